"""make card: what can each attention type do at equal budget, and at what price? One table and one figure.

    python -m benchmarks.card --part=recall --budget=3600 --types=gla,gdn   train and score what is missing
    python -m benchmarks.card                                               the table and docs/card.png, from JSON alone

A part is some stages of runs, each planned, trained and resumed by compare.py's functions, two at once. Where a stage
tries learning rates, a later one takes each type's best. A cell is one run as it was scored: its settings that are not
the defaults, and its data, are its identity. It is written to docs/card/PART.json when it is done, and what is there is
not run again, on whatever machine: the code is no part of it, `commit` says which it was. Runs that end early (Ctrl-C,
--budget) go on from their checkpoints in out/card; runs that compare.py left below that folder are taken as they are.
"""

import _thread
import json
import os
import signal
import statistics
import sys
import threading
from dataclasses import dataclass

if __name__ == "__main__":  # Ctrl-C while modules load is no traceback of theirs
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import config
from benchmarks.cells import HYBRIDS, Stage, cells_of, code_commit, run_stage
from benchmarks.comparison import ROOT
from benchmarks.quality import mean_and_deviation
from benchmarks.style import SMALL, colour, name_rows, pyplot, save_figure
from config import key
from data import DataError, Dataset
from model import ATTENTION
from weights import ModelError, TrainError, lock_folder

TINY = "config/train_enwik8_tiny.py --max_iters=500 --eval_interval=100 --equal_params --dtype=float32"
RATES = "--learning_rate=3e-3,1.5e-3,6e-3"
RECALL = "config/train_mqar.py --learning_rate=3e-3,1e-3,1e-2"
STATE = "config/train_parity.py --seed=1,2,3"
TWO = ("gla,softmax", "gdn,softmax")  # layers
TUNED, TUNED_RECALL = ("language", "enwik8_rates"), ("recall", "recall_rates")
PARTS = {
    "language": [
        Stage("enwik8_rates", f"{TINY} {RATES} --seed=1", "val"),
        Stage("enwik8", f"{TINY} {RATES} --seed=1,2,3", "test", TUNED),
        Stage("wikitext2", f"{TINY} {RATES} --seed=1 --dataset=wikitext2_bytes", "test", TUNED),
    ],
    "long": [Stage("enwik8_small", "config/train_enwik8_small.py --seed=1 --equal_params", "test")],
    "recall": [
        Stage("recall_rates", f"{RECALL} --seed=1", "val", hybrids=TWO),
        Stage("recall", f"{RECALL} --seed=1,2,3", "test", TUNED_RECALL, hybrids=TWO),
    ],
    "state": [
        Stage("parity", STATE, "test", hybrids=TWO),
        Stage("modulo5", f"{STATE} --dataset=state_tracking_5", "test", hybrids=TWO),
    ],
    "length": [Stage("longer", f"{TINY} {RATES} --seed=1", "test", TUNED, (2, 4, 8))],
}
PAIRS = {4: "4 pairs in 64", 8: "8 pairs in 64", 16: "16 pairs in 64", 32: "32 pairs in 128"}
MARKS = {"low": min, "high": max}


@dataclass
class CardConfig:
    """The card"""

    part: str = key("", "what to run; empty: the table and the figure", choices=("", *PARTS, "cost"))
    types: str = key("", "attention types, a pattern of layers joined with +; empty: all, and two hybrids")
    jobs: int = key(2, "runs at once; the threads are divided among them", low=1)
    budget: float = key(0.0, "seconds after which a part ends in order; 0: no limit", low=0.0)
    folder: str = key("docs/card", "folder of the cells")
    out_dir: str = key("out/card", "folder of the runs")
    png: str = key("docs/card.png", "the figure")


class DataSets(dict):
    """Each is read when it is asked for first."""

    def __missing__(self, name):
        self[name] = Dataset(name)
        return self[name]


def run_part(card):
    """The stages of a part, until the budget is used. The exit status: 1 if a run failed."""
    folder = os.path.join(card.out_dir, card.part)
    os.makedirs(folder, exist_ok=True)
    spent, failed, datasets, commit = threading.Event(), 0, DataSets(), code_commit()
    timer = threading.Timer(card.budget, lambda: (spent.set(), _thread.interrupt_main()))
    timer.daemon = True
    if card.budget:
        timer.start()
    try:
        with lock_folder(folder):
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
            for stage in PARTS[card.part]:
                failed += run_stage(card.part, stage, card, datasets.__getitem__, commit, spent.is_set)
    except KeyboardInterrupt:
        if not spent.is_set():
            raise
        print(f"{card.budget:g} seconds are over; the same command goes on", flush=True)
    finally:
        timer.cancel()
    return int(failed > 0)


