"""Configuration: precedence, types, round trips, owners, devices; then mutated configs against the real scripts, each
of which must end in one line that names the key or the file."""

import contextlib
import dataclasses
import io
import keyword
import math
import os
import random
import subprocess
import sys
import tempfile
import typing
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings, strategies as st

import bench
import config
import sample
import train
import weights
from benchmarks import decoding, layers, steps
from config import ConfigError, Runtime, build, key, load, override, read_file, resolve_device
from data import DataError
from kernels import launch
from model import ATTENTION, GPT, GPTConfig, ModelError
from train import TrainConfig, TrainError, default_folder

sys.path.insert(0, ROOT)
RECORDS = (GPTConfig, TrainConfig, sample.SampleConfig, bench.BenchConfig)
quick = settings(max_examples=40, deadline=None)


@dataclass
class Small:
    """A small record"""

    name: str = key("a", "some text")
    count: int = key(3, "a count", low=0, high=100)
    rate: float = key(0.5, "a rate", low=0.0)
    flag: bool = key(False, "a switch")
    limit: int | None = key(None, "a limit", low=1)
    maybe: bool | None = key(None, "a switch with a third state")
    share: typing.Optional[float] = key(None, "a share", low=0.0, high=1.0)  # noqa: UP045
    choice: str = key("left", "a side", choices=("left", "right"))


@dataclass
class Owned:
    """A record with keys of attention types"""

    attention_type: str = key("softmax", "a type or a pattern")
    span: int = key(0, "of one type", "adaptive_span", low=0)
    slots: int = key(64, "of two types", "gsa", "gla", low=1)
    common: int = key(1, "of every type")


def one(*argv, record=Small):
    return load(list(argv), record)[0]


def write(folder, text, name="c.py"):
    path = os.path.join(str(folder), name)
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        f.write(text)
    return path


def message(*argv, records=(Small,)):
    with pytest.raises(ConfigError) as caught:
        load(list(argv), *records)
    return str(caught.value)


# precedence


def test_defaults_and_precedence(tmp_path):
    a = write(tmp_path, "count = 10\nname = 'file a'\nlimit = 7\n", "a.py")
    b = write(tmp_path, "count = 20\nrate = 2\n", "b.py")
    assert one() == Small()
    values, given_by = load(["--limit=9", a, "--count=30", b, "--count=31"], Small)
    assert values == Small(name="file a", count=31, rate=2.0, limit=9)
    assert given_by == {"count": "the command line", "name": a, "limit": "the command line", "rate": b}
    assert one(b, a).count == 10 and one(a, b).count == 20


ASSIGNMENTS = st.fixed_dictionaries(
    {},
    optional=dict(
        name=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12),
        count=st.integers(0, 100),
        rate=st.floats(0, 1e300),
        flag=st.booleans(),
        limit=st.none() | st.integers(1, config.LARGEST),
        maybe=st.none() | st.booleans(),
        share=st.none() | st.floats(0, 1),
        choice=st.sampled_from(("left", "right")),
    ),
)


@quick
@given(st.lists(ASSIGNMENTS, max_size=3), st.lists(ASSIGNMENTS, max_size=3), st.randoms(use_true_random=False))
def test_later_sources_win(files, lines, shuffle):
    """Files in their order, then the command line in its order, however the two are interleaved."""
    want = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for i, values in enumerate(files):
            paths.append(write(folder, "".join(f"{k} = {v!r}\n" for k, v in values.items()), f"{i}.py"))
            want |= values
        words = [f"--{k}={v}" for values in lines for k, v in values.items()]
        for values in lines:
            want |= values
        slots = [True] * len(paths) + [False] * len(words)
        shuffle.shuffle(slots)
        paths, words = iter(paths), iter(words)
        got, given_by = load([next(paths if is_path else words) for is_path in slots], Small)
    assert got == Small(**want) and given_by.keys() == want.keys()


def test_several_records_share_one_command_line():
    small, owned, given_by = load(["--count=5", "--common=6"], Small, Owned)
    assert (small.count, owned.common, set(given_by)) == (5, 6, {"count", "common"})


# values


@pytest.mark.parametrize(
    "argument, value",
    [
        ("--name=a=b", "a=b"), ("--name==", "="), ("--name=", ""), ("--name=--count=3", "--count=3"),
        ("--name=None", "None"),
        ("--name=3", "3"), ("--name=True", "True"), ("--count=0", 0), ("--count=100", 100), ("--rate=3", 3.0),
        ("--rate=1e-05", 1e-5), ("--flag", True), ("--flag=true", True), ("--flag=FALSE", False),
        ("--limit=None", None),
        ("--limit=none", None), ("--limit=4", 4), ("--maybe", True), ("--maybe=None", None), ("--maybe=false", False),
        ("--share=1", 1.0), ("--share=null", None), ("--choice=right", "right"),
    ],
)  # fmt: skip
def test_command_line_values(argument, value):
    got = getattr(one("--flag=False", "--limit=2", "--maybe=True", argument), argument[2:].partition("=")[0])
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "line, value", [("rate = 3", 3.0), ("limit = None", None), ("share = 1", 1.0), ("maybe = 1 > 2", False)]
)
def test_file_values(tmp_path, line, value):
    got = getattr(one(write(tmp_path, line)), line.split()[0])
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "text, want",
    [
        ("count=1.5", "--count must be an integer, not '1.5'"), ("count=", "--count must be an integer, not ''"),
        ("count=True", "--count must be an integer, not 'True'"), ("count=-1", "--count must be at least 0, not -1"),
        ("count=101", "--count must be at most 100, not 101"), ("count=None", "--count must be an integer, not 'None'"),
        ("count", "--count: write --count=value (an integer)"), ("rate=x", "--rate must be a number, not 'x'"),
        ("rate=nan", "--rate must be finite, not nan"), ("rate=1e999", "--rate must be finite, not inf"),
        ("rate=-0.1", "--rate must be at least 0.0, not -0.1"), ("flag=1", "--flag must be True or False, not '1'"),
        ("limit=0", "--limit must be at least 1, not 0"),

        ("limit=2147483648", "--limit must be at most 2147483647 in size"),
        ("limit=x", "--limit must be an integer or None, not 'x'"),
        ("maybe=2", "--maybe must be True or False or None, not '2'"),
        ("share=2", "--share must be at most 1.0, not 2.0"),
        ("choice=rigth", "--choice must be one of left, right, not 'rigth'; did you mean right?"),
        ("cuont=3", "--cuont: unknown key cuont; did you mean count?"),
        ("zzzzzz=3", "--zzzzzz: unknown key zzzzzz; --help lists the keys"),
        (
            "use_adaptive_attention=True",
            "--use_adaptive_attention: use_adaptive_attention is not a key here; write attention_type=adaptive_span"
            " (False: attention_type=softmax)",
        ),
    ],
)  # fmt: skip
def test_refusals_say_what_to_write(text, want):
    assert message(f"--{text}") == want


