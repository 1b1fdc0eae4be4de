"""Gated linear attention (arXiv 2312.06635): one decaying K x V matrix per head in place of a cache.

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T        (K, V)        o_t = scale * S_t^T q_t

`gla` is the public function. Three forms of the same equations: `recurrent`, a loop over time; `torch`, chunks of
tokens in matrix products (the CPU path); `triton`. Axes: B batch, T time, H heads, K key width, V value width, C tokens
a chunk, n chunks in a segment, N = n * B * H. Inside a chunk b is the cumulative sum of g, up to and with the token.
"""

import functools
import math

import torch
import torch.nn.functional as F

from . import Case, at_once, check, in_autocast, in_steps, jit, leave_autocast, like_inputs, operator, tl, triton
from .launch import Kernel, choose, configurations, dot, dot_type, multiprocessors, operand, product_type, split

CHUNK = 64  # tokens a chunk, in every backend
SEGMENT = 4096  # token-heads that the chunked form works on at a time, so that its tensors stay in cache
SEGMENT_LOW = 16384  # the same for bf16 inputs, whose products gain more from being many at a time
SAFE_EXPONENT = 40.0  # the factorised form may multiply by e^x for |x| up to this


def compute_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def joined(outputs, dim):
    """torch.cat, without a copy of what is one already."""
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim)


# ----------------------------------------------------------------------------- oracle


def gla_recurrent(q, k, v, g=None, scale=None, gate_min=None, initial_state=None):
    """Token by token, in fp64 for fp64 inputs and fp32 otherwise. Differentiable; also the decoding step."""
    B, T, H, K = q.shape
    dtype, out_dtype = compute_dtype(q.dtype), v.dtype
    q, k, v = q.to(dtype) * (K**-0.5 if scale is None else scale), k.to(dtype), v.to(dtype)
    if g is not None:
        decay = (g.to(dtype) if gate_min is None else g.to(dtype).clamp(min=gate_min)).exp()
    state = q.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    out = []
    for t in range(T):
        product = k[:, t, :, :, None], v[:, t, :, None, :]  # (B, H, K, V)
        state = torch.addcmul(state, *product) if g is None else (state * decay[:, t, :, :, None]).addcmul_(*product)
        out.append(row_product(q[:, t, :, None, :], state))  # (B, H, 1, V)
    return joined(out, 2).transpose(1, 2).to(out_dtype), state


def row_product(x, S):
    """x S for rows x (B, H, 1, K). A compiler fuses a sum with what makes S; a matrix product would stand alone."""
    return (x.mT * S).sum(-2, keepdim=True) if torch.compiler.is_compiling() else x @ S


# ----------------------------------------------------------------------------- chunked PyTorch
#
# Time is cut into chunks of C tokens and chunks into segments that stay in cache. Per segment, everything but the
# recurrence of the state is a batched product over all its chunks:
#
#     o  = scale * ((q e^b) S + A v)          A_ij = sum_d q_id k_jd e^(b_id - b_jd),  j <= i
#     S' = e^B S + (k e^(B-b))^T v            B = b at the last token
#
# Bounded gates make A one product (`Factorised`), others one product per level of a binary tree (`Tree`). The states at
# the start of each chunk are kept; the backward recomputes the rest.


class Workspace:
    """Tensors that every segment asks for in the same order and that the next segment overwrites.

    Fresh memory costs more than arithmetic here: each page of it is a fault. `like` has the type of sums and states,
    `low` is that of the operands of products and of what they give: bf16 where the processor multiplies it natively.
    """

    def __init__(self, like, inputs=None):
        self.like, self.blocks, self.taken = like, [], 0
        self.low = product_type(inputs, like.dtype)

    def __call__(self, *shape, dtype=None):
        dtype, i = dtype or self.like.dtype, self.taken
        bytes = math.prod(shape) * dtype.itemsize
        if i == len(self.blocks):
            self.blocks.append(self.like.new_empty(bytes, dtype=torch.uint8))
        elif self.blocks[i].numel() < bytes:
            self.blocks[i] = self.like.new_empty(bytes, dtype=torch.uint8)
        self.taken += 1
        return self.blocks[i][:bytes].view(dtype).view(shape)

    def operand(self, x):
        """x in the type of operands."""
        return x if x.dtype == self.low else self(*x.shape, dtype=self.low).copy_(x)

    def full(self, x):
        """x in the type of sums."""
        return x if x.dtype == self.like.dtype else self(*x.shape).copy_(x)

    def bmm(self, a, b, out=None):
        """a b in the type of a and b, or in that of `out`."""
        if out is None or out.dtype != a.dtype:
            low = torch.bmm(a, b, out=self(a.shape[0], a.shape[1], b.shape[2], dtype=a.dtype))
            return low if out is None else out.copy_(low)
        return torch.bmm(a, b, out=out)

    def square(self, x):
        """An (N, C, C) for x (N, C, D), its matrices one spare row apart, which is what `below` needs."""
        N, C, _ = x.shape
        return self(N, C + 1, C)[:, :C]


