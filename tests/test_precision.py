"""Every operator in every precision: under autocast, in mixed types, and of one head, token or slot."""

import itertools
import math

import pytest
import torch
from test_random_models import performer_oracle

from kernels.distance import distance
from kernels.gated import gated, gated_map
from kernels.gla import gla
from kernels.gsa import gsa
from kernels.nsa import nsa_compressed, nsa_selected, nsa_window
from kernels.performer import performer

pytestmark = pytest.mark.usefixtures("fresh_rng")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 3e-3}


def rand(*shape):
    return torch.randn(shape, dtype=torch.float64)


# By operator, at shape (B, T, H, K, V): what is cast for products, the other inputs, and the call; all inputs fp64.


def draw_gla(B, T, H, K, V):
    return [rand(B, T, H, K), rand(B, T, H, K), rand(B, T, H, V)], [-rand(B, T, H, K).exp(), rand(B, H, K, V)]


def call_gla(backend, gate_min):
    def call(q, k, v, g, state):
        o, state = gla(q, k, v, g, None, gate_min, state, True, backend)
        return o, state

    return call


def draw_gsa(B, T, H, K, V, M=3):
    own = [rand(B, T, H, M).sigmoid(), -rand(B, T, H, M).exp(), rand(B, H, K, M), rand(B, H, M, V)]
    return [rand(B, T, H, K), rand(B, T, H, K), rand(B, T, H, V)], own


def call_gsa(backend):
    def call(q, k, v, s, g, hk, hv):
        o, state = gsa(q, k, v, s, g, None, (hk, hv), True, backend)
        return o, *state

    return call


def draw_performer(B, T, H, K, V, M=6):
    q, k, *w = rand(B, T, H, K) / K, rand(B, T, H, K) / K, rand(H, M, K), rand(H, M, K)
    return [rand(B, T, H, V)], [q, k, *w, rand(B, H, M, V + 1).exp()]


def call_performer(backend, features):
    return lambda v, q, k, wq, wk, state: performer(q, k, v, wq, wk, features, state, True, backend)


def draw_gated(B, T, H, K, V):
    return [rand(B, T, H, K), rand(B, T, H, K), rand(B, T, H, V)], [rand(B, T, H), rand(B, T, H)]


def call_gated(backend):
    return lambda q, k, v, a, b: gated(q, k, v, a, b, backend=backend)


def draw_map(B, T, H, K, V):
    """Decoding casts nothing itself."""
    return [], [rand(B, H, T, K), rand(B, H, T, K), rand(B, H, T), rand(B, H, T)]


def call_map(q, k, a, b):
    return gated_map(q, k, a, b, torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril())


def draw_distance(kind):
    def draw(B, T, H, K, V):
        table = 0 * rand(H, T) if kind == "ones" else -rand(H, T).exp()
        table[:, 2::3] = 0 if kind == "ones" else -math.inf
        prefix = [-rand(H, 2, T).exp()] if kind == "prefix" else []
        return [rand(B, T, H, K), rand(B, T, H, K), rand(B, T, H, V)], [table, *prefix]

    return draw


def call_distance(backend):
    return lambda q, k, v, *masks: (distance(q, k, v, *masks, backend=backend),)


def draw_nsa(B, T, H, K, V):
    return [rand(B, T, H, K), rand(B, T, H, K), rand(B, T, H, K)], []


