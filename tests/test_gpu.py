"""What `make gpu` runs on a borrowed machine, on the CPU with tiny sizes."""

import json
import time

import pytest
from conftest import check_units

import bench
from benchmarks import gpu, gpu_checks
from config import ConfigError
from kernels import Case

KEYS = ["--what=gpu", "--device=cpu", "--dtype=float32", "--rounds=1", "--seconds=0.01", "--tokens=3", "--limit=300"]


def measured(tmp_path, part, *keys):
    path = tmp_path / f"gpu-{part}.json"
    bench.main([*KEYS, f"--part={part}", f"--json={path}", *keys])
    found = json.loads(path.read_text())
    check_units(found["tables"])
    return {name: table["rows"] for name, table in found["tables"].items()}, path


def test_every_operator_and_type_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_checks, "TYPES", ["gsa", "gla,softmax"])
    tables, path = measured(tmp_path, 1)
    rows = tables["operators"]
    assert {row["operator"].split(" ")[0] for row in rows} == gpu_checks.OPERATORS.keys()
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    for row in rows + tables["types"]:
        errors = [x for name, x in row.items() if name.endswith("(error)") and name != "bound (error)"]
        assert min(errors[:2]) > 0 and max(errors) < (1e-5 if row["dtype"] == "float32" else 2e-2), row
    doc = tmp_path / "results.md"
    doc.write_text("before\n" + "".join(gpu.MARKS) + "after\n")
    monkeypatch.setattr(gpu, "PATHS", [path])
    for _ in range(2):
        gpu.write_tables(doc)
    text = doc.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and text.count("| gla_exact ") == 2


def test_a_wrong_operator_and_a_failing_one_are_reported(tmp_path, monkeypatch, capsys):
    def wrong(q, k, v, **_):
        return {"wrong": Case(lambda q, k, v: v * 1.01 + q - k, [q, k, v], lambda q, k, v: v + q - k, None)}

    operators = {"wrong": wrong, "broken": lambda *_, **__: 1 / 0}
    monkeypatch.setattr("benchmarks.operators.OPERATORS", operators)
    monkeypatch.setattr(gpu_checks, "OPERATORS", operators)
    monkeypatch.setattr(gpu_checks, "TYPES", [])
    with pytest.raises(ConfigError, match="some rows failed"):
        measured(tmp_path, 1)
    said = capsys.readouterr().out
    assert "wrong float32 1x40x2x16x16: an error above its bound" in said
    assert "broken float32 1x40x2x16x16 failed: ZeroDivisionError" in said


def test_operators_and_steps_are_timed(tmp_path, monkeypatch):
    tables, _ = measured(tmp_path, 2)
    names = [row["operator"] for row in tables["ops"]]
    assert len(names) == len({*names}) == len(gpu_checks.OPERATORS) and names[0] == "softmax"
    monkeypatch.setattr(gpu, "TYPES", ["softmax", "performer"])
    tables, _ = measured(tmp_path, 3)
    assert [(row["attention"], row["compiled"]) for row in tables["steps"]] == [("softmax", "no"), ("performer", "no")]
    assert all(row["decoding (tokens/s)"] > 0 and row["peak memory (MiB)"] > 0 for row in tables["steps"])


def test_runs_are_trained_and_scored(tmp_path, text_dataset):
    tables, _ = measured(tmp_path, 4, f"--dataset={text_dataset}")
    assert [row["attention"] for row in tables["quality"]] == ["softmax", "gla"]
    assert gpu.progress("out/gpu/gla") == (2, 2)


def test_a_run_that_the_limit_stopped_is_told(tmp_path, text_dataset, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "progress", lambda folder: (1, 2))
    with pytest.raises(ConfigError, match="some rows failed"):
        measured(tmp_path, 4, f"--dataset={text_dataset}")
    assert "gla was stopped by the time limit after 1 of 2 iterations" in capsys.readouterr().out


def test_the_limit_ends_a_row_and_what_is_measured_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "operators_at", lambda *_: time.sleep(30))
    with pytest.raises(ConfigError, match="some rows failed"):
        measured(tmp_path, 2, "--limit=0.2")
    said = capsys.readouterr().out
    assert said.count("failed: TimeoutError: the time limit") == len(gpu_checks.OPERATORS) - 1
