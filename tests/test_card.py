"""The card: cells that are run once, learning rates chosen on val, the table and the figure from JSON alone."""

import copy
import json
import re
import statistics

import pytest
import torch
from test_data import one_line

import compare
from benchmarks import card, cells
from benchmarks.cells import Stage
from config import ConfigError
from model import ATTENTION, GPTConfig

SHAPE = "--device=cpu --dtype=float32 --n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4"
SCHEDULE = "--max_iters=6 --warmup_iters=2 --eval_interval=3 --eval_iters=2 --min_lr=1e-5 --log_interval=2"
SHORT = "--part=language", "--types=none", "--jobs=2"


def stages(dataset, more=""):
    tiny = f"{SHAPE} {SCHEDULE} --dataset={dataset} --learning_rate=1e-2,1e-4 {more}"
    rates = ("language", "rates")
    return {
        "language": [Stage("rates", f"{tiny} --seed=1", "val"), Stage("enwik8", f"{tiny} --seed=1,2", "test", rates)],
        "length": [Stage("longer", f"{tiny} --seed=1", "test", rates, (2, 4))],
    }


@pytest.fixture
def started(monkeypatch):
    """The runs that were started, in order."""
    labels, start = [], compare.Run.start
    monkeypatch.setattr(compare.Run, "start", lambda run, *a: labels.append(run.label) or start(run, *a))
    return labels


def read(folder, part="language"):
    return json.loads((folder / f"{part}.json").read_text())["cells"]


def without_time(found):
    return [{k: v for k, v in cell.items() if "seconds" not in k} for cell in found]


@pytest.mark.slow
def test_a_part_is_run_once(text_dataset, tmp_path, monkeypatch, started, capsys):
    """Also in a fresh clone; the runs of a stage serve the next; with other settings a cell is run again."""
    monkeypatch.setattr(card, "PARTS", stages(text_dataset, "--pos_emb=rope"))
    where = [f"--folder={tmp_path / 'json'}", f"--out_dir={tmp_path / 'out'}"]
    assert card.main([*SHORT, *where]) == 0
    assert len(started) == 3, "two learning rates, and one more seed of the better one"
    found = read(tmp_path / "json")
    rates = {c["learning rate"]: c["score"]["nats/token"] for c in found if c["stage"] == "rates"}
    scored = [c for c in found if c["stage"] == "enwik8"]
    assert {(c["learning rate"], c["seed"]) for c in scored} == {(min(rates, key=rates.get), seed) for seed in (1, 2)}
    for cell in found:
        assert cell["attention"] == "none" and cell["parameters"] > 0 and cell["seconds"] >= 0 and cell["commit"]
        assert cell["settings"]["max_iters"] == 6 and "n_layer" in cell["settings"] and "bias" not in cell["settings"]
        assert max(map(int, cell["score"]["by position"])) == 16
    monkeypatch.setattr(card, "code_commit", lambda: "of later code")
    assert card.main(["--part=length", "--types=none", *where]) == 0 and len(started) == 3
    (longer,) = read(tmp_path / "json", "length")
    assert longer["commit"] == cells.git_commit() != "of later code", "a run keeps the commit that trained it"
    by_context = longer["score"]["by context"]
    assert [*by_context] == ["16", "32", "64"] and max(map(int, longer["score"]["by position"])) == 64
    assert by_context["16"] == next(c["score"]["bits/byte"] for c in scored if c["seed"] == 1)
    capsys.readouterr()
    elsewhere = [f"--folder={tmp_path / 'json'}", f"--out_dir={tmp_path / 'clone'}"]
    assert card.main([*SHORT, *elsewhere]) == 0 and card.main(["--part=length", "--types=none", *elsewhere]) == 0
    assert len(started) == 3 and capsys.readouterr().out.count(": 0 runs are missing") == 3
    monkeypatch.setattr(card, "PARTS", stages(text_dataset, "--pos_emb=rope --beta1=0.8"))
    assert card.main([*SHORT, *elsewhere]) == 0
    assert len(started) == 6 and len(read(tmp_path / "json")) == len(found), "new cells stand in place of the old ones"


