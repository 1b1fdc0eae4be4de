"""Gated slot attention (arXiv 2409.07146): M slots a head, written through a per-slot gate, read by a softmax.

    hk_t = hk_{t-1} diag(e^{g_t}) + k_t s_t^T        (K, M)      y_t = scale * hk_t^T q_t        p_t = softmax(y_t)
    hv_t = diag(e^{g_t}) hv_{t-1} + s_t v_t^T        (M, V)      o_t = hv_t^T p_t

`gsa` is the public function. Three forms of the same equations: `recurrent`, a loop over time; `torch`, chunks of
tokens in matrix products (the CPU path); `triton`. Axes: B batch, T time, H heads, K key width, V value width, M slots,
C tokens a chunk, N chunks in flight. Decays only ever appear as products of e^g over the tokens between two others.
"""

import functools

import torch
import torch.nn.functional as F

from . import Case, at_once, check, in_autocast, in_steps, jit, leave_autocast, operator, tl, triton
from .gla import (
    LOG2E,
    compute_dtype,
    double_sums,
    floor,
    group_length,
    group_starts,
    is_factorised,
    joined,
    last_of,
    pick_row,
    row_product,
    tree_level,
    weigh_launch,
)
from .launch import (
    Kernel,
    add_product,
    choose,
    configurations,
    dot,
    dot_type,
    operand,
    power,
    product,
    product_type,
    split,
)

CHUNK = 64  # tokens a chunk, in every backend
SEGMENT = 4096  # token-heads that the chunked form works on at a time, so that its blocks stay in cache
FACTOR_MIN = -1.25  # gates at or above this, with at most e^FACTOR_SUM of decay over a chunk, may be factorised
FACTOR_SUM = -60.0


# ----------------------------------------------------------------------------- oracle


def gsa_recurrent(q, k, v, s, g, scale=None, initial_state=None, gate_min=None):
    """One token at a time, in fp64 for fp64 inputs and fp32 otherwise; what every other form is tested against."""
    B, T, H, K, V, M = *q.shape, v.shape[-1], s.shape[-1]
    scale = K**-0.5 if scale is None else scale
    dtype, acc = v.dtype, compute_dtype(q.dtype)
    q, k, v, s, g = (x.to(acc) for x in (q, k, v, s, g))
    q = q if scale == 1.0 else q * scale
    g = g if gate_min is None else g.clamp(min=gate_min)
    if initial_state is None:
        hk, hv = q.new_zeros(B, H, K, M), q.new_zeros(B, H, M, V)
    else:
        hk, hv = (x.to(acc) for x in initial_state)
    out = []
    for t in range(T):
        decay, write = g[:, t].exp(), s[:, t]  # (B, H, M)
        hk = (hk * decay.unsqueeze(-2)).addcmul_(k[:, t].unsqueeze(-1), write.unsqueeze(-2))
        hv = (hv * decay.unsqueeze(-1)).addcmul_(write.unsqueeze(-1), v[:, t].unsqueeze(-2))
        p = torch.softmax(row_product(q[:, t].unsqueeze(-2), hk), -1)  # (B, H, 1, M)
        out.append(row_product(p, hv))
    return joined(out, 2).transpose(1, 2).to(dtype), (hk, hv)


# ----------------------------------------------------------------------------- chunked PyTorch


class Decay:
    """The decays inside N chunks of C tokens, and the three products that carry them from token j to token i >= j.

    `head` (N, C, M) is the decay from the chunk's start through each token, `tail` from after each token to the
    chunk's end. Mild gates are factorised: e^(b_i - b_j) is head_i / head_j, and every product is one matrix product.
    Otherwise chunks are halved down to single tokens; the pair (i, j) belongs to the one level whose middle lies
    between them, and there its decay is `right_i * left_j`, both products of e^g of neighbours: exact for every g <= 0.
    The pair i = j has no decay. It stays out of `gather` and `scatter`: gate gradients need the sums without it.
    """

    def __init__(self, g, s):
        N, C, M = g.shape
        self.s, self.levels, self.lifted = s, [], None
        if g.min() >= FACTOR_MIN and g.sum(1).min() >= FACTOR_SUM:
            self.head = torch.bmm(lower(C, g).expand(N, C, C), g).exp_()
            self.tail = self.head[:, -1:] / self.head
            self.lifted = s / self.head
            return
        self.head, self.tail, h = g.exp(), torch.ones_like(g), 1
        while h < C:
            head, tail = self.head.view(-1, 2, h, M), self.tail.view(-1, 2, h, M)
            left, right = tail[:, 0].clone(), head[:, 1].clone()
            self.levels.append((h, left, right, left * s.view(-1, 2, h, M)[:, 0]))
            tail[:, 0] *= right[:, -1:]
            head[:, 1] *= head[:, 0, -1:]
            h *= 2

    def scores(self, x, low):
        """A_ij = sum_m x_im s_jm e^(b_i - b_j) for j <= i, else 0. (N, C, C), as operands of type low."""
        N, C, M = x.shape
        if self.lifted is not None:
            return product(x * self.head, self.lifted.mT, low).tril_()
        A = torch.diag_embed((x * self.s).sum(-1))
        for h, _, right, written in self.levels:
            block = below(A, h)
            block.copy_(torch.bmm(x.view(-1, 2, h, M)[:, 1] * right, written.mT).view(block.shape))
        return A.to(low)

    def gather(self, P, base):
        """head_i * base_i + sum_{j<i} P_ij e^(b_i - b_j) s_j, in place of base. P (N, C, C) strictly lower."""
        if self.lifted is not None:
            return base.baddbmm_(P, self.lifted).mul_(self.head)
        base.mul_(self.head)
        for h, _, right, written in self.levels:
            base.view(-1, 2, h, base.shape[-1])[:, 1].addcmul_(right, torch.bmm(below(P, h).reshape(-1, h, h), written))
        return base

    def scatter(self, P, x, Q, y, low):
        """sum_{i>j} e^(b_i - b_j) (P_ij x_i + Q_ij y_i). P, Q (N, C, C) strictly lower, x, y (N, C, M)."""
        if self.lifted is not None:
            out = product(P.mT, x * self.head, low).to(x.dtype)
            return add_product(out, Q.mT, y * self.head, low).div_(self.head)
        out, M = torch.zeros_like(x), x.shape[-1]
        for h, left, right, _ in self.levels:
            part = torch.bmm(below(P, h).reshape(-1, h, h).mT, x.view(-1, 2, h, M)[:, 1] * right)
            part.baddbmm_(below(Q, h).reshape(-1, h, h).mT, y.view(-1, 2, h, M)[:, 1] * right)
            out.view(-1, 2, h, M)[:, 0].addcmul_(left, part)
        return out


def lower(C, like, diagonal=0):
    return torch.ones(C, C, dtype=like.dtype, device=like.device).tril_(diagonal)


