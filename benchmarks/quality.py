"""python bench.py --what=quality --out_dir=out/a,out/b: how good are checkpoints, and what did training them cost?"""

import functools
import os
import statistics

import numpy as np
import torch

from benchmarks import extrapolation, style
from benchmarks.runs import after_start, groups, places, read_config, read_log, recipe, runs
from benchmarks.style import save_figure
from data.scoring import context_sizes, eval_window, evaluate
from weights import read_checkpoint


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
    rows = [row | cost for row, cost in zip(table.rows, scaling.rows)]
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
    """Of the first split, for each group of runs that differ in their seed alone: the score, with its mean and spread;
    the validation loss against tokens; the loss by context; and the score against what is not equal of parameters,
    tokens and operations. Of records the accuracy too."""
    split = rows[0]["split"]
    rows = {row["folder"]: row for row in rows if row["split"] == split}
    found = [(group, [rows[folder] for folder in group.folders]) for group in groups(list(rows))]
    bits = all(row["bits/byte"] is not None for row in rows.values())
    measures = {"bits/byte": "bits per byte"} if bits else {"nats/token": "loss (nats per token)"}
    if all(row["accuracy (share)"] is not None for row in rows.values()):
        measures |= {"accuracy (share)": "accuracy (share)"}
    costs = ("parameters (count)", "trained on (tokens)", "executed in training (GFLOP)")
    costs = [cost for cost in costs if varies([row[cost] for row in rows.values()])]
    logs = {group.name: read_logs(group.folders) for group, _ in found}
    drawn = [functools.partial(draw_scores, found, name, f"{split} {label}") for name, label in measures.items()]
    drawn += [functools.partial(draw_losses, found, logs)] if any(logs.values()) else []
    drawn += [functools.partial(draw_context, found, curves, split)]
    drawn += [functools.partial(draw_cost, found, c, m, f"{split} {measures[m]}") for m in measures for c in costs]
    figure, panels = style.grid(len(drawn), height=style.height(len(found)))
    for draw, panel in zip(drawn, panels):
        draw(panel)
    if any(len(group.folders) > 1 for group, _ in found):
        figure.supxlabel(style.SPREAD, fontsize=style.SMALL)
    save_figure(figure, path)


def varies(costs):
    """Whether runs differ in a cost, by more than equal budgets leave."""
    return None not in costs and max(costs) > 1.05 * min(costs)


def read_logs(folders):
    """The logs of runs; [] where one has none."""
    there = all(os.path.exists(os.path.join(folder, "log.jsonl")) for folder in folders)
    return [read_log(folder) for folder in folders] if there else []


def draw_scores(found, measure, label, panel):
    rows = [(group.name, group.line, [row[measure] for row in rows]) for group, rows in found]
    style.dots(panel, rows, label, best="high" if "accuracy" in measure else "low")


def draw_losses(found, logs, panel):
    ends = []
    for group, _ in found:
        if logs[group.name]:
            losses = [after_start([e for e in log[1] if e["split"] == "val"], "val_loss") for log in logs[group.name]]
            end = style.band(panel, losses, group.line, places(logs[group.name], "tokens"))
            ends += [(group.name, group.line["color"], *end)] if end else []
    panel.set(xlabel="trained on (tokens)", ylabel="val loss, estimate (nats/token)")
    panel.xaxis.set_major_formatter(style.thousands)
    panel.locator_params(axis="x", nbins=4)
    style.label_ends(panel, ends)


def draw_context(found, curves, split, panel):
    ends = []
    for group, _ in found:
        end = style.band(panel, [curves[folder, split] for folder in group.folders], group.line)
        ends += [(group.name, group.line["color"], *end)] if end else []
    style.tokens_axis(panel, {n for group, _ in found for n in curves[group.folders[0], split]})
    panel.set(xlabel="tokens seen, up to", ylabel=f"{split} loss (nats per token)")
    style.label_ends(panel, ends)


def draw_cost(found, cost, measure, label, panel):
    """A point for each group, those of one attention type joined in the order of what they cost."""
    points, ends = {}, []
    for group, rows in found:
        scores, where = [row[measure] for row in rows], statistics.mean(row[cost] for row in rows)
        mean, code = statistics.mean(scores), group.line["color"]
        spread = statistics.stdev(scores) if scores[1:] else 0
        panel.errorbar(where, mean, yerr=spread, color=code, marker=group.line["marker"], markersize=6, capsize=3)
        points.setdefault(group.attention, []).append((where, mean))
        ends.append((group.name, code, where, mean))
    for name, own in points.items():
        panel.plot(*zip(*sorted(own)), color=style.colour(name), linewidth=1, alpha=0.7)
    panel.set(xlabel=cost, ylabel=label)
    style.scale(panel, [x for own in points.values() for x, _ in own])
    style.label_ends(panel, ends)