@pytest.mark.parametrize("argument", ["-count=1", "-", "--", "--=1", "---", "-c", "-5"])
def test_what_is_no_argument(argument):
    assert message(argument) == f"{argument}: write --key=value"


@pytest.mark.parametrize(
    "line, want",
    [
        ("count = 3.0", "an integer, not 3.0"), ("count = True", "an integer, not True"),
        ("count = '3'", "an integer, not '3'"),
        ("rate = True", "a number, not True"), ("rate = None", "a number, not None"),
        ("flag = 1", "True or False, not 1"),
        ("name = None", "text, not None"), ("name = b'x'", "text, not b'x'"),
        ("limit = 2.0", "an integer or None, not 2.0"),
        ("rate = 10**400", "must be at most 2147483647"),
        ("limit = 10**5000", "must be at most 2147483647"),
        ("rate = -1e999", "must be finite, not -inf"),
        ("limit = list(range(99))", "..."),
    ],
)  # fmt: skip
def test_files_are_checked_like_the_command_line(tmp_path, line, want):
    path = write(tmp_path, line)
    got = message(path)
    assert got.startswith(f"{path}: {line.split()[0]} must be ") and want in got and len(got) < len(path) + 120


def plain(record):
    """The record without its checks of one key against another, so that every key can be given every value."""
    return type(record.__name__, (record,), {"__post_init__": lambda self: None, "__doc__": record.__doc__})


def values_of(field, kinds):
    """A strategy for the values that a field may take."""
    meta, choices = field.metadata, []
    if type(None) in kinds:
        choices.append(st.none())
    if meta["choices"]:
        choices.append(st.sampled_from(meta["choices"]))
    elif meta["act"] is not None:  # of a file that runs; tests/test_plugin.py has these
        choices.append(st.just(field.default))
    elif field.name == "attention_type":  # every type in use, so that every type's keys may be given
        choices.append(st.permutations(list(ATTENTION)).map(",".join))
    elif bool in kinds:
        choices.append(st.booleans())
    elif int in kinds:
        choices.append(st.integers(meta["low"], meta["high"] or config.LARGEST))
    elif float in kinds:
        choices.append(st.floats(meta["low"], meta["high"], allow_nan=False, allow_infinity=False))
    else:
        choices.append(st.text(st.characters(codec="utf-8"), max_size=20))
    return st.one_of(choices)


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.__name__)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_key_round_trips(record, data):
    """--key=value and `key = value` in a file give the value back, for all keys of a record at once."""
    hints = typing.get_type_hints(record)
    want = {f.name: data.draw(values_of(f, config._kinds(hints[f.name])), f.name) for f in dataclasses.fields(record)}
    got, given_by = load([f"--{k}={v}" for k, v in want.items()], plain(record))
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, "".join(f"{k} = {v!r}\n" for k, v in want.items()))
        from_file = load([path], plain(record))[0]
    for name, value in want.items():
        for result in (getattr(got, name), getattr(from_file, name)):
            assert result == value and type(result) is type(value), name
    assert given_by == dict.fromkeys(want, "the command line")


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.__name__)
def test_defaults_and_bounds_are_themselves_valid(record):
    hints = typing.get_type_hints(record)
    for f in dataclasses.fields(record):
        kinds, meta = config._kinds(hints[f.name]), f.metadata
        edges = [f.default, *(meta["choices"] or ()), *(v for v in (meta["low"], meta["high"]) if v is not None)]
        owners = config._owners(f, (GPTConfig,))
        types = [f"--attention_type={','.join(owners)}"] if owners else []
        for value in edges:
            assert getattr(load([*types, f"--{f.name}={value}"], plain(record))[0], f.name) == value
        assert type(f.default) in kinds and meta["help"]
        for bound, beyond in ((meta["low"], -1), (meta["high"], 1)):
            if bound is not None:
                with pytest.raises(ConfigError, match=f"^--{f.name} must be at "):
                    load([f"--{f.name}={bound + beyond}"], plain(record))


PIECES = st.sampled_from(
    ("--", "-", "=", "count", "rate", "name", "flag", "limit", "3", "-1", "1e5", "None", "nan", "True", " ", "é", "\n")
)  # fmt: skip


@quick
@given(
    st.lists(st.lists(PIECES, max_size=5).map("".join) | st.text(st.characters(codec="utf-8", exclude_characters="\0")))
)
def test_any_command_line_is_a_record_or_a_config_error(argv):
    with contextlib.suppress(ConfigError):
        got = load([a for a in argv if a not in ("-h", "--help")], Small)[0]
        assert isinstance(got, Small) and 0 <= got.count <= 100 and math.isfinite(got.rate)


