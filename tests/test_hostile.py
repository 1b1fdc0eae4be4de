"""Hostile input: what reads it ends well, or in one line that names the file, and leaves nothing behind.

NANO_FUZZ is the number of examples of each test, a few by default.
"""

import bz2
import contextlib
import copy
import dataclasses
import gzip
import io
import json
import lzma
import os
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from test_data import TEXT, WIKI, script, write, write_targets

import config
import data
import sample
import train
from model import GPT, GPTConfig, stored_config
from weights import ModelError, TrainError, checksum, is_dense, load_weights, read_checkpoint

ERRORS = (data.DataError, ModelError, TrainError, config.ConfigError)
fuzz = settings(
    max_examples=int(os.environ.get("NANO_FUZZ", 25)),
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def one_line(call, culprit, folder=None):
    """What call() returns; None where it ends in one of the repository's errors, whose message must be one line that
    names the culprit, and which must leave no new file in the folder. Any other exception fails the test."""
    before = files(folder)
    try:
        return call()
    except ERRORS as error:
        message = str(error)
    except OSError as error:  # `config.run` writes it in one line
        message = str(error)
        assert error.filename is not None, message
    assert "\n" not in message and len(message) < 600, message
    assert str(culprit) in message, message
    assert files(folder) == before, message
    return None


def files(folder):
    return sorted(p for p in Path(folder).rglob("*") if not p.is_dir()) if folder else []


def prepare(name, out, *args):
    """Run data/<name>/prepare.py as users do, and open what it has made. DataError: what it said on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()) as printed:
        status = data.run_prepare(lambda: script(name).main([*map(str, args), f"--out_dir={out}"]))
    said = said.getvalue().removesuffix("\n")
    assert said.isprintable() and printed.getvalue().replace("\n", "").isprintable(), (said, printed)
    if status:
        raise data.DataError(said)
    return use(out)


def use(folder):
    """Read a data set in every way that training does."""
    dataset = data.Dataset(folder)
    json.dumps(dataset.meta, indent=1)
    for name in dataset.meta["splits"]:
        split = dataset.split(name)
        if split.record_len is None:
            assert split.scored_bytes <= split.n_bytes
        for _ in data.windows(split, split.record_len or 4, 1, 100):
            pass
        dataset.codec.decode(split.tokens[:9])
    if "train" in dataset.meta["splits"]:
        data.Batches(dataset, dataset.record_len or 1, 2, seed=0).batch("train")
    return dataset


# what is drawn


odd = st.sampled_from(
    ["", " ", "\x1b[2J", "\ud800", "\r\n", "NaN", "0", "1", "-1", "1e999", "\u2028", "a" * 5000, "DEEP"]
) | st.text(max_size=6)
numbers = st.integers() | st.sampled_from([-1, 0, 1, 2, 255, 256, 2**31, 2**63, 10**30, 10**4000]) | st.floats()
anything = st.recursive(
    st.none() | st.booleans() | numbers | odd,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd, inner, max_size=3),
    max_leaves=5,
)


def dumps(value):
    """JSON whose "DEEP" is a list of lists of lists ..."""
    return json.dumps(value, default=str).replace('"DEEP"', "[" * 3000 + "]" * 3000, 1)


def places(value):
    """Each (container, key) inside a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


@st.composite
def spoiled(draw, value):
    """A JSON value some places of which hold anything, or nothing; its text."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(list(places(value)) or [({}, "")]))
        if isinstance(container, dict) and draw(st.integers(0, 4)) == 0:
            container.pop(key, None)
        elif isinstance(container, dict) and draw(st.integers(0, 4)) == 0:
            container[draw(odd)] = draw(anything)
        else:
            container[key] = draw(anything)
    return dumps(value)


@st.composite
def damaged(draw, raw):
    """Bytes with some bits flipped, or cut, or with bytes of another kind in the middle."""
    raw = bytearray(raw)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(raw) - 1)))
        at = draw(st.sampled_from([at, min(at, 40), max(0, len(raw) - 1 - at % 60)]))  # heads and tails more often
        kind = draw(st.integers(0, 3))
        if kind == 0 and raw:
            raw[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1:
            del raw[at:]
        elif kind == 2:
            raw[at : at + draw(st.integers(0, 9))] = draw(st.binary(max_size=9))
        else:
            raw[at : at + 4] = draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\0" * 4000, b"\n" * 3000]))
    return bytes(raw)


@st.composite
def zipped(draw, members):
    """A zip archive by any method, whose directory may lie, or whose bits may be damaged."""
    out = io.BytesIO()
    methods = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    with zipfile.ZipFile(out, "w", draw(st.sampled_from(methods))) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    raw = out.getvalue()
    kind = draw(st.integers(0, 2))
    if kind == 1 and members:
        at = raw.rindex(b"PK\x01\x02")  # the entry of a member: flags (one is encryption), method, sizes, offset
        field, width = draw(st.sampled_from([(8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (42, 4)]))
        value = draw(st.sampled_from([0, 1, 8, 9, 12, 14, 99, 2**32 - 1]) | st.integers(0, 2**32 - 1))
        raw = raw[: at + field] + value.to_bytes(4, "little")[:width] + raw[at + field + width :]
    return draw(damaged(raw)) if kind == 2 else raw


def fresh(tmp_path_factory):
    """A folder of an example: (source, out)."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "source").mkdir()
    return folder / "source", folder / "out"


# meta.json and .bin files


def prepared(folder, kind):
    if kind == "text":
        return write(folder, b"some text of words\n" * 3)
    if kind == "symbols":
        return write(folder, b"a b c a b c", data.SymbolsCodec(["a", "b", "c"]))
    return write_targets(folder, [-1, -1, -1, 3, -1, -1, -1, 4], labels={"no": 3, "yes": 4})


@fuzz
@given(st.data(), st.sampled_from(["text", "symbols", "records"]))
def test_meta(tmp_path_factory, draw, kind):
    folder = prepared(tmp_path_factory.mktemp("meta"), kind)
    file = folder / "meta.json"
    text = draw.draw(spoiled(json.loads(file.read_text())))
    file.write_bytes(text.encode() if draw.draw(st.integers(0, 2)) else draw.draw(damaged(text.encode())))
    one_line(lambda: use(folder), folder, folder)


@fuzz
@given(st.data(), st.sampled_from(["text", "symbols", "records"]), st.booleans())
def test_bin(tmp_path_factory, draw, kind, old):
    """A changed .bin is never taken for what was prepared, where meta.json says what that was."""
    folder = prepared(tmp_path_factory.mktemp("bin"), kind)
    if old:  # a meta.json without checksums
        meta = json.loads((folder / "meta.json").read_text())
        for info in meta["splits"].values():
            info.pop("sha256"), info.pop("targets_sha256", None)
        (folder / "meta.json").write_text(json.dumps(meta))
    file = draw.draw(st.sampled_from(sorted(folder.glob("*.bin"))))
    raw = file.read_bytes()
    other = draw.draw(damaged(raw))
    file.write_bytes(other)
    found = one_line(lambda: use(folder), folder / file.name, folder)
    assert found is None or other == raw or old


# sources


@fuzz
@given(st.data())
def test_enwik8(tmp_path_factory, draw):
    source, out = fresh(tmp_path_factory)
    text = draw.draw(st.just(TEXT) | st.binary(max_size=99) | damaged(TEXT))
    member = draw.draw(st.sampled_from(["enwik8", "x/enwik8", "\x1b]", "other"]))
    if draw.draw(st.booleans()):
        raw = draw.draw(zipped({member: text}))
    else:
        raw = draw.draw(st.sampled_from([bytes, gzip.compress, bz2.compress, lzma.compress]))(text)
        raw = draw.draw(damaged(raw)) if draw.draw(st.integers(0, 3)) else raw
    file = source / draw.draw(st.sampled_from(["enwik8", "enwik8.zip", "enwik8.gz"]))
    file.write_bytes(raw)
    one_line(
        lambda: prepare("enwik8", out, "--source", draw.draw(st.sampled_from([file, source]))), file, source.parent
    )


@fuzz
@given(st.data())
def test_wikitext2(tmp_path_factory, draw):
    source, out = fresh(tmp_path_factory)
    text = WIKI.encode() * 3
    names = draw.draw(st.lists(st.sampled_from(["train", "valid", "test", "x", "\x1b\n"]), unique=True))
    members = {
        f"{draw.draw(st.sampled_from(['', '', 'a/']))}wiki.{name}.{draw.draw(st.sampled_from(['raw', 'tokens']))}":
        draw.draw(st.just(text) | damaged(text) | st.just(text.decode().encode("utf-16")))
        for name in names
    }  # fmt: skip
    if draw.draw(st.booleans()):
        path = source / "wiki.zip"
        path.write_bytes(draw.draw(zipped(members)))
    else:
        path = source
        for name, content in members.items():
            (source / name).parent.mkdir(exist_ok=True)
            (source / name).write_bytes(content)
    one_line(lambda: prepare("wikitext2", out, "--source", path, "--codec=bytes"), source, source.parent)


@st.composite
def sst2_file(draw, folder, name):
    """A table of sentences and labels that is right, or nearly, or not at all."""
    good = [{"idx": i, "sentence": f"text {i}", "label": i % 2} for i in range(4)]
    kind = draw(st.sampled_from(["jsonl", "tsv", "parquet"]))
    if kind == "jsonl":
        rows = [draw(spoiled(row) | anything.map(dumps)) if draw(st.booleans()) else json.dumps(row) for row in good]
        raw = (
            draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n"]))
            .join(rows)
            .encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-16", "utf-8-sig"])))
        )
    elif kind == "tsv":
        header = draw(
            st.sampled_from(["sentence\tlabel", "label\tsentence", "sentence", "", "\t\t", '"sentence\tlabel'])
        )
        cells = odd | st.sampled_from(['"', '""a"', "x" * 200_000, "a\0b", "good", "0", "1", "\t", "\r"])
        rows = ["\t".join(draw(st.lists(cells, min_size=1, max_size=3))) for _ in range(3)]
        raw = "\n".join([header, "fine\t1", *rows]).encode("utf-8", "surrogatepass")
    else:
        import pyarrow
        import pyarrow.parquet

        columns = {}
        for column in draw(st.sampled_from([("sentence", "label"), ("sentence",), ("label", "x"), ()])):
            columns[column] = draw(
                st.sampled_from(
                    [["a", "b"], [1, 0], [None, None], [1.5, 0.0], [[1], [2]], [b"\xff", b"a"], ["a", None]]
                )
                if draw(st.booleans())
                else st.just(["fine", "good"] if column == "sentence" else [0, 1])
            )
        out = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), out)
        raw = out.getvalue()
    if draw(st.integers(0, 2)) == 0:
        raw = draw(damaged(raw))
    (folder / f"{name}.{kind}").write_bytes(raw)


