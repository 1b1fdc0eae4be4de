"""Performer attention (arXiv 2009.14794): causal linear attention over non-negative features, with its normaliser.

    S_t = S_{t-1} + phi(k_t) [v_t, 1]^T        (M, V + 1)        [n_t, z_t] = S_t^T phi(q_t)        o_t = n_t / z_t

    phi(x) = exp(W x)   "softmax"        relu(W x) + 1e-3   "relu"        log(1 + exp(W x))   "learned"

For Gaussian rows w, E exp(w.q) exp(w.k) = exp(q.k) e^(|q|^2/2) e^(|k|^2/2). The query's factor cancels in o, and so
does the keys' where they all have one norm: "softmax" estimates softmax attention over such keys, with logits q.k.

`performer` is the public function. Three forms of the same equations: `recurrent`, a loop over time; `torch`, chunks of
tokens in matrix products (the CPU path); `triton`. Axes: B batch, T time, H heads, D head width, M features, V value
width, C tokens a chunk, N chunks in flight. Between forward and backward features are not kept but computed again.
"""

import functools
import itertools

import torch
import torch.nn.functional as F

from . import Case, at_once, check, in_autocast, in_steps, jit, leave_autocast, operator, tl, triton
from .gla import (
    CHUNK,
    COLUMNS,
    LOG2E,
    TILES,
    Workspace,
    chunked,
    compute_dtype,
    first_of,
    gla_read_kernel,
    gla_recurrent,
    gla_scan_kernel,
    read_launch,
    regular,
    scan_launch,
    store,
    too_wide,
)
from .launch import Kernel, add_product, choose, configurations, dot, dot_type, operand, power, split, too_long

SEGMENT = 2**18  # features of one head that the chunked form works on at a time, so that its tensors stay in cache
FLOOR = 1e-3  # of the relu features: no query is without keys
LEAST = tl.constexpr(FLOOR) if triton else None  # the same in kernels


# ----------------------------------------------------------------------------- features


