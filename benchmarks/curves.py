"""python bench.py --what=curves --out_dir=out/a,out/b: how did runs go? Their logs as one picture."""

import functools
import itertools
import math
import os

import torch

from benchmarks import style
from benchmarks.runs import after_start, groups, places, read_config, read_log, run_folders
from benchmarks.style import save_figure
from config import ConfigError

TRAJECTORIES = dict(alpha="alpha (logit)", span="span (tokens)", period="period (tokens)")  # of the masks' statistics
MEMORY = {"rss_mb": ("-", "of the process"), "cuda_mb": ("--", "of the GPU")}
FEW = 4  # more runs than these hide behind the noise of their training steps
SECONDS = {"wall_s": "training time (s)", "cpu_s": "processor time (s)"}


def plot_curves(bench, runtime, report):
    """Training and validation loss against steps and training time, memory against time, what runs cost, of records the
    accuracy, for students the distance from the teacher, and for learned masks their parameters' way, in one picture.
    Runs that differ in their seed alone are one line."""
    folders, found = run_folders(bench), []
    for group in groups(folders):
        logs = [read_log(folder) for folder in group.folders]
        for folder, (steps, evaluations, _) in zip(group.folders, logs):
            if not steps or not any(e["split"] == "val" for e in evaluations):
                raise ConfigError(f"{folder}/log.jsonl has no training steps or no evaluations yet")
        found.append((group, [(s, [e for e in all if e["split"] == "val"], stats) for s, all, stats in logs]))
    has = {key: any(key in e for _, logs in found for log in logs for part in log[:2] for e in part)
           for key in ("val_accuracy", "kl", *MEMORY)}  # fmt: skip
    drawings = [functools.partial(draw_loss, against=against) for against in ("iter", "wall_s")]
    drawings += [draw_accuracy] * has["val_accuracy"] + [draw_divergence] * has["kl"]
    drawings += [draw_memory] * any(has[key] for key in MEMORY)
    if len(found) > 1:
        drawings += [functools.partial(draw_seconds, key) for key in SECONDS if costs(found, key)]
    for group, logs in found:
        for kind in TRAJECTORIES:
            if any(key.endswith(f".{kind}") for e in logs[0][2] for key in e["stats"]):
                drawings.append(functools.partial(draw_trajectories, group, logs[0][2], kind))
    figure, panels = style.grid(len(drawings), height=style.height(len(found)))
    for draw, panel in zip(drawings, panels):
        draw(panel=panel, found=found)
    notes = ["marks: validation" + "; thin: training" * (len(found) <= FEW)]
    notes += [style.SPREAD] * any(len(logs) > 1 for _, logs in found)
    if len(found) == 1 and (seconds := {key: costs(found, key) for key in SECONDS})["wall_s"]:
        notes += [
            f"{label.removesuffix(' (s)')} {seconds[key][0][2][0]:,.0f} s"
            for key, label in SECONDS.items()
            if seconds[key]
        ]
    figure.supxlabel("; ".join(notes), fontsize=style.SMALL)
    save_figure(figure, bench.png or "out/curves.png")


def draw_lines(panel, found, pale, marked, against="iter"):
    """For each group what the steps of each run say (`pale`), and the mean over seeds of what its evaluations say
    (`marked`), step 0 left out. Returns the lines' ends, and the values that limits should hold: of the pale lines
    those from the first evaluation on."""
    ends, seen = [], []
    for group, logs in found:
        at = places([(steps, val, None) for steps, val, _ in logs], against)
        points = [after_start(val, marked) for _, val, _ in logs]
        first = min((step for curve in points for step in curve), default=math.inf)
        for steps, *_ in logs if pale and len(found) <= FEW else ():
            curve = after_start(steps, pale)  # steps that match a teacher have no such entry
            style.band(panel, [curve], group.line, at, marker="", linewidth=0.8, alpha=0.4)
            seen += [y for step, y in curve.items() if step >= first]
        end = style.band(panel, points, group.line, at)
        seen += [y for curve in points for y in curve.values()]
        ends += [(group.name, group.line["color"], *end)] if end else []
    seen = [y for y in seen if math.isfinite(y)]
    panel.set_xlabel({"iter": "optimizer steps", "wall_s": "training time (s)"}[against])
    panel.set_xlim(left=0)
    panel.locator_params(nbins=5)
    return ends, seen


