"""Several processes: each attention type learns as in one, whatever a process holds; checkpoints in shards."""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from test_faults import Launched, needs_proc
from test_train import read_log, weights_equal

import parallel
import sample
import train
import weights
from model import ATTENTION, GPT
from parallel import World
from weights import ModelError, TrainError, read_checkpoint

ENV = os.environ | {"OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
MEASURED = ("iter", "loss", "ce", "kl", "attention_error", "penalty", "grad_norm", "val_loss", "train_loss")


def many_runs(folder, runs, processes):
    """Train with each of these arguments, in one group of so many processes."""
    path = os.path.join(folder, "runs.json")
    Path(path).write_text(json.dumps(runs))
    command = [*TORCHRUN, "--standalone", f"--nproc_per_node={processes}"]
    command = [*command, os.path.join(ROOT, "tests", "many_runs.py"), path]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=600)
    assert done.returncode == 0, done.stderr


def same_run(a, b, tolerance=1e-5):
    one, two = read_log(a, *MEASURED), read_log(b, *MEASURED)
    assert len(one) == len(two) and sum("loss" in entry for entry in one) >= 20
    for x, y in zip(one, two):
        assert x == pytest.approx(y, abs=tolerance, rel=0)


@pytest.fixture
def arguments(tiny, tmp_path):
    """Of a run of four micro-batches a step in a folder of this name; what a student needs is filled in."""

    def make(name, **keys):
        defaults = dict(dropout=0.0, batch_size=2, gradient_accumulation_steps=4, eval_iters=3)
        if "distill" in keys:
            keys["teacher"] = str(tmp_path / "teacher")
        return tiny(out_dir=str(tmp_path / name), **defaults | keys)

    return make


# the same run


STUDENT = dict(attention_type="gla", distill_ce=0.5)
QUICK = {
    "span": dict(attention_type="adaptive_span", span_reg=0.01, penalty_warmup=4, activation_checkpointing=True),
    "kl": STUDENT | dict(distill="kl", distill_attention_iters=5),
}
LONG = {name: dict(attention_type=name) for name in ATTENTION} | {
    "performer drawn": dict(attention_type="performer", performer_redraw_interval=3, embedding="untied"),
    "plain kl": STUDENT | dict(distill="kl"),
    "attention": dict(distill="attention", train_only="attention", attention_type="gla"),
    "masks": dict(attention_type="mask_mix", train_only="masks"),
    "frozen": dict(train_only="attention", embedding="onehot", n_embd=256, n_layer=1),
    "mixed": dict(attention_type="softmax,gla", pos_emb="none", norm="rmsnorm", mlp="swiglu", bias=True),
}


def check_the_same(arguments, tmp_path, cases, processes, kind):
    train.main(arguments("teacher", seed=3, max_iters=2))
    runs = {name: arguments(f"{name} here", **keys) for name, keys in cases.items()}
    for run in runs.values():
        train.main(run)
    there = [arguments(f"{name} there", parallel=kind, **keys) for name, keys in cases.items()]
    many_runs(tmp_path, there, processes)
    for name in cases:
        same_run(tmp_path / f"{name} here", tmp_path / f"{name} there")


