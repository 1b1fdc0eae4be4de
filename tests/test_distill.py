"""Conversion and distillation: what is copied, what is compared, what moves."""

import json
import math
import os
import re

import numpy as np
import pytest
import torch
from conftest import oracle
from torch.nn import functional as F

import config
import sample
import train
from model import ATTENTION, GPT, GPTConfig, load_weights, read_checkpoint
from train import Divergence, Objective, compare_with_teacher, divergence, kl_divergence

TINY = dict(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=32)
CPU = config.resolve_device("cpu", "auto")


def make(**keys):
    gpt = GPT(GPTConfig(**(TINY | keys))).eval()
    for p in gpt.parameters():
        if p.dim() >= 2:
            torch.nn.init.normal_(p, std=0.3)
    return gpt


def tokens(B=3, T=16, V=40):
    idx = torch.randint(V, (B, T + 1))
    return idx[:, :-1], idx[:, 1:].clone()


# the divergence


def test_divergence_is_the_mean_over_scored_positions(fresh_rng):
    p, q = torch.randn(2, 5, 7, dtype=torch.float64), 3 * torch.randn(2, 5, 7, dtype=torch.float64)
    targets = torch.randint(7, (2, 5))
    targets[0, 3] = targets[1, 0] = -1
    for temperature in (1.0, 2.0):
        want = []
        for b in range(2):
            for t in range(5):
                if targets[b, t] >= 0:
                    a, c = (torch.softmax(x[b, t] / temperature, 0) for x in (p, q))
                    want.append(sum(a[i] * math.log(a[i] / c[i]) for i in range(7)))
        have = kl_divergence(p, q, targets, temperature)
        assert have.item() == pytest.approx(sum(want).item() / 8, rel=1e-5)
    twice = kl_divergence(torch.cat((p, p)), torch.cat((q, q)), torch.cat((targets, targets)))
    assert twice.item() == pytest.approx(kl_divergence(p, q, targets).item())  # a mean, not a sum
    assert kl_divergence(q, p, targets) != kl_divergence(p, q, targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_in_one_pass_is_the_formula(temperature, dtype, fresh_rng, monkeypatch):
    """Its hand-made gradient too, over groups of rows of which the last is shorter, some positions not scored."""
    monkeypatch.setattr(Divergence, "CACHED", 41 * int(fresh_rng.integers(1, 5)))
    p, q, targets = 4 * torch.randn(2, 7, 41), 4 * torch.randn(2, 7, 41), torch.randint(-1, 41, (2, 7))
    p, q, scored = p.to(dtype), q.to(dtype).mT.contiguous().mT.requires_grad_(), targets >= 0  # any strides
    kl = kl_divergence(p, q, targets, temperature)
    wanted = (divergence(p, q, temperature) * scored).sum() / scored.sum()
    torch.testing.assert_close(kl, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, q)[0] for x in (kl, wanted)))


def test_divergence_of_certain_teachers_is_finite():
    p = torch.tensor([[[200.0, -200.0, -1e4]]], requires_grad=True)
    q = torch.zeros(1, 1, 3, requires_grad=True)
    kl = kl_divergence(p.detach(), q, torch.zeros(1, 1, dtype=torch.long))
    assert kl.item() == pytest.approx(math.log(3), rel=1e-6)
    kl.backward()
    assert q.grad.isfinite().all() and q.grad.abs().sum() > 0


def test_objective_compares_the_same_positions(fresh_rng):
    """A copy of the teacher has divergence 0 and no gradient; one that predicts a position later has not."""
    teacher, (idx, targets) = make(), tokens()
    student = GPT(teacher.config)
    load_weights(student, teacher.state_dict(), teacher.config)
    _, parts = Objective(student, teacher)((idx, targets))
    assert abs(parts["kl"].item()) < 1e-6
    logits = teacher(idx, targets)[0]
    assert kl_divergence(logits[:, :-1], logits[:, 1:], targets[:, 1:]) > 0.1


