"""bench.py: tables, the file that they go into, and what needs no clock."""

import importlib
import json
import math
import re
import statistics
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import check_units

import bench
import kernels
import train
from benchmarks import clocks, decoding, layers, operators, peers, quality, tables
from benchmarks.layers import crossover
from benchmarks.tables import Table, number, speed_ratio, spread
from config import ConfigError, Runtime
from data import DataError, Dataset
from model import ATTENTION, GPT, GPTConfig, ModelError, read_checkpoint


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
    with pytest.raises(ZeroDivisionError), Table("name", "title", columns) as table:
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
    check_units(found["tables"])
    table = found["tables"]["ops"]
    assert [row["operator"] for row in table["rows"]] == ["softmax", "gla"]
    for row in table["rows"]:
        assert list(row) == table["columns"]
    capsys.readouterr()
    bench.main([*options, "--json="])
    assert "wrote" not in capsys.readouterr().out


def test_peak_memory_of_known_allocations():
    """To the byte, also of what an operator written in Python and a backward pass allocate and free."""
    MiB = 2**18  # float32 numbers

    def call():
        a, b = torch.empty(8 * MiB), torch.empty(16 * MiB)
        del a
        c = torch.empty(4 * MiB)
        del b, c

    assert clocks.peak_memory(call, "cpu") == 24.0
    assert clocks.peak_memory(lambda: [torch.empty(2 * MiB) for _ in range(5)], "cpu") == 10.0

    @torch.library.custom_op("test_bench::scratch", mutates_args=())
    def scratch(x: torch.Tensor) -> torch.Tensor:
        torch.empty(32 * MiB)
        return x.clone()

    assert clocks.peak_memory(lambda: scratch(torch.empty(MiB)), "cpu") == 33.0
    x = torch.zeros(MiB, requires_grad=True)
    grad = torch.ones(MiB)
    taken = clocks.peak_memory(lambda: torch.autograd.grad(x.exp(), x, grad), "cpu")
    assert taken == 2.0  # exp(x) is kept, its gradient is made


OVERVIEW = [
    "--device=cpu",
    "--lengths=8,32",
    "--rounds=2",
    "--seconds=0.05",
    "--n_embd=32",
    "--n_head=2",
    "--batch_size=1",
]


@pytest.fixture
def overview(tmp_path):
    def run(*arguments):
        path = tmp_path / "bench.json"
        assert bench.main([*OVERVIEW, f"--json={path}", f"--png={tmp_path / 'bench.png'}", *arguments]) == 0
        return json.loads(path.read_text())["tables"]

    return run


def test_overview_of_every_type(overview, tmp_path, capsys):
    tables = overview()
    rows = tables["overview"]["rows"]
    assert [(r["attention"], r["T (tokens)"]) for r in rows] == [(t, T) for T in (8, 32) for t in ATTENTION]
    check_units(tables)
    for row, more in zip(rows, tables["overview, further"]["rows"], strict=True):
        assert [*row.values()][:2] == [*more.values()][:2]
        row |= more
        assert row["crossover with softmax (tokens)"] is None if row["attention"] == "softmax" else True
        assert min(row["forward (ms)"] + row["forward + backward (ms)"] + row["decoding (tokens/s)"]) > 0
        attn = ATTENTION[row["attention"]](GPTConfig(block_size=row["T (tokens)"], n_embd=32, n_head=2))
        wanted = [f / 1e6 for f in attn.flops(row["T (tokens)"])]
        assert [row["nominal (MFLOP)"], row["executed (MFLOP)"]] == pytest.approx(wanted)
        assert max(row["of the matmul peak (share)"]) < 1
        assert (row["peak memory (MiB)"] > 0) and (row["state (bytes)"] > 0) == (row["attention"] != "none")
    assert {r["saved of softmax's (share)"] for r in rows if r["attention"] == "softmax"} == {0.0}
    assert {r["saved of softmax's (share)"] for r in rows if r["attention"] == "none"} == {1.0}
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"
    assert "checked at T 32" in capsys.readouterr().out


