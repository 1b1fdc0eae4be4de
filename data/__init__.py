"""The reader of prepared data sets, and the helpers that every data/<name>/prepare.py shares.

A data set is a folder with meta.json and up to three files of little-endian token ids, train.bin, val.bin, test.bin:

    {"format": 1, "dtype": "uint8" | "uint16", "vocab_size": V, "codec": "bytes" | "gpt2" | "symbols", "symbols": [...],
     "splits": {"train": {"tokens": n, "bytes": n, "words": n or null, "first_bytes": n, "sha256": of the .bin}, ...},
     "source": where the text came from, "sha256": of the text of all splits in order, "label": name for tables}

"bytes" and "words" count the raw text of a split, so that every perplexity can say what it is divided by.
"first_bytes" (optional) is the length of the first token's text. Nothing is ever unpickled.
A split whose entry has a "sha256" is compared with it before it is used, once for each state of the file: .verified, in
the same folder if that can be written, says which states have been.

A data set may be records instead of running text. meta.json then has "record_len": L, each split is whole records of L
tokens, and <split>.targets.bin holds for each token, as int32, what the model is to say there: an id of the vocabulary
(no shift is applied), or -1 where nothing is scored. A split says {"tokens": n, "scored": n, "sha256": of the .bin,
"targets_sha256": of the .targets.bin}; with "record_len": n too its own records have that length, and with "parts":
[{"name": ..., "record_len": n, "records": n}, ...] those of each part, one after the other, have theirs: a batch is of
one part, and each part is scored by itself. With "labels": {name: id, ...} every target is one of these classes;
"stripped": true says that records are texts without the whitespace around them.
"""

import argparse
import contextlib
import difflib
import gzip
import hashlib
import http.client
import json
import os
import re
import reprlib
import stat
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import torch

from config import hear_interrupts, printable

FORMAT = 1
ROOT = Path(__file__).resolve().parent
SPLITS = ("train", "val", "test")
DTYPES = {"uint8": np.dtype("u1"), "uint16": np.dtype("<u2")}
TARGET = np.dtype("<i4")
CHUNK = 1 << 20  # bytes or tokens held at once by every streaming pass
LINE = 1 << 20  # bytes of the longest line of text
KEPT = 1 << 23  # bytes of a .bin file that is small enough to stay in memory
JSON = 1 << 24  # bytes of the largest meta.json; that of 65,536 symbols has some 1 MB
COUNT = 1 << 48  # beyond any number of tokens, bytes or words
SETTLED = 2 * 10**9  # ns after which a file's next change gets another time on every file system
ZIP = b"PK\x03\x04"  # how a zip archive begins
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
    longest_blank = 400_000  # tiktoken panics, past any except clause, at a run of a million
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
        n = self.longest_blank
        if any(text[i : i + n].isspace() for i in range(0, len(text) - n + 1, n)):
            raise DataError(f"the text has {n} characters of whitespace in a row, too many for GPT-2's BPE")
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
        if not all(isinstance(s, str) and s.split() == [s] and s.isprintable() for s in self.symbols):
            raise DataError("meta.json: a symbol must be printable text without whitespace: prepare the data again")
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
            raise DataError(f"unknown symbol {', '.join(map(reprlib.repr, unknown[:5]))}: the vocabulary is {known}")
        return [self.ids[word] for word in words]

    def encode_bytes(self, raw):
        return np.array(self.encode(raw.decode("utf-8")), dtype=np.uint16)

    def decode_bytes(self, ids):
        return "".join(self.symbols[i] + " " for i in _check_ids(ids, self.vocab_size)).encode("utf-8")

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8")[:-1]