# ---------------------------------------------------------------------------------------------------------------------
# the table and the figure


class Card:
    """What the cells say, by type."""

    def __init__(self, folder):
        self.cells = {part: cells_of(folder, part) for part in PARTS}
        self.costs = {}
        with open(os.path.join(ROOT, "docs", "bench.json"), encoding="utf-8") as f:
            for row in json.load(f)["tables"]["sweep"]["rows"]:
                self.costs.setdefault(row["attention"], {})[row["T (tokens)"]] = row

    def scores(self, part, stage, name, of):
        """of(score) for each seed of a type, [] where nothing was run or it failed."""
        own = [c["score"] for c in self.cells[part] if (c["stage"], c["attention"]) == (stage, name)]
        return [of(score) for score in own if "failure" not in score]

    def cost(self, name, T, column):
        """The median over rounds of a column of docs/bench.json, as a list of one; [] where it was not timed. Of a
        pattern the mean of its layers."""
        found = [self.costs.get(layer, {}).get(T, {}).get(column) for layer in name.split(",")]
        if None in found:
            return []
        mean = statistics.harmonic_mean if column.endswith("/s)") else statistics.mean
        return [mean([statistics.median(cell) if isinstance(cell, list) else cell for cell in found])]

    def columns(self):
        """[(group, heading, which is best, format, {type: scores})]"""
        part = lambda pairs: lambda s: s["by part"][PAIRS[pairs]]  # noqa: E731
        bits, right = lambda s: s["bits/byte"], lambda s: s["accuracy"]
        time, state, rate = "of softmax (ratio)", "state (bytes)", "decoding (tokens/s)"
        found = [
            ("language", "enwik8 (bits/byte)", "low", ".3f", lambda n: self.scores("language", "enwik8", n, bits)),
            (
                "language",
                "WikiText-2 (bits/byte)",
                "low",
                ".3f",
                lambda n: self.scores("language", "wikitext2", n, bits),
            ),
            (
                "language",
                "6.1 M tokens (bits/byte)",
                "low",
                ".3f",
                lambda n: self.scores("long", "enwik8_small", n, bits),
            ),
            *(
                (
                    "recall",
                    f"{pairs} pairs",
                    "high",
                    ".2f",
                    lambda n, p=pairs: self.scores("recall", "recall", n, part(p)),
                )
                for pairs in (8, 16, 32)
            ),
            ("state", "parity", "high", ".2f", lambda n: self.scores("state", "parity", n, right)),
            ("state", "sum modulo 5", "high", ".2f", lambda n: self.scores("state", "modulo5", n, right)),
            ("length", "8 times (bits/byte more)", "low", "+.3f", lambda n: self.scores("length", "longer", n, beyond)),
            ("cost", "time at 1,024 (softmax's)", "low", ".2f", lambda n: self.cost(n, 1024, time)),
            ("cost", "time at 8,192 (softmax's)", "low", ".2f", lambda n: self.cost(n, 8192, time)),
            ("cost", "state at 8,192 (kB)", "low", ",.0f", lambda n: [b / 1e3 for b in self.cost(n, 8192, state)]),
            ("cost", "decoding (tokens/s)", "high", ",.0f", lambda n: self.cost(n, 8192, rate)),
        ]
        return [(*names, {n: of(n) for n in (*ATTENTION, *HYBRIDS)}) for *names, of in found]


def beyond(score):
    """How many bits a byte more a model needs with the longest context than with the one that it was trained on."""
    found = {int(size): bits for size, bits in score["by context"].items()}
    return found[max(found)] - found[min(found)]


def order(columns):
    """The types, those with the fewest bits a byte first, then those without a score."""
    _, _, _, _, bits = columns[0]
    return sorted(bits, key=lambda name: statistics.mean(bits[name]) if bits[name] else 99.0)


def cells(columns):
    """{heading: {type: its cell}}: mean, standard deviation over seeds (n - 1) and their number; the best is in bold,
    unless most types share it. `none` costs nothing, and is not the best for that."""
    found = {}
    for group, heading, which, spec, scores in columns:
        means = {n: format(statistics.mean(own), spec) for n, own in scores.items() if own and n != "none"}
        best = MARKS[which](means.values(), key=lambda text: float(text.replace(",", "")), default=None)
        alone = list(means.values()).count(best) <= max(1, len(means) / 2)
        rows = found.setdefault(f"{group}: {heading}", {})
        for name, own in scores.items():
            mean, deviation = mean_and_deviation(own)
            text = "-" if mean is None else format(mean, spec)
            text = f"**{text}**" if alone and means.get(name) == best and own else text
            text += f" ± {deviation:{spec.lstrip('+')}} ({len(own)})" if deviation is not None else ""
            rows[name] = text
    return found


