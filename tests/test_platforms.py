"""Where modules are missing: Triton on macOS and Windows, `resource` and `fcntl` on Windows."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import weights

HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden}:
            raise ImportError(name + " is hidden")

sys.meta_path.insert(0, Hidden())
for name in {hidden}:
    assert name not in sys.modules, name
"""

STEPS = """
import importlib, pkgutil
import torch
import kernels

for name in ("model", "train", "sample", "bench", "data", "config"):
    importlib.import_module(name)
for module in pkgutil.iter_modules(kernels.__path__):
    importlib.import_module(f"kernels.{module.name}")
assert kernels.triton is None

from model import ATTENTION, GPT, GPTConfig

for name in ATTENTION:
    lm = GPT(GPTConfig(attention_type=name, block_size=32, vocab_size=20, n_layer=1, n_head=2, n_embd=16)).train()
    loss = lm(*torch.randint(20, (2, 2, 32)))[1]
    loss.backward()
    grads = [p.grad for p in lm.transformer.h[0].attn.parameters() if p.grad is not None]
    assert loss.isfinite() and all(g.isfinite().all() for g in grads) and (grads or name == "none"), name
print(len(ATTENTION), "types")
"""

RUN = """
import train
sys.exit(train.main(sys.argv[1:]))
"""


def without(modules, code, *arguments):
    """Run code in a Python that finds none of the modules; its output."""
    command = [sys.executable, "-c", HIDE.replace("{hidden}", str(set(modules))) + code, *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_and_type_without_triton():
    assert without(["triton"], STEPS).endswith(" types\n")


def test_training_without_what_windows_lacks(tiny, tmp_path):
    without(["triton", "resource", "fcntl"], RUN, *tiny(max_iters=2, eval_interval=2))
    with open(tmp_path / "run" / "log.jsonl") as f:
        steps = [entry for entry in map(json.loads, f) if "loss" in entry]
    assert [entry["iter"] for entry in steps] == [1, 2] and not any("rss_mb" in entry for entry in steps)


def test_the_lock_without_flock(tmp_path, monkeypatch):
    """Windows refuses to remove a file that is open; what a killed run left is removed."""
    monkeypatch.setattr(weights, "fcntl", None)
    (tmp_path / ".lock").touch()
    unlink, held = os.unlink, []

    def windows(path):
        if held and not held[-1].closed:
            raise PermissionError(13, "The process cannot access the file", path)
        unlink(path)

    monkeypatch.setattr(os, "unlink", windows)
    held.append(weights.lock_folder(tmp_path))
    with pytest.raises(weights.TrainError, match="another run is writing there"):
        weights.lock_folder(tmp_path)
    held[-1].close()
    weights.lock_folder(tmp_path).close()