@pytest.mark.slow
def test_a_cut_part_goes_on_to_the_same_digits(text_dataset, tmp_path, monkeypatch, started, capsys):
    monkeypatch.setattr(card, "PARTS", {"language": stages(text_dataset)["language"][:1]})
    whole, cut = ([f"--folder={tmp_path / name}", f"--out_dir={tmp_path / name / 'out'}"] for name in ("whole", "cut"))
    assert card.main([*SHORT, *whole]) == 0 and len(started) == 2
    assert card.main([*SHORT, *cut, "--budget=1"]) == 0
    assert "the same command goes on" in capsys.readouterr().out and not (tmp_path / "cut" / "language.json").exists()
    assert card.main([*SHORT, *cut]) == 0
    assert without_time(read(tmp_path / "whole")) == without_time(read(tmp_path / "cut"))


def test_the_identity_of_a_cell():
    """What decides a result and no default, so that a key that comes later makes no cell another; and the data."""
    model, train = {"n_layer": 3, "bias": False, "plugin": "a.py"}, {"seed": 5, "learning_rate": 6e-4}
    settings = cells.changed(model, train)
    assert settings == {"n_layer": 3, "seed": 5}
    assert cells.changed(model | {"gla_gate_rank": GPTConfig().gla_gate_rank, "of later": 1}, train) == settings
    ids = {cells.identity(settings, "data", "val"), cells.identity(settings, "data", "test")}
    ids |= {cells.identity(settings | {"seed": 6}, "data", "val"), cells.identity(settings, "other", "val")}
    assert len(ids) == 4 and cells.identity(dict(reversed(settings.items())), "data", "val") in ids


def test_the_best_rate_needs_all_of_them():
    def cell(name, rate, score, stage="rates"):
        score = {"failure": "not finite"} if score is None else {"nats/token": score}
        return {"stage": stage, "attention": name, "learning rate": rate, "score": score}

    found = [cell("gla", 1e-3, 2.0), cell("gla", 3e-3, 1.5), cell("gsa", 1e-3, 1.0), cell("gsa", 3e-3, 0.5, "x")]
    found += [cell("gdn", 1e-3, 1.1), cell("gdn", 3e-3, None), cell("kda", 1e-3, None), cell("kda", 3e-3, None)]
    assert cells.best_rates(found, "rates", {1e-3, 3e-3}) == {"gla": 3e-3, "gdn": 1e-3}


@pytest.mark.slow
def test_every_part_can_be_planned():
    """All types, the hybrids as patterns that have both of their types, and equal parameters within 1 %."""

    class text:
        vocab_size = 256

    for part, found in card.PARTS.items():
        for stage in found:
            runs, _ = cells.planned(stage, lambda name: text)
            assert {run.row for run in runs} == {*ATTENTION, *cells.HYBRIDS}
            for run in runs:
                own = {*run.model.types()[: run.model.n_layer]}
                assert len(own) == 1 + ("," in run.row), (part, run.label)
            if "--equal_params" in stage.argv:
                counts = [cells.comparison.outline(run.model, 256).num_params() for run in runs]
                assert max(counts) / min(counts) < 1.02
            assert {run.cfg.dtype for run in runs} == {"float32"}


def cell(stage, name, seed, **score):
    return {"stage": stage, "attention": name, "learning rate": 1e-3, "seed": seed, "id": f"{stage}{name}{seed}"} | {
        "score": score
    }


@pytest.fixture
def half(tmp_path):
    """Some cells of two types, and one that failed."""
    recall = {pairs: 1 / i for i, pairs in enumerate(card.PAIRS.values(), 1)}
    for part, found in {
        "language": [
            *(cell("enwik8", "gla", seed, **{"bits/byte": bits}) for seed, bits in enumerate((2.5, 2.6, 2.7))),
            cell("enwik8", "softmax", 1, **{"bits/byte": 2.75}),
            cell("enwik8", "kda", 1, failure="not finite"),
        ],
        "recall": [cell("recall", "softmax", 1, **{"by part": recall})],
        "length": [cell("longer", "gla", 1, **{"by context": {"16": 3.0, "128": 3.5, "64": 3.2}})],
    }.items():
        for one in found:
            cells.save(tmp_path, part, one)
    return tmp_path


