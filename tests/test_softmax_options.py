"""Softmax attention with fewer heads of keys and values, with a window, with normed queries and keys."""

import math
import time
from unittest import mock

import pytest
import torch
from test_attention import make, pieces
from torch.nn import functional as F

from kernels import causal
from model import ATTENTION, GPT, GPTConfig, load_weights

OPTIONS = [
    dict(n_kv_head=1),
    dict(n_kv_head=2, n_head=4),
    dict(window=1),
    dict(window=9),
    dict(window=64),
    dict(qk_norm=True),
    dict(n_kv_head=1, window=20, qk_norm=True),
]


def by_hand(attn, x, H, Hk, window, pos_emb):
    """Dense attention of one sequence, head by head, from the layer's weights."""
    D, T = attn.d_head, x.size(1)
    q, k, v = attn.c_attn(x[0]).split([H * D, Hk * D, Hk * D], -1)
    out = []
    for h in range(H):
        qh, g = q[:, h * D : (h + 1) * D], h // (H // Hk)
        kh, vh = (z[:, g * D : (g + 1) * D] for z in (k, v))
        if attn.ln_q is not None:
            qh, kh = (
                z / (z.square().mean(1, keepdim=True) + 1e-5).sqrt() * w
                for z, w in ((qh, attn.ln_q.weight), (kh, attn.ln_k.weight))
            )
        if pos_emb == "rope":
            angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(D // 2, dtype=torch.float64) * 2 / D)
            turn = torch.polar(torch.ones_like(angle), angle)
            qh, kh = (torch.complex(*z.chunk(2, 1)) * turn for z in (qh, kh))
            logits = (qh @ kh.conj().T).real
        else:
            logits = qh @ kh.T
        far = torch.arange(T)[:, None] - torch.arange(T)
        logits = (logits / math.sqrt(D)).masked_fill((far < 0) | (far >= (window or T)), -torch.inf)
        out.append(logits.softmax(-1) @ vh)
    return attn.c_proj(torch.cat(out, 1))


@pytest.mark.parametrize("pos_emb", ["rope", "none"])
@pytest.mark.parametrize("keys", OPTIONS, ids=str)
def test_options_are_their_definitions(keys, pos_emb, fresh_rng):
    """Forward, gradients, every way to decode, the map, and operations."""
    attn = make("softmax", block_size=64, pos_emb=pos_emb, **keys)
    for p in attn.parameters():
        p.data += 0.2 * torch.randn_like(p) if p.dim() == 1 else 0
    H, window = keys.get("n_head", 2), keys.get("window", 0)
    x = torch.randn(1, 50, 32, dtype=torch.float64, requires_grad=True)
    wanted = by_hand(attn, x, H, keys.get("n_kv_head", H), window, pos_emb)[None]
    found = attn(x)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    leaves, weights = [x, *attn.parameters()], torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), leaves) for y in (found, wanted))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * (1 + float(b.abs().max())))
    for split in ([50], [1] * 50, pieces(50, fresh_rng)):
        state = attn.init_state(1, 64)
        steps = [attn.step(part, state)[0] for part in x.split(split, 1)]
        torch.testing.assert_close(torch.cat(steps, 1), wanted, rtol=0, atol=1e-9)
        assert state.k.shape[1:3] == (keys.get("n_kv_head", H), 2 * min(64, window or 64))
    seen = attn.stats(x)["attention_map"] > 0
    assert seen.sum().item() == H * sum(min(t + 1, window or 64) for t in range(50))
    nominal, executed = attn.flops(50)
    assert nominal == 4 * H * attn.d_head * sum(min(t + 1, window or 64) for t in range(50)) <= executed


def test_operations_of_a_window_follow_it(products, fresh_rng):
    for window in (16, 64, 1000):
        attn = ATTENTION["softmax"](GPTConfig(block_size=512, n_head=2, n_embd=64, window=window))
        x = torch.randn(2, 512, 64)
        with torch.no_grad():
            ran = products(lambda: attn(x)) - 2 * 2 * 512 * 4 * 64 * 64  # noqa: B023
        assert 2 * attn.flops(512)[1] == pytest.approx(ran, rel=0.02)
    costs = [ATTENTION["softmax"](GPTConfig(n_head=2, n_embd=64, window=w)).flops(4096)[1] for w in (64, 512, 0)]
    assert 4 * costs[0] < costs[1] < costs[2] / 3


def test_training_time_falls_with_the_window():
    def seconds(window):
        attn, best = ATTENTION["softmax"](GPTConfig(block_size=4096, n_head=2, n_embd=64, window=window)), math.inf
        x = torch.randn(1, 4096, 64)
        for _ in range(3):
            start = time.perf_counter()
            attn(x)[0].sum().backward()
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(64) < 0.5 * seconds(0)


