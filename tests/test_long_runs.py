"""What long runs need: spikes are skipped, the clock ends a run, memory stays flat."""

import json
import math
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_two_processes
from test_train import ENV, read_log, snapshot, weights_equal

import config
import train
import weights
from train import SPIKE_LEAST, SPIKE_ROW, SPIKE_WINDOW, Objective, SpikeGuard
from weights import ModelError, TrainError, read_checkpoint

GUARDED = dict(spike_guard=5.0, max_iters=40, lr_decay_iters=40, eval_interval=40)


def plant(monkeypatch, steps, factor=100.0):
    """Make the loss `factor` times what it is at the given steps (from 0)."""
    calls, forward = [0], Objective.forward

    def planted(self, *args):
        loss, parts = forward(self, *args)
        calls[0] += 1
        return loss * (factor if calls[0] - 1 in steps else 1.0), parts

    monkeypatch.setattr(Objective, "forward", planted)


def watch_updates(monkeypatch, seen):
    """After each step: the weights, and the moments of the optimizers."""
    update = train.Run.update

    def watched(self, *args):
        update(self, *args)
        states = [m for o in self.optimizers for state in o.state.values() for m in state.values()]
        seen.append((snapshot(self.model), torch.cat([m.detach().flatten() for m in states])))

    monkeypatch.setattr(train.Run, "update", watched)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_spike_is_skipped_and_the_optimizer_does_not_see_it(tiny, tmp_path, monkeypatch, capsys, optimizer):
    seen = []
    plant(monkeypatch, {SPIKE_LEAST - 1, 25, 30})  # the first comes before the guard acts
    watch_updates(monkeypatch, seen)
    assert train.main(tiny(optimizer=optimizer, **GUARDED)) == 0
    still = [i for i in range(1, 40) if all(torch.equal(a, b) for a, b in zip(seen[i], seen[i - 1]))]
    assert still == [25, 30]
    out = capsys.readouterr().out
    assert "iteration 26: gradient norm" in out and out.count("a spike, step skipped") == 2
    assert "1 skipped" in out and out.rstrip().splitlines()[-2].endswith("2 skipped")
    skipped = [e["skipped"] for e in read_log(tmp_path / "run", "skipped") if e]
    assert skipped == [0] * 25 + [1] * 5 + [2] * 10


def test_the_guard_is_off_by_default(tiny, tmp_path, monkeypatch, capsys):
    plant(monkeypatch, {25, 30})
    assert train.main(tiny(**GUARDED | dict(spike_guard=0.0))) == 0
    assert "spike" not in capsys.readouterr().out and not any(read_log(tmp_path / "run", "skipped"))
    with pytest.raises(config.ConfigError, match="spike_guard=0.5 would skip"):
        train.main(tiny(spike_guard=0.5))


def test_a_bad_batch_is_a_spike(tiny, tmp_path, monkeypatch):
    """Of a model that has learnt its text: targets that are no text."""
    from data import Batches

    draw, calls = Batches.batch, [0]

    def batch(self, split):
        x, y = draw(self, split)
        calls[0] += 1
        return (x, torch.randint(200, 256, y.shape)) if calls[0] == 61 else (x, y)

    monkeypatch.setattr(train.Run, "check_weights", lambda self: None)  # which draws batches too
    monkeypatch.setattr(Batches, "batch", batch)
    keys = dict(max_iters=70, lr_decay_iters=70, eval_interval=70, learning_rate=1e-2, dropout=0.0, spike_guard=2.0)
    assert train.main(tiny(**keys)) == 0
    skipped = [e["skipped"] for e in read_log(tmp_path / "run", "skipped") if e]
    assert skipped[60] == skipped[59] + 1


def test_resume_is_exact_with_a_guard(tiny, tmp_path, monkeypatch):
    """Norms, count and row are in the checkpoint: without them the guard would not act again for twenty steps."""
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    plant(monkeypatch, {25, 31, 33})
    train.main(tiny(out_dir=whole, **GUARDED))
    monkeypatch.undo()
    plant(monkeypatch, {25})
    train.main(tiny(out_dir=parts, **GUARDED | dict(max_iters=29)))
    monkeypatch.undo()
    plant(monkeypatch, {2, 4})
    train.main(tiny(out_dir=parts, init_from="resume", **GUARDED))
    names = ("iter", "loss", "grad_norm", "skipped")
    logs = [[e for e in read_log(folder, *names) if "loss" in e] for folder in (whole, parts)]
    assert logs[0] == logs[1] and logs[0][-1]["skipped"] == 3 and weights_equal(whole, parts)
    spikes = read_checkpoint(whole, "ckpt.pt")["spikes"]
    assert spikes == read_checkpoint(parts, "ckpt.pt")["spikes"] and len(spikes["norms"]) == 37


