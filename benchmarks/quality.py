"""python bench.py --what=quality --out_dir=out/a,out/b: how good are checkpoints, and what did training them cost?"""

import json
import os
import statistics
from dataclasses import asdict

import numpy as np
import torch

from benchmarks import extrapolation
from benchmarks.runs import read_config, read_log, runs
from benchmarks.tables import LINES, pyplot, save_figure
from data.scoring import context_sizes, eval_window, evaluate
from model import GPTConfig
from train import TrainConfig
from weights import read_checkpoint

# Keys that change no figure of a run, beside those of W&B: what it writes, and how it is scored afterwards.
IDLE = ("out_dir", "export", "checkpoint_interval", "log_interval")
IDLE += ("eval_only", "eval_context", "eval_stride", "eval_batch_size")


def bench_quality(bench, runtime, report):
    """The full pass over the splits for each checkpoint folder, the loss by position in the context, and what a model
    cost to train; of those that classify each label's part in it too. Of several contexts only the scores."""
    if len(context_sizes(bench.eval_context)) > 1:
        return extrapolation.bench_contexts(bench, runtime, report)
    labelled, curves, costs = [], {}, {}
    with quality_table(report) as table:
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
            names = [row[name] for name in ("folder", "attention", "split", "parameters (count)")]
            scaling.add(*names, *costs[row["folder"]], row["nats/token"])
    over_seeds(table.rows, report)
    rows = [row | {"accuracy (share)": s["accuracy (share)"]} for row, s in zip(scaling.rows, table.rows)]
    plot_quality(curves, rows, bench.png or "out/quality.png")
    for folder, scores in labelled:
        names = [row["label"] for row in scores["labels"]]
        columns = {"label": None, "targets (count)": None}
        columns |= dict.fromkeys(("precision (share)", "recall (share)", "F1 (share)"), ".4f")
        columns |= dict.fromkeys((f"called {name} (count)" for name in names), "d")
        title = f"labels of {folder}, {scores['split']}"
        with report.table(title, title, columns) as table:
            for row, called in zip(scores["labels"], scores["confusion"]):
                table.add(*row.values(), *called)


def quality_table(report):
    """An empty table for the rows of score_checkpoint."""
    columns = dict.fromkeys(("folder", "attention", "parameters (count)", "data", "split"))
    columns |= {"nats/token": ",.6f", "standard error (nats/token)": ".6f", "bits/byte": ",.6f"}
    columns |= {"perplexity (per token)": ",.3f", "perplexity (per word)": ",.2f"}
    columns |= dict.fromkeys(("context (tokens)", "stride (tokens)"))
    classes = ("accuracy", "majority class", "macro precision", "macro recall", "macro F1")
    columns |= dict.fromkeys((f"{name} (share)" for name in classes), ".4f")
    return report.table("quality", "full pass over whole splits", columns, keys=5)


def score_checkpoint(folder, model, dataset, bench, runtime, table, curves, costs, name=None):
    """A row of `table` for each split, its loss by context in `curves`, and in `costs` the tokens and operations of the
    training up to the checkpoint `name` (None: the best); returns the folder and the scores of those whose targets are
    labels."""
    labelled = []
    context, stride = eval_window(model, dataset, bench.eval_context, bench.eval_stride)
    for part in bench.split.split(","):
        split, each = dataset.split(part.strip()), []
        s = evaluate(model, split, context, stride, bench.eval_batch_size, runtime, each=each)
        row = (folder, model.config.attention_type, model.num_params(), dataset.meta["label"], split.name)
        nats = torch.cat([nats for _, nats, *_ in each])
        seen = torch.cat([torch.arange(1, scored.size(1) + 1).expand_as(scored)[scored] for scored, *_ in each])
        curves[folder, split.name] = loss_by_context(nats, seen)
        lengths = torch.cat([scored.sum(1) for scored, *_ in each]) if split.record_len else max(1024, context)
        text = (s["loss"], standard_error(nats, lengths), s.get("bits_per_byte"))
        text += (s["token_perplexity"], s.get("word_perplexity"))
        classes = (s.get(key) for key in ("accuracy", "majority", "precision", "recall", "f1"))
        table.add(*row, *text, s["context"], s["stride"], *classes)
        if split.labels:
            labelled.append((folder, s))
    costs[folder] = training_cost(folder, model, name)
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
            cells = [cell for unit in units for cell in mean_and_deviation([row[unit] for row in runs])]
            first = runs[0]
            table.add(first["attention"], first["folder"], split, first["parameters (count)"], len(runs), *cells)


