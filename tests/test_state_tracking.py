"""The state tracking data set, and splits whose records have a length of their own."""

import json

import numpy as np
import pytest
import torch
from test_data import edit, one_line, prepare, script

import config
import data
import train
from config import resolve_device
from data.scoring import evaluate
from model import GPT, GPTConfig
from train import TrainConfig


def sums(tokens, modulus):
    """The targets of one sequence, added up symbol by symbol until the padding."""
    found, total = [], 0
    for token in tokens:
        if token == modulus:
            break
        total = (total + token) % modulus
        found.append(total)
    return found


def test_the_script_writes_the_sums(tmp_path, fresh_rng):
    modulus, seed = int(fresh_rng.integers(2, 9)), str(fresh_rng.integers(1000))
    options = ["--modulus", str(modulus), "--seed", seed, "--train", "3000", "--val", "400", "--test", "50"]
    run = prepare("state_tracking", *options, "--out_dir", tmp_path / "a", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "3,000 records" in run.stdout and "50 records       10,800 targets" in run.stdout
    dataset = data.Dataset(tmp_path / "a")
    assert dataset.codec.symbols == [*map(str, range(modulus)), "-"] and dataset.record_len == 40
    seen = set()
    for name, size, length in (("train", 3000, 40), ("val", 400, 40), ("test", 50, 256)):
        split = dataset.split(name)
        assert split.record_len == length and split.n_tokens == size * length
        for tokens, targets in zip(*(a.reshape(size, length).tolist() for a in (split.tokens, split.targets))):
            wanted = sums(tokens, modulus)
            seen.add((name, len(wanted)))
            assert tokens[len(wanted) :] == [modulus] * (length - len(wanted))
            if name == "test":
                assert targets == [-1] * 40 + wanted[40:]
            else:
                assert targets == wanted + [-1] * (length - len(wanted))
    assert seen >= {("train", n) for n in range(3, 41)} | {("test", 256)} and not {("train", 2), ("test", 255)} & seen
    script("state_tracking").main([*options, "--out_dir", str(tmp_path / "b")])
    for file in ("meta.json", "train.bin", "train.targets.bin", "test.targets.bin"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_symbols_and_answers_are_even(fresh_rng):
    tokens, targets = script("state_tracking").generate(fresh_rng, 4000, 3, 3, 20)
    for numbers in (tokens[tokens < 3], targets[targets >= 0]):
        share = np.bincount(numbers) / len(numbers)
        assert len(share) == 3 and np.abs(share - 1 / 3).max() < 0.02


@pytest.mark.parametrize(
    "options, part",
    [
        ("--modulus 1", "--modulus must be 2 to 1000"),
        ("--modulus 1001", "--modulus must be 2 to 1000"),
        ("--seed -1", "--seed at least 0"),
        ("--shortest 41", "must grow"),
        ("--shortest 0", "must grow"),
        ("--test_longest 40", "must grow"),
        ("--val 0", "--val must be at least 1"),
        ("--train 100000000000", "at most 50000000 symbols"),
    ],
)
def test_the_script_refuses(tmp_path, options, part):
    with pytest.raises(data.DataError) as error:
        script("state_tracking").main([*options.split(), "--out_dir", str(tmp_path)])
    one_line(error, part)
    assert not (tmp_path / "meta.json").exists()


@pytest.fixture
def small(tmp_path):
    """Records of 5 to train on and of 12 to test. Its folder."""
    sizes = dict(shortest=2, longest=5, test_longest=12, train=200, val=30, test=20)
    options = [f"--{name}={size}" for name, size in sizes.items()]
    script("state_tracking").main([*options, "--out_dir", str(tmp_path / "small")])
    return tmp_path / "small"


def test_batches_and_windows_have_their_splits_length(small):
    dataset = data.Dataset(small)
    batches = data.Batches(dataset, 12, 4, seed=1)
    assert batches.length == 5 and batches.batch("train")[0].shape == (4, 5)
    rows = {name: torch.from_numpy(dataset.split(name).tokens.reshape(-1, n).astype(int)) for name, n in
            (("train", 5), ("val", 5), ("test", 12))}  # fmt: skip
    for name, (x, y) in [("train", batches.batch("train")), *(("test", pair) for pair in batches.fixed("test", 5))]:
        assert x.shape == y.shape == (4, rows[name].size(1))
        assert all((row == rows[name]).all(1).any() for row in x), "not whole records"
    for name, whole in rows.items():
        x, y, scored = zip(*data.windows(dataset.split(name), 12, 12, 7))
        assert torch.equal(torch.cat(x), whole) and int(torch.cat(scored).sum()) == dataset.split(name).n_scored
    with pytest.raises(data.DataError) as error:
        data.Batches(dataset, 11, 4, seed=1)
    one_line(error, "block_size 11 does not hold the 12 tokens", "--block_size=12")


def test_each_split_is_scored(small):
    dataset = data.Dataset(small)
    gpt = GPT(GPTConfig(block_size=12, n_layer=1, n_head=2, n_embd=16, vocab_size=3, pos_emb="none"))
    runtime = resolve_device("cpu", "float32", False)
    for name, length in (("val", 5), ("test", 12)):
        split = dataset.split(name)
        scores = evaluate(gpt, split, 12, 12, 8, runtime)
        assert scores["context"] == length and scores["tokens"] == split.n_scored
        idx = torch.from_numpy(split.tokens.reshape(-1, length).astype(int))
        wanted = torch.from_numpy(split.targets.reshape(-1, length).astype(int))
        right = gpt.eval()(idx, wanted)[0].argmax(-1)[wanted >= 0] == wanted[wanted >= 0]
        assert scores["accuracy"] == pytest.approx(right.float().mean().item())


@pytest.mark.parametrize(
    "length, part",
    [
        (7, "split test has 240 tokens, no whole records of 7"),
        (-4, "split test has -4 for a record_len"),
        ("12", "split test has '12' for a record_len"),
        ([12], "split test has [12] for a record_len"),
        (True, "split test has True for a record_len"),
    ],
)
def test_foreign_lengths_of_a_split(small, length, part):
    meta = json.loads((small / "meta.json").read_text())
    meta["splits"]["test"]["record_len"] = length
    edit(small, splits=meta["splits"])
    with pytest.raises(data.DataError) as error:
        data.Dataset(small)
    one_line(error, part)


def test_text_has_no_records_of_its_own_length(text_dataset, tmp_path):
    for file in ("meta.json", "train.bin", "val.bin", "test.bin"):
        (tmp_path / file).write_bytes(open(f"{text_dataset}/{file}", "rb").read())
    meta = json.loads((tmp_path / "meta.json").read_text())
    meta["splits"]["test"]["record_len"] = 5
    edit(tmp_path, splits=meta["splits"])
    with pytest.raises(data.DataError) as error:
        data.Dataset(tmp_path)
    one_line(error, "split test has 5 for a record_len")


def test_the_config_trains_and_scores_both(small, tmp_path, capsys):
    arguments = ["config/train_parity.py", f"--dataset={small}", f"--out_dir={tmp_path / 'run'}", "--n_embd=16"]
    arguments += ["--attention_type=gdn", "--delta_beta_max=2.0", "--max_iters=2", "--batch_size=4", "--device=cpu"]
    assert train.main(arguments) == 0
    assert train.main([*arguments, "--init_from=resume", "--eval_only"]) == 0
    out = capsys.readouterr().out
    assert "parity val:" in out and "in records of 5" in out and "in records of 12" in out
    own, cfg, _ = config.load(["config/train_parity.py"], GPTConfig, TrainConfig)
    assert (own.n_layer, own.n_embd, cfg.dataset) == (2, 128, "state_tracking")
