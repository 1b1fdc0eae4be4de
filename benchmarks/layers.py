"""python bench.py: what does a layer of each attention type cost, projections included, at each length?"""

import copy
import math
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn as nn

import config
from benchmarks import style
from benchmarks.clocks import accept, first_calls, fresh, interleaved, peak_memory, state_bytes, tolerance
from benchmarks.tables import Table, numbers
from config import ConfigError
from model import ATTENTION, GPTConfig, matrices, own_keys

LAYER = dict(n_layer=1, n_head=4, n_embd=256)
LAYER_TOKENS = 4096  # of a call, whatever T
NAMED, TRAINING = "attention, T (tokens), ", "forward + backward (ms), of softmax (ratio), of the matmul peak (share), "
REST = "decoding (tokens/s), state (bytes), peak memory (MiB), nominal (MFLOP), executed (MFLOP), "
REST += "saved of softmax's (share)"
SWEEP = NAMED + "batch (sequences), forward (ms), " + TRAINING + REST
PARTS = {  # of what is printed: a table for what training costs, and one for decoding and what needs no clock
    "overview": NAMED + "forward (ms), " + TRAINING + "crossover with softmax (tokens)",
    "overview, further": NAMED + REST,
}


def of_type(shape, name, **keys):
    """The configuration of one type at a shape, without what other types own."""
    return config.build(GPTConfig, own_keys(shape, name) | keys | dict(attention_type=name))


@dataclass
class Layer:
    """An attention layer for contexts of T tokens: its calls, and what needs no clock."""

    attn: nn.Module
    x: torch.Tensor  # (B, T, C)
    runtime: config.Runtime

    @classmethod
    def make(cls, name, T, shape, batch_size, runtime):
        c = of_type(shape, name, block_size=T)
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
        (B, T, _), (nominal, executed) = self.x.shape, self.attn.flops(self.x.size(1))
        return nominal, executed, B * (executed + 2 * T * sum(w.numel() for w in matrices(self.attn)))


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
    plot_overview(sweep.rows, bench.png or "out/bench.png")


def summary(sweep, *titles):
    """The tables that are printed of the sweep's rows, at the shortest and the longest T."""
    lengths, tables = sorted({row["T (tokens)"] for row in sweep}), []
    for (name, columns), title in zip(PARTS.items(), titles):
        tables.append(Table(name, title, columns, keys=2))
        for row in sweep:
            if row["T (tokens)"] in (lengths[0], lengths[-1]):
                ratios = [r["of softmax (ratio)"] for r in sweep if r["attention"] == row["attention"]]
                cross = crossover(lengths, ratios) if row["attention"] != "softmax" else None
                tables[-1].add(*(row.get(column, cross) for column in tables[-1].specs))
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


PANELS = {  # column: (title, label, what is drawn of a cell that is for n tokens)
    "forward + backward (ms)": ("Forward and backward pass", "time (µs/token)", lambda y, n: 1e3 * y / n),
    "peak memory (MiB)": ("Forward and backward pass", "peak memory (KiB/token)", lambda y, n: 1024 * y / n),
    "decoding (tokens/s)": ("Decoding after T - 1 tokens", "time (µs/token)", lambda y, n: 1e6 / y),
}


def plot_overview(rows, path):
    """Time, memory and decoding against length, a line for each type that computes something; of a single length a row
    for each of them, and a line at softmax's."""
    types = list(dict.fromkeys(row["attention"] for row in rows if row["executed (MFLOP)"]))
    lengths = sorted({row["T (tokens)"] for row in rows})
    figure, axes = style.grid(len(PANELS), 5.6, style.height(len(types), 4.6))
    for axis, (column, (title, label, drawn)) in zip(axes, PANELS.items()):
        found = {}
        for row in rows:
            if row["attention"] in types and row[column] is not None:
                cell = row[column] if isinstance(row[column], list) else [row[column]]
                tokens = row["batch (sequences)"] * row["T (tokens)"]
                found.setdefault(row["attention"], {})[row["T (tokens)"]] = [drawn(y, tokens) for y in cell]
        if not found:  # memory that nobody can measure here
            axis.remove()
        elif len(lengths) > 1:
            draw_lengths(axis, found, lengths, label)
        else:
            draw_single(axis, found, lengths[0], label)
        axis.set_title(title)
    rounds = "lowest to highest of the rounds"
    note = f"T {lengths[0]:,}; bars: {rounds}; dotted line: softmax" if len(lengths) == 1 else f"bands: {rounds}"
    figure.supxlabel(f"{note}; {tokens_of_a_call(rows)}; lower is better", fontsize=style.SMALL)
    style.save_figure(figure, path)


def tokens_of_a_call(rows):
    """In words; the longest sequences make larger calls."""
    tokens = {row["T (tokens)"]: row["batch (sequences)"] * row["T (tokens)"] for row in rows}
    usual = statistics.mode(tokens.values())
    others = [f", {n:,} at T {T:,}" for T, n in tokens.items() if n != usual]
    return f"a call has {usual:,} tokens{''.join(others)}"


def draw_lengths(axis, found, lengths, label):
    """found: {attention: {T: [a number for each round]}}. The median, and a band from the lowest to the highest."""
    ends = []
    for (name, cells), line in zip(found.items(), style.lines([*found])):
        middle = [statistics.median(cell) for cell in cells.values()]
        line |= dict(linewidth=2.6, zorder=3) if name == "softmax" else {}
        axis.plot([*cells], middle, **line)
        low, high = ([pick(cell) for cell in cells.values()] for pick in (min, max))
        axis.fill_between([*cells], low, high, color=line["color"], alpha=0.12, linewidth=0)
        ends.append((name, line["color"], max(cells), middle[-1]))
    axis.set(yscale="log", xlabel="T (tokens)", ylabel=label)
    style.tokens_axis(axis, lengths)
    style.log_ticks(axis.yaxis)
    style.label_ends(axis, ends)


def draw_single(axis, found, T, label):
    """The medians of one length, the least at the top; bars from the lowest to the highest."""
    order = sorted(found, key=lambda name: statistics.median(found[name][T]), reverse=True)
    for y, name in enumerate(order):
        low, middle, high = (pick(found[name][T]) for pick in (min, statistics.median, max))
        axis.plot((low, high), (y, y), color=style.colour(name), linewidth=2)
        axis.plot(middle, y, "o", color=style.colour(name))
    axis.axvline(statistics.median(found["softmax"][T]), color=style.colour("softmax"), linestyle=":", zorder=0)
    axis.set(xlabel=label, xlim=(0, None))
    style.name_rows(axis, order, [style.colour(name) for name in order])