TOKENS = list("=()['\":é\0\n\t+/0,#\\1") + ["count", "rate", "if", "lambda", "_x", "None", "1/0", "raise"]


@quick
@given(st.lists(st.sampled_from(TOKENS)))
def test_any_file_is_a_record_or_a_config_error(pieces):
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, " ".join(pieces))
        try:
            got = load([path], Small)[0]
        except ConfigError as error:
            assert str(error).startswith(path)
        else:
            assert isinstance(got, Small)


# override files


def test_a_file_computes_in_a_namespace_of_its_own(tmp_path):
    text = "import math as _math\n_half = 4\ndef _twice(n):\n    return 2 * n\n"
    text += "count = sum(_twice(_half) for _ in range(3))\n"
    text += "rate = _math.sqrt(16)\nname = f'{count} {__name__}'\nassert __file__.endswith('a.py')\n"
    a, b = write(tmp_path, text, "a.py"), write(tmp_path, "rate = count + 1.0\n", "b.py")
    assert read_file(a) == {"count": 24, "rate": 4.0, "name": "24 config_file"}
    assert one(a) == Small(count=24, rate=4.0, name="24 config_file")
    assert message(a, b) == f"{b}, line 1: NameError: name 'count' is not defined"
    before = dict(vars(config))
    write(tmp_path, "_check = key = load = None\n", "c.py")
    assert "unknown key key" in message(str(tmp_path / "c.py")) and vars(config) == before


