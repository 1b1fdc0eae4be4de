"""What things cost, and what checkpoints score.

    python bench.py                                        # the overview: cost of a layer of each attention type
    python bench.py --what=step                            # training steps: against a plain PyTorch stack and the peak
    python bench.py --what=step --beside=softmax --attention_type=adaptive_span   # of types, in the same rounds
    python bench.py --what=ops                             # attention operators against time, beside SDPA
    python bench.py --what=decode                          # sampling: with the cache, and recomputing the prefix
    python bench.py --what=quality --out_dir=out/a,out/b   # the full evaluation pass over checkpoints
    python bench.py --what=curves --out_dir=out/a,out/b    # loss against steps and time, as a PNG
    python bench.py --what=inspect --out_dir=out/a         # what masks keep, what that costs, and pictures of it
    python bench.py --what=heads --out_dir=out/a           # gates, and the weight on the first token, by layer
    python bench.py --what=superposition --out_dir=out/a   # which head of a toy carries which skip trigram
    python bench.py --what=all                             # all that needs no run; with --out_dir, quality and curves
    python bench.py --compare=A.json,B.json --fail_below=0.95   # the speeds of two files, for who changed a kernel

Timings are medians over interleaved rounds (A B A B), with minimum and maximum, so that a drifting machine favours
none of them; a range of more than half is printed alone, marked `wide`. Shares of the matmul peak count what a forward
pass executes three times; shares of the copy bandwidth the weights, states and keys that a token must read. Every table
goes into --json as well, after each part of --what=all:

    schema    1
    what      the value of --what, `time` when it ended (UTC), `commit` of the code
    machine   device, dtype, threads, processor, clock (Python's time.NAME, or CUDA events); matmul_gflops, copy_gb_s
    versions  python, torch
    config    bench: every key of this script; model: the keys that were given
    tables    {name: {title, columns, keys, rows}}: a row has a cell for each column, its unit in the column's name, and
              its first `keys` cells name it. A cell is text, a number, null, or a list: one number for each round
    notes     lines printed under the tables
"""

import copy
import functools
import importlib.util
import itertools
import json
import math
import os
import platform
import signal
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from unittest import mock

if __name__ == "__main__":  # Ctrl-C while modules load is no traceback of theirs
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

import config
import kernels.gla
import kernels.gsa
from config import ConfigError, key
from data import DataError, Dataset, SymbolsCodec, windows, write_meta, write_split
from data.scoring import evaluate, token_nats
from kernels.distance import distance, paths
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
)  # fmt: skip
from kernels.performer import performer
from model import ATTENTION, GPT, GPTConfig, matrices, own_keys, random_features
from train import Run, TrainConfig, World, eval_window, git_commit, progress_bar, write_atomically
from weights import ModelError, read_checkpoint

NANOGPT_SHAPES = [  # overhead rules; the size of a small character model; a long block
    dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, vocab_size=65),
    dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=16, vocab_size=256),
    dict(n_layer=4, n_head=4, n_embd=256, block_size=1024, batch_size=4, vocab_size=256),
]


WHATS = ("overview", "step", "ops", "decode", "quality", "curves", "inspect", "heads", "superposition", "all")


