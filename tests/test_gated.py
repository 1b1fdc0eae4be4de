"""Gates: on pairs after the softmax (`gated`), and on the heads' output (`gate_output`)."""

import math

import pytest
import torch
from test_gla import GPU, INTERPRETED, interpret
from torch.nn import functional as F

import kernels.gated
from kernels.gated import FLOOR, KERNELS, executed_pairs, gated
from kernels.launch import Kernel
from model import GPT, GPTConfig, param_groups

TINY = dict(block_size=32, vocab_size=50, n_layer=1, n_head=3, n_embd=24)


def make(dtype=torch.float64, **keys):
    attn = GPT(GPTConfig(**(TINY | dict(attention_type="gated") | keys))).transformer.h[0].attn.to(dtype).eval()
    for p in attn.parameters():
        if p.dim() >= 2:
            torch.nn.init.normal_(p, std=0.5)
    return attn


def random_inputs(B, T, H, D, V, dtype=torch.float64):
    """Gates on both sides of 0 and of 1, some exactly 0 and some pairs exactly 1."""
    q, k, v = (torch.randn(B, T, H, d, dtype=dtype) for d in (D, D, V))
    a, b = (1.5 * torch.randn(B, T, H, dtype=dtype) for _ in range(2))
    a[:, ::3], b[:, ::3], b[:, 1::4] = 1.0, 1.0, 0.0
    return [x.requires_grad_() for x in (q, k, v, a, b)]


def by_loops(q, k, v, a, b):
    """o and the penalty, pair by pair."""
    (B, T, H, D), o, shared = q.shape, torch.zeros_like(v), []
    for n in range(B):
        for t in range(T):
            gates = torch.zeros(H, t + 1, dtype=q.dtype)
            for h in range(H):
                p = torch.softmax(torch.stack([q[n, t, h] @ k[n, s, h] / math.sqrt(D) for s in range(t + 1)]), 0)
                for s in range(t + 1):
                    gates[h, s] = min(1.0, max(0.0, a[n, t, h] * b[n, s, h]))
                    o[n, t, h] += gates[h, s] * p[s] * v[n, s, h]
            shared += [sum(max(FLOOR, gates[h, s].item()) ** 0.6 for h in range(H)) ** (1 / 0.6) for s in range(t + 1)]
    return o, sum(shared) / len(shared)


@pytest.mark.parametrize("backend", ["dense", "torch"])
def test_both_forms_equal_the_equations(backend, fresh_rng):
    inputs = [x.detach() for x in random_inputs(1, 8, 2, 3, 4)]
    o, penalty = gated(*inputs, backend=backend)
    want, shared = by_loops(*inputs)
    torch.testing.assert_close(o, want, rtol=0, atol=1e-13)
    assert penalty.item() == pytest.approx(shared, rel=1e-12)
    assert gated(*inputs, penalise=False, backend=backend)[1] == 0


@pytest.mark.parametrize("T", [1, 37, 200, 700])
def test_executed_pairs_are_those_of_the_products(T, fresh_rng, products):
    inputs = [x.detach() for x in random_inputs(1, T, 4, 8, 8)]
    assert products(lambda: gated(*inputs)) == 4 * 8 * 4 * executed_pairs(T, 4)


@pytest.mark.parametrize("rows, segment", [(64, 2**18), (64, 1), (5, 1), (5, 300), (16, 1600)])
@pytest.mark.parametrize("shape", [(2, 1, 1, 3, 3), (3, 37, 4, 8, 8), (2, 64, 2, 16, 5), (5, 11, 8, 1, 1)])
def test_tiles_equal_the_dense_form(shape, rows, segment, fresh_rng, monkeypatch):
    """Outputs, penalty and all gradients, for tiles of any size, also such as begin behind a block's first query."""
    monkeypatch.setitem(kernels.gated.ROWS, "cpu", rows)
    monkeypatch.setitem(kernels.gated.SEGMENT, "cpu", segment)
    inputs, found = random_inputs(*shape), []
    weight = torch.randn(*shape[:3], shape[4], dtype=torch.float64)
    for backend in ("dense", "torch"):
        o, penalty = gated(*inputs, backend=backend)
        found.append((o, penalty, *torch.autograd.grad((o * weight).sum() + 10 * penalty, inputs)))
    for dense, blocks in zip(*found):
        torch.testing.assert_close(blocks, dense, rtol=0, atol=1e-12)
        assert dense.abs().max() > 0 or shape[1] == 1