def test_executed_operations_are_counted(overview):
    """Softmax's are the pairs of a brute-force count; a mask that skips nothing saves nothing, whatever computes it."""
    rows = overview("--attention_type=softmax,adaptive_span", "--span_init=1.0")["overview, further"]["rows"]
    for row in rows:
        T = row["T (tokens)"]
        pairs = sum(s <= t for t in range(T) for s in range(T))
        assert row["executed (MFLOP)"] == row["nominal (MFLOP)"] == pytest.approx(4 * 32 * pairs / 1e6)
        assert row["saved of softmax's (share)"] == 0.0
    assert [row["attention"] for row in rows] == ["softmax", "adaptive_span"] * 2
    rows = overview("--attention_type=mask_mix", "--mask_mix_candidates=full")["overview, further"]["rows"]
    for row in rows:  # weights below 1: in blocks, that hold more pairs than a causal mask has
        assert row["saved of softmax's (share)"] <= 0.0


@pytest.mark.parametrize("name", ATTENTION)
def test_operations_are_those_of_the_products(name, products):
    """Of a layer and its projections, forward: what is said to be executed is what runs, to 1 %: `gated` counts the
    products of its gates too, which are no matrix products, and what `nsa` selects depends on the data. Forward and
    backward: no more is said than runs."""
    runtime = Runtime("cpu", "float32", False, "")
    for T in (64, 192, 200):
        layer = layers.Layer.make(name, T, layers.LAYER, 2, runtime)
        said = layer.operations()[2]
        assert products(layer.forward) == pytest.approx(said, rel=0.01)
        assert products(layer.forward_backward) >= 3 * 0.995 * said


def test_operations_of_operators(products):
    """What is said of an operator is what runs (of `nsa`, whose tiles follow what is selected, to 3 %), and less than
    that forward and backward; the rest has no count."""
    shape, runtime = (2, 192, 4, 32, 32), Runtime("cpu", "float32", False, "")
    rows = operators.operator_rows(
        operators.OPERATORS, shape, bench.BenchConfig(spans="16,50,300", peers=True), runtime
    )
    counted = {name for name, case in rows.items() if case.executed}
    assert rows.keys() - counted == {name for name in rows if " layer" in name or name in peers.PEERS}
    for name in counted:
        call, inputs, _, said = rows[name]
        forward = products(lambda: call(*[x.detach() for x in inputs]))  # noqa: B023
        assert forward == pytest.approx(said, rel=0.03 if name == "nsa" else 0.001), name
        both = products(lambda: operators.operator_step(lambda: call(*inputs), inputs))  # noqa: B023
        assert both >= 3 * 0.999 * said, name


def test_the_check_finds_a_wrong_layer(overview, monkeypatch):
    step = ATTENTION["gla"].step
    monkeypatch.setattr(ATTENTION["gla"], "step", lambda self, x, state: (step(self, x, state)[0] * 1.01, state))
    with pytest.raises(ModelError, match="gla at T 32: its output is off by"):
        overview("--attention_type=gla")
    monkeypatch.setattr(ATTENTION["gla"], "forward", lambda self, x: (x * math.nan, None))
    with pytest.raises(ModelError, match="off by nan"):
        overview("--attention_type=gla")
    assert overview("--attention_type=gla", "--check=False")["overview"]["rows"]


def test_crossover_lengths():
    """Interpolated in the logarithms of both; each round by itself. A length where all rounds have one, a bound where
    all have it, and else how far they are apart."""
    lengths = [100, 200, 400, 800]
    at = lambda *ratios: [[r] for r in ratios]  # noqa: E731
    assert crossover(lengths, at(4, 2, 0.5, 0.1)) == [pytest.approx(200 * 2**0.5)]
    assert crossover(lengths, at(0.5, 2, 1.0, 0.5)) == [pytest.approx(400)]  # faster at 100 does not count
    assert (
        crossover(lengths, at(0.9, 0.8, 0.7, 1.0)) == "below 100" and crossover(lengths, at(9, 9, 9, 2)) == "above 800"
    )
    assert crossover(lengths, [[4, 0.5], [2, 0.5], [0.5, 0.5], [0.1, 0.1]]) == "uncertain: below 100 to 283"
    assert (
        crossover(lengths, [[9, 9, 0.5], [9, 9, 0.5], [9, 9, 0.5], [9, 9, 0.5]]) == "uncertain: below 100 to above 800"
    )
    most = [[0.5, 0.5, 0.5, 0.5, 4], [0.5] * 4 + [2], [0.5] * 5, [0.1] * 5]  # four rounds of five
    assert crossover(lengths, most) == "uncertain: below 100 to 283"
    assert crossover(lengths, [[2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 0.5]]) == "uncertain: 566 to above 800"
    two = crossover(lengths, [[4, 4], [2, 4], [0.5, 0.5], [0.1, 0.1]])
    assert two == [pytest.approx(200 * 2**0.5), pytest.approx(200 * 2 ** (2 / 3))]


