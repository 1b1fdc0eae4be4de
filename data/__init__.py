"""The reader of prepared data sets, and the helpers that every data/<name>/prepare.py shares.

A data set is a folder with meta.json and up to three files of little-endian token ids, train.bin, val.bin, test.bin:

    {"format": 1, "dtype": "uint8" | "uint16", "vocab_size": V, "codec": "bytes" | "gpt2" | "symbols", "symbols": [...],
     "splits": {"train": {"tokens": n, "bytes": n, "words": n or null, "first_bytes": n, "sha256": of the .bin}, ...},
     "source": where the text came from, "sha256": of the text of all splits in order, "label": name for tables}

"bytes" and "words" count the raw text of a split, so that every perplexity can say what it is divided by.
"first_bytes" (optional) is the length of the first token's text. Nothing is ever unpickled.

A data set may be records instead of running text. meta.json then has "record_len": L, each split is whole records of L
tokens, and <split>.targets.bin holds for each token, as int32, what the model is to say there: an id of the vocabulary
(no shift is applied), or -1 where nothing is scored. A split says {"tokens": n, "scored": n, "sha256": of the .bin,
"targets_sha256": of the .targets.bin}. With "labels": {name: id, ...} every target is one of these classes.
"""

import argparse
import contextlib
import difflib
import hashlib
import http.client
import json
import os
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import torch

FORMAT = 1
ROOT = Path(__file__).resolve().parent
SPLITS = ("train", "val", "test")
DTYPES = {"uint8": np.dtype("u1"), "uint16": np.dtype("<u2")}
TARGET = np.dtype("<i4")
CHUNK = 1 << 20  # bytes or tokens held at once by every streaming pass
WHITESPACE = b" \t\n\r\x0b\x0c"  # what bytes.split() splits at


class DataError(ValueError):
    """Data cannot be read or prepared. The message is one line: what is wrong, and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Codecs: text <-> ids. decode_bytes(a + b) == decode_bytes(a) + decode_bytes(b), so tokens can be streamed one by one.


class BytesCodec:
    """UTF-8 bytes; an id is a byte. Text that is not UTF-8 survives a round trip through decode_bytes."""

    vocab_size = 256

    def encode(self, text):
        try:
            # surrogateescape: a shell argument that is not UTF-8 reaches Python as such surrogates
            return list(text.encode("utf-8", errors="surrogateescape"))
        except UnicodeEncodeError as error:
            raise DataError(f"{text[error.start]!r} is not a character that UTF-8 can encode") from None

    def encode_bytes(self, raw):
        return np.frombuffer(raw, dtype=np.uint8)

    def decode_bytes(self, ids):
        return bytes(_check_ids(ids, self.vocab_size))

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class GPT2Codec:
    """GPT-2's byte-level BPE by tiktoken. The BPE files are fetched at first use, not before."""

    vocab_size = 50257
    _bpe = None

    def _encoding(self):
        if GPT2Codec._bpe is None:
            try:
                import tiktoken

                GPT2Codec._bpe = tiktoken.get_encoding("gpt2")
            except Exception as error:  # tiktoken lets errors of the network, of the disk and of its own through
                raise DataError(
                    f"cannot get the GPT-2 BPE files ({_reason(error)}): connect once, "
                    "or set TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's copies of them"
                ) from None
        return GPT2Codec._bpe

    def encode(self, text):
        return self._encoding().encode_ordinary(text)

    def encode_bytes(self, raw):
        try:
            return np.array(self.encode(raw.decode("utf-8")), dtype=np.uint16)
        except UnicodeDecodeError as error:
            raise DataError(f"the text is not UTF-8: {error.reason} near {raw[error.start :][:20]!r}") from None

    def decode_bytes(self, ids):
        # Checked here because tiktoken panics, past any except clause, at an id it does not know.
        return self._encoding().decode_bytes(_check_ids(ids, self.vocab_size))

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class SymbolsCodec:
    """A closed list of symbols; a text is symbols separated by whitespace."""

    def __init__(self, symbols):
        self.symbols = list(symbols)
        if not all(isinstance(s, str) and s.split() == [s] for s in self.symbols):
            raise DataError("meta.json: a symbol must be a string without whitespace: prepare the data again")
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        if len(self.ids) != len(self.symbols) or not self.symbols:
            raise DataError("meta.json: symbols must be there and differ from each other: prepare the data again")
        if len(self.symbols) > 65536:
            raise DataError(f"meta.json: {len(self.symbols)} symbols are more than uint16 ids can tell apart")
        self.vocab_size = len(self.symbols)

    def encode(self, text):
        words = text.split()
        unknown = sorted(set(words) - self.ids.keys())
        if unknown:
            known = " ".join(self.symbols[:8]) + (" ..." if self.vocab_size > 8 else "")
            raise DataError(f"unknown symbol {', '.join(map(repr, unknown[:5]))}: the vocabulary is {known}")
        return [self.ids[word] for word in words]

    def encode_bytes(self, raw):
        return np.array(self.encode(raw.decode("utf-8")), dtype=np.uint16)

    def decode_bytes(self, ids):
        return "".join(self.symbols[i] + " " for i in _check_ids(ids, self.vocab_size)).encode("utf-8")

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8")[:-1]


