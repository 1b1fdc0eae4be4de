"""Gated slot attention: every form against the loop over time in fp64, and that loop against a public one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this file is also run as a script, in its own process

import kernels.gsa as module  # noqa: E402
from kernels.gsa import gsa  # noqa: E402
from kernels.launch import Kernel  # noqa: E402

NAMES = ["o", "hk", "hv", "dq", "dk", "dv", "ds", "dg", "dhk", "dhv"]
TOLERANCE = {  # of o and states, of gradients, of dg
    "fp64": (1e-10, 1e-10, 1e-10),
    "fp32": (1e-5, 1e-4, 1e-4),
    "triton fp32": (1e-5, 1e-4, 2e-4),
    # In float64, rounding each operand of a product to bf16 once gives dq an error of 5.5e-3 to 6.1e-3 here, most of it
    # by the states and slots that the logits are made of: a softmax turns errors of its logits into relative ones.
    "bf16": (5e-3, 8e-3, 1e-2),
}
GATES = ["normaliser 0.1", "normaliser 1", "normaliser 16", 0.0, -1e-4, -5.0, -8.0, -12.0, -20.0]
GATES += ["mixed", "blocks", "decades", "-inf"]
TIMES = [1, 15, 16, 17, 63, 64, 65, 100, 256, 1000]
WIDTHS = [(16, 16, 16), (32, 60, 64), (60, 32, 24), (64, 64, 64), (96, 128, 64), (128, 192, 32), (192, 96, 128)]


def make_gates(kind, shape):
    if isinstance(kind, float):
        return torch.full(shape, kind, dtype=torch.float64)
    if kind.startswith("normaliser"):
        return F.logsigmoid(torch.randn(shape, dtype=torch.float64)) / float(kind.split()[1])
    if kind == "decades":
        return -(10.0 ** torch.empty(shape, dtype=torch.float64).uniform_(-5, 2))
    if kind == "blocks":  # 32 strong tokens, then 32 weak ones: where a cumulative sum loses its digits
        strong = (torch.arange(shape[1]) % 64 < 32).view(1, -1, 1, 1).expand(shape)
    else:
        strong = torch.rand(shape) < 0.3
    return torch.where(strong, -float("inf") if kind == "-inf" else -50.0, -1e-3).double()


def draw(T, K=16, V=20, M=12, gate="normaliser 8", B=1, H=3, seed=0):
    """q, k, v, s, g, hk, hv and gradients of the three outputs: fp64 numbers that fp32 holds exactly."""
    torch.manual_seed(seed)
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H, M), (B, H, K, M), (B, H, M, V)]
    q, k, v, s, hk, hv = (torch.randn(shape) for shape in shapes)
    g = make_gates(gate, (B, T, H, M)).float()
    outs = [torch.randn(shape).double() for shape in (v.shape, hk.shape, hv.shape)]
    return [x.double() for x in (q, k, v, s, g, hk, hv)], outs


def run(ins, outs, backend, dtype=torch.float64, scale=None, gate_min=None):
    """Outputs, final states and all gradients, in fp64."""
    ins = [x.to(dtype) if i < 5 else x.to(module.compute_dtype(dtype)) for i, x in enumerate(ins)]
    ins = [x.detach().requires_grad_() for x in ins]
    o, (hk, hv) = gsa(*ins[:5], scale, tuple(ins[5:]) or None, True, backend, gate_min)
    loss = sum((x.double() * y).sum() for x, y in zip((o, hk, hv), outs))
    return [x.detach().double() for x in (o, hk, hv, *torch.autograd.grad(loss, ins))]


def assert_close(have, want, tolerance, names=NAMES):
    for name, x, y in zip(names, have, want, strict=True):
        assert x.isfinite().all(), f"{name} is not finite"
        limit = tolerance[2 if name == "dg" else 1 if name.startswith("d") else 0]
        error = (x - y).abs().max()
        ratio = float((x - y).norm() / y.norm().clamp_min(1e-300))
        assert error <= min(1e-6, limit) or ratio <= limit, f"{name}: error ratio {ratio:.1e} above {limit:.0e}"


def compare(T, widths, gate, scale=None, gate_min=None):
    ins, outs = draw(T, *widths, gate, seed=T)
    options = dict(scale=scale, gate_min=gate_min)
    want = run(ins, outs, "recurrent", **options)
    assert_close(run(ins, outs, "torch", **options), want, TOLERANCE["fp64"])
    assert_close(run(ins, outs, "torch", torch.float32, **options), want, TOLERANCE["fp32"])


# ----------------------------------------------------------------------------- oracle


def test_oracle_equals_the_public_reference():
    spec = importlib.util.find_spec("fla")
    path = Path(spec.submodule_search_locations[0], "ops", "gsa", "naive.py") if spec else None
    if path is None or not path.exists() or importlib.util.find_spec("einops") is None:
        if os.environ.get("NANO_REQUIRE_ORACLES") == "1":
            pytest.fail("fla-core with einops is required here and is not installed")
        pytest.skip("fla-core or einops is not installed")
    spec = importlib.util.spec_from_file_location("naive_gsa", path)
    naive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(naive)
    for scale in (None, 1.0):
        ins, outs = draw(37, B=2)
        want = run(ins, outs, "recurrent", scale=scale)
        ins = [x.float().requires_grad_() for x in ins]
        o, state = naive.naive_recurrent_gsa(*ins[:5], scale, tuple(ins[5:]), True)
        loss = sum((x.double() * y).sum() for x, y in zip((o, *state), outs))
        have = [x.detach().double() for x in (o, *state, *torch.autograd.grad(loss, ins))]
        assert_close(have, want, (1e-6, 1e-5, 1e-5))


def test_oracle_equals_slots_written_one_by_one():
    (q, k, v, s, g, hk, hv), _ = draw(9)
    o, (fk, fv) = gsa(q, k, v, s, g, 0.7, (hk, hv), True, "recurrent")
    keys, values = hk[0, 1].T.clone(), hv[0, 1].clone()  # (M, K), (M, V) of head 1
    for t in range(9):
        for m in range(s.shape[-1]):
            keys[m] = g[0, t, 1, m].exp() * keys[m] + s[0, t, 1, m] * k[0, t, 1]
            values[m] = g[0, t, 1, m].exp() * values[m] + s[0, t, 1, m] * v[0, t, 1]
        torch.testing.assert_close(o[0, t, 1], torch.softmax(0.7 * keys @ q[0, t, 1], 0) @ values)
    torch.testing.assert_close(fk[0, 1].T, keys)
    torch.testing.assert_close(fv[0, 1], values)


# ----------------------------------------------------------------------------- chunked form


@pytest.mark.parametrize("T", TIMES)
def test_chunked_over_lengths(T):
    compare(T, (16, 20, 12), "normaliser 1")
    if T <= 256:
        compare(T, (16, 20, 12), "mixed", scale=1.0)


@pytest.mark.parametrize("widths", WIDTHS)
def test_chunked_over_widths(widths):
    compare(70, widths, "normaliser 16")
    compare(70, widths, "decades")


@pytest.mark.parametrize("gate", GATES)
def test_chunked_over_gates(gate):
    compare(150, (16, 20, 12), gate, scale=1.0)


@pytest.mark.parametrize("gate_min", [0.0, -0.5, -1.25, -30.0])
@pytest.mark.parametrize("gate", ["normaliser 1", "mixed", "-inf"])
def test_bounded_gates(gate, gate_min):
    """A clamp of the gates: the same outputs, and no gradient where it holds."""
    compare(150, (16, 20, 12), gate, gate_min=gate_min)
    ins, outs = draw(150, gate=gate)
    have = run(ins, outs, "torch", gate_min=gate_min)
    ins[4] = ins[4].clamp(min=gate_min)
    want = run(ins, outs, "torch")
    below = draw(150, gate=gate)[0][4] < gate_min
    want[7] = want[7].masked_fill(below, 0.0)
    assert_close(have, want, TOLERANCE["fp64"])
    assert not below.any() or (have[7][below] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("T", TIMES)
def test_chunked_grid(T, widths, gate):
    compare(T, widths, gate)


@pytest.mark.parametrize("gate", ["normaliser 8", "mixed"])
def test_segments_hand_over_their_states(gate, monkeypatch):
    """With short segments many borders lie inside the sequence; the result may not depend on where."""
    ins, outs = draw(400, gate=gate, B=2)
    want = run(ins, outs, "torch")
    monkeypatch.setattr(module, "SEGMENT", 64 * 6)
    assert len(module.segments(ins[0])) == 7
    assert_close(run(ins, outs, "torch"), want, TOLERANCE["fp64"])


@pytest.mark.parametrize("gate", ["normaliser 8", "mixed"])
@pytest.mark.parametrize("chunk", [1, 4, 16, 32, 128])
def test_chunk_size_does_not_matter(chunk, gate, monkeypatch):
    ins, outs = draw(150, gate=gate)
    want = run(ins, outs, "torch")
    monkeypatch.setattr(module, "CHUNK", chunk)
    assert_close(run(ins, outs, "torch"), want, TOLERANCE["fp64"])


@pytest.mark.parametrize("gate", [-1.2, "normaliser 8", "normaliser 0.1", "blocks"])
def test_both_forms_of_the_decay_agree(gate, monkeypatch):
    """The factorised form, where it is allowed, and halving give the same; the choice is made from the gates."""
    ins, outs = draw(130, gate=gate)
    forms, build = [], module.Decay.__init__

    def spy(self, *args):
        build(self, *args)
        forms.append(self.lifted is not None)

    monkeypatch.setattr(module.Decay, "__init__", spy)
    have = run(ins, outs, "torch", torch.float32)
    assert set(forms) == {gate == "normaliser 8"}
    monkeypatch.setattr(module, "FACTOR_MIN", 1.0)
    want = run(ins, outs, "torch", torch.float32)
    assert not forms[-1]
    assert_close(have, want, (5e-6, 5e-6, 1e-5))


def test_factorised_form_at_its_bounds():
    """The strongest gates that the factorised form takes: as accurate as the rest, and finite."""
    torch.manual_seed(0)
    for gate in (module.FACTOR_SUM / 64 * 0.999, -1e-3):
        ins, outs = draw(128, gate=gate)
        ins[4][:, 5::16] = max(-1.25, module.FACTOR_SUM / 8) if gate == -1e-3 else gate
        assert module.Decay(torch.full((1, 64, 1), gate), torch.ones(1, 64, 1)).lifted is not None
        assert_close(run(ins, outs, "torch", torch.float32), run(ins, outs, "recurrent"), (1e-5, 1e-5, 1e-5))


def test_products_are_counted(fresh_rng, products):
    """To the last one where gates are mild; strong ones run fewer."""
    for T in (1, 10, 64, 300):
        counted = 2 * module.operations(T, 3, 16, 20, 12)[1]
        for gate, wanted in (("normaliser 16", counted), ("mixed", None)):
            q, k, v, s, g, *_ = draw(T, gate=gate, B=2, seed=int(fresh_rng.integers(2**31)))[0]
            found = products(lambda: gsa(q, k, v, s, g))  # noqa: B023
            assert found == wanted if wanted else found < counted


def test_bf16_inputs():
    ins, outs = draw(200, 64, 64, 64)
    ins = [x.bfloat16().double() if i < 5 else x for i, x in enumerate(ins)]
    want = run(ins, outs, "recurrent")
    for backend in ("torch", "recurrent"):
        assert_close(run(ins, outs, backend, torch.bfloat16), want, TOLERANCE["bf16"])
    low = [x.bfloat16() for x in ins[:5]]
    o, state = gsa(*low, output_final_state=True)
    assert o.dtype == torch.bfloat16 and {x.dtype for x in state} == {torch.float32}


@pytest.mark.parametrize("native", [False, True], ids=["float32 products", "bfloat16 products"])
@pytest.mark.parametrize("gate", ["normaliser 0.1", "normaliser 16", -1e-4, 0.0, "mixed"])
@pytest.mark.parametrize("sizes", [(60, 32, 24), (64, 64, 64), (192, 96, 128)])
def test_products_in_bf16(sizes, gate, native, fresh_rng, monkeypatch):
    """Whatever the processor, of widths whose scale is no power of two as well. Gates come in fp32, as in the model."""
    monkeypatch.setattr("kernels.launch.native_bfloat16", lambda: native)
    ins, _ = draw(int(fresh_rng.integers(2, 300)), *sizes, gate=gate, seed=int(fresh_rng.integers(2**31)))
    low = [x.bfloat16() if i < 3 else x.float() for i, x in enumerate(ins[:5])]
    do, found = torch.randn(low[2].shape).bfloat16(), []
    for dtype, backend in ((None, "torch"), (torch.float64, "recurrent")):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in low]
        o, _ = gsa(*leaves, backend=backend)
        found.append([x.double() for x in (o, *torch.autograd.grad(o, leaves, do.to(o.dtype)))])
    assert_close(*found, TOLERANCE["bf16"], ["o", "dq", "dk", "dv", "ds", "dg"])


def test_mixed_types_and_autocast():
    """bf16 projections beside fp32 gates: given so, or made so by autocast. The gates, too fine for bf16, stay fp32."""
    ins, _ = draw(80, 32, 32, 32, gate=-1e-4)
    low = [x.bfloat16() for x in ins[:3]] + [x.float() for x in ins[3:5]]
    want, states = gsa(*(x.double() for x in low), output_final_state=True, backend="recurrent")
    for backend in ("torch", "recurrent"):
        o, state = gsa(*low, output_final_state=True, backend=backend)
        assert o.dtype == torch.bfloat16
        assert_close([o.double()], [want], TOLERANCE["bf16"], ["o"])
        assert_close([x.double() for x in state], states, TOLERANCE["fp32"], ["hk", "hv"])
        with torch.autocast("cpu", torch.bfloat16):
            again, state = gsa(*(x.float() for x in low), output_final_state=True, backend=backend)
        assert torch.equal(again, o)
        assert_close([x.double() for x in state], states, TOLERANCE["fp32"], ["hk", "hv"])


def test_strictly_causal():
    ins, _ = draw(130, gate="normaliser 1")
    want = {b: gsa(*ins[:5], backend=b)[0] for b in ("torch", "recurrent")}
    for t in (1, 16, 63, 64, 65, 100, 129):
        for i in range(5):
            edited = [x.clone() for x in ins[:5]]
            edited[i][:, t:] = edited[i][:, t:] * 0.5 - 0.1
            for backend, o in want.items():
                have = gsa(*edited, backend=backend)[0]
                assert torch.equal(have[:, :t], o[:, :t]) or (have - o)[:, :t].abs().max() < 1e-13 * o.abs().max()
                assert (have - o)[:, t:].abs().max() > 1e-3 or i == 0 and t == 129


def test_state_is_handed_over_at_every_split():
    ins, _ = draw(70, gate="decades")
    whole, want = gsa(*ins[:5], initial_state=tuple(ins[5:]), output_final_state=True)
    for split in range(1, 70):
        one, state = gsa(*(x[:, :split] for x in ins[:5]), initial_state=tuple(ins[5:]), output_final_state=True)
        two, state = gsa(*(x[:, split:] for x in ins[:5]), initial_state=state, output_final_state=True)
        assert_close([torch.cat((one, two), 1), *state], [whole, *want], TOLERANCE["fp64"], NAMES[:3])


def test_gradients_cross_a_split():
    ins, outs = draw(100, gate="normaliser 1")
    want = run(ins, outs, "recurrent")
    ins = [x.requires_grad_() for x in ins]
    one, state = gsa(*(x[:, :37] for x in ins[:5]), initial_state=tuple(ins[5:]), output_final_state=True)
    two, state = gsa(*(x[:, 37:] for x in ins[:5]), initial_state=state, output_final_state=True)
    loss = sum((x * y).sum() for x, y in zip((torch.cat((one, two), 1), *state), outs))
    have = [torch.cat((one, two), 1), *state, *torch.autograd.grad(loss, ins)]
    assert_close([x.detach() for x in have], want, TOLERANCE["fp64"])


def test_decoding_one_token_at_a_time():
    ins, _ = draw(20)
    for backend in ("torch", "recurrent"):
        state, out = tuple(ins[5:]), []
        for t in range(20):
            token = [x[:, t : t + 1] for x in ins[:5]]
            o, state = gsa(*token, initial_state=state, output_final_state=True, backend=backend)
            out.append(o)
        whole, want = gsa(*ins[:5], initial_state=tuple(ins[5:]), output_final_state=True, backend="recurrent")
        assert_close([torch.cat(out, 1), *state], [whole, *want], TOLERANCE["fp64"], NAMES[:3])


def test_inputs_need_not_be_contiguous():
    ins, outs = draw(90, B=2)
    want = run(ins, outs, "recurrent")
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in ins[:5]]
    strided += [x.mT.contiguous().mT for x in ins[5:]]
    assert not any(x.is_contiguous() for x in strided)
    leaves = [x.requires_grad_() for x in strided]
    o, state = gsa(*leaves[:5], initial_state=tuple(leaves[5:]), output_final_state=True)
    seeds = [outs[0].transpose(1, 2).contiguous().transpose(1, 2), *(x.mT.contiguous().mT for x in outs[1:])]
    grads = torch.autograd.grad((o, *state), leaves, seeds)
    assert_close([x.detach() for x in (o, *state, *grads)], want, TOLERANCE["fp64"])
    ones = torch.autograd.grad(gsa(*leaves[:5])[0].sum(), leaves[0])[0]  # an expanded gradient
    want = torch.autograd.grad(gsa(*leaves[:5], backend="recurrent")[0].sum(), leaves[0])[0]
    torch.testing.assert_close(ones, want)


def test_two_backward_passes_are_the_same():
    ins, outs = draw(100)
    leaves = [x.requires_grad_() for x in ins]
    o, _ = gsa(*leaves[:5])
    one = torch.autograd.grad(o, leaves[:5], outs[0], retain_graph=True)
    two = torch.autograd.grad(o, leaves[:5], outs[0])
    assert all(torch.equal(x, y) for x, y in zip(one, two))


def test_gradients_of_parts():
    """Only some outputs used, only some inputs asked for, no initial state."""
    ins, outs = draw(40)
    for used in ((0,), (1,), (2,), (1, 2)):
        grads = {}
        for backend in ("torch", "recurrent"):
            leaves = [x.clone().requires_grad_() for x in ins]
            o, state = gsa(*leaves[:5], initial_state=tuple(leaves[5:]), output_final_state=True, backend=backend)
            loss = sum(((o, *state)[i] * outs[i]).sum() for i in used)
            grads[backend] = torch.autograd.grad(loss, leaves, allow_unused=True)
        for x, y in zip(grads["torch"], grads["recurrent"]):
            torch.testing.assert_close(torch.zeros_like(x) if y is None else y, x)
    q, k, v, s, g = ins[:5]
    k = k.clone().requires_grad_()
    o, state = gsa(q, k, v, s, g)
    assert state == (None, None)
    o.sum().backward()
    assert k.grad.abs().sum() > 0


def test_default_scale():
    (q, k, v, s, g, _, _), _ = draw(20)
    for backend in ("torch", "recurrent"):
        default = gsa(q, k, v, s, g, backend=backend)[0]
        assert torch.equal(default, gsa(q, k, v, s, g, scale=0.25, backend=backend)[0])
        assert not torch.allclose(default, gsa(q, k, v, s, g, scale=1.0, backend=backend)[0])


# ----------------------------------------------------------------------------- operator


def test_opcheck():
    ins, _ = draw(20, B=2)
    ins = [x.requires_grad_() for x in ins]
    torch.library.opcheck(module.fwd_op, (*ins, 0.3, -1.0, "torch"))
    torch.library.opcheck(module.fwd_op, (*ins[:5], None, None, 0.3, None, "torch"))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compiles_into_one_graph(backend):
    ins, outs = draw(70)
    want = run(ins, outs, "recurrent")

    @torch.compile(fullgraph=True)
    def compiled(q, k, v, s, g, hk, hv):
        return gsa(q, k, v, s, g, initial_state=(hk, hv), output_final_state=True, backend=backend)

    leaves = [x.requires_grad_() for x in ins]
    o, state = compiled(*leaves)
    grads = torch.autograd.grad((o, *state), leaves, outs)
    assert_close([x.detach() for x in (o, *state, *grads)], want, TOLERANCE["fp64"])


@pytest.mark.parametrize("name", ["k", "v", "s", "g", "hk", "hv"])
def test_shape_errors_name_the_argument(name):
    ins, _ = draw(5)
    given = dict(zip(["q", "k", "v", "s", "g", "hk", "hv"], ins))
    given[name] = given[name][:, :, :2] if name in ("k", "v", "s", "g") else given[name][..., :-1]
    state = given.pop("hk"), given.pop("hv")
    with pytest.raises(ValueError, match=rf"\b{name} must (be|have)") as error:
        gsa(**given, initial_state=state)
    assert "\n" not in str(error.value)


def test_other_errors():
    ins, _ = draw(5)
    with pytest.raises(ValueError, match="q must be"):
        gsa(*(x[:, :0] for x in ins[:5]))
    with pytest.raises(ValueError, match="backend must be"):
        gsa(*ins[:5], backend="cuda")
    with pytest.raises(ValueError, match="initial_state must be a pair"):
        gsa(*ins[:5], initial_state=(ins[5], None))


@pytest.mark.skipif(module.triton is None, reason="Triton is not installed, which is the reason then")
def test_fallback_says_its_reason_once(monkeypatch):
    monkeypatch.setattr(module, "too_many", lambda M: "of a test")
    monkeypatch.setattr("kernels.launch.interpreting", lambda: True)
    ins = [x.float() for x in draw(5)[0]]
    with pytest.warns(UserWarning, match="of a test") as caught:
        outs = [gsa(*ins[:5], backend="triton")[0] for _ in range(3)]
    assert len(caught) == 1 and torch.equal(outs[0], gsa(*ins[:5], backend="torch")[0])


def test_works_without_triton():
    """With triton blocked the module imports and runs."""
    code = """if True:
        import sys
        sys.modules["triton"] = None
        import torch
        from kernels.gsa import gsa, triton
        assert triton is None
        x = torch.randn(1, 70, 2, 8, requires_grad=True)
        gsa(x, x, x, x, -x.abs())[0].sum().backward()
        assert x.grad.abs().sum() > 0
    """
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_peak_memory_is_linear():
    """Forward and backward at T = 4096 and 16384: the peak grows with T at most in proportion, and stays below 1 GB."""
    peaks = []
    for T in (4096, 16384):
        result = subprocess.run([sys.executable, __file__, "memory", str(T)], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        peaks.append(float(result.stdout))
    assert peaks[1] < 1e9 and peaks[1] < 4.4 * peaks[0] + 2e7, peaks


def measure_memory(T):
    """Bytes of peak resident memory of forward and backward, above inputs and gradients (B=2, H=4, K=V=M=64)."""
    import resource

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def leaves(n):
        tensors = [torch.randn(2, n, 4, 64) for _ in range(4)]
        tensors.append(F.logsigmoid(torch.randn(2, n, 4, 64)) / 8)
        return [x.requires_grad_() for x in tensors]

    warm = leaves(64)
    gsa(*warm)[0].sum().backward()  # libraries and thread pools
    ins, do = leaves(T), torch.randn(2, T, 4, 64)
    for x in ins:
        x.grad = torch.zeros_like(x)
        x.grad += 1  # touched
    before = peak()
    torch.autograd.grad(gsa(*ins)[0], ins, do)
    print(peak() - before)


# ----------------------------------------------------------------------------- Triton

triton_only = pytest.mark.skipif(module.triton is None, reason="Triton is not installed")
INTERPRETED = [  # T, (K, V, M), gate, gate_min, chunks of a group
    (1, (16, 16, 16), "normaliser 8", None),
    (17, (16, 20, 12), "mixed", None),
    (64, (32, 16, 16), -12.0, None),
    (65, (20, 24, 16), "normaliser 1", None),
    (100, (16, 32, 24), "blocks", None),
    (130, (32, 32, 16), "decades", None),
    (70, (16, 20, 12), "mixed", -1.25),
    (130, (32, 16, 24), "normaliser 1", -1.25),
    (40, (16, 16, 16), "-inf", -2.5),  # chunks of 32
    (33, (16, 16, 16), "decades", -30.0),  # too low for one product
    (70, (16, 16, 96), "blocks", -1.25),  # more slots, shorter chunks
    (130, (16, 20, 12), "normaliser 8", None, 2),
    (130, (20, 16, 16), "decades", -1.25, 1),
]


def interpret(T, widths, gate, gate_min, group=None):
    if group:
        module.group_length = lambda *sizes: group
    ins, outs = draw(T, *widths, gate, B=1, H=3)
    want = run(ins, outs, "recurrent", gate_min=gate_min)
    assert_close(run(ins, outs, "triton", torch.float32, gate_min=gate_min), want, TOLERANCE["triton fp32"])
    want = run(ins[:5], outs, "recurrent", scale=1.0, gate_min=gate_min)  # no initial states
    have = run(ins[:5], outs, "triton", torch.float32, scale=1.0, gate_min=gate_min)
    assert_close(have, want, TOLERANCE["triton fp32"], NAMES[:8])


@triton_only
@pytest.mark.parametrize(
    "case", [pytest.param(i, marks=() if i in (1, 6, 11) else pytest.mark.slow) for i in range(len(INTERPRETED))]
)
def test_triton_interpreted(case):
    result = subprocess.run(
        [sys.executable, __file__, "interpret", str(case)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]


@triton_only
def test_at_most_nine_launches(monkeypatch):
    """Two weigh what a scan adds up, so that nothing is summed in its loop."""
    launched = []
    monkeypatch.setattr(Kernel, "launch", lambda self, *args, **kwargs: launched.append(self))
    ins, outs = draw(70)
    o, *_, z, _ = module.gsa_fwd(*ins, 1.0, None)
    module.gsa_bwd(outs[0], None, None, *ins, z, 1.0, None)
    assert 0 < len(launched) <= 9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("gate_min", [None, -1.25])
@pytest.mark.parametrize("gate", ["normaliser 8", "mixed", "decades"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, "triton fp32"), (torch.bfloat16, "bf16")])
@pytest.mark.parametrize("T, widths", [(1, (16, 16, 16)), (100, (64, 64, 64)), (1000, (128, 128, 64)),
                                       (200, (60, 96, 33)), (130, (256, 192, 128)), (70, (64, 64, 256)),
                                       (2100, (64, 64, 64))])  # fmt: skip
def test_on_a_gpu(T, widths, dtype, tolerance, gate, gate_min):
    on_gpu(T, widths, dtype, tolerance, gate, gate_min)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("gate_min", [None, -1.25])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    "name, i", [(name, i) for name in module.KERNELS for i in range(len(module.KERNELS[name].configs))]
)
def test_every_configuration_on_a_gpu(name, i, width, gate_min, monkeypatch):
    kernel = module.KERNELS[name]
    monkeypatch.setitem(module.KERNELS, name, Kernel(kernel.function, [kernel.configs[i]]))
    on_gpu(200, (width, width, 64), torch.bfloat16, "bf16", "mixed", gate_min)


def on_gpu(T, widths, dtype, tolerance, gate, gate_min):
    ins, outs = draw(T, *widths, gate, B=2)
    ins[:3] = [x.to(dtype).double() for x in ins[:3]]  # q, k, v; slots and gates stay fp32
    want = run(ins, outs, "recurrent", gate_min=gate_min)
    leaves = [x.to("cuda", dtype if i < 3 else torch.float32).requires_grad_() for i, x in enumerate(ins)]
    o, state = gsa(*leaves[:5], None, tuple(leaves[5:]), True, "triton", gate_min)
    loss = sum((x.double() * y.cuda()).sum() for x, y in zip((o, *state), outs))
    have = [x.detach().double().cpu() for x in (o, *state, *torch.autograd.grad(loss, leaves))]
    assert_close(have, want, TOLERANCE[tolerance])


if __name__ == "__main__":
    if sys.argv[1] == "memory":
        measure_memory(int(sys.argv[2]))
    else:
        interpret(*INTERPRETED[int(sys.argv[2])])
