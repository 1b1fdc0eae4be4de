"""The gated delta rule (arXiv 2406.06484, 2412.06464, 2510.26692): states that are corrected, not just added to.

    S~_t = diag(e^{g_t}) S_{t-1}        u_t = beta_t (v_t - S~_t^T k_t)
    S_t = S~_t + k_t u_t^T              o_t = scale * S_t^T q_t

`delta` is the public function; g is nothing (DeltaNet), a number for each head (Gated DeltaNet) or for each channel
(Kimi delta attention). Two forms of the same equations: `recurrent`, a loop over time; `torch`, chunks of tokens in
matrix products. Axes: B batch, T time, H heads, K key width, V value width, C tokens a chunk, N = chunks * B * H.
"""

import functools

import torch

from . import check, in_autocast, leave_autocast, operator
from .gla import SAFE_EXPONENT, chunked, compute_dtype, store

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
        u = beta[:, t, :, None, None] * (v[:, t, :, None, :] - kt @ state)  # (B, H, 1, V)
        state = state + kt.mT @ u
        out.append(q[:, t, :, None, :] @ state)
    return torch.cat(out, 2).transpose(1, 2).to(out_dtype), state


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
# (I + L)^-1 is the same for all columns, so U = X - W S with X and W of the chunk alone: all chunks of a segment at
# once. What is left is a walk over the states, two products a chunk. The backward pass keeps the states at the chunks'
# starts, walks back over their gradients, and computes the rest of all chunks at once again.


