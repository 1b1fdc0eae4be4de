"""Recall of many keys, splits in parts, and logits only where a record is scored."""

import json

import numpy as np
import pytest
import torch
from test_data import edit, one_line, prepare, script

import config
import data
import train
from config import resolve_device
from data import scoring
from data.scoring import evaluate
from model import GPT, GPTConfig
from train import Objective, TrainConfig


def check_record(tokens, targets, pairs, vocabulary, others):
    keys, values = tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
    assert len({*keys}) == len({*values}) == pairs
    assert max(keys) < vocabulary // 2 <= min(values) and max(values) < vocabulary
    scored = [i for i, target in enumerate(targets) if target != -1]
    assert sorted(tokens[i] for i in scored) == sorted(keys), "each key once again"
    assert all(i >= 2 * pairs and i % 2 == 0 and targets[i] == dict(zip(keys, values))[tokens[i]] for i in scored)
    rest = [token for i, token in enumerate(tokens) if i >= 2 * pairs and i not in scored]
    if others:
        assert not {*keys} & {*rest}


def test_the_script_writes_recall(tmp_path, fresh_rng):
    seed, vocabulary = str(fresh_rng.integers(1000)), int(fresh_rng.integers(20, 50)) * 2
    sizes = {"train": "64x4x300,40x10x200", "val": "16x4x50", "test": "16x2x20,40x10x30,64x2x40"}
    options = ["--seed", seed, "--vocabulary", str(vocabulary), *(f"--{k}={v}" for k, v in sizes.items())]
    run = prepare("mqar", *options, "--out_dir", tmp_path / "a", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "500 records        3,200 targets" in run.stdout
    dataset = data.Dataset(tmp_path / "a")
    assert dataset.vocab_size == vocabulary and dataset.record_len == 64
    seen = set()
    for name, text in sizes.items():
        split, wanted = dataset.split(name), [tuple(map(int, size.split("x"))) for size in text.split(",")]
        assert [(length, n) for _, length, n, _ in split.parts] == [(length, n) for length, _, n in wanted]
        tokens, targets = split.tokens.tolist(), split.targets.tolist()
        for (_, length, count, first), (_, pairs, _) in zip(split.parts, wanted):
            for at in range(first, first + length * count, length):
                check_record(tokens[at : at + length], targets[at : at + length], pairs, vocabulary, True)
                seen.add(tuple(tokens[at : at + length]))
    assert len(seen) == 640, "records differ from each other"
    script("mqar").main([*options, "--out_dir", str(tmp_path / "b")])
    for file in ("meta.json", "train.bin", "train.targets.bin", "test.targets.bin"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_gaps_follow_the_power_law(fresh_rng):
    """With one pair the x-th place is drawn with x^(a - 1); the first two of many as a draw without replacement."""
    generate = script("mqar").generate
    for power in (0.01, 1.0):
        tokens, targets = generate(fresh_rng, 40_000, 20, 1, 60, power, False)
        share = np.bincount((targets >= 0).argmax(1) // 2 - 1, minlength=9) / 40_000
        wanted = np.arange(1, 10) ** (power - 1)
        assert np.abs(share - wanted / wanted.sum()).max() < 0.015
    for any_filler in (False, True):
        tokens, targets = generate(fresh_rng, 2_000, 64, 4, 16, 0.01, any_filler)
        rest = tokens[:, 8:][targets[:, 8:] < 0]
        assert np.bincount(rest, minlength=16).min() > 0.9 * len(rest) / 16 / (1 if any_filler else 2)
        held = (tokens[:, 8:, None] == tokens[:, None, :8:2]).any(2) & (targets[:, 8:] < 0)
        assert held.any() == any_filler
        keys = np.bincount(tokens[:, 0], minlength=8) / 2_000
        assert np.abs(keys - 1 / 8).max() < 0.04


@pytest.mark.parametrize(
    "options, part",
    [
        ("--vocabulary=255", "--vocabulary must be even"),
        ("--seed=-1", "--seed at least 0"),
        ("--power=-1", "--power must be 0 to 100"),
        ("--train=64x4", "write TxNxRECORDS"),
        ("--train=64xax3", "write TxNxRECORDS"),
        ("--val=64x4x0", "write TxNxRECORDS"),
        ("--test=15x2x4", "an even T of 8 or more, not 15"),
        ("--test=64x17x4", "an even T of 68 or more, not 64"),
        ("--train=64x10x4 --vocabulary=18", "a vocabulary of 20 or more, not 18"),
        ("--test=64x4x4,64x4x5", "a size is there twice"),
        ("--train=64x4x100000000000", "at most 100000000 tokens"),
    ],
)
def test_the_script_refuses(tmp_path, options, part):
    with pytest.raises(data.DataError) as error:
        script("mqar").main([*options.split(), "--out_dir", str(tmp_path)])
    one_line(error, part)
    assert not (tmp_path / "meta.json").exists()


def test_the_script_writes_induction(tmp_path, fresh_rng):
    vocabulary, seed = int(fresh_rng.integers(3, 20)), str(fresh_rng.integers(1000))
    options = ["--vocabulary", str(vocabulary), "--seed", seed, "--length", "9", "--test", "5,30,4"]
    options += ["--train_records", "200", "--val_records", "20", "--test_records", "40"]
    run = prepare("induction", *options, "--out_dir", tmp_path / "a", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    dataset = data.Dataset(tmp_path / "a")
    assert [part[1:3] for part in dataset.split("test").parts] == [(4, 40), (5, 40), (30, 40)]
    places = set()
    for name in ("train", "val", "test"):
        split = dataset.split(name)
        tokens, targets = split.tokens.tolist(), split.targets.tolist()
        for _, length, count, first in split.parts:
            for at in range(first, first + length * count, length):
                row, wanted = tokens[at : at + length], targets[at : at + length]
                (place, last) = [i for i, token in enumerate(row) if token == vocabulary - 1]
                assert last == length - 1 and wanted == [-1] * last + [row[place + 1]]
                places.add((length, place))
    assert {place for length, place in places if length == 9} == set(range(7)) and dataset.vocab_size == vocabulary


@pytest.mark.parametrize(
    "options, part",
    [
        ("--vocabulary=2", "--vocabulary must be 3"),
        ("--length=2", "lengths at least 3"),
        ("--test=5,a", "write lengths"),
        ("--val_records=0", "--val_records must be at least 1"),
        ("--train_records=1000000000", "at most 100000000 tokens"),
    ],
)
def test_the_script_of_induction_refuses(tmp_path, options, part):
    with pytest.raises(data.DataError) as error:
        script("induction").main([*options.split(), "--out_dir", str(tmp_path)])
    one_line(error, part)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mqar")
    sizes = ["--train=12x2x60,16x4x300,12x3x140", "--val=12x2x30", "--test=12x2x25,16x4x10"]
    script("mqar").main([*sizes, "--vocabulary=20", "--out_dir", str(folder)])
    return folder


def test_a_batch_is_of_one_part(small):
    dataset = data.Dataset(small)
    batches, counts = data.Batches(dataset, 16, 6, seed=3), {}
    known = {}
    for name, length, n, first in dataset.split("train").parts:
        rows = dataset.split("train").tokens[first : first + n * length].reshape(n, length).tolist()
        known |= {tuple(row): name for row in rows}
    for _ in range(400):
        x, y = batches.batch("train")
        (name,) = {known[tuple(row)] for row in x.tolist()}
        assert x.shape == y.shape and (y >= 0).sum(1).unique().numel() == 1
        counts[name] = counts.get(name, 0) + 1
    assert abs(counts["4 pairs in 16"] / 400 - 0.6) < 0.1 and abs(counts["3 pairs in 12"] / 400 - 0.28) < 0.1
    pairs, alone = [data.Batches(dataset, 16, 3, 3, rank, 2) for rank in range(2)], data.Batches(dataset, 16, 3, seed=3)
    for _ in range(20):  # two processes that draw once see what one sees that draws twice
        for batches in pairs:
            assert torch.equal(batches.batch("train")[0], alone.batch("train")[0])


def test_each_part_is_scored(small):
    dataset = data.Dataset(small)
    gpt = GPT(GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=8, vocab_size=20)).eval()
    runtime, split, each = resolve_device("cpu", "float32", False), dataset.split("test"), []
    scores = evaluate(gpt, split, 16, 16, 7, runtime, each=each)
    assert [part["part"] for part in scores["parts"]] == ["2 pairs in 12", "4 pairs in 16"]
    hits = torch.cat([right for _, _, right in each]).float()
    for part, (first, last) in zip(scores["parts"], ((0, 50), (50, 90))):
        assert part["targets"] == last - first
        assert part["accuracy"] == pytest.approx(hits[first:last].mean().item())
    wrong = GPT(GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=8, vocab_size=20))
    assert scores["accuracy"] == pytest.approx(hits.mean().item()) and scores["tokens"] == 90
    shares = [evaluate(wrong, split, 16, 16, 7, runtime, share=(rank, 2)) for rank in range(2)]
    assert sum(s["tokens"] for s in shares) == 90


@pytest.mark.parametrize("teacher", [False, True])
def test_the_head_reads_scored_positions_alone(fresh_rng, teacher):
    """The same loss, parts and gradients as with logits everywhere, for records with different numbers of targets."""
    shape = dict(block_size=24, n_layer=2, n_head=2, n_embd=16, vocab_size=30, attention_type="gla,softmax")
    gpt, other = GPT(GPTConfig(**shape)).double(), GPT(GPTConfig(**shape)).double() if teacher else None
    answers = torch.arange(30)
    objective = Objective(gpt, other, ce_weight=0.3, answers=answers)
    x = torch.from_numpy(fresh_rng.integers(0, 30, (5, 24)))
    y = torch.from_numpy(fresh_rng.integers(0, 30, (5, 24)))
    y[torch.from_numpy(fresh_rng.random((5, 24)) < 0.8)] = -1
    y[0], y[1, 0] = -1, 3
    batch = scoring.with_places(data_of_records, x, y)
    n = int((y >= 0).sum(1).max())
    assert batch[2].shape == (5, n) and n < 24
    assert all({*np.flatnonzero(row >= 0)} <= {*places.tolist()} for row, places in zip(y.numpy(), batch[2]))
    shapes = []
    gpt.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    found = []
    for given in ((x, y), batch):
        gpt.zero_grad()
        loss, parts = objective(given, weight=1.5)
        loss.backward()
        found.append((loss, parts, [p.grad.clone() for p in gpt.parameters()]))
    assert shapes == [(5, 24, 30), (5, n, 30)]
    (loss, parts, grads), (again, same, others) = found
    assert torch.allclose(loss, again, rtol=1e-6) and parts.keys() == same.keys()
    assert all(torch.allclose(parts[name], same[name], rtol=1e-6) for name in parts)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-9) for a, b in zip(grads, others))


