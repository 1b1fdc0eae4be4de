"""sample.py and bench.py as a user runs them, on a checkpoint trained for a moment."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import check_units

import bench
import config
import data
import sample
import train
from benchmarks import curves, operators, peers, runs, steps, style
from data import BytesCodec, DataError, SymbolsCodec
from data.scoring import evaluate
from model import GPT, GPTConfig, NoAttention
from weights import ModelError


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
    dataset = steps.random_dataset(folder, vocab_size=12, n=3000)
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


@pytest.fixture
def measured(tmp_path):
    """`measured(arguments)` runs bench.py and returns the tables that it wrote."""

    def run(*arguments):
        path = tmp_path / "bench.json"
        assert bench.main([f"--json={path}", f"--png={tmp_path / 'bench.png'}", "--device=cpu", *arguments]) == 0
        tables = json.loads(path.read_text())["tables"]
        check_units(tables)
        return tables

    return run


def test_control_characters_stay_off_a_terminal(monkeypatch, capsys):
    prompt, tokens = "a\x1b[2J\tb\n", [torch.tensor([[i]]) for i in b"\x1b]0;\x07c\r\n"]
    for terminal, want in ((True, "a\\x1b[2J\tb\n\\x1b]0;\\x07c\\r\n\n"), (False, "a\x1b[2J\tb\n\x1b]0;\x07c\r\n\n")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)  # noqa: B023
        sample.print_stream(prompt, tokens, BytesCodec())
        assert capsys.readouterr().out == want


def test_an_empty_prompt_file_is_no_prompt(tiny, tmp_path):
    train.main(tiny(out_dir=str(tmp_path / "run"), max_iters=1))
    (tmp_path / "empty").write_text("")
    for option in (f"--compare={tmp_path / 'run'}", f"--out_dir={tmp_path / 'run'}"):
        with pytest.raises(config.ConfigError, match="--start is empty"):
            sample.main([option, f"--start=FILE:{tmp_path / 'empty'}"])


def test_a_classifier_answers_with_a_label(tiny, tmp_path, labelled_dataset, capsys):
    """The likeliest label first, probabilities of labels alone; a longer text is the mean over its records."""
    keys = dict(
        dataset=labelled_dataset, max_iters=160, lr_decay_iters=160, learning_rate=1e-2, batch_size=32, dropout=0.0
    )
    train.main(tiny(**keys))
    capsys.readouterr()
    folder = str(tmp_path / "run")

    def answer(start):
        lines = text_of(capsys, f"--out_dir={folder}", f"--start={start}").splitlines()
        pairs = {label: float(p) for label, p in (line.split() for line in lines[1:])}
        assert list(pairs) == sorted(pairs, key=lambda label: -pairs[label]) and lines[0] == next(iter(pairs))
        assert sum(pairs.values()) == pytest.approx(1, abs=2e-4) and set(pairs) == {"no", "yes", "never"}
        return pairs

    model, codec = GPT.from_checkpoint(folder).eval(), train.Dataset(labelled_dataset).codec

    def by_hand(text):
        ids = torch.tensor([codec.encode(text)])
        with torch.no_grad():
            p = model(ids)[0][0, -1, 10:13].softmax(-1)
        return dict(zip(("no", "yes", "never"), p.tolist()))

    for text, label in (("a b x c d e", "yes"), ("a b c d e f", "no"), ("c a x", None)):
        found = answer(text)
        assert found == pytest.approx(by_hand(text), abs=1e-4) and label in (None, next(iter(found)))
    (tmp_path / "prompt").write_text("a b x c d e  a b c d e f  x a\n")  # the last record begins before the last two
    parts = [by_hand(t) for t in ("a b x c d e", "a b c d e f", "c d e f x a")]
    expected = {label: sum(p[label] for p in parts) / 3 for label in parts[0]}
    assert answer(f"FILE:{tmp_path / 'prompt'}") == pytest.approx(expected, abs=1e-4)
    with pytest.raises(config.ConfigError, match="labels them"):
        sample.main([f"--compare={folder},{folder}", "--start=a b"])
    with pytest.raises(config.ConfigError, match="empty"):
        sample.main([f"--out_dir={folder}", "--start= "])


def test_a_text_is_stripped_as_the_records_were(tiny, tmp_path, capsys, fresh_rng, monkeypatch):
    """A file's last newline is not the byte at which a model of stripped sentences has learnt to answer."""
    read, original = [], sample.label_probabilities

    def spy(model, tokens, *rest):
        read.append(list(tokens))
        return original(model, tokens, *rest)

    monkeypatch.setattr(sample, "label_probabilities", spy)
    codec, labels = data.BytesCodec(), data.byte_labels(["no", "yes"])
    tokens, targets = fresh_rng.integers(97, 123, (50, 8)), np.full((50, 8), -1)
    targets[:, -1] = fresh_rng.integers(254, 256, 50)
    (tmp_path / "prompt").write_text(" ab cd\n")
    for stripped in (False, True):
        splits = {name: data.write_records(tmp_path / "set", name, [(tokens, targets)], codec) for name in data.SPLITS}
        about = dict(source="test", sha256="", label="x", record_len=8, labels=labels)
        data.write_meta(tmp_path / "set", codec, splits, **about, **({"stripped": True} if stripped else {}))
        train.main(tiny(dataset=str(tmp_path / "set"), max_iters=5, learning_rate=0.1, init_from="scratch"))
        capsys.readouterr()
        run = f"--out_dir={tmp_path / 'run'}"
        read.clear()
        for start in (f"FILE:{tmp_path / 'prompt'}", " ab cd\n", "ab cd"):
            text_of(capsys, run, f"--start={start}")
        assert read[0] == read[1] and read[2] == list(b"ab cd") and (read[1] == read[2]) == stripped
    with pytest.raises(config.ConfigError, match="empty"):
        sample.main([run, "--start= \n"])
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"yes"', '"\\u001b[2J"'))
    assert "\\x1b[2J" in text_of(capsys, run, "--start=ab cd")


