"""Training: exact resume, faults, evaluation, processes. Runs are tiny, and in this process where they can be."""

import functools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, check_units, oracle, run_two_processes
from torch.nn import functional as F

import bench
import config
import train
import weights
from data import Batches, DataError, Dataset, windows
from data.scoring import evaluate, label_scores
from kernels import launch
from model import ATTENTION, GPT, GPTConfig, ModelError, read_checkpoint
from parallel import World
from train import Objective, TrainConfig, TrainError, lr_factor, make_optimizers
from weights import RUN_FILES

CPU = config.resolve_device("cpu", "auto")
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def read_log(folder, *names):
    """The values of log.jsonl that must not depend on how often a run was interrupted."""
    with open(os.path.join(folder, "log.jsonl")) as f:
        entries = [json.loads(line) for line in f]
    names = names or ("iter", "split", "loss", "ce", "penalty", "grad_norm", "lr", "tokens", "val_loss", "train_loss")
    return [{k: e[k] for k in names if k in e} for e in entries]


def weights_equal(a, b, name="ckpt.pt"):
    a, b = (read_checkpoint(str(folder), name)["model"] for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def command(arguments):
    return [sys.executable, os.path.join(ROOT, "train.py"), *arguments]


def run(arguments, **options):
    return subprocess.run(command(arguments), capture_output=True, text=True, env=ENV, **options)


# resume


@pytest.mark.parametrize(
    "keys",
    [
        {},
        dict(optimizer="muon", gradient_accumulation_steps=2, dropout=0.0),
        dict(attention_type="performer", performer_redraw_interval=3),
    ],
)
def test_resume_is_exact(tiny, tmp_path, keys):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    assert train.main(tiny(out_dir=whole, **keys)) == 0
    assert train.main(tiny(out_dir=parts, max_iters=10, **keys)) == 0
    torch.manual_seed(99)  # nothing outside the checkpoint may matter
    assert train.main(tiny(out_dir=parts, init_from="resume", **keys)) == 0
    assert read_log(whole) == read_log(parts)
    assert weights_equal(whole, parts) and weights_equal(whole, parts, "best.pt")
    losses = [e["loss"] for e in read_log(whole) if "loss" in e]
    assert len(losses) == 20 and len(set(losses)) == 20 and losses[-1] < losses[0]


def test_auto_keeps_the_precision_of_a_resumed_run(tiny, tmp_path, monkeypatch, capsys):
    """A run that a processor with bfloat16 began goes on so on one without; it is the run that was never stopped."""
    monkeypatch.setattr(launch, "native_bfloat16", lambda: True)
    train.main(tiny(dtype="auto", out_dir=tmp_path / "whole"))
    train.main(tiny(dtype="auto", out_dir=tmp_path / "parts", max_iters=10))
    assert "bfloat16, eager (as asked; AVX512-BF16 or AMX)" in capsys.readouterr().out
    monkeypatch.setattr(launch, "native_bfloat16", lambda: False)
    train.main(tiny(dtype="auto", out_dir=tmp_path / "parts", init_from="resume"))
    assert "bfloat16, eager (as asked; the run's precision)" in capsys.readouterr().out
    whole, parts = (weights.read_checkpoint(str(tmp_path / name), "ckpt.pt") for name in ("whole", "parts"))
    assert whole["config"]["dtype"] == parts["config"]["dtype"] == "bfloat16"
    assert all(torch.equal(w, parts["model"][name]) for name, w in whole["model"].items())


def test_resume_takes_the_commands_hyperparameters(tiny, tmp_path):
    train.main(tiny(max_iters=1, weight_decay=0.1))
    train.main(tiny(max_iters=2, weight_decay=0.3, beta2=0.9, init_from="resume"))
    groups = read_checkpoint(str(tmp_path / "run"), "ckpt.pt")["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0] and all(g["betas"] == (0.9, 0.9) for g in groups)


def test_resume_forgets_what_came_after_the_checkpoint(tiny, tmp_path):
    folder = str(tmp_path / "run")
    train.main(tiny(max_iters=10))
    with open(os.path.join(folder, "log.jsonl"), "a") as f:
        f.write('{"iter": 11, "loss": 0.5, "torn')
    train.main(tiny(init_from="resume"))
    assert [e["iter"] for e in read_log(folder) if "loss" in e] == list(range(1, 21))


def kill_and_resume(tiny, folder, delay):
    """Start a run, kill -9 it `delay` seconds after its first checkpoint, resume it to the end."""
    arguments = tiny(out_dir=folder, checkpoint_interval=1, max_iters=120, lr_decay_iters=120, eval_interval=40)
    process = subprocess.Popen(command(arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENV)
    deadline = time.time() + 60
    while not os.path.exists(os.path.join(folder, "ckpt.pt")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    process.communicate()
    assert train.main([*arguments, "--init_from=resume"]) == 0
    return process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_resume_after_kill(tiny, tmp_path, fresh_rng, times):
    whole = str(tmp_path / "whole")
    train.main(tiny(out_dir=whole, max_iters=120, lr_decay_iters=120, eval_interval=40))
    killed = 0
    for i in range(times):
        folder = str(tmp_path / f"killed{i}")
        killed += kill_and_resume(tiny, folder, fresh_rng.uniform(0, 1.0))
        assert read_log(folder) == read_log(whole) and weights_equal(folder, whole)
    assert killed, "no run was killed before its end"


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_finish_the_step_and_save(tiny, tmp_path, number, status):
    folder = str(tmp_path / "stopped")
    arguments = tiny(out_dir=folder, max_iters=100000, lr_decay_iters=20, eval_interval=100000)
    process = subprocess.Popen(command(arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    for line in process.stdout:
        if line.startswith("iter 5"):
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and err == "" and f"{number.name}: stopped after iteration" in out
    done = read_checkpoint(folder, "ckpt.pt")["iter_num"]
    assert [e["iter"] for e in read_log(folder) if "loss" in e] == list(range(1, done + 1))
    train.main(tiny(out_dir=folder, init_from="resume", max_iters=done + 2, eval_interval=100000))
    whole = str(tmp_path / "whole")
    train.main(tiny(out_dir=whole, max_iters=done + 2, eval_interval=100000))
    assert read_log(folder, "iter", "loss") == read_log(whole, "iter", "loss")


def test_resume_of_nanogpts_checkpoint(tiny, tmp_path, capsys):
    gpt = GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=32, dropout=0.1))
    matrices = [p for p in gpt.parameters() if p.dim() >= 2]
    vectors = [p for p in gpt.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}])
    gpt(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
    optimizer.step()
    args = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=False, vocab_size=256, dropout=0.1)
    stored = dict(model={f"_orig_mod.{k}": v for k, v in gpt.state_dict().items()}, optimizer=optimizer.state_dict())
    os.makedirs(tmp_path / "run")
    stored |= dict(model_args=args, iter_num=18, best_val_loss=torch.tensor(4.5), config={"dataset": "x"})
    torch.save(stored, tmp_path / "run" / "ckpt.pt")
    assert train.main(tiny(init_from="resume")) == 0
    assert "start afresh" in capsys.readouterr().out
    assert read_checkpoint(str(tmp_path / "run"), "ckpt.pt")["iter_num"] == 20


def test_resume_of_a_different_model_is_refused(tiny):
    train.main(tiny(max_iters=1))
    with pytest.raises(config.ConfigError, match="n_layer=3"):
        train.main(tiny(init_from="resume", n_layer=3))
    with pytest.raises(ModelError, match="optimizer=muon"):
        train.main(tiny(init_from="resume", optimizer="muon"))


# faults


@pytest.mark.parametrize("key, value", [
    ("rng", None), ("rng", [{}]), ("log_size", "x"), ("iter_num", "x"), ("iter_num", -3), ("batches", 3),
    ("optimizer", {}), ("model", {"a": 3}), ("model", {3: torch.ones(1)}), ("model_args", {"n_layer": "3"}),
    ("model_args", {"dropout": 7.0}), ("model_args", {3: 1}), ("rng", [{"cpu": torch.zeros(9, dtype=torch.uint8)}]),
    ("rng", [{"cpu": torch.ones(9)}]), ("iter_num", 2.5), ("iter_num", math.inf), ("seconds", "x"), ("wandb_id", 3),
    ("best_val_loss", [1]), ("config", 3), ("config", {"init_from": 3}), ("optimizer", []), ("optimizer", {"state": 3}),
    ("optimizer", {"state": {0: {"step": 3}}, "param_groups": []}), ("log_size", None),
])  # fmt: skip
def test_damaged_checkpoints_are_one_line(tiny, tmp_path, key, value):
    train.main(tiny(max_iters=1))
    path = tmp_path / "run" / "ckpt.pt"
    stored = torch.load(path, weights_only=True)
    stored[key] = stored[key] | value if key == "model_args" else value
    torch.save(stored, path)
    with pytest.raises((ModelError, DataError)) as error:
        train.main(tiny(init_from="resume"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("exp_avg", torch.rand(3)),
        ("exp_avg", torch.rand(())),
        ("exp_avg_sq", torch.rand(())),
        ("step", torch.rand(3)),
    ],
)
def test_optimizer_state_of_another_shape_is_refused(tiny, tmp_path, name, value):
    train.main(tiny(max_iters=1))
    path = tmp_path / "run" / "ckpt.pt"
    stored = torch.load(path, weights_only=True)
    stored["optimizer"]["state"][0][name] = value
    torch.save(stored, path)
    with pytest.raises(ModelError, match="another shape"):
        train.main(tiny(init_from="resume"))


def test_out_of_memory_and_nothing_to_train_are_one_line(tiny, capsys):
    arguments = tiny(attention_type="none", mlp="none", norm="none", pos_emb="none", embedding="onehot", n_embd=256)
    with pytest.raises(ModelError, match="no parameters"):
        train.main(arguments)
    with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *tiny(n_embd=2_000_000)])
        config.run(train.main)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and "out of memory" in error