@pytest.mark.parametrize(
    "text, want",
    [
        ("count = 1\nimport json\n", ": unknown key json; --help lists the keys (a helper's name starts with _)"),
        ("count = 1\ncuont = 1\n", ": unknown key cuont; did you mean count? (a helper's name starts with _)"),
        ("count = 1\n\nrate = (\n", ", line 3: '(' was never closed"),
        ("count = 1\n1 / 0\n", ", line 2: ZeroDivisionError: division by zero"),
        ("def _f():\n    raise OSError('a\\nb')\n_f()\n", ", line 2: OSError: a b"),
        ("raise SystemExit(0)\n", ": it exits; an override file holds plain assignments"),
        ("name = open('/no/f')\n", ", line 1: FileNotFoundError: [Errno 2] No such file or directory: '/no/f'"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named_with_its_line(tmp_path, text, want):
    path = write(tmp_path, text)
    assert message(path) == path + want


def test_a_file_that_cannot_be_read(tmp_path):
    path = write(tmp_path, "count = 1", "train_small.py")
    near, binary, folder = (str(tmp_path / name) for name in ("train_smal.py", "binary.py", "folder.py"))
    assert message(near) == f"{near}: No such file or directory; did you mean {path}?"
    with open(binary, "wb") as f:
        f.write(b"count = 1\n\xff\xfe")
    assert message(binary) == f"{binary}: not a text file"
    os.mkdir(folder)
    assert message(folder) == f"{folder}: Is a directory"
    assert message("count=3") == "count=3: not a config file; write config/<name>.py, or --key=value for one key"


def test_every_config_of_the_repository_loads():
    paths = [os.path.join(ROOT, "config", n) for n in sorted(os.listdir(os.path.join(ROOT, "config")))]
    paths = [p for p in paths if p.endswith(".py") and not p.endswith("__init__.py")]
    assert 5 <= len(paths) <= 40
    folders = []
    for path in paths:
        model_config, train_config, given_by = load([path], GPTConfig, TrainConfig)
        assert set(given_by.values()) == {path}
        with open(path) as f:
            assert f.readline().startswith("# "), "its first line says what it is for"
        folders.append(train_config.out_dir or default_folder([path], model_config.attention_type))
    assert len(set(folders)) == len(folders), "two configs write into one folder"


def test_a_run_has_a_folder_for_its_config_and_attention_type():
    argv = ["config/a.py", "--n_layer=4", "some/b.py"]
    assert default_folder(argv, "gla, gla,softmax") == os.path.join("out", "b-gla+gla+softmax")
    assert default_folder([], "softmax") == os.path.join("out", "train-softmax")


# owners


def test_a_key_of_an_unused_type(tmp_path, capsys):
    path = write(tmp_path, "span = 5\ncommon = 2\n")
    want = "span belongs to attention_type=adaptive_span, and no layer of 'softmax' is one"
    assert message("--span=5", records=(Owned,)) == f"--span: {want}"
    assert capsys.readouterr().err == ""
    assert one(path, record=Owned) == Owned(common=2)
    assert capsys.readouterr().err == f"warning: {path}: {want}; ignored\n"
    assert "'gla'" in message("--span=1", "--attention_type=gla", records=(Owned,))
    assert message(path, "--span=6", records=(Owned,)) == f"--span: {want}"
    assert "attention_type=gsa|gla" in message("--slots=1", records=(Owned,))


@pytest.mark.parametrize("pattern", ["adaptive_span", "softmax,adaptive_span", "gla , adaptive_span"])
def test_a_key_of_a_used_type(tmp_path, capsys, pattern):
    path = write(tmp_path, "span = 5\n")
    assert one(f"--attention_type={pattern}", "--span=4", record=Owned).span == 4
    assert one(path, f"--attention_type={pattern}", record=Owned).span == 5
    assert capsys.readouterr().err == ""


def test_either_owner_will_do(capsys):
    assert one("--slots=2", "--attention_type=gla", record=Owned).slots == 2
    assert one("--slots=3", "--attention_type=softmax,gsa", record=Owned).slots == 3
    assert capsys.readouterr().err == ""


# help, build, run


@pytest.mark.parametrize("flag", ["--help", "-h", "--help=True"])
@pytest.mark.parametrize("records", [RECORDS[:2], RECORDS[2:3], (RECORDS[0], RECORDS[3]), (Small, Owned)])
def test_help_prints_every_key(capsys, flag, records):
    with pytest.raises(SystemExit) as caught:
        load(["--no_such_key=1", flag], *records)
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for record in records:
        assert f"\n{record.__doc__.splitlines()[0]}\n" in text
        for f in dataclasses.fields(record):
            entry = text[text.index(f"\n  --{f.name}={f.default}\n") :].split("\n  --")[1]
            assert f.metadata["help"] in entry
            assert all(str(c) in entry for c in f.metadata["choices"] or ())
    if Owned in records:
        assert "[gsa, gla] of two types (an integer)" in text


@pytest.mark.parametrize("main", [train.main, sample.main, bench.main])
def test_help_of_the_scripts(capsys, main):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0 and "--device=auto" in capsys.readouterr().out


def test_build_and_override():
    assert override(GPTConfig(n_embd=24), n_head=3).n_embd == 24
    with pytest.raises(ConfigError, match="n_embd=24 is not a multiple of n_head=5"):
        override(GPTConfig(n_embd=24), n_head=5)
    with pytest.raises(ConfigError, match="no_such"):
        build(GPTConfig, {"no_such": 1})


@pytest.mark.parametrize(
    "error, status, line",
    [
        (ConfigError("a wrong\n  key"), 2, "run.py: a wrong key"), (ModelError("m"), 1, "run.py: m"),
        (ModelError("caf\u00e9 \x1b[2J\u202e"), 1, "run.py: caf\u00e9 \\x1b[2J\\u202e"),
        (OSError(2, "No such file", "f"), 1, "run.py: [Errno 2] No such file: 'f'"),
        (KeyboardInterrupt(), 130, "run.py: interrupted"),
    ],
)  # fmt: skip
def test_run_ends_in_one_line(monkeypatch, capsys, error, status, line):
    def main(argv):
        assert argv == ["--a=1"]
        raise error

    monkeypatch.setattr(sys, "argv", ["some/folder/run.py", "--a=1"])
    with pytest.raises(SystemExit) as caught:
        config.run(main, ModelError)
    assert (caught.value.code, capsys.readouterr().err) == (status, line + "\n")


def test_run_passes_the_status_and_shows_bugs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py"])
    with pytest.raises(SystemExit) as caught:
        config.run(lambda argv: 7)
    assert caught.value.code == 7
    with pytest.raises(ZeroDivisionError):
        config.run(lambda argv: 1 / 0, ModelError)


# devices


def test_cpu_touches_no_gpu(monkeypatch):
    def touched(*_, **__):
        raise AssertionError("asked for a GPU")

    monkeypatch.setattr(torch.cuda, "is_available", touched)
    monkeypatch.setattr(torch.backends.mps, "is_available", touched)
    assert resolve_device("cpu", "auto", None) == Runtime("cpu", "float32", False, "as asked")
    assert resolve_device("cpu", "bfloat16", True) == Runtime("cpu", "bfloat16", True, "as asked")
    assert str(resolve_device("cpu", "auto")) == "device cpu, float32, eager (as asked)"


@pytest.mark.parametrize(
    "device, dtype, compile, cuda, mps, bf16, want",
    [
        ("auto", "auto", None, True, True, True, ("cuda", "bfloat16", True, "CUDA found")),
        ("auto", "auto", False, True, False, False, ("cuda", "float16", False, "CUDA found")),
        ("auto", "auto", None, False, True, False, ("mps", "float32", False, "MPS found, no CUDA")),
        ("auto", "auto", True, False, False, False, ("cpu", "float32", True, "no GPU found")),
        ("cuda:1", "float32", None, True, False, True, ("cuda:1", "float32", True, "as asked")),
        ("mps", "auto", None, False, True, False, ("mps", "float32", False, "as asked")),
    ],
)
def test_choice_of_device(monkeypatch, device, dtype, compile, cuda, mps, bf16, want):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bf16)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "empty", lambda n, device: None)
    got = resolve_device(device, dtype, compile)
    assert dataclasses.astuple(got) == want and got.device_type == want[0].split(":")[0]


@pytest.mark.parametrize(
    "device, dtype, want",
    [
        ("cuda", "auto", "device=cuda: this PyTorch sees no CUDA device; write --device=cpu"),
        ("mps", "auto", "device=mps: this PyTorch sees no MPS device; write --device=cpu"),
        ("cpu", "float16", "dtype=float16 needs CUDA (its gradient scaler); write --dtype=float32 for cpu"),
        ("gpu", "auto", "device must be auto, cpu, cuda, cuda:N or mps, not 'gpu'"),
        ("", "auto", "device must be auto, cpu, cuda, cuda:N or mps, not ''"),
    ],
)
def test_refused_devices(monkeypatch, device, dtype, want):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        resolve_device(device, dtype)
    assert str(caught.value) == want


def test_a_device_number_that_does_not_exist(monkeypatch):
    def refuse(n, device):
        raise RuntimeError(f"CUDA error: invalid device ordinal {device}\nand a page of advice")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(ConfigError) as caught:
        resolve_device("cuda:99", "auto")
    assert str(caught.value) == "device=cuda:99: CUDA error: invalid device ordinal cuda:99"


def test_autocast_is_the_precision():
    a = torch.ones(2, 2)
    for dtype in (torch.float32, torch.bfloat16):
        with resolve_device("cpu", str(dtype).removeprefix("torch.")).autocast():
            assert (a @ a).dtype == dtype


# mutations: (script, arguments, what the line must name, exit status); each is wrong by construction

SCRIPTS = {
    "train": (train.main, (DataError, ModelError, TrainError), (GPTConfig, TrainConfig)),
    "sample": (sample.main, (DataError, ModelError), (sample.SampleConfig,)),
    "bench": (bench.main, (DataError, ModelError), (GPTConfig, bench.BenchConfig)),
    "owned": (lambda argv: load(argv, Owned), (), (Owned,)),
}
SHAPE = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=16", "--device=cpu", "--batch_size=2"]


class Mutations:
    def __init__(self, seed, folder, dataset, checkpoint):
        self.rng, self.folder, self.dataset, self.checkpoint = random.Random(seed), str(folder), dataset, checkpoint
        self.n = 0
        self.kinds = [getattr(self, name) for name in dir(type(self)) if name.startswith("make_")]

    def __iter__(self):
        """Every kind in turn, for ever."""
        while True:
            for make in self.kinds:
                case = make()
                if len(case) == 3:
                    case = (*case, 2)
                yield make.__name__.removeprefix("make_"), *case

    # helpers

    def script(self):
        return self.rng.choice(("train", "train", "sample", "bench"))

    def fields(self, script):
        return {f.name: f for record in SCRIPTS[script][2] for f in dataclasses.fields(record)}

    def pick(self, script, accept):
        """(field, kinds) of a random key that `accept` takes."""
        hints = {k: h for record in SCRIPTS[script][2] for k, h in typing.get_type_hints(record).items()}
        found = [(f, config._kinds(hints[f.name])) for f in self.fields(script).values()]
        return self.rng.choice([(f, kinds) for f, kinds in found if accept(f, kinds)])

    def path(self, suffix=".py"):
        self.n += 1
        stem = self.rng.choice(("config", "a b", "тест", "x=y", "été", "train.py"))
        return os.path.join(self.folder, f"{stem}{self.n}{suffix}")

    def file(self, text):
        path = self.path()
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)
        return path

    def with_company(self, script, *wrong):
        """The wrong argument, before or after one that is right."""
        right = self.rng.choice(("--device=cpu", "--seed=3" if script != "bench" else "--rounds=1", ""))
        argv = [*wrong, right] if self.rng.random() < 0.5 else [right, *wrong]
        return [a for a in argv if a]

    def line_or_file(self, script, name, text, literal):
        """`name` with a wrong value, on the command line or in a file; and what the line must name."""
        if self.rng.random() < 0.5:
            return script, self.with_company(script, f"--{name}={text}"), f"--{name}"
        path = self.file(f"# a comment\n{name} = {literal}\n")
        return script, self.with_company(script, path), f"{path}: {name}"

    # names

    def make_typo(self):
        script = self.script()
        known = self.fields(script)
        while True:
            name = list(self.rng.choice(sorted(known)))
            i = self.rng.randrange(len(name))
            edit = self.rng.randrange(4)
            if edit == 0:
                del name[i]
            elif edit == 1:
                name.insert(i, self.rng.choice("abcxyz_"))
            elif edit == 2:
                name[i] = self.rng.choice("abcxyz_")
            else:
                name[i : i + 2] = name[i : i + 2][::-1]
            name = "".join(name)
            valid = name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("_")
            if valid and name not in known and name != "help":
                return *self.line_or_file(script, name, "1", "1")[:2], name

    def make_unknown_name_in_a_file(self):
        script, name = self.script(), self.rng.choice(("helper", "x", "n", "größe", "os2"))
        statement = self.rng.choice(
            (f"{name} = 3", f"import math as {name}", f"def {name}(): pass", f"class {name}: pass",
             f"for {name} in range(3): pass", f"with open(__file__) as {name}: pass", f"{name}: int = 3")
        )  # fmt: skip
        path = self.file(f"seed = 3\n{statement}\n" if script != "bench" else statement)
        return script, self.with_company(script, path), f"{path}: unknown key {name};"

    def make_key_of_another_script(self):
        script, other = self.rng.sample(("train", "sample", "bench"), 2)
        name = self.rng.choice(sorted(self.fields(other).keys() - self.fields(script).keys()))
        return *self.line_or_file(script, name, "1", "1")[:2], f"unknown key {name};"

    def make_not_an_argument(self):
        script = self.script()
        name = self.pick(script, lambda f, kinds: True)[0].name
        argument = self.rng.choice((f"-{name}=1", f"-{name}", "-", "--", "---", "--=", "--=1", "-5", "-é"))
        return script, self.with_company(script, argument), f"{argument}: write --key=value"

    def make_no_value(self):
        script = self.script()
        name = self.pick(script, lambda f, kinds: bool not in kinds)[0].name
        return script, self.with_company(script, f"--{name}"), f"--{name}: write --{name}=value"

    def make_value_apart(self):
        script = self.script()
        name = self.pick(script, lambda f, kinds: int in kinds)[0].name
        return script, [f"--{name}", "12"], "12: not a config file; write config/<name>.py, or --key=value"

    # values

    def make_wrong_type(self):
        script = self.script()
        field, kinds = self.pick(script, lambda f, kinds: str not in kinds)
        text = ["", "abc", "1 2", "[1]", "yes", "0x10", "²", "четыре", "1,5", "'1'", "9" * 5000 + "x"]
        text += ["1", "0", "2.5"] if bool in kinds else ["1.5", "1e3", "True"] if int in kinds else ["True", "1e"]
        text += [] if type(None) in kinds else ["None"]
        literal = ["'1'", "''", "[1]", "(1,)", "{}", "b'1'", "1j", "object()", "print", "lambda: 1", "'a\\nb'"]
        literal += ["1", "0", "1.0"] if bool in kinds else ["True", "2.0"] if int in kinds else ["False"]
        literal += [] if type(None) in kinds else ["None"]
        return self.line_or_file(script, field.name, self.rng.choice(text), self.rng.choice(literal))

    def make_text_that_is_none(self):
        script = self.script()
        field, _ = self.pick(script, lambda f, kinds: kinds == (str,))
        literal = self.rng.choice(("3", "None", "[1]", "b'x'", "True", "1e999"))
        path = self.file(f"{field.name} = {literal}\n")
        return script, self.with_company(script, path), f"{path}: {field.name} must be text"

    def make_out_of_range(self):
        script = self.script()
        field, kinds = self.pick(script, lambda f, kinds: f.metadata["low"] is not None)
        meta, above = field.metadata, self.rng.random() < 0.5
        if above and meta["high"] is not None:
            value = meta["high"] + self.rng.choice((1, 10**6, 10**40))
        else:
            value = meta["low"] - self.rng.choice((1, 10**6, 10**40))
        return self.line_or_file(script, field.name, value, repr(value))

    def make_huge(self):
        script = self.script()
        field, _ = self.pick(script, lambda f, kinds: int in kinds)
        value = self.rng.choice((2**31, 10**18, 10**40, 10**4000))
        return self.line_or_file(script, field.name, value, repr(value))

    def make_not_finite(self):
        script = self.script()
        field, _ = self.pick(script, lambda f, kinds: float in kinds)
        text = self.rng.choice(("nan", "inf", "-inf", "1e999", "-1e400", "NaN", "Infinity"))
        literal = self.rng.choice(("1e999", "-1e999", "float('nan')", "10**400", "-10**400"))
        return self.line_or_file(script, field.name, text, literal)

    def make_wrong_choice(self):
        script = self.script()
        field, _ = self.pick(script, lambda f, kinds: f.metadata["choices"])
        right = self.rng.choice(field.metadata["choices"])
        wrong = self.rng.choice(
            (right.upper(), right + " ", right[:-1], right + "x", "", "None", "é", ",".join((right, right)))
        )
        assert wrong not in field.metadata["choices"]
        return self.line_or_file(script, field.name, wrong, repr(wrong))

    def make_unknown_attention(self):
        script = self.rng.choice(("train", "bench"))
        wrong = self.rng.choice(
            ("softmx", "SOFTMAX", "softmax,", ",", "", "softmax,,none", "softmax;none", "none softmax", "ünd")
        )
        script, argv, _ = self.line_or_file(script, "attention_type", wrong, repr(wrong))
        return script, argv, "attention_type: no type"

    def make_owned_by_another_type(self):
        name, used = self.rng.choice(
            (("span", "softmax"), ("span", "gla,gsa"), ("slots", "adaptive_span"), ("slots", "softmax"))
        )
        argv = [f"--{name}=5", f"--attention_type={used}"]
        return "owned", self.rng.sample(argv, 2), f"--{name}: {name} belongs to"

    # one key against another

    def make_heads_that_do_not_divide(self):
        heads = self.rng.randint(2, 9)
        width = heads * self.rng.randint(1, 9) + self.rng.randint(1, heads - 1)
        script = self.rng.choice(("train", "bench"))
        return script, [f"--n_head={heads}", f"--n_embd={width}"], f"n_embd={width} is not a multiple of n_head={heads}"

    def make_odd_rotation(self):
        size = 2 * self.rng.randint(0, 20) + 1
        return self.rng.choice(("train", "bench")), ["--pos_emb=rope", f"--head_dim={size}"], "pos_emb=rope"

    def make_onehot_of_another_width(self):
        width = 2 * self.rng.randint(1, 40)
        argv = [
            "--embedding=onehot",
            "--n_head=2",
            f"--n_embd={width}",
            f"--vocab_size={width + self.rng.choice((-1, 1, 9))}",
        ]
        return self.rng.choice(("train", "bench")), argv, "embedding=onehot"

    def make_rates_upside_down(self):
        rate = self.rng.choice((0, 1e-9, 0.001, 0.5))
        return "train", [f"--learning_rate={rate}", f"--min_lr={rate + self.rng.choice((1e-3, 1, 1e9))}"], "min_lr="

    def make_stride_beyond_the_context(self):
        context = self.rng.randint(1, 900)
        return (
            "train",
            [f"--eval_context={context}", f"--eval_stride={context + self.rng.randint(1, 99)}"],
            "eval_stride=",
        )

    # files

    def make_no_such_file(self):
        script, path = self.script(), self.path()
        return script, self.with_company(script, path), path

    def make_folder_as_file(self):
        script, path = self.script(), self.path(self.rng.choice((".py", "")))
        os.mkdir(path)
        return script, self.with_company(script, path), path

    def make_unreadable(self):
        script, path = self.script(), self.path()
        if self.rng.random() < 0.5:
            os.symlink(path, path)  # a loop, which root cannot read either
        else:
            os.symlink(path + ".gone", path)
        return script, self.with_company(script, path), path

    def make_binary(self):
        script, path = self.script(), self.path()
        with open(path, "wb") as f:
            f.write(
                self.rng.choice(
                    (b"\xff", b"\x80\x02}q\x00.", b"PK\x03\x04\xfe", b"seed = 1\n\x00\n", b"\x7fELF\x01\x00")
                )
            )
            f.write(self.rng.randbytes(self.rng.randrange(50)))
        return script, self.with_company(script, path), path

    def make_not_a_config_file(self):
        script, path = (
            self.script(),
            self.rng.choice((self.path(".txt"), "", "count=3", "config", "train", "é", "True", ".")),
        )
        return script, self.with_company(script) + [path], f"{path}: not a config file"

    def make_syntax_error(self):
        script = self.script()
        wrong = self.rng.choice(
            ("x = (", "def", "1 +", "seed == = 3", "seed = 'abc", "  seed = 3\n seed = 4", "seed 3", "return",
             "a = b'é'", "[" * 150, "é = €", "print 3", "x = 08", "'''", "lambda = 1", "f'{'", "\\ x", "await x")
        )  # fmt: skip
        path = self.file(f"_a = 3\n{wrong}\n")
        return script, self.with_company(script, path), path

    def make_file_that_raises(self):
        script = self.script()
        wrong = self.rng.choice(
            ("1 / 0", "import no_such_module_at_all", "raise ValueError('a\\nb\\nc')", "assert False",
             "def _f(): _f()\n_f()", "raise SystemExit", "raise SystemExit(0)", "import sys as _s\n_s.exit(3)", "_x.y",
             "seed += 1", "open('/no/such/file')", "int('x')",
             "raise StopIteration", "raise MemoryError", "del seed", "raise KeyError", "raise OSError(13, 'no', 'x')")
        )  # fmt: skip
        path = self.file(f"_a = 3\n{wrong}\n")
        return script, self.with_company(script, path), path

    # what only shows when the run begins

    def make_unknown_data_set(self):
        name = self.rng.choice(("stdlb", "Enwik8", "", "no/such/folder", self.path(""), "набор", self.folder))
        return "train", ["--device=cpu", f"--dataset={name}"], os.path.basename(name) or "data set ''", 1

    def make_init_from_nothing(self):
        name = self.rng.choice(("Scratch", "resume ", "GPT2", self.path(""), self.file("seed = 1"), "", "best.pt"))
        return (
            "train",
            [*SHAPE, f"--dataset={self.dataset}", f"--init_from={name}"],
            f"init_from={' '.join(name.split())}",
        )

    def make_nothing_to_resume(self):
        folder = self.path("")
        if self.rng.random() < 0.5:
            os.mkdir(folder)
        return "train", [*SHAPE, f"--dataset={self.dataset}", "--init_from=resume", f"--out_dir={folder}"], folder, 1

    def make_damaged_checkpoint(self):
        folder, script = self.path(""), self.rng.choice(("train", "sample"))
        os.mkdir(folder)
        with open(os.path.join(self.checkpoint, "ckpt.pt"), "rb") as f:
            whole = f.read()
        name = os.path.join(folder, "ckpt.pt")
        with open(name, "wb") as f:
            f.write(
                self.rng.choice((b"", b"hello\n", whole[: self.rng.randrange(1, len(whole))], self.rng.randbytes(99)))
            )
        if script == "sample":
            return script, ["--device=cpu", f"--out_dir={folder}"], name, 1
        return script, [*SHAPE, f"--dataset={self.dataset}", "--init_from=resume", f"--out_dir={folder}"], name, 1

    def make_out_dir_is_a_file(self):
        path = self.file("")
        return "train", [*SHAPE, f"--dataset={self.dataset}", f"--out_dir={path}"], path, 1

    def make_unknown_device(self):
        name = self.rng.choice(("gpu", "CPU", "", "tpu", "cudaa", "0", "meta", "xpu", "cpu0", "☃"))
        return self.script(), [f"--device={name}"], "device must be auto, cpu"

    def make_half_on_the_cpu(self):
        return self.script(), ["--device=cpu", "--dtype=float16"], "dtype=float16"

    def make_vocabulary_too_small(self):
        n = self.rng.randint(1, 255)
        return "train", [*SHAPE, f"--dataset={self.dataset}", f"--vocab_size={n}"], f"vocab_size={n}"

    def make_block_longer_than_the_data(self):
        argv = [*SHAPE, f"--dataset={self.dataset}", f"--out_dir={self.path('')}", "--pos_emb=none"]
        return "train", [*argv, f"--block_size={self.rng.randint(6000, 10**6)}"], "--block_size", 1

    def make_no_checkpoint_to_sample(self):
        folder = self.rng.choice((self.path(""), self.folder, self.file("")))
        return "sample", ["--device=cpu", f"--out_dir={folder}"], folder, 1

    def make_no_prompt(self):
        return "sample", ["--device=cpu", f"--out_dir={self.checkpoint}", "--start="], "--start is empty"

    def make_prompt_file(self):
        path, argv = self.path(".txt"), ["--device=cpu", f"--out_dir={self.checkpoint}"]
        if self.rng.random() < 0.5:
            with open(path, "wb") as f:
                f.write(b"\xff\xfe" + self.rng.randbytes(9))
            return "sample", [*argv, f"--start=FILE:{path}"], path
        if self.rng.random() < 0.5:
            os.mkdir(path)
        return "sample", [*argv, f"--start=FILE:{path}"], path, 1

    def make_bench_without_runs(self):
        what = self.rng.choice(("quality", "curves"))
        return (
            "bench",
            ["--device=cpu", f"--what={what}", f"--out_dir={self.rng.choice(('', ' ', ',', ' , '))}"],
            "--out_dir",
        )

    def make_bench_of_no_run(self):
        what, folder = self.rng.choice(("quality", "curves")), self.path("")
        return "bench", ["--device=cpu", f"--what={what}", f"--out_dir={folder}"], folder, 1