def test_the_table_of_a_half_finished_card(half):
    header, _, *rows = card.table(card.Card(half))
    rows = {re.match(r"\| `(.*?)`", row)[1]: [c.strip() for c in row.split("|")[2:-1]] for row in rows}
    assert {*rows} == {*ATTENTION, *cells.HYBRIDS} and [*rows][:2] == ["gla", "softmax"]
    headings = [h.strip() for h in header.split("|")[2:-1]]
    table = {name: dict(zip(headings, cell)) for name, cell in rows.items()}
    assert table["gla"]["language: enwik8 (bits/byte)"] == "**2.600** ± 0.100 (3)"
    assert table["softmax"]["language: enwik8 (bits/byte)"] == "2.750"
    assert table["kda"]["language: enwik8 (bits/byte)"] == table["gsa"]["state: parity"] == "-"
    assert table["softmax"]["recall: 8 pairs"] == "**0.50**" and table["gla"]["recall: 8 pairs"] == "-"
    assert table["gla"]["length: 8 times (bits/byte more)"] == "**+0.500**"
    assert table["softmax"]["cost: time at 8,192 (softmax's)"] == "1.00"
    assert all(set(row.values()) - {"-"} for name, row in table.items() if name in ATTENTION), "costs are all there"
    assert not any("**" in text for text in rows["none"])


def test_a_pattern_costs_the_mean_of_its_layers(half):
    found, mixed = card.Card(half), "gla,gla,gla,softmax"
    for column, mean in (("of softmax (ratio)", statistics.mean), ("decoding (tokens/s)", statistics.harmonic_mean)):
        (gla,), (softmax,) = (found.cost(name, 8192, column) for name in ("gla", "softmax"))
        assert found.cost(mixed, 8192, column) == pytest.approx([mean([gla] * 3 + [softmax])])
    assert found.cost("gla,unknown", 8192, "of softmax (ratio)") == []


@pytest.mark.parametrize("which, best", [("low", "**1.00**"), ("high", "**3.00**")])
def test_what_most_types_share_is_not_the_best(which, best):
    scores = {"none": [0.0], "gla": [1.0], "gsa": [2.0], "nsa": [3.0], "kda": []}
    (found,) = card.cells([("a", "b", which, ".2f", scores)]).values()
    assert [text for text in found.values() if "**" in text] == [best]
    scores |= {"gla": [2.0], "kda": [2.0]}
    for same in (scores, {**scores, "nsa": [2.0]}):
        (found,) = card.cells([("a", "b", which, ".2f", same)]).values()
        shared = found["gsa"] == "**2.00**"
        assert not shared and found["gla"] == found["gsa"] == found["kda"]


def test_the_figure_of_a_half_finished_card(half, tmp_path, capsys):
    assert card.main([f"--folder={half}", f"--png={tmp_path / 'card.png'}"]) == 0
    assert "| `gla` |" in capsys.readouterr().out
    assert (tmp_path / "card.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "none").mkdir()
    assert card.main([f"--folder={tmp_path / 'none'}", f"--png={tmp_path / 'empty.png'}"]) == 0


def test_cells_of_one_place_replace_each_other(tmp_path):
    for seed, bits in ((1, 2.5), (2, 2.6), (1, 2.4)):
        cells.save(tmp_path, "long", cell("x", "gla", seed, **{"bits/byte": bits}))
    found = cells.cells_of(tmp_path, "long")
    assert statistics.mean(c["score"]["bits/byte"] for c in found) == pytest.approx(2.5) and len(found) == 2


def test_cost_is_nothing_to_run(tmp_path, capsys):
    assert card.main(["--part=cost", "--types=", f"--folder={tmp_path}", f"--out_dir={tmp_path}"]) == 0
    assert "docs/bench.json" in capsys.readouterr().out and not any(tmp_path.iterdir())


def test_mistakes_are_one_line(tmp_path):
    for argv, part in (
        (["--part=state", "--types=glaa"], "--types: glaa is none of softmax"),
        (["--part=languages"], "language"),
    ):
        with pytest.raises((ConfigError, card.DataError)) as error:
            card.main([*argv, f"--folder={tmp_path}", f"--out_dir={tmp_path}"])
        one_line(error, part)
    (tmp_path / "recall.json").write_text("{")
    with pytest.raises(ConfigError) as error:
        card.main([f"--folder={tmp_path}"])
    one_line(error, "recall.json is damaged")


def test_the_committed_cells():
    """Each is whole: what it was, what it scored, and which code it was."""
    for part, found in card.PARTS.items():
        known, names = cells.cells_of(f"{cells.comparison.ROOT}/docs/card", part), {stage.name for stage in found}
        for one in known:
            assert one["stage"] in names and one["attention"] in {*ATTENTION, *cells.HYBRIDS}
            assert one["commit"] and not one["commit"].endswith("-dirty") and one["settings"]["seed"] == one["seed"]
            assert "failure" in one["score"] or one["parameters"] > 0
        assert len({cells.place(one) for one in known}) == len(known)
        assert torch.tensor([one["score"].get("nats/token", 0.0) for one in copy.deepcopy(known)]).isfinite().all()
