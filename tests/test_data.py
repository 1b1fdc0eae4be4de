"""data/: codecs, reader, batches, windows, and every prepare.py on small sources. No network."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import os
import subprocess
import sys
import threading
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import data

ROOT = Path(data.__file__).resolve().parents[1]
quick = settings(max_examples=60, deadline=None)


def write(folder, tokens, codec=None):
    """A data set of one array for all three splits (or a dict of arrays), through the writer of prepare.py."""
    codec = codec or data.BytesCodec()
    splits = tokens if isinstance(tokens, dict) else dict.fromkeys(data.SPLITS, tokens)
    infos = {name: data.write_split(folder, name, [bytes(t)], codec) for name, t in splits.items()}
    data.write_meta(folder, codec, infos, "made by a test", "0" * 64, "test data")
    return folder


def edit(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}), encoding="utf-8")


def fake_split(tokens):
    tokens = torch.tensor(tokens)

    def pairs(starts, length):
        rows = tokens[torch.from_numpy(starts)[:, None] + torch.arange(length + 1)]
        return rows[:, :-1], rows[:, 1:]

    return types.SimpleNamespace(pairs=pairs, n_tokens=len(tokens), where="fake: val", record_len=None)


def one_line(error, *parts):
    message = str(error.value if hasattr(error, "value") else error)
    assert "\n" not in message and len(message) < 600
    for part in parts:
        assert part in message, message


@functools.cache
def script(name):
    """data/<name>/prepare.py as a module."""
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def prepare(name, *args, cwd):
    """Run data/<name>/prepare.py as users do, from a folder that is not the repository."""
    command = [sys.executable, str(ROOT / "data" / name / "prepare.py"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@functools.cache
def bpe_missing():
    try:
        return not data.GPT2Codec().encode("a")
    except data.DataError:
        return True


def need_bpe():
    if bpe_missing():
        pytest.skip("the GPT-2 BPE files cannot be had here")


# codecs


@quick
@given(st.text(st.characters(exclude_categories=["Cs"])), st.binary())
def test_bytes_codec_round_trip(text, raw):
    codec = data.get_codec({"codec": "bytes"})
    assert codec.decode(codec.encode(text)) == text
    assert codec.decode_bytes(codec.encode_bytes(raw)) == raw
    assert codec.encode(text) == codec.encode_bytes(text.encode()).tolist()


def test_bytes_codec_edges():
    codec = data.BytesCodec()
    assert codec.decode([0xE2, 0x82]) == "\ufffd"  # half a character is shown, not raised
    assert codec.encode(b"\xff".decode("utf-8", "surrogateescape")) == [0xFF]
    with pytest.raises(data.DataError) as error:
        codec.encode("a\ud800")
    one_line(error, "ud800")
    for wrong in (256, -1):
        with pytest.raises(data.DataError) as error:
            codec.decode([65, wrong])
        one_line(error, str(wrong), "256")


@quick
@given(st.lists(st.sampled_from(["a", "b", "\u00e9", "long"])))
def test_symbols_codec_round_trip(words):
    codec = data.get_codec({"codec": "symbols", "symbols": ["a", "b", "\u00e9", "long"]})
    ids = codec.encode(" \n".join(words))
    assert codec.decode(ids) == " ".join(words)
    assert b"".join(codec.decode_bytes([i]) for i in ids) == codec.decode_bytes(ids)


def test_symbols_codec_errors():
    codec = data.get_codec({"codec": "symbols", "symbols": ["a", "b"]})
    assert codec.vocab_size == 2
    with pytest.raises(data.DataError) as error:
        codec.encode("a zebra")
    one_line(error, "'zebra'", "a b")
    with pytest.raises(data.DataError) as error:
        codec.decode([2])
    one_line(error, "id 2")
    for symbols in ([], ["a", "a"], ["a b"], None, [3]):
        with pytest.raises(data.DataError):
            data.get_codec({"codec": "symbols", "symbols": symbols})
    with pytest.raises(data.DataError) as error:
        data.get_codec({"codec": "morse"})
    one_line(error, "morse", "gpt2")


def test_gpt2_codec():
    need_bpe()
    codec = data.get_codec({"codec": "gpt2"})
    assert codec.encode("Hello world") == [15496, 995]
    assert len(codec.encode("<|endoftext|>")) > 1  # text is never taken for a special token
    text = "na\u00efve \u65e5\u672c\n\n  x"
    assert codec.decode(codec.encode(text)) == text
    assert codec.decode_bytes([50256]) == b"<|endoftext|>"
    with pytest.raises(data.DataError) as error:
        codec.decode([50257])
    one_line(error, "50257")
    with pytest.raises(data.DataError) as error:
        codec.encode_bytes(b"ab\xff")
    one_line(error, "UTF-8")


@pytest.fixture
def bpe_of_bytes(monkeypatch):
    """GPT-2's pattern and no merges, in the place of its BPE."""
    import tiktoken

    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(data.GPT2Codec, "_bpe", encoding)


def test_gpt2_codec_of_endless_whitespace(bpe_of_bytes):
    """tiktoken panics at a run of a million; one that is nearly as long as it may be is encoded."""
    codec = data.GPT2Codec()
    assert len(codec.encode("a" + " \n" * 199_999 + "b")) == 400_000
    for blank in (" ", "\n", "\u3000 "):
        with pytest.raises(data.DataError) as error:
            codec.encode("a" + blank * 1_000_001 + "b")
        one_line(error, "400000 characters of whitespace")


def test_gpt2_codec_without_its_files(monkeypatch):
    def get_encoding(name):
        raise OSError("no route to host\nsecond line")

    monkeypatch.setitem(sys.modules, "tiktoken", types.SimpleNamespace(get_encoding=get_encoding))
    monkeypatch.setattr(data.GPT2Codec, "_bpe", None)
    codec = data.get_codec({"codec": "gpt2"})
    assert codec.vocab_size == 50257  # a model can be built without them
    with pytest.raises(data.DataError) as error:
        codec.encode("a")
    one_line(error, "no route to host", "TIKTOKEN_CACHE_DIR")


# reader


def test_reader(tmp_path):
    text = b"one two\nthree"
    dataset = data.Dataset(write(tmp_path / "set", {"train": text, "val": b" a b "}))
    assert (dataset.name, dataset.vocab_size, dataset.path) == ("set", 256, (tmp_path / "set").resolve())
    assert dataset.meta["label"] == "test data" and isinstance(dataset.codec, data.BytesCodec)
    train = dataset.split("train")
    assert train.tokens.tobytes() == text
    assert (train.n_tokens, train.n_bytes, train.n_words, train.scored_bytes) == (13, 13, 3, 12)
    assert dataset.split("train") is train and dataset.split("val").n_words == 2
    with pytest.raises(data.DataError) as error:
        dataset.split("test")
    one_line(error, "'test'", "train, val")


def test_files_are_little_endian(tmp_path):
    codec = data.SymbolsCodec([f"s{i}" for i in range(1000)])
    write(tmp_path, b"s1 s515 s999", codec)
    assert (tmp_path / "val.bin").read_bytes() == b"\x01\x00\x03\x02\xe7\x03"
    dataset = data.Dataset(tmp_path)
    assert dataset.meta["dtype"] == "uint16" and dataset.codec.symbols == codec.symbols
    assert dataset.split("val").tokens.tolist() == [1, 515, 999]


def test_scored_bytes_excludes_the_first_token(tmp_path):
    write(tmp_path, b"long a a ", data.SymbolsCodec(["a", "long"]))
    assert data.Dataset(tmp_path).split("val").scored_bytes == 4
    splits = json.loads((tmp_path / "meta.json").read_text(encoding="utf-8"))["splits"]
    del splits["val"]["first_bytes"]  # optional: the codec can tell
    edit(tmp_path, splits=splits)
    assert data.Dataset(tmp_path).split("val").scored_bytes == 4