def test_objective_adds_what_its_line_says(fresh_rng):
    teacher, student, (idx, targets) = make(), make(attention_type="gla"), tokens()
    loss, parts = Objective(student, teacher, 2.0, 0.25)((idx, targets))
    logits, ce = student(idx, targets)
    torch.testing.assert_close(parts["ce"], ce)  # next token, shifted once
    torch.testing.assert_close(ce, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    kl = kl_divergence(teacher(idx, targets)[0], logits, targets, 2.0)
    torch.testing.assert_close(loss, 4 * kl + 0.25 * ce)
    loss.backward()
    assert all(p.grad is not None for p in student.parameters()) and all(p.grad is None for p in teacher.parameters())


def test_attention_is_matched_on_the_teachers_inputs(fresh_rng):
    teacher, student, (idx, targets) = make(), make(attention_type="gla"), tokens()
    loss, parts = Objective(student, teacher)((idx, targets), matching=True)
    errors, x = [], teacher.embed(idx, 0)
    for mine, theirs in zip(student.transformer.h, teacher.transformer.h):
        entry = theirs.ln_1(x)
        want, have = theirs.attn(entry)[0], mine.attn(entry)[0]
        errors.append((have - want).square().sum() / want.square().sum())
        x, _ = theirs(x)
    torch.testing.assert_close(loss, torch.stack(errors).mean())
    loss.backward()
    moved = {name for name, p in student.named_parameters() if p.grad is not None}
    assert moved == {name for name, _ in student.named_parameters() if ".attn." in name}
    twin = make()
    load_weights(twin, teacher.state_dict(), teacher.config)
    assert Objective(twin, teacher)((idx, targets), matching=True)[0] < 1e-10


def test_comparison_equals_a_loop(fresh_rng):
    teacher, student = make(), make(attention_type="gla")
    batches = [tokens(3), tokens(2)]
    batches[0][1][0, :5] = -1
    have = compare_with_teacher(student, teacher, batches, CPU, train.World(0, 1, 0), chunk=40 * 7)
    kl, ours, theirs, agreed, n = 0.0, 0.0, 0.0, 0, 0
    for idx, targets in batches:
        q, p = (m(idx, targets)[0].double().log_softmax(-1) for m in (student, teacher))
        for b in range(len(idx)):
            for t in range(16):
                if (y := targets[b, t]) >= 0:
                    kl, n = kl + (p[b, t].exp() * (p[b, t] - q[b, t])).sum().item(), n + 1
                    ours, theirs = ours - q[b, t, y].item(), theirs - p[b, t, y].item()
                    agreed += int(q[b, t].argmax() == p[b, t].argmax())
    want = {"kl": kl / n, "student_ce": ours / n, "teacher_ce": theirs / n, "agreement": agreed / n}
    assert n == 3 * 16 + 2 * 16 - 5 and have == pytest.approx(want, rel=1e-5)


# what is copied


@pytest.mark.parametrize("keys, taken", [({}, "v"), (dict(gla_expand_k=1.0), "q,k,v"), (dict(gla_n_head=2), "v")])
def test_projections_go_where_they_fit(keys, taken):
    teacher, student = make(), make(attention_type="gla", **keys)
    before = student.state_dict()["transformer.h.1.attn.c_attn.weight"].clone()
    report = load_weights(student, teacher.state_dict(), teacher.config)
    name = "transformer.h.{}.attn.c_attn.weight"
    rest = [part for part in "qkv" if part not in taken]
    assert [c for c in report.copied if "c_attn" in c] == [name.format(i) + f"[{taken}]" for i in range(2)]
    left = [name.format(i) + f"[{','.join(rest)}]" for i in range(2) if rest]
    assert [c for c in report.left if "c_attn" in c] == left
    fresh = [f"transformer.h.{i}.attn.{n}" for i in range(2) for n in ("c_gate.weight", "c_gate.bias", "ln_o.weight")]
    fresh += [name.format(i) + f"[{','.join([*rest, 'r', 'z'])}]" for i in range(2)]
    assert sorted(report.new) == sorted(fresh)
    attn, source = student.transformer.h[1].attn, teacher.state_dict()[name.format(1)]
    rows = dict(zip(attn.parts, attn.c_attn.weight.split(list(attn.parts.values()))))
    old = dict(zip(attn.parts, before.split(list(attn.parts.values()))))
    for part, value in zip("qkv", source.chunk(3)):
        assert torch.equal(rows[part], value) if part in taken else torch.equal(rows[part], old[part])
    assert torch.equal(rows["r"], old["r"]) and torch.equal(rows["z"], old["z"])
    for copied in ("transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.mlp.c_fc.weight"):
        assert torch.equal(student.state_dict()[copied], teacher.state_dict()[copied])
    assert torch.equal(attn.c_proj.weight, teacher.transformer.h[1].attn.c_proj.weight)


@pytest.mark.parametrize("name", [name for name in ATTENTION if name != "none"])
def test_every_type_converts_and_learns_from_a_teacher(name, fresh_rng):
    """Embeddings, MLPs and the output projection are the teacher's; a step of each objective reaches the attention."""
    teacher, student, batch = make(), make(attention_type=name), tokens()
    report = load_weights(student, teacher.state_dict(), teacher.config)
    assert all(".attn." in part for part in report.new + report.left)
    assert "transformer.h.0.attn.c_proj.weight" in report.copied
    for matching in (False, True):
        student.zero_grad()
        Objective(student, teacher)(batch, matching)[0].backward()
        assert student.transformer.h[1].attn.c_proj.weight.grad.isfinite().all()
    if name == "nsa":
        rows = student.transformer.h[0].attn.c_attn.weight[:32]
        assert torch.equal(rows, teacher.transformer.h[0].attn.c_attn.weight[:32])  # the queries


def test_another_mechanisms_projections_are_not_taken_for_softmaxs():
    """The rows of gla's c_attn are not q, k and v of a third each."""
    report = load_weights(make(), (other := make(attention_type="gla")).state_dict(), other.config)
    assert not any("c_attn" in name for name in report.copied) and sum("c_attn" in name for name in report.new) == 2
    widths = [dict(gla_expand_k=0.5, gla_expand_v=1.0), dict(gla_expand_k=1.0, gla_expand_v=0.5)]
    ours, theirs = (make(attention_type="gla", **w) for w in widths)  # as many rows in all, of other parts
    name = "transformer.h.0.attn.c_attn.weight"
    assert ours.state_dict()[name].shape == theirs.state_dict()[name].shape
    assert name not in load_weights(ours, theirs.state_dict(), theirs.config).copied


def test_rows_of_another_order_are_not_taken_for_the_same():
    """With H / 3 key-value heads nsa's c_attn has as many rows as softmax attention's, but they are not q, k, v."""
    keys = dict(n_head=3, n_embd=48)
    teacher, student = make(**keys), make(attention_type="nsa", nsa_kv_head=1, **keys)
    name = "transformer.h.0.attn.c_attn.weight"
    before, source = student.state_dict()[name].clone(), teacher.state_dict()[name]
    assert before.shape == source.shape
    report = load_weights(student, teacher.state_dict(), teacher.config)
    assert [c for c in report.copied if "h.0.attn.c_attn" in c] == [name + "[q]"]
    after = student.state_dict()[name]
    assert torch.equal(after[:48], source[:48]) and torch.equal(after[48:], before[48:])
    back = make(**keys)
    before = back.state_dict()[name].clone()
    assert any(left.startswith(name) for left in load_weights(back, student.state_dict(), student.config).left)
    assert torch.equal(back.state_dict()[name], before)
    twin = make(attention_type="nsa", nsa_kv_head=1, **keys)
    assert load_weights(twin, student.state_dict(), student.config).left == [] and torch.equal(
        twin.state_dict()[name], after
    )


@pytest.mark.parametrize(
    "keys",
    [
        dict(attention_type="adaptive_span", span_init=1.0),
        dict(attention_type="adaptive_span", span_init=1.0, span_param="ratio"),
        dict(attention_type="mask_mix", mask_mix_candidates="full"),
        dict(attention_type="softmax,adaptive_span", span_init=1.0),
        dict(attention_type="gated"),
        dict(attention_type="gated_output", gate_output_bias_init=40.0),
        dict(attention_type="softmax", gate_output=True, gate_output_kind="headwise", gate_output_bias_init=40.0),
    ],
)
def test_open_students_equal_their_teacher(keys, fresh_rng):
    teacher, (idx, targets) = make(), tokens()
    student = GPT(GPTConfig(**(TINY | keys))).eval()
    report = load_weights(student, teacher.state_dict(), teacher.config)
    added = (".span", ".alpha", ".gate", ".gate_bias", ".output_gate.weight", ".output_gate.bias")
    assert report.left == [] and all(name.endswith(added) for name in report.new)
    torch.testing.assert_close(student(idx, targets)[0], teacher(idx, targets)[0], rtol=0, atol=1e-5)
    assert (make()(idx, targets)[0] - teacher(idx, targets)[0]).abs().max() > 1


@pytest.mark.parametrize("branch", ["selected", "window"])
@pytest.mark.parametrize("keys", [dict(pos_emb="rope"), dict(bias=True)])
def test_nsa_that_reads_everything_equals_its_teacher(branch, keys, fresh_rng):
    """With a key-value head for each head every branch holds the teacher's keys and values; with every block selected
    (or a window of the whole block) and the gates saturated, the branch is softmax attention."""
    teacher, (idx, targets) = make(**keys), tokens()
    if teacher.config.bias:
        for block in teacher.transformer.h:
            torch.nn.init.normal_(block.attn.c_attn.bias, std=0.3)
    sizes = dict(nsa_compress_block=4, nsa_compress_stride=2, nsa_select_block=4, nsa_select_count=4, nsa_window=16)
    student = GPT(GPTConfig(**(TINY | keys | sizes), attention_type="nsa", nsa_kv_head=2)).eval()
    report = load_weights(student, teacher.state_dict(), teacher.config)
    kinds = ["weight", "bias"] if teacher.config.bias else ["weight"]
    parts = "[q,kv_compressed,kv_selected,kv_window]"
    assert [n for n in report.copied if "c_attn" in n] == [
        f"transformer.h.{i}.attn.c_attn.{kind}{parts}" for i in range(2) for kind in kinds
    ]
    own = ("slots", "phi_in", "phi_out", "c_gate.weight", "c_gate.bias")
    assert report.left == [] and sorted(report.new) == sorted(
        f"transformer.h.{i}.attn.{n}" for i in range(2) for n in own
    )
    away = (student(idx, targets)[0] - teacher(idx, targets)[0]).abs().max()
    for block in student.transformer.h:
        block.attn.c_gate.weight.data.zero_()
        gates = block.attn.c_gate.bias.data.fill_(-40.0).view(3, -1)  # compressed, selected, window
        gates[1 if branch == "selected" else 2] = 40.0
    torch.testing.assert_close(student(idx, targets)[0], teacher(idx, targets)[0], rtol=0, atol=1e-5)
    assert away > 0.01  # as initialised, all three branches are half open


# runs


@pytest.fixture
def teacher(tiny, tmp_path):
    folder = str(tmp_path / "teacher")
    train.main(tiny(out_dir=folder, max_iters=60, lr_decay_iters=60, learning_rate=3e-3, dropout=0.1))
    return folder


def read_log(folder):
    with open(os.path.join(folder, "log.jsonl")) as f:
        return [json.loads(line) for line in f]


def student(tiny, tmp_path, folder, **keys):
    keys = dict(init_from=folder, teacher=folder, attention_type="gla", distill="kl", dropout=0.0) | keys
    return tiny(out_dir=str(tmp_path / "student"), learning_rate=3e-3, max_iters=40, lr_decay_iters=40, **keys)


def test_a_student_comes_closer(tiny, tmp_path, teacher, capsys):
    capsys.readouterr()
    train.main(student(tiny, tmp_path, teacher, distill_attention_iters=10))
    out = capsys.readouterr().out
    assert "copied" in out and "KL from the teacher" in out and "same likeliest token" in out
    log = read_log(tmp_path / "student")
    rows = [e for e in log if e.get("split") == "val"]
    assert [e["iter"] for e in rows] == [0, 10, 20, 30, 40]  # the first is the student as converted
    assert rows[-1]["kl"] < 0.5 * rows[0]["kl"] and 0 <= rows[-1]["agreement"] <= 1
    assert len({e["teacher_ce"] for e in rows}) == 1  # the teacher neither moves nor drops anything
    steps = [e for e in log if "loss" in e]
    assert all("attention_error" in e for e in steps[:10]) and all("kl" in e and "ce" in e for e in steps[10:])
    capsys.readouterr()
    train.main([*student(tiny, tmp_path, teacher, distill_attention_iters=10), "--init_from=resume", "--eval_only"])
    assert capsys.readouterr().out.count("KL from the teacher") == 2  # val and test, by the full pass


def test_resuming_a_distillation_is_exact(tiny, tmp_path, teacher):
    whole, parts = (dict(distill_attention_iters=5, out_dir=str(tmp_path / name)) for name in ("whole", "parts"))
    arguments = [*student(tiny, tmp_path, teacher), "--distill_attention_iters=5", "--eval_interval=4"]
    train.main([*arguments, f"--out_dir={whole['out_dir']}", "--max_iters=12"])
    for stop in (4, 12):
        resume = ["--init_from=resume"] if stop == 12 else []
        train.main([*arguments, f"--out_dir={parts['out_dir']}", f"--max_iters={stop}", *resume])
    a, b = (read_checkpoint(folder["out_dir"], "ckpt.pt")["model"] for folder in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_only_masks_move(tiny, tmp_path, teacher):
    before = read_checkpoint(teacher)["model"]
    keys = dict(attention_type="mask_mix", train_only="masks", mask_mix_per_head=True)
    train.main(student(tiny, tmp_path, teacher, **keys))
    after = read_checkpoint(str(tmp_path / "student"), "ckpt.pt")["model"]
    moved = {name for name, value in after.items() if name not in before or not torch.equal(before[name], value)}
    assert moved == {f"transformer.h.{i}.attn.alpha" for i in range(2)}
    kl = [e["kl"] for e in read_log(tmp_path / "student") if e.get("split") == "val"]
    assert kl[-1] < kl[0]


def test_only_attention_moves(tiny, tmp_path, teacher):
    before = read_checkpoint(teacher)["model"]
    train.main(student(tiny, tmp_path, teacher, distill="attention", train_only="attention"))
    after = read_checkpoint(str(tmp_path / "student"), "ckpt.pt")["model"]
    same = {name for name in before if name in after and torch.equal(before[name], after[name])}
    assert same == {name for name in before if ".attn." not in name}
    errors = [e["attention_error"] for e in read_log(tmp_path / "student") if "attention_error" in e]
    assert sum(errors[-5:]) < 0.7 * sum(errors[:5])


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(distill="none"), "needs teacher"),
        (dict(teacher=""), "needs teacher"),
        (dict(distill="attention"), "train_only=attention"),
        (dict(train_only="masks"), "has none to train"),
        (dict(teacher="no/such/folder"), "neither a folder"),
        (dict(init_from="scratch", n_layer=3, distill="attention", train_only="attention"), "n_layer=2"),
        (dict(init_from="scratch", vocab_size=300), "vocab_size=256"),
        (dict(init_from="scratch", block_size=32), "block_size=16"),
    ],
)
def test_errors_say_what_to_write(tiny, tmp_path, teacher, keys, message):
    with pytest.raises((config.ConfigError, ValueError), match=message) as error:
        train.main(student(tiny, tmp_path, teacher, **keys))
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A random GPT-2 of two layers, as transformers saves one: its folder, and the model."""
    transformers = oracle("transformers")
    torch.manual_seed(0)
    shape = dict(vocab_size=300, n_positions=32, n_embd=48, n_layer=2, n_head=4, initializer_range=0.1)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    folder = str(tmp_path_factory.mktemp("gpt2"))
    hf.save_pretrained(folder)
    return folder, hf


@pytest.mark.parametrize("name", ["mask_mix", "performer", "nsa", "gla"])
def test_gpt2_is_distilled_by_the_configs(name, gpt2, text_dataset, tmp_path, capsys):
    """config/distill_*.py as they are, but for the folder of the weights and the size: conversion, then both stages."""
    folder, _ = gpt2
    file = os.path.join(os.path.dirname(config.__file__), f"distill_{name}.py")
    sizes = dict(
        block_size=16, batch_size=4, warmup_iters=2, distill_attention_iters=10, max_iters=30, eval_interval=10
    )
    options = dict(
        init_from=folder, teacher=folder, dataset=text_dataset, device="cpu", eval_iters=2, learning_rate=3e-3
    )
    out_dir = str(tmp_path / "student")
    train.main([file, f"--out_dir={out_dir}", *(f"--{k}={v}" for k, v in (options | sizes).items())])
    out = capsys.readouterr().out
    assert "copied" in out and "transformer.wte" not in out  # neither new nor left
    rows = [e for e in read_log(out_dir) if e.get("split") == "val"]
    assert [e["iter"] for e in rows] == [0, 10, 20, 30] and rows[-1]["kl"] < rows[0]["kl"]
    assert GPT.from_checkpoint(out_dir).config.attention_type == name


def test_gpt2_is_scored_by_its_config(gpt2, text_dataset, tmp_path, capsys):
    """config/eval_gpt2.py gives what transformers' logits give: each token scored once, its own successor."""
    folder, hf = gpt2
    file = os.path.join(os.path.dirname(config.__file__), "eval_gpt2.py")
    options = [f"--init_from={folder}", f"--dataset={text_dataset}", "--device=cpu", f"--out_dir={tmp_path / 'eval'}"]
    train.main([file, *options, "--eval_context=32", "--eval_stride=32"])
    found = re.findall(r"(val|test): ([0-9.]+) nats a token", capsys.readouterr().out)
    assert [split for split, _ in found] == ["val", "test"]
    for split, nats in found:
        ids = torch.from_numpy(np.fromfile(os.path.join(text_dataset, f"{split}.bin"), np.uint8).astype(np.int64))
        total = 0.0
        for start in range(0, len(ids) - 1, 32):
            x, y = ids[start : start + 32], ids[start + 1 : start + 33]
            logits = hf(x[None, : len(y)]).logits[0].detach()
            total += F.cross_entropy(logits, y, reduction="sum").item()
        assert float(nats) == pytest.approx(total / (len(ids) - 1), abs=1e-4)