def test_fp32_and_one_output_alone(fresh_rng):
    inputs = random_inputs(2, 48, 3, 8, 8)
    single = [x.detach().float().requires_grad_() for x in inputs]
    for pick in (lambda o, p: o.sum(), lambda o, p: p):
        exact = torch.autograd.grad(pick(*gated(*inputs, backend="dense")), inputs, allow_unused=True)
        found = torch.autograd.grad(pick(*gated(*single)), single)
        for want, have in zip(exact, found):
            want = torch.zeros_like(have) if want is None else want.float()
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gated(*single)[0], gated(*inputs, backend="dense")[0].float(), rtol=0, atol=2e-6)


@pytest.mark.slow
def test_the_op_obeys_the_rules_of_torch_library(fresh_rng):
    inputs = random_inputs(2, 7, 2, 3, 3)
    torch.library.opcheck(kernels.gated.gated_op, (*inputs, 0.5, True, "torch"))


@pytest.mark.parametrize("backend", ["dense", "torch"])
def test_gates_of_zero_are_harmless(backend, fresh_rng):
    """Shut gates, the usual state: finite gradients, none for the gates, also of one that the floor has just left."""
    inputs = random_inputs(2, 12, 3, 4, 4)
    q, k, v, a, b = inputs
    for close in (0.0, -1.0, 1e-9):
        a = torch.full_like(a, close, requires_grad=True)
        b = torch.ones_like(b, requires_grad=True)
        o, penalty = gated(q, k, v, a, b, backend=backend)
        grads = torch.autograd.grad(o.square().sum() + penalty, (q, k, v, a, b))
        assert all(g.isfinite().all() for g in grads)
        assert penalty < 1e-4 and (close > 0 or not o.any())
        assert close != 0.0 or grads[3].abs().max() == 0  # o is 0 there, and below the floor the penalty is flat
    o, _ = gated(q, k, v, torch.zeros_like(a).requires_grad_(), b, backend=backend)
    assert torch.autograd.grad(o.sum(), a, allow_unused=True)[0] is None


def test_penalty_prefers_one_head_to_a_pair():
    """One open gate costs 1, two half open ones 2^(1/0.6) / 2, two open ones 2^(1/0.6): its limits by hand."""
    q = torch.zeros(1, 1, 2, 1, dtype=torch.float64)
    cost = lambda *gates: gated(q, q, q, torch.tensor([[gates]]).double(), torch.ones(1, 1, 2).double())[1].item()  # noqa: E731
    assert cost(1, 0) == pytest.approx(1, rel=1e-3)
    assert cost(0.5, 0.5) == pytest.approx(0.5 * 2 ** (1 / 0.6))
    assert cost(1, 1) == pytest.approx(2 ** (1 / 0.6)) == pytest.approx(cost(7, 3))
    assert cost(0, 0) < 1e-4


def test_wrong_shapes_are_named():
    q, a = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4)
    for arguments, message in (
        ((q, q, q[:1], a, a), "v must be"),
        ((q, q[..., :2], q, a, a), "k must have"),
        ((q, q, q, a[:, :2], a), "a must be"),
        ((q, q, q, a, a.long()), "b must be"),
        ((q[0], q, q, a, a), "q must be"),
    ):
        with pytest.raises(ValueError, match=message):
            gated(*arguments)
    with pytest.raises(ValueError, match="backend must be"):
        gated(q, q, q, a, a, backend="cuda")


# the layers


