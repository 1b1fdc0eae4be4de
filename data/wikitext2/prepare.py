"""Prepare WikiText-2, raw or tokenised (with <unk>), as GPT-2 BPE tokens or as bytes.

    python data/wikitext2/prepare.py                             download with the datasets library
    python data/wikitext2/prepare.py --source PATH               a folder or zip with wiki.{train,valid,test}.raw
    python data/wikitext2/prepare.py --variant tokens --codec bytes

A split is the text of its file, every newline kept; words are counted on that text and bytes are its UTF-8 length. A
source may hold only some of the splits. Newlines of a Windows copy (\\r\\n) are read as \\n. The text is encoded
1 MB at a time, in about 30 MB of memory, besides what datasets needs. A file of more than 16 MB is refused: the
largest one has 11. Interrupting and running again is safe.
"""

import hashlib
import signal
import sys
import zipfile
from pathlib import Path

# Run as a script, Python looks for modules beside this file, not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":  # Ctrl-C while modules load is no traceback of theirs
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import data

HUB = "Salesforce/wikitext"
REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"  # pinned: data of the same name has changed on the hub before
CONFIGS = {"raw": "wikitext-2-raw-v1", "tokens": "wikitext-2-v1"}
FILES = {"train": "train", "val": "valid", "test": "test"}
HUB_SPLITS = {"train": "train", "val": "validation", "test": "test"}
LARGEST = 16 * 10**6  # bytes of a file or an archive
WORDS = {"train": 2051910, "val": 213886, "test": 241211}  # of the complete splits; the same in both variants


def lines_of_hub(variant, split):
    """Yield the lines of a split from the hub as bytes, equal to those of the original file."""
    try:
        import datasets

        rows = datasets.load_dataset(HUB, CONFIGS[variant], split=HUB_SPLITS[split], revision=REVISION)
        for row in rows:
            # The hub's copy has an empty string where the original file has a line of one space.
            yield row["text"].encode("utf-8") or b" \n"
    except Exception as error:  # datasets lets errors of the network, of the disk and of its own through
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise data.DataError(
            f"cannot get {HUB} {CONFIGS[variant]} from the hub ({reason}): get wikitext-2-raw-v1.zip or the three "
            f"wiki.*.{variant} files another way, for instance from a mirror of the hub, and pass --source PATH"
        ) from None


class Local:
    """A folder or zip archive that holds wiki.{train,valid,test}.{raw,tokens}, at its top or in one folder below.

    Read without the datasets library, whose text loader would only copy these files through a cache.
    """

    def __init__(self, path, variant):
        self.path = path
        if path.is_dir():
            names = {p.relative_to(path).as_posix() for g in ("wiki.*", "*/wiki.*") for p in path.glob(g)}
        else:
            with data.reading(path, "WikiText-2", LARGEST) as file:
                if file.read(4) != data.ZIP:
                    raise data.DataError(f"--source {path} is neither a folder nor a zip archive of wiki.*.{variant}")
                names = set(zipfile.ZipFile(file).namelist())
        self.files = {}
        for split, name in FILES.items():
            found = sorted((n for n in names if n.rsplit("/", 1)[-1] == f"wiki.{name}.{variant}"), key=len)
            if len(found) > 1 and "/" in found[0]:
                raise data.DataError(f"--source {path} holds {' and '.join(found[:3])}: pass the folder of one of them")
            if found:
                self.files[split] = found[0]
        if not self.files:
            other = "tokens" if variant == "raw" else "raw"
            hint = f", but wiki.*.{other}: add --variant {other}" if any(n.endswith(other) for n in names) else ""
            raise data.DataError(f"--source {path} holds no wiki.{{train,valid,test}}.{variant}{hint}")

    def lines(self, split):
        """Yield the lines of a split as bytes, each with its newline."""
        name, path = self.files[split], self.path
        if path.is_dir():
            path = path / name
            chunks = data.read(path, "WikiText-2", LARGEST)
        else:
            chunks = data.unpack(path, "WikiText-2", LARGEST, lambda names: name)
        for line in data.lines(chunks, path):
            yield line[:-2] + b"\n" if line.endswith(b"\r\n") else line


def pieces(lines, size=data.CHUNK):
    """Join lines into pieces of at least `size` bytes whose ids, one piece after the other, are the ids of the whole.

    GPT-2's pattern splits a run of whitespace before its last character, which it keeps only if that is a space and
    joins to the word that follows. So a cut after a newline changes nothing if the next line begins with one space
    and a visible character; or, where it begins with a visible one, if the newline is alone, without whitespace before.
    Anywhere else (" \\n" before a bare word, blank lines) a cut would turn one token into two, or two into one.
    Only visible ASCII counts as visible here, which can only make pieces longer.
    """
    group, held = [], 0
    for line in lines:
        if held >= size and _may_cut(group[-1], line):
            yield b"".join(group)
            group, held = [], 0
        group.append(line)
        held += len(line)
    if group:
        yield b"".join(group)


def _may_cut(before, after):
    if not before.endswith(b"\n"):
        return False
    if after[:1] == b" ":
        return _visible(after[1:2])
    return _visible(after[:1]) and _visible(before[-2:-1])


def _visible(byte):
    return b"!" <= byte <= b"~"


def main(argv=None):
    parser = data.arguments(__doc__, Path(__file__).resolve().parent)
    parser.add_argument("--variant", choices=CONFIGS, default="raw", help="raw text (default), or tokenised with <unk>")
    parser.add_argument("--codec", choices=("gpt2", "bytes"), default="gpt2", help="GPT-2 BPE (default) or bytes")
    args = parser.parse_args(argv)
    if args.source is not None and not args.source.exists():
        raise data.DataError(f"--source {args.source} does not exist")
    codec = data.get_codec({"codec": args.codec})
    codec.encode("a")  # a missing BPE file shows before a download does
    local = args.source and Local(args.source, args.variant)
    digest, splits = hashlib.sha256(), {}
    for name in data.SPLITS:
        if local and name not in local.files:
            continue
        lines = local.lines(name) if local else lines_of_hub(args.variant, name)
        source = args.source / local.files[name] if local else HUB
        splits[name] = data.write_split(args.out_dir, name, pieces(lines), codec, digest, source=source)
        if not local and splits[name]["words"] != WORDS[name]:
            raise data.DataError(
                f"the hub's {name} split has {splits[name]['words']} words, not {WORDS[name]}: it is damaged or has "
                "changed, get the original files and pass --source PATH"
            )
    label = "WikiText-2 raw" if args.variant == "raw" else "WikiText-2 tokens"
    if "train" not in splits:
        label += ", no train"
    elif splits["train"]["words"] != WORDS["train"]:
        label += f", {data.size_label(splits['train']['bytes'])} of train"
    partial = [f"{n} {splits[n]['words']} of {WORDS[n]} words" for n in splits if splits[n]["words"] != WORDS[n]]
    source = f"{HUB} {CONFIGS[args.variant]}{' from local files' if local else ' at ' + REVISION[:10]}"
    if partial:
        source += f" ({', '.join(partial)})"
        print(f"note: not the complete WikiText-2: {', '.join(partial)}")
    data.print_summary(data.write_meta(args.out_dir, codec, splits, source, digest.hexdigest(), label), args.out_dir)


if __name__ == "__main__":
    sys.exit(data.run_prepare(main))
