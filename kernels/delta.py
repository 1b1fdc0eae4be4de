"""The gated delta rule (arXiv 2406.06484, 2412.06464, 2510.26692): states that are corrected, not just added to.

    S~_t = diag(e^{g_t}) S_{t-1}        u_t = beta_t (v_t - S~_t^T k_t)
    S_t = S~_t + k_t u_t^T              o_t = scale * S_t^T q_t

`delta` is the public function; g is nothing (DeltaNet), a number for each head (Gated DeltaNet) or for each channel
(Kimi delta attention). Two forms of the same equations: `recurrent`, a loop over time; `torch`, chunks of tokens in
matrix products. Axes: B batch, T time, H heads, K key width, V value width, C tokens a chunk, N = chunks * B * H.
"""

import functools

import torch
import torch.nn.functional as F

from . import Case, check, in_autocast, leave_autocast, operator
from .gla import SAFE_EXPONENT, chunked, compute_dtype, gate_sums, pair_decays, store
from .gsa import below

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
