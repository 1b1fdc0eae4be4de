"""Conversion and distillation: what is copied, what is compared, what moves."""

import json
import math
import os
import re

import numpy as np
import pytest
import torch
from conftest import oracle, run_two_processes
from torch.nn import functional as F

import bench
import config
import sample
import train
from benchmarks import curves
from data.scoring import compare_with_teacher, describe_comparison, evaluate
from kernels.divergence import Divergence, divergence, kl_divergence
from model import ATTENTION, GPT, GPTConfig, ModelError, load_weights, read_checkpoint
from train import Objective

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


@pytest.mark.parametrize("matching", [False, True])
def test_objective_adds_the_penalty(matching, fresh_rng):
    """Whole, or the share of it that counts; beside the divergence and beside the error of attention."""
    teacher, student = make(), make(attention_type="adaptive_span", span_reg=0.3).train()
    objective, batch = Objective(student, teacher, 2.0, 0.25), tokens()
    loss, parts = objective(batch, matching)
    spans = torch.stack([block.attn.spans() + 32 for block in student.transformer.h])
    torch.testing.assert_close(parts["penalty"], 0.3 * spans.mean(1).sum())
    rest = parts["attention_error"] if matching else 4 * parts["kl"] + 0.25 * parts["ce"]
    torch.testing.assert_close(loss, rest + parts["penalty"])
    half, halved = objective(batch, matching, 0.5)
    torch.testing.assert_close(halved["penalty"], parts["penalty"] / 2)
    torch.testing.assert_close(half, rest + parts["penalty"] / 2)


def test_float16_gradients_survive_until_the_loss_scale(fresh_rng):
    """Of thousands of tokens most gradients are below float16's smallest number: the scale must reach them before they
    are rounded."""
    p, q = 3 * torch.randn(2, 8, 2000), 3 * torch.randn(2, 8, 2000)
    targets, grads = torch.zeros(2, 8, dtype=torch.long), []
    for dtype, scale in ((torch.float16, 2.0**16), (torch.float32, 1.0)):
        logits = q.to(torch.float16).to(dtype).requires_grad_()
        (scale * kl_divergence(p.to(torch.float16).to(dtype), logits, targets)).backward()
        grads.append(logits.grad.float() / scale)
    half, whole = grads
    small = (whole.abs() > 1e-9) & (whole.abs() < 2e-8)
    assert small.sum() > 100 and (half[small] != 0).all()
    torch.testing.assert_close(half, whole, rtol=2e-2, atol=1e-8)


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


@pytest.mark.parametrize("keys", [dict(attention_type="gla"), dict(attention_type="adaptive_span", span_reg=1.0)])
def test_comparison_equals_a_loop(keys, fresh_rng):
    teacher, student = make(dropout=0.5).train(), make(dropout=0.5, **keys).train()
    batches = [tokens(3), tokens(2)]
    batches[0][1][0, :5] = -1
    teacher.eval()  # as load_teacher leaves it; the student is put into evaluation for the while
    have = compare_with_teacher(student, teacher, batches, CPU, chunk=40 * 7)
    assert student.training
    student.eval()
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
    shape = dict(mamba2_expand=1.0) if name == "mamba2" else {}  # by default its output projection is wider
    teacher, student, batch = make(), make(attention_type=name, **shape), tokens()
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
    "ours, theirs, name",
    [
        (dict(attention_type="adaptive_span"), dict(span_param="ratio"), "span"),
        (dict(attention_type="adaptive_span", span_max=4), dict(span_max=16), "span"),
        (dict(attention_type="adaptive_span"), dict(block_size=8), "span"),
        (dict(attention_type="mask_mix"), dict(mask_mix_candidates="offset_0,every_2,every_3,every_4,full"), "alpha"),
        (
            dict(attention_type="adaptive_span", use_triangle_wave_masking=True),
            dict(period_max_triangle_wave_masking=9.0),
            "period",
        ),
    ],
)
def test_a_masks_numbers_are_copied_where_they_mean_the_same(ours, theirs, name):
    source, same, other = make(**ours), make(**ours), make(**ours | theirs)
    full = f"transformer.h.1.attn.{name}"
    torch.nn.init.normal_(source.get_parameter(full))
    before = other.get_parameter(full).clone()
    assert full in load_weights(same, source.state_dict(), source.config).copied
    assert torch.equal(same.get_parameter(full), source.get_parameter(full))
    report = load_weights(other, source.state_dict(), source.config)
    assert full in report.new and full in report.left and torch.equal(other.get_parameter(full), before)
    wave = make(**ours | dict(attention_type="adaptive_span", use_triangle_wave_masking=True))
    if name == "span":  # another factor beside it leaves it what it was
        assert full in load_weights(wave, source.state_dict(), source.config).copied


