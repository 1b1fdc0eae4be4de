"""Operators, one file each: the oracle, the chunked PyTorch form, the Triton kernels, the public function."""

import contextlib
import functools
import types
import warnings
from typing import NamedTuple

import torch
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, types.SimpleNamespace(constexpr=None)  # enough for the kernels' definitions to be read

STEP = 16  # tokens of a decoding step: more are faster in chunks
SHORT = 2**14  # numbers of a head, below which softmax attention on a CPU is trained faster in float32 than in bfloat16

_said = set()

MODULES = (
    "gla",
    "delta",
    "gsa",
    "nsa",
    "performer",
    "distance",
    "gated",
)  # of each, CASES: {operator: f}, f(q, k, v, **options) -> {row: Case}


class Case(NamedTuple):
    """An operator and the inputs that it is timed with."""

    call: object  # of the inputs
    inputs: list  # tensors that take gradients, tokens in dim 1
    oracle: object  # of the inputs in float64, a prefix of their tokens too: what defines the operator
    executed: int | None  # operations of a forward pass of the batch; None: not counted


def jit(kernel):
    """triton.jit, or the bare function on a machine without Triton. T and L, tokens and chunks, change from call to
    call: no variant for each."""
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=["T", "L"])


def interpreting():
    return triton is not None and triton.knobs.runtime.interpret


def autocast_on(device_type):
    """Some devices have none, such as meta."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def in_autocast(*xs):
    """Tensors in autocast's precision where it is on, as PyTorch's own attention takes q, k and v; float64 stays."""
    device_type = xs[0].device.type
    if not autocast_on(device_type):
        return xs
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in xs)


def leave_autocast(x):
    """A context in which operations on tensors beside x keep the precision of their inputs. An opaque operator is not
    outside autocast by itself: what it calls would be cast."""
    device_type = x.device.type
    return torch.autocast(device_type, enabled=False) if autocast_on(device_type) else contextlib.nullcontext()


def causal(q, k, v, dropout=0.0):
    """Softmax attention (B, H, T, D) of q (B, H, T, D) to k, v (B, Hk, T, D) up to the query's own, by PyTorch.
    In training on a CPU, short sequences in bfloat16 are computed in float32: with AMX their backward pass is up to 7
    times as fast."""
    q, k, v = in_autocast(q, k, v)
    dtype, gqa = q.dtype, k.shape[1] < q.shape[1]
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if trained and q.device.type == "cpu" and dtype == torch.bfloat16 and q.shape[2] * q.shape[3] < SHORT:
        q, k, v = q.float(), k.float(), v.float()
    with leave_autocast(q):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=gqa).to(dtype)


def operator(name, schema):
    """Registers a function as nanoattention::name, opaque to autograd and compilers, outside autocast. Its first
    argument is a tensor. It must return no input, and no view of one."""

    def register(function):
        @functools.wraps(function)
        def run(x, *args):
            with leave_autocast(x):
                return function(x, *args)

        return torch.library.custom_op(f"nanoattention::{name}", run, mutates_args=(), schema=schema)

    return register


def in_steps(backend, q, state, output_final_state):
    """Whether an operator runs token by token: asked to, or with `auto` in a decoding step, which goes on from a state
    by a few tokens."""
    step = output_final_state and state is not None and q.shape[1] <= STEP
    return backend == "recurrent" or (backend == "auto" and step)


def at_once(size, x):
    """How much a PyTorch form works on at a time: on a CPU what stays in cache. A GPU has no such cache, and each call
    costs it more than its arithmetic."""
    return size if x.device.type == "cpu" else 64 * size


def like_inputs(n):
    """The fake of an operator that returns a tensor like each of its first n inputs."""
    return lambda *xs: tuple(x.new_empty(x.shape) for x in xs[:n])


def check(op, q, k, v, backend, *backends):
    """ValueError, of one line, unless q, k (B, T, H, D) and v (B, T, H, V) fit each other and `op` has the backend."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or not x.is_floating_point() or min(x.shape) < 1:
            raise ValueError(f"{op}: {name} must be a float (B, T, H, D), none 0, got {x.dtype} {tuple(x.shape)}")
    if k.shape != q.shape:
        raise ValueError(f"{op}: k must have q's shape {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"{op}: v must be {tuple(q.shape[:3])} and its width, got {tuple(v.shape)}")
    if backend not in backends:
        raise ValueError(f"{op}: backend must be {', '.join(backends[:-1])} or {backends[-1]}, got {backend!r}")


def warn_once(reason):
    if reason not in _said:
        _said.add(reason)
        warnings.warn(reason, stacklevel=3)
