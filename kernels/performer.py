"""Performer attention (arXiv 2009.14794): causal linear attention over non-negative features, with its normaliser.

    S_t = S_{t-1} + phi(k_t) [v_t, 1]^T        (M, V + 1)        [n_t, z_t] = S_t^T phi(q_t)        o_t = n_t / z_t

    phi(x) = exp(W x)   "softmax"        relu(W x) + 1e-3   "relu"        log(1 + exp(W x))   "learned"

For Gaussian rows w, E exp(w.q) exp(w.k) = exp(q.k) e^(|q|^2/2) e^(|k|^2/2). The query's factor cancels in o, and so does
the keys' where they all have one norm: "softmax" estimates softmax attention over such keys, with logits q.k.

`performer` is the public function. Three forms of the same equations: `recurrent`, a loop over time; `torch`, chunks of
tokens in matrix products (the CPU path); `triton`. Axes: B batch, T time, H heads, D head width, M features, V value
width, C tokens a chunk, N chunks in flight. Between forward and backward features are not kept but computed again.
"""


import torch
import torch.nn.functional as F

from . import interpreting, triton, warn_once
from .gla import CHUNK, Workspace, chunked, compute_dtype, gla_recurrent, load, store

SEGMENT = 2**17  # features of one head that the chunked form works on at a time, so that its tensors stay in cache
FLOOR = 1e-3  # of the relu features: no query is without keys
MAX_WIDTH = 256


# ----------------------------------------------------------------------------- features


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
    return torch._C._nn.softplus(z, out=z)


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
    q, k = feature_map(q, wq, features), feature_map(k, wk, features)
    o, state = gla_recurrent(q, k, F.pad(v, (0, 1), value=1.0), None, 1.0, None, state)
    return divide(o).to(out_dtype), state


def divide(o):
    """[n, z] -> n / z. Features are positive; only their underflow makes a z of 0, whose n is 0 as well."""
    return o[..., :-1] / o[..., -1:].clamp(min=torch.finfo(o.dtype).tiny)


# ----------------------------------------------------------------------------- chunked PyTorch
#
# Time is cut into chunks of C tokens and chunks into segments that stay in cache. A segment is of one head, its features
# one product with W, the rest batched products over its chunks, u = [v, 1]:
#
#     [n, z] = phi(q) S + tril(phi(q) phi(k)^T) u          S' = S + phi(k)^T u
#
# The states at the start of each segment are kept; the backward computes the rest again.


