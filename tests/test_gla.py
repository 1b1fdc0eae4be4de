"""Gated linear attention: every form against the oracle, the oracle against fla-core's definition."""

import importlib.util
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import kernels
from kernels import gla as G, launch
from kernels.gla import gla, gla_recurrent
from kernels.launch import Kernel

NAMES = ("o", "state", "dq", "dk", "dv", "dg", "dh0")
EXACT = (1e-10,) * 7
FP32 = (1e-5, 1e-5, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4)
TRITON_FP32 = (1e-5, 1e-5, 1e-4, 1e-4, 1e-4, 2e-4, 1e-4)
BF16 = (5e-3, 5e-3, 5e-3, 5e-3, 5e-3, 1e-2, 5e-3)
INTERPRETED = pytest.mark.skipif(not kernels.interpreting(), reason="runs inside test_triton_under_the_interpreter")
GPU = pytest.mark.skipif(not torch.cuda.is_available() or kernels.triton is None, reason="needs a GPU and Triton")


@pytest.fixture(autouse=True)
def fresh_seed():
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)  # shown when a test fails
    torch.manual_seed(seed)


def constant(value):
    return lambda *shape: torch.full(shape, value, dtype=torch.float64)


def logsigmoid(normalizer):
    return lambda *shape: torch.nn.functional.logsigmoid(torch.randn(shape, dtype=torch.float64)) / normalizer


def blocks(*shape):
    """Stretches of 32 tokens at -50 beside stretches at -1e-3."""
    strong = (torch.arange(shape[1]) // 32 % 2 == 0).view(1, -1, 1, 1).expand(shape)
    return torch.where(strong, -50.0, -1e-3).double()


def decades(*shape):
    return -50 * 10 ** (-5 * torch.rand(shape, dtype=torch.float64))


GATES = {
    "weak": logsigmoid(16),
    "plain": logsigmoid(1),
    "strong": logsigmoid(0.1),
    "blocks": blocks,
    "decades": decades,
    "coin": lambda *shape: torch.where(torch.rand(shape) < 0.5, -50.0, -1e-3).double(),
    **{f"{x:g}": constant(x) for x in (0, -1e-4, -5, -8, -12, -20)},
}


def draw(B, T, H, K, V, gates="plain"):
    """q, k, v, g, the initial state and the two gradients that come in, all fp64."""
    shapes = (B, T, H, K), (B, T, H, K), (B, T, H, V)
    q, k, v = (torch.randn(x, dtype=torch.float64) for x in shapes)
    h0, dstate = torch.randn(2, B, H, K, V, dtype=torch.float64)
    return [q, k, v, GATES[gates](B, T, H, K), h0, torch.randn_like(v), dstate]


def run(inputs, dtype, backend, device="cpu", **kwargs):
    """o, the state, and every gradient. States stay in fp32 where the rest is bf16."""
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    q, k, v, g, h0, do, dstate = inputs
    leaves = [x.to(device, dtype, copy=True).requires_grad_() for x in (q, k, v)]
    leaves += [x.to(device, wide, copy=True).requires_grad_() for x in (g, h0)]
    o, state = gla(*leaves[:4], initial_state=leaves[4], output_final_state=True, backend=backend, **kwargs)
    assert o.dtype == dtype and state.dtype == wide
    grads = torch.autograd.grad((o, state), leaves, (do.to(o), dstate.to(state)))
    return [x.detach().double().cpu() for x in (o, state, *grads)]


def agree(found, wanted, tolerances):
    for name, x, ref, tolerance in zip(NAMES, found, wanted, tolerances, strict=True):
        assert x.shape == ref.shape and torch.isfinite(x).all(), name
        if (x - ref).abs().max() > 1e-6 or tolerance < 1e-6:
            error = ((x - ref).norm() / ref.norm().clamp(min=1e-30)).item()
            assert error <= tolerance or (x - ref).abs().max() < 1e-14, f"{name}: {error:.1e} above {tolerance:.0e}"


def compare(inputs, dtype, tolerances, backend="torch", device="cpu", **kwargs):
    wanted = run(inputs, torch.float64, "recurrent", **kwargs)
    agree(run(inputs, dtype, backend, device, **kwargs), wanted, tolerances)


# ----------------------------------------------------------------------------- chunked PyTorch against the oracle


@pytest.mark.parametrize("gate_min", [-1.25, None])
@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65, 100, 256])
def test_lengths(T, gate_min):
    inputs = draw(1, T, 3, 24, 20)
    compare(inputs, torch.float64, EXACT, gate_min=gate_min)
    compare(inputs, torch.float32, FP32, gate_min=gate_min)