def call_compressed(q, k, v):
    N = max(0, (q.size(1) - 8) // 4 + 1)
    return (nsa_compressed(q, k[:, :N], v[:, :N], 8, 4, 8, 4)[0],)


def call_selected(backend):
    def call(q, k, v):
        B, T, H, _ = q.shape
        index = torch.arange(T)[:, None] // 8 - torch.arange(3)
        return (nsa_selected(q, k, v, index[None, :, None].expand(B, T, H, 3).clamp(min=-1), 8, backend=backend),)

    return call


OPS = {  # computed inside a custom op, whose backward pass is an op too
    "gla": (draw_gla, call_gla("torch", -1.25)),
    "gla tree": (draw_gla, call_gla("torch", None)),
    "gsa": (draw_gsa, call_gsa("torch")),
    **{f"performer {f}": (draw_performer, call_performer("torch", f)) for f in ("softmax", "relu", "learned")},
    "gated": (draw_gated, call_gated("torch")),
    "distance": (draw_distance("some"), call_distance("banded")),
    "distance prefix": (draw_distance("prefix"), call_distance("banded")),
    "distance ones": (draw_distance("ones"), call_distance("banded")),
    "nsa compressed": (draw_nsa, call_compressed),
    "nsa selected": (draw_nsa, call_selected("torch")),
    "nsa window": (draw_nsa, lambda q, k, v: (nsa_window(q, k, v, 16),)),
}
FORMS = {  # by PyTorch's own operations: steps of decoding, and oracles
    "gla recurrent": (draw_gla, call_gla("recurrent", -1.25)),
    "gla recurrent, no bound": (draw_gla, call_gla("recurrent", None)),
    "gsa recurrent": (draw_gsa, call_gsa("recurrent")),
    **{f"performer {f} recurrent": (draw_performer, call_performer("recurrent", f)) for f in ("softmax", "learned")},
    "gated dense": (draw_gated, call_gated("dense")),
    "gated map": (draw_map, call_map),
    "distance dense": (draw_distance("prefix"), call_distance("dense")),
    "nsa gather": (draw_nsa, call_selected("gather")),
}
NAMES, SHAPE = [*OPS, *FORMS], (2, 70, 3, 16, 12)


def leaves(xs, dtype):
    return [x.to(dtype, copy=True).requires_grad_() for x in xs]


# ----------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("name", NAMES)
def test_autocast_casts_the_inputs_of_products_and_nothing_else(name):
    """Digit for digit what inputs give that were cast by hand, outside autocast; also where the backward pass of an op
    runs inside it."""
    draw, call = (OPS | FORMS)[name]
    low, own = draw(*SHAPE)
    by_hand = leaves(low, torch.bfloat16) + leaves(own, torch.float32)
    wanted = call(*by_hand)
    weights = [torch.randn_like(o) for o in wanted]
    grads = torch.autograd.grad(wanted, by_hand, weights)
    for inside in (False, True) if name in OPS else (False,):
        inputs = [x.detach().float().requires_grad_() for x in by_hand]
        with torch.autocast("cpu", torch.bfloat16):
            found = call(*inputs)
            again = torch.autograd.grad(found, inputs, weights) if inside else None
        again = again or torch.autograd.grad(found, inputs, weights)
        for a, b in zip((*found, *again), (*wanted, *(g.float() for g in grads)), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("name", OPS)
def test_autocast_in_a_compiled_graph(name):
    draw, call = OPS[name]
    low, own = draw(*SHAPE)
    inputs = leaves(low + own, torch.float32)
    torch._dynamo.reset()
    compiled, found = torch.compile(call, fullgraph=True, backend="aot_eager"), []
    for f in (call, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            o = f(*inputs)
        found.append((*o, *torch.autograd.grad([x.float().square().sum() for x in o], inputs)))
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


# ----------------------------------------------------------------------------- mixed types


@pytest.mark.parametrize("name", NAMES)
def test_any_types_go_together(name):
    """Products and the other inputs each of any type: the output is of the first kind, a gradient of its input's."""
    draw, call = (OPS | FORMS)[name]
    drawn = draw(*SHAPE)
    for types in itertools.product(*(DTYPES if xs else (torch.float64,) for xs in drawn)):
        inputs = [x for xs, dtype in zip(drawn, types) for x in leaves(xs, dtype)]
        exact = [x.detach().double().requires_grad_() for x in inputs]
        found, wanted = call(*inputs), call(*exact)
        weights = [torch.randn_like(o) for o in wanted]
        grads = torch.autograd.grad(found, inputs, [w.to(o.dtype) for w, o in zip(weights, found)])
        again = torch.autograd.grad(wanted, exact, [w.to(o.dtype).double() for w, o in zip(weights, found)])
        assert found[0].dtype == (types[0] if drawn[0] else torch.promote_types(types[1], torch.float32))
        assert [g.dtype for g in grads] == [x.dtype for x in inputs]
        sizes = [b.norm().clamp(min=1e-3) for b in (*wanted, *again)]
        if name == "performer relu":  # (n/z)' is n'/z less n z'/z^2, which are large where all features are near 0
            v, q, k, wq, wk, state = exact
            o, last = performer_oracle(q, k, v, wq, wk, "relu", state, held=True)
            parts = torch.autograd.grad([(o * weights[0]).sum(), (last * weights[1]).sum()], exact)
            sizes[2:] = [max(size, part.norm()) for size, part in zip(sizes[2:], parts)]
        for a, b, size in zip((*found, *grads), (*wanted, *again), sizes, strict=True):
            error = (a.double() - b).norm() / size
            assert a.isfinite().all() and error <= max(TOLERANCE[d] for d in (a.dtype, *types)), (types, error)


# ----------------------------------------------------------------------------- shapes of one


@pytest.mark.parametrize("name", OPS)
def test_dimensions_of_one(name):
    """No output is a view of another or of an input, which PyTorch refuses."""
    draw, call = OPS[name]
    sizes = {"M": (1, 2)} if "gsa" in name or "performer" in name else {}
    for B, T, H, K, V, *M in itertools.product(*[(1, 2)] * 5, *sizes.values()):
        low, own = draw(B, T, H, K, V, *M)
        inputs = leaves(low + own, torch.float64)
        found = call(*inputs)
        grads = torch.autograd.grad(found, inputs, [torch.randn_like(o) for o in found])
        assert all(x.isfinite().all() for x in (*found, *grads))
