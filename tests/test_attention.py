"""The protocol that every attention type of the registry obeys: a new type is tested by being registered."""

import io
import warnings

import pytest
import torch
from conftest import NoFloat64

import train
from benchmarks.clocks import state_bytes
from config import resolve_device
from data.scoring import compare_with_teacher, token_nats
from kernels import launch
from model import ATTENTION, GPT, GPTConfig, matrices, param_groups, rotate
from sample import label_probabilities
from weights import read_checkpoint

TYPES = list(ATTENTION)
GLA_KEYS = dict(gla_gate_min=None), dict(gla_gate="scalar"), dict(gla_gate="fixed", gla_gate_min=None)
POSITIONS = ("learned", "rope", "none")


def make(name, dtype=torch.float64, **keys):
    """An attention of the given type in eval mode, its weights large enough that it does something."""
    config = GPTConfig(
        **(dict(block_size=64, vocab_size=50, n_layer=1, n_head=2, n_embd=32, attention_type=name) | keys)
    )
    attn = GPT(config).transformer.h[0].attn.to(dtype).eval()
    for p in attn.parameters():
        if p.dim() >= 2:
            torch.nn.init.normal_(p, std=0.3)
    return attn


def pieces(total, rng):
    """A random split of `total` tokens into parts of at least one."""
    cuts = sorted({0, total, *rng.integers(1, total, 4).tolist()})
    return [b - a for a, b in zip(cuts, cuts[1:])]


@pytest.mark.parametrize("pos_emb", POSITIONS)
@pytest.mark.parametrize("name", TYPES)
def test_step_equals_forward_over_any_split(name, pos_emb, fresh_rng):
    attn = make(name, pos_emb=pos_emb, block_size=160)
    for T in (1, 7, 64, 150):
        x = torch.randn(2, T, 32, dtype=torch.float64)
        expected, _ = attn(x)
        for split in ([T], [1] * T, pieces(T, fresh_rng) if T > 1 else [1]):
            state = attn.init_state(2, 160)
            found = []
            with torch.set_grad_enabled(bool(fresh_rng.integers(2))):  # models decode without gradients
                for part in x.split(split, 1):
                    y, state = attn.step(part, state)
                    found.append(y)
            torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("pos_emb", ("rope", "none"))
@pytest.mark.parametrize("name", TYPES)
def test_a_prompt_beyond_the_block_is_read_as_token_by_token(name, pos_emb, fresh_rng):
    keys = dict(span_init=1.0, softness_span_mask=40.0) if name == "adaptive_span" else {}  # beyond the block
    attn = make(name, pos_emb=pos_emb, block_size=16, **keys)
    x = torch.randn(2, 50, 32, dtype=torch.float64)
    expected = None
    for split in ([1] * 50, [50], pieces(50, fresh_rng)):
        state, found = attn.init_state(2, 16), []
        for part in x.split(split, 1):
            y, state = attn.step(part, state)
            found.append(y)
        expected = torch.cat(found, 1) if expected is None else expected
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", TYPES)
def test_devices_without_float64_train_score_and_decode(name, fresh_rng, monkeypatch):
    keys = dict(block_size=32, vocab_size=50, n_layer=2, n_head=2, n_embd=32, pos_emb="rope", attention_type=name)
    gpt, runtime = GPT(GPTConfig(**keys)), resolve_device("cpu", "float32", False)
    idx, scored = torch.randint(50, (2, 32)), torch.ones(2, 32, dtype=torch.bool)
    with NoFloat64(monkeypatch):
        gpt(idx, idx)[1].backward()
        nats = token_nats(gpt.eval(), idx, idx, scored, runtime)
        compare_with_teacher(gpt, gpt, [(idx, idx)], runtime)
        gpt.generate(idx, 3)
        gpt.flops(32)
        label_probabilities(gpt, idx[0].tolist(), 32, {"no": 0, "yes": 1}, runtime)
    logits = gpt(idx, idx)[0].double().flatten(0, 1)
    torch.testing.assert_close(nats, torch.nn.functional.cross_entropy(logits, idx.flatten(), reduction="sum").item())
    with pytest.raises(AssertionError, match="float64 on the device"), NoFloat64(monkeypatch):
        idx.double()