def get_codec(meta):
    """The codec that meta["codec"] names. Raises DataError for a name it does not know."""
    name = meta.get("codec")
    if name == "bytes":
        return BytesCodec()
    if name == "gpt2":
        return GPT2Codec()
    if name == "symbols":
        symbols = meta.get("symbols")
        return SymbolsCodec(symbols if isinstance(symbols, list) else [])
    raise DataError(f"unknown codec {name!r}: known are bytes, gpt2, symbols")


def _check_ids(ids, vocab_size):
    ids = [int(i) for i in ids]
    for i in ids:
        if not 0 <= i < vocab_size:
            raise DataError(f"id {i} is outside the vocabulary of {vocab_size}: wrong data set for this model?")
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class Dataset:
    """A prepared data set: meta.json and its splits as read-only memmaps.

    name: a folder of data/ ("enwik8"), or the path of a folder that holds meta.json.
    Raises DataError if it is missing, foreign or inconsistent. Split files are opened and checked by split().
    """

    def __init__(self, name):
        name = os.fspath(name)
        own = ROOT / name
        # A plain name always means data/<name>, whatever the working directory holds.
        plain = os.path.basename(name) == name
        if plain and ((own / "prepare.py").is_file() or (own / "meta.json").is_file()):
            self.path = own
        elif os.path.isdir(name) or not plain:
            self.path = Path(name).resolve()
        else:
            known = sorted(p.parent.name for p in ROOT.glob("*/prepare.py"))
            near = difflib.get_close_matches(name, known, 1)
            raise DataError(
                f"unknown data set {name!r}{f', did you mean {near[0]}?' if near else ':'} known are "
                f"{', '.join(known)}, and the path of any folder that holds a meta.json"
            )
        self.name = self.path.name
        in_house = self.path.parent == ROOT
        self._where = f"data/{self.name}" if in_house else str(self.path)
        self._hint = (
            f"run python data/{self.name}/prepare.py" if in_house else f"run its prepare.py with --out_dir {name}"
        )
        self._splits = {}
        self.meta = self._read_meta()
        try:
            self.codec = get_codec(self.meta)
        except DataError as error:
            raise DataError(f"{self._where}: {error}") from None
        self.vocab_size = self.meta["vocab_size"]
        self.record_len, self.labels = self.meta.get("record_len"), self.meta.get("labels")  # None for running text
        if self.codec.vocab_size != self.vocab_size:
            self._foreign(f"vocab_size {self.vocab_size} is not the {self.codec.vocab_size} of its codec")

    def __repr__(self):
        return f"Dataset({self._where})"

    def split(self, name):
        """The Split called name (train, val or test), checked once against meta.json. DataError if it is not sound."""
        if name not in self._splits:
            if name not in self.meta["splits"]:
                raise DataError(f"{self._where} has no {name!r} split: it has {', '.join(self.meta['splits'])}")
            split = Split(self, name)
            self._check(split)
            self._splits[name] = split
        return self._splits[name]

    def _foreign(self, why):
        raise DataError(f"{self._where}/meta.json: {why}: {self._hint} again")

    def _read_meta(self):
        try:
            meta = json.loads((self.path / "meta.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"no prepared data in {self._where}: {self._hint}") from None
        except (ValueError, OSError) as error:
            self._foreign(f"not readable ({_reason(error)})")
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            found = meta.get("format") if isinstance(meta, dict) else None
            self._foreign(f"format {found!r} is not the known {FORMAT}")
        if meta.get("dtype") not in list(DTYPES):
            self._foreign(f"dtype {meta.get('dtype')!r} is not one of {', '.join(DTYPES)}")
        if not _is_count(meta.get("vocab_size")):
            self._foreign(f"vocab_size {meta.get('vocab_size')!r} is not a number of tokens")
        if not isinstance(meta.get("label"), str):
            self._foreign("it has no label")
        splits = meta.get("splits")
        if not isinstance(splits, dict) or not splits or not set(splits) <= set(SPLITS):
            self._foreign(f"splits must be some of {', '.join(SPLITS)}")
        for name, info in splits.items():
            counts = ("tokens", "bytes" if meta.get("record_len") is None else "scored")
            if not isinstance(info, dict) or not all(_is_count(info.get(key)) for key in counts):
                self._foreign(f"split {name} does not say its {counts[0]} and {counts[1]}")
            if info.get("words") is not None and not _is_count(info["words"]):
                self._foreign(f"split {name} has {info['words']!r} words")
        self._check_records(meta)
        return meta

    def _check_records(self, meta):
        length, labels = meta.get("record_len"), meta.get("labels")
        if length is not None:
            if not _is_count(length) or length == 0:
                self._foreign(f"record_len {length!r} is not a number of tokens")
            for name, info in meta["splits"].items():
                if info["tokens"] % length:
                    self._foreign(f"split {name} has {info['tokens']} tokens, no whole records of {length}")
        if labels is not None:
            ids = list(labels.values()) if isinstance(labels, dict) else []
            if length is None or len(ids) < 2 or not all(_is_count(i) and i < meta["vocab_size"] for i in ids):
                self._foreign("labels must be names and ids of the vocabulary, two or more, of records")
            if len(set(ids)) < len(ids) or not all(name.strip() and name.isprintable() for name in labels):
                self._foreign("labels must differ from each other, names as ids, and names be printable")

    def _check(self, split):
        file, n = f"{self._where}/{split.name}.bin", split.n_tokens
        self._check_size(split.file, n * split.dtype.itemsize)
        if n == 0:
            raise DataError(f"{file} is empty: {self._hint} again")
        if self.record_len is not None:
            self._check_targets(split)
        if self.vocab_size > np.iinfo(split.dtype).max:
            return  # no id can be beyond the vocabulary
        tokens = split.tokens
        largest = max(int(tokens[i : i + CHUNK].max()) for i in range(0, n, CHUNK))
        if largest >= self.vocab_size:
            raise DataError(
                f"{file} holds id {largest}, beyond its vocabulary of {self.vocab_size}: {self._hint} again"
            )

    def _check_size(self, path, expected):
        try:
            size = path.stat().st_size
        except OSError:
            raise DataError(f"no prepared data in {self._where}: {path.name} is missing: {self._hint}") from None
        if size != expected:
            state, file = "truncated" if size < expected else "too long", f"{self._where}/{path.name}"
            raise DataError(f"{file} is {state}: {size} bytes, meta.json says {expected}: {self._hint} again")

    def _check_targets(self, split):
        """Each target is -1, or an id of the vocabulary or of the labels; each record to train on scores something."""
        file = f"{self._where}/{split.targets_file.name}"
        self._check_size(split.targets_file, split.n_tokens * TARGET.itemsize)
        known, scored = np.zeros(self.vocab_size, bool), 0
        known[list(self.labels.values()) if self.labels else slice(None)] = True
        targets, step = split.targets, max(1, CHUNK // self.record_len) * self.record_len
        for first in range(0, split.n_tokens, step):
            block = np.asarray(targets[first : first + step])
            low, high = int(block.min()), int(block.max())
            if low < -1 or high >= self.vocab_size or not known[block[block >= 0]].all():
                wrong = next(int(t) for t in block if not (t == -1 or (0 <= t < self.vocab_size and known[t])))
                what = "one of its labels" if self.labels else f"an id below its vocabulary of {self.vocab_size}"
                raise DataError(f"{file} holds target {wrong}, neither -1 nor {what}: {self._hint} again")
            scored += int((block >= 0).sum())
            if split.name == "train" and not (block.reshape(-1, self.record_len) >= 0).any(1).all():
                raise DataError(f"{file} has a record without a target, nothing to train on: {self._hint} again")
        if scored != split.n_scored or scored == 0:
            raise DataError(f"{file} has {scored} targets, meta.json says {split.n_scored}: {self._hint} again")


class Split:
    """One split of a Dataset; made by Dataset.split.

    name; n_tokens; n_scored: the targets of a full pass (in running text nothing predicts token 0). Of running text:
    n_bytes; n_words (None where they are not counted); scored_bytes: the bytes of tokens 1..N-1. Of records:
    record_len and labels (None where there are none), and the targets.
    """

    def __init__(self, dataset, name):
        info = dataset.meta["splits"][name]
        self.name = name
        self.where = f"{dataset._where}: {name}"
        self.file = dataset.path / f"{name}.bin"
        self.dtype = DTYPES[dataset.meta["dtype"]]
        self.record_len, self.labels = dataset.record_len, dataset.labels
        self.n_tokens, self.n_bytes, self.n_words = info["tokens"], info.get("bytes"), info.get("words")
        self.n_scored = info["tokens"] - 1 if self.record_len is None else info["scored"]
        self.targets_file = dataset.path / f"{name}.targets.bin"
        self._codec, self._first_bytes = dataset.codec, info.get("first_bytes")

    @property
    def tokens(self):
        """A read-only np.memmap (N,), opened anew at each access.

        Pages that were read stay in the resident set of a process for as long as their map lives, so that one map
        kept for a whole run grows to the size of the file. Take it once per batch or pass, and let it go.
        """
        return self._map(self.file, self.dtype)

    @property
    def targets(self):
        """A read-only np.memmap (N,) of int32, opened anew as well."""
        return self._map(self.targets_file, TARGET)

    def _map(self, file, dtype):
        try:
            return np.memmap(file, dtype=dtype, mode="r", shape=(self.n_tokens,))
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {self.where}: {_reason(error)}: prepare the data again") from None

    @property
    def scored_bytes(self):
        if self._first_bytes is None:
            self._first_bytes = len(self._codec.decode_bytes(self.tokens[:1]))
        return self.n_bytes - self._first_bytes


class Batches:
    """Random training batches, drawn globally and sliced by rank.

    One generator draws the starts of all processes, so the stream of rows depends on the seed alone: one process that
    draws twice sees what two processes see that draw once. Of records whole ones are drawn, `length` is theirs, and
    block_size only has to hold one. DataError if a split is too short for block_size.
    """

    def __init__(self, dataset, block_size, batch_size, seed, rank=0, world_size=1):
        if block_size < 1 or batch_size < 1 or not 0 <= rank < world_size:
            raise DataError(
                f"batches need block_size >= 1, batch_size >= 1 and 0 <= rank < world_size, "
                f"not {block_size}, {batch_size}, {rank} of {world_size}"
            )
        if block_size < (dataset.record_len or 0):
            raise DataError(
                f"block_size {block_size} does not hold the {dataset.record_len} tokens of a record of {dataset.name}: "
                f"use --block_size={dataset.record_len}"
            )
        self.dataset, self.length, self.batch_size = dataset, dataset.record_len or block_size, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.generator = torch.Generator().manual_seed(seed)
        if "train" in dataset.meta["splits"]:
            self._split("train")  # a bad file shows now, not after the model has been built

    def batch(self, split):
        """(x, y), int64 CPU tensors (batch_size, length); y is x shifted by one, or a record's targets."""
        split, n = self._split(split), self.batch_size
        starts = self._starts(split, self.world_size * n, self.generator)
        return self._rows(split, starts[self.rank * n : (self.rank + 1) * n])

    def fixed(self, split, n):
        """Yield this process's share of n batches, every world_size-th one. The n are the same at every call and for
        any number of processes; the training generator does not move."""
        split = self._split(split)
        # Another seed than the training generator's, which would give the very batches that training starts with.
        generator = torch.Generator().manual_seed((self.seed + 0x9E3779B97F4A7C15) % 2**63)
        for i in range(n):
            starts = self._starts(split, self.batch_size, generator)
            if i % self.world_size == self.rank:
                yield self._rows(split, starts)

    def state_dict(self):
        """{"generator": uint8 tensor, "seed": int}: it suits any number of processes and any batch size."""
        return {"generator": self.generator.get_state(), "seed": self.seed}

    def load_state_dict(self, state):
        try:
            # .cpu(): a checkpoint that is loaded with map_location="cuda" brings this tensor along
            self.generator.set_state(state["generator"].cpu())
            self.seed = int(state["seed"])
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise DataError(f"not a state of Batches ({_reason(error)}): is the checkpoint damaged?") from None

    def _split(self, name):
        split = self.dataset.split(name)
        if split.record_len is None and split.n_tokens <= self.length:
            raise DataError(
                f"{split.where} has {split.n_tokens} tokens, too short for block_size {self.length}: "
                f"use --block_size={max(1, split.n_tokens - 1)} or less, or prepare more data"
            )
        return split

    def _starts(self, split, n, generator):
        if split.record_len is not None:
            return torch.randint(split.n_tokens // self.length, (n,), generator=generator).numpy() * self.length
        return torch.randint(split.n_tokens - self.length, (n,), generator=generator).numpy()

    def _rows(self, split, starts):
        # split.tokens is a new map for each batch, dropped on return: opening it costs some 50 us, and keeps the
        # resident set at one batch instead of the file.
        if split.record_len is not None:
            return _gather_records(split, starts)
        return _gather(split.tokens, starts, self.length)


def windows(split, context, stride, batch_size=1):
    """Yield (x, y, scored) of one deterministic full pass: each of tokens 1..N-1 is scored exactly once.

    x, y int64 (b, t), y is x shifted by one; scored bool (b, t), true where this window scores y. Window k starts at
    k * stride and has up to `context` inputs; it scores the targets that no earlier window has. Windows of a batch are
    equally long; the last one, if shorter, comes alone, so the pass is the same for every batch_size.
    Of records the windows are the records, in order, whatever the stride; y are their targets, -1 where not scored.
    DataError for a stride outside 1..context, a batch_size below 1, a split without a second token, or a context that
    does not hold a record.
    """
    if not 1 <= stride <= context:
        raise DataError(
            f"stride must be between 1 and the context of {context}, not {stride}: else targets are skipped"
        )
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, not {batch_size}")
    if split.record_len is not None:
        if context < split.record_len:
            raise DataError(f"{split.where}: a context of {context} does not hold its records of {split.record_len}")
        step = batch_size * split.record_len
        for first in range(0, split.n_tokens, step):
            x, y = _gather_records(split, np.arange(first, min(first + step, split.n_tokens), split.record_len))
            yield x, y, y >= 0
        return
    targets = split.n_tokens - 1
    if targets < 1:
        raise DataError(f"{split.where} has {split.n_tokens} token: nothing to score, prepare more data")
    full = max(0, (targets - context) // stride + 1)
    done = 0  # targets scored so far
    for first in range(0, full, batch_size):
        starts = np.arange(first, min(first + batch_size, full)) * stride
        # A new map for each batch, for the same reason as in Batches.
        x, y = _gather(split.tokens, starts, context)
        ends = starts + context
        fresh = np.maximum(np.concatenate(([done], ends[:-1])) - starts, 0)  # first position that this window scores
        yield x, y, torch.from_numpy(np.arange(context) >= fresh[:, None])
        done = int(ends[-1])
    if done < targets:
        start = full * stride
        x, y = _gather(split.tokens, np.array([start]), targets - start)
        yield x, y, torch.arange(targets - start)[None] >= done - start


def _gather(tokens, starts, length):
    """x, y int64 (len(starts), length), from a memmap of tokens and the windows' first positions."""
    rows = np.asarray(tokens)[starts[:, None] + np.arange(length + 1)]
    return torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(rows[:, 1:].astype(np.int64))


def _gather_records(split, starts):
    """x and their targets y, int64 (len(starts), record_len), from the records' first positions."""
    rows = starts[:, None] + np.arange(split.record_len)
    return tuple(torch.from_numpy(np.asarray(a)[rows].astype(np.int64)) for a in (split.tokens, split.targets))


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _reason(error):
    """An exception as part of a one-line message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# Preparing: what the prepare.py scripts share


def arguments(description, folder, source=True):
    """The parser of a prepare.py with its two common options; folder is the default of --out_dir. source=False: what
    it makes has none."""
    parser = argparse.ArgumentParser(
        description=description.strip(), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if source:
        usual = "a local copy to read instead of the usual source"
        parser.add_argument("--source", type=Path, metavar="PATH", help=usual)
    parser.add_argument("--out_dir", type=Path, default=folder, metavar="PATH", help="where to write (default: here)")
    return parser


def run_prepare(main):
    """Run a prepare.py's main(); return the exit status. Expected failures are one line on stderr, not a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: nothing half-prepared is left to be read, run it again", file=sys.stderr)
        return 130
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {_reason(error)}", file=sys.stderr)
        return 1
    return 0


def download(urls, path, sha256=None):
    """Fetch one file from the first of several sources that delivers it, and return path.

    The file is written beside its place and renamed when it is whole and its checksum fits. A file that is already
    there and has this checksum is used as it is. Memory: 1 MB. Raises DataError with each source and its reason.
    """
    path = Path(path)
    if sha256 and path.is_file() and _sha256(path) == sha256:
        return path
    from tqdm import tqdm

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    reasons = []
    for url in urls:
        try:
            # Some servers turn away urllib's own name.
            request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (prepare.py)"})
            digest = hashlib.sha256()
            with urllib.request.urlopen(request, timeout=30) as response, open(part, "wb") as out:
                length = response.headers.get("Content-Length")
                total = int(length) if length and length.isdigit() else None
                with tqdm(total=total, unit="B", unit_scale=True, desc=path.name, leave=False, disable=None) as bar:
                    while chunk := response.read(CHUNK):
                        out.write(chunk)
                        digest.update(chunk)
                        bar.update(len(chunk))
                size = out.tell()
                _sync(out)
            if total is not None and size != total:
                reason = f"ended after {size} of {total} bytes"
            elif sha256 and digest.hexdigest() != sha256:
                reason = f"wrong checksum (sha256 {digest.hexdigest()}, not {sha256})"
            else:
                _replace(part, path)
                return path
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = _reason(error)
        finally:
            part.unlink(missing_ok=True)
        reasons.append(f"{url}: {reason}")
    raise DataError(f"cannot download {path.name} ({'; '.join(reasons)}): get it another way and pass --source PATH")


def write_split(out_dir, name, pieces, codec, digest=None, words=True):
    """Encode pieces of text into OUT_DIR/<name>.bin.part and return the split's entry for meta.json.

    pieces: an iterable of bytes, whose concatenation is the raw text; each is encoded by itself, so they must be cut
    where the codec may be cut. digest: a hashlib object that is fed the text. words: count whitespace-separated words.
    Memory: one piece. The file gets its name only from write_meta.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    part = out_dir / f"{name}.bin.part"
    dtype = _dtype(codec)
    sha, info, in_word = hashlib.sha256(), {"tokens": 0, "bytes": 0, "words": 0 if words else None}, False
    try:
        with open(part, "wb") as out:
            for piece in pieces:
                ids = codec.encode_bytes(piece)
                if not info["tokens"] and len(ids):
                    info["first_bytes"] = len(codec.decode_bytes(ids[:1]))
                binary = np.ascontiguousarray(ids, dtype=DTYPES[dtype]).tobytes()
                out.write(binary)
                sha.update(binary)
                if digest is not None:
                    digest.update(piece)
                info["tokens"] += len(ids)
                info["bytes"] += len(piece)
                if words and piece:
                    # A word that goes on across the border of two pieces was counted with the first of them.
                    info["words"] += len(piece.split()) - (in_word and piece[0] not in WHITESPACE)
                    in_word = piece[-1] not in WHITESPACE
            _sync(out)
        if info["tokens"] < 2:
            raise DataError(f"the source leaves {info['tokens']} tokens for the {name} split: give a larger one")
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    info["sha256"] = sha.hexdigest()
    return info


def write_records(out_dir, name, blocks, codec, digest=None):
    """Write OUT_DIR/<name>.bin.part and <name>.targets.bin.part and return the split's entry for meta.json.

    blocks: an iterable of (tokens, targets), arrays (records, record_len) each. digest: a hashlib object that is fed
    both. Memory: one block. The files get their names only from write_meta, which is told record_len.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    parts = [out_dir / f"{name}.bin.part", out_dir / f"{name}.targets.bin.part"]
    dtypes, shas = (DTYPES[_dtype(codec)], TARGET), (hashlib.sha256(), hashlib.sha256())
    info = {"tokens": 0, "scored": 0}
    try:
        with open(parts[0], "wb") as tokens_out, open(parts[1], "wb") as targets_out:
            for block in blocks:
                for array, dtype, out, sha in zip(block, dtypes, (tokens_out, targets_out), shas):
                    binary = np.ascontiguousarray(array, dtype=dtype).tobytes()
                    out.write(binary)
                    sha.update(binary)
                    if digest is not None:
                        digest.update(binary)
                info["tokens"] += block[0].size
                info["scored"] += int((block[1] >= 0).sum())
            _sync(tokens_out)
            _sync(targets_out)
        if not info["scored"]:
            raise DataError(f"nothing is scored in the {name} split: give more of it")
    except BaseException:
        for part in parts:
            part.unlink(missing_ok=True)
        raise
    info["sha256"], info["targets_sha256"] = (sha.hexdigest() for sha in shas)
    return info


def write_meta(out_dir, codec, splits, source, sha256, label, record_len=None, labels=None):
    """Put the split files in their places, then meta.json, and return meta.

    codec: its object; splits: {name: what write_split or write_records returned}, the latter with the record_len of all
    and, for classes, labels {name: id}. An interruption before this call leaves an earlier
    preparation as it was; one during it leaves no meta.json, so that nothing half-prepared can be taken for whole.
    """
    out_dir = Path(out_dir)
    name = {BytesCodec: "bytes", GPT2Codec: "gpt2", SymbolsCodec: "symbols"}[type(codec)]
    meta = {"format": FORMAT, "dtype": _dtype(codec), "vocab_size": codec.vocab_size, "codec": name}
    if name == "symbols":
        meta["symbols"] = codec.symbols
    if record_len is not None:
        meta["record_len"] = record_len
    if labels is not None:
        meta["labels"] = labels
    meta.update(splits=splits, source=source, sha256=sha256, label=label)
    part = out_dir / "meta.json.part"
    with open(part, "w", encoding="utf-8", newline="\n") as out:
        out.write(json.dumps(meta, indent=1) + "\n")
        _sync(out)
    (out_dir / "meta.json").unlink(missing_ok=True)
    for split in SPLITS:
        for file, made in ((f"{split}.bin", True), (f"{split}.targets.bin", record_len is not None)):
            if made and split in splits:
                _replace(out_dir / f"{file}.part", out_dir / file)
            else:  # of an earlier preparation that had this file
                (out_dir / file).unlink(missing_ok=True)
    _replace(part, out_dir / "meta.json")
    return meta


def print_summary(meta, out_dir):
    """Say on stdout what was prepared: label, then what each split counts, and its sha256."""
    print(f"{meta['label']}: codec {meta['codec']}, vocabulary {meta['vocab_size']}, in {out_dir}")
    for name, info in meta["splits"].items():
        if "record_len" in meta:
            counted = f"{info['tokens'] // meta['record_len']:>12,} records {info['scored']:>12,} targets"
        else:
            words = "" if info["words"] is None else f"{info['words']:>12,} words"
            counted = f"{info['tokens']:>12,} tokens {info['bytes']:>12,} bytes {words}"
        print(f"  {name:5} {counted}  sha256 {info['sha256']}")
    print(f"  {'records' if 'record_len' in meta else 'text'} sha256 {meta['sha256']}")


def byte_labels(names):
    """{name: id} for records of bytes: the last ones, which no UTF-8 text has, so that no text is taken for a label."""
    names = list(names)
    if len(names) > 11:
        raise DataError(f"{len(names)} labels: UTF-8 leaves only 11 bytes (245 to 255) free")
    return {name: 256 - len(names) + i for i, name in enumerate(names)}


def print_labels(name, counts):
    """Say how many records of a split have each label, and what calling them all by the commonest would get right."""
    each = ", ".join(f"{label} {n:,}" for label, n in counts.items())
    print(f"{name}: {each}; majority class {100 * max(counts.values()) / sum(counts.values()):.1f} %")


def size_label(n):
    """A number of bytes for a label: 4000000 -> "4 MB", 12345 -> "12.3 kB"."""
    return f"{n / 1e6:.3g} MB" if n >= 1e6 else f"{n / 1e3:.3g} kB"


def _dtype(codec):
    return "uint8" if codec.vocab_size <= 256 else "uint16"


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(file):
    file.flush()
    os.fsync(file.fileno())


def _replace(source, target):
    """os.replace that outlasts a virus scanner, which on Windows holds new files open for a moment."""
    for wait in (0.1, 0.5, 2.0):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(wait)
    os.replace(source, target)
