"""python bench.py --what=ops: what does an attention operator alone cost, beside softmax attention?"""

import functools
import importlib

import torch
from torch.nn import functional as F

import kernels.launch
from benchmarks.clocks import accept, first_calls, interleaved, peak_memory, replayed, tolerance
from benchmarks.peers import PEERS, peers
from benchmarks.tables import numbers
from config import ConfigError
from kernels.distance import distance


def sdpa(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def softmax(q, k, v, **_):
    """PyTorch's own: its oracle is a mask by distance that masks nothing."""
    (B, T, H, K), V = q.shape, v.shape[3]

    def oracle(q, k, v):
        return distance(q, k, v, q.new_zeros(1, q.shape[1]), backend="dense").transpose(1, 2)

    return {"softmax": kernels.Case(sdpa, [q, k, v], oracle, 2 * B * H * (K + V) * (T * (T + 1) // 2))}


OPERATORS = {"softmax": softmax}
MODULES = [importlib.import_module(f"kernels.{name}") for name in kernels.MODULES]
for module in MODULES:
    OPERATORS |= module.CASES


def operator_rows(names, shape, bench, runtime):
    """{name of a row: its kernels.Case}: of one shape, the operators take the same q, k and v."""
    B, T, H, K, V = shape
    options = dict(device=runtime.device, dtype=getattr(torch, runtime.dtype))
    qkv = [torch.randn(B, T, H, d, **options).requires_grad_() for d in (K, K, V)]
    own, rows = {key: numbers(getattr(bench, key), key) for key in ("spans", "offsets")}, {}
    for name in names:
        rows |= OPERATORS[name](*qkv, **own)
    return rows | (peers(rows, shape, runtime) if bench.peers else {})


def operator_step(call, inputs):
    o = call()
    return torch.autograd.grad(o, inputs, torch.ones_like(o), allow_unused=True)


@torch.no_grad()
def check_operators(rows, T, report):
    """Before anything is timed: the first tokens of each output are finite and those of its oracle in float64."""
    n = min(T, 128)
    for name, case in rows.items():
        if case.oracle:
            few = [x[:, :n] for x in case.inputs]
            expected = case.oracle(*(x.double() for x in few))
            difference = float((case.call(*few).double() - expected).norm() / expected.norm())
            accept(name, n, difference, report)
    report.note(f"checked at T {n}: each operator is within {tolerance(report):g} of its oracle's norm")


def parse_shapes(text):
    try:
        shapes = [tuple(int(n) for n in shape.split("x")) for shape in text.split(",")]
    except ValueError:
        shapes = [()]
    if any(len(shape) != 5 or min(shape) < 1 for shape in shapes):
        raise ConfigError(f"--shapes={text}: write batch x time x heads x key size x value size, as 2x1024x4x64x64")
    return shapes


def bench_operators(bench, runtime, report):
    """Forward, and forward and backward, of each operator at each shape, with the ratio to SDPA of the same round."""
    names = [n.strip() for n in bench.operators.split(",") if n.strip()] or list(OPERATORS)
    if unknown := [n for n in names if n not in OPERATORS]:
        raise ConfigError(f"--operators: no {unknown[0]!r}; write some of {', '.join(OPERATORS)}")
    names = ["softmax"] + [n for n in names if n != "softmax"]
    kernels.launch.AUTOTUNE = bench.autotune
    title = f"operators: 64 slots, 256 features, {bench.rounds} rounds; memory beyond the inputs, forward + backward"
    columns = "operator, B x T x H x K x V, forward (ms), forward + backward (ms), of softmax (ratio), ns/token, "
    columns += "of the matmul peak (share), peak memory (MiB)"
    with report.table("ops", title, columns, keys=2) as table:
        for shape in parse_shapes(bench.shapes):
            operators_at(shape, names, bench, runtime, report, table)


def operators_at(shape, names, bench, runtime, report, table):
    rows = operator_rows(names, shape, bench, runtime)
    calls = {name: functools.partial(case.call, *case.inputs) for name, case in rows.items()}
    steps = {name: functools.partial(operator_step, calls[name], case.inputs) for name, case in rows.items()}
    if bench.autotune:  # at this length, not at that of the check
        for module in MODULES:
            for kernel in module.KERNELS.values():
                kernel.runs.clear()
        first_calls(steps, "tuning", report)
    if bench.check:
        check_operators(rows, shape[1], report)
    for name in rows.keys() & PEERS.keys():
        with torch.no_grad():
            ours, theirs = calls[PEERS[name][0]]().double(), calls[name]().double()
        error = (ours - theirs).norm() / theirs.norm()
        report.note(f"{name} at {shape}: its output differs from ours by {error:.1e} of its norm")
    label = "x".join(map(str, shape))
    forward = {name: torch.no_grad()(call) for name, call in calls.items()}
    if runtime.device_type == "cuda":
        forward, steps = ({name: replayed(call) for name, call in d.items()} for d in (forward, steps))
    forward = interleaved(forward, bench.rounds, bench.seconds / 4, runtime, f"{label} forward")
    both = interleaved(steps, bench.rounds, bench.seconds, runtime, f"{label} forward + backward")
    forward, both = ({name: [1000 * t for t in ts] for name, ts in times.items()} for times in (forward, both))
    for name, case in rows.items():
        ratio = [a / b for a, b in zip(both[name], both["softmax"])]
        each = [1e6 * t / (shape[0] * shape[1]) for t in both[name]]
        share = report.share_of_peak(case.executed, [t / 1000 for t in both[name]])
        step = functools.partial(operator_step, calls[name], case.inputs)
        memory = peak_memory(step, runtime.device_type)
        table.add(name, " x ".join(map(str, shape)), forward[name], both[name], ratio, each, share, memory)