def test_unprepared_and_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ROOT", tmp_path / "data")
    for name in ("enwik8", "stdlib"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "prepare.py").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("enwik8", "data/enwik8", tmp_path / "data" / "enwik8"):
        with pytest.raises(data.DataError) as error:
            data.Dataset(name)
        assert str(error.value) == "no prepared data in data/enwik8: run python data/enwik8/prepare.py"
    with pytest.raises(data.DataError) as error:
        data.Dataset("enwiki8")
    one_line(error, "'enwiki8'", "did you mean enwik8?", "stdlib", "meta.json")
    with pytest.raises(data.DataError) as error:
        data.Dataset(tmp_path / "nowhere")
    one_line(error, "nowhere", "--out_dir")
    with pytest.raises(data.DataError) as error:
        data.Dataset("a/\0")
    one_line(error, "'a/\\x00'")
    # A folder of the working directory does not shadow the data set of the same name, a prepared path is found.
    write(tmp_path / "enwik8", b"abc")
    with pytest.raises(data.DataError):
        data.Dataset("enwik8")
    assert data.Dataset("./enwik8").split("val").n_tokens == 3
    write(tmp_path / "own", b"abc")
    assert data.Dataset("own").name == "own"
    (tmp_path / "data" / "enwik8" / "meta.json").write_bytes((tmp_path / "enwik8" / "meta.json").read_bytes())
    with pytest.raises(data.DataError) as error:
        data.Dataset("enwik8").split("val")
    one_line(error, "val.bin is missing", "python data/enwik8/prepare.py")


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"format": 2}, "format 2"),
        ({"dtype": "int64"}, "dtype 'int64'"),
        ({"dtype": ["uint8"]}, "dtype"),
        ({"vocab_size": "256"}, "vocab_size '256'"),
        ({"vocab_size": 100}, "vocab_size 100"),
        ({"codec": "morse"}, "codec 'morse'"),
        ({"splits": {}}, "splits"),
        ({"splits": {"dev": {}}}, "splits"),
        ({"splits": {"val": {"tokens": 3}}}, "split val"),
        ({"splits": {"val": {"tokens": 3, "bytes": 3, "words": 1.5}}}, "1.5 words"),
        ({"splits": {"val": 3}}, "split val"),
        ({"splits": {"val": {"tokens": 10**400, "bytes": 3}}}, "split val"),
        ({"splits": {"val": {"tokens": 3, "bytes": 3, "first_bytes": [1]}}}, "[1] first_bytes"),
        ({"splits": {"val": {"tokens": 3, "bytes": 3, "sha256": 7}}}, "7 for a sha256"),
        ({"codec": ["\x1b[2J"] * 1000}, "codec ['\\x1b[2J', "),
        ({"codec": "symbols", "symbols": ["\x1b"]}, "printable"),
        ({"codec": "symbols", "symbols": ["\ud800"]}, "printable"),
        ({"more": eval("[" * 90 + "]" * 90)}, "nested too deep"),
        ({"more": float("nan")}, "NaN is not JSON"),
    ],
)
def test_foreign_meta(tmp_path, changes, part):
    edit(write(tmp_path, b"abc"), **changes)
    with pytest.raises(data.DataError) as error:
        data.Dataset(tmp_path)
    one_line(error, str(tmp_path), part)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\x00", "[" * 10**5, "1" * 5000, " " * (1 << 25)])
def test_unreadable_meta(tmp_path, text):
    write(tmp_path, b"abc")
    (tmp_path / "meta.json").write_text(text, encoding="utf-8")
    with pytest.raises(data.DataError) as error:
        data.Dataset(tmp_path)
    one_line(error, "meta.json", "--out_dir")


@pytest.mark.parametrize(
    "size, part", [(8, "truncated: 8 bytes, meta.json says 9"), (10, "too long"), (0, "truncated")]
)
def test_wrong_size(tmp_path, size, part):
    write(tmp_path, b"abcdefghi")
    (tmp_path / "val.bin").write_bytes(bytes(size))
    dataset = data.Dataset(tmp_path)
    assert dataset.split("train").n_tokens == 9
    with pytest.raises(data.DataError) as error:
        dataset.split("val")
    one_line(error, part, "again")


def test_labels_reach_a_terminal_as_text(tmp_path, capsys):
    meta = data.write_meta(tmp_path, data.BytesCodec(), {}, "a\nb", "0" * 64, "bell \a\x1b[2J caf\u00e9")
    data.print_summary({**meta, "splits": {}}, Path("new\nline"))
    assert capsys.readouterr().out.startswith(
        "bell \\x07\\x1b[2J caf\u00e9: codec bytes, vocabulary 256, in new\\nline\n"
    )
    edit(write(tmp_path, b"abc"), label="\x1b]0;title\a")
    assert data.Dataset(tmp_path).meta["label"] == "\\x1b]0;title\\x07"


# files that are not what was prepared


def flip(file, rng):
    """Another bit somewhere in a file, of the lowest byte of a number, so that it is sound in itself."""
    raw = bytearray(file.read_bytes())
    raw[4 * rng.integers(len(raw) // 4)] ^= 1 << int(rng.integers(8))
    file.write_bytes(raw)


def use_all(folder):
    data.Batches(data.Dataset(folder), 4, 2, seed=0)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "test.bin", "train.targets.bin", "test.targets.bin"])
def test_a_flipped_bit_is_found(tmp_path, fresh_rng, name):
    if "targets" in name:
        write_targets(tmp_path, fresh_rng.integers(0, 512, 512))
    else:
        write(tmp_path, fresh_rng.bytes(3000))
    use_all(tmp_path)
    raw = (tmp_path / name).read_bytes()
    flip(tmp_path / name, fresh_rng)
    with pytest.raises(data.DataError) as error:
        use_all(tmp_path)
    one_line(error, f"{tmp_path / name}", "sha256", "again")
    (tmp_path / name).write_bytes(raw)
    use_all(tmp_path)
    splits = json.loads((tmp_path / "meta.json").read_text())["splits"]
    edit(tmp_path, splits={n: {k: v for k, v in info.items() if "sha256" not in k} for n, info in splits.items()})
    flip(tmp_path / name, fresh_rng)
    use_all(tmp_path)  # a meta.json without checksums is read as before


def test_a_file_is_verified_once(tmp_path, fresh_rng, monkeypatch):
    """Until it changes; also where what was noted is damaged, or cannot be."""
    hashed, sha256 = [], hashlib.sha256
    write(tmp_path, fresh_rng.bytes(3000))
    monkeypatch.setattr(data, "SETTLED", 10**12)
    use_all(tmp_path)
    assert not (tmp_path / ".verified").exists()  # so new that the next change could have the same time
    monkeypatch.setattr(data, "SETTLED", -1)
    monkeypatch.setattr(hashlib, "sha256", lambda: hashed.append(1) or sha256())

    def count():
        hashed.clear()
        use_all(tmp_path)
        return len(hashed)

    assert [count(), count()] == [3, 0]
    (tmp_path / "val.bin").write_bytes((tmp_path / "val.bin").read_bytes())
    assert [count(), count()] == [1, 0]
    for damage in (b"", b"\xff", b"[" * 10**5, b"[1]", b'{"val.bin": {"a": NaN}}'):
        (tmp_path / ".verified").write_bytes(damage)
        assert [count(), count()] == [3, 0]
    (tmp_path / ".verified").unlink()
    (tmp_path / ".verified").mkdir()  # as good as a folder that cannot be written
    assert [count(), count()] == [3, 3]


@pytest.mark.parametrize("kept", [0, 1 << 20])
def test_a_file_that_changes_under_a_run(tmp_path, fresh_rng, monkeypatch, kept):
    """What is changed in nothing but its time is read on; what is not as it was prepared ends in one line."""
    monkeypatch.setattr(data, "KEPT", kept)
    file, raw = tmp_path / "train.bin", fresh_rng.bytes(3000)
    for change in (
        lambda: flip(file, fresh_rng),
        lambda: file.write_bytes(raw[:-9]),
        lambda: file.write_bytes(raw * 2),
    ):
        batches = data.Batches(data.Dataset(write(tmp_path, raw)), 4, 2, seed=0)
        file.write_bytes(raw)
        batches.batch("train")
        change()
        with pytest.raises(data.DataError) as error:
            batches.batch("train")
        one_line(error, "train.bin", "again")
        with pytest.raises(data.DataError):
            next(batches.fixed("train", 1))


def test_a_file_that_is_cut_while_it_is_read(tmp_path, fresh_rng, monkeypatch):
    monkeypatch.setattr(data, "KEPT", 0)
    batches = data.Batches(data.Dataset(write(tmp_path, fresh_rng.bytes(3000))), 4, 2, seed=0)
    state = batches.dataset.split("train")._tokens._state
    monkeypatch.setattr(data.Numbers, "_read_state", lambda self: state)  # as if it was cut after this was looked at
    os.truncate(tmp_path / "train.bin", 2)
    with pytest.raises(data.DataError) as error:
        batches.batch("train")
    one_line(error, "train.bin became shorter", "again")


def test_id_beyond_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 4)  # so that the bad id is in a later chunk of the check
    write(tmp_path, b"a b a b a b a b b", data.SymbolsCodec(["a", "b"]))
    assert data.Dataset(tmp_path).split("val").n_tokens == 9
    (tmp_path / "val.bin").write_bytes(bytes([0] * 8 + [2]))
    with pytest.raises(data.DataError) as error:
        data.Dataset(tmp_path).split("val")
    one_line(error, "val.bin", "id 2", "vocabulary of 2", "again")


# batches


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """Token i of the train split is i, so that a row tells its start."""
    folder = tmp_path_factory.mktemp("numbers")
    codec = data.SymbolsCodec([f"n{i}" for i in range(2000)])
    text = {"train": " ".join(codec.symbols).encode(), "val": " ".join(codec.symbols[1000:1100]).encode()}
    return data.Dataset(write(folder, text, codec))


def rows(batches, split="train", draws=1):
    return torch.cat([batches.batch(split)[0] for _ in range(draws)])


def test_batch_shapes_and_shift(numbers):
    x, y = data.Batches(numbers, 7, 300, seed=1).batch("train")
    assert x.shape == y.shape == (300, 7) and x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(y, x + 1) and torch.equal(x[:, 1:], y[:, :-1])
    assert x[:, 0].unique().numel() > 200
    x, _ = data.Batches(numbers, 1998, 50, seed=1).batch("train")
    assert set(x[:, 0].tolist()) == {0, 1}  # the last possible start is drawn, and no later one


def test_batches_depend_on_seed_alone(numbers):
    first = rows(data.Batches(numbers, 5, 4, seed=3), draws=3)
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(first, rows(data.Batches(numbers, 5, 4, seed=3), draws=3))
    assert not torch.equal(first, rows(data.Batches(numbers, 5, 4, seed=4), draws=3))
    assert not torch.equal(first[:4], first[4:8])


