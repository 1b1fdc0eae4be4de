"""Performer: every form of the operator against the oracle, the oracle against performer-pytorch's feature maps, the
estimate against softmax attention, and the mistakes that this attention is known for."""

import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import oracle
from test_gla import GPU, INTERPRETED, interpret
from torch.nn import functional as F

import kernels
import train
from config import ConfigError, load
from kernels import performer as P
from kernels.launch import Kernel
from kernels.performer import feature_map, performer
from model import GPT, GPTConfig, random_features

NAMES = ("o", "state", "dq", "dk", "dv", "dwq", "dwk", "dstate")
FEATURES = ("softmax", "relu", "learned")
EXACT = (1e-10,) * 8
FP32 = (1e-5, 1e-5) + (1e-4,) * 6
BF16 = (5e-3, 5e-3) + (8e-3,) * 6

pytestmark = pytest.mark.usefixtures("fresh_rng")


def draw(B, T, H, D, M, V, norm=1.5):
    """q, k, v, wq, wk, the initial state and the two gradients that come in, all fp64. q and k of one norm."""
    q, k = (norm * F.normalize(torch.randn(B, T, H, D, dtype=torch.float64), dim=-1) for _ in range(2))
    wq, wk = torch.randn(2, H, M, D, dtype=torch.float64)
    v, do = torch.randn(2, B, T, H, V, dtype=torch.float64)
    state, dstate = torch.randn(2, B, H, M, V + 1, dtype=torch.float64)
    return [q, k, v, wq, wk, state.abs(), do, dstate]


def run(inputs, dtype, features, backend, device="cpu"):
    """o, the state, and every gradient. bf16 is the precision of the values: exponents and states are in fp32."""
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    *leaves, do, dstate = (x.to(device, dtype if i == 2 else wide, copy=True) for i, x in enumerate(inputs))
    leaves = [x.requires_grad_() for x in leaves]
    o, state = performer(*leaves[:5], features, leaves[5], True, backend)
    assert o.dtype == dtype and state.dtype == wide
    grads = torch.autograd.grad((o, state), leaves, (do.to(o), dstate.to(state)))
    return [x.detach().double().cpu() for x in (o, state, *grads)]


def agree(found, wanted, tolerances):
    for name, x, ref, tolerance in zip(NAMES, found, wanted, tolerances, strict=True):
        assert x.shape == ref.shape and torch.isfinite(x).all(), name
        error = ((x - ref).norm() / ref.norm().clamp(min=1e-30)).item()
        assert error <= tolerance, f"{name}: {error:.1e} above {tolerance:.0e}"


def compare(inputs, dtype, tolerances, features="softmax", backend="torch", device="cpu"):
    wanted = run(inputs, torch.float64, features, "recurrent")
    agree(run(inputs, dtype, features, backend, device), wanted, tolerances)


def quadratic(fq, fk, v):
    """The masked quadratic form of o for features (B, T, H, M)."""
    A = torch.einsum("bihm,bjhm->bhij", fq, fk).tril()
    return torch.einsum("bhij,bjhv->bihv", A / A.sum(-1, keepdim=True), v)


# ----------------------------------------------------------------------------- chunked PyTorch against the oracle


def test_products_are_counted(products):
    for T in (1, 10, 64, 300):
        q, k, v, wq, wk, *_ = draw(2, T, 3, 8, 24, 20)
        found = products(lambda: performer(q, k, v, wq, wk))  # noqa: B023
        assert found == 2 * P.operations(T, 3, 8, 20, 24)[1]


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65, 100, 256])
def test_lengths(T, features):
    inputs = draw(1, T, 3, 8, 24, 20)
    compare(inputs, torch.float64, EXACT, features)
    compare(inputs, torch.float32, FP32, features)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("D, M, V", [(2, 9, 1), (16, 33, 60), (64, 256, 64), (60, 96, 192)])
def test_widths(D, M, V, features):
    compare(draw(1, 130, 1, D, M, V), torch.float32, FP32, features)


@pytest.mark.parametrize("features", FEATURES)
def test_several_segments_and_row_groups(features, monkeypatch):
    """Borders between segments and between groups of batch rows, both with a ragged rest."""
    for B, T, chunks, parts in ((5, 60, 2, 2 * 3), (1, 300, 2, 2 * 3), (3, 300, 5, 2 * 3)):
        monkeypatch.setattr(P, "SEGMENT", chunks * 64 * 8)
        inputs = draw(B, T, 2, 4, 8, 12)
        found = P.pieces(inputs[0], 8, 64)
        assert len(found) == parts and found[-1][-1].stop == P.states_kept(inputs[0], inputs[5], "torch")[0]
        compare(inputs, torch.float64, EXACT, features)