def test_processes_with_shares_make_the_same_run(arguments, tmp_path):
    check_the_same(arguments, tmp_path, QUICK, 2, "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("processes, kind", [(2, "ddp"), (2, "fsdp"), (4, "fsdp")])
def test_every_type_learns_the_same_in_processes(arguments, tmp_path, processes, kind):
    check_the_same(arguments, tmp_path, LONG | QUICK, processes, kind)


@pytest.mark.slow
def test_muon_sees_whole_matrices(arguments, tmp_path):
    """It rounds to bfloat16: a last digit of a gradient becomes 1e-5 of the loss, with DDP as well."""
    train.main(arguments("one", optimizer="muon"))
    many_runs(tmp_path, [arguments(kind, optimizer="muon", parallel=kind) for kind in ("ddp", "fsdp")], 2)
    for kind in ("ddp", "fsdp"):
        ours, theirs = ([e["loss"] for e in read_log(tmp_path / name) if "loss" in e] for name in ("one", kind))
        assert len(ours) == 20 and ours == pytest.approx(theirs, abs=3e-4, rel=0)


def test_muon_of_shards(group, fresh_rng):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    matrix = torch.randn(6, 4)
    part = distribute_tensor(matrix, init_device_mesh("cpu", (1,)), [Shard(0)])
    options = (3.4445, -4.775, 2.0315), 5, 1e-7
    assert torch.equal(parallel.orthogonal(part, *options).full_tensor(), parallel.orthogonal(matrix, *options).float())


# checkpoints in shards


@pytest.mark.slow
def test_a_run_goes_on_in_any_number_of_processes(arguments, tmp_path, capsys):
    """Begun in two processes with shares: resumed there it is bit for bit the run that was not stopped, also with
    dropout; in one process and back it is the same to 1e-5. One command makes a ckpt.pt of the shards."""
    train.main(arguments("one"))
    begun = dict(parallel="fsdp", max_iters=10)
    there = [
        arguments("whole", parallel="fsdp", dropout=0.1),
        arguments("parts", **begun, dropout=0.1),
        arguments("parts", parallel="fsdp", dropout=0.1, init_from="resume"),
        arguments("to one", **begun),
    ]
    train.main(arguments("from one", max_iters=10))
    many_runs(tmp_path, [*there, arguments("from one", parallel="fsdp", init_from="resume", export=True)], 2)
    for name in ("whole", "parts", "to one", "from one"):
        assert not (tmp_path / name / "ckpt.pt").exists() and len(os.listdir(tmp_path / name / "shards")) == 1
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "parts")
    same_run(tmp_path / "one", tmp_path / "from one")
    exported = GPT.from_checkpoint(str(tmp_path / "from one"), "model.safetensors")
    for name in ("whole", "parts", "from one"):
        assert parallel.main([str(tmp_path / name)]) == 0
        assert "shards/20 at iteration 20" in capsys.readouterr().out
    assert weights_equal(tmp_path / "whole", tmp_path / "parts")
    stored = read_checkpoint(str(tmp_path / "from one"), "ckpt.pt")
    assert all(torch.equal(w, stored["model"][name]) for name, w in exported.state_dict().items())
    assert stored.keys() == read_checkpoint(str(tmp_path / "one"), "ckpt.pt").keys()
    # one process resumes from shards, and from what is made of them
    assert train.main(arguments("to one", init_from="resume")) == 0
    assert not (tmp_path / "to one" / "shards").exists()
    same_run(tmp_path / "one", tmp_path / "to one")
    (tmp_path / "whole" / "best.pt").unlink()
    sample.main([f"--out_dir={tmp_path / 'whole'}", "--max_new_tokens=5", "--device=cpu"])
    assert train.main(arguments("whole", dropout=0.1, init_from="resume", max_iters=21)) == 0


@pytest.mark.slow
def test_a_run_goes_on_in_more_and_in_fewer_processes(arguments, tmp_path):
    """2, 4, then 1, 4 and 2 processes again: the run of one. Muon's state moves as well."""
    train.main(arguments("one", max_iters=25, lr_decay_iters=25))
    train.main(arguments("muon one", optimizer="muon"))
    for i, (processes, kind) in enumerate([(2, "fsdp"), (4, "fsdp"), (1, "ddp"), (4, "fsdp"), (2, "ddp")]):
        keys = dict(parallel=kind, max_iters=5 * i + 5, lr_decay_iters=25, init_from="resume" if i else "scratch")
        muon = dict(optimizer="muon", parallel=kind, max_iters=min(20, 5 * i + 5), init_from=keys["init_from"])
        many_runs(tmp_path, [arguments("all", **keys), arguments("muon all", **muon)], processes)
    for a, b, tolerance in (("one", "all", 1e-5), ("muon one", "muon all", 3e-4)):
        losses = [[e["loss"] for e in read_log(tmp_path / name) if "loss" in e] for name in (a, b)]
        assert losses[0] == pytest.approx(losses[1], abs=tolerance, rel=0)