@quick
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**40))
def test_ranks_slice_one_stream(numbers, world_size, batch_size, draws, seed):
    single = rows(data.Batches(numbers, 6, batch_size, seed), draws=draws * world_size)
    ranks = [data.Batches(numbers, 6, batch_size, seed, rank, world_size) for rank in range(world_size)]
    assert torch.equal(single, torch.cat([rows(r) for _ in range(draws) for r in ranks]))
    fixed = [x for x, _ in data.Batches(numbers, 6, batch_size, seed).fixed("val", draws * world_size)]
    split = zip(*(r.fixed("val", draws * world_size) for r in ranks), strict=True)
    assert torch.equal(torch.cat(fixed), torch.cat([x for step in split for x, _ in step]))


def test_batches_state_round_trip(numbers, tmp_path):
    batches = data.Batches(numbers, 5, 4, seed=3)
    rows(batches, draws=2)
    torch.save(batches.state_dict(), tmp_path / "state.pt")
    expected = rows(batches, draws=2)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["generator"].dtype == torch.uint8
    assert all(type(v) is int for k, v in state.items() if k != "generator")
    other = data.Batches(numbers, 5, 4, seed=8)
    other.load_state_dict(state)
    assert torch.equal(rows(other, draws=2), expected)
    assert torch.equal(next(other.fixed("val", 1))[0], next(batches.fixed("val", 1))[0])
    for wrong in ({}, {"generator": torch.zeros(3, dtype=torch.uint8), "seed": 1}, {"generator": None, "seed": 1}, 3):
        with pytest.raises(data.DataError) as error:
            other.load_state_dict(wrong)
        one_line(error, "checkpoint")


def test_state_is_a_snapshot(numbers):
    batches = data.Batches(numbers, 5, 4, seed=3)
    state = batches.state_dict()
    expected = rows(batches)
    batches.load_state_dict(state)
    assert torch.equal(rows(batches), expected)


def test_fixed_is_fixed_and_apart(numbers):
    batches, other = data.Batches(numbers, 5, 4, seed=3), data.Batches(numbers, 5, 4, seed=3)
    first = [x for x, _ in batches.fixed("train", 3)]
    start = rows(batches)
    assert torch.equal(start, rows(other))  # fixed() did not move the training generator
    again = list(batches.fixed("train", 3))
    assert all(torch.equal(a, b) for a, (b, _) in zip(first, again, strict=True))
    assert torch.equal(rows(batches), rows(other))
    assert torch.equal(again[2][1], again[2][0] + 1)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], start)
    assert next(batches.fixed("val", 1))[0].min() >= 1000


def test_block_size_needs_a_longer_split(numbers):
    batches = data.Batches(numbers, 99, 2, seed=0)
    assert batches.batch("val")[0][0].tolist() == list(range(1000, 1099))
    with pytest.raises(data.DataError) as error:
        data.Batches(numbers, 100, 2, seed=0).batch("val")
    one_line(error, "val has 100 tokens", "block_size 100", "--block_size=99")
    with pytest.raises(data.DataError) as error:
        next(data.Batches(numbers, 100, 2, seed=0).fixed("val", 1))
    with pytest.raises(data.DataError) as error:
        data.Batches(numbers, 2000, 2, seed=0)
    one_line(error, "train has 2000 tokens")


@pytest.mark.parametrize("args", [(0, 1, 0), (4, 0, 0), (4, 1, 0, 2, 2), (4, 1, 0, -1, 2)])
def test_batches_arguments(numbers, args):
    with pytest.raises(data.DataError) as error:
        data.Batches(numbers, *args)
    one_line(error, "batch_size")


# windows


@quick
@given(st.data())
def test_windows_score_each_token_once(draw):
    n, context = draw.draw(st.integers(2, 80)), draw.draw(st.integers(1, 90))
    stride, batch_size = draw.draw(st.integers(1, context)), draw.draw(st.integers(1, 9))
    tokens = np.random.default_rng(n).permutation(n)
    position = np.argsort(tokens)  # token -> its place
    seen, passes = [], []
    for size in (batch_size, 1):
        found = []
        for x, y, scored in data.windows(fake_split(tokens), context, stride, size):
            assert x.shape == y.shape == scored.shape and 1 <= len(x) <= size
            assert x.dtype == y.dtype == torch.int64 and scored.dtype == torch.bool
            found += zip(x.tolist(), y.tolist(), scored.tolist(), strict=True)
        passes.append(found)
    assert passes[0] == passes[1]
    for k, (x, y, scored) in enumerate(passes[0]):
        start = k * stride
        assert x == tokens[start : start + context][: len(x)].tolist()
        assert y == tokens[start + 1 : start + 1 + len(x)].tolist()
        assert len(x) == min(context, n - 1 - start) and any(scored)
        seen += [int(position[t]) for t, s in zip(y, scored, strict=True) if s]
    assert seen == list(range(1, n))  # once each, in order, so by the first window that holds it


def test_windows_example():
    found = list(data.windows(fake_split(range(10)), context=4, stride=2, batch_size=2))
    assert [x.tolist() for x, _, _ in found] == [[[0, 1, 2, 3], [2, 3, 4, 5]], [[4, 5, 6, 7]], [[6, 7, 8]]]
    assert [s.int().tolist() for _, _, s in found] == [[[1, 1, 1, 1], [0, 0, 1, 1]], [[0, 0, 1, 1]], [[0, 0, 1]]]


def test_windows_of_a_dataset(numbers):
    total = sum(int(scored.sum()) for _, _, scored in data.windows(numbers.split("train"), 64, 48, 5))
    assert total == 1999


@pytest.mark.parametrize("n, args, part", [(9, (4, 5), "stride"), (9, (4, 0), "stride"), (9, (4, 4, 0), "batch_size")])
def test_windows_arguments(n, args, part):
    with pytest.raises(data.DataError) as error:
        next(data.windows(fake_split(range(n)), *args))
    one_line(error, part)
    with pytest.raises(data.DataError) as error:
        next(data.windows(fake_split([1]), 4, 4))
    one_line(error, "nothing to score")


# records with targets


def write_targets(folder, targets, length=4, labels=None, tokens=None):
    """Records of `length` whose token i is i, all splits alike; targets (n,), -1 where nothing is scored."""
    targets = np.asarray(targets)
    tokens = np.arange(len(targets)) if tokens is None else tokens
    codec = data.SymbolsCodec([f"n{i}" for i in range(max(10, len(targets)))])
    blocks = [(t[None], y[None]) for t, y in zip(tokens.reshape(-1, length), targets.reshape(-1, length))]
    infos = {name: data.write_records(folder, name, blocks, codec) for name in data.SPLITS}
    data.write_meta(folder, codec, infos, "made by a test", "0" * 64, "records", record_len=length, labels=labels)
    return folder


@pytest.fixture
def records(tmp_path, fresh_rng):
    """300 records of 7, and their targets (300, 7): of each record some are scored, at random."""
    targets = fresh_rng.integers(0, 2100, (300, 7))
    targets[fresh_rng.random((300, 7)) < 0.5] = -1
    targets[:, 3] = fresh_rng.integers(0, 2100, 300)
    return data.Dataset(write_targets(tmp_path / "records", targets.ravel(), 7)), targets


def test_batches_are_whole_records(records, fresh_rng):
    dataset, targets = records
    seed, seen = int(fresh_rng.integers(2**31)), set()
    for block_size, train_draws in ((7, 1000), (50, 20)):
        batches = data.Batches(dataset, block_size, 5, seed)
        assert batches.length == 7
        for split, draws in [("train", train_draws), ("val", 20)]:
            for _ in range(draws):
                x, y = batches.batch(split)
                assert x.shape == y.shape == (5, 7) and x.dtype == y.dtype == torch.int64
                numbers = x[:, 0] // 7
                assert torch.equal(x, numbers[:, None] * 7 + torch.arange(7))
                assert np.array_equal(y, targets[numbers])
                seen |= set(numbers.tolist())
    assert seen == set(range(300)), "some records are never drawn"


def test_ranks_and_state_of_records(records):
    dataset, _ = records
    one, ranks = data.Batches(dataset, 7, 6, 1), [data.Batches(dataset, 7, 2, 1, rank, 3) for rank in range(3)]
    for _ in range(3):
        parts = [b.batch("train") for b in ranks]
        assert all(torch.equal(a, torch.cat(b)) for a, b in zip(one.batch("train"), zip(*parts)))
    state = one.state_dict()
    again = data.Batches(dataset, 7, 6, 99)
    again.load_state_dict(state)
    whole = [one.batch("train") for _ in range(4)]
    assert all(torch.equal(a, b) for w in whole for a, b in zip(w, again.batch("train")))
    fixed = [list(b.fixed("val", 5)) for b in (one, one)]
    assert all(torch.equal(a, b) for f, g in zip(*fixed) for a, b in zip(f, g))