def blocking(q, M, chunk):
    """Batch rows handled together, and chunks in a segment of them."""
    B, T, _, _ = q.shape
    chunks = -(-T // chunk)
    rows = min(B, max(1, SEGMENT // (M * chunk * chunks)))
    return rows, min(chunks, max(1, SEGMENT // (M * chunk * rows)))


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
    """x and phi(x), (N, C, D) and (N, C, M). Padded tokens have features too: it is their values that are 0."""
    x = load(x, segment, chunk, new)
    phi = new(*x.shape[:2], w.shape[0])
    torch.mm(x.flatten(0, 1), w.mT, out=phi.flatten(0, 1))
    return x, activate(phi, features)


def with_ones(v, segment, chunk, new):
    """u = [v, 1] (N, C, V + 1), 0 for padded tokens."""
    lo, hi, n = segment
    place = new(n, v.shape[0], 1, chunk, v.shape[3] + 1)
    place[..., :-1].copy_(chunked(v, segment, chunk))
    place[..., -1] = 1
    place[-1, ..., chunk - (n * chunk - (hi - lo)) :, -1] = 0
    return place.flatten(0, 2)


def running_sums(x, carry, out, reverse=False):
    """States from chunk to chunk: out[0] = carry, out[i+1] = out[i] + x[i]. The last one into carry.

    x, out (N, M, V + 1), carry (rows, 1, M, V + 1)
    """
    x, y = x.view(-1, *carry.shape).unbind(), out.view(-1, *carry.shape).unbind()
    order = range(len(x) - 1, -1, -1) if reverse else range(len(x))
    y[order[0]].copy_(carry)
    for i, j in zip(order, order[1:]):
        torch.add(y[i], x[i], out=y[j])
    i = order[-1]
    torch.add(y[i], x[i], out=carry)
    return out


def chunk_forward(q, k, v, wq, wk, state, features, chunk=CHUNK):
    """o (B, T, H, V), 1/z (B, T, H, 1), the last state (B, H, M, V + 1), and those at the start of each segment."""
    o, inverse = v.new_empty(v.shape), state.new_empty(*v.shape[:3], 1)
    starts, state, new = state.new_empty(states_kept(q, state, "torch", chunk)), state.clone(), Workspace(state)
    for rows, h, segment, here in pieces(q, state.shape[2], chunk):
        new.taken = 0
        _, fq = segment_features(q[rows, :, h], wq[h.start], features, segment, chunk, new)
        _, fk = segment_features(k[rows, :, h], wk[h.start], features, segment, chunk, new)
        u = with_ones(v[rows, :, h], segment, chunk, new)
        carry = state[rows, h]
        starts[here] = carry[:, 0]
        x = new.bmm(fk.mT, u)
        S = running_sums(x, carry, new(*x.shape))
        n = new.bmm(fq, S).baddbmm_(new.bmm(fq, fk.mT).tril_(), u)
        n, z = n.view(-1, carry.shape[0], 1, chunk, n.shape[2]).split((v.shape[3], 1), -1)
        z = z.clamp(min=torch.finfo(z.dtype).tiny).reciprocal_()
        store(o[rows, :, h], segment, chunk, lambda place: torch.mul(n, z, out=place))  # noqa: B023
        store(inverse[rows, :, h], segment, chunk, lambda place: place.copy_(z))  # noqa: B023
    return o, inverse, state, starts


def chunk_backward(q, k, v, wq, wk, o, inverse, starts, do, dstate, features, weights, chunk=CHUNK):
    """Gradients of q, k, v, wq, wk (empty unless `weights`) and the initial state. dstate: that of the last state."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dwq, dwk = (torch.zeros_like(w) if weights else w.new_empty(0) for w in (wq, wk))
    new, dstate = Workspace(starts), dstate.clone()
    V = v.shape[3]
    for rows, h, segment, here in reversed(pieces(q, wq.shape[1], chunk)):
        new.taken = 0
        xq, fq = segment_features(q[rows, :, h], wq[h.start], features, segment, chunk, new)
        xk, fk = segment_features(k[rows, :, h], wk[h.start], features, segment, chunk, new)
        u = with_ones(v[rows, :, h], segment, chunk, new)
        du = read_gradient(do[rows, :, h], o[rows, :, h], inverse[rows, :, h], segment, chunk, new)
        x = new.bmm(fk.mT, u)
        S = running_sums(x, starts[here].unsqueeze(1), new(*x.shape))
        torch.bmm(fq.mT, du, out=x)
        dS = running_sums(x, dstate[rows, h], new(*x.shape), reverse=True)
        A, dA = new.bmm(fq, fk.mT).tril_(), new.bmm(du, u.mT).tril_()
        dvs = new.bmm(fk, dS[:, :, :V]).baddbmm_(A.mT, du[:, :, :V])
        store(dv[rows, :, h], segment, chunk, lambda place: place.copy_(dvs.view(place.shape)))  # noqa: B023
        dfq = new.bmm(du, S.mT).baddbmm_(dA, fk)
        dfk = new.bmm(u, dS.mT).baddbmm_(dA.mT, fq)
        for w, dw, x, f, df, dx in ((wq, dwq, xq, fq, dfq, dq), (wk, dwk, xk, fk, dfk, dk)):
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


# ----------------------------------------------------------------------------- op
#
# Custom ops return tensors only and no input among them: `starts` is empty where a backend keeps none.


@torch.library.custom_op(
    "nanoattention::performer",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor wq, Tensor wk, Tensor state, str features, str backend)"
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


@torch.library.custom_op(
    "nanoattention::performer_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor wq, Tensor wk, Tensor state, Tensor o, Tensor inverse,"
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
    check(q, k, v, wq, wk, features, initial_state, backend)
    (B, _, H, _), M, V, dtype = q.shape, wq.shape[1], v.shape[3], compute_dtype(q.dtype)
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        v = v.to(torch.get_autocast_dtype(q.device.type))  # of the products; exponents and states keep their precision
    wq, wk = wq.to(dtype), wk.to(dtype)
    if backend == "recurrent":
        o, state = performer_recurrent(q, k, v, wq, wk, features, initial_state)
    else:
        state = q.new_zeros(B, H, M, V + 1, dtype=dtype) if initial_state is None else initial_state.to(dtype)
        o, _, state, _ = performer_op(q, k, v, wq, wk, state, features, choose(backend, q, V))
    return o, state if output_final_state else None


def check(q, k, v, wq, wk, features, initial_state, backend):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or not x.is_floating_point() or min(x.shape) < 1:
            raise ValueError(f"performer: {name} must be a float (B, T, H, D), none 0, got {x.dtype} {tuple(x.shape)}")
    (B, _, H, D), V = q.shape, v.shape[3]
    if k.shape != q.shape:
        raise ValueError(f"performer: k must have the shape of q {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"performer: v must be {tuple(q.shape[:3])} and its width, got {tuple(v.shape)}")
    for name, w in (("wq", wq), ("wk", wk)):
        if w.dim() != 3 or (w.shape[0], w.shape[2]) != (H, D) or w.shape != wq.shape or w.shape[1] < 1:
            raise ValueError(f"performer: {name} must be ({H}, features, {D}), both alike, got {tuple(w.shape)}")
    if features not in ("softmax", "relu", "learned"):
        raise ValueError(f"performer: features must be softmax, relu or learned, got {features!r}")
    shape = (B, H, wq.shape[1], V + 1)
    if initial_state is not None and initial_state.shape != shape:
        raise ValueError(f"performer: initial_state must be {shape}, got {tuple(initial_state.shape)}")
    if backend not in ("auto", "triton", "torch", "recurrent"):
        raise ValueError(f"performer: backend must be auto, triton, torch or recurrent, got {backend!r}")


def choose(backend, q, V):
    """triton or torch. A wish that cannot be met is answered with its reason, once."""
    if backend == "torch" or (backend == "auto" and not q.is_cuda):
        return "torch"
    reason = None
    if triton is None:
        reason = "Triton is not installed"
    elif not q.is_cuda and not interpreting():
        reason = f"Triton does not run on {q.device.type}"
    elif q.dtype == torch.float64:
        reason = "the Triton kernels do not compute in fp64"
    elif V > MAX_WIDTH:
        reason = f"the Triton kernels take values up to {MAX_WIDTH} wide"
    if reason:
        warn_once(f"performer runs its PyTorch form: {reason}")
    return "torch" if reason else "triton"
