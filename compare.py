"""Runs alike: train every combination of values, score all on the same tokens, and print one table.

    python compare.py config/train_enwik8_tiny.py --attention_type=softmax,gla,gla+gla+softmax --seed=1,2,3
    python compare.py config/train_stdlib.py --attention_type=all --equal_params --max_iters=500
    python compare.py config/train_stdlib.py --attention_type=gla --learning_rate=1e-3,3e-3 --gla_gate_rank=8,16

Any key of train.py takes a list. A pattern of layers is joined with +. Quotes hold the commas of other items together;
a shell removes quotes unless others surround them: '--mask_mix_candidates=full,"offset_0,offset_1"'. A key that belongs
to some of the attention types is left out for the rest.

Each run is a process of train.py in its own folder, OUT_DIR/VALUES-HASH. The hash is of all that decides a result:
settings, data, code, a plugin's too where a layer is of it. So a run that is done is not repeated, one that was cut
goes on from its checkpoint, and a change makes a new folder beside the old one. Ctrl-C stops all runs; the same command
goes on. Runs end at max_iters: only a max_seconds on the command line counts. The exit status is 1 if a run failed.
"""

import contextlib
import dataclasses
import glob
import hashlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from types import SimpleNamespace

if __name__ == "__main__":  # Ctrl-C while modules load is no traceback of theirs
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

import config
from benchmarks import comparison, style
from benchmarks.quality import quality_table
from benchmarks.runs import decides
from benchmarks.tables import Report
from config import ConfigError, key, printable
from data import DataError, Dataset
from data.scoring import eval_window
from model import GPTConfig
from train import TrainConfig
from weights import ModelError, TrainError, lock_folder, write_atomically

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

HERE = os.path.dirname(os.path.abspath(__file__))
OURS = {"init_from": "resume", "eval_only": True, "dry_run": True}  # what compare.py does itself, or cannot


@dataclass
class CompareConfig:
    """Comparison (with out_dir as the folder of all runs; empty: out/compare/CONFIG)"""

    jobs: int = key(2, "runs at once; the threads are divided among them", low=1)
    equal_params: bool = key(False, "choose mlp_hidden for the parameters of the first run, within 1 %")
    checkpoint: str = key("last", "which one of each run is scored", choices=(*comparison.CHECKPOINTS,))
    split: str = key("val", "split that is scored", choices=("val", "test"))
    json: str = key("", "file to write the tables to; empty: OUT_DIR/compare.json")
    png: str = key("", "picture to write, .png, .pdf or .svg; empty: OUT_DIR/compare.png")