@pytest.fixture
def results(tmp_path, fresh_rng):
    """`results(name, slower, drift)` writes a file as --what=ops does: rounds scatter by 3 %; the times of operators in
    `slower` are multiplied, and all by `drift`, the machine."""

    def write(name, slower, drift=1.0):
        report = tables.Report(
            bench.BenchConfig(what="ops", json=str(tmp_path / name)), Runtime("cpu", "float32", False, ""), {}
        )
        table = report.table(
            "ops", "title", "operator, T (tokens), forward (ms), of softmax (ratio), rate (tokens/s)", keys=2
        )
        for T in (1024, 4096):
            for operator, ms in {"softmax": T / 100, "gla": T / 300, "gsa": T / 200}.items():
                times = [ms * drift * slower.get(operator, 1.0) * x for x in fresh_rng.uniform(0.97, 1.03, 5)]
                table.add(operator, T, times, [1.0] * 5, [1000 * T / t for t in times])
        report.write()
        return str(tmp_path / name)

    return write


def test_compare_finds_a_planted_slow_down(results, capsys):
    """20 % in one operator, on a machine that has become 40 % slower: that operator alone is named."""
    a, b, c = results("a.json", {}), results("b.json", {"gla": 1.2}, drift=1.4), results("c.json", {}, drift=1.4)
    assert bench.main([f"--compare={a},{c}", "--fail_below=0.9"]) == 0
    assert "0.7" in capsys.readouterr().out  # the machine's own speed is shown, and not judged
    assert bench.main([f"--compare={a},{b}", "--fail_below=0.9"]) == 1
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "below 0.9" in line]
    slow = {(row[2].strip(), row[3].strip()) for row in rows}
    assert slow == {(f"gla, {T}", c) for T in (1024, 4096) for c in ("forward (ms)", "rate (tokens/s)")}
    assert bench.main([f"--compare={a},{results('d.json', {'gla': 1.2})}", "--fail_below=0.9"]) == 1
    assert bench.main([f"--compare={a},{results('e.json', {'gla': 1 / 1.2})}", "--fail_below=0.9"]) == 0
    assert bench.main([f"--compare={a},{results('f.json', {})}", "--fail_below=0.9"]) == 0
    assert bench.main([f"--compare={a},{b}"]) == 0


def test_compare_finds_a_planted_slow_down_of_an_operator(tmp_path, monkeypatch, fresh_rng, capsys):
    """From the operators to the exit status, on a clock that they alone move, read with 2 % of noise."""
    clock, factor = [0.0], {}

    def timed(step, *_, **__):
        start, clock[0] = clock[0], clock[0] + 1e-6
        step()
        return (clock[0] - start) * fresh_rng.uniform(0.98, 1.02)

    def slowed(name, plain):
        def call(call, *inputs):
            clock[0] += 0.001 * factor.get(name, 1.0)
            return call(*inputs)

        def cases(*qkv, **options):
            return {k: case._replace(call=partial(call, case.call)) for k, case in plain(*qkv, **options).items()}

        return cases

    monkeypatch.setattr(clocks, "timed", timed)
    monkeypatch.setattr(tables.Report, "measure_machine", lambda self, _: self.peaks.update(matmul_gflops=100.0))
    for name in ("softmax", "gla", "gsa"):
        monkeypatch.setitem(operators.OPERATORS, name, slowed(name, operators.OPERATORS[name]))
    options = ["--what=ops", "--shapes=1x32x1x8x8", "--operators=gla,gsa", "--rounds=5", "--device=cpu"]
    files = [str(tmp_path / name) for name in ("a.json", "b.json", "c.json")]
    for file, factor["gla"] in zip(files, (1.0, 1.2, 1.0)):
        assert bench.main([*options, f"--json={file}"]) == 0
    capsys.readouterr()
    assert bench.main([f"--compare={files[0]},{files[1]}", "--fail_below=0.9", "--json="]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "below 0.9" in line]
    assert lines and all("gla, 1 x 32" in line for line in lines)
    assert bench.main([f"--compare={files[0]},{files[2]}", "--fail_below=0.9", "--json="]) == 0


