"""Prepare OV-incoherent skip trigrams "A ... B -> C": a toy task that wants one attention head a trigram.

    python data/skip_trigrams/prepare.py                                               five trigrams
    python data/skip_trigrams/prepare.py --trigrams 3 --out_dir data/skip_trigrams_3   three: --dataset=skip_trigrams_3

A sequence is BOS and then random symbols of A, B1..Bn, C1..Cn, BOS, with one rule: the first B after an A is followed
by its own C, and no second A comes before that B. Which C to write depends on the B that attends, while the A that it
attends to is the same for all: one head with a fixed value and output cannot write different Cs.

train and val score every position with the symbol that comes next, as the task is published; test scores only the Bs of
trigrams, with their Cs, so that its accuracy is the share of trigrams that a model knows. A trigram whose B comes last
is scored nowhere. Everything follows from --seed. Memory: some 100 bytes a token of the largest split.
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

SIZES = {"train": 100_000, "val": 10_000, "test": 100_000}
LARGEST = 5 * 10**7  # tokens of a split
LEAST = {"train": 1000, "val": 100, "test": 100}  # scored trigrams of each B


def symbols(trigrams):
    """A is 0, the Bs 1 .. n, the C of b is b + n, BOS 2n + 1."""
    numbers = range(1, trigrams + 1)
    return ["A", *(f"B{i}" for i in numbers), *(f"C{i}" for i in numbers), "BOS"]


def generate(rng, samples, trigrams, positions):
    """tokens (samples, positions), and of the same shape `found`: b where the B of a trigram stands, else 0."""
    vocab_size = 2 * trigrams + 2
    tokens = np.full((samples, positions), vocab_size - 1)
    found = np.zeros_like(tokens)
    pending = forced = np.zeros(samples, dtype=bool)  # an A waits for its B; the next symbol is a C
    for p in range(1, positions):
        token = rng.integers(pending, vocab_size, samples)  # while an A waits, no second one
        token[forced] = tokens[forced, p - 1] + trigrams
        pending = pending | (token == 0)
        forced = pending & (token >= 1) & (token <= trigrams)
        pending = pending & ~forced
        found[forced, p] = token[forced]
        tokens[:, p] = token
    return tokens, found


def check(name, tokens, found, trigrams):
    """The validity tests of the published task; each failure is one line."""
    inner = found[:, :-1]
    counts, last = (np.bincount(f[f > 0], minlength=trigrams + 1)[1:] for f in (inner, found[:, -1]))
    rows, places = np.nonzero(inner)
    b = inner[rows, places]
    if not (tokens[rows, places] == b).all() or not (tokens[rows, places + 1] == b + trigrams).all():
        raise data.DataError(f"{name}: a trigram's B is not followed by its C: the generator is broken")
    if counts.min() < LEAST[name]:
        raise data.DataError(
            f"{name}: B{counts.argmin() + 1} has {counts.min()} scored trigrams, fewer than {LEAST[name]}: "
            f"raise --{name}, or take fewer --trigrams or more --positions"
        )
    if last.max() > counts.min() / 2:
        raise data.DataError(
            f"{name}: B{last.argmax() + 1} comes last in {last.max()} trigrams, more than half of the "
            f"{counts.min()} scored ones that the rarest B has: take more --positions"
        )
    frequency = np.bincount(tokens[:, 1:].ravel(), minlength=2 * trigrams + 2)[1:]
    ratio = frequency / frequency.mean()
    if ratio.max() > 1.5 or ratio.min() < 1 / 1.5:
        worst = symbols(trigrams)[1 + (ratio.argmax() if ratio.max() > 1.5 else ratio.argmin())]
        raise data.DataError(f"{name}: {worst} is not within 1.5 times the mean frequency: raise --{name}")


def targets(name, tokens, found, trigrams):
    """(samples, positions): the next symbol everywhere, or in test the C of each trigram; -1 in the last position."""
    wanted = tokens[:, 1:] if name != "test" else np.where(found > 0, found + trigrams, -1)[:, :-1]
    return np.pad(wanted, ((0, 0), (0, 1)), constant_values=-1)


def main(argv=None):
    parser = data.arguments(__doc__, Path(__file__).resolve().parent, source=False)
    parser.add_argument("--trigrams", type=int, default=5, metavar="N", help="pairs of a B and a C (default: 5)")
    parser.add_argument("--positions", type=int, default=11, metavar="N", help="length, BOS included (default: 11)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all draws (default: 0)")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size, metavar="N", help=f"sequences (default: {size})")
    args = parser.parse_args(argv)
    if args.trigrams < 1 or args.positions < 4 or args.seed < 0:
        raise data.DataError("--trigrams must be at least 1, --positions 4 (BOS A B C) and --seed 0")
    if args.trigrams > 30_000:
        raise data.DataError(f"--trigrams must be at most 30000, not {args.trigrams}: ids have 16 bits")
    codec, digest, splits = data.SymbolsCodec(symbols(args.trigrams)), hashlib.sha256(), {}
    for number, name in enumerate(data.SPLITS):
        samples = getattr(args, name)
        if samples < 1:
            raise data.DataError(f"--{name} must be at least 1")
        if samples * args.positions > LARGEST:
            raise data.DataError(
                f"--{name} sequences of --positions symbols must be at most {LARGEST} symbols together"
            )
        rng = np.random.default_rng((args.seed, number))
        tokens, found = generate(rng, samples, args.trigrams, args.positions)
        check(name, tokens, found, args.trigrams)
        block = tokens, targets(name, tokens, found, args.trigrams)
        splits[name] = data.write_records(args.out_dir, name, [block], codec, digest)
        per = [(np.count_nonzero(found, 1) == k).mean() for k in range(3)]
        print(
            f"{name}: " + ", ".join(f"{100 * share:.1f} % with {k}" for k, share in enumerate(per)) + " trigrams; ",
            end="",
        )
        ends, all_found = np.count_nonzero(found[:, -1]), np.count_nonzero(found)
        print(f"{100 * ends / all_found:.1f} % of trigrams end at the last position; ", end="")
        print(f"{1000 * (all_found - ends) / samples / args.trigrams:.1f} scored ones a B in 1,000 sequences")
    label = f"OV-incoherent skip trigrams, n={args.trigrams}"
    source = f"generated: seed {args.seed}, {args.positions} positions"
    meta = data.write_meta(args.out_dir, codec, splits, source, digest.hexdigest(), label, record_len=args.positions)
    data.print_summary(meta, args.out_dir)


if __name__ == "__main__":
    sys.exit(data.run_prepare(main))
