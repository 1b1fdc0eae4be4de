"""Operators, one file each: the oracle, the chunked PyTorch form, the Triton kernels, the public function."""

import types
import warnings

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


def warn_once(reason):
    if reason not in _said:
        _said.add(reason)
        warnings.warn(reason, stacklevel=3)
