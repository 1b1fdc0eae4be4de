"""python bench.py --what=ops: what does an attention operator alone cost, beside softmax attention?"""

import functools
import math
from types import SimpleNamespace

import torch
from torch.nn import functional as F

import kernels.gla
import kernels.gsa
from benchmarks.clocks import accept, first_calls, interleaved, peak_memory, tolerance
from benchmarks.peers import NAIVE_LIMIT, PEERS, layer, nsa_layer, peer
from benchmarks.tables import numbers
from config import ConfigError
from kernels.distance import distance
from kernels.gla import gla
from kernels.gsa import gsa
from kernels.nsa import (
    nsa_compressed,
    nsa_compressed_dense,
    nsa_selected,
    nsa_selected_dense,
    nsa_sizes,
    nsa_window,
    nsa_window_dense,
)
from kernels.performer import performer
from model import ATTENTION, random_features


def sdpa(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def nsa(q, k, v, g, s, backend="auto"):
    """The three branches of native sparse attention with the sizes for T, a key head for all query heads, blocks
    compressed to their means, and gates of 1."""
    sizes, k, v = nsa_sizes(q.shape[1]), k[:, :, :1], v[:, :, :1]
    branches = nsa_compressed, nsa_selected, nsa_window
    if backend == "recurrent":
        branches = nsa_compressed_dense, nsa_selected_dense, nsa_window_dense
    compressed, selected, window = branches
    blocks = (x.unfold(1, sizes[0], sizes[1]).mean(-1) for x in (k, v))  # (B, N, 1, D)
    o, index = compressed(q, *blocks, *sizes[:4])
    return o + selected(q, k, v, index, sizes[2]) + window(q, k, v, sizes[4])


def performer_with(w, q, k, v, backend="auto"):
    return performer(q, k, v, w, w, backend=backend)[0]


OPERATORS = {  # each takes q, k (B, T, H, K), v (B, T, H, V), log-gates g (B, T, H, K) and slot gates s (B, T, H, 64)
    "softmax": lambda q, k, v, g, s: sdpa(q, k, v),
    "gla": lambda q, k, v, g, s, backend="auto": gla(q, k, v, g, gate_min=-1.25, backend=backend)[0],
    "gla_exact": lambda q, k, v, g, s, backend="auto": gla(q, k, v, g, backend=backend)[0],
    "gsa": lambda q, k, v, g, s, backend="auto": gsa(q, k, v, -torch.expm1(s), s, scale=1.0, backend=backend)[0],
    "nsa": nsa,
}
SPAN = functools.partial(distance, constant_ones=True)  # as adaptive spans call it
BANDED = functools.partial(SPAN, backend="banded")
WITH_TABLES = ("performer", "span", "mask_mix")  # these take q, k, v, and features or a mask by distance


def operator_rows(names, shape, bench, runtime):
    """{name of a row: (operator, its inputs)}; `span` has a row for each of --spans."""
    B, T, H, K, V = shape
    options = dict(device=runtime.device, dtype=getattr(torch, runtime.dtype))
    qkv = [torch.randn(B, T, H, d, **options).requires_grad_() for d in (K, K, V)]
    gates = [F.logsigmoid(torch.randn(B, T, H, d, device=runtime.device)) / 16 for d in (K, 64)]
    gates, x, rows = [t.requires_grad_() for t in gates], torch.arange(T, device=runtime.device), {}
    for name in names:
        if name == "performer":
            w = random_features(1, 256, K).expand(H, -1, -1).to(runtime.device)
            unit = [F.normalize(t.detach(), dim=-1).requires_grad_() for t in qkv[:2]]
            rows[name] = functools.partial(performer_with, w), [*unit, qkv[2]]
        elif name == "span":
            for span in numbers(bench.spans, "spans"):
                table = ((span - x) / 32).clamp(0, 1).log().repeat(H, 1)
                rows[f"span {span}"] = SPAN, [*qkv, table.requires_grad_()]
                if runtime.device_type == "cuda":  # where FlexAttention is taken: the form that it must beat
                    rows[f"span {span}, banded"] = BANDED, rows[f"span {span}"][1]
        elif name == "mask_mix":
            kept = [o for o in numbers(bench.offsets, "offsets") if o < T]
            table = torch.full((1, T), -math.inf, device=runtime.device)
            table[0, kept] = -torch.rand(len(kept), device=runtime.device)
            rows[f"mask_mix of {len(kept)}"] = distance, [*qkv, table.requires_grad_()]
        elif name != "nsa" or K == V:  # its values are as wide as its keys
            rows[name] = OPERATORS[name], [*qkv, *gates]
            if name == "nsa" and bench.peers:
                for row, n_kv in (("nsa layer", H), ("nsa layer, one key head", 1)):
                    attn, entry = nsa_layer(T, H, K, n_kv).to(**options), torch.randn(B, T, H * K, **options)
                    rows[row] = functools.partial(layer, attn), [entry.requires_grad_(), *attn.parameters()]
    for name, (ours, device, *_) in PEERS.items() if bench.peers else ():
        near = device == "cuda" or T <= NAIVE_LIMIT
        if ours in rows and device == runtime.device_type and near:
            rows[name] = peer(name, *rows[ours])
    return rows


def operator_step(call, inputs):
    o = call()
    return torch.autograd.grad(o, inputs, torch.ones_like(o), allow_unused=True)


def oracle(name, call):
    """What defines the operator of a row, and its other forms are tested against; None for peers and layers."""
    if name == "softmax":  # a mask by distance that masks nothing
        return lambda q, k, v, *_: distance(q, k, v, q.new_zeros(1, q.shape[1]), backend="dense").transpose(1, 2)
    if call in (distance, SPAN, BANDED):
        return functools.partial(distance, backend="dense")
    if name == "performer":
        return functools.partial(performer_with, call.args[0].double(), backend="recurrent")
    return functools.partial(call, backend="recurrent") if name in OPERATORS else None


@torch.no_grad()
def check_operators(rows, T, report):
    """Before anything is timed: the first tokens of each output are finite and those of its oracle in float64."""
    n = min(T, 128)
    for name, (call, inputs) in rows.items():
        if defined := oracle(name, call):
            few = [x[:, :n] for x in inputs]
            expected = defined(*(x.double() for x in few))
            difference = float((call(*few).double() - expected).norm() / expected.norm())
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
    known = [*OPERATORS, *WITH_TABLES]
    names = [n.strip() for n in bench.operators.split(",") if n.strip()] or known
    unknown = [n for n in names if n not in known]
    if unknown:
        raise ConfigError(f"--operators: no {unknown[0]!r}; write some of {', '.join(known)}")
    names = ["softmax"] + [n for n in names if n != "softmax"]
    kernels.gla.AUTOTUNE = kernels.gsa.AUTOTUNE = bench.autotune
    title = f"operators: 64 slots, 256 features, {bench.rounds} rounds; memory beyond the inputs, forward + backward"
    columns = "operator, B x T x H x K x V, forward (ms), forward + backward (ms), of softmax (ratio), ns/token, "
    columns += "of the matmul peak (share), peak memory (MiB)"
    with report.table("ops", title, columns, keys=2) as table:
        for shape in parse_shapes(bench.shapes):
            operators_at(shape, names, bench, runtime, report, table)


def operators_at(shape, names, bench, runtime, report, table):
    rows = operator_rows(names, shape, bench, runtime)
    calls = {name: functools.partial(call, *inputs) for name, (call, inputs) in rows.items()}
    steps = {name: functools.partial(operator_step, calls[name], inputs) for name, (_, inputs) in rows.items()}
    if bench.check:
        check_operators(rows, shape[1], report)
    if bench.autotune:
        first_calls(steps, "tuning", report)
    for name in rows.keys() & PEERS.keys():
        with torch.no_grad():
            ours, theirs = calls[PEERS[name][0]]().double(), calls[name]().double()
        error = (ours - theirs).norm() / theirs.norm()
        report.note(f"{name} at {shape}: its output differs from ours by {error:.1e} of its norm")
    label = "x".join(map(str, shape))
    forward = {name: torch.no_grad()(call) for name, call in calls.items()}
    forward = interleaved(forward, bench.rounds, bench.seconds / 4, runtime, f"{label} forward")
    both = interleaved(steps, bench.rounds, bench.seconds, runtime, f"{label} forward + backward")
    forward, both = ({name: [1000 * t for t in ts] for name, ts in times.items()} for times in (forward, both))
    for name in rows:
        ratio = [a / b for a, b in zip(both[name], both["softmax"])]
        each = [1e6 * t / (shape[0] * shape[1]) for t in both[name]]
        share = report.share_of_peak(operations(name, *rows[name], shape), [t / 1000 for t in both[name]])
        memory = peak_memory(steps[name], runtime.device_type)
        table.add(name, " x ".join(map(str, shape)), forward[name], both[name], ratio, each, share, memory)


def operations(name, call, inputs, shape):
    """What a forward pass of an operator executes, as the layer that it is of counts it; None for what no layer here
    is made of."""
    B, T, H, K, V = shape
    sizes = SimpleNamespace(n_head=H, d_head=(K + V) / 2, d_k=K, d_v=V, n_slot=64, n_feature=256, n_kv=1, mean=True)
    sizes.sizes, sizes.log_mask = nsa_sizes(T), lambda T: (inputs[3].detach(), None)
    sizes.gate_min, sizes.constant_ones = None if name == "gla_exact" else -1.25, call is SPAN
    kind = "mask_mix" if call in (distance, SPAN) else {"gla_exact": "gla"}.get(name, name)
    return B * ATTENTION[kind].flops(sizes, T)[1] if kind in ATTENTION else None