@dataclass
class BenchConfig:
    """Benchmark"""

    what: str = key("overview", "what to measure", choices=WHATS)
    rounds: int = key(5, "interleaved rounds", low=1)
    seconds: float = key(2.0, "time for each measurement of a round", low=0.01)
    lengths: str = key("128,256,512,1024,2048,4096,8192", "lengths of a context (overview)")
    limit: float = key(100.0, "seconds after which no round begins, but for the first two (overview)", low=0.0)
    check: bool = key(True, "compare outputs with those of the oracle before timing (overview, ops)")
    batch_size: int = key(0, "sequences of a call; 0: 4096 tokens (overview), 16 with a shape given (step)", low=0)
    tokens: int = key(500, "tokens to sample (decode)", low=1)
    positions: str = key("10,10000", "tokens before the one that is timed, comma-separated (decode)")
    operators: str = key("", "operators, comma-separated; empty: all (ops)")
    shapes: str = key(
        "2x1024x4x64x64,2x4096x4x64x64,2x16384x4x64x64", "batch x time x heads x key size x value size, ... (ops)"
    )
    peers: bool = key(False, "other implementations beside ours, from requirements-peers.txt (ops)")
    autotune: bool = key(False, "try every configuration of the Triton kernels first (ops)")
    beside: str = key("", "attention types of new models, their steps timed in the same rounds (step)")
    spans: str = key("256", "spans of `span`, a ramp of 32 included (ops)")
    offsets: str = key("0,1,2,3,4", "distances that `mask_mix` keeps (ops)")
    out_dir: str = key("", "folders of runs, comma-separated (all but overview, ops and decode)")
    prune: float = key(0.02, "the loss without candidates below this share of the largest (inspect)", low=0.0, high=1.0)
    inspect_batch_size: int = key(4, "sequences of the timed attention (inspect)", low=1)
    text: str = key("", "text of the attention maps; empty: from the validation split (inspect)")
    dataset: str = key("", "data set (quality); empty: the one that a checkpoint was trained on")
    split: str = key("val,test", "splits (quality)")
    eval_context: int = key(0, "tokens of context in the full pass; 0: block_size", low=0)
    eval_stride: int = key(0, "step between its windows; 0: its context", low=0)
    eval_batch_size: int = key(16, "windows at once", low=1)
    png: str = key("", "picture to write; empty: bench.png, curves.png or quality.png")
    compare: str = key("", "instead of measuring, compare two files that --json wrote: A.json,B.json")
    fail_below: float = key(0.0, "exit status 1 where the speed of B is below this share of A's (compare)", low=0.0)
    json: str = key("bench.json", "file to write the tables to; empty: none")
    device: str = key("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = key("auto", "autocast precision", choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = key(False, "torch.compile our training step")


# -----------------------------------------------------------------------------
# tables, the file that they go into, and pictures


def number(x, decimals=None):
    """With thousands separators and four significant digits, or rounded to `decimals` (below 0: to tens, hundreds)."""
    if isinstance(x, int) or not math.isfinite(x):
        return f"{x:,}"
    decimals = 3 - math.floor(math.log10(abs(x) or 1)) if decimals is None else decimals
    return f"{round(x, decimals):,.{max(0, decimals)}f}"


def spread(values):
    """'median (min - max)', with digits down to a tenth of the range; the range alone where it is more than half."""
    low, middle, high = min(values), statistics.median(values), max(values)
    if low == high:
        return number(middle)
    if high - low > 0.5 * abs(middle):
        low, high = (number(x, 1 - math.floor(math.log10(abs(x) or 1))) for x in (low, high))
        return f"{low} - {high} (wide)"
    decimals = min(math.ceil(1 - math.log10(high - low)), 3 - math.floor(math.log10(high)))
    return f"{number(middle, decimals)} ({number(low, decimals)} - {number(high, decimals)})"


class Table:
    """Rows of cells under headings that name the unit; the first `keys` cells name a row. A cell is text, a number,
    None or a list: one number for each round. As a context it prints itself at its end, even if an error cut it."""

    def __init__(self, name, title, columns, keys=1):
        self.name, self.title, self.keys, self.rows = name, title, keys, []
        self.specs = dict(columns) if isinstance(columns, dict) else dict.fromkeys(columns.split(", "))

    def add(self, *cells):
        self.rows.append(dict(zip(self.specs, cells, strict=True)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.show()

    def show(self):
        print("\n".join(["", self.title, "", *self.lines()]), flush=True)

    def lines(self):
        """In Markdown, aligned, without the columns that are empty."""
        filled = [name for name in self.specs if any(row[name] is not None for row in self.rows)] or list(self.specs)
        texts = [filled] + [[self.text(name, row[name]) for name in filled] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*texts)]
        numeric = [any(isinstance(row[name], (int, float, list)) for row in self.rows) for name in filled]
        lines = [[c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric)] for row in texts]
        lines[1:1] = [["-" * (w - 1) + (":" if n else "-") for w, n in zip(widths, numeric)]]
        return [f"| {' | '.join(line)} |" for line in lines]

    def text(self, name, cell):
        if cell is None or isinstance(cell, str):
            return cell or "-"
        if isinstance(cell, list):
            return spread(cell)
        return format(cell, self.specs[name]) if self.specs[name] else number(cell)


class Report:
    """What this run prints and writes: see the top of this file."""

    def __init__(self, bench, runtime, model_keys):
        self.path, self.tables, self.notes, self.peaks = bench.json, {}, [], {}
        self.runtime, self.config = runtime, {"bench": asdict(bench), "model": model_keys}
        self.commit = git_commit()  # before a picture in the repository is written again

    def table(self, name, title, columns, keys=1):
        self.tables[name] = Table(name, title, columns, keys)
        return self.tables[name]

    def note(self, text):
        self.notes.append(text)
        print(text, flush=True)

    def measure_machine(self, seconds):
        """Operations and bytes a second that nothing here can exceed: each figure is read beside them."""
        gflops, copied = matmul_peak(self.runtime, seconds) / 1e9, copy_bandwidth(self.runtime, seconds) / 1e9
        self.peaks = {"matmul_gflops": gflops, "copy_gb_s": copied}
        print(f"matmul peak {number(gflops)} GFLOP/s, copy bandwidth {number(copied)} GB/s", flush=True)
        load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count()
        if self.runtime.device_type == "cpu" and load > 0.5 * cores:
            hint = "" if torch.get_num_threads() == 1 else "; OMP_NUM_THREADS=1 times by the processor's own clock"
            self.note(f"load average {load:.1f} on {cores} cores: other work shares them{hint}")

    def share_of_peak(self, forward, seconds):
        """The measured matmul peak's share of a forward and backward pass, for each round: operations that the forward
        pass executes (None: nobody counted them), and twice as many for the backward pass, which executes no fewer."""
        return None if forward is None else [3 * forward / 1e9 / self.peaks["matmul_gflops"] / s for s in seconds]

    def share_of_bandwidth(self, bytes, seconds):
        """The measured copy bandwidth's share of reading so many bytes, for each round: what a cache holds is read
        faster than that, and then no share is given."""
        shares = [bytes / 1e9 / self.peaks["copy_gb_s"] / s for s in seconds]
        return shares if max(shares) <= 1 else "above 1: from caches"

    def write(self):
        """After each part of a measurement, what there is until then."""
        if not self.path or not any(t.rows for t in self.tables.values()):
            return
        r = self.runtime
        machine = {"device": r.device, "dtype": r.dtype, "threads": torch.get_num_threads(), "processor": processor(r)}
        machine["clock"] = "events" if r.device_type == "cuda" else clock_name(r.device_type)
        found = {"schema": 1, "what": self.config["bench"]["what"], "machine": machine | self.peaks}
        found |= {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": self.commit}
        found |= {"versions": {"python": platform.python_version(), "torch": torch.__version__}, "config": self.config}
        tables = {
            name: {"title": t.title, "columns": list(t.specs), "keys": t.keys, "rows": t.rows}
            for name, t in self.tables.items()
        }
        found |= {"tables": tables, "notes": self.notes}
        text = json.dumps(found, indent=1)
        write_atomically(self.path, lambda f: f.write(text.encode()))
        print(f"wrote {self.path}")


def processor(runtime):
    if runtime.device_type == "cuda":
        return torch.cuda.get_device_name(runtime.device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def read_report(path):
    """{(table, first cells): row} of a file that this script wrote."""
    try:
        with open(path, encoding="utf-8") as f:
            tables = json.load(f)["tables"]
        return {(n, *(row[c] for c in t["columns"][: t["keys"]])): row for n, t in tables.items() for row in t["rows"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path}: not a file that bench.py wrote") from None


TIMES, RATES = ("(ms)", "(us)", "ns/token"), ("tokens/s", "(tokens/s)")  # how columns that hold what was timed end


def compare(bench, report):
    """The speed of what the second file of --compare timed over the first's: lowest, middle and highest that the rounds
    allow. Where softmax was timed in the same rounds it is divided out, and not judged itself: a machine that is
    slower than it was does not count. Returns 1 if a middle is below --fail_below."""
    paths = [path.strip() for path in bench.compare.split(",")]
    if len(paths) != 2:
        raise ConfigError(f"--compare={bench.compare}: write two files, A.json,B.json")
    (a, b), slow = (read_report(path) for path in paths), 0
    common = [(key, c) for key in a if key in b for c in a[key] if c.endswith(TIMES + RATES)]
    common = [(key, c) for key, c in common if all(isinstance(row[key].get(c), list) for row in (a, b))]
    if not common:
        raise ConfigError(f"--compare={bench.compare}: nothing that was timed is in both files")
    columns = "table, row, measured, A (in its unit), B (in its unit), speed of B / A (ratio), beside softmax (ratio), "
    columns += "too slow"
    with report.table("compare", f"A is {paths[0]}, B is {paths[1]}; above 1 is faster", columns, keys=3) as table:
        for key, column in common:
            cells, reference, beside = (a[key][column], b[key][column]), (key[0], "softmax", *key[2:]), None
            if reference in a and reference in b and key != reference:
                by_round = [[x / y for x, y in zip(f[key][column], f[reference][column])] for f in (a, b)]
                beside = speed_ratio(*by_round, column)
            speed = speed_ratio(*cells, column)
            others = any(k in b and (k[0], *k[2:]) == (key[0], *key[2:]) for k in a if k != key)
            judged = None if key == reference and others else beside or speed
            below = judged is not None and statistics.median(judged) < bench.fail_below
            slow += below
            verdict = f"below {bench.fail_below:g}" if below else None
            table.add(key[0], ", ".join(map(str, key[1:])), column, *cells, speed, beside, verdict)
    if alone := len(a.keys() ^ b.keys()):
        report.note(f"{alone} rows are in one of the files alone")
    return int(slow > 0)


def speed_ratio(a, b, column):
    """[lowest, middle, highest] speed of rounds b over rounds a, which are rates or times by their column's name."""
    a, b = (a, b) if column.endswith(RATES) else (b, a)
    return [min(b) / max(a), statistics.median(b) / statistics.median(a), max(b) / min(a)]


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # safe for colour-blind eyes
LINES = [  # a colour and a marker together are one line's alone
    dict(color=COLOURS[i % 6], marker=marker, linestyle="-" if i < 6 else "--", markersize=6)
    for i, marker in enumerate("os^Dv<>ph*PX")
]


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
    )
    return plt


def save_figure(figure, path):
    """On white, with a margin of its own, so that it reads the same on a dark page."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=140, facecolor="white")
    pyplot().close(figure)
    print(f"wrote {path}")


def heat_map(values, rows, size, label, vmax=1, cmap="viridis", **options):
    """A figure and its axes: a matrix whose rows have names, and what its colours mean."""
    figure, axes = pyplot().subplots(figsize=size, layout="constrained")
    image = axes.imshow(values.numpy(), aspect="auto", interpolation="nearest", cmap=cmap, vmin=0, vmax=vmax)
    axes.set(yticks=range(len(rows)), **options)
    axes.set_yticklabels(rows, fontsize=9)
    axes.grid(False)
    figure.colorbar(image).set_label(label, fontsize=10)
    return figure, axes


# -----------------------------------------------------------------------------
# clocks


def timed(step, seconds, device_type, pick=min, inputs=tuple):
    """Seconds of one call step(*inputs()), of the calls of about `seconds`, each timed by itself, without its inputs:
    the fastest, because what else the machine does only adds to it. On CUDA between two events, and the cache is
    overwritten before each call."""
    times, events, end = [], [], time.perf_counter() + seconds
    clock = getattr(time, clock_name(device_type, pick))
    while not (times or events) or time.perf_counter() < end:
        given = inputs()
        if device_type == "cuda":
            overwritten().zero_()
            events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            events[-1][0].record()
            step(*given)
            events[-1][1].record()
            if len(events) % 16 == 0:  # the queue must not grow, nor run empty
                torch.cuda.synchronize()
            continue
        start = clock()
        step(*given)
        if device_type == "mps":
            torch.mps.synchronize()
        times.append(clock() - start)
    if events:
        torch.cuda.synchronize()
    return pick(times or [a.elapsed_time(b) / 1000 for a, b in events])


def clock_name(device_type, pick=min):
    """One thread's processor time tells what a call costs however busy the machine is. Several threads wait for each
    other, and a whole training step for its data: the monotonic clock."""
    alone = device_type == "cpu" and torch.get_num_threads() == 1 and pick is min
    return "process_time" if alone else "perf_counter"


@functools.cache
def overwritten():
    return torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda")


def interleaved(calls, rounds, seconds, runtime, label, until=math.inf, pick=min, warm=True, inputs=None):
    """{name: [seconds of a call in each round]} for {name: callable}, in the order A B C, C B A, and so on; with `warm`
    after a call of each that is not counted. No round begins after the moment `until`, but for the first two. `inputs`:
    {name: what makes the arguments of each call}, where it takes any."""
    times, first = {name: [] for name in calls}, -1 if warm else 0
    with progress_bar((rounds - first) * len(calls), label, "call", World(0, 1, 0)) as bar:
        for i in range(first, rounds):
            if i > 1 and time.perf_counter() > until:
                break
            for name in list(calls)[:: -1 if i % 2 else 1]:
                given = (inputs or {}).get(name, tuple)
                if i < 0:
                    calls[name](*given())
                else:
                    times[name].append(timed(calls[name], seconds, runtime.device_type, pick, given))
                bar.update()
    return times


def fresh(state):
    """What makes the argument of a call that decodes: a copy of the state, which a step changes, partly in place."""

    def inputs():
        with torch.inference_mode():
            return (copy.deepcopy(state),)

    return inputs


def matmul_peak(runtime, seconds):
    """Operations a second of a square product in the run's precision: the highest of many short trials."""
    size = 1024 if runtime.device_type == "cpu" else 8192
    dtype = getattr(torch, runtime.dtype)
    a, b = (torch.randn(size, size, device=runtime.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = [timed(lambda: torch.mm(a, b, out=out), seconds / 20, runtime.device_type) for _ in range(10)]
    return 2 * size**3 / min(times)


def copy_bandwidth(runtime, seconds):
    """Bytes a second, read and written, of copying what no cache holds: the highest of many short trials."""
    n = 2**26 if runtime.device_type == "cpu" else 2**30
    a, b = (torch.zeros(n, dtype=torch.uint8, device=runtime.device) for _ in range(2))
    return 2 * n / min(timed(lambda: b.copy_(a), seconds / 20, runtime.device_type) for _ in range(10))


def peak_memory(step, device_type):
    """MiB that a call takes at its peak beyond what is there before it, by PyTorch's allocator: on CUDA its counter, on
    a CPU the largest sum over the allocations and frees that the profiler saw, those inside operators included."""
    if device_type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if device_type != "cpu":
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports its start and stop on stderr
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    events = [(e.start_ns(), e.nbytes()) for e in profile.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate((n for _, n in sorted(events, key=lambda e: e[0])), initial=0)) / 2**20


# -----------------------------------------------------------------------------
# the overview: a layer of each attention type, projections included, at the same shape

LAYER = dict(n_layer=1, n_head=4, n_embd=256)
LAYER_TOKENS = 4096  # of a call, whatever T
SWEEP = "attention, T (tokens), batch (sequences), forward (ms), forward + backward (ms), of softmax (ratio), "
SWEEP += "of the matmul peak (share), decoding (tokens/s), state (bytes), peak memory (MiB), nominal (MFLOP), "
SWEEP += "executed (MFLOP), saved of softmax's (share)"
PARTS = {  # of what is printed: a table for what training costs, and one for decoding and what needs no clock
    "overview": SWEEP.split(", ")[:2] + SWEEP.split(", ")[3:7] + ["crossover with softmax (tokens)"],
    "overview, further": SWEEP.split(", ")[:2] + SWEEP.split(", ")[7:],
}


@dataclass
class Layer:
    """An attention layer for contexts of T tokens: its calls, and what needs no clock."""

    attn: nn.Module
    x: torch.Tensor  # (B, T, C)
    runtime: config.Runtime

    @classmethod
    def make(cls, name, T, shape, batch_size, runtime):
        c = config.build(GPTConfig, own_keys(shape, name) | dict(attention_type=name, block_size=T))
        attn = ATTENTION[name](c).to(runtime.device)
        x = torch.randn(batch_size or max(1, LAYER_TOKENS // T), T, c.n_embd, device=runtime.device)
        return cls(torch.compile(attn) if runtime.compile else attn, x.requires_grad_(), runtime)

    def forward(self):
        with torch.no_grad(), self.runtime.autocast():
            return self.attn(self.x)[0]

    def forward_backward(self):
        with self.runtime.autocast():
            y = self.attn(self.x)[0]
        if y.requires_grad:
            torch.autograd.grad(y, [self.x, *self.attn.parameters()], torch.ones_like(y), allow_unused=True)

    @torch.inference_mode()
    def decoder(self):
        """A call that decodes a token from a state, and the state after T - 1 others."""
        T = self.x.size(1)
        with self.runtime.autocast():
            state = self.attn.init_state(1, T)
            if T > 1:
                state = self.attn.step(self.x[:1, 1:], state)[1]

        def decode(state):
            with torch.inference_mode(), self.runtime.autocast():
                return self.attn.step(self.x[:1, :1], state)[0]

        return decode, state

    @torch.no_grad()
    def difference(self):
        """Of the output from that of the same layer in float64, which decodes token by token: of the oracle's norm."""
        self.attn.eval()
        oracle = copy.deepcopy(getattr(self.attn, "_orig_mod", self.attn)).double()
        x, state = self.x[:1].double(), oracle.init_state(1, self.x.size(1))
        steps = []
        for token in x.split(1, 1):
            y, state = oracle.step(token, state)
            steps.append(y)
        expected = torch.cat(steps, 1)
        found = self.forward()[:1].double()
        self.attn.train()
        return float((found - expected).norm() / expected.norm().clamp(min=1e-30))

    def operations(self):
        """(nominal, executed) of the attention of a sequence, and all that a forward pass of the layer executes."""
        nominal, executed = self.attn.flops(self.x.size(1))
        return (
            nominal,
            executed,
            self.x.size(0) * (executed + 2 * self.x.size(1) * sum(w.numel() for w in matrices(self.attn))),
        )


def tolerance(report):
    return 1e-3 if report.runtime.dtype == "float32" else 5e-2


def accept(name, T, difference, report):
    if not difference < tolerance(report):  # NaN too
        raise ModelError(f"{name} at T {T}: its output is off by {difference:.1e} of its norm")


def first_calls(calls, what, report):
    """Compiling and tuning, apart from what is timed afterwards."""
    seconds = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        if report.runtime.device_type == "cuda":
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start
    report.note(f"first calls, {what} included (s): " + ", ".join(f"{n} {t:.2f}" for n, t in seconds.items()))


def overview(types, shape, bench, runtime, report):
    """Each type at each length, all in the same rounds; printed at the shortest and the longest."""
    lengths, until = sorted(set(numbers(bench.lengths, "lengths"))), time.perf_counter() + bench.limit
    if lengths[0] < 1 or "block_size" in shape:
        raise ConfigError(f"--lengths={bench.lengths}: write numbers of tokens, in place of block_size too")
    types = ["softmax", *(t for t in types if t != "softmax")]
    layers = {(t, T): Layer.make(t, T, shape, bench.batch_size, runtime) for T in lengths for t in types}
    if bench.check:
        T = lengths[min(1, len(lengths) - 1)] if lengths[0] < 128 else lengths[0]
        for t in types:  # the layer in float64, which decodes token by token
            accept(t, T, layers[t, T].difference(), report)
        report.note(f"checked at T {T}: each layer is within {tolerance(report):g} of its norm in float64")
    if runtime.compile:
        first_calls({f"{t} {T}": x.forward_backward for (t, T), x in layers.items()}, "compiling", report)
    decoders = {key: layer.decoder() for key, layer in layers.items()}
    calls = {(*key, "forward"): layer.forward for key, layer in layers.items()}
    calls |= {(*key, "both"): layer.forward_backward for key, layer in layers.items()}
    calls |= {(*key, "decode"): decode for key, (decode, _) in decoders.items()}
    inputs = {(*key, "decode"): fresh(state) for key, (_, state) in decoders.items()}
    # a whole call of each: what follows is warm
    memory = {key: peak_memory(layer.forward_backward, runtime.device_type) for key, layer in layers.items()}
    times = interleaved(calls, bench.rounds, bench.seconds / 50, runtime, "rounds", until, warm=False, inputs=inputs)
    sweep = report.table("sweep", "a layer at each length", SWEEP, keys=2)
    for (t, T), layer in layers.items():
        forward, both, decode = (times[t, T, kind] for kind in ("forward", "both", "decode"))
        ratio = [a / b for a, b in zip(both, times["softmax", T, "both"])]
        nominal, executed, whole = layer.operations()
        saved = 1 - executed / layers["softmax", T].operations()[1]
        share = report.share_of_peak(whole, both)
        row = (t, T, layer.x.size(0), [1e3 * s for s in forward], [1e3 * s for s in both], ratio, share)
        decoding = [1 / s for s in decode], state_bytes(decoders[t, T][1])
        sweep.add(*row, *decoding, memory[t, T], nominal / 1e6, executed / 1e6, saved)
    rounds, tokens = len(next(iter(times.values()))), sweep.rows[0]["batch (sequences)"] * lengths[0]
    title = f"a layer of n_embd {shape['n_embd']}, n_head {shape['n_head']}, as initialised, projections included, "
    title += f"{tokens:,} tokens or a sequence a call, {rounds} rounds; crossover: no slower than softmax from there on"
    further = "decoding after T - 1 tokens; memory of a forward and backward pass; operations of attention, forward, "
    for table in summary(sweep.rows, title, further + "one sequence"):
        report.tables[table.name] = table
        table.show()
    plot_overview(sweep, bench.png or "bench.png")


def summary(sweep, *titles):
    """The tables that are printed of the sweep's rows, at the shortest and the longest T."""
    lengths, tables = sorted({row["T (tokens)"] for row in sweep}), []
    for (name, columns), title in zip(PARTS.items(), titles):
        tables.append(Table(name, title, ", ".join(columns), keys=2))
        for row in sweep:
            if row["T (tokens)"] in (lengths[0], lengths[-1]):
                ratios = [r["of softmax (ratio)"] for r in sweep if r["attention"] == row["attention"]]
                cross = crossover(lengths, ratios) if row["attention"] != "softmax" else None
                tables[-1].add(*(row.get(column, cross) for column in columns))
    return tables


def crossover(lengths, ratios):
    """The length from which on an attention is no slower than softmax, given its ratios (a list of rounds) at each
    length: for each round, interpolated in the logarithms. A bound where all rounds put it outside; text that says how
    far they are apart where only some do."""
    found = []
    for round in zip(*ratios):
        slower = [i for i, r in enumerate(round) if r > 1]
        if not slower:
            found.append(0)
        elif slower[-1] == len(lengths) - 1:
            found.append(math.inf)
        else:
            i = slower[-1]
            (a, b), (low, high) = (math.log(r) for r in round[i : i + 2]), (math.log(T) for T in lengths[i : i + 2])
            found.append(math.exp(low + (high - low) * a / (a - b)))
    if min(found) > 0 and max(found) < math.inf:
        return found
    bounds = {0: f"below {lengths[0]:,}", math.inf: f"above {lengths[-1]:,}"}
    low, high = (bounds.get(T) or f"{T:,.0f}" for T in (min(found), max(found)))
    return low if low == high else f"uncertain: {low} to {high}"


def plot_overview(sweep, path):
    """Time, memory and decoding against length, a line for each type that computes something."""
    panels = {  # column: (label, what is drawn of a cell that is for n tokens)
        "forward + backward (ms)": ("forward + backward (µs/token)", lambda y, n: 1e3 * y / n),
        "peak memory (MiB)": ("peak memory (KiB/token)", lambda y, n: 1024 * y / n),
        "decoding (tokens/s)": ("decoding (µs/token)", lambda y, n: 1e6 / y),
    }
    types = list(dict.fromkeys(row["attention"] for row in sweep.rows if row["executed (MFLOP)"]))
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(8.4, 7.4), layout="constrained")
    for axis, (column, (label, drawn)) in zip(axes.flat, panels.items()):
        for i, name in enumerate(types):
            rows = [row for row in sweep.rows if row["attention"] == name and row[column] is not None]
            cells = [row[column] if isinstance(row[column], list) else [row[column]] for row in rows]
            lengths = [row["T (tokens)"] for row in rows]
            ys = [[drawn(y, r["batch (sequences)"] * T) for y in cell] for r, T, cell in zip(rows, lengths, cells)]
            style = LINES[i % len(LINES)] if i else dict(color="black", linewidth=2.5)
            axis.plot(lengths, [statistics.median(y) for y in ys], label=name, **style)
            axis.fill_between(lengths, [min(y) for y in ys], [max(y) for y in ys], color=style["color"], alpha=0.15)
        axis.set(xscale="log", yscale="log", xlabel="T (tokens)", ylabel=label)
        axis.set_xticks(lengths, [f"{T:,}" for T in lengths], rotation=45)
        axis.xaxis.set_minor_locator(plt.NullLocator())
        axis.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(plt.FuncFormatter(lambda y, _: f"{y:,g}"))
        axis.yaxis.set_minor_locator(plt.NullLocator())
    axes[1, 1].set_axis_off()
    handles = axes[0, 0].get_legend_handles_labels()
    axes[1, 1].legend(*handles, loc="center", frameon=False, ncols=1 + len(types) // 9, fontsize=11, handlelength=1.5)
    save_figure(figure, path)


# -----------------------------------------------------------------------------
# training step


class PlainBlock(nn.Module):
    """The same block from PyTorch's own modules, and nothing around it: what a training step cannot be slower than."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.ln_1, self.ln_2 = (nn.LayerNorm(c.n_embd, bias=False) for _ in range(2))
        self.qkv = nn.Linear(c.n_embd, 3 * c.n_embd, bias=False)
        self.proj = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(c.n_embd, 4 * c.n_embd, bias=False), nn.GELU(), nn.Linear(4 * c.n_embd, c.n_embd, bias=False)
        )

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(self.ln_1(x)).split(C, dim=2)
        q, k, v = (t.view(B, T, self.c.n_head, -1).transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.ln_2(x))


def plain_step(c, cfg, runtime, idx, targets):
    """A training step of the plain stack: forward, backward, clip, fused AdamW. Returns a callable."""
    wte, wpe = nn.Embedding(c.vocab_size, c.n_embd), nn.Embedding(c.block_size, c.n_embd)
    blocks = nn.Sequential(*(PlainBlock(c) for _ in range(c.n_layer)))
    ln_f = nn.LayerNorm(c.n_embd, bias=False)
    model = nn.ModuleList((wte, wpe, blocks, ln_f)).to(runtime.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    positions = torch.arange(c.block_size, device=runtime.device)

    def step():
        with runtime.autocast():
            x = ln_f(blocks(wte(idx) + wpe(positions)))
            loss = F.cross_entropy(F.linear(x, wte.weight).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def random_dataset(folder, vocab_size, n=200_000):
    """A prepared data set of random ids, so that the whole training step, reader included, is timed."""
    codec = SymbolsCodec([str(i) for i in range(vocab_size)])
    text = " ".join(map(str, torch.randint(vocab_size, (n,)).tolist())).encode()
    splits = {"train": write_split(folder, "train", [text], codec, words=False)}
    write_meta(folder, codec, splits, source="random", sha256="", label="random ids")
    return Dataset(folder)


def our_step(model, cfg, runtime, folder):
    dataset = random_dataset(tempfile.mkdtemp(dir=folder), model.config.vocab_size)
    run = Run(cfg, runtime, World(0, 1, 0), dataset, model.to(runtime.device), None)
    if runtime.compile:
        run.objective = torch.compile(run.objective)
    run.model.train()
    return run.step, run.model


def bench_steps(shapes, bench, runtime, report):
    columns = "attention, n_layer (layers), n_head (heads), n_embd (channels), block (tokens), batch (sequences), "
    columns += "vocabulary (ids), parameters (count), step (ms), tokens/s, plain stack (ms), ours / plain (ratio), "
    columns += "nanoGPT's count (MFLOP/token), of the peak by it (share), of the matmul peak (share)"
    title = f"training steps, {bench.rounds} rounds; the plain stack is softmax attention from torch.nn"
    with report.table("step", title, columns, keys=7) as table:
        for shape in shapes:
            bench_step(shape, bench, runtime, report, table)


def bench_step(shape, bench, runtime, report, table):
    """One shape: our whole step (data, forward, backward, clip, AdamW) and the plain stack's, in the same rounds."""
    batch_size = shape.pop("batch_size")
    c = config.build(GPTConfig, shape)
    cfg = TrainConfig(batch_size=batch_size, learning_rate=1e-4, min_lr=1e-5)
    x, y = (torch.randint(c.vocab_size, (batch_size, c.block_size), device=runtime.device) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        step, model = our_step(GPT(c), cfg, runtime, folder)
        # the plain stack is softmax attention, learned positions and a GELU MLP, whatever stands beside it
        beside = plain_step(c, cfg, runtime, x, y)
        if runtime.compile:
            first_calls({c.attention_type: step}, "compiling", report)
        calls, pick = {"ours": step, "plain": beside}, statistics.mean  # a step waits for its data now and then
        times = interleaved(calls, bench.rounds, bench.seconds, runtime, c.attention_type, pick=pick)
    ours, plain = ([1000 * t for t in ts] for ts in times.values())
    peak = max(report.peaks["matmul_gflops"], matmul_peak(runtime, bench.seconds) / 1e9)  # the machine drifts
    report.peaks["matmul_gflops"] = peak
    tokens, N = batch_size * c.block_size, model.num_params()
    rates, counted, share = [1000 * tokens / t for t in ours], None, None
    if c.attention_type == "softmax":  # what it takes for attention is softmax attention's, of a full T x T
        counted = 6 * N + 12 * c.n_layer * c.n_head * c.d_head * c.block_size
        share = statistics.median(rates) * counted / 1e9 / peak
    executed = report.share_of_peak(batch_size * model.flops(c.block_size)[1], [t / 1000 for t in ours])
    row = (c.attention_type, c.n_layer, c.n_head, c.n_embd, c.block_size, batch_size, c.vocab_size, N)
    row += (ours, rates, plain, [a / b for a, b in zip(ours, plain)], counted and counted / 1e6, share, executed)
    table.add(*row)


# -----------------------------------------------------------------------------
# attention types beside each other


def models_beside(c, bench):
    """{name: model}: a new model of each type of --beside, then what is compared with the first of them: the models of
    --out_dir, or a new one of `c`. The shape is the latter's."""
    folders = run_folders(bench) if bench.out_dir else []
    models = {f: GPT.from_checkpoint(f) for f in folders} or {c.attention_type: GPT(c)}
    shape, types = next(iter(models.values())).config, [t.strip() for t in bench.beside.split(",")]
    for name, model in models.items():
        if any(getattr(model.config, k) != getattr(shape, k) for k in ("n_layer", "n_embd", "block_size")):
            raise ConfigError(f"{name}: models that are timed beside each other must have one shape")
    return {name: GPT(of_type(shape, name)) for name in types} | models


def of_type(c, name):
    return config.build(GPTConfig, own_keys(vars(c), name) | dict(attention_type=name))


def steps_beside(models, bench, runtime, report):
    """Whole training steps of several models in the same rounds, masks held as they are; the operations of their
    attention, forward, as a share of the first one's."""
    batch_size = bench.batch_size or 16
    cfg = TrainConfig(batch_size=batch_size, learning_rate=1e-4, min_lr=1e-5, mask_learning_rate=0.0)
    first, c = next(iter(models)), next(iter(models.values())).config
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: our_step(model, cfg, runtime, folder)[0] for name, model in models.items()}
        if runtime.compile:
            first_calls(steps, "compiling", report)
        times = interleaved(steps, bench.rounds, bench.seconds, runtime, "steps", pick=statistics.mean)
    title = f"training steps: n_layer {c.n_layer}, n_head {c.n_head}, n_embd {c.n_embd}, block {c.block_size}, "
    title += f"batch {batch_size}; operations of attention, forward, as a share of {first}'s"
    columns = f"model, kept (distances), nominal (share), executed (share), step (ms), of {first}'s (ratio), "
    columns += "of the matmul peak (share)"
    full = attention_flops(models[first])[0]
    with report.table("steps beside", title, columns) as table:
        for name, model in models.items():
            kept = [b.attn.stats()["kept"].float() for b in model.transformer.h if hasattr(b.attn, "log_mask")]
            kept = float(torch.cat(kept).mean()) if kept else None
            ms, ratio = [1000 * t for t in times[name]], [a / b for a, b in zip(times[name], times[first])]
            share = report.share_of_peak(batch_size * model.flops(c.block_size)[1], times[name])
            table.add(name, kept, *(f / full for f in attention_flops(model)), ms, ratio, share)


def attention_flops(model):
    T = model.config.block_size
    return [sum(f) for f in zip(*(block.attn.flops(T) for block in model.transformer.h))]


# -----------------------------------------------------------------------------
# operators


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


def layer(attn, x, *parameters):
    return attn(x)[0]


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


def performer_pytorch(public, ours, inputs):
    """Its causal path on a CPU, with our draw of features. The eps that it adds to them is 0 here, so that both are the
    same function; with it, a later key moves earlier outputs."""
    w, public = ours.args[0][0], public.performer_pytorch

    def call(q, k, v):
        q, k = (
            public.softmax_kernel(x.transpose(1, 2) * x.shape[3] ** 0.25, projection_matrix=w, is_query=is_query, eps=0)
            for x, is_query in ((q, True), (k, False))
        )  # it scales by D^(-1/4)
        return public.causal_linear_attention_noncuda(q, k, v.transpose(1, 2), eps=0).transpose(1, 2)

    return call, inputs


def nsa_layer(T, H, D, n_kv):
    """Our layer with the sizes for T. All branches are computed, the window's gate alone is open: there the public
    module's definition is ours."""
    attn = ATTENTION["nsa"](GPTConfig(block_size=T, n_head=H, n_embd=H * D, attention_type="nsa", nsa_kv_head=n_kv))
    nn.init.zeros_(attn.c_gate.weight)
    attn.c_gate.bias.data = torch.tensor([-30.0, -30.0, 30.0]).repeat_interleave(H)
    return attn


def native_sparse_attention_pytorch(public, ours, inputs):
    """Its module, projections and all, with our sizes and weights; without its norm and its rotary positions."""
    attn, x = ours.args[0], inputs[0]
    block, stride, select_block, count, window = attn.sizes
    theirs = public.SparseAttention(
        dim=x.shape[2], dim_head=attn.d_head, heads=attn.n_head, kv_heads=attn.n_kv, causal=True, norm=False,
        sliding_window_size=window - 1,  # it sees one token more than it says
        compress_block_size=block, compress_block_sliding_stride=stride, compress_mlp_expand_factor=2 / block,
        selection_block_size=select_block, num_selected_blocks=count - 1,  # and the own block
    )  # fmt: skip
    theirs.rotary_emb.rotate_queries_with_cached_keys = lambda q, k: (q, k)
    q, _, _, kv = attn.c_attn.weight.data.split(list(attn.parts.values()))
    theirs.to_qkv.weight.data = torch.cat((q, kv))
    theirs.combine_heads.weight.data = attn.c_proj.weight.data
    theirs.to_strategy_combine[0].bias.data = attn.c_gate.bias.data.view(3, -1).T.flatten()
    return lambda x, *parameters: theirs(x), [x, *(p for p in theirs.parameters() if p.requires_grad)]


PEERS = {  # name: ours, device, module, function, how it is called
    "gla, fla naive": ("gla", "cpu", "gla/naive", "naive_recurrent_gla", lambda f, q, k, v, g, s: f(q, k, v, g)[0]),
    "gsa, fla naive": (
        "gsa", "cpu", "gsa/naive", "naive_recurrent_gsa",
        lambda f, q, k, v, g, s: f(q, k, v, -torch.expm1(s), s, 1.0)[0],
    ),
    "gla, fla chunk": ("gla", "cuda", "gla", "chunk_gla", lambda f, q, k, v, g, s: f(q, k, v, g)[0]),
    "gsa, fla chunk": (
        "gsa", "cuda", "gsa", "chunk_gsa",
        lambda f, q, k, v, g, s: f(q, k, v, -torch.expm1(s), s, scale=1.0)[0],
    ),
    "performer, performer-pytorch": ("performer", "cpu", "performer_pytorch", None, performer_pytorch),
    "nsa layer, native-sparse-attention-pytorch": (
        "nsa layer", "cpu", "native_sparse_attention_pytorch", None, native_sparse_attention_pytorch,
    ),
    "nsa layer, one key head, native-sparse-attention-pytorch": (
        "nsa layer, one key head", "cpu", "native_sparse_attention_pytorch", None, native_sparse_attention_pytorch,
    ),
}  # fmt: skip
NAIVE_LIMIT = 1024  # tokens; peers on a CPU take a second for these already


def peer(name, ours, inputs):
    """A peer as (operator, its inputs), as our row is. fla-core's naive files are read by path: it wants a GPU."""
    _, device, module, function, call = PEERS[name]
    needed = "pip install -r requirements-peers.txt -c requirements.txt"
    if not function:
        try:
            return call(importlib.import_module(module), ours, inputs)
        except ImportError as error:
            raise ConfigError(f"--peers needs {module} ({error}): {needed}") from None
    spec = importlib.util.find_spec("fla")
    if spec is None:
        raise ConfigError(f"--peers needs fla-core: {needed}")
    if device == "cuda":
        found = importlib.import_module("fla.ops." + module)
    else:
        path = os.path.join(spec.submodule_search_locations[0], "ops", module + ".py")
        file = importlib.util.spec_from_file_location(module.replace("/", "_"), path)
        found = importlib.util.module_from_spec(file)
        file.loader.exec_module(found)
    return functools.partial(call, getattr(found, function)), inputs


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


def numbers(text, name):
    try:
        return [int(n) for n in text.split(",")]
    except ValueError:
        raise ConfigError(f"--{name}={text}: write numbers, comma-separated") from None


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


# -----------------------------------------------------------------------------
# decoding


def bench_decode(c, bench, runtime, report):
    """Greedy sampling after 12 tokens, with the cache and recomputing the prefix; the texts must be equal."""
    model = GPT(c).to(runtime.device).eval()
    idx = torch.randint(c.vocab_size, (1, 12), device=runtime.device)
    times, texts = {True: [], False: []}, {}
    with torch.no_grad(), runtime.autocast():
        read = keys_read(lambda: model.generate(idx, bench.tokens, temperature=0))[1]
        model.generate(idx, 5, temperature=0, use_cache=False)
        for _ in range(bench.rounds):
            for use_cache in times:
                start = time.perf_counter()
                texts[use_cache] = model.generate(idx, bench.tokens, temperature=0, use_cache=use_cache)
                texts[use_cache][0, -1].item()  # the last token is there
                times[use_cache].append(time.perf_counter() - start)
    rates = {cached: [bench.tokens / t for t in ts] for cached, ts in times.items()}
    columns = "attention, n_layer (layers), n_embd (channels), block (tokens), cached (tokens/s), "
    columns += "of the copy bandwidth (share), recomputed (tokens/s), cached / recomputed (ratio), same greedy text"
    with report.table("decode", f"{bench.tokens} tokens after 12, batch 1", columns, keys=4) as table:
        ratio = [a / b for a, b in zip(times[False], times[True])]
        same = "yes" if torch.equal(texts[True], texts[False]) else "no"
        read += bench.tokens * fixed_bytes(model, model.init_state(1).layers)
        share = report.share_of_bandwidth(read, times[True])
        table.add(c.attention_type, c.n_layer, c.n_embd, c.block_size, rates[True], share, rates[False], ratio, same)
    if c.pos_emb != "learned":  # learned positions end with the block
        bench_positions(model, bench, runtime, report)


@torch.inference_mode()
def bench_positions(model, bench, runtime, report):
    """The cost of one token by its position in a text, beside softmax attention in the same rounds, and the bytes that
    the state holds."""
    models, positions = {model.config.attention_type: model}, numbers(bench.positions, "positions")
    if min(positions) < 1:
        raise ConfigError(f"--positions={bench.positions}: write at least 1")
    if "softmax" not in models:
        models["softmax"] = GPT(of_type(model.config, "softmax")).to(runtime.device).eval()
    states = {}
    with runtime.autocast():
        for name, pos in itertools.product(models, positions):
            state = models[name].init_state(1)
            for piece in torch.randint(model.config.vocab_size, (1, pos), device=runtime.device).split(1024, 1):
                state = models[name].step(piece, state)[1]
            states[name, pos] = state
        token = torch.randint(model.config.vocab_size, (1, 1), device=runtime.device)
        calls = {row: functools.partial(models[row[0]].step, token) for row in states}
        inputs = {row: fresh(state) for row, state in states.items()}
        read = {row: keys_read(functools.partial(call, *inputs[row]())) for row, call in calls.items()}
        times = interleaved(calls, 4 * bench.rounds, bench.seconds / 8, runtime, "positions", inputs=inputs)
    columns = "attention, position (tokens), a token (us), of the first position (ratio), of softmax (ratio), "
    columns += "read (keys), state (bytes), of the copy bandwidth (share)"
    with report.table("positions", "one token, by its position in the text", columns, keys=2) as table:
        for (name, pos), state in states.items():
            seconds, (keys, of_keys) = times[name, pos], read[name, pos]
            ratios = [[a / b for a, b in zip(seconds, times[x])] for x in ((name, positions[0]), ("softmax", pos))]
            share = report.share_of_bandwidth(of_keys + fixed_bytes(models[name], state.layers), seconds)
            us = [1e6 * t for t in seconds]
            table.add(name, pos, us, *ratios, keys or None, state_bytes(state.layers), share)


def keys_read(step):
    """(keys, bytes of them and of their values) that softmax attention reads while `step` runs, over all heads,
    counted where they reach PyTorch."""
    plain, read = F.scaled_dot_product_attention, [(0, 0)]

    def counted(q, k, v, **options):
        read.append((k.shape[:3].numel(), k.nbytes + v.nbytes))
        return plain(q, k, v, **options)

    with mock.patch.object(F, "scaled_dot_product_attention", counted):
        step()
    return tuple(map(sum, zip(*read)))


def fixed_bytes(model, layers):
    """Bytes that each token reads wherever it stands: the matrices, and the states that do not grow. With those of
    keys_read it is what a token reads at the least: `gated` and `nsa` read keys that nobody counts."""
    return sum(w.nbytes for w in matrices(model)) + state_bytes(
        [s for s in layers if isinstance(s, (torch.Tensor, tuple))]
    )


def state_bytes(state):
    """Bytes of all tensors in a decoding state."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, (list, tuple)):
        return sum(state_bytes(s) for s in state)
    return sum(state_bytes(s) for s in vars(state).values()) if hasattr(state, "__dict__") else 0


# -----------------------------------------------------------------------------
# quality


def bench_quality(bench, runtime, report):
    """The full pass over the splits for each checkpoint folder, the loss by position in the context, and what a model
    cost to train; of those that classify each label's part in it too."""
    columns = dict.fromkeys(("folder", "attention", "parameters (count)", "data", "split"))
    columns |= {"nats/token": ",.6f", "standard error (nats/token)": ".6f", "bits/byte": ",.6f"}
    columns |= {"perplexity (per token)": ",.3f", "perplexity (per word)": ",.2f"}
    columns |= dict.fromkeys(("context (tokens)", "stride (tokens)"))
    classes = ("accuracy", "majority class", "macro precision", "macro recall", "macro F1")
    columns |= dict.fromkeys((f"{name} (share)" for name in classes), ".4f")
    labelled, curves, costs = [], {}, {}
    with report.table("quality", "full pass over whole splits", columns, keys=5) as table:
        for run in runs(bench, runtime):
            labelled += score_checkpoint(*run, bench, runtime, table, curves, costs)
    bins = sorted({bin for curve in curves.values() for bin in curve})
    columns = {"folder": None, "split": None} | {f"to {bin} (nats/token)": ".4f" for bin in bins}
    title = "loss of tokens by how many they see, above the one before up to the one named"
    with report.table("by context", title, columns, keys=2) as by_context:
        for (folder, split), curve in curves.items():
            by_context.add(folder, split, *(curve.get(bin) for bin in bins))
    columns = dict.fromkeys(("folder", "attention", "split", "parameters (count)", "trained on (tokens)"))
    columns |= {"executed in training (GFLOP)": None, "loss (nats/token)": ".4f"}
    with report.table("scaling", "loss against what it cost", columns, keys=3) as scaling:
        for row in table.rows:
            cost = costs[row["folder"]]
            scaling.add(
                row["folder"], row["attention"], row["split"], row["parameters (count)"], *cost, row["nats/token"]
            )
    over_seeds(table.rows, report)
    plot_quality(curves, scaling.rows, bench.png or "quality.png")
    for folder, scores in labelled:
        names = [row["label"] for row in scores["labels"]]
        columns = {"label": None, "targets (count)": None}
        columns |= dict.fromkeys(("precision (share)", "recall (share)", "F1 (share)"), ".4f")
        columns |= dict.fromkeys((f"called {name} (count)" for name in names), "d")
        title = f"labels of {folder}, {scores['split']}"
        with report.table(title, title, columns) as table:
            for row, called in zip(scores["labels"], scores["confusion"]):
                table.add(*row.values(), *called)


def score_checkpoint(folder, model, dataset, bench, runtime, table, curves, costs):
    """A row of `table` for each split, its loss by context in `curves`, and in `costs` the training's tokens and
    operations; returns the folder and the scores of those whose targets are labels."""
    labelled = []
    context, stride = eval_window(model, dataset, bench.eval_context, bench.eval_stride)
    for name in bench.split.split(","):
        split = dataset.split(name.strip())
        each = []
        s = evaluate(model, split, context, stride, bench.eval_batch_size, runtime, each=each)
        row = (folder, model.config.attention_type, model.num_params(), dataset.meta["label"], split.name)
        nats = torch.cat([nats for _, nats in each])
        seen = torch.cat([torch.arange(1, scored.size(1) + 1).expand_as(scored)[scored] for scored, _ in each])
        curves[folder, split.name] = loss_by_context(nats, seen)
        lengths = torch.cat([scored.sum(1) for scored, _ in each]) if split.record_len else max(1024, context)
        text = (s["loss"], standard_error(nats, lengths), s.get("bits_per_byte"))
        text += (s["token_perplexity"], s.get("word_perplexity"))
        classes = (s.get(key) for key in ("accuracy", "majority", "precision", "recall", "f1"))
        table.add(*row, *text, s["context"], s["stride"], *classes)
        if split.labels:
            labelled.append((folder, s))
    costs[folder] = training_cost(folder, model)
    return labelled


def over_seeds(rows, report):
    """Mean and standard deviation (n - 1) over runs that differ in nothing but their seed, where there are any."""
    groups = {}
    for row in rows:
        alike, seed = recipe(row["folder"])
        groups.setdefault((alike, row["split"]), {}).setdefault(seed, row)
    groups = {key: list(runs.values()) for key, runs in groups.items()}
    if all(len(runs) < 2 for runs in groups.values()):
        return
    columns = dict.fromkeys(("attention", "first run", "split", "parameters (count)", "seeds (count)"))
    units = {"nats/token": ".4f", "bits/byte": ".4f"}
    columns |= {f"{what} ({unit})": f for unit, f in units.items() for what in ("mean", "standard deviation")}
    with report.table("over seeds", "mean over runs that differ in their seed alone", columns, keys=3) as table:
        for (_, split), runs in groups.items():
            cells = []
            for scores in ([row[unit] for row in runs] for unit in units):
                known = scores[0] is not None
                cells += [statistics.mean(scores) if known else None]
                cells += [statistics.stdev(scores) if known and len(scores) > 1 else None]
            first = runs[0]
            table.add(first["attention"], first["folder"], split, first["parameters (count)"], len(runs), *cells)


def recipe(folder):
    """What a run was, but for its folder and keys that leave its figures alone, and its seed; of a folder that does not
    say, the folder and None."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            stored = json.load(f)
        idle = ("out_dir", "export", "checkpoint_interval", "log_interval", "device", "compile")
        idle += ("eval_only", "eval_context", "eval_stride", "eval_batch_size")
        model, cfg = asdict(GPTConfig()) | stored["model"], asdict(TrainConfig()) | stored["train"]
        seed = cfg.pop("seed")
        cfg = {k: v for k, v in cfg.items() if k not in idle and not k.startswith("wandb")}
        return json.dumps([model, cfg, stored["data"]["label"]], sort_keys=True), seed
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return folder, None


def standard_error(nats, lengths):
    """Of the mean over tokens, in nats a token, from the scatter over segments of so many tokens (or of `lengths` each,
    of which a record is one): neighbours in a text are too alike to count by themselves. None for a single one."""
    if isinstance(lengths, int):
        lengths = torch.tensor([len(part) for part in nats.split(lengths)])
    n, mean, segment = len(lengths), nats.mean(), torch.arange(len(lengths)).repeat_interleave(lengths)
    if n < 2:
        return None
    squares = (torch.zeros(n, dtype=nats.dtype).index_add(0, segment, nats) - lengths * mean).square().sum()
    return float((squares * n / (n - 1)).sqrt() / len(nats))


def loss_by_context(nats, seen):
    """{last: mean nats of the tokens that see more than last / 2 and up to `last` tokens}, last a power of two."""
    bins = torch.ceil(torch.log2(seen.double())).long()
    return {2**bin: float(nats[bins == bin].mean()) for bin in bins.unique().tolist()}


def training_cost(folder, model):
    """(tokens, executed GFLOP) of the training up to the checkpoint that is scored; a backward pass is two forwards.
    Tokens are those that the log counted, between two of its lines in proportion; after its last line, or without a
    log, those of the run's keys."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            stored = json.load(f)
        cfg, T = stored["train"], stored["data"].get("record_len") or model.config.block_size
        steps, each = read_checkpoint(folder)["iter_num"], cfg["batch_size"] * cfg["gradient_accumulation_steps"] * T
        log = read_log(folder)[0] if os.path.exists(os.path.join(folder, "log.jsonl")) else []
        points = [(0, 0)] + [(e["iter"], e["tokens"]) for e in log if "tokens" in e]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # of another project, or exported
        return None, None
    i, tokens = points[-1]
    points += [(steps, tokens + (steps - i) * each)] if i < steps else []
    tokens = round(np.interp(steps, *zip(*points)))
    return tokens, 3 * tokens / T * model.flops(T)[1] / 1e9


def plot_quality(curves, rows, path):
    """The loss by context, and against parameters, tokens and operations, of the first split."""
    split, plt = rows[0]["split"], pyplot()
    rows = [row for row in rows if row["split"] == split]
    types = list(dict.fromkeys(row["attention"] for row in rows))
    figure, axes = plt.subplots(2, 2, figsize=(8.4, 7.4), layout="constrained")
    for i, row in enumerate(rows):
        curve = curves[row["folder"], split]
        name = os.path.basename(os.path.normpath(row["folder"]))
        axes[0, 0].plot(list(curve), list(curve.values()), label=name, **LINES[i % len(LINES)])
    axes[0, 0].set(xscale="log", xlabel="context (tokens)", ylabel=f"{split} loss (nats per token)")
    axes[0, 0].legend(frameon=False, fontsize=10)
    for axis, column in zip(
        axes.flat[1:], ("parameters (count)", "trained on (tokens)", "executed in training (GFLOP)")
    ):
        for i, name in enumerate(types):
            points = sorted((r[column], r["loss (nats/token)"]) for r in rows if r["attention"] == name and r[column])
            if points:
                axis.plot(*zip(*points), label=name, **LINES[i % len(LINES)])
        axis.set(xscale="log", xlabel=column, ylabel=f"{split} loss (nats per token)")
    axes[0, 1].legend(frameon=False, fontsize=10)
    save_figure(figure, path)


def run_folders(bench):
    folders = [f.strip() for f in bench.out_dir.split(",") if f.strip()]
    if not folders:
        raise ConfigError(f"--what={bench.what} needs --out_dir=FOLDER[,FOLDER...]")
    return folders


def runs(bench, runtime):
    """(folder, model, data set) of each folder of --out_dir."""
    for folder in run_folders(bench):
        model = GPT.from_checkpoint(folder).to(runtime.device).eval()
        dataset = Dataset(bench.dataset or trained_on(folder))
        if model.config.vocab_size < dataset.vocab_size:
            raise ConfigError(f"{folder}: its vocabulary of {model.config.vocab_size} is not that of {dataset.name}")
        yield folder, model, dataset


def trained_on(folder):
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            return json.load(f)["train"]["dataset"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{folder}/config.json does not say the data set: write --dataset=NAME") from None


# -----------------------------------------------------------------------------
# masks


def inspect(bench, runtime, report):
    """For each folder: what its masks keep, by layer and head; what that costs, counted and measured; what rounding
    periods or dropping light candidates does to the loss; and pictures, written to the folder."""
    for folder, model, dataset in runs(bench, runtime):
        layers = {i: b.attn for i, b in enumerate(model.transformer.h) if hasattr(b.attn, "log_mask")}
        if not layers:
            raise ConfigError(f"{folder}: no layer of {model.config.attention_type!r} learns a mask by distance")
        print(f"{folder}: {model.config.attention_type}, block_size {model.config.block_size}")
        mask_table(folder, layers, model.config, report)
        mask_costs(folder, layers, model.config, bench, runtime, report)
        mask_changes(folder, model, layers, dataset, bench, runtime, report)
        draw_masks(folder, model, layers, dataset, bench, runtime)


def mask_table(folder, layers, c, report):
    """A row for each head, or one for all heads of a layer, with the path that its training takes."""
    columns = "layer, head, span (tokens), period (tokens), offset (tokens), kept (distances), computed as, "
    with report.table(f"masks of {folder}", f"{folder}: masks", columns + "weights (sigmoid)", keys=2) as out:
        for i, attn in layers.items():
            stats, (table, first) = attn.stats(), attn.log_mask(c.block_size)
            first = table.new_empty(len(table), 0, c.block_size) if first is None else first
            computed = [path for path, _ in paths(table.detach(), first, c.d_head, attn.constant_ones)]
            names = c.mask_mix_candidates.split(",")
            for h in range(len(table)):
                row = [float(stats[name][h]) if name in stats else None for name in ("span", "period", "offset")]
                weights = stats["weight"][h].tolist() if "weight" in stats else []
                shown = " ".join(f"{name} {w:.3f}" for name, w in zip(names, weights))
                out.add(str(i), str(h) if len(table) > 1 else "all", *row, int(stats["kept"][h]), computed[h], shown)


def mask_costs(folder, layers, c, bench, runtime, report):
    """Operations of one sequence's forward pass, and the time of a forward and backward pass beside SDPA's."""
    T, shape = c.block_size, (bench.inspect_batch_size, c.block_size, c.n_head, c.d_head)
    q, k, v = (torch.randn(shape, device=runtime.device, requires_grad=True) for _ in range(3))
    full = 4 * c.n_head * c.d_head * (T * (T + 1) // 2)
    title = f"{folder}: cost at T {T}, batch {shape[0]}, {bench.rounds} rounds; operations as a share of softmax's"
    columns = "layer, nominal (share), executed (share), forward + backward (ms), of softmax's time (ratio), "
    columns += "of the matmul peak (share)"
    with report.table(f"costs of {folder}", title, columns) as out:
        for i, attn in layers.items():
            mask = [m if m is None else m.detach().requires_grad_() for m in attn.log_mask(T)]
            inputs = [q, k, v] + [m for m in mask if m is not None]
            attention = functools.partial(distance, q, k, v, *mask, constant_ones=attn.constant_ones)
            ours = functools.partial(operator_step, attention, inputs)
            plain = functools.partial(operator_step, functools.partial(sdpa, q, k, v), [q, k, v])
            times = interleaved({"ours": ours, "plain": plain}, bench.rounds, bench.seconds / 4, runtime, f"layer {i}")
            ours, ratio = times["ours"], [a / b for a, b in zip(*times.values())]
            nominal, executed = attn.flops(T)
            share = report.share_of_peak(shape[0] * executed, ours)
            out.add(str(i), nominal / full, executed / full, [1000 * t for t in ours], ratio, share)


def mask_changes(folder, model, layers, dataset, bench, runtime, report):
    """The loss on a part of the validation split, as trained and with simpler masks."""
    split, context, losses = dataset.split("val"), model.config.block_size, {}

    def loss():
        nats = count = 0
        for x, y, scored in itertools.islice(windows(split, context, context, bench.eval_batch_size), 4):
            nats += token_nats(model, x.to(runtime.device), y.to(runtime.device), scored, runtime)
            count += int(scored.sum())
        return nats / count

    with torch.no_grad():
        losses["as trained"] = loss()
        for attn in layers.values():
            if hasattr(attn, "alpha"):
                attn.prune = bench.prune
                losses[f"without candidates below {bench.prune:g} of the largest"] = None
            elif attn.wave:
                attn.snap_periods()
                losses["with periods rounded to whole tokens"] = None
        for name in [name for name, value in losses.items() if value is None]:
            losses[name] = loss()
    columns = {"masks": "", "loss (nats/token)": ".5f", "difference (nats/token)": "+.5f"}
    with report.table(f"losses of {folder}", f"{folder}: loss on a part of the validation split", columns) as out:
        for name, value in losses.items():
            out.add(name, value, value - losses["as trained"])


def draw_masks(folder, model, layers, dataset, bench, runtime):
    """Pictures: spans.png, kept.png, weights.png (mixtures), attention.png."""
    model = GPT.from_checkpoint(folder).to(runtime.device).eval()  # as trained again
    layers, plt = {i: model.transformer.h[i].attn for i in layers}, pyplot()
    H, T, L = model.config.n_head, model.config.block_size, len(layers)
    stats = {i: attn.stats() for i, attn in layers.items()}
    names = [f"{i}.{h}" for i in layers for h in range(H)]

    def save(figure, name):
        save_figure(figure, os.path.join(folder, name))

    figure, axes = plt.subplots(figsize=(max(5, 0.35 * len(names)), 3.6), layout="constrained")
    axes.bar(range(len(names)), torch.cat([s["kept"] for s in stats.values()]).cpu(), color="#56B4E9", label="kept")
    if all("span" in s for s in stats.values()):
        spans = torch.cat([s["span"] for s in stats.values()]).cpu()
        axes.plot(range(len(names)), spans, "o", color="#D55E00", label="span, without its ramp")
    axes.set(xlabel="layer.head", ylabel="distances (tokens)", xticks=range(len(names)))
    axes.set_xticklabels(names, rotation=90, fontsize=9)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    save(figure, "spans.png")

    masks = torch.cat([attn.log_mask(T)[0].detach().expand(H, -1) for attn in layers.values()]).exp().cpu()
    reach = int((masks > 0).nonzero()[:, 1].max()) + 1
    kept = masks[:, :reach].masked_fill(masks[:, :reach] == 0, math.nan)
    options = dict(xlabel="distance (tokens); white: dropped", ylabel="layer.head")
    size = 9, 1.2 + 0.22 * len(names)
    save(heat_map(kept, names, size, "mask (factor of a weight)", vmax=None, **options)[0], "kept.png")

    mixed = {i: s["weight"].cpu() for i, s in stats.items() if "weight" in s}
    if mixed:
        weights, candidates = torch.cat(list(mixed.values())), model.config.mask_mix_candidates.split(",")
        rows = [str(i) if len(w) == 1 else f"{i}.{h}" for i, w in mixed.items() for h in range(len(w))]
        size = 2.5 + 0.5 * len(candidates), 1.6 + 0.25 * len(weights)
        options = dict(xlabel="mask", ylabel="layer" if len(rows) == len(mixed) else "layer.head")
        figure, axes = heat_map(weights, rows, size, "weight (sigmoid of alpha)", **options)
        axes.set_xticks(range(len(candidates)), [c.strip() for c in candidates], rotation=45, ha="right")
        save(figure, "weights.png")

    ids = dataset.codec.encode(bench.text)[:T] if bench.text else dataset.split("val").tokens[: min(T, 64)]
    idx = torch.tensor([int(i) for i in ids], device=runtime.device)[None]
    entries = model.trace(idx)
    figure, axes = plt.subplots(L, H, figsize=(2.1 * H, 2.1 * L + 0.4), layout="constrained", squeeze=False)
    for row, (i, attn) in zip(axes, layers.items()):
        for h, (panel, p) in enumerate(zip(row, attn.stats(entries[i][0])["attention_map"].float().cpu())):
            image = panel.imshow(p.sqrt(), interpolation="nearest", cmap="viridis", vmin=0, vmax=1)
            panel.set(title=f"{i}.{h}", xticks=[], yticks=[])
            panel.grid(False)
    figure.supxlabel("key (tokens; a panel for each layer.head)")
    figure.supylabel("query (tokens)")
    figure.colorbar(image, ax=axes, label="square root of the weight", fraction=0.05, aspect=40)
    save(figure, "attention.png")


# -----------------------------------------------------------------------------
# heads


def bench_heads(bench, runtime, report):
    """Over the first windows of the validation split, by layer: the weight on the first token, the mean gate of pairs,
    the share of them that is 0, heads whose gates are all 0, and the mean gate of the output."""
    names = {"first_token": "on the first token (weight)", "gate": "of pairs (mean gate)"}
    names |= {"gate_zero": "gates of 0 (share)", "output_gate": "of the output (mean gate)"}
    for folder, model, dataset in runs(bench, runtime):
        split, context = dataset.split("val"), model.config.block_size
        x = next(windows(split, context, context, bench.eval_batch_size))[0].to(runtime.device)
        found = [b.attn.stats(entry) for b, (entry, _) in zip(model.transformer.h, model.trace(x))]
        title = f"{folder}: {model.config.attention_type}, {x.numel():,} tokens"
        head = ", ".join(["layer", *names.values(), "dead heads (count)"])
        with report.table(f"heads of {folder}", title, head) as out:
            for i, stats in enumerate(found):
                row = [float(stats[name].float().mean()) if name in stats else None for name in names]
                out.add(str(i), *row, int(stats["dead"].sum()) if "dead" in stats else None)
            rows = [list(row.values())[1:] for row in out.rows]
            columns = [[x for x in column if x is not None] for column in zip(*rows)]
            *means, dead = [statistics.fmean(column) if column else None for column in columns]
            out.add("all", *means, None if dead is None else sum(columns[-1]))


@torch.no_grad()
def head_outputs(model, idx):
    """What each head of a model of one layer adds to the residual stream, (H, B, T, C), without the output's bias."""
    block, seen = model.transformer.h[0], []
    hook = block.attn.c_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    block.attn(block.ln_1(model.embed(idx, 0)))
    hook.remove()
    (z,), project, H = seen, block.attn.c_proj, block.attn.n_head
    one = torch.eye(H, dtype=z.dtype, device=z.device)[:, None, None, :, None]
    alone = (z.unflatten(-1, (H, -1)) * one).flatten(-2)  # (H, B, T, H D): zeros but for one head
    return project(alone) - project(torch.zeros_like(alone[:1, :1, :1]))


def head_ablation(outputs, wanted, readout):
    """outputs (H, N, C), wanted (N,) ids -> whether head h alone can say each, (H, N): whichever others are removed,
    one at least, the sum of the rest still does. And whether the sum of all does, (N,)."""
    H = len(outputs)
    kept = (torch.arange(1, 2**H)[:, None] >> torch.arange(H)) & 1  # (subsets, H); the last one keeps all
    kept = kept.to(outputs)
    right = readout(torch.einsum("sh,hnc->snc", kept, outputs)).argmax(-1) == wanted
    return torch.stack([right[:-1][kept[:-1, h] > 0].all(0) for h in range(H)]), right[-1]


def superposition(model, x, y, samples=2000, sure=0.99):
    """For each target of the records x, y (N, T): how often the model says it, and which heads carry it, by ablation on
    records of one target. A target is learnt at an accuracy above `sure`; a head represents it if it does so alone in
    that share of the records; learnt and represented by no head, it is distributed: held in superposition."""
    with torch.no_grad():
        pairs = zip(x.split(4096), y.split(4096))
        said = torch.cat([model(a, b)[0].argmax(-1) for a, b in pairs])
    single = ((y >= 0).sum(1) == 1).nonzero()[:samples, 0]
    at = (y[single] >= 0).int().argmax(1)
    wanted, outputs = y[single, at], head_outputs(model, x[single])[:, torch.arange(len(single)), at]
    alone, together = head_ablation(outputs, wanted, model.lm_head)
    rows = []
    for target in sorted(set(y[y >= 0].tolist())):
        mine, scored = wanted == target, y == target
        shares = alone[:, mine].double().mean(1)  # (H,)
        row = {"target": target, "token": int(x[scored][0]), "records": int(scored.sum())}
        row |= {"accuracy": (said[scored] == target).double().mean().item(), "shares": shares.tolist()}
        row["learnt"] = row["accuracy"] > sure
        row["heads"] = [h for h, share in enumerate(row["shares"]) if row["learnt"] and share > sure]
        whole = together[mine].double().mean().item() > sure
        row["distributed"] = row["learnt"] and not row["heads"] and whole
        rows.append(row)
    return rows


def bench_superposition(bench, runtime, report):
    """Which trigrams each folder's toy has learnt, which head represents each, and superposition.png in the folder."""
    for folder, model, dataset in runs(bench, runtime):
        c, attn = model.config, model.transformer.h[0].attn
        if c.n_layer != 1 or c.mlp != "none" or c.norm != "none" or not 2 <= getattr(attn, "n_head", 0) <= 12:
            needs = "n_layer=1, mlp=none, norm=none and 2 to 12 heads"
            raise ConfigError(f"{folder}: heads are told apart in a model of attention alone: {needs}")
        if dataset.record_len is None:
            raise ConfigError(f"{folder}: {dataset.name} is text: heads are told apart by the targets of records")
        split = dataset.split("test")
        passes = [(x, y) for x, y, _ in windows(split, split.record_len, split.record_len, 4096)]
        x, y = (torch.cat(parts).to(runtime.device) for parts in zip(*passes))
        rows = superposition(model, x, y)
        title = f"{folder}: {c.attention_type}, {attn.n_head} heads, {len(rows)} trigrams"
        columns = {"trigram": "", "records (count)": "", "accuracy (share)": ".4f"}
        columns |= dict.fromkeys(("learnt", "heads", "distributed"))
        with report.table(f"superposition in {folder}", title, columns) as out:
            for row in rows:
                row["name"] = dataset.codec.decode([row["token"]]) + " -> " + dataset.codec.decode([row["target"]])
                yes = ["yes" if row[key] else "no" for key in ("learnt", "distributed")]
                heads = ", ".join(map(str, row["heads"]))
                out.add(row["name"], row["records"], row["accuracy"], yes[0], heads, yes[1])
        report.note(f"{folder}: " + describe_heads(rows, attn.n_head))
        draw_heads(rows, os.path.join(folder, "superposition.png"))


def describe_heads(rows, n_head):
    """One line: what is in superposition, whether each trigram has one head to itself, and which heads have none."""
    used = [h for row in rows for h in row["heads"]]
    unused = ", ".join(str(h) for h in range(n_head) if h not in used) or "none"
    distributed = ", ".join(row["name"] for row in rows if row["distributed"]) or "none"
    apart = all(len(row["heads"]) == 1 for row in rows) and len(set(used)) == len(used)
    line = f"learnt {sum(row['learnt'] for row in rows)} of {len(rows)}; distributed: {distributed}; "
    return line + f"one head for each trigram: {'yes' if apart else 'no'}; unused heads: {unused}"


def draw_heads(rows, path):
    """Heads by trigrams: the share of records that a head can do alone."""
    shares = torch.tensor([row["shares"] for row in rows]).T  # (H, trigrams)
    (H, n), options = shares.shape, dict(cmap="Blues", xlabel="trigram", ylabel="head")
    size, label = (2.2 + 0.8 * n, 1.6 + 0.42 * H), "done by the head alone (share)"
    figure, axes = heat_map(shares, range(H), size, label, **options)
    for h, i in itertools.product(range(H), range(n)):
        share = shares[h, i].item()
        axes.text(i, h, f"{share:.2f}", ha="center", va="center", fontsize=9, color="white" if share > 0.6 else "black")
    state = ["distributed" if row["distributed"] else "" if row["learnt"] else "not learnt" for row in rows]
    axes.set_xticks(range(n), [f"{row['name']}\n{s}" for row, s in zip(rows, state)], fontsize=9)
    save_figure(figure, path)


# -----------------------------------------------------------------------------
# curves


TRAJECTORIES = {
    "alpha": "alpha (logit)",
    "span": "span (tokens)",
    "period": "period (tokens)",
}  # of the masks' statistics


def read_log(folder):
    """The entries of a run's log.jsonl: (training steps, evaluations, what the masks were)."""
    path = os.path.join(folder, "log.jsonl")
    try:
        with open(path, encoding="utf-8") as f:
            entries = [json.loads(line) for line in f]
    except (ValueError, RecursionError):
        raise ConfigError(f"{path} is damaged: a line is not JSON") from None
    if not all(isinstance(e, dict) and "iter" in e for e in entries):
        raise ConfigError(f"{path} is damaged: a line is not an entry of a run")
    return tuple([e for e in entries if kind in e] for kind in ("loss", "split", "stats"))


def plot_curves(bench, runtime, report):
    """Training and validation loss of each run against steps and training time, what it cost, for students the distance
    from the teacher, and for learned masks their parameters' way, in one PNG."""
    runs, masks = {}, []
    for folder in run_folders(bench):
        steps, evaluations, stats = read_log(folder)
        name, val = os.path.basename(os.path.normpath(folder)), [e for e in evaluations if e["split"] == "val"]
        if not steps or not val:
            raise ConfigError(f"{folder}/log.jsonl has no training steps or no evaluations yet")
        name = folder if name in runs else name
        runs[name] = steps, val
        kinds = [kind for kind in TRAJECTORIES if any(key.endswith(f".{kind}") for e in stats for key in e["stats"])]
        masks += [functools.partial(draw_trajectories, folder, name, stats, kind) for kind in kinds]
    drawings = [functools.partial(draw_loss, against="iter"), functools.partial(draw_loss, against="wall_s")]
    drawings += [draw_divergence] if any("kl" in e for _, val in runs.values() for e in val) else []
    bars = {"wall_s": "training time (s)", "cpu_s": "processor time (s)", "rss_mb": "peak memory (MB)"}
    drawings += [functools.partial(draw_bars, key, label) for key, label in bars.items()]
    drawings += masks
    rows = -(-len(drawings) // 2)
    figure, panels = pyplot().subplots(rows, 2, figsize=(8.4, 3.7 * rows), layout="constrained", squeeze=False)
    for panel in panels.flat[len(drawings) :]:
        panel.set_axis_off()
    for draw, panel in zip(drawings, panels.flat):
        draw(panel=panel, runs=runs)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper left", frameon=False)
    save_figure(figure, bench.png or "curves.png")


def draw_loss(panel, runs, against):
    for (name, (steps, val)), colour in zip(runs.items(), itertools.cycle(COLOURS)):
        steps = [e for e in steps if "ce" in e]  # steps that match a teacher's attention have no cross-entropy
        points = [e[against] for e in steps], [e["ce"] for e in steps]
        panel.plot(*points, color=colour, alpha=0.35)
        points = [e[against] for e in val], [e["val_loss"] for e in val]
        panel.plot(*points, color=colour, marker="o", markersize=4, label=name)
    panel.set(
        title="validation; pale: training", xlabel={"iter": "optimizer steps", "wall_s": "training time (s)"}[against]
    )
    panel.set(ylabel="cross-entropy (nats per token)")


def draw_divergence(panel, runs):
    for (name, (_, val)), colour in zip(runs.items(), itertools.cycle(COLOURS)):
        points = [e["iter"] for e in val if "kl" in e], [e["kl"] for e in val if "kl" in e]
        panel.plot(*points, color=colour, marker="o", markersize=4, label=name)
    panel.set(xlabel="optimizer steps", ylabel="KL from the teacher (nats per token)", ylim=(0, None))


def draw_trajectories(folder, name, stats, kind, panel, runs):
    """A line for each parameter of each layer (and head): colours are candidates of mask_mix, layers of the others."""
    layers = sorted({int(key.split(".")[1]) for e in stats for key in e["stats"] if key.endswith(f".{kind}")})
    iters, labels = [e["iter"] for e in stats], {}
    for i in layers:
        values = torch.tensor(
            [e["stats"][f"h.{i}.{kind}"] for e in stats]
        )  # (evaluations, heads), alpha: (.., heads, N)
        names = [f"layer {i}"] * values.shape[-1]
        if kind == "alpha":
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
                names = json.load(f)["model"]["mask_mix_candidates"].split(",")
        for line, label in zip(values.movedim(0, -1).reshape(-1, len(iters)), itertools.cycle(names)):
            colour = COLOURS[labels.setdefault(label, len(labels)) % len(COLOURS)]
            panel.plot(iters, line, color=colour, alpha=0.7, linewidth=1.2)
    for label, number in labels.items():
        panel.plot([], [], color=COLOURS[number % len(COLOURS)], label=label)
    panel.legend(frameon=False, fontsize=9, ncols=2)
    panel.set(xlabel="optimizer steps", ylabel=TRAJECTORIES[kind], title=name)


def draw_bars(key, label, panel, runs):
    """The last value of each run's steps, where it was measured."""
    runs = {name: steps for name, (steps, _) in runs.items() if key in steps[-1]}
    for i, (name, steps) in enumerate(runs.items()):
        panel.barh(i, steps[-1][key], color=COLOURS[i % len(COLOURS)], alpha=0.5)
        panel.annotate(f" {name}: {steps[-1][key]:,.0f}", (0, i), va="center")
    panel.set(xlabel=label, yticks=[])
    panel.grid(axis="y", visible=False)
    panel.invert_yaxis()


def measure(what, explicit, bench, runtime, report):
    """One of the kinds of measurement; `explicit` are the keys of the model that were given."""
    own = explicit.keys() - {"attention_type"}  # a shape of the user's, or nanoGPT's
    if what == "overview":  # of --what=all too, whose block_size is that of the models
        explicit = {k: v for k, v in explicit.items() if k != "block_size" or bench.what == what}
        types = explicit.get("attention_type", ",".join(ATTENTION)).split(",")
        overview([t.strip() for t in types], LAYER | explicit, bench, runtime, report)
    elif what == "step" and bench.beside:
        c = config.build(GPTConfig, dict(vocab_size=256) | explicit)
        steps_beside(models_beside(c, bench), bench, runtime, report)
    elif what == "step":
        shapes = [dict(vocab_size=256, batch_size=bench.batch_size or 16)] if own else NANOGPT_SHAPES
        bench_steps([shape | explicit for shape in shapes], bench, runtime, report)
    elif what == "decode":
        shape = dict(vocab_size=256) if own else {k: v for k, v in NANOGPT_SHAPES[2].items() if k != "batch_size"}
        bench_decode(config.build(GPTConfig, shape | explicit), bench, runtime, report)
    else:
        parts = dict(ops=bench_operators, quality=bench_quality, inspect=inspect, heads=bench_heads)
        (parts | dict(superposition=bench_superposition, curves=plot_curves))[what](bench, runtime, report)


def main(argv):
    model_config, bench, given = config.load(argv, GPTConfig, BenchConfig)
    if bench.png and not os.path.basename(bench.png)[1:].endswith(".png"):
        raise ConfigError(f"--png={bench.png}: the name must end in .png")
    if bench.what == "all" and bench.png:
        raise ConfigError("--png names one picture: without it --what=all writes one for each kind")
    runtime = config.resolve_device(bench.device, bench.dtype, bench.compile)
    explicit = config.explicit(model_config, given)
    report = Report(bench, runtime, explicit)
    if bench.compare:
        return compare(bench, report)
    print(f"{runtime}; torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    whats = [bench.what]
    if bench.what == "all":
        whats = ["overview", "ops", "step", "decode"] + (["quality", "curves"] if bench.out_dir else [])
    if {"overview", "step", "ops", "decode", "inspect"} & set(whats):
        report.measure_machine(bench.seconds)
    failed = False
    for what in whats:
        try:
            measure(what, explicit, bench, runtime, report)
        except Exception as error:
            report.notes.append(f"{what} failed: {type(error).__name__}: {' '.join(str(error).split())}")
            if len(whats) == 1:
                raise
            print(report.notes[-1], flush=True)
            failed = True
        except KeyboardInterrupt:
            report.note(f"{what} was interrupted")
            raise
        finally:
            report.write()
    return int(failed)


if __name__ == "__main__":
    config.run(main, DataError, ModelError)