def test_ratios_of_speeds_have_the_range_that_the_rounds_allow():
    low, middle, high = speed_ratio([10.0, 11.0, 12.0], [20.0, 22.0, 30.0], "forward (ms)")
    assert (low, middle, high) == (10 / 30, 0.5, 12 / 20)
    assert speed_ratio([10.0, 12.0], [20.0, 30.0], "tokens/s") == [20 / 12, 25 / 11, 3.0]


SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--pos_emb=rope", "--vocab_size=20"]
TIMED = {
    "overview": ["--attention_type=gla,gsa", *OVERVIEW],
    "step": ["--what=step", "--attention_type=gla", *SMALL],
    "beside": ["--what=step", "--beside=softmax", "--attention_type=gla", *SMALL],
    "ops": ["--what=ops", "--shapes=1x16x1x8x8", "--operators=gla"],
    "decode": ["--what=decode", "--positions=3,9", "--tokens=4", "--attention_type=gla", *SMALL],
    "inspect": ["--what=inspect"],
}


@pytest.mark.parametrize("what", TIMED)
def test_compare_reads_what_each_measurement_wrote(what, tiny, tmp_path, monkeypatch, capsys):
    """Also where rounds cross over in one file alone, and softmax has no such length."""
    lengths = iter(([9.0, 11.0], [10.0, 12.0], [10.0, 9.0], "below 8"))  # two printed lengths of two files
    monkeypatch.setattr(layers, "crossover", lambda *_: next(lengths, "uncertain: 9 to above 32"))
    options = [*TIMED[what], "--device=cpu", "--rounds=2", "--seconds=0.01", f"--png={tmp_path / 'a.png'}"]
    if what == "inspect":
        train.main(tiny(max_iters=1, attention_type="adaptive_span", n_layer=1))
        options.append(f"--out_dir={tmp_path / 'run'}")
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    for path in (a, b):
        assert bench.main([*options, f"--json={path}"]) == 0
    for files in (f"{a},{b}", f"{b},{a}", f"{a},{a}"):
        capsys.readouterr()
        assert bench.main([f"--compare={files}"]) == 0
        measured = {line.split("|")[3].strip() for line in capsys.readouterr().out.splitlines() if line[:1] == "|"}
        assert len(measured) > 2 and not any("crossover" in column for column in measured)


NANOGPT_LIKE = """
import torch
from torch import nn
from torch.nn import functional as F

class GPTConfig:
    def __init__(self, block_size, vocab_size, n_layer, n_head, n_embd, bias, dropout):
        self.vocab_size, self.n_embd = vocab_size, n_embd

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("a line about sizes")
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def forward(self, idx, targets):
        assert idx.shape == targets.shape == (4, 16) and (idx[:, 1:] == targets[:, :-1]).all()
        loss = F.cross_entropy(self.head(self.wte(idx)).flatten(0, 1), targets.flatten())
        with open(__file__ + ".bias", "a") as f:
            f.write(f"{self.head.bias.detach().norm().item()}\\n")
        return None, loss
"""


def test_steps_beside_a_file(tmp_path, capsys):
    """It is given batches of the shape, in whole steps: its weights move before each."""
    path = tmp_path / "model.py"
    path.write_text(NANOGPT_LIKE)
    options = ["--what=step", *SMALL, "--n_layer=4", "--device=cpu", "--rounds=2", "--seconds=0.05", "--batch_size=4"]
    assert bench.main([*options, f"--beside_file={path}", f"--json={tmp_path / 'a.json'}"]) == 0
    table = json.loads((tmp_path / "a.json").read_text())["tables"]["step"]
    assert str(path) in table["title"] and len(table["rows"][0]["plain stack (ms)"]) == 2
    norms = (tmp_path / "model.py.bias").read_text().split()
    assert len(norms) > 4 and len(set(norms)) == len(norms)
    assert "a line about sizes" not in capsys.readouterr().out
    for text, says in (("x = 1", "no attribute 'GPT'"), ("def", "SyntaxError")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"--beside_file={path}: .*{says}"):
            bench.main([*options, f"--beside_file={path}", "--json="])


