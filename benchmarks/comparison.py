"""python compare.py ...: which of many runs is best? Equal parameters, scores, one table and one figure."""

import ast
import csv
import dataclasses
import glob
import hashlib
import os
import statistics
from types import SimpleNamespace

import torch

import config
from benchmarks import style
from benchmarks.quality import mean_and_deviation, score_checkpoint
from benchmarks.runs import after_start, read_log
from config import ConfigError, printable
from model import ATTENTION, GPT
from plugins import import_plugins, registered, split

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CHECKPOINTS = {"last": "ckpt.pt", "best": "best.pt"}
CODE = ("model.py", "train.py", "parallel.py", "weights.py", "formats.py", "config/__init__.py")
CODE += ("data/*.py", "kernels/*.py")
SCORED_ALIKE = ("dataset", "eval_context", "eval_stride", "eval_batch_size", "out_dir")  # one value for all runs


def read_lists(argv, single):
    """{key: its values} of a command line. A plugin comes first: `all` and keys of types ask what types there are."""
    files = [config.read_file(a) for a in argv if not a.startswith("-")]
    named = [names["plugin"] for names in files if isinstance(names.get("plugin"), str)]
    named += [a.removeprefix("--plugin=") for a in argv if a.startswith("--plugin=")]
    import_plugins(named[-1] if named else "")
    return dict(split_list(a, single | {"plugin"}) for a in argv if a.startswith("--"))


def split_list(argument, single):
    """`--key=a,"b,c"` -> (key, ["a", "b,c"]); keys in `single` take one value."""
    name, equals, text = argument[2:].partition("=")
    if not argument.startswith("--") or not equals or name in single:
        return name, [text if equals else "True"]
    try:
        items = [item.strip() for item in next(csv.reader([text], strict=True, skipinitialspace=True)) or [""]]
    except csv.Error:
        raise ConfigError(f"--{name}={printable(text)}: quotes surround a whole item: 'a,\"b,c\"'") from None
    if name in SCORED_ALIKE and len(items) > 1:
        raise ConfigError(f"--{name}={printable(text)}: one value, so that all runs are scored on the same tokens")
    if name == "attention_type":
        items = [part for item in items for part in (ATTENTION if item == "all" else [item.replace("+", ",")])]
    for item in items:
        if items.count(item) > 1:
            hint = "; a pattern of layers is joined with +" if name == "attention_type" else ""
            raise ConfigError(f"--{name}: {printable(item)} is there {items.count(item)} times{hint}")
    return name, items


def plugins_of(model):
    """The plugins that decide the result of a run: none where all its types are of model.py."""
    return tuple(split(model.plugin)) if registered & {*model.types()} else ()


def code(plugins=()):
    """A hash of what the code says that decides a result; comments and layout do not."""
    digest = hashlib.sha256()
    ours = sorted(path for pattern in CODE for path in glob.glob(os.path.join(ROOT, pattern)))
    for path in [*ours, *plugins]:
        with open(path, "rb") as f:
            digest.update(ast.dump(ast.parse(f.read())).encode())
    return digest.hexdigest()


def outline(model, vocab_size):
    """The model of a config without memory for its weights."""
    with torch.device("meta"):
        return GPT(config.override(model, vocab_size=model.vocab_size or vocab_size))


def equalise(runs, vocab_size):
    """Give each run the width of the MLP at which its model has the parameters of the first, and print both."""
    first, widths = runs[0].model, {}
    wanted = outline(first, vocab_size).num_params()
    print(f"{runs[0].group}: {wanted:,} parameters", flush=True)
    for run in runs:
        if run.cfg.init_from != "scratch" or run.model.mlp == "none" or "mlp_hidden" in run.cells:
            raise ConfigError(
                "--equal_params chooses mlp_hidden of new models: leave out init_from, mlp=none and lists"
            )
        if run.model != first:
            model = dataclasses.astuple(run.model)
            widths[model] = widths.get(model) or solve_width(run, wanted, vocab_size)
            run.keys["mlp_hidden"] = widths[model]
            run.model = config.override(run.model, mlp_hidden=widths[model])
    for run in runs:
        run.cells["mlp_hidden"] = str(outline(run.model, vocab_size).transformer.h[0].mlp.c_proj.in_features)


def solve_width(run, wanted, vocab_size):
    """The mlp_hidden of so many parameters: a multiple of 8, which GPUs prefer, where that is within 1 %."""
    models = (outline(config.override(run.model, mlp_hidden=width), vocab_size) for width in (1, 2))
    one, two = (model.num_params() for model in models)  # each further channel costs the same
    for step in (8, 1):
        width = max(1, round((1 + (wanted - one) / (two - one)) / step) * step)
        has = one + (width - 1) * (two - one)
        if abs(has - wanted) <= 0.01 * wanted:
            print(f"{run.group}: {has:,} parameters ({(has - wanted) / wanted:+.2%}), mlp_hidden={width}", flush=True)
            return width
    least = f"with mlp_hidden={width} it has {has:,} parameters, the first run has {wanted:,}"
    raise ConfigError(f"--equal_params: {run.group}: {least}")