def poison(monkeypatch, steps):
    """Make the loss NaN at the given steps (from 0)."""
    calls, forward = [0], Objective.forward

    def poisoned(self, *args):
        loss, parts = forward(self, *args)
        calls[0] += 1
        return loss * (math.nan if calls[0] - 1 in steps else 1.0), parts

    monkeypatch.setattr(Objective, "forward", poisoned)


def test_a_bad_step_is_skipped(tiny, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {3, 4, 5, 6})
    seen = []
    update = train.Run.update
    monkeypatch.setattr(train.Run, "update", lambda self, *a: (update(self, *a), seen.append(snapshot(self.model))))
    assert train.main(tiny(max_iters=10)) == 0
    assert "iteration 4: loss nan" in capsys.readouterr().out
    assert torch.equal(seen[2], seen[6]) and not torch.equal(seen[6], seen[7]) and seen[-1].isfinite().all()


def snapshot(gpt):
    return torch.cat([p.detach().flatten() for p in gpt.parameters()])


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(12, 99)))
    with pytest.raises(TrainError, match="5 non-finite steps in a row up to iteration 17.*ckpt.pt"):
        train.main(tiny())
    stored = read_checkpoint(str(tmp_path / "run"), "ckpt.pt")
    assert stored["iter_num"] == 10 and all(w.isfinite().all() for w in stored["model"].values())


