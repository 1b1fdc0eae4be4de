"""What a training run keeps when something goes wrong: kills, damaged files, full disks, lost peers."""

import contextlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from faults import cut, flip, read_damaged
from test_train import poison, read_log, weights_equal

import bench
import config
import data
import train
import weights
from model import GPT
from train import TrainError
from weights import ModelError, is_training_folder, read_checkpoint

ENV = os.environ | {"OMP_NUM_THREADS": "1"}
FILES = ("config.json", "log.jsonl", "best.pt", "ckpt.pt", "model.safetensors")


def files(folder):
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}


class Struck(BaseException):
    """Ends a run in this process as a kill would: nothing of train.py catches it."""


def strike(monkeypatch, name, number=1):
    """The call of this number of Run.`name` ends the run."""
    method, calls = getattr(train.Run, name), [0]

    def struck(self, *args):
        calls[0] += 1
        if calls[0] == number:
            raise Struck
        return method(self, *args)

    monkeypatch.setattr(train.Run, name, struck)


def test_injected_faults_lose_nothing():
    """The short form of the script. Its table says what was injected."""
    script = [sys.executable, os.path.join(ROOT, "tests", "faults.py"), "--kills=20", "--short"]
    done = subprocess.run(script, capture_output=True, text=True, env=ENV, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


# starting and resuming


def test_a_run_stopped_before_its_first_step_resumes_again_and_again(tiny, tmp_path):
    whole = str(tmp_path / "whole")
    train.main(tiny(out_dir=whole))
    for init in ("scratch", "resume", "resume"):
        with pytest.raises(Struck), pytest.MonkeyPatch.context() as patch:
            strike(patch, "step")
            train.main(tiny(init_from=init))
    assert train.main(tiny(init_from="resume")) == 0
    assert read_log(tmp_path / "run") == read_log(whole)
    assert weights_equal(tmp_path / "run", whole) and weights_equal(tmp_path / "run", whole, "best.pt")


@pytest.mark.parametrize("moment", ["prepare", "evaluate", "save"])
def test_a_new_run_touches_nothing_before_it_has_saved(tiny, tmp_path, monkeypatch, moment):
    folder = tmp_path / "run"
    train.main(tiny(max_iters=2, export=True))
    before = files(folder)
    assert len(before) == 5
    strike(monkeypatch, moment)
    with pytest.raises(Struck):
        train.main(tiny(seed=7))
    assert files(folder) == before
    monkeypatch.undo()
    assert train.main(tiny(init_from="resume", max_iters=3)) == 0  # it is the earlier run that goes on
    assert [e["iter"] for e in read_log(folder) if "loss" in e] == [1, 2, 3]


def test_a_running_run_can_be_scored(tiny, tmp_path, capsys):
    """Reading needs no lock, also where nothing can be written. An export is written, and needs it."""
    train.main(tiny(max_iters=2))
    scores = dict(init_from="resume", eval_only=True)
    with weights.lock_folder(str(tmp_path / "run")):
        capsys.readouterr()
        assert train.main(tiny(**scores)) == 0
        assert "words val:" in capsys.readouterr().out
        with pytest.raises(TrainError, match="another run"):
            train.main(tiny(export=True, **scores))
    (tmp_path / "run" / ".lock").unlink()
    before = sorted(os.listdir(tmp_path / "run"))
    assert train.main(tiny(**scores)) == 0 and sorted(os.listdir(tmp_path / "run")) == before
    for place in (".new", ".placing"):  # where a kill left the checkpoint of a new run
        (tmp_path / "run" / place).mkdir()
        (tmp_path / "run" / "ckpt.pt").rename(tmp_path / "run" / place / "ckpt.pt")
        capsys.readouterr()
        assert train.main(tiny(**scores)) == 0 and f"{place}/ckpt.pt at iteration 2" in capsys.readouterr().out
        (tmp_path / "run" / place / "ckpt.pt").rename(tmp_path / "run" / "ckpt.pt")


# weights that are no good


def finite(folder, name):
    return all(w.isfinite().all() for w in read_checkpoint(str(folder), name)["model"].values())


@pytest.mark.parametrize("rate", [1e6, 1e10, 1e18])
def test_an_update_that_ruins_the_weights_is_not_saved(tiny, tmp_path, rate):
    """The checkpoint that stays goes on at a lower rate, without one bad step."""
    keys = dict(checkpoint_interval=1, max_iters=8)
    with pytest.raises(TrainError, match="the last good checkpoint is .*ckpt.pt; lower learning_rate"):
        train.main(tiny(learning_rate=rate, **keys))
    done = read_checkpoint(str(tmp_path / "run"), "ckpt.pt")["iter_num"]
    assert train.main(tiny(init_from="resume", **keys)) == 0
    log = read_log(tmp_path / "run", "iter", "loss")
    assert done < 3 and [e["iter"] for e in log if "loss" in e] == [*range(1, 9)]
    assert all(math.isfinite(e["loss"]) for e in log if "loss" in e)


RUINED = [("span", math.inf), ("alpha", -math.inf), ("c_attn.weight", math.nan), ("c_proj.weight", math.inf)]


@pytest.mark.parametrize("name, value", RUINED)
def test_weights_that_are_not_finite_end_the_run_unsaved(tiny, tmp_path, monkeypatch, fresh_rng, name, value):
    """Also where the loss stays finite, as with a span of infinity."""
    number, update, calls = int(fresh_rng.integers(11, 21)), train.Run.update, [0]

    def ruined(self, *args):
        update(self, *args)
        calls[0] += 1
        if calls[0] == number:
            p = self.model.transformer.h[0].attn.get_parameter(name)
            p.data.view(-1)[fresh_rng.integers(p.numel())] = value

    monkeypatch.setattr(train.Run, "update", ruined)
    kind = {"span": "adaptive_span", "alpha": "mask_mix"}.get(name, "softmax")
    with pytest.raises(TrainError):
        train.main(tiny(attention_type=kind, checkpoint_interval=1))
    assert read_checkpoint(str(tmp_path / "run"), "ckpt.pt")["iter_num"] == number - 1
    assert finite(tmp_path / "run", "ckpt.pt") and finite(tmp_path / "run", "best.pt")


@pytest.mark.parametrize("value, says", [(3e38, "0 left a loss of nan; nothing was saved"), (math.nan, "not a finite")])
def test_a_new_run_with_ruined_weights_saves_nothing(tiny, tmp_path, value, says):
    donor = tmp_path / "donor"
    train.main(tiny(out_dir=str(donor), max_iters=1))
    stored = torch.load(donor / "best.pt")
    stored["model"]["transformer.h.0.attn.c_attn.weight"][:] = value
    torch.save(stored, donor / "best.pt")
    with pytest.raises((TrainError, ModelError), match=says):
        train.main(tiny(init_from=str(donor)))
    assert not (tmp_path / "run" / "ckpt.pt").exists()


# damaged files


@pytest.fixture
def run_folder(tiny, tmp_path):
    """A finished run with all its files, small: its bytes are flipped one at a time."""
    train.main(tiny(max_iters=2, n_layer=1, n_embd=8, n_head=1, export=True))
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["ckpt.pt", "best.pt", "model.safetensors"])
def test_damaged_files_load_as_nothing_else(run_folder, fresh_rng, name):
    whole = (run_folder / name).read_bytes()
    found = [read_damaged(run_folder, name, flip(int(i), int(i) % 8)) for i in fresh_rng.integers(0, len(whole), 150)]
    assert "other" not in found and found.count("refused") > 50
    found = [read_damaged(run_folder, name, cut(int(n))) for n in fresh_rng.integers(0, len(whole), 20)]
    assert {*found} == {"refused"}


