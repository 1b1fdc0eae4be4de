import importlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakIdKeyDictionary

import data
import train
from config import ConfigError
from kernels import launch
from plugins import import_plugins

torch.set_num_threads(1)  # sums in a fixed order: runs in this process and in others are compared digit for digit
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def pytest_addoption(parser):
    parser.addoption("--plugin", default="", help="file of attention types of your own, to be tested like the others")


def pytest_configure(config):
    try:
        import_plugins(config.getoption("--plugin"))
    except ConfigError as error:
        raise pytest.UsageError(str(error)) from None


def oracle(name):
    """Import a test oracle. A missing one skips the test, except where NANO_REQUIRE_ORACLES says that all are there."""
    if os.environ.get("NANO_REQUIRE_ORACLES") == "1":
        return importlib.import_module(name)
    return pytest.importorskip(name)


def run_two_processes(arguments, script=f"{ROOT}/train.py"):
    """train.py, or a script of its arguments, under torchrun, two processes on the CPU."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    launch += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(script)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr


class NoFloat64(TorchDispatchMode):
    """Plays a device that lacks float64, as MPS does. A tensor is on the host where `cpu()` made it, or an operation
    whose tensors all are there, or one that names no device; any other float64 is refused."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.host = WeakIdKeyDictionary()
        monkeypatch.setattr(torch.Tensor, "cpu", lambda x: self.copy(x))

    def copy(self, x):
        x = x.clone()
        self.host[x] = True
        return x

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        read = [x for x in tree_flatten((args, kwargs))[0] if torch.is_tensor(x)]
        on_host = all(x in self.host for x in read) if read else kwargs.get("device") is None
        for x in tree_flatten(out)[0]:
            if torch.is_tensor(x) and on_host:
                self.host[x] = True
            elif torch.is_tensor(x):
                assert x.dtype != torch.float64, f"{function} makes float64 on the device"
        return out


def check_units(tables):
    """Of a file that bench.py wrote: each column that holds numbers names its unit."""
    for table in tables.values():
        for row in table["rows"]:
            unnamed = [c for c, cell in row.items() if isinstance(cell, (int, float, list)) and not {*c} & {*"(/"}]
            assert list(row) == table["columns"] and not unnamed, unnamed


@pytest.fixture(scope="session")
def text_dataset(tmp_path_factory):
    """A prepared data set of bytes with something to learn: counted words in a random order. Its folder."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    codec, splits = data.BytesCodec(), {}
    for name, n in (("train", 6000), ("val", 700), ("test", 500)):
        text = " ".join(f"word{i}" for i in rng.integers(0, 30, n // 6)).encode()
        splits[name] = data.write_split(folder, name, [text], codec)
    data.write_meta(folder, codec, splits, source="test", sha256="", label="words")
    return str(folder)


@pytest.fixture(scope="session")
def labelled_dataset(tmp_path_factory):
    """Records of 6 symbols whose last is to be answered by a label: whether one of them is "x"; "never" is a
    third label, which no record has. Its folder."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(1)
    codec = data.SymbolsCodec([*"abcdefghwx", "no", "yes", "never"])
    splits = {}
    for name, n in (("train", 800), ("val", 150), ("test", 130)):
        tokens, targets = rng.integers(0, 9, (n, 6)), np.full((n, 6), -1)
        tokens[np.arange(n), rng.integers(0, 6, n)] = 9 - (rng.random(n) < 0.6)
        targets[:, -1] = 10 + (tokens == 9).any(1)
        splits[name] = data.write_records(
            folder, name, [(tokens[:50], targets[:50]), (tokens[50:], targets[50:])], codec
        )
    labels = {"no": 10, "yes": 11, "never": 12}
    data.write_meta(folder, codec, splits, source="test", sha256="", label="x", record_len=6, labels=labels)
    return str(folder)


@pytest.fixture(scope="session")
def uneven_dataset(tmp_path_factory):
    """Records of 8 symbols with 1 to 8 targets each; of its validation split none is scored. Its folder."""
    folder = tmp_path_factory.mktemp("uneven")
    rng, splits = np.random.default_rng(2), {}
    codec = data.SymbolsCodec([*"abcdefgh"])
    for name, n in (("train", 600), ("val", 40)):
        tokens = rng.integers(0, 8, (n, 8))
        targets = np.where(np.arange(8) < rng.integers(1, 9, n)[:, None], np.roll(tokens, 1, 1), -1)
        splits[name] = data.write_records(folder, name, [(tokens, targets)], codec)
    data.write_meta(folder, codec, splits, source="test", sha256="", label="uneven", record_len=8)
    return str(folder)


@pytest.fixture
def fresh_rng():
    """A generator with a new seed at each run, printed so that a failure can be repeated."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


@pytest.fixture
def products():
    """`products(call)`: the operations of the matrix products and triangular solves that a call runs, also of those
    inside operators, two for a multiply-add, by the shapes that PyTorch was given. Of its causal attention those of the
    pairs s <= t, in two products forward and five backward."""

    def count(call):
        with torch.autograd.profiler.profile(record_shapes=True) as profile:
            call()
        operations = 0
        for event in profile.kineto_results.events():
            name, shapes = event.name().removeprefix("aten::").rstrip("_"), event.shapes()
            if name in ("mm", "bmm", "addmm", "baddbmm"):
                a, b = shapes[int("add" in name) :][:2]
                operations += 2 * math.prod(a) * b[-1]
            elif name == "linalg_solve_triangular":
                operations += math.prod(shapes[0]) * shapes[1][-1]
            elif name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
                backward = name.endswith("backward")
                B, H, T, D = shapes[int(backward)]
                operations += (10 if backward else 4) * B * H * D * (T * (T + 1) // 2)
        return operations

    return count


@pytest.fixture
def operand_types(monkeypatch):
    """`operand_types(call, native)`: the types of the operands of all matrix products of a call, such as "float", on a
    processor that multiplies bfloat16 itself or not."""

    def collect(call, native):
        monkeypatch.setattr(launch, "native_bfloat16", lambda: native)
        with torch.autograd.profiler.profile(record_shapes=True) as profile:
            call()
        events = [
            event for event in profile.kineto_results.events() if event.name().rstrip("_").endswith(("mm", "bmm"))
        ]
        return {kind for event in events for kind in event.dtypes() if kind != "Scalar"}

    return collect


@pytest.fixture
def tiny(text_dataset, tmp_path):
    """Arguments of a tiny training run into a new folder; `tiny(key=value)` adds some."""

    def arguments(**keys):
        defaults = dict(
            out_dir=str(tmp_path / "run"), dataset=text_dataset, device="cpu", dtype="float32", n_layer=2, n_head=2,
            n_embd=32, block_size=16, batch_size=4, max_iters=20, lr_decay_iters=20, warmup_iters=3, learning_rate=1e-3,
            min_lr=1e-4, eval_interval=10, eval_iters=2, log_interval=1, dropout=0.1,
        )  # fmt: skip
        return [f"--{k}={v}" for k, v in (defaults | keys).items()]

    return arguments


@pytest.fixture
def checkpoint(tiny, tmp_path, capsys):
    """The option that names a run of 30 iterations."""
    train.main(tiny(max_iters=30, lr_decay_iters=30, learning_rate=3e-3))
    capsys.readouterr()
    return f"--out_dir={tmp_path / 'run'}"