def test_quality_is_the_full_pass(checkpoint, text_dataset, tmp_path, measured, capsys):
    row = measured("--what=quality", checkpoint, "--split=val", "--eval_stride=4")["quality"]["rows"][0]
    split = train.Dataset(text_dataset).split("val")
    scores = evaluate(GPT.from_checkpoint(str(tmp_path / "run")), split, 16, 4, 3, config.resolve_device("cpu", "auto"))
    assert row["split"] == "val" and row["nats/token"] == pytest.approx(scores["loss"], rel=1e-6)
    assert row["bits/byte"] == pytest.approx(scores["bits_per_byte"], rel=1e-6)
    assert f"{row['nats/token']:.6f} |" in capsys.readouterr().out


def test_step_and_decode_print_their_figures(measured):
    tiny = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32", "--rounds=2"]
    row = measured("--what=step", "--batch_size=2", "--seconds=0.02", *tiny)["step"]["rows"][0]
    per_token = 6 * (12 * 32**2 + 3 * 32 + 256 * 32) + 12 * 32 * 32
    assert row["nanoGPT's count (MFLOP/token)"] == per_token / 1e6 and row["batch (sequences)"] == 2
    assert row["tokens/s"] == pytest.approx([1000 * 64 / ms for ms in row["step (ms)"]])
    assert 0 < row["of the peak by it (share)"] < 1 and 0 < max(row["of the matmul peak (share)"]) < 1
    tables = measured("--what=decode", "--tokens=50", "--seconds=0.02", *tiny)
    assert tables["decode"]["rows"][0]["same greedy text"] == "yes" and "positions" not in tables


def test_operators_beside_softmax_and_other_implementations(measured, capsys):
    options = ["--shapes=1x40x2x16x24,2x33x1x16x16", "--rounds=2", "--seconds=0.01", "--peers=true"]
    rows = measured("--what=ops", *options)["ops"]["rows"]
    shapes = list(dict.fromkeys(row["B x T x H x K x V"] for row in rows))
    names = [[row["operator"] for row in rows if row["B x T x H x K x V"] == shape] for shape in shapes]
    on_cpu = {name for name, (_, device, *_) in peers.PEERS.items() if device == "cpu"}
    wanted = {*operators.OPERATORS} - {"span", "mask_mix"} | {"span 256", "mask_mix of 5"} | on_cpu
    assert shapes == ["1 x 40 x 2 x 16 x 24", "2 x 33 x 1 x 16 x 16"]
    assert {n for n in wanted if "nsa" not in n} == set(names[0])  # nsa wants values like keys
    assert wanted < set(names[1]) and names[0][0] == names[1][0] == "softmax"
    for row in rows[: len(names[0])]:
        both, softmax = row["forward + backward (ms)"], rows[0]["forward + backward (ms)"]
        assert row["of softmax (ratio)"] == pytest.approx([a / b for a, b in zip(both, softmax)])
        assert min(both) > 0 and len(both) == 2
    lines = capsys.readouterr().out.splitlines()
    errors = [float(re.search(r"by (\S+) of its norm", line)[1]) for line in lines if "differs" in line]
    assert len(errors) == sum(name in on_cpu for shape in names for name in shape) and max(errors) < 1e-5
    with pytest.raises(config.ConfigError, match="--shapes"):
        bench.main(["--what=ops", "--shapes=2x3"])


def test_decoding_costs_by_position_and_state_size(measured):
    tiny = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--rounds=1"]
    options = ["--what=decode", "--attention_type=gla", "--pos_emb=none", "--tokens=5", "--seconds=0.05"]
    rows = measured(*options, "--positions=10,3000", *tiny)["positions"]["rows"]
    # two layers: of gla one head of 16 x 32 floats; of softmax a ring of 32 keys and values, twice
    assert [row["state (bytes)"] for row in rows] == [2 * 16 * 32 * 4] * 2 + [2 * 2 * 2 * 32 * 32 * 4] * 2
    assert [(row["attention"], row["position (tokens)"]) for row in rows] == [
        ("gla", 10), ("gla", 3000), ("softmax", 10), ("softmax", 3000)
    ]  # fmt: skip
    for i, row in enumerate(rows):
        ratio = [a / b for a, b in zip(row["a token (us)"], rows[2 + i % 2]["a token (us)"])]
        assert row["of softmax (ratio)"] == pytest.approx(ratio)
    with pytest.raises(config.ConfigError, match="--positions=0"):
        bench.main([*options, "--positions=0", "--device=cpu", *tiny])