def test_compare_says_what_is_wrong(results, tmp_path):
    a = results("a.json", {})
    (tmp_path / "b.json").write_text("{}")
    (tmp_path / "c.json").write_text(json.dumps({"tables": {}}))
    for files, says in (
        (a, "write two files"),
        (f"{a},{tmp_path / 'b.json'}", "not a file that"),
        (f"{a},{tmp_path / 'c.json'}", "nothing that was timed"),
    ):
        with pytest.raises(ConfigError, match=says):
            bench.main([f"--compare={files}"])
    with pytest.raises(FileNotFoundError):
        bench.main([f"--compare={a},{tmp_path / 'no.json'}"])


def test_the_check_finds_a_wrong_operator(tmp_path, monkeypatch):
    options = ["--what=ops", "--shapes=1x40x2x16x16", "--rounds=1", "--seconds=0.01", "--device=cpu", "--json="]
    right = operators.OPERATORS["gsa"]

    def wrong(*qkv, **options):
        case = right(*qkv, **options)["gsa"]
        return {"gsa": case._replace(call=lambda *inputs: case.call(*inputs) * 1.01)}

    monkeypatch.setitem(operators.OPERATORS, "gsa", wrong)
    with pytest.raises(ModelError, match="gsa at T 40: its output is off by 1.0e-02"):
        bench.main([*options, "--operators=gsa"])
    assert bench.main([*options, "--operators=gsa", "--check=False"]) == 0


def test_standard_error_of_segments(fresh_rng):
    """Of equal segments it is the textbook's, of their means; of independent tokens that of the tokens, nearly."""
    nats = torch.from_numpy(fresh_rng.gamma(2.0, 1.5, 64_000))
    means = nats.view(-1, 64).mean(1)
    assert quality.standard_error(nats, 64) == pytest.approx(float(means.std() / len(means) ** 0.5), rel=1e-9)
    assert quality.standard_error(nats, 64) == pytest.approx(float(nats.std() / len(nats) ** 0.5), rel=0.15)
    lengths = torch.tensor([64] * 999 + [32, 32])
    assert quality.standard_error(nats, lengths) == pytest.approx(quality.standard_error(nats, 64), rel=0.05)
    alike = nats[:1000].repeat_interleave(64)
    assert quality.standard_error(alike, 64) == pytest.approx(8 * quality.standard_error(alike, 1), rel=0.01)
    assert quality.standard_error(nats, 64_000) is None


def test_loss_by_context():
    seen = torch.tensor([1, 2, 3, 4, 5, 8, 9])
    assert quality.loss_by_context(torch.tensor([1.0, 2, 3, 4, 5, 6, 7]), seen) == {1: 1, 2: 2, 4: 3.5, 8: 5.5, 16: 7}


def test_an_error_prints_the_rows_before_it_and_no_empty_table(tiny, tmp_path, capsys):
    train.main(tiny(max_iters=1, out_dir=tmp_path))
    capsys.readouterr()
    for splits, rows in (("vals", 0), ("val,vals", 1)):
        with pytest.raises(DataError, match="no 'vals' split: it has train, val, test"):
            bench.main(
                ["--what=quality", f"--split={splits}", f"--out_dir={tmp_path}", f"--json={tmp_path / 'b.json'}"]
            )
        out = capsys.readouterr().out
        assert ("full pass" in out) == bool(rows) and out.count(f"| {tmp_path} ") == rows


