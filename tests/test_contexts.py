"""Scores at several sizes of the context, beyond the one in training too."""

import json

import pytest
import torch
from conftest import check_units

import bench
import compare
import config
import train
from data import Dataset
from data.scoring import context_sizes, evaluate
from model import ATTENTION, GPT, GPTConfig

SIZES = "8,16,48"


def bits(folder, dataset, context, split="val", stride=None):
    runtime = config.resolve_device("cpu", "float32")
    split = Dataset(dataset).split(split)
    return evaluate(GPT.from_checkpoint(folder).eval(), split, context, stride or context, 4, runtime)["bits_per_byte"]


@pytest.fixture
def trained(tiny, tmp_path, capsys):
    """`trained(name, **keys)`: the folder of a run of 10 steps in a context of 16."""

    def run(name, **keys):
        train.main(tiny(out_dir=str(tmp_path / name), max_iters=10, lr_decay_iters=10, **keys))
        capsys.readouterr()
        return str(tmp_path / name)

    return run


def cells(out):
    """The rows of the Markdown table in what was printed."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


@pytest.mark.parametrize("name", ATTENTION)
def test_every_type_goes_beyond_its_block(name, text_dataset):
    """Without learned positions; a token is scored by what its window holds, however long that is."""
    keys = dict(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=32, attention_type=name, pos_emb="rope")
    model, runtime = GPT(GPTConfig(**keys)).eval(), config.resolve_device("cpu", "float32")
    split = Dataset(text_dataset).split("test")
    for n in (16, 64):
        x = torch.from_numpy(split.tokens.astype("int64"))
        total = 0.0
        for start in range(0, len(x) - 1, n):
            part = x[start : start + n + 1]
            logits = model(part[None, :-1], part[None, 1:])[0].double()
            total -= logits[0].log_softmax(-1).gather(1, part[1:, None]).sum().item()
        assert evaluate(model, split, n, n, 3, runtime)["loss"] == pytest.approx(total / (len(x) - 1), rel=1e-5)


def test_eval_only_makes_one_table_and_one_figure(trained, tiny, text_dataset, tmp_path, capsys):
    folder = trained("rope", pos_emb="rope")
    keys = dict(out_dir=folder, pos_emb="rope", init_from="resume", eval_only=True, eval_stride=8)
    assert train.main(tiny(eval_context=SIZES, **keys)) == 0
    out = capsys.readouterr().out
    rows = cells(out)
    assert [(row["folder"], row["split"], row["trained in (tokens)"]) for row in rows] == [
        (folder, "val", "16"), (folder, "test", "16")
    ]  # fmt: skip
    for row in rows:
        for n in (8, 16, 48):
            assert float(row[f"{n} (bits/byte)"]) == pytest.approx(
                bits(folder, text_dataset, n, row["split"], 8), abs=6e-5
            )
    assert out.count("bits per byte, token perplexity") == 6
    assert (tmp_path / "rope" / "contexts.png").read_bytes()[:4] == b"\x89PNG"
    assert train.main(tiny(**keys | dict(eval_context=48))) == 0  # one number: a line a split, as ever
    assert "|" not in capsys.readouterr().out


def test_learned_positions_end(trained, tiny, text_dataset, capsys):
    folder = trained("learned")
    keys = dict(out_dir=folder, init_from="resume", eval_only=True)
    train.main(tiny(eval_context=SIZES, **keys))
    out = capsys.readouterr().out
    assert "no score at a context of 48: learned positions end at block_size=16\n" in out
    assert float(cells(out)[0]["16 (bits/byte)"]) == pytest.approx(bits(folder, text_dataset, 16), abs=6e-5)
    for sizes in ("32,64", "32"):
        with pytest.raises(config.ConfigError, match=f"eval_context={sizes}: .*learned positions end at block_size=16"):
            train.main(tiny(eval_context=sizes, **keys))


def test_quality_of_several_contexts(trained, text_dataset, tmp_path, capsys):
    """A row for each run and split; of each only what its positions allow."""
    folders = trained("learned"), trained("none", pos_emb="none", attention_type="gla"), trained("rope", pos_emb="rope")
    options = ["--what=quality", f"--out_dir={','.join(folders)}", "--device=cpu", f"--png={tmp_path / 'a' / 'b.png'}"]
    assert bench.main([*options, f"--eval_context={SIZES}", f"--json={tmp_path / 'bench.json'}"]) == 0
    assert f"{folders[0]}: no score at a context of 48: learned positions" in capsys.readouterr().out
    tables = json.loads((tmp_path / "bench.json").read_text())["tables"]
    check_units(tables)
    rows = tables["contexts"]["rows"]
    assert list(tables) == ["contexts"] and [(r["folder"], r["split"]) for r in rows] == [
        (folder, split) for folder in folders for split in ("val", "test")
    ]
    for row in rows:
        for n in (8, 16, 48):
            expected = (
                None if n == 48 and row["folder"] == folders[0] else bits(row["folder"], text_dataset, n, row["split"])
            )
            assert row[f"{n} (bits/byte)"] == (expected and pytest.approx(expected, rel=1e-6))
    assert (tmp_path / "a" / "b.png").read_bytes()[:4] == b"\x89PNG"
    assert bench.main([*options, "--eval_context=8", "--split=val", f"--json={tmp_path / 'one.json'}"]) == 0
    assert {"quality", "scaling"} <= json.loads((tmp_path / "one.json").read_text())["tables"].keys()


def test_sizes_are_numbers(tiny, labelled_dataset, text_dataset, tmp_path):
    assert context_sizes(0) == [0] and context_sizes("64, 8,64") == [8, 64]
    for value, wrong in (
        ("many", "write one number, or several with commas"), ("8,", "write one number, or several with commas"),
        ("8,16.5", "write one number, or several with commas"), ("0,8", "sizes of a context are from 1"),
        ("8,-1", "sizes of a context are from 1"), ("8,99999999999", "sizes of a context are from 1"),
        (-1, "must be at least 0"), ("", "write one number"),
    ):  # fmt: skip
        for call in (train.main, lambda argv: bench.main(["--what=quality", "--out_dir=a", argv[-1]])):
            with pytest.raises(config.ConfigError, match=f"eval_context.*{wrong}"):
                call(tiny(eval_context=value))
    with pytest.raises(config.ConfigError, match="eval_stride=16 would skip tokens: eval_context is 8,32"):
        train.main(tiny(eval_context="8,32", eval_stride=16))
    with pytest.raises(config.ConfigError, match="eval_context=8,16: write one number here"):
        compare.main([*tiny(out_dir=str(tmp_path / "c")), '--eval_context="8,16"', "--jobs=1"])
    train.main(tiny(dataset=labelled_dataset, max_iters=1))
    with pytest.raises(config.ConfigError, match="records of 6 tokens, each scored whole"):
        train.main(tiny(dataset=labelled_dataset, init_from="resume", eval_only=True, eval_context="6,12"))
    (tmp_path / "c.py").write_text('eval_context = "8, 16"\n')
    assert config.load([str(tmp_path / "c.py")], train.TrainConfig)[0].eval_context == "8, 16"