@pytest.mark.parametrize("batch_size, context, stride", [(1, 7, 7), (16, 7, 1), (300, 64, 64), (1000, 7, 3)])
def test_windows_of_records(records, batch_size, context, stride):
    dataset, targets = records
    split = dataset.split("test")
    parts = list(data.windows(split, context, stride, batch_size))
    x, y, scored = (torch.cat(part) for part in zip(*parts))
    assert torch.equal(x, torch.arange(2100).view(300, 7)) and np.array_equal(y, targets)
    assert np.array_equal(scored, targets >= 0) and int(scored.sum()) == split.n_scored
    assert len(parts) == -(-300 // batch_size)


def test_records_need_room(records):
    dataset, _ = records
    with pytest.raises(data.DataError) as error:
        data.Batches(dataset, 6, 1, 0)
    one_line(error, "block_size 6", "7 tokens", "--block_size=7")
    with pytest.raises(data.DataError) as error:
        next(data.windows(dataset.split("val"), 6, 6))
    one_line(error, "context of 6", "records of 7")


def targets_error(folder, split="train"):
    with pytest.raises(data.DataError) as error:
        data.Dataset(folder).split(split)
    one_line(error, f"{split}.targets.bin")
    return str(error.value)


@pytest.mark.parametrize(
    "edited, split, part",
    [
        ([1, 2, -1, 3], "val", "truncated: 16 bytes, meta.json says 32"),
        ([1] * 9, "val", "too long"),
        ([-1, 2, -1, 3, -1, 10, -1, 3], "val", "target 10, neither -1 nor an id below its vocabulary of 10"),
        ([-1, 2, -1, 3, -1, -2, -1, 3], "test", "target -2"),
        ([-1, 2, -1, 3, -1, 3, -1, -1], "val", "3 targets, meta.json says 4"),
        ([2, 2, 3, 3, -1, -1, -1, -1], "train", "a record without a target"),
        (None, "val", "missing"),
    ],
)
def test_wrong_targets(tmp_path, monkeypatch, edited, split, part):
    monkeypatch.setattr(data, "CHUNK", 4)  # so that what is wrong is in a later chunk of the check
    write_targets(tmp_path, [-1, 2, -1, 3, -1, 2, -1, 3])
    file = tmp_path / f"{split}.targets.bin"
    assert data.Dataset(tmp_path).split(split).n_scored == 4
    assert file.read_bytes() == np.array([-1, 2, -1, 3, -1, 2, -1, 3], dtype="<i4").tobytes()
    file.unlink() if edited is None else file.write_bytes(np.array(edited, dtype="<i4").tobytes())
    message = targets_error(tmp_path, split)
    assert part in message and ("again" in message or "run its" in message), message


def test_targets_must_be_labels(tmp_path):
    write_targets(tmp_path, [-1, -1, -1, 3, -1, -1, -1, 4], labels={"no": 3, "yes": 4})
    dataset = data.Dataset(tmp_path)
    assert dataset.labels == dataset.split("val").labels == {"no": 3, "yes": 4}
    edit(tmp_path, labels={"no": 3, "yes": 5})
    assert "target 4, neither -1 nor one of its labels" in targets_error(tmp_path)


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"record_len": 0}, "record_len 0"),
        ({"record_len": "4"}, "record_len '4'"),
        ({"record_len": 3}, "no whole records of 3"),
        ({"record_len": None}, "does not say its tokens and bytes"),
        ({"labels": ["a", "b"]}, "labels must be names"),
        ({"labels": {"a": 1}}, "two or more"),
        ({"labels": {"a": 1, "b": 10}}, "ids of the vocabulary"),
        ({"labels": {"a": 1, "b": 1}}, "differ"),
        ({"labels": {"a": 1, "b\n": 2}}, "printable"),
    ],
)
def test_foreign_meta_of_records(tmp_path, changes, part):
    edit(write_targets(tmp_path, [1, -1, -1, 2, 1, -1, -1, 2]), **changes)
    with pytest.raises(data.DataError) as error:
        data.Dataset(tmp_path)
    one_line(error, str(tmp_path), part)


def test_labels_need_records(tmp_path):
    edit(write(tmp_path, b"abc"), labels={"a": 1, "b": 2})
    with pytest.raises(data.DataError) as error:
        data.Dataset(tmp_path)
    one_line(error, "of records")


def test_interrupted_records_leave_nothing(tmp_path):
    def interrupted():
        yield np.ones((1, 4), int), np.ones((1, 4), int)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.write_records(tmp_path, "train", interrupted(), data.BytesCodec())
    with pytest.raises(data.DataError) as error:
        data.write_records(tmp_path, "val", [(np.ones((1, 4), int), -np.ones((1, 4), int))], data.BytesCodec())
    one_line(error, "nothing is scored in the val split")
    assert list(tmp_path.iterdir()) == []
    write_targets(tmp_path, [1, 2, 3, 4])
    write(tmp_path, b"text in the place of records")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != ".verified") == [
        "meta.json",
        "test.bin",
        "train.bin",
        "val.bin",
    ]


# writing


@quick
@given(st.binary(min_size=2), st.lists(st.integers(1, 5), min_size=1))
def test_words_are_counted_across_pieces(tmp_path_factory, raw, sizes):
    pieces, rest = [], raw
    for size in itertools.cycle(sizes):
        pieces, rest = [*pieces, rest[:size]], rest[size:]
        if not rest:
            break
    digest = hashlib.sha256()
    info = data.write_split(tmp_path_factory.getbasetemp(), "val", [b"", *pieces], data.BytesCodec(), digest)
    assert info["words"] == len(raw.split()) and info["bytes"] == info["tokens"] == len(raw)
    assert info["sha256"] == digest.hexdigest() == hashlib.sha256(raw).hexdigest()


def test_interrupted_write_leaves_nothing(tmp_path):
    def interrupted():
        yield b"some text"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.write_split(tmp_path, "train", interrupted(), data.BytesCodec())
    assert list(tmp_path.iterdir()) == []
    write(tmp_path, b"whole")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert sorted(before) == ["meta.json", "test.bin", "train.bin", "val.bin"]
    data.write_split(tmp_path, "train", [b"other"], data.BytesCodec())
    with pytest.raises(KeyboardInterrupt):
        data.write_split(tmp_path, "val", interrupted(), data.BytesCodec())
    assert {n: (tmp_path / n).read_bytes() for n in before} == before  # the earlier set is as it was
    write(tmp_path, {"val": b"newer"})
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".part")) == ["meta.json", "val.bin"]


@pytest.mark.parametrize("step", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "older", [lambda folder: write(folder, b"older data"), lambda f: write_targets(f, [1, 2, 3, 4])]
)
def test_interrupted_commit_is_never_whole(tmp_path, monkeypatch, step, older):
    older(tmp_path)
    replace, steps = data._replace, itertools.count(1)

    def stopping(source, target):
        if next(steps) == step:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(data, "_replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, b"newer data")
    with pytest.raises(data.DataError) as error:
        data.Dataset(tmp_path)
    one_line(error, "no prepared data")
    monkeypatch.undo()
    write(tmp_path, b"newer data")
    assert data.Dataset(tmp_path).split("train").tokens.tobytes() == b"newer data"


def test_replace_outlasts_a_scanner(tmp_path, monkeypatch):
    replace, calls = os.replace, []

    def busy(source, target):
        calls.append(source)
        if len(calls) < 3:
            raise PermissionError("in use")
        return replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    (tmp_path / "a").write_text("x", encoding="utf-8")
    data._replace(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text(encoding="utf-8") == "x"
    calls[:] = []
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(PermissionError("in use")))
    with pytest.raises(PermissionError):
        data._replace(tmp_path / "b", tmp_path / "a")


@pytest.mark.parametrize(
    "raised, status, part",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (data.DataError("no such thing"), 1, "error: no such thing\n"),
        (data.DataError("a\x1b[2J\nb"), 1, "error: a\\x1b[2J\\nb\n"),
        (OSError("disk full"), 1, "error: OSError: disk full\n"),
        (MemoryError(), 1, "error: MemoryError\n"),
        (None, 0, ""),
    ],
)
def test_run_prepare(capsys, raised, status, part):
    def main():
        if raised is not None:
            raise raised

    assert data.run_prepare(main) == status
    assert part in capsys.readouterr().err


@pytest.mark.parametrize("ending", [KeyboardInterrupt, MemoryError, RuntimeError, data.DataError])
def test_run_prepare_leaves_nothing(tmp_path, ending):
    """However a preparation ends before its last step, its finished splits go, and an earlier one stays as it was."""
    out = write(tmp_path / "out", b"earlier")
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def main():
        for name in data.SPLITS:
            data.write_split(out, name, [b"newer"], data.BytesCodec())
        assert len(list(out.glob("*.part"))) == 3
        raise ending("stopped")

    with pytest.raises(RuntimeError) if ending is RuntimeError else contextlib.nullcontext():  # a bug: a traceback
        assert data.run_prepare(main) == (130 if ending is KeyboardInterrupt else 1)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("file", ["train.bin", "val.bin", "meta.json"])
def test_full_disk(tmp_path, file, capsys):
    (tmp_path / "source").write_bytes(TEXT * 20)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{file}.part").symlink_to("/dev/full")
    assert data.run_prepare(lambda: enwik8(tmp_path / "source", tmp_path / "out")) == 1
    assert capsys.readouterr().err == f"error: cannot write {tmp_path / 'out' / file}: No space left on device\n"
    assert list((tmp_path / "out").iterdir()) == []


# download