def test_chunk_size_does_not_matter():
    q, k, v, wq, wk, state, do, dstate = draw(2, 150, 1, 8, 16, 24)
    found = []
    for chunk in (16, 32, 64, 128):
        o, inverse, last, starts = P.chunk_forward(q, k, v, wq, wk, state, "softmax", chunk)
        grads = P.chunk_backward(q, k, v, wq, wk, o, inverse, starts, do, dstate, "softmax", True, chunk)
        found.append((o, last, *grads))
    for other in found[1:]:
        agree(other, found[0], EXACT)


@pytest.mark.parametrize("features", FEATURES)
def test_gradcheck(features):
    """Against differences, not against the oracle's autograd."""
    *leaves, _, _ = (x.requires_grad_() for x in draw(1, 6, 2, 3, 4, 2))
    f = lambda *xs: performer(*xs[:5], features, xs[5], True, "torch")  # noqa: E731
    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("native", [False, True], ids=["float32 products", "bfloat16 products"])
@pytest.mark.parametrize("features", FEATURES)
def test_bf16_values(features, native, monkeypatch):
    """Whatever the processor."""
    monkeypatch.setattr("kernels.launch.native_bfloat16", lambda: native)
    for T, D, M in ((130, 16, 64), (300, 64, 256)):
        inputs = [x.bfloat16().double() if i in (2, 6) else x for i, x in enumerate(draw(2, T, 3, D, M, 32))]
        compare(inputs, torch.bfloat16, BF16, features)


# ----------------------------------------------------------------------------- the oracle