def run_in_process(script, argv):
    """(exit status, stderr); a run that does not stop by itself fails the test."""
    main, errors, _ = SCRIPTS[script]
    err, out = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *argv])
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out), pytest.raises(SystemExit) as caught:
            config.run(main, *errors)
    return caught.value.code, err.getvalue()


def complaint(script, argv, names, status, got, err):
    """What is wrong with how a mutated run ended, or None."""
    if got != status:
        return f"exit status {got}, not {status}: {err}"
    if (
        not err.startswith(f"{script}.py: ")
        or err.count("\n") != 1
        or not err.endswith("\n")
        or len(err.splitlines()) != 1
    ):
        return f"not one line: {err!r}"
    if "Traceback" in err or " ".join(names.split()) not in err:
        return f"does not name {names!r}: {err}"


@pytest.fixture(scope="module")
def checkpoint(text_dataset, tmp_path_factory):
    """A folder with a model of 16 numbers a token that was never trained."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=256))
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    weights.save_checkpoint(os.path.join(folder, "ckpt.pt"), model)
    write(folder, '{"data": {"codec": "bytes"}}', "config.json")
    return folder


@pytest.fixture(scope="module")
def processes(text_dataset, checkpoint, tmp_path_factory):
    """Five true processes, started before the other mutations run: importing torch takes seconds."""
    folder = tmp_path_factory.mktemp("processes")
    syntax, exits = write(folder, "n_layer = (\n", "syntax.py"), write(folder, "raise SystemExit(0)\n", "exits.py")
    cases = [
        ("train", ["--n_layers=3"], "--n_layers", 2),
        ("train", [syntax], f"{syntax}, line 1", 2),
        ("train", ["--device=cpu", "--dataset=no_such_set"], "no_such_set", 1),
        ("sample", [exits], exits, 2),
        ("bench", ["--device=cpu", "--what=quality", f"--out_dir={folder}"], str(folder), 1),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment)
    started = [(c, subprocess.Popen([sys.executable, os.path.join(ROOT, c[0] + ".py"), *c[1]], **pipes)) for c in cases]
    yield started
    for _, process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("seed, count", [(0, 200), (None, 60)], ids=["fixed", "fresh"])
def test_mutations_end_in_one_line(monkeypatch, tmp_path, text_dataset, checkpoint, processes, seed, count):
    def trained(*_):
        raise AssertionError("a mutated run began to train")

    monkeypatch.setattr(train.Run, "train", trained)
    monkeypatch.setattr(steps, "bench_step", trained)
    monkeypatch.setattr(decoding, "bench_decode", trained)
    monkeypatch.setattr(layers, "overview", trained)
    monkeypatch.setattr(sample, "print_stream", trained)
    monkeypatch.chdir(tmp_path)
    seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
    cases = iter(Mutations(seed, tmp_path, text_dataset, checkpoint))
    wrong, kinds = [], set()
    for _ in range(count):
        kind, script, argv, names, status = next(cases)
        kinds.add(kind)
        found = complaint(script, argv, names, status, *run_in_process(script, argv))
        if found:
            wrong.append(f"seed {seed}, {kind}: {script}.py {argv}: {found}")
    assert not wrong, "\n".join(wrong)
    assert len(kinds) == len([name for name in vars(Mutations) if name.startswith("make_")])


def test_mutations_in_true_processes(processes):
    for (script, argv, names, status), process in processes:
        err = process.communicate(timeout=300)[1]
        assert complaint(script, argv, names, status, process.returncode, err) is None, (argv, err)


def test_the_complaint_can_be_made():
    """The judge of the mutations refuses what it should."""
    good = ("train", [], "--n_layer", 2)
    assert complaint(*good, 2, "train.py: --n_layer must be an integer\n") is None
    assert "status" in complaint(*good, 1, "train.py: --n_layer must be an integer\n")
    for text in (
        "",
        "train.py: --n_layer\nmore\n",
        "train.py: --n_layer",
        "--n_layer\n",
        "warning: x\ntrain.py: --n_layer\n",
    ):
        assert "not one line" in complaint(*good, 2, text)
    assert "does not name" in complaint(*good, 2, "train.py: --n_head must be an integer\n")


@pytest.mark.parametrize(
    "flags, native", [("fpu avx512f avx512_bf16", True), ("amx_tile amx_bf16", True), ("avx2", False)]
)
def test_a_cpu_trains_in_bfloat16_where_it_multiplies_it(monkeypatch, flags, native):
    real = open
    text = io.StringIO(f"processor : 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(
        "builtins.open", lambda path, *a, **kw: text if path == "/proc/cpuinfo" else real(path, *a, **kw)
    )
    monkeypatch.setattr(launch, "native_bfloat16", launch.native_bfloat16.__wrapped__)  # asks anew
    runtime = resolve_device("cpu", "auto", training=True)
    assert runtime.dtype == ("bfloat16" if native else "float32")
    assert runtime.why == f"as asked; {'' if native else 'no '}AVX512-BF16 or AMX"
    assert resolve_device("cpu", "float32", training=True).dtype == "float32"
    assert resolve_device("cpu", "auto").dtype == "float32"  # sampling and evaluation: casting costs more than it saves


@pytest.mark.parametrize(
    "device, dtype, keys, began, want",
    [
        ("cpu", "float32", {}, "bfloat16", "bfloat16"),
        ("cpu", "bfloat16", {}, "float32", "float32"),
        ("cpu", "bfloat16", {}, "auto", "float32"),  # what an earlier version meant by it
        ("cuda", "bfloat16", {}, "auto", "bfloat16"),
        ("cpu", "float32", {}, "float16", "float32"),  # needs CUDA
        ("cpu", "bfloat16", {}, ["damaged"], "float32"),
        ("cuda", "bfloat16", {}, "float16", "float16"),
        ("cpu", "float32", dict(dtype="float32"), "bfloat16", "float32"),
        ("cpu", "float32", dict(eval_only=True), "bfloat16", "float32"),
        ("cpu", "float32", dict(init_from="scratch"), "bfloat16", "float32"),
    ],
)
def test_a_resumed_run_keeps_its_precision(device, dtype, keys, began, want):
    cfg = SimpleNamespace(**(dict(init_from="resume", eval_only=False, dtype="auto") | keys))
    runtime = Runtime(device, dtype, False, "as asked; no AVX512-BF16 or AMX")
    got = config.as_it_began(runtime, cfg, {"config": {"dtype": began}})
    assert got.dtype == want and (got == runtime or got.why == "as asked; the run's precision")
    assert config.as_it_began(runtime, cfg, {"config": began}).dtype in ("float32", dtype)  # refused where it is read
