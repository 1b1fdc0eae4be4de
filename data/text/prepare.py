"""Prepare text of your own: one file, a folder of text or source files, or JSON lines.

    python data/text/prepare.py --source novel.txt                  into data/novel, for --dataset=novel
    python data/text/prepare.py --source FOLDER --codec gpt2        whole files are dealt out
    python data/text/prepare.py --source documents.jsonl --field text

The text is UTF-8. A single file is cut at line breaks: its first 90 % are for training, then 5 % each for validation
and test. Files of a folder and documents of JSON lines are dealt out whole, about 90/5/5. Files go by a checksum of
their path, documents by one of their text: two equal documents share a split. A blank line ends each. Hidden files of a
folder are left out. So are those that are not UTF-8 text, and the summary counts them. Newlines are written as \\n.
Memory: one file of a folder, or one line. Interrupting and running again is safe.
"""

import hashlib
import json
import os
import re
import signal
import sys
from pathlib import Path

# Run as a script, Python looks for modules beside this file, not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":  # Ctrl-C while modules load is no traceback of theirs
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import data

LARGEST = 2**36  # bytes of a text; what is larger is no text that one machine trains on
LARGEST_FILE = 2**27  # bytes of one file of a folder, which is held in memory
SHARES = {"train": (0.0, 0.9), "val": (0.9, 0.95), "test": (0.95, 1.0)}


def checked(text, path):
    """The text with newlines as \\n; DataError unless it is UTF-8 text."""
    if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise data.DataError(f"{path} is UTF-16: convert it, for instance by iconv -f UTF-16 -t UTF-8")
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise data.DataError(f"{path} is not UTF-8 text: byte {error.start} of a part of it is not") from None
    if b"\0" in text:
        raise data.DataError(f"{path} holds a byte 0: it is no text")
    return text.replace(b"\r\n", b"\n")


def file_lines(path):
    """Yield (first byte, line) of a text file."""
    at = 0
    for line in data.lines(data.read(path, "a text", LARGEST), path):
        yield at, checked(line, path)
        at += len(line)


def of_file(path, split):
    """Yield the split's lines, those that begin in its share of the bytes, many at a time. A piece ends where the next
    line begins with a letter: GPT-2's BPE may be cut there."""
    low, high = (share * os.path.getsize(path) for share in SHARES[split])
    piece, size = [], 0
    for at, line in file_lines(path):
        if not low <= at < high:
            continue
        if size > data.CHUNK and not line[:1].isspace():
            yield b"".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    yield b"".join(piece)


def of_folder(files, split):
    """Yield the files [(relative path, path), ...] of the split, each ended by a blank line."""
    for name, path in files:
        if data.deal(name.encode("utf-8", errors="surrogateescape")) == split:
            yield document(checked(b"".join(data.read(path, "a text", LARGEST_FILE)), path))


def of_documents(path, field, split):
    """Yield the documents of the split: the field of each line's JSON object."""
    for number, line in enumerate(data.lines(data.read(path, "JSON lines", LARGEST), path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            raise data.DataError(f"{path}, line {number}: not JSON") from None
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise data.DataError(f"{path}, line {number}: no text in {field!r}: write --field=NAME for another field")
        text = checked(text.encode("utf-8", errors="surrogatepass"), f"{path}, line {number},")
        if data.deal(text) == split:
            yield document(text)


def document(text):
    return text.rstrip(b"\n") + b"\n\n" if text.strip() else b""


def text_files(folder):
    """The UTF-8 files of a folder as [(relative path, path), ...], sorted, and the number of the others."""
    found, others = [], 0
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(root, name) for name in names if not name.startswith(".")):
            try:
                for piece in data.lines(data.read(path, "a text", LARGEST_FILE), path):
                    checked(piece, path)
                found.append((path.relative_to(folder).as_posix(), path))
            except data.DataError:
                others += 1
    return sorted(found), others


def main(argv=None):
    here = Path(__file__).resolve().parent
    parser = data.arguments(__doc__, None)
    parser.add_argument("--codec", choices=("bytes", "gpt2"), default="bytes", help="how text becomes tokens")
    parser.add_argument("--field", default="text", help="the field of JSON lines that holds a document")
    args = parser.parse_args(argv)
    if args.source is None:
        raise data.DataError("no text is named: write --source FILE, FOLDER or documents.jsonl")
    if not args.source.exists():
        raise data.DataError(f"{args.source} does not exist")
    name = re.sub(r"[^\w.-]+", "_", args.source.resolve().stem) or "mine"
    out_dir = args.out_dir or here.parent / name
    if args.out_dir is None and (out_dir / "prepare.py").exists():
        raise data.DataError(f"{out_dir} belongs to another data set: write --out_dir=FOLDER")
    what, pieces = "text", lambda split: of_file(args.source, split)
    if args.source.is_dir():
        files, others = text_files(args.source)
        what, pieces = f"{len(files)} text files, {others} others left out", lambda split: of_folder(files, split)
    elif args.source.suffix in (".jsonl", ".ndjson"):
        what, pieces = f"field {args.field}", lambda split: of_documents(args.source, args.field, split)
    codec, digest, splits = data.get_codec({"codec": args.codec}), hashlib.sha256(), {}
    for split in data.SPLITS:
        splits[split] = data.write_split(out_dir, split, pieces(split), codec, digest, source=args.source)
    meta = data.write_meta(out_dir, codec, splits, f"{args.source}, {what}", digest.hexdigest(), f"{name} ({what})")
    data.print_summary(meta, out_dir)


if __name__ == "__main__":
    sys.exit(data.run_prepare(main))