def test_one_key_head_is_many_with_the_same_weights(fresh_rng):
    few, many = make("softmax", n_head=4, n_kv_head=2), make("softmax", n_head=4)
    q, k, v = few.c_attn.weight.data.split([32, 16, 16])
    k, v = (w.view(2, 8, 32).repeat_interleave(2, 0).flatten(0, 1) for w in (k, v))
    many.c_attn.weight.data = torch.cat((q, k, v))
    many.c_proj.weight.data = few.c_proj.weight.data
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    torch.testing.assert_close(few(x)[0], many(x)[0], rtol=0, atol=1e-10)


def test_without_options_the_names_and_rows_are_nanogpts():
    names = {n for n, _ in ATTENTION["softmax"](GPTConfig(n_head=2, n_embd=32, bias=True)).named_parameters()}
    assert names == {"c_attn.weight", "c_attn.bias", "c_proj.weight", "c_proj.bias"}
    assert GPTConfig().n_kv_head == GPTConfig().window == 0 and not GPTConfig().qk_norm


def test_rows_are_copied_where_shapes_agree():
    keys = dict(block_size=8, n_layer=1, n_head=4, n_embd=32, vocab_size=8)
    whole, few = (GPT(GPTConfig(**keys, n_kv_head=n)) for n in (0, 2))
    name = "transformer.h.0.attn.c_attn.weight"
    report = load_weights(few, whole.state_dict(), whole.config)
    assert name + "[q]" in report.copied and name + "[k,v]" in report.left
    assert torch.equal(few.state_dict()[name][:32], whole.state_dict()[name][:32])
    nsa = GPT(GPTConfig(**keys, attention_type="nsa", nsa_kv_head=2))  # keys and values of as many heads
    report = load_weights(nsa, few.state_dict(), few.config)
    assert name + "[q,kv_compressed,kv_selected,kv_window]" in report.copied
    assert torch.equal(nsa.state_dict()[name][32:64], few.state_dict()[name][32:])


def test_options_of_softmax_leave_its_relatives_alone(fresh_rng):
    """In a mixture, the window and the shared heads are those of the softmax layers."""
    keys = dict(block_size=32, n_layer=3, n_head=2, n_embd=32, vocab_size=11, n_kv_head=1, window=4, qk_norm=True)
    gpt = GPT(GPTConfig(attention_type="softmax,adaptive_span,gated", **keys)).double().eval()
    layers = [block.attn for block in gpt.transformer.h]
    assert [attn.n_kv for attn in layers] == [1, 2, 2] and [attn.window for attn in layers] == [4, 0, 0]
    assert all(attn.ln_q is not None for attn in layers)
    idx = torch.randint(11, (2, 32))
    whole, state = gpt(idx, idx)[0], gpt.init_state(2)
    steps = [gpt.step(part, state)[0] for part in idx.split([7, 1, 24], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "keys, want",
    [
        (dict(n_kv_head=3, n_head=4), "n_head=4 is not a multiple of n_kv_head=3"),
        (dict(n_kv_head=8, n_head=4), "n_head=4 is not a multiple of n_kv_head=8"),
        (dict(attention_type="gla", window=4), "window belongs to attention_type=softmax|gated_output"),
        (dict(attention_type="gla", qk_norm=True), "qk_norm belongs to attention_type=softmax|adaptive_span|"),
    ],
)
def test_wrong_options_are_refused(keys, want):
    with pytest.raises(ValueError) as caught:
        GPTConfig(**(dict(n_head=2, n_embd=32) | keys))
    assert want in str(caught.value)


@pytest.mark.parametrize("T, D, low", [(64, 16, False), (100, 32, False), (260, 64, True)])
def test_short_sequences_in_bfloat16_are_computed_in_float32(T, D, low, fresh_rng):
    """Their outputs and gradients then are float32's, rounded once; longer ones are coarser."""
    inputs = [torch.randn(2, heads, T, D, dtype=torch.bfloat16).requires_grad_() for heads in (4, 2, 2)]
    exact, weight = [x.detach().double().requires_grad_() for x in inputs], torch.randn(2, 4, T, D).bfloat16()
    with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as attention:
        y, z = causal(*inputs), causal(*exact)
    assert [call.args[0].dtype for call in attention.call_args_list][0] == (torch.bfloat16 if low else torch.float32)
    found, wanted = torch.autograd.grad(y, inputs, weight), torch.autograd.grad(z, exact, weight.double())
    for a, b in zip((y, *found), (z, *wanted)):
        assert a.dtype == torch.bfloat16
        assert 5e-4 < (a.double() - b).norm() / b.norm() < (2e-2 if low else 2.5e-3)  # a rounding: at most 2^-9


def test_bfloat16_stays_where_nothing_is_trained():
    q = torch.randn(2, 3, 20, 8, dtype=torch.bfloat16)
    for grad in (True, False):
        x = q.clone().requires_grad_(grad)
        with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as attention:
            causal(x, q, q)
            with torch.no_grad():
                causal(x, q, q)
        types = [call.args[0].dtype for call in attention.call_args_list]
        assert types == [torch.float32 if grad else torch.bfloat16, torch.bfloat16]


def test_a_model_of_shapes_alone():
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=10)).to("meta")
    assert model(torch.zeros(1, 8, dtype=torch.long, device="meta"))[0].shape == (1, 1, 10)
