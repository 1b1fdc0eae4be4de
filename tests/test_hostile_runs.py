"""Hostile checkpoints, prompts and configs: a script ends well, or in one line that names the culprit.

NANO_FUZZ is the number of examples of each test, a few by default.
"""

import contextlib
import copy
import io
import json
import math
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, strategies as st
from test_hostile import anything, damaged, files, fuzz, numbers, odd, places

import bench
import config
import sample
import train
from data import DataError
from weights import ModelError, TrainError

tensors = st.sampled_from([
    torch.zeros(0), torch.zeros(3), torch.full((16, 16), math.nan), torch.zeros(16, 16, dtype=torch.int64),
    torch.zeros(16, 16, dtype=torch.bool), torch.zeros(16, 16, dtype=torch.complex64), torch.eye(4).to_sparse(),
    torch.zeros(16, 16, dtype=torch.float16), torch.zeros(1, 1).expand(10**6, 10**6),
    torch.zeros(16, 16, device="meta"),
])  # fmt: skip


def run(script, *argv):
    """The exit status of a script's main, and what it says on stderr: at most one line, printable, no traceback."""
    out, err = io.StringIO(), io.StringIO()
    name = f"{script.__name__}.py"
    with (
        mock.patch.object(sys, "argv", [name, *argv]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        config.run(script.main, DataError, ModelError, TrainError)
    said = "".join(line for line in err.getvalue().splitlines(True) if not line.startswith("warning: "))
    status = end.value.code or 0
    assert status in (0, 1, 2) and said.count("\n") == (status > 0), (status, said)
    assert said.removesuffix("\n").isprintable() and len(said) < 900 and "Traceback" not in said, said
    assert not status or said.startswith(f"{name}: "), said
    return status, said


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a data set of bytes, and a run on it."""
    from test_data import write

    folder = tmp_path_factory.mktemp("trained")
    write(folder / "text", b"some text of words, and more of them\n" * 9)
    sizes = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, batch_size=2, eval_iters=1, eval_interval=4, max_iters=2)
    sizes |= dict(dataset=folder / "text", out_dir=folder / "run", device="cpu", dtype="float32", export=True)
    assert run(train, *(f"--{k}={v}" for k, v in sizes.items())) == (0, "")
    return folder


def resumed(folder, trained):
    keys = dict(out_dir=folder, dataset=trained / "text", init_from="resume", max_iters=3, device="cpu", batch_size=2)
    return run(train, *(f"--{k}={v}" for k, v in (keys | dict(eval_iters=1, eval_interval=4)).items()))


@fuzz
@given(st.data(), st.sampled_from(["ckpt.pt", "best.pt", "model.safetensors", "config.json", "log.jsonl"]))
def test_a_run_s_files_damaged(trained, tmp_path_factory, draw, name):
    """By bits, bytes and ends. What is refused is named; the files of the run stay."""
    folder = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(trained / "run", folder)
    (folder / name).write_bytes(draw.draw(damaged((folder / name).read_bytes())))
    if draw.draw(st.booleans()) and name == "model.safetensors":
        (folder / "ckpt.pt").unlink()
        (folder / "best.pt").unlink()
    before = files(folder)
    status, said = run(sample, f"--out_dir={folder}", "--max_new_tokens=2", "--device=cpu", "--start=a")
    assert not status or str(folder / name) in said, said
    assert files(folder) == before
    status, said = resumed(folder, trained)
    assert not status or str(folder) in said, said


@fuzz
@given(st.data())
def test_checkpoints_of_other_contents(trained, tmp_path_factory, draw):
    """Saved whole, with values of other kinds, sizes and types."""
    folder = tmp_path_factory.mktemp("other")
    stored = torch.load(trained / "run" / "ckpt.pt", weights_only=True)
    for _ in range(draw.draw(st.integers(1, 2))):
        container, key = draw.draw(st.sampled_from(list(places(stored))))
        if isinstance(container, dict) and draw.draw(st.integers(0, 3)) == 0:
            container.pop(key, None)
        else:
            container[key] = copy.deepcopy(draw.draw(tensors | anything | st.sampled_from(list(stored.values()))))
    try:
        torch.save(stored, folder / "ckpt.pt")
    except Exception:  # what cannot be saved is no file
        return
    status, said = run(sample, f"--out_dir={folder}", "--max_new_tokens=2", "--device=cpu", "--start=a")
    assert not status or str(folder) in said, said
    status, said = resumed(folder, trained)
    assert not status or str(folder) in said or "lower learning_rate" in said, said


@fuzz
@given(st.data())
def test_prompts(trained, tmp_path_factory, draw):
    folder = tmp_path_factory.mktemp("prompt")
    file = folder / draw.draw(st.sampled_from(["p", "p.txt", "\x1b[2Jp", "ä"]))
    kind = draw.draw(st.integers(0, 4))
    if kind == 0:
        file.write_bytes(draw.draw(st.binary(max_size=30) | st.sampled_from([b"", b"a" * 10**5, b"\xff\xfe", b"\n"])))
    elif kind == 1:
        file.mkdir()
    text = f"FILE:{file}" if kind < 3 else draw.draw(odd | st.text(max_size=9) | odd.map("FILE:{}".format))
    keys = {
        "temperature": numbers,
        "top_k": numbers,
        "top_p": numbers,
        "max_new_tokens": st.integers(-1, 3),
        "seed": numbers,
    }
    chosen = draw.draw(st.lists(st.sampled_from([*keys]), max_size=2, unique=True))
    options = {"max_new_tokens": 2} | {k: draw.draw(keys[k]) for k in chosen}
    status, said = run(
        sample,
        f"--out_dir={trained / 'run'}",
        "--device=cpu",
        f"--start={text}",
        *(f"--{k}={v}" for k, v in options.items()),
    )
    if status and not chosen and kind < 3:
        assert config.printable(str(file)) in said, said


@fuzz
@given(st.data(), st.sampled_from([train, sample, bench]))
def test_command_lines(tmp_path_factory, draw, script):
    """Each key with a value of another kind: refused by its name before anything is done."""
    folder = tmp_path_factory.mktemp("line")
    records = {train: [train.GPTConfig, train.TrainConfig], sample: [sample.SampleConfig]}.get(script)
    records = records or [bench.GPTConfig, bench.BenchConfig]
    keys = [f for record in records for f in record.__dataclass_fields__ if f not in ("out_dir", "wandb_log")]
    name = draw.draw(st.sampled_from(keys) | odd.map(lambda text: text.replace("=", "")))
    value = draw.draw((numbers | odd | st.booleans() | st.none()).map(str))
    where = folder / "x.py"
    if draw.draw(st.booleans()):
        line = draw.draw(
            st.sampled_from([f"{name} = {value!r}", f"{name} = {value}", f"{name} == 1", "(", "import os", "\0"])
        )
        where.write_bytes(line.encode("utf-8", "surrogatepass"))
        argv, culprit = [str(where)], str(where)
    else:
        argv, culprit = [f"--{name}={value}"], config.printable(name)[:150]
    stop = ["--out_dir=" + str(folder / "nowhere")] if name != "out_dir" else []
    if script is train:
        stop += ["--init_from=resume"] if name != "init_from" else ["--dataset=" + str(folder / "nowhere")]
    if script is bench:
        stop += ["--what=quality"] if name != "what" else ["--compare=x"]
    status, said = run(script, *argv, *stop)
    assert status, "a folder that is nowhere"
    known = "nowhere" in said or "no prepared data" in said  # what else is wrong with the command
    assert culprit in said or name in said or known or name in ("what", "compare", "dataset"), said
    assert [p.name for p in folder.iterdir()] in ([], ["x.py"])


def test_an_empty_prompt_file_is_named(trained, tmp_path):
    (tmp_path / "empty").write_text("")
    log = Path(trained / "run" / "log.jsonl").read_text()
    assert json.loads(log.splitlines()[0])["iter"] == 0
    status, said = run(sample, f"--out_dir={trained / 'run'}", "--device=cpu", f"--start=FILE:{tmp_path / 'empty'}")
    assert status == 2 and str(tmp_path / "empty") in said