@fuzz
@given(st.data())
def test_sst2(tmp_path_factory, draw):
    source, out = fresh(tmp_path_factory)
    for name in draw.draw(st.lists(st.sampled_from(["train", "validation", "test"]), unique=True, min_size=1)):
        draw.draw(sst2_file(source, name))
    length = draw.draw(st.sampled_from([1, 24, 256]))
    one_line(lambda: prepare("sst2", out, "--source", source, f"--record_len={length}"), source, source.parent)


@fuzz
@given(st.data(), st.sampled_from(["stdlib", "classify_stdlib"]))
def test_libraries(tmp_path_factory, draw, name):
    source, out = fresh(tmp_path_factory)
    for i in range(draw.draw(st.integers(0, 60))):
        path = source / draw.draw(st.sampled_from(["xml", "email", ""])) / f"m{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(draw.draw(st.binary(max_size=50)) * draw.draw(st.sampled_from([0, 1, 50])))
    special = draw.draw(st.sampled_from(["", "", "", "", "folder", "pipe", "nowhere", "/dev/zero"]))
    if special == "folder":
        (source / "gzip.py").mkdir()
    elif special == "pipe":
        os.mkfifo(source / "gzip.py")
    elif special:
        (source / "gzip.py").symlink_to(special)
    one_line(lambda: prepare(name, out, "--source", source), source, source.parent)


