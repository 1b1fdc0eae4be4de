"""Prepare associative recall of many keys (MQAR, arXiv 2312.04927): which value stood beside this key?

    python data/mqar/prepare.py                                              4 to 16 pairs to train on, tested to 32
    python data/mqar/prepare.py --vocabulary 8192 --filler any --out_dir data/mqar_published \\
      --train 64x4x100000,128x8x20000,256x16x20000,256x32x20000,256x64x20000 --val ... --test ...

A record of T tokens begins with N keys, each followed by its value. Then each key comes once again, and is scored there
with its value: nothing else is scored. Keys are the lower half of the vocabulary, values the upper; within a record no
key comes twice among the pairs, and no value. The places where keys come again are every second one after the pairs,
drawn without replacement with a probability of x^(power - 1) for the x-th: most come soon. The places between hold
tokens that are no keys of the record or, with --filler any, as published, any tokens.

A split is TxNxRECORDS, several with commas, each of which is trained on in batches of its own and scored by itself. An
associative memory of fixed size loses the more, the more pairs there are; attention loses nothing. Everything follows
from --seed. Memory: some 100 MB.
"""

import hashlib
import signal
import sys
from pathlib import Path

import numpy as np

# Run as a script, Python looks for modules beside this file, not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":  # Ctrl-C while modules load is no traceback of theirs
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import data

SIZES = {
    "train": "64x4x100000,64x8x100000,64x16x100000",
    "val": "64x4x1000,64x8x1000,64x16x1000",
    "test": "64x4x1000,64x8x1000,64x16x1000,128x16x1000,128x32x1000,256x32x1000",
}
LARGEST = 10**8  # tokens of a split
BLOCK = 2**22  # random numbers at once


def draw(rng, n, count, among):
    """n rows of `count` different numbers below `among`, in random order."""
    return rng.random((n, among)).argpartition(count - 1, 1)[:, :count].astype(np.int64)


def generate(rng, samples, length, pairs, vocabulary, power, any_filler):
    """tokens and targets, (samples, length) each."""
    half, rows = vocabulary // 2, np.arange(samples)[:, None]
    keys, values = (rng.permuted(draw(rng, samples, pairs, half), axis=1) + at for at in (0, half))
    tokens = rng.integers(0, vocabulary if any_filler else vocabulary - pairs, (samples, length))
    if not any_filler:  # the r-th token that is no key: one more for each key below it, in ascending order
        for key in np.sort(keys, 1).T:
            tokens += tokens >= key[:, None]
    tokens[:, : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    places = (length - 2 * pairs) // 2
    weight = np.arange(1, places + 1) ** (power - 1.0)
    drawn = (rng.exponential(size=(samples, places)) / weight).argsort(1)[:, :pairs]  # one by one, without replacement
    again = 2 * pairs + 2 * drawn
    targets = np.full((samples, length), -1)
    tokens[rows, again], targets[rows, again] = keys, values
    return tokens, targets


def read_sizes(name, text, vocabulary):
    """[(T, N, records), ...] of an option."""
    try:
        sizes = [tuple(int(n) for n in size.split("x")) for size in text.split(",")]
        if any(len(size) != 3 or min(size) < 1 for size in sizes):
            raise ValueError
    except ValueError:
        raise data.DataError(f"--{name}={text}: write TxNxRECORDS, several with commas, as 64x4x1000") from None
    for length, pairs, _ in sizes:
        if 4 * pairs > length or length % 2:
            raise data.DataError(f"--{name}: {pairs} pairs need an even T of {4 * pairs} or more, not {length}")
        if pairs > vocabulary // 2:
            raise data.DataError(f"--{name}: {pairs} pairs need a vocabulary of {2 * pairs} or more, not {vocabulary}")
    if len({size[:2] for size in sizes}) < len(sizes):
        raise data.DataError(f"--{name}={text}: a size is there twice")
    if sum(length * records for length, _, records in sizes) > LARGEST:
        raise data.DataError(f"--{name}: its records must be at most {LARGEST} tokens together")
    return sizes


def blocks(rng, sizes, args):
    """Yield (tokens, targets), some records of a size at a time, and beside them its name."""
    for length, pairs, records in sizes:
        step = max(1, BLOCK // max(args.vocabulary, length))
        for first in range(0, records, step):
            n = min(step, records - first)
            how = (args.vocabulary, args.power, args.filler == "any")
            yield generate(rng, n, length, pairs, *how), f"{pairs} pairs in {length}"


def main(argv=None):
    parser = data.arguments(__doc__, Path(__file__).resolve().parent, source=False)
    parser.add_argument("--vocabulary", type=int, default=256, metavar="N", help="keys and values (default: 256)")
    parser.add_argument("--power", type=float, default=0.01, metavar="A", help="of the gaps (default: 0.01)")
    parser.add_argument(
        "--filler", choices=("others", "any"), default="others", help="tokens between (default: others)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all draws (default: 0)")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", default=size, metavar="TxNxRECORDS,...", help=f"(default: {size})")
    args = parser.parse_args(argv)
    if not 4 <= args.vocabulary <= 65536 or args.vocabulary % 2 or args.seed < 0:
        raise data.DataError("--vocabulary must be even, 4 to 65536, and --seed at least 0")
    if not 0 <= args.power <= 100:
        raise data.DataError("--power must be 0 to 100: 1 draws all gaps alike, 0 most of them short")
    sizes = {name: read_sizes(name, getattr(args, name), args.vocabulary) for name in data.SPLITS}
    codec, digest, splits = data.SymbolsCodec(map(str, range(args.vocabulary))), hashlib.sha256(), {}
    for number, name in enumerate(data.SPLITS):
        made = blocks(np.random.default_rng((args.seed, number)), sizes[name], args)
        splits[name] = data.write_records(args.out_dir, name, made, codec, digest, named=True)
    source = f"generated: seed {args.seed}, vocabulary {args.vocabulary}, power {args.power:g}, filler {args.filler}"
    longest, label = splits["train"]["record_len"], "recall of " + ", ".join(str(n) for _, n, _ in sizes["train"])
    meta = data.write_meta(
        args.out_dir, codec, splits, source, digest.hexdigest(), label + " pairs", record_len=longest
    )
    data.print_summary(meta, args.out_dir)


if __name__ == "__main__":
    sys.exit(data.run_prepare(main))