@pytest.mark.parametrize("spikes", [{"norms": ["x"]}, {"norms": [1.0], "skipped": "x", "row": 0}, [3]])
def test_a_damaged_guard_is_one_line(tiny, tmp_path, spikes):
    train.main(tiny(max_iters=1))
    path = tmp_path / "run" / "ckpt.pt"
    torch.save(torch.load(path, weights_only=True) | {"spikes": spikes}, path)
    with pytest.raises(ModelError, match="damaged"):
        train.main(tiny(init_from="resume"))


def test_a_checkpoint_without_a_guard_resumes(tiny, tmp_path):
    """One that is older than the guard and the clock."""
    train.main(tiny(max_iters=3))
    path = tmp_path / "run" / "ckpt.pt"
    stored = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in stored.items() if k not in ("spikes", "clock", "evaluation")}, path)
    assert train.main(tiny(init_from="resume", max_iters=5, spike_guard=3.0)) == 0
    assert len(read_checkpoint(str(tmp_path / "run"), "ckpt.pt")["spikes"]["norms"]) == 2


def test_the_median_of_the_norms_before(fresh_rng):
    """Against numpy: spikes stay out of the window; more than a few in a row are a new level."""
    import numpy as np

    guard, kept, skipped = SpikeGuard([]), [], 0
    for norm in fresh_rng.lognormal(0, 1, 2000):
        window = kept[-SPIKE_WINDOW:]
        wanted = len(window) >= SPIKE_LEAST and norm > 3.0 * np.median(window)
        row = guard.row
        found = guard.is_spike(norm, 3.0)
        assert found == (wanted and row < SPIKE_ROW)
        skipped += found
        if wanted and not found:
            kept = []
        kept += [] if found else [norm]
    assert guard.skipped == skipped > 50 and guard.norms == kept[-SPIKE_WINDOW:]
    guard = SpikeGuard([1.0] * 50)
    assert [guard.is_spike(9.0, 3.0) for _ in range(SPIKE_ROW + 2)] == [True] * SPIKE_ROW + [False] * 2
    assert guard.norms == [9.0, 9.0] and guard.row == 0


PLANTED = """
import os, sys
import train

forward, calls = train.Objective.forward, [0]

def planted(self, *args):
    loss, parts = forward(self, *args)
    calls[0] += 1
    return loss * (1e3 if os.environ["RANK"] == "1" and calls[0] in (25, 30) else 1.0), parts

train.Objective.forward = planted
update = train.Run.update

def watched(self, *args):
    update(self, *args)
    with open(os.path.join(self.cfg.out_dir, "skipped" + os.environ["RANK"]), "a") as f:
        print(self.progress.iter_num, self.guard.skipped, args[1], float(next(self.model.parameters()).sum()), file=f)

train.Run.update = watched
train.config.run(train.main)
"""


def test_two_processes_skip_together(tiny, tmp_path):
    """A spike of one of them: gradients and norms are of both."""
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    keys = dict(GUARDED, dropout=0.0, batch_size=2, gradient_accumulation_steps=2, max_iters=32)
    (tmp_path / "run").mkdir()
    run_two_processes(tiny(**keys), script)
    one, two = ((tmp_path / "run" / f"skipped{rank}").read_text() for rank in range(2))
    assert one == two and [line.split()[1] for line in one.splitlines()] == ["0"] * 24 + ["1"] * 5 + ["2"] * 3


# the clock


class Clock:
    """A clock that steps, evaluations and saves move, by seconds of their own."""

    def __init__(self, monkeypatch):
        self.now, self.saved = 100.0, []
        stand_in = SimpleNamespace(perf_counter=lambda: self.now, process_time=lambda: 0.0)
        monkeypatch.setattr(train, "time", stand_in)
        for name, seconds in (("step", 1.0), ("estimate", 5.0), ("save", 3.0)):
            where, what = (train, "estimate_loss") if name == "estimate" else (train.Run, name)
            monkeypatch.setattr(where, what, self.takes(seconds, getattr(where, what)))

    def takes(self, seconds, call):
        def wrapped(*args):
            result = call(*args)
            self.now += seconds
            return result

        return wrapped


def test_the_clock_ends_a_run_within_a_step_and_a_save(tiny, tmp_path, monkeypatch):
    clock, folder = Clock(monkeypatch), str(tmp_path / "run")
    begin = clock.now
    assert train.main(tiny(max_seconds=40.0, max_iters=1000, eval_interval=10)) == 0
    assert 40 - 1 <= clock.now - begin <= 40 + 1 + 3
    stored = read_checkpoint(folder, "ckpt.pt")
    # 8 s of evaluating and saving before step 1, 8 s after step 10, and 5 s of the last evaluation
    assert stored["iter_num"] == 40 - 8 - 8 - 5 and stored["clock"] == 40 and stored["seconds"] == stored["iter_num"]
    assert [e for e in read_log(folder, "iter", "val_loss") if "val_loss" in e][-1]["iter"] == stored["iter_num"]
    begin, clock.now = clock.now + 7777, clock.now + 7777  # nobody's time
    train.main(tiny(max_seconds=60.0, max_iters=1000, eval_interval=10, init_from="resume"))
    stored = read_checkpoint(folder, "ckpt.pt")
    assert 20 - 1 <= clock.now - begin <= 20 + 1 + 3 and 60 <= stored["clock"] <= 61