class Run:
    """One combination: its settings, where it is, and how it went."""

    def __init__(self, model, cfg, given, cells, seed):
        self.model, self.cfg, self.cells = model, cfg, cells  # cells: {key with a list: its value here}
        self.keys = {name: getattr(record, name) for record in (model, cfg) for name in given if hasattr(record, name)}
        names = [v if name == "attention_type" else f"{name}={v}" for name, v in cells.items() if v is not None]
        self.group = " ".join(names) or "run"
        self.label = f"{self.group} seed={seed}" if seed else self.group
        self.score, self.failure, self.told = None, None, False
        self.plugins = comparison.plugins_of(model)

    def place(self, out_dir, common):
        """Choose the folder, and read what an earlier command left there."""
        settings = {name: value for name, value in asdict(self.cfg).items() if decides(name)}
        sources = [f for f in (self.cfg.init_from, self.cfg.teacher) if os.path.isdir(f)]
        files = [entry for folder in sources for entry in os.scandir(folder) if entry.name.endswith((".pt", "tensors"))]
        stamps = sorted((entry.path, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in files)
        self.recipe = common | {"model": asdict(self.model) | {"plugin": ""}, "train": settings, "sources": stamps}
        number = hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest()[:10]
        name = re.sub(r"[^\w.+=-]+", "_", self.label.replace(" ", "-").replace(",", "+"))[:100]
        found = glob.glob(os.path.join(glob.escape(out_dir), f"*-{number}"))  # a longer list changes the label alone
        self.folder = found[0] if found else os.path.join(out_dir, f"{name}-{number}")
        self.state = {"done": False, "threads": None, "scores": {}}
        path = os.path.join(self.folder, "recipe.json")
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), open(path) as f:
            self.state |= json.load(f)["state"]
        self.state["done"] &= os.path.exists(os.path.join(self.folder, "ckpt.pt"))

    def write(self):
        text = json.dumps({"state": self.state, "recipe": self.recipe}, indent=1).encode()
        write_atomically(os.path.join(self.folder, "recipe.json"), lambda f: f.write(text))

    def claim(self):
        """The file of its output, locked; None while a process trains there that an earlier, killed command left. The
        lock is the process's own: it writes there."""
        os.makedirs(self.folder, exist_ok=True)
        output = open(os.path.join(self.folder, "output.txt"), "a")
        try:
            if fcntl is not None:
                fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return output
        except OSError:
            output.close()
            if not self.told:
                print(f"{self.label}: waiting for the process of an earlier command that trains it", flush=True)
            self.told = True

    def start(self, threads, output):
        """The process of train.py. A run that was cut keeps its threads: sums in another order differ in a digit."""
        threads = self.state["threads"] or threads
        self.state |= {"threads": threads, "scores": {}}
        self.write()
        saved = any(os.path.exists(os.path.join(self.folder, d, "ckpt.pt")) for d in (".new", ".placing", ""))
        keys = self.keys | {"out_dir": self.folder} | ({"init_from": "resume"} if saved else {})
        command = [sys.executable, os.path.join(HERE, "train.py"), *(f"--{k}={v}" for k, v in keys.items())]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.began = time.monotonic()
        with output:
            output.truncate(0)
            options = dict(stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment)
            return subprocess.Popen(command, **options)

    def end(self, status):
        """Note that it is done, or why it failed: in the words of train.py, or as what killed it."""
        self.state["done"] = status == 0
        self.write()
        if status:
            with open(os.path.join(self.folder, "output.txt"), encoding="utf-8", errors="replace") as f:
                said = [line.strip() for line in f if line.strip()] or [f"exit status {status}"]
            self.failure = f"killed by {signal.Signals(-status).name}" if status < 0 else printable(said[-1])[:400]


def plan(argv):
    """(CompareConfig, all runs, folder of all) of a command line."""
    if wrong := [a for a in argv if a.startswith("-") and not a.startswith("--")]:
        raise ConfigError(f"{printable(wrong[0])}: write --key=value")
    files = [a for a in argv if not a.startswith("-")]
    single = {field.name for field in dataclasses.fields(CompareConfig)} | {"help"}
    lists = comparison.read_lists(argv, single)
    types, fields = lists.get("attention_type", []), {f.name: f for f in dataclasses.fields(GPTConfig)}
    runs, warnings = [], io.StringIO()
    for items in itertools.product(*lists.values()):
        values = dict(zip(lists, items))
        for name in [name for name in values if name in fields and len(types) > 1]:
            strays = [config.stray_key(fields[name], pattern, (GPTConfig,)) is not None for pattern in types]
            if strays[types.index(values["attention_type"])] and not all(strays):
                del values[name]
        arguments = [*files, "--max_seconds=0", *(f"--{name}={value}" for name, value in values.items())]
        with contextlib.redirect_stderr(warnings):
            model, cfg, compare, given = config.load(arguments, GPTConfig, TrainConfig, CompareConfig)
        for name, value in OURS.items():
            if getattr(cfg, name) == value:
                raise ConfigError(f"{name}={value} ({given[name]}): compare.py trains, resumes and scores by itself")
        cells = {name: values.get(name) for name in lists if len(lists[name]) > 1 and name != "seed"}
        runs.append(Run(model, cfg, given, cells, values["seed"] if len(lists.get("seed", [])) > 1 else None))
    for line in dict.fromkeys(warnings.getvalue().splitlines()):
        print(line, file=sys.stderr)
    stem = os.path.basename(files[-1]).removesuffix(".py") if files else "train"
    return compare, runs, lists.get("out_dir", [""])[0] or os.path.join("out", "compare", stem)