def test_the_report_names_layers_that_are_not_all():
    source, deeper = make(), make(n_layer=4)
    text = str(load_weights(deeper, source.state_dict(), source.config))
    assert "new (not in the file): transformer.h.2,3.ln_1.weight" in text
    assert "transformer.h.*.attn.c_attn" in str(
        load_weights(make(attention_type="gla"), source.state_dict(), source.config)
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
    sizes = dict(learning_rate=3e-3, max_iters=40, lr_decay_iters=40)
    return tiny(**dict(out_dir=str(tmp_path / "student")) | sizes | keys)


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


def test_rows_are_of_held_out_text_and_best_is_their_best(tiny, tmp_path, teacher, capsys):
    """A row is the comparison on the fixed batches of val, and no training row has it; best.pt is the trained student
    with the lowest divergence and penalty, also where that of the cross-entropy is another."""
    train.main(student(tiny, tmp_path, teacher, distill_attention_iters=10, eval_interval=5, distill_ce=0.1))
    folder, log = str(tmp_path / "student"), read_log(tmp_path / "student")
    rows = {e["iter"]: e for e in log if e.get("split") == "val"}
    assert not any("kl" in e for e in log if e.get("split") == "train")
    assert all(e["student_ce"] == pytest.approx(e["val_loss"], rel=1e-6) for e in rows.values())
    best, last = read_checkpoint(folder, "best.pt"), GPT.from_checkpoint(folder, "ckpt.pt").eval()
    found = min((i for i in rows if i), key=lambda i: rows[i]["kl"])
    assert best["iter_num"] == found and best["best_val_loss"] == pytest.approx(rows[found]["kl"])
    dataset = train.Dataset(json.load(open(os.path.join(folder, "config.json")))["train"]["dataset"])
    original = GPT.from_checkpoint(teacher).eval()
    batches = train.Batches(dataset, 16, 4, 1337).fixed("val", 2)
    wanted = compare_with_teacher(last, original, batches, CPU)
    assert {name: rows[40][name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    capsys.readouterr()
    options = ["--init_from=resume", "--eval_only", "--eval_context=16", "--eval_stride=4"]
    train.main([*student(tiny, tmp_path, teacher), *options])
    out = capsys.readouterr().out
    nats = [float(x) for x in re.findall(r"(?:val|test): ([0-9.]+) nats", out)]
    shown = re.findall(r"KL from the teacher ([0-9.]+) .* token perplexity ([0-9.]+) \(teacher ([0-9.]+)\)", out)
    assert len(nats) == len(shown) == 2
    for loss, (_, ours, theirs), split in zip(nats, shown, ("val", "test")):
        assert float(ours) == pytest.approx(math.exp(loss), abs=1e-3)
        scores = evaluate(original, dataset.split(split), 16, 4, 16, CPU)
        assert float(theirs) == pytest.approx(scores["token_perplexity"], abs=1e-3)


def test_a_student_that_begins_as_its_teacher_is_not_its_own_result(tiny, tmp_path, teacher):
    """Open spans are the teacher exactly, and no divergence is below that: the penalty counts in what is best."""
    keys = dict(attention_type="adaptive_span", span_init=1.0, span_param="ratio", span_reg=1e-2, learning_rate=1e-4)
    train.main(student(tiny, tmp_path, teacher, **keys, softness_span_mask=2, mask_learning_rate=0.05, eval_interval=5))
    log, best = read_log(tmp_path / "student"), read_checkpoint(str(tmp_path / "student"), "best.pt")
    rows = {e["iter"]: e for e in log if e.get("split") == "val"}
    penalty = {e["iter"]: e["penalty"] for e in log if "penalty" in e}
    assert rows[0]["kl"] < 1e-6 and rows[40]["kl"] > 1e-6
    found = min((i for i in rows if i), key=lambda i: rows[i]["kl"] + penalty[i])
    assert best["iter_num"] == found > 5 and best["best_val_loss"] == pytest.approx(rows[found]["kl"] + penalty[found])


def test_the_objectives_keys_reach_it(tiny, tmp_path, teacher, monkeypatch):
    """A step's loss is t^2 KL + w CE of its own row; the teacher of a model with dropout does not drop."""
    teachers = []
    step = train.Run.step
    monkeypatch.setattr(train.Run, "step", lambda run: teachers.append(run.objective.teacher.training) or step(run))
    train.main(student(tiny, tmp_path, teacher, distill_temperature=3.0, distill_ce=0.5))
    rows = [e for e in read_log(tmp_path / "student") if "loss" in e]
    assert len(rows) == 40 and not any(teachers)
    for e in rows:
        assert e["loss"] == pytest.approx(9 * e["kl"] + 0.5 * e["ce"], rel=1e-5)


def test_best_has_seen_a_step_with_the_penalty(tiny, tmp_path, teacher):
    """An evaluation just before the first step that counts the penalty is none of a student with it."""
    keys = dict(attention_type="adaptive_span", span_init=1.0, span_param="ratio", span_reg=1e-2, penalty_start=20)
    train.main(student(tiny, tmp_path, teacher, **keys, softness_span_mask=2, mask_learning_rate=0.05, eval_interval=5))
    assert read_checkpoint(str(tmp_path / "student"), "best.pt")["iter_num"] > 20


def test_a_resumed_run_remembers_where_it_began(tiny, tmp_path, teacher):
    folder = tmp_path / "student"
    for stop, keys in ((4, {}), (6, dict(init_from="resume")), (8, dict(init_from="resume"))):
        train.main([*student(tiny, tmp_path, teacher, **keys), f"--max_iters={stop}"])
        assert json.loads((folder / "config.json").read_text())["train"]["init_from"] == teacher
        assert read_checkpoint(str(folder), "ckpt.pt")["config"]["init_from"] == teacher


def test_best_is_found_again_when_the_teacher_leaves(tiny, tmp_path, teacher):
    """A divergence is no loss to compare with."""
    train.main([*student(tiny, tmp_path, teacher), "--max_iters=10"])
    options = student(tiny, tmp_path, teacher, init_from="resume", teacher="", distill="none", eval_interval=10)
    train.main([*options, "--max_iters=30"])
    best = read_checkpoint(str(tmp_path / "student"), "best.pt")
    losses = {e["iter"]: e["val_loss"] for e in read_log(tmp_path / "student") if e.get("split") == "val"}
    later = min((20, 30), key=losses.get)
    assert best["iter_num"] == later and best["best_val_loss"] == pytest.approx(losses[later])


@pytest.mark.parametrize("init_from", ["scratch", None, "resume"])
def test_a_teacher_is_not_written_over(tiny, tmp_path, teacher, init_from):
    before = {name: open(os.path.join(teacher, name), "rb").read() for name in ("best.pt", "ckpt.pt", "log.jsonl")}
    keys = {} if init_from is None else dict(init_from=init_from)
    link = tmp_path / "link"
    link.symlink_to(teacher)
    with pytest.raises(config.ConfigError, match="out_dir=.* is the folder of teacher"):
        train.main([*student(tiny, tmp_path, teacher, attention_type="softmax", **keys), f"--out_dir={link}"])
    with pytest.raises(config.ConfigError, match="out_dir=.* is the folder of init_from"):
        train.main(tiny(init_from=teacher, out_dir=teacher))
    assert train.main(tiny(init_from=teacher, out_dir=teacher, dry_run=True)) == 0  # writes nothing
    assert all(open(os.path.join(teacher, name), "rb").read() == data for name, data in before.items())


def test_muon_may_have_all_there_is(tiny, tmp_path, teacher):
    """Softmax attention without biases is matrices alone: no group is left for AdamW, here and on resume."""
    keys = dict(attention_type="softmax", train_only="attention", optimizer="muon", min_lr=1e-4, eval_interval=5)
    train.main([*student(tiny, tmp_path, teacher, **keys, distill_ce=1.0), "--max_iters=5"])
    resume = student(tiny, tmp_path, teacher, **keys | dict(init_from="resume"), distill_ce=1.0)
    assert train.main([*resume, "--max_iters=10"]) == 0
    with pytest.raises(train.ModelError, match="optimizer=adamw, train_only=all"):
        train.main([*resume, "--train_only=all", "--optimizer=adamw", "--max_iters=12"])
    keys |= dict(attention_type="mask_mix", train_only="masks", out_dir=str(tmp_path / "masks"))
    train.main([*student(tiny, tmp_path, teacher, **keys), "--max_iters=2"])  # and none for Muon
    assert "muon" not in read_checkpoint(str(tmp_path / "masks"), "ckpt.pt")


def test_resuming_a_distillation_is_exact(tiny, tmp_path, teacher):
    whole, parts = (dict(distill_attention_iters=5, out_dir=str(tmp_path / name)) for name in ("whole", "parts"))
    arguments = [*student(tiny, tmp_path, teacher), "--distill_attention_iters=5", "--eval_interval=4"]
    train.main([*arguments, f"--out_dir={whole['out_dir']}", "--max_iters=12"])
    for stop in (4, 12):
        resume = ["--init_from=resume"] if stop == 12 else []
        train.main([*arguments, f"--out_dir={parts['out_dir']}", f"--max_iters={stop}", *resume])
    a, b = (read_checkpoint(folder["out_dir"], "ckpt.pt")["model"] for folder in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_two_processes_distil_the_same_student(tiny, tmp_path, teacher):
    """Also in the steps that match attention, which reach nothing else of the model."""
    keys = dict(distill_attention_iters=10, batch_size=2, gradient_accumulation_steps=2)
    arguments = [*student(tiny, tmp_path, teacher, **keys), "--max_iters=20"]
    train.main([*arguments, f"--out_dir={tmp_path / 'one'}"])
    run_two_processes([*arguments, f"--out_dir={tmp_path / 'two'}"])
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    steady = {"ms", "tokens_per_s", "cpu_s", "wall_s", "rss_mb"}
    assert len(one) == len(two) == 26
    for a, b in zip(one, two):
        a, b = ({k: v for k, v in row.items() if k not in steady} for row in (a, b))
        assert a == pytest.approx(b, abs=1e-4)


def test_curves_of_a_student(tiny, tmp_path, teacher, monkeypatch):
    """The steps that match attention have no cross-entropy to draw; the distance from the teacher has a panel."""
    keys = dict(distill_attention_iters=10, attention_type="mask_mix", mask_mix_candidates="offset_0,window_3")
    train.main(student(tiny, tmp_path, teacher, **keys))
    figures = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, path: figures.append(figure))
    assert bench.main(["--what=curves", f"--out_dir={tmp_path / 'student'}", "--json=", "--device=cpu"]) == 0
    panels = {panel.get_ylabel() or panel.get_xlabel(): panel for panel in figures[0].axes}
    rows = [e for e in read_log(tmp_path / "student") if e.get("split") == "val"]
    line, rows = panels["KL from the teacher (nats per token)"].lines[0], rows[1:]  # step 0 is left out
    assert list(line.get_ydata()) == [e["kl"] for e in rows] and list(line.get_xdata()) == [e["iter"] for e in rows]
    losses = panels["loss, estimate (nats/token)"].lines
    assert [len(line.get_xdata()) for line in losses[:2]] == [30, 4]
    assert "peak memory of the process (MB)" in panels
    assert sum(len(line.get_xdata()) == 5 for line in panels[curves.TRAJECTORIES["alpha"]].lines) == 4  # 2 layers


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
        (dict(init_from="scratch", vocab_size=300), "write --vocab_size=256"),
        (dict(init_from="scratch", n_layer=3, distill_attention_iters=2), "n_layer=2"),
        (dict(init_from="scratch", n_embd=64, distill_attention_iters=2), "n_embd=32"),
        (dict(init_from="scratch", block_size=32), "ends at block_size=16"),
        (dict(attention_type="none", distill_attention_iters=2), "distill_attention_iters=0"),
        (dict(attention_type="none", distill="attention", train_only="attention"), "has none to train"),
        (dict(n_embd=64), "none of its tensors has a place"),
    ],
)
def test_errors_say_what_to_write(tiny, tmp_path, teacher, keys, message):
    with pytest.raises((config.ConfigError, ValueError, ModelError), match=message) as error:
        train.main(student(tiny, tmp_path, teacher, **keys))
    assert "\n" not in str(error.value)


def test_a_teacher_must_be_whole_and_have_what_is_matched(tiny, tmp_path, teacher):
    bare = str(tmp_path / "bare")
    train.main(tiny(out_dir=bare, max_iters=2, attention_type="none"))
    with pytest.raises(config.ConfigError, match="layers without attention"):
        train.main(student(tiny, tmp_path, bare, attention_type="gla", distill_attention_iters=2))
    stored = torch.load(os.path.join(teacher, "best.pt"), weights_only=True)
    del stored["model"]["transformer.h.0.attn.c_attn.weight"]
    torch.save(stored, os.path.join(teacher, "best.pt"))
    with pytest.raises(ModelError, match="lacks transformer.h.0.attn.c_attn.weight"):
        train.main(student(tiny, tmp_path, teacher))


def test_a_hopeless_teacher_is_described():
    text = describe_comparison(dict(kl=1.0, student_ce=math.log(3), teacher_ce=1000.0, agreement=0.25))
    assert "token perplexity 3.000 (teacher inf)" in text and "25.0 %" in text


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
    """config/distill_gpt2.py as it is, but for the folder of the weights and the size: conversion, then both stages."""
    folder, _ = gpt2
    file = os.path.join(os.path.dirname(config.__file__), "distill_gla.py" if name == "gla" else "distill_gpt2.py")
    sizes = dict(
        block_size=16, batch_size=4, warmup_iters=2, distill_attention_iters=10, max_iters=30, eval_interval=10
    )
    options = dict(
        init_from=folder, teacher=folder, dataset=text_dataset, device="cpu", eval_iters=2, learning_rate=3e-3
    )
    options |= dict(attention_type=name)
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


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(scale_attn_weights=False), "scale_attn_weights"),
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (dict(layer_norm_epsilon=1e-2), "layer_norm_epsilon"),
        (dict(activation_function="relu"), "relu"),
        (dict(model_type="llama"), "of type llama"),
        ("transformer.h.1.attn.c_attn.weight", "lacks transformer.h.1.attn.c_attn.weight"),
    ],
)
def test_a_folder_that_has_no_equal_here_is_refused(keys, message, gpt2, tmp_path):
    """Copied without a word, its logits would be others: never."""
    folder, hf = gpt2
    hf.save_pretrained(tmp_path)
    if isinstance(keys, str):
        hf.save_pretrained(
            tmp_path, state_dict={n: w for n, w in hf.state_dict().items() if n not in (keys, "lm_head.weight")}
        )
    else:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    with pytest.raises(ModelError, match=message) as error:
        GPT.from_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_folder_that_does_not_say_its_type_is_gpt2s(gpt2, tmp_path):
    folder, hf = gpt2
    hf.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "model_type"}))
    assert torch.equal(GPT.from_pretrained(str(tmp_path)).transformer.wte.weight, hf.transformer.wte.weight)


