"""Faults on purpose: tiny training runs are killed, cut short, filled up and poisoned. What each kind cost is counted.

    python tests/faults.py                                # 100 signals and all else, about two minutes
    python tests/faults.py --kills=20 --short --seed=3    # fewer of each kind

Prints a Markdown table: faults injected, survived, and the steps that were done again. A fault is survived when the run
ends like one that was never interrupted, digit for digit in weights and log, or when what is damaged is refused in one
line and the rest is whole. Exits with 1 if one was not. Runs are children of this process, which has imported all.
"""

import argparse
import errno
import functools
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
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
import weights
from data import DataError, scoring
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
            at_call(scoring, "token_nats", rng.randint(1, 4), act)
        elif kind == "a save":
            at_change(folder, rng.randint(1, 4), threading.Timer(rng.uniform(0, 0.01), act).start, ".tmp")
        elif kind == "a change of a file":
            at_change(folder, rng.randint(1, 40), act)
        else:
            at_call(train.Run, "clip", rng.randint(1, INTERVAL - 1 if kind == "early step" else STEPS), act)

    return hook


def full_disk(left):
    """What is written fails, as on a full disk, after so many bytes."""
    left = [left]

    class Disk(io.FileIO):
        def write(self, data):
            n = min(len(data), left[0])
            if not n:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left[0] -= n
            return super().write(data[:n])

    def limited(path, mode="r", **options):
        if mode in ("wb", "a+b"):
            return (io.BufferedRandom if "+" in mode else io.BufferedWriter)(Disk(path, mode.replace("b", "")))
        return open(path, mode, **options)

    weights.open = limited


def read_only(folder):
    """Nothing in `folder` can be written by this process, also one of root's."""
    os.chmod(folder, 0o555)
    if os.getuid() == 0:
        os.setuid(65534)


def plant(steps, rng):
    """A number that is not finite in the gradients of these steps, counted from 1."""
    clip, calls = train.Run.clip, [0]

    def planted(self):
        calls[0] += 1
        if calls[0] in steps:
            grad = rng.choice([p.grad for p in self.model.parameters() if p.grad is not None])
            grad.view(-1)[rng.randrange(grad.numel())] = rng.choice([math.nan, math.inf, -math.inf])
        return clip(self)

    train.Run.clip = planted