def byte_letters():
    """GPT-2's letter for each byte: itself where it is printable, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


class TokenizerCodec:
    """The tokenizer.json of a model from elsewhere, read by the package tokenizers: byte-level BPE, or pieces with a
    mark for the space. Tokens without text, such as that of a beginning, decode to nothing."""

    def __init__(self, path):
        try:
            import tokenizers

            self._tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # tokenizers raises Exception itself
            raise DataError(f"cannot read {path} by the package tokenizers ({_reason(error)})") from None
        with open(path, encoding="utf-8") as f:
            stored = json.load(f)
        self.vocab_size = self._tokenizer.get_vocab_size()
        self._special = {t["id"] for t in stored.get("added_tokens") or [] if t.get("special")}
        self._bytes = {letter: b for b, letter in enumerate(byte_letters())}
        self._by_level = '"ByteLevel"' in json.dumps([stored.get("pre_tokenizer"), stored.get("decoder")])

    def encode(self, text):
        return self._tokenizer.encode(text).ids

    def decode_bytes(self, ids):
        return b"".join(map(self._piece, _check_ids(ids, self.vocab_size)))

    def _piece(self, i):
        token = self._tokenizer.id_to_token(i)
        if token is None or i in self._special:
            return b""
        if self._by_level:
            return bytes(self._bytes[c] for c in token) if self._bytes.keys() >= set(token) else token.encode()
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()


def get_codec(meta):
    """The codec that meta["codec"] names. Raises DataError for a name it does not know."""
    name = meta.get("codec")
    if name == "tokenizer":
        return TokenizerCodec(meta["tokenizer"])
    if name == "bytes":
        return BytesCodec()
    if name == "gpt2":
        return GPT2Codec()
    if name == "symbols":
        symbols = meta.get("symbols")
        return SymbolsCodec(symbols if isinstance(symbols, list) else [])
    raise DataError(f"unknown codec {reprlib.repr(name)}: known are bytes, gpt2, symbols")


def _check_ids(ids, vocab_size):
    ids = [int(i) for i in ids]
    for i in ids:
        if not 0 <= i < vocab_size:
            raise DataError(f"id {i} is outside the vocabulary of {vocab_size}: wrong data set for this model?")
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class Dataset:
    """A prepared data set: meta.json and its splits, which are read from their files in rows.

    name: a folder of data/ ("enwik8"), or the path of a folder that holds meta.json.
    Raises DataError if it is missing, foreign or inconsistent. Split files are opened and checked by split().
    """

    def __init__(self, name):
        name = os.fspath(name)
        own = ROOT / name
        # A plain name always means data/<name>, whatever the working directory holds.
        plain = os.path.basename(name) == name
        if os.path.isfile(name) or name.endswith((".txt", ".md", ".jsonl")):
            command = f"python data/text/prepare.py --source {name}"
            raise DataError(f"{name} is a text: {command} makes a data set of it, --dataset={Path(name).stem}")
        if plain and ((own / "prepare.py").is_file() or (own / "meta.json").is_file()):
            self.path = own
        elif os.path.isdir(name) or not (plain or "\0" in name):
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

    def lengths(self, block_size):
        """(tokens of a sequence,), and of records the scored ones of one in `train`, where those are not all."""
        length, train = self.record_len or block_size, self.meta["splits"].get("train", {})
        scored = -(-train["scored"] * length // train["tokens"]) if "scored" in train else length
        return (length,) if scored == length else (length, scored)

    def checksums(self):
        """{split: those of its files}, by which a resumed run knows its data."""
        splits = self.meta["splits"].items()
        return {name: {k: v for k, v in info.items() if k.endswith("sha256")} for name, info in splits}

    def split(self, name):
        """The Split called name (train, val or test), checked once against meta.json. DataError if it is not sound."""
        if name not in self._splits:
            if name not in self.meta["splits"]:
                raise DataError(f"{self._where} has no {name!r} split: it has {', '.join(self.meta['splits'])}")
            self._splits[name] = Split(self, name)
        return self._splits[name]

    def _foreign(self, why):
        raise DataError(f"{self._where}/meta.json: {why}: {self._hint} again")

    def _read_meta(self):
        try:
            meta = _read_json(self.path / "meta.json")
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"no prepared data in {self._where}: {self._hint}") from None
        except (ValueError, OSError, RecursionError) as error:
            self._foreign(f"not readable ({_reason(error)})")
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            found = meta.get("format") if isinstance(meta, dict) else None
            self._foreign(f"format {reprlib.repr(found)} is not the known {FORMAT}")
        if meta.get("dtype") not in list(DTYPES):
            self._foreign(f"dtype {reprlib.repr(meta.get('dtype'))} is not one of {', '.join(DTYPES)}")
        if not _is_count(meta.get("vocab_size")):
            self._foreign(f"vocab_size {reprlib.repr(meta.get('vocab_size'))} is not a number of tokens")
        if not isinstance(meta.get("label"), str):
            self._foreign("it has no label")
        meta["label"] = printable(meta["label"])
        splits = meta.get("splits")
        if not isinstance(splits, dict) or not splits or not set(splits) <= set(SPLITS):
            self._foreign(f"splits must be some of {', '.join(SPLITS)}")
        for name, info in splits.items():
            counts = ("tokens", "bytes" if meta.get("record_len") is None else "scored")
            if not isinstance(info, dict) or not all(_is_count(info.get(key)) for key in counts):
                self._foreign(f"split {name} does not say its {counts[0]} and {counts[1]}")
            for key in ("words", "first_bytes"):
                if info.get(key) is not None and not _is_count(info[key]):
                    self._foreign(f"split {name} has {reprlib.repr(info[key])} {key}")
            for key in ("sha256", "targets_sha256"):
                if info.get(key) is not None and not _is_sha256(info[key]):
                    self._foreign(f"split {name} has {reprlib.repr(info[key])} for a {key}")
        self._check_records(meta)
        return meta

    def _check_records(self, meta):
        length, labels = meta.get("record_len"), meta.get("labels")
        if length is not None and (not _is_count(length) or length == 0):
            self._foreign(f"record_len {reprlib.repr(length)} is not a number of tokens")
        for name, info in meta["splits"].items():
            own = info.get("record_len") or length
            if own is not None:
                if length is None or not _is_count(own):
                    self._foreign(f"split {name} has {reprlib.repr(own)} for a record_len")
                if "parts" not in info and info["tokens"] % own:
                    self._foreign(f"split {name} has {info['tokens']} tokens, no whole records of {own}")
            if "parts" in info:
                self._check_parts(name, info, own)
        if labels is not None:
            ids = list(labels.values()) if isinstance(labels, dict) else []
            if length is None or len(ids) < 2 or not all(_is_count(i) and i < meta["vocab_size"] for i in ids):
                self._foreign("labels must be names and ids of the vocabulary, two or more, of records")
            if len(set(ids)) < len(ids) or not all(name.strip() and name.isprintable() for name in labels):
                self._foreign("labels must differ from each other, names as ids, and names be printable")

    def _check_parts(self, name, info, longest):
        parts = info["parts"] if isinstance(info["parts"], list) else []
        sound = [
            isinstance(part, dict)
            and isinstance(part.get("name"), str)
            and part["name"].isprintable()
            and all(_is_count(part.get(key)) and part[key] for key in ("record_len", "records"))
            for part in parts
        ]
        if not parts or not all(sound) or max(part["record_len"] for part in parts) != longest:
            self._foreign(f"the parts of split {name} are not names, lengths up to {longest} and numbers of records")
        if sum(part["record_len"] * part["records"] for part in parts) != info["tokens"]:
            self._foreign(f"the parts of split {name} do not add up to its {info['tokens']} tokens")


class Numbers:
    """The file that holds the tokens of a split, or its targets: `count` little-endian numbers, read in rows.

    It is not mapped: a process dies when a file is cut under its map, and what it has read of it stays in memory. A
    file of at most KEPT bytes is read once. What has been checked stays checked: if the file is not as it was (its
    size, times and inode), the next reading checks it again.
    look: called with the blocks (n,) of a pass over the file, in order; raises DataError where they are not sound. None
    where nothing can be wrong.
    """

    def __init__(self, dataset, name, dtype, count, sha256, look=None):
        self.path, self.where, self._hint = dataset.path / name, f"{dataset._where}/{name}", dataset._hint
        self.dtype, self.count, self.sha256, self._look = dtype, count, sha256, look
        self._state, self._small = None, None
        self.check()

    def rows(self, starts, length):
        """(len(starts), length): the numbers from each of `starts`, an int array, on."""
        if self._read_state() != self._state:
            self.check()
        if self._small is not None:
            return self._small[starts[:, None] + np.arange(length)]
        return self._read(starts, length)

    def all(self):
        """The numbers of the whole file, (count,)."""
        return np.concatenate(list(self._blocks()))

    def check(self):
        """Raise DataError unless the file is sound, and the one whose size and sha256 are in meta.json."""
        state, expected = self._read_state(), self.count * self.dtype.itemsize
        if state[0] != expected:
            what = "truncated" if state[0] < expected else "too long"
            self._fail(f"is {what}: {state[0]} bytes, meta.json says {expected}")
        if not self.count:
            self._fail("is empty")
        known = self.sha256 is None or _read_verified(self.path).get(self.path.name) == [*state, self.sha256]
        digest = None if known else hashlib.sha256()
        blocks = self._blocks(digest)
        if self._look is not None:
            self._look(self, blocks)
        if digest is not None:
            for _ in blocks:
                pass
            if digest.hexdigest() != self.sha256:
                self._fail("is not as it was prepared: its sha256 is not the one in meta.json")
            _write_verified(self.path, [*state, self.sha256])
        self._state, self._small = state, self._read(np.array([0]), self.count)[0] if expected <= KEPT else None

    def _fail(self, why):
        raise DataError(f"{self.where} {why}: {self._hint} again")

    def _read_state(self):
        """(size, times of the last modification and change in ns, inode)."""
        try:
            found = os.stat(self.path)
        except OSError:
            folder, name = os.path.split(self.where)
            raise DataError(f"no prepared data in {folder}: {name} is missing: {self._hint}") from None
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino

    def _blocks(self, digest=None):
        for first in range(0, self.count, CHUNK):
            block = self._read(np.array([first]), min(CHUNK, self.count - first))[0]
            if digest is not None:
                digest.update(block)
            yield block

    def _read(self, starts, length):
        out = np.empty((len(starts), length), self.dtype)
        try:
            with open(self.path, "rb", buffering=0) as file:
                for row, start in zip(out, starts.tolist()):
                    file.seek(start * self.dtype.itemsize)
                    if file.readinto(row) != row.nbytes:
                        self._fail("became shorter while it was read")
        except OSError as error:
            self._fail(f"cannot be read ({_reason(error)})")
        return out


def _read_verified(path):
    """{file: [state, sha256]} of the .bin files beside `path` that had this sha256 in this state."""
    try:
        found = _read_json(path.with_name(".verified"))
    except (ValueError, OSError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_verified(path, entry):
    """Note a verified file, unless the folder cannot be written, or the file is so new that it could change once more
    and keep its time."""
    if time.time_ns() - max(entry[1:3]) > SETTLED:
        with contextlib.suppress(OSError):
            path.with_name(".verified").write_text(json.dumps(_read_verified(path) | {path.name: entry}))


class Split:
    """One split of a Dataset; made, and checked, by Dataset.split.

    name; n_tokens; n_scored: the targets of a full pass (in running text nothing predicts token 0). Of running text:
    n_bytes; n_words (None where they are not counted); scored_bytes: the bytes of tokens 1..N-1. Of records:
    record_len, of the longest, and labels (None where there are none), and parts, a list of (name, record_len, records,
    first token). tokens, and of records targets: the whole split, (N,).
    """

    def __init__(self, dataset, name):
        info = dataset.meta["splits"][name]
        self.name = name
        self.where = f"{dataset._where}: {name}"
        self.record_len, self.labels = info.get("record_len") or dataset.record_len, dataset.labels
        self.n_tokens, self.n_bytes, self.n_words = info["tokens"], info.get("bytes"), info.get("words")
        self.n_scored = info["tokens"] - 1 if self.record_len is None else info["scored"]
        self.parts, first = [], 0
        if self.record_len is not None:
            whole = {"name": name, "record_len": self.record_len, "records": info["tokens"] // self.record_len}
            for part in info.get("parts") or [whole]:
                self.parts.append((part["name"], part["record_len"], part["records"], first))
                first += part["record_len"] * part["records"]
        self._vocab_size, self._codec, self._first_bytes = dataset.vocab_size, dataset.codec, info.get("first_bytes")
        dtype = DTYPES[dataset.meta["dtype"]]
        look = self._look_at_tokens if self._vocab_size <= np.iinfo(dtype).max else None
        self._tokens = Numbers(dataset, f"{name}.bin", dtype, self.n_tokens, info.get("sha256"), look)
        self._targets = None
        if self.record_len is not None:
            targets = f"{name}.targets.bin", TARGET, self.n_tokens, info.get("targets_sha256")
            self._targets = Numbers(dataset, *targets, self._look_at_targets)

    @property
    def tokens(self):
        return self._tokens.all()

    @property
    def targets(self):
        return self._targets.all()

    def pairs(self, starts, length):
        """x, y int64 (len(starts), length), from the first positions of x: y is x shifted by one; of records the
        targets of x."""
        if self._targets is not None:
            x, y = self._tokens.rows(starts, length), self._targets.rows(starts, length)
        else:
            both = self._tokens.rows(starts, length + 1)
            x, y = both[:, :-1], both[:, 1:]
        return torch.from_numpy(x.astype(np.int64)), torch.from_numpy(y.astype(np.int64))

    @property
    def scored_bytes(self):
        if self._first_bytes is None:
            self._first_bytes = len(self._codec.decode_bytes(self._tokens.rows(np.array([0]), 1)[0]))
        return self.n_bytes - self._first_bytes

    def _look_at_tokens(self, file, blocks):
        largest = max(int(block.max()) for block in blocks)
        if largest >= self._vocab_size:
            file._fail(f"holds id {largest}, beyond its vocabulary of {self._vocab_size}")

    def _look_at_targets(self, file, blocks):
        """Each target is -1, or an id of the vocabulary or of the labels; each record to train on scores something."""
        known, scored, at = np.zeros(self._vocab_size, bool), 0, 0
        known[list(self.labels.values()) if self.labels else slice(None)] = True
        starts = np.concatenate([first + length * np.arange(n) for _, length, n, first in self.parts])
        trained = np.zeros(len(starts), bool)
        for block in blocks:
            low, high = int(block.min()), int(block.max())
            if low < -1 or high >= self._vocab_size or not known[block[block >= 0]].all():
                wrong = next(int(t) for t in block if not (t == -1 or (0 <= t < self._vocab_size and known[t])))
                what = "one of its labels" if self.labels else f"an id below its vocabulary of {self._vocab_size}"
                file._fail(f"holds target {wrong}, neither -1 nor {what}")
            found = np.flatnonzero(block >= 0)
            trained[np.searchsorted(starts, at + found, side="right") - 1] = True
            scored, at = scored + len(found), at + len(block)
        if self.name == "train" and not trained.all():
            file._fail("has a record without a target, nothing to train on")
        if scored != self.n_scored or scored == 0:
            file._fail(f"has {scored} targets, meta.json says {self.n_scored}")


class Batches:
    """Random training batches, drawn globally and sliced by rank.

    One generator draws the starts of all processes, so the stream of rows depends on the seed alone: one process that
    draws twice sees what two processes see that draw once. Of records whole ones are drawn, each time of one part, by
    its share of all; `length` is the longest's, which block_size has to hold. DataError if a split is too short for
    block_size.
    """

    def __init__(self, dataset, block_size, batch_size, seed, rank=0, world_size=1):
        if block_size < 1 or batch_size < 1 or not 0 <= rank < world_size:
            raise DataError(
                f"batches need block_size >= 1, batch_size >= 1 and 0 <= rank < world_size, "
                f"not {block_size}, {batch_size}, {rank} of {world_size}"
            )
        longest = max(info.get("record_len") or dataset.record_len or 0 for info in dataset.meta["splits"].values())
        if block_size < longest:
            raise DataError(
                f"block_size {block_size} does not hold the {longest} tokens of a record of {dataset.name}: "
                f"use --block_size={longest}"
            )
        self.dataset, self.length, self.batch_size = dataset, dataset.record_len or block_size, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.generator = torch.Generator().manual_seed(seed)
        for name in dataset.meta["splits"]:
            dataset.split(name)  # a bad file shows now, not after hours
        if "train" in dataset.meta["splits"]:
            self._split("train")

    def batch(self, split):
        """(x, y), int64 CPU tensors (batch_size, length); y is x shifted by one, or a record's targets."""
        split, n = self._split(split), self.batch_size
        drawn = [self._starts(split, n, self.generator) for _ in range(self.world_size)]
        return split.pairs(*drawn[self.rank])

    def fixed(self, split, n):
        """Yield this process's share of n batches, every world_size-th one. The n are the same at every call and for
        any number of processes; the training generator does not move. Each process gets as many: beyond the n one
        whose targets are not scored."""
        split = self._split(split)
        # Another seed than the training generator's, which would give the very batches that training starts with.
        generator = torch.Generator().manual_seed((self.seed + 0x9E3779B97F4A7C15) % 2**63)
        for i in range(-(-n // self.world_size) * self.world_size):
            starts, length = self._starts(split, self.batch_size, generator)
            if i % self.world_size == self.rank:
                x, y = split.pairs(starts, length)
                yield x, (y if i < n else torch.full_like(y, -1))

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
        """Where n rows begin, and their length."""
        if split.record_len is None:
            return torch.randint(split.n_tokens - self.length, (n,), generator=generator).numpy(), self.length
        parts = split.parts
        if len(parts) > 1:
            ends = np.cumsum([count for _, _, count, _ in parts])
            drawn = int(torch.randint(int(ends[-1]), (1,), generator=generator))
            parts = parts[int(np.searchsorted(ends, drawn, side="right")) :]
        _, length, count, first = parts[0]
        return first + torch.randint(count, (n,), generator=generator).numpy() * length, length


def windows(split, context, stride, batch_size=1):
    """Yield (x, y, scored) of one deterministic full pass: each of tokens 1..N-1 is scored exactly once.

    x, y int64 (b, t), y is x shifted by one; scored bool (b, t), true where this window scores y. Window k starts at
    k * stride and has up to `context` inputs; it scores the targets that no earlier window has. Windows of a batch are
    equally long; the last one, if shorter, comes alone, so the pass is the same for every batch_size.
    Of records the windows are the records, in order, whatever the stride, and a batch is of one part; y are their
    targets, -1 where not scored.
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
        for _, length, count, begin in split.parts:
            for first in range(0, count, batch_size):
                x, y = split.pairs(begin + length * np.arange(first, min(first + batch_size, count)), length)
                yield x, y, y >= 0
        return
    targets = split.n_tokens - 1
    if targets < 1:
        raise DataError(f"{split.where} has {split.n_tokens} token: nothing to score, prepare more data")
    full = max(0, (targets - context) // stride + 1)
    done = 0  # targets scored so far
    for first in range(0, full, batch_size):
        starts = np.arange(first, min(first + batch_size, full)) * stride
        x, y = split.pairs(starts, context)
        ends = starts + context
        fresh = np.maximum(np.concatenate(([done], ends[:-1])) - starts, 0)  # first position that this window scores
        yield x, y, torch.from_numpy(np.arange(context) >= fresh[:, None])
        done = int(ends[-1])
    if done < targets:
        start = full * stride
        x, y = split.pairs(np.array([start]), targets - start)
        yield x, y, torch.arange(targets - start)[None] >= done - start


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < COUNT


def _is_sha256(value):
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _read_json(path):
    """What a small JSON file holds. Raises ValueError, OSError or RecursionError."""
    with open(path, "rb") as file:
        raw = file.read(JSON + 1)
    if len(raw) > JSON:
        raise ValueError(f"it has more than {JSON} bytes")

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    found = json.loads(raw.decode("utf-8"), parse_constant=refuse)
    if _depth(found) > 20:  # json.dumps takes less depth than json.loads
        raise ValueError("it is nested too deep")
    return found


def _depth(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


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
    """Run a prepare.py's main(); return the exit status. Expected failures are one line on stderr, not a traceback, and
    whatever ends it early, no unfinished file stays."""
    hear_interrupts()
    try:
        main()
        return 0
    except KeyboardInterrupt:
        status, message = 130, "\ninterrupted: nothing half-prepared is left to be read, run it again"
    except DataError as error:
        status, message = 1, f"error: {printable(str(error))}"
    except (OSError, MemoryError) as error:
        status, message = 1, f"error: {printable(f'{type(error).__name__}: {error}'.removesuffix(': '))}"
    finally:
        for part in _unfinished:
            part.unlink(missing_ok=True)
        _unfinished.clear()
    print(message, file=sys.stderr)
    return status


@contextlib.contextmanager
def reading(path, what, limit):
    """A source file, open. Whatever goes wrong with it is a DataError that names it: it cannot be read, is damaged, or
    has more than `limit` bytes, which no file of what it should be has."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"{path} is not a file")
        with open(path, "rb") as file:
            _check_limit(path, what, os.fstat(file.fileno()).st_size, limit)
            yield file
    except (DataError, MemoryError):
        raise
    except Exception as error:  # decompressors and parsers let errors of many kinds through
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        raise DataError(f"{path} is damaged ({_reason(error)}): get it again") from None


def _check_limit(path, what, size, limit):
    if size > limit:
        raise DataError(f"{path} is not {what}: it has {size} bytes, more than {limit}")


def read(path, what, limit):
    """Yield the bytes of a source file in chunks."""
    with reading(path, what, limit) as file:
        while chunk := file.read(CHUNK):
            yield chunk


def unpack(path, what, limit, choose):
    """Yield the unpacked bytes of a plain file, a gzip file or a zip archive in chunks, `limit` of them at most.
    choose: a function that picks the member of an archive from the list of their names."""
    with reading(path, what, limit) as file:
        magic, size = file.read(4), 0
        file.seek(0)
        stream = file
        if magic[:2] == b"\x1f\x8b":
            stream = gzip.GzipFile(fileobj=file)
        elif magic == ZIP:
            archive = zipfile.ZipFile(file)
            member = archive.getinfo(choose(archive.namelist()))
            # Other methods unpack what they like at once, and passwords are not asked for.
            if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(f"{path} is encrypted, or packed otherwise than by deflate: pass it unpacked")
            _check_limit(path, what, member.file_size, limit)
            stream = archive.open(member)
        while chunk := stream.read(CHUNK):
            size += len(chunk)
            _check_limit(path, what, size, limit)
            yield chunk


def lines(chunks, path):
    """Yield the lines of a source's chunks, each with its newline."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line + b"\n" for line in whole)
        if len(rest) > LINE:
            raise DataError(f"{path} has a line of more than {LINE} bytes: no text has, get it again")
    if rest:
        yield rest


def deal(key):
    """train, val or test, about 90/5/5, by a checksum of the bytes that name or are a document."""
    share = int.from_bytes(hashlib.sha256(key).digest()[:4], "big") % 100
    return "train" if share < 90 else "val" if share < 95 else "test"


class NoBar:
    """What stands in for tqdm's bar where it is missing."""

    disable = True

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self, n=1):
        pass


def make_bar(**options):
    """tqdm's bar; without tqdm none is shown."""
    try:
        from tqdm import tqdm
    except ImportError:
        return NoBar()
    return tqdm(**options)


def download(urls, path, sha256=None, limit=2**31):
    """Fetch one file from the first of several sources that delivers it, and return path.

    The file is written beside its place and renamed when it is whole and its checksum fits; what is longer than `limit`
    bytes is not it. A file that is already there and has this checksum is used as it is. Memory: 1 MB. Raises DataError
    with each source and its reason.
    """
    path = Path(path)
    if sha256 and path.is_file() and _sha256(path) == sha256:
        return path
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
                with make_bar(total=total, unit="B", unit_scale=True, desc=path.name, leave=False, disable=None) as bar:
                    while out.tell() <= limit and (chunk := response.read(CHUNK)):
                        out.write(chunk)
                        digest.update(chunk)
                        bar.update(len(chunk))
                size = out.tell()
                _sync(out)
            if size > limit:
                reason = f"more than {limit} bytes"
            elif total is not None and size != total:
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
    raise DataError(f"cannot download {path} ({'; '.join(reasons)}): get it another way and pass --source PATH")


_unfinished = set()  # .part files that run_prepare takes away unless write_meta has put them in their places


@contextlib.contextmanager
def _writing(*paths):
    """New files, each path with .part added, open for writing, and synced at the end. If it fails, they go, and an
    OSError of writing, as of a full disk, is a DataError that names them."""
    parts = [path.with_name(path.name + ".part") for path in paths]
    _unfinished.update(parts)
    try:
        parts[0].parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(part, "wb")) for part in parts]
            yield files
            for file in files:
                _sync(file)
    except BaseException as error:
        for part in parts:
            with contextlib.suppress(OSError):
                part.unlink()
        _unfinished.difference_update(parts)
        if isinstance(error, OSError):
            raise DataError(f"cannot write {paths[0]}: {error.strerror or error}") from None
        raise