CONTENT = bytes(range(256)) * 5000
CHECKSUM = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server():
    """http://127.0.0.1:port with /good, /short (ends early), /other (wrong content); the rest is missing."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            body = {"/good": CONTENT, "/short": CONTENT, "/other": b"<html>"}.get(self.path)
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write((body or b"")[: 1000 if self.path == "/short" else None])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield types.SimpleNamespace(url=f"http://127.0.0.1:{running.server_port}", requests=requests)
        running.shutdown()


def test_download_takes_the_first_source_that_delivers(server, tmp_path):
    urls = [f"{server.url}/{name}" for name in ("missing", "short", "other", "good", "never")]
    path = data.download(urls, tmp_path / "new" / "file", CHECKSUM)
    assert path.read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == ["file"]
    assert server.requests == ["/missing", "/short", "/other", "/good"]
    data.download(urls, path, CHECKSUM)
    assert len(server.requests) == 4  # it is there already
    path.write_bytes(b"damaged")
    data.download(urls[3:], path, CHECKSUM)
    assert path.read_bytes() == CONTENT


def test_download_from_a_file(tmp_path):
    (tmp_path / "source").write_bytes(CONTENT)
    urls = [(tmp_path / "nowhere").as_uri(), (tmp_path / "source").as_uri()]
    assert data.download(urls, tmp_path / "file").read_bytes() == CONTENT


def test_download_names_each_source(server, tmp_path):
    urls = [f"{server.url}/missing", f"{server.url}/short", f"{server.url}/other", "nonsense"]
    with pytest.raises(data.DataError) as error:
        data.download(urls, tmp_path / "file", CHECKSUM)
    message = str(error.value)
    assert "\n" not in message and "--source" in message
    for part in [*urls, "404", "1000", "wrong checksum", "unknown url type"]:
        assert part in message, message
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(data.DataError) as error:  # without a checksum, a short file is still noticed
        data.download(urls[1:2], tmp_path / "file")
    one_line(error, "ended after 1000 of 1280000 bytes")
    with pytest.raises(data.DataError) as error:
        data.download([f"{server.url}/good"], tmp_path / "file", CHECKSUM, limit=999)
    one_line(error, "more than 999 bytes", str(tmp_path / "file"))
    assert list(tmp_path.iterdir()) == []


# enwik8


TEXT = b"<mediawiki>" + b"word another\tline\n" * 500 + b"\xff\x00 end of it" * 10


def packed(kind, text=TEXT, method=zipfile.ZIP_DEFLATED, name="enwik8"):
    if kind == "gz":
        return gzip.compress(text)
    if kind == "zip":
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", method) as archive:
            archive.writestr(name, text)
        return out.getvalue()
    return text


def encrypted(archive):
    """A zip archive that says of its members that they are."""
    return archive.replace(b"PK\x03\x04\x14\0\0", b"PK\x03\x04\x14\0\1").replace(
        b"PK\x01\x02\x14\x03\x14\0\0", b"PK\x01\x02\x14\x03\x14\0\1"
    )


@pytest.mark.parametrize("kind", ["", "gz", "zip"])
def test_enwik8_sources(tmp_path, kind, capsys):
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / ("enwik8" + ("." + kind if kind else ""))
    source.write_bytes(packed(kind))
    enwik8(source, tmp_path / "out")
    enwik8(source.parent, tmp_path / "again")
    check_enwik8(tmp_path / "out", capsys.readouterr().out)
    assert (tmp_path / "out" / "meta.json").read_bytes() == (tmp_path / "again" / "meta.json").read_bytes()


def test_enwik8_script(tmp_path):
    (tmp_path / "enwik8.first.gz").write_bytes(packed("gz"))
    run = prepare("enwik8", "--source", tmp_path, f"--out_dir={tmp_path / 'out'}", cwd=tmp_path)
    assert run.returncode == 0 and run.stderr == "", run.stderr
    check_enwik8(tmp_path / "out", run.stdout)


def check_enwik8(out, summary):
    dataset = data.Dataset(out)
    held_out = len(TEXT) * 5 // 100
    borders = [0, len(TEXT) - 2 * held_out, len(TEXT) - held_out, len(TEXT)]
    for name, (start, stop) in zip(data.SPLITS, itertools.pairwise(borders), strict=True):
        split, part = dataset.split(name), TEXT[start:stop]
        assert split.tokens.tobytes() == part and split.n_words == len(part.split())
        assert dataset.meta["splits"][name]["sha256"] == hashlib.sha256(part).hexdigest()
        assert f"{len(part):,} tokens" in summary and hashlib.sha256(part).hexdigest() in summary
    assert dataset.meta["sha256"] == hashlib.sha256(TEXT).hexdigest()
    assert dataset.meta["label"] == f"enwik8, first {len(TEXT) / 1000:.3g} kB"
    assert sorted(p.name for p in out.iterdir() if p.name != ".verified") == [
        "meta.json",
        "test.bin",
        "train.bin",
        "val.bin",
    ]


def enwik8(source, out):
    script("enwik8").main(["--source", str(source), "--out_dir", str(out)])


def test_enwik8_rerun_and_chunks(tmp_path, monkeypatch, capsys):
    (tmp_path / "a").write_bytes(TEXT)
    (tmp_path / "b").write_bytes(TEXT[:5000])
    enwik8(tmp_path / "b", tmp_path / "out")
    monkeypatch.setattr(data, "CHUNK", 7)  # borders of splits and words fall within and between chunks
    enwik8(tmp_path / "a", tmp_path / "out")
    dataset = data.Dataset(tmp_path / "out")
    parts = [dataset.split(name).tokens.tobytes() for name in data.SPLITS]
    assert b"".join(parts) == TEXT
    assert [dataset.split(name).n_words for name in data.SPLITS] == [len(part.split()) for part in parts]


def test_enwik8_full_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script("enwik8"), "SIZE", len(TEXT))
    (tmp_path / "enwik8").write_bytes(TEXT)
    with pytest.raises(data.DataError) as error:
        enwik8(tmp_path, tmp_path / "out")
    one_line(error, "wrong checksum", "sha256")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(script("enwik8"), "SHA256", hashlib.sha256(TEXT).hexdigest())
    enwik8(tmp_path, tmp_path / "out")
    assert data.Dataset(tmp_path / "out").meta["label"] == "enwik8"
    (tmp_path / "enwik8").write_bytes(TEXT + b"x")
    with pytest.raises(data.DataError) as error:
        enwik8(tmp_path, tmp_path / "out")
    one_line(error, "more than")


def test_enwik8_download(tmp_path, monkeypatch, capsys):
    (tmp_path / "served").write_bytes(packed("zip"))
    module = script("enwik8")
    monkeypatch.setattr(module, "URLS", [(tmp_path / "nowhere").as_uri(), (tmp_path / "served").as_uri()])
    with pytest.raises(data.DataError) as error:
        module.main(["--out_dir", str(tmp_path / "out")])
    one_line(error, "wrong checksum", "--source")
    monkeypatch.setattr(module, "ZIP_SHA256", hashlib.sha256(packed("zip")).hexdigest())
    module.main(["--out_dir", str(tmp_path / "out")])
    assert data.Dataset(tmp_path / "out").split("train").n_tokens > 8000


@pytest.mark.parametrize("kind", ["", "gz", "zip"])
@pytest.mark.parametrize("text, chunks, part", [(b"x", 1, "does not begin"), (b"<mediawiki>", 3, "more than 2000")])
def test_enwik8_unpacks_no_more_than_it_must(tmp_path, monkeypatch, kind, text, chunks, part):
    """1 MB here, at once in 3 GB there: what is not enwik8 is known by its beginning, its size, or what comes out."""
    module, read = script("enwik8"), []
    monkeypatch.setattr(module, "SIZE", 2000)
    monkeypatch.setattr(data, "CHUNK", 1000)
    unpack = module.read
    monkeypatch.setattr(module, "read", lambda path: (read.append(len(c)) or c for c in unpack(path)))
    (tmp_path / "enwik8").write_bytes(packed(kind, text + bytes(10**6)))
    with pytest.raises(data.DataError) as error:
        enwik8(tmp_path, tmp_path / "out")
    one_line(error, str(tmp_path / "enwik8"), "more than 2000" if kind != "gz" else part)
    assert sum(read) <= 2000 and len(read) < max(2, chunks) and not (tmp_path / "out").exists()


def test_enwik8_refuses(tmp_path):
    cases = {
        "damaged.gz": (packed("gz")[:-9], "damaged"),
        "damaged.zip": (packed("zip").replace(TEXT[:4], b"????")[:-30], "damaged"),
        "encrypted.zip": (encrypted(packed("zip")), "is encrypted"),
        "lzma.zip": (packed("zip", method=zipfile.ZIP_LZMA), "otherwise than by deflate"),
        "other": (b"another text", "not enwik8"),
        "tiny": (TEXT[:15], "tokens for the val split"),
    }
    for name, (content, part) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(data.DataError) as error:
            enwik8(tmp_path / name, tmp_path / "out")
        one_line(error, part, str(tmp_path / name))
        assert not (tmp_path / "out" / "meta.json").exists()
    with pytest.raises(data.DataError) as error:
        enwik8(tmp_path, tmp_path / "out")
    one_line(error, "holds none")
    run = prepare("enwik8", "--source", "nowhere", "--out_dir", tmp_path / "out", cwd=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", "error: --source nowhere does not exist\n")


# stdlib


def test_stdlib_script(tmp_path):
    library = tmp_path / "Lib"
    skipped = ("site-packages/a.py", "test/b.py", "idlelib/idle_test/c.py", "_sysconfigdata_x.py", "notes.txt")
    kept = {f"pkg/m{i}.py": f"# {i}\n".encode() for i in range(80)}
    kept |= {"bare.py": b"x = 1", "latin.py": b"# \xe9\xff\r\n", "empty.py": b""}
    for name, text in {**kept, **dict.fromkeys(skipped, b"SKIPPED\n")}.items():
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_bytes(text)
    run = prepare("stdlib", "--source", library, "--out_dir", tmp_path / "out", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    dataset = data.Dataset(tmp_path / "out")
    split_of = script("stdlib").split_of
    for name in data.SPLITS:
        texts = [kept[p].replace(b"\r\n", b"\n") for p in sorted(kept) if split_of(p) == name]
        expected = b"".join(t if t.endswith(b"\n") or not t else t + b"\n" for t in texts)
        assert dataset.split(name).tokens.tobytes() == expected
    (tmp_path / "none").mkdir()
    with pytest.raises(data.DataError) as error:
        script("stdlib").main(["--source", str(tmp_path / "none"), "--out_dir", str(tmp_path / "out")])
    one_line(error, "no Python source text")


@pytest.mark.parametrize("name", ["stdlib", "classify_stdlib"])
def test_libraries_name_the_file(tmp_path, name, monkeypatch):
    """One that is no file, or so large that it is no source text, is not read."""
    (tmp_path / "xml").mkdir()
    (tmp_path / "xml" / "a.py").symlink_to(os.devnull)
    (tmp_path / "xml" / "b.py").write_bytes(b"x = 1\n" * 100)
    for part in ("a.py is not a file", "b.py is not Python source text: it has 600 bytes, more than 500"):
        with pytest.raises(data.DataError) as error:
            script(name).main(["--source", str(tmp_path), "--out_dir", str(tmp_path / "out")])
        one_line(error, part)
        (tmp_path / "xml" / "a.py").unlink(missing_ok=True)
        monkeypatch.setitem(script(name).read.__globals__, "LARGEST", 500)


def test_stdlib_splits_are_stable():
    split_of = script("stdlib").split_of
    assert [split_of(n) for n in ("os.py", "json/decoder.py", "shutil.py", "socket.py")] == [
        "train",
        "train",
        "val",
        "test",
    ]
    counts = [[split_of(f"m{i}.py") for i in range(4000)].count(name) / 4000 for name in data.SPLITS]
    assert np.allclose(counts, [0.9, 0.05, 0.05], atol=0.015)


def test_stdlib_of_this_python():
    """Not prepared here, which takes seconds: what would be read is looked at instead."""
    module = script("stdlib")
    files = dict(module.find(module.sysconfig.get_path("stdlib")))
    assert "os.py" in files and "json/decoder.py" in files
    assert not any("test" in name.split("/") for name in files)
    assert 5e6 < sum(path.stat().st_size for path in files.values()) < 20e6


# wikitext2


WIKI = (
    " = Title = \n \n Some text of caf\u00e9s , with \u65e5\u672c .  \n \n \n = = Part = = \n It 's\u00a0here\u3000. \n"
    "bare line\nanother\n\n  two spaces \n\tTab\n 's start\n"
)


def wiki_folder(folder, names=("train", "valid", "test"), variant="raw"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        (folder / f"wiki.{name}.{variant}").write_bytes((WIKI * (i + 1)).encode())
    return folder


def wikitext2(*args):
    script("wikitext2").main([str(a) for a in args])


def test_wikitext2_script(tmp_path):
    source = wiki_folder(tmp_path / "wiki")
    run = prepare("wikitext2", "--source", source, "--codec=bytes", "--out_dir", tmp_path / "out", cwd=tmp_path)
    assert run.returncode == 0 and run.stderr == "", run.stderr
    dataset = data.Dataset(tmp_path / "out")
    for i, name in enumerate(data.SPLITS):
        raw = (WIKI * (i + 1)).encode()
        split = dataset.split(name)
        assert split.tokens.tobytes() == raw and split.n_words == len(raw.split()) and split.n_bytes == len(raw)
    assert dataset.meta["label"] == f"WikiText-2 raw, {len(WIKI.encode()) / 1000:.3g} kB of train"
    assert "not the complete WikiText-2" in run.stdout


def test_wikitext2_label_of_the_whole(tmp_path, monkeypatch, capsys):
    words = {name: len(WIKI.encode().split()) * (i + 1) for i, name in enumerate(data.SPLITS)}
    monkeypatch.setattr(script("wikitext2"), "WORDS", words)
    wikitext2("--source", wiki_folder(tmp_path / "wiki"), "--codec=bytes", "--out_dir", tmp_path / "out")
    assert data.Dataset(tmp_path / "out").meta["label"] == "WikiText-2 raw"
    assert "note:" not in capsys.readouterr().out


def test_wikitext2_sources(tmp_path, capsys):
    """Windows newlines, a zip archive with a folder, and the tokenised variant without train."""
    expected = (WIKI * 2).encode()
    folder = wiki_folder(tmp_path / "a" / "wikitext-2", ("valid", "test"), "tokens")
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    with zipfile.ZipFile(tmp_path / "wiki.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, f"wikitext-2/{path.name}")
    for i, source in enumerate((folder, tmp_path / "a", tmp_path / "wiki.zip")):
        out = tmp_path / f"out{i}"
        wikitext2("--source", source, "--variant=tokens", "--codec=bytes", "--out_dir", out)
        dataset = data.Dataset(out)
        assert dataset.split("test").tokens.tobytes() == expected
        assert dataset.meta["label"] == "WikiText-2 tokens, no train" and set(dataset.meta["splits"]) == {"val", "test"}
    assert data.Batches(dataset, 5, 2, seed=0).batch("val")[0].shape == (2, 5)


def test_wikitext2_names_what_is_not_utf8(tmp_path, bpe_of_bytes):
    wiki_folder(tmp_path / "wiki")
    (tmp_path / "wiki" / "wiki.valid.raw").write_bytes(WIKI.encode("utf-16"))
    with pytest.raises(data.DataError) as error:
        wikitext2("--source", tmp_path / "wiki", "--out_dir", tmp_path / "out")
    one_line(error, "wiki.valid.raw: the text is not UTF-8")


def test_wikitext2_refuses(tmp_path, capsys):
    wiki_folder(tmp_path / "tokens", ("valid",), "tokens")
    for folder in ("x", "y"):
        wiki_folder(tmp_path / "two" / folder)
    (tmp_path / "file").write_bytes(b"text")
    with zipfile.ZipFile(tmp_path / "damaged.zip", "w") as archive:
        archive.writestr("wiki.valid.raw", WIKI)
    damaged = (tmp_path / "damaged.zip").read_bytes().replace(b"Title", b"Tatle")
    (tmp_path / "damaged.zip").write_bytes(damaged)
    cases = {"tokens": "--variant tokens", "two": "pass the folder", "file": "neither", "no": "does not exist"}
    (tmp_path / "encrypted.zip").write_bytes(encrypted((tmp_path / "damaged.zip").read_bytes()))
    cases |= {
        "damaged.zip": "damaged",
        "encrypted.zip": "is encrypted",
        "long": "a line of more than",
        "big": "more than",
        "big.zip": "more than",
    }
    for name, text in (("long", b"a" * (data.LINE + 2)), ("big", b"text\n" * 4_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "wiki.train.raw").write_bytes(text)
    (tmp_path / "big.zip").write_bytes(packed("zip", b"text\n" * 4_000_000, name="wiki.valid.raw"))
    for name, part in cases.items():
        with pytest.raises(data.DataError) as error:
            wikitext2("--source", tmp_path / name, "--codec=bytes", "--out_dir", tmp_path / "out")
        one_line(error, part, name)
        assert not (tmp_path / "out" / "meta.json").exists()


def hub(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_wikitext2_from_the_hub(tmp_path, monkeypatch, capsys):
    asked = []

    def load_dataset(name, config, split, revision):
        asked.append((name, config, split))
        lines = " = T = \n \n Text . \n".splitlines(keepends=True)
        return [{"text": line if line.strip() else ""} for line in lines]

    hub(monkeypatch, load_dataset)
    args = ("--codec=bytes", "--out_dir", tmp_path / "out")
    with pytest.raises(data.DataError) as error:
        wikitext2(*args)
    one_line(error, "has 5 words, not 2051910", "--source")
    assert not (tmp_path / "out" / "meta.json").exists()
    monkeypatch.setattr(script("wikitext2"), "WORDS", dict.fromkeys(data.SPLITS, 5))
    wikitext2(*args)
    dataset = data.Dataset(tmp_path / "out")
    assert dataset.split("train").tokens.tobytes() == b" = T = \n \n Text . \n"  # as in the original files
    assert dataset.meta["label"] == "WikiText-2 raw"
    assert asked[-3:] == [("Salesforce/wikitext", "wikitext-2-raw-v1", s) for s in ("train", "validation", "test")]


def test_wikitext2_hub_failure(tmp_path, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route to host\nmore")

    hub(monkeypatch, load_dataset)
    with pytest.raises(data.DataError) as error:
        wikitext2("--codec=bytes", "--out_dir", tmp_path / "out")
    one_line(error, "no route to host", "--source", "wikitext-2-raw-v1.zip")
    assert not (tmp_path / "out" / "meta.json").exists()


def test_wikitext2_bpe(tmp_path):
    need_bpe()
    wiki_folder(tmp_path)
    wikitext2("--source", tmp_path, "--out_dir", tmp_path / "out")
    dataset = data.Dataset(tmp_path / "out")
    split = dataset.split("test")
    assert dataset.meta["dtype"] == "uint16" and split.tokens.tolist() == dataset.codec.encode(WIKI * 3)
    first = len(dataset.codec.decode_bytes(split.tokens[:1]))
    assert split.n_bytes == len((WIKI * 3).encode()) and split.scored_bytes == split.n_bytes - first


@quick
@given(st.lists(st.sampled_from([" ", "\n", " \n", "a", "1", ".", "'s", "\u00e9", "\u3000", "\t", " =", "\n ="])))
def test_pieces_encode_as_the_whole(parts):
    need_bpe()
    text = "".join(parts)
    lines = text.encode().splitlines(keepends=True) if text.isascii() else io.BytesIO(text.encode()).readlines()
    cut = list(script("wikitext2").pieces(lines, size=1))
    assert b"".join(cut) == text.encode()
    codec = data.GPT2Codec()
    assert [i for piece in cut for i in codec.encode_bytes(piece).tolist()] == codec.encode(text)


def test_pieces_are_cut():
    """Without this, one piece for everything would pass the test above."""
    cut = list(script("wikitext2").pieces(WIKI.encode().splitlines(keepends=True), size=1))
    assert [piece.split()[0] for piece in cut] == [b"=", b"Some", b"=", b"It", b"another", b"'s"]


# skip_trigrams


def read_by_hand(tokens, n):
    """The trigrams of one sequence, token by token: [(position of A, of B, b)]; None if it breaks the rules."""
    found, a, due = [], None, None
    if tokens[0] != 2 * n + 1:
        return None
    for p, token in enumerate(tokens[1:], 1):
        if due is not None:
            if token != due:
                return None
            due = None
        elif token == 0:
            if a is not None:
                return None
            a = p
        elif a is not None and 1 <= token <= n:
            found.append((a, p, token))
            a, due = None, token + n
    return found


def write_by_hand(random, n, positions):
    """One sequence of the published state machine, token by token."""
    tokens, pending, force = [2 * n + 1], False, False
    while len(tokens) < positions:
        token = tokens[-1] + n if force else random.randint(1 if pending else 0, 2 * n + 1)
        force = False
        pending = pending or token == 0
        if pending and 1 <= token <= n:
            pending, force = False, True
        tokens.append(token)
    return tokens


def trigram_statistics(sequences, n):
    """Shares of sequences with 0, 1, 2 trigrams, share of trigrams whose B is last, scored ones a B in 1,000."""
    found = [read_by_hand(s, n) for s in sequences]
    assert all(f is not None for f in found), "a sequence breaks the rules"
    counts, last = np.array([len(f) for f in found]), sum(f[-1][1] == len(sequences[0]) - 1 for f in found if f)
    scored = 1000 * (counts.sum() - last) / len(sequences) / n
    return [*((counts == k).mean() for k in range(3)), last / counts.sum(), scored]


def test_skip_trigrams_of_the_published_size(fresh_rng):
    """100 batches of 1,000 sequences, n = 5, each looked at by a state machine that goes token by token."""
    tokens, found = script("skip_trigrams").generate(fresh_rng, 100_000, 5, 11)
    assert tokens.shape == found.shape == (100_000, 11)
    for row, marks in zip(tokens[:5000].tolist(), found[:5000].tolist()):
        assert [(p, b) for p, b in enumerate(marks) if b] == [(p, b) for _, p, b in read_by_hand(row, 5)]
    shares = trigram_statistics(tokens.tolist(), 5)
    assert np.allclose(shares[:4], [0.512, 0.428, 0.059, 0.118], atol=0.007), shares
    assert abs(shares[4] - 97) < 1.5, shares
    assert np.unique(tokens).size == 12
    script("skip_trigrams").check("train", tokens, found, 5)


@pytest.mark.parametrize("n, positions", [(1, 8), (3, 11), (4, 17)])
def test_skip_trigrams_are_those_of_the_state_machine(fresh_rng, n, positions):
    """The same distribution as one that is written token by token, position by position."""
    import random

    source, samples = random.Random(int(fresh_rng.integers(2**31))), 15_000
    slow = [write_by_hand(source, n, positions) for _ in range(samples)]
    fast = script("skip_trigrams").generate(fresh_rng, samples, n, positions)[0].tolist()
    a, b = (np.array(trigram_statistics(s, n)) for s in (slow, fast))
    assert np.allclose(a[:4], b[:4], atol=0.03) and np.isclose(a[4], b[4], rtol=0.1), (a, b)
    for p in range(positions):
        a, b = (np.bincount(np.array(s)[:, p], minlength=2 * n + 2) / samples for s in (slow, fast))
        assert np.allclose(a, b, atol=0.03), p


def test_skip_trigrams_script(tmp_path, fresh_rng):
    n, positions = int(fresh_rng.integers(2, 7)), int(fresh_rng.integers(9, 15))
    seed = str(fresh_rng.integers(1000))
    options = [
        "--trigrams",
        str(n),
        "--positions",
        str(positions),
        "--seed",
        seed,
        "--train",
        "30000",
        "--test",
        "4000",
    ]
    run = prepare("skip_trigrams", *options, "--val", "3000", "--out_dir", tmp_path / "a", cwd=tmp_path)
    assert run.returncode == 0 and "scored ones a B in 1,000 sequences" in run.stdout, run.stderr
    dataset = data.Dataset(tmp_path / "a")
    assert dataset.codec.symbols == ["A", *(f"{c}{i}" for c in "BC" for i in range(1, n + 1)), "BOS"]
    for name, size in [("train", 30000), ("val", 3000), ("test", 4000)]:
        split = dataset.split(name)
        assert split.n_tokens == size * positions
        for tokens, targets in zip(
            *(a.reshape(size, positions)[:2000].tolist() for a in (split.tokens, split.targets))
        ):
            wanted = [*tokens[1:], -1]
            if name == "test":
                trigrams = {p: b + n for _, p, b in read_by_hand(tokens, n) if p < positions - 1}
                wanted = [trigrams.get(p, -1) for p in range(positions)]
            assert targets == wanted
    script("skip_trigrams").main([*options, "--val", "3000", "--out_dir", str(tmp_path / "b")])
    for file in ("meta.json", "train.bin", "train.targets.bin", "test.targets.bin"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    script("skip_trigrams").main([*options[:-4], "--seed", "1001", "--val", "3000", "--out_dir", str(tmp_path / "b")])
    assert (tmp_path / "a" / "val.bin").read_bytes() != (tmp_path / "b" / "val.bin").read_bytes()


@pytest.mark.parametrize(
    "options, part",
    [
        ("--train 2000", "raise --train"),
        ("--trigrams 40", "fewer than 1000"),
        ("--positions 4", "more than half"),
        ("--positions 3", "--positions 4"),
        ("--trigrams 0", "--trigrams must be at least 1"),
        ("--val 0", "--val must be at least 1"),
        ("--train 100000000000", "--train sequences of --positions symbols must be at most"),
        ("--trigrams 1000000000", "--trigrams must be at most"),
        ("--seed -1", "--seed 0"),
    ],
)
def test_skip_trigrams_refuses(tmp_path, options, part):
    options = options.split() + ["--train", "150000"] * (options.startswith("--positions"))
    with pytest.raises(data.DataError) as error:
        script("skip_trigrams").main([*options, "--out_dir", str(tmp_path)])
    one_line(error, part)
    assert not (tmp_path / "meta.json").exists()


@pytest.mark.parametrize(
    "spoil, part",
    [
        (lambda tokens, found: np.copyto(tokens, np.where(tokens == 4, 3, tokens)), "not followed by its C"),
        (lambda tokens, found: np.copyto(tokens[:, 1:], 0, where=tokens[:, 1:] == 5), "BOS is not within 1.5 times"),
        (lambda tokens, found: np.copyto(found, np.where(found == 2, 0, found)), "B2 has 0"),
        (lambda tokens, found: np.copyto(found[:, -1:], 1), "B1 comes last in 20000 trigrams"),
    ],
)
def test_skip_trigrams_are_checked(fresh_rng, spoil, part):
    module = script("skip_trigrams")
    tokens, found = module.generate(fresh_rng, 20_000, 2, 11)
    module.check("train", tokens, found, 2)
    spoil(tokens, found)
    with pytest.raises(data.DataError) as error:
        module.check("train", tokens, found, 2)
    one_line(error, part)


# classification


def library(folder, fresh_rng, groups=("asyncio", "email", "xml"), files=20):
    """A Lib folder in which every line says which file it is in."""
    for group in groups:
        for i in range(files):
            lines = [f"{group} file{i} line{n}" + "x" * int(fresh_rng.integers(40)) for n in range(60)]
            (folder / group).mkdir(parents=True, exist_ok=True)
            (folder / group / f"m{i}.py").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return folder


def test_classify_stdlib(tmp_path, fresh_rng):
    """Each record is of one file from a line's beginning on, no file is in two splits, and groups are equally many."""
    folder = library(tmp_path / "Lib", fresh_rng)
    (folder / "gzip.py").write_text("archives file0\n" * 3, encoding="utf-8")  # too little of this group
    run = prepare("classify_stdlib", "--source", folder, "--out_dir", "out", "--record_len", "64", cwd=tmp_path)
    assert run.returncode == 0 and "note: archives is left out" in run.stdout, run.stderr
    dataset = data.Dataset(tmp_path / "out")
    assert dataset.labels == {"asyncio": 253, "email": 254, "xml": 255}
    assert run.stdout.count("majority class 33.3 %") == 3
    files, bytes_of = {}, {}
    for name in data.SPLITS:
        split = dataset.split(name)
        tokens, targets = (a.reshape(-1, 64) for a in (split.tokens, split.targets))
        wanted = [15, 31, 47, 63] if name == "train" else [63]
        counts = {}
        for text, row in zip(tokens, targets):
            group, file = bytes(text).split()[:2]  # fails on a text that does not begin with a line
            assert np.flatnonzero(row >= 0).tolist() == wanted and set(row[wanted]) == {dataset.labels[group.decode()]}
            assert bytes(text) in (folder / group.decode() / f"m{int(file[4:])}.py").read_bytes()
            counts[group] = counts.get(group, 0) + 1
            files.setdefault((group, file), set()).add(name)
            bytes_of[name] = bytes_of.get(name, 0) + 64
        assert len(set(counts.values())) == 1 and len(counts) == 3 and split.n_scored == len(tokens) * len(wanted)
    assert all(len(names) == 1 for names in files.values()) and len(files) == 60, "a file is in two splits"
    shares = [bytes_of[name] / sum(bytes_of.values()) for name in data.SPLITS]
    assert min(shares[1:]) > 0.04 and max(shares[1:]) <= 0.16, shares  # whole files, at most 0.15 of each group