def test_oracle_by_hand():
    """Two tokens, one head, one feature pair."""
    q, k, v = (torch.tensor(x).double().view(1, 2, 1, -1) for x in ([[1.0], [2.0]], [[3.0], [-1.0]], [[5.0], [7.0]]))
    w = torch.tensor([[[0.5], [-0.25]]]).double()
    o, state = performer(q, k, v, w, w, output_final_state=True, backend="recurrent")
    a, b = (math.exp(0.5 * 2 + 0.5 * x) + math.exp(-0.25 * 2 - 0.25 * x) for x in (3.0, -1.0))
    assert o.flatten().tolist() == pytest.approx([5.0, (5 * a + 7 * b) / (a + b)])
    assert state[0, 0, 0].tolist() == pytest.approx(
        [5 * math.exp(1.5) + 7 * math.exp(-0.5), math.exp(1.5) + math.exp(-0.5)]
    )


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
def test_public_feature_maps(backend):
    """performer-pytorch's maps in the masked quadratic form. Their eps, which leaks through a maximum over the keys,
    is 0. There q and k arrive before the scaling by D^(-1/4), in (B, H, T, D), and one W serves all heads."""
    public = oracle("performer_pytorch").performer_pytorch
    B, T, H, D, M, V = 2, 75, 3, 16, 32, 20
    q, k, v = (x.float() for x in draw(B, T, H, D, M, V)[:3])
    w = public.gaussian_orthogonal_random_matrix(M, D)
    theirs = [x.transpose(1, 2) * D**0.25 for x in (q, k)]
    maps = {
        "softmax": [
            public.softmax_kernel(x, projection_matrix=w, is_query=i == 0, eps=0) for i, x in enumerate(theirs)
        ],
        "relu": [public.generalized_kernel(x, projection_matrix=w) for x in theirs],
    }
    for features, (fq, fk) in maps.items():
        o, _ = performer(q, k, v, *(w.expand(H, M, D),) * 2, features, backend=backend)
        torch.testing.assert_close(o, quadratic(fq.transpose(1, 2), fk.transpose(1, 2), v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
def test_public_causal_attention_with_relu_features(backend):
    """The whole of it: with these features the public one is causal. It adds 1e-6 to each sum of keys' features, which
    are at least 1e-3."""
    public = oracle("performer_pytorch").performer_pytorch
    q, k, v = (x.float() for x in draw(2, 75, 3, 16, 32, 16)[:3])
    attention = public.FastAttention(16, nb_features=32, causal=True, generalized_attention=True)
    wanted = attention(*(x.transpose(1, 2) * s for x, s in ((q, 2.0), (k, 2.0), (v, 1.0)))).transpose(1, 2)
    w = attention.projection_matrix.expand(3, 32, 16)
    torch.testing.assert_close(performer(q, k, v, w, w, "relu", backend=backend)[0], wanted, rtol=1.5e-3, atol=1e-5)


# ----------------------------------------------------------------------------- the estimate


def test_features_are_gaussian_and_orthogonal_in_blocks():
    w = random_features(400, 40, 16).double()  # 2 blocks and a half
    first = w[:, :16] @ w[:, :16].mT
    assert (first - torch.diag_embed(first.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4
    assert (w[:, :16] @ w[:, 16:32].mT).abs().max() > 1
    norms = w.norm(dim=-1)
    assert abs((norms**2).mean() - 16) < 0.5 and abs(norms.var() - 0.5) < 0.06  # of a Gaussian vector: chi
    assert abs(w.mean()) < 0.01 and abs(w.var() - 1) < 0.03 and abs((w**4).mean() - 3) < 0.15


def test_products_of_features_are_unbiased():
    """E exp(w.q) exp(w.k) = exp(q.k + |q|^2/2 + |k|^2/2), for aligned, orthogonal and opposite pairs: a wrong sign or
    temperature, or rows of unit norm, would show."""
    q, k = torch.zeros(2, 1, 3, 1, 16, dtype=torch.float64)
    q[..., 0] = 0.8
    k[0, 0, :, 0], k[0, 1, :, 1], k[0, 2, :, 0] = 0.8, 0.8, -0.8
    w = random_features(1, 2**18, 16).double()
    found = (feature_map(q, w, "softmax") * feature_map(k, w, "softmax")).mean(-1).flatten()
    wanted = (torch.tensor([0.64, 0.0, -0.64]).double() + 0.64).exp()
    torch.testing.assert_close(found, wanted, rtol=0.03, atol=0)


def estimate_error(M, q, k, v, H=64):
    """The relative error of the estimate with M features, over H draws, against softmax attention with logits q.k."""
    wanted = quadratic_softmax(q, k, v)
    w = random_features(H, M, q.shape[3]).double()
    o, _ = performer(*(x.expand(-1, -1, H, -1) for x in (q, k, v)), w, w)
    return (((o - wanted) ** 2).mean() / (wanted**2).mean()).sqrt().item()


def quadratic_softmax(q, k, v):
    logits = torch.einsum("bihd,bjhd->bhij", q, k)
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhij,bjhv->bihv", logits.masked_fill(hidden, -torch.inf).softmax(-1), v)


def test_error_falls_as_the_root_of_the_number_of_features():
    inputs, counts = draw(1, 32, 1, 16, 1, 8, 0.7)[:3], [64, 256, 1024, 4096]
    errors = torch.tensor([estimate_error(M, *inputs) for M in counts]).log()
    x = torch.tensor(counts).log()
    slope = ((x - x.mean()) * (errors - errors.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert -0.55 < slope < -0.45 and errors[-1].exp() < 0.03, (slope, errors.exp())


def test_error_grows_with_the_norms():
    """Why queries and keys have a bounded norm: the variance of a product is e^(|q + k|^2) / M."""
    q, k, v = draw(1, 32, 1, 16, 1, 8, 1.0)[:3]
    assert estimate_error(256, 2 * q, 2 * k, v) > 2 * estimate_error(256, q, k, v)


# ----------------------------------------------------------------------------- properties


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("features", FEATURES)
def test_strictly_causal_whatever_the_later_keys(features, dtype):
    """Not a digit of an earlier output moves, also for a later key that outweighs everything before it."""
    inputs = [x.to(dtype) for x in draw(1, 90, 2, 8, 16, 8)[:5]]
    for backend in ("torch", "recurrent"):
        o, _ = performer(*inputs, features, backend=backend)
        for t in (0, 1, 31, 63, 64, 89):
            for i, size in ((0, 1.5), (1, 1.5), (1, 8.0), (2, 1e6)):
                edited = [x.clone() for x in inputs]
                edited[i][:, t] = size * F.normalize(torch.randn(2, 8, dtype=dtype), dim=-1)
                moved = (performer(*edited, features, backend=backend)[0] - o).abs().amax((0, 2, 3))
                assert moved[:t].max() == 0 if t else True
                assert moved[t:].max() > 0 or (t == 0 and i == 0)  # the first token's output is its value


@pytest.mark.parametrize("features", FEATURES)
def test_outputs_are_means_of_values(features):
    """Weights are positive and sum to 1: constants come out, and nothing beyond the values seen so far."""
    q, k, v, wq, wk = draw(2, 80, 2, 8, 16, 5)[:5]
    for backend in ("torch", "recurrent"):
        o, _ = performer(q, k, torch.full_like(v, 3.25), wq, wk, features, backend=backend)
        torch.testing.assert_close(o, torch.full_like(v, 3.25), rtol=1e-12, atol=0)
        o, _ = performer(q, k, v, wq, wk, features, backend=backend)
        assert (o <= v.cummax(1).values + 1e-12).all() and (o >= v.cummin(1).values - 1e-12).all() and o.std() > 0.01


def test_state_is_handed_over_at_every_split():
    q, k, v, wq, wk, state, _, _ = draw(2, 70, 1, 8, 16, 8)
    o, last = performer(q, k, v, wq, wk, "softmax", state, True)
    for t in range(1, 70):
        a, middle = performer(*(x[:, :t] for x in (q, k, v)), wq, wk, "softmax", state, True)
        b, end = performer(*(x[:, t:] for x in (q, k, v)), wq, wk, "softmax", middle, True)
        assert torch.allclose(torch.cat([a, b], 1), o, 1e-12, 1e-12) and torch.allclose(end, last, 1e-12, 1e-12)


def test_non_contiguous():
    inputs = draw(2, 70, 3, 16, 24, 8)
    strided = [torch.stack([x, x], -1)[..., 0].transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    strided[6] = inputs[6][:, :1, :1].expand_as(inputs[6])  # as the gradient of a sum arrives
    inputs[6] = strided[6].contiguous()
    leaves = [x.detach().requires_grad_() for x in strided[:6]]
    o, state = performer(*leaves[:5], "softmax", leaves[5], True)
    grads = torch.autograd.grad((o, state), leaves, strided[6:])
    agree([x.detach() for x in (o, state, *grads)], run(inputs, torch.float64, "softmax", "recurrent"), EXACT)


def test_two_backward_passes():
    leaves = [x.requires_grad_() for x in draw(1, 100, 2, 8, 16, 16)[:5]]
    o, _ = performer(*leaves)
    do = torch.randn_like(o)
    first = torch.autograd.grad(o, leaves, do, retain_graph=True)
    second = torch.autograd.grad(o, leaves, do)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("used", [0, 1])
def test_an_unused_output_has_no_gradient(used):
    inputs = draw(1, 70, 2, 8, 16, 8)
    found = []
    for backend in ("torch", "recurrent"):
        leaves = [x.clone().requires_grad_() for x in inputs[:6]]
        out = performer(*leaves[:5], "softmax", leaves[5], True, backend)[used]
        grads = torch.autograd.grad(out, leaves, inputs[6 + used], allow_unused=True)
        found.append([torch.zeros_like(x) if dx is None else dx for x, dx in zip(leaves, grads)])
    for a, b in zip(*found):
        assert torch.allclose(a, b, 1e-10, 1e-12)


def test_one_map_for_queries_and_keys():
    """One tensor as both maps receives both gradients; a map without gradient costs none."""
    q, k, v, w, _, _, do, _ = draw(1, 70, 2, 8, 16, 8)
    found = []
    for backend in ("torch", "recurrent"):
        leaf = w.clone().requires_grad_()
        found.append(torch.autograd.grad(performer(q, k, v, leaf, leaf, "learned", backend=backend)[0], leaf, do)[0])
    assert torch.allclose(*found, 1e-10, 1e-12)
    o, _ = performer(q.requires_grad_(), k, v, w, w)
    assert w.grad is None and torch.autograd.grad(o, q, do)[0].abs().max() > 0


def test_inputs_are_left_alone():
    inputs = draw(1, 70, 2, 8, 16, 8)
    before = [x.clone() for x in inputs]
    leaves = [x.requires_grad_() for x in inputs[:6]]
    o, state = performer(*leaves[:5], "learned", leaves[5], True)
    torch.autograd.backward((o, state), inputs[6:])
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_autocast():
    """Values in bf16, exponents and states in fp32."""
    q, k, v, wq, wk = (x.float() for x in draw(1, 70, 2, 8, 16, 8)[:5])
    with torch.autocast("cpu", torch.bfloat16):
        o, state = performer(q, k, v, wq, wk, output_final_state=True)
    wanted, _ = performer(q, k, v.bfloat16(), wq, wk)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32 and torch.equal(o, wanted)


# ----------------------------------------------------------------------------- the op


@pytest.mark.parametrize("features", FEATURES)
def test_compiles_in_one_graph(features):
    leaves = [x.float().requires_grad_() for x in draw(2, 100, 2, 8, 16, 8)[:6]]

    def f(q, k, v, wq, wk, state):
        o, state = performer(q * 2, k, v, wq, wk, features, state, True)
        return (o * o).sum() + state.sum()

    wanted = torch.autograd.grad(f(*leaves), leaves)
    torch._dynamo.reset()
    found = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, 1e-4, 1e-4)


def test_opcheck():
    tensors = [x.float().requires_grad_() for x in draw(1, 70, 2, 8, 4, 4)[:6]]
    torch.library.opcheck(P.performer_op, (*tensors, "softmax", "torch"))


@pytest.mark.parametrize(
    "name, bad",
    [
        ("q", dict(q=torch.zeros(2, 3, 4))),
        ("q", dict(q=torch.zeros(1, 0, 1, 4), k=torch.zeros(1, 0, 1, 4))),
        ("k", dict(k=torch.zeros(1, 5, 1, 3))),
        ("v", dict(v=torch.zeros(1, 4, 1, 3))),
        ("v", dict(v=torch.zeros(1, 5, 1, 3, dtype=torch.long))),
        ("wq", dict(wq=torch.zeros(1, 8, 3))),
        ("wk", dict(wk=torch.zeros(1, 9, 4))),
        ("features", dict(features="cosine")),
        ("initial_state", dict(initial_state=torch.zeros(1, 1, 8, 3))),
        ("backend", dict(backend="cuda")),
    ],
)
def test_errors_name_the_argument(name, bad):
    good = dict(q=torch.zeros(1, 5, 1, 4), k=torch.zeros(1, 5, 1, 4), v=torch.zeros(1, 5, 1, 3))
    good |= dict(wq=torch.zeros(1, 8, 4), wk=torch.zeros(1, 8, 4))
    performer(**good)
    with pytest.raises(ValueError, match=rf"^performer: {name} ") as error:
        performer(**good | bad)
    assert "\n" not in str(error.value)


def test_a_fallback_says_its_reason_once():
    if kernels.interpreting():
        pytest.skip("the interpreter runs Triton on a CPU")
    inputs = [x.float() for x in draw(1, 5, 1, 4, 4, 4)[:5]]
    kernels._said.clear()
    with pytest.warns(UserWarning, match="performer runs its PyTorch form: Triton"):
        o, _ = performer(*inputs, backend="triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(performer(*inputs, backend="triton")[0], o)


def test_works_without_triton():
    code = """if True:
        import sys
        sys.modules["triton"] = None
        import torch, kernels
        from kernels.performer import performer
        assert kernels.triton is None
        q = torch.randn(1, 5, 1, 4, requires_grad=True)
        w = torch.randn(1, 8, 4)
        performer(q, q, q, w, w)[0].sum().backward()
        assert q.grad.isfinite().all()
    """
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True, timeout=300)


# ----------------------------------------------------------------------------- the attention type


def attention(dtype=torch.float64, **keys):
    """A Performer attention in eval mode, its weights large enough that it does something."""
    shape = dict(block_size=64, vocab_size=50, n_layer=1, n_head=2, n_embd=32, attention_type="performer")
    attn = GPT(GPTConfig(**(shape | keys))).transformer.h[0].attn.to(dtype).eval()
    for p in (attn.c_attn.weight, attn.c_proj.weight):
        torch.nn.init.normal_(p, std=0.3)
    return attn


@pytest.mark.parametrize("pos_emb", ["rope", "none"])
def test_with_many_features_it_is_softmax_attention(pos_emb):
    """Of its own queries and keys: the whole layer, so that an output of zeros, a glance ahead, a lost temperature or
    keys that count with the wrong sign cannot pass."""
    attn = attention(performer_num_features=2**15, pos_emb=pos_emb)
    attn.temperature.data = torch.tensor([-1.0, 0.0]).double()
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    q, k, v = attn._qkv(x, 0)
    wanted = attn._project(quadratic_softmax(q, k, v), x)
    assert (attn(x)[0] - wanted).norm() < 0.08 * wanted.norm() and wanted.norm() > 1
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    logits = attn.stats(x)["attention_map"]
    exact = (q[:1] @ k[:1].mT).masked_fill(torch.ones(40, 40, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    assert (logits - exact[0]).abs().max() < 0.2


@pytest.mark.parametrize("features", FEATURES)
def test_every_kind_of_features_obeys_the_protocol(features):
    attn = attention(performer_features=features, pos_emb="rope")
    x = torch.randn(3, 64, 32, dtype=torch.float64)
    expected, _ = attn(x)
    for split in ([64], [1] * 64, [20, 1, 17, 26]):
        state, found = attn.init_state(3, 64), []
        for part in x.split(split, 1):
            y, state = attn.step(part, state)
            found.append(y)
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-9)
    y, _ = attn.train()(x.requires_grad_())
    (y * torch.randn_like(y)).sum().backward()
    for name, p in attn.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    trained = {name.split(".")[0] for name, _ in attn.named_parameters()}
    assert trained == {"c_attn", "c_proj", "temperature"} | ({"w_q", "w_k"} if features == "learned" else set())


@pytest.mark.parametrize("pos_emb", ["rope", "none"])
def test_queries_and_keys_have_one_bounded_norm(pos_emb):
    attn = attention(pos_emb=pos_emb, performer_max_norm2=3.0)
    attn.temperature.data = torch.tensor([-50.0, 50.0]).double()
    for scale in (1e-3, 1.0, 1e3):
        q, k, _ = attn._qkv(scale * torch.randn(2, 9, 32, dtype=torch.float64), 0)
        for t in (q, k):
            torch.testing.assert_close((t**2).sum(-1)[..., 1], torch.full((2, 9), 3.0).double())
            assert (t**2).sum(-1)[..., 0].max() < 1e-20


def test_rope_is_relative():
    """The exact kernel of rotated queries and keys depends on distances alone; positions do reach the output."""
    attn = attention(pos_emb="rope")
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    (q, k, _), (q2, k2, _) = attn._qkv(x, 0), attn._qkv(x, 100)
    dot = lambda q, k: torch.einsum("bihd,bjhd->bhij", q, k)  # noqa: E731
    torch.testing.assert_close(dot(q, k), dot(q2, k2), rtol=0, atol=1e-10)
    assert (q - q2).abs().max() > 0.1


def test_number_of_features():
    for d, M in ((32, 128), (64, 256), (128, 512), (1, 16)):
        assert attention(head_dim=d, n_embd=32).n_feature == M
    assert attention(performer_num_features=40).w.shape == (2, 40, 16)


def test_decoding_state_does_not_grow():
    attn = attention()
    state = attn.init_state(2, 8)
    for _ in range(20):
        _, state = attn.step(torch.randn(2, 3, 32, dtype=torch.float64), state)
    assert state[0].shape == (2, 2, attn.n_feature, 17) and state[1] == 60


def test_features_are_redrawn_between_training_steps_alone():
    attn = attention(performer_redraw_interval=3)
    first, other = attn.w.clone(), attention(performer_redraw_interval=3)
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    for _ in range(5):
        attn.train()(x), attn.eval()(x)
        attn.step(x, attn.init_state(2, 20))
    assert torch.equal(attn.w, first)
    seen = [first]
    for step in range(10):
        attn.redraw(step)
        if not torch.equal(seen[-1], attn.w):
            assert step in (3, 6, 9)
            seen.append(attn.w.clone())
    assert len(seen) == 4 and abs(attn.w.var() - 1) < 0.4
    other.load_state_dict(attn.state_dict())  # the seed is in it: the same draw, whatever came before
    torch.manual_seed(1)
    other.redraw(6), attn.redraw(9)
    assert torch.equal(other.w, seen[2]) and torch.equal(attn.w, seen[3])
    fixed = attention(performer_redraw_interval=0)
    before = fixed.w.clone()
    fixed.redraw(1000)
    assert torch.equal(fixed.w, before)


@pytest.mark.parametrize("features", ["relu", "learned"])
def test_learned_features_have_no_redraw(features):
    attn = attention(performer_features=features, performer_redraw_interval=1)
    before = {k: v.clone() for k, v in attn.state_dict().items()}
    attn.redraw(1)
    changed = {k for k, v in attn.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == ({"w"} if features == "relu" else set())


def test_training_redraws_once_a_step_and_evaluation_never(tiny, monkeypatch):
    steps = []
    monkeypatch.setattr(GPT, "redraw", lambda self, step: steps.append((step, self.training)))
    arguments = tiny(attention_type="performer", max_iters=4, gradient_accumulation_steps=2)
    assert train.main(arguments) == 0
    assert steps == [(step, True) for step in range(4)]


def test_features_and_seed_are_in_checkpoints_and_exports(tiny, tmp_path):
    train.main(tiny(attention_type="performer", performer_redraw_interval=2, max_iters=4, export=True))
    last, exported = (GPT.from_checkpoint(str(tmp_path / "run"), x).eval() for x in ("ckpt.pt", "model.safetensors"))
    idx = torch.randint(256, (2, 16))
    assert torch.equal(last(idx)[0], exported(idx)[0]) and last.loaded.new == exported.loaded.new == []
    for model in (last, exported):
        model.redraw(4)
    assert torch.equal(last(idx)[0], exported(idx)[0])


def test_dry_run(tiny, capsys):
    assert train.main(tiny(attention_type="performer", dry_run=True)) == 0
    assert "GFLOP" in capsys.readouterr().out


def test_keys_belong_to_the_type():
    with pytest.raises(ConfigError, match="performer_num_features belongs to attention_type=performer"):
        load(["--performer_num_features=64"], GPTConfig)
    for bad in ("performer_features=cosine", "performer_max_norm2=0", "performer_max_norm2=100"):
        with pytest.raises(ConfigError, match=bad.split("=")[0]):
            load(["--attention_type=performer", f"--{bad}"], GPTConfig)


def test_weights_of_softmax_attention_fit():
    shape = dict(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=32)
    ours = GPT(GPTConfig(**shape, attention_type="performer")).transformer.h[0].attn.state_dict()
    theirs = GPT(GPTConfig(**shape)).transformer.h[0].attn.state_dict()
    assert {k: v.shape for k, v in theirs.items()}.items() <= {k: v.shape for k, v in ours.items()}.items()


# ----------------------------------------------------------------------------- Triton


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_triton_under_the_interpreter(which):
    interpret(__file__, which)


@INTERPRETED
@pytest.mark.parametrize("features", FEATURES)
def test_interpreted(features):
    compare(draw(1, 70, 1, 8, 20, 24), torch.float32, FP32, features, "triton")


@INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize("T, D, M, V", [(1, 8, 16, 16), (64, 16, 32, 16), (130, 8, 80, 80)])
def test_interpreted_shapes(T, D, M, V):
    compare(draw(2, T, 3, D, M, V), torch.float32, FP32, backend="triton")


@INTERPRETED
def test_interpreted_maps_that_heads_share():
    """W as a view, expanded or transposed, and without a gradient of its own."""
    q, k, v, *_, do, _ = (x.float().requires_grad_() for x in draw(1, 40, 3, 8, 16, 16))
    for w in (torch.randn(1, 16, 8).expand(3, -1, -1), torch.randn(3, 8, 16).mT):
        outputs = [performer(q, k, v, w, w, backend=backend)[0] for backend in ("triton", "recurrent")]
        torch.testing.assert_close(*outputs)
        found, wanted = (torch.autograd.grad(o, (q, k, v), do) for o in outputs)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@INTERPRETED
def test_interpreted_launches(monkeypatch):
    """Four kernels forward, six backward."""
    forward = ["feature", "feature", "scan", "read"]
    backward = ["feature", "feature", "scan", "scan", "read", "grad"]
    names, count, launch = {kernel: name for name, kernel in P.KERNELS.items()}, [], Kernel.launch
    monkeypatch.setattr(Kernel, "launch", lambda self, *a, **kw: (count.append(names[self]), launch(self, *a, **kw)))
    run(draw(1, 20, 1, 4, 16, 16), torch.float32, "softmax", "triton")
    assert count == forward + backward


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("dtype, tolerances", [(torch.float32, FP32), (torch.bfloat16, (5e-3, 5e-3) + (1e-2,) * 6)])
@pytest.mark.parametrize("T, D, M, V", [(1, 16, 16, 16), (100, 64, 256, 64), (1000, 128, 512, 128), (130, 60, 96, 192)])
def test_on_a_gpu(T, D, M, V, dtype, tolerances, features):
    inputs = [x.to(dtype).double() if i in (2, 6) else x for i, x in enumerate(draw(1, T, 3, D, M, V))]
    compare(inputs, dtype, tolerances, features, "triton", "cuda")