def test_each_bit_of_an_archives_directory_is_checked(run_folder):
    """Also the mark of a folder, at which torch.load reads zeros and zipfile does not look."""
    whole = (run_folder / "best.pt").read_bytes()
    entry = whole.rindex(b"PK\x01\x02")  # of a record of the directory
    found = {i: [read_damaged(run_folder, "best.pt", flip(entry + i, bit)) for bit in range(8)] for i in range(46)}
    assert "other" not in sum(found.values(), []) and found[38][4] == "refused"


def test_the_exports_config_is_its_own(run_folder):
    """A changed config.json changes no exported model; an export without its own is read with it."""
    from safetensors.torch import load_file, save_file

    expected = read_checkpoint(str(run_folder), "model.safetensors")["model_args"]
    text = (run_folder / "config.json").read_text()
    (run_folder / "config.json").write_text(text.replace('"n_head": 1', '"n_head": 2'))
    assert read_checkpoint(str(run_folder), "model.safetensors")["model_args"] == expected
    save_file(load_file(run_folder / "model.safetensors"), run_folder / "model.safetensors")
    assert read_checkpoint(str(run_folder), "model.safetensors")["model_args"] == expected | {"n_head": 2}


WRONG = {
    "int": lambda w: w.int(),
    "complex": lambda w: w + 1j,
    "sparse": lambda w: w.to_sparse(),
    "meta": lambda w: w.to("meta"),
    "quantised": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", ["transformer.wpe.weight", "transformer.h.0.attn.c_attn.weight"])
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_a_wrong_kind_are_refused(run_folder, kind, name):
    stored = torch.load(run_folder / "best.pt")
    stored["model"][name] = WRONG[kind](stored["model"][name])
    torch.save(stored, run_folder / "best.pt")
    with pytest.raises(ModelError) as error:
        GPT.from_checkpoint(str(run_folder), attention_type="softmax,none" if "wpe" in name else "nsa")
    assert "\n" not in str(error.value) and "damaged" in str(error.value)


@pytest.mark.parametrize("kind", [*WRONG, "overlapping", "number", "missing"])
@pytest.mark.filterwarnings("ignore")
def test_moments_of_a_wrong_kind_are_refused(run_folder, tiny, kind):
    stored = torch.load(run_folder / "ckpt.pt")
    moments = stored["optimizer"]["state"][1]
    wrong = WRONG | {"overlapping": lambda w: w.flatten()[0].expand(w.shape), "number": lambda w: 0.5}
    if kind == "missing":
        del moments["exp_avg"]
    else:
        moments["exp_avg"] = wrong[kind](moments["exp_avg"])
    torch.save(stored, run_folder / "ckpt.pt")
    with pytest.raises(ModelError) as error:
        train.main(tiny(init_from="resume", n_layer=1, n_embd=8, n_head=1))
    assert "\n" not in str(error.value)


def test_json_that_is_nested_too_deeply_is_one_line(run_folder, tiny):
    for name in ("ckpt.pt", "best.pt", "model.safetensors"):
        os.unlink(run_folder / name)
    (run_folder / "config.json").write_text("[" * 100_000)
    assert not is_training_folder(str(run_folder))
    with pytest.raises(ModelError):
        train.main(tiny(out_dir=str(run_folder / "new"), init_from=str(run_folder)))


@pytest.mark.parametrize("lost", [1, 200])
def test_a_shortened_log_is_said_and_its_lines_stay_whole(tiny, tmp_path, capsys, lost):
    train.main(tiny(max_iters=4))
    path = tmp_path / "run" / "log.jsonl"
    path.write_bytes(path.read_bytes()[:-lost])
    train.main(tiny(init_from="resume", max_iters=6))
    assert f"{path} lacks {lost} bytes" in capsys.readouterr().out
    assert [e["iter"] for e in read_log(tmp_path / "run") if "loss" in e][-2:] == [5, 6]


# what a resumed run is told


def test_a_changed_data_set_is_refused_and_said_how_to_go_on(tiny, tmp_path, text_dataset):
    folder = str(tmp_path / "text")
    shutil.copytree(text_dataset, folder)
    train.main(tiny(dataset=folder, max_iters=2))
    moved = str(tmp_path / "elsewhere")
    shutil.copytree(folder, moved)  # the same data in another place is the same
    train.main(tiny(dataset=moved, max_iters=2, init_from="resume"))
    before = files(tmp_path / "run")
    codec, meta = data.BytesCodec(), json.loads(Path(folder, "meta.json").read_text())
    meta["splits"]["train"] = data.write_split(folder, "train", [b"other words " * 99], codec)
    for name in ("val", "test"):
        shutil.copy(Path(folder, f"{name}.bin"), Path(folder, f"{name}.bin.part"))
    data.write_meta(folder, codec, meta["splits"], source="test", sha256="", label="words")
    with pytest.raises(ModelError, match="train of the data set changed since then; --init_from=.*run"):
        train.main(tiny(dataset=folder, init_from="resume"))
    assert files(tmp_path / "run") == before
    assert train.main(tiny(dataset=folder, init_from=str(tmp_path / "run"), out_dir=moved, max_iters=1)) == 0


def test_what_differs_from_the_checkpoint_is_said(tiny, tmp_path, capsys):
    train.main(tiny(max_iters=2, seed=5))
    capsys.readouterr()
    train.main(tiny(max_iters=3, seed=6, batch_size=2, gradient_accumulation_steps=3, init_from="resume"))
    note = "note: batch_size=2, it was 4; gradient_accumulation_steps=3, it was 1; the seed stays 5\n"
    assert note in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["seed"] == 5
    train.main(tiny(max_iters=3, seed=5, batch_size=2, gradient_accumulation_steps=3, init_from="resume"))
    assert "note:" not in capsys.readouterr().out


# what is written and printed


def test_the_log_is_json_without_nan(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, {3, 4})
    train.main(tiny(max_iters=8))
    text = (tmp_path / "run" / "log.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert [e["iter"] for e in read_log(tmp_path / "run") if e.get("loss", 0) is None] == [4, 5]
    bench.main(["--what=curves", f"--out_dir={tmp_path / 'run'}", f"--png={tmp_path / 'loss.png'}"])
    log = weights.Log(train.TrainConfig(), str(tmp_path), train.Progress(), None, {})
    log.write(iter=1, a=[1.5, math.inf, [-math.inf, 3]], b=math.nan, c=True)
    assert (tmp_path / "log.jsonl").read_text() == '{"iter": 1, "a": [1.5, null, [null, 3]], "b": null, "c": true}\n'


@pytest.mark.parametrize("name", ["ckpt.pt", "best.pt", "config.json", "log.jsonl"])
def test_a_full_disk_is_named_with_the_file(tiny, tmp_path, monkeypatch, name):
    folder, step = tmp_path / "run", train.Run.step
    train.main(tiny(max_iters=2))
    before, limits = files(folder), resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[name]) + 50, limits[1]))
        return step(self)

    if name == "log.jsonl":
        reason = "File too large"
        monkeypatch.setattr(train.Run, "step", limited)
    else:
        reason = "No space left on device"
        (folder / f"{name}.tmp").symlink_to("/dev/full")
    try:
        with pytest.raises(TrainError) as error:
            train.main(tiny(max_iters=12, init_from="resume"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot write {folder / name}: {reason}" in str(error.value) and "\n" not in str(error.value)
    monkeypatch.undo()
    assert files(folder)["ckpt.pt"] == before["ckpt.pt"]
    assert train.main(tiny(max_iters=12, init_from="resume")) == 0


def test_names_reach_a_terminal_without_control_characters(tiny, tmp_path, text_dataset, capsys, monkeypatch):
    folder = tmp_path / "text"
    shutil.copytree(text_dataset, folder)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"label": "words\x1b[2J\u009b31m"}))
    train.main(tiny(dataset=str(folder), max_iters=1))
    train.main(tiny(dataset=str(folder), init_from="resume", eval_only=True))
    out = capsys.readouterr().out
    assert out.count("words\\x1b[2J\\x9b31m") == 4 and "\x1b" not in out and "\u009b" not in out
    monkeypatch.setattr(sys, "argv", ["train.py", "--out\x1b[2J_dir=3"])
    with pytest.raises(SystemExit):
        config.run(train.main)
    error = capsys.readouterr().err
    assert "\x1b" not in error and "\\x1b[2J" in error


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="looks in /proc for what is loaded")
@pytest.mark.parametrize("script", ["train.py", "sample.py", "bench.py", "data/enwik8/prepare.py"])
def test_ctrl_c_while_modules_load_is_no_traceback(script):
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, script), "--help"], stderr=subprocess.PIPE, text=True
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "libtorch" not in maps.read_text():
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGINT and error.count("\n") <= 1 and "Traceback" not in error


