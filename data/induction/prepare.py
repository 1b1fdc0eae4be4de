"""Prepare induction heads (arXiv 2212.14052; lengths of arXiv 2312.00752, table 11): what followed the special token?

    python data/induction/prepare.py                       256 tokens to train on, tested at 64 to 4,096
    python data/induction/prepare.py --test 256,16384      and then --block_size=16384

A record is random tokens of a small vocabulary. Its last token is the special one, which also stands once before: the
answer, scored at the last position alone, is the token that followed it there. Everything follows from --seed.
Memory: some 300 MB.
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

SIZES = {"train": 100_000, "val": 1_000, "test": 500}
LARGEST = 10**8  # tokens of a split
BLOCK = 2**22  # tokens at once


def generate(rng, samples, length, vocabulary):
    """tokens and targets, (samples, length) each; the special token is the last of the vocabulary."""
    rows, special = np.arange(samples), vocabulary - 1
    tokens, targets = rng.integers(0, special, (samples, length)), np.full((samples, length), -1)
    place = rng.integers(0, length - 2, samples)
    tokens[rows, place] = tokens[:, -1] = special
    targets[:, -1] = tokens[rows, place + 1]
    return tokens, targets


def blocks(rng, records, lengths, vocabulary):
    """Yield (tokens, targets), some records of a length at a time, and beside them the name of the part."""
    for length in lengths:
        step = max(1, BLOCK // length)
        for first in range(0, records, step):
            yield generate(rng, min(step, records - first), length, vocabulary), f"{length:,} tokens"


def main(argv=None):
    parser = data.arguments(__doc__, Path(__file__).resolve().parent, source=False)
    parser.add_argument("--vocabulary", type=int, default=16, metavar="N", help="the special one too (default: 16)")
    parser.add_argument("--length", type=int, default=256, metavar="T", help="tokens to train on (default: 256)")
    parser.add_argument("--test", default="64,128,256,512,1024,2048,4096", metavar="T,...", help="lengths of test")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all draws (default: 0)")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}_records", type=int, default=size, metavar="N", help=f"(default: {size})")
    args = parser.parse_args(argv)
    try:
        tested = sorted({int(n) for n in args.test.split(",")})
    except ValueError:
        raise data.DataError(f"--test={args.test}: write lengths, several with commas") from None
    if not 3 <= args.vocabulary <= 65536 or args.seed < 0 or min(args.length, *tested) < 3:
        raise data.DataError("--vocabulary must be 3 to 65536, lengths at least 3, and --seed at least 0")
    codec = data.SymbolsCodec([*map(str, range(args.vocabulary - 1)), "?"])
    digest, splits = hashlib.sha256(), {}
    for number, name in enumerate(data.SPLITS):
        records, lengths = getattr(args, f"{name}_records"), tested if name == "test" else [args.length]
        if records < 1 or records * sum(lengths) > LARGEST:
            raise data.DataError(f"--{name}_records must be at least 1, and at most {LARGEST} tokens together")
        made = blocks(np.random.default_rng((args.seed, number)), records, lengths, args.vocabulary)
        splits[name] = data.write_records(args.out_dir, name, made, codec, digest, named=True)
    source = f"generated: seed {args.seed}, vocabulary {args.vocabulary}"
    label = f"induction heads, {args.length} tokens"
    meta = data.write_meta(args.out_dir, codec, splits, source, digest.hexdigest(), label, record_len=args.length)
    data.print_summary(meta, args.out_dir)


if __name__ == "__main__":
    sys.exit(data.run_prepare(main))