def draw_loss(panel, found, against):
    ends, seen = draw_lines(panel, found, "ce", "val_loss", against)
    if seen:
        margin = 0.05 * (max(seen) - min(seen)) or 0.1
        panel.set_ylim(min(seen) - margin, max(seen) + margin)
    panel.set_ylabel("loss, estimate (nats/token)")
    style.label_ends(panel, ends)


def draw_accuracy(panel, found):
    ends, _ = draw_lines(panel, found, "accuracy", "val_accuracy")
    panel.set(ylabel="accuracy (share)", ylim=(-0.02, 1.02))
    style.label_ends(panel, ends)


def draw_divergence(panel, found):
    ends, seen = draw_lines(panel, found, None, "kl")
    panel.set(ylabel="KL from the teacher (nats per token)", ylim=(0, 1.05 * max(seen, default=1)))
    style.label_ends(panel, ends)


def draw_memory(panel, found):
    """The highest so far, of the process and of the GPU, against time."""
    ends, drawn, highest = [], [], 0
    for group, logs in found:
        at = places([(steps, [], None) for steps, *_ in logs], "wall_s")
        for key, (dashes, of) in MEMORY.items():
            curves = [after_start(steps, key) for steps, *_ in logs]
            if end := style.band(panel, curves, group.line, at, marker="", linestyle=dashes):
                drawn += [of]
                highest = max([highest, *(y for curve in curves for y in curve.values())])
                ends.append((group.name, group.line["color"], *end))
    both = len({*drawn}) > 1
    ends = [(f"{name}, {of}" if both else name, *end) for (name, *end), of in zip(ends, drawn)]
    panel.set(xlabel="training time (s)", xlim=(0, None), ylim=(0, 1.15 * highest))
    panel.set_ylabel("peak memory (MB)" if both else f"peak memory {drawn[0]} (MB)")
    panel.locator_params(nbins=5)
    style.label_ends(panel, ends)


def costs(found, key):
    """[(name, style, the last value of each run)] of the groups whose runs measured it."""
    last = [(group, [steps[-1].get(key) for steps, *_ in logs]) for group, logs in found]
    return [(group.name, group.line, values) for group, values in last if None not in values]


def draw_seconds(key, panel, found):
    style.dots(panel, costs(found, key), SECONDS[key])
    panel.set_xlim(left=0)


def draw_trajectories(group, stats, kind, panel, found):
    """A line for each parameter of each layer (and head) of the group's first run: colours are candidates of mask_mix,
    layers of the others. Lines that are few have labels; of many, one label stands in the middle of their ends."""
    layers = sorted({int(key.split(".")[1]) for e in stats for key in e["stats"] if key.endswith(f".{kind}")})
    iters, ends = [e["iter"] for e in stats], {}
    for i in layers:
        values = torch.tensor([e["stats"][f"h.{i}.{kind}"] for e in stats])  # (evaluations, heads; of alpha also N)
        names = [f"layer {i}"] * values.shape[-1]
        if kind == "alpha":
            names = [c.strip() for c in read_config(group.folders[0])["model"]["mask_mix_candidates"].split(",")]
        for line, label in zip(values.movedim(0, -1).reshape(-1, len(iters)), itertools.cycle(names)):
            own = ends.setdefault(label, (style.CATEGORIES[len(ends) % len(style.CATEGORIES)], []))
            panel.plot(iters, line, color=own[0], alpha=0.7, linewidth=1.2)
            own[1].append(float(line[-1]))
    panel.set(xlabel="optimizer steps", ylabel=TRAJECTORIES[kind])
    what = "layer" if kind == "alpha" else "layer and head"
    panel.set_title(
        f"{os.path.basename(os.path.normpath(group.folders[0]))}: a line for each {what}", fontsize=style.SMALL
    )
    panel.locator_params(nbins=5)
    few = sum(len(ys) for _, ys in ends.values()) <= 20
    marked = {label: (code, ys if few else [sorted(ys)[len(ys) // 2]]) for label, (code, ys) in ends.items()}
    style.label_ends(panel, [(label, code, iters[-1], y) for label, (code, ys) in marked.items() for y in ys])