@pytest.mark.parametrize("K, V", [(16, 32), (60, 64), (96, 192), (1, 1), (256, 16)])
def test_widths(K, V):
    for gate_min in (-1.25, None):
        compare(draw(1, 70, 1, K, V), torch.float32, FP32, gate_min=gate_min)


@pytest.mark.parametrize("gates", GATES)
def test_gates(gates):
    inputs = draw(1, 150, 3, 32, 16, gates)
    compare(inputs, torch.float64, EXACT)
    compare(inputs, torch.float32, FP32)
    compare(inputs, torch.float32, FP32, gate_min=-1.25)
    compare(inputs, torch.float32, FP32, gate_min=-5.0)


@pytest.mark.slow
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("K, V", [(16, 192), (32, 128), (60, 60), (64, 64), (128, 96)])
@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65, 100, 256, 1000])
def test_grid(T, K, V, gates):
    inputs = draw(1, T, 1 if T == 1000 else 3, K, V, gates)
    for gate_min in (-1.25, None):
        wanted = run(inputs, torch.float64, "recurrent", gate_min=gate_min)
        agree(run(inputs, torch.float64, "torch", gate_min=gate_min), wanted, EXACT)
        agree(run(inputs, torch.float32, "torch", gate_min=gate_min), wanted, FP32)


def test_several_segments_and_row_groups(monkeypatch):
    """Borders between segments and between groups of batch rows, both with a ragged rest."""
    monkeypatch.setattr(G, "SEGMENT", 2 * 2 * 64)
    for B, groups, parts in ((5, 3, 5), (1, 1, 3)):
        q = torch.empty(B, 300, 2, 8)
        assert len(G.row_groups(q, 64)) == groups and len(G.segments(q, 64)) == parts
        inputs = draw(B, 300, 2, 8, 12)
        for gate_min in (-1.25, None):
            compare(inputs, torch.float64, EXACT, gate_min=gate_min)


def test_chunk_size_does_not_matter():
    q, k, v, g, h0, do, dstate = draw(2, 150, 1, 16, 24)
    for gate_min in (-0.5, None):
        found = []
        for chunk in (16, 32, 64, 128):
            o, state, borders = G.chunk_forward(q, k, v, g, h0, 0.3, gate_min, chunk)
            grads = G.chunk_backward(q, k, v, g, borders, do, dstate, 0.3, gate_min, chunk)
            found.append((o, state, *grads))
        for other in found[1:]:
            agree(other, found[0], EXACT)


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("gate_min", [-1.25, -2.0, None])
def test_products_are_counted(gate_min, scalar, products):
    for T in (1, 10, 64, 300):
        q, k, v, g = (torch.randn(2, T, 3, D) for D in (16, 16, 20, 16))
        g = g[..., 0] if scalar else g
        found = products(lambda: gla(q, k, v, -g.exp(), gate_min=gate_min))  # noqa: B023
        assert found == 2 * G.operations(T, 3, 16, 20, gate_min, scalar)[1]


def test_gradcheck():
    """Against differences, not against the oracle's autograd."""
    q, k, v, g, h0, _, _ = draw(1, 6, 2, 3, 2)
    leaves = [x.requires_grad_() for x in (q, k, v, g, h0)]
    for gate_min in (-1.25, None):  # differences must not cross the clamp
        safe = [x if x is not g else g.detach().clamp(min=-1.0).requires_grad_() for x in leaves]

        def f(q, k, v, g, h0):
            return gla(q, k, v, g, None, gate_min, h0, True, "torch")  # noqa: B023

        assert torch.autograd.gradcheck(f, safe)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("T, K, V", [(17, 16, 32), (64, 96, 24), (300, 64, 64)])
def test_bf16(T, K, V, gates, native, monkeypatch):
    """With products in fp32 and in bf16, which the processor decides."""
    monkeypatch.setattr(launch, "native_bfloat16", lambda: native)
    inputs = [x.bfloat16().double() for x in draw(2, T, 3, K, V, gates)]
    for gate_min in (-1.25, None):
        compare(inputs, torch.bfloat16, BF16, gate_min=gate_min)


