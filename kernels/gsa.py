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

from . import interpreting, jit, tl, triton, warn_once

CHUNK = 64  # tokens a chunk, in every backend
SEGMENT = 8192  # token-heads that the chunked form works on at a time, so that its blocks stay in cache
FACTOR_MIN = -1.25  # gates at or above this, with at most e^FACTOR_SUM of decay over a chunk, may be factorised
FACTOR_SUM = -60.0


# ----------------------------------------------------------------------------- oracle


def gsa_recurrent(q, k, v, s, g, scale=None, initial_state=None):
    """One token at a time, in fp64 for fp64 inputs and fp32 otherwise; what every other form is tested against."""
    B, T, H, K, V, M = *q.shape, v.shape[-1], s.shape[-1]
    scale = K**-0.5 if scale is None else scale
    dtype, acc = v.dtype, accumulator(q)
    q, k, v, s, g = (x.to(acc) for x in (q, k, v, s, g))
    if initial_state is None:
        hk, hv = q.new_zeros(B, H, K, M), q.new_zeros(B, H, M, V)
    else:
        hk, hv = (x.to(acc) for x in initial_state)
    out = []
    for t in range(T):
        decay, write = g[:, t].exp(), s[:, t]  # (B, H, M)
        hk = hk * decay.unsqueeze(-2) + k[:, t].unsqueeze(-1) * write.unsqueeze(-2)
        hv = hv * decay.unsqueeze(-1) + write.unsqueeze(-1) * v[:, t].unsqueeze(-2)
        p = torch.softmax(scale * (q[:, t].unsqueeze(-1) * hk).sum(-2), -1)  # (B, H, M)
        out.append((p.unsqueeze(-1) * hv).sum(-2))
    return torch.stack(out, 1).to(dtype), (hk, hv)


