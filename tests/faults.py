"""Faults on purpose: tiny training runs are killed, cut short, filled up and poisoned. What each kind cost is counted.

    python tests/faults.py                                # 100 kills and everything else, about three minutes
    python tests/faults.py --kills=20 --short --seed=3    # fewer of each kind

Prints a Markdown table: faults injected, survived, and the steps that were done again. A fault is survived when the run
ends like one that was never interrupted, digit for digit in weights and log, or when what is damaged is refused in one
line and the rest is whole. Exits with 1 if one was not. Runs are children of this process, which has imported all.
"""

import argparse
import functools
import importlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch

import config
import data
import train
from data import DataError
from train import TrainError
from weights import ModelError, read_checkpoint

torch.set_num_threads(1)  # sums in a fixed order, and no threads that a fork would lose
FILES = ("config.json", "log.jsonl", "best.pt", "ckpt.pt", "model.safetensors")  # of a run
STEPS, INTERVAL = 30, 10  # of a run, and between its evaluations
EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate")  # what changes a folder
MEASURED = ("ms", "tokens_per_s", "cpu_s", "wall_s", "rss_mb")  # in log.jsonl, and different each time


# -----------------------------------------------------------------------------
# what runs in the child: hooks that strike it


def strike(signals, rng):
    """Send this process the signals, a second one a moment after the first."""
    for number in signals[1:]:
        threading.Timer(rng.uniform(0, 0.02), os.kill, (os.getpid(), number)).start()
    os.kill(os.getpid(), signals[0])


def at_call(owner, name, number, act):
    """Before the call of this number of owner.name, act()."""
    function, calls = getattr(owner, name), [0]

    def counted(*args, **options):
        calls[0] += 1
        if calls[0] == number:
            act()
        return function(*args, **options)

    setattr(owner, name, counted)


def at_change(folder, number, act, ends=""):
    """Before the change of this number of a file in `folder` whose name ends so, act()."""
    changes = [0]

    def hook(event, args):
        if event not in EVENTS or (event == "open" and not str(args[1]).strip("rb")):
            return
        if not str(args[0]).startswith((folder, *FILES)) or not str(args[0]).endswith(ends):
            return  # a name without its folder is one of those that shutil.rmtree removes
        changes[0] += 1
        if changes[0] == number:
            act()

    sys.addaudithook(hook)


def moment(kind, signals, seed, folder):
    """A hook that strikes at a random moment of this kind, or before the change of this number of a file."""
    rng = random.Random(seed)
    act = functools.partial(strike, signals, rng)

    def hook():
        if isinstance(kind, int):
            at_change(folder, kind, act)
        elif kind == "loading":
            threading.Timer(rng.uniform(0, 0.2), act).start()
        elif kind == "evaluation":
            at_call(train, "token_nats", rng.randint(1, 4), act)
        elif kind == "a save":
            at_change(folder, rng.randint(1, 4), threading.Timer(rng.uniform(0, 0.01), act).start, ".tmp")
        elif kind == "a change of a file":
            at_change(folder, rng.randint(1, 40), act)
        else:
            at_call(train.Run, "clip", rng.randint(1, INTERVAL - 1 if kind == "early step" else STEPS), act)

    return hook


# -----------------------------------------------------------------------------
# runs


class Child:
    """train.py with these arguments, forked; `hook()` runs in it first."""

    def __init__(self, arguments, hook=None, env=()):
        self.out, self.err = (tempfile.TemporaryFile("w+") for _ in range(2))
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(arguments, hook, env)

    def _run(self, arguments, hook, env):
        status = 70
        try:
            os.dup2(self.out.fileno(), 1)
            os.dup2(self.err.fileno(), 2)
            os.environ.update(env)
            sys.argv = ["train.py", *arguments]
            if hook:
                hook()
            config.run(train.main, DataError, ModelError, TrainError)
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def wait(self):
        """(exit status or -signal, stdout, stderr)"""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        for file in (self.out, self.err):
            file.seek(0)
        return status, self.out.read(), self.err.read()


def files(folder):
    """What a run left in its folder: {name: bytes}."""
    return {name: (Path(folder) / name).read_bytes() for name in FILES if (Path(folder) / name).exists()}


def outcome(folder):
    """What must not depend on how often a run was interrupted: log entries and weights."""
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    entries = [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]
    weights = [read_checkpoint(str(folder), name)["model"] for name in ("ckpt.pt", "best.pt")]
    return entries, [{name: w.numpy().tobytes() for name, w in part.items()} for part in weights]


