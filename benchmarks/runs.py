"""python bench.py --out_dir=out/a,out/b: what is in the folders of runs? Models, data sets and logs."""

import json
import os

from config import ConfigError
from data import Dataset
from model import GPT


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
