"""What a training run keeps when something goes wrong: kills, damaged files, full disks, lost peers."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from test_train import read_log, weights_equal

import train

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
