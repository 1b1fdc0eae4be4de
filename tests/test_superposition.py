"""Skip trigrams: the toy model by configuration, and which head carries what."""

import itertools
import json
import math
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, check_units

import bench
import config
import train
from benchmarks import superposition
from model import GPT, GPTConfig

TRIGRAMS = runpy.run_path(f"{ROOT}/data/skip_trigrams/prepare.py")
TOY = dict(block_size=11, n_layer=1, head_dim=1, mlp="none", norm="none", pos_emb="none", embedding="onehot")


def toy(n, n_head, **keys):
    keys = dict(qkv_bias=True, attention_init="xavier") | keys
    return GPT(GPTConfig(**TOY, vocab_size=2 * n + 2, n_embd=2 * n + 2, n_head=n_head, **keys)).eval()


def records(n, samples=3000):
    """x and y: the C of each trigram at its B."""
    tokens, found = TRIGRAMS["generate"](np.random.default_rng(3), samples, n, 11)
    return torch.from_numpy(tokens), torch.from_numpy(TRIGRAMS["targets"]("test", tokens, found, n))


@torch.no_grad()
def set_by_hand(model, n, writes):
    """`writes`: for each head {b: {c: amount}}: it looks at A from these Bs alone, and writes these amounts."""
    attn, H = model.transformer.h[0].attn, len(writes)
    for p in attn.parameters():
        p.zero_()
    q, k, v = attn.c_attn.weight.view(3, H, -1)
    for h, bs in enumerate(writes):
        q[h] = -1.0
        q[h, list(bs)] = 1.0
        k[h, 0], v[h, 0] = 30.0, 1.0
        for c, amount in next(iter(bs.values()), {}).items():
            attn.c_proj.weight[n + c, h] = amount


def test_a_trigram_that_two_heads_hold_together_is_distributed():
    """Heads 0 and 1 say C1 and C2 alone; C3 only the sum of both says."""
    model, both = toy(3, 2), {1: 10.0, 3: 6.0}
    other = {2: 10.0, 3: 6.0}
    set_by_hand(model, 3, [{1: both, 3: both}, {2: other, 3: other}])
    rows = superposition.superposition(model, *records(3))
    assert [row["token"] for row in rows] == [1, 2, 3] and [row["target"] for row in rows] == [4, 5, 6]
    assert all(row["learnt"] and row["accuracy"] == 1 for row in rows)
    assert [row["heads"] for row in rows] == [[0], [1], []]
    assert [row["distributed"] for row in rows] == [False, False, True]
    for row in rows:
        row["name"] = "B -> C"
    assert superposition.describe_heads(rows, 2) == (
        "learnt 3 of 3; distributed: B -> C; one head for each trigram: no; unused heads: none"
    )


def test_a_head_for_each_trigram():
    """Three of four heads, by gates alone: queries of all Bs look at A, and a gate lets one through."""
    model = toy(3, 4, attention_type="gated", gated_unit_norm=True)
    set_by_hand(model, 3, [{1: {1: 1.0}}, {}, {3: {3: 1.0}}, {2: {2: 1.0}}])
    attn = model.transformer.h[0].attn
    with torch.no_grad():
        attn.c_attn.weight[:4] = 1.0
        attn.c_attn.bias[8:] = 2.0  # values of 3, more than the 1 of the B itself in the residual stream
        attn.c_proj.weight[0, 1] = 1.0  # the unused head would write A
        for h, b in ((0, 1), (2, 3), (3, 2)):
            attn.gate[0, h, b] = 9.0
        attn.gate_bias[4:] = 1.0
    rows = superposition.superposition(model, *records(3))
    assert [row["heads"] for row in rows] == [[0], [3], [2]]
    for row in rows:
        row["name"] = "B -> C"
    assert superposition.describe_heads(rows, 4).endswith("one head for each trigram: yes; unused heads: 1")


def test_an_untrained_model_has_learnt_nothing(fresh_rng):
    for keys in ({}, dict(attention_type="gated", gated_unit_norm=True)):
        model = toy(4, 3, **keys)
        model.transformer.h[0].attn.c_proj.weight.data *= 0.1
        rows = superposition.superposition(model, *records(4, 1000))
        assert not any(row["learnt"] or row["distributed"] or row["heads"] for row in rows)


