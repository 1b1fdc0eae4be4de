"""bench.py: tables, the file that they go into, and what needs no clock."""

import json
import math

import pytest

import bench
from bench import Table, number, spread


def test_numbers_have_the_digits_that_their_spread_leaves():
    assert number(1234567) == "1,234,567" and number(1234567.8) == "1,235,000" and number(0.012345678) == "0.01235"
    assert number(0.0) == "0.000" and number(math.inf) == "inf" and number(14296.0, -2) == "14,300"
    assert spread([7.061, 6.951, 7.083]) == "7.06 (6.95 - 7.08)"
    assert spread([1223.84, 1218.46, 1265.80]) == "1,224 (1,218 - 1,266)"
    assert spread([14296.0, 12118.0, 15306.0]) == "14,300 (12,100 - 15,300)"
    assert spread([2.0, 2.0]) == "2.000" and spread([1.0, 1.0 + 1e-9]) == "1.000 (1.000 - 1.000)"
    assert spread([1.0, 9.87654, 3.0]) == "1.0 - 9.9 (wide)"  # no median: it means nothing


def test_a_table_is_aligned_markdown_and_survives_an_error(capsys):
    columns = {"name": None, "loss (nats/token)": ".3f", "time (ms)": None}
    with pytest.raises(ZeroDivisionError), Table("title", columns, keys=1) as table:
        table.add("a", 1.23456, [1.0, 1.1])
        table.add("longer", None, None)
        raise ZeroDivisionError
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "title" and len({len(line) for line in lines[2:]}) == 1
    assert [c.strip() for c in lines[4].split("|")[1:-1]] == ["a", "1.235", "1.05 (1.00 - 1.10)"]
    assert [c.strip() for c in lines[5].split("|")[1:-1]] == ["longer", "-", "-"]
    with pytest.raises(ValueError):
        table.add("too few")


def test_the_file_says_where_it_comes_from(tmp_path, capsys):
    """The schema at the top of bench.py, and each column that holds numbers names its unit."""
    path = tmp_path / "a.json"
    options = ["--what=ops", "--shapes=1x33x1x8x8", "--operators=gla", "--rounds=2", "--seconds=0.01", "--device=cpu"]
    bench.main([*options, f"--json={path}"])
    found = json.loads(path.read_text())
    for name in ("schema", "what", "time", "commit", "machine", "versions", "config", "tables", "notes"):
        assert name in found and f"{name}" in bench.__doc__
    assert found["what"] == "ops" and found["config"]["bench"]["rounds"] == 2
    assert found["machine"]["matmul_gflops"] > 0 and found["machine"]["copy_gb_s"] > 0
    table = found["tables"]["ops"]
    assert [row["operator"] for row in table["rows"]] == ["softmax", "gla"]
    for row in table["rows"]:
        assert list(row) == table["columns"]
        assert all("(" in name or "/" in name for name, cell in row.items() if isinstance(cell, (int, float, list)))
    capsys.readouterr()
    bench.main([*options, "--json="])
    assert "wrote" not in capsys.readouterr().out
