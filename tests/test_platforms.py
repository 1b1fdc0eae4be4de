"""Where modules are missing: Triton on macOS and Windows, `resource` and `fcntl` on Windows; packages, a compiler; and
what `make` takes torch from."""

import ctypes
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import bench
import config
import data
import train
import weights
from weights import ModelError

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


def without(modules, code, *arguments, **variables):
    """Run code in a Python that finds none of the modules; its output."""
    command = [sys.executable, "-c", HIDE.replace("{hidden}", str(set(modules))) + code, *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT} | variables
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_and_type_without_triton():
    assert without(["triton"], STEPS).endswith(" types\n")


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


# a system that is not Linux

NOT_LINUX = """
import ctypes, os, signal
import torch
import matplotlib.pyplot
import train, sample, bench  # others ask where they are too: what is tested is ours, from here on

def missing(name, *_, **__):
    raise OSError(name + " is not here")

ctypes.CDLL = missing
for name in ("fork", "getloadavg", "sysconf", "nice"):
    delattr(os, name)
del signal.SIGALRM, signal.SIGUSR1
opened = open

def no_proc(path, *args, **options):
    if str(path).startswith(("/proc/", "/sys/")):
        missing(str(path))
    return opened(path, *args, **options)

__builtins__.open = no_proc
sys.platform = {platform}
folder = sys.argv[1]
assert train.main(sys.argv[2:]) == 0
assert train.main([*sys.argv[2:], "--init_from=resume", "--eval_only"]) == 0
sample.main(["--out_dir=" + folder, "--device=cpu", "--start=word", "--max_new_tokens=3"])
bench.main(["--what=curves", "--out_dir=" + folder, "--png=" + os.path.join(folder, "loss.png"), "--device=cpu"])
"""


@pytest.mark.parametrize("platform, hidden", [("win32", ["triton", "resource", "fcntl"]), ("darwin", ["triton"])])
def test_a_run_on_another_system(tiny, tmp_path, platform, hidden):
    """Trained, scored, sampled, drawn: without fork, /proc, libc and load average."""
    arguments = tiny(max_iters=2, eval_interval=2, checkpoint_interval=1, export=True)
    without(hidden, NOT_LINUX.replace("{platform}", repr(platform)), str(tmp_path / "run"), *arguments)
    assert {"loss.png", "ckpt.pt", "best.pt", "model.safetensors"} <= {*os.listdir(tmp_path / "run")}
    with open(tmp_path / "run" / "log.jsonl") as f:
        steps = [entry for entry in map(json.loads, f) if "loss" in entry]
    assert [entry["iter"] for entry in steps] == [1, 2]
    assert all(("rss_mb" in entry) == (platform == "darwin") for entry in steps)


