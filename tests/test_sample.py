"""sample.py and bench.py as a user runs them, on a checkpoint trained for a moment."""

import json
import re

import pytest
import torch

import bench
import config
import sample
import train
from data import DataError, SymbolsCodec
from model import GPT


@pytest.fixture
def checkpoint(tiny, tmp_path, capsys):
    train.main(tiny(max_iters=30, lr_decay_iters=30, learning_rate=3e-3))
    capsys.readouterr()
    return f"--out_dir={tmp_path / 'run'}"


def text_of(capsys, *arguments):
    assert sample.main(["--device=cpu", "--max_new_tokens=40", *arguments]) == 0
    return capsys.readouterr().out


def test_stream_equals_the_batch(checkpoint, capsys):
    """One sample is streamed, several are drawn at once; greedy, all are the same text, cached or not."""
    streamed = text_of(capsys, checkpoint, "--start=word1 word2", "--temperature=0")
    assert streamed.startswith("word1 word2") and len(streamed.encode()) >= 52
    assert text_of(capsys, checkpoint, "--start=word1 word2", "--temperature=0", "--use_cache=False") == streamed
    batch = text_of(capsys, checkpoint, "--start=word1 word2", "--temperature=0", "--num_samples=3")
    assert batch == (streamed + "-" * 80 + "\n") * 3


def test_seed_and_limits(checkpoint, capsys):
    a, b, c = (text_of(capsys, checkpoint, f"--seed={s}", "--temperature=1.0") for s in (1, 1, 2))
    assert a == b != c
    greedy = text_of(capsys, checkpoint, "--temperature=0")
    assert text_of(capsys, checkpoint, "--top_k=1") == greedy == text_of(capsys, checkpoint, "--top_p=0.000001")


def test_prompt_from_a_file(checkpoint, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("wörd ☃", encoding="utf-8")
    assert text_of(capsys, checkpoint, f"--start=FILE:{tmp_path / 'prompt.txt'}").startswith("wörd ☃")
    (tmp_path / "prompt.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(config.ConfigError, match="not UTF-8"):
        sample.main([checkpoint, f"--start=FILE:{tmp_path / 'prompt.txt'}"])
    with pytest.raises(FileNotFoundError):
        sample.main([checkpoint, f"--start=FILE:{tmp_path / 'missing.txt'}"])
    with pytest.raises(config.ConfigError, match="empty"):
        sample.main([checkpoint, "--start="])


def test_unfinished_characters_wait(capsys):
    class Codec:
        def decode_bytes(self, ids):
            return bytes(ids)

    tokens = [torch.tensor([[b]]) for b in "é☃".encode() + b"\xe2\x98"]
    sample.print_stream("> ", iter(tokens), Codec())
    assert capsys.readouterr().out == "> é☃\N{REPLACEMENT CHARACTER}\n"


def test_symbols_outside_the_vocabulary_are_named(tiny, tmp_path, capsys):
    folder = str(tmp_path / "symbols")
    dataset = bench.random_dataset(folder, vocab_size=12, n=3000)
    assert isinstance(dataset.codec, SymbolsCodec)
    train.main(tiny(dataset=folder, max_iters=1, vocab_size=64))
    capsys.readouterr()
    run = f"--out_dir={tmp_path / 'run'}"
    with pytest.raises(DataError, match="'99'"):
        sample.main([run, "--start=3 99 4"])
    words = text_of(capsys, run, "--start=3 4", "--temperature=5.0", "--top_k=None").split()
    assert len(words) == 41 or len(words) == 42
    assert all(0 <= int(word) < 12 for word in words[2:]), "an id of the padded vocabulary was drawn"


def test_foreign_folder_needs_a_codec(checkpoint, tmp_path):
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(config.ConfigError, match="--dataset"):
        sample.main([checkpoint])


def test_quality_is_the_full_pass(checkpoint, text_dataset, tmp_path, capsys):
    bench.main(["--what=quality", checkpoint, "--split=val", "--eval_stride=4", "--device=cpu"])
    row = capsys.readouterr().out.splitlines()[-1].split(" | ")
    split = train.Dataset(text_dataset).split("val")
    scores = train.evaluate(
        GPT.from_checkpoint(str(tmp_path / "run")), split, 16, 4, 3, config.resolve_device("cpu", "auto")
    )
    assert row[4] == "val" and row[5] == f"{scores['loss']:.6f}" and row[6] == f"{scores['bits_per_byte']:.6f}"


def test_step_and_decode_print_their_figures(capsys):
    tiny = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32", "--rounds=2", "--device=cpu"]
    assert bench.main(["--what=step", "--batch_size=2", "--seconds=0.02", *tiny]) == 0
    out = capsys.readouterr().out
    per_token = 6 * (12 * 32**2 + 3 * 32 + 256 * 32) + 12 * 32 * 32
    assert f"{per_token / 1e6:.2f} MFLOP a token" in out
    rate, peak, share = (float(re.search(p, out)[1].replace(",", "")) for p in (
        r"ms, ([\d,]+) \(", r"peak   ([\d,]+) GFLOP", r"of the peak   ([\d.]+)"))  # fmt: skip
    assert share == pytest.approx(rate * per_token / (peak * 1e9), abs=0.01)
    assert bench.main(["--what=decode", "--tokens=50", *tiny]) == 0
    assert "same greedy text: True" in capsys.readouterr().out


def test_operators_beside_softmax_and_the_naive_loops(capsys):
    options = ["--shapes=1x40x2x16x24,2x33x1x16x16", "--rounds=1", "--seconds=0.01", "--device=cpu", "--peers=true"]
    assert bench.main(["--what=ops", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")][1:]
    ours = [*bench.OPERATORS, "performer", "span 256", "mask_mix of 5"]
    names = [*ours, "gla, fla naive", "gsa, fla naive"]
    assert [row[0] for row in rows] == [name for name in names if name != "nsa"] + names  # nsa wants values like keys
    assert rows[0][4].startswith("1.000") and all(float(row[3].split()[0].replace(",", "")) > 0 for row in rows)
    errors = [float(re.search(r"by (\S+) of its norm", line)[1]) for line in lines if "differs" in line]
    assert len(errors) == 4 and max(errors) < 1e-5
    with pytest.raises(config.ConfigError, match="--shapes"):
        bench.main(["--what=ops", "--shapes=2x3"])


def test_decoding_costs_by_position_and_state_size(capsys):
    tiny = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--rounds=1", "--device=cpu"]
    options = ["--what=decode", "--attention_type=gla", "--pos_emb=none", "--tokens=5", "--seconds=0.05"]
    assert bench.main([*options, *tiny]) == 0
    out = capsys.readouterr().out
    assert out.count(f"state {2 * 16 * 32 * 4:,} bytes") == 2  # two layers of one head, 16 x 32 floats
    assert "late / early" in out


def test_curves_write_a_picture(checkpoint, tmp_path):
    assert bench.main(["--what=curves", checkpoint, f"--png={tmp_path / 'a' / 'curves.png'}"]) == 0
    assert (tmp_path / "a" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "run" / "log.jsonl").write_text(json.dumps({"iter": 0, "split": "val", "val_loss": 1.0}) + "\n")
    with pytest.raises(config.ConfigError, match="log.jsonl"):
        bench.main(["--what=curves", checkpoint])