@pytest.mark.parametrize("gates", GATES)
def test_one_gate_for_all_channels(gates, monkeypatch):
    """g (B, T, H): as the same gate in each channel, whose gradient is their sum."""
    monkeypatch.setattr(launch, "native_bfloat16", lambda: True)
    for gate_min in (-1.25, -5.0, None):
        for T, K, V in ((1, 8, 8), (63, 24, 20), (150, 16, 32)):
            q, k, v, g, *rest = draw(2, T, 3, K, V, gates)
            inputs = q, k, v, g[..., 0], *rest
            wanted = run((q, k, v, g[..., :1].expand_as(g), *rest), torch.float64, "recurrent", gate_min=gate_min)
            wanted[5] = wanted[5].sum(-1)
            agree(run(inputs, torch.float64, "recurrent", gate_min=gate_min), wanted, EXACT)
            agree(run(inputs, torch.float64, "torch", gate_min=gate_min), wanted, EXACT)
            agree(run(inputs, torch.float32, "torch", gate_min=gate_min), wanted, FP32)
        q, k, v, g, *rest = (x.bfloat16().double() for x in draw(2, 150, 4, 64, 64, gates))
        compare((q, k, v, g[..., 0], *rest), torch.bfloat16, BF16, gate_min=gate_min)


@pytest.mark.parametrize("gate_min", [-1.25, None])
def test_products_of_bf16_follow_the_processor(gate_min, operand_types):
    q, k, v, g = (x.bfloat16() for x in draw(1, 128, 2, 16, 16)[:4])
    for native, wanted in ((True, "c10::BFloat16"), (False, "float")):
        assert operand_types(lambda: gla(q, k, v, g.float(), gate_min=gate_min), native) == {wanted}


# ----------------------------------------------------------------------------- the oracle


