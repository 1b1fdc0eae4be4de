"""Draw the pictures of README and docs from the JSON files beside this one; print what README's first table measures.

    python docs/figures.py

bench.py wrote the files: compare.json with --what=quality, of runs that differ in attention and seed; bench.json, of a
layer of each type; superposition.json with --what=superposition, of a toy and the gated block that imitates it.
"""

import json
import pathlib
import re
import statistics
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository

from benchmarks import card, layers, style  # noqa: E402
from benchmarks.style import COLORS  # noqa: E402

TIME = "forward + backward (ms)"
FIRST = ("language: enwik8 (bits/byte)", "recall: 16 pairs", "state: parity", "length: 8 times (bits/byte more)")
FIRST += ("cost: time at 8,192 (softmax's)", "cost: state at 8,192 (kB)")


def scores():
    """{attention: (mean bits a byte, standard deviation, seeds)}"""
    rows = json.loads((HERE / "compare.json").read_text())["tables"]["over seeds"]["rows"]
    keys = ("mean (bits/byte)", "standard deviation (bits/byte)", "seeds (count)")
    return {row["attention"]: tuple(row[key] for key in keys) for row in rows}


def costs():
    """{attention: {T: its row}}"""
    found = {}
    for row in json.loads((HERE / "bench.json").read_text())["tables"]["sweep"]["rows"]:
        found.setdefault(row["attention"], {})[row["T (tokens)"]] = row
    return found


def first_table():
    """{type: [what the README's first table says of it]}, in the order of the card's table: without the number of
    seeds, which is 3, and deviations that are 0."""
    columns = card.Card(HERE / "card").columns()
    found = card.cells(columns)

    def short(cell):
        return re.sub(r" ± 0\.00$", "", cell.replace(" (3)", ""))

    return {name: [short(found[heading][name]) for heading in FIRST] for name in card.order(columns)}


def draw_scores(axis, found):
    """A dot with its standard deviation for each type, the best at the top; the control is a dashed line."""
    control, *_ = found.pop("none")
    order = sorted(found, key=lambda name: found[name][0], reverse=True)
    for y, name in enumerate(order):
        mean, deviation, _ = found[name]
        axis.errorbar(mean, y, xerr=deviation, color=COLORS[name], marker="o", markersize=4, capsize=5, linewidth=1.5)
    axis.axvline(control, color=COLORS["none"], linestyle="--", linewidth=1.5)
    place = dict(xytext=(-8, 0), textcoords="offset points", ha="right", va="center", color=COLORS["none"])
    axis.annotate("none\n(no attention)", (control, (len(order) - 1) / 2), **place)
    axis.set_xlabel("bits per byte (lower is better)")
    axis.set_title("Loss after 1.0 M tokens, context 128")
    style.name_rows(axis, order, [COLORS[name] for name in order])


def draw_times(axis, found):
    """Microseconds a token against length, each line named at its end."""
    ends = []
    for name, rows in found.items():
        if name == "none":  # it computes nothing
            continue
        times = [[1e3 * ms / (T * row["batch (sequences)"]) for ms in row[TIME]] for T, row in rows.items()]
        middle = [statistics.median(round) for round in times]
        (line,), lengths = style.lines([name]), list(rows)
        line |= dict(linewidth=3, zorder=3) if name == "softmax" else {}
        low, high = ([pick(round) for round in times] for pick in (min, max))
        axis.fill_between(lengths, low, high, color=COLORS[name], alpha=0.12, linewidth=0)
        axis.plot(lengths, middle, **line)
        ends.append((name, COLORS[name], lengths[-1], middle[-1]))
    axis.set(
        yscale="log", xlim=(lengths[0] * 0.93, lengths[-1] * 1.07), xlabel="T, tokens of context", ylabel="µs a token"
    )
    axis.set_title("Time of a layer, forward and backward")
    style.tokens_axis(axis, lengths)
    style.log_ticks(axis.yaxis)
    style.label_ends(axis, ends)


def draw_heads(axis, table, name):
    """Heads by trigrams: a square where a head says a trigram alone, a column where only several heads together do."""
    rows, n = table["rows"], int(re.search(r"(\d+) heads", table["title"])[1])
    for x, row in enumerate(rows):
        for head in map(int, filter(None, row["heads"].split(", "))):
            axis.add_patch(style.pyplot().Rectangle((x - 0.5, head - 0.5), 1, 1, color=COLORS[name]))
            axis.text(x, head, "alone", color="white", ha="center", va="center", size=10)
        if row["distributed"] == "yes":
            axis.add_patch(style.pyplot().Rectangle((x - 0.5, -0.5), 1, n, color="#f0c9b8"))
            axis.text(x, n / 2 - 0.5, "no head\nalone", ha="center", va="center", size=10)
    axis.set(xlim=(-0.5, len(rows) - 0.5), ylim=(n - 0.5, -0.5), ylabel="head", aspect=0.4, anchor="N")
    axis.set_xticks(range(len(rows)), [row["trigram"].replace("->", "→") for row in rows])
    axis.set_yticks(range(n), range(n))
    axis.set_xlabel("skip trigram: A … B → C", fontsize=style.SMALL)
    axis.set_title(f"{name}, {n} heads")
    axis.tick_params(length=0)
    axis.grid(False)


def main():
    plt = style.pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained", width_ratios=(1, 1.25))
    draw_scores(left, scores())
    draw_times(right, costs())
    note = "bars: ± one standard deviation over seeds; bands: lowest to highest of the rounds; none takes no time"
    figure.supxlabel(note, fontsize=style.SMALL)
    style.save_figure(figure, str(HERE / "overview.png"))

    toy, block = json.loads((HERE / "superposition.json").read_text())["tables"].values()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    draw_heads(left, toy, "softmax")
    draw_heads(right, block, "gated")
    style.save_figure(figure, str(HERE / "superposition.png"))

    rows = json.loads((HERE / "bench.json").read_text())["tables"]["sweep"]["rows"]
    layers.plot_overview(rows, str(HERE / "bench.png"))

    for name, row in first_table().items():
        print(name, *row, sep=" | ")


if __name__ == "__main__":
    main()