def test_ablation_is_the_published_procedure(fresh_rng):
    """Subset by subset, on random outputs."""
    H, N, V = 4, 60, 5
    outputs, wanted = torch.randn(H, N, V) + 1.0, torch.randint(V, (N,))
    outputs[:, torch.arange(N), wanted] += 1.5
    alone, together = superposition.head_ablation(outputs, wanted, torch.nn.Identity())
    for h, i in itertools.product(range(H), range(N)):
        others, passed = [o for o in range(H) if o != h], True
        for size in range(1, H):
            for removed in itertools.combinations(others, size):
                kept = [o for o in range(H) if o not in removed]
                passed &= bool(outputs[kept, i].sum(0).argmax() == wanted[i])
        assert alone[h, i] == passed
    assert torch.equal(together, outputs.sum(0).argmax(-1) == wanted)
    assert 0 < alone.sum() < alone.numel()


@pytest.mark.parametrize("name", ["softmax", "gated", "gated_output", "mask_mix", "gla", "performer"])
def test_heads_add_up_to_the_layers_output(name, fresh_rng):
    shape = dict(n_layer=1, n_head=2, n_embd=16, vocab_size=16, mlp="none", norm="none", pos_emb="none", bias=True)
    shape |= dict(gla_n_head=2) if name == "gla" else {}
    model = GPT(GPTConfig(**shape, attention_type=name, block_size=16)).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    idx = torch.randint(16, (3, 9))
    outputs, y = superposition.head_outputs(model, idx), model.trace(idx)[0][1]
    assert outputs.shape == (2, 3, 9, 16)
    torch.testing.assert_close(outputs.sum(0) + model.transformer.h[0].attn.c_proj.bias, y)


def test_xavier_has_the_specified_widths(fresh_rng):
    """Standard deviations of many draws; of each token gates of 0.6 and -0.6, in a pattern of each head's own."""
    n, H = 5, 4
    V, draws = 2 * n + 2, [toy(n, H).transformer.h[0].attn for _ in range(60)]
    for get, std in (
        (lambda a: a.c_attn.weight, math.sqrt(2 / (V + H))),
        (lambda a: a.c_proj.weight, math.sqrt(2 / (V * (1 + H)))),
        (lambda a: a.c_attn.bias, math.sqrt(2 / (1 + H))),
    ):
        assert torch.cat([get(a).flatten() for a in draws]).std().item() == pytest.approx(std, rel=0.12)
    assert draws[0].c_proj.bias is None
    attn = toy(n, 8, attention_type="gated").transformer.h[0].attn
    gates = torch.stack(attn._gates(torch.eye(V)[None]))[:, 0]  # (2, V, 8), of one-hot tokens
    torch.testing.assert_close(gates.abs(), torch.full_like(gates, 0.6))
    for pattern in gates.sign():
        assert len(pattern.T.unique(dim=0)) == 8 and 0.2 < (pattern > 0).float().mean() < 0.8


def test_penalty_grows_after_its_start():
    cfg = train.TrainConfig(penalty_start=2, penalty_warmup=3)
    assert [train.penalty_share(cfg, it) for it in range(8)] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert train.penalty_share(train.TrainConfig(), 0) == 1
    assert train.penalty_share(train.TrainConfig(penalty_start=1), 1) == 1
    model = toy(3, 4, attention_type="gated", gated_reg=2.0).train()
    x, y = records(3, 50)
    whole, parts = train.Objective(model)((x, y))
    half, halved = train.Objective(model)((x, y), False, torch.tensor(0.5))
    torch.testing.assert_close(halved["penalty"], 0.5 * parts["penalty"])
    torch.testing.assert_close(whole - half, halved["penalty"])
    assert halved["penalty"] > 0.1


def test_best_weights_have_seen_the_whole_penalty(tiny, tmp_path, monkeypatch):
    """The validation loss is lowest before gates are penalised; those weights answer another question."""
    rising = itertools.count()
    monkeypatch.setattr(train, "estimate_loss", lambda *_: {"val": float(next(rising))})
    keys = dict(attention_type="gated", gated_reg=0.1, eval_interval=5, max_iters=20)
    for started, best in ((dict(penalty_start=8, penalty_warmup=3), 15), ({}, 0)):
        out_dir = str(tmp_path / f"best_{best}")
        assert train.main(tiny(out_dir=out_dir, **keys, **started)) == 0
        assert torch.load(f"{out_dir}/best.pt", weights_only=True)["iter_num"] == best