def random_features(H, M, D, generator=None):
    """W (H, M, D): each row is a Gaussian vector, and the rows of a block of D are orthogonal, which lowers the
    estimate's variance (arXiv 2009.14794, section 2.4). Directions by QR, uniform once R has a positive diagonal."""
    q, r = torch.linalg.qr(torch.randn(H, -(-M // D), D, D, generator=generator))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    norms = torch.randn(H, M, D, generator=generator).norm(dim=-1, keepdim=True)
    return q.flatten(1, 2)[:, :M] * norms


def feature_map(x, w, features):
    """phi(x) (B, T, H, M) of x (B, T, H, D), w (H, M, D). Differentiable."""
    z = torch.einsum("bthd,hmd->bthm", x, w)
    return {"softmax": torch.exp, "relu": lambda z: z.relu() + FLOOR, "learned": F.softplus}[features](z)


def activate(z, features):
    """phi in place of z = W x."""
    if features == "softmax":
        return z.exp_()
    if features == "relu":
        return z.relu_().add_(FLOOR)
    return z.copy_(F.softplus(z))


def through_features(dphi, phi, features):
    """The gradient of z = W x in place of that of phi. The slope of each map is a function of its value."""
    if features == "softmax":
        return dphi.mul_(phi)
    return dphi.mul_(phi > FLOOR) if features == "relu" else dphi.mul_(torch.expm1(-phi)).neg_()


# ----------------------------------------------------------------------------- oracle


def performer_recurrent(q, k, v, wq, wk, features="softmax", state=None):
    """Token by token, in fp64 for fp64 inputs and fp32 otherwise. Differentiable; also the decoding step."""
    dtype, out_dtype = compute_dtype(q.dtype), v.dtype
    q, k, v, wq, wk = (x.to(dtype) for x in (q, k, v, wq, wk))
    if wq is wk:
        q, k = feature_map(torch.cat((q, k), 1), wq, features).chunk(2, 1)
    else:
        q, k = feature_map(q, wq, features), feature_map(k, wk, features)
    o, state = gla_recurrent(q, k, F.pad(v, (0, 1), value=1.0), None, 1.0, None, state)
    return divide(o).to(out_dtype), state


def divide(o):
    """[n, z] -> n / z. Features are positive; only their underflow makes a z of 0, whose n is 0 as well."""
    return o[..., :-1] / o[..., -1:].clamp(min=torch.finfo(o.dtype).tiny)


# ----------------------------------------------------------------------------- chunked PyTorch
#
# Time is cut into chunks of C tokens and chunks into segments that stay in cache. A segment is of one head: its
# features are one product with W, the rest is batched products over its chunks, u = [v, 1]:
#
#     [n, z] = phi(q) S + tril(phi(q) phi(k)^T) u          S' = S + phi(k)^T u
#
# The states at the start of each segment are kept; the backward computes the rest again.


def blocking(q, M, chunk):
    """Batch rows handled together, and chunks in a segment of them."""
    B, T, _, _ = q.shape
    chunks, size = -(-T // chunk), at_once(SEGMENT, q)
    rows = min(B, max(1, size // (M * chunk * chunks)))
    return rows, min(chunks, max(1, size // (M * chunk * rows)))


def pieces(q, M, chunk):
    """What is worked on at a time: batch rows, head, segment (start, stop, chunks), and its place among the states."""
    (B, T, H, _), (rows, n), todo, start = q.shape, blocking(q, M, chunk), [], 0
    for h in range(H):
        for b in range(0, B, rows):
            size = min(rows, B - b)
            for lo in range(0, T, n * chunk):
                hi = min(T, lo + n * chunk)
                segment = (lo, hi, -(-(hi - lo) // chunk))
                todo.append((slice(b, b + size), slice(h, h + 1), segment, slice(start, start + size)))
                start += size
    return todo


def states_kept(q, state, backend, chunk=CHUNK):
    """The shape of the states that the backward pass finds: those at the start of each segment, or none."""
    (B, T, H, _), (_, n) = q.shape, blocking(q, state.shape[2], chunk)
    return (0,) if backend == "triton" else (B * H * -(-T // (n * chunk)), *state.shape[2:])


def segment_features(x, w, features, segment, chunk, new):
    """x, phi(x), and the same as operands: (N, C, D), (N, C, M). Padded tokens have features too: it is their values
    that are 0. An exponent needs its digits, so features are products in full precision."""
    x = chunked(x, segment, chunk)
    x = new(*x.shape).copy_(x).flatten(0, 2)
    phi = new(*x.shape[:2], w.shape[0])
    torch.mm(x.flatten(0, 1), w.mT, out=phi.flatten(0, 1))
    return x, activate(phi, features), new.operand(phi)


def operands(v, features):
    """The type whose products may be those of operands. Learned features are nearly alike, so their differences, which
    gradients are made of, need full precision."""
    return None if features == "learned" else v.dtype


def with_ones(v, segment, chunk, new):
    """u = [v, 1] (N, C, V + 1), 0 for padded tokens, as operands."""
    lo, hi, n = segment
    u = new(n, v.shape[0], 1, chunk, v.shape[3] + 1, dtype=new.low)
    u[..., :-1].copy_(chunked(v, segment, chunk))
    u[..., -1] = 1
    u[-1, ..., hi - lo - (n - 1) * chunk :, -1] = 0
    return u.flatten(0, 2)


def running_sums(x, first, out, last=None, reverse=False):
    """States from chunk to chunk: out[0] = first, out[i+1] = out[i] + x[i]. The last one into `last`.

    x, out (N, M, V + 1), first, last (rows, 1, M, V + 1), the same tensor if need be
    """
    x, y = x.view(-1, *first.shape).unbind(), out.view(-1, *first.shape).unbind()
    order = range(len(x) - 1, -1, -1) if reverse else range(len(x))
    y[order[0]].copy_(first)
    for i, j in zip(order, order[1:]):
        torch.add(y[i], x[i], out=y[j])
    if last is not None:
        i = order[-1]
        torch.add(y[i], x[i], out=last)
    return out


def operations(T, H, D, V, M):
    """(nominal, executed) of a sequence of T: features and the recurrence, and the matrix products that `chunk_forward`
    runs, a whole last chunk included: features, states, and what a chunk adds."""
    each = 4 * M * (D + V + 1)  # of a token
    return each * H * T, H * -(-T // CHUNK) * CHUNK * (each + 2 * CHUNK * (M + V + 1))


def chunk_forward(q, k, v, wq, wk, state, features, chunk=CHUNK):
    """o (B, T, H, V), 1/z (B, T, H, 1), the last state (B, H, M, V + 1), and those at the start of each segment."""
    o, inverse = v.new_empty(v.shape), state.new_empty(*v.shape[:3], 1)
    starts, state = state.new_empty(states_kept(q, state, "torch", chunk)), state.clone()
    new = Workspace(state, operands(v, features))
    for rows, h, segment, here in pieces(q, state.shape[2], chunk):
        new.taken = 0
        *_, fq = segment_features(q[rows, :, h], wq[h.start], features, segment, chunk, new)
        *_, fk = segment_features(k[rows, :, h], wk[h.start], features, segment, chunk, new)
        u = with_ones(v[rows, :, h], segment, chunk, new)
        carry = state[rows, h]
        starts[here] = carry[:, 0]
        x = new.full(new.bmm(fk.mT, u))
        S = new.operand(running_sums(x, carry, new(*x.shape), carry))
        n = add_product(new.full(new.bmm(fq, S)), new.bmm(fq, fk.mT).tril_(), u, new.low)
        n, z = n.view(-1, carry.shape[0], 1, chunk, n.shape[2]).split((v.shape[3], 1), -1)
        z = z.clamp(min=torch.finfo(z.dtype).tiny).reciprocal_()
        store(o[rows, :, h], segment, chunk, lambda place: torch.mul(n, z, out=place))  # noqa: B023
        store(inverse[rows, :, h], segment, chunk, lambda place: place.copy_(z))  # noqa: B023
    return o, inverse, state, starts


def chunk_backward(q, k, v, wq, wk, o, inverse, starts, do, dstate, features, weights, chunk=CHUNK):
    """Gradients of q, k, v, wq, wk (empty unless `weights`) and the initial state. dstate: that of the last state."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dwq, dwk = (torch.zeros_like(w) if weights else w.new_empty(0) for w in (wq, wk))
    new, dstate = Workspace(starts, operands(v, features)), dstate.clone()
    V, low = v.shape[3], new.low
    for rows, h, segment, here in reversed(pieces(q, wq.shape[1], chunk)):
        new.taken = 0
        xq, phi_q, fq = segment_features(q[rows, :, h], wq[h.start], features, segment, chunk, new)
        xk, phi_k, fk = segment_features(k[rows, :, h], wk[h.start], features, segment, chunk, new)
        u = with_ones(v[rows, :, h], segment, chunk, new)
        full = read_gradient(do[rows, :, h], o[rows, :, h], inverse[rows, :, h], segment, chunk, new)
        du = new.operand(full)
        x = new.full(new.bmm(fk.mT, u))
        S = running_sums(x, starts[here].unsqueeze(1), new(*x.shape))
        carry = dstate[rows, h]
        new.bmm(fq.mT, du, out=x)
        dS = new.operand(running_sums(x, carry, new(*x.shape), carry, reverse=True))
        A, dA = new.bmm(fq, fk.mT).tril_(), new.operand(new.bmm(full, new.full(u).mT).tril_())
        dvs = new.bmm(fk, dS[:, :, :V]).baddbmm_(A.mT, du[:, :, :V])
        store(dv[rows, :, h], segment, chunk, lambda place: place.copy_(dvs.view(place.shape)))  # noqa: B023
        dfq = add_product(new.full(new.bmm(du, new.operand(S).mT)), dA, fk, low)
        dfk = add_product(new.full(new.bmm(u, dS.mT)), dA.mT, fq, low)
        for w, dw, x, f, df, dx in ((wq, dwq, xq, phi_q, dfq, dq), (wk, dwk, xk, phi_k, dfk, dk)):
            dz = through_features(df, f, features).flatten(0, 1)  # (N C, M)
            if weights:
                dw[h.start].addmm_(dz.mT, x.flatten(0, 1))
            dxs = torch.mm(dz, w[h.start], out=x.flatten(0, 1))
            store(dx[rows, :, h], segment, chunk, lambda place: place.copy_(dxs.view(place.shape)))  # noqa: B023
    return dq, dk, dv, dwq, dwk, dstate


def read_gradient(do, o, inverse, segment, chunk, new):
    """The gradient of [n, z], (N, C, V + 1): do / z, and -(do . o) / z."""
    do, inverse = chunked(do, segment, chunk), chunked(inverse, segment, chunk)
    du = new(*do.shape[:-1], do.shape[-1] + 1)
    dn = torch.mul(do, inverse, out=du[..., :-1])
    torch.sum(dn * chunked(o, segment, chunk), -1, out=du[..., -1]).neg_()
    return du.flatten(0, 2)


# ----------------------------------------------------------------------------- Triton
#
# The linear attention of kernels/gla.py without gates; scan and read are gla's kernels. Normalisers are sums over
# chunks of features, small beside them; inside a chunk the kernels add the rest.
#
#     feature  phi(x) in the type of products, of exponents in fp32, and its sum over each chunk, weighed or not
#     scan     S at the start of each chunk, the last state          REVERSE: dS at the end of each chunk, and the first
#     read     o, 1/z from phi(q), phi(k), v, S, z                   REVERSE: dv from phi(k), phi(q), dn, dS
#     grad     dq, dk, through the gradients of their features


@jit
def performer_feature_kernel(
    p_x, p_w, p_weight, p_f, p_sum, SX, T, H, K, D,
    C: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, FEATURES: tl.constexpr,
    WEIGHED: tl.constexpr,
):  # fmt: skip
    """BK features of a chunk of x (B, T, H, D), and sum_t weight_t phi(x_t) of the rounded ones."""
    i_k, i = split(tl.program_id(0), tl.cdiv(K, BK))
    i_t, i_bh = split(i, tl.cdiv(T, C))
    o_c, o_k = tl.arange(0, C), i_k * BK + tl.arange(0, BK)
    o_t = i_t * C + o_c
    m_t, m_k = o_t < T, o_k < K
    p_x += first_of(i_bh, T, SX, H, D)
    b_f = tl.zeros([C, BK], tl.float32)
    for i_d in range(0, tl.cdiv(D, BD)):
        o_d = i_d * BD + tl.arange(0, BD)
        m_d = o_d < D
        b_x = tl.load(p_x + o_t[:, None] * SX + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0)  # (C, BD)
        o_w = (i_bh % H * K + o_k)[None, :] * D + o_d[:, None]
        b_w = tl.load(p_w + o_w, mask=m_k[None, :] & m_d[:, None], other=0.0)  # (BD, BK)
        b_f += dot(b_x.to(tl.float32), b_w, DOT)
    if FEATURES == "softmax":
        b_f = tl.exp2(b_f * LOG2E)
    elif FEATURES == "relu":
        b_f = tl.maximum(b_f, 0.0) + LEAST
    else:  # log(1 + e^z) without an overflow
        b_f = tl.maximum(b_f, 0.0) + tl.log2(1.0 + tl.exp2(-tl.abs(b_f) * LOG2E)) / LOG2E
    b_f = b_f.to(p_f.dtype.element_ty)
    o_f = first_of(i_bh, T, H * K, H, K) + o_t[:, None] * (H * K) + o_k[None, :]
    tl.store(p_f + o_f, b_f, mask=m_t[:, None] & m_k[None, :])
    b_n = tl.where(m_t, 1.0, 0.0)
    if WEIGHED:
        b_n = tl.load(p_weight + first_of(i_bh, T, H, H, 1) + o_t * H, mask=m_t, other=0.0)
    chunk = i_bh.to(tl.int64) * tl.cdiv(T, C) + i_t
    tl.store(p_sum + chunk * K + o_k, tl.sum(b_f.to(tl.float32) * b_n[:, None], 0), mask=m_k)


@jit
def through_map(b_df, b_f, FEATURES: tl.constexpr):
    """The gradient of W x from that of its features; the slope of each map is a function of its value."""
    b_f = b_f.to(tl.float32)
    if FEATURES == "softmax":
        return b_df * b_f
    elif FEATURES == "relu":
        return tl.where(b_f > LEAST, b_df, 0.0)
    else:
        return b_df * (1.0 - tl.exp2(-b_f * LOG2E))


@jit
def performer_grad_kernel(
    p_q, p_k, p_v, p_dn, p_dz, p_s, p_ds, p_z, p_dzs, p_wq, p_wk, p_dq, p_dk, p_mq, p_mk, T, H, K, V, D,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, MAP: tl.constexpr,
    FEATURES: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """dq, dk of a chunk, BK features at a time. p_q, p_k: features; p_z, p_dzs: of the state; p_dz: of each token's
    normaliser; p_mq, p_mk: the gradients of W x, which those of W need. MAP: the products with W."""
    i_t, i_bh = split(tl.program_id(0), tl.cdiv(T, C))
    o_c, o_d = tl.arange(0, C), tl.arange(0, BD)
    o_t = i_t * C + o_c
    m_t, m_d = o_t < T, o_d < D
    row = (i_bh // H).to(tl.int64) * T * H + i_bh % H
    p_v, p_dn = p_v + row * V, p_dn + row * V
    chunk = i_bh.to(tl.int64) * tl.cdiv(T, C) + i_t
    b_dz = tl.load(p_dz + row + o_t * H, mask=m_t, other=0.0)  # (C)
    b_dA, b_dAT = tl.zeros([C, C], tl.float32) + b_dz[:, None], tl.zeros([C, C], tl.float32) + b_dz[None, :]
    for i_v in range(0, tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        o_y, m_y = o_t[:, None] * (H * V) + o_v[None, :], m_t[:, None] & (o_v < V)[None, :]
        b_v = tl.load(p_v + o_y, mask=m_y, other=0.0)  # (C, BV)
        b_dn = tl.load(p_dn + o_y, mask=m_y, other=0.0)  # (C, BV)
        b_dA += dot(b_dn, tl.trans(b_v), DOT)
        b_dAT += dot(b_v, tl.trans(b_dn), DOT)
    b_dA = operand(tl.where(o_c[:, None] >= o_c[None, :], b_dA, 0.0), DOT)
    b_dAT = operand(tl.where(o_c[:, None] <= o_c[None, :], b_dAT, 0.0), DOT)
    b_dq, b_dk = tl.zeros([C, BD], tl.float32), tl.zeros([C, BD], tl.float32)
    for i_k in range(0, tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = o_k < K
        b_z = tl.load(p_z + chunk * K + o_k, mask=m_k, other=0.0)  # (BK)
        b_dzs = tl.load(p_dzs + chunk * K + o_k, mask=m_k, other=0.0)  # (BK)
        b_mq, b_mk = b_dz[:, None] * b_z[None, :], tl.zeros([C, BK], tl.float32) + b_dzs[None, :]
        for i_v in range(0, tl.cdiv(V, BV)):
            o_v = i_v * BV + tl.arange(0, BV)
            o_y, m_y = o_t[:, None] * (H * V) + o_v[None, :], m_t[:, None] & (o_v < V)[None, :]
            o_s, m_s = chunk * K * V + o_k[None, :] * V + o_v[:, None], m_k[None, :] & (o_v < V)[:, None]
            b_s = operand(tl.load(p_s + o_s, mask=m_s, other=0.0), DOT)  # (BV, BK)
            b_ds = operand(tl.load(p_ds + o_s, mask=m_s, other=0.0), DOT)  # (BV, BK)
            b_mq += dot(tl.load(p_dn + o_y, mask=m_y, other=0.0), b_s, DOT)
            b_mk += dot(tl.load(p_v + o_y, mask=m_y, other=0.0), b_ds, DOT)
        o_x, m_x = row * K + o_t[:, None] * (H * K) + o_k[None, :], m_t[:, None] & m_k[None, :]
        b_q = tl.load(p_q + o_x, mask=m_x, other=0.0)  # (C, BK)
        b_k = tl.load(p_k + o_x, mask=m_x, other=0.0)  # (C, BK)
        b_mq = through_map(b_mq + dot(b_dA, b_k, DOT), b_q, FEATURES)
        b_mk = through_map(b_mk + dot(b_dAT, b_q, DOT), b_k, FEATURES)
        if WEIGHTS:
            tl.store(p_mq + o_x, b_mq, mask=m_x)
            tl.store(p_mk + o_x, b_mk, mask=m_x)
        o_w, m_w = (i_bh % H * K + o_k)[:, None] * D + o_d[None, :], m_k[:, None] & m_d[None, :]
        b_dq += dot(b_mq, tl.load(p_wq + o_w, mask=m_w, other=0.0), MAP)
        b_dk += dot(b_mk, tl.load(p_wk + o_w, mask=m_w, other=0.0), MAP)
    o_x, m_x = row * D + o_t[:, None] * (H * D) + o_d[None, :], m_t[:, None] & m_d[None, :]
    tl.store(p_dq + o_x, b_dq.to(p_dq.dtype.element_ty), mask=m_x)
    tl.store(p_dk + o_x, b_dk.to(p_dk.dtype.element_ty), mask=m_x)


FEATURE_TILES, FEATURE_WIDTHS = "BK BD num_warps num_stages", dict(BK="K", BD="D")
KERNELS = {
    "feature": Kernel(
        performer_feature_kernel,
        configurations(FEATURE_TILES, (64, 32, 8, 1), (32, 32, 4, 1)),
        FEATURE_WIDTHS,
        serial="D / BD",
    ),
    "scan": Kernel(
        gla_scan_kernel,
        configurations(COLUMNS, (64, 64, 4, 2)),
        TILES,
        dict(BK=64, BV=32, num_warps=4, num_stages=2),
        serial="T / 64",
    ),
    "read": Kernel(
        gla_read_kernel,
        configurations(COLUMNS, (64, 64, 4, 2)),
        TILES,
        dict(BK=32, BV=32, num_warps=4, num_stages=1),
        serial="K / BK",
    ),
    "grad": Kernel(
        performer_grad_kernel,
        configurations(COLUMNS, (16, 32, 8, 1), (32, 32, 8, 1)),
        TILES,
        dict(BK=16, BV=16, num_warps=8, num_stages=1),
        serial="K / BK",
    ),
}


def normalisers(sums, first, reverse=False):
    """Normalisers (B, H, chunks, M) on arrival at each chunk, and the last one, from the sums of the chunks."""
    sums = torch.cat((first.unsqueeze(2), sums.flip(2) if reverse else sums), 2).cumsum(2)
    states, last = sums[:, :, :-1], sums[:, :, -1]
    return (states.flip(2) if reverse else states).contiguous(), last


def feature_launch(x, w, features, dtype, weight=None):
    """phi(x) (B, T, H, M) in `dtype`, and its sums over chunks (B, H, chunks, M), weighed by weight (B, T, H)."""
    (B, T, H, D), M, chunks = x.shape, w.shape[1], triton.cdiv(x.shape[1], CHUNK)
    x, w = x if regular(x) else x.contiguous(), w.contiguous()
    phi, sums = x.new_empty(B, T, H, M, dtype=dtype), w.new_empty(B, H, chunks, M)

    def programs(meta):
        return (triton.cdiv(M, meta["BK"]) * chunks * B * H,)

    options = dict(C=CHUNK, DOT=dot_type(torch.float32), FEATURES=features, WEIGHED=weight is not None)
    args = x, w, sums if weight is None else weight.contiguous(), phi, sums, x.stride(1), T, H
    KERNELS["feature"].launch(programs, *args, K=M, D=D, **options)
    return phi, sums


def product_inputs(v, state):
    """The type of products, fp32 or bf16, values in it, and the two parts of the state."""
    dtype = torch.float32 if v.dtype == torch.float32 else torch.bfloat16
    return dtype, v.to(dtype).contiguous(), state[..., :-1].contiguous(), state[..., -1]


def performer_fwd(q, k, v, wq, wk, state, features):
    """o, 1/z and the last state, in four launches, or six."""
    dtype, y, first, z = product_inputs(v, state)
    (fq, _), (fk, sums) = (feature_launch(x, w, features, dtype) for x, w in ((q, wq), (k, wk)))
    states, last = scan_launch(fk, y, None, first, dtype, kernels=KERNELS)
    z, z_last = normalisers(sums, z)
    o, inverse = read_launch(fq, fk, y, None, states, normaliser=z, kernels=KERNELS)
    return o.to(v.dtype), inverse, torch.cat((last, z_last.unsqueeze(-1)), -1)


def performer_bwd(q, k, v, wq, wk, state, o, inverse, do, dstate, features, weights):
    """The gradients of q, k, v, wq, wk and the initial state, in six launches, or ten."""
    dtype, y, first, z = product_inputs(v, state)
    (B, T, H, _), V, M = q.shape, v.shape[3], wq.shape[1]
    dn = (do.float() * inverse).to(dtype).contiguous()
    dz = -(dn.float() * o).sum(-1)  # (B, T, H), of the rounded dn: the two nearly cancel
    (fq, dsums), (fk, sums) = (feature_launch(*xw, features, dtype, n) for *xw, n in ((q, wq, dz), (k, wk, None)))
    states, _ = scan_launch(fk, y, None, first, torch.float32, kernels=KERNELS)
    zs, _ = normalisers(sums, z)
    dlast = dstate[..., :-1].contiguous()
    dstates, dfirst = scan_launch(fq, dn, None, dlast, torch.float32, reverse=True, kernels=KERNELS)
    dzs, dz_first = normalisers(dsums, dstate[..., -1], True)
    dv, _ = read_launch(fk, fq, dn, None, dstates, reverse=True, kernels=KERNELS)
    dq, dk = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    through = [torch.empty_like(fq, dtype=torch.float32) for _ in range(2)] if weights else (dq, dk)

    def programs(_):
        return (states.shape[2] * B * H,)

    args = fq, fk, y, dn, dz, states, dstates, zs, dzs, wq.contiguous(), wk.contiguous(), dq, dk, *through, T, H
    kinds = dict(DOT=dot_type(fq.dtype), MAP=dot_type(torch.float32), FEATURES=features, WEIGHTS=weights)
    KERNELS["grad"].launch(programs, *args, K=M, V=V, D=q.shape[3], C=CHUNK, BD=power(q.shape[3]), **kinds)
    dws = [torch.einsum("bthm,bthd->hmd", x, y.float()) for x, y in zip(through, (q, k)) if weights]
    dws = dws or [wq.new_empty(0), wk.new_empty(0)]
    return dq, dk, dv.to(v.dtype), *dws, torch.cat((dfirst, dz_first.unsqueeze(-1)), -1)


def aot_specs():
    """(name, kernel, signature, constants) of every kernel, for the report."""
    forms = [("scan", dict(REVERSE=False, FINAL=True)), ("scan", dict(REVERSE=True, FINAL=True)), ("grad", {})]
    read = dict(FACTORISED=True, STATES=True)
    forms += [("read", read | dict(NORMALISED=not reverse, REVERSE=reverse)) for reverse in (False, True)]
    specs = []
    for name, flags in forms:
        for M, V in ((128, 32), (256, 64), (512, 128)):
            wide = {"p_first", "p_last", "p_z", "p_dz", "p_dzs", "p_inverse", "p_ds", "p_wq", "p_wk", "p_mq", "p_mk"}
            wide |= {"p_all", "p_s"} if flags.get("REVERSE", True) else set()
            kernel = KERNELS[name].function
            signature = {x: "*fp32" if x in wide else "*bf16" for x in kernel.arg_names if x[:2] == "p_"}
            signature |= dict.fromkeys("THL", "i32") | dict.fromkeys(("K", "V", "D", "SX", "SY", "SW"), "i32:16")
            signature |= dict.fromkeys(("scale", "gate_min", "tiny"), "fp32")
            constants = KERNELS[name].options(dict(K=M, V=V))[0] | flags | dict(C=CHUNK, DOT="bf16")
            through = dict(BD=V, MAP="tf32x3", FEATURES="softmax", WEIGHTS=False)
            constants |= through if name == "grad" else dict(GATED=False, HEAD=False)
            form = " reverse" if flags.get("REVERSE") else ""
            specs.append((f"performer_{name}{form} {V} #0", kernel, signature, constants))
    for width, i in itertools.product((64, 128), range(len(KERNELS["feature"].configs))):
        kernel, config = performer_feature_kernel, KERNELS["feature"].options(dict(K=256, D=width))[i]
        signature = {x: "*bf16" if x == "p_f" else "*fp32" for x in kernel.arg_names if x[:2] == "p_"}
        signature |= dict.fromkeys("TH", "i32") | dict.fromkeys(("K", "D", "SX"), "i32:16")
        constants = dict(C=CHUNK, DOT="tf32x3", FEATURES="softmax", WEIGHED=False, **config)
        specs.append((f"performer_feature {width} #{i}", kernel, signature, constants))
    return specs


# ----------------------------------------------------------------------------- op
#
# Custom ops return tensors only and no input among them: `starts` is empty where a backend keeps none.


@operator(
    "performer",
    "(Tensor q, Tensor k, Tensor v, Tensor wq, Tensor wk, Tensor state, str features, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def performer_op(q, k, v, wq, wk, state, features, backend):
    if backend == "triton":
        return *performer_fwd(q, k, v, wq, wk, state, features), state.new_empty(0)
    return chunk_forward(q, k, v, wq, wk, state, features)


@performer_op.register_fake
def _(q, k, v, wq, wk, state, features, backend):
    inverse, starts = (*v.shape[:3], 1), states_kept(q, state, backend)
    return v.new_empty(v.shape), *(state.new_empty(shape) for shape in (inverse, state.shape, starts))


@operator(
    "performer_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor wq, Tensor wk, Tensor state, Tensor o, Tensor inverse,"
    " Tensor starts, Tensor do, Tensor dstate, str features, bool weights, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def performer_backward_op(q, k, v, wq, wk, state, o, inverse, starts, do, dstate, features, weights, backend):
    if backend == "triton":
        return performer_bwd(q, k, v, wq, wk, state, o, inverse, do, dstate, features, weights)
    return chunk_backward(q, k, v, wq, wk, o, inverse, starts, do, dstate, features, weights)


@performer_backward_op.register_fake
def _(q, k, v, wq, wk, state, o, inverse, starts, do, dstate, features, weights, backend):
    dw = (w.new_empty(w.shape if weights else (0,)) for w in (wq, wk))
    return *(x.new_empty(x.shape) for x in (q, k, v)), *dw, state.new_empty(state.shape)


def setup_context(ctx, inputs, output):
    *tensors, ctx.features, ctx.backend = inputs
    o, inverse, _, starts = output
    ctx.save_for_backward(*tensors, o, inverse, starts)


def backward(ctx, do, _, dstate, __):
    q, k, v, wq, wk, state, o, inverse, starts = ctx.saved_tensors
    do = v.new_zeros(v.shape) if do is None else do
    dstate = torch.zeros_like(state) if dstate is None else dstate
    weights = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    tensors = q, k, v, wq, wk, state, o, inverse, starts, do, dstate
    dq, dk, dv, dwq, dwk, dstate = performer_backward_op(*tensors, ctx.features, weights, ctx.backend)
    dwq, dwk = (dwq, dwk) if weights else (None, None)
    return dq, dk, dv, dwq, dwk, dstate, None, None


performer_op.register_autograd(backward, setup_context=setup_context)


# ----------------------------------------------------------------------------- public


def performer(
    q, k, v, wq, wk, features="softmax", initial_state=None, output_final_state=False, backend="auto"
):  # fmt: skip
    """Performer attention. Returns o (B, T, H, V), and the final state (B, H, M, V + 1) if asked for, else None.

    q, k (B, T, H, D)   v (B, T, H, V)   wq, wk (H, M, D), the rows of W for queries and for keys
    features: softmax | relu | learned.  initial_state (B, H, M, V + 1), of which the last column is the normaliser.
    backend: auto | triton | torch | recurrent.  States are fp32, fp64 for fp64 inputs.
    """
    check_inputs(q, k, v, wq, wk, features, initial_state, backend)
    (B, _, H, _), M, V, dtype = q.shape, wq.shape[1], v.shape[3], compute_dtype(q.dtype)
    (v,) = in_autocast(v)  # exponents and states keep their precision
    wq, wk = wq.to(dtype), wk.to(dtype)
    if in_steps(backend, q, initial_state, output_final_state):
        with leave_autocast(q):
            o, state = performer_recurrent(q, k, v, wq, wk, features, initial_state)
    else:
        state = q.new_zeros(B, H, M, V + 1, dtype=dtype) if initial_state is None else initial_state.to(dtype)
        obstacle = too_wide(q.shape[3], V) or too_long(q.shape[1] * q.shape[2] * M)
        backend = choose("performer", backend, q, obstacle)
        o, _, state, _ = performer_op(q, k, v, wq, wk, state, features, backend)
    return o, state if output_final_state else None


def check_inputs(q, k, v, wq, wk, features, initial_state, backend):
    check("performer", q, k, v, backend, "auto", "triton", "torch", "recurrent")
    (B, _, H, D), V = q.shape, v.shape[3]
    for name, w in (("wq", wq), ("wk", wk)):
        if w.dim() != 3 or (w.shape[0], w.shape[2]) != (H, D) or w.shape != wq.shape or w.shape[1] < 1:
            raise ValueError(f"performer: {name} must be ({H}, features, {D}), both alike, got {tuple(w.shape)}")
    if features not in ("softmax", "relu", "learned"):
        raise ValueError(f"performer: features must be softmax, relu or learned, got {features!r}")
    shape = (B, H, wq.shape[1], V + 1)
    if initial_state is not None and initial_state.shape != shape:
        raise ValueError(f"performer: initial_state must be {shape}, got {tuple(initial_state.shape)}")


def case(q, k, v, n_feature=256, **_):
    """What is timed: keys and queries of norm 1, and features that all heads share."""
    (B, T, H, K), V = q.shape, v.shape[3]
    w = random_features(1, n_feature, K).expand(H, -1, -1).to(q.device)
    unit = [F.normalize(x.detach(), dim=-1).requires_grad_() for x in (q, k)]
    call, oracle = functools.partial(of_features, w), functools.partial(of_features, w.double(), backend="recurrent")
    return {"performer": Case(call, [*unit, v], oracle, B * operations(T, H, K, V, n_feature)[1])}


def of_features(w, q, k, v, backend="auto"):
    return performer(q, k, v, w, w, backend=backend)[0]


CASES = {"performer": case}
