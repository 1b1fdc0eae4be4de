"""Run the ```bash commands of the README and of docs/ as written, with sizes added that make each take seconds, and the
```python blocks that begin with an import, in a copy of the tree. One that begins with `# NAME.py` is written there.

Data sets that a user downloads are prepared from small local text. Blocks marked ```shell need a network, hours or a
choice, and are not run.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = (
    "n_layer=1 n_head=2 n_embd=32 block_size=32 batch_size=2 max_iters=4 lr_decay_iters=4 eval_iters=1 eval_interval=2"
)
RECORDS = ("skip_trigrams", "parity", "mqar")
SHAPE = ["--n_layer", "--n_head", "--n_embd", "--block_size"]
SMALL = {  # what each script is given on top of the README's own arguments
    "train.py": TINY.split() + ["log_interval=1", "device=cpu", "eval_batch_size=512"],
    "compare.py": TINY.split() + ["log_interval=1", "device=cpu", "eval_batch_size=512"],
    "sample.py": ["max_new_tokens=20", "device=cpu"],
    "data/classify_stdlib/prepare.py": ["record_len=32"],
    "data/mqar/prepare.py": ["train=64x4x200,64x8x200", "val=64x4x20", "test=128x8x20"],
    "bench.py": ["device=cpu", "lengths=16,64", "rounds=2", "seconds=0.05"],
}


def shown(command, folder):
    print("+", shlex.join(command), flush=True)
    start = time.monotonic()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    print(f"  {time.monotonic() - start:.0f} s", flush=True)


def prepare_small_data(folder):
    """What enwik8 and WikiText-2 are, in small: the text of some of Python's own modules."""
    modules = sorted(pathlib.Path(os.__file__).parent.glob("[a-d]*.py"))
    text = b"<mediawiki>\n" + b"".join(p.read_bytes() for p in modules)[:300_000]
    source = folder / "source"
    source.mkdir()
    (source / "enwik8").write_bytes(text)
    for split, part in (("train", text[:200_000]), ("valid", text[200_000:250_000]), ("test", text[250_000:])):
        (source / f"wiki.{split}.raw").write_text(part.decode("utf-8", "ignore"), encoding="utf-8")
    shown([sys.executable, "data/stdlib/prepare.py"], folder)
    shown([sys.executable, "data/enwik8/prepare.py", "--source", "source/enwik8"], folder)
    shown([sys.executable, "data/wikitext2/prepare.py", "--source", "source", "--codec", "bytes"], folder)


def run_block(language, block, folder):
    """Run one block, or write the file that it names; the number of its commands."""
    if name := re.match(r"# (\w+\.py)\n", block):
        (folder / name[1]).write_text(block, encoding="utf-8")
        return 0
    if language == "python":
        shown([sys.executable, "-c", block], folder)
        return 1
    lines = block.replace("\\\n", "").strip().splitlines()
    for line in lines:
        words = shlex.split(line, comments=True)
        script = next(word for word in words if word.endswith(".py"))
        given = [word.split("=")[0] for word in words]
        given += SHAPE if any(name in line for name in RECORDS) else []  # the data decide it
        extra = [f"--{key}" for key in SMALL.get(script, []) if f"--{key.split('=')[0]}" not in given]
        if words[0] == "python":
            words[0] = sys.executable
        elif words[0] == "torchrun":
            words[:1] = [sys.executable, "-m", "torch.distributed.run"]
        shown(words + extra, folder)
    return len(lines)


def main():
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "copy"
        built = shutil.ignore_patterns(".venv", ".git", "out", "*.bin", "meta.json", "__pycache__")
        shutil.copytree(ROOT, folder, ignore=built)
        prepare_small_data(folder)
        for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
            text = page.read_text(encoding="utf-8")
            blocks = re.findall(r"```(bash|python)\n(.*?)```", text, re.S)
            runs = [b for b in blocks if b[0] == "bash" or b[1].startswith(("import", "# "))]
            n = sum(run_block(*block, folder) for block in runs)
            print(f"{n} commands of {page.name} ran", flush=True)


if __name__ == "__main__":
    main()