def fla_naive(*path):
    spec = importlib.util.find_spec("fla")
    file = Path(*spec.submodule_search_locations, *path) if spec else None
    if file is None or not file.exists():
        message = "fla-core is not installed"
        pytest.fail(message) if os.environ.get("NANO_REQUIRE_ORACLES") == "1" else pytest.skip(message)
    spec = importlib.util.spec_from_file_location("fla_naive", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("gates", ["weak", "strong", "decades"])
@pytest.mark.parametrize("backend", ["recurrent", "torch"])
def test_public_reference(backend, gates):
    naive = fla_naive("ops", "gla", "naive.py").naive_recurrent_gla
    inputs = draw(2, 75, 3, 24, 40, gates)
    leaves = [x.float().requires_grad_() for x in inputs[:5]]
    o, state = naive(*leaves[:4], initial_state=leaves[4], output_final_state=True)
    grads = torch.autograd.grad((o, state), leaves, [x.float() for x in inputs[5:]])
    found = run(inputs, torch.float32, backend)
    agree(found, [x.detach().double() for x in (o, state, *grads)], FP32)


def test_oracle_by_hand():
    """Two tokens, one head, one channel: o = scale * q (e^g (e^g0 h + k0 v0) + k1 v1)."""
    q, k, v = (torch.tensor(x).view(1, 2, 1, 1).double() for x in ([2.0, 3.0], [5.0, 7.0], [11.0, 13.0]))
    g = torch.tensor([0.5, 0.25]).log().view(1, 2, 1, 1).double()
    o, state = gla_recurrent(q, k, v, g, 0.1, None, torch.full((1, 1, 1, 1), 4.0).double())
    assert o.flatten().tolist() == pytest.approx([0.2 * (2 + 55), 0.3 * (57 / 4 + 91)])
    assert state.item() == pytest.approx(57 / 4 + 91)


# ----------------------------------------------------------------------------- properties


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
@pytest.mark.parametrize("gate_min", [-1.25, None])
def test_strictly_causal(backend, gate_min):
    inputs = draw(1, 90, 2, 8, 8)[:4]
    o, _ = gla(*inputs, gate_min=gate_min, backend=backend)
    for t in (0, 1, 31, 32, 63, 64, 89):
        for i in range(4):
            edited = [x.clone() for x in inputs]
            edited[i][:, t] -= 0.3
            moved = (gla(*edited, gate_min=gate_min, backend=backend)[0] - o).abs().amax((0, 2, 3))
            assert moved[:t].max() <= 1e-13 if t else True
            assert moved[t:].max() > 1e-6 or (i == 3 and t == 0)  # without a state the first gate decays nothing


def test_state_is_handed_over_at_every_split():
    q, k, v, g, h0, _, _ = draw(2, 70, 1, 8, 8)
    for gate_min in (-1.25, None):
        o, last = gla(q, k, v, g, None, gate_min, h0, True)
        for t in range(1, 70):
            a, state = gla(*(x[:, :t] for x in (q, k, v, g)), None, gate_min, h0, True)
            b, state = gla(*(x[:, t:] for x in (q, k, v, g)), None, gate_min, state, True)
            assert torch.allclose(torch.cat([a, b], 1), o, 1e-12, 1e-12) and torch.allclose(state, last, 1e-12, 1e-12)


def test_decoding_token_by_token():
    q, k, v, g, h0, _, _ = draw(2, 70, 1, 8, 8)
    o, last = gla(q, k, v, g, None, None, h0, True)
    state, steps = h0, []
    for t in range(70):
        step, state = gla_recurrent(*(x[:, t : t + 1] for x in (q, k, v, g)), initial_state=state)
        steps.append(step)
    assert torch.allclose(torch.cat(steps, 1), o, 1e-12, 1e-12) and torch.allclose(state, last, 1e-12, 1e-12)


def test_no_decay():
    q, k, v, g, h0, _, _ = draw(2, 100, 2, 16, 8, "0")
    for backend in ("torch", "recurrent"):
        o, state = gla(q, k, v, None, initial_state=h0, output_final_state=True, backend=backend)
        wanted = torch.tril(torch.einsum("bihk,bjhk->bhij", q, k)) / 4
        wanted = torch.einsum("bhij,bjhv->bihv", wanted, v) + torch.einsum("bihk,bhkv->bihv", q, h0) / 4
        assert torch.allclose(o, wanted) and torch.allclose(state, h0 + torch.einsum("bihk,bihv->bhkv", k, v))


def test_clamp_stops_the_gradient_below():
    g = torch.tensor([-3.0, -1.25, -0.5, -1.2500001]).view(1, 4, 1, 1).requires_grad_()
    q, k, v = torch.randn(3, 1, 4, 1, 1)
    for backend in ("torch", "recurrent"):
        o, _ = gla(q, k, v, g, gate_min=-1.25, initial_state=torch.randn(1, 1, 1, 1), backend=backend)
        dg = torch.autograd.grad(o.sum(), g)[0].flatten()
        assert dg[0] == 0 and dg[3] == 0 and dg[1] != 0 and dg[2] != 0, backend


def test_non_contiguous():
    inputs = draw(2, 70, 3, 16, 24)
    strided = [torch.stack([x, x], -1)[..., 0].transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    strided[5] = inputs[5][:, :1, :1].expand_as(inputs[5])  # as the gradient of a sum arrives
    inputs[5] = strided[5].contiguous()
    assert not any(x.is_contiguous() for x in strided[:4])
    leaves = [x.detach().requires_grad_() for x in strided[:5]]
    o, state = gla(*leaves[:4], initial_state=leaves[4], output_final_state=True)
    grads = torch.autograd.grad((o, state), leaves, strided[5:])
    agree([x.detach() for x in (o, state, *grads)], run(inputs, torch.float64, "recurrent"), EXACT)


def test_two_backward_passes():
    leaves = [x.requires_grad_() for x in draw(1, 100, 2, 16, 16)[:4]]
    o, _ = gla(*leaves)
    do = torch.randn_like(o)
    first = torch.autograd.grad(o, leaves, do, retain_graph=True)
    second = torch.autograd.grad(o, leaves, do)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("used", [0, 1])
def test_an_unused_output_has_no_gradient(used):
    """None comes in for it: the gradients are those of the other alone, for o and for the state."""
    inputs = draw(1, 70, 2, 8, 8)
    found = []
    for backend in ("torch", "recurrent"):
        leaves = [x.clone().requires_grad_() for x in inputs[:5]]
        out = gla(*leaves[:4], initial_state=leaves[4], output_final_state=True, backend=backend)[used]
        grads = torch.autograd.grad(out, leaves, inputs[5 + used], allow_unused=True)
        found.append([torch.zeros_like(x) if dx is None else dx for x, dx in zip(leaves, grads)])
    for a, b in zip(*found):
        assert torch.allclose(a, b, 1e-10, 1e-12)


def test_inputs_are_left_alone():
    inputs = draw(1, 70, 2, 8, 8)
    before = [x.clone() for x in inputs]
    run(inputs, torch.float64, "torch", gate_min=-1.25)
    run(inputs, torch.float64, "torch")
    leaves = [x.requires_grad_() for x in inputs[:5]]
    o, state = gla(*leaves[:4], initial_state=leaves[4], output_final_state=True)
    torch.autograd.backward((o, state), inputs[5:])
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_autocast():
    """Products in bf16, gates and states in fp32; the same numbers as with bf16 inputs."""
    q, k, v, g, h0, _, _ = (x.float() for x in draw(1, 70, 2, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        o, state = gla(q, k, v, g, initial_state=h0, output_final_state=True)
    wanted, _ = gla(q.bfloat16(), k.bfloat16(), v.bfloat16(), g, initial_state=h0)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32 and torch.equal(o, wanted)


# ----------------------------------------------------------------------------- the op


@pytest.mark.parametrize("gate_min", [-1.25, None])
def test_compiles_in_one_graph(gate_min):
    inputs = draw(2, 100, 2, 16, 8)
    leaves = [x.float().requires_grad_() for x in inputs[:5]]

    def f(q, k, v, g, h0):
        o, state = gla(q * 2, k, v, g, gate_min=gate_min, initial_state=h0, output_final_state=True)
        return (o * o).sum() + state.sum()

    wanted = torch.autograd.grad(f(*leaves), leaves)
    torch._dynamo.reset()
    found = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, 1e-4, 1e-4)


def test_opcheck():
    q, k, v, g, h0, _, _ = (x.float() for x in draw(1, 70, 2, 8, 4))
    tensors = [x.requires_grad_() for x in (q, k, v, g, h0)]
    for gate_min in (-1.25, None):
        torch.library.opcheck(G.gla_op, (*tensors, 0.5, gate_min, "torch"))


@pytest.mark.parametrize(
    "name, bad",
    [
        ("q", dict(q=torch.zeros(2, 3, 4))),
        ("q", dict(q=torch.zeros(1, 0, 1, 4), k=torch.zeros(1, 0, 1, 4))),
        ("k", dict(k=torch.zeros(1, 5, 1, 3))),
        ("v", dict(v=torch.zeros(1, 4, 1, 3))),
        ("v", dict(v=torch.zeros(1, 5, 1, 3, dtype=torch.long))),
        ("g", dict(g=torch.zeros(1, 5, 1, 1))),
        ("gate_min", dict(gate_min=1.0)),
        ("initial_state", dict(initial_state=torch.zeros(1, 1, 3, 4))),
        ("backend", dict(backend="cuda")),
    ],
)
def test_errors_name_the_argument(name, bad):
    good = dict(q=torch.zeros(1, 5, 1, 4), k=torch.zeros(1, 5, 1, 4), v=torch.zeros(1, 5, 1, 3))
    gla(**good)
    with pytest.raises(ValueError, match=rf"^gla: {name} ") as error:
        gla(**good | bad)
    assert "\n" not in str(error.value)


def test_a_fallback_says_its_reason_once():
    if kernels.interpreting():
        pytest.skip("the interpreter runs Triton on a CPU")
    q = torch.randn(1, 5, 1, 4)
    kernels._said.clear()
    with pytest.warns(UserWarning, match="gla runs its PyTorch form: Triton"):
        o, _ = gla(q, q, q, backend="triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(gla(q, q, q, backend="triton")[0], o)


def test_works_without_triton():
    code = """if True:
        import sys
        sys.modules["triton"] = None
        import torch, kernels
        from kernels.gla import gla
        assert kernels.triton is None
        q = torch.randn(1, 5, 1, 4, requires_grad=True)
        gla(q, q, q)[0].sum().backward()
        assert q.grad.isfinite().all()
    """
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True, timeout=300)


# ----------------------------------------------------------------------------- Triton


def interpret(path, which):
    """The tests of a file marked INTERPRETED, in a process whose kernels run on the CPU."""
    if kernels.triton is None:
        pytest.skip("Triton is not installed")
    if kernels.interpreting():
        pytest.skip("already inside")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        "-k",
        "interpreted",
        "-m",
        which,
        path,
    ]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=Path(__file__).parent.parent, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout, result.stdout[-4000:]


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_triton_under_the_interpreter(which):
    interpret(__file__, which)


@INTERPRETED
@pytest.mark.parametrize("gate_min", [-1.25, None])
@pytest.mark.parametrize("T, gates", [(70, "plain"), (130, "decades")])
def test_interpreted(T, gates, gate_min):
    inputs = draw(1, T, 1, 20, 24, gates)
    compare(inputs, torch.float32, TRITON_FP32, "triton", gate_min=gate_min)
    inputs[3] = inputs[3][..., 0]  # one gate for all channels
    compare(inputs, torch.float32, TRITON_FP32, "triton", gate_min=gate_min)


@INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize("gate_min", [-1.25, None])
@pytest.mark.parametrize("T, K, V, gates", [(1, 16, 16, "plain"), (64, 32, 16, "weak"), (70, 20, 40, "strong")])
def test_interpreted_shapes(T, K, V, gates, gate_min):
    compare(draw(1, T, 2, K, V, gates), torch.float32, TRITON_FP32, "triton", gate_min=gate_min)


@INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize("gates", ["blocks", "coin", "-20", "-8", "0"])
def test_interpreted_gates(gates):
    inputs = draw(1, 67, 1, 16, 16, gates)
    compare(inputs, torch.float32, TRITON_FP32, "triton")
    inputs[3] = inputs[3][..., 0]  # one gate for all channels
    compare(inputs, torch.float32, TRITON_FP32, "triton")


@INTERPRETED
@pytest.mark.slow
def test_interpreted_tiles(monkeypatch):
    """Heads wider than a tile, in both directions, with a rest."""
    for kernel in G.KERNELS.values():
        monkeypatch.setattr(kernel, "configs", [dict(BK=16, BV=16, num_warps=4, num_stages=1)])
        monkeypatch.setattr(kernel, "runs", {})
    for gate_min in (-1.25, None):
        inputs = draw(1, 65, 1, 40, 24)
        compare(inputs, torch.float32, TRITON_FP32, "triton", gate_min=gate_min)
        inputs[3] = inputs[3][..., 0]
        compare(inputs, torch.float32, TRITON_FP32, "triton", gate_min=gate_min)


@INTERPRETED
@pytest.mark.parametrize("gates, L", [("plain", 2), ("decades", 1)])
def test_interpreted_groups(gates, L, monkeypatch):
    """Chunks walked over in groups at a time, the last of which is shorter, forward and backward."""
    monkeypatch.setattr(G, "group_length", lambda *sizes: L)
    inputs = draw(1, 300, 1, 16, 20, gates)
    compare(inputs, torch.float32, TRITON_FP32, "triton", gate_min=-1.25)
    inputs[3] = inputs[3][..., 0]  # one gate for all channels
    compare(inputs, torch.float32, TRITON_FP32, "triton")


def test_groups_fill_a_gpu(monkeypatch):
    """The walks of few heads over many chunks are cut; those of many heads, and short ones, are not."""
    monkeypatch.setattr(G, "multiprocessors", lambda device: 132)
    lengths = {(512, 8): 16, (512, 1): 8, (64, 32): 8, (64, 64): 16, (16, 64): 16, (16, 1): 16, (512, 100): 512}
    assert {sizes: G.group_length(*sizes, None) for sizes in lengths} == lengths


@INTERPRETED
@pytest.mark.parametrize("D, given", [(5, True), (5, False), (1, True), (0, True)])
def test_interpreted_starts_of_groups(D, given):
    """Gates that lose everything, or nothing, and any between. What is no number harms no group before it."""
    ends, first = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 5, 6)
    sums = -torch.rand(2, 3, 4, D) * 10.0 ** torch.randint(-3, 4, (2, 3, 4, D))
    sums[:, :, 1], ends[:, :, 2] = -torch.inf, torch.nan
    for xs in (ends, ends.mT.contiguous().mT):
        starts, state = G.group_starts(xs, sums, first if given else None), first if given else 0 * first
        for i in range(3):
            assert (starts[:, :, i] - state).norm() <= 1e-6 * state.norm()
            state = ends[:, :, i] + (state * sums[:, :, i].exp2().unsqueeze(-1) if D else state)
        first = first.mT.contiguous().mT


@INTERPRETED
def test_interpreted_groups_keep_what_an_operator_promises(monkeypatch):
    """Contiguous outputs of their own, also of one head; and no token harms an earlier one, though it be no number."""
    monkeypatch.setattr(G, "group_length", lambda *sizes: 1)
    q, k, v, g = (torch.randn(1, 200, 1, n) for n in (3, 3, 5, 3))
    state = torch.zeros(1, 1, 3, 5).requires_grad_()
    torch.library.opcheck(G.gla_op, (q, k, v, -g.abs(), state, 1.0, None, "triton"))
    v[:, 150] = torch.nan
    o = gla(q, k, v, -g.abs(), backend="triton")[0]
    assert o[:, :128].isfinite().all() and not o[:, 150:].isfinite().any()


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_interpreted_types_of_gates(dtype):
    """A gate near 0 of any type keeps its digits."""
    *inputs, dstate = draw(1, 40, 1, 16, 16, "weak")
    inputs[3] = inputs[3].to(dtype).double()
    wanted = run([*inputs, dstate], torch.float64, "recurrent", gate_min=-1.25)
    q, k, v, _, h0 = (x.float().requires_grad_() for x in inputs[:5])
    g = inputs[3].to(dtype).requires_grad_()
    o, state = gla(q, k, v, g, None, -1.25, h0, True, "triton")
    grads = torch.autograd.grad((o, state), (q, k, v, g, h0), (inputs[5].float(), dstate.float()))
    assert grads[3].dtype == dtype
    tolerances = list(TRITON_FP32)
    tolerances[5] = {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(dtype, tolerances[5])
    agree([x.detach().double() for x in (o, state, *grads)], wanted, tolerances)


@INTERPRETED
def test_interpreted_slices_of_a_projection():
    """They are read where they are, and give what their copies give."""
    packed = torch.randn(2, 70, 3 * 2 * 16)
    views = [x.unflatten(-1, (2, 16)) for x in packed.chunk(3, -1)]
    assert all(map(lambda x, y: x is y, G.in_rows(*views), views))
    assert not views[0].is_contiguous() and all(
        x.is_contiguous() for x in G.in_rows(*(x.transpose(0, 1) for x in views))
    )
    g, found = torch.nn.functional.logsigmoid(torch.randn(2, 70, 2, 16)), []
    for xs in (views, [x.contiguous() for x in views]):
        xs = [x.detach().requires_grad_() for x in (*xs, g)]
        o = gla(*xs, None, -1.25, None, False, "triton")[0]
        found.append([o, *torch.autograd.grad(o.square().sum(), xs)])
    assert all(map(torch.equal, *found))


@INTERPRETED
def test_interpreted_launches(monkeypatch):
    """Forward and backward together launch six kernels."""
    count, launch = [], Kernel.launch
    monkeypatch.setattr(Kernel, "launch", lambda self, *args, **kw: (count.append(self), launch(self, *args, **kw)))
    run(draw(1, 20, 1, 16, 16), torch.float32, "triton", gate_min=-1.25)
    assert len(count) == 9


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("gate_min", [-1.25, None])
@pytest.mark.parametrize("dtype, tolerances", [(torch.float32, TRITON_FP32), (torch.bfloat16, BF16)])
@pytest.mark.parametrize(
    "T, K, V", [(1, 16, 16), (100, 64, 64), (256, 60, 96), (1000, 128, 128), (130, 256, 192), (2100, 64, 64)]
)
def test_on_a_gpu(T, K, V, dtype, tolerances, gate_min):
    inputs = [x.to(dtype).double() for x in draw(1, T, 3, K, V)]
    compare(inputs, dtype, tolerances, "triton", "cuda", gate_min=gate_min)
    inputs[3] = inputs[3][..., 0]  # one gate for all channels
    compare(inputs, dtype, tolerances, "triton", "cuda", gate_min=gate_min)


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("gate_min", [-1.25, None])
@pytest.mark.parametrize("name, i", [(name, i) for name in G.KERNELS for i in range(len(G.KERNELS[name].configs))])
def test_every_configuration_on_a_gpu(name, i, gate_min, width, monkeypatch):
    kernel = G.KERNELS[name]
    monkeypatch.setitem(G.KERNELS, name, Kernel(kernel.function, [kernel.configs[i]], kernel.tiles))
    inputs = [x.bfloat16().double() for x in draw(2, 200, 3, width, width)]
    compare(inputs, torch.bfloat16, BF16, "triton", "cuda", gate_min=gate_min)
    inputs[3] = inputs[3][..., 0]
    compare(inputs, torch.bfloat16, BF16, "triton", "cuda", gate_min=gate_min)