# from configuration to picture


@pytest.fixture(scope="module")
def trigrams(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data") / "skip_trigrams_3")
    command = [sys.executable, "data/skip_trigrams/prepare.py", "--trigrams", "3", "--out_dir", folder]
    sizes = ["--train", "5000", "--val", "2000", "--test", "2000"]
    assert subprocess.run(command + sizes, cwd=ROOT, capture_output=True).returncode == 0
    return folder


def test_base_and_gated_block_by_configuration(trigrams, tmp_path, capsys, monkeypatch):
    """The two configs of the README, a few steps: the student is fresh, the report names each trigram."""
    base, student = str(tmp_path / "base"), str(tmp_path / "gated")
    short = [
        f"--dataset={trigrams}",
        "--max_iters=30",
        "--eval_interval=30",
        "--eval_iters=2",
        "--device=cpu",
        "--log_interval=10",
    ]
    monkeypatch.chdir(ROOT)
    assert train.main(["config/skip_trigrams_2h3t.py", *short, f"--out_dir={base}"]) == 0
    gated = ["config/gated_skip_trigrams_2h3t.py", *short, f"--teacher={base}", f"--out_dir={student}"]
    assert train.main([*gated, "--penalty_start=10", "--penalty_warmup=10"]) == 0
    with open(f"{student}/log.jsonl") as f:
        steps = [json.loads(line) for line in f]
    penalties = {e["iter"]: e["penalty"] for e in steps if "penalty" in e}
    assert penalties[10] == 0 < penalties[20]  # a step's number is one more than the steps before it
    model = GPT.from_checkpoint(student)
    assert model.config.n_head == 2 * GPT.from_checkpoint(base).config.n_head == 4
    report = str(tmp_path / "report.json")
    capsys.readouterr()
    options = ["--what=superposition", f"--out_dir={base},{student}", f"--json={report}", "--device=cpu"]
    assert bench.main(options) == 0
    out = capsys.readouterr().out
    assert "B1 -> C1" in out and "distributed: none" in out and "unused heads" in out
    with open(report) as f:
        tables = json.load(f)["tables"]
    check_units(tables)
    assert [row["trigram"] for row in tables[f"superposition in {base}"]["rows"]] == [
        f"B{b} -> C{b}" for b in (1, 2, 3)
    ]
    assert all((tmp_path / name / "superposition.png").stat().st_size > 5000 for name in ("base", "gated"))


def test_heads_of_a_text_model(tiny, tmp_path, capsys):
    train.main(tiny(attention_type="gated,gated_output", gated_reg=0.01))
    capsys.readouterr()
    assert bench.main(["--what=heads", f"--out_dir={tmp_path / 'run'}", "--json=", "--device=cpu"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 2 + 1 and "dead heads" in rows[0] and rows[-1].startswith("| all")


def test_what_has_no_heads_to_tell_apart(tiny, tmp_path):
    train.main(tiny())
    with pytest.raises(config.ConfigError, match="n_layer=1") as error:
        bench.main(["--what=superposition", f"--out_dir={tmp_path / 'run'}", "--json=", "--device=cpu"])
    assert "\n" not in str(error.value)


def test_the_lowest_loss_is_of_seeds_alone(tmp_path, monkeypatch):
    """Of the last five lines; a run of another recipe, and one without a log's steps, are no try."""
    losses = {"a": [0.0] * 3 + [2.0] * 5, "b": [9.0, 1.0, 1.0, 1.0, 1.0, 3.0], "other": [0.1], "empty": []}
    for name, found in losses.items():
        lines = [json.dumps({"iter": i, "loss": loss}) for i, loss in enumerate(found)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    def read(folder):
        return ([json.loads(line) for line in (tmp_path / f"{folder}.jsonl").read_text().splitlines()],)

    monkeypatch.setattr(superposition, "read_log", read)
    monkeypatch.setattr(superposition, "recipe", lambda folder: ("other" if folder == "other" else "r", 1))
    (tries,) = superposition.tries_of([*losses])
    assert tries == {"a": 2.0, "b": pytest.approx(1.4)} and min(tries, key=tries.get) == "b"