class Factorised:
    """A = (q e^(b-m)) (k e^(m-b))^T, m = b in the middle of the chunk. Needs C/2 * |g| <= SAFE_EXPONENT.

    The state moves to the same footing: it is read as e^m S, and k e^(m-b) writes it up to a factor e^(B-m). One gate
    may serve all channels, g (N, C, 1).
    """

    def __init__(self, q, k, g, new):
        self.new = new
        C = g.shape[1]
        b = torch.cumsum(g, 1, out=new(*g.shape))
        self.decay = b[:, -1].exp()  # (N, K)
        mid = b[:, C // 2 - 1 : C // 2].clone()  # (N, 1, K)
        self.e = b.sub_(mid).exp_()  # (N, C, K)
        e = self.e.view(*q.shape[:-1], -1)  # (n, B, H, C, K or 1)
        self.sharp = [f(x, e, out=new(*x.shape)).flatten(0, 2) for f, x in ((torch.mul, q), (torch.div, k))]
        self.q, self.k = (new.operand(x) for x in self.sharp)
        self.read, self.write = mid.exp_().mT, self.e[:, -1, :, None]  # (N, K, 1)

    def scores(self):
        return self.new.bmm(self.q, self.k.mT).tril_()

    def dq(self, dA, base):
        """base is dq without its decay, from the state; adds the strictly earlier keys. In place."""
        return self.new.full(base).baddbmm_(dA, self.sharp[1]).mul_(self.e)

    def dk(self, dA, base):
        return self.new.full(base).baddbmm_(dA.mT, self.sharp[0]).div_(self.e)


class Tree:
    """The pair (i, j) is scored in the smallest aligned block that holds both: i in its right half, j in its left.

    The decay between them is a product of two local products, both at most 1: of e^g over the right half up to i, and
    over the left half after j. Products in place of sums of g: a gate of -50 costs its neighbours no digits.
    """

    read = write = None

    def __init__(self, q, k, g, new):
        N, C, K = g.shape
        self.new, self.levels = new, []
        self.decay = g.sum(1).exp_()  # a product of e^g near 1 would round one way, chunk after chunk
        self.alpha = g.exp_()
        q_, k_ = torch.mul(q, self.alpha.view(q.shape), out=new(*q.shape)).view_as(g), new(*g.shape)
        k_.view(k.shape).copy_(k)
        self.A = new.square(g).zero_()
        self.A.diagonal(dim1=1, dim2=2).copy_(torch.mul(q, k, out=new(*q.shape)).sum(-1).view(N, C))
        total, h = self.alpha, 1  # the decay over each block of h
        while h < C:  # q is decayed from its block's first token, k to its block's last
            left, right = total.view(-1, 2, 1, K).unbind(1)
            ql, kl = q_.view(-1, 2, h, K)[:, 1], k_.view(-1, 2, h, K)[:, 0]
            kept = [new(*x.shape).copy_(x) for x in (ql, kl)]
            below(self.A, h).copy_(small_bmm_t(*kept, new))
            self.levels.append((h, left, right, *kept))
            ql.mul_(left)
            kl.mul_(right)
            total = torch.mul(left, right, out=new(*left.shape))
            h *= 2
        self.q, self.k = new.operand(q_), new.operand(k_)

    def scores(self):
        return self.new.operand(self.A)

    def dq(self, dA, base):
        """From the whole chunk down to single tokens: what came in carries the decay of the left half besides."""
        base = self.new.full(base)
        for h, left, _, _, kl in reversed(self.levels):
            half = base.view(-1, 2, h, base.shape[-1])[:, 1]
            torch.addcmul(small_bmm(below(dA, h), kl, self.new), half, left, out=half)
        return base.mul_(self.alpha)

    def dk(self, dA, base):
        base = self.new.full(base)
        for h, _, right, ql, _ in reversed(self.levels):
            half = base.view(-1, 2, h, base.shape[-1])[:, 0]
            torch.addcmul(small_bmm(below(dA, h).mT, ql, self.new), half, right, out=half)
        return base


class Scalar:
    """One gate for all channels of a head, g (N, C, 1), of any strength: A = (q k^T) * L, L_ij = e^(b_i - b_j), the
    dual form of Mamba-2 (arXiv 2405.21060, section 6)."""

    read = write = None

    def __init__(self, q, k, g, new):
        self.new, (N, C, _) = new, g.shape
        self.sharp = [x.flatten(0, 2) if x.is_contiguous() else new(*x.shape).copy_(x).flatten(0, 2) for x in (q, k)]
        b = gate_sums(g)  # (N, C, 1)
        self.decay, self.L = b[:, -1].to(g.dtype).exp(), pair_decays(b, new(N, C, C))
        self.factors = [x.to(g.dtype).exp() for x in (b, b[:, -1:] - b)]  # of reading and writing the state (N, C, 1)
        self.q, self.k = (new.operand(torch.mul(x, f, out=new(*x.shape))) for x, f in zip(self.sharp, self.factors))

    def scores(self):
        A = self.new.bmm(*(self.new.operand(x) if i == 0 else self.new.operand(x).mT for i, x in enumerate(self.sharp)))
        return self.new.operand(self.new.full(A).mul_(self.L))

    def dq(self, dA, base):
        """dA is strictly lower."""
        return self.new.full(base).mul_(self.factors[0]).baddbmm_(dA.mul_(self.L), self.sharp[1])

    def dk(self, dA, base):
        return self.new.full(base).mul_(self.factors[1]).baddbmm_(dA.mT, self.sharp[0])  # dA has its decay from dq


def gate_sums(g):
    """Sums of gates g (N, C, 1) in fp64: a gate of -50 must cost its neighbours no digits. One of -inf becomes finite:
    e^-10000 is 0 too, and two such sums have a difference."""
    return g.clamp(min=-1e4).cumsum(1, dtype=torch.float64)


def pair_decays(b, out):
    """e^(b_i - b_j) for j <= i, else 0, into out (N, C, C), for sums of gates b (N, C, 1) in fp64. The differences are
    taken in the type of out, in two parts: that is faster."""
    high = b.to(out.dtype)
    low, C = (b - high).to(out.dtype), b.shape[1]
    later = torch.ones(C, C, dtype=torch.bool, device=b.device).triu_(1)
    return torch.sub(high, high.mT, out=out).add_(low).sub_(low.mT).masked_fill_(later, -math.inf).exp_()


def small_bmm_t(a, b, new):
    """a b^T for a, b (n, h, K). Matrix products of one or two rows are slower than elementwise work."""
    n, h, K = a.shape
    if h > 2:
        return new.bmm(new.operand(a), new.operand(b).mT)
    return torch.mul(a.unsqueeze(2), b.unsqueeze(1), out=new(n, h, h, K)).sum(-1)


def small_bmm(a, b, new):
    """a b for a (n, h, h), b (n, h, K)."""
    h = a.shape[1]
    if h > 2:
        return new.bmm(a, b)
    out = torch.mul(a[:, :, :1], b[:, :1], out=new(*b.shape))
    return out if h == 1 else out.addcmul_(a[:, :, 1:], b[:, 1:])


def below(A, h):
    """The h x h blocks of A left of the diagonal inside its diagonal blocks of 2h: (N * C / 2h, h, h)."""
    N, C, _ = A.shape
    return A.as_strided((N * C // (2 * h), h, h), (2 * h * (C + 1), C, 1), A.storage_offset() + h * C)


def is_factorised(gate_min, chunk=CHUNK):
    return gate_min is not None and -gate_min * chunk / 2 <= SAFE_EXPONENT


def blocking(q, chunk):
    """Batch rows handled together, and chunks in a segment of them."""
    (B, _, H, _), size = q.shape, at_once(SEGMENT_LOW if q.dtype == torch.bfloat16 else SEGMENT, q)
    rows = min(B, max(1, size // (H * chunk)))
    return rows, max(1, size // (rows * H * chunk))


def row_groups(q, chunk):
    rows, _ = blocking(q, chunk)
    return [slice(b, b + rows) for b in range(0, q.shape[0], rows)]


def segments(q, chunk):
    """The (start, stop, chunks) of each segment."""
    T, (_, n) = q.shape[1], blocking(q, chunk)
    return [(lo, min(T, lo + n * chunk), min(n, -(-(T - lo) // chunk))) for lo in range(0, T, n * chunk)]


def chunked(x, segment, chunk):
    """A segment of x (B, T, H, D) as (n, B, H, C, D): a view, or a copy padded with zeros where the last is ragged."""
    lo, hi, n = segment
    x = x[:, lo:hi]
    if hi - lo < n * chunk:
        x = F.pad(x, (0, 0, 0, 0, 0, n * chunk - (hi - lo)))
    return x.unflatten(1, (n, chunk)).permute(1, 0, 3, 2, 4)


def load(x, segment, chunk, new):
    """The same side by side, as operands: (N, C, D)."""
    x = chunked(x, segment, chunk)
    return new(*x.shape, dtype=new.low).copy_(x).flatten(0, 2)


def store(out, segment, chunk, write):
    """Calls write(place), place (n, B, H, C, D) being the segment of out (B, T, H, D), or a stand-in with padding."""
    lo, hi, n = segment
    if hi - lo == n * chunk:
        write(chunked(out, segment, chunk))
        return
    B, _, H, D = out.shape
    padded = out.new_empty(B, n * chunk, H, D)
    write(chunked(padded, (0, n * chunk, n), chunk))
    out[:, lo:hi].copy_(padded[:, : hi - lo])


def operations(T, H, K, V, gate_min, scalar=False):
    """(nominal, executed) of a sequence of T: the recurrence, and the matrix products that `chunk_forward` runs, a
    whole last chunk included. Elementwise work is not counted, nor the levels of one and two tokens of a tree.
    scalar: one gate a head."""
    C, whole = CHUNK, scalar or is_factorised(gate_min)
    scores = 2 * C * C * K if whole else C * (C - 4) * K  # C h K at each level of h = 4 ... C / 2
    return 4 * K * V * H * T, H * -(-T // C) * (4 * C * K * V + scores + 2 * C * C * V)


def prepare(q, k, g, segment, chunk, gate_min, new):
    """q, k, g (n, B, H, C, K), and the form of their products."""
    q, k, g = new.full(chunked(q, segment, chunk)), new.full(chunked(k, segment, chunk)), chunked(g, segment, chunk)
    gates = new(*g.shape)
    if gate_min is None:
        gates.copy_(g)
    else:
        torch.clamp(g.to(gates.dtype), min=gate_min, out=gates)
    scalar = g.shape[-1] < q.shape[-1]
    form = Factorised if is_factorised(gate_min, chunk) else Scalar if scalar else Tree
    return q, k, g, form(q, k, gates.flatten(0, 2), new)


def scaled(x, factor):
    return x if factor is None else x.mul_(factor)


def scan(x, decay, carry, out, reverse=False):
    """States handed from chunk to chunk: out[0] = carry, out[i+1] = decay[i] out[i] + x[i]. The last one into carry.

    x, out (N, K, V), decay (N, K) or (N, 1), carry (B, H, K, V)
    """
    shape = carry.shape
    x, decay = x.view(-1, *shape).unbind(), decay.view(-1, *shape[:2], decay.shape[1], 1).unbind()
    y = out.view(-1, *shape).unbind()
    order = range(len(x) - 1, -1, -1) if reverse else range(len(x))
    y[order[0]].copy_(carry)
    for i, j in zip(order, order[1:]):
        torch.addcmul(x[i], y[i], decay[i], out=y[j])
    i = order[-1]
    torch.addcmul(x[i], y[i], decay[i], out=carry)
    return out


def pieces(q, chunk):
    """What is worked on at a time: batch rows, segment, and the places of its N states among all of them."""
    todo, start = [], 0
    for rows in row_groups(q, chunk):
        for segment in segments(q, chunk):
            size = len(range(*rows.indices(q.shape[0]))) * q.shape[2] * segment[2]
            todo.append((rows, segment, slice(start, start + size)))
            start += size
    return todo


def chunk_forward(q, k, v, g, state, scale, gate_min, chunk=CHUNK):
    """o (B, T, H, V), the last state (B, H, K, V), and those at the start of each chunk (B * H * T / C, K, V)."""
    o, state, new = v.new_empty(v.shape), state.clone(), Workspace(state, q.dtype)
    states = state.new_empty(states_kept(q, state, "torch", chunk))
    for rows, segment, here in pieces(q, chunk):
        xs = q[rows], k[rows], v[rows], g[rows], o[rows]
        forward_segment(*xs, state[rows], states[here], segment, scale, gate_min, chunk, new)
    return o, state, states


def forward_segment(q, k, v, g, o, state, states, segment, scale, gate_min, chunk, new):
    """Writes the segment of o and its states; state becomes the one after it."""
    new.taken = 0
    _, _, _, form = prepare(q, k, g, segment, chunk, gate_min, new)
    v = load(v, segment, chunk, new)
    x = scaled(new.full(new.bmm(form.k.mT, v)), form.write)
    S = scan(x, form.decay, state, states)
    if form.read is not None:
        S = torch.mul(S, form.read, out=x)
    out = new(*v.shape, dtype=v.dtype)
    torch.baddbmm(out, form.q, new.operand(S), beta=0, alpha=scale, out=out)
    out.baddbmm_(form.scores(), v, alpha=scale)
    store(o, segment, chunk, lambda place: place.copy_(out.view(place.shape)))


def chunk_backward(q, k, v, g, states, do, dstate, scale, gate_min, chunk=CHUNK):
    """Gradients of q, k, v, g and the initial state. dstate: gradient of the last state."""
    new, dstate = Workspace(states, q.dtype), dstate.clone()
    grads = [x.new_empty(x.shape) for x in (q, k, v, g)]
    for rows, segment, here in reversed(pieces(q, chunk)):
        xs = [x[rows] for x in (q, k, v, g, do, *grads)]
        backward_segment(*xs, states[here], dstate[rows], segment, scale, gate_min, chunk, new)
    return *grads, dstate


def backward_segment(q, k, v, g, do, dq, dk, dv, dg, S, dstate, segment, scale, gate_min, chunk, new):
    """Writes the segment of dq, dk, dv, dg; dstate becomes the gradient of the state before it."""
    new.taken = 0
    q, k, g, form = prepare(q, k, g, segment, chunk, gate_min, new)
    v, do = load(v, segment, chunk, new), load(do, segment, chunk, new).mul_(scale)
    x = scaled(new.full(new.bmm(form.q.mT, do)), form.read)
    dS = scan(x, form.decay, dstate, new(*x.shape), reverse=True)
    first = decay_gradient(S, dS, dstate, out=x)
    first = first if g.shape[-1] == first.shape[-1] else first.sum(-1, keepdim=True)
    if form.read is not None:
        S, dS = torch.mul(S, form.read, out=x), dS.mul_(form.write)
    S, dS = new.operand(S), new.operand(dS)
    dA = new.bmm(do, v.mT, out=new.square(v))
    own = dA.diagonal(dim1=1, dim2=2).clone().view(*q.shape[:-1], 1)  # a token's pair with itself, which has no decay
    dA.tril_(-1)
    dvs = new.bmm(form.k, dS).baddbmm_(form.scores().mT, do)
    store(dv, segment, chunk, lambda place: place.copy_(dvs.view(place.shape)))
    dqs, dks = form.dq(dA, new.bmm(do, S.mT)).view(q.shape), form.dk(dA, new.bmm(v, dS.mT)).view(k.shape)
    dgs = gate_gradient(q, k, dqs, dks, first, new)
    store(dg, segment, chunk, lambda place: where_open(dgs, g, gate_min, place))
    store(dq, segment, chunk, lambda place: torch.addcmul(dqs, k, own, out=place))
    store(dk, segment, chunk, lambda place: torch.addcmul(dks, q, own, out=place))


def where_open(dg, g, gate_min, place):
    """dg into its place, without gradient where the gate was clamped."""
    if gate_min is not None:  # the gradient of a threshold just below it: one pass, four times as fast as a mask
        below = torch.nextafter(*torch.tensor([gate_min, -math.inf], dtype=dg.dtype)).item()
        torch.ops.aten.threshold_backward.grad_input(dg, g.to(dg.dtype), below, grad_input=place)
    else:
        place.copy_(dg)


def decay_gradient(S, dS, dstate, out):
    """sum_v S dS (N, K) at the start of each chunk. The gradient there is what the chunk before it received."""
    first, N = dstate.flatten(0, 1), dstate.shape[0] * dstate.shape[1]
    torch.mul(S[:N], first, out=out[:N])
    torch.mul(S[N:], dS[:-N], out=out[N:])
    return out.sum(-1)


def gate_gradient(q, k, dq, dk, first, new):
    """dg (n, B, H, C, K), as a sum of products that never cancel, however strong the gates.

    The first token's is that of the decay of the incoming state; each token adds k dk - q dq to the next one's. The
    pair of a token with itself would enter k dk and q dq alike: it is left out of both.
    """
    if first.shape[-1] < q.shape[-1]:  # one gate for all channels
        each = torch.mul(k, dk, out=new(*q.shape)).addcmul_(q, dq, value=-1).sum(-1, keepdim=True)
        return torch.cat((first.view_as(each[..., :1, :]), each[..., :-1, :]), -2).cumsum(-2)
    out = new(*q.shape)
    later = out[..., 1:, :]
    torch.mul(k[..., :-1, :], dk[..., :-1, :], out=later).addcmul_(q[..., :-1, :], dq[..., :-1, :], value=-1)
    out[..., 0, :] = first.view(out[..., 0, :].shape)
    return torch.cumsum(out, -2, out=new(*q.shape))


# ----------------------------------------------------------------------------- Triton
#
# Five kernels, nine launches, and two more for a scan that walks over groups of chunks. Time runs both ways: what S, q
# and v are to the forward, dS, k and do are to dv.
#
#     weigh    k with its decay, and the sums of gates: what the scan adds up
#     scan     S at the start of each chunk, the last state          backward: the same S, in fp32
#              REVERSE: dS at the end of each chunk, the first one's gradient
#     start    S at the start of each group of chunks
#     read     o from q, k, v, S                                     REVERSE: dv from k, q, do, dS
#     grad     dq, dk, dg
#
# Performer attention runs scan and read too: without gates (GATED), with a normaliser z (NORMALISED).
# Gates are loaded in log2 units; their sums inside a chunk are taken where they are used. Only the scan, which alone is
# serial, finds them done.

LOG2E = tl.constexpr(math.log2(math.e)) if triton else None


@jit
def load_gates(p_g, o_g, m_g, gate_min):
    return tl.maximum(tl.load(p_g + o_g, mask=m_g, other=0.0).to(tl.float32), gate_min) * LOG2E


@jit
def pick_row(b_x, row, C: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, C) == row)[:, None], b_x, 0.0), 0)


@jit
def double_sums(b_r, b_l, h, C: tl.constexpr, BK: tl.constexpr):
    """From blocks of h to blocks of 2h. b_r: gates from the block's start to the row; b_l: after the row to its end.

    Both only ever add what belongs to them: the left half's total is b_r at its last row, the right half's likewise.
    """
    o_c = tl.arange(0, C)
    left, right = (o_c // h) * h - 1, (o_c // h) * h + 2 * h - 1
    m_r = (o_c // h) % 2 == 1
    b_last = tl.gather(b_r, tl.broadcast_to(tl.where(m_r, left, right)[:, None], (C, BK)), 0)
    return b_r + tl.where(m_r[:, None], b_last, 0.0), b_l + tl.where(m_r[:, None], 0.0, b_last)


@jit
def tree_level(b_r, b_l, h, C: tl.constexpr):
    """Decays from the middle of a block of 2h to the rows of its right half, and from those of its left half to the
    middle, zero elsewhere (C, BK); and which pairs of rows share a block (C, C)."""
    o_c = tl.arange(0, C)
    m_r, m_same = ((o_c // h) % 2 == 1)[:, None], (o_c // (2 * h))[:, None] == (o_c // (2 * h))[None, :]
    b_e = tl.exp2(tl.where(m_r, b_r, b_l))
    return tl.where(m_r, b_e, 0.0), tl.where(m_r, 0.0, b_e), m_same


@jit
def add_pairs(
    b_A, b_x, b_y, b_g, C: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
    FACTORISED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """A (C, C) plus sum_d x_id y_jd e^(b_i - b_j) for j <= i, with REVERSE e^(b_j - b_i) for i <= j; what stands beyond
    the diagonal is not defined. And the sums of gates up to the row (C, BK), with REVERSE those after it."""
    if FACTORISED:
        b_b = tl.cumsum(b_g, 0)
        b_m = pick_row(b_b, C // 2 - 1, C)[None, :]
        b_e = b_m - b_b if REVERSE else b_b - b_m
        b_A += dot(b_x * tl.exp2(b_e), tl.trans(operand(b_y * tl.exp2(-b_e), DOT)), DOT)
        b_r, b_l = b_b, tl.sum(b_g, 0)[None, :] - b_b
    else:
        o_c = tl.arange(0, C)
        b_A += tl.where(o_c[:, None] == o_c[None, :], tl.sum(b_x * b_y, 1)[:, None], 0.0)
        b_r, b_l = b_g, tl.zeros([C, BK], tl.float32)
        h = 1  # a loop of its own: unrolled, all levels want their registers at once
        while h < C:
            b_er, b_el, m_same = tree_level(b_r, b_l, h, C)
            if REVERSE:
                b_xe, b_ye = b_x * b_el, b_y * b_er
            else:
                b_xe, b_ye = b_x * b_er, b_y * b_el
            b_p = dot(b_xe, tl.trans(operand(b_ye, DOT)), DOT)
            b_A += tl.where(m_same, b_p, 0.0)
            b_r, b_l = double_sums(b_r, b_l, h, C, BK)
            h *= 2
    return b_A, b_l if REVERSE else b_r


@jit
def head_decays(b_g, C: tl.constexpr, REVERSE: tl.constexpr):
    """e^(b_i - b_j) for j <= i, with REVERSE e^(b_j - b_i) for i <= j, 0 elsewhere (C, C), from gates of a head (C,).
    Each sum is of its own gates: a difference of sums would lose digits to a strong gate before them."""
    o_i, o_j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if REVERSE:
        return tl.where(o_j >= o_i, tl.exp2(tl.cumsum(tl.where(o_j > o_i, b_g[None, :], 0.0), 1)), 0.0)
    return tl.where(o_i >= o_j, tl.exp2(tl.cumsum(tl.where(o_i > o_j, b_g[:, None], 0.0), 0)), 0.0)


@jit
def next_gates(p_g, o_t, o_d, T, H, D, gate_min, C: tl.constexpr):
    """The gate of the token after each, 0 for the last of a chunk (C, D): summed from the end, the decay after it."""
    m_n = ((o_t + 1) % C != 0) & (o_t + 1 < T)
    return load_gates(p_g, (o_t + 1)[:, None] * (H * D) + o_d[None, :], m_n[:, None] & (o_d < D)[None, :], gate_min)


@jit
def first_of(i_bh, T, S, H, D):
    """Where the head's first token stands in (B, T, H, D) with S numbers a token."""
    return (i_bh // H).to(tl.int64) * T * S + i_bh % H * D


@jit
def gla_weigh_kernel(
    p_x, p_g, p_w, p_total, SX, T, H, K, scale, gate_min,
    C: tl.constexpr, BK: tl.constexpr, HEAD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What a scan adds up, one (C, BK) tile: x times the decay after it, up to the chunk's end; with REVERSE times that
    from the chunk's start up to it. And the sums of the chunk's gates. So nothing is summed in the scan's loop."""
    i_k, i = split(tl.program_id(0), tl.cdiv(K, BK))
    i_t, i_bh = split(i, tl.cdiv(T, C))
    o_c, o_k = tl.arange(0, C), i_k * BK + tl.arange(0, BK)
    o_t = i_t * C + o_c
    o_d = tl.arange(0, 1) if HEAD else o_k  # channels of gates
    D = 1 if HEAD else K
    m_x, m_g = (o_t < T)[:, None] & (o_k < K)[None, :], (o_t < T)[:, None] & (o_d < D)[None, :]
    p_g += first_of(i_bh, T, H * D, H, D)
    b_g = load_gates(p_g, o_t[:, None] * (H * D) + o_d[None, :], m_g, gate_min)  # (C, BK) or (C, 1)
    if REVERSE:
        b_e = tl.cumsum(b_g, 0)
    else:
        b_e = tl.cumsum(next_gates(p_g, o_t, o_d, T, H, D, gate_min, C), 0, reverse=True)
    b_x = tl.load(p_x + first_of(i_bh, T, SX, H, K) + o_t[:, None] * SX + o_k[None, :], mask=m_x, other=0.0)
    b_x = b_x.to(tl.float32) * tl.exp2(b_e) * scale
    o_w = first_of(i_bh, T, H * K, H, K) + o_t[:, None] * (H * K) + o_k[None, :]
    tl.store(p_w + o_w, b_x.to(p_w.dtype.element_ty), mask=m_x)
    chunk = i_bh.to(tl.int64) * tl.cdiv(T, C) + i_t
    tl.store(p_total + chunk * D + o_d, tl.sum(b_g, 0), mask=(o_d < D) & (i_k == 0 if HEAD else True))


@jit
def gla_scan_kernel(
    p_x, p_y, p_total, p_first, p_all, p_last, SX, SY, T, H, L, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    GATED: tl.constexpr, HEAD: tl.constexpr, REVERSE: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """One (BK, BV) tile of the state walks over the up to L chunks of a group. FINAL: it starts from p_first, and what
    it is on arrival at each chunk is written to p_all. Otherwise it starts from 0, only its last is kept, and p_all
    takes the sums of the group's gates. GATED: it decays by the chunk's gates, HEAD: which have one channel."""
    NT = tl.cdiv(T, C)
    i_g, i_bh = split(tl.program_id(0), tl.cdiv(NT, L))
    o_k, o_v = tl.program_id(1) * BK + tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
    o_c = tl.arange(0, C)
    m_k, m_v = o_k < K, o_v < V
    o_d = tl.arange(0, 1) if HEAD else o_k  # channels of gates
    D = 1 if HEAD else K
    p_x, p_y = p_x + first_of(i_bh, T, SX, H, K), p_y + first_of(i_bh, T, SY, H, V)
    p_total += i_bh.to(tl.int64) * NT * D
    o_s, m_s = o_k[:, None] * V + o_v[None, :], m_k[:, None] & m_v[None, :]
    group, b_sum = tl.program_id(0).to(tl.int64), tl.zeros([1 if HEAD else BK], tl.float32)
    p_all += group * D if not FINAL else i_bh.to(tl.int64) * NT * K * V
    b_s = tl.load(p_first + group * K * V + o_s, mask=m_s, other=0.0) if FINAL else tl.zeros([BK, BV], tl.float32)
    for i in range(i_g * L, tl.minimum(NT, (i_g + 1) * L)):
        i_t = NT - 1 - i if REVERSE else i
        if FINAL:
            tl.store(p_all + i_t.to(tl.int64) * K * V + o_s, b_s.to(p_all.dtype.element_ty), mask=m_s)
        o_t = i_t * C + o_c
        m_kt = m_k[:, None] & (o_t < T)[None, :]
        b_x = tl.load(p_x + o_t[None, :] * SX + o_k[:, None], mask=m_kt, other=0.0)  # (BK, C)
        m_y = (o_t < T)[:, None] & m_v[None, :]
        b_y = tl.load(p_y + o_t[:, None] * SY + o_v[None, :], mask=m_y, other=0.0)  # (C, BV)
        if GATED:
            b_g = tl.load(p_total + i_t * D + o_d, mask=o_d < D, other=0.0)
            b_s *= tl.exp2(b_g)[:, None]
            b_sum += b_g
        b_s += dot(b_x, b_y, DOT)
    tl.store(p_last + group * K * V + o_s, b_s, mask=m_s)
    if GATED and not FINAL:
        tl.store(p_all + o_d, b_sum, mask=(o_d < D) & (tl.program_id(2) == 0))


@jit
def gla_start_kernel(
    p_last, p_sum, p_first, p_start, L, K, V, SK, SV,
    BK: tl.constexpr, BV: tl.constexpr, GATED: tl.constexpr, HEAD: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """What each of L groups starts with, one (BK, BV) tile: p_first, or 0 without FIRST, then the decay of the group
    before, e to its sum of gates, times what that started with, plus what it ended with from 0."""
    i_bh = tl.program_id(0).to(tl.int64)
    o_k, o_v = tl.program_id(1) * BK + tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
    o_d = tl.arange(0, 1) if HEAD else o_k  # channels of gates
    D = 1 if HEAD else K
    o_s, m_s = o_k[:, None] * SK + o_v[None, :] * SV, (o_k < K)[:, None] & (o_v < V)[None, :]
    b_s = tl.zeros([BK, BV], tl.float32)
    if FIRST:
        b_s += tl.load(p_first + i_bh * K * V + o_s, mask=m_s, other=0.0)
    for i in range(0, L):
        group = i_bh * L + i
        tl.store(p_start + group * K * V + o_s, b_s, mask=m_s)
        if GATED:
            b_s *= tl.exp2(tl.load(p_sum + group * D + o_d, mask=o_d < D, other=0.0))[:, None]
        b_s += tl.load(p_last + group * K * V + o_s, mask=m_s, other=0.0)


@jit
def gla_read_kernel(
    p_x, p_y, p_w, p_g, p_s, p_o, p_z, p_inverse, SX, SW, T, H, K, V, scale, gate_min, tiny,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    GATED: tl.constexpr, HEAD: tl.constexpr, FACTORISED: tl.constexpr, STATES: tl.constexpr,
    NORMALISED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """o = scale * (x e^b S + tril(A) w), one (C, BV) tile. REVERSE: dv = k e^(B-b) dS + scale * triu(A^T) do.
    STATES: there are any. NORMALISED: o over x z + A 1, whose inverse is kept."""
    i_v, i = split(tl.program_id(0), tl.cdiv(V, BV))
    i_t, i_bh = split(i, tl.cdiv(T, C))
    o_c, o_v = tl.arange(0, C), i_v * BV + tl.arange(0, BV)
    o_t = i_t * C + o_c
    m_t, m_v = o_t < T, o_v < V
    row = (i_bh // H).to(tl.int64) * T * H + i_bh % H
    p_x, p_y = p_x + first_of(i_bh, T, SX, H, K), p_y + first_of(i_bh, T, SX, H, K)
    p_g += row * (1 if HEAD else K)
    chunk = i_bh.to(tl.int64) * tl.cdiv(T, C) + i_t
    p_s += chunk * K * V
    b_A = tl.zeros([C, C], tl.float32)
    b_o = tl.zeros([C, BV], tl.float32)
    b_z = tl.zeros([C], tl.float32)
    for i_k in range(0, tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        o_x, m_x = o_t[:, None] * SX + o_k[None, :], m_t[:, None] & (o_k < K)[None, :]
        b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)  # (C, BK)
        b_y = tl.load(p_y + o_x, mask=m_x, other=0.0).to(tl.float32)  # (C, BK)
        if NORMALISED:
            b_z += tl.sum(b_x * tl.load(p_z + chunk * K + o_k, mask=o_k < K, other=0.0)[None, :], 1)
        if STATES:
            m_s = (o_k < K)[:, None] & m_v[None, :]
            b_s = tl.load(p_s + o_k[:, None] * V + o_v[None, :], mask=m_s, other=0.0)  # (BK, BV)
        if GATED and not HEAD:
            b_g = load_gates(p_g, o_t[:, None] * (H * K) + o_k[None, :], m_x, gate_min)  # (C, BK)
            b_A, b_e = add_pairs(b_A, b_x, b_y, b_g, C, BK, DOT, FACTORISED, REVERSE)
            b_x *= tl.exp2(b_e)
        else:
            b_A += dot(b_x, tl.trans(operand(b_y, DOT)), DOT)
        if STATES:
            b_o += dot(b_x, b_s, DOT)
    if HEAD:
        b_g = load_gates(p_g, o_t * H, m_t, gate_min)  # (C,)
        b_A *= head_decays(b_g, C, REVERSE)
        if STATES:
            if REVERSE:
                b_g = load_gates(p_g, o_t * H + H, (o_c + 1 < C) & (o_t + 1 < T), gate_min)
            b_o *= tl.exp2(tl.cumsum(b_g, 0, reverse=REVERSE))[:, None]
    else:
        b_A = tl.where(o_c[:, None] <= o_c[None, :] if REVERSE else o_c[:, None] >= o_c[None, :], b_A, 0.0)
    m_o, o_o = m_t[:, None] & m_v[None, :], o_t[:, None] * (H * V) + o_v[None, :]
    p_w += first_of(i_bh, T, SW, H, V)
    b_w = tl.load(p_w + o_t[:, None] * SW + o_v[None, :], mask=m_o, other=0.0)  # (C, BV)
    if not REVERSE:  # dS carries the scale already
        b_o *= scale
    b_o += dot(b_A * scale, b_w, DOT)
    if NORMALISED:
        b_z = 1 / tl.maximum(b_z + tl.sum(b_A, 1), tiny)
        b_o *= b_z[:, None]
        tl.store(p_inverse + row + o_t * H, b_z, mask=m_t & (i_v == 0))
    tl.store(p_o + row * V + o_o, b_o.to(p_o.dtype.element_ty), mask=m_o)


@jit
def gla_grad_kernel(
    p_q, p_k, p_v, p_g, p_do, p_s, p_ds, p_dq, p_dk, p_dg, SQ, SV, T, H, K, V, scale, gate_min,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    HEAD: tl.constexpr, FACTORISED: tl.constexpr, STRICT: tl.constexpr,
):  # fmt: skip
    """dq, dk, dg of one (C, BK) tile. A token's pair with itself stays apart: the gate gradient must not see it.
    STRICT: there is no such pair, and nothing after the chunk. HEAD: dg is of all channels of the tile."""
    i_k, i = split(tl.program_id(0), tl.cdiv(K, BK))
    i_t, i_bh = split(i, tl.cdiv(T, C))
    o_c, o_k = tl.arange(0, C), i_k * BK + tl.arange(0, BK)
    o_t = i_t * C + o_c
    m_t, m_k = o_t < T, o_k < K
    row = (i_bh // H).to(tl.int64) * T * H + i_bh % H
    o_d = tl.arange(0, 1) if HEAD else o_k  # channels of gates
    D = 1 if HEAD else K
    p_q, p_k = p_q + first_of(i_bh, T, SQ, H, K), p_k + first_of(i_bh, T, SQ, H, K)
    p_v, p_do, p_g = p_v + first_of(i_bh, T, SV, H, V), p_do + row * V, p_g + row * D
    state = (i_bh.to(tl.int64) * tl.cdiv(T, C) + i_t) * K * V
    b_dA, b_dAT = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    b_dq, b_dk = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    b_own, b_first = tl.zeros([C], tl.float32), tl.zeros([BK], tl.float32)
    for i_v in range(0, tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        m_y = m_t[:, None] & (o_v < V)[None, :]
        b_v = tl.load(p_v + o_t[:, None] * SV + o_v[None, :], mask=m_y, other=0.0)  # (C, BV)
        b_do = tl.load(p_do + o_t[:, None] * (H * V) + o_v[None, :], mask=m_y, other=0.0)  # (C, BV)
        o_s, m_s = state + o_k[None, :] * V + o_v[:, None], m_k[None, :] & (o_v < V)[:, None]
        b_s = tl.load(p_s + o_s, mask=m_s, other=0.0)  # (BV, BK)
        b_dA += dot(b_do, tl.trans(b_v), DOT)
        b_dAT += dot(b_v, tl.trans(b_do), DOT)
        b_dq += dot(b_do, b_s, DOT)
        if not STRICT:
            b_ds = tl.load(p_ds + o_s, mask=m_s, other=0.0)  # (BV, BK)
            b_first += tl.sum(b_s * b_ds, 0)
            b_own += tl.sum(b_v.to(tl.float32) * b_do.to(tl.float32), 1)
            b_dk += dot(b_v, b_ds, DOT)
    if HEAD:
        b_h = load_gates(p_g, o_t * H, m_t, gate_min)  # (C,)
        b_dA *= head_decays(b_h, C, False)
        b_dAT *= head_decays(b_h, C, True)
    b_pairs = operand(tl.where(o_c[:, None] > o_c[None, :], b_dA * scale, 0.0), DOT)  # (i, j), i > j
    b_pairsT = operand(tl.where(o_c[:, None] < o_c[None, :], b_dAT * scale, 0.0), DOT)  # (j, i)
    o_x, m_x = row * K + o_t[:, None] * (H * K) + o_k[None, :], m_t[:, None] & m_k[None, :]
    o_q = o_t[:, None] * SQ + o_k[None, :]
    b_q = tl.load(p_q + o_q, mask=m_x, other=0.0).to(tl.float32)  # (C, BK)
    b_k = tl.load(p_k + o_q, mask=m_x, other=0.0).to(tl.float32)  # (C, BK)
    o_g, m_g = o_t[:, None] * (H * D) + o_d[None, :], m_t[:, None] & (o_d < D)[None, :]
    b_g = load_gates(p_g, o_g, m_g, gate_min)  # (C, BK) or (C, 1)
    b_b = tl.cumsum(b_g, 0)
    b_total = tl.sum(b_g, 0)
    b_dq *= tl.exp2(b_b) * scale
    b_first = b_first * tl.exp2(b_total) + tl.sum(b_q * b_dq, 0)  # sum_v S dS at the chunk's start
    if HEAD:
        b_dq += dot(b_pairs, b_k, DOT)
        b_n = next_gates(p_g, o_t, o_d, T, H, D, gate_min, C)
        b_dk = b_dk * tl.exp2(tl.cumsum(b_n, 0, reverse=True)) + dot(b_pairsT, b_q, DOT)
    elif FACTORISED:
        b_m = pick_row(b_b, C // 2 - 1, C)[None, :]
        b_e, b_i = tl.exp2(b_b - b_m), tl.exp2(b_m - b_b)
        b_dq += b_e * dot(b_pairs, b_k * b_i, DOT)
        b_dk *= tl.exp2(b_total[None, :] - b_m)
        b_dk = b_i * (b_dk + dot(b_pairsT, b_q * b_e, DOT))
    else:
        b_n = next_gates(p_g, o_t, o_d, T, H, D, gate_min, C)
        b_dk *= tl.exp2(tl.cumsum(b_n, 0, reverse=True))
        b_r, b_l = b_g, tl.zeros([C, BK], tl.float32)
        h = 1
        while h < C:
            b_er, b_el, m_same = tree_level(b_r, b_l, h, C)
            b_p = tl.where(m_same, b_pairs, 0.0)
            b_dq += b_er * dot(b_p, b_k * b_el, DOT)
            b_p = tl.where(m_same, b_pairsT, 0.0)
            b_dk += b_el * dot(b_p, b_q * b_er, DOT)
            b_r, b_l = double_sums(b_r, b_l, h, C, BK)
            h *= 2
    b_z = tl.where(((o_c + 1 < C) & (o_t + 1 < T))[:, None], b_k * b_dk - b_q * b_dq, 0.0)  # dg_{t+1} - dg_t
    b_dg = b_first[None, :] + tl.cumsum(b_z, 0) - b_z
    m_min = tl.load(p_g + o_g, mask=m_g, other=0.0).to(tl.float32) >= gate_min
    b_dg = tl.where(m_min, b_dg, 0.0)
    if HEAD:  # one column for each tile
        tl.store(p_dg + (row + o_t * H) * tl.cdiv(K, 16) + i_k, tl.sum(b_dg, 1), mask=m_t)
    else:
        tl.store(p_dg + row * K + o_g, b_dg.to(p_dg.dtype.element_ty), mask=m_g)
    b_own = (b_own * scale)[:, None]
    tl.store(p_dq + o_x, (b_dq + b_own * b_k).to(p_dq.dtype.element_ty), mask=m_x)
    tl.store(p_dk + o_x, (b_dk + b_own * b_q).to(p_dk.dtype.element_ty), mask=m_x)


TILES = dict(BK="K", BV="V")
COLUMNS = "BK BV num_warps num_stages"
KERNELS = {
    "weigh": Kernel(
        gla_weigh_kernel, configurations("BK num_warps num_stages", (64, 4, 1), (32, 4, 1), (128, 8, 1)), dict(BK="K")
    ),
    "scan": Kernel(
        gla_scan_kernel,
        configurations(
            COLUMNS, (64, 64, 8, 2), (64, 64, 4, 1), (64, 32, 4, 2), (32, 64, 4, 2), (32, 32, 2, 3), (128, 64, 8, 2)
        ),
        TILES,
        dict(BK=32, BV=64, num_warps=8, num_stages=1),
        serial="T / 64",
    ),
    "start": Kernel(gla_start_kernel, configurations(COLUMNS, (32, 32, 4, 1)), TILES, serial="G"),
    "read": Kernel(
        gla_read_kernel,
        configurations(
            COLUMNS, (32, 64, 4, 1), (64, 64, 8, 1), (32, 64, 4, 2), (64, 128, 8, 1), (32, 32, 4, 2), (32, 128, 8, 2)
        ),
        TILES,
        dict(BK=16, BV=32, num_warps=4, num_stages=1),
        serial="K / BK",
    ),
    "read tree": Kernel(
        gla_read_kernel,
        configurations(COLUMNS, (32, 64, 8, 1), (32, 32, 4, 2), (64, 64, 8, 1), (32, 64, 4, 1)),
        TILES,
        dict(BK=16, BV=32, num_warps=4, num_stages=1),
        serial="K / BK",
    ),
    "grad": Kernel(
        gla_grad_kernel,
        configurations(
            COLUMNS, (32, 32, 8, 1), (32, 64, 8, 1), (64, 32, 8, 1), (64, 64, 8, 1), (32, 32, 4, 1), (32, 64, 8, 2)
        ),
        TILES,
        dict(BK=16, BV=16, num_warps=8, num_stages=1),
        serial="V / BV",
        zeroed=["p_dg"],
    ),
    "grad tree": Kernel(
        gla_grad_kernel,
        configurations(COLUMNS, (16, 32, 8, 1), (32, 32, 8, 1), (16, 32, 4, 1), (32, 64, 8, 1)),
        TILES,
        dict(BK=16, BV=16, num_warps=8, num_stages=1),
        serial="V / BV",
        zeroed=["p_dg"],
    ),
}
MAX_WIDTH = 256  # of heads


def scan_launch(x, y, g, first, dtype, scale=1.0, gate_min=None, reverse=False, kernels=KERNELS):
    """States (B, H, chunks, K, V) on arrival at each chunk, and the last one (B, H, K, V). g (B, T, H, K or 1), or
    None: no gates; there `scale` does not act.

    Few heads would leave most of a GPU idle while they walk over many chunks. Then all groups of chunks are walked over
    at the same time, from states of 0; what they end with gives the states that they start with; and they are walked
    over again.
    """
    B, T, H, K, V, NT = *x.shape, y.shape[3], triton.cdiv(x.shape[1], CHUNK)
    states, total = x.new_empty(B, H, NT, K, V, dtype=dtype), None
    if g is not None:
        x, total = weigh_launch(x, g, scale, gate_min, reverse)
    L = group_length(NT, B * H * triton.cdiv(K, 64) * triton.cdiv(V, 64), x.device)
    G = triton.cdiv(NT, L)

    def walk(first, out, final):
        def programs(meta):
            return B * H * G, triton.cdiv(K, meta["BK"]), triton.cdiv(V, meta["BV"])

        last = torch.empty(B, H, G, K, V, device=x.device)
        args = x, y, x if total is None else total, first, out, last, x.stride(1), y.stride(1), T, H, L
        flags = dict(DOT=dot_type(x.dtype), GATED=g is not None, HEAD=is_head(g), REVERSE=reverse, FINAL=final)
        kernels["scan"].launch(programs, *args, K=K, V=V, C=CHUNK, **flags)
        return last

    if G == 1:
        return states, walk(first, states, True)[:, :, 0]
    sums = torch.empty(B, H, G, 0 if total is None else total.shape[3], device=x.device)
    starts = group_starts(walk(first, sums, False), sums, first)
    return states, last_of(walk(starts, states, True))


def last_of(ends):
    """The state after the last group, of those after each (B, H, G, K, V)."""
    return ends[:, :, -1].clone(memory_format=torch.contiguous_format)


def group_length(chunks, programs, device):
    """Chunks of a group: as few as make the groups of all `programs` fill the GPU twice, but at least 8. All chunks are
    one group unless there would be 4: two walks over a quarter take half the time."""
    groups = min(chunks // 8, 2 * multiprocessors(device) // programs)
    return triton.cdiv(chunks, groups) if groups >= 4 else chunks


def group_starts(ends, sums, first):
    """The states that groups start with, from those that they end with if they start with 0 (B, H, G, K, V), the sums
    of their gates, base 2 (B, H, G, K or 1 or 0), and the state before all (B, H, K, V), or None: it is 0."""
    (B, H, G, K, V), D = ends.shape, sums.shape[3]
    starts = torch.empty_like(ends)

    def programs(meta):
        return B * H, triton.cdiv(K, meta["BK"]), triton.cdiv(V, meta["BV"])

    args = ends, sums, ends if first is None else first, starts, G
    strides, flags = dict(SK=ends.stride(3), SV=ends.stride(4)), dict(GATED=D > 0, HEAD=D == 1, FIRST=first is not None)
    KERNELS["start"].launch(programs, *args, K=K, V=V, **strides, **flags)
    return starts


def weigh_launch(x, g, scale, gate_min, reverse, chunk=CHUNK, dtype=None):
    """x with its decays, in its type or another, and the sums of gates (B, H, chunks, K or 1)."""
    (B, T, H, K), NT = x.shape, triton.cdiv(x.shape[1], chunk)
    w, total = x.new_empty(x.shape, dtype=dtype), torch.empty(B, H, NT, g.shape[3], device=x.device)

    def programs(meta):
        return (triton.cdiv(K, meta["BK"]) * NT * B * H,)

    flags = dict(scale=scale, gate_min=floor(gate_min), C=chunk, HEAD=is_head(g), REVERSE=reverse)
    KERNELS["weigh"].launch(programs, x, g, w, total, x.stride(1), T, H, K=K, **flags)
    return w, total


def read_launch(x, y, w, g, states, scale=1.0, gate_min=None, reverse=False, normaliser=None, kernels=KERNELS):
    """o (B, T, H, V), without what comes of states where they are None. normaliser: what the sums of y are on arrival
    at each chunk, (B, H, chunks, K); then also the inverse (B, T, H, 1) of z, else None."""
    (B, T, H, K), V, out = x.shape, w.shape[3], w.new_empty(w.shape)
    inverse = None if normaliser is None else normaliser.new_empty(B, T, H, 1)

    def programs(meta):
        return (triton.cdiv(V, meta["BV"]) * triton.cdiv(T, CHUNK) * B * H,)

    sums = (out, out) if normaliser is None else (normaliser, inverse)
    args = x, y, w, x if g is None else g, w if states is None else states, out, *sums, x.stride(1), w.stride(1), T, H
    numbers = dict(scale=scale, gate_min=floor(gate_min), tiny=torch.finfo(torch.float32).tiny)
    flags = dict(GATED=g is not None, HEAD=is_head(g), FACTORISED=is_factorised(gate_min))
    flags |= dict(STATES=states is not None, NORMALISED=normaliser is not None, REVERSE=reverse)
    flags |= dict(DOT=dot_type(x.dtype), C=CHUNK)
    tree = g is not None and not flags["HEAD"] and not flags["FACTORISED"]
    kernels["read tree" if tree else "read"].launch(programs, *args, K=K, V=V, **numbers, **flags)
    return out, inverse


def grad_launch(q, k, v, g, do, states, dstates, scale, gate_min, kernels=KERNELS):
    """dq, dk, dg from the states before the chunks and the gradients of those after them. dstates None: STRICT."""
    (B, T, H, K), V, head = q.shape, v.shape[3], is_head(g)
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    dg = g.new_zeros(B, T, H, triton.cdiv(K, 16), dtype=torch.float32) if head else torch.empty_like(g)

    def programs(meta):
        return (triton.cdiv(K, meta["BK"]) * states.shape[2] * B * H,)

    factorised = head or is_factorised(gate_min)
    strides = q.stride(1), v.stride(1)
    args = q, k, v, g, do, states, states if dstates is None else dstates, dq, dk, dg, *strides, T, H
    flags = dict(scale=scale, gate_min=floor(gate_min), C=CHUNK, DOT=dot_type(q.dtype))
    flags |= dict(HEAD=head, FACTORISED=factorised, STRICT=dstates is None)
    kernels["grad" if factorised else "grad tree"].launch(programs, *args, K=K, V=V, **flags)
    return dq, dk, dg.sum(3, keepdim=True).to(g.dtype) if head else dg


def is_head(g):
    """Whether one gate is for all channels of a head."""
    return g is not None and g.shape[3] == 1


def floor(gate_min):
    return torch.finfo(torch.float32).min if gate_min is None else gate_min


def dense(*xs):
    """Contiguous; fp16 as bf16, because the factorised form needs its range."""
    return [in_range(x).contiguous() for x in xs]


def in_range(x):
    return x.to(torch.bfloat16) if x.dtype == torch.float16 else x


def in_rows(q, k, v):
    """q, k, v (B, T, H, D) as they are if their tokens stand at equal distances, q's and k's at the same, such as those
    of slices of a projection."""
    q, k, v = (x if regular(x) else x.contiguous() for x in map(in_range, (q, k, v)))
    return (q, k, v) if q.stride() == k.stride() else (q.contiguous(), k.contiguous(), v)


def regular(x):
    (B, T, _, D), (batch, token, head, one) = x.shape, x.stride()
    return (head, one) == (D, 1) and (batch == T * token or B == 1)


def gla_fwd(q, k, v, g, state, scale, gate_min):
    """o and the last state, in three launches, or five."""
    dtype = v.dtype
    q, k, v, g = *in_rows(q, k, v), g.contiguous()
    states, last = scan_launch(k, v, g, state.contiguous(), q.dtype, 1.0, gate_min)
    return read_launch(q, k, v, g, states, scale, gate_min)[0].to(dtype), last


def gla_bwd(q, k, v, g, state, do, dstate, scale, gate_min):
    """dq, dk, dv, dg and the initial state's gradient, in six launches, or ten."""
    dtypes = [x.dtype for x in (q, k, v, g)]
    q, k, v, do, g = *in_rows(q, k, v), *dense(do), g.contiguous()
    states, _ = scan_launch(k, v, g, state.contiguous(), torch.float32, 1.0, gate_min)
    dstates, first = scan_launch(q, do, g, dstate.contiguous(), torch.float32, scale, gate_min, True)
    dv, _ = read_launch(k, q, do, g, dstates, scale, gate_min, True)
    dq, dk, dg = grad_launch(q, k, v, g, do, states, dstates, scale, gate_min)
    return *(x.to(dtype) for x, dtype in zip((dq, dk, dv, dg), dtypes)), first


def aot_specs():
    """(name, kernel, signature, constants) of every kernel and configuration, for the report. Default first."""
    channel, head = dict(GATED=True, HEAD=False), dict(GATED=True, HEAD=True, FACTORISED=True)
    factorised, tree = channel | dict(FACTORISED=True), channel | dict(FACTORISED=False)
    forms = {
        "weigh": [("", channel), (" head", dict(GATED=True, HEAD=True))],
        "scan": [("", channel), (" head", dict(GATED=True, HEAD=True))],
        "start": [("", dict(GATED=True, HEAD=False, FIRST=True))],
        "read": [("", factorised), (" head", head)],
        "read tree": [("", tree)],
        "grad": [("", factorised), (" head", head)],
        "grad tree": [("", tree)],
    }
    read = dict(STATES=True, NORMALISED=False)
    for name, more in (("weigh", {}), ("scan", dict(FINAL=True)), ("read", read), ("read tree", read)):
        ways = (("", False), (" reverse", True))
        forms[name] = [(form + way, flags | more | dict(REVERSE=r)) for form, flags in forms[name] for way, r in ways]
    fp32 = {"p_g", "p_total", "p_first", "p_last", "p_ds", "p_dg", "p_z", "p_inverse", "p_sum", "p_start"}
    specs = []
    for name, kernel in KERNELS.items():
        names = kernel.function.arg_names
        for form, flags in forms[name]:
            for width in (64, 128):
                for i, option in enumerate(kernel.options(dict(K=width, V=width))):
                    constants = dict(C=CHUNK, DOT="bf16", STRICT=False, **flags, **option)
                    constants = {x: constants[x] for x in constants if x in names or x[:4] == "num_"}
                    wide = fp32 | ({"p_all", "p_s"} if flags.get("REVERSE") or "grad" in name else set())
                    signature = {x: "*fp32" if x in wide else "*bf16" for x in names if x[:2] == "p_"}
                    sizes = dict.fromkeys(("K", "V", "SX", "SY", "SW", "SQ", "SK", "SV"), "i32:16")
                    signature |= {x: "i32" for x in "THL" if x in names} | {x: sizes[x] for x in names if x in sizes}
                    signature |= dict.fromkeys(("scale", "gate_min", "tiny"), "fp32")
                    specs.append((f"gla_{name}{form} {width} #{i}", kernel.function, signature, constants))
    return specs


# ----------------------------------------------------------------------------- op
#
# Custom ops return tensors only and no input among them: `states` is empty where a backend keeps none.


def states_kept(q, state, backend, chunk=CHUNK):
    """The shape of the states that the backward pass finds: those at the start of each chunk, or none."""
    B, T, H, _ = q.shape
    return (0,) if backend == "triton" else (B * H * -(-T // chunk), *state.shape[2:])


@operator(
    "gla",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor state, float scale, float? gate_min, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)
def gla_op(q, k, v, g, state, scale, gate_min, backend):
    if backend == "triton":
        return *gla_fwd(q, k, v, g, state, scale, gate_min), state.new_empty(0)
    return chunk_forward(q, k, v, g, state, scale, gate_min)


@gla_op.register_fake
def _(q, k, v, g, state, scale, gate_min, backend):
    return v.new_empty(v.shape), state.new_empty(state.shape), state.new_empty(states_kept(q, state, backend))


@operator(
    "gla_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor state, Tensor states, Tensor do, Tensor dstate,"
    " float scale, float? gate_min, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def gla_backward_op(q, k, v, g, state, states, do, dstate, scale, gate_min, backend):
    if backend == "triton":
        return gla_bwd(q, k, v, g, state, do, dstate, scale, gate_min)
    return chunk_backward(q, k, v, g, states, do, dstate, scale, gate_min)


gla_backward_op.register_fake(like_inputs(5))


def setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.gate_min, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[2])


def backward(ctx, do, dstate, _):
    q, k, v, g, state, states = ctx.saved_tensors
    do = v.new_zeros(v.shape) if do is None else do
    dstate = torch.zeros_like(state) if dstate is None else dstate
    grads = gla_backward_op(q, k, v, g, state, states, do, dstate, ctx.scale, ctx.gate_min, ctx.backend)
    return *grads, None, None, None


gla_op.register_autograd(backward, setup_context=setup_context)


# ----------------------------------------------------------------------------- public


def gla(
    q, k, v, g=None, scale=None, gate_min=None, initial_state=None, output_final_state=False, backend="auto"
):  # fmt: skip
    """Gated linear attention. Returns o (B, T, H, V), and the final state (B, H, K, V) if asked for, else None.

    q, k (B, T, H, K)   v (B, T, H, V)   initial_state (B, H, K, V)   g log-decay <= 0: (B, T, H, K), or (B, T, H) for
    one of all channels, which costs less, or None for no decay
    scale: K^-1/2 unless given.  gate_min: g is clamped there, with no gradient below; from -1.25 up the operator then
    takes its faster form.  backend: auto | triton | torch | recurrent; auto takes the last for up to 16 tokens that go
    on from a state.  States are fp32, fp64 for fp64 inputs.
    """
    check_inputs(q, k, v, g, gate_min, initial_state, backend)
    (B, T, H, K), V = q.shape, v.shape[3]
    g = g.unsqueeze(3) if g is not None and g.dim() == 3 else g
    q, k, v = in_autocast(q, k, v)  # gates and states keep their precision
    scale = K**-0.5 if scale is None else scale
    if in_steps(backend, q, initial_state, output_final_state):
        with leave_autocast(q):
            o, state = gla_recurrent(q, k, v, g, scale, gate_min, initial_state)
    else:
        if g is None:
            g, gate_min = torch.zeros((), dtype=compute_dtype(q.dtype), device=q.device).expand(B, T, H, 1), -1.0
        dtype = compute_dtype(q.dtype)
        state = q.new_zeros(B, H, K, V, dtype=dtype) if initial_state is None else initial_state.to(dtype)
        o, state, _ = gla_op(q, k, v, g, state, float(scale), gate_min, choose("gla", backend, q, too_wide(K, V)))
    return o, state if output_final_state else None


def check_inputs(q, k, v, g, gate_min, initial_state, backend):
    check("gla", q, k, v, backend, "auto", "triton", "torch", "recurrent")
    if g is not None and g.shape not in (q.shape, q.shape[:3]):
        shapes = f"{tuple(q.shape)} or {tuple(q.shape[:3])}"
        raise ValueError(f"gla: g must have the shape of q, with channels or without: {shapes}, got {tuple(g.shape)}")
    if gate_min is not None and gate_min > 0:
        raise ValueError(f"gla: gate_min must be at most 0 or None, got {gate_min}")
    B, _, H, K = q.shape
    if initial_state is not None and initial_state.shape != (B, H, K, v.shape[3]):
        shape = tuple(initial_state.shape)
        raise ValueError(f"gla: initial_state must be {(B, H, K, v.shape[3])}, got {shape}")


def too_wide(K, V):
    """What the Triton kernels do not take, or None."""
    return f"the Triton kernels take heads up to {MAX_WIDTH} wide" if max(K, V) > MAX_WIDTH else None


def case(name, gate_min, channels, q, k, v, **_):
    """What is timed: mild gates, bounded below or not, of each channel or of a head."""
    (B, T, H, K), V = q.shape, v.shape[3]
    call, shape = functools.partial(gated_output, gate_min=gate_min), (B, T, H, K) if channels else (B, T, H)
    g = (F.logsigmoid(torch.randn(shape, device=q.device)) / 16).requires_grad_()
    executed = B * operations(T, H, K, V, gate_min, not channels)[1]
    return {name: Case(call, [q, k, v, g], functools.partial(call, backend="recurrent"), executed)}


def gated_output(*inputs, **options):
    return gla(*inputs, **options)[0]


FORMS = ("gla", -1.25, True), ("gla_exact", None, True), ("gla_head", None, False)
CASES = {form[0]: functools.partial(case, *form) for form in FORMS}
