"""What launches share, with a device that is not there."""

import contextlib
import inspect
from types import SimpleNamespace

import pytest
import torch
from test_gla import INTERPRETED, interpret

from benchmarks import launches, operators
from kernels import delta as D, distance, gla as G, gsa as S, launch, nsa as N, performer as P
from kernels.launch import Kernel, choose, configurations
from model import ATTENTION


class Function:
    """In place of a kernel: remembers the device, the grid and the configuration of each launch; too little shared
    memory for tiles above `most`."""

    arg_names = ("BK",)

    def __init__(self, entered, most=1024):
        self.entered, self.most, self.seen = entered, most, []

    def __getitem__(self, grid):
        def run(*args, **constants):
            if constants["BK"] > self.most:
                raise MemoryError("shared memory")
            self.seen.append((self.entered[-1], grid(constants), constants["BK"]))

        return run


@pytest.fixture
def entered(monkeypatch):
    """The devices that were entered, in order."""
    found = []

    @contextlib.contextmanager
    def device(d):
        found.append(d)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(launch, "OutOfResources", MemoryError)
    return found


def test_a_launch_goes_to_its_tensors_device(entered):
    function = Function(entered)
    kernel = Kernel(function, configurations("BK", (64,), (32,), (16,)), {"BK": "K"})
    for name, K in (("cuda:1", 100), ("cuda:0", 100), ("cuda:1", 20), ("cuda:1", 20)):
        kernel.launch(lambda meta: (70_000 * meta["BK"],), SimpleNamespace(device=name, is_cuda=True), K=K)
    assert function.seen == [
        ("cuda:1", (70_000 * 64,), 64), ("cuda:0", (70_000 * 64,), 64), *[("cuda:1", (70_000 * 32,), 32)] * 2,
    ]  # fmt: skip


def test_a_configuration_that_does_not_fit_gives_way_to_the_next(entered):
    kernel = Kernel(Function(entered, most=32), configurations("BK", (128,), (64,), (32,), (16,)), {"BK": "K"})
    x = SimpleNamespace(device="cuda:0", is_cuda=True)
    for _ in range(2):
        kernel.launch(lambda meta: (1,), x, K=300)
    assert [tile for *_, tile in kernel.function.seen] == [32, 32]
    kernel = Kernel(Function(entered, most=8), configurations("BK", (32,), (16,)), {"BK": "K"})
    with pytest.raises(MemoryError, match="shared memory"):
        kernel.launch(lambda meta: (1,), x, K=300)


@pytest.mark.parametrize(
    "kernels", [G.KERNELS, D.KERNELS, S.KERNELS, P.KERNELS, N.KERNELS], ids=["gla", "delta", "gsa", "performer", "nsa"]
)
def test_only_the_first_axis_of_a_grid_is_long(kernels, monkeypatch):
    """With 70,000 pairs of a sequence and a head: axes beyond the first end at 65,535."""
    pytest.importorskip("triton")
    grids, constants = [], dict(BK=16, BV=16, BD=16, BM=64, BN=64)
    monkeypatch.setattr(Kernel, "launch", lambda self, programs, *args, **kw: grids.append(programs(constants)))
    B, T, H, K = 700, 65, 100, 16
    x = torch.empty(B, T, H, K, device="meta")
    state = torch.empty(B, H, K, K, device="meta")
    if kernels is G.KERNELS:
        G.gla_bwd(x, x, x, x, state, x, state, 1.0, -1.0)
    elif kernels is D.KERNELS:
        D.delta_bwd(x, x, x, x[..., 0], None, state, x, state, 1.0, None)
    elif kernels is S.KERNELS:
        z = torch.empty(B, T, H, K, device="meta")
        S.gsa_bwd(x, None, None, x, x, x, z, z, None, None, z, 1.0, None)
    elif kernels is P.KERNELS:
        w, state = torch.empty(H, K, K, device="meta"), torch.empty(B, H, K, K + 1, device="meta")
        P.performer_fwd(x, x, x, w, w, state, "softmax")
    else:
        N.band_bwd(x, x, x, x, x[..., 0], x, 1.0, 0, 16, 1, 0)
    assert grids and all(grid[0] >= B * H and max(grid[1:], default=1) <= 65_535 for grid in grids), grids