def test_quality_adds_up(tiny, text_dataset, tmp_path):
    """The parts of the loss are the loss, and what a run cost is its steps times the operations of its model."""
    train.main(tiny(max_iters=20))
    path = tmp_path / "bench.json"
    out = [f"--out_dir={tmp_path / 'run'}", f"--json={path}", f"--png={tmp_path / 'a.png'}", "--device=cpu"]
    assert bench.main(["--what=quality", *out, "--eval_stride=4"]) == 0
    tables = json.loads(path.read_text())["tables"]
    check_units(tables)
    model = GPT.from_checkpoint(str(tmp_path / "run"))
    steps = read_checkpoint(str(tmp_path / "run"))["iter_num"]
    for row, curve, cost in zip(*(tables[name]["rows"] for name in ("quality", "by context", "scaling"))):
        split = Dataset(text_dataset).split(row["split"])
        counts = {f"to {2**b} (nats/token)": 2 ** max(b - 1, 0) for b in range(5)}  # of the first window
        later = split.n_tokens - 1 - 16  # each sees 13 to 16 tokens, all in the last bin
        counts["to 16 (nats/token)"] += later
        mean = sum(curve[name] * n for name, n in counts.items()) / (split.n_tokens - 1)
        assert mean == pytest.approx(row["nats/token"], rel=1e-6)
        assert cost["loss (nats/token)"] == row["nats/token"] and cost["trained on (tokens)"] == steps * 4 * 16
        wanted = 3 * steps * 4 * model.flops(16)[1] / 1e9
        assert cost["executed in training (GFLOP)"] == pytest.approx(wanted) and wanted > 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_training_is_counted_as_the_log_has_it(tiny, labelled_dataset, tmp_path):
    """Records are as long as they are, whatever block_size; and a resumed run may have another batch."""
    keys = dict(dataset=labelled_dataset, block_size=16, log_interval=2, eval_interval=4, dropout=0.0)
    train.main(tiny(max_iters=8, batch_size=4, **keys))
    train.main(tiny(max_iters=12, batch_size=10, init_from="resume", **keys))
    folder, model = str(tmp_path / "run"), GPT.from_checkpoint(str(tmp_path / "run"))
    wanted = {4: 4 * 4, 5: 5 * 4, 8: 8 * 4, 12: 8 * 4 + 4 * 10, 14: 8 * 4 + 6 * 10}  # sequences, after so many steps

    def cost(steps):
        stored = read_checkpoint(folder) | {"iter_num": steps}
        torch.save({k: v for k, v in stored.items() if k != "path"}, tmp_path / "run" / "best.pt")
        return quality.training_cost(folder, model)

    for steps, sequences in wanted.items():
        assert cost(steps) == (6 * sequences, pytest.approx(3 * sequences * model.flops(6)[1] / 1e9))
    (tmp_path / "run" / "log.jsonl").unlink()
    assert cost(8)[0] == 6 * 8 * 10  # by the last keys
    (tmp_path / "run" / "config.json").unlink()
    assert cost(8) == (None, None)


def test_seeds_are_averaged_and_nothing_else(tiny, tmp_path, capsys):
    """Runs that differ in seed, folder and intervals of the log are one row, with their mean and deviation (n - 1); a
    run of another rate stays apart; without two alike there is no table."""
    keys = {"a": dict(seed=1), "b": dict(seed=2, log_interval=7), "c": dict(seed=3, learning_rate=2e-3)}
    for name, of in (keys | {"d": dict(seed=4, eval_interval=5), "e": dict(seed=1)}).items():
        train.main(tiny(max_iters=5, out_dir=tmp_path / name, **of))
    train.main(tiny(max_iters=5, out_dir=tmp_path / "a", init_from="resume", seed=1))
    path, png = tmp_path / "bench.json", tmp_path / "a.png"

    def tables(names):
        folders = ",".join(str(tmp_path / name) for name in names)
        options = [f"--out_dir={folders}", "--split=val", f"--json={path}", f"--png={png}", "--device=cpu"]
        assert bench.main(["--what=quality", *options]) == 0
        return json.loads(path.read_text())["tables"]

    found = tables("acbe")  # e has the seed of a
    check_units(found)
    a, c, b, _ = found["quality"]["rows"]
    both, alone = found["over seeds"]["rows"]
    assert (both["first run"], both["seeds (count)"]) == (a["folder"], 2)
    assert (alone["first run"], alone["seeds (count)"]) == (c["folder"], 1)
    for unit in ("nats/token", "bits/byte"):
        assert both[f"mean ({unit})"] == pytest.approx((a[unit] + b[unit]) / 2) and a[unit] != b[unit]
        assert both[f"standard deviation ({unit})"] == pytest.approx(abs(a[unit] - b[unit]) / 2**0.5)
        assert alone[f"mean ({unit})"] == c[unit] and alone[f"standard deviation ({unit})"] is None
    assert "over seeds" not in tables("acde")  # d was evaluated, and its best weights chosen, at other steps


