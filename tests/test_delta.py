"""The gated delta rule: the chunked form against the loop in float64, the loop against fla-core's definitions."""

import pytest
import torch
from test_gla import GPU, INTERPRETED, fla_naive, interpret
from torch.nn import functional as F

from kernels import delta as D
from kernels.delta import delta, delta_recurrent
from kernels.gla import gla_recurrent
from kernels.launch import Kernel

NAMES = ("o", "state", "dq", "dk", "dv", "dbeta", "dstate", "dg")
EXACT, FP32 = (1e-10,) * 8, (1e-5, 1e-5, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 2e-4)
BF16 = (5e-3, 5e-3, 8e-3, 8e-3, 8e-3, 8e-3, 8e-3, 1e-2)
GATES = {  # name: of each head or channel, log-decays of a shape
    "none": ("head", lambda shape: None),
    "head weak": ("head", lambda shape: F.logsigmoid(torch.randn(shape)) / 16),
    "head strong": ("head", lambda shape: -(torch.rand(shape) ** 4) * 50),
    "head decades": ("head", lambda shape: -(10.0 ** torch.empty(shape).uniform_(-5, 2))),
    "head -inf": ("head", lambda shape: torch.where(torch.rand(shape) < 0.2, -float("inf"), -1e-3)),
    "channel": ("channel", lambda shape: -2 * torch.rand(shape)),
    "channel decades": ("channel", lambda shape: -(10.0 ** torch.empty(shape).uniform_(-5, 2))),
}


def draw(T, K=16, V=20, gates="head weak", B=2, H=3):
    """q, k, v, beta, initial state, g, then the gradients of both outputs, in float64."""
    kind, make = GATES[gates]
    q, k = (F.normalize(torch.randn(B, T, H, K), dim=-1) for _ in range(2))
    g = make((B, T, H, K) if kind == "channel" else (B, T, H))
    xs = (q, k, torch.randn(B, T, H, V), 2 * torch.rand(B, T, H), torch.randn(B, H, K, V), g)
    return [x if x is None else x.double() for x in (*xs, torch.randn(B, T, H, V), torch.randn(B, H, K, V))]


def run(inputs, backend, dtype=torch.float64, gate_min=None, device="cpu"):
    """Both outputs and the gradients in float64. beta, gates and states are fp32 beside inputs of bf16."""
    *xs, do, dstate = inputs
    kinds = [torch.float32 if dtype == torch.bfloat16 and i > 2 else dtype for i in range(6)]
    xs = [x if x is None else x.to(device, kind).requires_grad_() for x, kind in zip(xs, kinds)]
    q, k, v, beta, state, g = xs
    o, last = delta(q, k, v, beta, g, None, gate_min, state, True, backend)
    loss = (o.double() * do.to(device)).sum() + (last.double() * dstate.to(device)).sum()
    return [x.detach().double().cpu() for x in (o, last, *torch.autograd.grad(loss, [x for x in xs if x is not None]))]


def agree(found, wanted, tolerances):
    for name, x, y, limit in zip(NAMES, found, wanted, tolerances):
        assert x.isfinite().all(), name
        ratio = float((x - y).norm() / y.norm().clamp(min=1e-300))
        assert ratio <= limit or float((x - y).abs().max()) <= min(1e-6, limit), f"{name}: {ratio:.1e}"


def compare(inputs, gate_min=None):
    wanted = run(inputs, "recurrent", gate_min=gate_min)
    agree(run(inputs, "torch", gate_min=gate_min), wanted, EXACT)
    agree(run(inputs, "torch", torch.float32, gate_min), wanted, FP32)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("T", [1, 15, 64, 65, 200])
def test_lengths_and_gates(T, gates):
    compare(draw(T, gates=gates), -1.25 if GATES[gates][0] == "channel" else None)


@pytest.mark.parametrize("K, V", [(1, 1), (16, 96), (60, 32), (128, 64)])
def test_widths(K, V):
    for gates, gate_min in (("none", None), ("head strong", -20.0), ("channel", -5.0)):
        compare(draw(130, K, V, gates, 1, 2), gate_min)


def test_several_segments(monkeypatch):
    monkeypatch.setattr(D, "SEGMENT", 2 * 2 * 3 * 64)
    compare(draw(300))
    compare(draw(300, gates="channel"), -5.0)