def test_a_head_of_its_own_is_kept(gpt2, tmp_path):
    transformers = oracle("transformers")
    hf = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**gpt2[1].config.to_diff_dict() | dict(tie_word_embeddings=False))
    ).eval()
    hf.save_pretrained(tmp_path)
    ours, idx = GPT.from_pretrained(str(tmp_path)).eval(), torch.randint(300, (2, 20))
    assert ours.config.embedding == "untied" and ours.loaded.new == ours.loaded.left == []
    torch.testing.assert_close(ours(idx, idx)[0], hf(idx).logits, rtol=0, atol=1e-4)


# continuations side by side


def test_each_model_continues_each_prompt_alone(tiny, tmp_path, teacher, capsys):
    """The cell of a model and a prompt is what the model says by itself, with the same seed for each."""
    train.main(tiny(out_dir=tmp_path / "other", attention_type="gla", max_iters=5, learning_rate=1e-2))
    prompts, folders = ["word1 ", "word2"], [teacher, str(tmp_path / "other"), teacher]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    options = ["--max_new_tokens=30", "--temperature=1", "--device=cpu", "--seed=5", "--num_samples=1"]
    out = tmp_path / "side.md"
    sample.main(
        [f"--compare={','.join(folders)}", f"--start=FILE:{tmp_path / 'prompts.txt'}", f"--out={out}", *options]
    )
    tables = [part.split("\n") for part in out.read_bytes().decode().split("## ")[1:]]
    assert len(tables) == 2
    for prompt, lines in zip(prompts, tables):
        cells = [cell.strip() for cell in [line for line in lines if line.startswith("| ")][-1].strip("|").split("|")]
        assert len(cells) == 3 and cells[0] == cells[2] != cells[1]
        for folder, cell in zip(folders[:2], cells):
            capsys.readouterr()
            sample.main([f"--out_dir={folder}", f"--start={prompt}", *options])
            alone = capsys.readouterr().out
            letters = [re.sub(r"[^A-Za-z0-9]", "", text) for text in (cell, alone)]
            assert letters[0] and letters[0] in letters[1]


def test_a_hugging_face_folder_is_compared(tiny, tmp_path, teacher, gpt2, monkeypatch, capsys):
    """GPT-2's weights, of a folder, beside a run: read as GPT-2's, not taken for a checkpoint of ours."""
    meta = json.load(open(os.path.join(teacher, "config.json")))["data"]  # bytes: tiktoken's files need a network
    monkeypatch.setattr(sample, "load_gpt2", lambda source: (GPT.from_pretrained(source), meta))
    assert sample.main([f"--compare={teacher},{gpt2[0]}", "--start=word", "--max_new_tokens=5", "--device=cpu"]) == 0
    assert "word\n" in capsys.readouterr().out


def test_comparing_nothing_is_said(capsys):
    with pytest.raises(config.ConfigError, match="names no folder"):
        sample.main(["--compare=,", "--start=a"])


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