@pytest.mark.parametrize("pos_emb", POSITIONS)
@pytest.mark.parametrize("name", TYPES)
def test_strictly_causal_and_rows_apart(name, pos_emb, fresh_rng):
    """Around the ends of chunks and blocks too."""
    attn = make(name, pos_emb=pos_emb, block_size=160)
    x = torch.randn(2, 150, 32, dtype=torch.float64)
    y, _ = attn(x)
    for t in (0, 1, 17, 63, 64, 65, 149):
        edited = x.clone()
        edited[0, t:] += torch.randn(150 - t, 32, dtype=torch.float64)
        z, _ = attn(edited)
        torch.testing.assert_close(z[0, :t], y[0, :t], rtol=0, atol=1e-12)
        torch.testing.assert_close(z[1], y[1], rtol=0, atol=1e-12)
        if name != "none":
            assert (z[0, t] - y[0, t]).abs().max() > 1e-6, "the edited token has no effect at all"


@pytest.mark.parametrize("name", TYPES)
def test_gradients_reach_every_parameter(name, fresh_rng):
    """And every part of a fused projection, which the class names."""
    attn = make(name, block_size=160).train()
    x = torch.randn(2, 150, 32, dtype=torch.float64, requires_grad=True)
    y, penalty = attn(x)
    assert penalty.shape == () and penalty.dtype == torch.float32
    loss = (y * torch.randn_like(y)).sum() + penalty
    if not loss.requires_grad:
        assert name == "none" and not list(attn.parameters())
        return
    loss.backward()
    for pname, p in attn.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, pname
    assert x.grad.isfinite().all()
    if hasattr(attn, "c_attn"):
        parts = attn.c_attn.weight.grad.split(list(attn.parts.values()))
        assert all(rows.abs().max() > 0 for rows in parts), list(attn.parts)


@pytest.mark.parametrize("name", TYPES)
def test_parameters_of_masks_are_named(name):
    """They have a rate of their own and no decay: of a mask, what is no weight of a projection, norm or gate."""
    attn = make(name, gate_output=True) if "output gate" in ATTENTION[name].families else make(name)
    own = {n for n, _ in attn.named_parameters(recurse=False)}
    assert {*attn.mask_parameters} <= {n.split(".")[-1] for n in own | {"period", "ratio"}}
    if hasattr(attn, "log_mask") or hasattr(attn, "gate"):
        assert own <= {*attn.mask_parameters}


@pytest.mark.parametrize("name", [name for name in TYPES if name != "none"])
def test_dropout_acts_in_training(name, fresh_rng):
    attn = make(name, dropout=0.5).train()
    x = torch.randn(2, 32, 32, dtype=torch.float64)
    assert not torch.equal(attn(x)[0], attn(x)[0])


@pytest.mark.parametrize("name", TYPES)
def test_a_resumed_run_is_the_same_run(name, tiny, tmp_path):
    """Steps, a save, a load and more steps, and what the optimizer holds of each parameter."""
    sizes = dict(max_iters=4, lr_decay_iters=4, eval_interval=2, eval_iters=1, log_interval=1, attention_type=name)
    assert train.main(tiny(out_dir=str(tmp_path / "whole"), **sizes)) == 0
    assert train.main(tiny(out_dir=str(tmp_path / "parts"), **(sizes | dict(max_iters=2)))) == 0
    assert train.main(tiny(out_dir=str(tmp_path / "parts"), init_from="resume", **sizes)) == 0
    whole, parts = (read_checkpoint(str(tmp_path / folder), "ckpt.pt") for folder in ("whole", "parts"))
    assert all(torch.equal(w, parts["model"][n]) for n, w in whole["model"].items())
    groups = param_groups(GPT.from_checkpoint(str(tmp_path / "whole")))
    assert len(whole["optimizer"]["state"]) == sum(len(members) for members in groups.values())


@pytest.mark.parametrize("name", TYPES)
def test_eval_is_deterministic_and_free_of_penalty(name, fresh_rng):
    attn = make(name, dropout=0.5)
    x = torch.randn(2, 32, 32, dtype=torch.float64)
    (a, penalty), (b, _) = attn(x), attn(x)
    assert torch.equal(a, b) and penalty.item() == 0