@pytest.mark.parametrize("pos_emb", ["learned", "rope"])
def test_open_gates_are_softmax_attention(pos_emb, fresh_rng):
    """w = 0, beta = 1: the layer as it begins, forward, step and penalty; and it learns from there."""
    attn, softmax = (GPT(GPTConfig(**TINY, attention_type=n, pos_emb=pos_emb)) for n in ("gated", "softmax"))
    attn, softmax = (m.transformer.h[0].attn for m in (attn, softmax))
    missing, unexpected = attn.load_state_dict(softmax.state_dict(), strict=False)
    assert sorted(missing) == ["gate", "gate_bias"] and not unexpected
    x = torch.randn(2, 32, 24)
    want = softmax(x)[0]
    torch.testing.assert_close(attn(x)[0], want, rtol=0, atol=1e-6)
    torch.testing.assert_close(attn.step(x, attn.init_state(2, 32))[0], want, rtol=0, atol=1e-6)
    attn.reg = 0.1
    y, penalty = attn(x)
    assert penalty.item() == pytest.approx(0.1 * 3 ** (1 / 0.6), rel=1e-5)  # three heads share all pairs
    (y.square().sum() + penalty).backward()
    assert attn.gate.grad.abs().max() > 0 and attn.gate_bias.grad.abs().max() > 0


def test_gates_multiply_what_softmax_gives(fresh_rng):
    """The layer against its docstring, head by head, with a ring that has come round."""
    attn, T, L = make(pos_emb="none"), 21, 8
    x = torch.randn(2, T, 24, dtype=torch.float64)
    q, k, v = (t.unflatten(-1, (3, 8)) for t in attn.c_attn(x).chunk(3, -1))
    a, b = (
        torch.einsum("btc,hc->bth", x, w) / math.sqrt(24) + beta for w, beta in zip(attn.gate, attn.gate_bias.chunk(2))
    )
    for width in (L, T):
        y = torch.zeros(2, T, 24, dtype=torch.float64)
        for t in range(T):
            past = slice(max(0, t + 1 - width), t + 1)
            for h in range(3):
                p = torch.softmax(torch.einsum("bd,bsd->bs", q[:, t, h], k[:, past, h]) / math.sqrt(8), -1)
                gate = (a[:, t, h, None] * b[:, past, h]).clamp(0, 1)
                o = torch.einsum("bs,bsd->bd", p * gate, v[:, past, h])
                y[:, t] += o @ attn.c_proj.weight[:, 8 * h : 8 * h + 8].T
        state = attn.init_state(2, width)
        steps = [attn.step(part, state)[0] for part in x.split([5, 1, 1, 7, 4, 3], 1)]
        torch.testing.assert_close(torch.cat(steps, 1), y, rtol=0, atol=1e-10)
        if width == T:
            torch.testing.assert_close(attn(x)[0], y, rtol=0, atol=1e-10)
            attn.gate.data.zero_()
            assert (y - attn(x)[0]).abs().max() > 0.1  # open gates are something else


def test_values_and_output_of_norm_one(fresh_rng):
    """gated_unit_norm: the scale of W_v and W_o is irrelevant, that of W_q is not."""
    attn, x = make(gated_unit_norm=True, qkv_bias=True), torch.randn(2, 16, 24, dtype=torch.float64)
    y = attn(x)[0]
    plain = make(qkv_bias=True)
    plain.load_state_dict(attn.state_dict())
    with torch.no_grad():
        plain.c_attn.weight[48:] /= plain.c_attn.weight[48:].norm(dim=1, keepdim=True)
        plain.c_proj.weight /= plain.c_proj.weight.norm(dim=0)
        torch.testing.assert_close(y, plain(x)[0], rtol=0, atol=1e-12)
        attn.c_attn.weight[48:] *= 3
        attn.c_proj.weight *= torch.rand(24) + 0.5
        torch.testing.assert_close(attn(x)[0], y, rtol=0, atol=1e-12)
        attn.c_attn.weight[:24] *= 2
        assert (attn(x)[0] - y).abs().max() > 1e-3


def test_gates_are_masks_with_their_own_rate():
    names = {name.split(".")[-1] for name, _ in param_groups(GPT(GPTConfig(**TINY, attention_type="gated")))["mask"]}
    assert names == {"gate", "gate_bias"}


