"""Prepare a text classification task without a download: which part of Python's standard library is a snippet from?

    python data/classify_stdlib/prepare.py                     this Python's library
    python data/classify_stdlib/prepare.py --source FOLDER     another folder of Python source text

A record is --record_len bytes of source text from the beginning of a line on; its label is the group of packages that
the file belongs to (GROUPS). Whole files are dealt to train, val and test, about 70/15/15 by bytes in each group, so
that no file is in two of them, and within a split every group has the same number of records.

The answer to a record is expected at its last token: there the target is the label's id, which stands for a byte that
no UTF-8 text has. val and test score that token alone; train also scores the label at every 16th token, so that a model
learns to answer shorter texts as well. Memory: the text of all groups, about 6 MB, three times over.
"""

import hashlib
import platform
import signal
import sys
import sysconfig
from pathlib import Path

import numpy as np

# Run as a script, Python looks for modules beside this file, not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":  # Ctrl-C while modules load is no traceback of theirs
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import data
from data.stdlib.prepare import find, read

GROUPS = {  # folders and modules at the top of the library; not every Python has all of them
    "asyncio": "asyncio selectors",
    "archives": "tarfile zipfile gzip bz2 lzma shutil _compression compression pickle pickletools shelve dbm",
    "email": "email mailbox smtplib imaplib poplib nntplib smtpd quopri mimetypes",
    "encodings": "encodings",
    "gui": "idlelib tkinter turtle turtledemo",
    "numbers": "_pydecimal fractions statistics random datetime _pydatetime calendar colorsys zoneinfo _strptime",
    "packaging": "distutils importlib ensurepip venv pkgutil zipimport zipapp modulefinder",
    "processes": "multiprocessing concurrent subprocess threading",
    "testing": "unittest doctest pdb bdb trace profile cProfile pstats timeit",
    "web": "http urllib html xmlrpc wsgiref socketserver ftplib webbrowser cgi cgitb",
    "xml": "xml",
}
SHARE = {"test": 0.15, "val": 0.15}  # of a group's bytes, at most; the rest is train
LEAST = 16  # records of a group in each split
LARGEST = 10**8  # bytes of a group: all of them have 6 MB


def deal(files):
    """{split: paths} of one group's (name, path), whole files, in an order that a checksum of their names decides."""
    files = sorted(files, key=lambda f: hashlib.sha256(f[0].encode("utf-8", errors="surrogateescape")).digest())
    sizes = {name: path.stat().st_size for name, path in files}
    dealt, filled, total = {name: [] for name in data.SPLITS}, dict.fromkeys(SHARE, 0), sum(sizes.values())
    if total > LARGEST:
        raise data.DataError(f"{files[0][1].parent} and others have {total} bytes, more than any Python library")
    for name, path in files:
        fits = (split for split in SHARE if filled[split] + sizes[name] <= SHARE[split] * total)
        split = next(fits, "train")
        dealt[split].append(path)
        if split in SHARE:
            filled[split] += sizes[name]
    return dealt


def snippets(text, length):
    """Pieces of `length` bytes that begin where a line does and do not overlap; what is left of the text is dropped."""
    start, found = 0, []
    while start + length <= len(text):
        found.append(text[start : start + length])
        start = text.find(b"\n", start + length - 1) + 1 or len(text)
    return found


def collect(folder, length):
    """{group: {split: records (n, length) uint8}} of the groups that this Python has enough of."""
    groups = {name: [] for name in GROUPS}
    owner = {top: group for group, names in GROUPS.items() for top in names.split()}
    for relative, path in find(folder):
        group = owner.get(relative.split("/")[0].removesuffix(".py"))
        if group:
            groups[group].append((relative, path))
    found = {}
    for group, files in groups.items():
        texts = {
            name: [s for text in read(paths) for s in snippets(text, length)] for name, paths in deal(files).items()
        }
        fewest = min(map(len, texts.values()))
        if fewest < LEAST:
            print(f"note: {group} is left out: {fewest} snippets in one of its splits, fewer than {LEAST}")
            continue
        found[group] = {n: np.frombuffer(b"".join(t), dtype=np.uint8).reshape(-1, length) for n, t in texts.items()}
    if len(found) < 2:
        raise data.DataError(f"{folder} has source text of {len(found)} groups: pass --source with the Lib of a Python")
    return found


def main(argv=None):
    parser = data.arguments(__doc__, Path(__file__).resolve().parent)
    parser.add_argument("--record_len", type=int, default=128, metavar="N", help="bytes of a snippet (default: 128)")
    args = parser.parse_args(argv)
    if args.record_len < 16:
        raise data.DataError(f"--record_len must be at least 16, not {args.record_len}")
    groups = collect(args.source or Path(sysconfig.get_path("stdlib")), args.record_len)
    labels, codec, digest, splits = data.byte_labels(groups), data.BytesCodec(), hashlib.sha256(), {}
    for name in data.SPLITS:
        fewest = min(len(records[name]) for records in groups.values())
        blocks, counts = [], {}
        for group, records in groups.items():
            chosen = records[name][np.arange(fewest) * len(records[name]) // fewest]  # spread over all files
            targets = np.full(chosen.shape, -1)
            targets[:, -1] = labels[group]
            if name == "train":
                targets[:, 15::16] = labels[group]
            blocks.append((chosen, targets))
            counts[group] = fewest
        splits[name] = data.write_records(args.out_dir, name, blocks, codec, digest)
        data.print_labels(name, counts)
    if args.source is None:
        label = f"parts of the stdlib of Python {platform.python_version()}"
    else:
        label = f"parts of the Python library {args.source.resolve().name}"
    source = f"{label}, {len(groups)} groups"
    length = args.record_len
    meta = data.write_meta(args.out_dir, codec, splits, source, digest.hexdigest(), label, length, labels)
    data.print_summary(meta, args.out_dir)


if __name__ == "__main__":
    sys.exit(data.run_prepare(main))