def test_the_loop_against_public_definitions():
    q, k, v, beta, state, g, *_ = draw(70, gates="head weak")
    naive = fla_naive("ops", "gated_delta_rule", "naive.py").naive_recurrent_gated_delta_rule
    xs = [x.float() for x in (q, k, v, beta, g)]
    o, last = naive(*xs, scale=0.3, initial_state=state.float(), output_final_state=True)
    found = delta_recurrent(q, k, v, beta, g, 0.3, None, state)
    agree([x.double() for x in (o, last)], found, (1e-5, 1e-5))
    g = -torch.rand(q.shape).double()
    naive = fla_naive("ops", "kda", "naive.py").naive_recurrent_kda
    xs = [x.float() for x in (q, k, v, g, beta)]
    o, last = naive(*xs, scale=0.3, initial_state=state.float(), output_final_state=True)
    agree([x.double() for x in (o, last)], delta_recurrent(q, k, v, beta, g, 0.3, None, state), (1e-5, 1e-5))


def test_reductions():
    """Gates of 0 are none; alike ones in all channels are a head's; orthogonal keys have nothing to correct."""
    q, k, v, beta, state, g, *ends = draw(100)
    plain = run([q, k, v, beta, state, None, *ends], "torch")
    agree(run([q, k, v, beta, state, 0 * g, *ends], "torch"), plain, EXACT[:7])
    wide = g.unsqueeze(-1).expand(q.shape)
    mild = run([q, k, v, beta, state, wide, *ends], "torch", gate_min=-1.25)
    agree(mild[:7], run([q, k, v, beta, state, g.clamp(min=-1.25), *ends], "torch")[:7], EXACT)
    k = torch.eye(40).double().view(1, 40, 1, 40)
    q, v, beta = torch.randn(1, 40, 1, 40).double(), torch.randn(1, 40, 1, 8).double(), torch.rand(1, 40, 1).double()
    torch.testing.assert_close(delta(q, k, v, beta)[0], gla_recurrent(q, k, v * beta.unsqueeze(-1))[0])


@pytest.mark.parametrize("gates", ["none", "head strong", "channel"])
def test_strictly_causal_and_handed_over(gates):
    q, k, v, beta, state, g, *_ = draw(150, gates=gates)
    low = -1.25 if gates == "channel" else None

    def call(cut=slice(None), state=state):
        xs = [x if x is None else x[:, cut] for x in (q, k, v, beta, g)]
        return delta(*xs, None, low, state, True)

    whole, last = call()
    for t in (1, 64, 100):
        first, middle = call(slice(0, t))
        rest, end = call(slice(t, None), middle)
        agree((torch.cat((first, rest), 1), end), (whole, last), EXACT)
    edited = v.clone()
    edited[:, 90] += 1
    after = delta(q, k, edited, beta, g, None, low, state)[0]
    assert torch.equal(after[:, :64], whole[:, :64]) and not torch.equal(after[:, 90:], whole[:, 90:])
    agree([after[:, :90]], [whole[:, :90]], EXACT)


