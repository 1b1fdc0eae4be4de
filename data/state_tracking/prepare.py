"""Prepare state tracking: the sum modulo m of all symbols so far, beside each symbol. With m = 2 it is parity.

    python data/state_tracking/prepare.py                                                   parity
    python data/state_tracking/prepare.py --modulus 5 --out_dir data/state_tracking_5       --dataset=state_tracking_5

A model with a state of fixed size, whose step from token to token is the same everywhere, tells either at any length,
if it can turn its state around. Attention, and states that only shrink, learn the lengths that they see.

train and val are sequences of 3 to 40 symbols of 0 .. m-1, then "-" up to 40, which nothing scores; each symbol is
scored with the sum up to it. test is sequences of 256 symbols, scored from the 41st on: as no symbol sees a later one,
each stands for the sequence that ends with it, so the accuracy is that over the lengths 41 to 256. Everything follows
from --seed (arXiv 2411.12537, section 5.1, has these lengths). Memory: some 30 bytes a token of the largest split.
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

SIZES = {"train": 200_000, "val": 2_000, "test": 1_000}
LARGEST = 5 * 10**7  # tokens of a split


def generate(rng, samples, modulus, shortest, longest, unscored=0):
    """tokens and targets (samples, longest): lengths from `shortest` on, all positions but the first `unscored`."""
    tokens = rng.integers(0, modulus, (samples, longest))
    targets = tokens.cumsum(1) % modulus
    beyond = np.arange(longest) >= rng.integers(shortest, longest + 1, samples)[:, None]
    tokens[beyond], targets[beyond] = modulus, -1
    targets[:, :unscored] = -1
    return tokens, targets


def main(argv=None):
    parser = data.arguments(__doc__, Path(__file__).resolve().parent, source=False)
    parser.add_argument("--modulus", type=int, default=2, metavar="M", help="of the sum (default: 2, parity)")
    parser.add_argument("--shortest", type=int, default=3, metavar="N", help="least length to train on (default: 3)")
    parser.add_argument("--longest", type=int, default=40, metavar="N", help="largest length to train on (default: 40)")
    parser.add_argument("--test_longest", type=int, default=256, metavar="N", help="length of test (default: 256)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all draws (default: 0)")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size, metavar="N", help=f"sequences (default: {size})")
    args = parser.parse_args(argv)
    if not 2 <= args.modulus <= 1000 or args.seed < 0:
        raise data.DataError("--modulus must be 2 to 1000, and --seed at least 0")
    if not 1 <= args.shortest <= args.longest < args.test_longest:
        raise data.DataError(
            "--shortest, --longest and --test_longest must grow, from 1 on: test is of longer sequences"
        )
    codec, digest, splits = data.SymbolsCodec([*map(str, range(args.modulus)), "-"]), hashlib.sha256(), {}
    for number, name in enumerate(data.SPLITS):
        samples, length = getattr(args, name), args.test_longest if name == "test" else args.longest
        if samples < 1 or samples * length > LARGEST:
            raise data.DataError(f"--{name} must be at least 1, and its sequences at most {LARGEST} symbols together")
        rng, test = np.random.default_rng((args.seed, number)), name == "test"
        block = generate(rng, samples, args.modulus, length if test else args.shortest, length, test * args.longest)
        splits[name] = data.write_records(args.out_dir, name, [block], codec, digest) | {"record_len": length}
    label = "parity" if args.modulus == 2 else f"sum modulo {args.modulus}"
    source = f"generated: seed {args.seed}, lengths {args.shortest} to {args.longest}, tested to {args.test_longest}"
    meta = data.write_meta(args.out_dir, codec, splits, source, digest.hexdigest(), label, record_len=args.longest)
    data.print_summary(meta, args.out_dir)


if __name__ == "__main__":
    sys.exit(data.run_prepare(main))