def train_all(runs, jobs, threads, score):
    """Train what is not done, `jobs` at once, and score each run when it ends. On the way out all processes stop."""
    torch.set_num_threads(threads)  # scoring stands in for a run
    waiting, running = [run for run in runs if not run.state["done"]], {}
    for run in runs:
        if run.state["done"]:
            finish(run, 0, runs, score)
    try:
        while waiting or running:
            for run in waiting[: jobs - len(running)]:  # one that an earlier command left running keeps its place
                if output := run.claim():
                    if run.recipe.get("code", code := comparison.code(run.plugins)) != code:
                        raise TrainError("the code changed since the first run began: give the command again")
                    waiting.remove(run)
                    running[run.start(threads, output)] = run
            for process in [process for process in running if process.poll() is not None]:
                finish(running.pop(process), process.returncode, runs, score)
            time.sleep(0.05)
    finally:
        if running:
            print(f"stopping {len(running)} runs; the same command goes on", flush=True)
        for process in running:
            process.terminate()  # it finishes its step and saves
        for process in running:
            process.wait()


def finish(run, status, runs, score):
    """Score a run that has ended, and say in one line how it went."""
    took = "done before"
    if not run.state["done"]:
        took = f"{time.monotonic() - run.began:.0f} s"
        run.end(status)
    if run.failure is None:
        try:
            run.score = score(run)
        except (ConfigError, DataError, ModelError, OSError, MemoryError, RuntimeError) as error:
            run.failure = printable(str(error))
    ended = sum(r.score is not None or r.failure is not None for r in runs)
    unit = comparison.unit(runs)
    how = f"failed: {run.failure}" if run.failure else f"{run.score[unit]:.4f} {unit}"
    print(f"{ended}/{len(runs)} {run.label} ({took}): {how}", flush=True)


def main(argv):
    compare, runs, folder = plan(argv)
    first, threads = runs[0], max(1, torch.get_num_threads() // min(compare.jobs, len(runs)))
    style.check_name(compare.png)
    dataset = Dataset(first.cfg.dataset)
    dataset.split(compare.split)
    alike = len({run.cfg.dtype for run in runs}) == 1
    runtime = config.resolve_device(first.cfg.device, first.cfg.dtype if alike else "auto")
    for run in runs:  # a mistake ends the command before anything is trained
        eval_window(SimpleNamespace(config=run.model), dataset, run.cfg.eval_context, run.cfg.eval_stride)
    if compare.equal_params:
        comparison.equalise(runs, dataset.vocab_size)
    common = {"data": dataset.checksums(), "torch": torch.__version__}
    codes = {plugins: comparison.code(plugins) for plugins in {run.plugins for run in runs}}
    for run in runs:
        run.place(folder, common | {"code": codes[run.plugins]})
    runs = [*{run.folder: run for run in reversed(runs)}.values()][::-1]  # without a key that is not its type's, twice
    os.makedirs(folder, exist_ok=True)
    paths = {name: getattr(compare, name) or os.path.join(folder, f"compare.{name}") for name in ("json", "png")}
    report = Report(dataclasses.replace(compare, **paths), runtime, {"command": argv}, "compare")
    label = printable(dataset.meta["label"])
    with lock_folder(folder):
        print(f"{folder}: runs={len(runs)}, jobs={compare.jobs}, threads of each={threads}; {runtime}")
        print(f"each is scored by its {compare.checkpoint} checkpoint, on {compare.split} of {label}")
        table = quality_table(report)
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        train_all(runs, compare.jobs, threads, lambda run: comparison.score_run(run, compare, dataset, runtime, table))
        comparison.show(runs, report, paths["png"])
        report.write()
    return int(any(run.failure for run in runs))


if __name__ == "__main__":
    config.run(main, DataError, ModelError, TrainError)
