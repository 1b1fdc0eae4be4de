"""Cells of the card (card.py): one run as it was scored, found again by what it was."""

import contextlib
import glob
import hashlib
import io
import json
import os
import subprocess
from dataclasses import dataclass, fields

import torch

import compare
import config
from benchmarks import comparison
from benchmarks.quality import loss_by_context
from benchmarks.runs import read_log
from config import ConfigError
from data.scoring import eval_window, evaluate
from model import ATTENTION, GPT, GPTConfig
from train import TrainConfig, git_commit
from weights import write_atomically

HYBRIDS = ("gla,gla,gla,softmax", "gdn,gdn,gdn,softmax")


@dataclass
class Stage:
    """Runs of compare.py's arguments for every type, each scored on a split. rates_of: the part and the stage that
    tried the learning rates of these arguments, of which each type's best is taken; longer: contexts to score as well,
    times the one that was trained; hybrids: what stands for HYBRIDS in models of fewer layers."""

    name: str
    argv: str
    split: str
    rates_of: tuple = ()
    longer: tuple = ()
    hybrids: tuple = HYBRIDS


def cells_of(folder, part):
    """The cells in FOLDER/PART.json, [] where there is none."""
    path = os.path.join(folder, f"{part}.json")
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)["cells"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is damaged: take it from the repository again") from None


def changed(model, train):
    """The settings that decide a result and are not the defaults: those that come later change no identity."""
    found = {}
    for record, values in ((GPTConfig, model), (TrainConfig, train)):
        defaults = {field.name: field.default for field in fields(record)}
        found |= {k: v for k, v in values.items() if k in defaults and v != defaults[k] and k != "plugin"}
    return found


def identity(settings, data, *scoring):
    text = json.dumps([settings, data, *scoring], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def place(cell):
    """What a cell is a result of: another one of the same place is an older one."""
    return cell["stage"], cell["attention"], cell["learning rate"], cell["seed"]


def save(folder, part, cell):
    """Put a cell into the file of its part, in place of an older one."""
    cells = {place(c): c for c in cells_of(folder, part)} | {place(cell): cell}
    text = json.dumps({"schema": 1, "part": part, "cells": [cells[k] for k in sorted(cells)]}, indent=1) + "\n"
    os.makedirs(folder, exist_ok=True)
    write_atomically(os.path.join(folder, f"{part}.json"), lambda f: f.write(text.encode()))


def best_rates(cells, stage, rates):
    """{type: the learning rate of its best run}, of the types whose runs are all there; a failed one has no score."""
    found = {}
    for cell in (c for c in cells if c["stage"] == stage):
        found.setdefault(cell["attention"], {})[cell["learning rate"]] = cell["score"].get("nats/token")
    scores = {name: {r: s for r, s in own.items() if s is not None} for name, own in found.items() if {*own} >= rates}
    return {name: min(own, key=own.get) for name, own in scores.items() if own}


def code_commit():
    """The commit of the code; cells that were written since do not make it another."""
    commit = git_commit()
    clean = commit and subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "*.py"], cwd=comparison.ROOT)
    return commit.removesuffix("-dirty") if clean and clean.returncode == 0 else commit


def planned(stage, dataset_of):
    """The runs of a stage, all types and learning rates, and their data set. Types are chosen afterwards: all have as
    many parameters as the first."""
    rows = dict(zip((*ATTENTION, *stage.hybrids), (*ATTENTION, *HYBRIDS)))
    types = ",".join(name.replace(",", "+") for name in rows)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        options, runs, _ = compare.plan([*stage.argv.split(), f"--attention_type={types}"])
        dataset = dataset_of(runs[0].cfg.dataset)
        if options.equal_params:
            comparison.equalise(runs, dataset.vocab_size)
    for run in runs:
        run.row = rows[run.model.attention_type]
    return runs, dataset