def test_clamp_autocast_and_two_backward_passes():
    q, k, v, beta, state, g, *_ = draw(20, gates="channel")
    g = g.requires_grad_()
    dg = torch.autograd.grad(delta(q, k, v, beta, g, None, -1.0, state)[0].sum(), g)[0]
    assert (dg[g < -1.0] == 0).all() and (dg[g > -1.0] != 0).any()
    xs = [x.float().requires_grad_() for x in draw(70, 20)[:4]]  # a scale that is no power of two
    with torch.autocast("cpu", torch.bfloat16):
        o = delta(*xs)[0]
        assert o.dtype == torch.bfloat16
    rounded = [x.detach().bfloat16().double() for x in xs[:3]]
    wanted = delta_recurrent(*rounded, xs[3].detach().double())[0]
    assert (o.double() - wanted).norm() < 2e-3 * wanted.norm()  # the error of rounding the output
    first, second = (torch.autograd.grad(o.float().sum(), xs, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_opcheck_and_one_graph():
    q, k, v, beta, state, g, *_ = (x if x is None else x.float() for x in draw(70, 8, 8, B=1, H=2))
    tensors = [x.requires_grad_() for x in (q, k, v, beta, g, state)]
    torch.library.opcheck(D.delta_op, (*tensors, 0.5, None, "torch"))
    compiled = torch.compile(lambda *xs: delta(*xs)[0], backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v, beta, g), delta(q, k, v, beta, g)[0])


@pytest.mark.parametrize(
    "want, change",
    [
        ("beta must be (1, 5, 2)", lambda q: dict(beta=q[..., :2])),
        ("g must be (1, 5, 2) or (1, 5, 2, 4)", lambda q: dict(g=q[:, :4])),
        ("gate_min must be at most 0", lambda q: dict(gate_min=0.5)),
        ("initial_state must be (1, 2, 4, 4)", lambda q: dict(initial_state=q)),
        ("backend must be auto, triton, torch or recurrent", lambda q: dict(backend="cuda")),
    ],
)
def test_errors_name_the_argument(want, change):
    q = torch.randn(1, 5, 2, 4)
    with pytest.raises(ValueError) as error:
        delta(**(dict(q=q, k=q, v=q, beta=q[..., 0]) | change(q)))
    assert want in str(error.value) and "\n" not in str(error.value)


# ----------------------------------------------------------------------------- Triton

FORMS = [("none", None), ("head weak", None), ("head strong", -20.0), ("channel", -1.25), ("channel decades", None)]


def compare_triton(inputs, gate_min, dtype=torch.float32, device="cpu"):
    inputs = [x if x is None else x.to(dtype).double() for x in inputs]
    wanted = run(inputs, "recurrent", gate_min=gate_min)
    agree(run(inputs, "triton", dtype, gate_min, device), wanted, BF16 if dtype == torch.bfloat16 else FP32)


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_triton_under_the_interpreter(which):
    interpret(__file__, which)


@INTERPRETED
@pytest.mark.parametrize("gates, gate_min", FORMS)
def test_interpreted(gates, gate_min):
    compare_triton(draw(70, 20, 24, gates, 1, 2), gate_min)


@INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize("gates, gate_min", [*FORMS, ("head decades", None), ("head -inf", None), ("channel", -5.0)])
@pytest.mark.parametrize("T, K, V", [(1, 16, 16), (64, 32, 16), (200, 16, 48)])
def test_interpreted_shapes(T, K, V, gates, gate_min):
    compare_triton(draw(T, K, V, gates, 1, 1), gate_min)


@INTERPRETED
def test_interpreted_keys_that_are_all_the_same():
    """The inverse is the hardest where every pair counts in full: its powers grow to 2^63."""
    inputs = draw(64, 16, 16, "none", 1, 1)
    inputs[1] = inputs[1][:, :1].expand_as(inputs[1]).clone()
    compare_triton(inputs, None)


@INTERPRETED
@pytest.mark.slow
def test_interpreted_tiles(monkeypatch):
    """Heads wider than a tile, in both directions, with a rest."""
    for kernel in (*D.KERNELS.values(), *D.G.KERNELS.values()):
        tiles = dict.fromkeys(kernel.tiles, 16)
        monkeypatch.setattr(kernel, "configs", [dict(**tiles, num_warps=4, num_stages=1)])
        monkeypatch.setattr(kernel, "fp32", None)
        monkeypatch.setattr(kernel, "runs", {})
    for gates, gate_min in FORMS:
        compare_triton(draw(65, 40, 24, gates, 1, 1), gate_min)


@INTERPRETED
def test_interpreted_launches(monkeypatch):
    """Three kernels forward, seven backward."""
    count, launch = [], Kernel.launch
    monkeypatch.setattr(Kernel, "launch", lambda self, *args, **kw: (count.append(self), launch(self, *args, **kw)))
    run(draw(20, B=1, H=1), "triton", torch.float32)
    assert len(count) == 3 + 7


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gates, gate_min", [*FORMS, ("channel", -5.0)])
@pytest.mark.parametrize("T, K, V", [(1, 16, 16), (100, 64, 64), (256, 60, 96), (1000, 128, 128), (130, 256, 192)])
def test_on_a_gpu(T, K, V, gates, gate_min, dtype):
    compare_triton(halved(draw(T, K, V, gates, 1, 3)), gate_min, dtype, "cuda")


def halved(inputs):
    """With beta in (0, 1), as the papers have it."""
    inputs[3] = inputs[3] / 2
    return inputs


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name, i", [(name, i) for name in D.KERNELS for i in range(len(D.KERNELS[name].configs))])
def test_every_configuration_on_a_gpu(name, i, width, monkeypatch):
    kernel = D.KERNELS[name]
    monkeypatch.setitem(D.KERNELS, name, Kernel(kernel.function, [kernel.configs[i]], kernel.tiles))
    for gates, gate_min in FORMS:
        compare_triton(halved(draw(200, width, width, gates, 2, 3)), gate_min, torch.bfloat16, "cuda")
