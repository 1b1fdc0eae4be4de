"""Under autocast an operator does what it does with q, k and v cast by hand, and nothing else changes: bit for bit."""

import pytest
import torch
from test_random_models import OPERATORS, fill, some_index
from torch.utils._pytree import tree_leaves

from model import GPT, GPTConfig

SIZES = dict(B=2, H=2, D=8, V=8, M=8, R=2, P=2, Q=2, W=9, F=11, T=80, S=80, N=19)
OPTIONS = dict(
    nsa_window=dict(window=16),
    nsa_selected=dict(select_block=8),
    nsa_compressed=dict(block=8, stride=4, select_block=8, select_count=4),
)
FORMS = [(kind, "auto") for kind in OPERATORS] + [("distance", "dense"), ("gated", "dense"), ("nsa_selected", "gather")]
FORMS += [(kind, "recurrent") for kind in ("gla", "gsa", "performer")]


@pytest.mark.parametrize("kind, backend", FORMS)
def test_operators_leave_autocast(kind, backend, fresh_rng):
    """The ops also in their backward pass, inside the region; the other forms are PyTorch's to differentiate."""
    operator, _, shapes, *_ = OPERATORS[kind]
    options = OPTIONS.get(kind, {}) | ({} if kind in ("nsa_window", "nsa_compressed") else dict(backend=backend))
    if kind in ("gla", "gsa", "performer"):
        options |= dict(output_final_state=True)
    if kind == "nsa_selected":
        options |= dict(index=some_index(2, 80, 2, 4, 8, 0))
    names = {name: [SIZES[c] for c in dims] for name, dims in shapes.items() if name not in ("hk", "hv", "prefix")}
    values = {name: fill(name, torch.randn(shape)) for name, shape in names.items()}
    lowered, found = ("v",) if kind == "performer" else ("q", "k", "v"), []
    for autocast in (False, True):
        leaves = {name: x.clone().requires_grad_() for name, x in values.items()}
        given = {n: x if autocast or n not in lowered else x.bfloat16() for n, x in leaves.items()}
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = [x for x in tree_leaves(operator(**given, **options)) if torch.is_tensor(x) and x.is_floating_point()]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast and backend == "auto"):
            sum((x.float() * torch.randn(x.shape)).sum() for x in out).backward()
        found.append([*out, *(x.grad for x in leaves.values())])
    for a, b in zip(*found):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_masks_keep_their_digits(fresh_rng):
    keys = dict(
        block_size=64, vocab_size=20, n_layer=1, n_head=2, n_embd=16, mask_mix_candidates="window_9,every_3,first_2"
    )
    attn = GPT(GPTConfig(**keys, attention_type="mask_mix")).transformer.h[0].attn
    torch.nn.init.normal_(attn.alpha)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attn.log_mask(64)
    assert all(torch.equal(a, b) for a, b in zip(inside, attn.log_mask(64)))


def test_a_gated_step_scores_in_float32(fresh_rng):
    keys = dict(block_size=64, vocab_size=20, n_layer=1, n_head=2, n_embd=16, attention_type="gated")
    attn = GPT(GPTConfig(**keys)).transformer.h[0].attn
    q, k = (3 * torch.randn(2, 2, 2, 5, 8)).bfloat16()
    v, x = torch.cat((torch.randn(2, 2, 5, 8), torch.ones(2, 2, 5, 1)), -1), torch.randn(2, 5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        p, _ = attn._gated_map(x, q, k, v.bfloat16(), None)
    logits = (q.double() @ k.double().mT / 8**0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(p.double(), logits.softmax(-1), rtol=0, atol=1e-5)
