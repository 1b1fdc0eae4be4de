"""Prepare the source text of the running Python's standard library: about 12 MB of real text, no download.

    python data/stdlib/prepare.py                     this Python's library
    python data/stdlib/prepare.py --source FOLDER     another folder of Python source text

Whole files are dealt out, about 90/5/5, by a checksum of their path, so that a file keeps its split from version to
version. The text is raw bytes with newlines as \\n; files come in the order of their paths. Memory: a few times the
largest file, which has 1 MB; one of more than 16 MB is refused. Interrupting and running again is safe.
"""

import hashlib
import os
import platform
import signal
import sys
import sysconfig
from pathlib import Path

# Run as a script, Python looks for modules beside this file, not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":  # Ctrl-C while modules load is no traceback of theirs
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import data

# Tests are left out: they are 19 MB, more than the library itself (12 MB), and Linux distributions ship Python without
# them, so that "the standard library" would mean different things on different machines.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
# Written when Python was built or installed: they hold paths of that machine.
SKIPPED_FILES = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize")
LARGEST = 16 * 10**6


def find(folder):
    """The (posix path relative to folder, path) of each source file, sorted by the former."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        for name in files:
            if name.endswith(".py") and not name.startswith(SKIPPED_FILES):
                path = Path(root, name)
                found.append((path.relative_to(folder).as_posix(), path))
    return sorted(found)


def split_of(name):
    """train, val or test, by the file's relative path alone."""
    return data.deal(name.encode("utf-8", errors="surrogateescape"))


def read(paths):
    """Yield the bytes of each file, UTF-8 or not, ended by a newline."""
    for path in paths:
        # Python's installer for Windows writes \r\n; without this the same version would be other data there.
        text = b"".join(data.read(path, "Python source text", LARGEST)).replace(b"\r\n", b"\n")
        if text:
            yield text if text.endswith(b"\n") else text + b"\n"


def main(argv=None):
    args = data.arguments(__doc__, Path(__file__).resolve().parent).parse_args(argv)
    folder = args.source or Path(sysconfig.get_path("stdlib"))
    files = find(folder)
    if not files:
        raise data.DataError(f"no Python source text in {folder}: pass --source with the Lib folder of a Python")
    codec, digest, splits = data.BytesCodec(), hashlib.sha256(), {}
    for name in data.SPLITS:
        paths = [path for relative, path in files if split_of(relative) == name]
        splits[name] = data.write_split(args.out_dir, name, read(paths), codec, digest, source=folder)
    if args.source is None:
        label = f"stdlib of Python {platform.python_version()}"
    else:
        label = f"Python source text of {folder.resolve().name}"
    source = f"{label}, {len(files)} files"
    data.print_summary(data.write_meta(args.out_dir, codec, splits, source, digest.hexdigest(), label), args.out_dir)


if __name__ == "__main__":
    sys.exit(data.run_prepare(main))
