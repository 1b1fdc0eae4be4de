"""What every launch of a Triton kernel shares: whether it can run, with which tiles, and on which device."""

import contextlib
import functools
import math

import torch

from . import interpreting, jit, tl, triton, warn_once

AUTOTUNE = False  # time all configurations of a kernel, once for each size, instead of taking the first that fits
OutOfResources = triton.runtime.errors.OutOfResources if triton else ()


def choose(name, backend, q, obstacle=None):
    """triton or torch for the operator `name`. A wish that cannot be met is answered with its reason, once. obstacle:
    what of the sizes its kernels do not take."""
    if backend == "torch" or (backend == "auto" and not q.is_cuda):
        return "torch"
    if triton is None:
        reason = "Triton is not installed"
    elif not q.is_cuda and not interpreting():
        reason = f"Triton does not run on {q.device.type}"
    elif q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        reason = f"the Triton kernels need an Ampere GPU or newer, not {torch.cuda.get_device_name(q.device)}"
    elif q.dtype == torch.float64:
        reason = "the Triton kernels do not compute in fp64"
    else:
        reason = obstacle or too_long(math.prod(q.shape[1:]))
    if reason:
        warn_once(f"{name} runs its PyTorch form: {reason}")
    return "torch" if reason else "triton"


def too_long(numbers):
    """What the Triton kernels do not take, or None: their offsets within a sequence are of 32 bits."""
    return "the Triton kernels take sequences of fewer than 2^31 numbers" if numbers >= 2**31 else None


@functools.cache
def native_bfloat16():
    """Whether this processor multiplies bfloat16 itself; another is half as fast in it as in float32."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
        flags = next((line.split() for line in f if line.startswith("flags")), ())
        return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)
    return False


def product_type(inputs, sums):
    """The type of the operands of a PyTorch form's products, and of what they give, for the types of the inputs and of
    the sums: bf16 for bf16 inputs where that is fast. Each product is added up in fp32 and rounded once."""
    return torch.bfloat16 if inputs == torch.bfloat16 and native_bfloat16() else sums


def product(a, b, low):
    """a b (N, ...) with operands of type low, and of that type."""
    return torch.bmm(a.to(low), b.to(low))


def add_product(base, a, b, low):
    """base + a b, in place."""
    return base.baddbmm_(a, b) if low == base.dtype else base.add_(product(a, b, low))


@functools.cache
def multiprocessors(device):
    """Of a GPU; a CPU stands for one of them."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def power(n):
    """The least tile that holds n: a power of two, from the 16 on that a product needs."""
    return max(16, 1 << (n - 1).bit_length())


def dot_type(dtype):
    """What products are made of. fp32: three products in tf32, whose sum is as good as fp32 and needs no more registers
    than there are, or one, if torch.set_float32_matmul_precision allows it. fp16 becomes bf16: factors that decay and
    grow need its range."""
    if dtype != torch.float32:
        return "bf16"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@jit
def operand(x, DOT: tl.constexpr):
    """x in the type of the products' operands."""
    return x.to(tl.bfloat16 if DOT == "bf16" else tl.float16 if DOT == "fp16" else tl.float32)


@jit
def dot(a, b, DOT: tl.constexpr):
    """a b with operands in DOT, added up in fp32."""
    precision: tl.constexpr = "ieee" if DOT == "bf16" or DOT == "fp16" else DOT
    return tl.dot(operand(a, DOT), operand(b, DOT), input_precision=precision)


@jit
def split(i, n):
    """The number of a program as its place along n and the rest: only the first axis of a grid may go beyond 65,535."""
    return i % n, i // n


class Kernel:
    """A Triton kernel with its configurations, dicts of tiles, num_warps and num_stages: the first is the default.
    tiles: {tile: the size that it need not exceed}. fp32: the default for products of fp32, if another.
    serial: how many steps a program takes one after the other, for the report. zeroed: the outputs that must be 0
    before a launch, because it adds to them or leaves some of them alone."""

    def __init__(self, function, configs, tiles=None, fp32=None, serial="1", zeroed=()):
        self.function, self.configs, self.tiles, self.fp32, self.serial = function, configs, tiles or {}, fp32, serial
        self.zeroed = list(zeroed)
        self.runs = {}  # {device and constants: what is launched, and its configuration}

    def options(self, constants):
        """The distinct configurations for the sizes among `constants`, the default first."""
        sizes = {tile: power(constants[size]) for tile, size in self.tiles.items()}
        first = [self.fp32] if self.fp32 and constants.get("DOT") in ("tf32", "tf32x3") else []
        fitted = [c | {tile: min(c[tile], size) for tile, size in sizes.items()} for c in first + self.configs]
        return [c for i, c in enumerate(fitted) if c not in fitted[:i]]

    def launch(self, programs, *args, **constants):
        """Run programs(configuration) of it on the device of the first argument. A device that has too little shared
        memory for a configuration takes the next."""
        key = args[0].device, *constants.values()
        with torch.cuda.device(args[0].device) if args[0].is_cuda else contextlib.nullcontext():
            if key in self.runs:
                run, option = self.runs[key]
                return run[programs](*args, **constants, **option)
            for option in self.options(constants):
                run, option = (self.tuned(constants), {}) if AUTOTUNE else (self.function, option)
                try:
                    run[programs](*args, **constants, **option)
                except OutOfResources as error:
                    reason = error
                else:
                    self.runs[key] = run, option
                    return
            raise reason

    def tuned(self, constants):
        """The kernel with an autotuner over its configurations for these sizes."""
        configs = []
        for option in self.options(constants):
            tiles = {name: n for name, n in option.items() if name in self.function.arg_names}
            options = {name: n for name, n in option.items() if name not in tiles}
            configs.append(triton.Config(tiles, **options))
        return triton.autotune(configs, key=[], reset_to_zero=self.zeroed)(self.function)


def configurations(names, *rows):
    """[(64, 8), ...] as dicts, by names that are written in one string."""
    return [dict(zip(names.split(), row, strict=True)) for row in rows]