def test_a_full_disk_is_one_line_and_loses_nothing(tiny, tmp_path):
    train.main(tiny(max_iters=4))
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "import config, train; sys.argv = ['train.py'] + sys.argv[1:];"
        "config.run(train.main, train.DataError, train.ModelError, train.TrainError)"
    )
    arguments = tiny(init_from="resume", max_iters=8)
    done = subprocess.run(
        [sys.executable, "-c", limited, *arguments], cwd=ROOT, capture_output=True, text=True, env=ENV
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "cannot write" in done.stderr, done.stderr
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before
    assert not [n for n in os.listdir(tmp_path / "run") if n.endswith(".tmp")]


def test_compile_failure_falls_back(tiny, tmp_path, monkeypatch, capsys):
    def broken(module):
        raise RuntimeError("no C++ compiler\nand more")

    reference = str(tmp_path / "eager")
    train.main(tiny(out_dir=reference, max_iters=3))
    monkeypatch.setattr(torch, "compile", broken)
    assert train.main(tiny(compile=True, max_iters=3)) == 0
    assert "eager: torch.compile failed (RuntimeError: no C++ compiler)" in capsys.readouterr().out
    assert read_log(tmp_path / "run") == read_log(reference)


@pytest.mark.slow
def test_compiled_training_is_close_to_eager(tiny, tmp_path, capsys):
    reference = str(tmp_path / "eager")
    train.main(tiny(out_dir=reference, dropout=0.0))
    assert train.main(tiny(compile=True, dropout=0.0)) == 0
    assert "compiled in" in capsys.readouterr().out
    pairs = zip(read_log(tmp_path / "run", "loss"), read_log(reference, "loss"))
    assert all(abs(a["loss"] - b["loss"]) < 1e-4 for a, b in pairs if a)


# the step


def test_schedule():
    cfg = TrainConfig(learning_rate=1e-3, min_lr=1e-4, warmup_iters=10, max_iters=110)
    factors = [lr_factor(cfg, i) for i in range(111)]
    assert factors[0] == pytest.approx(1 / 11) and factors[10] == 1 and factors[110] == pytest.approx(0.1)
    assert factors[60] == pytest.approx(0.55) and all(a > b for a, b in zip(factors[10:], factors[11:]))
    constant = TrainConfig(learning_rate=1e-3, decay_lr=False, warmup_iters=10)
    assert lr_factor(constant, 10**6) == 1


def test_accumulation_equals_a_larger_batch(tiny, tmp_path):
    whole = str(tmp_path / "whole")
    train.main(tiny(out_dir=whole, batch_size=8, dropout=0.0))
    train.main(tiny(batch_size=4, gradient_accumulation_steps=2, dropout=0.0))
    for a, b in zip(read_log(whole, "loss", "grad_norm"), read_log(tmp_path / "run", "loss", "grad_norm")):
        assert a == pytest.approx(b, abs=1e-5)


def test_activation_checkpointing_changes_no_digit(tiny, tmp_path):
    whole = str(tmp_path / "whole")
    train.main(tiny(out_dir=whole))
    train.main(tiny(activation_checkpointing=True))
    assert read_log(whole) == read_log(tmp_path / "run")


def test_optimizer_groups():
    gpt = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32, bias=True))
    embeddings = {id(gpt.transformer.wte.weight), id(gpt.transformer.wpe.weight)}
    adamw, muon = make_optimizers(gpt, TrainConfig(optimizer="muon", weight_decay=0.3), "cpu")
    in_muon = {id(p) for g in muon.param_groups for p in g["params"]}
    in_adamw = {id(p) for g in adamw.param_groups for p in g["params"]}
    assert in_muon | in_adamw == {id(p) for p in gpt.parameters()} and not in_muon & in_adamw
    assert embeddings <= in_adamw and len(in_muon) == 2 * 4
    for group in adamw.param_groups:
        assert all((p.dim() >= 2) == (group["weight_decay"] == 0.3) for p in group["params"])
    (adamw,) = make_optimizers(gpt, TrainConfig(), "cpu")
    assert sum(len(g["params"]) for g in adamw.param_groups) == len(list(gpt.parameters()))


def test_time_limit_counts_over_resumes(tiny, tmp_path):
    train.main(tiny(max_seconds=1e-6))
    assert read_checkpoint(str(tmp_path / "run"), "ckpt.pt")["iter_num"] == 1
    train.main(tiny(max_seconds=1e-6, init_from="resume"))
    assert read_checkpoint(str(tmp_path / "run"), "ckpt.pt")["iter_num"] <= 2


# evaluation


def model_and_split(text_dataset, **keys):
    torch.manual_seed(3)
    gpt = GPT(GPTConfig(**(dict(block_size=16, vocab_size=256, n_layer=1, n_head=2, n_embd=32, dropout=0.3) | keys)))
    torch.nn.init.normal_(gpt.transformer.wte.weight, std=0.5)
    return gpt, Dataset(text_dataset).split("val")


