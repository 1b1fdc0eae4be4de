"""Decoding beside another checkout, each in a process of its own."""

import pytest

from benchmarks import revisions
from config import ConfigError


@pytest.mark.slow
def test_this_checkout_beside_itself(capsys):
    """A type that a checkout cannot decode, or compile, has its reason in place of a ratio."""
    argv = [f"--beside={revisions.ROOT}", "--types=softmax,gla/none,unknown", "--rounds=2", "--tokens=3"]
    assert revisions.main(argv) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[4:]]
    found = {(row[0], row[1]): row[2:] for row in rows if len(row) == 4}
    for kind, code in (("softmax", "eager"), ("gla/none", "eager"), ("gla/none", "compiled")):
        speed, ratio = found[kind, code]
        assert float(speed.replace(",", "")) > 0 and float(ratio.split()[0]) > 0
    assert found["softmax", "compiled"][1].startswith("eager: the state of softmax grows")
    assert all("unknown" in found["unknown", code][1] for code in ("beside", "eager", "compiled"))


def test_a_folder_without_a_checkout_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no checkout, it holds no model.py"):
        revisions.main([f"--beside={tmp_path}"])
