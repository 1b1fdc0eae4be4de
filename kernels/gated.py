"""Softmax attention whose probabilities are gated pair by pair, after the softmax and without renormalisation:

    o_t = sum_{s <= t} gamma_ts p_ts v_s        p_t = softmax_s(q_t . k_s scale)        gamma_ts = clamp(a_t b_s, 0, 1)

and the penalty on heads that share a pair: the mean over causal pairs of (sum_h gamma_h^0.6)^(1 / 0.6).

`gated` is the public function. Two forms: `dense`, the equations in any precision; `torch`, blocks of query rows that
stay in cache (the path of every device). Between forward and backward no T x T tensor is kept: p and gamma are computed
again. Axes: B batch, T time, H heads, D head width, V value width, R query rows, S keys.

With r = do . v_s and delta = do . o the gradients of a pair are dgamma = p r and dlogit = p (gamma r - delta): nothing
divides by gamma or takes its logarithm, so a gate of exactly 0, the usual state, is harmless.
"""

import math

import torch

from . import check, in_autocast, leave_autocast, like_inputs, operator
from .gla import compute_dtype

POWER = 0.6  # of the penalty: below 1 it wants one open head for a pair, not several half open
FLOOR = 1e-6  # of gamma in the penalty: the slope of gamma^0.6 at 0 is infinite
SEGMENT = {"cpu": 2**17, "cuda": 2**25}  # pairs, over all heads, that are worked on at a time


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


# ----------------------------------------------------------------------------- blocks of query rows


def blocking(B, T, H, device_type):
    """Batch rows and query rows of a block."""
    segment = SEGMENT.get(device_type, SEGMENT["cuda"])
    rows = min(T, max(8, segment // (H * T)))
    return min(B, max(1, segment // (H * T * rows))), rows


def blocks(B, T, H, device_type):
    """(batch rows, first query, the query after the last) of each block; its keys are those before the last."""
    batch, rows = blocking(B, T, H, device_type)
    for start in range(0, B, batch):
        for lo in range(0, T, rows):
            yield slice(start, start + batch), lo, min(T, lo + rows)


def executed_pairs(T, H):
    """Pairs of a head that the blocks of one sequence compute on a CPU, future ones included."""
    return sum((hi - lo) * hi for _, lo, hi in blocks(1, T, H, "cpu"))


def by_head(*xs):
    """(B, T, H, D) -> (B, H, T, D), and (B, T, H) -> (B, H, T), in the precision that the first one asks for."""
    dtype = compute_dtype(xs[0].dtype)
    return [x.to(dtype).transpose(1, 2).contiguous() for x in xs]


def product(x, y):
    """x @ y^T. For heads one wide a matrix product is mostly overhead."""
    return x * y.mT if x.shape[-1] == 1 else x @ y.mT


def block_logits(q, k, lo, hi, future):
    """q . k of the queries lo .. hi - 1 and the keys before hi, (B, H, R, S). `future` (T, T) is the mask."""
    logits = product(q[:, :, lo:hi], k[:, :, :hi])
    logits[..., lo:].masked_fill_(future[: hi - lo, : hi - lo], -torch.inf)
    return logits


def powers(gamma):
    """gamma^0.6 under the floor, and the sum over heads to the 1 / 0.6, (B, R, S)."""
    each = gamma.clamp(min=FLOOR).log_().mul_(POWER).exp_()
    return each, each.sum(1).log_()


def block_forward(q, k, v, a, b, scale, penalise):
    """o (B, T, H, V), the penalty, and the logarithm of each softmax's denominator (B, H, T)."""
    q, k, v, a, b = by_head(q, k, v, a, b)
    (B, H, T, _), q = q.shape, q * scale
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    o, penalty, lse = torch.empty_like(v), v.new_zeros(()), v.new_empty(B, H, T, 1)
    for rows, lo, hi in blocks(B, T, H, q.device.type):
        p = block_logits(q[rows], k[rows], lo, hi, future)
        top = p.amax(-1, keepdim=True)
        z = p.sub_(top).exp_().sum(-1, keepdim=True)
        lse[rows, :, lo:hi] = top.add_(z.log())
        gamma = (a[rows, :, lo:hi, None] * b[rows, :, None, :hi]).clamp_(0, 1)
        torch.div(p.mul_(gamma) @ v[rows, :, :hi], z, out=o[rows, :, lo:hi])
        if penalise:
            shared = powers(gamma)[1].mul_(1 / POWER).exp_()
            shared[..., lo:].masked_fill_(future[: hi - lo, : hi - lo], 0.0)
            penalty += shared.sum()
    return o.transpose(1, 2).contiguous(), penalty / (B * (T * (T + 1) // 2)), lse.squeeze(-1)


def block_backward(q, k, v, a, b, o, lse, do, dpenalty, scale, penalise):
    """The gradients of q, k, v, a and b."""
    like = q, k, v, a, b
    q, k, v, a, b, o, do = by_head(q, k, v, a, b, o, do)
    (B, H, T, _), q, lse = q.shape, q * scale, lse.unsqueeze(-1)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    dq, da = torch.empty_like(q), torch.empty_like(a)
    dk, dv, db = (torch.zeros_like(x) for x in (k, v, b))
    delta = (o * do).sum(-1, keepdim=True)  # (B, H, T, 1)
    share = dpenalty / (B * (T * (T + 1) // 2))
    for rows, lo, hi in blocks(B, T, H, q.device.type):
        mine, keys = (rows, slice(None), slice(lo, hi)), (rows, slice(None), slice(0, hi))
        p = block_logits(q[rows], k[rows], lo, hi, future).sub_(lse[mine]).exp_()
        raw = a[mine].unsqueeze(-1) * b[keys].unsqueeze(-2)  # (B, H, R, S)
        gamma = raw.clamp(0, 1)
        r = product(do[mine], v[keys])
        dgamma = p * r
        if penalise:
            each, total = powers(gamma)
            total = total.mul_(1 / POWER - 1).exp_().mul_(share)
            total[..., lo:].masked_fill_(future[: hi - lo, : hi - lo], 0.0)
            slope = each.div_(gamma.clamp(min=FLOOR)).mul_(total.unsqueeze(1))
            dgamma += slope.masked_fill_(gamma < FLOOR, 0.0)
        dgamma.mul_(raw == gamma)  # outside [0, 1] the clamp has no slope
        da[mine] = (dgamma @ b[keys].unsqueeze(-1)).squeeze(-1)
        db[keys] += (dgamma.mT @ a[mine].unsqueeze(-1)).squeeze(-1)
        dlogits = r.mul_(gamma).sub_(delta[mine]).mul_(p)
        torch.matmul(dlogits, k[keys], out=dq[mine])
        dk[keys] += dlogits.mT @ q[mine]
        dv[keys] += p.mul_(gamma).mT @ do[mine]
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