# checkpoints beside the steps, as on CUDA


@pytest.fixture
def beside(monkeypatch):
    writer = weights.Writer
    monkeypatch.setattr(weights, "Writer", lambda beside: writer(True))


def test_checkpoints_beside_the_steps_are_the_same(tiny, tmp_path, monkeypatch, beside):
    """Bit by bit, and no larger; resumed exactly."""
    train.main(tiny(out_dir=str(tmp_path / "parts"), max_iters=10, attention_type="adaptive_span"))
    train.main(tiny(out_dir=str(tmp_path / "parts"), init_from="resume", attention_type="adaptive_span"))
    monkeypatch.undo()
    train.main(tiny(out_dir=str(tmp_path / "whole"), attention_type="adaptive_span"))
    for name in ("ckpt.pt", "best.pt"):
        assert weights_equal(tmp_path / "whole", tmp_path / "parts", name)
        sizes = [(tmp_path / folder / name).stat().st_size for folder in ("whole", "parts")]
        assert abs(sizes[0] - sizes[1]) < 8000, sizes  # a tied head is one tensor, of 32 kB
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "parts")


def test_steps_go_on_while_a_checkpoint_is_written(tiny, tmp_path, monkeypatch, beside):
    """The file has the weights of its own iteration, and the one after it waits."""
    write, gate, order = weights.write_atomically, threading.Event(), []
    step, folder = train.Run.step, str(tmp_path / "run")

    def slow(path, content):
        if path == os.path.join(folder, "ckpt.pt"):
            assert gate.wait(60)
            order.append("written")
        write(path, content)

    def stepped(self):
        if self.progress.iter_num == 15:
            assert read_checkpoint(folder, "ckpt.pt")["iter_num"] == 0
            gate.set()
            self.writer.wait()
            order.append(read_checkpoint(folder, "ckpt.pt"))
        return step(self)

    monkeypatch.setattr(weights, "write_atomically", slow)
    monkeypatch.setattr(train.Run, "step", stepped)
    assert train.main(tiny(out_dir=folder)) == 0
    first, middle, last = order
    assert first == last == "written" and middle["iter_num"] == 10
    monkeypatch.undo()
    train.main(tiny(out_dir=str(tmp_path / "short"), max_iters=10))
    short = read_checkpoint(str(tmp_path / "short"), "ckpt.pt")
    assert all(torch.equal(w, short["model"][name]) for name, w in middle["model"].items())
    states = [stored["optimizer"]["state"] for stored in (short, middle)]
    assert all(torch.equal(states[0][i][k], m) for i, moments in states[1].items() for k, m in moments.items())


def test_what_the_thread_cannot_write_ends_the_run(tiny, tmp_path, monkeypatch, beside):
    """At the next checkpoint, and the one before stays."""
    write, folder, broken = weights.write_atomically, str(tmp_path / "run"), []

    def full(path, content):
        if path == os.path.join(folder, "ckpt.pt"):
            broken.append(path)
            raise TrainError(f"cannot write {path}: No space left on device")
        write(path, content)

    monkeypatch.setattr(weights, "write_atomically", full)
    with pytest.raises(TrainError, match="No space left"):
        train.main(tiny(out_dir=folder, max_iters=35, checkpoint_interval=10))
    assert len(broken) == 1 and read_checkpoint(folder, "ckpt.pt")["iter_num"] == 0
    assert max(e["iter"] for e in read_log(folder, "iter")) == 20


# memory


@pytest.mark.slow
def test_memory_is_flat(tiny, tmp_path):
    """Peak memory of a process of its own, with all that a run does, within 1 MB from iteration 300 to 1,500."""
    keys = dict(attention_type="adaptive_span,mask_mix", spike_guard=3.0, max_iters=1500, lr_decay_iters=1500)
    keys |= dict(eval_interval=30, checkpoint_interval=10, export=True, wandb_mode="disabled", n_embd=8)
    done = subprocess.run([sys.executable, f"{ROOT}/train.py", *tiny(**keys)], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "run" / "log.jsonl") as f:
        at = {e["iter"]: e["rss_mb"] for e in map(json.loads, f) if "rss_mb" in e}
    assert at[1500] - at[300] < 1.0 and math.isfinite(at[1500])
