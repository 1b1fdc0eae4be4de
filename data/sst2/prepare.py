"""Prepare SST-2, sentences of film reviews that are negative or positive, as padded records of bytes.

    python data/sst2/prepare.py                    download with the datasets library
    python data/sst2/prepare.py --source PATH      a folder with {train,validation,test}*.parquet (as on the hub),
                                                   .jsonl or .tsv (as of GLUE, with dev.tsv), here or in data/

A record is a sentence of at most --record_len bytes, cut there if it is longer, padded with byte 0. The answer is
expected at the sentence's last byte: there the target is the label's id, which stands for a byte that no UTF-8 text
has. The published test split keeps its labels secret: it is left out. Memory: a split, about 100 MB.
"""

import collections
import hashlib
import json
import reprlib
import signal
import sys
from pathlib import Path

import numpy as np

# Run as a script, Python looks for modules beside this file, not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":  # Ctrl-C while modules load is no traceback of theirs
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import data

HUB = "stanfordnlp/sst2"
REVISION = "8d51e7e4887a4caaa95b3fbebbf53c0490b58bbb"  # pinned: data of the same name has changed on the hub before
FILES = {"train": ("train",), "val": ("validation", "dev"), "test": ("test",)}
ROWS = {"train": 67349, "val": 872}  # of the complete splits
NAMES = ["negative", "positive"]
MOST, LARGEST = 200_000, 16 * 10**6  # rows of a split, and bytes of its files: the largest are 67,349 and some 7 MB


def rows_of_hub(split):
    """[(text, 0, 1 or -1)] of a split."""
    try:
        import datasets

        rows = list(datasets.load_dataset(HUB, split=FILES[split][0], revision=REVISION))
    except Exception as error:  # datasets lets errors of the network, of the disk and of its own through
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise data.DataError(
            f"cannot get {HUB} from the hub ({reason}): get its data/*.parquet files another way, for instance from a "
            "mirror of the hub, and pass --source PATH"
        ) from None
    return [checked(row, f"{HUB}, {split}, row {i}") for i, row in enumerate(rows, 1)]


def local_files(source):
    """{split: paths} in a folder; a split may be in several files."""
    found = {}
    for split, names in FILES.items():
        for suffix in KINDS:
            paths = [p for name in names for place in ("", "data/") for p in source.glob(f"{place}{name}*{suffix}")]
            if paths and split not in found:
                found[split] = sorted(paths)
    if not found:
        raise data.DataError(f"--source {source} holds no {{train,validation,test}}*.parquet, .jsonl or .tsv")
    return found


def rows_of_files(paths):
    """The same of local files."""
    rows, size = [], 0
    for path in paths:
        for number, row in enumerate(KINDS[path.suffix](path), 1):
            rows.append(checked(row, f"{path}, row {number}"))
            size += len(rows[-1][0])
            if len(rows) > MOST or size > LARGEST:
                raise data.DataError(
                    f"{path} is not SST-2: it has more than {MOST} sentences, or {LARGEST} bytes of text"
                )
    return rows


def rows_of_parquet(path):
    import pyarrow.parquet

    with data.reading(path, "SST-2", LARGEST) as file:
        table = pyarrow.parquet.ParquetFile(file)
        about = table.metadata
        unpacked = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        if about.num_rows > MOST or unpacked > LARGEST:
            raise data.DataError(f"{path} is not SST-2: it has {about.num_rows} rows of {unpacked} bytes")
        columns = [name for name in ("sentence", "label") if name in table.schema_arrow.names]
        for batch in table.iter_batches(batch_size=32, columns=columns):  # a dictionary may hold a long text only once
            yield from batch.to_pylist()


def rows_of_jsonl(path):
    for line in lines(path):
        try:
            yield json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError) as error:
            raise data.DataError(f"{path} is not JSON lines: {error}, in {line[:40]!r}") from None


def rows_of_tsv(path):
    header = None
    for line in lines(path):
        cells = line.split("\t")
        if header is not None:
            yield dict(zip(header, cells))
        header = header or cells