class Chunk:
    """What N chunks need beside their state. q, k (N, C, K), v (N, C, V), beta (N, C, 1), g (N, C, K), (N, C, 1) or
    None; q is scaled. A gate for each channel is split at the chunk's middle, e^(b_i - m) e^(m - b_j)."""

    def __init__(self, q, k, v, beta, g):
        self.q, self.k, self.v, self.beta, self.D, self.decay, self.f = q, k, v, beta, None, None, None
        self.read, self.write, self.left, up, down, self.upq = q, k, k, k, k, q
        if g is not None:
            b = g.cumsum(1)
            self.e, self.decay = b.exp(), b[:, -1:].mT.exp()
            if g.shape[2] == 1:  # each D a sum of its own gates: a strong one costs its neighbours no digits
                self.D = g.expand(-1, -1, g.shape[1]).tril(-1).cumsum(1).exp()  # (N, C, C), 1 above the diagonal
                self.tail = self.D[:, -1, :, None]
            else:
                self.f, self.tail = (b - b[:, (b.shape[1] - 1) // 2, None]).exp(), (b[:, -1:] - b).exp()
                up, down, self.upq = k * self.f, k / self.f, q * self.f
            self.read, self.write, self.left = q * self.e, k * self.tail, k * self.e
        self.up, self.down = up, down
        self.pairs, self.scores = (up @ down.mT).tril(-1), (self.upq @ down.mT).tril()
        if self.D is not None:
            self.pairs, self.scores = self.pairs * self.D, self.scores * self.D
        self.L = self.pairs * beta

    def solve(self, x):
        """(I + L)^-1 x."""
        return torch.linalg.solve_triangular(self.L, x, upper=False, unitriangular=True)

    @functools.cached_property
    def w(self):
        return self.solve(self.left * self.beta)

    def error(self, S):
        """v - left S, which beta times is solved for."""
        return torch.baddbmm(self.v, self.left, S, alpha=-1)

    def output(self, S):
        """o (N, C, V), from S (N, K, V) before the chunks."""
        return torch.baddbmm(self.scores @ self.solve(self.error(S) * self.beta), self.read, S)

    def gradients(self, S, do, dS):
        """Of q, k, v, beta and g, from the states before the chunks and the gradients of those after them."""
        error = self.error(S)
        u = self.solve(error * self.beta)
        du = torch.baddbmm(self.scores.mT @ do, self.write, dS)
        de = torch.linalg.solve_triangular(self.L.mT, du, upper=True, unitriangular=True)
        dL = (de @ u.mT).tril_(-1).neg_()
        dbeta = (de * error).sum(-1, True) + (dL * self.pairs).sum(-1, True)
        de = de * self.beta
        dpairs, dscores = dL * self.beta, (do @ u.mT).tril_()
        dread, dwrite, dleft = do @ S.mT, u @ dS.mT, (de @ S.mT).neg_()
        if self.decay is None:
            dq = torch.baddbmm(dread, dscores, self.k)
            dk = (dwrite + dleft).baddbmm_(dscores.mT, self.q).baddbmm_(dpairs + dpairs.mT, self.k)
            return dq, dk, de, dbeta, None
        db = dread * self.read + dleft * self.left - dwrite * self.write
        last = (dwrite * self.write).sum(1, True) + self.decay.mT * (S * dS).sum(2).unsqueeze(1)
        if self.D is not None:
            pair = dpairs * self.pairs + dscores * self.scores
            db = db.sum(-1, True) + pair.sum(2, True) - pair.sum(1).unsqueeze(2)
            last = last.sum(-1, True)
            dpairs, dscores = dpairs * self.D, dscores * self.D
        dq, up = dscores @ self.down, dpairs @ self.down
        down = torch.baddbmm(dscores.mT @ self.upq, dpairs.mT, self.up)
        if self.f is not None:
            dq, up, down = dq * self.f, up * self.f, down / self.f
            db = db + self.q * dq + self.k * (up - down)
        dk = up + down + dwrite * self.tail + dleft * self.e
        return dq + dread * self.e, dk, de, dbeta, db.flip(1).cumsum(1).flip(1) + last

    def walk(self, S, n):
        """The states before each of n chunks, and after the last, from S (BH, K, V): (n + 1, BH, K, V)."""
        out = S.new_empty(n + 1, *S.shape)
        out[0] = S
        parts = [x.unflatten(0, (n, -1)) for x in (self.solve(self.v * self.beta), self.w, self.write)]
        decay = None if self.decay is None else self.decay.unflatten(0, (n, -1))
        for i, (x, w, write) in enumerate(zip(*parts)):
            u = torch.baddbmm(x, w, out[i], alpha=-1)
            torch.baddbmm(out[i] if decay is None else out[i] * decay[i], write.mT, u, out=out[i + 1])
        return out

    def walk_back(self, do, dS, n):
        """The gradients of the states after each of n chunks, and of the first one: (n + 1, BH, K, V)."""
        out = dS.new_empty(n + 1, *dS.shape)
        out[n] = dS
        parts = [x.unflatten(0, (n, -1)) for x in (self.scores.mT @ do, self.read.mT @ do, self.w, self.write)]
        decay = None if self.decay is None else self.decay.unflatten(0, (n, -1))
        for i in reversed(range(n)):
            du, ds, w, write = (x[i] for x in parts)
            du = torch.baddbmm(du, write, out[i + 1])
            ds = ds + (out[i + 1] if decay is None else out[i + 1] * decay[i])
            torch.baddbmm(ds, w.mT, du, alpha=-1, out=out[i])
        return out


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
    return 6 * K * V * H * T, H * -(-T // C) * (8 * C * K * V + C * C * (5 * K + 4 * V))


def segments(q, C):
    """The (start, stop, chunks) of each segment."""
    B, T, H, _ = q.shape
    n = max(1, SEGMENT // (B * H * C))
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
        states = chunk.walk(S, segment[2])
        kept.append(states[:-1])
        S = states[-1]
        put(o, chunk.output(states[:-1].flatten(0, 1)), segment, C)
    return o, S.clone().view(state.shape), torch.cat(kept)


def chunk_backward(q, k, v, beta, g, states, do, dstate, scale, gate_min):
    C, inputs = chunk_length(g, gate_min), (q, k, v, beta, g)
    grads, dS = [None if x is None else x.new_empty(x.shape) for x in inputs], dstate.flatten(0, 1)
    for segment in reversed(segments(q, C)):
        lo, _, n = segment
        here = states[lo // C : lo // C + n].flatten(0, 1)
        dos = load(do, segment, C, states.dtype)
        chunk = Chunk(*load_all(*inputs, scale, gate_min, segment, C))
        back = chunk.walk_back(dos, dS, n)
        dS = back[0]
        parts = chunk.gradients(here, dos, back[1:].flatten(0, 1))
        for grad, part, factor in zip(grads, parts, (scale, 1.0, 1.0, 1.0, 1.0)):
            if part is not None:
                put(by_channel(grad), part * factor, segment, C)
    if g is not None and gate_min is not None:
        grads[4].masked_fill_(g < gate_min, 0.0)
    return grads, dS.clone().view(dstate.shape)


# ----------------------------------------------------------------------------- op


@operator(
    "delta",
    "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor state, float scale, float? gate_min)"
    " -> (Tensor, Tensor, Tensor)",
)
def delta_op(q, k, v, beta, g, state, scale, gate_min):
    return chunk_forward(q, k, v, beta, g, state, scale, gate_min)


@delta_op.register_fake
def _(q, k, v, beta, g, state, scale, gate_min):
    chunks = -(-q.shape[1] // chunk_length(g, gate_min))
    kept = state.new_empty(chunks, q.shape[0] * q.shape[2], *state.shape[2:])
    return v.new_empty(v.shape), state.new_empty(state.shape), kept


@operator(
    "delta_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor states, Tensor do, Tensor dstate, float scale,"
    " float? gate_min) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def delta_backward_op(q, k, v, beta, g, states, do, dstate, scale, gate_min):
    grads, dstate = chunk_backward(q, k, v, beta, g, states, do, dstate, scale, gate_min)
    return *(q.new_empty(0) if x is None else x for x in grads), dstate


@delta_backward_op.register_fake
def _(q, k, v, beta, g, states, do, dstate, scale, gate_min):
    grads = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, beta, g))
    return *grads, dstate.new_empty(dstate.shape)


def setup_context(ctx, inputs, output):
    *tensors, _, ctx.scale, ctx.gate_min = inputs
    ctx.save_for_backward(*tensors, output[2])


def backward(ctx, do, dstate, _):
    q, k, v, beta, g, states = ctx.saved_tensors
    do = v.new_zeros(v.shape) if do is None else do
    shape = q.shape[0], q.shape[2], *states.shape[2:]
    dstate = states.new_zeros(shape) if dstate is None else dstate
    *grads, dstate = delta_backward_op(q, k, v, beta, g, states, do, dstate, ctx.scale, ctx.gate_min)
    return *grads[:4], None if g is None else grads[4], dstate, None, None


delta_op.register_autograd(backward, setup_context=setup_context)


# ----------------------------------------------------------------------------- public


def delta(
    q, k, v, beta, g=None, scale=None, gate_min=None, initial_state=None, output_final_state=False, backend="auto"
):  # fmt: skip
    """The gated delta rule. Returns o (B, T, H, V), and the final state (B, H, K, V) if asked for, else None.

    q, k (B, T, H, K)   v (B, T, H, V)   beta (B, T, H) how much of the error is written   g: None, (B, T, H) or
    (B, T, H, K), log-decay <= 0   initial_state (B, H, K, V).  Keys of norm 1 and beta in (0, 2) keep the state
    bounded.  scale: K^-1/2 unless given.  gate_min: g is clamped there, with no gradient below; the chunked form of a
    gate for each channel needs one, and takes shorter chunks the lower it is; without one the loop over time runs.
    backend: auto | torch | recurrent.  States are fp32, fp64 for fp64 inputs.
    """
    check_inputs(q, k, v, beta, g, gate_min, initial_state, backend)
    (B, _, H, K), V = q.shape, v.shape[3]
    q, k, v = in_autocast(q, k, v)  # beta, gates and states keep their precision
    scale = K**-0.5 if scale is None else float(scale)
    if backend == "recurrent" or (g is not None and g.dim() == 4 and gate_min is None):
        with leave_autocast(q):
            o, state = delta_recurrent(q, k, v, beta, g, scale, gate_min, initial_state)
    else:
        dtype = compute_dtype(q.dtype)
        state = q.new_zeros(B, H, K, V, dtype=dtype) if initial_state is None else initial_state.to(dtype)
        o, state, _ = delta_op(q, k, v, beta, g, state, scale, gate_min)
    return o, state if output_final_state else None


def check_inputs(q, k, v, beta, g, gate_min, initial_state, backend):
    check("delta", q, k, v, backend, "auto", "torch", "recurrent")
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
