"""Prepare enwik8, the first 10^8 bytes of a Wikipedia dump: raw bytes, 90/5/5 in the order of the file.

    python data/enwik8/prepare.py                     download (36 MB, kept here as enwik8.zip) and prepare
    python data/enwik8/prepare.py --source PATH       enwik8, enwik8.zip, enwik8.gz, or a folder that holds one

A beginning of the file is accepted as a source, and labelled as one ("enwik8, first 4 MB"). The text is read once to
check it and once more to write it; 10 MB of memory are enough, whatever its size. Interrupting and running again is
safe.
"""

import hashlib
import signal
import sys
from pathlib import Path

# Run as a script, Python looks for modules beside this file, not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":  # Ctrl-C while modules load is no traceback of theirs
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import data

URLS = [
    "https://mattmahoney.net/dc/enwik8.zip",
    "http://mattmahoney.net/dc/enwik8.zip",
    "https://data.deepai.org/enwik8.zip",
]
ZIP_LIMIT = 40 * 10**6  # bytes; it has 36 MB
ZIP_SHA256 = "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
SIZE = 10**8
SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"  # of the 10^8 bytes
START = b"<mediawiki"  # any prefix of enwik8 begins with it; another file must not be labelled enwik8


def find(path):
    """The file that --source means. Raises DataError if there is none, or no telling which."""
    if not path.exists():
        raise data.DataError(f"--source {path} does not exist")
    if not path.is_dir():
        return path
    for name in ("enwik8", "enwik8.zip", "enwik8.gz"):
        if (path / name).is_file():
            return path / name
    found = sorted(p.name for p in path.glob("enwik8*") if p.is_file())
    if len(found) != 1:
        raise data.DataError(f"--source {path} must hold one enwik8 file, it holds {', '.join(found[:3]) or 'none'}")
    return path / found[0]


def read(path):
    """Yield the unpacked bytes of a plain, gzip or zip file in chunks. Raises DataError if it is damaged or larger."""

    def choose(names):
        members = [name for name in names if Path(name).name.startswith("enwik8")]
        if len(members) != 1:
            raise data.DataError(f"{path} holds {len(members)} members called enwik8, not one")
        return members[0]

    return data.unpack(path, "enwik8", SIZE, choose)


def part_of(path, start, stop):
    """Yield bytes start..stop-1 of the unpacked file."""
    position = 0
    for chunk in read(path):
        piece = chunk[max(0, start - position) : max(0, stop - position)]
        if piece:
            yield piece
        position += len(chunk)
        if position >= stop:
            return


def main(argv=None):
    args = data.arguments(__doc__, Path(__file__).resolve().parent).parse_args(argv)
    if args.source is None:
        path = data.download(URLS, args.out_dir / "enwik8.zip", ZIP_SHA256, ZIP_LIMIT)
    else:
        path = find(args.source)
    size, sha, start = 0, hashlib.sha256(), b""
    for chunk in read(path):
        start = (start + chunk)[: len(START)]
        if not START.startswith(start):
            break
        size += len(chunk)
        sha.update(chunk)
    if start != START:
        raise data.DataError(f"{path} is not enwik8: it does not begin with {START.decode()}")
    if size == SIZE and sha.hexdigest() != SHA256:
        raise data.DataError(f"{path} is not enwik8: wrong checksum (sha256 {sha.hexdigest()}, not {SHA256})")

    held_out = size * 5 // 100
    borders = {"train": (0, size - 2 * held_out), "val": (size - 2 * held_out, size - held_out)}
    borders["test"] = (size - held_out, size)
    codec, written = data.BytesCodec(), hashlib.sha256()
    splits = {
        name: data.write_split(args.out_dir, name, part_of(path, *border), codec, written, source=path)
        for name, border in borders.items()
    }
    if written.digest() != sha.digest():
        raise data.DataError(f"{path} changed while it was read: run this again")
    label = "enwik8" if size == SIZE else f"enwik8, first {data.size_label(size)}"
    source = f"{URLS[0]}, {'' if size == SIZE else 'first '}{size} bytes"
    data.print_summary(data.write_meta(args.out_dir, codec, splits, source, sha.hexdigest(), label), args.out_dir)


if __name__ == "__main__":
    sys.exit(data.run_prepare(main))
