"""Prepare SST-2, sentences of film reviews that are negative or positive, as padded records of bytes.

    python data/sst2/prepare.py                    download with the datasets library
    python data/sst2/prepare.py --source PATH      a folder with {train,validation,test}*.parquet (as on the hub),
                                                   .jsonl or .tsv (as of GLUE, with dev.tsv), here or in data/

A record is a sentence of at most --record_len bytes, cut there if it is longer, padded with byte 0. The answer is
expected at the sentence's last byte: there the target is the label's id, which stands for a byte that no UTF-8 text
has. The published test split keeps its labels secret: it is left out. Memory: a split, about 100 MB.
"""

import csv
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

# Run as a script, Python looks for modules beside this file, not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data

HUB = "stanfordnlp/sst2"
REVISION = "8d51e7e4887a4caaa95b3fbebbf53c0490b58bbb"  # pinned: data of the same name has changed on the hub before
FILES = {"train": ("train",), "val": ("validation", "dev"), "test": ("test",)}
ROWS = {"train": 67349, "val": 872}  # of the complete splits
NAMES = ["negative", "positive"]


def rows_of_hub(split):
    """[(sentence, 0, 1 or -1)] of a split."""
    try:
        import datasets

        rows = datasets.load_dataset(HUB, split=FILES[split][0], revision=REVISION)
        return [(row["sentence"], row["label"]) for row in rows]
    except Exception as error:  # datasets lets errors of the network, of the disk and of its own through
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise data.DataError(
            f"cannot get {HUB} from the hub ({reason}): get its data/*.parquet files another way, for instance from a "
            "mirror of the hub, and pass --source PATH"
        ) from None


def local_files(source):
    """{split: paths} in a folder; a split may be in several files."""
    found = {}
    for split, names in FILES.items():
        for suffix in (".parquet", ".jsonl", ".tsv"):
            paths = [p for name in names for place in ("", "data/") for p in source.glob(f"{place}{name}*{suffix}")]
            if paths and split not in found:
                found[split] = sorted(paths)
    if not found:
        raise data.DataError(f"--source {source} holds no {{train,validation,test}}*.parquet, .jsonl or .tsv")
    return found


def rows_of_files(paths):
    """The same of local files."""
    rows = []
    for path in paths:
        try:
            if path.suffix == ".parquet":
                import pyarrow.parquet

                table = pyarrow.parquet.read_table(path, columns=["sentence", "label"]).to_pylist()
            elif path.suffix == ".jsonl":
                table = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            else:
                with open(path, encoding="utf-8", newline="") as file:
                    table = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
            rows += [(row["sentence"], int(row.get("label", -1))) for row in table]
        except (KeyError, TypeError, ValueError, OSError) as error:  # pyarrow's errors are ValueErrors and OSErrors
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
            raise data.DataError(f"{path} is not a table of sentence and label ({reason})") from None
    return rows


def records(rows, length, labels):
    """tokens and targets (n, length) of [(sentence, label)], and how many sentences were cut."""
    tokens, targets, cut = np.zeros((len(rows), length), np.uint8), np.full((len(rows), length), -1), 0
    for i, (sentence, label) in enumerate(rows):
        text = sentence.strip().encode("utf-8")
        if not text or label not in (0, 1):
            raise data.DataError(f"sentence {i + 1} ({sentence[:40]!r}) has label {label}, or no text: neither 0 nor 1")
        cut += len(text) > length
        text = text[:length]
        tokens[i, : len(text)] = np.frombuffer(text, np.uint8)
        targets[i, len(text) - 1] = labels[NAMES[label]]
    return tokens, targets, cut


def main(argv=None):
    parser = data.arguments(__doc__, Path(__file__).resolve().parent)
    parser.add_argument("--record_len", type=int, default=256, metavar="N", help="bytes of a record (default: 256)")
    args = parser.parse_args(argv)
    if args.record_len < 1:
        raise data.DataError(f"--record_len must be at least 1, not {args.record_len}")
    if args.source is not None and not args.source.is_dir():
        raise data.DataError(f"--source {args.source} is not a folder")
    local = args.source and local_files(args.source)
    labels, codec, digest, splits, partial = data.byte_labels(NAMES), data.BytesCodec(), hashlib.sha256(), {}, []
    for name in data.SPLITS:
        if local and name not in local:
            continue
        rows = rows_of_files(local[name]) if local else rows_of_hub(name)
        if all(label == -1 for _, label in rows):
            print(f"note: {name} is left out: it has no labels")
            continue
        tokens, targets, cut = records(rows, args.record_len, labels)
        splits[name] = data.write_records(args.out_dir, name, [(tokens, targets)], codec, digest)
        data.print_labels(name, {label: int((targets == i).sum()) for label, i in labels.items()})
        if cut:
            print(f"note: {name}: {cut} of {len(rows)} sentences are cut to {args.record_len} bytes")
        if len(rows) != ROWS.get(name, len(rows)):
            partial.append(f"{name} {len(rows)} of {ROWS[name]} sentences")
    if not splits:
        raise data.DataError("no split has labels")
    if partial and not local:
        raise data.DataError(f"the hub's copy is not complete ({', '.join(partial)}): pass --source PATH")
    label = "SST-2" + (f", {', '.join(partial)}" if partial else "")
    source = f"{HUB}{' from local files' if local else ' at ' + REVISION[:10]}"
    length = args.record_len
    meta = data.write_meta(args.out_dir, codec, splits, source, digest.hexdigest(), label, length, labels)
    data.print_summary(meta, args.out_dir)


if __name__ == "__main__":
    sys.exit(data.run_prepare(main))