def test_no_libc_and_no_load_average(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert config.resolve_device("cpu", "float32").device == "cpu"
    monkeypatch.delattr(os, "getloadavg")
    assert config.advise_threads() is None


def test_nothing_forks_but_what_needs_triton():
    """Windows has no fork, macOS breaks after one. The report compiles Triton's kernels, which neither has. A process
    that is spawned is as good as any."""
    forks = re.compile(r"os\.fork|\"fork\"|multiprocessing(?!\.get_context\(\"spawn\"\)|\n)")
    rooms = [Path(ROOT), *(Path(ROOT) / name for name in ("benchmarks", "config", "kernels"))]
    files = [path for room in rooms for path in room.glob("*.py")] + [Path(ROOT) / "data" / "__init__.py"]
    found = {path.name for path in files if forks.search(path.read_text(encoding="utf-8"))}
    assert len(files) > 40 and found == {"report.py"}


# packages and a compiler

PACKAGES = ("wandb", "datasets", "tqdm", "matplotlib", "transformers", "safetensors", "tiktoken")


def hide(monkeypatch, package):
    for name in {package, *(name for name in sys.modules if name.startswith(f"{package}."))}:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("package", PACKAGES)
def test_training_without_a_package(tiny, tmp_path, monkeypatch, package):
    hide(monkeypatch, package)
    assert train.main(tiny(max_iters=2, eval_interval=2)) == 0
    assert train.main(tiny(init_from="resume", eval_only=True)) == 0
    with open(tmp_path / "run" / "log.jsonl") as f:
        assert [entry["iter"] for entry in map(json.loads, f) if "loss" in entry] == [1, 2]


def test_what_is_missing_is_said_before_anything_is_done(tiny, tmp_path, monkeypatch):
    for package in PACKAGES:
        hide(monkeypatch, package)
    cases = {
        "pip install wandb": (config.ConfigError, dict(wandb_log=True)),
        "pip install transformers": (ModelError, dict(init_from="gpt2")),
        "pip install safetensors": (config.ConfigError, dict(export=True)),
    }
    for words, (error, keys) in cases.items():
        with pytest.raises(error, match=words) as caught:
            train.main(tiny(**keys))
        assert "\n" not in str(caught.value) and not (tmp_path / "run" / "ckpt.pt").exists()
    train.main(tiny(max_iters=1))
    with pytest.raises(config.ConfigError, match="pip install matplotlib"):
        bench.main(["--what=curves", f"--out_dir={tmp_path / 'run'}", f"--png={tmp_path / 'x.png'}", "--device=cpu"])
    with pytest.raises(config.ConfigError, match="pip install matplotlib"):
        train.main(tiny(init_from="resume", eval_only=True, eval_context="8,16"))
    with pytest.raises(data.DataError, match="tiktoken"):
        data.GPT2Codec().encode("a word")


@pytest.mark.parametrize("name, of_hub", [("wikitext2", "lines_of_hub"), ("sst2", "rows_of_hub")])
def test_preparing_without_datasets(monkeypatch, name, of_hub):
    """Its line names the package and another way."""
    hide(monkeypatch, "datasets")
    call = runpy.run_path(f"{ROOT}/data/{name}/prepare.py")[of_hub]
    with pytest.raises(data.DataError, match=r"datasets.*pass --source PATH") as caught:
        list(call("raw", "train") if name == "wikitext2" else call("train"))
    assert "\n" not in str(caught.value)


def test_a_bar_that_is_missing_shows_nothing(monkeypatch):
    hide(monkeypatch, "tqdm")
    with data.make_bar(total=3, desc="x") as bar:
        bar.update()
        bar.update(2)
    assert bar.disable


@pytest.mark.slow
def test_training_without_a_compiler(tiny, tmp_path):
    """torch.compile wants a C++ compiler on a CPU: the run says so, and goes on without."""
    variables = {"PATH": str(tmp_path), "CXX": "", "CC": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    out = without([], RUN, *tiny(max_iters=2, eval_interval=2, compile=True), **variables)
    assert "eager: torch.compile failed" in out and "iter 2: loss" in out


# make

STUB = """#!/bin/sh
# Stands in for Python: notes what make asks of pip.
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip "*) echo "$*" >> "$NOTES"; case "$*" in *--index-url*) exit ${INDEX_STATUS:-0} ;; esac ;;
esac
"""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    "given, index, words",
    [
        (["DRIVER=false", "ANSWERS=true"], CPU_INDEX, "its CPU build"),
        (["DRIVER=true", "ANSWERS=true"], None, "an NVIDIA driver is here"),
        (["DRIVER=false", "ANSWERS=false"], None, "does not answer"),
        (["SYSTEM=Darwin", "DRIVER=false", "ANSWERS=true"], None, "on Darwin"),
        (["TORCH_INDEX=https://x.y/z", "DRIVER=true", "ANSWERS=false"], "https://x.y/z", "as asked"),
        (["TORCH_INDEX=", "DRIVER=false", "ANSWERS=true"], None, "as asked"),
    ],
)
def test_make_takes_the_torch_that_fits(tmp_path, given, index, words):
    """One line says which; then the rest of what is needed."""
    done, asked = make(tmp_path, given)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("torch:")]
    assert len(lines) == 1 and words in lines[0], done.stdout
    torch = next(line for line in open(f"{ROOT}/requirements.txt") if line.startswith("torch==")).strip()
    wanted = [f"-m pip install -q {torch} --index-url {index}"] if index else []
    assert asked == [*wanted, "-m pip install -q -r requirements.txt"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_an_index_that_fails(tmp_path):
    """What make chose by itself gives way to pip's own index; what was asked for is an error."""
    done, asked = make(tmp_path / "own", ["DRIVER=false", "ANSWERS=true"], INDEX_STATUS="1")
    assert done.returncode == 0 and len(asked) == 2 and "torch: that failed" in done.stdout
    done, asked = make(tmp_path / "asked", [f"TORCH_INDEX={CPU_INDEX}"], INDEX_STATUS="1")
    assert done.returncode and len(asked) == 1


def make(folder, given, **variables):
    """`make install` into a folder with a stub for Python; what it asked of pip."""
    folder.mkdir(exist_ok=True)
    (folder / "stub").write_text(STUB)
    (folder / "stub").chmod(0o755)
    command = ["make", "install", f"VENV={folder / 'venv'}", f"PYTHON={folder / 'stub'}", *given]
    env = os.environ | {"NOTES": str(folder / "notes")} | variables
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=60)
    return done, (folder / "notes").read_text().splitlines()


def test_the_public_workflow():
    """Every system and Python that the README promises, and scripts that are there."""
    yaml = pytest.importorskip("yaml")
    with open(f"{ROOT}/.github/workflows/ci.yml") as f:
        flow = yaml.safe_load(f)
    assert {"push", "pull_request"} <= flow[True].keys()  # YAML 1.1 reads `on` as a truth
    whole, smoke = flow["jobs"]["whole"], flow["jobs"]["windows"]
    assert whole["strategy"]["matrix"] == {"os": ["ubuntu-latest", "macos-latest"], "python": ["3.10", "3.13"]}
    assert whole["runs-on"] == "${{ matrix.os }}" and smoke["runs-on"] == "windows-latest"
    assert any(step.get("run") == ".ci/run" for step in whole["steps"])
    commands = [line for step in smoke["steps"] for line in step.get("run", "").splitlines()]
    scripts = [word for line in commands for word in line.split() if word.endswith(".py")]
    assert {"train.py", "sample.py"} <= {*scripts} and all(os.path.exists(f"{ROOT}/{name}") for name in scripts)