counts = st.sampled_from([-1, 0, 3, 50, 10**8, 10**12, 10**19, 10**30])


@fuzz
@given(st.lists(st.tuples(st.sampled_from(["trigrams", "positions", "train", "val", "test"]), counts), min_size=1))
def test_counts(tmp_path_factory, given):
    _, out = fresh(tmp_path_factory)
    options = {"train": 500, "val": 500, "test": 500} | dict(given)
    one_line(lambda: prepare("skip_trigrams", out, *(f"--{k}={v}" for k, v in options.items())), "--", out.parent)


@fuzz
@given(counts, st.sampled_from(["sst2", "classify_stdlib"]))
def test_record_len(tmp_path_factory, length, name):
    source, out = fresh(tmp_path_factory)
    (source / "train.jsonl").write_text('{"sentence": "fine", "label": 1}\n')
    (source / "xml").mkdir()
    (source / "xml" / "m.py").write_text("x = 1\n" * 1000)
    one_line(lambda: prepare(name, out, "--source", source, f"--record_len={length}"), "", out.parent)


# checkpoints


RUN = dict(n_layer=2, n_head=2, n_embd=8, block_size=8, batch_size=2, max_iters=1, eval_interval=1, eval_iters=1)
RUN |= dict(lr_decay_iters=1, warmup_iters=0, device="cpu", compile=False, wandb_log=False)