@pytest.fixture
def group(tmp_path):
    """This process as a group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def slow_disk(monkeypatch):
    """Files of tensors are written when this event is set."""
    from torch.distributed.checkpoint import FileSystemWriter

    gate, write = threading.Event(), FileSystemWriter.write_data

    def wait_and_write(self, *args, **options):
        assert gate.wait(30)
        return write(self, *args, **options)

    monkeypatch.setattr(FileSystemWriter, "write_data", wait_and_write)
    return gate


def a_model(fresh_rng, iteration=3):
    from model import GPTConfig

    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8, attention_type="performer"))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randint(11, (2, 8)), torch.randint(11, (2, 8)))[1].backward()
    optimizer.step()
    return model, optimizer, dict(iter_num=iteration)


def test_steps_go_on_while_shards_are_written(group, slow_disk, tmp_path, fresh_rng):
    """What is saved is what was there at the call; until it is whole, the one before it is the last."""
    model, optimizer, extra = a_model(fresh_rng)
    shards = weights.Shards(World(0, 1, 0), None)
    slow_disk.set()
    shards.save(str(tmp_path), model, {"optimizer": optimizer}, extra)
    shards.finish()
    slow_disk.clear()
    before = {name: w.clone() for name, w in model.state_dict().items()}
    shards.save(str(tmp_path), model, {"optimizer": optimizer}, extra | dict(iter_num=4))
    for p in model.parameters():
        p.data.fill_(7.0)
    assert weights.last_shards(str(tmp_path)).endswith("/3")
    slow_disk.set()
    shards.finish()
    stored = weights.read_last(str(tmp_path))
    assert stored["iter_num"] == 4 and os.listdir(tmp_path / "shards") == ["4"]
    assert stored["model"].keys() == before.keys()
    assert all(torch.equal(w, before[name]) for name, w in stored["model"].items())
    assert stored["optimizer"]["state"].keys() == optimizer.state_dict()["state"].keys()


def test_a_disk_that_is_full_keeps_the_shards_before(group, tmp_path, fresh_rng, monkeypatch):
    from torch.distributed.checkpoint import FileSystemWriter

    model, optimizer, extra = a_model(fresh_rng)
    shards = weights.Shards(World(0, 1, 0), None)
    shards.save(str(tmp_path), model, {"optimizer": optimizer}, extra)
    shards.finish()

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    shards.save(str(tmp_path), model, {"optimizer": optimizer}, extra | dict(iter_num=4))
    with pytest.raises(TrainError, match="No space left on device; the one before it is intact"):
        shards.finish()
    assert weights.read_last(str(tmp_path))["iter_num"] == 3


def test_damaged_shards_are_one_line(group, tmp_path, fresh_rng):
    """Also metadata that would run code."""
    model, optimizer, extra = a_model(fresh_rng)
    shards = weights.Shards(World(0, 1, 0), None)
    shards.save(str(tmp_path), model, {"optimizer": optimizer}, extra)
    shards.finish()
    folder = tmp_path / "shards" / "3"

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    whole = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    for name, content in whole.items():
        for damaged in (content[: len(content) // 2], b"", *([pickle.dumps(Code())] if name == ".metadata" else [])):
            (folder / name).write_bytes(damaged)
            with pytest.raises(ModelError, match="not a readable checkpoint"):
                weights.read_last(str(tmp_path))
        (folder / name).write_bytes(content)
    assert not (tmp_path / "ran").exists() and weights.read_last(str(tmp_path))["iter_num"] == 3


def test_only_shards_say_how_to_be_read(tmp_path):
    (tmp_path / "shards" / "5").mkdir(parents=True)
    (tmp_path / "shards" / "5" / ".metadata").touch()
    with pytest.raises(ModelError, match=f"python parallel.py {tmp_path}"):
        read_checkpoint(str(tmp_path))


@needs_proc
@pytest.mark.slow
def test_a_group_killed_while_it_saves_loses_nothing(tiny, tmp_path, fresh_rng):
    """All processes at once, at random moments of a run that saves after each step; then resumed, as after a reset."""
    keys = dict(max_iters=120, lr_decay_iters=120, eval_interval=60, gradient_accumulation_steps=2, parallel="fsdp")
    whole = Launched(tiny(out_dir=tmp_path / "whole", **keys))
    whole.end(120)
    killed = 0
    for i in range(3):
        folder = tmp_path / str(i)
        group = Launched(tiny(out_dir=folder, checkpoint_interval=1, **keys))
        time.sleep(fresh_rng.uniform(0, 2))
        for pid in (group.launcher.pid, *group.workers):
            with contextlib.suppress(ProcessLookupError):  # it was done
                os.kill(pid, signal.SIGKILL)
                killed += 1
        group.end(60)
        done = weights.read_last(str(folder))["iter_num"]
        many_runs(tmp_path, [tiny(out_dir=str(folder), init_from="resume", checkpoint_interval=1, **keys)], 2)
        assert done <= 120 and read_log(folder) == read_log(tmp_path / "whole")
    assert killed


# two nodes


@pytest.mark.slow
def test_two_nodes(arguments, tmp_path):
    """Two torchruns of two processes each, as on two machines."""
    train.main(arguments("one"))
    port = 20000 + os.getpid() % 10000
    nodes = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d", f"--rdzv_id={port}"]
    nodes += [f"--rdzv_endpoint=localhost:{port}", os.path.join(ROOT, "train.py"), *arguments("two", parallel="fsdp")]
    launched = [subprocess.Popen(nodes, stderr=subprocess.PIPE, text=True, env=ENV) for _ in range(2)]
    for node in launched:
        assert node.communicate(timeout=180)[1] is not None and node.returncode == 0
    same_run(tmp_path / "one", tmp_path / "two")