def table(card):
    """A row a type, in Markdown."""
    columns = card.columns()
    found = cells(columns)
    lines = ["| attention | " + " | ".join(found) + " |", "|---" + "|---:" * len(found) + "|"]
    return lines + [f"| `{n}` | " + " | ".join(rows[n] for rows in found.values()) + " |" for n in order(columns)]


def draw(card, path):
    """A panel for each question: a dot is the mean, a mark a seed, and better is further right. Recall is a small curve
    for each type."""
    columns = {heading: rest for _, heading, *rest in card.columns()}
    names = order(card.columns())[::-1]
    near, far = (f"time at {T} (softmax's)" for T in ("1,024", "8,192"))
    shown = {  # title, and a line to compare with
        "enwik8 (bits/byte)": ("Language\nbits per byte", None),
        "recall": ("Recall of 4 to 32 pairs\nheight of a row: 0 to 1 found", None),
        "parity": ("Parity of 41 to 256 symbols\nshare right; dashed: chance", 0.5),
        "8 times (bits/byte more)": ("Length\nbits per byte more at 8 times", 0.0),
        far: ("Cost: time, softmax's is 1\ndot: at 8,192; ring: at 1,024", 1.0),
    }
    size = (14, 1.2 + 0.36 * len(names))
    figure, panels = pyplot().subplots(1, len(shown), figsize=size, layout="constrained", sharey=True)
    for panel, (heading, (title, line)) in zip(panels, shown.items()):
        panel.set_title(title, fontsize=SMALL)
        if heading == "recall":
            draw_recall(panel, card, names)
            continue
        which, _, scores = columns[heading]
        for y, name in enumerate(names):
            if heading == far and name == "none":  # no place on a logarithmic axis
                panel.annotate("0 →", (0.99, y), xycoords=("axes fraction", "data"), ha="right", va="center")
            elif scores[name]:
                seeds = scores[name] if len(scores[name]) > 1 else []
                panel.plot(seeds, [y] * len(seeds), "|", color=colour(name), alpha=0.6, markersize=10)
                panel.plot(statistics.mean(scores[name]), y, "o", color=colour(name), markersize=6)
            if heading == far and name != "none":
                panel.plot(
                    columns[near][2][name], [y] * len(columns[near][2][name]), "o", color=colour(name), mfc="none"
                )
        if line is not None:
            panel.axvline(line, color="grey", linestyle="--", linewidth=1)
        if heading == far:
            panel.set_xscale("log")
            panel.set_xticks((0.1, 0.2, 0.5, 1, 2), ("0.1", "0.2", "0.5", "1", "2"))
            panel.minorticks_off()
        if which == "low":
            panel.invert_xaxis()
    name_rows(panels[0], names, [colour(name) for name in names])
    panels[0].set_ylim(-0.7, len(names) - 0.3)
    note = "further right is better, in recall fuller; dot: mean, tick or thin line: a seed; rows in order of language"
    figure.supxlabel(note, fontsize=SMALL)
    save_figure(figure, path)


def draw_recall(panel, card, names):
    """Accuracy from 0 to 1 within each row, against the number of pairs: the mean, filled, and each seed."""
    for y, name in enumerate(names):
        for edge in (y - 0.4, y + 0.4):
            panel.axhline(edge, color="grey", linewidth=0.5, alpha=0.4)
        seeds = card.scores("recall", "recall", name, lambda s: [s["by part"][pairs] for pairs in PAIRS.values()])
        seeds = [[y - 0.4 + 0.8 * share for share in shares] for shares in seeds]
        if seeds:
            heights = [statistics.mean(heights) for heights in zip(*seeds)]
            panel.fill_between(range(len(PAIRS)), y - 0.4, heights, color=colour(name), alpha=0.35, linewidth=0)
            panel.plot(range(len(PAIRS)), heights, color=colour(name))
            panel.plot(range(len(PAIRS)), list(zip(*seeds)), color=colour(name), linewidth=0.6)
    panel.set_xticks(range(len(PAIRS)), PAIRS)
    panel.grid(axis="y", visible=False)


def main(argv):
    (card, _) = config.load(argv, CardConfig)
    if card.part == "cost":
        print("the figures of cost are those of docs/bench.json, which the table reads: there is nothing to run")
        return 0
    if card.part:
        return run_part(card)
    found = Card(card.folder)
    print("\n".join(table(found)))
    draw(found, card.png)
    return 0


if __name__ == "__main__":
    config.run(main, DataError, ModelError, TrainError)