def command(**keys):
    return [f"--{k}={v}" for k, v in (RUN | keys).items()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_dataset):
    """{kind: the folder of a run of one step}, each with ckpt.pt, best.pt and model.safetensors."""
    folders = {}
    kinds = {"softmax": {}, "muon": dict(optimizer="muon"), "span": dict(attention_type="adaptive_span,gated")}
    kinds |= {"performer": dict(attention_type="performer", pos_emb="rope"), "gsa": dict(attention_type="gsa,gla")}
    for kind, keys in kinds.items():
        folders[kind] = keys, tmp_path_factory.mktemp("runs") / kind
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train.main(command(out_dir=folders[kind][1], dataset=text_dataset, export=True, **keys))
    return folders


@st.composite
def tensors(draw, like):
    """A tensor that is not quite `like`, or not at all."""
    like = like.half() if like.dtype == torch.float8_e4m3fn else like  # spoiled twice; few operations take float8
    kind = draw(st.integers(0, 7))
    if kind == 0:
        dtypes = [torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.uint8]
        return like.to(draw(st.sampled_from([*dtypes, torch.float8_e4m3fn])))
    if kind == 1:
        return like * draw(st.sampled_from([float("nan"), float("inf"), 1e30, 1e38, -1e38]))
    if kind == 2:
        one = like.float().clone(memory_format=torch.contiguous_format)
        one.view(-1)[draw(st.integers(0, one.numel() - 1)) if one.numel() else slice(0)] = draw(st.floats(width=32))
        return one
    if kind == 3:
        return like[draw(st.sampled_from([slice(0), slice(1), None]))] if like.dim() else like[None]
    if kind == 4:
        return torch.cat((like, like)) if like.dim() else like.repeat(3)
    if kind == 5:
        return like.t() if like.dim() == 2 else like.expand(2, *like.shape)
    if kind == 6:
        return like.to_sparse() if like.dim() else like
    return torch.rand(draw(st.lists(st.integers(0, 3), max_size=4)))


absurd = st.sampled_from([-1, 0, 1, 2, 3, 7, 8, 9, 64, 4096, 10**6, 2**31 - 1, 2**31, 2**63, 10**30, -(10**30)])
plain = (
    absurd | anything | st.sampled_from(["softmax", "gla", "none", "x,", "rope", "4", b"x", [torch.ones(2)], {1: 2}])
)