def write_split(out_dir, name, pieces, codec, digest=None, words=True, source="the source"):
    """Encode pieces of text into OUT_DIR/<name>.bin.part and return the split's entry for meta.json.

    pieces: an iterable of bytes, whose concatenation is the raw text; each is encoded by itself, so they must be cut
    where the codec may be cut. digest: a hashlib object that is fed the text. words: count whitespace-separated words.
    source: what to name in errors. Memory: one piece. The file gets its name only from write_meta.
    """
    dtype = _dtype(codec)
    sha, info, in_word = hashlib.sha256(), {"tokens": 0, "bytes": 0, "words": 0 if words else None}, False
    with _writing(Path(out_dir) / f"{name}.bin") as (out,):
        for piece in pieces:
            try:
                ids = codec.encode_bytes(piece)
            except DataError as error:
                raise DataError(f"{source}: {error}") from None
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
        if info["tokens"] < 2:
            raise DataError(f"{source} leaves {info['tokens']} tokens for the {name} split: give a larger one")
    info["sha256"] = sha.hexdigest()
    return info


def write_records(out_dir, name, blocks, codec, digest=None, named=False):
    """Write OUT_DIR/<name>.bin.part and <name>.targets.bin.part and return the split's entry for meta.json.

    blocks: an iterable of (tokens, targets), arrays (records, record_len) each; named: of (these, the name of the part
    that they belong to), a part's blocks in a row. digest: a hashlib object that is fed both. Memory: one block. The
    files get their names only from write_meta, which is told record_len.
    """
    dtypes, shas = (DTYPES[_dtype(codec)], TARGET), (hashlib.sha256(), hashlib.sha256())
    info, parts = {"tokens": 0, "scored": 0}, {}
    with _writing(Path(out_dir) / f"{name}.bin", Path(out_dir) / f"{name}.targets.bin") as files:
        for block in blocks:
            if named:
                block, part = block
                part = parts.setdefault(part, {"record_len": block[0].shape[1], "records": 0})
                part["records"] += len(block[0])
            for array, dtype, out, sha in zip(block, dtypes, files, shas):
                binary = np.ascontiguousarray(array, dtype=dtype).tobytes()
                out.write(binary)
                sha.update(binary)
                if digest is not None:
                    digest.update(binary)
            info["tokens"] += block[0].size
            info["scored"] += int((block[1] >= 0).sum())
        if not info["scored"]:
            raise DataError(f"nothing is scored in the {name} split: give more of it")
    info["sha256"], info["targets_sha256"] = (sha.hexdigest() for sha in shas)
    if named:
        info["record_len"] = max(part["record_len"] for part in parts.values())
        info["parts"] = [{"name": name} | part for name, part in parts.items()]
    return info


