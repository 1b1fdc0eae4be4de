"""python bench.py --what=heads --out_dir=out/a: what do heads do? Gates, decays, states and reads, by layer."""

import statistics

import torch

from benchmarks import style
from benchmarks.runs import run_folders, runs
from data import windows

# What the types' `stats` say of a head, and how a table and a picture call it.
COLUMNS = {"first_token": "on the first token (weight)", "gate": "of pairs (mean gate)"}
COLUMNS |= {
    "branch_gate": "of branches (mean gate)",
    "gate_zero": "gates of 0 (share)",
    "output_gate": "of the output (mean gate)",
}
COLUMNS |= {"decay": "decay of the state (factor)", "state_norm": "state after a window (norm)"}
COLUMNS |= {"max_logit": "largest logit (number)", "norm2": "queries and keys (squared norm)"}
COLUMNS |= {"pair_norm2": "largest query + key (squared norm)", "kept": "kept (distances)", "span": "span (tokens)"}
COLUMNS |= {"period": "period (tokens)", "weight": "of candidates (mean weight)"}
BRANCHES = ("compressed", "selected", "window")


def bench_heads(bench, runtime, report):
    """Over the first windows of the validation split, by layer, means over its heads: the weight on the first token,
    gates, decays, norms of states, and heads whose gates are all 0. And of each head, in heads.png in the folder; of
    gsa the decay of each slot, and of nsa which blocks read which."""
    several = len(run_folders(bench)) > 1
    for folder, model, dataset in runs(bench, runtime):
        split, context = dataset.split("val"), model.config.block_size
        x = next(windows(split, context, context, bench.eval_batch_size))[0].to(runtime.device)
        found = [b.attn.stats(entry) for b, (entry, _) in zip(model.transformer.h, model.trace(x))]
        for stats in found:
            if "gate" in stats and stats["gate"].dim() == 2:  # nsa's, (3, H)
                stats["branch_gate"] = stats.pop("gate")
        title = f"{folder}: {model.config.attention_type}, {x.numel():,} tokens"
        head = ", ".join(["layer", *COLUMNS.values(), "dead heads (count)"])
        with report.table(f"heads of {folder}", title, head) as out:
            dead = [int(stats["dead"].sum()) if "dead" in stats else None for stats in found]
            means = [[float(s[name].float().mean()) if name in s else None for s in found] for name in COLUMNS]
            for i, row in enumerate(zip(*means, dead)):
                out.add(str(i), *row)
            *means, dead = ([x for x in column if x is not None] for column in (*means, dead))
            out.add("all", *(statistics.fmean(c) if c else None for c in means), sum(dead) if dead else None)
        path = style.place(bench.png, folder, "heads", several) if several or not bench.png else bench.png
        draw_stats(found, model.config.types(), path)


def draw_stats(found, types, path):
    """A panel for each statistic of heads: a mark for each head of a layer, in the colour of the layer's type; then the
    decay of the slots of each layer, sorted, and the reads of each layer."""
    found = [{name: value.float().cpu() for name, value in stats.items()} for stats in found]
    panels = [(draw_by_head, name) for name in COLUMNS if any(name in stats for stats in found)]
    panels += [(draw_slots, "slot_decay")] * any("slot_decay" in stats for stats in found)
    panels += [(draw_reads, i) for i, stats in enumerate(found) if "reads" in stats]
    if not panels:
        return
    figure, axes = style.grid(len(panels), 4.2, 3.2, columns=3)
    for (draw, what), axis in zip(panels, axes):
        draw(axis, what, found, types)
    shown = [t for t in dict.fromkeys(types) if t != "none"]
    marks = [style.pyplot().Line2D([], [], color=style.colour(t), marker="o", linestyle="", label=t) for t in shown]
    figure.legend(handles=marks, loc="outside upper left", ncols=6)
    style.save_figure(figure, path)


def draw_by_head(axis, name, found, types):
    """Heads of a layer stand beside each other; of nsa's gates a branch has a mark of its own."""
    branches, layers = {}, [i for i, stats in enumerate(found) if name in stats]
    for i in layers:
        values = found[i][name]
        rows = values if name == "branch_gate" else values.reshape(1, len(values), -1).mean(-1)
        for b, row in enumerate(rows):
            marker = style.MARKERS[b]
            branches |= {BRANCHES[b]: marker} if len(rows) > 1 else {}
            xs = i + 0.5 * ((torch.arange(len(row)) + 0.5) / len(row) - 0.5)
            axis.plot(xs, row, marker, color=style.colour(types[i]), alpha=0.8, markersize=5)
    for label, marker in branches.items():
        axis.plot([], [], marker, color="grey", label=label)
    if branches:
        above = dict(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=0.8, handletextpad=0)
        axis.legend(fontsize=8, **above)
    axis.set_xticks(range(len(found)))
    axis.set(xlabel="layer; a mark for each head", xlim=(-0.5, len(found) - 0.5))
    what, _, unit = COLUMNS[name].rstrip(")").partition(" (")
    label = f"{unit} {what}" if what[:3] in ("of ", "on ") else COLUMNS[name]  # "mean gate of pairs"
    axis.set_ylabel(label, fontsize=style.SMALL)
    axis.locator_params(axis="y", nbins=5, integer=name == "kept")


def draw_slots(axis, name, found, types):
    """The decay of each slot, sorted: how many remember for long. Of the mean over heads."""
    ends = []
    for i, stats in enumerate(found):
        if name in stats:
            values = stats[name].sort(-1).values.mean(0)
            code = style.pale(style.colour(types[i]), 0.5 * i / max(1, len(found) - 1))
            axis.plot(range(len(values)), values, color=code)
            ends.append((f"layer {i}", code, len(values) - 1, float(values[-1])))
    axis.set(xlabel="slot, sorted")
    axis.set_ylabel("decay of slots (factor)", fontsize=style.SMALL)
    style.label_ends(axis, ends)


def draw_reads(axis, i, found, types):
    """Which blocks the queries of each block read, the future left white."""
    reads = found[i]["reads"]
    future = torch.ones_like(reads, dtype=torch.bool).triu(1)
    image = axis.imshow(reads.masked_fill(future, float("nan")).numpy(), cmap="viridis", vmin=0, vmax=1)
    axis.set(xlabel="block that is read", ylabel=f"block of the query, layer {i}")
    axis.grid(False)
    axis.locator_params(nbins=6, integer=True)
    axis.figure.colorbar(image, ax=axis).set_label("share of its queries", fontsize=style.SMALL)
