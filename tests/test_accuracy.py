"""Accuracy of records while a model trains: in the lines, in log.jsonl and in the pictures. And advice on threads."""

import json
import os

import numpy as np
import pytest
import torch

import bench
import compare
import config
import train
from benchmarks import curves, quality, runs, style
from data import Batches, Dataset
from data.scoring import accuracy
from model import GPT


def entries(folder):
    with open(os.path.join(folder, "log.jsonl")) as f:
        return [json.loads(line) for line in f]


def test_accuracy_is_the_share_of_right_answers(fresh_rng):
    logits = torch.from_numpy(fresh_rng.normal(size=(5, 7, 11)))
    targets = torch.from_numpy(fresh_rng.integers(-1, 11, (5, 7)))
    for among in ([*range(11)], [3, 1, 8]):
        called = np.array(among)[logits[..., among].numpy().argmax(-1)]
        scored = targets.numpy() >= 0
        expected = (called == targets.numpy())[scored].mean()
        assert accuracy(logits, targets, torch.tensor(among)).item() == pytest.approx(expected)
    assert accuracy(logits, torch.full((5, 7), -1), torch.arange(11)).item() == 0


def test_training_logs_the_accuracy_of_labels(tiny, tmp_path, labelled_dataset, capsys):
    """Of a step over its batch, whatever the micro-batches; of an evaluation over its fixed batches."""
    keys = dict(dataset=labelled_dataset, learning_rate=1e-2, dropout=0.0, eval_iters=5, max_iters=20)
    train.main(tiny(batch_size=8, **keys))
    out, folder = capsys.readouterr().out, str(tmp_path / "run")
    log = entries(folder)
    steps, (*_, last) = [e for e in log if "loss" in e], [e for e in log if e.get("split") == "val"]
    model, dataset = GPT.from_checkpoint(folder, "ckpt.pt").eval(), Dataset(labelled_dataset)
    right = []
    for x, y in Batches(dataset, 16, 8, 1337).fixed("val", 5):
        with torch.no_grad():
            logits = model(x, y)[0]
        right += (logits[:, -1, 10:13].argmax(-1) + 10 == y[:, -1]).tolist()
    assert last["val_accuracy"] == pytest.approx(sum(right) / 40)
    line = next(line for line in out.splitlines() if line.startswith("iteration 20:"))
    assert f"val accuracy {last['val_accuracy']:.4f}" in line and "train accuracy" in line
    assert f", accuracy {steps[4]['accuracy']:.4f})" in out
    assert {round(8 * e["accuracy"], 6) % 1 for e in steps} == {0} and steps[-1]["accuracy"] > 0.4
    train.main(tiny(batch_size=2, gradient_accumulation_steps=4, **keys, out_dir=str(tmp_path / "micro")))
    micro = [e["accuracy"] for e in entries(tmp_path / "micro") if "loss" in e]
    assert micro[:5] == pytest.approx([e["accuracy"] for e in steps[:5]])


def test_uneven_records_and_running_text(tiny, tmp_path, uneven_dataset):
    """Records of any number of targets have an accuracy; running text has none."""
    train.main(tiny(dataset=uneven_dataset, out_dir=str(tmp_path / "uneven")))
    log = entries(tmp_path / "uneven")
    found = [value for e in log for key, value in e.items() if key.endswith("accuracy")]
    assert len(found) == 20 + 2 * 3 and all(0 <= value <= 1 for value in found)
    train.main(tiny())
    assert not any("accuracy" in key for e in entries(tmp_path / "run") for key in e)


@pytest.fixture
def drawn(monkeypatch):
    """{name of a picture: the labels of its axes}, in place of the pictures."""
    labels = {}

    def keep(figure, path):
        labels[os.path.basename(path)] = [(a.get_xlabel(), a.get_ylabel()) for a in figure.axes]

    for module in (curves, quality, style):
        monkeypatch.setattr(module, "save_figure", keep)
    return labels


def test_pictures_show_accuracy(tiny, tmp_path, labelled_dataset, drawn):
    train.main(tiny(dataset=labelled_dataset))
    folder = str(tmp_path / "run")
    for what in ("curves", "quality"):
        bench.main([f"--what={what}", f"--out_dir={folder}", f"--png={what}.png", "--json=", "--device=cpu"])
    assert ("optimizer steps", "accuracy (share)") in drawn["curves.png"]
    assert [x for x, _ in drawn["quality.png"]].count("val accuracy (share); higher is better") == 1
    figure, (panel,) = style.grid(1)
    steps, evaluations, _ = runs.read_log(folder)
    val = [e for e in evaluations if e["split"] == "val"]
    curves.draw_accuracy(panel, [(group, [(steps, val, [])]) for group in runs.groups([folder])])
    pale, marked = (list(line.get_ydata()) for line in panel.lines[:2])  # step 0 is left out
    assert pale == [e["accuracy"] for e in steps] and marked == [e["val_accuracy"] for e in val[1:]] and len(val) == 3


@pytest.mark.slow
def test_the_picture_of_a_comparison_shows_accuracy(tiny, tmp_path, labelled_dataset, drawn):
    arguments = [a for a in tiny(dataset=labelled_dataset) if not a.startswith("--out_dir")]
    compare.main([*arguments, f"--out_dir={tmp_path / 'all'}", "--learning_rate=1e-3,1e-2", "--jobs=1"])
    labels = [x for x, _ in drawn["compare.png"]]
    assert [label.partition(";")[0] for label in labels[1:]] == ["nats/token", "accuracy (share)"]


def test_a_busy_machine_is_told_once(tiny, monkeypatch, capsys):
    """Where more waits than there are cores, and nobody has said how many threads. Quiet where nobody can tell."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def advice(load, **names):
        with monkeypatch.context() as patch:
            patch.setattr(os, "getloadavg", load, raising=False)
            for name, value in names.items():
                patch.setenv(name, value)
            return config.advise_threads()

    def nobody_knows():
        raise OSError

    assert advice(lambda: (24.0, 1.0, 1.0)) == (
        "load average 24.0 on 8 cores: other work shares them; OMP_NUM_THREADS=2 may be faster"
    )
    assert advice(lambda: (11.9, 99.0, 99.0)) is None and advice(nobody_knows) is None
    assert advice(lambda: (24.0, 1.0, 1.0), OMP_NUM_THREADS="8") is None
    with monkeypatch.context() as patch:
        patch.delattr(os, "getloadavg", raising=False)
        assert config.advise_threads() is None
    monkeypatch.setattr(os, "getloadavg", lambda: (24.0, 1.0, 1.0), raising=False)
    train.main(tiny(max_iters=2))
    assert capsys.readouterr().out.count("OMP_NUM_THREADS=2") == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert config.advise_threads() is None