@pytest.mark.parametrize("name", TYPES)
def test_a_state_holds_no_more_than_it_needs(name):
    """No view that keeps all tokens of a prompt in memory."""
    attn, stored = make(name, torch.float32, block_size=512), io.BytesIO()
    with torch.no_grad():
        _, state = attn.step(torch.randn(1, 500, 32), attn.init_state(1, 512))
        torch.save(state, stored)
    assert stored.tell() < state_bytes(state) + 25_000


@pytest.mark.parametrize("name", TYPES)
def test_compiles_without_a_break(name, fresh_rng):
    attn = make(name, torch.float32, pos_emb="rope").train()
    x = torch.randn(2, 64, 32)
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], attn(x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TYPES)
def test_operations_are_counted(name):
    attn = make(name)
    for T in (1, 16, 64):
        nominal, executed = attn.flops(T)
        assert isinstance(nominal, int) and isinstance(executed, int) and executed >= 0
        assert (nominal > 0) == (name != "none")
    assert name == "none" or attn.flops(64)[0] >= 3.9 * attn.flops(16)[0]


@pytest.mark.parametrize("name, keys", [*((name, {}) for name in TYPES), *(("gla", keys) for keys in GLA_KEYS)])
def test_executed_operations_are_those_of_the_products(name, keys, fresh_rng, products):
    """Of layers as initialised, whole chunks or not. `gated` counts its gates too, 1 in 64 of the rest, and the one
    product of `nsa` with its slots is nothing for many sequences."""
    for T in (1, 10, 63, 64, 65, 100, 256, 300):
        attn = ATTENTION[name](GPTConfig(block_size=T, n_head=2, n_embd=64, attention_type=name, **keys))
        x = torch.randn(min(16, max(1, 1024 // T)), T, 64)
        with torch.no_grad():
            ran = products(lambda: attn(x))  # noqa: B023
        ran -= 2 * x.size(0) * T * sum(w.numel() for w in matrices(attn))
        nominal, executed = attn.flops(T)
        assert x.size(0) * executed == pytest.approx(ran, rel=0.02), T
        if T in (64, 256):  # what is defined is a good part of what runs, and no more
            assert executed / 8 <= nominal <= 1.05 * executed, T


@pytest.mark.parametrize("name", TYPES)
def test_stats_are_tensors_and_change_nothing(name, fresh_rng):
    attn = make(name)
    x = torch.randn(2, 32, 32, dtype=torch.float64)
    before = attn(x)[0]
    for stats in (attn.stats(), attn.stats(x)):
        assert all(torch.is_tensor(v) and not v.requires_grad and v.isfinite().all() for v in stats.values())
    assert torch.equal(attn(x)[0], before)


@pytest.mark.parametrize("name", TYPES)
def test_bf16_autocast_is_close(name, fresh_rng):
    attn = make(name, torch.float32)
    x = torch.randn(2, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns where two precisions meet and take a slow path
        y, _ = attn(x)
    exact = attn(x)[0]
    assert (y.float() - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.parametrize("name", ["gla", "gsa", "deltanet", "gdn", "kda", "mamba2", "performer"])
@pytest.mark.parametrize("native, bound", [(False, 1e-3), (True, 1e-2)])
def test_autocast_leaves_recurrent_steps_alone(name, native, bound, fresh_rng, monkeypatch):
    """The states' arithmetic is in fp32 in either form: all that may differ is a rounding of the projections, and of
    the chunks' operands on a processor that multiplies bfloat16 itself."""
    monkeypatch.setattr(launch, "native_bfloat16", lambda: native)
    attn = make(name, torch.float32)
    x = torch.randn(2, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y, state, steps = attn(x)[0].float(), attn.init_state(2, 64), []
        for token in x.split(1, 1):
            z, state = attn.step(token, state)
            steps.append(z)
    assert (torch.cat(steps, 1).float() - y).norm() <= bound * y.norm()


def previous_token_loss(name, steps=300):
    """Train a one-layer model to name the token before the present one; returns its last loss in nats."""
    torch.manual_seed(0)
    V = 16
    config = GPTConfig(block_size=32, vocab_size=V, n_layer=1, n_head=2, n_embd=32, attention_type=name)
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        idx = torch.randint(V, (16, 32))
        targets = torch.cat((torch.full((16, 1), -1), idx[:, :-1]), 1)
        loss = model(idx, targets)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("name", [name for name in TYPES if name != "none"])
def test_learns_what_no_attention_cannot(name):
    none = previous_token_loss("none")
    assert none > 2.7  # log 16 = 2.77: it cannot look back
    assert previous_token_loss(name) < none - 1.0


@pytest.mark.parametrize("name", TYPES)
def test_positions_are_what_the_class_says(name, fresh_rng):
    torch.manual_seed(seed := int(fresh_rng.integers(2**31)))
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    outputs = []
    for pos_emb in ("rope", "none"):
        torch.manual_seed(seed)
        outputs.append(make(name, pos_emb=pos_emb)(x)[0])
    assert torch.equal(*outputs) != ATTENTION[name].positions
    config = GPTConfig(n_head=2, n_embd=32, vocab_size=50, n_layer=1, attention_type=name, pos_emb="rope")
    assert config.without_positions() == ([] if ATTENTION[name].positions else [name])


# what the types do, one by one


def test_softmax_window_slides_over_a_long_stream(fresh_rng):
    """The ring of max_len keys, against dense attention with an explicit window; rotary keys are turned on the way."""
    for pos_emb in ("rope", "none"):
        attn, L, T = make("softmax", pos_emb=pos_emb), 8, 61
        x = torch.randn(2, T, 32, dtype=torch.float64)
        q, k, v = (t.transpose(1, 2) for t in attn._qkv(x, 0))
        distance = torch.arange(T)[:, None] - torch.arange(T)
        logits = (q @ k.mT / 4).masked_fill((distance < 0) | (distance >= L), -torch.inf)
        expected = attn._project((logits.softmax(-1) @ v).transpose(1, 2), x)
        for split in ([1] * T, [3, 20, 1, 1, 30, 6], [T]):
            state = attn.init_state(2, L)
            found = [attn.step(part, state)[0] for part in x.split(split, 1)]
            torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-9)


def test_rotary_logits_depend_on_the_distance_alone(fresh_rng):
    q, k = torch.randn(2, 2, 1, 1, 16, dtype=torch.float64).unbind(1)  # (B, T, H, D)
    logit = lambda i, j: (rotate(q, i, 10000.0) * rotate(k, j, 10000.0)).sum(-1)  # noqa: E731
    torch.testing.assert_close(logit(5, 2), logit(1003, 1000), rtol=0, atol=1e-10)
    torch.testing.assert_close(logit(4, 4), (q * k).sum(-1), rtol=0, atol=1e-12)
    pair = torch.view_as_complex(torch.stack((q[0, 0, 0, :8], q[0, 0, 0, 8:]), -1))
    turned = torch.view_as_complex(torch.stack(rotate(q, 3, 10000.0)[0, 0, 0].chunk(2), -1))
    angle = 3 * 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    torch.testing.assert_close(turned, pair * torch.polar(torch.ones_like(angle), angle), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gate", ["scalar", "fixed"])
def test_gates_of_a_head(gate, fresh_rng):
    """gla_gate: the layer against its T x T form and its steps, and a gradient for every weight."""
    config = GPTConfig(block_size=150, n_head=2, n_embd=64, gla_n_head=4, attention_type="gla", gla_gate=gate)
    attn = ATTENTION["gla"](config).double()
    x = torch.randn(2, 150, 64, dtype=torch.float64)
    y = attn(x)[0]
    q, k, v, g, r = attn._inputs(x)
    assert g.shape == (2, 150, 4)
    if gate == "fixed":
        assert torch.allclose(g.exp(), 1 - 2.0 ** (-5.0 - torch.arange(4.0, dtype=torch.float64)), atol=1e-7)
    b = g.cumsum(1).transpose(1, 2)  # (B, H, T)
    decay = (b.unsqueeze(-1) - b.unsqueeze(-2)).exp().tril()
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * decay / q.size(3) ** 0.5
    o = torch.einsum("bhij,bjhv->bihv", scores, v)
    assert torch.allclose(attn._project(o, r), y, atol=1e-10)
    state, steps = attn.init_state(2, 150), []
    for piece in x.split((1, 2, 17, 64, 66), 1):
        z, state = attn.step(piece, state)
        steps.append(z)
    assert torch.allclose(torch.cat(steps, 1), y, atol=1e-10)
    y.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in attn.parameters() if p is not attn.c_proj.bias)