KINDS = {".parquet": rows_of_parquet, ".jsonl": rows_of_jsonl, ".tsv": rows_of_tsv}


def lines(path):
    """The lines of a file that are not blank, as text without their ends."""
    for line in data.lines(data.read(path, "SST-2", LARGEST), path):
        try:
            line = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise data.DataError(f"{path} is not UTF-8 text: {line[:40]!r}") from None
        if line.strip():
            yield line


def checked(row, where):
    """(text, label) of a row: UTF-8 without the whitespace around it; 0 or 1, -1 if it has no label."""
    sentence, label = (row.get("sentence"), row.get("label", -1)) if isinstance(row, dict) else (row, None)
    label = {"-1": -1, "0": 0, "1": 1}.get(label, label) if isinstance(label, str) else label
    text = sentence.strip() if isinstance(sentence, str) else ""
    if not text or not isinstance(label, (int, float)) or label not in (-1, 0, 1):
        found = f"sentence {reprlib.repr(sentence)}, label {reprlib.repr(label)}"
        raise data.DataError(f"{where}: {found}: it must have text, and 0 or 1 (-1 or nothing in test)")
    try:
        return text.encode("utf-8"), int(label)
    except UnicodeEncodeError:
        raise data.DataError(f"{where}: sentence {reprlib.repr(sentence)} holds half a character") from None


def records(rows, length, labels):
    """tokens and targets (n, length) of [(text, label)]."""
    tokens, targets = np.zeros((len(rows), length), np.uint8), np.full((len(rows), length), -1, np.int32)
    for i, (text, label) in enumerate(rows):
        text = text[:length]
        tokens[i, : len(text)] = np.frombuffer(text, np.uint8)
        targets[i, len(text) - 1] = labels[NAMES[label]]
    return tokens, targets


def main(argv=None):
    parser = data.arguments(__doc__, Path(__file__).resolve().parent)
    parser.add_argument("--record_len", type=int, default=256, metavar="N", help="bytes of a record (default: 256)")
    args = parser.parse_args(argv)
    if not 1 <= args.record_len <= 1000:
        raise data.DataError(f"--record_len must be from 1 to 1000, not {args.record_len}")
    if args.source is not None and not args.source.is_dir():
        raise data.DataError(f"--source {args.source} is not a folder")
    local = args.source and local_files(args.source)
    labels, codec, digest, splits, partial = data.byte_labels(NAMES), data.BytesCodec(), hashlib.sha256(), {}, []
    for name in data.SPLITS:
        if local and name not in local:
            continue
        rows = rows_of_files(local[name]) if local else rows_of_hub(name)
        each = collections.Counter(label for _, label in rows)
        if each[-1] == len(rows):
            print(f"note: {name} is left out: it has no labels")
            continue
        if each[-1]:
            where = local[name][0].parent if local else HUB
            raise data.DataError(f"{where}: {each[-1]} of {len(rows)} sentences of {name} have no label")
        block = records(rows, args.record_len, labels)
        splits[name] = data.write_records(args.out_dir, name, [block], codec, digest)
        data.print_labels(name, {label: each[i] for i, label in enumerate(NAMES)})
        if cut := sum(len(text) > args.record_len for text, _ in rows):
            print(f"note: {name}: {cut} of {len(rows)} sentences are cut to {args.record_len} bytes")
        if len(rows) != ROWS.get(name, len(rows)):
            partial.append(f"{name} {len(rows)} of {ROWS[name]} sentences")
    if not splits:
        raise data.DataError(f"no split of {args.source or HUB} has labels")
    if partial and not local:
        raise data.DataError(f"the hub's copy is not complete ({', '.join(partial)}): pass --source PATH")
    label = "SST-2" + (f", {', '.join(partial)}" if partial else "")
    source = f"{HUB}{' from local files' if local else ' at ' + REVISION[:10]}"
    length = args.record_len
    meta = data.write_meta(
        args.out_dir, codec, splits, source, digest.hexdigest(), label, length, labels, stripped=True
    )
    data.print_summary(meta, args.out_dir)


if __name__ == "__main__":
    sys.exit(data.run_prepare(main))
