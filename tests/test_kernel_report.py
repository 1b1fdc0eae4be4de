"""The Triton kernels compiled ahead of time for sm_80 and sm_90: no GPU needed."""

import pytest

pytest.importorskip("triton")

from kernels import report  # noqa: E402

SPECS = report.specs()


DEFAULTS = [(x, arch) for x in SPECS if x[0].endswith(" #0") for arch in report.ARCHS]


def quick(name, arch):
    """A compilation takes seconds: the default run sees one architecture, without TF32 and unbounded gates."""
    return arch == 90 and name.startswith("gla") and "tree" not in name and "tf32" not in name


@pytest.mark.parametrize(
    "spec, arch",
    [
        pytest.param(*x, id=f"{x[0][0]}-{x[1]}", marks=() if quick(x[0][0], x[1]) else pytest.mark.slow)
        for x in DEFAULTS
    ],
)
def test_default_does_not_spill_and_uses_tensor_cores(spec, arch):
    row = report.resources(*spec[1:], arch)
    assert not report.too_much(spec[0], row) and row["programs"] >= 1, row
    assert row["barriers"] > 0 or "scan" not in spec[0], row  # its loop shares memory
    sums_alone = spec[0].startswith(("gla_weigh", "gla_start", "gated_penalty"))
    assert row["HMMA"] + row["HGMMA"] > 0 or sums_alone, row


@pytest.mark.slow
@pytest.mark.parametrize("arch", report.ARCHS)
@pytest.mark.parametrize("group", sorted({x[0].rsplit(" #", 1)[0] for x in SPECS}))
def test_every_configuration_compiles_and_one_fits_consumer_cards(group, arch):
    rows = [report.resources(*x[1:], arch) for x in SPECS if x[0].rsplit(" #", 1)[0] == group]
    assert min(x["shared"] for x in rows) <= report.SMALL_SHARED, rows


@pytest.mark.parametrize("group", sorted({x[0].rsplit(" #", 1)[0] for x in SPECS}))
def test_at_most_six_configurations_and_a_default(group):
    numbers = [x[0].rsplit(" #", 1)[1] for x in SPECS if x[0].rsplit(" #", 1)[0] == group]
    assert numbers == [str(i) for i in range(len(numbers))] and 1 <= len(numbers) <= 6


def test_a_spill_is_seen():
    """The check itself: a kernel that must keep far more values than a thread has registers."""
    import triton
    import triton.language as tl

    @triton.jit
    def hoard(p_x, N: tl.constexpr):
        b_x = tl.load(p_x + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :])
        b_y = tl.dot(b_x, b_x)
        tl.debug_barrier()
        tl.store(p_x + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :], b_y + b_x)

    row = report.resources(hoard, {"p_x": "*fp32"}, dict(N=128, num_warps=1), 80)
    assert report.spills(row) and row["stack"] > report.FP32_STACK
    assert report.faults({("hoard fp32 #0", 80): row})[0] == "hoard fp32 sm_80: the default spills"
    little = row | dict(stack=8, shared=0)
    assert report.faults({("hoard fp32 #0", 80): little}) == []
    for name in ("hoard", "hoard tf32"):
        assert report.faults({(f"{name} #0", 80): little}) == [f"{name} sm_80: the default spills"]
