"""Prompts of sample.py: standard input, batches, interactive; and where samples end."""

import io
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import config
import sample
import train
from data import BytesCodec, SymbolsCodec
from data.streaming import Text
from model import ATTENTION, GPT, GPTConfig

ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def text_of(capsys, *arguments):
    assert sample.main(["--device=cpu", "--max_new_tokens=30", *arguments]) == 0
    return capsys.readouterr().out


def said(cfg, model, codec, prompts):
    runtime = config.resolve_device("cpu", "float32")
    with torch.no_grad():
        found = list(sample.continuations(cfg, model, codec, prompts, runtime))
    assert [i for i, _ in found] == list(range(len(prompts)))
    return [[text.said for text in texts] for _, texts in found]


@pytest.mark.parametrize("pos_emb", ("learned", "rope"))
@pytest.mark.parametrize("name", ATTENTION)
def test_a_batch_says_what_each_prompt_says_alone(name, pos_emb, fresh_rng):
    """Prompts of several lengths, one beyond the block, two alike, in one batch or in several: the same texts."""
    keys = dict(block_size=16, vocab_size=20, n_layer=2, n_head=2, n_embd=32, attention_type=name, pos_emb=pos_emb)
    model = GPT(GPTConfig(**keys)).double().eval()
    for p in model.parameters():
        if p.dim() >= 2:
            torch.nn.init.normal_(p, std=0.3)
    codec = SymbolsCodec([*"abcdefghijklmnopqrst"])
    prompts = [fresh_rng.integers(0, 20, n).tolist() for n in (3, 21, 1, 12)]
    prompts.append(prompts[0])
    for keys in (dict(num_samples=2), dict(temperature=0.0, stop="c", max_new_tokens=8), dict(use_cache=False)):
        cfg = sample.SampleConfig(**dict(seed=5, temperature=1.5, max_new_tokens=12) | keys)
        together = said(cfg, model, codec, prompts)
        assert together == [said(cfg, model, codec, [ids])[0] for ids in prompts], keys
        assert together[0] == together[4]
        if cfg.num_samples == 2:
            assert len({text for texts in together for text in texts}) > 2 or name == "none", "all prompts look alike"
            assert together[0][0] != together[0][1] and len(together[0][0].split()) == 12
            torch.manual_seed(5)
            own = model.generate(torch.tensor([prompts[0]] * 2), 12, temperature=1.5, top_k=200)[:, 3:]
            assert [codec.decode(row) for row in own.tolist()] == [text.strip() for text in together[0]]


def test_batches_cost_the_fewest_steps():
    cfg = sample.SampleConfig(max_new_tokens=10, num_samples=1)
    assert sample.batches(cfg, [5, 100, 3, 15, 108, 26]) == [[2, 0, 3], [5], [1, 4]]
    assert [len(group) for group in sample.batches(cfg, [4] * 130)] == [64, 64, 2]
    wide = sample.SampleConfig(num_samples=100)
    assert sample.batches(wide, [4, 4]) == [[0], [1]]


def test_lines_are_prompts(checkpoint, capsys, tmp_path):
    """In the order of the file, each under its name; the text is the one that the prompt has alone."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("word1 word2\r\n\nword7\nwörd\n".encode())
    names = {1: "word1 word2", 3: "word7", 4: "wörd"}
    for options in ([], ["--num_samples=2", "--stop=7"]):
        alone = {n: text_of(capsys, checkpoint, f"--start={prompt}", *options) for n, prompt in names.items()}
        expected = "".join(f"=== {path}, line {n} ===\n{text}" for n, text in alone.items())
        assert text_of(capsys, checkpoint, f"--start=LINES:{path}", *options) == expected
    path.write_text("\n\n")
    for start in (f"LINES:{path}", "LINES:"):
        with pytest.raises(config.ConfigError, match="is empty: write at least one token|names no file"):
            sample.main([checkpoint, f"--start={start}"])


@pytest.fixture
def stdin(tmp_path):
    """`stdin(data)` makes some bytes the standard input of this process, as its file and as Python's object."""
    kept, python = os.dup(0), sys.stdin

    def be(data):
        (tmp_path / "stdin").write_bytes(data)
        file = os.open(tmp_path / "stdin", os.O_RDONLY)
        os.dup2(file, 0)
        os.close(file)
        sys.stdin = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")

    yield be
    os.dup2(kept, 0)
    os.close(kept)
    sys.stdin = python


def test_standard_input_is_a_prompt(checkpoint, capsys, stdin):
    for start, data, prompt in (("-", "wörd\nword1\n", "wörd\nword1\n"), ("FILE:-", "wörd", "wörd")):
        stdin(data.encode())
        assert text_of(capsys, checkpoint, f"--start={start}") == text_of(capsys, checkpoint, f"--start={prompt}")
    stdin(b"word1\nword2\n")
    said = text_of(capsys, checkpoint, "--start=LINES:-")
    assert said.startswith("=== -, line 1 ===\nword1") and "=== -, line 2 ===\nword2" in said
    for data, wrong in ((b"\xff\xfea", "not UTF-8"), (b"", "--start is empty: write at least one token")):
        stdin(data)
        with pytest.raises(config.ConfigError, match=wrong):
            sample.main([checkpoint, "--start=-", "--device=cpu"])