def test_classify_stdlib_refuses(tmp_path, fresh_rng):
    folder = library(tmp_path / "Lib", fresh_rng, groups=["xml"])
    with pytest.raises(data.DataError) as error:
        script("classify_stdlib").main(["--source", str(folder), "--out_dir", str(tmp_path / "out")])
    one_line(error, "of 1 groups", "--source")
    with pytest.raises(data.DataError) as error:
        script("classify_stdlib").main(["--record_len", "8", "--out_dir", str(tmp_path / "out")])
    one_line(error, "at least 16")


def test_snippets(fresh_rng):
    cut = script("classify_stdlib").snippets
    assert cut(b"abc\ndef\nghi\n", 4) == [b"abc\n", b"def\n", b"ghi\n"]
    assert cut(b"abcdef\nghij\nk", 4) == [b"abcd", b"ghij"] and cut(b"abc", 4) == []
    text = bytes(fresh_rng.choice([10, 97, 98], 3000).astype(np.uint8))
    starts = [i for i in range(3000 - 8) if i == 0 or text[i - 1] == 10]
    expected, end = [], 0
    for i in starts:
        if i >= end:
            expected.append(text[i : i + 9])
            end = i + 9
    assert cut(text, 9) == expected


def test_byte_labels():
    assert data.byte_labels(["a", "b"]) == {"a": 254, "b": 255}
    for i in data.byte_labels(map(str, range(11))).values():
        with pytest.raises(UnicodeDecodeError):
            bytes([i]).decode()
    with pytest.raises(data.DataError) as error:
        data.byte_labels("abcdefghijkl")
    one_line(error, "12 labels", "11 bytes")


