"""Configuration: typed records, override files, and --key=value, in that order of precedence.

    model_config, train_config, given = load(sys.argv[1:], GPTConfig, TrainConfig)

A record is a dataclass whose fields are made with `key`. An override file (config/*.py) holds plain assignments and may
compute values; each public name it leaves behind must be a key of one of the records. Every mistake ends in one line.
"""

import contextlib
import ctypes
import dataclasses
import difflib
import math
import os
import signal
import sys
import types
import typing

ELSEWHERE = {  # keys of the projects that configs come from, and what to write here
    "use_adaptive_attention": "write attention_type=adaptive_span (False: attention_type=softmax)",
}
LARGEST = 2**31 - 1  # of an integer value: beyond it nothing is meant, and sizes overflow


class ConfigError(ValueError):
    """A mistake in a config file or on the command line; the message is one line and says what to write instead."""


def key(default, help, *owners, choices=None, low=None, high=None, act=None):
    """A field of a config record: its default, its one-line meaning, the attention types or families of types that own
    it (none: it is everybody's), the values it may take, or the bounds of a number. `load` calls `act` with a given
    value before it builds the records: what they check may depend on it."""
    metadata = dict(help=help, owners=owners, choices=choices, low=low, high=high, act=act)
    return dataclasses.field(default=default, metadata=metadata)


def load(argv, *records):
    """Build one instance of each record from `argv`.

    Precedence: defaults, then each override file named, then --key=value, left to right. Returns the instances in
    order, then a dict that names where each given key came from. Raises ConfigError; --help prints all keys and exits.
    """
    fields = {f.name: f for r in records for f in dataclasses.fields(r)}
    hints = {name: hint for r in records for name, hint in typing.get_type_hints(r).items()}
    if any(a in ("-h", "--help", "--help=True") for a in argv):
        print_help(records, hints)
        raise SystemExit(0)
    values, given = {}, {}
    for path in [a for a in argv if not a.startswith("-")]:
        for name, value in read_file(path).items():
            _check_known(name, fields, path)
            values[name] = _check(fields[name], hints[name], value, f"{path}: {name}")
            given[name] = path
    for argument in [a for a in argv if a.startswith("-")]:
        name, value = _parse_argument(argument, fields, hints)
        values[name], given[name] = value, "the command line"
    for name, value in values.items():
        if fields[name].metadata["act"] is not None:
            fields[name].metadata["act"](value)
    _drop_stray_keys(values, given, fields, records)
    return (*(build(r, {k: v for k, v in values.items() if k in _names(r)}) for r in records), given)


