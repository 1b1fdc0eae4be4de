"""Masks by distance: the banded form against the dense oracle, what a mask drops, and the two types that learn one."""

import itertools
import json
import math

import pytest
import torch
from conftest import check_units
from hypothesis import given, settings, strategies as st
from test_gla import GPU, INTERPRETED, interpret

import bench
import train
from benchmarks import decoding
from config import ConfigError
from kernels import distance as D
from kernels.distance import distance
from model import GPT, GPTConfig, param_groups

KINDS = ("span", "full", "mixed", "few", "noself", "multiples", "wave", "far", "nothing")
TOLERANCES = {torch.float64: (1e-10,) * 6, torch.float32: (2e-6,) + (2e-5,) * 5}


def masks(kind, H, T, rng):
    """(H, T) in [0, 1]"""
    x, m = torch.arange(T, dtype=torch.float64), torch.zeros(H, T, dtype=torch.float64)
    for h in range(H):
        z, R = rng.uniform(0, T), rng.choice([1, 8, 32])
        span = ((R + z - x) / R).clamp(0, 1)
        if kind == "full" or (kind == "mixed" and h % 2):
            m[h] = 1
        elif kind in ("span", "mixed"):
            m[h] = span
        elif kind == "few":
            m[h, [min(T - 1, i) for i in (0, 1, 2, 7, T // 2, T - 1)]] = torch.rand(6, dtype=torch.float64)
        elif kind == "noself":
            m[h, [min(3, T - 1), T // 2]] = torch.rand(2, dtype=torch.float64) + 0.1
        elif kind == "multiples":
            m[h, :: int(rng.integers(2, 6))] = rng.uniform(0.1, 1)
        elif kind == "far":  # the first queries see no key
            m[h, int(rng.integers(T // 4, T)) :: int(rng.integers(1, 4))] = rng.uniform(0.1, 1)
        elif kind == "wave":
            P, rho = rng.uniform(2, 8), rng.uniform(-0.25, 0.25)
            m[h] = span * (0.5 + P * (rho + 0.25) - (x - P * (x / P).round()).abs()).clamp(0, 1)
    return m


def draw(B, T, H, K, V, kind, P, rng, shared=False):
    """q, k, v, table, prefix (or None) and the gradient that comes in, all fp64."""
    q, k, v, do = (torch.randn(B, T, H, d, dtype=torch.float64) for d in (K, K, V, V))
    u = masks(kind, 1 if shared else H, T, rng)
    f = torch.rand(len(u), P, 1, dtype=torch.float64) * (torch.rand(len(u), P, 1) < 0.7)
    return q, k, v, u.log(), (u[:, None] + f).log() if P else None, do


def run(inputs, dtype, backend):
    *tensors, do = inputs
    leaves = [None if x is None else x.to(dtype, copy=True).requires_grad_() for x in tensors]
    o = distance(*leaves, backend=backend)
    grads = torch.autograd.grad(o, [x for x in leaves if x is not None], do.to(dtype))
    assert o.dtype == dtype
    return [x.detach().double() for x in (o, *grads)]


def agree(found, wanted, tolerances, for_zero=0.1):
    summed = math.prod(wanted[0].shape[:3])  # queries: a table's gradient is a sum over them, which may cancel
    for name, x, ref, tolerance in zip(("o", "dq", "dk", "dv", "dtable", "dprefix"), found, wanted, tolerances):
        assert x.shape == ref.shape and torch.isfinite(x).all(), name
        if x.numel() and ref.abs().max() < 1e-12:  # exactly 0 (one key): its terms, of size 1, cancel up to rounding
            assert x.abs().max() <= for_zero * tolerance, f"{name}: {x.abs().max():.1e} for 0"
        elif x.numel():  # a gradient that is 0 but for rounding has the scale of its terms
            terms = summed if name in ("dtable", "dprefix") else x.numel()
            error = ((x - ref).norm() / ref.norm().clamp(min=0.01 * terms**0.5)).item()
            assert error <= tolerance, f"{name}: {error:.1e}"


def compare(inputs, dtypes=(torch.float64, torch.float32)):
    wanted = run(inputs, torch.float64, "dense")
    for dtype in dtypes:
        agree(run(inputs, dtype, "auto"), wanted, TOLERANCES[dtype])


# ----------------------------------------------------------------------------- banded against dense


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 2, 5, 63, 64, 65, 200])
def test_lengths(T, kind, fresh_rng):
    compare(draw(2, T, 3, 8, 8, kind, 0, fresh_rng))
    compare(draw(2, T, 2, 8, 12, kind, min(3, T), fresh_rng))
    compare(draw(2, T, 3, 8, 8, kind, 0, fresh_rng, shared=True))


@pytest.mark.parametrize("kind", ["span", "wave", "few", "multiples", "noself", "far"])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_every_block_size_and_several_segments(block, kind, fresh_rng, monkeypatch):
    """Small segments: borders between them, and between rows; the caches hold plans of the usual sizes."""
    monkeypatch.setattr(D, "SEGMENT", 2**13)
    monkeypatch.setattr(D, "BLOCKS", (block,))
    caches = D.make_plan, D.segments, D.cost, D.together
    [cache.cache_clear() for cache in caches]
    try:
        for P, shared in ((0, False), (3, True)):
            compare(draw(3, 300, 2, 8, 8, kind, P, fresh_rng, shared))
    finally:
        [cache.cache_clear() for cache in caches]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 150), st.sampled_from(KINDS), st.integers(0, 4), st.booleans(), st.integers(0, 2**31))
def test_random_masks(T, kind, P, shared, seed):
    import numpy as np

    torch.manual_seed(seed)
    compare(draw(2, T, 2, 4, 6, kind, min(P, T), np.random.default_rng(seed), shared), (torch.float64,))


def test_gradcheck(fresh_rng):
    """Against differences, not against the oracle's autograd."""
    for kind in ("span", "few", "noself"):
        q, k, v, table, prefix, _ = draw(1, 9, 2, 3, 2, kind, 2, fresh_rng)
        kept = table > -math.inf
        values = torch.randn(int(kept.sum()), dtype=torch.float64).requires_grad_()

        def f(q, k, v, values, prefix):
            return distance(q, k, v, torch.full_like(table, -math.inf).masked_scatter(kept, values), prefix)  # noqa: B023

        assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in (q, k, v)] + [values, prefix])


def test_full_mask_is_causal_attention(fresh_rng):
    q, k, v, table, _, _ = draw(2, 70, 3, 16, 16, "full", 0, fresh_rng)
    wanted = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    assert torch.equal(distance(q, k, v, table), wanted.transpose(1, 2))
    assert [str(plan) for plan in D.plans(table, table.new_empty(3, 0, 70))] == ["causal SDPA"] * 3
    for backend in ("dense", "banded"):
        torch.testing.assert_close(distance(q, k, v, table * 0 - 1.5, backend=backend), wanted.transpose(1, 2))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("T, K, V", [(1, 8, 8), (70, 8, 8), (70, 8, 12), (300, 16, 16)])
def test_a_row_of_ones_has_a_gradient(T, K, V, shared, fresh_rng):
    """It is a row like any other to whoever learns it: alone, beside other rows, and with masks of the first keys."""
    for kind, P in (("full", 0), ("full", min(2, T)), ("mixed", 0)):
        inputs = draw(2, T, 3, K, V, kind, P, fresh_rng, shared)
        compare(inputs)
        weights = run(inputs, torch.float64, "auto")[4]
        assert T == 1 or (weights.abs().amax(1) > 1e-3).all()


def test_ones_of_no_interest(fresh_rng):
    """constant_ones: the same output and gradients of q, k and v, at the cost of PyTorch's causal attention; of the
    rows' own gradient nothing is said. Where the table needs none, that is so without asking."""
    inputs = draw(2, 70, 3, 8, 8, "mixed", 0, fresh_rng)
    wanted = run(inputs, torch.float64, "dense")
    q, k, v, table, _, do = inputs
    for learned in (True, False):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        own = table.clone().requires_grad_(learned)
        o = distance(*leaves, own, constant_ones=learned)
        with torch.autograd.profiler.profile() as profile:
            grads = torch.autograd.grad(o, [*leaves, own] if learned else leaves, do)
        assert any("flash_attention_for_cpu_backward" in event.name for event in profile.function_events)
        agree([o.detach(), *grads[:3]], wanted[:4], (1e-10,) * 4)
    found = D.flat(table).all(1).tolist()  # a span may happen to hold all 70 distances
    assert found == (table == 0).all(1).tolist() and found[1]


@pytest.fixture
def windows_are_free(monkeypatch):
    """The plan with a flat part is taken wherever there is one."""
    cost = D.cost
    monkeypatch.setattr(D, "cost", lambda plan, T, heads=1: -plan.flat if plan.flat else cost(plan, T, heads))
    D.make_plan.cache_clear()
    yield
    D.make_plan.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, shared", [(140, False), (300, False), (513, True), (700, False)])
def test_windows(T, shared, dtype, windows_are_free, fresh_rng):
    """Ramps of different heads, a hard window, and one that begins at a whole distance."""
    starts, slopes = [fresh_rng.uniform(129, T - 8), 131.0, max(132.0, 0.9 * T), 130.5], [32, 1, 7, 0.5]
    x = torch.arange(T, dtype=torch.float64)
    rows = torch.stack([((z + R - x) / R).clamp(0, 1) for z, R in zip(starts, slopes)])
    table = (rows[:1] if shared else rows).log()
    q, k, v, do = (torch.randn(2, T, 4, 8, dtype=torch.float64).to(dtype).double() for _ in range(4))
    assert all(plan.flat >= 129 for plan in D.plans(table, table.new_empty(len(table), 0, T)) if plan.block)
    found = []
    for backend, kind in (("dense", torch.float64), ("banded", dtype)):
        leaves = [x.to(kind, copy=True).requires_grad_() for x in (q, k, v)]
        own = table.to(torch.float32 if kind == torch.bfloat16 else kind, copy=True).requires_grad_()
        o = distance(*leaves, own, backend=backend, constant_ones=True)
        found.append([o, *torch.autograd.grad(o, [*leaves, own], do.to(kind))])
    found = [[x.detach().double() for x in xs] for xs in found]
    agree(found[1], found[0], TOLERANCES.get(dtype, (1e-2,) * 5))
    assert (found[1][4][D.flat(table)] == 0).all() and (found[1][4][0] != 0).any()
    hidden = distance(*(x.float() for x in (q, k, v)), table.float())
    q[:, T // 2] += 1
    v[:, T // 2] += 1
    assert torch.equal(distance(*(x.float() for x in (q, k, v)), table.float())[:, : T // 2], hidden[:, : T // 2])


def test_numbers_of_a_vector_apart(fresh_rng):
    """Inputs and gradients whose last dimension is not contiguous, for rows of ones and for others."""
    for kind in ("full", "mixed", "span"):
        *tensors, table, prefix, do = draw(2, 40, 3, 2, 2, kind, 0, fresh_rng)
        wanted = run((*tensors, table, prefix, do), torch.float64, "dense")
        for layout in ((0, 1, 3, 2), (3, 0, 1, 2), (3, 2, 1, 0)):
            back = torch.tensor(layout).argsort().tolist()
            apart = [x.permute(layout).contiguous().permute(back) for x in (*tensors, do)]
            assert apart[0].stride(-1) != 1 and torch.equal(apart[0], tensors[0])
            leaves = [x.requires_grad_() for x in apart[:3]]
            o = distance(*leaves, table)
            grads = torch.autograd.grad(o, leaves, apart[3])
            agree([o.detach(), *grads], wanted[:4], TOLERANCES[torch.float64])


def test_bf16_computes_in_fp32(fresh_rng):
    for kind in ("span", "full"):
        q, k, v, table, _, do = draw(2, 100, 2, 16, 16, kind, 0, fresh_rng)
        q, k, v, do = (x.bfloat16() for x in (q, k, v, do))
        wanted = run((*(x.double() for x in (q, k, v)), table, None, do), torch.float64, "dense")
        leaves = [x.requires_grad_() for x in (q, k, v)]
        o = distance(*leaves, table.float())
        for x, ref in zip((o, *torch.autograd.grad(o, leaves, do)), wanted):
            assert x.dtype == torch.bfloat16 and (x.double() - ref).norm() <= 1e-2 * ref.norm()


def test_non_contiguous(fresh_rng):
    inputs = draw(2, 70, 3, 16, 16, "wave", 0, fresh_rng)
    wanted = run(inputs, torch.float64, "dense")
    q, k, v, table, _, do = inputs
    packed = torch.cat((q, k, v), -1).transpose(1, 2).contiguous().requires_grad_()  # (B, H, T, 3 D)
    o = distance(*packed.transpose(1, 2).chunk(3, -1), table)
    (grad,) = torch.autograd.grad(o, packed, do[:, :1, :1].expand_as(do))
    expected = run((q, k, v, table, None, do[:, :1, :1].expand_as(do).contiguous()), torch.float64, "dense")
    torch.testing.assert_close(o, wanted[0])
    torch.testing.assert_close(grad, torch.cat(expected[1:4], -1).transpose(1, 2))


def test_opcheck(fresh_rng):
    q, k, v, table, _, _ = draw(1, 40, 2, 8, 8, "span", 0, fresh_rng)
    tensors = [x.float().requires_grad_() for x in (q, k, v, table.clamp(min=-50))]
    tensors += [tensors[3].new_empty(2, 0, 40), torch.empty(0, dtype=torch.int32)]
    for table in (tensors[3], torch.zeros(2, 40, requires_grad=True)):
        for constant_ones in (False, True):
            torch.library.opcheck(D.distance_op, (*tensors[:3], table, *tensors[4:], 0.3, constant_ones, "torch"))


# ----------------------------------------------------------------------------- Triton


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_diagonals_are_those_that_hold_something(kind, size, fresh_rng):
    """Against the distances of each tile's pairs, one by one; a compiled model sees into it."""
    torch._dynamo.reset()
    compiled = torch.compile(D.diagonals, backend="aot_eager", fullgraph=True)
    for T in (1, size, 5 * size + 7):
        table, n = draw(1, T, 2, 1, 1, kind, 0, fresh_rng)[3], -(-T // size)
        for constant_ones in (False, True):
            found = D.diagonals(table, size, constant_ones)
            assert torch.equal(compiled(table, size, constant_ones), found)
            order, count, kinds = found.unbind(1)
            slope = (table > -math.inf) & ~(D.flat(table) & constant_ones)
            for h, i in itertools.product(range(2), range(n)):
                far = torch.arange(max(0, size * (i - 1) + 1), min(T, size * (i + 1)))
                kept = [
                    x for x in range(n) if (table[h, max(0, size * (x - 1) + 1) : size * (x + 1)] > -math.inf).any()
                ]
                assert order[h, : len(kept)].tolist() == kept and count[h, i] == sum(x <= i for x in kept)
                masked = i == 0 or bool((table[h, far] != 0).any())
                assert kinds[h, i] == masked + 2 * bool(slope[h, far].any())


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_triton_under_the_interpreter(which):
    interpret(__file__, which)


def compare_triton(inputs):
    agree(run(inputs, torch.float32, "triton"), run(inputs, torch.float64, "dense"), TOLERANCES[torch.float32], 1)


@INTERPRETED
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T, P, shared", [(70, 0, False), (100, 3, True), (33, 40, False)])
def test_interpreted(T, P, shared, kind, fresh_rng):
    """P 40: first keys that fill more than a tile, and more than there are."""
    compare_triton(draw(2, T, 2, 16, 24, kind, P, fresh_rng, shared))


@INTERPRETED
@pytest.mark.parametrize("kind", ["span", "few", "far"])
def test_interpreted_tiles(kind, fresh_rng, monkeypatch):
    """Those of bf16, whose products the interpreter cannot do."""
    monkeypatch.setattr(D, "tile_size", lambda *_: 64)
    compare_triton(draw(1, 140, 2, 16, 16, kind, 2, fresh_rng))


@INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T, K, V", [(1, 8, 8), (32, 40, 8), (65, 8, 72), (200, 16, 16)])
def test_interpreted_shapes(T, K, V, kind, fresh_rng):
    for P, shared in ((0, False), (2, False), (min(T, 20), True)):
        compare_triton(draw(2, T, 3, K, V, kind, P, fresh_rng, shared))


@INTERPRETED
def test_interpreted_runs_of_a_diagonal(fresh_rng, monkeypatch):
    """A diagonal that several programs share."""
    monkeypatch.setattr(D, "RUN", 2)
    compare_triton(draw(1, 200, 2, 16, 16, "wave", 3, fresh_rng))


@INTERPRETED
def test_interpreted_constant_ones(fresh_rng):
    """Whole diagonals that are flat have no gradient; the others have all of theirs."""
    q, k, v, table, _, do = draw(1, 150, 3, 16, 16, "span", 0, fresh_rng)
    found = []
    for dtype, backend in ((torch.float64, "dense"), (torch.float32, "triton")):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v, table)]
        o = distance(*leaves, backend=backend, constant_ones=True)
        found.append([o, *torch.autograd.grad(o, leaves, do.to(dtype))])
    wanted, found = ([x.detach().double() for x in xs] for xs in found)
    agree(found, wanted, TOLERANCES[torch.float32], for_zero=1)
    assert not found[4][D.flat(table)].any()


@INTERPRETED
def test_interpreted_is_causal(fresh_rng):
    q, k, v, table, _, _ = (x if x is None else x.float() for x in draw(1, 90, 2, 16, 16, "span", 0, fresh_rng))
    before = distance(q, k, v, table, backend="triton")
    for x in (k, v):
        x[:, 60] += 1
    after = distance(q, k, v, table, backend="triton")
    assert torch.equal(after[:, :60], before[:, :60]) and not torch.equal(after[:, 60:], before[:, 60:])


@INTERPRETED
def test_interpreted_op(fresh_rng):
    q, k, v, table, prefix, _ = draw(1, 40, 2, 8, 8, "span", 2, fresh_rng)
    tensors = [x.float().requires_grad_() for x in (q, k, v, table.clamp(min=-50), prefix.clamp(min=-50))]
    tiles = D.diagonals(table, D.tile_size(torch.float32, 8), False)
    torch.library.opcheck(D.distance_op, (*tensors, tiles, 0.3, False, "triton"), test_utils="test_faketensor")


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "banded"])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind, backend, fresh_rng):
    """Triton and the banded form against the oracle, all gradients; bf16 to its own rounding."""
    for P, shared in ((0, False), (3, False), (0, True)):
        *tensors, do = draw(2, 500, 3, 64, 64, kind, P, fresh_rng, shared)
        for dtype, tolerances in ((torch.float32, (2e-5,) + (2e-4,) * 5), (torch.bfloat16, (1e-2,) + (2e-2,) * 5)):
            rounded = [x.to(dtype).double() for x in tensors[:3]]
            wanted = run((*rounded, *tensors[3:], do.to(dtype).double()), torch.float64, "dense")
            leaves = [x.cuda().to(dtype) for x in rounded] + [x if x is None else x.cuda().float() for x in tensors[3:]]
            leaves = [x if x is None else x.requires_grad_() for x in leaves]
            o = distance(*leaves, backend=backend)
            grads = torch.autograd.grad(o, [x for x in leaves if x is not None], do.cuda().to(dtype))
            agree([x.detach().double().cpu() for x in (o, *grads)], wanted, tolerances, for_zero=1)
    assert "Triton" in D.paths(leaves[3].detach(), None, 64)[0][0]


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["forward", "query", "key", "table"])
@pytest.mark.parametrize("width", [64, 128])
def test_every_configuration_on_a_gpu(name, width, fresh_rng, monkeypatch):
    *tensors, do = draw(1, 300, 2, width, width, "wave", 0, fresh_rng)
    rounded = [x.bfloat16().double() for x in tensors[:3]]
    wanted = run((*rounded, *tensors[3:], do.bfloat16().double()), torch.float64, "dense")
    for option in D.KERNELS[name].configs:
        monkeypatch.setattr(D.KERNELS[name], "configs", [option])
        monkeypatch.setattr(D.KERNELS[name], "runs", {})
        leaves = [x.cuda().bfloat16().requires_grad_() for x in rounded] + [tensors[3].cuda().float().requires_grad_()]
        o = distance(*leaves)
        grads = torch.autograd.grad(o, leaves, do.cuda().bfloat16())
        agree([x.detach().double().cpu() for x in (o, *grads)], wanted, (1e-2,) + (2e-2,) * 5, for_zero=1)


@pytest.mark.parametrize(
    "change, want",
    [
        (dict(k=torch.randn(2, 9, 3, 8)), "k must have q's shape"),
        (dict(table=torch.zeros(3, 9)), "table must be (3, 10) or (1, 10)"),
        (dict(prefix=torch.zeros(3, 2, 9)), "prefix must be (3, P, 10)"),
        (dict(backend="fast"), "backend must be auto, banded, triton or dense"),
        (dict(q=torch.randn(10, 3, 8)), "q must be a float (B, T, H, D)"),
    ],
)
def test_refusals(change, want):
    given = dict(q=torch.randn(2, 10, 3, 8), k=torch.randn(2, 10, 3, 8), v=torch.randn(2, 10, 3, 8))
    with pytest.raises(ValueError) as error:
        distance(**(given | dict(table=torch.zeros(3, 10)) | change))
    assert want in str(error.value)


# ----------------------------------------------------------------------------- what a mask drops


@pytest.mark.parametrize("kind", ["span", "few", "wave", "multiples", "noself"])
def test_dropped_keys_have_no_effect_at_all(kind, fresh_rng):
    """Bit for bit: a key whose distances to the queries are dropped may be anything, and has no gradient there."""
    q, k, v, table, _, do = draw(1, 150, 2, 8, 8, kind, 0, fresh_rng)
    o = distance(q, k, v, table)
    for s in fresh_rng.integers(0, 150, 4).tolist():
        edited = [x.clone() for x in (k, v)]
        for x in edited:
            x[:, s] += 100 * torch.randn_like(x[:, s])
        same = (distance(q, *edited, table) == o).all(-1)[0]  # (T, H)
        far = torch.arange(150) - s
        dropped = (far < 0)[:, None] | (table == -math.inf)[:, far.clamp(min=0)].T
        assert same[dropped].all()
        leaves = [x.clone().requires_grad_() for x in (k, v)]
        only = do.masked_fill(~dropped[None, :, :, None], 0.0)
        for grad in torch.autograd.grad(distance(q, *leaves, table), leaves, only):
            assert (grad[:, s] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kept_distance_is_computed(kind, fresh_rng):
    """The plan against the table: no pair that the mask keeps lies outside its blocks, whatever the length."""
    for T in (1, 17, 100, 400):
        table = masks(kind, 4, T, fresh_rng).log()
        plans, ends = D.plans(table, table.new_empty(4, 0, T)), {}
        for row, plan in zip(table, plans):
            kept = {int(x) for x in (row > -math.inf).nonzero()}
            if plan.block == 0:
                assert len(kept) == T
                continue
            covered = {x * plan.stride for lo, hi in plan.runs for x in range(lo, hi + 1)}
            assert kept <= covered
            ends[plan] = ends.get(plan, set()) | kept
            pairs = sum(T - x for x in kept)
            assert D.executed_pairs(plan, T) >= pairs
        for plan, kept in ends.items():  # of the heads that share it
            for lo, hi in plan.runs:
                assert lo * plan.stride in kept and hi * plan.stride in kept


def test_neighbours_share_a_plan_where_that_pays():
    """Short sequences: heads of like spans go together, one call for all; a wide head beside narrow ones stays apart,
    and long sequences have nothing to share."""

    def plans(T, *spans):
        table = torch.where(torch.arange(T) < torch.tensor(spans)[:, None], -0.1, -math.inf)
        return D.plans(table, table.new_empty(len(spans), 0, T))

    assert len(set(plans(256, 40, 48, 36, 44))) == 1
    assert D.executed_pairs(plans(2048, 16, 2000, 16)[0], 2048) < 0.1 * D.executed_pairs(plans(2048, 2000)[0], 2048)
    assert plans(4096, 100, 300, 200) == [*plans(4096, 100), *plans(4096, 300), *plans(4096, 200)]


def test_work_follows_the_mask():
    """Executed pairs, not time: a span of an eighth costs a fraction, few or periodic distances less still."""
    T = 4096

    def pairs(*kept):
        table = torch.full((1, T), -math.inf)
        table[0, list(kept)] = -0.5
        return D.executed_pairs(*D.plans(table, table.new_empty(1, 0, T)), T)

    full = T * (T + 1) / 2
    assert pairs(*range(256)) < 0.17 * full and pairs(*range(128)) < 0.10 * full
    assert pairs(0, 1, 2, 3, 4) < 0.02 * full and pairs(0, 1, 2048) < 0.02 * full
    assert pairs(*range(0, T, 4)) < 0.35 * full
    assert pairs(*range(T)) < 1.1 * full
    executed = [pairs(*range(s)) for s in (32, 64, 128, 256, 512, 1024, 2048)]
    assert executed == sorted(executed)


# ----------------------------------------------------------------------------- the types


VARIANTS = {
    "span": dict(attention_type="adaptive_span", softness_span_mask=8.0, span_init=0.2),
    "clamped": dict(attention_type="adaptive_span", softness_span_mask=4.0, span_init=0.3, span_param="ratio"),
    "wave": dict(attention_type="adaptive_span", softness_span_mask=8.0, use_triangle_wave_masking=True),
    "offsets": dict(attention_type="mask_mix"),
    "heads": dict(attention_type="mask_mix", mask_mix_per_head=True, mask_mix_candidates="offset_0,window_5,every_3"),
    "noself": dict(attention_type="mask_mix", mask_mix_candidates="offset_2,offset_9"),
    "first": dict(attention_type="mask_mix", mask_mix_candidates="offset_1,window_3,first_2,first_4"),
    "only first": dict(attention_type="mask_mix", mask_mix_candidates="first_3"),
    "all": dict(attention_type="mask_mix", mask_mix_candidates="full,every_2,offset_7", mask_mix_reg=0.1),
}


def make(name, dtype=torch.float64, **keys):
    """An attention whose mask parameters differ between heads."""
    shape = dict(block_size=64, vocab_size=50, n_layer=1, n_head=3, n_embd=24)
    model = GPT(GPTConfig(**(shape | VARIANTS[name] | keys)))
    attn = model.transformer.h[0].attn.to(dtype).eval()
    for pname, p in attn.named_parameters():
        spread = 0.5 if p.dim() == 1 and pname == "span" and keys.get("span_param") != "ratio" else 0.3
        torch.nn.init.normal_(p, std=0.3) if p.dim() >= 2 else p.data.add_(spread * torch.randn_like(p))
    return attn


def by_definition(attn, x):
    """p = softmax, times the mask, renormalised; the mask entry by entry."""
    T, H = x.size(1), attn.n_head
    q, k, v = (t.transpose(1, 2) for t in attn._qkv(x, 0))
    p = (q @ k.mT / math.sqrt(attn.d_head)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
    mask = torch.zeros(H, T, T, dtype=x.dtype)
    for h in range(H):
        for t in range(T):
            for s in range(t + 1):
                mask[h, t, s] = entry(attn, h, t, s)
    p = p * mask
    total = p.sum(-1, keepdim=True)
    return attn._project((torch.where(total > 0, p / total, 0.0) @ v).transpose(1, 2), x)


def entry(attn, h, t, s):
    x = t - s
    if hasattr(attn, "alpha"):
        w, total = attn.weights().expand(attn.n_head, -1)[h].tolist(), 0.0
        for weight, (kind, k) in zip(w, attn.candidates):
            shown = dict(offset=x == k, window=x < k, every=k > 0 and x % k == 0, first=s < k, full=True)[kind]
            total += weight * shown
        return total
    m = min(1.0, max(0.0, (attn.R + attn.spans()[h].item() - x) / attn.R))
    if attn.wave:
        P, half = (value[h].item() for value in attn.periods())
        triangle = 2 / math.pi * math.asin(max(-1.0, min(1.0, math.cos(2 * math.pi * x / P))))  # peak 1 at multiples
        m *= min(1.0, max(0.0, P / 4 * triangle + 0.5 + half - P / 4))
    return m


@pytest.mark.parametrize("pos_emb", ["none", "rope"])
@pytest.mark.parametrize("name", VARIANTS)
def test_types_by_their_definition(name, pos_emb, fresh_rng):
    attn = make(name, pos_emb=pos_emb, bias=True)
    x = torch.randn(2, 40, 24, dtype=torch.float64)
    torch.testing.assert_close(attn(x)[0], by_definition(attn, x), rtol=0, atol=1e-9)


def test_heads_of_two_channels_with_rotary_positions(fresh_rng):
    """Rotated vectors lie apart in memory."""
    attn = make("span", pos_emb="rope", head_dim=2, softness_span_mask=1.0, span_init=1.0)
    attn.span.data.fill_(20.0)  # a mask of ones: all of the span
    x = torch.randn(2, 40, 24, dtype=torch.float64)
    torch.testing.assert_close(attn(x)[0], by_definition(attn, x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", VARIANTS)
def test_autocast_does_not_round_masks(name, fresh_rng):
    """Nor their gradients, also where the backward pass runs inside it."""
    attn, found = make(name, torch.float32), []
    parameters = [p for n, p in attn.named_parameters() if n in attn.mask_parameters and p.requires_grad]
    weight = torch.randn(64)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            masks = [x for x in attn.log_mask(64) if x is not None]
            loss = sum((x.exp() * weight).sum() for x in masks)
            found.append((*masks, *torch.autograd.grad(loss, parameters)))
    assert all(map(torch.equal, *found))


def test_a_mixture_of_ones_learns(fresh_rng):
    """Weights that sum to 1 at each distance, beside first keys of their own: a gradient as of any other mask."""
    attn = make("first", mask_mix_candidates="full,window_64,first_2").train()
    attn.alpha.data.zero_()
    x, weight = torch.randn(2, 2, 64, 24, dtype=torch.float64)
    found = []
    for alpha in (attn.alpha, attn.alpha + 1e-9):  # as good as the same, but no row of zeros
        attn.weights = alpha.sigmoid
        found.append(torch.autograd.grad((attn(x)[0] * weight).sum(), attn.alpha)[0])
    assert found[0].abs().min() > 1e-3
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pos_emb", ["none", "rope"])
@pytest.mark.parametrize("name", VARIANTS)
def test_step_equals_forward(name, pos_emb, fresh_rng, monkeypatch):
    """Heads read together or apart."""
    monkeypatch.setattr(D, "GATHERED", int(fresh_rng.choice([0, 512])))
    attn = make(name, pos_emb=pos_emb)
    for T in (1, 7, 64):
        x = torch.randn(2, T, 24, dtype=torch.float64)
        wanted = attn(x)[0]
        cuts = sorted({0, T, *fresh_rng.integers(0, T, 4).tolist()})
        for split in ([T], [1] * T, [b - a for a, b in zip(cuts, cuts[1:])]):
            state = attn.init_state(2, 64)
            found = torch.cat([attn.step(part, state)[0] for part in x.split(split, 1)], 1)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("gathered", [0, 512])
@pytest.mark.parametrize("name", ["span", "wave", "offsets", "first", "all", "heads"])
def test_a_stream_longer_than_the_block(name, gathered, fresh_rng, monkeypatch):
    """Distances from block_size on are dropped, the first keys stay; the ring keeps what the masks reach."""
    monkeypatch.setattr(D, "GATHERED", gathered)
    attn, T = make(name, pos_emb="rope"), 150
    x = torch.randn(2, T, 24, dtype=torch.float64)
    token_by_token = attn.init_state(2, 64)
    wanted = torch.cat([attn.step(x[:, t : t + 1], token_by_token)[0] for t in range(T)], 1)
    for split in ([T], [3, 70, 1, 1, 60, 15]):
        state = attn.init_state(2, 64)
        found = torch.cat([attn.step(part, state)[0] for part in x.split(split, 1)], 1)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    kept = (attn.log_mask(64)[0] > -math.inf).nonzero()[:, 1].max().item() + 1
    assert state.reach == kept and state.k.size(2) == 2 * kept


@pytest.mark.parametrize("gathered", [0, 512])
@pytest.mark.parametrize("name", ["span", "wave", "heads", "first"])
def test_decoding_reads_kept_keys_alone(name, gathered, fresh_rng, monkeypatch):
    """Every other slot of the ring may hold NaN."""
    monkeypatch.setattr(D, "GATHERED", gathered)
    attn = make(name)
    x = torch.randn(1, 64, 24, dtype=torch.float64)
    state = attn.init_state(1, 64)
    attn.step(x[:, :63], state)
    table = attn.log_mask(64)[0].expand(3, -1)
    for h in range(3):
        kept = set((state.end - (table[h] > -math.inf).nonzero()[:, 0]).tolist())
        for slot in range(state.k.size(2)):
            if slot not in kept:
                state.k[:, h, slot] = state.v[:, h, slot] = math.nan
    torch.testing.assert_close(attn.step(x[:, 63:], state)[0], attn(x)[0][:, 63:], rtol=0, atol=1e-9)


def test_decoding_reads_fewer_keys():
    """At 4,096 tokens of context and spans of 128, their ramps included: counted where they are read."""
    counts = {}
    for name, keys in (("softmax", {}), ("adaptive_span", dict(span_init=96 / 4096))):
        shape = dict(block_size=4096, vocab_size=50, n_layer=2, n_head=2, n_embd=16, pos_emb="rope")
        lm = GPT(GPTConfig(attention_type=name, **shape, **keys)).eval()
        state = lm.init_state(1)
        lm.step(torch.randint(50, (1, 4095)), state)
        counts[name], size = decoding.keys_read(lambda: lm.step(torch.randint(50, (1, 1)), state))  # noqa: B023
        assert size == counts[name] * 2 * 8 * 4  # a key and a value of 8 floats each
    assert counts["softmax"] == 2 * 2 * 4096 and counts["adaptive_span"] == 2 * 2 * 128
    assert counts["softmax"] >= 3 * counts["adaptive_span"]


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_of_mask_parameters(name, fresh_rng):
    """Through the banded form and through the dense one."""
    attn = make(name).train()
    x, grads = torch.randn(2, 64, 24, dtype=torch.float64), []
    weight = torch.randn(2, 64, 24, dtype=torch.float64)
    for backend in ("auto", "dense"):
        q, k, v = attn._qkv(x, 0)
        y = distance(q, k, v, *attn.log_mask(64), backend=backend)
        loss = (attn._project(y, x) * weight).sum() + attn.penalty()
        parameters = [p for n, p in attn.named_parameters() if n in attn.mask_parameters]
        grads.append(torch.autograd.grad(loss, parameters))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert a.abs().max() > 0 or name == "only first"


def test_distances_that_matter_are_kept_while_training(fresh_rng):
    """Ten optimizer steps with a large rate: after each, the banded form is the dense one, to the last kept key."""
    torch.manual_seed(0)
    keys = dict(softness_span_mask=8.0, use_triangle_wave_masking=True, span_reg=1e-3)
    shape = dict(block_size=64, vocab_size=20, n_layer=2, n_head=2, n_embd=16)
    model = GPT(GPTConfig(attention_type="adaptive_span", **shape, **keys)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    seen, lost = set(), 0
    for _ in range(10):
        idx = torch.randint(20, (2, 64))
        loss = model(idx, idx)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for block in model.transformer.h:
            table = block.attn.log_mask(64)[0]
            seen.add(tuple((table > -math.inf).sum(1).tolist()))
            for row, plan in zip(table, D.plans(table, table.new_empty(2, 0, 64))):
                covered = torch.zeros(64, dtype=torch.bool)
                for lo, hi in plan.runs if plan.block else ((0, 63),):
                    covered[lo * plan.stride : hi * plan.stride + 1 : plan.stride] = True
                lost += int(((row > -math.inf) & ~covered).sum())
            q, k, v = torch.randn(3, 1, 64, 2, 8, dtype=torch.float64)
            agree([distance(q, k, v, table).detach()], [distance(q, k, v, table, backend="dense").detach()], (1e-12,))
    assert lost == 0 and len(seen) > 5, "the kept sets did not move: nothing was tested"


@pytest.mark.parametrize("name, sets", [("wave", 6), ("heads", 3)])
def test_one_graph_whatever_is_kept(name, sets):
    """The training step of a whole model, compiled without a break: the kept set is read inside the operator, so that
    nothing is compiled again when the optimizer changes it."""
    torch.manual_seed(0)
    own = dict(mask_mix_prune=0.7) if name == "heads" else {}
    shape = dict(block_size=64, vocab_size=20, n_layer=2, n_head=3, n_embd=24)
    model = GPT(GPTConfig(**shape, **VARIANTS[name], **own))
    attns = [block.attn for block in model.transformer.h]
    optimizer = torch.optim.AdamW([p for attn in attns for p in attn.parameters()], lr=0.3)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, kept = torch.compile(model, fullgraph=True, backend="aot_eager"), set()
    for _ in range(8):
        idx = torch.randint(20, (2, 64))
        loss = compiled(idx, idx)[1]
        torch.testing.assert_close(loss, model(idx, idx)[1], rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        kept.add(tuple(n for attn in attns for n in attn.stats()["kept"].tolist()))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print(f"{name}: {graphs} graph, {len(kept)} kept sets")
    assert graphs == 1 and len(kept) >= sets


def test_the_penalty_counts_the_support(fresh_rng):
    """(z + R) times the share of continuous distances in the wave's support, measured on 200,000 points."""
    attn = make("wave").train()
    for _ in range(10):
        torch.nn.init.normal_(attn.period, std=2.0), torch.nn.init.normal_(attn.ratio, std=2.0)
        P, h = (t.detach()[:, None] for t in attn.periods())
        x = P * torch.linspace(0, 1, 200_000, dtype=torch.float64)
        wave = 0.5 + h - (x - P * (x / P).round()).abs()
        share, base = (wave > 0).double().mean(1), ((1 + 2 * h) / P)[:, 0]
        term = torch.where(base < 1, share, 1 + wave.amin(1))
        wanted = attn.reg * ((attn.spans().detach() + attn.R) * term).mean()
        torch.testing.assert_close(attn.penalty().detach(), wanted, rtol=1e-3, atol=0)


def test_the_penalty_shrinks_spans_and_thins_mixtures():
    for name, stat, keys in (("span", "kept", dict(span_reg=1e-2)), ("offsets", "weight", dict(mask_mix_reg=1.0))):
        torch.manual_seed(1)
        attn = make(name, **keys).train()
        before = attn.stats()[stat].double()
        parameters = [p for n, p in attn.named_parameters() if n in attn.mask_parameters]
        optimizer = torch.optim.Adam(parameters, lr=0.1)
        for _ in range(60):
            optimizer.zero_grad()
            attn.penalty().backward()
            optimizer.step()
        after = attn.stats()[stat].double()
        if name == "span":
            assert (after < before).all()
        else:
            assert after.max() > 0.9 and after.sum() / after.max() < before.sum() / before.max() - 1


def test_pruned_candidates_cost_nothing(fresh_rng):
    attn = make("heads", mask_mix_candidates="offset_0,full,offset_1", mask_mix_per_head=False)
    attn.alpha.data = torch.tensor([[2.0, -6.0, 1.0]], dtype=torch.float64)
    dense = attn.flops(64)
    attn.prune = 0.02
    assert attn.stats()["kept"].tolist() == [2, 2, 2] and attn.weights()[0, 1] == 0
    assert attn.flops(64)[0] == 4 * 8 * 3 * (64 + 63) and attn.flops(64)[1] < dense[1]


def test_the_clamped_ratio_stays_useful():
    """Outside [0, 1] a gradient that pushes further out is dropped; one that pulls back is not."""
    attn = make("clamped")
    attn.span.data = torch.tensor([-0.1, 1.2, 0.5], dtype=torch.float64)
    assert attn.spans().tolist() == [0, 64, 32]
    up, down = (torch.autograd.grad((sign * attn.spans()).sum(), attn.span)[0].tolist() for sign in (-1.0, 1.0))
    assert up == [-64, 0, -64] and down == [0, 64, 64]


@pytest.mark.parametrize("name", VARIANTS)
def test_operations_are_those_of_the_kept_pairs(name, fresh_rng, products):
    """Nominal: of all pairs, one by one, those with a mask above 0. Executed: the matrix products that ran."""
    attn = make(name)
    for T in (3, 40, 64):
        pairs = sum(entry(attn, h, t, s) > 0 for h in range(3) for t in range(T) for s in range(t + 1))
        nominal, executed = attn.flops(T)
        assert nominal == 4 * 8 * pairs and executed >= nominal
        q, k, v = torch.randn(3, 1, T, 3, 8, dtype=torch.float64)
        mask = [x if x is None else x.detach() for x in attn.log_mask(T)]
        assert executed == products(lambda: distance(q, k, v, *mask))  # noqa: B023


@pytest.mark.parametrize("kind", KINDS)
def test_executed_pairs_are_those_of_the_products(kind, fresh_rng, products):
    """Several blocks, segments and sequences, heads together and apart, with and without masks of the first keys."""
    for T, P, shared in ((17, 0, False), (400, 0, False), (400, 3, False), (400, 2, True)):
        q, k, v, table, prefix, _ = draw(2, T, 4, 8, 8, kind, P, fresh_rng, shared)
        plans = D.plans(table, table.new_empty(len(table), 0, T) if prefix is None else prefix)
        pairs = 2 * 4 // len(table) * sum(D.executed_pairs(plan, T) for plan in plans)
        assert products(lambda: distance(q, k, v, table, prefix)) == 4 * 8 * pairs  # noqa: B023


def test_mask_parameters_are_not_decayed():
    for name in ("wave", "offsets"):
        model = GPT(GPTConfig(block_size=64, vocab_size=50, n_layer=2, n_head=3, n_embd=24, **VARIANTS[name]))
        names = {n.split(".")[-1] for n, _ in param_groups(model)["mask"]}
        assert names == ({"span", "period", "ratio"} if name == "wave" else {"alpha"})


@pytest.mark.parametrize(
    "keys, want",
    [
        (dict(attention_type="adaptive_span", span_max=2000), "span_max=2000 is above block_size=1024"),
        (
            dict(attention_type="adaptive_span", period_min_triangle_wave_masking=8.0),
            "period_max_triangle_wave_masking=8 must be above",
        ),
        (dict(attention_type="mask_mix", mask_mix_candidates="offset_1,last_3"), "no mask 'last_3'; write some of"),
        (dict(attention_type="mask_mix", mask_mix_candidates="first_17"), "no mask 'first_17'"),
        (dict(attention_type="mask_mix", mask_mix_candidates="full_3"), "no mask 'full_3'"),
        (dict(attention_type="mask_mix", mask_mix_candidates=""), "no mask ''"),
        (dict(attention_type="mask_mix", mask_mix_candidates="offset_²"), "no mask 'offset_²'"),
    ],
)
def test_wrong_keys(keys, want):
    with pytest.raises(ValueError) as error:
        GPTConfig(**keys)
    assert want in str(error.value)


# ----------------------------------------------------------------------------- what bench says of them


@pytest.mark.slow
def test_inspect(tiny, tmp_path, capsys):
    keys = dict(use_triangle_wave_masking=True, mask_mix_candidates="offset_0,full,first_2", max_iters=2)
    folder, report = tmp_path / "run", tmp_path / "report.json"
    for kind in ("adaptive_span", "softmax,mask_mix"):
        own = {k: v for k, v in keys.items() if k == "max_iters" or ("wave" in k) == (kind == "adaptive_span")}
        train.main(tiny(attention_type=kind, **own))
        bench.main(
            [
                f"--out_dir={folder}",
                "--what=inspect",
                "--rounds=1",
                "--seconds=0.01",
                "--device=cpu",
                f"--json={report}",
            ]
        )
        check_units(json.loads(report.read_text())["tables"])
        out = capsys.readouterr().out
        assert out.count("blocks of") == (4 if kind == "adaptive_span" else 1)  # one for all heads
        assert ("with periods rounded" if kind == "adaptive_span" else "without candidates below 0.02") in out
        for name in ("spans", "kept", "attention") + (("weights",) if "mix" in kind else ()):
            assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    train.main(tiny(attention_type="softmax", max_iters=1))
    with pytest.raises(ConfigError, match="no layer of 'softmax' learns a mask"):
        bench.main([f"--out_dir={folder}", "--what=inspect", "--device=cpu"])


def test_operators_of_masks(capsys):
    options = ["--what=ops", "--shapes=1x64x2x16x16", "--rounds=1", "--seconds=0.01", "--device=cpu"]
    bench.main([*options, "--operators=span,mask_mix", "--spans=8,40", "--json="])
    out = " ".join(capsys.readouterr().out.split())
    assert all(row in out for row in ("| span 8 | 1 x 64", "| span 40 | 1 x 64", "| mask_mix of 5 | 1 x 64"))
    with pytest.raises(ConfigError, match="--spans=8,x: write numbers"):
        bench.main([*options, "--operators=span", "--spans=8,x"])


def test_types_beside_each_other(tmp_path):
    """Whole training steps in the same rounds, masks held; and the keys that a decoded token reads."""
    shape = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=32", "--vocab_size=20", "--pos_emb=rope"]
    keys = ["--attention_type=adaptive_span", "--softness_span_mask=4", "--span_init=0.25"]
    file = tmp_path / "bench.json"
    options = [*shape, *keys, "--rounds=2", "--seconds=0.01", "--device=cpu", f"--json={file}"]

    def rows(table, *more):
        bench.main([*options, *more])
        return [list(row.values()) for row in json.loads(file.read_text())["tables"][table]["rows"]]

    softmax, none, span = rows("steps beside", "--what=step", "--beside=softmax,none", "--batch_size=2")
    assert [softmax[0], none[0], span[0]] == ["softmax", "none", "adaptive_span"]
    assert softmax[1:4] == [None, 1.0, 1.0] and span[1] == 12 and none[3] == 0
    span, softmax = rows("positions", "--what=decode", "--positions=31", "--tokens=2")
    assert (span[0], span[-3]) == ("adaptive_span", 24) and (softmax[0], softmax[-3]) == ("softmax", 64)