class data_of_records:
    record_len = 24


def test_text_keeps_its_batches():
    x = torch.zeros(2, 5, dtype=torch.long)

    class text:
        record_len = None

    assert scoring.with_places(text, x, x) == (x, x) and scoring.with_places(data_of_records, x, x) == (x, x)


@pytest.mark.parametrize(
    "parts, part",
    [
        ([], "are not names, lengths up to 16"),
        ("all", "are not names, lengths up to 16"),
        ([{"name": "a", "record_len": 16}], "are not names, lengths up to 16"),
        ([{"name": "a\n", "record_len": 16, "records": 1}], "are not names, lengths up to 16"),
        ([{"name": "a", "record_len": 12, "records": 1}], "are not names, lengths up to 16"),
        ([{"name": "a", "record_len": 16, "records": 1}], "do not add up to its 460 tokens"),
    ],
)
def test_foreign_parts(small, tmp_path, parts, part):
    for path in small.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    splits = json.loads((small / "meta.json").read_text())["splits"]
    splits["test"]["parts"] = parts
    edit(tmp_path, splits=splits)
    with pytest.raises(data.DataError) as error:
        data.Dataset(tmp_path)
    one_line(error, part)


def test_a_record_without_a_target_is_found(small, tmp_path):
    for path in small.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    targets = np.fromfile(tmp_path / "train.targets.bin", "<i4")
    targets[60 * 12 + 16 : 60 * 12 + 32] = -1  # the second record of the second part
    targets.tofile(tmp_path / "train.targets.bin")
    splits = json.loads((small / "meta.json").read_text())["splits"]
    del splits["train"]["targets_sha256"]
    edit(tmp_path, splits=splits)
    with pytest.raises(data.DataError) as error:
        data.Dataset(tmp_path).split("train")
    one_line(error, "a record without a target")


