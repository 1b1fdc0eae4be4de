"""What other systems lack: Triton on macOS and Windows, resource and fcntl on Windows."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""
EVERY_MODULE_AND_TYPE = """
import importlib, pathlib, torch
for path in pathlib.Path(".").glob("**/*.py"):
    parts = path.with_suffix("").parts
    if parts[0] in ("bench", "benchmarks", "config", "data", "kernels", "model", "sample", "train", "weights"):
        if parts[0] != "config" and parts[-1] != "prepare":
            importlib.import_module(".".join(parts).removesuffix(".__init__"))
from model import ATTENTION, GPT, GPTConfig
assert kernels_without_triton()
for name in ATTENTION:
    gpt = GPT(GPTConfig(block_size=70, vocab_size=20, n_layer=1, n_head=2, n_embd=16, attention_type=name))
    idx = torch.randint(20, (2, 70))
    gpt(idx, idx)[1].backward()
    gpt.eval().generate(idx[:, :5], 2)
""".replace("kernels_without_triton()", "__import__('kernels').triton is None")


def run(code, hidden, *arguments):
    command = [sys.executable, "-c", HIDE + code, hidden, *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_and_type_without_triton():
    run(EVERY_MODULE_AND_TYPE, "triton")


@pytest.mark.parametrize("hidden", ["resource,fcntl,triton"])
def test_a_run_without_what_windows_lacks(hidden, text_dataset, tmp_path):
    sizes = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=2, max_iters=2, eval_iters=1, log_interval=1)
    options = dict(dataset=text_dataset, device="cpu", out_dir=str(tmp_path / "run")) | sizes
    code = "del sys.argv[:2]\nimport train\nsys.exit(train.main(sys.argv))\n"
    for more in ([], ["--init_from=resume", "--max_iters=3"]):
        out = run(code, hidden, *(f"--{k}={v}" for k, v in options.items()), *more)
    assert "iter 3: loss" in out