SENTENCES = [
    ("hide new secretions ", 0),
    ("contains no wit , only labored gags ", 0),
    ("caf\u00e9 of delight ", 1),
    ("good", 1),
]


def sst2_folder(folder, kind, sentences=SENTENCES):
    """Local copies as datasets and GLUE write them; the test split has no labels."""
    import datasets

    folder.mkdir(exist_ok=True)
    for name, rows in (("train", sentences), ("validation", sentences[1:3]), ("test", [(s, -1) for s, _ in sentences])):
        columns = {"idx": list(range(len(rows))), "sentence": [s for s, _ in rows], "label": [y for _, y in rows]}
        if kind == "parquet":  # the hub's layout, train in two files
            (folder / "data").mkdir(exist_ok=True)
            parts = [slice(0, 2), slice(2, None)] if name == "train" else [slice(None)]
            for i, part in enumerate(parts):
                table = datasets.Dataset.from_dict({k: v[part] for k, v in columns.items()})
                table.to_parquet(folder / "data" / f"{name}-{i:05}-of-{len(parts):05}.parquet")
        elif kind == "jsonl":
            datasets.Dataset.from_dict(columns).to_json(folder / f"{name}.jsonl")
        else:
            header, lines = "sentence\tlabel", [f"{s}\t{y}" for s, y in rows]
            if name == "test":
                header, lines = "index\tsentence", [f"{i}\t{s}" for i, (s, _) in enumerate(rows)]
            file = folder / f"{'dev' if name == 'validation' else name}.tsv"
            file.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return folder