def test_gpt2s_tensors_are_turned(gpt2):
    folder, hf = gpt2
    start = GPT.from_pretrained(folder, attention_type="gla", gla_expand_k=1.0)
    assert "transformer.h.1.attn.c_attn.weight[q,k,v]" in start.loaded.copied
    rows = start.transformer.h[0].attn.c_attn.weight[:48]
    conv1d = hf.transformer.h[0].attn.c_attn.weight  # (in, out): turned, or silently wrong where it is square
    assert torch.equal(rows, conv1d.t()[:48]) and not torch.equal(rows, conv1d[:, :48])
    square = hf.transformer.h[0].attn.c_proj.weight
    assert torch.equal(start.transformer.h[0].attn.c_proj.weight, square.t())
    for name in ("wte", "wpe"):
        assert torch.equal(start.transformer.get_submodule(name).weight, hf.transformer.get_submodule(name).weight)
    assert start.lm_head.weight is start.transformer.wte.weight


# continuations side by side


def test_compare_prints_and_writes_both(tiny, tmp_path, teacher, capsys):
    train.main(student(tiny, tmp_path, teacher))
    (tmp_path / "prompts.txt").write_text("word1 |\nword2\n")
    options = [f"--compare={teacher},{tmp_path / 'student'}", f"--start=FILE:{tmp_path / 'prompts.txt'}"]
    options += ["--max_new_tokens=8", "--num_samples=2", "--temperature=0", "--device=cpu"]
    options += [f"--out={tmp_path / 'a' / 'b.md'}"]
    capsys.readouterr()
    assert sample.main(options) == 0
    out = capsys.readouterr().out
    assert "word1 |\n" in out and "word2\n" in out and " | " in out
    written = (tmp_path / "a" / "b.md").read_text()
    assert written.count("## ") == 2 and "word1 &#124;" in written
    rows = [line for line in written.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 * 3 and all(row.count("|") == 3 for row in rows)  # a header and two samples a prompt
