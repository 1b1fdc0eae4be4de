"""Softmax attention whose probabilities are gated pair by pair, after the softmax and without renormalisation:

    o_t = sum_{s <= t} gamma_ts p_ts v_s        p_t = softmax_s(q_t . k_s scale)        gamma_ts = clamp(a_t b_s, 0, 1)

and the penalty on heads that share a pair: the mean over causal pairs of (sum_h gamma_h^0.6)^(1 / 0.6).

`gated` is the public function. Three forms: `dense`, the equations in any precision; `torch`, tiles of queries and keys
that stay in cache, with the maximum and the sum of the softmax carried along a row of tiles; `triton`, the same in one
kernel forward and two backward. Between forward and backward no T x T tensor is kept: p and gamma are computed again.
Axes: B batch, T time, H heads, D head width, V value width, R query rows, S keys of a tile.

With r = do . v_s and delta = do . o the gradients of a pair are dgamma = p r and dlogit = p (gamma r - delta): nothing
divides by gamma or takes its logarithm, so a gate of exactly 0, the usual state, is harmless. The penalty's power of a
product is the product of powers: gamma^0.6 = clamp(a^0.6 b^0.6, 0, 1), where x^0.6 keeps the sign of x.
"""

import functools
import math

import torch

from . import Case, check, in_autocast, jit, leave_autocast, like_inputs, operator, tl, triton
from .gla import LOG2E, compute_dtype, dense
from .launch import Kernel, choose, configurations, dot, dot_type, operand, power, split

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
    a (B, H, t), b (B, H, S), mask (t, S), True where a key is seen; None: all are."""
    dtype = compute_dtype(q.dtype)
    q, k, a, b = (x.to(dtype) for x in (q, k, a, b))
    with leave_autocast(q):
        s = q @ k.mT / math.sqrt(q.shape[-1])
        p = (s if mask is None else s.masked_fill(~mask, -torch.inf)).softmax(-1)
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


# ----------------------------------------------------------------------------- Triton
#
#     forward    o and the log of each softmax's denominator, base 2; a block of queries goes along its keys
#     penalty    the sum of a block of queries, all heads
#     query      dq and da, along the keys
#     key        dk, dv and db, along the queries from the block's own on
#
# A product and its transpose are two products, because some versions of Triton transpose an accumulator wrongly. The
# penalty couples heads: its slope needs the sum over all of them, which each head's program takes again.

if triton:
    FLOORED, LOW, HIGH = (tl.constexpr(x) for x in (FLOOR**POWER, FLOOR * (1 - 2**-23), 1 + 2**-23))
    OUTER = tl.constexpr(1 / POWER)


@jit
def load_rows(p_x, o_t, stride, m_t, o_d, D):
    return tl.load(p_x + o_t[:, None] * stride + o_d[None, :], mask=m_t[:, None] & (o_d < D)[None, :], other=0.0)


@jit
def store_rows(p_x, b_x, o_t, stride, m_t, o_d, D):
    o_x = o_t[:, None] * stride + o_d[None, :]
    tl.store(p_x + o_x, b_x.to(p_x.dtype.element_ty), mask=m_t[:, None] & (o_d < D)[None, :])


@jit
def head_sum(p_x, p_y, o_x, o_y, T, H, BX: tl.constexpr, BY: tl.constexpr):
    """sum_h gamma_h^0.6 (BX, BY) from the roots of both gates (T, H), in either order."""
    b_sum = tl.zeros([BX, BY], tl.float32)
    for h in range(0, H):
        b_x = tl.load(p_x + o_x * H + h, mask=o_x < T, other=0.0)
        b_y = tl.load(p_y + o_y * H + h, mask=o_y < T, other=0.0)
        b_sum += tl.minimum(tl.maximum(b_x[:, None] * b_y[None, :], FLOORED), 1.0)
    return b_sum


@jit
def gate_slope(b_p, b_r, b_raw, b_seen, b_sum, b_slopes, share, PENALISE: tl.constexpr):
    """The gradient of raw = a b of each pair: p r, and the penalty's; none outside [0, 1]."""
    b_d = b_p * b_r
    if PENALISE:
        b_total = share * b_slopes * tl.exp2(tl.log2(b_sum) * (OUTER - 1))
        b_d += tl.where((b_raw > LOW) & (b_raw < HIGH), b_total, 0.0)
    return tl.where(b_seen & (b_raw >= 0.0) & (b_raw < HIGH), b_d, 0.0)


