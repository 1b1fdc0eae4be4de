"""python -m benchmarks.launches: what does an operator ask of a GPU? Launches, bytes and waits, counted without one.

PyTorch's operations run on the CPU and are counted as they come; a Triton kernel is counted and not run, so the numbers
mean nothing and the shapes everything. A launch moves at least the bytes of its tensors, each once. A prediction is
what an H200 needs for the bytes, at the rate that it copies with, and COST for each launch.
"""

import contextlib
import copy
import importlib
from collections import Counter
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from benchmarks.layers import of_type
from kernels import MODULES, launch
from model import ATTENTION, GPTConfig

SHAPE = (8, 1024, 8, 64)  # batch, tokens, heads, channels
RATE, COST = 4.26e12, 2e-6  # bytes a second of a copy on an H200 (docs/gpu-2.json); seconds of a launch
NOTHING = {  # no launch: views, and memory
    *("view", "_unsafe_view", "_reshape_alias", "as_strided", "t", "transpose", "permute", "expand", "squeeze"),
    *("unsqueeze", "split", "split_with_sizes", "chunk", "unbind", "slice", "select", "narrow", "unfold", "diagonal"),
    *("detach", "alias", "lift_fresh", "resize_"),
    *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"),
}
WAITS = {"_local_scalar_dense", "nonzero", "bincount", "repeat_interleave", "_unique2", "masked_select"}


class Counted(TorchDispatchMode):
    """Counts what runs inside: operations of PyTorch, Triton kernels, bytes, and waits for the device."""

    def __init__(self, found=None):
        super().__init__()
        self.found = Counter() if found is None else found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        if function.namespace == "aten" and name not in NOTHING:
            self.found["operations"] += 1
            self.found["waits"] += name in WAITS
            self.add_bytes(args, kwargs, out)
        return out

    def add_bytes(self, *values):
        tensors = {id(x): x for x in tree_leaves(values) if torch.is_tensor(x)}
        self.found["bytes"] += sum(x.numel() * x.itemsize for x in tensors.values())

    def launch(self, programs, *args, **constants):
        """In place of Kernel.launch."""
        self.found["kernels"] += 1
        self.add_bytes(args)


@contextlib.contextmanager
def counting():
    """A Counted in which operators take their Triton form, with a GPU's sizes, and none of it runs."""
    counted, patches = Counted(), contextlib.ExitStack()
    with patches:
        patches.enter_context(mock.patch.object(launch.Kernel, "launch", counted.launch))
        # an opaque operator is not seen from outside
        patches.enter_context(mock.patch.object(kernels, "leave_autocast", lambda x: Counted(counted.found)))
        for module in (importlib.import_module(f"kernels.{name}") for name in MODULES):
            for name, stand_in in (("choose", lambda *a, **k: "triton"), ("at_once", lambda size, x: 64 * size)):
                if hasattr(module, name):
                    patches.enter_context(mock.patch.object(module, name, stand_in))
        patches.enter_context(counted)
        yield counted.found


def operators():
    """{row: Case} of the operators that have Triton kernels, bf16 inputs."""
    B, T, H, D = SHAPE
    q, k, v = (torch.randn(B, T, H, D, dtype=torch.bfloat16) for _ in range(3))
    modules = [importlib.import_module(f"kernels.{name}") for name in MODULES if name != "distance"]
    return {row: case for module in modules for make in module.CASES.values() for row, case in make(q, k, v).items()}


def of_operator(case):
    """The counts of a forward and a backward pass."""
    inputs = [x.detach().requires_grad_() for x in case.inputs]
    with counting() as forward:
        out = case.call(*inputs)
        out, forward = out[0] if isinstance(out, tuple) else out, Counter(forward)
    gradient = torch.ones_like(out)
    with counting() as backward:
        out.backward(gradient)
    return forward, backward


def of_step(kind):
    """The counts of the attention of one layer in a step of one token, after 100 others. The angles of rope, which the
    first layer makes for all, are there."""
    c = of_type(vars(GPTConfig()) | dict(n_layer=1, n_head=4, n_embd=256, block_size=1024, pos_emb="rope"), kind)
    attn = ATTENTION[kind](c).eval()
    with torch.no_grad():
        state = attn.step(torch.randn(1, 100, 256), attn.init_state(1, 1024))[1]
        x = torch.randn(1, 1, 256)
        attn.step(x, copy.deepcopy(state))
        with Counted() as counted:
            attn.step(x, state)
    return counted.found


def row(found):
    launches = found["operations"] + found["kernels"]
    seconds = found["bytes"] / RATE + launches * COST
    return f"{launches} ({found['kernels']}) | {found['bytes'] / 1e6:,.0f} | {found['waits']} | {1e6 * seconds:,.0f}"


def main():
    torch.manual_seed(0)
    print(f"shape {SHAPE}, bfloat16; launches (of them Triton kernels), MB, waits, predicted microseconds\n")
    print("| operator | forward | MB | waits | predicted (µs) | backward | MB | waits | predicted (µs) |")
    print("|---" * 9 + "|")
    for name, case in operators().items():
        print(f"| `{name}` | {' | '.join(map(row, of_operator(case)))} |", flush=True)
    print("\n| a step of one token, attention alone | launches | waits |\n|---|---|---|")
    for kind in ATTENTION:
        found = of_step(kind)
        print(f"| `{kind}` | {found['operations']} | {found['waits']} |", flush=True)


if __name__ == "__main__":
    main()