def test_a_part_that_fails_or_is_stopped_loses_nothing(tmp_path, monkeypatch, capsys):
    """The file is there after each part, also with what the failed one had measured; the others go on."""
    path, seen, stop = tmp_path / "bench.json", [], False

    def measure(what, explicit, bench, runtime, report):
        seen.append((what, set(json.loads(path.read_text())["tables"]) if path.exists() else set()))
        with report.table(what, "title", "name, time (ms)") as table:
            if what != "step":
                table.add("a", [1.0, 2.0])
            if what == "ops":
                raise KeyboardInterrupt if stop else RuntimeError("out of\nluck")

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(tables.Report, "measure_machine", lambda *_: None)
    assert bench.main(["--what=all", "--device=cpu", f"--json={path}"]) == 1
    assert "\nops failed: RuntimeError: out of luck\n" in capsys.readouterr().out
    parts = ["overview", "ops", "step", "decode"]
    assert seen == [(what, set(parts[:i])) for i, what in enumerate(parts)]
    found = json.loads(path.read_text())
    assert list(found["tables"]) == parts
    assert found["tables"]["ops"]["rows"] and found["notes"] == ["ops failed: RuntimeError: out of luck"]
    stop = True
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--what=all", "--device=cpu", f"--json={path}"])
    found = json.loads(path.read_text())
    assert list(found["tables"]) == ["overview", "ops"] and found["notes"] == ["ops was interrupted"]
    with pytest.raises(KeyboardInterrupt):  # by itself too
        bench.main(["--what=ops", "--device=cpu", f"--json={path}"])
    assert list(json.loads(path.read_text())["tables"]) == ["ops"]
    stop = False
    with pytest.raises(RuntimeError):  # one part alone: a bug shows its traceback
        bench.main(["--what=ops", "--device=cpu", f"--json={path}"])


def test_no_share_of_what_a_cache_gave():
    report = tables.Report(bench.BenchConfig(), Runtime("cpu", "float32", False, ""), {})
    report.peaks = {"matmul_gflops": 100.0, "copy_gb_s": 10.0}
    assert report.share_of_bandwidth(1e9, [0.2, 0.4]) == [0.5, 0.25]
    assert report.share_of_bandwidth(1e9, [0.2, 0.09]) == "above 1: from caches"
    assert report.share_of_peak(1e9, [0.06]) == [0.5] and report.share_of_peak(None, [0.06]) is None


def test_bytes_that_a_token_reads():
    """The matrices once, the state of a fixed size, and keys and values up to the token's own."""
    shape = dict(block_size=32, vocab_size=20, n_layer=2, n_head=2, n_embd=16, pos_emb="rope")
    for name, state in (("gla", 2 * 8 * 16), ("softmax", 2 * 2 * 2 * 9 * 8), ("none", 0)):
        lm = GPT(GPTConfig(attention_type=name, **shape)).eval()
        state_of = lm.init_state(1)
        lm.step(torch.randint(20, (1, 8)), state_of)
        keys, size = decoding.keys_read(lambda: lm.step(torch.randint(20, (1, 1)), state_of))  # noqa: B023
        weights = sum(p.numel() for p in lm.parameters() if p.dim() == 2)  # the embedding is the output matrix
        assert size + decoding.fixed_bytes(lm, state_of.layers) == 4 * (weights + state)
        assert keys == (2 * 2 * 9 if name == "softmax" else 0)


@pytest.mark.parametrize("name", ATTENTION)
def test_each_timed_token_comes_after_the_named_ones(name, tmp_path, monkeypatch):
    """Every call of a row starts from the same state, whatever a step replaces in it or changes in place."""
    plain, step, calls, rows = clocks.timed, GPT.step, [], []

    def watched(self, idx, state):
        before = state.pos
        logits, state = step(self, idx, state)
        calls.append((before, logits.clone()))
        return logits, state

    def timed(call, seconds, *rest, **options):
        calls.clear()
        for _ in range(3):
            plain(call, 0.0, *rest, **options)
        rows.append([*calls])
        return 0.001

    monkeypatch.setattr(GPT, "step", watched)
    monkeypatch.setattr(clocks, "timed", timed)
    monkeypatch.setattr(tables.Report, "measure_machine", lambda self, _: self.peaks.update(copy_gb_s=100.0))
    options = ["--what=decode", "--positions=7,20", "--tokens=2", "--rounds=1", "--device=cpu", "--json="]
    bench.main([*options, *SMALL, f"--attention_type={name}"])
    rows = [row for row in rows if row]
    assert len(rows) == 4 * 2 * len({name, "softmax"})
    for row in rows:
        assert len(row) == 3 and {pos for pos, _ in row} in ({7}, {20})
        assert all(torch.equal(logits, row[0][1]) for _, logits in row)