@jit
def gated_forward_kernel(
    p_q, p_k, p_v, p_a, p_b, p_o, p_lse, T, H, D, V, scale,
    BQ: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    i_q, i_bh = split(tl.program_id(0), tl.cdiv(T, BQ))
    row = (i_bh // H).to(tl.int64) * T * H + i_bh % H
    p_q, p_k, p_v, p_o = p_q + row * D, p_k + row * D, p_v + row * V, p_o + row * V
    o_t, o_d, o_v = i_q * BQ + tl.arange(0, BQ), tl.arange(0, BD), tl.arange(0, BV)
    m_t = o_t < T
    b_q = load_rows(p_q, o_t, H * D, m_t, o_d, D)  # (BQ, BD)
    b_a = tl.load(p_a + row + o_t * H, mask=m_t, other=0.0).to(tl.float32)
    b_top, b_z = tl.full([BQ], float("-inf"), tl.float32), tl.zeros([BQ], tl.float32)
    b_o = tl.zeros([BQ, BV], tl.float32)
    for first in range(0, tl.minimum(T, (i_q + 1) * BQ), BS):
        o_s = first + tl.arange(0, BS)
        b_k = load_rows(p_k, o_s, H * D, o_s < T, o_d, D)  # (BS, BD)
        b_v = load_rows(p_v, o_s, H * V, o_s < T, o_v, V)  # (BS, BV)
        b_b = tl.load(p_b + row + o_s * H, mask=o_s < T, other=0.0).to(tl.float32)
        b_s = dot(b_q, tl.trans(operand(b_k, DOT)), DOT) * (scale * LOG2E)
        b_s = tl.where(o_t[:, None] >= o_s[None, :], b_s, float("-inf"))
        b_before = b_top
        b_top = tl.maximum(b_top, tl.max(b_s, 1))
        b_shrink = tl.exp2(b_before - b_top)
        b_p = tl.exp2(b_s - b_top[:, None])
        b_z = b_z * b_shrink + tl.sum(b_p, 1)
        b_p *= tl.minimum(tl.maximum(b_a[:, None] * b_b[None, :], 0.0), 1.0)
        b_o = b_o * b_shrink[:, None] + dot(b_p, b_v, DOT)
    store_rows(p_o, b_o / b_z[:, None], o_t, H * V, m_t, o_v, V)
    tl.store(p_lse + i_bh.to(tl.int64) * T + o_t, b_top + tl.log2(b_z), mask=m_t)


@jit
def gated_penalty_kernel(p_x, p_y, p_sum, T, H, BQ: tl.constexpr, BS: tl.constexpr):
    """p_x, p_y: the roots of a and b (B, T, H)."""
    i_q, i_b = split(tl.program_id(0), tl.cdiv(T, BQ))
    row = i_b.to(tl.int64) * T * H
    o_t, b_all = i_q * BQ + tl.arange(0, BQ), tl.zeros([BQ], tl.float32)
    for first in range(0, tl.minimum(T, (i_q + 1) * BQ), BS):
        o_s = first + tl.arange(0, BS)
        b_sum = head_sum(p_x + row, p_y + row, o_t, o_s, T, H, BQ, BS)
        m_seen = (o_t[:, None] >= o_s[None, :]) & (o_t < T)[:, None]
        b_all += tl.sum(tl.where(m_seen, tl.exp2(tl.log2(b_sum) * OUTER), 0.0), 1)
    tl.store(p_sum + tl.program_id(0), tl.sum(b_all, 0))


@jit
def gated_query_kernel(
    p_q, p_k, p_v, p_a, p_b, p_x, p_y, p_slope_a, p_slope_b, p_do, p_lse, p_delta, p_share, p_dq, p_da, T, H, D, V,
    scale, BQ: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    PENALISE: tl.constexpr,
):  # fmt: skip
    i_q, i_bh = split(tl.program_id(0), tl.cdiv(T, BQ))
    start = (i_bh // H).to(tl.int64) * T * H
    row = start + i_bh % H
    p_q, p_k, p_v, p_do, p_dq = p_q + row * D, p_k + row * D, p_v + row * V, p_do + row * V, p_dq + row * D
    o_t, o_d, o_v = i_q * BQ + tl.arange(0, BQ), tl.arange(0, BD), tl.arange(0, BV)
    m_t, o_g = o_t < T, row + o_t * H
    b_q = load_rows(p_q, o_t, H * D, m_t, o_d, D)  # (BQ, BD)
    b_do = load_rows(p_do, o_t, H * V, m_t, o_v, V)  # (BQ, BV)
    b_a = tl.load(p_a + o_g, mask=m_t, other=0.0).to(tl.float32)
    b_lse = tl.load(p_lse + i_bh.to(tl.int64) * T + o_t, mask=m_t, other=0.0)
    b_delta = tl.load(p_delta + o_g, mask=m_t, other=0.0)
    b_dq, b_da = tl.zeros([BQ, BD], tl.float32), tl.zeros([BQ], tl.float32)
    for first in range(0, tl.minimum(T, (i_q + 1) * BQ), BS):
        o_s = first + tl.arange(0, BS)
        b_k = load_rows(p_k, o_s, H * D, o_s < T, o_d, D)  # (BS, BD)
        b_v = load_rows(p_v, o_s, H * V, o_s < T, o_v, V)  # (BS, BV)
        b_b = tl.load(p_b + row + o_s * H, mask=o_s < T, other=0.0).to(tl.float32)
        b_seen = (o_t[:, None] >= o_s[None, :]) & m_t[:, None]
        b_s = dot(b_q, tl.trans(operand(b_k, DOT)), DOT) * (scale * LOG2E)
        b_p = tl.where(b_seen, tl.exp2(b_s - b_lse[:, None]), 0.0)
        b_r = dot(b_do, tl.trans(operand(b_v, DOT)), DOT)
        b_raw = b_a[:, None] * b_b[None, :]
        b_sum, b_slopes, share = b_raw, b_raw, 0.0
        if PENALISE:
            share = tl.load(p_share)
            b_sum = head_sum(p_x + start, p_y + start, o_t, o_s, T, H, BQ, BS)
            b_slopes = tl.load(p_slope_a + o_g, mask=m_t, other=0.0)[:, None]
            b_slopes *= tl.load(p_slope_b + row + o_s * H, mask=o_s < T, other=0.0)[None, :]
        b_draw = gate_slope(b_p, b_r, b_raw, b_seen, b_sum, b_slopes, share, PENALISE)
        b_da += tl.sum(b_draw * b_b[None, :], 1)
        b_r = b_p * (tl.minimum(tl.maximum(b_raw, 0.0), 1.0) * b_r - b_delta[:, None])
        b_dq += dot(b_r, b_k, DOT)
    store_rows(p_dq, b_dq * scale, o_t, H * D, m_t, o_d, D)
    tl.store(p_da + o_g, b_da.to(p_da.dtype.element_ty), mask=m_t)


@jit
def gated_key_kernel(
    p_q, p_k, p_v, p_a, p_b, p_x, p_y, p_slope_a, p_slope_b, p_do, p_lse, p_delta, p_share, p_dk, p_dv, p_db, T, H, D,
    V, scale, BQ: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    PENALISE: tl.constexpr,
):  # fmt: skip
    """Tiles are transposed: (BS, BQ)."""
    i_s, i_bh = split(tl.program_id(0), tl.cdiv(T, BS))
    start = (i_bh // H).to(tl.int64) * T * H
    row = start + i_bh % H
    p_q, p_k, p_v, p_do = p_q + row * D, p_k + row * D, p_v + row * V, p_do + row * V
    o_s, o_d, o_v = i_s * BS + tl.arange(0, BS), tl.arange(0, BD), tl.arange(0, BV)
    m_s, o_g = o_s < T, row + o_s * H
    b_k = load_rows(p_k, o_s, H * D, m_s, o_d, D)  # (BS, BD)
    b_v = load_rows(p_v, o_s, H * V, m_s, o_v, V)  # (BS, BV)
    b_b = tl.load(p_b + o_g, mask=m_s, other=0.0).to(tl.float32)
    b_dk, b_dv = tl.zeros([BS, BD], tl.float32), tl.zeros([BS, BV], tl.float32)
    b_db = tl.zeros([BS], tl.float32)
    for first in range(i_s * BS // BQ * BQ, T, BQ):
        o_t = first + tl.arange(0, BQ)
        m_t = o_t < T
        b_q = load_rows(p_q, o_t, H * D, m_t, o_d, D)  # (BQ, BD)
        b_do = load_rows(p_do, o_t, H * V, m_t, o_v, V)  # (BQ, BV)
        b_a = tl.load(p_a + row + o_t * H, mask=m_t, other=0.0).to(tl.float32)
        b_lse = tl.load(p_lse + i_bh.to(tl.int64) * T + o_t, mask=m_t, other=0.0)
        b_delta = tl.load(p_delta + row + o_t * H, mask=m_t, other=0.0)
        b_seen = (o_t[None, :] >= o_s[:, None]) & m_t[None, :]
        b_s = dot(b_k, tl.trans(operand(b_q, DOT)), DOT) * (scale * LOG2E)
        b_p = tl.where(b_seen, tl.exp2(b_s - b_lse[None, :]), 0.0)
        b_r = dot(b_v, tl.trans(operand(b_do, DOT)), DOT)
        b_raw = b_b[:, None] * b_a[None, :]
        b_sum, b_slopes, share = b_raw, b_raw, 0.0
        if PENALISE:
            share = tl.load(p_share)
            b_sum = head_sum(p_y + start, p_x + start, o_s, o_t, T, H, BS, BQ)
            b_slopes = tl.load(p_slope_b + o_g, mask=m_s, other=0.0)[:, None]
            b_slopes *= tl.load(p_slope_a + row + o_t * H, mask=m_t, other=0.0)[None, :]
        b_draw = gate_slope(b_p, b_r, b_raw, b_seen, b_sum, b_slopes, share, PENALISE)
        b_db += tl.sum(b_draw * b_a[None, :], 1)
        b_gamma = tl.minimum(tl.maximum(b_raw, 0.0), 1.0)
        b_dv += dot(b_gamma * b_p, b_do, DOT)
        b_dk += dot(b_p * (b_gamma * b_r - b_delta[None, :]), b_q, DOT)
    store_rows(p_dk + row * D, b_dk * scale, o_s, H * D, m_s, o_d, D)
    store_rows(p_dv + row * V, b_dv, o_s, H * V, m_s, o_v, V)
    tl.store(p_db + o_g, b_db.to(p_db.dtype.element_ty), mask=m_s)


COLUMNS = "BQ BS num_warps num_stages"
KERNELS = {
    "forward": Kernel(
        gated_forward_kernel,
        configurations(COLUMNS, (64, 32, 4, 2), (64, 64, 4, 2), (128, 32, 8, 2), (32, 32, 4, 1)),
        fp32=dict(BQ=16, BS=32, num_warps=4, num_stages=1),
        serial="T / BS",
    ),
    "penalty": Kernel(
        gated_penalty_kernel,
        configurations(COLUMNS, (32, 64, 4, 1), (64, 64, 8, 1)),
        serial="H T / BS",
        zeroed=["p_sum"],
    ),
    "query": Kernel(
        gated_query_kernel,
        configurations(COLUMNS, (64, 32, 8, 1), (64, 32, 4, 1), (32, 32, 4, 1), (64, 64, 8, 1)),
        fp32=dict(BQ=16, BS=32, num_warps=8, num_stages=1),
        serial="T / BS",
    ),
    "key": Kernel(
        gated_key_kernel,
        configurations(COLUMNS, (32, 32, 4, 1), (32, 64, 8, 1), (32, 64, 4, 1), (64, 64, 8, 1)),
        fp32=dict(BQ=16, BS=16, num_warps=8, num_stages=1),
        serial="T / BQ",
    ),
}
MAX_WIDTH = 128  # of heads


def widths(q, v):
    return dict(D=q.shape[3], V=v.shape[3], BD=power(q.shape[3]), BV=power(v.shape[3]), DOT=dot_type(q.dtype))


def programs(B, H, T, tile):
    return lambda meta: (triton.cdiv(T, meta[tile]) * B * H,)


def gated_fwd(q, k, v, a, b, scale, penalise):
    """In one launch, and one for the penalty."""
    dtype, (B, T, H, _) = v.dtype, q.shape
    q, k, v, a, b = *dense(q, k, v), a.contiguous(), b.contiguous()
    o, lse = torch.empty_like(v), q.new_empty(B, H, T, dtype=torch.float32)
    args = q, k, v, a, b, o, lse, T, H
    KERNELS["forward"].launch(programs(B, H, T, "BQ"), *args, scale=scale, **widths(q, v))
    penalty = lse.new_zeros(())
    if penalise:
        sums = lse.new_zeros(B * triton.cdiv(T, 16))
        KERNELS["penalty"].launch(programs(B, 1, T, "BQ"), *(root(x.float()) for x in (a, b)), sums, T, H)
        penalty = sums.sum() / (B * (T * (T + 1) // 2))
    return o.to(dtype), penalty, lse


def gated_bwd(q, k, v, a, b, o, lse, do, dpenalty, scale, penalise):
    """In two launches."""
    like, (B, T, H, _) = (q, k, v, a, b), q.shape
    delta = (o.float() * do.float()).sum(-1)  # (B, T, H)
    q, k, v, do, a, b = *dense(q, k, v, do), a.contiguous(), b.contiguous()
    grads = [torch.empty_like(x) for x in (q, k, v, a, b)]
    roots = [root(x.float()) for x in (a, b)] + [x.float().abs().pow_(POWER - 1) for x in (a, b)]
    share = (dpenalty / (B * (T * (T + 1) // 2))).float()
    args = q, k, v, a, b, *(roots if penalise else (a, b, a, b)), do, lse, delta, share
    flags = dict(scale=scale, PENALISE=penalise, **widths(q, v))
    KERNELS["query"].launch(programs(B, H, T, "BQ"), *args, grads[0], grads[3], T, H, **flags)
    KERNELS["key"].launch(programs(B, H, T, "BS"), *args, grads[1], grads[2], grads[4], T, H, **flags)
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, like))


def aot_specs():
    """(name, kernel, signature, constants) of every kernel and configuration, for the report. Default first."""
    bf16, specs = {"p_q", "p_k", "p_v", "p_o", "p_do", "p_dq", "p_dk", "p_dv"}, []
    for name, kernel in KERNELS.items():
        for width in (64, 128):
            for i, option in enumerate(kernel.options({})):
                names = kernel.function.arg_names
                constants = dict(BD=width, BV=width, DOT="bf16", PENALISE=True, **option)
                constants = {x: constants[x] for x in constants if x in names or x[:4] == "num_"}
                signature = {x: "*bf16" if x in bf16 else "*fp32" for x in names if x[:2] == "p_"}
                signature |= dict.fromkeys("TH", "i32") | dict.fromkeys("DV", "i32:16") | {"scale": "fp32"}
                specs.append((f"gated_{name} {width} #{i}", kernel.function, signature, constants))
    return specs


# ----------------------------------------------------------------------------- op


@operator(
    "gated",
    "(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, float scale, bool penalise, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)
def gated_op(q, k, v, a, b, scale, penalise, backend):
    if backend == "triton":
        return gated_fwd(q, k, v, a, b, scale, penalise)
    o, penalty, lse = block_forward(q, k, v, a, b, scale, penalise)
    return o.to(v.dtype), penalty, lse


@gated_op.register_fake
def _(q, k, v, a, b, scale, penalise, backend):
    (B, T, H, _), dtype = v.shape, compute_dtype(q.dtype)
    return v.new_empty(v.shape), v.new_empty((), dtype=dtype), v.new_empty((B, H, T), dtype=dtype)


@operator(
    "gated_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor o, Tensor lse, Tensor do,"
    " Tensor dpenalty, float scale, bool penalise, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def gated_backward_op(*args):
    return (gated_bwd if args[-1] == "triton" else block_backward)(*args[:-1])


gated_backward_op.register_fake(like_inputs(5))


def setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.penalise, ctx.backend = inputs
    o, _, lse = output
    ctx.save_for_backward(*tensors, o, lse)


def backward(ctx, do, dpenalty, _):
    *tensors, o, lse = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    dpenalty = o.new_zeros((), dtype=lse.dtype) if dpenalty is None else dpenalty
    return *gated_backward_op(*tensors, o, lse, do, dpenalty, ctx.scale, ctx.penalise, ctx.backend), None, None, None


gated_op.register_autograd(backward, setup_context=setup_context)


# ----------------------------------------------------------------------------- public


def gated(q, k, v, a, b, scale=None, penalise=True, backend="auto"):
    """Gated softmax attention. Returns o (B, T, H, V) and the penalty, a scalar in fp32 (fp64 for fp64 inputs); without
    `penalise` 0.

    q, k (B, T, H, D)   v (B, T, H, V)   a, b (B, T, H), the gates of queries and of keys.
    scale=None is D^-1/2.  backend: auto | triton | torch | dense.
    """
    check_inputs(q, k, v, a, b, backend)
    q, k, v = in_autocast(q, k, v)  # gates keep their precision
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "dense":
        with leave_autocast(q):
            return gated_dense(q, k, v, a, b, scale, penalise)
    wide = max(q.shape[3], v.shape[3]) > MAX_WIDTH
    obstacle = f"the Triton kernels take heads up to {MAX_WIDTH} wide" if wide else None
    o, penalty, _ = gated_op(q, k, v, a, b, float(scale), penalise, choose("gated", backend, q, obstacle))
    return o, penalty


def check_inputs(q, k, v, a, b, backend):
    check("gated", q, k, v, backend, "auto", "triton", "torch", "dense")
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
