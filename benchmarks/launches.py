"""python -m benchmarks.launches: what does an operator ask of a GPU? Launches, bytes and waits, counted without one.

PyTorch's operations run on the CPU and are counted as they come; a Triton kernel is counted and not run, so the numbers
mean nothing and the shapes everything. A launch moves at least the bytes of its tensors, each once. A prediction is
what an H200 needs for the bytes, at the rate that it copies with, and COST for each launch.
"""

import contextlib
import copy
import multiprocessing
import re
import types
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch
import torch.utils._triton
from torch._dynamo import device_interface
from torch._inductor import config as inductor
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import kernels
import sample
from benchmarks.layers import of_type
from benchmarks.operators import MODULES
from kernels import launch
from model import ATTENTION, GPTConfig

SHAPE = (8, 1024, 8, 64)  # batch, tokens, heads, channels
RATE, COST = 4.26e12, 2e-6  # bytes a second of a copy on an H200 (docs/gpu-2.json); seconds of a launch
MULTIPROCESSORS = 132  # of an H200
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
        patches.enter_context(mock.patch.object(kernels.gla, "multiprocessors", lambda device: MULTIPROCESSORS))
        # an opaque operator is not seen from outside
        patches.enter_context(mock.patch.object(kernels, "leave_autocast", lambda x: Counted(counted.found)))
        for module in MODULES:
            for name, stand_in in (("choose", lambda *a, **k: "triton"), ("at_once", lambda size, x: 64 * size)):
                if hasattr(module, name):
                    patches.enter_context(mock.patch.object(module, name, stand_in))
        patches.enter_context(counted)
        yield counted.found


def operators():
    """{row: Case} of the operators that have Triton kernels, bf16 inputs."""
    B, T, H, D = SHAPE
    q, k, v = (torch.randn(B, T, H, D, dtype=torch.bfloat16) for _ in range(3))
    return {row: case for module in MODULES for make in module.CASES.values() for row, case in make(q, k, v).items()}


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


def one_layer(kind):
    """The attention of one layer, its state after 100 tokens, and the next token."""
    c = of_type(vars(GPTConfig()) | dict(n_layer=1, n_head=4, n_embd=256, block_size=1024, pos_emb="rope"), kind)
    attn = ATTENTION[kind](c).eval()
    with torch.no_grad():
        return attn, attn.step(torch.randn(1, 100, 256), attn.init_state(1, 1024))[1], torch.randn(1, 1, 256)


def of_step(kind):
    """The counts of the attention of one layer in a step of one token, after 100 others. The angles of rope, which the
    first layer makes for all, are there."""
    attn, state, x = one_layer(kind)
    with torch.no_grad(), mock.patch.object(torch.nn.functional, "rms_norm", one_launch):
        attn.step(x, copy.deepcopy(state))
        with Counted() as counted:
            attn.step(x, state)
    return counted.found


def one_launch(x, shape, weight, eps):
    """RMSNorm, which is one kernel on a GPU and some operations on a CPU."""
    return torch.add(x, weight)


@contextlib.contextmanager
def pretending():
    """PyTorch's compiler writes what it would for an H200: asked about the device, PyTorch answers from a table."""
    properties = types.SimpleNamespace(
        **dict(name="NVIDIA H200", major=9, minor=0, gcnArchName="", is_integrated=0, total_memory=139 << 30),
        **dict(multi_processor_count=132, warp_size=32, regs_per_multiprocessor=65536, max_threads_per_block=1024),
        **dict(max_threads_per_multi_processor=2048, shared_memory_per_block_optin=232448, L2_cache_size=50 << 20),
    )
    cuda, workers = device_interface.CudaInterface, device_interface.CudaInterface.Worker
    answers = [(cuda, "raise_if_triton_unavailable", None), (cuda, "get_compute_capability", 90)]
    answers += [(torch.cuda, "get_device_capability", (9, 0)), (torch.utils._triton, "triton_hash_with_backend", "")]
    answers += [(at, "is_available", True) for at in (cuda, torch.cuda)]
    answers += [(at, "current_device", 0) for at in (workers, torch.cuda)]
    answers += [(at, "get_device_properties", properties) for at in (cuda, workers, torch.cuda)]
    with contextlib.ExitStack() as patches:
        for where, name, answer in answers:
            patches.enter_context(mock.patch.object(where, name, staticmethod(lambda *_, answer=answer: answer)))
        yield


def of_compiled_steps(kinds=()):
    """{type: of_compiled_step}, of all types with one. In a process of its own: the compiler remembers its device."""
    kinds = kinds or [name for name, attn in ATTENTION.items() if not attn.keeps_keys]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return dict(zip(kinds, pool.map(of_compiled_step, kinds)))


def of_compiled_step(kind):
    """The names of what `of_step` launches once `sample.py --compile=True` has compiled it for a GPU."""
    attn, state, x = one_layer(kind)
    state, weights = attn.step(x, state)[1], dict(attn.named_parameters()) | dict(attn.named_buffers())

    def step(x, position, held, weights):
        held = iter(held)
        own = tree_map(lambda leaf: next(held) if torch.is_tensor(leaf) else position, state)
        with mock.patch.object(attn, "forward", attn.step):
            y, new = torch.func.functional_call(attn, weights, (x, own))
        sample.copy_states(tree_map(lambda x, leaf: x if torch.is_tensor(leaf) else 0, own, state), new)
        return y

    held = [leaf for leaf in tree_leaves(state) if torch.is_tensor(leaf)]
    args = x, torch.tensor(101), held, weights
    with torch.no_grad(), mock.patch.object(torch.compiler, "is_compiling", lambda: True):
        functional = torch.func.functionalize(step, remove="mutations")
        graph = make_fx(functional, decomposition_table=select_decomp_table(), tracing_mode="fake")(*args)
    graph.graph.set_codegen(torch.fx.graph.CodeGen())  # arguments in one row
    with pretending(), FakeTensorMode(allow_non_fake_inputs=True) as fake, DebugContext():
        inputs = [
            torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="cuda")
            for leaf in tree_leaves(args)
        ]
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.update_kwarg("device", torch.device("cuda", 0))
            if node.op == "get_attr":
                setattr(graph, node.target, torch.empty_like(getattr(graph, node.target), device="cuda"))
        graph.recompile()
        FakeTensorProp(graph, fake).propagate(*inputs)
        lowering = GraphLowering(graph, example_inputs=inputs, is_inference=True)
        options = inductor.patch(sample.CUDA_OPTIONS)
        with options, V.set_graph_handler(lowering), V.set_fake_mode(fake):
            lowering.run(*inputs)
            code = lowering.codegen()[0].value
    return re.findall(r"(extern_kernels\.\w+|triton_\w+)(?:\.run)?\(.*(?:out=|stream=)", code)


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
    print("\n| a step of one token, attention alone | launches | compiled | waits |\n|---|---|---|---|")
    compiled = of_compiled_steps()
    for kind in ATTENTION:
        found = of_step(kind)
        print(f"| `{kind}` | {found['operations']} | {len(compiled.get(kind, ())) or '-'} | {found['waits']} |")


if __name__ == "__main__":
    main()