def same(a, b):
    """Whether two loaded checkpoints are equal to the bit, with their types."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if torch.is_tensor(a):
        bits = [x.reshape(-1).view(torch.uint8) for x in (a, b) if x.is_contiguous()]
        return a.dtype == b.dtype and a.shape == b.shape and len(bits) == 2 and torch.equal(*bits)
    return a == b


def read_damaged(folder, name, damage):
    """ "refused", "same" or "other": what reading folder/name says after damage(bytes) -> bytes. The file stays."""
    path, expected = Path(folder) / name, read_checkpoint(str(folder), name)
    whole = path.read_bytes()
    try:
        path.write_bytes(damage(whole))
        return "same" if same(read_checkpoint(str(folder), name), expected) else "other"
    except ModelError as error:
        assert "\n" not in str(error)
        return "refused"
    finally:
        path.write_bytes(whole)


def flip(position, bit):
    return lambda whole: whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :]


def cut(size):
    return lambda whole: whole[:size]


class Faults:
    """A temporary folder with data, an uninterrupted run, an earlier run of another seed, and the counts."""

    def __init__(self, seed):
        for name in ("torch._dynamo", "tqdm", "safetensors.torch"):  # what runs import, here once and not in each child
            importlib.import_module(name)
        self.rng, self.numpy = random.Random(seed), np.random.default_rng(seed)
        self.temporary = tempfile.TemporaryDirectory()
        self.root, self.runs = Path(self.temporary.name).resolve(), 0
        self.counts = defaultdict(lambda: [0, 0, 0, 0])  # injected, survived, steps again, the most of them at once
        self.dataset = self.make_data()
        self.whole, self.earlier = str(self.root / "whole"), str(self.root / "earlier")
        assert self.train(self.whole, export=True)[0] == self.train(self.earlier, seed=7, max_iters=2)[0] == 0
        self.expected = outcome(self.whole)

    def make_data(self):
        folder, codec, splits = self.root / "text", data.BytesCodec(), {}
        for name, n in (("train", 1000), ("val", 200)):
            text = " ".join(f"word{i}" for i in self.numpy.integers(0, 30, n)).encode()
            splits[name] = data.write_split(folder, name, [text], codec)
        data.write_meta(folder, codec, splits, source="test", sha256="", label="words")
        return str(folder)

    def arguments(self, folder, **keys):
        defaults = dict(
            out_dir=folder, dataset=self.dataset, device="cpu", n_layer=1, n_head=2, n_embd=16, block_size=16,
            batch_size=2, max_iters=STEPS, warmup_iters=3, learning_rate=1e-3, min_lr=1e-4, eval_interval=INTERVAL,
            eval_iters=2, log_interval=1, dropout=0.1,
        )  # fmt: skip
        return [f"--{k}={v}" for k, v in (defaults | keys).items()]

    def train(self, folder, hook=None, **keys):
        return Child(self.arguments(folder, **keys), hook).wait()

    def new_folder(self, source=None):
        self.runs += 1
        folder = self.root / f"run{self.runs}"
        if source:
            shutil.copytree(source, folder)
        else:
            folder.mkdir()
        return str(folder)

    def count(self, kind, survived, again=0, why=""):
        counts = self.counts[kind]
        counts[0] += 1
        counts[1] += bool(survived)
        counts[2] += again
        counts[3] = max(counts[3], again)
        if not survived:
            print(f"{kind}: {why}", file=sys.stderr)

    def table(self):
        print("| fault | injected | survived | steps done again | most at once |\n|---|---|---|---|---|")
        for kind, counts in sorted(self.counts.items()):
            print(f"| {kind} | " + " | ".join(map(str, counts)) + " |")
        injected, survived, again, most = (list(column) for column in zip(*self.counts.values()))
        print(f"| all | {sum(injected)} | {sum(survived)} | {sum(again)} | {max(most)} |")
        return sum(injected) == sum(survived)

    # kills

    def chain(self, faults, over_earlier=False, **keys):
        """Start a run and strike it with each of `faults`, (kind, hook of the folder); resume it after each, as a user
        would, and to its end. over_earlier: in the folder of an earlier run."""
        folder = self.new_folder(self.earlier if over_earlier else None)
        before = files(folder)
        has_saved, last, struck, complaints = False, 0, [], []
        for kind, hook in [*faults, ("", None)]:
            stands = self.stands(folder, before)
            if has_saved and not stands:
                complaints.append("the run is lost")
            if not stands and before and files(folder) != before:
                complaints.append("the earlier run is not whole")
            has_saved = stands
            init = dict(init_from="resume") if stands else {}
            status, out, err = self.train(folder, hook(folder) if hook else None, **keys, **init)
            resumed = re.search(r"at iteration (\d+):", out)
            first = int(resumed[1]) if resumed else 0
            steps = [int(n) for n in re.findall(r"^iter (\d+):", out, re.M)]
            if struck and (stands == bool(resumed)):  # not where it was struck before it could say so
                struck[-1][1] = max(0, last - first)
                last = max([first, *steps])
            if status not in ((0, -signal.SIGKILL, -signal.SIGTERM, 130, 143) if hook else (0,)):
                complaints.append(f"status {status}")
            if "Traceback" in err or err.count("\n") > 1:
                complaints.append(err)
            last = max([last, *steps])
            if status != 0:
                struck.append([kind, 0])
        left = sorted(set(os.listdir(folder)) - {*FILES, ".lock", "previous"})
        if not complaints and (outcome(folder) != self.expected or left):
            complaints.append(f"another end than that of the whole run {left}")
        if not complaints and before and files(os.path.join(folder, "previous")) != before:
            complaints.append("the earlier run is not whole in previous/")
        for kind, again in struck:
            self.count(kind, not complaints, again, f"{folder}: {'; '.join(complaints)}")
        shutil.rmtree(folder) if not complaints else None
        return len(struck)

    def stands(self, folder, before):
        """Whether the new run can be resumed: its checkpoint is in its place, or on the way there."""
        parts = [os.path.join(folder, name) for name in (".new/ckpt.pt", ".placing", "ckpt.pt")]
        if os.path.exists(parts[0]) or os.path.exists(parts[1]):
            return True
        return os.path.exists(parts[2]) and files(folder).get("ckpt.pt") != before.get("ckpt.pt")

    def kills(self, n):
        """`n` signals in chains of some, at random moments, half of them before the first interval has passed."""
        done = 0
        early, late = ("loading", "evaluation", "a save", "early step"), ("step", "a save", "a change of a file")
        names = {signal.SIGKILL: "kill -9", signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
        while done < n:
            faults = []
            for number in range(min(self.rng.randint(1, 5), n - done)):
                kind = self.rng.choice(late if number and self.rng.random() < 0.7 else early)
                signals = self.rng.choices(list(names), (4, 1, 1))
                if self.rng.random() < 0.2:
                    signals = [self.rng.choice([signal.SIGTERM, signal.SIGINT]), *signals]
                name = f"{names[signals[0]] if len(signals) == 1 else 'pair of signals'}: {kind}"
                faults.append((name, functools.partial(moment, kind, signals, self.rng.random())))
            keys = dict(checkpoint_interval=self.rng.choice([0, 1, 4]))
            done += self.chain(faults, self.rng.random() < 0.3, **keys)

    def crash_points(self, share):
        """kill -9 before each change of a file, from the start of a run over an earlier one to its last step."""
        for number in itertools.count(1):
            if self.rng.random() < share:
                hook = functools.partial(moment, number, [signal.SIGKILL], 0)
                if not self.chain([("kill -9: each change of a file", hook)], over_earlier=True, checkpoint_interval=9):
                    return

    # files

    def damaged_files(self, flips):
        """Single bits flipped, and ends cut off: each is refused, or is in what loads as nothing."""
        for name in ("ckpt.pt", "best.pt", "model.safetensors"):
            size = (Path(self.whole) / name).stat().st_size
            bits = [flip(self.rng.randrange(size), self.rng.randrange(8)) for _ in range(flips)]
            cuts = [cut(self.rng.randrange(size)) for _ in range(flips // 10)]
            for what, damages in (("a bit flipped", bits), ("cut", cuts)):
                for damage in damages:
                    found = read_damaged(self.whole, name, damage)
                    self.count(f"{name}: {what}", found != "other", why="loads as something else")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="signals at random moments")
    parser.add_argument("--short", action="store_true", help="few of the other faults")
    parser.add_argument("--seed", type=int, default=None, help="of all that is random")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    faults = Faults(seed)
    faults.kills(options.kills)
    faults.crash_points(0.2 if options.short else 1.0)
    faults.damaged_files(60 if options.short else 600)
    return 0 if faults.table() else 1


if __name__ == "__main__":
    sys.exit(main())