def test_the_config_trains_resumes_and_scores(small, tmp_path, capsys):
    """A run that is cut is the same run, batches of several lengths included; its tokens are those it read."""
    common = ["config/train_mqar.py", f"--dataset={small}", "--n_embd=8", "--batch_size=4", "--log_interval=1"]
    common += ["--eval_interval=50", "--eval_iters=2", "--device=cpu"]
    folders = [f"--out_dir={tmp_path / name}" for name in ("whole", "cut")]
    assert train.main([*common, folders[0], "--max_iters=12"]) == 0
    assert train.main([*common, folders[1], "--max_iters=6", "--lr_decay_iters=12"]) == 0
    assert train.main([*common, folders[1], "--max_iters=12", "--init_from=resume"]) == 0
    logs = [[json.loads(line) for line in open(tmp_path / name / "log.jsonl")] for name in ("whole", "cut")]
    steps = [[(e["iter"], e["loss"], e["accuracy"], e["tokens"]) for e in log if "loss" in e] for log in logs]
    assert steps[0] == steps[1] and len(steps[0]) == 12
    read = np.diff([0, *(tokens for *_, tokens in steps[0])])
    assert {*read.tolist()} == {4 * 12, 4 * 16}
    assert train.main([*common, folders[0], "--init_from=resume", "--eval_only"]) == 0
    assert "4 pairs in 16: accuracy" in capsys.readouterr().out
    own, cfg, _ = config.load(["config/train_mqar.py"], GPTConfig, TrainConfig)
    assert (own.n_layer, own.n_embd, own.mlp, cfg.dataset) == (2, 64, "none", "mqar")
