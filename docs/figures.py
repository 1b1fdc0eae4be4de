"""Draw the README's two figures from the JSON files beside this one, and print the measured columns of its first table.

    python docs/figures.py

bench.py wrote the files: compare.json with --what=quality, of runs that differ in attention and seed; bench.json, of a
layer of each type; superposition.json with --what=superposition, of a toy and the gated block that imitates it.
"""

import json
import math
import pathlib
import re
import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).resolve().parent
COLORS = {
    "softmax": "#222222",
    "adaptive_span": "#c1440e",
    "mask_mix": "#e08e0b",
    "gla": "#0b5fa5",
    "gsa": "#3d9be0",
    "deltanet": "#2aa198",
    "gdn": "#157a6e",
    "kda": "#7fc8a9",
    "mamba2": "#a3b18a",
    "performer": "#1b8a5a",
    "nsa": "#b03a7c",
    "gated": "#6a3d9a",
    "gated_output": "#8a6d3b",
    "none": "#888888",
}
TIME, RATIO = "forward + backward (ms)", "of softmax (ratio)"


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


def cells(score, row):
    """What the README's first table says of a type: its state, bits a byte (score=None: not measured) and time at the
    longest T."""
    bits = "{:.3f} ± {:.3f} ({})".format(*score) if score else "-"
    low, middle, high = min(row[RATIO]), statistics.median(row[RATIO]), max(row[RATIO])
    wide = high - low > 0.5 * middle and f"{low:.2f}" != f"{high:.2f}"
    time = f"{low:.2f} - {high:.2f}" if wide else f"{middle:.2f}"
    state = row["state (bytes)"]
    size = f"{state / 1e6:.2g} MB" if state >= 1e6 else f"{state / 1e3:.0f} kB" if state else "0"
    return size, bits, time


def apart(heights, gap):
    """Sorted heights, moved as little as needed to be `gap` apart: neighbours that touch spread around their mean."""
    groups = [[h] for h in sorted(heights)]
    while True:
        centres = [statistics.mean(group) for group in groups]
        for i in range(len(groups) - 1):
            if centres[i + 1] - centres[i] < gap * (len(groups[i]) + len(groups[i + 1])) / 2 - 1e-9:
                groups[i : i + 2] = [groups[i] + groups[i + 1]]
                break
        else:
            return [c + gap * (k - (len(g) - 1) / 2) for c, g in zip(centres, groups) for k in range(len(g))]


def draw_scores(axis, found):
    """A dot with its standard deviation for each type, the best at the top; the control is a dashed line."""
    control, *_ = found.pop("none")
    order = sorted(found, key=lambda name: found[name][0], reverse=True)
    for y, name in enumerate(order):
        mean, deviation, _ = found[name]
        axis.errorbar(mean, y, xerr=deviation, color=COLORS[name], marker="o", markersize=5, capsize=4, linewidth=2)
    axis.axvline(control, color=COLORS["none"], linestyle="--", linewidth=1.5)
    place = dict(xytext=(-8, 0), textcoords="offset points", ha="right", va="center", color=COLORS["none"])
    axis.annotate("none\n(no attention)", (control, (len(order) - 1) / 2), **place)
    axis.set_yticks(range(len(order)), order)
    for label, name in zip(axis.get_yticklabels(), order):
        label.set_color(COLORS[name])
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("bits per byte (lower is better)")
    axis.set_title("Loss at equal tokens", loc="left")
    axis.grid(axis="x", alpha=0.3)


def draw_times(axis, found):
    """Microseconds a token against length, each line named at its end."""
    ends = {}
    for name, rows in found.items():
        if name == "none":  # it computes nothing
            continue
        times = [[1e3 * ms / (T * row["batch (sequences)"]) for ms in row[TIME]] for T, row in rows.items()]
        middle = [statistics.median(round) for round in times]
        width = 3 if name == "softmax" else 2
        axis.fill_between(list(rows), [min(r) for r in times], [max(r) for r in times], color=COLORS[name], alpha=0.12,
                          linewidth=0)  # fmt: skip
        axis.plot(list(rows), middle, color=COLORS[name], linewidth=width, zorder=3 if name == "softmax" else 2)
        ends[name] = math.log(middle[-1])
    lengths = list(found["softmax"])
    order = sorted(ends, key=ends.get)
    for name, height in zip(order, apart(ends.values(), 0.2)):
        x = lengths[-1]
        axis.plot((x * 1.03, x * 1.22), (math.exp(ends[name]), math.exp(height)), color=COLORS[name], linewidth=0.8,
                  clip_on=False)  # fmt: skip
        weight = "bold" if name == "softmax" else "normal"
        axis.text(x * 1.27, math.exp(height), name, color=COLORS[name], va="center", weight=weight)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlim(lengths[0], lengths[-1])
    axis.set_xticks(lengths, [f"{T:,}" for T in lengths])
    axis.set_yticks((10, 20, 50, 100, 200), ("10", "20", "50", "100", "200"))
    axis.minorticks_off()
    axis.set_xlabel("T, tokens of context")
    axis.set_ylabel("µs a token")
    axis.set_title("Time of a layer, forward and backward", loc="left")
    axis.grid(alpha=0.3)


def draw_heads(axis, table, title):
    """Heads by trigrams: a square where a head says a trigram alone, a column where only several heads together do."""
    rows, n = table["rows"], int(re.search(r"(\d+) heads", table["title"])[1])
    for x, row in enumerate(rows):
        for head in map(int, filter(None, row["heads"].split(", "))):
            axis.add_patch(plt.Rectangle((x - 0.5, head - 0.5), 1, 1, color=COLORS["gla"]))
            axis.text(x, head, "alone", color="white", ha="center", va="center", size=10)
        if row["distributed"] == "yes":
            axis.add_patch(plt.Rectangle((x - 0.5, -0.5), 1, n, color="#f0c9b8"))
            axis.text(x, n / 2 - 0.5, "only\ntogether", ha="center", va="center", size=10)
    axis.set(xlim=(-0.5, len(rows) - 0.5), ylim=(n - 0.5, -0.5), ylabel="head", aspect=0.4, anchor="N")
    axis.set_xticks(range(len(rows)), [row["trigram"].replace("->", "→") for row in rows])
    axis.set_yticks(range(n), range(n))
    axis.set_title(title, loc="left")
    axis.tick_params(length=0)


def main():
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained", width_ratios=(1, 1.25))
    draw_scores(left, scores())
    draw_times(right, costs())
    figure.savefig(HERE / "overview.png", dpi=110)

    toy, block = json.loads((HERE / "superposition.json").read_text())["tables"].values()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9), layout="constrained")
    draw_heads(left, toy, "softmax, 3 heads")
    draw_heads(right, block, "gated, 6 heads")
    figure.savefig(HERE / "superposition.png", dpi=110)

    found = scores()
    for name, rows in costs().items():
        print(name, *cells(found.get(name), rows[max(rows)]), sep=" | ")


if __name__ == "__main__":
    main()