def write_meta(out_dir, codec, splits, source, sha256, label, record_len=None, labels=None, stripped=False):
    """Put the split files in their places, then meta.json, and return meta.

    codec: its object; splits: {name: what write_split or write_records returned}, the latter with the record_len of all
    that do not hold a "record_len" themselves and, for classes, labels {name: id}; stripped: records are texts without
    the whitespace around them. An interruption before this call leaves an earlier preparation as it was; one during it
    leaves no meta.json, so that nothing half-prepared can be taken for whole.
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
    if stripped:
        meta["stripped"] = True
    meta.update(splits=splits, source=printable(source), sha256=sha256, label=printable(label))
    with _writing(out_dir / "meta.json") as (out,):
        out.write((json.dumps(meta, indent=1) + "\n").encode())
    (out_dir / "meta.json").unlink(missing_ok=True)
    for split in SPLITS:
        for file, made in ((f"{split}.bin", True), (f"{split}.targets.bin", record_len is not None)):
            if made and split in splits:
                _replace(out_dir / f"{file}.part", out_dir / file)
            else:  # of an earlier preparation that had this file
                (out_dir / file).unlink(missing_ok=True)
    _replace(out_dir / "meta.json.part", out_dir / "meta.json")
    _unfinished.clear()
    return meta


def print_summary(meta, out_dir):
    """Say on stdout what was prepared: label, then what each split counts, and its sha256."""
    print(f"{meta['label']}: codec {meta['codec']}, vocabulary {meta['vocab_size']}, in {printable(str(out_dir))}")
    for name, info in meta["splits"].items():
        if "record_len" in meta:
            whole = info["tokens"] // (info.get("record_len") or meta["record_len"])
            records = sum(part["records"] for part in info["parts"]) if "parts" in info else whole
            counted = f"{records:>12,} records {info['scored']:>12,} targets"
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