# processes


def test_a_rank_without_an_address_is_one_line(tiny, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0" if name.endswith("RANK") else "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(config.ConfigError, match="RANK is set, but .*MASTER_ADDR"):
        train.main(tiny())


class Launched:
    """torchrun with two processes, which have made three steps."""

    def __init__(self, arguments, *options):
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", *options]
        launch += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", os.path.join(ROOT, "train.py"), *arguments]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
        self.launcher = subprocess.Popen(launch, **pipes)
        next(line for line in self.launcher.stdout if line.startswith("iter 3:"))
        children = Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children").read_text()
        self.workers = [int(pid) for pid in children.split()]

    def end(self, timeout):
        """(what was printed, on stderr too) once the workers are gone, which hold the pipes."""
        try:
            return self.launcher.communicate(timeout=timeout)
        finally:
            for pid in self.workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.launcher.kill()


@pytest.fixture
def launch(tiny):
    keys = dict(max_iters=10**6, lr_decay_iters=20, eval_interval=10**6, gradient_accumulation_steps=2)
    return lambda *options, **more: Launched(tiny(**keys | more), *options)


def our_lines(error):
    """Of what torchrun and its processes printed, the lines of train.py."""
    found = [
        line for line in error.splitlines() if line.startswith(("train.py:", "[rank")) or 'train.py", line' in line
    ]
    return [line for line in found if "SIGTERM" not in line]


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the workers in /proc")


both = pytest.mark.parametrize("parallel", ["ddp", "fsdp"])


def last_saved(folder):
    return weights.read_last(str(folder))["iter_num"]


@needs_proc
@pytest.mark.slow
@both
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_peer_is_one_line(launch, victim, parallel):
    group = launch(parallel=parallel)
    os.kill(group.workers[victim], signal.SIGKILL)
    (line,) = our_lines(group.end(60)[1])
    assert line.startswith("train.py: a process of the group was lost: ")


@needs_proc
@pytest.mark.slow
@both
def test_a_peer_that_stops_is_one_line_after_its_timeout(launch, parallel):
    group = launch(parallel=parallel, peer_timeout=5)
    os.kill(group.workers[1], signal.SIGSTOP)
    (line,) = our_lines(group.end(120)[1])  # torchrun gives the stopped one 30 seconds
    assert line.startswith("train.py: a process of the group was lost: ") and "5000ms" in line


@needs_proc
@pytest.mark.slow
@both
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_torchrun_restarts_a_run_from_its_last_checkpoint(launch, tiny, tmp_path, parallel, number):
    """By the command of the first start, over an earlier run of the folder. It ends like one that was not killed."""
    keys = dict(max_iters=200, lr_decay_iters=200, checkpoint_interval=5, eval_interval=100, parallel=parallel)
    train.main(tiny(seed=7, max_iters=2))
    group = launch("--max_restarts=1", **keys, peer_timeout=5)
    os.kill(group.workers[1], number)
    out, error = group.end(180)
    assert group.launcher.returncode == 0, error
    assert f"resumed from {tmp_path / 'run'}" in out and out.count("a new model of") == 0  # printed before iter 3
    entries = read_log(tmp_path / "run")
    assert [e["iter"] for e in entries if "loss" in e] == list(range(1, 201))
    whole = launch(**keys, out_dir=tmp_path / "whole")
    assert whole.end(180) and whole.launcher.returncode == 0
    assert read_log(tmp_path / "whole") == entries
    assert last_saved(tmp_path / "run" / "previous") == 2


@needs_proc
@pytest.mark.slow
@both
@pytest.mark.parametrize("victims", [[0], [1], [0, 1], "launcher"])
def test_a_terminated_group_saves_its_step(launch, tmp_path, parallel, victims):
    """SIGTERM to one process, to all, and to torchrun."""
    group = launch(parallel=parallel)
    for pid in [group.launcher.pid] if victims == "launcher" else [group.workers[i] for i in victims]:
        os.kill(pid, signal.SIGTERM)
    out, error = group.end(90)
    assert "SIGTERM: stopped after iteration" in out and not our_lines(error)
    done = last_saved(tmp_path / "run")
    assert [e["iter"] for e in read_log(tmp_path / "run") if "loss" in e] == list(range(1, done + 1))


@needs_proc
@pytest.mark.slow
def test_a_killed_launcher_ends_the_run_saved(launch, tmp_path):
    group = launch()
    group.launcher.kill()
    out, error = group.end(60)
    assert "SIGTERM: stopped after iteration" in out and "Traceback" not in error
    done = read_checkpoint(str(tmp_path / "run"), "ckpt.pt")["iter_num"]
    assert [e["iter"] for e in read_log(tmp_path / "run") if "loss" in e] == list(range(1, done + 1))


@needs_proc
@pytest.mark.slow
def test_a_group_with_a_stopped_process_ends(launch, tmp_path):
    group = launch()
    os.kill(group.workers[1], signal.SIGSTOP)
    group.launcher.send_signal(signal.SIGTERM)
    group.end(90)
    assert read_checkpoint(str(tmp_path / "run"), "ckpt.pt")["iter_num"] == 0