def unit(runs):
    """What scores are in: bits a byte of text, nats a scored token of records."""
    return "bits/byte" if all(run.score["bits/byte"] is not None for run in runs if run.score) else "nats/token"


def score_run(run, compare, dataset, runtime, table):
    """The row of a run in the table of all, from its checkpoint, or as it was scored before."""
    context, stride, batch = run.cfg.eval_context, run.cfg.eval_stride, run.cfg.eval_batch_size
    alike = f"{compare.checkpoint} {compare.split} {context} {stride} {runtime.device} {runtime.dtype}"
    if score := run.state["scores"].get(alike):
        table.add(*((score | {"folder": run.folder})[name] for name in table.specs))
        return score
    how = SimpleNamespace(split=compare.split, eval_context=context, eval_stride=stride, eval_batch_size=batch)
    name, costs = CHECKPOINTS[compare.checkpoint], {}
    model = GPT.from_checkpoint(run.folder, name).to(runtime.device)
    score_checkpoint(run.folder, model, dataset, how, runtime, table, {}, costs, name)
    score = run.state["scores"][alike] = table.rows[-1] | {"trained on (tokens)": costs[run.folder][0]}
    run.write()
    return score


def show(runs, report, png):
    """One table, sorted, and one figure: a row and a line for all runs that differ in their seed alone."""
    measure, groups = unit(runs), {}
    for run in runs:
        groups.setdefault((*run.cells.values(),), []).append(run)
    groups = sorted(groups.values(), key=lambda members: rank(members, measure))
    names, mean = ["attention" if name == "attention_type" else name for name in runs[0].cells], f"mean ({measure})"
    columns = dict.fromkeys((*names, "parameters (count)", "trained on (tokens)", "seeds (count)"))
    columns |= {mean: ".4f", f"standard deviation ({measure})": ".4f", "accuracy (share)": ".4f"}
    title = "mean over runs that differ in their seed alone"
    with report.table("over seeds", title, columns, keys=max(1, len(names)), lowest=mean) as table:
        for members in groups:
            scores = [run.score for run in members if run.score]
            parameters = scores[0]["parameters (count)"] if scores else None
            tokens = sorted({score["trained on (tokens)"] for score in scores})
            tokens = tokens if len(tokens) > 1 else tokens[0] if tokens else None
            results = mean_and_deviation([score[measure] for score in scores])
            accuracy = mean_and_deviation([score["accuracy (share)"] for score in scores])[0]
            table.add(*members[0].cells.values(), parameters, tokens, len(scores), *results, accuracy)
    for run in runs:
        if run.failure:
            report.note(f"{run.label} failed: {run.failure}")
    scored = [[run for run in members if run.score] for members in groups if any(run.score for run in members)]
    if scored:
        draw(scored, measure, png)


def rank(members, measure):
    """The lowest mean first, then those without a score."""
    scores = [run.score[measure] for run in members if run.score]
    return (0, statistics.mean(scores)) if scores else (1, 0)


def draw(groups, measure, path):
    """Validation loss in training, and the score of each group of runs, with the mean and the spread over its seeds; of
    records the accuracy too."""
    measures = [measure] + ["accuracy (share)"] * any(run.score["accuracy (share)"] for g in groups for run in g)
    width, names = 5.2 + 0.05 * max(len(members[0].group) for members in groups), [g[0].group for g in groups]
    figure, panels = style.grid(1 + len(measures), width, style.height(len(groups)), columns=3)
    drawn, ends = style.lines([members[0].model.attention_type for members in groups]), []
    for members, line in zip(groups, drawn):
        logs = [read_log(run.folder)[1] for run in members]
        losses = [after_start([e for e in log if e["split"] == "val"], "val_loss") for log in logs]
        end = style.band(panels[0], losses, line)
        ends += [(members[0].group, line["color"], *end)] if end else []
    panels[0].set(xlabel="optimizer steps", ylabel="val loss, estimate (nats/token)")
    panels[0].locator_params(axis="x", nbins=5)
    style.label_ends(panels[0], ends)
    for panel, name in zip(panels[1:], measures):
        rows = [(group, line, [run.score[name] for run in g]) for group, line, g in zip(names, drawn, groups)]
        style.dots(panel, rows, name, best="low" if name == measure else "high")
    if any(len(members) > 1 for members in groups):
        figure.supxlabel(style.SPREAD, fontsize=style.SMALL)
    style.save_figure(figure, path)