@pytest.mark.parametrize("codec", [BytesCodec(), SymbolsCodec(["ab", "b", "stop", "a"])])
def test_a_text_ends_before_its_stop(codec, fresh_rng):
    """However tokens cut the stop; what might become it is held back, and comes when it does not."""
    for _ in range(300):
        if isinstance(codec, BytesCodec):
            ids = list("".join(fresh_rng.choice([*"aab\n☃"], 12)).encode())[: fresh_rng.integers(1, 25)]
        else:
            ids = fresh_rng.integers(0, 4, 8).tolist()
        whole = codec.decode_bytes(ids).decode("utf-8", errors="replace")
        stop = str(fresh_rng.choice(["", "ab", "aab", "b a", "☃", "☃☃a", "\n\n", "b stop", "zz"]))
        text, pieces = Text(codec, stop, limit=len(ids)), ""
        for token in ids:
            assert not text.ended
            piece = text.add(token)
            pieces += piece
            assert text.said == pieces
            if text.ended:
                break
        assert pieces == (whole.split(stop)[0] if stop else whole), (stop, whole)
        if stop and stop in whole:
            seen = codec.decode_bytes(ids[: text.count]).decode("utf-8", errors="ignore")
            assert stop in seen and stop not in codec.decode_bytes(ids[: text.count - 1]).decode("utf-8", "ignore")
    text = Text(BytesCodec(), "ab")
    assert [text.add(b) for b in b"xaa"] == ["x", "", "a"] and text.end() == "a" == text.said[2:]


def test_stop_in_a_stream_and_in_a_batch(checkpoint, capsys):
    whole = text_of(capsys, checkpoint, "--start=word1 word2", "--temperature=0")
    stop = whole[len("word1 word2") :][6:9]
    cut = whole[: whole.index(stop, len("word1 word2"))] + "\n"
    options = [checkpoint, "--start=word1 word2", "--temperature=0", f"--stop={stop}"]
    assert text_of(capsys, *options) == cut != whole
    assert text_of(capsys, *options, "--num_samples=2") == (cut + "-" * 80 + "\n") * 2


def test_a_terminal_is_told_the_speed(checkpoint, capsys, monkeypatch):
    for options, count in (([], 30), (["--num_samples=2"], 60)):
        sample.main(["--device=cpu", "--max_new_tokens=30", checkpoint, *options])
        assert "tokens/s" not in "".join(capsys.readouterr())
        with monkeypatch.context() as patch:
            patch.setattr(sys.stdout, "isatty", lambda: True)
            sample.main(["--device=cpu", "--max_new_tokens=30", checkpoint, *options])
        out, err = capsys.readouterr()
        assert "tokens/s" not in out
        found, seconds, rate = (float(err.split()[i].replace(",", "")) for i in (0, 3, 5))
        assert found == count and abs(found / rate - seconds) < 0.06


def test_interactive(checkpoint, capsys, stdin):
    """A prompt a line, each from a seed greater by one, until an empty line; a wrong prompt is a line."""
    stdin(b"word1\nword2\nword1\n\nword3\n")
    expected = "".join(
        text_of(capsys, checkpoint, f"--start={prompt}", f"--seed={1337 + i}")
        for i, prompt in enumerate(("word1", "word2", "word1"))
    )
    assert text_of(capsys, checkpoint, "--interactive") == expected
    stdin(b"word1")  # without a line break, as a file may end
    assert text_of(capsys, checkpoint, "--interactive") == text_of(capsys, checkpoint, "--start=word1")
    for option in ("--start=a", "--compare=a"):
        with pytest.raises(config.ConfigError, match="leave out --start and --compare"):
            sample.main([checkpoint, "--interactive", option])


def test_interactive_goes_on_after_a_wrong_prompt(labelled_dataset, tiny, tmp_path, capsys, stdin):
    train.main(tiny(dataset=labelled_dataset, max_iters=1))
    capsys.readouterr()
    stdin(b"a b ? d\n   \na b c d e f\n")
    sample.main([f"--out_dir={tmp_path / 'run'}", "--interactive", "--device=cpu"])
    out, err = capsys.readouterr()
    assert err.splitlines()[0].startswith("sample.py: the prompt: unknown symbol '?'")
    assert err.splitlines()[1] == "sample.py: the prompt is empty: write at least one token"
    assert len(out.splitlines()) == 4 and set(out.split()[1::2]) == {"no", "yes", "never"}, out
    (tmp_path / "lines").write_text("a b\nc x\n")
    sample.main([f"--out_dir={tmp_path / 'run'}", f"--start=LINES:{tmp_path / 'lines'}", "--device=cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("===")] == [f"=== {tmp_path}/lines, line {n} ===" for n in (1, 2)]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_an_interrupt_ends_a_sample_alone(checkpoint):
    """Ctrl-C in the middle of an endless sample; the next prompt is answered, and the end of input ends the process."""
    command = [sys.executable, os.path.join(ROOT, "sample.py"), checkpoint, "--interactive", "--device=cpu"]
    command += ["--max_new_tokens=1000000", "--stop=9", "--seed=3"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV)
    process = subprocess.Popen([part for part in command if not part.startswith("--stop")], **pipes)
    process.stdin.write(b"word1\n")
    process.stdin.flush()
    first = process.stdout.read(40)  # it samples
    process.send_signal(signal.SIGINT)
    process.stdin.write(b"word22\n")
    process.stdin.flush()
    seen = b""
    while b"\nword22" not in seen:
        seen += process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert first.startswith(b"word1") and process.returncode == 0 and err == b"", err