def test_stats_name_the_gates(fresh_rng):
    attn = make()
    with torch.no_grad():
        torch.nn.init.normal_(attn.gate, std=3.0)
        attn.gate[:, 1], attn.gate_bias[1] = 0.0, -1.0  # a head whose gates are all shut
        attn.gate[:, 2], attn.gate_bias[2::3] = 0.0, 0.5
    stats = attn.stats(torch.randn(2, 10, 24, dtype=torch.float64))
    assert stats["dead"].tolist() == [False, True, False]
    assert stats["gate_zero"][1] == 1 and stats["gate"][1] == 0 and 0 < stats["gate_zero"][0] < 1
    assert stats["gate"][2] == pytest.approx(0.25, abs=1e-6) and stats["gate_zero"][2] == 0
    assert stats["attention_map"][2].sum(-1).sub(0.25).abs().max() < 1e-6
    assert stats["first_token"][2] == pytest.approx(0.25 * softmax_first(attn, 2), abs=0.1)


def softmax_first(attn, h):
    """The weight of a uniform first token among 1 .. 10 keys: weights here are small, so that p is nearly that."""
    return sum(1 / t for t in range(1, 11)) / 10


# gates on the output


GATED = ["softmax", "adaptive_span", "mask_mix", "gated", "gsa", "performer", "nsa"]


@pytest.mark.parametrize("kind", ["elementwise", "headwise"])
@pytest.mark.parametrize("name", GATED)
def test_output_gates_compose_with_each_type(name, kind, fresh_rng):
    """Open, they change nothing; in between, forward and step agree and the gate's parameters learn."""
    keys = dict(TINY, n_head=2, attention_type=name, pos_emb="rope")
    plain = GPT(GPTConfig(**keys)).transformer.h[0].attn.double().eval()
    attn = GPT(GPTConfig(**keys, gate_output=True, gate_output_kind=kind, gate_output_bias_init=40.0))
    attn = attn.transformer.h[0].attn.double().eval()
    missing, unexpected = attn.load_state_dict(plain.state_dict(), strict=False)
    assert sorted(missing) == ["output_gate.bias", "output_gate.weight"] and not unexpected
    rows = 24 if kind == "elementwise" else 2
    rows = rows if name != "gsa" or kind == "elementwise" else 1  # of its own head count
    assert attn.output_gate.weight.shape == (rows, 24)
    x = torch.randn(2, 32, 24, dtype=torch.float64)
    torch.testing.assert_close(attn(x)[0], plain(x)[0], rtol=0, atol=1e-6)
    torch.nn.init.normal_(attn.output_gate.weight)
    torch.nn.init.normal_(attn.output_gate.bias)
    y = attn(x)[0]
    assert (y - plain(x)[0]).abs().max() > 0.1 * y.abs().max()
    state, found = attn.init_state(2, 32), []
    for part in x.split([20, 1, 11], 1):
        z, state = attn.step(part, state)
        found.append(z)
    torch.testing.assert_close(torch.cat(found, 1), y, rtol=0, atol=1e-9)
    y.square().sum().backward()
    assert attn.output_gate.weight.grad.abs().max() > 0 and attn.output_gate.bias.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["elementwise", "headwise"])
def test_output_gate_by_the_formula(kind, fresh_rng):
    attn = make(attention_type="gated_output", gate_output_kind=kind, gate_output_bias_init=0.3, pos_emb="none")
    x = torch.randn(2, 32, 24, dtype=torch.float64)
    q, k, v = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in attn.c_attn(x).chunk(3, -1))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
    gate = torch.sigmoid(x @ attn.output_gate.weight.T + attn.output_gate.bias)
    gate = gate.unflatten(-1, (3, 8)) if kind == "elementwise" else gate.unsqueeze(-1)  # (B, T, H, D or 1)
    want = (y.transpose(1, 2) * gate).flatten(2) @ attn.c_proj.weight.T
    torch.testing.assert_close(attn(x)[0], want, rtol=0, atol=1e-12)
    mean = gate.mean((0, 1, 3))
    torch.testing.assert_close(attn.stats(x)["output_gate"], mean)


