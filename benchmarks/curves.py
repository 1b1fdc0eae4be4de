"""python bench.py --what=curves --out_dir=out/a,out/b: how did runs go? Their logs as one picture."""

import functools
import itertools
import os

import torch

from benchmarks.runs import read_config, read_log, run_folders
from benchmarks.tables import COLOURS, pyplot, save_figure
from config import ConfigError

TRAJECTORIES = dict(alpha="alpha (logit)", span="span (tokens)", period="period (tokens)")  # of the masks' statistics


def plot_curves(bench, runtime, report):
    """Training and validation loss of each run against steps and training time, what it cost, of records the accuracy,
    for students the distance from the teacher, and for learned masks their parameters' way, in one PNG."""
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
    drawings += [draw_accuracy] if any("val_accuracy" in e for _, val in runs.values() for e in val) else []
    drawings += [draw_divergence] if any("kl" in e for _, val in runs.values() for e in val) else []
    bars = {"wall_s": "training time (s)", "cpu_s": "processor time (s)", "rss_mb": "peak memory (MB)"}
    drawings += [functools.partial(draw_bars, key, label) for key, label in bars.items()] + masks
    rows = -(-len(drawings) // 2)
    figure, panels = pyplot().subplots(rows, 2, figsize=(8.4, 3.7 * rows), layout="constrained", squeeze=False)
    for panel in panels.flat[len(drawings) :]:
        panel.set_axis_off()
    for draw, panel in zip(drawings, panels.flat):
        draw(panel=panel, runs=runs)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper left", frameon=False)
    save_figure(figure, bench.png or "out/curves.png")


def draw_loss(panel, runs, against):
    for (name, (steps, val)), colour in zip(runs.items(), itertools.cycle(COLOURS)):
        steps = [e for e in steps if "ce" in e]  # steps that match a teacher's attention have no cross-entropy
        panel.plot([e[against] for e in steps], [e["ce"] for e in steps], color=colour, alpha=0.35)
        points = [e[against] for e in val], [e["val_loss"] for e in val]
        panel.plot(*points, color=colour, marker="o", markersize=4, label=name)
    label = {"iter": "optimizer steps", "wall_s": "training time (s)"}[against]
    panel.set(title="validation; pale: training", xlabel=label, ylabel="cross-entropy (nats per token)")


def draw_accuracy(panel, runs):
    for (name, (steps, val)), colour in zip(runs.items(), itertools.cycle(COLOURS)):
        for entries, key, style in (
            (steps, "accuracy", dict(alpha=0.35)),
            (val, "val_accuracy", dict(marker="o", markersize=4, label=name)),
        ):
            entries = [e for e in entries if e.get(key) is not None]  # no running text, and a split without targets
            panel.plot([e["iter"] for e in entries], [e[key] for e in entries], color=colour, **style)
    title = "validation; pale: training"
    panel.set(title=title, xlabel="optimizer steps", ylabel="accuracy (share)", ylim=(0, 1.02))


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
        values = torch.tensor([e["stats"][f"h.{i}.{kind}"] for e in stats])  # (evaluations, heads; of alpha also N)
        names = [f"layer {i}"] * values.shape[-1]
        if kind == "alpha":
            names = read_config(folder)["model"]["mask_mix_candidates"].split(",")
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