def test_old_gpus_take_the_pytorch_form(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(launch, "triton", object())
    q = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(1, 8, 2, 16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.warns(UserWarning, match="op runs its PyTorch form: the Triton kernels need an Ampere GPU or newer"):
        assert choose("op", "auto", q) == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose("op", "auto", q) == "triton"


def test_fp32_takes_its_own_default(entered):
    kernel = Kernel(Function(entered), configurations("BK", (64,), (32,)), {"BK": "K"}, fp32=dict(BK=16))
    tiles = {
        dot: [option["BK"] for option in kernel.options(dict(K=100, DOT=dot))] for dot in ("bf16", "tf32", "tf32x3")
    }
    assert tiles == {"bf16": [64, 32], "tf32": [16, 64, 32], "tf32x3": [16, 64, 32]}


def test_products_are_made_of_what_pytorch_allows(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert [launch.dot_type(d) for d in (torch.float32, torch.bfloat16, torch.float16)] == ["tf32x3", "bf16", "bf16"]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert [launch.dot_type(d) for d in (torch.float32, torch.bfloat16, torch.float16)] == ["tf32", "bf16", "bf16"]


def test_nsa_takes_wide_heads_in_bf16_alone():
    x = torch.empty(1, 1, 4, 128, device="meta")
    assert "float32 heads up to 64 wide" in N.too_large(x, 64, 4) and N.too_large(x.bfloat16(), 64, 4) is None
    assert N.too_large(x[..., :64], 64, 4) is None and "up to 128 wide" in N.too_large(x.bfloat16(), 256, 4)


LAUNCHES = {
    "gla": (5, 12),
    "gla_head": (5, 15),
    "delta_head": (5, 24),
    "gsa": (10, 17),
    "nsa": (90, 80),
    "span 256": (30, 30),
    "gated": (17, 31),
}


def test_no_operator_waits_for_the_gpu_or_launches_more(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(launches, "SHAPE", (2, 200, 4, 32))
    counts = {name: launches.of_operator(case) for name, case in launches.operators().items()}
    assert counts.keys() >= LAUNCHES.keys()
    for name, passes in counts.items():
        for found, limit in zip(passes, LAUNCHES.get(name, (100, 100))):
            assert found["kernels"] > 0 and found["bytes"] > 0 and found["waits"] == 0, (name, found)
            assert found["operations"] + found["kernels"] <= limit, (name, found)


@pytest.mark.parametrize("kind", ATTENTION)
def test_no_step_waits_for_the_gpu(kind):
    found = launches.of_step(kind)
    limit = dict.fromkeys(("softmax", "adaptive_span", "mask_mix"), 8) | {"nsa": 62}
    assert found["waits"] == 0 and found["operations"] <= limit.get(kind, 35), found


@pytest.mark.parametrize("kinds", [("gla",), pytest.param((), marks=pytest.mark.slow)], ids=["one", "all"])
def test_compiled_steps_are_few_launches(kinds):
    pytest.importorskip("triton")
    counts = launches.of_compiled_steps(kinds)
    assert counts.keys() >= set(kinds or ("gsa", "performer", "deltanet", "kda", "mamba2"))
    for kind, found in counts.items():
        assert 0 < len(found) <= (9 if kind == "kda" else 8), (kind, found)
        assert sum(name.endswith("mm") for name in found) >= (0 if kind == "none" else 2)


@pytest.mark.parametrize("which", ["not slow"])
def test_triton_under_the_interpreter(which):
    interpret(__file__, which)


@INTERPRETED
@pytest.mark.parametrize("name", [name for name in operators.OPERATORS if name != "softmax"])
def test_interpreted_gradients_that_come_in_as_views(name, monkeypatch):
    """What follows an operator may permute its output: the gradient that comes back is a view."""
    for module in operators.MODULES:
        monkeypatch.setattr(module, "choose", lambda *_: "triton")
    q, k, v = (torch.randn(1, 40, 3, 16).requires_grad_() for _ in range(3))
    for row, case in operators.OPERATORS[name](q, k, v, spans=(20,)).items():
        weight, found = torch.randn(1, 3, 16, 40), []
        for gradient in (weight.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2).contiguous()):
            o = case.call(*case.inputs)
            o = o[0] if isinstance(o, tuple) else o
            found.append(torch.autograd.grad(o, case.inputs, gradient.expand_as(o)))
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, msg=lambda text, row=row: f"{row}: {text}")


def test_trials_of_a_tuner_do_not_add_up():
    """A kernel that adds to its output names it."""
    pytest.importorskip("triton")
    assert distance.KERNELS["table"].tuned({}).reset_to_zero == ["p_dtable"]
    assert G.KERNELS["grad"].tuned(dict(K=64, V=64)).reset_to_zero == ["p_dg"]
    for module in operators.MODULES:  # an atomic addition, or a buffer that is made of zeros
        for kernel in module.KERNELS.values():
            adds = "tl.atomic_add" in inspect.getsource(kernel.function.fn)
            assert adds <= bool(kernel.zeroed) and {*kernel.zeroed} <= {*kernel.function.arg_names}


def test_sequences_that_offsets_cannot_reach():
    q = torch.empty(1, 2**17, 128, 128, device="meta")
    assert "2^31" in launch.too_long(q[0].numel()) and launch.too_long(q[0, 1:].numel()) is None


def test_a_wait_is_counted():
    with launches.Counted() as counted:
        x = torch.randn(3)
        x.sum().item()
        x.nonzero()
    assert counted.found["waits"] == 2 and counted.found["operations"] == 4