def inner_places(value):
    """Each (container, key) inside what a checkpoint holds."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from inner_places(value[key])


@st.composite
def spoiled_checkpoint(draw, stored):
    """A checkpoint of which some places hold anything, or nothing, or what is nearly right."""
    stored = copy.deepcopy(stored)
    for _ in range(draw(st.integers(1, 2))):
        part = draw(st.sampled_from([*stored, "model", "model_args", "optimizer"]))
        container, key = draw(st.sampled_from(list(inner_places(stored.get(part))) or [(stored, part)]))
        if key not in stored and container is stored:
            continue
        kind, old = draw(st.integers(0, 9)), container[key]
        if kind == 0 and isinstance(container, dict):
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[draw(odd | st.integers(0, 9) | st.sampled_from(list(container)))] = draw(plain | st.just(old))
        elif is_dense(old) and kind < 9:
            container[key] = draw(tensors(old))
        elif isinstance(old, (bool, str)) or kind == 9:
            container[key] = draw(plain)
        elif isinstance(old, (int, float)):
            container[key] = draw(absurd | numbers | plain)
        else:
            container[key] = draw(plain | st.sampled_from([{}, [], [old], (old,), {"": old}]))
    return stored


def quietly(main, arguments):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(list(map(str, arguments))) == 0


def copied(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "run"
    shutil.copytree(run, folder)
    return folder


def load(folder, name):
    """What a checkpoint holds, in a model of numbers, whose parts fit another model of the same sizes."""
    model = GPT.from_checkpoint(str(folder), name)
    assert all(w.isfinite().all() for w in model.state_dict().values() if w.is_floating_point())
    stored = read_checkpoint(str(folder), name)
    load_weights(GPT(stored_config(stored)), stored["model"], stored_config(stored))


def use_checkpoint(folder, name, text, keys=None):
    """Weights, text from them, and where `keys` are given a resumed step: each ends well, or in one line."""
    one_line(lambda: load(folder, name), "", folder)
    arguments = [f"--out_dir={folder}", f"--checkpoint={name}", f"--dataset={text}", "--device=cpu"]
    one_line(lambda: quietly(sample.main, [*arguments, "--max_new_tokens=3"]), "", folder)
    if keys is not None:
        resumed = command(out_dir=folder, dataset=text, init_from="resume", max_iters=2, **keys)
        one_line(lambda: quietly(train.main, resumed), "", folder)


once = settings(fuzz, phases=[Phase.generate])  # a failure that is made smaller takes minutes here
KINDS = st.sampled_from(["softmax", "muon", "span", "performer", "gsa"])


@once
@given(st.data(), KINDS)
def test_checkpoint(tmp_path_factory, text_dataset, runs, draw, kind):
    """Content that torch.save wrote, whose checksums fit: only what it says is wrong."""
    keys, run = runs[kind]
    folder = copied(run, tmp_path_factory)
    stored = draw.draw(spoiled_checkpoint(torch.load(folder / "ckpt.pt", weights_only=True)))
    torch.save(stored, folder / "ckpt.pt")
    use_checkpoint(folder, "ckpt.pt", text_dataset, keys)


@once
@given(st.data(), KINDS)
def test_export(tmp_path_factory, text_dataset, runs, draw, kind):
    from safetensors.torch import save_file

    folder = copied(runs[kind][1], tmp_path_factory)
    stored = read_checkpoint(str(folder), "model.safetensors")
    stored = draw.draw(spoiled_checkpoint({k: stored[k] for k in ("model", "model_args")}))
    weights = stored.get("model") if isinstance(stored.get("model"), dict) else {}
    weights = {str(k): w.contiguous() for k, w in weights.items() if is_dense(w) and str(k).isprintable()}
    text = dumps(stored.get("model_args")) if draw.draw(st.integers(0, 3)) else draw.draw(odd)
    text = text.encode(errors="replace").decode()
    try:
        save_file(
            {k: w.clone() for k, w in weights.items()},
            folder / "model.safetensors",
            {"model_args": text, "crc32": checksum(weights, text)},
        )
    except Exception:
        return
    use_checkpoint(folder, "model.safetensors", text_dataset)


@fuzz
@given(st.data(), st.sampled_from(["ckpt.pt", "best.pt", "model.safetensors"]))
def test_checkpoint_file(tmp_path_factory, text_dataset, runs, draw, name):
    """A file that is cut, or damaged, or another: refused by name, unless it is as it was."""
    folder = copied(runs["softmax"][1], tmp_path_factory)
    path = folder / name
    raw = path.read_bytes()
    other = draw.draw(
        damaged(raw)
        | zipped({"a/data.pkl": b"x"})
        | st.binary(max_size=50)
        | st.binary(max_size=9).map(lambda b: b + raw)
    )
    path.write_bytes(other)
    model = one_line(lambda: GPT.from_checkpoint(str(folder), name), path, folder)
    if model is not None:  # what was changed is not read
        stored = GPT.from_checkpoint(str(runs["softmax"][1]), name).state_dict()
        assert all(torch.equal(w, stored[k]) for k, w in model.state_dict().items())
    use_checkpoint(folder, name, text_dataset, {} if name == "ckpt.pt" else None)


# prompts


prompts = (
    st.text()
    | odd
    | st.sampled_from(["\0", "\udcff", "\ud800", "FILE:", "FILE:\0", "FILE:\ud800", "FILE:/", "FILE:\n"])
)


@fuzz
@given(st.data(), prompts)
def test_prompt(tmp_path_factory, text_dataset, runs, draw, text):
    folder = tmp_path_factory.mktemp("prompt")
    dataset = draw.draw(st.sampled_from([text_dataset, None]))
    if dataset is None:
        dataset = write(folder / "symbols", b"a b c a b c", data.SymbolsCodec(["a", "b", "c"]))
    culprit, file = "", folder / "prompt.txt"
    if draw.draw(st.booleans()):
        raw = st.binary(max_size=20) | st.sampled_from([b"", b"\xff", b"\0", b"\r\n", b" ", b"ab " * 9000, b"a\n\nb"])
        kind = draw.draw(st.sampled_from(["file", "file", "file", "missing", "folder", "huge", "device"]))
        if kind == "file":
            file.write_bytes(draw.draw(raw | st.just(text.encode(errors="replace"))))
        elif kind == "folder":
            file.mkdir()
        elif kind == "huge":
            with open(file, "wb") as f:
                f.truncate(2**40)
        elif kind == "device":
            file.symlink_to("/dev/zero")
        text = f"FILE:{file}"
        culprit = file
    arguments = [f"--out_dir={runs['softmax'][1]}", f"--dataset={dataset}", "--device=cpu", "--max_new_tokens=2"]
    arguments += [f"--start={text}", f"--num_samples={draw.draw(st.integers(1, 2))}"]
    one_line(lambda: quietly(sample.main, arguments), culprit, folder)


# config


@fuzz
@given(st.data())
def test_config(tmp_path_factory, draw):
    """Files and arguments: each ends in records whose values are of their types, or in one line that names it."""
    folder = tmp_path_factory.mktemp("config")
    names = [f.name for r in (GPTConfig, train.TrainConfig) for f in dataclasses.fields(r)]
    key = st.sampled_from([*names, "n_layer", "learning_rate", "learning_rat", "n_layer "]) | odd
    values = anything.map(repr) | odd.map(repr) | st.sampled_from(
        ["1e999", "float('nan')", "10**400", "1/0", "undefined", "exit()", "open('/nowhere')", "[" * 300, "'a\nb'", "(",
         "2**10", "1_0", "lambda: 0", "print", "__import__('os')", "'\\ud800'", "{}", "b'x'", "[[]]", "True", "-0.0"]
    )  # fmt: skip
    statements = st.builds("{} = {}".format, key, values) | st.sampled_from(
        ["raise SystemExit(3)", "raise Exception('a\\nb\\x1b')", "\0", "import os", "x = y",
         "def f(): f()\nf()", "assert False", "# \ufeff", "\ttab", "n_layer = 2; n_layer = 3",
         "class n_layer: pass", "del __file__", "globals().clear()", "raise SyntaxError('x')"]
    )  # fmt: skip
    arguments, culprit = [], ""
    if draw.draw(st.booleans()):
        path = folder / draw.draw(st.sampled_from(["a.py", "a.py", "a.txt", "a.py/b.py", ".py"]))
        text = "\n".join(draw.draw(st.lists(statements, min_size=1, max_size=3))).encode(errors="surrogatepass")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(draw.draw(damaged(text)) if draw.draw(st.integers(0, 4)) == 0 else text)
        arguments, culprit = [str(path)], ""
    texts = anything.map(str) | odd | values | st.sampled_from(["nan", "inf", "1e999", "0x10", "1" * 5000, "١", "1_0"])
    options = (
        st.builds("--{}={}".format, key, texts) | key.map("--{}".format) | odd | st.sampled_from(["-", "--", "--="])
    )
    arguments += draw.draw(st.lists(options, min_size=0 if arguments else 1, max_size=3))
    found = one_line(lambda: config.load(arguments, GPTConfig, train.TrainConfig), culprit, folder)
    for record in (found or ())[:2]:
        assert config.build(type(record), dataclasses.asdict(record)) == record


# flips


@fuzz
@given(st.data(), st.sampled_from(["train", "val", "test"]), st.sampled_from(["text", "symbols", "records"]))
def test_flips(tmp_path_factory, draw, split, kind):
    """One bit of a .bin is flipped, and the time put back: nobody opens it, though it was verified before."""
    folder = prepared(tmp_path_factory.mktemp("flips"), kind)
    if draw.draw(st.booleans()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "SETTLED", 0)
            use(folder)
        assert (folder / ".verified").exists()
        time.sleep(0.02)  # the clock of a file system has ticked
    file = folder / draw.draw(st.sampled_from([f.name for f in folder.glob(f"{split}*.bin")]))
    raw, changed = bytearray(file.read_bytes()), file.stat().st_mtime_ns
    bit = draw.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    file.write_bytes(raw)
    if draw.draw(st.booleans()):
        os.utime(file, ns=(changed, changed))
    assert one_line(lambda: use(folder), file, folder) is None