@pytest.mark.parametrize("context, stride", [(16, 16), (16, 5), (7, 1)])
def test_evaluation_is_the_sum_over_tokens(text_dataset, context, stride):
    """Against a loop that scores token i from the context that its window gives, for every batch size."""
    gpt, split = model_and_split(text_dataset)
    gpt.eval()
    tokens = torch.from_numpy(split.tokens.astype("int64"))
    nats = 0.0
    for i in range(1, len(tokens)):
        start = max(0, math.ceil((i - context) / stride)) * stride  # the first window that reaches token i
        logits = gpt(tokens[None, start:i])[0][0, -1]
        nats += F.cross_entropy(logits.double(), tokens[i]).item()
    gpt.train()
    found = [evaluate(gpt, split, context, stride, b, CPU) for b in (1, 7, 64)]
    assert gpt.training
    for scores in found:
        assert scores["tokens"] == len(tokens) - 1 == scores["bytes"]
        assert scores["loss"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-6)
        assert scores["loss"] == pytest.approx(found[0]["loss"], rel=1e-6)
        assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / split.scored_bytes, rel=1e-6)
        assert scores["token_perplexity"] == pytest.approx(math.exp(nats / (len(tokens) - 1)), rel=1e-6)
        words = len(bytes(split.tokens).split())
        assert scores["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-5)


def test_uniform_model_scores_log2_of_the_vocabulary(text_dataset):
    gpt, split = model_and_split(text_dataset)
    torch.nn.init.zeros_(gpt.lm_head.weight)
    for batch_size in (1, 7, 64):
        assert evaluate(gpt, split, 16, 16, batch_size, CPU)["bits_per_byte"] == pytest.approx(8.0, abs=1e-12)


def test_penalties_stay_out_of_every_evaluation(text_dataset, monkeypatch, tiny, tmp_path):
    train.main(tiny(max_iters=1, dropout=0.0))
    attention = train.GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=32)).transformer.h[0].attn
    forward = type(attention).forward
    penalised = lambda self, x: (forward(self, x)[0], torch.tensor(7.0) if self.training else torch.zeros(()))  # noqa: E731
    monkeypatch.setattr(type(attention), "forward", penalised)
    other = str(tmp_path / "penalised")
    train.main(tiny(out_dir=other, max_iters=1, dropout=0.0))
    a, b = read_log(tmp_path / "run"), read_log(other)
    assert b[2]["penalty"] == 14 and b[2]["loss"] == pytest.approx(a[2]["ce"] + 14, abs=1e-4)
    assert [e for e in a if "split" in e] == [e for e in b if "split" in e]


def test_eval_only_prints_both_splits(tiny, capsys):
    train.main(tiny(max_iters=2))
    capsys.readouterr()
    assert train.main(tiny(init_from="resume", eval_only=True, eval_stride=8, eval_context=16)) == 0
    out = capsys.readouterr().out
    assert "words val: " in out and "words test: " in out and "bits per byte" in out and "stride 8" in out


def test_a_finished_run_says_what_the_user_may_have_forgotten(tiny, capsys):
    train.main(tiny(max_iters=2))
    capsys.readouterr()
    with pytest.raises(config.ConfigError, match="would score a new model.*--init_from=resume"):
        train.main(tiny(max_iters=2, eval_only=True))
    assert train.main(tiny(max_iters=2, init_from="resume")) == 0
    assert "already at iteration 2" in capsys.readouterr().out


def test_scored_positions_cover_the_split_once(text_dataset):
    split = Dataset(text_dataset).split("val")
    for context, stride in ((16, 16), (16, 3)):
        assert sum(int(s.sum()) for _, _, s in windows(split, context, stride, 5)) == split.n_tokens - 1


# records with targets


def random_model(dataset, **keys):
    """A small model of random weights, far from uniform."""
    gpt = GPT(GPTConfig(block_size=8, vocab_size=dataset.vocab_size + 3, n_layer=1, n_head=2, n_embd=16, **keys))
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return gpt


def by_hand(gpt, split):
    """Nats, true labels and the likeliest labels of a labelled split, one record at a time."""
    ids, nats, true, likeliest = list(split.labels.values()), 0.0, [], []
    records = split.tokens.reshape(-1, split.record_len), split.targets.reshape(-1, split.record_len)
    for tokens, targets in zip(*(torch.from_numpy(r.astype("int64")) for r in records)):
        with torch.no_grad():
            logits = gpt(tokens[None], targets[None])[0][0].double()
        for p in torch.nonzero(targets >= 0).flatten():
            nats -= logits[p].log_softmax(-1)[targets[p]].item()
            true.append(int(targets[p]))
            likeliest.append(max(ids, key=lambda i: logits[p, i]))
    return nats, true, likeliest


def sklearn_scores(true, likeliest, ids):
    metrics = oracle("sklearn.metrics")
    options = dict(labels=ids, zero_division=0)
    each = metrics.precision_recall_fscore_support(true, likeliest, **options)
    macro = metrics.precision_recall_fscore_support(true, likeliest, average="macro", **options)
    return metrics.accuracy_score(true, likeliest), each, macro, metrics.confusion_matrix(true, likeliest, labels=ids)


def same_scores(scores, accuracy, each, macro, confusion):
    if "accuracy" in scores:
        assert scores["accuracy"] == pytest.approx(accuracy, abs=1e-12)
    found = [[row[key] for row in scores["labels"]] for key in ("precision", "recall", "f1", "support")]
    assert np.allclose(found, each, rtol=0, atol=1e-12)
    assert np.allclose([scores[key] for key in ("precision", "recall", "f1")], macro[:3], rtol=0, atol=1e-12)
    assert scores["confusion"] == confusion.tolist()


