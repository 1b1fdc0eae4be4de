"""Operators, one file each: the oracle, the chunked PyTorch form, the Triton kernels, the public function."""

import functools
import types
import warnings

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, types.SimpleNamespace(constexpr=None)  # enough for the kernels' definitions to be read

_said = set()


def jit(kernel):
    """triton.jit, or the bare function on a machine without Triton. T changes from call to call: no variant per T."""
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=["T"])


def interpreting():
    return triton is not None and triton.knobs.runtime.interpret


def autocasts(x):
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def for_products(*xs):
    """xs as PyTorch's attention takes them: under autocast in its precision, unless they are fp64."""
    if not autocasts(xs[0]):
        return xs
    dtype = torch.get_autocast_dtype(xs[0].device.type)
    return [x if x.dtype == torch.float64 else x.to(dtype) for x in xs]


def outside_autocast(f):
    """f without autocast, whose casts would reach its products and sums. The first argument names the device."""

    @functools.wraps(f)
    def run(x, *args, **options):
        if not autocasts(x):
            return f(x, *args, **options)
        with torch.autocast(x.device.type, enabled=False):
            return f(x, *args, **options)

    return run


def op(name, schema):
    """Makes a function a custom op. Autocast acts inside custom ops too, and in a backward pass that is run under it:
    every op leaves it."""

    def register(f):
        return torch.library.custom_op(f"nanoattention::{name}", outside_autocast(f), mutates_args=(), schema=schema)

    return register


def warn_once(reason):
    if reason not in _said:
        _said.add(reason)
        warnings.warn(reason, stacklevel=3)