def ruin(step, rng):
    """The update of this step leaves weights that are not finite, or finite and far too large."""
    update, calls = train.Run.update, [0]

    def ruined(self, *args):
        update(self, *args)
        calls[0] += 1
        if calls[0] == step:
            p = rng.choice([*self.model.parameters()]).data
            if rng.random() < 0.5:
                p.view(-1)[rng.randrange(p.numel())] = rng.choice([math.nan, math.inf])
            else:
                [q.data.mul_(1e25) for q in self.model.parameters()]

    train.Run.update = ruined


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
        path.unlink()  # `expected` may be a map of this file
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
        self.early = 0  # signals that came before the first interval had passed
        os.chmod(self.root, 0o755)  # for a child that gives up its rights
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

    # faults of a run that is resumed

    def chain(self, faults, over_earlier=False, whole=None, start=None, **keys):
        """Start a run and strike it with each of `faults`; resume it after each, as a user would, and to its end.

        A fault is (name, hook of the folder, the statuses that it may end with, what its one line of error says).
        over_earlier: in the folder of an earlier run. whole, start: the outcome to be expected, and what starts a run.
        Returns how many of the faults struck."""
        folder, start = self.new_folder(self.earlier if over_earlier else None), start or self.train
        before, has_saved, last, struck, complaints = files(folder), False, 0, [], []
        for name, hook, ends, says in [*faults, ("", lambda folder: None, [0], "")]:
            stands = self.stands(folder, before)
            if has_saved and not stands:
                complaints.append("the run is lost")
            if not stands and before and files(folder) != before:
                complaints.append("the earlier run is not whole")
            has_saved = stands
            init = dict(init_from="resume") if stands else {}
            status, out, err = start(folder, hook(folder), **keys, **init)
            resumed = re.search(r"at iteration (\d+):", out)
            first = int(resumed[1]) if resumed else 0
            steps = [int(n) for n in re.findall(r"^iter (\d+):", out, re.M)]
            if struck and stands == bool(resumed):  # else it was struck again before it could say where it was
                struck[-1][1] = max(0, last - first)
            last = max([first, *steps]) if stands == bool(resumed) else last
            if status not in ends or "Traceback" in err or err.count("\n") > 1 or (status == 1 and says not in err):
                complaints.append(f"status {status}, {err}")
            if (name or says) and (status != 0 or ends == [0]):
                struck.append([name or f"{self.phase(folder, out, last)}: {says}", 0])
                self.early += not name and last < INTERVAL
        left = sorted(set(os.listdir(folder)) - {*FILES, ".lock", "previous"})
        if not complaints and (outcome(folder) != (whole or self.expected) or left):
            complaints.append(f"another end than that of the whole run {left}")
        if not complaints and before and files(os.path.join(folder, "previous")) != before:
            complaints.append("the earlier run is not whole in previous/")
        for name, again in struck or ([["no fault", 0]] if complaints else []):
            self.count(name, not complaints, again, f"{folder}: {'; '.join(complaints)}")
        shutil.rmtree(folder)
        return len(struck)

    def stands(self, folder, before):
        """Whether the new run can be resumed: its checkpoint is in its place, or on the way there."""
        parts = [os.path.join(folder, name) for name in (".new/ckpt.pt", ".placing", "ckpt.pt")]
        if os.path.exists(parts[0]) or os.path.exists(parts[1]):
            return True
        return os.path.exists(parts[2]) and files(folder).get("ckpt.pt") != before.get("ckpt.pt")

    def phase(self, folder, out, last):
        """When a signal came, by what it left."""
        if list(Path(folder).rglob("*.tmp")):
            return "in a save"
        if "data:" not in out:
            return "while loading"
        if last == 0 and "resumed" not in out and "iteration 0:" not in out:
            return "before or in the first evaluation"
        return "in the first interval" if last < INTERVAL else "later"

    def kills(self, n):
        """`n` signals in chains of some, at random moments, half of them before the first interval has passed."""
        done, total = 0, n
        names = {signal.SIGKILL: "kill -9", signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
        ends = [0, 130, 143, -signal.SIGKILL, -signal.SIGTERM]
        while done < total:
            faults = []
            for number in range(min(self.rng.randint(1, 4), total - done)):
                kinds = ("loading", "evaluation", "a save", "early step")
                kinds = ("step", "a save", "a change of a file") if number and self.rng.random() < 0.6 else kinds
                signals = self.rng.choices(list(names), (4, 1, 1))
                if self.rng.random() < 0.2:
                    signals = [self.rng.choice([signal.SIGTERM, signal.SIGINT]), *signals]
                hook = functools.partial(moment, self.rng.choice(kinds), signals, self.rng.random())
                says = names[signals[0]] if len(signals) == 1 else "pair of signals"
                faults.append(("", hook, ends, says))
            done += self.chain(faults, self.rng.random() < 0.3, checkpoint_interval=self.rng.choice([0, 1, 4]))
        print(f"{self.early} of {done} signals came before step {INTERVAL}, the first with an evaluation\n", flush=True)

    def crash_points(self, share):
        """kill -9 before each change of a file, from the start of a run over an earlier one to its last step."""
        for number in itertools.count(1):
            if self.rng.random() < share:
                hook = functools.partial(moment, number, [signal.SIGKILL], 0)
                fault = ("before each change of a file: kill -9", hook, [0, -signal.SIGKILL], "")
                if not self.chain([fault], over_earlier=True, checkpoint_interval=9):
                    return

    def once(self, name, hook, says, times, **keys):
        """Faults that end a run with one line; what it says. hook(folder, rng)."""
        for _ in range(times):
            rng = random.Random(self.rng.random())
            interval = self.rng.choice([0, 1, 4])
            self.chain([(name, lambda f, rng=rng: hook(f, rng), [1], says)], checkpoint_interval=interval, **keys)

    def full_disks(self, times):
        def hook(folder, rng):
            size = sum(map(len, files(self.whole).values()))
            return lambda: full_disk(rng.randrange(size))

        self.once("full disk", hook, "No space left on device", times)

    def read_only_folders(self, times):
        """A run that was killed is resumed where nothing can be written, then where it can."""
        for _ in range(times):
            kill = functools.partial(moment, "step", [signal.SIGKILL], self.rng.random())
            faults = [("", kill, [0, -signal.SIGKILL], "kill -9")]
            faults += [("read-only folder", lambda folder: lambda: read_only(folder), [1], "Permission denied")]
            self.chain(faults)

    def changed_data(self, times):
        """train.bin is cut short or grows under a run; it is put back before the run is resumed."""
        path = Path(self.dataset) / "train.bin"
        whole = path.read_bytes()

        def changed(change, folder, rng):
            act = functools.partial(change, rng.randrange(1, len(whole)))
            return lambda: at_call(train.Run, "clip", rng.randint(1, STEPS - 2), act)

        def cut_short(size):
            os.truncate(path, size)

        def grow(size):
            path.write_bytes(whole + whole[:size])

        def start(folder, hook, **keys):
            path.write_bytes(whole)
            return self.train(folder, hook, **keys)

        for name, change, says in (("cut short", cut_short, "truncated"), ("grown", grow, "too long")):
            hook = functools.partial(changed, change)
            self.once(f"train.bin {name} under a run", hook, says, times, start=start)
        path.write_bytes(whole)

    def bad_numbers(self, times):
        """Gradients that are not finite, in few steps or in many, and an update that ruins the weights."""

        def many(folder, rng):
            first = rng.randint(1, STEPS - 5)
            return lambda: plant(range(first, STEPS + 1), rng)

        def ruined(folder, rng):
            return lambda: ruin(rng.randint(1, STEPS), rng)

        self.once("gradients not finite to the end", many, "non-finite steps in a row", times)
        self.once("an update that ruins the weights", ruined, "lower learning_rate", times)
        for _ in range(times):
            folder, bad = self.new_folder(), self.rng.sample(range(1, STEPS - 4), self.rng.randint(1, 4))
            status, _, err = self.train(folder, lambda bad=bad: plant(bad, random.Random(self.rng.random())))
            weights = [read_checkpoint(folder, name)["model"] for name in ("ckpt.pt", "best.pt")]
            sound = all(w.isfinite().all() for part in weights for w in part.values())
            self.count("gradients not finite in 1 to 4 steps", status == 0 and sound, why=f"status {status}, {err}")

    def lost_peers(self, times):
        """Of two processes one is killed; the other ends with a line, and both go on later."""
        keys = dict(gradient_accumulation_steps=2)

        def start(folder, hook, **keys):
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE="2")
            arguments, victim = self.arguments(folder, **keys), self.rng.randrange(2)
            env = [address | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
            children = [Child(arguments, hook if rank == victim else None, env[rank]) for rank in range(2)]
            ends = [child.wait() for child in children]
            return ends[1 - victim][0], ends[0][1], ends[1 - victim][2]

        whole = self.new_folder()
        assert start(whole, None, **keys)[0] == 0
        kinds = ("step", "evaluation", "a save", "early step")
        for _ in range(times):
            hook = functools.partial(moment, self.rng.choice(kinds), [signal.SIGKILL], self.rng.random())
            self.chain(
                [("a lost peer", hook, [0, 1], "a process of the group was lost")],
                whole=outcome(whole),
                start=start,
                **keys,
            )

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

    def damaged_data(self, flips):
        """Single bits flipped in a .bin file: its split is refused, also where the whole file was read before."""
        for name in ("train", "val"):
            path = Path(self.dataset) / f"{name}.bin"
            whole = path.read_bytes()
            for _ in range(flips):
                path.write_bytes(flip(self.rng.randrange(len(whole)), self.rng.randrange(8))(whole))
                try:
                    data.Dataset(self.dataset).split(name)
                    says = "loads as something else"
                except DataError as error:
                    says = str(error)
                self.count(f"{name}.bin: a bit flipped", str(path) in says and "\n" not in says, why=says)
            path.write_bytes(whole)
            data.Dataset(self.dataset).split(name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="signals at random moments")
    parser.add_argument("--short", action="store_true", help="few of the other faults")
    parser.add_argument("--seed", type=int, default=None, help="of all that is random")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    faults = Faults(seed)
    few = options.short
    faults.kills(options.kills)
    faults.crash_points(0.1 if few else 1.0)
    faults.full_disks(2 if few else 20)
    faults.read_only_folders(1 if few else 5)
    faults.changed_data(1 if few else 10)
    faults.bad_numbers(1 if few else 20)
    faults.lost_peers(1 if few else 10)
    faults.damaged_files(60 if few else 600)
    faults.damaged_data(60 if few else 600)
    return 0 if faults.table() else 1


if __name__ == "__main__":
    sys.exit(main())