@pytest.mark.parametrize("case", ["all", "never predicted", "never true", "one label only", "neither"])
def test_label_scores_equal_scikit_learns(fresh_rng, case):
    for _ in range(20):
        k, n = int(fresh_rng.integers(2, 9)), int(fresh_rng.integers(1, 60))
        true, likeliest = (fresh_rng.integers(0, k, n) for _ in range(2))
        if case in ("never predicted", "neither"):
            likeliest[likeliest == 1] = 0
        if case in ("never true", "neither"):
            true[true == 1] = 0
        if case == "one label only":
            likeliest[:] = fresh_rng.integers(k)
        confusion = [[int(((true == i) & (likeliest == j)).sum()) for j in range(k)] for i in range(k)]
        scores = label_scores(confusion, [f"l{i}" for i in range(k)])
        same_scores(scores, *sklearn_scores(true, likeliest, list(range(k))))
        assert scores["majority"] == pytest.approx(np.bincount(true).max() / n)


def test_evaluation_of_records(labelled_dataset, fresh_rng):
    """Against one record at a time, and scikit-learn on the same predictions, for every batch size."""
    split = Dataset(labelled_dataset).split("val")
    gpt = random_model(Dataset(labelled_dataset), dropout=0.3).eval()
    nats, true, likeliest = by_hand(gpt, split)
    gpt.train()
    for batch_size in (1, 7, 500):
        scores = evaluate(gpt, split, 8, 8, batch_size, CPU)
        assert gpt.training and scores["tokens"] == len(true) == 150
        assert scores["loss"] == pytest.approx(nats / 150, rel=1e-5) and "bits_per_byte" not in scores
        same_scores(scores, *sklearn_scores(true, likeliest, list(split.labels.values())))


def test_evaluation_of_records_without_labels(tmp_path, fresh_rng):
    """Targets here and there, also none in a record: nats and accuracy over the whole vocabulary."""
    from test_data import write_targets

    targets = np.where(fresh_rng.random(120) < 0.4, fresh_rng.integers(0, 120, 120), -1)
    targets[::6] = 5
    write_targets(tmp_path, targets, 6)
    blank = np.where(np.arange(120) // 6 % 2, -1, targets)  # the test split: every second record scores nothing
    dataset = Dataset(tmp_path)
    dataset.meta["splits"]["test"] |= {"scored": int((blank >= 0).sum()), "targets_sha256": None}
    (tmp_path / "test.targets.bin").write_bytes(blank.astype("<i4").tobytes())
    gpt = random_model(dataset).eval()
    for name, wanted in (("val", targets), ("test", blank)):
        wanted = torch.from_numpy(wanted).view(20, 6)
        with torch.no_grad():
            logits = gpt(torch.arange(120).view(20, 6), wanted)[0]
        loss = F.cross_entropy(logits.double().flatten(0, 1), wanted.flatten(), ignore_index=-1).item()
        right = (logits.argmax(-1) == wanted)[wanted >= 0].double().mean().item()
        for batch_size in (1, 3, 50):
            scores = evaluate(gpt, dataset.split(name), 8, 8, batch_size, CPU)
            assert scores["loss"] == pytest.approx(loss, rel=1e-5) and scores["accuracy"] == pytest.approx(right)
            assert scores["tokens"] == (wanted >= 0).sum() and "f1" not in scores


def test_processes_share_the_records(labelled_dataset, fresh_rng):
    """What two processes add up is what one counts."""
    split = Dataset(labelled_dataset).split("test")
    gpt = random_model(Dataset(labelled_dataset))
    alone, barrier, shares, found = evaluate(gpt, split, 8, 8, 7, CPU), threading.Barrier(2), [None] * 2, [None] * 2

    def reduce(rank, values):
        shares[rank] = values
        barrier.wait()
        total = [a + b for a, b in zip(*shares)]
        barrier.wait()
        return total

    def process(rank):
        copy = random_model(Dataset(labelled_dataset))
        copy.load_state_dict(gpt.state_dict())
        found[rank] = evaluate(copy, split, 8, 8, 7, CPU, (rank, 2), functools.partial(reduce, rank))

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    [t.start() for t in threads], [t.join() for t in threads]
    for scores in found:
        assert scores.pop("loss") == pytest.approx(alone["loss"], rel=1e-9)
        assert scores.pop("token_perplexity") == pytest.approx(alone["token_perplexity"], rel=1e-9)
        assert scores == {k: alone[k] for k in scores}


def test_training_on_records(tiny, tmp_path, labelled_dataset, capsys):
    """Learnt, counted in tokens of records, resumed to the digit, and scored by every label."""
    keys = dict(dataset=labelled_dataset, batch_size=32, learning_rate=1e-2, dropout=0.0)
    keys |= dict(max_iters=160, lr_decay_iters=160, eval_interval=80)
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    assert train.main(tiny(out_dir=whole, **keys)) == 0
    assert train.main(tiny(out_dir=parts, **keys | dict(max_iters=80))) == 0
    torch.manual_seed(99)
    assert train.main(tiny(out_dir=parts, init_from="resume", **keys)) == 0
    assert read_log(whole) == read_log(parts) and weights_equal(whole, parts)
    log = read_log(whole)
    assert [e["tokens"] for e in log if "tokens" in e][-1] == 160 * 32 * 6
    losses = [e["val_loss"] for e in log if "val_loss" in e]
    capsys.readouterr()
    assert train.main(tiny(out_dir=whole, init_from="resume", eval_only=True, **keys)) == 0
    out = capsys.readouterr().out
    accuracy = float(out.split("accuracy ")[1].split()[0])
    assert losses[-1] < 0.2 < losses[0] and accuracy > 0.95, out
    assert (
        "x val: " in out and "x test: " in out and "150 targets in records of 6" in out and "bits per byte" not in out
    )
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| never")]
    assert len(rows) == 2 and rows[0][1:5] == ["0", "0.0000", "0.0000", "0.0000"]
    report = str(tmp_path / "quality.json")
    keys = ["--split=val", "--device=cpu", f"--json={report}", f"--png={report}.png"]
    bench.main(["--what=quality", f"--out_dir={whole}", *keys])
    with open(report) as f:
        tables = json.load(f)["tables"]
    check_units(tables)
    row = tables["quality"]["rows"][0]
    assert (
        row["accuracy (share)"] == pytest.approx(accuracy, abs=1e-6)
        and row["bits/byte"] is None
        and row["context (tokens)"] == 6
    )
    row = tables[f"labels of {whole}, val"]["rows"][2]
    assert list(row.values()) == ["never", 0, 0.0, 0.0, 0.0, 0, 0, 0]


def test_records_are_refused_in_one_line(tiny, tmp_path, labelled_dataset):
    with pytest.raises(
        DataError, match="block_size 5 does not hold the 6 tokens of a record of .*: use --block_size=6"
    ):
        train.main(tiny(dataset=labelled_dataset, block_size=5))
    train.main(tiny(dataset=labelled_dataset, max_iters=1))
    for key in ("eval_stride", "eval_context"):
        with pytest.raises(config.ConfigError, match="records of 6 tokens, each scored whole"):
            train.main(tiny(dataset=labelled_dataset, init_from="resume", eval_only=True, **{key: 6}))
    from test_data import write_targets

    write_targets(tmp_path / "cut", [1, 2, 3, 4])
    (tmp_path / "cut" / "train.targets.bin").write_bytes(b"1234")
    with pytest.raises(DataError, match="train.targets.bin is truncated"):
        train.main(tiny(out_dir=str(tmp_path / "other"), dataset=str(tmp_path / "cut")))


# processes


@pytest.mark.parametrize(
    "attention",
    [{}, pytest.param(dict(attention_type="performer", performer_redraw_interval=3), marks=pytest.mark.slow)],
)
def test_two_processes_make_the_same_run(tiny, tmp_path, attention):
    keys = dict(dropout=0.0, batch_size=2, **attention)
    train.main(tiny(out_dir=str(tmp_path / "one"), gradient_accumulation_steps=4, **keys))
    arguments = tiny(out_dir=str(tmp_path / "two"), gradient_accumulation_steps=4, **keys)
    run_two_processes(arguments)
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) >= 26
    for a, b in zip(one, two):
        ours, theirs = (row.pop("stats", {}) for row in (a, b))  # of the types that have some
        assert a == pytest.approx(b, abs=1e-5) and ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(*(torch.tensor(stats[name]) for stats in (ours, theirs)), rtol=0, atol=1e-5)


