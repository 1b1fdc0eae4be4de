"""python bench.py --out_dir=out/a,out/b: what is in the folders of runs? Models, data sets and logs."""

import json
import math
import os
import statistics
from dataclasses import asdict, dataclass

import numpy as np

from benchmarks import style
from config import ConfigError
from data import Dataset
from model import GPT, GPTConfig
from train import TrainConfig

# Keys that change no figure of a run, beside those of W&B: what it writes, and how it is scored afterwards.
IDLE = ("out_dir", "export", "checkpoint_interval", "log_interval")
IDLE += ("eval_only", "eval_context", "eval_stride", "eval_batch_size")


def run_folders(bench):
    folders = [f.strip() for f in bench.out_dir.split(",") if f.strip()]
    if not folders:
        raise ConfigError(f"--what={bench.what} needs --out_dir=FOLDER[,FOLDER...]")
    return folders


def runs(bench, runtime):
    """(folder, model, data set) of each folder of --out_dir."""
    for folder in run_folders(bench):
        model = GPT.from_checkpoint(folder).to(runtime.device).eval()
        dataset = Dataset(bench.dataset or trained_on(folder))
        if model.config.vocab_size < dataset.vocab_size:
            raise ConfigError(f"{folder}: its vocabulary of {model.config.vocab_size} is not that of {dataset.name}")
        yield folder, model, dataset


def trained_on(folder):
    try:
        return read_config(folder)["train"]["dataset"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{folder}/config.json does not say the data set: write --dataset=NAME") from None


def read_config(folder):
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        return json.load(f)


def read_log(folder):
    """The entries of a run's log.jsonl: (training steps, evaluations, what the masks were)."""
    path = os.path.join(folder, "log.jsonl")
    try:
        with open(path, encoding="utf-8") as f:
            entries = [json.loads(line) for line in f]
    except (ValueError, RecursionError):
        raise ConfigError(f"{path} is damaged: a line is not JSON") from None
    if not all(isinstance(e, dict) and "iter" in e for e in entries):
        raise ConfigError(f"{path} is damaged: a line is not an entry of a run")
    return tuple([e for e in entries if kind in e] for kind in ("loss", "split", "stats"))


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


@dataclass
class Group:
    """Runs that differ in nothing but their seed, under one name, drawn as one line."""

    name: str
    attention: str
    folders: list
    line: dict = None


def groups(folders):
    """The runs of folders, those that are alike together. A group's name is its attention type, where no other group
    has it, and else also its first run's folder."""
    found = {}
    for folder in dict.fromkeys(folders):
        found.setdefault(recipe(folder)[0], []).append(folder)
    types = [attention_of(members[0]) for members in found.values()]
    bases = [os.path.basename(os.path.normpath(members[0])) for members in found.values()]
    names = [base if types.count(kind) > 1 else kind for base, kind in zip(bases, types)]
    names = [name if names.count(name) == 1 else members[0] for name, members in zip(names, found.values())]
    together = zip(names, types, found.values(), style.lines(types))
    return [Group(name, kind, members, line) for name, kind, members, line in together]


def attention_of(folder):
    """The attention type of a run; of a folder that does not say, its name."""
    try:
        return str((asdict(GPTConfig()) | read_config(folder)["model"])["attention_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return os.path.basename(os.path.normpath(folder))


def after_start(entries, measure):
    """{step: value} of the entries that have it, but for step 0, whose loss is that of an untrained model."""
    found = {e["iter"]: e[measure] for e in entries if e.get(measure, "") != "" and e["iter"]}
    return {step: math.nan if value is None else value for step, value in found.items()}


def places(logs, what):
    """{step: the mean over runs of what each had used at it}, `iter`, `tokens` or `wall_s`; of an evaluation from the
    lines around it. logs: one of read_log for each run."""
    found = {}
    for steps, evaluations, _ in logs:
        known = [(0, 0)] + [(e["iter"], e[what]) for e in steps + evaluations if e.get(what) is not None]
        known = sorted(dict(known).items())
        for e in steps + evaluations:
            if e["iter"] <= known[-1][0]:
                found.setdefault(e["iter"], {})[id(steps)] = float(np.interp(e["iter"], *zip(*known)))
    return {step: statistics.mean(each.values()) for step, each in found.items()}
