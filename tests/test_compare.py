"""compare.py: lists, equal parameters, what is skipped and what runs again, kills, failures. Runs are tiny and real."""

import contextlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, check_units

import bench
import compare
import train
from benchmarks import comparison
from config import ConfigError, override
from data import DataError
from model import ATTENTION, GPT, read_checkpoint
from weights import TrainError

SHAPE = dict(device="cpu", dtype="float32", n_layer=2, n_head=2, n_embd=32, block_size=16, batch_size=4, dropout=0.1)
SCHEDULE = dict(max_iters=20, warmup_iters=3, eval_interval=10, eval_iters=2, learning_rate=1e-3, min_lr=1e-4)
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def command(folder, dataset, **keys):
    keys = SHAPE | SCHEDULE | dict(out_dir=folder, dataset=dataset) | keys
    return [f"--{name}={value}" for name, value in keys.items()]


def labels(line):
    """The runs of a command line as a shell splits it."""
    return [run.label for run in compare.plan(shlex.split(line))[1]]


def tables(folder):
    return json.loads((Path(folder) / "compare.json").read_text())["tables"]


def runs(folder):
    """{label: its folder}"""
    return {path.parent.name.rpartition("-")[0]: path.parent for path in sorted(Path(folder).glob("*/recipe.json"))}


@pytest.fixture(scope="module")
def compared(text_dataset, tmp_path_factory):
    """Four runs: the command line, what was printed, and of each process its threads and how many ran beside it."""
    folder, started = tmp_path_factory.mktemp("compared"), []
    Popen = subprocess.Popen

    class Recorded(Popen):
        def __init__(self, arguments, **options):
            super().__init__(arguments, **options)
            self.alive = sum(process.poll() is None for process in started)
            self.threads = options.get("env", {}).get("OMP_NUM_THREADS")
            if "train.py" in arguments[1]:
                started.append(self)

    line = command(folder, text_dataset, attention_type="softmax,gla+none", seed="1,2", equal_params=True, jobs=2)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(compare.subprocess, "Popen", Recorded)
        assert compare.main(line) == 0
    return SimpleNamespace(folder=folder, line=line, out=out.getvalue(), started=started)


@pytest.fixture
def again(compared, tmp_path, monkeypatch):
    """`again(*more)`: the same command in a copy of its folder, where nothing may be trained; its tables."""
    folder = tmp_path / "again"
    shutil.copytree(compared.folder, folder)

    def no_training(*_, **__):
        raise AssertionError("train.py was started")

    def call(*more):
        monkeypatch.setattr(compare.Run, "start", no_training)
        assert compare.main([*compared.line, f"--out_dir={folder}", *more]) == 0
        return tables(folder)

    return call


# what to run


def test_a_list_makes_every_combination():
    assert labels("--seed=1") == labels("") == ["run"]
    assert labels("--attention_type=softmax,gla --seed=1,2") == [
        f"{t} seed={s}" for t in ("softmax", "gla") for s in "12"
    ]
    wanted = [f"learning_rate={lr} n_layer={n}" for lr in ("1e-3", "3e-3") for n in (1, 2)]
    assert labels("--learning_rate=1e-3,3e-3 --n_layer=1,2 --compile=false") == wanted
    assert labels("--attention_type=all") == list(ATTENTION)


@pytest.mark.parametrize(
    "written",
    [
        "--attention_type=softmax,gla+gla+softmax",
        """'--attention_type=softmax,"gla,gla,softmax"'""",
        """--attention_type='softmax, "gla,gla,softmax"'""",
        """--attention_type=softmax,'"gla,gla,softmax"'""",
        """--attention_type=softmax,\\"gla,gla,softmax\\" """,
    ],
)
def test_an_item_may_hold_commas(written):
    _, found, *_ = compare.plan(shlex.split(written))
    assert [run.model.attention_type for run in found] == ["softmax", "gla,gla,softmax"]