@pytest.mark.parametrize("name", ATTENTION)
def test_a_layer_decodes_after_the_same_tokens_each_time(name, fresh_rng):
    layer = layers.Layer.make(name, 24, layers.LAYER, 1, Runtime("cpu", "float32", False, ""))
    decode, state = layer.decoder()
    inputs = clocks.fresh(state)
    found = [decode(*inputs()) for _ in range(3)]
    tokens = torch.cat((layer.x[:, 1:], layer.x[:, :1]), 1)
    expected = layer.attn.eval()(tokens)[0][:, -1:]
    for y in found:
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_all_that_needs_no_run(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(bench, "measure", lambda what, *_: done.append(what))
    monkeypatch.setattr(tables.Report, "measure_machine", lambda *_: done.append("machine"))
    assert bench.main(["--what=all", "--device=cpu", "--out_dir=x"]) == 0
    assert done == ["machine", "overview", "ops", "step", "decode", "quality", "curves"]
    with pytest.raises(ConfigError, match="--png"):
        bench.main(["--what=all", "--png=a.png"])


def test_the_clock(monkeypatch):
    """One thread's processor time where nothing but arithmetic is timed; else the monotonic clock."""
    assert clocks.clock_name("cpu") == "process_time"  # the tests' one thread
    assert {clocks.clock_name("cpu", statistics.mean), clocks.clock_name("mps")} == {"perf_counter"}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert clocks.clock_name("cpu") == "perf_counter"


def test_rounds_take_turns():
    calls, seen = {name: (lambda name=name: seen.append(name)) for name in "abc"}, []
    times = clocks.interleaved(calls, 3, 0.0, Runtime("cpu", "float32", False, ""), "test")
    order = [name for i, name in enumerate(seen) if i == 0 or seen[i - 1] != name]
    assert "".join(order).startswith("cbabcba") and {name: len(t) for name, t in times.items()} == dict.fromkeys(
        "abc", 3
    )
    times = clocks.interleaved(calls, 9, 0.0, Runtime("cpu", "float32", False, ""), "test", until=0.0)
    assert {len(t) for t in times.values()} == {2}  # out of time: the first two rounds


def test_what_is_written_goes_to_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench.main([*OVERVIEW, "--attention_type=none"]) == 0
    assert "sweep" in json.loads((tmp_path / "out" / "bench.json").read_text())["tables"]
    assert (tmp_path / "out" / "bench.png").read_bytes()[:4] == b"\x89PNG" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("path", sorted(Path(tables.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_each_measurement_is_a_short_file_that_needs_no_door(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith('"""') and len(text.splitlines()) <= 300
    assert not re.search(r"^(import|from) bench\b", text, re.M)


def test_a_new_operator_needs_its_kernel_alone(tmp_path, monkeypatch):
    """What operators.py reads of a module is its CASES; what they give is timed and checked."""
    case = operators.OPERATORS["gla"]
    monkeypatch.setitem(operators.OPERATORS, "new", lambda *qkv, **options: {"new": case(*qkv, **options)["gla"]})
    options = ["--what=ops", "--shapes=1x33x1x8x8", "--operators=new", "--rounds=1", "--seconds=0.01", "--device=cpu"]
    assert bench.main([*options, f"--json={tmp_path / 'a.json'}"]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["tables"]["ops"]["rows"]
    assert [row["operator"] for row in rows] == ["softmax", "new"]
    modules = [importlib.import_module(f"kernels.{name}") for name in kernels.MODULES]
    assert {name for module in modules for name in module.CASES} <= operators.OPERATORS.keys()