def build(record, values):
    """An instance of `record` whose values are checked, wherever they come from; complaints are ConfigErrors."""
    fields, hints = {f.name: f for f in dataclasses.fields(record)}, typing.get_type_hints(record)
    for name, value in values.items():
        _check_known(name, fields, record.__name__)
        values = values | {name: _check(fields[name], hints[name], value, name)}
    try:
        return record(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None


def explicit(record, given):
    """The values of a record that were written in a file or on the command line, by `load`'s third answer."""
    return {name: getattr(record, name) for name in given if hasattr(record, name)}


def override(record, **values):
    """`record` with some values replaced and checked again."""
    return build(type(record), dataclasses.asdict(record) | values)


def read_file(path):
    """The public names that an override file leaves behind, run in a namespace of its own."""
    if not path.endswith(".py"):
        raise ConfigError(f"{_cut(path)}: not a config file; write config/<name>.py, or --key=value for one key")
    namespace = {"__file__": path, "__name__": "config_file"}
    run_file(path, namespace, "an override file holds plain assignments")
    return {name: value for name, value in namespace.items() if not name.startswith("_")}


def run_file(path, namespace, holds):
    """Run a Python file in `namespace`. Its mistakes are ConfigErrors that name the line; `holds` says what the file is
    for, where it ends the process."""
    try:
        with open(path, encoding="utf-8") as f:
            source = f.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        folder = os.path.dirname(path) or "."
        missing = os.path.isdir(folder) and not os.path.exists(path)
        here = sorted(n for n in os.listdir(folder) if n.endswith(".py")) if missing else []
        close = difflib.get_close_matches(os.path.basename(path), here, 1)
        hint = f"; did you mean {os.path.join(folder, close[0])}?" if close else ""
        raise ConfigError(f"{path}: {reason}{hint}") from None
    try:
        exec(compile(source, path, "exec"), namespace)
    except SyntaxError as error:
        raise ConfigError(f"{path}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        raise ConfigError(f"{path}, line {_line_in(error, path)}: {kind}{error}".replace("\n", " ")) from None
    except SystemExit:
        raise ConfigError(f"{path}: it exits; {holds}") from None


def _line_in(error, path):
    tb, line = error.__traceback__, "?"
    while tb is not None:
        if tb.tb_frame.f_code.co_filename == path:
            line = tb.tb_lineno
        tb = tb.tb_next
    return line


def _names(record):
    return {f.name for f in dataclasses.fields(record)}


def _check_known(name, fields, where):
    if name in fields:
        return
    if name in ELSEWHERE:
        raise ConfigError(f"{where}: {name} is not a key here; {ELSEWHERE[name]}")
    close = difflib.get_close_matches(name, fields, 1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else "--help lists the keys"
    if where.endswith(".py"):
        hint += " (a helper's name starts with _)"
    raise ConfigError(f"{where}: unknown key {_cut(name)}; {hint}")


def _parse_argument(argument, fields, hints):
    """`--key=value` -> (key, checked value); a bare `--key` switches a bool on."""
    name, equals, text = argument.lstrip("-").partition("=")
    if not argument.startswith("--") or not name:
        raise ConfigError(f"{_cut(argument)}: write --key=value")
    _check_known(name, fields, f"--{_cut(name)}")
    kinds = _kinds(hints[name])
    if not equals:
        if bool not in kinds:
            raise ConfigError(f"--{name}: write --{name}=value ({_describe(hints[name])})")
        text = "True"
    return name, _check(fields[name], hints[name], _parse(text, kinds), f"--{name}")


def _parse(text, kinds):
    """The value that `text` spells for one of `kinds`; the text itself where it spells none, for _check to refuse."""
    if type(None) in kinds and text in ("None", "none", "null"):
        return None
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            with contextlib.suppress(ValueError):
                return kind(text)
    return text


def _kinds(hint):
    """The plain types that a field accepts: Optional[int] -> (int, NoneType)."""
    is_union = typing.get_origin(hint) in (typing.Union, getattr(types, "UnionType", typing.Union))
    return typing.get_args(hint) if is_union else (hint,)


def _describe(hint):
    names = {int: "an integer", float: "a number", bool: "True or False", str: "text", type(None): "None"}
    return " or ".join(names[k] for k in _kinds(hint))


def _check(field, hint, value, where):
    kinds, meta = _kinds(hint), field.metadata
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ConfigError(f"{where} must be at most {LARGEST} in size")
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        value = float(value)
    if type(value) not in kinds:
        raise ConfigError(f"{where} must be {_describe(hint)}, not {_short(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} must be finite, not {value}")
    if meta["choices"] is not None and value not in meta["choices"]:
        close = difflib.get_close_matches(str(value), [str(c) for c in meta["choices"]], 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{where} must be one of {', '.join(map(str, meta['choices']))}, not {_short(value)}{hint}")
    if meta["low"] is not None and isinstance(value, (int, float)) and value < meta["low"]:
        raise ConfigError(f"{where} must be at least {meta['low']}, not {value}")
    if value is not None and meta["high"] is not None and value > meta["high"]:
        raise ConfigError(f"{where} must be at most {meta['high']}, not {value}")
    return value


def _short(value):
    return _cut(repr(value), 60)


def _cut(text, size=200):
    """What was written, on one line and at a length that leaves the message around it legible."""
    text = printable(text)
    return text if len(text) <= size else text[: size - 3] + "..."


def _owners(field, records):
    """The attention types that a key belongs to, by name or by family; none: it is everybody's."""
    known = next((r.attention_types() for r in records if hasattr(r, "attention_types")), {})
    owners = field.metadata["owners"]
    return [name for name, families in known.items() if {name, *families} & {*owners}] or list(owners)


def stray_key(field, pattern, records):
    """What is wrong with a value for a key of attention types that no layer of `pattern` is; None: nothing."""
    owners = _owners(field, records)
    if not owners or {name.strip() for name in pattern.split(",")} & set(owners):
        return None
    return f"{field.name} belongs to attention_type={'|'.join(owners)}, and no layer of {pattern!r} is one"


def _drop_stray_keys(values, given, fields, records):
    """A key of an attention type that no layer is: an error on the command line; in a file it is ignored with a
    warning, so that one file can be run with another type."""
    if "attention_type" not in fields:
        return
    pattern = values.get("attention_type", fields["attention_type"].default)
    for name, where in list(given.items()):
        message = stray_key(fields[name], pattern, records)
        if message and where == "the command line":
            raise ConfigError(f"--{name}: {message}")
        if message:
            print(f"warning: {where}: {message}; ignored", file=sys.stderr)
            del values[name], given[name]


def print_help(records, hints):
    """Every key with its type, default and meaning: a group for each record, then one for each attention type."""
    print("usage: python SCRIPT.py [config/FILE.py ...] [--key=value ...]\n")
    for record in records:
        print(record.__doc__.strip().splitlines()[0])
        for f in sorted(dataclasses.fields(record), key=lambda f: f.metadata["owners"]):
            meta, owners = f.metadata, _owners(f, records)
            kind = "|".join(map(str, meta["choices"])) if meta["choices"] else _describe(hints[f.name])
            owner = f"[{', '.join(owners)}] " if owners else ""
            print(f"  --{f.name}={f.default}\n        {owner}{meta['help']} ({kind})")
        print()


def printable(text):
    """`text` with escapes in place of what a terminal obeys or does not show: control characters, line breaks, ..."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def hear_interrupts():
    """Ctrl-C raises KeyboardInterrupt again: while modules load, the scripts let it end the process without a word."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run(main, *errors):
    """Run a script's `main(argv)`. A user's mistake ends in one line on stderr: exit status 2 for a wrong config, 1 for
    `errors` and for files that cannot be read or written, 130 after Ctrl-C. Anything else is a bug: a traceback."""
    name = os.path.basename(sys.argv[0])
    hear_interrupts()
    try:
        leave(main(sys.argv[1:]))
    except ConfigError as caught:
        error, status = caught, 2
    except BrokenPipeError:  # the reader of our output went away, as in `python train.py --help | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (*errors, OSError) as caught:
        error, status = caught, 1
    except (MemoryError, RuntimeError) as caught:
        if not isinstance(caught, MemoryError) and "memory" not in str(caught):
            raise
        error, status = "out of memory: take a smaller batch_size, block_size or model (--dry_run adds them up)", 1
    except KeyboardInterrupt:
        error, status = "interrupted", 130
    line = printable(" ".join(str(error).split()))
    print(f"{name}: {line if len(line) < 600 else line[:600] + ' ...'}", file=sys.stderr)
    leave(status)


def leave(status):
    """End the process; one of a group at once: gloo's threads outlive the group under DDP, and one that wakes while
    Python ends aborts it."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Where and in what precision a script computes, resolved from `device`, `dtype` and `compile`."""

    device: str
    dtype: str
    compile: bool
    why: str

    @property
    def device_type(self):
        return self.device.partition(":")[0]

    def autocast(self):
        """The autocast context of the precision: none in float32."""
        import torch

        if self.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=getattr(torch, self.dtype))

    def __str__(self):
        return f"device {self.device}, {self.dtype}, {'compiled' if self.compile else 'eager'} ({self.why})"


def resolve_device(device, dtype, compile=False, training=False):
    """(device, dtype, compile) as asked -> Runtime. `auto` takes CUDA, then MPS, then the CPU; bfloat16 where CUDA has
    it, else float16 with a scaler; bfloat16 where a CPU that is to train multiplies it, and float32 elsewhere;
    compile=None compiles on CUDA. CUDA is not touched unless asked for or `auto`. Raises ConfigError where the device
    does not exist or lacks the precision."""
    import torch

    from kernels import launch

    why = "as asked"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        why = {"cuda": "CUDA found", "mps": "MPS found, no CUDA", "cpu": "no GPU found"}[device]
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda", "mps") or (kind != "cuda" and device != kind):
        raise ConfigError(f"device must be auto, cpu, cuda, cuda:N or mps, not {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device}: this PyTorch sees no CUDA device; write --device=cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device=mps: this PyTorch sees no MPS device; write --device=cpu")
    if kind != "cpu":
        with _one_line(f"device={device}"):
            torch.empty(1, device=device)
    if dtype == "auto":
        dtype = "float32"
        if kind == "cuda":  # a V100 or T4 only emulates bfloat16, and is slow at that
            dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        elif kind == "cpu" and training:
            dtype = "bfloat16" if launch.native_bfloat16() else "float32"
            why += f"; {'' if dtype == 'bfloat16' else 'no '}AVX512-BF16 or AMX"
    if dtype == "float16" and kind != "cuda":
        raise ConfigError(f"dtype=float16 needs CUDA (its gradient scaler); write --dtype=float32 for {kind}")
    if kind == "cpu":
        _keep_freed_memory()
    return Runtime(device, dtype, kind == "cuda" if compile is None else compile, why)


def advise_threads():
    """A line where much more work waits than this machine has cores, and nobody has said how many threads to take: they
    wait for each other there. None elsewhere, and on Windows, which keeps no load average."""
    import torch

    load, cores = 0.0, os.cpu_count() or 1
    with contextlib.suppress(AttributeError, OSError):
        load = os.getloadavg()[0]
    few = max(1, int(cores * cores / (load + cores)))  # this process's share of the cores
    if load <= 1.5 * cores or "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() <= few:
        return None
    return f"load average {load:.1f} on {cores} cores: other work shares them; OMP_NUM_THREADS={few} may be faster"


def as_it_began(runtime, cfg, stored):
    """The runtime of a run whose dtype is `auto`: a resumed one keeps the precision of its checkpoint, `stored`. A CPU
    trained in float32 when checkpoints said `auto`."""
    if cfg.init_from != "resume" or cfg.eval_only or cfg.dtype != "auto":
        return runtime
    began, cpu = stored.get("config"), runtime.device_type == "cpu"
    kept = began.get("dtype") if isinstance(began, dict) else None
    kept = kept if kept in ("float32", "bfloat16", "float16") else "float32" if cpu else runtime.dtype
    if kept == runtime.dtype or (kept == "float16" and runtime.device_type != "cuda"):
        return runtime
    return dataclasses.replace(runtime, dtype=kept, why=f"{runtime.why.partition(';')[0]}; the run's precision")


def _keep_freed_memory():
    """glibc gives large freed blocks back to the system, and each training step asks for them again: thousands of page
    faults a step, several per cent of its time. Keep blocks of up to 32 MB, glibc's limit. A no-op elsewhere."""
    with contextlib.suppress(OSError, AttributeError):
        libc, trim_threshold, mmap_threshold = ctypes.CDLL("libc.so.6"), -1, -3
        libc.mallopt(mmap_threshold, 32 * 2**20)
        libc.mallopt(trim_threshold, 2**31 - 1)


@contextlib.contextmanager
def _one_line(what):
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"{what}: {str(error).splitlines()[0]}") from None