def test_quotes_serve_every_key():
    line = """--attention_type=mask_mix --mask_mix_candidates='full,"offset_0,offset_1"'"""
    found = [run.model.mask_mix_candidates for run in compare.plan(shlex.split(line))[1]]
    assert found == ["full", "offset_0,offset_1"]


def test_a_key_of_one_type_leaves_the_others_alone(tmp_path):
    _, found, _ = compare.plan(shlex.split("--attention_type=softmax,gla --gla_gate_rank=8,16"))
    for run in found:
        run.place(str(tmp_path), {})
    assert len(found) == 4 and len({run.folder for run in found}) == 3  # softmax once
    assert [run.cells["gla_gate_rank"] for run in found] == [None, None, "8", "16"]


def test_a_file_gives_the_rest(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text("n_layer = 3\nmax_seconds = 5.0\ngla_gate_rank = 8\nout_dir = 'elsewhere'\n")
    _, found, folder = compare.plan([str(path), "--attention_type=softmax,gla"])
    assert folder == os.path.join("out", "compare", "mine") and "elsewhere" not in str(found)
    assert [run.keys.get("gla_gate_rank") for run in found] == [None, 8]
    assert all(run.cfg.max_seconds == 0 and run.keys["n_layer"] == 3 for run in found)
    assert "softmax" in capsys.readouterr().err
    assert compare.plan([str(path), "--max_seconds=7"])[1][0].cfg.max_seconds == 7


@pytest.mark.parametrize(
    "line, wanted",
    [
        ('--attention_type=softmax,"gla,gla"', r"gla is there 2 times; a pattern of layers is joined with \+"),
        ("--seed=1,1", "1 is there 2 times$"),
        ("--seed=1,x", "seed must be an integer"),
        ("--seed=", "seed must be an integer"),
        ("--seed", "seed must be an integer"),
        ("--attention_type=softmax,new", "no type 'new'"),
        ("--attention_type='softmax,\"gla'", "quotes surround a whole item"),
        ("--learning_rat=1,2", "did you mean learning_rate"),
        ("--job=1", "did you mean jobs"),
        ("--jobs=1,2", "jobs must be an integer"),
        ("--jobs=0", "at least 1"),
        ("--checkpoint=frist", "one of last, best"),
        ("-x", "write --key=value"),
        ("softmax,gla", "not a config file"),
        ("--eval_context=8,16", "one value, so that all runs are scored on the same tokens"),
        ("--dataset=a,b", "one value"),
        ("--out_dir=a,b", "one value"),
        ("--eval_context=32 --block_size=16", "learned positions end at block_size=16"),
        ("--init_from=resume", "resumes and scores by itself"),
        ("--eval_only", "resumes and scores by itself"),
        ("--attention_type=softmax,none --gla_gate_rank=8", "no layer of 'softmax' is one"),
        ("--equal_params --mlp=none --n_layer=1,2", "leave out init_from, mlp=none and lists"),
        ("--equal_params --mlp_hidden=8,16", "leave out init_from, mlp=none and lists"),
        ("--equal_params --n_layer=1 --n_embd=8,64 --n_head=2", "with mlp_hidden=1 it has .* the first run has"),
        ("--png=a.jpg", "must end in .png"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_trained(line, wanted, text_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = [] if "dataset" in line else [f"--dataset={text_dataset}"]
    with pytest.raises(ConfigError, match=wanted) as error:
        compare.main([*dataset, "--device=cpu", *shlex.split(line)])
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_data_set_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="nowhere"):
        compare.main(["--dataset=nowhere", "--device=cpu"])
    assert not list(tmp_path.iterdir())


# what comes out


def test_the_table_is_sorted_and_means_what_it_says(compared):
    found = tables(compared.folder)
    check_units(found)
    rows, quality = found["over seeds"]["rows"], found["quality"]["rows"]
    assert [row["mean (bits/byte)"] for row in rows] == sorted(row["mean (bits/byte)"] for row in rows)
    assert {row["attention"] for row in rows} == {"softmax", "gla,none"} and len(quality) == 4
    for row in rows:
        scores = [q["bits/byte"] for q in quality if q["attention"] == row["attention"]]
        assert row["seeds (count)"] == 2 and row["trained on (tokens)"] == 20 * 4 * 16
        assert row["mean (bits/byte)"] == statistics.mean(scores)
        assert row["standard deviation (bits/byte)"] == statistics.stdev(scores) > 0
    bold = re.findall(r"\*\*(.*?)\*\*", compared.out)
    assert bold == [f"{rows[0]['mean (bits/byte)']:.4f}"]
    assert "each is scored by its last checkpoint, on val" in compared.out
    assert (compared.folder / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_scores_are_those_of_the_full_pass(compared, tmp_path, capsys):
    """Of bench.py, which scores best.pt: here the last evaluation was the best."""
    rows = tables(compared.folder)["quality"]["rows"]
    options = ["--what=quality", "--split=val", "--device=cpu", f"--png={tmp_path / 'a.png'}"]
    for row in rows:
        assert read_checkpoint(row["folder"])["iter_num"] == 20
    bench.main([*options, f"--out_dir={','.join(r['folder'] for r in rows)}", f"--json={tmp_path / 'a.json'}"])
    wanted = json.loads((tmp_path / "a.json").read_text())["tables"]
    for name in ("nats/token", "bits/byte", "parameters (count)", "context (tokens)"):
        assert [row[name] for row in rows] == [row[name] for row in wanted["quality"]["rows"]]
    ours, theirs = (
        {row["attention"]: row["mean (bits/byte)"] for row in found["over seeds"]["rows"]}
        for found in (tables(compared.folder), wanted)
    )
    assert ours == theirs


def test_parameters_are_equal(compared):
    models = {
        row["attention"]: GPT.from_checkpoint(row["folder"]) for row in tables(compared.folder)["quality"]["rows"]
    }
    first, other = (models[name].num_params() for name in ("softmax", "gla,none"))
    assert abs(other - first) <= 0.01 * first and models["softmax"].config.mlp_hidden == 0
    width = models["gla,none"].config.mlp_hidden
    assert f"softmax: {first:,} parameters\n" in compared.out
    assert f"gla,none: {other:,} parameters ({(other - first) / first:+.2%}), mlp_hidden={width}\n" in compared.out
    column = {row["attention"]: row["mlp_hidden"] for row in tables(compared.folder)["over seeds"]["rows"]}
    assert column == {"softmax": "128", "gla,none": str(width)}


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_every_type_finds_its_width(mlp, capsys):
    _, found, *_ = compare.plan([os.path.join(ROOT, "config", "demo.py"), "--attention_type=all", f"--mlp={mlp}"])
    comparison.equalise(found, 256)
    counts = [GPT(override(run.model, vocab_size=256)).num_params() for run in found]
    assert max(abs(n - counts[0]) for n in counts) <= 0.01 * counts[0]
    assert found[0].model.mlp_hidden == 0 and all(run.keys["mlp_hidden"] for run in found[1:])


def test_jobs_and_threads(compared):
    """Two at once and never more, each with its share of the threads; the tests have one."""
    assert len(compared.started) == 4 and max(process.alive for process in compared.started) == 1
    assert {process.threads for process in compared.started} == {"1"}


def test_records_are_scored_in_nats(labelled_dataset, tmp_path):
    line = command(tmp_path / "out", labelled_dataset, seed=1, max_iters=2, attention_type="none")
    assert compare.main(line) == 0
    (row,) = tables(tmp_path / "out")["over seeds"]["rows"]
    assert row["mean (nats/token)"] > 0 and 0 <= row["accuracy (share)"] <= 1


# what is done again


def test_what_is_done_is_skipped(compared, again, capsys):
    assert again()["over seeds"] == tables(compared.folder)["over seeds"]
    assert capsys.readouterr().out.count("(done before)") == 4
    again("--log_interval=1", "--checkpoint_interval=5", "--jobs=1")
    assert len(again("--seed=2")["over seeds"]["rows"]) == 2  # another label, the same runs
    width = next(r["mlp_hidden"] for r in tables(compared.folder)["over seeds"]["rows"] if r["attention"] != "softmax")
    (row,) = again("--attention_type=gla+none", "--equal_params=false", f"--mlp_hidden={width}")["over seeds"]["rows"]
    assert row["seeds (count)"] == 2


def test_another_score_needs_no_training(again):
    last, best = again(), again("--checkpoint=best")
    assert best["quality"]["rows"] == last["quality"]["rows"]  # their last was their best
    test = again("--split=test")["quality"]["rows"]
    assert {row["split"] for row in test} == {"test"}
    assert {row["context (tokens)"] for row in again("--eval_context=8")["quality"]["rows"]} == {8}


def folders(line, out_dir, common=None):
    _, found, *_ = compare.plan(line)
    for run in found:
        run.place(str(out_dir), common or {})
    return [run.folder for run in found]


def test_a_change_of_what_decides_a_result_is_another_run(text_dataset, tmp_path, monkeypatch):
    line, module = command(tmp_path, text_dataset), tmp_path / "module.py"
    before = folders(line, tmp_path)
    assert folders([*line, "--wandb_project=x", "--eval_stride=4"], tmp_path) == before
    for option in ("--max_iters=21", "--dropout=0.2", "--seed=5", "--n_layer=1", "--eval_interval=5"):
        assert folders([*line, option], tmp_path) != before
    assert folders(line, tmp_path, {"data": 1}) != before
    monkeypatch.setattr(compare.comparison, "CODE", (str(module),))
    found = []
    for text in ("x = 1\n", "# why\nx = (1)\n", "x = 2\n"):
        module.write_text(text)
        found.append(compare.comparison.code())
    assert found[0] == found[1] != found[2]
    monkeypatch.undo()
    names = {
        os.path.relpath(path, ROOT)
        for pattern in compare.comparison.CODE
        for path in compare.glob.glob(f"{ROOT}/{pattern}")
    }
    wanted = {"model.py", "train.py", "data/__init__.py", "data/scoring.py", "kernels/gla.py", "kernels/launch.py"}
    assert wanted <= {name.replace(os.sep, "/") for name in names}


def test_a_retrained_teacher_is_another_run(tiny, text_dataset, tmp_path):
    teacher = tmp_path / "run"
    assert train.main(tiny(max_iters=1)) == 0
    line = command(tmp_path, text_dataset, teacher=teacher, distill="kl")
    before = folders(line, tmp_path)
    assert before == folders(line, tmp_path)
    os.utime(teacher / "best.pt", (0, 0))
    assert before != folders(line, tmp_path)


@pytest.mark.slow
def test_changed_runs_run_again_beside_the_old(compared, text_dataset, tmp_path):
    folder, more = tmp_path / "again", ["--seed=1", "--attention_type=softmax", "--equal_params=false"]
    shutil.copytree(compared.folder, folder)
    assert compare.main([*compared.line, f"--out_dir={folder}", *more, "--max_iters=25"]) == 0
    assert len(list(folder.glob("*/recipe.json"))) == 5
    assert tables(folder)["over seeds"]["rows"][0]["trained on (tokens)"] == 25 * 4 * 16


def test_code_that_changes_meanwhile_ends_the_command(text_dataset, tmp_path, monkeypatch):
    versions = itertools.count()
    monkeypatch.setattr(compare.comparison, "code", lambda plugins: str(next(versions)))
    with pytest.raises(TrainError, match="the code changed"):
        compare.main(command(tmp_path / "out", text_dataset))


def test_one_command_at_a_time_in_a_folder(again, text_dataset, tmp_path):
    (tmp_path / "out").mkdir()
    with compare.lock_folder(str(tmp_path / "out")), pytest.raises(TrainError, match="another run is writing there"):
        compare.main(command(tmp_path / "out", text_dataset))


# faults


def test_a_failing_run_stops_no_other(text_dataset, tmp_path, capsys):
    line = command(tmp_path / "out", text_dataset, learning_rate="1e9,1e-3", grad_clip=0, dropout=0.0)
    assert compare.main(line) == 1
    out = capsys.readouterr().out
    good, bad = tables(tmp_path / "out")["over seeds"]["rows"]
    assert good["learning_rate"] == "1e-3" and good["mean (bits/byte)"] > 0
    assert bad["learning_rate"] == "1e9" and bad["mean (bits/byte)"] is None and bad["seeds (count)"] == 0
    (note,) = (n for n in out.splitlines() if n.startswith("learning_rate=1e9 failed: train.py: "))
    assert "lower learning_rate" in note and "Traceback" not in out
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["notes"] == [note]


class Cut:
    """The command as a process group, and what has become of its runs."""

    def __init__(self, folder, line):
        self.folder = folder
        script = [sys.executable, os.path.join(ROOT, "compare.py"), *line]
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV, start_new_session=True)
        self.process = subprocess.Popen(script, **options)

    def wait_for_steps(self, number):
        """Until each run that was not done has `number` more steps than it had."""
        had, until = self.steps(), time.monotonic() + 60
        while time.monotonic() < until and self.process.poll() is None:
            has = self.steps()
            if len(has) == 2 and all(has[name] >= had.get(name, 0) + number for name in has):
                return
            time.sleep(0.02)
        raise AssertionError(self.process.communicate()[0])

    def steps(self):
        found = {}
        for label, folder in runs(self.folder).items():
            with contextlib.suppress(OSError, ValueError, IndexError):
                lines = (folder / "log.jsonl").read_text().splitlines()
                found[label] = json.loads(lines[-1])["iter"]
        return found


@pytest.mark.slow
def test_cut_and_resumed_it_is_the_same_comparison(text_dataset, tmp_path):
    """kill -9 of all processes, of compare.py alone, and of a run; Ctrl-C. Then the tables and logs of an uncut one."""
    keys = dict(attention_type="softmax,gla", max_iters=1500, eval_interval=50, log_interval=1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    line = command(cut, text_dataset, **keys)
    assert compare.main(command(whole, text_dataset, **keys)) == 0

    def interrupt(process):
        os.kill(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 130 and "stopping 2 runs" in out and "Traceback" not in out
        assert out.splitlines()[-1] == "compare.py: interrupted"

    for end in (lambda process: os.killpg(process.pid, signal.SIGKILL), interrupt, lambda process: process.kill()):
        command_ = Cut(cut, line)
        command_.wait_for_steps(100)
        end(command_.process)
        command_.process.wait()
    assert compare.main(line) == 0
    for name in ("over seeds", "quality"):
        ours, theirs = (tables(folder)[name]["rows"] for folder in (cut, whole))
        for row in ours + theirs:
            row.pop("folder", None)
        assert ours == theirs
    for label, folder in runs(whole).items():
        logs = [
            [json.loads(text) for text in (f / "log.jsonl").read_text().splitlines()]
            for f in (folder, runs(cut)[label])
        ]
        losses = [[(e["iter"], e.get("loss"), e.get("val_loss"), e.get("grad_norm")) for e in log] for log in logs]
        assert losses[0] == losses[1] and len(losses[0]) > 1500
        states = [read_checkpoint(str(f), "ckpt.pt")["model"] for f in (folder, runs(cut)[label])]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.slow
def test_a_killed_run_is_a_failed_one(text_dataset, tmp_path):
    line = command(tmp_path, text_dataset, attention_type="softmax,none", max_iters=2000, eval_interval=100)
    started = Cut(tmp_path, line)
    started.wait_for_steps(10)
    victim = next(str(path) for label, path in runs(tmp_path).items() if label == "softmax")
    for pid in subprocess.run(["pgrep", "-P", str(started.process.pid)], capture_output=True, text=True).stdout.split():
        if victim in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(int(pid), signal.SIGKILL)
    out, _ = started.process.communicate(timeout=120)
    assert started.process.returncode == 1 and "softmax failed: killed by SIGKILL" in out and "none (" in out