def score(run, stage, dataset, runtime):
    """What its best checkpoint scores: of text bits a byte, by context too; of records accuracy, by part or length."""
    model, split, each = GPT.from_checkpoint(run.folder, "best.pt").to(runtime.device), dataset.split(stage.split), []
    T, batch = run.model.block_size, run.cfg.eval_batch_size
    s = evaluate(model, split, *eval_window(model, dataset, 0, 0), batch, runtime, each=each)
    found = {"nats/token": s["loss"], "bits/byte": s.get("bits_per_byte")}
    for size in (T * times for times in stage.longer):
        each, rows = [], max(1, batch * T // size)
        longer = evaluate(model, split, *eval_window(model, dataset, size, 0), rows, runtime, each=each)
        found.setdefault("by context", {T: s["bits_per_byte"]})[size] = longer["bits_per_byte"]
    seen = torch.cat([torch.arange(1, scored.size(1) + 1).expand_as(scored)[scored] for scored, *_ in each])
    if split.record_len is None:
        per_byte = s["bits_per_byte"] / s["loss"]
        nats = torch.cat([nats for _, nats in each])
        found["by position"] = {last: nats * per_byte for last, nats in loss_by_context(nats, seen).items()}
    elif "parts" in s:
        found |= {"accuracy": s["accuracy"], "by part": {part["part"]: part["accuracy"] for part in s["parts"]}}
    else:  # the mean of ones and zeros is the share of right answers
        hits = torch.cat([right for *_, right in each]).double()
        found |= {"accuracy": s["accuracy"], "by length": loss_by_context(hits, seen)}
    return found, model.num_params()


def run_stage(part, stage, card, dataset_of, commit, spent):
    """Train and score the stage's runs that have no cell. Returns how many failed. spent(): whether no time is left."""
    wanted = {t.strip().replace("+", ",") for t in card.types.split(",")} if card.types else {*ATTENTION, *HYBRIDS}
    if unknown := wanted - {*ATTENTION, *HYBRIDS}:
        raise ConfigError(f"--types: {', '.join(sorted(unknown))} is none of {', '.join((*ATTENTION, *HYBRIDS))}")
    runs, dataset = planned(stage, dataset_of)
    dataset.split(stage.split)
    runs = [run for run in runs if run.row in wanted]
    if stage.rates_of:
        source, name = stage.rates_of
        best = best_rates(cells_of(card.folder, source), name, {run.cfg.learning_rate for run in runs})
        if missing := sorted(wanted - {*best}):
            print(f"{stage.name}: no learning rate yet for {', '.join(missing)} (make card PART={source})", flush=True)
        runs = [run for run in runs if best.get(run.row) == run.cfg.learning_rate]
    known, earlier = {cell["id"] for cell in cells_of(card.folder, part)}, earlier_runs(card.out_dir)
    for run in runs:
        run.place(os.path.join(card.out_dir, part), {"data": dataset.checksums()})
        run.settings = changed(run.recipe["model"], run.recipe["train"])
        run.commit = commit
        run.id = identity(run.settings, run.recipe["data"], stage.name, stage.split, stage.longer)
        if not run.state["done"] and (folder := earlier.get(identity(run.settings, run.recipe["data"]))):
            run.folder, run.state = folder, {"done": True, "threads": None, "scores": {}}
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
                run.commit = json.load(f).get("commit")
    runs = [run for run in runs if run.id not in known]
    print(f"{part}, {stage.name}: {len(runs)} runs are missing", flush=True)
    if not runs:
        return 0
    runtime = config.resolve_device(runs[0].cfg.device, runs[0].cfg.dtype)

    def keep(run):
        found, parameters = score(run, stage, dataset, runtime)
        steps = read_log(run.folder)[0]
        spent = {name: round(steps[-1][k], 1) for name, k in (("seconds", "wall_s"), ("cpu seconds", "cpu_s")) if steps}
        write(run, found, {"parameters": parameters} | spent)
        return found

    def write(run, found, more):
        cell = {"id": run.id, "stage": stage.name, "attention": run.row, "score": found} | more
        cell |= {"learning rate": run.cfg.learning_rate, "seed": run.cfg.seed}
        cell |= {"settings": run.settings, "data": dataset.meta["label"], "split": stage.split, "commit": run.commit}
        save(card.folder, part, cell | {"torch": torch.__version__, "threads": run.state["threads"]})

    if spent():  # an interrupt may be lost in a destructor, before there is anything to stop
        raise KeyboardInterrupt
    compare.train_all(runs, card.jobs, max(1, torch.get_num_threads() // card.jobs), keep)
    failed = [run for run in runs if run.failure]
    for run in failed:
        if not run.failure.startswith("killed by"):
            write(run, {"failure": run.failure}, {})
    return len(failed)


def earlier_runs(out_dir):
    """{identity: folder} of the runs below out_dir that are done, compare.py's own too."""
    found = {}
    for path in glob.glob(os.path.join(glob.escape(out_dir), "**", "recipe.json"), recursive=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError), open(path) as f:
            stored = json.load(f)
            recipe, folder = stored["recipe"], os.path.dirname(path)
            if stored["state"]["done"] and os.path.exists(os.path.join(folder, "best.pt")):
                found[identity(changed(recipe["model"], recipe["train"]), recipe["data"])] = folder
    return found