def accumulator(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


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

    def scores(self, x):
        """A_ij = sum_m x_im s_jm e^(b_i - b_j) for j <= i, else 0. (N, C, C)"""
        N, C, M = x.shape
        if self.lifted is not None:
            return torch.bmm(x * self.head, self.lifted.mT).tril_()
        A = torch.diag_embed((x * self.s).sum(-1))
        for h, _, right, written in self.levels:
            block = below(A, h)
            block.copy_(torch.bmm(x.view(-1, 2, h, M)[:, 1] * right, written.mT).view(block.shape))
        return A

    def gather(self, P, base):
        """head_i * base_i + sum_{j<i} P_ij e^(b_i - b_j) s_j, in place of base. P (N, C, C) strictly lower."""
        if self.lifted is not None:
            return base.baddbmm_(P, self.lifted).mul_(self.head)
        base.mul_(self.head)
        for h, _, right, written in self.levels:
            base.view(-1, 2, h, base.shape[-1])[:, 1].addcmul_(right, torch.bmm(below(P, h).reshape(-1, h, h), written))
        return base

    def scatter(self, P, x, Q, y):
        """sum_{i>j} e^(b_i - b_j) (P_ij x_i + Q_ij y_i). P, Q (N, C, C) strictly lower, x, y (N, C, M)."""
        if self.lifted is not None:
            out = torch.bmm(P.mT, x * self.head)
            return out.baddbmm_(Q.mT, y * self.head).div_(self.head)
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


def causal_scores(q, k):
    """The strictly lower part of q k^T (N, C, C), and its diagonal (N, C, 1)."""
    P = torch.bmm(q, k.mT)
    diagonal = P.diagonal(dim1=1, dim2=2).clone().unsqueeze(-1)
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


def segments(B, T, H):
    """(first token, tokens, chunks, chunk length) of each segment; a segment is a whole number of chunks."""
    C = min(CHUNK, 1 << (T - 1).bit_length())
    step = segment_length(B, H)
    return [(t, min(step, T - t), -(-min(step, T - t) // C), C) for t in range(0, T, step)]


def segment_length(B, H):
    return CHUNK * max(1, SEGMENT // (CHUNK * B * H))


def chunk_fwd(q, k, v, s, g, hk, hv, scale):
    """-> o, the final states, and for the backward pass the logits without their own token, and states at borders."""
    B, T, H, K, V, M = *q.shape, v.shape[-1], s.shape[-1]
    acc = accumulator(q)
    o, z = v.new_empty(v.shape), s.new_empty(s.shape, dtype=acc)
    parts = segments(B, T, H)
    borders = z.new_empty(len(parts) + 1, B * H, M, K + V)
    borders[0].zero_()
    if hk is not None:
        borders[0, ..., :K].copy_(hk.mT.flatten(0, 1))
        borders[0, ..., K:].copy_(hv.flatten(0, 1))
    for i, (t, size, n, C) in enumerate(parts):
        here = slice(t, t + size)
        qc = load(n, C, acc, q[:, here]).mul_(scale)
        kv = load(n, C, acc, k[:, here], v[:, here])
        sc, gc = load(n, C, acc, s[:, here]), load(n, C, acc, g[:, here])
        decay = Decay(gc, sc)
        S = states(borders[i], decay, kv, n)
        borders[i + 1].copy_(S[n])
        S = S[:n].flatten(0, 1)  # (N, M, K + V)
        P, own = causal_scores(qc, kv[..., :K])
        zc = decay.gather(P, torch.bmm(qc, S[..., :K].mT))
        store(z[:, here], zc)
        p = torch.softmax(zc.addcmul_(own, sc), -1)
        oc = torch.bmm(decay.scores(p), kv[..., K:])
        store(o[:, here], oc.baddbmm_(p.mul_(decay.head), S[..., K:]))
    last = borders[-1].view(B, H, M, K + V)
    return o, last[..., :K].mT.contiguous(), last[..., K:].contiguous(), z, borders


def states(first, decay, kv, n):
    """The states at the n + 1 chunk borders of a segment, keys and values side by side: (n + 1, BH, M, K + V)."""
    S = first.new_empty(n + 1, *first.shape)
    S[0].copy_(first)
    U = torch.bmm((decay.s * decay.tail).mT, kv).view(n, *first.shape)
    total = decay.head[:, -1].view(n, -1, S.shape[2], 1)
    for c in range(n):
        torch.addcmul(U[c], total[c], S[c], out=S[c + 1])
    return S


def chunk_bwd(do, dhk, dhv, q, k, v, s, g, z, borders, scale):
    """-> dq, dk, dv, ds, dg, and the gradients of the initial states."""
    B, T, H, K, V, M = *q.shape, v.shape[-1], s.shape[-1]
    acc = z.dtype
    grads = [x.new_empty(x.shape) for x in (q, k, v, s, g)]
    dS = borders.new_zeros(B * H, M, K + V)  # the gradient of the state at the end of the segment
    if dhk is not None:
        dS[..., :K].copy_(dhk.mT.flatten(0, 1))
    if dhv is not None:
        dS[..., K:].copy_(dhv.flatten(0, 1))
    for i, (t, size, n, C) in reversed(list(enumerate(segments(B, T, H)))):
        here = slice(t, t + size)
        q_, k_, v_, s_, g_, z_, do_ = (x[:, here] for x in (q, k, v, s, g, z, do))
        qc, kv = load(n, C, acc, q_).mul_(scale), load(n, C, acc, k_, v_)
        sc, gc, zc, dc = (load(n, C, acc, x) for x in (s_, g_, z_, do_))
        *parts, dS = segment_bwd(qc, kv, sc, gc, zc, dc, borders[i], dS)
        parts[0].mul_(scale)
        for grad, part in zip(grads, parts):
            store(grad[:, here], part)
    dS = dS.view(B, H, M, K + V)
    return *grads, dS[..., :K].mT.contiguous(), dS[..., K:].contiguous()


def segment_bwd(q, kv, s, g, z, do, first, last):
    """One segment of n chunks; every block is (N, C, its width), q scaled. `first` is the state at its start, `last`
    the gradient of the state at its end. -> the gradients of scaled q, k, v, s, g, and of the first state."""
    K, n = q.shape[-1], len(q) // len(first)
    k, v = kv[..., :K], kv[..., K:]
    decay = Decay(g, s)
    S = states(first, decay, kv, n)[:n].flatten(0, 1)  # (N, M, K + V)
    # second pass: o = A v + (p * head) S, then the softmax
    P, own = causal_scores(q, k)
    p = torch.softmax(torch.addcmul(z, own, s), -1)
    dA, dA_own = causal_scores(do, v)
    dp = decay.gather(dA, torch.bmm(do, S[..., K:].mT))
    x = dp * p  # what the gates see: every sum without its own token
    dy = torch._softmax_backward_data(dp.addcmul_(dA_own, s), p, -1, p.dtype)
    x.addcmul_(z, dy)
    # the gradient of the state, from the last chunk to the first
    U, dS = torch.empty_like(S), first.new_empty(n + 1, *first.shape)
    U[..., :K] = torch.bmm((dy * decay.head).mT, q)
    U[..., K:] = torch.bmm((p * decay.head).mT, do)
    dS[n] = last
    U, total = U.view(n, *first.shape), decay.head[:, -1].view(n, -1, s.shape[-1], 1)
    for c in reversed(range(n)):
        torch.addcmul(U[c], total[c], dS[c + 1], out=dS[c])
    end = dS[1:].flatten(0, 1)  # (N, M, K + V), at the end of each chunk
    # keys, values, queries: first pass and state together
    dkv = torch.bmm(s * decay.tail, end)
    dP = decay.scores(dy)
    dk = torch.baddbmm(dkv[..., :K], dP.mT, q)
    dv = torch.baddbmm(dkv[..., K:], decay.scores(p).mT, do)
    dq = torch.bmm(dy * decay.head, S[..., :K]).baddbmm_(dP, k)
    # writes and gates
    ds = decay.scatter(dA, p, P, dy)
    x.addcmul_(s, ds, value=-1)
    carried = torch.bmm(kv, end.mT).mul_(decay.tail)
    dg = gate_gradient(x, carried * s, S.mul_(end).sum(-1).mul_(decay.head[:, -1]))
    ds.add_(carried).addcmul_(own, dy).addcmul_(dA_own, p)
    return dq, dk, dv, ds, dg, dS[0]


def gate_gradient(x, carried, through):
    """dg_t = sum of x from t to the chunk's end + sum of `carried` before t + what passes `through` the whole chunk."""
    C = x.shape[1]
    both = torch.cat((lower(C, x).mT, lower(C, x, -1)), 1)  # (C, 2C)
    return torch.bmm(both.expand(len(x), C, 2 * C), torch.cat((x, carried), 1)).add_(through.unsqueeze(1))


# ----------------------------------------------------------------------------- Triton
#
# Five launches. Forward: one program per (batch, head) walks time in tiles of 16 tokens, both states in registers.
# Backward: `scan_kernel` recomputes the states at the chunk borders; `logit_kernel` redoes each chunk from its state,
# for the softmax and dq; `scan_kernel` runs again, in reverse, for the gradients of the states; `input_kernel` walks
# each chunk backwards for all that is left. States and their gradients at chunk borders: (B, H, NT, K + V, M) fp32.
#
# The decay from token j to token i inside a tile of 16 is a running product over columns j, from the last to the first;
# everything further apart passes through a state. No exponent is positive and no two sums are subtracted.


@jit
def decay_column(b_f, p_g, p_s, t, j, n, stride, o_c, o_m, m_m):
    """From the decays after column j + 1 of a tile of n tokens from t on, those after column j [BC, BM]; and s_j [BM].
    The loops over columns run to n, not to a constant, so that the compiler does not unroll them out of registers."""
    m_next = m_m & (j + 1 < n)
    b_a = tl.exp(tl.load(p_g + (t + j + 1) * stride + o_m, mask=m_next, other=0.0).to(tl.float32))
    b_s = tl.load(p_s + (t + j) * stride + o_m, mask=m_m, other=0.0).to(tl.float32)
    b_f = tl.where(o_c[:, None] > j, b_f * b_a[None, :], tl.where(o_c[:, None] == j, 1.0, 0.0))
    return b_f, b_s


@jit
def tile_tail(p_g, o_t, stride, o_m, m_m, T, end):
    """The decay from after each token of o_t to the one before `end` [len(o_t), BM]."""
    m_next = ((o_t + 1 < T) & (o_t + 1 < end))[:, None] & m_m[None, :]
    b_next = tl.load(p_g + (o_t + 1)[:, None] * stride + o_m[None, :], mask=m_next, other=0.0).to(tl.float32)
    return tl.exp(tl.cumsum(b_next, 0, reverse=True))


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
def fwd_kernel(
    p_q,  # (B, T, H, K)
    p_k,  # (B, T, H, K)
    p_v,  # (B, T, H, V)
    p_s,  # (B, T, H, M)
    p_g,  # (B, T, H, M)
    p_hk,  # (B, H, K, M) initial states
    p_hv,  # (B, H, M, V)
    p_o,  # (B, T, H, V)
    p_z,  # (B, T, H, M) logits without their own token
    p_fk,  # (B, H, K, M) final states
    p_fv,  # (B, H, M, V)
    scale,
    T,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    INIT: tl.constexpr,
):
    i_bh = tl.program_id(0).to(tl.int64)
    i_row = (i_bh // H) * T * H + i_bh % H
    p_q, p_k, p_v, p_o = p_q + i_row * K, p_k + i_row * K, p_v + i_row * V, p_o + i_row * V
    p_s, p_g, p_z = p_s + i_row * M, p_g + i_row * M, p_z + i_row * M
    o_k, o_v, o_m, o_c = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BM), tl.arange(0, BC)
    m_k, m_v, m_m = o_k < K, o_v < V, o_m < M
    if INIT:
        b_hk = load_tile(p_hk + i_bh * K * M, o_k, M, m_k, o_m, 1, m_m)  # [BK, BM]
        b_hv = load_tile(p_hv + i_bh * M * V, o_m, V, m_m, o_v, 1, m_v)  # [BM, BV]
    else:
        b_hk, b_hv = tl.zeros([BK, BM], tl.float32), tl.zeros([BM, BV], tl.float32)
    for t in range(0, T, BC):
        o_t = t + o_c
        m_t = o_t < T
        n = tl.minimum(BC, T - t)
        b_q = load_tile(p_q, o_t, H * K, m_t, o_k, 1, m_k)  # [BC, BK]
        b_kt = load_tile(p_k, o_k, 1, m_k, o_t, H * K, m_t)  # [BK, BC]
        b_v = load_tile(p_v, o_t, H * V, m_t, o_v, 1, m_v)  # [BC, BV]
        b_s = load_tile(p_s, o_t, H * M, m_t, o_m, 1, m_m).to(tl.float32)  # [BC, BM]
        b_g = load_tile(p_g, o_t, H * M, m_t, o_m, 1, m_m).to(tl.float32)
        b_head = tl.exp(tl.cumsum(b_g, 0))
        b_total = tl.exp(tl.sum(b_g, 0))  # [BM]
        b_w = b_s * tile_tail(p_g, o_t, H * M, o_m, m_m, T, t + BC)
        b_p = scale * tl.dot(b_q, b_kt, input_precision="ieee")  # [BC, BC]
        b_z = scale * b_head * tl.dot(b_q, b_hk.to(b_q.dtype), input_precision="ieee")  # [BC, BM]
        b_f = tl.zeros([BC, BM], tl.float32)
        for i in range(0, n):
            j = n - 1 - i
            b_f, b_sj = decay_column(b_f, p_g, p_s, t, j, n, H * M, o_c, o_m, m_m)
            b_pj = tl.sum(tl.where((o_c[None, :] == j) & (o_c[:, None] > j), b_p, 0.0), 1)  # [BC]
            b_z += b_pj[:, None] * b_f * b_sj[None, :]
        store_tile(p_z, b_z, o_t, H * M, m_t, o_m, 1, m_m)
        b_own = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_p, 0.0), 1)
        b_y = masked_softmax(b_z + b_own[:, None] * b_s, m_m)
        b_a, b_f = tl.zeros([BC, BC], tl.float32), tl.zeros([BC, BM], tl.float32)
        for i in range(0, n):
            j = n - 1 - i
            b_f, b_sj = decay_column(b_f, p_g, p_s, t, j, n, H * M, o_c, o_m, m_m)
            b_a = tl.where(o_c[None, :] == j, tl.sum(b_y * b_f * b_sj[None, :], 1)[:, None], b_a)
        b_o = tl.dot(b_a.to(b_v.dtype), b_v, input_precision="ieee")  # [BC, BV]
        b_o += tl.dot((b_y * b_head).to(b_v.dtype), b_hv.to(b_v.dtype), input_precision="ieee")
        store_tile(p_o, b_o, o_t, H * V, m_t, o_v, 1, m_v)
        b_hk = b_hk * b_total[None, :] + tl.dot(b_kt, b_w.to(b_kt.dtype), input_precision="ieee")
        b_hv = b_hv * b_total[:, None] + tl.dot(tl.trans(b_w).to(b_v.dtype), b_v, input_precision="ieee")
    store_tile(p_fk + i_bh * K * M, b_hk, o_k, M, m_k, o_m, 1, m_m)
    store_tile(p_fv + i_bh * M * V, b_hv, o_m, V, m_m, o_v, 1, m_v)


@jit
def scan_side(
    p_x, p_w, p_g, p_h, p_first, p_last, scale, T, stride_x, stride_g, o_d, m_d, state_d, state_m,
    M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, C: tl.constexpr, stride_h: tl.constexpr,
    FIRST: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Columns o_d of x: h <- h * (decay of chunk c) + x_c^T w_c for c from the first to the last, or in REVERSE. The h
    before chunk c goes to p_h, the one after all to p_last. w_c is decayed towards where h goes."""
    o_m, o_c = tl.arange(0, BM), tl.arange(0, C)
    m_m = o_m < M
    b_h = tl.zeros([BD, BM], tl.float32)
    if FIRST:
        b_h += load_tile(p_first, o_d, state_d, m_d, o_m, state_m, m_m)
    n = tl.cdiv(T, C)
    if REVERSE:
        p_h += (n - 1).to(tl.int64) * stride_h
    for i in range(0, n):
        c = n - 1 - i if REVERSE else i
        store_tile(p_h, b_h, o_d, M, m_d, o_m, 1, m_m)
        p_h += -stride_h if REVERSE else stride_h
        o_t = c * C + o_c
        m_t = o_t < T
        b_xt = load_tile(p_x, o_d, 1, m_d, o_t, stride_x, m_t)  # [BD, C]
        b_w = load_tile(p_w, o_t, stride_g, m_t, o_m, 1, m_m).to(tl.float32)  # [C, BM]
        b_g = load_tile(p_g, o_t, stride_g, m_t, o_m, 1, m_m).to(tl.float32)
        if REVERSE:
            b_w *= scale * tl.exp(tl.cumsum(b_g, 0))
        else:
            b_w *= tile_tail(p_g, o_t, stride_g, o_m, m_m, T, c * C + C)
        b_h = b_h * tl.exp(tl.sum(b_g, 0))[None, :] + tl.dot(b_xt, b_w.to(b_xt.dtype), input_precision="ieee")
    store_tile(p_last, b_h, o_d, state_d, m_d, o_m, state_m, m_m)


@jit
def scan_kernel(
    p_xk,  # (B, T, H, K) k, or q in REVERSE
    p_xv,  # (B, T, H, V) v, or do
    p_wk,  # (B, T, H, M) s, or dy
    p_wv,  # (B, T, H, M) s, or p
    p_g,  # (B, T, H, M)
    p_h,  # (B, H, NT, K + V, M)
    p_fk,  # (B, H, K, M) where to start, if FIRST_K
    p_fv,  # (B, H, M, V)
    p_lk,  # (B, H, K, M) what is left at the end
    p_lv,  # (B, H, M, V)
    scale,
    T,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    BM: tl.constexpr,
    C: tl.constexpr,
    FIRST_K: tl.constexpr,
    FIRST_V: tl.constexpr,
    REVERSE: tl.constexpr,
    BD: tl.constexpr,
):
    i_d, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_row = (i_bh // H) * T * H + i_bh % H
    p_g, p_wk, p_wv = p_g + i_row * M, p_wk + i_row * M, p_wv + i_row * M
    p_h += i_bh * tl.cdiv(T, C) * (K + V) * M
    o_d = i_d * BD + tl.arange(0, BD)
    if i_d < tl.cdiv(K, BD):
        scan_side(p_xk + i_row * K, p_wk, p_g, p_h, p_fk + i_bh * K * M, p_lk + i_bh * K * M, scale, T, H * K, H * M,
                  o_d, o_d < K, M, 1, M, BD, BM, C, (K + V) * M, FIRST_K, REVERSE)  # fmt: skip
    else:
        o_d -= tl.cdiv(K, BD) * BD
        scan_side(p_xv + i_row * V, p_wv, p_g, p_h + K * M, p_fv + i_bh * M * V, p_lv + i_bh * M * V, 1.0, T, H * V,
                  H * M, o_d, o_d < V, 1, V, M, BD, BM, C, (K + V) * M, FIRST_V, REVERSE)  # fmt: skip


@jit
def logit_kernel(
    p_q,  # (B, T, H, K)
    p_k,  # (B, T, H, K)
    p_v,  # (B, T, H, V)
    p_s,  # (B, T, H, M)
    p_g,  # (B, T, H, M)
    p_z,  # (B, T, H, M)
    p_do,  # (B, T, H, V)
    p_h,  # (B, H, NT, K + V, M) states at the start of each chunk
    p_p,  # (B, T, H, M) -> softmax
    p_dy,  # (B, T, H, M) -> gradient of the logits
    p_x,  # (B, T, H, M) -> z * dy + p * dp, both without their own token
    p_dq,  # (B, T, H, K)
    scale,
    T,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    C: tl.constexpr,
):
    i_t, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_row = (i_bh // H) * T * H + i_bh % H
    p_q, p_k, p_v, p_do, p_dq = p_q + i_row * K, p_k + i_row * K, p_v + i_row * V, p_do + i_row * V, p_dq + i_row * K
    p_s, p_g, p_z, p_p = p_s + i_row * M, p_g + i_row * M, p_z + i_row * M, p_p + i_row * M
    p_dy, p_x = p_dy + i_row * M, p_x + i_row * M
    o_k, o_v, o_m, o_c = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BM), tl.arange(0, BC)
    m_k, m_v, m_m = o_k < K, o_v < V, o_m < M
    p_h += (i_bh * tl.cdiv(T, C) + i_t) * (K + V) * M
    b_hk = load_tile(p_h, o_m, 1, m_m, o_k, M, m_k)  # [BM, BK]
    b_hv = load_tile(p_h + K * M, o_v, M, m_v, o_m, 1, m_m)  # [BV, BM]
    for t in range(i_t * C, tl.minimum(T, i_t * C + C), BC):
        o_t = t + o_c
        m_t = o_t < T
        n = tl.minimum(BC, T - t)
        b_q = load_tile(p_q, o_t, H * K, m_t, o_k, 1, m_k)  # [BC, BK]
        b_k = load_tile(p_k, o_t, H * K, m_t, o_k, 1, m_k)
        b_vt = load_tile(p_v, o_v, 1, m_v, o_t, H * V, m_t)  # [BV, BC]
        b_do = load_tile(p_do, o_t, H * V, m_t, o_v, 1, m_v)  # [BC, BV]
        b_s = load_tile(p_s, o_t, H * M, m_t, o_m, 1, m_m).to(tl.float32)  # [BC, BM]
        b_g = load_tile(p_g, o_t, H * M, m_t, o_m, 1, m_m).to(tl.float32)
        b_z = load_tile(p_z, o_t, H * M, m_t, o_m, 1, m_m)
        b_head = tl.exp(tl.cumsum(b_g, 0))
        b_total = tl.exp(tl.sum(b_g, 0))  # [BM]
        b_w = b_s * tile_tail(p_g, o_t, H * M, o_m, m_m, T, t + BC)
        b_da = tl.dot(b_do, b_vt, input_precision="ieee")  # [BC, BC]
        b_dp = b_head * tl.dot(b_do, b_hv.to(b_do.dtype), input_precision="ieee")  # [BC, BM]
        b_f = tl.zeros([BC, BM], tl.float32)
        for i in range(0, n):
            j = n - 1 - i
            b_f, b_sj = decay_column(b_f, p_g, p_s, t, j, n, H * M, o_c, o_m, m_m)
            b_daj = tl.sum(tl.where((o_c[None, :] == j) & (o_c[:, None] > j), b_da, 0.0), 1)  # [BC]
            b_dp += b_daj[:, None] * b_f * b_sj[None, :]
        b_own = scale * tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32), 1)
        b_p = masked_softmax(b_z + b_own[:, None] * b_s, m_m)
        b_x = b_p * b_dp
        b_dp += tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_da, 0.0), 1)[:, None] * b_s
        b_dy = b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None])
        store_tile(p_p, b_p, o_t, H * M, m_t, o_m, 1, m_m)
        store_tile(p_dy, b_dy, o_t, H * M, m_t, o_m, 1, m_m)
        store_tile(p_x, b_x + b_z * b_dy, o_t, H * M, m_t, o_m, 1, m_m)
        b_ds, b_f = tl.zeros([BC, BC], tl.float32), tl.zeros([BC, BM], tl.float32)  # the gradient of q k^T
        for i in range(0, n):
            j = n - 1 - i
            b_f, b_sj = decay_column(b_f, p_g, p_s, t, j, n, H * M, o_c, o_m, m_m)
            b_ds = tl.where(o_c[None, :] == j, tl.sum(b_dy * b_f * b_sj[None, :], 1)[:, None], b_ds)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, input_precision="ieee")  # [BC, BK]
        b_dq += tl.dot((b_dy * b_head).to(b_k.dtype), b_hk.to(b_k.dtype), input_precision="ieee")
        store_tile(p_dq, scale * b_dq, o_t, H * K, m_t, o_k, 1, m_k)
        b_hk = b_hk * b_total[:, None] + tl.dot(tl.trans(b_w).to(b_k.dtype), b_k, input_precision="ieee")
        b_hv = b_hv * b_total[None, :] + tl.dot(b_vt, b_w.to(b_vt.dtype), input_precision="ieee")


@jit
def chunk_gates(
    p_k, p_v, p_s, p_g, p_h, p_dh, t, T, stride_k, stride_v, stride_m, o_k, o_v, o_m, m_k, m_v, m_m,
    KM: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """What dg has of later chunks: from before this chunk [BM], and from each of its tiles [C / BC, BM]."""
    o_t = t + tl.arange(0, C)
    m_t = o_t < T
    b_s = load_tile(p_s, o_t, stride_m, m_t, o_m, 1, m_m).to(tl.float32)  # [C, BM]
    b_g = load_tile(p_g, o_t, stride_m, m_t, o_m, 1, m_m).to(tl.float32)
    b_w = b_s * tile_tail(p_g, o_t, stride_m, o_m, m_m, T, t + C)
    b_dh = load_tile(p_dh, o_k, M, m_k, o_m, 1, m_m)  # [BK, BM]
    b_through = tl.sum(b_dh * load_tile(p_h, o_k, M, m_k, o_m, 1, m_m), 0)
    b_k = load_tile(p_k, o_t, stride_k, m_t, o_k, 1, m_k)  # [C, BK]
    b_far = tl.dot(b_k, b_dh.to(b_k.dtype), input_precision="ieee")  # [C, BM]
    b_dh = load_tile(p_dh + KM, o_v, M, m_v, o_m, 1, m_m)  # [BV, BM]
    b_through += tl.sum(b_dh * load_tile(p_h + KM, o_v, M, m_v, o_m, 1, m_m), 0)
    b_v = load_tile(p_v, o_t, stride_v, m_t, o_v, 1, m_v)  # [C, BV]
    b_far += tl.dot(b_v, b_dh.to(b_v.dtype), input_precision="ieee")
    return tl.exp(tl.sum(b_g, 0)) * b_through, tl.sum(tl.reshape(b_w * b_far, [C // BC, BC, BM]), 1)


@jit
def tile_pairs(p_g, p_s, t, n, stride, o_c, o_m, m_m, b_qk, b_dov, b_dy, b_p, BC: tl.constexpr, BM: tl.constexpr):
    """Pairs inside a tile. b_qk = (q k^T)^T and b_dov = (do v^T)^T [BC, BC] -> the gradient of q k^T and the weights
    of the values [BC, BC], and ds without each token's own pair [BC, BM]."""
    b_ds, b_f = tl.zeros([BC, BM], tl.float32), tl.zeros([BC, BM], tl.float32)
    b_dqk, b_a = tl.zeros([BC, BC], tl.float32), tl.zeros([BC, BC], tl.float32)
    for i in range(0, n):
        j = n - 1 - i
        b_f, b_sj = decay_column(b_f, p_g, p_s, t, j, n, stride, o_c, o_m, m_m)
        m_j = (o_c[:, None] == j) & (o_c[None, :] > j)
        b_dyj, b_pj = b_f * b_dy, b_f * b_p
        b_dqk = tl.where(o_c[None, :] == j, tl.sum(b_dyj * b_sj[None, :], 1)[:, None], b_dqk)
        b_a = tl.where(o_c[None, :] == j, tl.sum(b_pj * b_sj[None, :], 1)[:, None], b_a)
        b_dyj *= tl.sum(tl.where(m_j, b_qk, 0.0), 0)[:, None]
        b_pj *= tl.sum(tl.where(m_j, b_dov, 0.0), 0)[:, None]
        b_ds = tl.where(o_c[:, None] == j, tl.sum(b_dyj + b_pj, 0)[None, :], b_ds)
    return b_dqk, b_a, b_ds


@jit
def input_kernel(
    p_q, p_k,  # (B, T, H, K)
    p_v,  # (B, T, H, V)
    p_s, p_g,  # (B, T, H, M)
    p_do,  # (B, T, H, V)
    p_p, p_dy, p_x,  # (B, T, H, M)
    p_h,  # (B, H, NT, K + V, M) states at the start of each chunk
    p_dh,  # (B, H, NT, K + V, M) gradients of the states at the end of each chunk
    p_dk,  # (B, T, H, K)
    p_dv,  # (B, T, H, V)
    p_ds, p_dg,  # (B, T, H, M)
    scale, T, H,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    i_t, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_row = (i_bh // H) * T * H + i_bh % H
    p_q, p_k, p_v, p_do = p_q + i_row * K, p_k + i_row * K, p_v + i_row * V, p_do + i_row * V
    p_s, p_g, p_p, p_dy, p_x = p_s + i_row * M, p_g + i_row * M, p_p + i_row * M, p_dy + i_row * M, p_x + i_row * M
    p_dk, p_dv, p_ds, p_dg = p_dk + i_row * K, p_dv + i_row * V, p_ds + i_row * M, p_dg + i_row * M
    o_k, o_v, o_m, o_c = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BM), tl.arange(0, BC)
    m_k, m_v, m_m = o_k < K, o_v < V, o_m < M
    p_h += (i_bh * tl.cdiv(T, C) + i_t) * (K + V) * M
    p_dh += (i_bh * tl.cdiv(T, C) + i_t) * (K + V) * M
    b_through, b_tiles = chunk_gates(p_k, p_v, p_s, p_g, p_h, p_dh, i_t * C, T, H * K, H * V, H * M, o_k, o_v, o_m,
                                     m_k, m_v, m_m, K * M, M, BM, BC, C)  # fmt: skip
    o_n = tl.arange(0, C // BC)
    m_before = tl.where(o_c[:, None] > o_c[None, :], 1.0, 0.0)  # [BC, BC]
    b_ek, b_ev = tl.zeros([BK, BM], tl.float32), tl.zeros([BV, BM], tl.float32)  # as dh, from inside this chunk only
    b_rest = tl.zeros([BM], tl.float32)  # log-decay from this tile's end to the chunk's end
    b_carry = tl.zeros([BM], tl.float32)
    for i in range(0, C // BC):
        t = i_t * C + C - BC - i * BC
        o_t = t + o_c
        m_t = o_t < T
        n = tl.minimum(BC, T - t)
        b_k = load_tile(p_k, o_t, H * K, m_t, o_k, 1, m_k)  # [BC, BK]
        b_v = load_tile(p_v, o_t, H * V, m_t, o_v, 1, m_v)  # [BC, BV]
        b_q = load_tile(p_q, o_k, 1, m_k, o_t, H * K, m_t)  # [BK, BC]
        b_do = load_tile(p_do, o_v, 1, m_v, o_t, H * V, m_t)  # [BV, BC]
        b_s = load_tile(p_s, o_t, H * M, m_t, o_m, 1, m_m).to(tl.float32)  # [BC, BM]
        b_g = load_tile(p_g, o_t, H * M, m_t, o_m, 1, m_m).to(tl.float32)
        b_p = load_tile(p_p, o_t, H * M, m_t, o_m, 1, m_m)
        b_dy = load_tile(p_dy, o_t, H * M, m_t, o_m, 1, m_m)
        b_tail = tile_tail(p_g, o_t, H * M, o_m, m_m, T, t + BC)
        b_total, b_delta = tl.exp(tl.sum(b_g, 0)), tl.exp(b_rest)  # [BM]
        b_qk = scale * tl.dot(b_k, b_q, input_precision="ieee")  # [BC, BC], transposed
        b_dov = tl.dot(b_v, b_do, input_precision="ieee")
        b_dqk, b_a, b_ds = tile_pairs(p_g, p_s, t, n, H * M, o_c, o_m, m_m, b_qk, b_dov, b_dy, b_p, BC, BM)
        # ds from the rest of the chunk, and from later chunks
        b_near = tl.dot(b_k, b_ek.to(b_k.dtype), input_precision="ieee")  # [BC, BM]
        b_ds += b_tail * (b_near + tl.dot(b_v, b_ev.to(b_v.dtype), input_precision="ieee"))
        b_w = tl.trans(b_s * b_tail)  # [BM, BC]
        b_dh = load_tile(p_dh, o_k, M, m_k, o_m, 1, m_m)  # [BK, BM]
        b_far = tl.dot(b_k, b_dh.to(b_k.dtype), input_precision="ieee")
        b_dk = tl.dot((b_ek + b_delta[None, :] * b_dh).to(b_k.dtype), b_w.to(b_k.dtype), input_precision="ieee")
        b_dk += scale * tl.dot(b_q, b_dqk.to(b_q.dtype), input_precision="ieee")  # [BK, BC]
        store_tile(p_dk, b_dk, o_k, 1, m_k, o_t, H * K, m_t)
        b_dh = load_tile(p_dh + K * M, o_v, M, m_v, o_m, 1, m_m)  # [BV, BM]
        b_far += tl.dot(b_v, b_dh.to(b_v.dtype), input_precision="ieee")
        b_dv = tl.dot((b_ev + b_delta[None, :] * b_dh).to(b_v.dtype), b_w.to(b_v.dtype), input_precision="ieee")
        b_dv += tl.dot(b_do, b_a.to(b_do.dtype), input_precision="ieee")  # [BV, BC]
        store_tile(p_dv, b_dv, o_v, 1, m_v, o_t, H * V, m_t)
        b_far *= b_tail * b_delta[None, :]
        b_y = load_tile(p_x, o_t, H * M, m_t, o_m, 1, m_m) - b_s * b_ds
        b_earlier = b_through + tl.sum(tl.where(o_n[:, None] < C // BC - 1 - i, b_tiles, 0.0), 0)  # [BM]
        b_dg = tl.cumsum(b_y, 0, reverse=True) + (b_carry + b_earlier)[None, :]
        b_dg += tl.dot(m_before, b_s * b_far, input_precision="ieee")
        store_tile(p_dg, b_dg, o_t, H * M, m_t, o_m, 1, m_m)
        b_carry += tl.sum(b_y, 0)
        m_own = o_c[:, None] == o_c[None, :]
        b_ds += b_far + tl.sum(tl.where(m_own, b_qk, 0.0), 1)[:, None] * b_dy
        b_ds += tl.sum(tl.where(m_own, b_dov, 0.0), 1)[:, None] * b_p
        store_tile(p_ds, b_ds, o_t, H * M, m_t, o_m, 1, m_m)
        b_head = tl.exp(tl.cumsum(b_g, 0))
        b_ek = b_ek * b_total[None, :] + scale * tl.dot(b_q, (b_dy * b_head).to(b_q.dtype), input_precision="ieee")
        b_ev = b_ev * b_total[None, :] + tl.dot(b_do, (b_p * b_head).to(b_do.dtype), input_precision="ieee")
        b_rest += tl.sum(b_g, 0)


# (num_warps, num_stages) of each kernel, the default first; BD is the scan's tile of columns.
CONFIGS = {
    "fwd": [dict(num_warps=8, num_stages=1), dict(num_warps=4, num_stages=1), dict(num_warps=4, num_stages=2)],
    "scan": [
        dict(BD=64, num_warps=4, num_stages=2),
        dict(BD=32, num_warps=4, num_stages=2),
        dict(BD=32, num_warps=2, num_stages=2),
        dict(BD=64, num_warps=4, num_stages=3),
    ],
    "logit": [dict(num_warps=8, num_stages=1), dict(num_warps=4, num_stages=1)],
    "input": [dict(num_warps=8, num_stages=1), dict(num_warps=4, num_stages=1)],
}
KERNELS = {"fwd": fwd_kernel, "scan": scan_kernel, "logit": logit_kernel, "input": input_kernel}
AUTOTUNE = False  # True: all configurations are tried, once per head size
TILE = 16  # tokens that a kernel takes at a time inside a chunk
STATE_MAX = 64 * 512  # numbers of both states, padded to powers of two, that a program can hold


def power(n):
    return max(16, 1 << (n - 1).bit_length())


@functools.cache
def tuned(name):
    """The kernel with its autotuner."""
    configs = [dict(c) for c in CONFIGS[name]]
    configs = [triton.Config(c, num_warps=c.pop("num_warps"), num_stages=c.pop("num_stages")) for c in configs]
    prune = {"early_config_prune": fitting}
    return triton.autotune(configs, key=["K", "V", "M"], prune_configs_by=prune)(KERNELS[name])


def fitting(configs, arguments, **constants):
    """The configurations whose operands fit into the shared memory of this device; at least the first."""
    have = torch.cuda.get_device_properties(arguments["p_g"].device).shared_memory_per_block_optin
    known = {**arguments, **constants}
    return [c for c in configs if shared_bytes(c, known) <= have] or configs[:1]


def shared_bytes(config, known):
    """An estimate: the states as operands of a product, and the tiles of tokens that each stage of the loop holds."""
    size = known["p_q" if "p_q" in known else "p_xk"].element_size()
    rows = known["C"] if "BD" in config.kwargs else TILE
    width = config.kwargs["BD"] if "BD" in config.kwargs else known["BK"] + known["BV"]
    return size * (known["BM"] * (rows + width) + config.num_stages * rows * (width + 2 * known["BM"]))


def launch(name, grid, *args, **constants):
    if AUTOTUNE:
        tuned(name)[grid](*args, **constants)
    else:
        KERNELS[name][grid](*args, **constants, **CONFIGS[name][0])


def widths(q, v, s):
    K, V, M = q.shape[-1], v.shape[-1], s.shape[-1]
    return dict(K=K, V=V, M=M), dict(BK=power(K), BV=power(V), BM=power(M))


def gsa_fwd(q, k, v, s, g, hk, hv, scale):
    B, T, H, K, V, M = *q.shape, v.shape[-1], s.shape[-1]
    o, z = v.new_empty(v.shape), s.new_empty(s.shape, dtype=torch.float32)
    q, k, v, s, g = alike(q, k, v, s, g)
    sizes, blocks = widths(q, v, s)
    init = hk is not None
    fk, fv = z.new_empty(B, H, K, M), z.new_empty(B, H, M, V)
    hk, hv = (hk.contiguous(), hv.contiguous()) if init else (fk, fv)
    args = (q, k, v, s, g, hk, hv, o, z, fk, fv, scale, T, H)
    launch("fwd", lambda meta: (B * H,), *args, **sizes, **blocks, BC=TILE, INIT=init)
    return o, fk, fv, z, z.new_empty(0)


def alike(q, k, v, s, g, *more):
    """Contiguous, and those that meet in matrix products in one type."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in (q, k, v, *more)))
    q, k, v, *more = (x.to(dtype).contiguous() for x in (q, k, v, *more))
    return q, k, v, s.contiguous(), g.contiguous(), *more


def gsa_bwd(do, dhk, dhv, q, k, v, s, g, hk, hv, z, scale):
    B, T, H, K, V, M = *q.shape, v.shape[-1], s.shape[-1]
    grads = [x.new_empty(x.shape) for x in (q, k, v, s, g)]
    q, k, v, s, g, do = alike(q, k, v, s, g, do)
    sizes, blocks = widths(q, v, s)
    h, dh = (z.new_empty(B * H, -(-T // CHUNK), K + V, M) for _ in range(2))
    lk, lv = z.new_empty(B, H, K, M), z.new_empty(B, H, M, V)
    p, dy, x = (torch.empty_like(z) for _ in range(3))

    def scan(xk, xv, wk, wv, out, first_k, first_v, reverse):
        firsts = lk if first_k is None else first_k.contiguous(), lv if first_v is None else first_v.contiguous()
        given = dict(FIRST_K=first_k is not None, FIRST_V=first_v is not None, REVERSE=reverse)
        args = (xk, xv, wk, wv, g, out, *firsts, lk, lv, scale if reverse else 1.0, T, H)
        launch("scan", tiles, *args, **sizes, BM=blocks["BM"], C=CHUNK, **given)

    def tiles(meta):
        return -(-K // meta["BD"]) + -(-V // meta["BD"]), B * H

    def chunks(meta):
        return -(-T // CHUNK), B * H

    scan(k, v, s, s, h, hk, hv, False)
    args = (q, k, v, s, g, z, do, h, p, dy, x, grads[0], scale, T, H)
    launch("logit", chunks, *args, **sizes, **blocks, BC=TILE, C=CHUNK)
    scan(q, do, dy, p, dh, dhk, dhv, True)
    args = (q, k, v, s, g, do, p, dy, x, h, dh, *grads[1:], scale, T, H)
    launch("input", chunks, *args, **sizes, **blocks, BC=TILE, C=CHUNK)
    return *grads, lk, lv


def aot_specs():
    """(name, kernel, signature, constants) of every kernel and configuration, for the report. Default first."""
    forms = [
        ("gsa_fwd", "fwd", dict(BC=TILE, INIT=True)),
        ("gsa_scan", "scan", dict(C=CHUNK, FIRST_K=True, FIRST_V=True, REVERSE=False)),
        ("gsa_scan reverse", "scan", dict(C=CHUNK, FIRST_K=True, FIRST_V=True, REVERSE=True)),
        ("gsa_logit", "logit", dict(BC=TILE, C=CHUNK)),
        ("gsa_input", "input", dict(BC=TILE, C=CHUNK)),
    ]
    low = {"p_q", "p_k", "p_v", "p_o", "p_do", "p_xk", "p_xv", "p_dq", "p_dk", "p_dv"}
    specs = []
    for title, name, flags in forms:
        kernel = KERNELS[name]
        for width in (64, 128):
            for i, config in enumerate(CONFIGS[name]):
                constants = dict(K=width, V=width, M=64, BK=width, BV=width, BM=64, **flags, **config)
                constants = {x: y for x, y in constants.items() if x in kernel.arg_names or x[:4] == "num_"}
                signature = {x: "*bf16" if x in low else "*fp32" for x in kernel.arg_names if x[:2] == "p_"}
                signature |= {"scale": "fp32", "T": "i32", "H": "i32"}
                specs.append((f"{title} {width} #{i}", kernel, signature, constants))
    return specs


# ----------------------------------------------------------------------------- operator


@torch.library.custom_op(
    "nanoattention::gsa",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor s, Tensor g, Tensor? hk, Tensor? hv, float scale, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def fwd_op(q, k, v, s, g, hk, hv, scale, backend):
    with torch.autocast(q.device.type, enabled=False):
        run = gsa_fwd if backend == "triton" else chunk_fwd
        return run(q, k, v, s, g, hk, hv, scale)


@fwd_op.register_fake
def _(q, k, v, s, g, hk, hv, scale, backend):
    B, T, H, K, V, M = *q.shape, v.shape[-1], s.shape[-1]
    acc = accumulator(q)
    parts = 1 + -(-T // segment_length(B, H))
    borders = (0,) if backend == "triton" else (parts, B * H, M, K + V)
    return (
        v.new_empty(v.shape),
        q.new_empty(B, H, K, M, dtype=acc),
        q.new_empty(B, H, M, V, dtype=acc),
        s.new_empty(s.shape, dtype=acc),
        q.new_empty(borders, dtype=acc),
    )


@torch.library.custom_op(
    "nanoattention::gsa_backward",
    mutates_args=(),
    schema="(Tensor do, Tensor? dhk, Tensor? dhv, Tensor q, Tensor k, Tensor v, Tensor s, Tensor g, Tensor? hk,"
    " Tensor? hv, Tensor z, Tensor borders, float scale, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def bwd_op(do, dhk, dhv, q, k, v, s, g, hk, hv, z, borders, scale, backend):
    with torch.autocast(q.device.type, enabled=False):
        if backend == "triton":
            return gsa_bwd(do, dhk, dhv, q, k, v, s, g, hk, hv, z, scale)
        return chunk_bwd(do, dhk, dhv, q, k, v, s, g, z, borders, scale)


@bwd_op.register_fake
def _(do, dhk, dhv, q, k, v, s, g, hk, hv, z, borders, scale, backend):
    B, _, H, K, V, M = *q.shape, v.shape[-1], s.shape[-1]
    grads = [x.new_empty(x.shape) for x in (q, k, v, s, g)]
    return *grads, z.new_empty(B, H, K, M), z.new_empty(B, H, M, V)


def save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[3], output[4])
    ctx.set_materialize_grads(False)


def backward(ctx, do, dhk, dhv, *_):
    if do is None and dhk is None and dhv is None:
        return (None,) * 9
    *inputs, z, borders = ctx.saved_tensors
    do = torch.zeros_like(inputs[2]) if do is None else do
    *grads, dhk, dhv = bwd_op(do, dhk, dhv, *inputs, z, borders, ctx.scale, ctx.backend)
    hk, hv = inputs[5:]
    return *grads, None if hk is None else dhk, None if hv is None else dhv, None, None


fwd_op.register_autograd(backward, setup_context=save)


# ----------------------------------------------------------------------------- public


def gsa(q, k, v, s, g, scale=None, initial_state=None, output_final_state=False, backend="auto"):
    """Gated slot attention. q, k (B, T, H, K)   v (B, T, H, V)   s (B, T, H, M) what is written   g (B, T, H, M)
    log-gate <= 0   initial_state (hk (B, H, K, M), hv (B, H, M, V))   scale: K^-1/2 unless given
    backend: auto | triton | torch | recurrent.

    -> o (B, T, H, V) in v's dtype, (hk, hv) in fp32 (fp64 for fp64 inputs), or (None, None) unless output_final_state.
    """
    hk, hv = initial_state if initial_state is not None else (None, None)
    check(q, k, v, s, g, hk, hv, backend)
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)  # of products; gates and states stay fp32
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if backend == "recurrent":
        o, state = gsa_recurrent(q, k, v, s, g, scale, initial_state)
    else:
        if hk is not None:
            hk, hv = hk.to(accumulator(q)), hv.to(accumulator(q))
        o, *state = fwd_op(q, k, v, s, g, hk, hv, scale, choose(backend, q, v, s))[:3]
    return o, tuple(state) if output_final_state else (None, None)


def check(q, k, v, s, g, hk, hv, backend):
    if backend not in ("auto", "triton", "torch", "recurrent"):
        raise ValueError(f"gsa: backend must be auto, triton, torch or recurrent, got {backend!r}")
    for name, x in (("q", q), ("k", k), ("v", v), ("s", s), ("g", g)):
        if x.dim() != 4 or not x.is_floating_point() or min(x.shape) < 1:
            raise ValueError(f"gsa: {name} must be non-empty floats (B, T, H, D), got {x.dtype} {tuple(x.shape)}")
    B, T, H, K = q.shape
    V, M = v.shape[-1], s.shape[-1]
    for name, x, width in (("k", k, K), ("v", v, V), ("s", s, M), ("g", g, M)):
        if x.shape != (B, T, H, width):
            raise ValueError(f"gsa: {name} must be {(B, T, H, width)} to match q and s, got {tuple(x.shape)}")
    if (hk is None) != (hv is None):
        raise ValueError("gsa: initial_state must be a pair (hk, hv), got only one of them")
    for name, x, want in (("hk", hk, (B, H, K, M)), ("hv", hv, (B, H, M, V))):
        if x is not None and x.shape != want:
            raise ValueError(f"gsa: initial_state {name} must be {want}, got {tuple(x.shape)}")


def choose(backend, q, v, s):
    """triton or torch. A wish that cannot be met is answered with its reason, once. `auto` does not take the kernels
    yet: they are right under the interpreter, but spill, and no GPU has run them."""
    if backend in ("torch", "auto"):
        return "torch"
    reason = obstacle(q, v, s)
    if reason:
        warn_once(f"gsa runs its PyTorch form: {reason}")
    return "torch" if reason else "triton"


def obstacle(q, v, s):
    """Why the Triton kernels cannot run, or None."""
    if triton is None:
        return "Triton is not installed"
    if not q.is_cuda and not interpreting():
        return f"Triton does not run on {q.device.type}"
    if q.dtype == torch.float64:
        return "the Triton kernels do not compute in fp64"
    if power(s.shape[-1]) * (power(q.shape[-1]) + power(v.shape[-1])) > STATE_MAX:
        return f"states of {q.shape[-1]} x {s.shape[-1]} and {s.shape[-1]} x {v.shape[-1]} do not fit into one program"
    return None