def test_gate_output_on_softmax_is_gated_output():
    a = GPT(GPTConfig(**TINY, gate_output=True)).state_dict()
    b = GPT(GPTConfig(**TINY, attention_type="gated_output")).state_dict()
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    extra = set(b) - set(GPT(GPTConfig(**TINY)).state_dict())
    assert extra == {"transformer.h.0.attn.output_gate.weight", "transformer.h.0.attn.output_gate.bias"}


# ----------------------------------------------------------------------------- Triton

TOLERANCES = {torch.float32: (1e-5, 1e-5) + (1e-4,) * 5, torch.bfloat16: (5e-3, 1e-4) + (8e-3,) * 5}


def compare_triton(shape, dtype=torch.float32, device="cpu"):
    """Against the dense form in float64, on inputs rounded as the kernels read them."""
    kinds = [dtype] * 3 + [torch.float32] * 2  # gates keep their precision
    inputs = [x.detach().to(kind) for x, kind in zip(random_inputs(*shape), kinds)]
    weight = torch.randn(*shape[:3], shape[4]).to(dtype)
    for penalise in (True, False):
        found = []
        for backend, place, kind in (("dense", "cpu", torch.float64), ("triton", device, None)):
            xs = [x.to(place, kind or x.dtype, copy=True).requires_grad_() for x in inputs]
            o, penalty = gated(*xs, penalise=penalise, backend=backend)
            loss = (o.double() * weight.to(place).double()).sum() + 10 * penalty
            found.append([o, penalty, *torch.autograd.grad(loss, xs)])
        names = ("o", "penalty", "dq", "dk", "dv", "da", "db")
        for name, wanted, x, limit in zip(names, *found, TOLERANCES[dtype]):
            error = (x.detach().double().cpu() - wanted.detach()).norm()
            assert error <= limit * wanted.norm() or error <= 1e-6, f"{name}, penalise={penalise}: {error:.1e}"


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_triton_under_the_interpreter(which):
    interpret(__file__, which)


@INTERPRETED
def test_interpreted(fresh_rng):
    compare_triton((2, 70, 3, 20, 24))


@INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1, 8, 8), (2, 64, 2, 16, 5), (1, 130, 5, 40, 16), (3, 33, 1, 1, 1)])
def test_interpreted_shapes(shape, fresh_rng):
    compare_triton(shape)


@INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize("queries, keys", [(16, 64), (64, 16)])
def test_interpreted_tiles(queries, keys, fresh_rng, monkeypatch):
    for kernel in KERNELS.values():
        monkeypatch.setattr(kernel, "configs", [dict(BQ=queries, BS=keys, num_warps=4, num_stages=1)])
        monkeypatch.setattr(kernel, "fp32", None)
        monkeypatch.setattr(kernel, "runs", {})
    compare_triton((1, 100, 2, 16, 16))


@INTERPRETED
def test_interpreted_is_causal(fresh_rng):
    inputs = [x.detach().float() for x in random_inputs(1, 90, 2, 16, 16)]
    before = gated(*inputs, backend="triton")[0]
    for i in (1, 2, 4):
        inputs[i][:, 60] += 1
    after = gated(*inputs, backend="triton")[0]
    assert torch.equal(after[:, :60], before[:, :60]) and not torch.equal(after[:, 60:], before[:, 60:])


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(2, 100, 3, 64, 64), (1, 1000, 4, 128, 96), (2, 1, 1, 16, 16)])
def test_on_a_gpu(shape, dtype, fresh_rng):
    compare_triton(shape, dtype, "cuda")


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name, i", [(name, i) for name in KERNELS for i in range(len(KERNELS[name].configs))])
def test_every_configuration_on_a_gpu(name, i, width, fresh_rng, monkeypatch):
    kernel = KERNELS[name]
    monkeypatch.setitem(KERNELS, name, Kernel(kernel.function, [kernel.configs[i]]))
    compare_triton((2, 200, 3, width, width), torch.bfloat16, "cuda")
