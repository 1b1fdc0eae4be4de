"""The gated delta rule (arXiv 2406.06484, 2412.06464, 2510.26692): states that are corrected, not just added to.

    S~_t = diag(e^{g_t}) S_{t-1}        u_t = beta_t (v_t - S~_t^T k_t)
    S_t = S~_t + k_t u_t^T              o_t = scale * S_t^T q_t

`delta` is the public function; g is nothing (DeltaNet), a number for each head (Gated DeltaNet) or for each channel
(Kimi delta attention). Three forms of the same equations: `recurrent`, a loop over time; `torch`, chunks of tokens in
matrix products; `triton`, the same in three kernels and two of `gla`. Axes: B batch, T time, H heads, K key width, V
value width, C tokens a chunk, N = chunks * B * H.
"""

import functools

import torch
import torch.nn.functional as F

from . import Case, at_once, check, gla as G, in_autocast, in_steps, jit, leave_autocast, operator, tl, triton
from .gla import (
    SAFE_EXPONENT,
    add_pairs,
    chunked,
    compute_dtype,
    gate_sums,
    head_decays,
    joined,
    load_gates,
    next_gates,
    pair_decays,
    row_product,
    store,
)
from .gsa import below
from .launch import Kernel, choose, configurations, dot, dot_type, operand, power, split

CHUNK = 64  # tokens a chunk
SEGMENT = 8192  # token-heads that are worked on at a time, so that their tensors stay in cache


# ----------------------------------------------------------------------------- oracle


def delta_recurrent(q, k, v, beta, g=None, scale=None, gate_min=None, initial_state=None):
    """Token by token, in fp64 for fp64 inputs and fp32 otherwise. Differentiable; also the decoding step."""
    B, T, H, K = q.shape
    dtype, out_dtype = compute_dtype(q.dtype), v.dtype
    q, k, v, beta = q.to(dtype) * (K**-0.5 if scale is None else scale), k.to(dtype), v.to(dtype), beta.to(dtype)
    decay = None if g is None else by_channel(bounded(g.to(dtype), gate_min)).exp()  # (B, T, H, K or 1)
    state = q.new_zeros(B, H, K, v.shape[3]) if initial_state is None else initial_state.to(dtype)
    out = []
    for t in range(T):
        if decay is not None:
            state = state * decay[:, t, :, :, None]
        kt = k[:, t, :, None, :]  # (B, H, 1, K)
        u = beta[:, t, :, None, None] * (v[:, t, :, None, :] - row_product(kt, state))  # (B, H, 1, V)
        state = torch.addcmul(state, kt.mT, u)
        out.append(row_product(q[:, t, :, None, :], state))
    return joined(out, 2).transpose(1, 2).to(out_dtype), state


def bounded(g, gate_min):
    return g if gate_min is None else g.clamp(min=gate_min)


def by_channel(g):
    return g.unsqueeze(-1) if g.dim() == 3 else g


# ----------------------------------------------------------------------------- chunked PyTorch
#
# Within a chunk, b the cumulative sum of g up to and with the token, D_ij = e^(b_i - b_j):
#
#     (I + L) U = beta (v - (k e^b) S)      L_ij = beta_i k_i . k_j D_ij, j < i
#     o  = scale * ((q e^b) S + A U)        A_ij = q_i . k_j D_ij, j <= i
#     S' = e^B S + (k e^(B-b))^T U          B = b at the last token
#
# T = (I + L)^-1 is the same for all columns, so U = X - W S with X and W of the chunk alone: all chunks of a segment at
# once. What is left is a walk over the states, two products a chunk. The backward pass keeps the states at the chunks'
# starts, walks back over their gradients, and computes the rest of all chunks at once again.