def below(A, h):
    """A view of all h x h blocks of A (N, C, C) in the lower left of a diagonal block of 2h: (N, C / 2h, h, h)."""
    N, C, _ = A.shape
    pairs = A.view(N, C // (2 * h), 2 * h, C // (2 * h), 2 * h).diagonal(dim1=1, dim2=3)  # (N, 2h, 2h, C / 2h)
    return pairs[:, h:, :h].permute(0, 3, 1, 2)


def causal_scores(q, k, dtype):
    """The strictly lower part of q k^T (N, C, C), and its diagonal (N, C, 1), which is of that type."""
    P = torch.bmm(q, k.mT)
    diagonal = P.diagonal(dim1=1, dim2=2).to(dtype, copy=True).unsqueeze(-1)
    return P.tril_(-1), diagonal


def load(n, C, dtype, *xs):
    """n chunks of each x (B, n * C or fewer, H, D), zero-padded, side by side: (n * B * H, C, sum of the D)."""
    B, T, H, _ = xs[0].shape
    out = torch.empty(n, B, H, C, sum(x.shape[-1] for x in xs), dtype=dtype, device=xs[0].device)
    at = 0
    for x in xs:
        x = F.pad(x, (0, 0, 0, 0, 0, n * C - T)) if n * C > T else x
        out[..., at : at + x.shape[-1]].copy_(x.unflatten(1, (n, C)).permute(1, 0, 3, 2, 4))
        at += x.shape[-1]
    return out.view(-1, C, at)


def store(out, x):
    """The inverse: chunks x (n * B * H, C, D) into out (B, T, H, D), without the padding."""
    B, T, H, D = out.shape
    C = x.shape[1]
    x = x.view(-1, B, H, C, D).permute(1, 0, 3, 2, 4)  # (B, n, C, H, D)
    if x.shape[1] * C == T:
        out.unflatten(1, (-1, C)).copy_(x)
    else:
        out.copy_(x.flatten(1, 2)[:, :T])


def segments(q):
    """(first token, tokens, chunks, chunk length) of each segment; a segment is a whole number of chunks."""
    B, T, H, _ = q.shape
    C = chunk_length(T)
    step = CHUNK * max(1, at_once(SEGMENT, q) // (CHUNK * B * H))
    return [(t, min(step, T - t), -(-min(step, T - t) // C), C) for t in range(0, T, step)]


def chunk_length(T):
    return min(CHUNK, 1 << (T - 1).bit_length())


def operations(T, H, K, V, M):
    """(nominal, executed) of a sequence of T: the recurrence, and the matrix products that `chunk_fwd` runs, a whole
    last chunk included, where gates are mild enough to be factorised. Strong ones, taken by halves, run fewer."""
    C = chunk_length(T)
    return 4 * M * (K + V) * H * T, H * -(-T // C) * (4 * C * M * (K + V) + 2 * C * C * (K + V + 3 * M))


def chunk_fwd(q, k, v, s, g, hk, hv, scale, gate_min):
    """-> o, the final states, and for the backward pass the logits without their own token, and the states at the
    chunk borders, keys and values side by side (chunks + 1, B * H, M, K + V)."""
    (B, _, H, K), V, M = q.shape, v.shape[-1], s.shape[-1]
    acc = compute_dtype(q.dtype)
    low = product_type(v.dtype, acc)
    o, z = v.new_empty(v.shape), s.new_empty(s.shape, dtype=acc)
    borders = z.new_empty(borders_shape(q, v, s))
    borders[0].zero_()
    if hk is not None:
        borders[0, ..., :K].copy_(hk.mT.flatten(0, 1))
        borders[0, ..., K:].copy_(hv.flatten(0, 1))
    for t, size, n, C in segments(q):
        here = slice(t, t + size)
        qc = load(n, C, acc, q[:, here]).mul_(scale)
        kv = load(n, C, acc, k[:, here], v[:, here])
        sc, gc = load(n, C, acc, s[:, here]), load(n, C, acc, g[:, here])
        decay = Decay(gc if gate_min is None else gc.clamp_(min=gate_min), sc)
        S = walk(borders[t // C : t // C + n + 1], decay, kv)
        P, own = causal_scores(qc, kv[..., :K], acc)
        zc = decay.gather(P, torch.bmm(qc, S[..., :K].mT))  # a softmax turns errors of logits into relative ones
        store(z[:, here], zc)
        p = torch.softmax(zc.addcmul_(own, sc), -1)
        oc = product(decay.scores(p, low), kv[..., K:], low).to(acc)
        store(o[:, here], add_product(oc, p.mul_(decay.head), S[..., K:], low))
    last = borders[-1].view(B, H, M, K + V)
    return o, *(x.clone(memory_format=torch.contiguous_format) for x in (last[..., :K].mT, last[..., K:])), z, borders


def borders_shape(q, v, s):
    (B, T, H, K), C = q.shape, chunk_length(q.shape[1])
    return -(-T // C) + 1, B * H, s.shape[-1], K + v.shape[-1]


def walk(S, decay, kv):
    """From the state S[0] the others of S (n + 1, BH, M, K + V), at the borders of n chunks. -> S[:n] (N, M, K + V)"""
    U = torch.bmm((decay.s * decay.tail).mT, kv).view(-1, *S.shape[1:])
    total = decay.head[:, -1].view(len(U), -1, S.shape[2], 1)
    for c in range(len(U)):
        torch.addcmul(U[c], total[c], S[c], out=S[c + 1])
    return S[:-1].flatten(0, 1)


def chunk_bwd(do, dhk, dhv, q, k, v, s, g, z, borders, scale, gate_min):
    """-> dq, dk, dv, ds, dg, and the gradients of the initial states."""
    (B, _, H, K), V, M = q.shape, v.shape[-1], s.shape[-1]
    acc = z.dtype
    low = product_type(v.dtype, acc)
    grads = [x.new_empty(x.shape) for x in (q, k, v, s, g)]
    dS = borders.new_zeros(B * H, M, K + V)  # the gradient of the state at the end of the segment
    if dhk is not None:
        dS[..., :K].copy_(dhk.mT.flatten(0, 1))
    if dhv is not None:
        dS[..., K:].copy_(dhv.flatten(0, 1))
    for t, size, n, C in reversed(segments(q)):
        here = slice(t, t + size)
        q_, k_, v_, s_, g_, z_, do_ = (x[:, here] for x in (q, k, v, s, g, z, do))
        kv, dc = load(n, C, low, k_, v_), load(n, C, low, do_)
        qc, sc, gc, zc = (load(n, C, acc, x) for x in (q_, s_, g_, z_))
        qc.mul_(scale)
        bounded = gc if gate_min is None else gc.clamp(min=gate_min)
        *parts, dS = segment_bwd(qc, kv, sc, bounded, zc, dc, borders[t // C : t // C + n], dS)
        if gate_min is not None:  # no gradient below
            parts[4].masked_fill_(gc < gate_min, 0.0)
        parts[0].mul_(scale)
        for grad, part in zip(grads, parts):
            store(grad[:, here], part)
    dS = dS.view(B, H, M, K + V)
    return *grads, *(x.clone(memory_format=torch.contiguous_format) for x in (dS[..., :K].mT, dS[..., K:]))


def segment_bwd(q, kv, s, g, z, do, S, last):
    """One segment of n chunks; every block is (N, C, its width), q scaled. S: the states at the chunks' starts, `last`:
    the gradient of the state at the segment's end. -> the gradients of scaled q, k, v, s, g, and of the first state."""
    K, n, acc, low = q.shape[-1], len(S), z.dtype, kv.dtype
    k, v = kv[..., :K], kv[..., K:]
    decay = Decay(g, s)
    S = S.flatten(0, 1)  # (N, M, K + V)
    S_low = S.to(low)
    # second pass: o = A v + (p * head) S, then the softmax
    P, own = causal_scores(q, k.to(acc), acc)  # as precise as z: gates see their difference
    p = torch.softmax(torch.addcmul(z, own, s), -1)
    dA, dA_own = causal_scores(do, v, acc)
    dA = dA.to(acc)
    dp = decay.gather(dA, torch.bmm(do, S_low[..., K:].mT).to(acc))
    x = dp * p  # what the gates see: every sum without its own token
    dy = torch._softmax_backward_data(dp.addcmul_(dA_own, s), p, -1, p.dtype)
    x.addcmul_(z, dy)
    # the gradient of the state, from the last chunk to the first
    U, dS = torch.empty_like(S), last.new_empty(n + 1, *last.shape)
    U[..., :K] = product((dy * decay.head).mT, q, low)
    U[..., K:] = product((p * decay.head).mT, do, low)
    dS[n] = last
    U, total = U.view(n, *last.shape), decay.head[:, -1].view(n, -1, s.shape[-1], 1)
    for c in reversed(range(n)):
        torch.addcmul(U[c], total[c], dS[c + 1], out=dS[c])
    end = dS[1:].flatten(0, 1)  # (N, M, K + V), at the end of each chunk
    # keys, values, queries: first pass and state together
    end_low = end.to(low)
    dkv = product(s * decay.tail, end_low, low).to(acc)
    dP = decay.scores(dy, low)
    dk = add_product(dkv[..., :K], dP.mT, q, low)
    dv = add_product(dkv[..., K:], decay.scores(p, low).mT, do, low)
    dq = add_product(product(dy * decay.head, S_low[..., :K], low).to(acc), dP, k, low)
    # writes and gates
    ds = decay.scatter(dA, p, P, dy, low)
    x.addcmul_(s, ds, value=-1)
    carried = torch.bmm(kv, end_low.mT).to(acc).mul_(decay.tail)
    dg = gate_gradient(x, carried * s, torch.mul(S, end, out=U.flatten(0, 1)).sum(-1).mul_(decay.head[:, -1]))
    ds.add_(carried).addcmul_(own, dy).addcmul_(dA_own, p)
    return dq, dk, dv, ds, dg, dS[0]


def gate_gradient(x, carried, through):
    """dg_t = sum of x from t to the chunk's end + sum of `carried` before t + what passes `through` the whole chunk."""
    C = x.shape[1]
    from_here, before = (m.expand(len(x), C, C) for m in (lower(C, x).mT, lower(C, x, -1)))
    return torch.bmm(from_here, x).baddbmm_(before, carried).add_(through.unsqueeze(1))


# ----------------------------------------------------------------------------- Triton
#
# Seven launches, each parallel over chunks or over columns of the states:
#
#     scan     hk and hv at the start of each chunk, and at the end
#     read     from them and one chunk: logits, softmax, output. The forward ends here, and keeps the logits
#     scan     the same states, in fp32
#     logit    the softmax again, the gradient dy of its logits, and x, what the gates see of both
#     scan     REVERSE: the gradients of the states at the end of each chunk
#     write    ds and dg of one chunk
#     input    dq, dk and dv of one chunk
#
# The states and their gradients: (B, H, NT, K + V, M). Decays inside a chunk follow the tree of `Decay`, in a loop of
# its own over the levels: unrolled, all of them want their registers at once. Bounded gates are FACTORISED about the
# middle of the chunk: one product instead of a tree of them. Gates are loaded in log2 units. A product and its
# transpose are two products, because some versions of Triton transpose an accumulator wrongly.


@jit
def load_tile(p_x, o_a, stride_a, m_a, o_b, stride_b, m_b):
    """[len(o_a), len(o_b)], zero where masked."""
    o_x = o_a[:, None] * stride_a + o_b[None, :] * stride_b
    return tl.load(p_x + o_x, mask=m_a[:, None] & m_b[None, :], other=0.0)


@jit
def store_tile(p_x, b_x, o_a, stride_a, m_a, o_b, stride_b, m_b):
    o_x = o_a[:, None] * stride_a + o_b[None, :] * stride_b
    tl.store(p_x + o_x, b_x.to(p_x.dtype.element_ty), mask=m_a[:, None] & m_b[None, :])


@jit
def masked_softmax(b_y, m_m):
    b_y = tl.where(m_m[None, :], b_y, float("-inf"))
    b_e = tl.exp(b_y - tl.max(b_y, 1)[:, None])
    return b_e / tl.sum(b_e, 1)[:, None]


@jit
def diagonal(b_A, C: tl.constexpr):
    o_c = tl.arange(0, C)
    return tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_A, 0.0), 1)[:, None]  # [C, 1]


@jit
def load_log_gates(p_g, o_t, stride, m_t, o_m, m_m, gate_min):
    """[C, BM], 0 where masked, in log2 units."""
    return tl.maximum(load_tile(p_g, o_t, stride, m_t, o_m, 1, m_m).to(tl.float32), gate_min) * LOG2E


@jit
def around_middle(b_g, C: tl.constexpr):
    """The gates from the chunk's start through each token, without and with those of its first half taken off."""
    b_b = tl.cumsum(b_g, 0)
    return b_b, b_b - pick_row(b_b, C // 2 - 1, C)[None, :]


@jit
def gather(b_P, b_s, b_g, C: tl.constexpr, BM: tl.constexpr, DOT: tl.constexpr, FACTORISED: tl.constexpr):
    """sum_{j<i} P_ij e^(b_i - b_j) s_j [C, BM]; and the gates from the chunk's start through each token."""
    if FACTORISED:
        o_c = tl.arange(0, C)
        b_r, b_e = around_middle(b_g, C)
        b_Pl = tl.where(o_c[:, None] > o_c[None, :], b_P, 0.0)
        b_out = tl.exp2(b_e) * dot(b_Pl, b_s * tl.exp2(-b_e), DOT)
    else:
        b_out, b_r, b_l = tl.zeros([C, BM], tl.float32), b_g, tl.zeros([C, BM], tl.float32)
        h = 1
        while h < C:
            b_er, b_el, m_same = tree_level(b_r, b_l, h, C)
            b_Ph = operand(tl.where(m_same, b_P, 0.0), DOT)
            b_out += b_er * dot(b_Ph, b_s * b_el, DOT)
            b_r, b_l = double_sums(b_r, b_l, h, C, BM)
            h *= 2
    return b_out, b_r


@jit
def outer(b_i, b_j, DOT: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The products of the rows of two matrices, those of the first down, or with TRANSPOSED across."""
    if TRANSPOSED:
        return dot(b_j, tl.trans(operand(b_i, DOT)), DOT)
    return dot(b_i, tl.trans(operand(b_j, DOT)), DOT)


@jit
def scores(
    b_x, b_s, b_g, C: tl.constexpr, BM: tl.constexpr, DOT: tl.constexpr, FACTORISED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """A_ij = sum_m x_im s_jm e^(b_i - b_j) for j <= i, else 0 [C, C], or its transpose."""
    o_c = tl.arange(0, C)
    o_i, o_j = o_c[:, None], o_c[None, :]
    if FACTORISED:
        _, b_e = around_middle(b_g, C)
        b_A = outer(b_x * tl.exp2(b_e), b_s * tl.exp2(-b_e), DOT, TRANSPOSED)
        b_A = tl.where(o_i <= o_j if TRANSPOSED else o_i >= o_j, b_A, 0.0)
    else:
        b_A = tl.where(o_i == o_j, tl.sum(b_x * b_s, 1)[:, None], 0.0)
        b_r, b_l = b_g, tl.zeros([C, BM], tl.float32)
        h = 1
        while h < C:
            b_er, b_el, m_same = tree_level(b_r, b_l, h, C)
            b_A += tl.where(m_same, outer(b_x * b_er, b_s * b_el, DOT, TRANSPOSED), 0.0)
            b_r, b_l = double_sums(b_r, b_l, h, C, BM)
            h *= 2
    return b_A


@jit
def scatter(b_PT, b_x, b_g, C: tl.constexpr, BM: tl.constexpr, DOT: tl.constexpr, FACTORISED: tl.constexpr):
    """sum_{i>j} P_ij e^(b_i - b_j) x_i [C, BM], P given transposed; and the gates from after each token to the chunk's
    end."""
    if FACTORISED:
        o_c = tl.arange(0, C)
        b_b, b_e = around_middle(b_g, C)
        b_PT = tl.where(o_c[:, None] < o_c[None, :], b_PT, 0.0)
        b_out = tl.exp2(-b_e) * dot(b_PT, b_x * tl.exp2(b_e), DOT)
        b_l = tl.sum(b_g, 0)[None, :] - b_b
    else:
        b_out, b_r, b_l = tl.zeros([C, BM], tl.float32), b_g, tl.zeros([C, BM], tl.float32)
        h = 1
        while h < C:
            b_er, b_el, m_same = tree_level(b_r, b_l, h, C)
            b_out += b_el * dot(tl.where(m_same, b_PT, 0.0), b_x * b_er, DOT)
            b_r, b_l = double_sums(b_r, b_l, h, C, BM)
            h *= 2
    return b_out, b_l


@jit
def scan_side(
    p_x, p_w, p_total, p_h, p_first, p_last, T, L, i_g, i_d, stride_x, stride_w, o_d, m_d, state_d, state_m,
    M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, C: tl.constexpr, stride_h: tl.constexpr,
    DOT: tl.constexpr, FIRST: tl.constexpr, REVERSE: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """Columns o_d of x: h <- h * (decay of chunk c) + x_c^T w_c for the up to L chunks c of group i_g, from the last
    with REVERSE. The h before chunk c goes to p_h if FINAL, the one after the group to p_last. Without FINAL p_h takes
    the sums of the group's gates. w_c is decayed towards where h goes."""
    o_m, o_c = tl.arange(0, BM), tl.arange(0, C)
    m_m = o_m < M
    b_h = tl.zeros([BD, BM], tl.float32)
    if FIRST:
        b_h += load_tile(p_first, o_d, state_d, m_d, o_m, state_m, m_m)
    n, b_sum = tl.cdiv(T, C), tl.zeros([BM], tl.float32)
    for i in range(i_g * L, tl.minimum(n, (i_g + 1) * L)):
        c = n - 1 - i if REVERSE else i
        if FINAL:
            store_tile(p_h + c.to(tl.int64) * stride_h, b_h, o_d, M, m_d, o_m, 1, m_m)
        o_t = c * C + o_c
        m_t = o_t < T
        b_xt = load_tile(p_x, o_d, 1, m_d, o_t, stride_x, m_t)  # [BD, C]
        b_w = load_tile(p_w, o_t, stride_w, m_t, o_m, 1, m_m)  # [C, BM]
        b_g = tl.load(p_total + c * M + o_m, mask=m_m, other=0.0)
        b_h *= tl.exp2(b_g)[None, :]
        b_sum += b_g
        b_h += dot(b_xt, b_w, DOT)
    if not FINAL:
        tl.store(p_h + o_m, b_sum, mask=m_m & (i_d == 0))
    store_tile(p_last, b_h, o_d, state_d, m_d, o_m, state_m, m_m)


@jit
def gsa_scan_kernel(
    p_xk,  # (B, T, H, K) k, or q in REVERSE
    p_xv,  # (B, T, H, V) v, or do
    p_wk,  # (B, T, H, M) s, or dy, with its decay
    p_wv,  # (B, T, H, M) s, or p, with its decay
    p_total,  # (B, H, NT, M) sums of gates
    p_h,  # (B, H, NT, K + V, M)
    p_fk, p_fv,  # (B, H, G, K, M), (B, H, G, M, V) where each group starts, if FIRST_K, FIRST_V
    p_lk, p_lv,  # (B, H, G, K, M), (B, H, G, M, V) what is left at the end of each
    T, H, L,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
    FIRST_K: tl.constexpr, FIRST_V: tl.constexpr, REVERSE: tl.constexpr, FINAL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One tile of BD columns of keys or of values walks over the up to L chunks of a group. FINAL: p_h takes states,
    otherwise the sums of the groups' gates (B, H, G, M)."""
    i_d, i = split(tl.program_id(0), tl.cdiv(K, BD) + tl.cdiv(V, BD))
    i_g, i_bh = split(i, tl.cdiv(tl.cdiv(T, C), L))
    i, i_bh = i.to(tl.int64), i_bh.to(tl.int64)
    i_row = (i_bh // H) * T * H + i_bh % H
    p_wk, p_wv, p_total = p_wk + i_row * M, p_wv + i_row * M, p_total + i_bh * tl.cdiv(T, C) * M
    p_h += i_bh * tl.cdiv(T, C) * (K + V) * M if FINAL else i * M
    o_d = i_d * BD + tl.arange(0, BD)
    if i_d < tl.cdiv(K, BD):
        scan_side(p_xk + i_row * K, p_wk, p_total, p_h, p_fk + i * K * M, p_lk + i * K * M, T, L, i_g, i_d,
                  H * K, H * M, o_d, o_d < K, M, 1, M, BD, BM, C, (K + V) * M, DOT, FIRST_K, REVERSE,
                  FINAL)  # fmt: skip
    else:
        o_d -= tl.cdiv(K, BD) * BD
        scan_side(p_xv + i_row * V, p_wv, p_total, p_h + K * M, p_fv + i * M * V, p_lv + i * M * V, T, L, i_g, i_d,
                  H * V, H * M, o_d, o_d < V, 1, V, M, BD, BM, C, (K + V) * M, DOT, FIRST_V, REVERSE,
                  FINAL)  # fmt: skip


@jit
def gsa_read_kernel(
    p_q, p_k,  # (B, T, H, K)
    p_v,  # (B, T, H, V)
    p_s, p_g,  # (B, T, H, M)
    p_h,  # (B, H, NT, K + V, M) states at the start of each chunk
    p_o,  # (B, T, H, V)
    p_z,  # (B, T, H, M) logits without their own token
    scale, T, H, gate_min,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
    FACTORISED: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """z = scale * (head * (q hk) + gather(q k^T)), p = softmax(z + own * s), o = scores(p) v + (p * head) hv."""
    i_t, i_bh = split(tl.program_id(0), tl.cdiv(T, C))
    i_bh = i_bh.to(tl.int64)
    i_row = (i_bh // H) * T * H + i_bh % H
    o_t, o_m = i_t * C + tl.arange(0, C), tl.arange(0, BM)
    m_t, m_m = o_t < T, o_m < M
    p_h += (i_bh * tl.cdiv(T, C) + i_t) * (K + V) * M
    b_s = load_tile(p_s + i_row * M, o_t, H * M, m_t, o_m, 1, m_m).to(tl.float32)  # [C, BM]
    b_g = load_log_gates(p_g + i_row * M, o_t, H * M, m_t, o_m, m_m, gate_min)
    b_P, b_qh = tl.zeros([C, C], tl.float32), tl.zeros([C, BM], tl.float32)
    for i in range(0, tl.cdiv(K, BK)):
        o_k = i * BK + tl.arange(0, BK)
        m_k = o_k < K
        b_q = load_tile(p_q + i_row * K, o_t, H * K, m_t, o_k, 1, m_k)  # [C, BK]
        b_kt = load_tile(p_k + i_row * K, o_k, 1, m_k, o_t, H * K, m_t)  # [BK, C]
        b_h = load_tile(p_h, o_k, M, m_k, o_m, 1, m_m)  # [BK, BM]
        b_P += dot(b_q, b_kt, DOT)
        b_qh += dot(b_q, b_h, DOT)
    b_z, b_r = gather(b_P, b_s, b_g, C, BM, DOT, FACTORISED)
    b_head = tl.exp2(b_r)
    b_z = scale * (b_z + b_head * b_qh)
    store_tile(p_z + i_row * M, b_z, o_t, H * M, m_t, o_m, 1, m_m)
    b_p = masked_softmax(b_z + scale * diagonal(b_P, C) * b_s, m_m)
    b_A = operand(scores(b_p, b_s, b_g, C, BM, DOT, FACTORISED, False), DOT)
    b_p = operand(b_p * b_head, DOT)
    for i in range(0, tl.cdiv(V, BV)):
        o_v = i * BV + tl.arange(0, BV)
        m_v = o_v < V
        b_v = load_tile(p_v + i_row * V, o_t, H * V, m_t, o_v, 1, m_v)  # [C, BV]
        b_h = load_tile(p_h + K * M, o_m, 1, m_m, o_v, M, m_v)  # [BM, BV]
        b_o = dot(b_A, b_v, DOT)
        b_o += dot(b_p, b_h, DOT)
        store_tile(p_o + i_row * V, b_o, o_t, H * V, m_t, o_v, 1, m_v)


@jit
def gsa_logit_kernel(
    p_q, p_k,  # (B, T, H, K)
    p_v,  # (B, T, H, V)
    p_s, p_g, p_z,  # (B, T, H, M)
    p_do,  # (B, T, H, V)
    p_h,  # (B, H, NT, K + V, M)
    p_p,  # (B, T, H, M) -> softmax
    p_dy,  # (B, T, H, M) -> gradient of its logits
    p_x,  # (B, T, H, M) -> z * dy + p * dp, both without their own token
    p_wdy, p_wp,  # (B, T, H, M) -> scale * dy and p with the decay from the chunk's start, for the scan
    scale, T, H, gate_min,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
    FACTORISED: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dp = head * (do hv^T) + gather(do v^T), dy = p * (dp - sum p dp)."""
    i_t, i_bh = split(tl.program_id(0), tl.cdiv(T, C))
    i_bh = i_bh.to(tl.int64)
    i_row = (i_bh // H) * T * H + i_bh % H
    o_t, o_m = i_t * C + tl.arange(0, C), tl.arange(0, BM)
    m_t, m_m = o_t < T, o_m < M
    p_h += (i_bh * tl.cdiv(T, C) + i_t) * (K + V) * M + K * M
    b_own = tl.zeros([C], tl.float32)  # what a token's logits get of its own key
    for i in range(0, tl.cdiv(K, BK)):
        o_k = i * BK + tl.arange(0, BK)
        b_q = load_tile(p_q + i_row * K, o_t, H * K, m_t, o_k, 1, o_k < K).to(tl.float32)
        b_own += tl.sum(b_q * load_tile(p_k + i_row * K, o_t, H * K, m_t, o_k, 1, o_k < K).to(tl.float32), 1)
    b_dA, b_dh = tl.zeros([C, C], tl.float32), tl.zeros([C, BM], tl.float32)
    for i in range(0, tl.cdiv(V, BV)):
        o_v = i * BV + tl.arange(0, BV)
        m_v = o_v < V
        b_do = load_tile(p_do + i_row * V, o_t, H * V, m_t, o_v, 1, m_v)  # [C, BV]
        b_vt = load_tile(p_v + i_row * V, o_v, 1, m_v, o_t, H * V, m_t)  # [BV, C]
        b_h = load_tile(p_h, o_v, M, m_v, o_m, 1, m_m)  # [BV, BM]
        b_dA += dot(b_do, b_vt, DOT)
        b_dh += dot(b_do, b_h, DOT)
    b_dA_own = diagonal(b_dA, C)
    b_s = load_tile(p_s + i_row * M, o_t, H * M, m_t, o_m, 1, m_m).to(tl.float32)  # [C, BM]
    b_g = load_log_gates(p_g + i_row * M, o_t, H * M, m_t, o_m, m_m, gate_min)
    b_dp, b_r = gather(b_dA, b_s, b_g, C, BM, DOT, FACTORISED)
    b_head = tl.exp2(b_r)
    b_dp += b_head * b_dh
    b_z = load_tile(p_z + i_row * M, o_t, H * M, m_t, o_m, 1, m_m)
    b_p = masked_softmax(b_z + scale * b_own[:, None] * b_s, m_m)
    b_x = b_p * b_dp
    b_dp += b_dA_own * b_s
    b_dy = b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None])
    store_tile(p_p + i_row * M, b_p, o_t, H * M, m_t, o_m, 1, m_m)
    store_tile(p_dy + i_row * M, b_dy, o_t, H * M, m_t, o_m, 1, m_m)
    store_tile(p_x + i_row * M, b_x + b_z * b_dy, o_t, H * M, m_t, o_m, 1, m_m)
    store_tile(p_wdy + i_row * M, scale * b_dy * b_head, o_t, H * M, m_t, o_m, 1, m_m)
    store_tile(p_wp + i_row * M, b_p * b_head, o_t, H * M, m_t, o_m, 1, m_m)


@jit
def gsa_write_kernel(
    p_q, p_k,  # (B, T, H, K)
    p_v, p_do,  # (B, T, H, V)
    p_s, p_g, p_p, p_dy, p_x,  # (B, T, H, M)
    p_h,  # (B, H, NT, K + V, M) states at the start of each chunk
    p_dh,  # (B, H, NT, K + V, M) gradients of the states at the end of each chunk
    p_ds, p_dg,  # (B, T, H, M)
    scale, T, H, gate_min,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
    FACTORISED: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """ds = scatter(do v^T, p, q k^T, dy) + tail * (k dhk + v dhv) + the own token's; dg as in `gate_gradient`. BM slots
    of them."""
    i_m, i = split(tl.program_id(0), tl.cdiv(M, BM))
    i_t, i_bh = split(i, tl.cdiv(T, C))
    i_bh = i_bh.to(tl.int64)
    i_row = (i_bh // H) * T * H + i_bh % H
    p_q, p_k, p_v, p_do = p_q + i_row * K, p_k + i_row * K, p_v + i_row * V, p_do + i_row * V
    p_s, p_g, p_p, p_dy, p_x = p_s + i_row * M, p_g + i_row * M, p_p + i_row * M, p_dy + i_row * M, p_x + i_row * M
    o_t, o_m = i_t * C + tl.arange(0, C), i_m * BM + tl.arange(0, BM)
    m_t, m_m = o_t < T, o_m < M
    p_h += (i_bh * tl.cdiv(T, C) + i_t) * (K + V) * M
    p_dh += (i_bh * tl.cdiv(T, C) + i_t) * (K + V) * M
    b_PT, b_carried, b_through = tl.zeros([C, C], tl.float32), tl.zeros([C, BM], tl.float32), tl.zeros([BM], tl.float32)
    for i in range(0, tl.cdiv(K, BK)):
        o_k = i * BK + tl.arange(0, BK)
        m_k = o_k < K
        b_k = load_tile(p_k, o_t, H * K, m_t, o_k, 1, m_k)  # [C, BK]
        b_PT += dot(b_k, load_tile(p_q, o_k, 1, m_k, o_t, H * K, m_t), DOT)
        b_dh = load_tile(p_dh, o_k, M, m_k, o_m, 1, m_m)  # [BK, BM]
        b_through += tl.sum(b_dh * load_tile(p_h, o_k, M, m_k, o_m, 1, m_m), 0)
        b_carried += dot(b_k, b_dh, DOT)
    b_g = load_log_gates(p_g, o_t, H * M, m_t, o_m, m_m, gate_min)  # [C, BM]
    b_PT *= scale
    b_dy = load_tile(p_dy, o_t, H * M, m_t, o_m, 1, m_m)
    b_ds, b_l = scatter(b_PT, b_dy, b_g, C, BM, DOT, FACTORISED)
    b_own = diagonal(b_PT, C) * b_dy
    b_PT = tl.zeros([C, C], tl.float32)  # of do v^T from here on
    for i in range(0, tl.cdiv(V, BV)):
        o_v = i * BV + tl.arange(0, BV)
        m_v = o_v < V
        b_v = load_tile(p_v, o_t, H * V, m_t, o_v, 1, m_v)  # [C, BV]
        b_PT += dot(b_v, load_tile(p_do, o_v, 1, m_v, o_t, H * V, m_t), DOT)
        b_dh = load_tile(p_dh + K * M, o_v, M, m_v, o_m, 1, m_m)  # [BV, BM]
        b_through += tl.sum(b_dh * load_tile(p_h + K * M, o_v, M, m_v, o_m, 1, m_m), 0)
        b_carried += dot(b_v, b_dh, DOT)
    b_p = load_tile(p_p, o_t, H * M, m_t, o_m, 1, m_m)
    b_more, b_l = scatter(b_PT, b_p, b_g, C, BM, DOT, FACTORISED)
    b_ds += b_more
    b_own += diagonal(b_PT, C) * b_p
    b_s = load_tile(p_s, o_t, H * M, m_t, o_m, 1, m_m).to(tl.float32)
    b_carried *= tl.exp2(b_l)
    b_y = load_tile(p_x, o_t, H * M, m_t, o_m, 1, m_m) - b_s * b_ds
    b_before = b_s * b_carried
    b_dg = tl.cumsum(b_y, 0, reverse=True) + tl.cumsum(b_before, 0) - b_before
    b_dg += (tl.exp2(tl.sum(b_g, 0)) * b_through)[None, :]
    m_open = load_tile(p_g, o_t, H * M, m_t, o_m, 1, m_m).to(tl.float32) >= gate_min
    b_dg = tl.where(m_open, b_dg, 0.0)
    store_tile(p_dg + i_row * M, b_dg, o_t, H * M, m_t, o_m, 1, m_m)
    b_ds += b_carried + b_own
    store_tile(p_ds + i_row * M, b_ds, o_t, H * M, m_t, o_m, 1, m_m)


@jit
def gsa_input_kernel(
    p_q, p_k,  # (B, T, H, K)
    p_do,  # (B, T, H, V)
    p_s, p_g, p_p, p_dy,  # (B, T, H, M)
    p_h, p_dh,  # (B, H, NT, K + V, M) as above
    p_dq, p_dk,  # (B, T, H, K)
    p_dv,  # (B, T, H, V)
    scale, T, H, gate_min,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
    FACTORISED: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """With dP = scores(dy) and A = scores(p): dq = scale * (dP k + (dy * head) hk^T), dk = scale * dP^T q + (s * tail)
    dhk^T, dv = A^T do + (s * tail) dhv^T."""
    i_t, i_bh = split(tl.program_id(0), tl.cdiv(T, C))
    i_bh = i_bh.to(tl.int64)
    i_row = (i_bh // H) * T * H + i_bh % H
    o_t, o_m = i_t * C + tl.arange(0, C), tl.arange(0, BM)
    m_t, m_m = o_t < T, o_m < M
    p_h += (i_bh * tl.cdiv(T, C) + i_t) * (K + V) * M
    p_dh += (i_bh * tl.cdiv(T, C) + i_t) * (K + V) * M
    b_s = load_tile(p_s + i_row * M, o_t, H * M, m_t, o_m, 1, m_m).to(tl.float32)  # [C, BM]
    b_g = load_log_gates(p_g + i_row * M, o_t, H * M, m_t, o_m, m_m, gate_min)
    m_next = (tl.arange(0, C) + 1 < C) & (o_t + 1 < T)
    b_next = load_log_gates(p_g + i_row * M, o_t + 1, H * M, m_next, o_m, m_m, gate_min)
    b_w = operand(b_s * tl.exp2(tl.cumsum(b_next, 0, reverse=True)), DOT)
    b_p = load_tile(p_p + i_row * M, o_t, H * M, m_t, o_m, 1, m_m)
    b_AT = operand(scores(b_p, b_s, b_g, C, BM, DOT, FACTORISED, True), DOT)
    for i in range(0, tl.cdiv(V, BV)):
        o_v = i * BV + tl.arange(0, BV)
        m_v = o_v < V
        b_dv = dot(b_AT, load_tile(p_do + i_row * V, o_t, H * V, m_t, o_v, 1, m_v), DOT)
        b_dh = load_tile(p_dh + K * M, o_m, 1, m_m, o_v, M, m_v)  # [BM, BV]
        b_dv += dot(b_w, b_dh, DOT)
        store_tile(p_dv + i_row * V, b_dv, o_t, H * V, m_t, o_v, 1, m_v)
    b_dy = load_tile(p_dy + i_row * M, o_t, H * M, m_t, o_m, 1, m_m)
    b_dP = operand(scores(b_dy, b_s, b_g, C, BM, DOT, FACTORISED, False), DOT)
    b_dPT = operand(scores(b_dy, b_s, b_g, C, BM, DOT, FACTORISED, True), DOT)
    b_dy = operand(b_dy * tl.exp2(tl.cumsum(b_g, 0)), DOT)
    for i in range(0, tl.cdiv(K, BK)):
        o_k = i * BK + tl.arange(0, BK)
        m_k = o_k < K
        b_k = load_tile(p_k + i_row * K, o_t, H * K, m_t, o_k, 1, m_k)  # [C, BK]
        b_dq = dot(b_dP, b_k, DOT)
        b_h = load_tile(p_h, o_m, 1, m_m, o_k, M, m_k)  # [BM, BK]
        b_dq += dot(b_dy, b_h, DOT)
        store_tile(p_dq + i_row * K, scale * b_dq, o_t, H * K, m_t, o_k, 1, m_k)
        b_q = load_tile(p_q + i_row * K, o_t, H * K, m_t, o_k, 1, m_k)
        b_dk = scale * dot(b_dPT, b_q, DOT)
        b_dh = load_tile(p_dh, o_m, 1, m_m, o_k, M, m_k)
        b_dk += dot(b_w, b_dh, DOT)
        store_tile(p_dk + i_row * K, b_dk, o_t, H * K, m_t, o_k, 1, m_k)


TILES = (64, 64, 8, 1), (64, 64, 4, 1), (32, 32, 8, 2), (32, 32, 4, 1)
WIDE, NARROW = (configurations("BK BV num_warps num_stages", TILES[i], *TILES[:i], *TILES[i + 1 :]) for i in (0, 2))
BOTH = "K / BK + V / BV"
SCAN_CONFIGS = configurations("BD num_warps num_stages", (64, 4, 2), (32, 4, 2), (32, 2, 3), (64, 8, 2))
KERNELS = {
    "scan": Kernel(gsa_scan_kernel, SCAN_CONFIGS, serial="T / 32"),  # BD, BK, BV: tiles of columns of the states
    "read": Kernel(gsa_read_kernel, WIDE, serial=BOTH),
    "logit": Kernel(gsa_logit_kernel, NARROW, serial=BOTH),
    "write": Kernel(gsa_write_kernel, NARROW, serial=BOTH),
    "input": Kernel(gsa_input_kernel, WIDE, fp32=dict(BK=16, BV=16, num_warps=8, num_stages=1), serial=BOTH),
}
MAX_SLOTS = 256


def fp32_sizes(_):
    """Of 64 slots, for the report."""
    return dict(C=32)


def chunk(M, gate_min, kind):
    """Tokens a chunk of the kernels, for products of that kind: as many as slots and decays leave registers for."""
    C = min(CHUNK, max(16, 4096 // power(M)))
    return C if kind == "bf16" and is_factorised(gate_min, C) else max(16, C // 2)


def scan_launch(xk, xv, wk, wv, total, dtype, first_k, first_v, sizes, reverse=False):
    """States (B * H, NT, K + V, M) on arrival at each chunk, and the two last ones. total: the gates' sums. Groups of
    chunks are walked over twice where heads are few, as in gla."""
    (B, T, H, K), V, M, NT = xk.shape, xv.shape[-1], wk.shape[-1], triton.cdiv(xk.shape[1], sizes["C"])
    h = xk.new_empty(B * H, NT, K + V, M, dtype=dtype)
    L = group_length(NT, 2 * B * H * triton.cdiv(max(K, V), 64), xk.device)
    G = triton.cdiv(NT, L)

    def walk(first_k, first_v, out, final):
        last_k, last_v = (xk.new_empty(B, H, G, *size, dtype=torch.float32) for size in ((K, M), (M, V)))
        firsts = [y if x is None else x.contiguous() for x, y in zip((first_k, first_v), (last_k, last_v))]
        given = dict(FIRST_K=first_k is not None, FIRST_V=first_v is not None, REVERSE=reverse, FINAL=final)

        def programs(meta):
            return ((triton.cdiv(K, meta["BD"]) + triton.cdiv(V, meta["BD"])) * B * H * G,)

        args = xk, xv, wk, wv, total, out, *firsts, last_k, last_v, T, H, L
        KERNELS["scan"].launch(programs, *args, **sizes, **given)
        return last_k, last_v

    if G == 1:
        return h, *(x[:, :, 0] for x in walk(first_k, first_v, h, True))
    sums = total.new_empty(B, H, G, M)
    last_k, last_v = walk(None, None, sums, False)
    first_k = group_starts(last_k.mT, sums, None if first_k is None else first_k.contiguous().mT).mT
    first_v = group_starts(last_v, sums, None if first_v is None else first_v.contiguous())
    return h, *map(last_of, walk(first_k, first_v, h, True))


def alike(gate_min, q, k, v, s, g, *more):
    """Contiguous, those that meet in matrix products in one type; and the constants of every kernel."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in (q, k, v, *more)))
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype  # decayed gradients need its range
    q, k, v, *more = (x.to(dtype).contiguous() for x in (q, k, v, *more))
    K, V, M = q.shape[-1], v.shape[-1], s.shape[-1]
    sizes = dict(K=K, V=V, M=M, BM=power(M), C=chunk(M, gate_min, dot_type(dtype)), DOT=dot_type(dtype))
    return sizes, q, k, v, s.contiguous(), g.contiguous(), *more


def slots(C, BM):
    """Slots of a program of `write`, which keeps more tiles of them than the others."""
    return min(BM, 2048 // C)


def launch(name, h, gate_min, sizes, *args):
    """A program for each chunk, of which h (B * H, NT, K + V, M) has the states; of `write` for each tile of slots."""
    flags = sizes | dict(gate_min=floor(gate_min), FACTORISED=is_factorised(gate_min, sizes["C"]))
    if name == "write":
        flags["BM"] = slots(sizes["C"], sizes["BM"])
    tiles = triton.cdiv(sizes["M"], flags["BM"])
    KERNELS[name].launch(lambda meta: (h.shape[0] * h.shape[1] * tiles,), *args, **flags)


def gsa_fwd(q, k, v, s, g, hk, hv, scale, gate_min):
    B, T, H, _ = q.shape
    o, z = v.new_empty(v.shape), s.new_empty(s.shape, dtype=torch.float32)
    sizes, q, k, v, s, g = alike(gate_min, q, k, v, s, g)
    w, total = weigh_launch(s, g, 1.0, gate_min, False, sizes["C"], q.dtype)
    h, *last = scan_launch(k, v, w, w, total, q.dtype, hk, hv, sizes)
    launch("read", h, gate_min, sizes, q, k, v, s, g, h, o, z, scale, T, H)
    return o, *last, z, z.new_empty(0)


def gsa_bwd(do, dhk, dhv, q, k, v, s, g, hk, hv, z, scale, gate_min):
    B, T, H, _ = q.shape
    dq, dk, dv, ds, dg = (x.new_empty(x.shape) for x in (q, k, v, s, g))
    p, dy, x = (torch.empty_like(z) for _ in range(3))
    sizes, q, k, v, s, g, do = alike(gate_min, q, k, v, s, g, do)
    w, total = weigh_launch(s, g, 1.0, gate_min, False, sizes["C"], q.dtype)
    h, *_ = scan_launch(k, v, w, w, total, torch.float32, hk, hv, sizes)
    wdy, wp = torch.empty_like(w), torch.empty_like(w)
    launch("logit", h, gate_min, sizes, q, k, v, s, g, z, do, h, p, dy, x, wdy, wp, scale, T, H)
    dh, *first = scan_launch(q, do, wdy, wp, total, torch.float32, dhk, dhv, sizes, reverse=True)
    launch("write", h, gate_min, sizes, q, k, v, do, s, g, p, dy, x, h, dh, ds, dg, scale, T, H)
    launch("input", h, gate_min, sizes, q, k, do, s, g, p, dy, h, dh, dq, dk, dv, scale, T, H)
    return dq, dk, dv, ds, dg, *first


def aot_specs():
    """(name, kernel, signature, constants) of every kernel and configuration, for the report. Default first."""
    first = dict(FIRST_K=True, FIRST_V=True, FINAL=True)
    forms = [("gsa_scan", "scan", dict(first, REVERSE=False)), ("gsa_scan reverse", "scan", dict(first, REVERSE=True))]
    for name in ("read", "logit", "write", "input"):
        forms += [(f"gsa_{name}", name, dict(FACTORISED=False)), (f"gsa_{name} bounded", name, dict(FACTORISED=True))]
    low = {"p_q", "p_k", "p_v", "p_o", "p_do", "p_xk", "p_xv", "p_wk", "p_wv", "p_wdy", "p_wp", "p_dq", "p_dk", "p_dv"}
    specs = []
    for title, name, flags in forms:
        kernel = KERNELS[name].function
        for width in (64, 128):
            for i, config in enumerate(KERNELS[name].configs):
                C = chunk(64, -1.0 if flags.get("FACTORISED") else None, "bf16")
                BM = slots(C, 64) if name == "write" else 64
                constants = dict(K=width, V=width, M=64, BM=BM, C=C, DOT="bf16", **flags, **config)
                half = low | ({"p_h"} if title in ("gsa_scan", "gsa_read") else set())
                signature = {x: "*bf16" if x in half else "*fp32" for x in kernel.arg_names if x[:2] == "p_"}
                signature |= {"scale": "fp32", "gate_min": "fp32", "T": "i32", "H": "i32", "L": "i32"}
                specs.append((f"{title} {width} #{i}", kernel, signature, constants))
    return specs


# ----------------------------------------------------------------------------- operator


@operator(
    "gsa",
    "(Tensor q, Tensor k, Tensor v, Tensor s, Tensor g, Tensor? hk, Tensor? hv, float scale, float? gate_min,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def fwd_op(q, k, v, s, g, hk, hv, scale, gate_min, backend):
    run = gsa_fwd if backend == "triton" else chunk_fwd
    return run(q, k, v, s, g, hk, hv, scale, gate_min)


@fwd_op.register_fake
def _(q, k, v, s, g, hk, hv, scale, gate_min, backend):
    B, _, H, K, V, M = *q.shape, v.shape[-1], s.shape[-1]
    acc = compute_dtype(q.dtype)
    borders = (0,) if backend == "triton" else borders_shape(q, v, s)
    return (
        v.new_empty(v.shape),
        q.new_empty(B, H, K, M, dtype=acc),
        q.new_empty(B, H, M, V, dtype=acc),
        s.new_empty(s.shape, dtype=acc),
        q.new_empty(borders, dtype=acc),
    )


@operator(
    "gsa_backward",
    "(Tensor do, Tensor? dhk, Tensor? dhv, Tensor q, Tensor k, Tensor v, Tensor s, Tensor g, Tensor? hk,"
    " Tensor? hv, Tensor z, Tensor borders, float scale, float? gate_min, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def bwd_op(do, dhk, dhv, q, k, v, s, g, hk, hv, z, borders, scale, gate_min, backend):
    if backend == "triton":
        return gsa_bwd(do, dhk, dhv, q, k, v, s, g, hk, hv, z, scale, gate_min)
    return chunk_bwd(do, dhk, dhv, q, k, v, s, g, z, borders, scale, gate_min)


@bwd_op.register_fake
def _(do, dhk, dhv, q, k, v, s, g, hk, hv, z, borders, scale, gate_min, backend):
    B, _, H, K, V, M = *q.shape, v.shape[-1], s.shape[-1]
    grads = [x.new_empty(x.shape) for x in (q, k, v, s, g)]
    return *grads, z.new_empty(B, H, K, M), z.new_empty(B, H, M, V)


def save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.gate_min, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[3], output[4])
    ctx.set_materialize_grads(False)


def backward(ctx, do, dhk, dhv, *_):
    if do is None and dhk is None and dhv is None:
        return (None,) * 10
    *inputs, z, borders = ctx.saved_tensors
    do = torch.zeros_like(inputs[2]) if do is None else do
    *grads, dhk, dhv = bwd_op(do, dhk, dhv, *inputs, z, borders, ctx.scale, ctx.gate_min, ctx.backend)
    hk, hv = inputs[5:]
    return *grads, None if hk is None else dhk, None if hv is None else dhv, None, None, None


fwd_op.register_autograd(backward, setup_context=save)


# ----------------------------------------------------------------------------- public


def gsa(
    q, k, v, s, g, scale=None, initial_state=None, output_final_state=False, backend="auto", gate_min=None
):  # fmt: skip
    """Gated slot attention. q, k (B, T, H, K)   v (B, T, H, V)   s (B, T, H, M) what is written   g (B, T, H, M)
    log-gate <= 0   initial_state (hk (B, H, K, M), hv (B, H, M, V))   scale: K^-1/2 unless given
    backend: auto | triton | torch | recurrent   gate_min: g is clamped there, with no gradient below; from -1.25 up the
    Triton kernels then take chunks twice as long, in plain matrix products.

    -> o (B, T, H, V) in v's dtype, (hk, hv) in fp32 (fp64 for fp64 inputs), or (None, None) unless output_final_state.
    """
    hk, hv = initial_state if initial_state is not None else (None, None)
    check_inputs(q, k, v, s, g, gate_min, hk, hv, backend)
    q, k, v = in_autocast(q, k, v)  # gates and states keep their precision
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if in_steps(backend, q, initial_state, output_final_state):
        with leave_autocast(q):
            o, state = gsa_recurrent(q, k, v, s, g, scale, initial_state, gate_min)
    else:
        if hk is not None:
            hk, hv = hk.to(compute_dtype(q.dtype)), hv.to(compute_dtype(q.dtype))
        backend = choose("gsa", backend, q, too_many(s.shape[-1]))
        o, *state = fwd_op(q, k, v, s, g, hk, hv, scale, gate_min, backend)[:3]
    return o, tuple(state) if output_final_state else (None, None)


def check_inputs(q, k, v, s, g, gate_min, hk, hv, backend):
    check("gsa", q, k, v, backend, "auto", "triton", "torch", "recurrent")
    want = (*q.shape[:3], *s.shape[3:])
    for name, x in (("s", s), ("g", g)):
        if x.dim() != 4 or x.shape != want or not x.is_floating_point() or x.shape[3] < 1:
            raise ValueError(f"gsa: {name} must be floats {want} to match q and s, got {x.dtype} {tuple(x.shape)}")
    if gate_min is not None and gate_min > 0:
        raise ValueError(f"gsa: gate_min must be at most 0 or None, got {gate_min}")
    (B, _, H, K), V, M = q.shape, v.shape[3], s.shape[3]
    if (hk is None) != (hv is None):
        raise ValueError("gsa: initial_state must be a pair (hk, hv), got only one of them")
    for name, x, want in (("hk", hk, (B, H, K, M)), ("hv", hv, (B, H, M, V))):
        if x is not None and x.shape != want:
            raise ValueError(f"gsa: initial_state {name} must be {want}, got {tuple(x.shape)}")


def too_many(M):
    """What the Triton kernels do not take, or None."""
    return f"the Triton kernels take up to {MAX_SLOTS} slots" if M > MAX_SLOTS else None


def case(name, gate_min, q, k, v, slots=64, **_):
    """What is timed: mild gates g, and writes of 1 - e^g."""
    (B, T, H, K), V = q.shape, v.shape[3]

    def call(q, k, v, g, backend="auto"):
        return gsa(q, k, v, -torch.expm1(g), g, scale=1.0, backend=backend, gate_min=gate_min)[0]

    g = (F.logsigmoid(torch.randn(B, T, H, slots, device=q.device)) / 16).requires_grad_()
    executed = B * operations(T, H, K, V, slots)[1]
    return {name: Case(call, [q, k, v, g], functools.partial(call, backend="recurrent"), executed)}


CASES = {name: functools.partial(case, name, bound) for name, bound in (("gsa", None), ("gsa_bounded", -1.25))}