def test_curves_write_a_picture(checkpoint, tmp_path):
    assert bench.main(["--what=curves", checkpoint, f"--png={tmp_path / 'a' / 'curves.png'}"]) == 0
    assert (tmp_path / "a" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "run" / "log.jsonl").write_text(json.dumps({"iter": 0, "split": "val", "val_loss": 1.0}) + "\n")
    with pytest.raises(config.ConfigError, match="log.jsonl"):
        bench.main(["--what=curves", checkpoint])


def test_curves_follow_the_masks(tiny, tmp_path):
    """Each parameter of a mask is a line through what the log holds at each evaluation, named after its candidate."""
    keys = dict(mask_mix_candidates="offset_1,full", mask_mix_per_head=True)
    train.main(tiny(attention_type="softmax,mask_mix", **keys))
    steps, evaluations, stats = runs.read_log(str(tmp_path / "run"))
    figure, (panel,) = style.grid(1)
    (group,) = runs.groups([str(tmp_path / "run")])
    curves.draw_trajectories(group, stats, "alpha", panel, [])
    lines = [line for line in panel.lines if len(line.get_xdata()) == len(stats)]
    assert len(lines) == 2 * 2 and [e["iter"] for e in stats] == [0, 10, 20]
    for i, line in enumerate(lines):
        head, candidate = divmod(i, 2)
        assert list(line.get_xdata()) == [0, 10, 20]
        want = [e["stats"]["h.1.alpha"][head][candidate] for e in stats]
        assert list(line.get_ydata()) == pytest.approx(want) and want[0] != want[-1]
    colours = {label.get_text(): label.get_color() for label in panel.texts}
    assert colours == {"offset_1": lines[0].get_color(), "full": lines[1].get_color()}
    assert bench.main(["--what=curves", f"--out_dir={tmp_path / 'run'}", f"--png={tmp_path / 'curves.png'}"]) == 0


def test_compiled_steps_are_the_same_text(tiny, tmp_path, capsys):
    """One graph serves all positions, also after a second prompt; a state that grows stays eager."""
    for name in ("gla,performer", "softmax"):
        folder = str(tmp_path / name)
        train.main(tiny(attention_type=name, out_dir=folder, max_iters=5, lr_decay_iters=5))
        capsys.readouterr()
        arguments = [f"--out_dir={folder}", "--start=word1 word2", "--temperature=0", "--num_samples=2"]
        eager = text_of(capsys, *arguments)
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters["stats"]
        counters.clear()
        assert sample.main(["--device=cpu", "--max_new_tokens=40", "--compile=True", *arguments]) == 0
        out, err = capsys.readouterr()
        assert out == eager
        if name == "softmax":
            assert "eager: the state of softmax grows" in err and not counters["unique_graphs"]
        else:
            assert "step compiled in" in err and counters["unique_graphs"] == 1


@pytest.mark.parametrize(
    "keys",
    [
        dict(attention_type="performer,kda", pos_emb="rope", delta_conv=3),
        pytest.param(dict(attention_type="gsa,mamba2,none", pos_emb="learned", mamba2_conv=2), marks=pytest.mark.slow),
    ],
    ids=["rope", "learned"],
)
def test_a_compiled_step_goes_where_the_eager_one_goes(keys, fresh_rng):
    """Token by token, with several at once between, for two batches one after the other, and for one of another size;
    two batches in turns are refused."""
    torch._dynamo.reset()
    lm = GPT(GPTConfig(n_layer=3, n_head=2, n_embd=32, block_size=64, vocab_size=11, **keys)).eval()
    compiled = sample.CompiledStep(lm)

    def logits(step, idx, sizes):
        found, state, at = [], lm.init_state(len(idx)), 0
        for n in sizes:
            y, state = step(idx[:, at : at + n], state)
            found.append(y)
            at += n
        return torch.cat(found, 1), state

    with torch.no_grad():
        for rows, sizes in ((2, [5, 1, 1, 1, 4, 1, 1]), (2, [1, 1, 1]), (1, [3, 1, 1]), (2, [2, 1])):
            idx = torch.randint(11, (rows, sum(sizes)))
            found, state = logits(compiled, idx, sizes)
            torch.testing.assert_close(found, logits(lm.step, idx, sizes)[0], rtol=1e-5, atol=1e-5)
        token = torch.randint(11, (2, 1))
        compiled(token, lm.step(token, lm.init_state(2))[1])
        with pytest.raises(ModelError, match="one batch at a time"):
            compiled(token, state)


def test_a_step_whose_state_is_no_tensor_stays_eager(tiny, monkeypatch):
    lm = GPT(GPTConfig(attention_type="none", n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=5))
    monkeypatch.setattr(NoAttention, "init_state", lambda self, batch, max_len: {"seen": "nothing"})
    assert "the state of none holds more than tensors" in sample.compile_step(lm, 1)
    assert "step" not in vars(lm)