def mean_and_deviation(scores):
    """(mean, standard deviation with n - 1) of runs' scores; None where there are too few, or a run has none."""
    known = scores and None not in scores
    return statistics.mean(scores) if known else None, statistics.stdev(scores) if known and scores[1:] else None


def decides(name):
    """Whether a key of TrainConfig can change what a run learns, or which weights are its best."""
    return name not in IDLE and not name.startswith("wandb")


def recipe(folder):
    """What a run was, but for its folder and keys that leave its figures alone, and its seed; of a folder that does not
    say, the folder and None."""
    try:
        stored = read_config(folder)
        model, cfg = asdict(GPTConfig()) | stored["model"], asdict(TrainConfig()) | stored["train"]
        seed = cfg.pop("seed")
        cfg = {k: v for k, v in cfg.items() if decides(k) and k not in ("device", "compile")}
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


def training_cost(folder, model, name=None):
    """(tokens, executed GFLOP) of the training up to the checkpoint that is scored; a backward pass is two forwards.
    Tokens are those that the log counted, between two of its lines in proportion; after its last line, or without a
    log, those of the run's keys."""
    try:
        stored = read_config(folder)
        cfg, T = stored["train"], stored["data"].get("record_len") or model.config.block_size
        steps = read_checkpoint(folder, name)["iter_num"]
        each = cfg["batch_size"] * cfg["gradient_accumulation_steps"] * T
        log = read_log(folder)[0] if os.path.exists(os.path.join(folder, "log.jsonl")) else []
        points = [(0, 0)] + [(e["iter"], e["tokens"]) for e in log if "tokens" in e]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # of another project, or exported
        return None, None
    i, tokens = points[-1]
    points += [(steps, tokens + (steps - i) * each)] if i < steps else []
    tokens = round(np.interp(steps, *zip(*points)))
    return tokens, 3 * tokens / T * model.flops(T)[1] / 1e9


def plot_quality(curves, rows, path):
    """The loss by context, and against parameters, tokens and operations, of the first split; of records the accuracy
    against parameters and tokens too."""
    split, plt = rows[0]["split"], pyplot()
    rows = [row for row in rows if row["split"] == split]
    types = list(dict.fromkeys(row["attention"] for row in rows))
    columns = "parameters (count)", "trained on (tokens)", "executed in training (GFLOP)"
    panels = [(column, "loss (nats/token)") for column in columns]
    if any(row["accuracy (share)"] is not None for row in rows):
        panels += [(column, "accuracy (share)") for column in columns[:2]]
    n = -(-(1 + len(panels)) // 2)
    figure, axes = plt.subplots(n, 2, figsize=(8.4, 3.7 * n), layout="constrained")
    for i, row in enumerate(rows):
        curve = curves[row["folder"], split]
        name = os.path.basename(os.path.normpath(row["folder"]))
        axes[0, 0].plot(list(curve), list(curve.values()), label=name, **LINES[i % len(LINES)])
    axes[0, 0].set(xscale="log", xlabel="context (tokens)", ylabel=f"{split} loss (nats per token)")
    axes[0, 0].legend(frameon=False, fontsize=10)
    for axis, (column, measure) in zip(axes.flat[1:], panels):
        for i, name in enumerate(types):
            own = [row for row in rows if row["attention"] == name and row[column] and row[measure] is not None]
            if own:
                points = sorted((row[column], row[measure]) for row in own)
                axis.plot(*zip(*points), label=name, **LINES[i % len(LINES)])
        axis.set(xscale="log", xlabel=column, ylabel=f"{split} {measure}")
    axes[0, 1].legend(frameon=False, fontsize=10)
    save_figure(figure, path)