ONE_STEP = dict(max_iters=1, log_interval=1, eval_iters=1, dropout=0.0, block_size=8, warmup_iters=0)


def one_step(tiny, folder, dataset, batch_size, accumulation, launch=train.main, **keys):
    """Loss, parts and gradient norm of a step over 8 records, and the weights after it."""
    sizes = dict(batch_size=batch_size, gradient_accumulation_steps=accumulation) | ONE_STEP
    launch(tiny(out_dir=str(folder), dataset=dataset, **(sizes | keys)))
    (entry,) = [e for e in read_log(folder, "iter", "loss", "ce", "kl", "penalty", "grad_norm") if "loss" in e]
    return entry, read_checkpoint(str(folder), "ckpt.pt")["optimizer"]["state"]


@pytest.mark.parametrize("kind", ["targets", "penalty", "student"])
def test_a_step_is_the_mean_over_scored_targets_whatever_the_split(kind, tiny, uneven_dataset, tmp_path):
    keys = dict(attention_type="adaptive_span", span_reg=0.1) if kind == "penalty" else {}
    if kind == "student":
        train.main(tiny(out_dir=str(tmp_path / "teacher"), dataset=uneven_dataset, **(ONE_STEP | dict(seed=5))))
        keys = dict(teacher=str(tmp_path / "teacher"), distill="kl")
    wanted, state = one_step(tiny, tmp_path / "8", uneven_dataset, 8, 1, **keys)
    for size in (4, 2, 1):
        found, other = one_step(tiny, tmp_path / str(size), uneven_dataset, size, 8 // size, **keys)
        assert found == pytest.approx(wanted, rel=1e-5)
        for i in state:  # the first moments are the gradients
            torch.testing.assert_close(other[i]["exp_avg"], state[i]["exp_avg"], rtol=1e-4, atol=1e-7)


def test_processes_weigh_their_targets(tiny, uneven_dataset, tmp_path):
    wanted, _ = one_step(tiny, tmp_path / "one", uneven_dataset, 8, 1)
    found, _ = one_step(tiny, tmp_path / "two", uneven_dataset, 2, 4, launch=run_two_processes)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_text_is_weighed_as_ever(tiny, tmp_path, text_dataset, monkeypatch):
    """Digit for digit the mean of the micro-batches' means."""
    one_step(tiny, tmp_path / "ours", text_dataset, 2, 4)

    def plain(self, batch, *_):
        x, penalty = self.model.hidden(batch[0])
        ce = F.cross_entropy(self.model.lm_head(x).flatten(0, 1), batch[1].flatten())
        return ce + penalty, {"ce": ce, "penalty": torch.as_tensor(penalty)}

    monkeypatch.setattr(Objective, "forward", plain)
    one_step(tiny, tmp_path / "plain", text_dataset, 2, 4)
    assert read_log(tmp_path / "ours") == read_log(tmp_path / "plain")
    assert weights_equal(tmp_path / "ours", tmp_path / "plain")


@pytest.mark.parametrize("distill", [False, True])
def test_a_validation_split_without_targets(distill, tiny, uneven_dataset, tmp_path, monkeypatch, capsys):
    """Its loss is not a number, and the run goes on."""
    monkeypatch.setattr(Batches, "fixed", without_targets(Batches.fixed))
    keys = ONE_STEP | dict(dataset=uneven_dataset, max_iters=2)
    assert train.main(tiny(out_dir=str(tmp_path / "teacher"), **keys)) == 0
    keys |= dict(teacher=str(tmp_path / "teacher"), distill="kl") if distill else {}
    assert train.main(tiny(out_dir=str(tmp_path / "run"), **keys)) == 0
    out = capsys.readouterr().out
    assert "val loss nan" in out and "inf" not in out


def without_targets(fixed):
    def blind(self, split, n):
        for x, y in fixed(self, split, n):
            yield x, torch.full_like(y, -1) if split == "val" else y

    return blind


@pytest.mark.parametrize("name", list(ATTENTION))
def test_short_sequences_give_every_parameter_a_gradient(name):
    """Processes of a group wait for all of them."""
    gpt = GPT(GPTConfig(block_size=64, vocab_size=20, n_layer=1, n_head=2, n_embd=16, attention_type=name))
    for T in (1, 2, 5):
        idx = torch.randint(20, (2, T))
        gpt.zero_grad(set_to_none=True)
        gpt(idx, idx)[1].backward()
        missing = [n for n, p in gpt.named_parameters() if p.grad is None]
        assert [n for n in missing if "wpe" not in n] == []


def test_nsa_in_two_processes_with_short_records(tiny, uneven_dataset, tmp_path):
    keys = dict(attention_type="nsa", nsa_compress_block=16, nsa_compress_stride=8, nsa_select_block=16, max_iters=3)
    run_two_processes(tiny(out_dir=str(tmp_path / "run"), dataset=uneven_dataset, **(ONE_STEP | keys), batch_size=2,
                           gradient_accumulation_steps=2))  # fmt: skip
    assert read_checkpoint(str(tmp_path / "run"), "ckpt.pt")["iter_num"] == 3


def test_processes_must_divide_the_accumulation(tiny):
    with pytest.raises(config.ConfigError, match="gradient_accumulation_steps=3"):
        model_config, cfg, given = config.load(tiny(gradient_accumulation_steps=3), GPTConfig, TrainConfig)
        train.train(model_config, cfg, given, World(0, 2, 0), "cpu")


# what a run leaves behind


def test_folder_of_a_run(tiny, tmp_path, text_dataset):
    train.main(tiny(export=True, attention_type="softmax,none"))
    folder = tmp_path / "run"
    resolved = json.loads((folder / "config.json").read_text())
    assert resolved["model"]["attention_type"] == "softmax,none" and resolved["train"]["dataset"] == text_dataset
    assert resolved["model"]["vocab_size"] == 256 and resolved["data"]["label"] == "words" and "commit" in resolved
    entry = json.loads((folder / "log.jsonl").read_text().splitlines()[2])
    expected = "iter loss ce penalty grad_norm lr ms tokens_per_s tokens cpu_s wall_s rss_mb"
    assert list(entry) == expected.split() and entry["rss_mb"] > 50
    stored = torch.load(folder / "ckpt.pt", weights_only=True)
    assert {"model", "model_args", "optimizer", "iter_num", "best_val_loss", "config"} <= stored.keys()
    last, exported = (GPT.from_checkpoint(str(folder), name).eval() for name in ("ckpt.pt", "model.safetensors"))
    idx = torch.randint(256, (1, 16))
    assert torch.equal(last(idx)[0], exported(idx)[0]) and exported.loaded.new == []


def test_a_new_run_moves_the_earlier_one_aside(tiny, tmp_path, capsys):
    """Whole, and over the one before it; what else is in the folder stays."""
    folder, previous = tmp_path / "run", tmp_path / "run" / "previous"
    for n_embd, export in ((8, True), (16, False), (32, True), (64, False)):
        before = {name: (folder / name).read_bytes() for name in RUN_FILES if (folder / name).exists()}
        train.main(tiny(max_iters=1, n_embd=n_embd, export=export))
        assert GPT.from_checkpoint(str(folder)).config.n_embd == n_embd
        assert (folder / "model.safetensors").exists() == export
        if before:
            assert f"the earlier run of {folder} is in {previous} now" in capsys.readouterr().out
            assert {path.name: path.read_bytes() for path in previous.iterdir()} == before
        (folder / "notes.txt").touch()
    assert {*os.listdir(folder)} == {*RUN_FILES, ".lock", "notes.txt", "previous"} - {
        "model.safetensors",
        "hf",
        "shards",
    }


def test_init_from_a_folder_with_another_attention(tiny, tmp_path, capsys):
    donor = str(tmp_path / "donor")
    train.main(tiny(out_dir=donor))
    capsys.readouterr()
    train.main(tiny(init_from=donor, attention_type="softmax,none", max_iters=1))
    out = capsys.readouterr().out
    assert "left (not in the model): transformer.h.1.ln_1.weight, transformer.h.1.attn.c_attn.weight" in out


def test_dry_run_allocates_and_writes_nothing(tiny, tmp_path, capsys):
    huge = tiny(dry_run=True, n_layer=48, n_embd=6400, n_head=50, block_size=512, batch_size=64)
    assert train.main(huge) == 0
    out = capsys.readouterr().out
    n = 48 * (12 * 6400**2 + 2 * 6400) + 6400 + 256 * 6400 + 512 * 6400
    assert f"parameters: {n:,}" in out and "GFLOP" in out and not (tmp_path / "run").exists()


def test_dry_run_counts_activations(tiny, capsys):
    """Memory that the graph keeps, against a count of the tensors that a real step keeps."""
    train.main(tiny(dry_run=True, dropout=0.0, block_size=64, n_embd=64))
    dense = float(capsys.readouterr().out.split(" MB of activations")[0].split()[-1].replace(",", ""))
    train.main(tiny(dry_run=True, dropout=0.0, block_size=64, n_embd=64, activation_checkpointing=True))
    recomputed = float(capsys.readouterr().out.split(" MB of activations")[0].split()[-1].replace(",", ""))
    assert 0 < recomputed < dense


@pytest.mark.parametrize("mode", ["disabled", pytest.param("offline", marks=pytest.mark.slow)])
def test_wandb(tiny, tmp_path, mode):
    pytest.importorskip("wandb")
    assert train.main(tiny(wandb_log=True, wandb_mode=mode, max_iters=2, attention_type="softmax,mask_mix")) == 0
    assert len(read_log(tmp_path / "run", "iter", "loss")) == 8
    if mode == "offline":
        assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_masks_go_to_wandb_as_histograms(tiny, monkeypatch):
    """At each evaluation, by layer: spans, periods, kept distances, weights."""
    wandb, sent = pytest.importorskip("wandb"), []
    run = SimpleNamespace(log=lambda numbers, step: sent.append((step, numbers)), finish=lambda exit_code: None)
    monkeypatch.setattr(weights, "start_wandb", lambda *_: run)
    keys = dict(attention_type="adaptive_span,mask_mix", use_triangle_wave_masking=True, span_max=8)
    assert train.main(tiny(wandb_log=True, max_iters=4, eval_interval=2, **keys)) == 0
    stats = [(step, n) for step, n in sent if any(name.startswith("stats/") for name in n)]
    assert [step for step, _ in stats] == [0, 2, 4]
    for _, numbers in stats:
        assert {"stats/h.0.span", "stats/h.0.period", "stats/h.0.kept", "stats/h.1.weight"} <= numbers.keys()
        assert all(isinstance(h, wandb.Histogram) for h in numbers.values())
    assert sum(stats[-1][1]["stats/h.0.span"].histogram) == 2 and sum(stats[-1][1]["stats/h.1.weight"].histogram) == 5


def test_masks_are_logged_and_dry_runs_count_what_they_keep(tiny, tmp_path, capsys):
    keys = dict(attention_type="adaptive_span,mask_mix", use_triangle_wave_masking=True, span_reg=0.1, span_max=8)
    assert train.main(tiny(softness_span_mask=2.0, max_iters=4, eval_interval=2, wandb_mode="disabled", **keys)) == 0
    logged = [e["stats"] for e in read_log(tmp_path / "run", "stats") if e]
    assert len(logged) == 3 and all(len(e["h.0.period"]) == 2 and len(e["h.1.weight"][0]) == 5 for e in logged)
    assert sum(logged[2]["h.0.span"]) < sum(logged[0]["h.0.span"])  # only the penalty is that strong
    assert all(e["penalty"] > 0 for e in read_log(tmp_path / "run", "penalty") if e)
    train.main(tiny(dry_run=True, attention_type="mask_mix", block_size=512))
    few = float(capsys.readouterr().out.split(" executed")[0].split()[-1])
    train.main(tiny(dry_run=True, attention_type="softmax", block_size=512))
    assert few < float(capsys.readouterr().out.split(" executed")[0].split()[-1])


def test_a_run_that_fails_to_start_leaves_the_earlier_one_whole(tiny, tmp_path):
    train.main(tiny(max_iters=2))
    before = {n: (tmp_path / "run" / n).read_bytes() for n in ("ckpt.pt", "best.pt")}
    with pytest.raises(DataError, match="too short"):
        train.main(tiny(block_size=1000))  # more than the validation split has
    assert {n: (tmp_path / "run" / n).read_bytes() for n in before} == before


def test_one_run_a_folder(tiny, tmp_path):
    train.main(tiny(max_iters=1))
    lock = weights.lock_folder(str(tmp_path / "run"))
    with pytest.raises(TrainError, match="another run"):
        train.main(tiny(max_iters=1))
    lock.close()
    assert train.main(tiny(max_iters=1)) == 0


def test_weights_of_bad_steps_are_not_saved(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, {9, 10, 11})
    with pytest.raises(TrainError, match="last 3 steps"):
        train.main(tiny(max_iters=12))  # an evaluation with its checkpoint falls on step 10
    assert read_checkpoint(str(tmp_path / "run"), "ckpt.pt")["iter_num"] == 0