def sst2(*args):
    script("sst2").main([str(a) for a in args])


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "tsv"])
def test_sst2_sources(tmp_path, kind, capsys):
    sst2("--source", sst2_folder(tmp_path / "source", kind), "--out_dir", tmp_path / "out", "--record_len", 24)
    out = capsys.readouterr().out
    assert "test is left out: it has no labels" in out and "train: 1 of 4 sentences are cut to 24 bytes" in out
    assert "train: negative 2, positive 2; majority class 50.0 %" in out
    dataset = data.Dataset(tmp_path / "out")
    assert sorted(dataset.meta["splits"]) == ["train", "val"] and dataset.labels == {"negative": 254, "positive": 255}
    assert dataset.meta["label"] == "SST-2, train 4 of 67349 sentences, val 2 of 872 sentences"
    assert dataset.meta["stripped"] is True
    for name, rows in (("train", SENTENCES), ("val", SENTENCES[1:3])):
        split = dataset.split(name)
        assert split.n_scored == len(rows)
        for (sentence, label), tokens, targets in zip(
            rows, split.tokens.reshape(-1, 24), split.targets.reshape(-1, 24)
        ):
            text = sentence.strip().encode()[:24]
            assert bytes(tokens) == text.ljust(24, b"\0")
            assert targets.tolist() == [-1] * (len(text) - 1) + [254 + label] + [-1] * (24 - len(text))


def test_sst2_from_the_hub(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, split, revision):
        asked.append((name, split, len(revision)))
        return [{"sentence": s, "label": -1 if split == "test" else y} for s, y in SENTENCES]

    hub(monkeypatch, load_dataset)
    with pytest.raises(data.DataError) as error:
        sst2("--out_dir", tmp_path / "out")
    one_line(error, "train 4 of 67349 sentences", "--source")
    monkeypatch.setattr(script("sst2"), "ROWS", {"train": 4, "val": 4})
    sst2("--out_dir", tmp_path / "out")
    assert data.Dataset(tmp_path / "out").meta["label"] == "SST-2"
    assert asked[-3:] == [("stanfordnlp/sst2", s, 40) for s in ("train", "validation", "test")]


ROWS = [{"sentence": s, "label": 1} for s in ("\ud800", "", ["a"], 3)] + [
    ["a", 1],
    None,
    {"sentence": "a", "label": -1},
]
LABELS = [None, "x", "", 1.5, 2, [], {}, float("nan"), 10**30]


@pytest.mark.parametrize("row", ROWS + [{"sentence": "good", "label": label} for label in LABELS])
def test_sst2_names_the_row(tmp_path, row):
    text = '{"sentence": "fine", "label": 1}\n'
    (tmp_path / "train.jsonl").write_text(f"{text}{json.dumps(row)}\n{text}")
    with pytest.raises(data.DataError) as error:
        sst2("--source", tmp_path, "--out_dir", tmp_path / "out")
    one_line(error, "1 of 3 sentences" if row == ROWS[-1] else "train.jsonl, row 2: sentence ", str(tmp_path))


def test_sst2_parquet_of_other_columns(tmp_path):
    import pyarrow
    import pyarrow.parquet

    wrong = [
        {"sentence": [1, 2]},
        {"sentence": [None, "a"]},
        {"label": [1, 0]},
        {},
        {"sentence": [b"\xff"], "label": [1]},
    ]
    wrong += [{"sentence": ["a"] * 300_000, "label": [1] * 300_000}, {"sentence": ["a"], "label": [[1]]}]
    for columns in wrong:
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
        with pytest.raises(data.DataError) as error:
            sst2("--source", tmp_path, "--out_dir", tmp_path / "out")
        one_line(error, str(tmp_path))


def test_sst2_refuses(tmp_path, monkeypatch):
    (tmp_path / "none").mkdir()
    for source, part in ((tmp_path / "none", "holds no"), (tmp_path / "missing", "is not a folder")):
        with pytest.raises(data.DataError) as error:
            sst2("--source", source, "--out_dir", tmp_path / "out")
        one_line(error, part)
    contents = {
        "train.tsv": ["sentence\tlabel\nfine\t7\n", "text\tlabel\nfine\t1\n", "sentence\tlabel\nfine\tgood\n", ""]
        + ["sentence\tlabel\nfine\t1\n" + "x" * 200_000 + "\t5\n", "sentence\tlabel\nfine\t1\ngood\n"],
        "train.jsonl": [
            "{",
            "[1]\n",
            '{"sentence": "", "label": 1}\n',
            '{"sentence": null, "label": 1}\n',
            "[" * 10**5,
        ],
        "train.parquet": ["not a table"],
    }
    for name, texts in contents.items():
        for text in texts:
            (tmp_path / "none" / name).write_text(text, encoding="utf-8")
            with pytest.raises(data.DataError) as error:
                sst2("--source", tmp_path / "none", "--out_dir", tmp_path / "out")
            one_line(error, str(tmp_path / "none"))
        (tmp_path / "none" / name).unlink()

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route to host\nmore")

    hub(monkeypatch, load_dataset)
    with pytest.raises(data.DataError) as error:
        sst2("--out_dir", tmp_path / "out")
    one_line(error, "no route to host", "--source")
    assert not (tmp_path / "out" / "meta.json").exists()
