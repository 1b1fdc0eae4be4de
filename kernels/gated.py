"""Softmax attention whose probabilities are gated pair by pair, after the softmax and without renormalisation:

    o_t = sum_{s <= t} gamma_ts p_ts v_s        p_t = softmax_s(q_t . k_s scale)        gamma_ts = clamp(a_t b_s, 0, 1)

and the penalty on heads that share a pair: the mean over causal pairs of (sum_h gamma_h^0.6)^(1 / 0.6).

`gated` is the public function. Two forms: `dense`, the equations in any precision; `torch`, tiles of queries and keys
that stay in cache (the path of every device), with the maximum and the sum of the softmax carried along a row of tiles.
Between forward and backward no T x T tensor is kept: p and gamma are computed again. Axes: B batch, T time, H heads,
D head width, V value width, R query rows, S keys of a tile.

With r = do . v_s and delta = do . o the gradients of a pair are dgamma = p r and dlogit = p (gamma r - delta): nothing
divides by gamma or takes its logarithm, so a gate of exactly 0, the usual state, is harmless. The penalty's power of a
product is the product of powers: gamma^0.6 = clamp(a^0.6 b^0.6, 0, 1), where x^0.6 keeps the sign of x.
"""

import functools
import math

import torch

from . import Case, check, in_autocast, leave_autocast, like_inputs, operator
from .gla import compute_dtype

POWER = 0.6  # of the penalty: below 1 it wants one open head for a pair, not several half open
FLOOR = 1e-6  # of gamma in the penalty: the slope of gamma^0.6 at 0 is infinite
ROWS = {"cpu": 64, "cuda": 2048}  # queries of a tile
SEGMENT = {"cpu": 2**18, "cuda": 2**25}  # pairs of a tile, over all heads


# ----------------------------------------------------------------------------- dense


def gated_dense(q, k, v, a, b, scale, penalise=True):
    """All pairs at once, in fp64 for fp64 inputs and fp32 otherwise. Differentiable by autograd: the oracle."""
    dtype, out_dtype = compute_dtype(q.dtype), v.dtype
    q, k, v, a, b = (x.to(dtype) for x in (q, k, v, a, b))
    T = q.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    p = (scale * torch.einsum("bthd,bshd->bhts", q, k)).masked_fill(~causal, -torch.inf).softmax(-1)
    gamma = torch.einsum("bth,bsh->bhts", a, b).clamp(0, 1)
    o = torch.einsum("bhts,bshv->bthv", gamma * p, v)
    if not penalise:
        return o.to(out_dtype), o.new_zeros(())
    shared = gamma.clamp(min=FLOOR).pow(POWER).sum(1).pow(1 / POWER)  # (B, T, T)
    return o.to(out_dtype), shared[:, causal].mean()


def gated_map(q, k, a, b, mask):
    """gamma p and gamma (B, H, t, S) of a few queries, as decoding reads them: q (B, H, t, D), k (B, H, S, D),
    a (B, H, t), b (B, H, S), mask (t, S), True where a key is seen."""
    dtype = compute_dtype(q.dtype)
    q, k, a, b = (x.to(dtype) for x in (q, k, a, b))
    with leave_autocast(q):
        p = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -torch.inf).softmax(-1)
    gamma = (a.unsqueeze(-1) * b.unsqueeze(-2)).clamp(0, 1)
    return gamma * p, gamma


# ----------------------------------------------------------------------------- tiles