class Chunk:
    """What N chunks need beside their state. q, k (N, C, K), v (N, C, V), beta (N, C, 1), g (N, C, K), (N, C, 1) or
    None; q is scaled. A gate for each channel is split at the chunk's middle, e^(b_i - m) e^(m - b_j). Products with
    one factor in common are one: rows (N, 2 C, K) holds the left factors of A and of L."""

    def __init__(self, q, k, v, beta, g):
        (N, C, K), self.q, self.k, self.v, self.beta = q.shape, q, k, v, beta
        self.decay = self.D = self.f = None
        self.read, self.write, self.left, self.down = q, k, k, k
        self.rows = q.new_empty(N, 2 * C, K)
        rows_q, rows_k = self.rows[:, :C], self.rows[:, C:]
        if g is None or g.shape[2] == 1:
            rows_q.copy_(q)
            rows_k.copy_(k)
        if g is not None:
            b = gate_sums(g) if g.shape[2] == 1 else g.cumsum(1)
            self.e, self.decay = b.to(q.dtype).exp(), b[:, -1:].mT.to(q.dtype).exp()
            self.tail = (b[:, -1:] - b).to(q.dtype).exp()
            if g.shape[2] == 1:
                self.D = pair_decays(b, q.new_empty(N, C, C))
            else:
                self.f, self.down = (b - b[:, (C - 1) // 2, None]).exp(), q.new_empty(N, C, K)
                torch.mul(q, self.f, out=rows_q)
                torch.mul(k, self.f, out=rows_k)
                torch.div(k, self.f, out=self.down)
            self.read, self.write, self.left = q * self.e, k * self.tail, k * self.e
        products = torch.bmm(self.rows, self.down.mT)  # (N, 2 C, C)
        if self.D is not None:
            products.view(N, 2, C, C).mul_(self.D[:, None])
        self.scores, self.pairs = products[:, :C].tril_(), products[:, C:].tril_(-1)
        self.T = inverse(self.pairs * beta)

    def error(self, S):
        """v - left S: beta times it is what T takes."""
        return torch.baddbmm(self.v, self.left, S, alpha=-1)

    def gradients(self, S, u, error, do, du, dS):
        """Of q, k, v, beta and g, from the states before the chunks, u, the error, and the gradients of o, of u and of
        the states after the chunks."""
        C = do.shape[1]
        both = do.new_empty(len(do), 2 * C, do.shape[2])  # do, and the gradient of beta times the error
        both[:, :C] = do
        de = torch.bmm(self.T.mT, du, out=both[:, C:])
        pairs, states = both @ u.mT, both @ S.mT
        dscores, dL = pairs[:, :C].tril_(), pairs[:, C:].tril_(-1).neg_()
        dread, dleft, dwrite = states[:, :C], states[:, C:].mul_(self.beta).neg_(), u @ dS.mT
        dbeta = (de * error).sum(-1, True) + (dL * self.pairs).sum(-1, True)
        dL.mul_(self.beta)
        if self.decay is not None:
            db = (dread * self.read).addcmul_(dleft, self.left)
            written = dwrite * self.write
            last = written.sum(1, True) + self.decay.mT * (S * dS).sum(2).unsqueeze(1)
            db.sub_(written)
        if self.D is not None:
            pair = (dL * self.pairs).addcmul_(dscores, self.scores)
            db, last = db.sum(-1, True) + pair.sum(2, True) - pair.sum(1).unsqueeze(2), last.sum(-1, True)
            pairs.view(-1, 2, C, C).mul_(self.D[:, None])
        rows, down = pairs @ self.down, pairs.mT @ self.rows
        dq, dk = rows[:, :C], rows[:, C:]
        if self.f is not None:
            rows.view(-1, 2, *self.f.shape[1:]).mul_(self.f[:, None])
            down.div_(self.f)
            db += self.q * dq + self.k * (dk - down)
        dk = dk + down
        if self.decay is None:
            return dq + dread, dk.add_(dwrite).add_(dleft), de * self.beta, dbeta, None
        dq, dk = torch.addcmul(dq, dread, self.e), dk.addcmul_(dwrite, self.tail).addcmul_(dleft, self.e)
        return dq, dk, de * self.beta, dbeta, db.flip(1).cumsum(1).flip(1) + last

    def walk(self, S, n):
        """The states before each of n chunks, and after the last, from S (BH, K, V): (n + 1, BH, K, V); and u."""
        out, V = S.new_empty(n + 1, *S.shape), S.shape[2]
        out[0] = S
        parts = torch.bmm(self.T, torch.cat((self.v, self.left), 2).mul_(self.beta)).unflatten(0, (n, -1))
        write = self.write.mT.unflatten(0, (n, -1))
        decay = None if self.decay is None else self.decay.unflatten(0, (n, -1))
        u = parts[..., :V].contiguous()
        for i in range(n):
            u[i].baddbmm_(parts[i][..., V:], out[i], alpha=-1)
            torch.baddbmm(out[i] if decay is None else out[i] * decay[i], write[i], u[i], out=out[i + 1])
        return out, u.flatten(0, 1)

    def walk_back(self, do, dS, n):
        """The gradients of the states after each of n chunks, and of the first one: (n + 1, BH, K, V); and of u."""
        out, w = dS.new_empty(n + 1, *dS.shape), torch.bmm(self.T, self.left * self.beta)
        out[n] = dS
        du, ds = torch.bmm(self.scores.mT, do), torch.bmm(self.read.mT, do)
        parts = [x.unflatten(0, (n, -1)) for x in (du, ds, w.mT, self.write)]
        decay = None if self.decay is None else self.decay.unflatten(0, (n, -1))
        for i in reversed(range(n)):
            dui, dsi, wi, write = (x[i] for x in parts)
            dui.baddbmm_(write, out[i + 1])
            dsi.add_(out[i + 1]) if decay is None else dsi.addcmul_(out[i + 1], decay[i])
            torch.baddbmm(dsi, wi, dui, alpha=-1, out=out[i])
        return out, du


def inverse(L):
    """(I + L)^-1 of strictly lower L (N, C, C): by substitution in blocks of 16 on the diagonal, which are then merged,
    [[T1, 0], [-T2 L21 T1, T2]]. A substitution of 64 rows takes three times as long."""
    N, C, _ = L.shape
    h = min(16, C)
    blocks = L.view(N, C // h, h, C // h, h).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(-1, h, h)
    eye = torch.eye(h, dtype=L.dtype, device=L.device).expand_as(blocks)
    T = torch.linalg.solve_triangular(blocks, eye, upper=False, unitriangular=True)
    while h < C:
        left, right = T.view(-1, 2, h, h).unbind(1)
        T = L.new_zeros(len(left), 2 * h, 2 * h)
        T[:, :h, :h], T[:, h:, h:] = left, right
        T[:, h:, :h] = -(right @ below(L, h).reshape(-1, h, h) @ left)
        h *= 2
    return T


def chunk_length(g, gate_min):
    """Tokens a chunk."""
    return CHUNK if g is None or g.dim() == 3 else channel_chunk(gate_min)


def channel_chunk(gate_min):
    """With a gate for each channel: the factors of its products stay within e^SAFE_EXPONENT."""
    return min(CHUNK, 1 << (max(1, int(2 * SAFE_EXPONENT / max(-gate_min, 1e-9))).bit_length() - 1))


def operations(T, H, K, V, gate_min=None):
    """(nominal, executed) of a sequence of T: the recurrence, and the products and triangular solves of
    `chunk_forward`, a whole last chunk included. gate_min: of a gate for each channel; None: there is none."""
    C = CHUNK if gate_min is None else channel_chunk(gate_min)
    inverse, h = C * min(16, C) ** 2, 16
    while h < C:
        inverse, h = inverse + 2 * C * h * h, 2 * h
    return 6 * K * V * H * T, H * -(-T // C) * (6 * C * K * V + C * C * (6 * K + 4 * V) + inverse)


def segments(q, C):
    """The (start, stop, chunks) of each segment."""
    B, T, H, _ = q.shape
    n = max(1, at_once(SEGMENT, q) // (B * H * C))
    return [(lo, min(T, lo + n * C), min(n, -(-(T - lo) // C))) for lo in range(0, T, n * C)]


def load(x, segment, C, dtype):
    """A segment of x (B, T, H, D) as (N, C, D), padded with zeros: tokens that write nothing and forget nothing."""
    return chunked(x, segment, C).to(dtype).flatten(0, 2)


def put(out, x, segment, C):
    """The inverse, x (N, C, D) into out (B, T, H, D)."""
    store(out, segment, C, lambda place: place.copy_(x.view(place.shape)))


def load_all(q, k, v, beta, g, scale, gate_min, segment, C):
    dtype = compute_dtype(q.dtype)
    q, k, v, beta = (load(x, segment, C, dtype) for x in (q, k, v, beta.unsqueeze(-1)))
    return q * scale, k, v, beta, None if g is None else bounded(load(by_channel(g), segment, C, dtype), gate_min)


def chunk_forward(q, k, v, beta, g, state, scale, gate_min):
    """o, the last state, and the states at the start of each chunk (chunks, B * H, K, V)."""
    C, o, kept = chunk_length(g, gate_min), v.new_empty(v.shape), []
    S = state.flatten(0, 1)
    for segment in segments(q, C):
        chunk = Chunk(*load_all(q, k, v, beta, g, scale, gate_min, segment, C))
        states, u = chunk.walk(S, segment[2])
        kept.append(states[:-1])
        S = states[-1]
        put(o, torch.bmm(chunk.scores, u).baddbmm_(chunk.read, kept[-1].flatten(0, 1)), segment, C)
    return o, S.clone().view(state.shape), torch.cat(kept)


def chunk_backward(q, k, v, beta, g, states, do, dstate, scale, gate_min):
    C, inputs = chunk_length(g, gate_min), (q, k, v, beta, g)
    grads, dS = [None if x is None else x.new_empty(x.shape) for x in inputs], dstate.flatten(0, 1)
    for segment in reversed(segments(q, C)):
        lo, _, n = segment
        here = states[lo // C : lo // C + n].flatten(0, 1)
        dos = load(do, segment, C, states.dtype)
        chunk = Chunk(*load_all(*inputs, scale, gate_min, segment, C))
        back, du = chunk.walk_back(dos, dS, n)
        dS, error = back[0], chunk.error(here)
        u = torch.bmm(chunk.T, error * chunk.beta)
        parts = chunk.gradients(here, u, error, dos, du, back[1:].flatten(0, 1))
        for grad, part, factor in zip(grads, parts, (scale, 1.0, 1.0, 1.0, 1.0)):
            if part is not None:
                put(by_channel(grad), part * factor, segment, C)
    if g is not None and gate_min is not None:
        grads[4].masked_fill_(g < gate_min, 0.0)
    return grads, dS.clone().view(dstate.shape)


# ----------------------------------------------------------------------------- Triton
#
# The rows of a chunk, with P_ij = k_i . k_j D_ij, j < i, r = v - S~^T k and u = beta r:
#
#     solve    T = (I + P diag(beta))^-1, X = T v, W = T (k e^b), so that r = X - W S    backward: P and T too
#     walk     S and u = beta r, chunk by chunk              backward: S and r; then, from the end, the gradient of r,
#                                                            du = A^T do + (k e^(B-b)) dS, and of the states
#     error    backward: the gradient of v is T^T (beta du); with it that of beta
#
# The rest is gla with u in place of v. Its `read` gives o, and A^T do. Its `grad` runs twice: for what o reads, and for
# what the errors read; there k stands for q, pairs are strict, and the gradient is that of v, negative. Gates have one
# channel (HEAD) or K. No gates are gates of 0.


@jit
def invert(b_L, C: tl.constexpr, DOT: tl.constexpr):
    """(I + L)^-1 of strictly lower L (C, C): by substitution in blocks of 16 on the diagonal, all blocks at once, which
    are then merged: in tf32 where what it multiplies is bf16, which is coarser."""
    MERGE: tl.constexpr = "tf32" if DOT == "bf16" else DOT
    o_i, o_j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    m_block = o_i // 16 == o_j // 16
    b_T = tl.where(o_i == o_j, 1.0, 0.0)
    for i in range(1, 16):
        m_i = (o_i % 16 == i) & m_block
        b_l = tl.sum(tl.where(m_i, b_L, 0.0), 0)  # (C,), what row i of the block of j has at j
        b_row = tl.sum(b_l[:, None] * b_T, 0)
        b_T = tl.where(m_i, b_T - b_row[None, :], b_T)
    h = 16
    while h < C:
        m_below = (o_i // (2 * h) == o_j // (2 * h)) & ((o_i // h) % 2 == 1) & ((o_j // h) % 2 == 0)
        b_TL = dot(b_T, tl.where(m_below, b_L, 0.0), MERGE)
        b_T -= dot(b_TL, b_T, MERGE)
        h *= 2
    return b_T


@jit
def delta_solve_kernel(
    p_q, p_k, p_v, p_beta, p_g, p_x, p_w, p_write, p_decay, p_read, p_P, p_T, T, H, K, V, scale, gate_min,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    HEAD: tl.constexpr, FACTORISED: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """What a chunk's walk needs: X (C, V), W (C, K), k e^(B-b) (C, K) and e^B (K). BACKWARD: scale q e^b, P and T
    too."""
    i_t, i_bh = split(tl.program_id(0), tl.cdiv(T, C))
    o_c = tl.arange(0, C)
    o_t = i_t * C + o_c
    m_t = o_t < T
    row = (i_bh // H).to(tl.int64) * T * H + i_bh % H
    p_q, p_k, p_w, p_write, p_read = p_q + row * K, p_k + row * K, p_w + row * K, p_write + row * K, p_read + row * K
    p_v, p_x, p_g = p_v + row * V, p_x + row * V, p_g + row * (1 if HEAD else K)
    p_decay += (i_bh.to(tl.int64) * tl.cdiv(T, C) + i_t) * K
    D = 1 if HEAD else K
    b_P = tl.zeros([C, C], tl.float32)
    for i_k in range(0, tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        o_x, m_x = o_t[:, None] * (H * K) + o_k[None, :], m_t[:, None] & (o_k < K)[None, :]
        b_k = tl.load(p_k + o_x, mask=m_x, other=0.0).to(tl.float32)  # (C, BK)
        if HEAD:
            b_P += dot(b_k, tl.trans(operand(b_k, DOT)), DOT)
        else:
            b_g = load_gates(p_g, o_x, m_x, gate_min)  # (C, BK)
            b_P, _ = add_pairs(b_P, b_k, b_k, b_g, C, BK, DOT, FACTORISED, False)
    if HEAD:
        b_P *= head_decays(load_gates(p_g, o_t * H, m_t, gate_min), C, False)
    b_P = tl.where(o_c[:, None] > o_c[None, :], b_P, 0.0)
    b_beta = tl.load(p_beta + row + o_t * H, mask=m_t, other=0.0).to(tl.float32)
    b_T = invert(b_P * b_beta[None, :], C, DOT)
    if BACKWARD:
        o_p, m_p = (row + o_t * H)[:, None] * C + o_c[None, :], m_t[:, None] & (o_c < C)[None, :]
        tl.store(p_P + o_p, b_P.to(p_P.dtype.element_ty), mask=m_p)
        tl.store(p_T + o_p, b_T.to(p_T.dtype.element_ty), mask=m_p)
    b_T = operand(b_T, DOT)
    for i_v in range(0, tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        o_y, m_y = o_t[:, None] * (H * V) + o_v[None, :], m_t[:, None] & (o_v < V)[None, :]
        b_x = dot(b_T, tl.load(p_v + o_y, mask=m_y, other=0.0), DOT)  # (C, BV)
        tl.store(p_x + o_y, b_x.to(p_x.dtype.element_ty), mask=m_y)
    for i_k in range(0, tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        o_d = tl.arange(0, 1) if HEAD else o_k  # channels of gates
        o_x, m_x = o_t[:, None] * (H * K) + o_k[None, :], m_t[:, None] & (o_k < K)[None, :]
        b_k = tl.load(p_k + o_x, mask=m_x, other=0.0).to(tl.float32)  # (C, BK)
        m_g = m_t[:, None] & (o_d < D)[None, :]
        b_g = load_gates(p_g, o_t[:, None] * (H * D) + o_d[None, :], m_g, gate_min)  # (C, BK) or (C, 1)
        b_e = tl.exp2(tl.cumsum(b_g, 0))
        tl.store(p_decay + o_k, tl.exp2(tl.sum(b_g, 0)) + 0.0 * o_k, mask=o_k < K)
        tl.store(p_w + o_x, dot(b_T, b_k * b_e, DOT).to(p_w.dtype.element_ty), mask=m_x)
        if BACKWARD:
            b_q = tl.load(p_q + o_x, mask=m_x, other=0.0).to(tl.float32) * b_e * scale  # (C, BK)
            tl.store(p_read + o_x, b_q.to(p_read.dtype.element_ty), mask=m_x)
        b_n = next_gates(p_g, o_t, o_d, T, H, D, gate_min, C)
        b_k *= tl.exp2(tl.cumsum(b_n, 0, reverse=True))
        tl.store(p_write + o_x, b_k.to(p_write.dtype.element_ty), mask=m_x)


@jit
def delta_walk_kernel(
    p_x, p_a, p_c, p_beta, p_decay, p_read, p_do, p_first, p_y, p_all, p_last, T, H, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    SCALED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """BV columns of the state walk over the chunks: r = x - a S, then S = e^B S + c^T (beta r). REVERSE:
    du = x + a dS, then dS = e^B dS - c^T (beta du) + read^T do. p_all: S on arrival at each chunk; p_y: r or du, with
    SCALED times beta."""
    i_bh = tl.program_id(0)
    o_k, o_v, o_c = tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV), tl.arange(0, C)
    m_k, m_v = o_k < K, o_v < V
    NT = tl.cdiv(T, C)
    row = (i_bh // H).to(tl.int64) * T * H + i_bh % H
    p_a, p_c, p_read, p_beta = p_a + row * K, p_c + row * K, p_read + row * K, p_beta + row
    p_x, p_y, p_do = p_x + row * V, p_y + row * V, p_do + row * V
    o_s, m_s = o_k[:, None] * V + o_v[None, :], m_k[:, None] & m_v[None, :]
    p_all += i_bh.to(tl.int64) * NT * K * V
    p_decay += i_bh.to(tl.int64) * NT * K
    b_s = tl.load(p_first + i_bh.to(tl.int64) * K * V + o_s, mask=m_s, other=0.0)
    for i in range(0, NT):
        i_t = NT - 1 - i if REVERSE else i
        tl.store(p_all + i_t * K * V + o_s, b_s.to(p_all.dtype.element_ty), mask=m_s)
        o_t = i_t * C + o_c
        m_t = o_t < T
        o_x, m_x = o_t[:, None] * (H * K) + o_k[None, :], m_t[:, None] & m_k[None, :]
        o_kt, m_kt = o_t[None, :] * (H * K) + o_k[:, None], m_t[None, :] & m_k[:, None]
        o_y, m_y = o_t[:, None] * (H * V) + o_v[None, :], m_t[:, None] & m_v[None, :]
        b_y = dot(tl.load(p_a + o_x, mask=m_x, other=0.0), b_s, DOT)  # (C, BV)
        b_x = tl.load(p_x + o_y, mask=m_y, other=0.0).to(tl.float32)  # (C, BV)
        b_y = b_x + b_y if REVERSE else b_x - b_y
        b_u = b_y * tl.load(p_beta + o_t * H, mask=m_t, other=0.0).to(tl.float32)[:, None]
        tl.store(p_y + o_y, (b_u if SCALED else b_y).to(p_y.dtype.element_ty), mask=m_y)
        b_c = tl.load(p_c + o_kt, mask=m_kt, other=0.0)  # (BK, C)
        b_s *= tl.load(p_decay + i_t * K + o_k, mask=m_k, other=0.0)[:, None]
        if REVERSE:
            b_do = tl.load(p_do + o_y, mask=m_y, other=0.0)  # (C, BV)
            b_s += dot(tl.load(p_read + o_kt, mask=m_kt, other=0.0), b_do, DOT)
            b_s -= dot(b_c, b_u, DOT)
        else:
            b_s += dot(b_c, b_u, DOT)
    tl.store(p_last + i_bh.to(tl.int64) * K * V + o_s, b_s, mask=m_s)


@jit
def delta_error_kernel(
    p_P, p_T, p_r, p_du, p_beta, p_u, p_dv, p_dbeta, T, H, V,
    C: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """u = beta r (C, V), dv = T^T (beta du) (C, V), and the gradient of beta, r . (du - P^T dv) (C)."""
    i_t, i_bh = split(tl.program_id(0), tl.cdiv(T, C))
    o_c = tl.arange(0, C)
    o_t = i_t * C + o_c
    m_t = o_t < T
    row = (i_bh // H).to(tl.int64) * T * H + i_bh % H
    p_r, p_du, p_u, p_dv = p_r + row * V, p_du + row * V, p_u + row * V, p_dv + row * V
    o_p, m_p = (row + o_t * H)[None, :] * C + o_c[:, None], m_t[None, :] & (o_c < C)[:, None]
    b_TT, b_PT = tl.load(p_T + o_p, mask=m_p, other=0.0), tl.load(p_P + o_p, mask=m_p, other=0.0)  # (C, C)
    b_beta = tl.load(p_beta + row + o_t * H, mask=m_t, other=0.0).to(tl.float32)[:, None]
    b_dbeta = tl.zeros([C], tl.float32)
    for i_v in range(0, tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        o_y, m_y = o_t[:, None] * (H * V) + o_v[None, :], m_t[:, None] & (o_v < V)[None, :]
        b_r = tl.load(p_r + o_y, mask=m_y, other=0.0).to(tl.float32)  # (C, BV)
        b_du = tl.load(p_du + o_y, mask=m_y, other=0.0).to(tl.float32)  # (C, BV)
        b_dv = dot(b_TT, b_beta * b_du, DOT)
        b_dbeta += tl.sum(b_r * (b_du - dot(b_PT, b_dv, DOT)), 1)
        tl.store(p_u + o_y, (b_beta * b_r).to(p_u.dtype.element_ty), mask=m_y)
        tl.store(p_dv + o_y, b_dv.to(p_dv.dtype.element_ty), mask=m_y)
    tl.store(p_dbeta + row + o_t * H, b_dbeta.to(p_dbeta.dtype.element_ty), mask=m_t)


WALK = (32, 8, 1), (32, 4, 1), (64, 8, 1), (16, 4, 2), (16, 4, 1)
KERNELS = {
    "solve": Kernel(
        delta_solve_kernel,
        configurations(G.COLUMNS, (32, 64, 8, 1), (64, 64, 8, 1), (32, 32, 4, 1), (64, 64, 4, 1)),
        G.TILES,
        dict(BK=32, BV=32, num_warps=8, num_stages=1),
        serial="16 + (2 K + V) / BK",
    ),
    "walk": Kernel(
        delta_walk_kernel,
        configurations("BV num_warps num_stages", (32, 8, 2), *WALK),
        dict(BV="V"),
        dict(BV=16, num_warps=4, num_stages=1),
        serial="T / 64",
    ),
    "walk back": Kernel(
        delta_walk_kernel,
        configurations("BV num_warps num_stages", *WALK),
        dict(BV="V"),
        dict(BV=16, num_warps=8, num_stages=1),
        serial="T / 64",
    ),
    "error": Kernel(
        delta_error_kernel,
        configurations("BV num_warps num_stages", (64, 4, 1), (64, 8, 1), (32, 4, 1), (32, 4, 2)),
        dict(BV="V"),
        dict(BV=32, num_warps=8, num_stages=1),
        serial="V / BV",
    ),
}


def solve_launch(q, k, v, beta, g, scale, gate_min, backward):
    """X, W, k e^(B-b), e^B (B, H, chunks, K), and for the backward pass scale q e^b, P and T (B, T, H, C)."""
    (B, T, H, K), V, chunks = q.shape, v.shape[3], triton.cdiv(q.shape[1], G.CHUNK)
    x, w, write = (torch.empty_like(x) for x in (v, k, k))
    decay = k.new_empty(B, H, chunks, K, dtype=torch.float32)
    read, P, inverse = (q.new_empty(B, T, H, n if backward else 0) for n in (K, G.CHUNK, G.CHUNK))
    args = q, k, v, beta, g, x, w, write, decay, read, P, inverse, T, H
    flags = dict(scale=scale, gate_min=G.floor(gate_min), C=G.CHUNK, DOT=dot_type(q.dtype), BACKWARD=backward)
    flags |= dict(HEAD=G.is_head(g), FACTORISED=G.is_factorised(gate_min))
    KERNELS["solve"].launch(lambda meta: (chunks * B * H,), *args, K=K, V=V, **flags)
    return x, w, write, decay, read, P, inverse


def walk_launch(x, a, c, beta, decay, first, dtype, read=None, do=None, scaled=False):
    """r or beta r, the states (B, H, chunks, K, V) and the last one; with `read` and `do` backward in time."""
    (B, T, H, K), V, reverse = a.shape, x.shape[3], do is not None
    y, last = torch.empty_like(x), torch.empty_like(first)
    states = x.new_empty(B, H, decay.shape[2], K, V, dtype=dtype)
    args = x, a, c, beta, decay, read if reverse else a, do if reverse else x, first, y, states, last, T, H
    flags = dict(C=G.CHUNK, BK=power(K), DOT=dot_type(a.dtype), SCALED=scaled, REVERSE=reverse)
    KERNELS["walk back" if reverse else "walk"].launch(
        lambda meta: (B * H, triton.cdiv(V, meta["BV"])), *args, K=K, V=V, **flags
    )
    return y, states, last


def dense(q, k, v, beta, g, state, *more):
    """What the kernels read: gates (B, T, H, K or 1), zeros where there are none."""
    g = torch.zeros_like(beta, dtype=torch.float32) if g is None else g
    return *G.dense(q, k, v), beta.contiguous(), by_channel(g).contiguous(), state.contiguous(), *G.dense(*more)


def delta_fwd(q, k, v, beta, g, state, scale, gate_min):
    """o and the last state, in three launches."""
    dtype = v.dtype
    q, k, v, beta, g, state = dense(q, k, v, beta, g, state)
    x, w, write, decay, *_ = solve_launch(q, k, v, beta, g, scale, gate_min, False)
    u, states, last = walk_launch(x, w, write, beta, decay, state, q.dtype, scaled=True)
    return G.read_launch(q, k, u, g, states, scale, gate_min)[0].to(dtype), last


def delta_bwd(q, k, v, beta, g, state, do, dstate, scale, gate_min):
    """The gradients of the inputs, in seven launches."""
    inputs = q, k, v, beta, g
    q, k, v, beta, g, state, do = dense(q, k, v, beta, g, state, do)
    x, w, write, decay, read, P, T = solve_launch(q, k, v, beta, g, scale, gate_min, True)
    r, states, _ = walk_launch(x, w, write, beta, decay, state, torch.float32)
    x, _ = G.read_launch(k, q, do, g, None, scale, gate_min, True)
    du, dstates, first = walk_launch(x, write, w, beta, decay, dstate.contiguous(), torch.float32, read, do)
    u, dv, dbeta = torch.empty_like(v), torch.empty_like(v), torch.empty_like(beta)
    (B, chunks, H), V = (q.shape[0], decay.shape[2], q.shape[2]), v.shape[3]
    args = P, T, r, du, beta, u, dv, dbeta, q.shape[1], H
    KERNELS["error"].launch(lambda meta: (chunks * B * H,), *args, V=V, C=G.CHUNK, DOT=dot_type(q.dtype))
    dq, dk, dg = G.grad_launch(q, k, u, g, do, states, dstates, scale, gate_min)
    left, right, more = G.grad_launch(k, k, u, g, dv, states, None, -1.0, gate_min)
    grads = dq, dk.float() + left + right, dv, dbeta, dg + more
    return [None if x is None else grad.view(x.shape).to(x.dtype) for grad, x in zip(grads, inputs)], first


def aot_specs():
    """(name, kernel, signature, constants) of every kernel and configuration, for the report. Default first."""
    head, channel = dict(HEAD=True, FACTORISED=False), dict(HEAD=False, FACTORISED=True)
    forms = {
        "solve": [("", head), (" channel", channel), (" tree", channel | dict(FACTORISED=False))],
        "walk": [("", dict(SCALED=True, REVERSE=False))],
        "walk back": [("", dict(SCALED=False, REVERSE=True))],
        "error": [("", {})],
    }
    specs = []
    for name, kernel in KERNELS.items():
        for form, flags in forms[name]:
            for width in (64, 128):
                for i, option in enumerate(kernel.options(dict(K=width, V=width))):
                    constants = dict(C=G.CHUNK, DOT="bf16", **flags, **option)
                    constants |= dict(BK=width) if "walk" in name else {"solve": dict(BACKWARD=True)}.get(name, {})
                    wide = {"p_beta", "p_g", "p_decay", "p_first", "p_last", "p_dbeta"}
                    wide |= {"p_all"} if flags.get("REVERSE") else set()
                    names = kernel.function.arg_names
                    signature = {x: "*fp32" if x in wide else "*bf16" for x in names if x[:2] == "p_"}
                    signature |= dict.fromkeys("TH", "i32") | dict.fromkeys("KV", "i32:16")
                    signature |= dict.fromkeys(("scale", "gate_min"), "fp32")
                    specs.append((f"delta_{name}{form} {width} #{i}", kernel.function, signature, constants))
    return specs


# ----------------------------------------------------------------------------- op


@operator(
    "delta",
    "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor state, float scale, float? gate_min, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)
def delta_op(q, k, v, beta, g, state, scale, gate_min, backend):
    if backend == "triton":
        return *delta_fwd(q, k, v, beta, g, state, scale, gate_min), state.new_empty(0)
    return chunk_forward(q, k, v, beta, g, state, scale, gate_min)


@delta_op.register_fake
def _(q, k, v, beta, g, state, scale, gate_min, backend):
    chunks = -(-q.shape[1] // chunk_length(g, gate_min))
    kept = (0,) if backend == "triton" else (chunks, q.shape[0] * q.shape[2], *state.shape[2:])
    return v.new_empty(v.shape), state.new_empty(state.shape), state.new_empty(kept)


@operator(
    "delta_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor states, Tensor do, Tensor dstate, float scale,"
    " float? gate_min, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def delta_backward_op(q, k, v, beta, g, states, do, dstate, scale, gate_min, backend):
    """states: those at the chunks' starts, or for Triton the first one."""
    backward = delta_bwd if backend == "triton" else chunk_backward
    grads, dstate = backward(q, k, v, beta, g, states, do, dstate, scale, gate_min)
    return *(q.new_empty(0) if x is None else x for x in grads), dstate


@delta_backward_op.register_fake
def _(q, k, v, beta, g, states, do, dstate, scale, gate_min, backend):
    grads = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, beta, g))
    return *grads, dstate.new_empty(dstate.shape)


def setup_context(ctx, inputs, output):
    *tensors, state, ctx.scale, ctx.gate_min, ctx.backend = inputs
    ctx.save_for_backward(*tensors, state if ctx.backend == "triton" else output[2])


def backward(ctx, do, dstate, _):
    q, k, v, beta, g, states = ctx.saved_tensors
    do = v.new_zeros(v.shape) if do is None else do
    shape = q.shape[0], q.shape[2], *states.shape[2:]
    dstate = states.new_zeros(shape) if dstate is None else dstate
    args = q, k, v, beta, g, states, do, dstate, ctx.scale, ctx.gate_min, ctx.backend
    *grads, dstate = delta_backward_op(*args)
    return *grads[:4], None if g is None else grads[4], dstate, None, None, None


delta_op.register_autograd(backward, setup_context=setup_context)


# ----------------------------------------------------------------------------- public


def delta(
    q, k, v, beta, g=None, scale=None, gate_min=None, initial_state=None, output_final_state=False, backend="auto"
):  # fmt: skip
    """The gated delta rule. Returns o (B, T, H, V), and the final state (B, H, K, V) if asked for, else None.

    q, k (B, T, H, K)   v (B, T, H, V)   beta (B, T, H) how much of the error is written   g: None, (B, T, H) or
    (B, T, H, K), log-decay <= 0   initial_state (B, H, K, V).  Keys of norm 1 and beta in (0, 2) keep the state
    bounded.  scale: K^-1/2 unless given.  gate_min: g is clamped there, with no gradient below; with a gate for each
    channel the PyTorch form takes shorter chunks the lower it is, and without one it is the loop over time.
    backend: auto | triton | torch | recurrent.  States are fp32, fp64 for fp64 inputs.
    """
    check_inputs(q, k, v, beta, g, gate_min, initial_state, backend)
    (B, _, H, K), V = q.shape, v.shape[3]
    q, k, v = in_autocast(q, k, v)  # beta, gates and states keep their precision
    scale = K**-0.5 if scale is None else float(scale)
    in_a_step = in_steps(backend, q, initial_state, output_final_state)
    if not in_a_step:
        backend = choose("delta", backend, q, G.too_wide(K, V))
    if in_a_step or (backend == "torch" and g is not None and g.dim() == 4 and gate_min is None):
        with leave_autocast(q):
            o, state = delta_recurrent(q, k, v, beta, g, scale, gate_min, initial_state)
    else:
        dtype = compute_dtype(q.dtype)
        state = q.new_zeros(B, H, K, V, dtype=dtype) if initial_state is None else initial_state.to(dtype)
        o, state, _ = delta_op(q, k, v, beta, g, state, scale, gate_min, backend)
    return o, state if output_final_state else None


def check_inputs(q, k, v, beta, g, gate_min, initial_state, backend):
    check("delta", q, k, v, backend, "auto", "triton", "torch", "recurrent")
    B, _, H, K = q.shape
    if beta.shape != q.shape[:3]:
        raise ValueError(f"delta: beta must be {tuple(q.shape[:3])}, got {tuple(beta.shape)}")
    if g is not None and g.shape not in (q.shape, q.shape[:3]):
        raise ValueError(f"delta: g must be {tuple(q.shape[:3])} or {tuple(q.shape)}, got {tuple(g.shape)}")
    if gate_min is not None and gate_min > 0:
        raise ValueError(f"delta: gate_min must be at most 0 or None, got {gate_min}")
    if initial_state is not None and initial_state.shape != (B, H, K, v.shape[3]):
        shape = tuple(initial_state.shape)
        raise ValueError(f"delta: initial_state must be {(B, H, K, v.shape[3])}, got {shape}")


def case(gate, q, k, v, **_):
    """What is timed: keys of norm 1, and mild gates of a head, of its channels or none."""
    (B, T, H, K), V = q.shape, v.shape[3]
    q, k = (F.normalize(x.detach(), dim=-1).requires_grad_() for x in (q, k))
    beta = torch.rand(B, T, H, device=q.device).requires_grad_()
    shape = {"none": None, "head": (B, T, H), "channel": (B, T, H, K)}[gate]
    g = [(F.logsigmoid(torch.randn(shape, device=q.device)) / 16).requires_grad_()] if shape else []
    low = -1.25 if gate == "channel" else None
    call = functools.partial(corrected_output, gate_min=low)
    executed = B * operations(T, H, K, V, low)[1]
    return {f"delta_{gate}": Case(call, [q, k, v, beta, *g], functools.partial(call, backend="recurrent"), executed)}


def corrected_output(*inputs, **options):
    return delta(*inputs, **options)[0]


CASES = {f"delta_{gate}": functools.partial(case, gate) for gate in ("none", "head", "channel")}