def blocks(B, T, H, device_type):
    """(index of the queries, lo, hi, tiles) of each block of queries lo .. hi - 1; `tiles` are the (index of the keys,
    first, last) of keys first .. last - 1, and cover the keys before hi. An index is that of (B, H, T, ...)."""
    segment, rows = SEGMENT.get(device_type, SEGMENT["cuda"]), min(T, ROWS.get(device_type, ROWS["cuda"]))
    keys = min(T, max(1, segment // (H * rows)))
    batch = max(1, segment // (H * rows * keys))
    for start in range(0, B, batch):
        some = slice(start, start + batch), slice(None)
        for lo in range(0, T, rows):
            hi = min(T, lo + rows)
            ends = [(s, min(hi, s + keys)) for s in range(0, hi, keys)]
            yield (*some, slice(lo, hi)), lo, hi, [((*some, slice(s, e)), s, e) for s, e in ends]


def executed_pairs(T, H):
    """Pairs of a head that the tiles of one sequence compute on a CPU, future ones included."""
    return sum((hi - lo) * hi for _, lo, hi, _ in blocks(1, T, H, "cpu"))


def by_head(*xs):
    """(B, T, H, D) -> (B, H, T, D), and (B, T, H) -> (B, H, T), in the precision that the first one asks for."""
    dtype = compute_dtype(xs[0].dtype)
    return [x.to(dtype).transpose(1, 2).contiguous() for x in xs]


def product(x, y):
    """x @ y^T. For heads one wide a matrix product is mostly overhead."""
    return x * y.mT if x.shape[-1] == 1 else x @ y.mT


def hide_future(x, lo, hi, first, last, value):
    """Fill x (..., R, S), of queries lo .. hi - 1 and keys first .. last - 1, with `value` where the key is later."""
    start = max(first, lo)
    if start < last:
        future = torch.ones(hi - lo, last - start, dtype=torch.bool, device=x.device).triu(1 + lo - start)
        x[..., start - first :].masked_fill_(future, value)
    return x


def root(x):
    """x^0.6 with the sign of x: (..., T)."""
    return x.abs().pow_(POWER).mul_(x.sign())


def inside(x, at, low, high):
    """x where low < at < high, else 0, whatever x is there."""
    return torch.ops.aten.hardtanh_backward(x, at, low, high)


def shared(root_a, root_b, exponent):
    """(sum_h gamma_h^0.6)^exponent, each gamma at least the floor: (B, R, S)."""
    return (root_a.unsqueeze(-1) * root_b.unsqueeze(-2)).clamp_(FLOOR**POWER, 1).sum(1).log_().mul_(exponent).exp_()


def block_forward(q, k, v, a, b, scale, penalise):
    """o (B, T, H, V), the penalty, and the logarithm of each softmax's denominator (B, H, T)."""
    q, k, v, a, b = by_head(q, k, v, a, b)
    (B, H, T, _), q = q.shape, q * scale
    o, penalty, lse = torch.empty_like(v), v.new_zeros(()), v.new_empty(B, H, T, 1)
    root_a, root_b = root(a), root(b)
    for mine, lo, hi, tiles in blocks(B, T, H, q.device.type):
        top = torch.full_like(lse[mine], -torch.inf)  # (B, H, R, 1)
        z, total = torch.zeros_like(top), torch.zeros_like(o[mine])
        for keys, first, last in tiles:
            p = hide_future(product(q[mine], k[keys]), lo, hi, first, last, -torch.inf)
            before = top
            top = torch.maximum(top, p.amax(-1, keepdim=True))
            shrink = before.sub_(top).exp_()
            z = z.mul_(shrink).add_(p.sub_(top).exp_().sum(-1, keepdim=True))
            p.mul_((a[mine].unsqueeze(-1) * b[keys].unsqueeze(-2)).clamp_(0, 1))
            total = total.mul_(shrink).add_(p @ v[keys])
            if penalise:
                each = shared(root_a[mine], root_b[keys], 1 / POWER)
                penalty += hide_future(each, lo, hi, first, last, 0.0).sum()
        o[mine] = total.div_(z)
        lse[mine] = top.add_(z.log_())
    return o.transpose(1, 2).contiguous(), penalty / (B * (T * (T + 1) // 2)), lse.squeeze(-1)


def block_backward(q, k, v, a, b, o, lse, do, dpenalty, scale, penalise):
    """The gradients of q, k, v, a and b."""
    like = q, k, v, a, b
    q, k, v, a, b, o, do = by_head(q, k, v, a, b, o, do)
    (B, H, T, _), q, lse = q.shape, q * scale, lse.unsqueeze(-1)
    dq, dk, dv, da, db = (torch.zeros_like(x) for x in (q, k, v, a, b))
    root_a, root_b = root(a), root(b)
    slope_a, slope_b = (x.abs().pow_(POWER - 1) for x in (a, b))
    eps, tiny = torch.finfo(q.dtype).eps, torch.finfo(q.dtype).tiny
    delta = (o * do).sum(-1, keepdim=True)  # (B, H, T, 1)
    share = dpenalty / (B * (T * (T + 1) // 2))
    pairs = ((mine, lo, hi, *tile) for mine, lo, hi, tiles in blocks(B, T, H, q.device.type) for tile in tiles)
    for mine, lo, hi, keys, first, last in pairs:
        p = hide_future(product(q[mine], k[keys]), lo, hi, first, last, -torch.inf).sub_(lse[mine]).exp_()
        raw = a[mine].unsqueeze(-1) * b[keys].unsqueeze(-2)  # (B, H, R, S)
        gated_p = raw.clamp(0, 1).mul_(p)
        r = product(do[mine], v[keys])
        if penalise:
            total = shared(root_a[mine], root_b[keys], 1 / POWER - 1).mul_(share)
            total = hide_future(total, lo, hi, first, last, 0.0).unsqueeze(1)
            slope = (slope_a[mine].unsqueeze(-1) * slope_b[keys].unsqueeze(-2)).mul_(total)  # gamma^-0.4, inf at 0
            dgamma = inside(slope, raw, FLOOR * (1 - eps), 1 + eps).addcmul_(p, r)
        else:
            dgamma = p * r
        dgamma = inside(dgamma, raw, -tiny, 1 + eps)  # the clamp has no slope outside [0, 1]
        da[mine] += (dgamma @ b[keys].unsqueeze(-1)).squeeze(-1)
        db[keys] += (dgamma.mT @ a[mine].unsqueeze(-1)).squeeze(-1)
        dlogits = r.mul_(gated_p).addcmul_(p, delta[mine], value=-1)
        dq[mine] += dlogits @ k[keys]
        dk[keys] += dlogits.mT @ q[mine]
        dv[keys] += gated_p.mT @ do[mine]
    grads = dq * scale, dk, dv, da, db
    return tuple(x.transpose(1, 2).to(y.dtype).contiguous() for x, y in zip(grads, like))


# ----------------------------------------------------------------------------- op


@operator(
    "gated",
    "(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, float scale, bool penalise) -> (Tensor, Tensor, Tensor)",
)
def gated_op(q, k, v, a, b, scale, penalise):
    o, penalty, lse = block_forward(q, k, v, a, b, scale, penalise)
    return o.to(v.dtype), penalty, lse


@gated_op.register_fake
def _(q, k, v, a, b, scale, penalise):
    (B, T, H, _), dtype = v.shape, compute_dtype(q.dtype)
    return v.new_empty(v.shape), v.new_empty((), dtype=dtype), v.new_empty((B, H, T), dtype=dtype)


gated_backward_op = operator(
    "gated_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor o, Tensor lse, Tensor do,"
    " Tensor dpenalty, float scale, bool penalise) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)(block_backward)
gated_backward_op.register_fake(like_inputs(5))


def setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.penalise = inputs
    o, _, lse = output
    ctx.save_for_backward(*tensors, o, lse)


def backward(ctx, do, dpenalty, _):
    *tensors, o, lse = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    dpenalty = o.new_zeros((), dtype=lse.dtype) if dpenalty is None else dpenalty
    return *gated_backward_op(*tensors, o, lse, do, dpenalty, ctx.scale, ctx.penalise), None, None


gated_op.register_autograd(backward, setup_context=setup_context)


# ----------------------------------------------------------------------------- public


def gated(q, k, v, a, b, scale=None, penalise=True, backend="auto"):
    """Gated softmax attention. Returns o (B, T, H, V) and the penalty, a scalar in fp32 (fp64 for fp64 inputs); without
    `penalise` 0.

    q, k (B, T, H, D)   v (B, T, H, V)   a, b (B, T, H), the gates of queries and of keys.
    scale=None is D^-1/2.  backend: auto | torch | dense.
    """
    check_inputs(q, k, v, a, b, backend)
    q, k, v = in_autocast(q, k, v)  # gates keep their precision
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "dense":
        with leave_autocast(q):
            return gated_dense(q, k, v, a, b, scale, penalise)
    o, penalty, _ = gated_op(q, k, v, a, b, scale, penalise)
    return o, penalty


def check_inputs(q, k, v, a, b, backend):
    check("gated", q, k, v, backend, "auto", "torch", "dense")
    for name, x in (("a", a), ("b", b)):
        if x.shape != q.shape[:3] or not x.is_floating_point():
            raise ValueError(f"gated: {name} must be a float {tuple(q.shape[:3])}, got {x.dtype} {tuple(x.shape)}")


def case(q, k, v, **_):
    """What is timed: gates on both sides of their bounds, with the penalty."""
    B, T, H, D = q.shape
    a, b = (torch.rand(B, T, H, device=q.device).mul_(2).sub_(0.5).requires_grad_() for _ in range(2))
    executed = 2 * B * H * (D + v.shape[3]) * executed_pairs(T, H)
    return {"gated": Case(gated_output, [q, k, v, a, b], functools.partial(gated_output, backend="dense"), executed)}


def gated_output(*inputs, **options):
    return gated(*inputs, **options)[0]


CASES = {"gated": case}
