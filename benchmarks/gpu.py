"""make gpu PART=N runs python bench.py --what=gpu --part=N: is all of it right on a GPU, is it fast, does it learn?

    1  every operator and type against float64, forward and gradients; the tests marked gpu; compute-sanitizer
    2  operators beside PyTorch's attention and flash-linear-attention, replayed as CUDA graphs
    3  whole training steps of each type at the size of config/train_enwik8.py, and decoding
    4  each type trained by config/train_enwik8_small.py: bits per byte

On a CPU the same with tiny sizes: that shows that a part runs before a machine is borrowed for it. A row that fails, or
that --limit seconds cut, is noted and the others go on; the exit status is 1 after that and after an error above its
bound. `make gpu-table` writes the section of docs/results.md from docs/gpu-1.json to docs/gpu-4.json.
"""

import concurrent.futures
import contextlib
import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import torch

import config
from benchmarks.clocks import first_calls, interleaved, peak_memory
from benchmarks.gpu_checks import ROOT, TYPES, checks, errors
from benchmarks.layers import of_type
from benchmarks.operators import OPERATORS, operators_at, parse_shapes
from benchmarks.quality import bench_quality
from benchmarks.steps import our_run
from benchmarks.tables import Table
from config import ConfigError
from model import GPT, GPTConfig
from train import TrainConfig
from weights import read_checkpoint

TIMED = {  # B x T x H x K x V
    "cpu": "1x64x2x16x16",
    "cuda": "8x1024x8x64x64,4x4096x8x64x64,1x32768x8x64x64,4x4096x16x128x128,1x32768x16x128x128,32x1024x6x64x128",
}


class Rows:
    """Runs one row after the other, each as a context. An error of a row is noted; so is that the limit ended it, which
    a signal does, also in the middle of an hour of tuning."""

    def __init__(self, bench, report):
        self.end, self.report, self.failed = time.perf_counter() + bench.limit, report, False
        signal.signal(signal.SIGALRM, self.stop)

    def left(self):
        return max(0.001, self.end - time.perf_counter())

    def stop(self, *_):
        raise TimeoutError("the time limit")

    @contextlib.contextmanager
    def row(self, name):
        try:
            signal.setitimer(signal.ITIMER_REAL, self.left())
            yield
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            self.fail(f"{name} failed: {type(error).__name__}: {text}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.report.write(quiet=True)

    def fail(self, text):
        self.failed = True
        self.report.note(text)


def bench_gpu(bench, runtime, report):
    if runtime.device_type not in TIMED:
        raise ConfigError(f"--what=gpu runs on cuda, and on a cpu to be tried out, not on {runtime.device_type}")
    rows = Rows(bench, report)
    (checks, operators, steps, quality)[bench.part - 1](bench, runtime, report, rows)
    if rows.failed:
        raise ConfigError("some rows failed or were left out: see above")


# part 2


def operators(bench, runtime, report, rows):
    columns = "operator, B x T x H x K x V, forward (ms), forward + backward (ms), of softmax (ratio), ns/token, "
    columns += "of the matmul peak (share), peak memory (MiB)"
    peers = runtime.device_type == "cuda" and importlib.util.find_spec("fla") is not None
    shapes, ours = parse_shapes(TIMED[runtime.device_type]), [name for name in OPERATORS if name != "softmax"]
    wanted = [(False, shape, name) for shape in shapes for name in ours]
    wanted += [(True, shape, name) for shape in shapes for name in ("gla", "gsa") if peers]  # last: they tune for long
    title = f"operators: 64 slots, 256 features, {bench.rounds} rounds; memory beyond the inputs, forward + backward"
    with report.table("ops", title, columns, keys=2) as table:
        for bench.peers, shape, name in wanted:
            bench.check = shape == shapes[0]  # against the oracle: seconds each
            known = [(row["operator"], row["B x T x H x K x V"]) for row in table.rows]
            with rows.row(f"{name} {'x'.join(map(str, shape))}{' and its peer' if bench.peers else ''}"):
                operators_at(shape, ["softmax", name], bench, runtime, report, table)
            new = [row for row in table.rows[len(known) :] if (row["operator"], row["B x T x H x K x V"]) not in known]
            table.rows[len(known) :] = new


# part 3


def steps(bench, runtime, report, rows):
    """Types one by one, each beside softmax in the same rounds; then compiled, as train.py runs them on CUDA."""
    cuda, paths = runtime.device_type == "cuda", [os.path.join(ROOT, "config", "train_enwik8.py")]
    c, cfg = config.load(paths, GPTConfig, TrainConfig)[:2]
    tiny = {} if cuda else dict(n_layer=1, n_head=2, n_embd=32, block_size=64)
    cfg = TrainConfig(batch_size=cfg.batch_size if cuda else 2, learning_rate=1e-4, min_lr=1e-5)
    columns = "attention, compiled, parameters (count), step (ms), of softmax (ratio), tokens/s, "
    columns += "of the matmul peak (share), peak memory (MiB), decoding (tokens/s)"
    title = f"whole training steps of config/train_enwik8.py, {bench.rounds} rounds; decoding: {bench.tokens} tokens"
    with report.table("steps", title, columns, keys=2) as table, tempfile.TemporaryDirectory() as folder:
        for compiled in (False, True) if cuda else (False,):
            place = config.Runtime(runtime.device, runtime.dtype, compiled, runtime.why)

            def make(name, place=place):
                model = GPT(of_type(vars(c) | dict(vocab_size=256) | tiny, name))
                run = our_run(model, cfg, place, folder)
                return run.step, run.model

            reference = make("softmax")[0]
            for name in TYPES:
                label = f"{name}{', compiled' if compiled else ''}"
                with rows.row(label):
                    time_steps(label, make(name), reference, cfg, bench, place, report, table)


def time_steps(name, ours, reference, cfg, bench, runtime, report, table):
    step, model = ours
    T = model.config.block_size
    first_calls({name: step}, "compiling", report)
    reference()
    memory = peak_memory(step, runtime.device_type)
    calls = {"softmax": reference, name: step}
    times = interleaved(calls, bench.rounds, bench.seconds, runtime, name)
    decoding = None
    if not runtime.compile:
        model.eval()
        generate = functools.partial(model.generate, torch.zeros(1, 1, dtype=torch.long, device=runtime.device))
        with torch.inference_mode(), runtime.autocast():
            generate(5)
            start = time.perf_counter()
            generate(min(bench.tokens, T - 1))[0, -1].item()
            decoding = min(bench.tokens, T - 1) / (time.perf_counter() - start)
    share = report.share_of_peak(cfg.batch_size * model.flops(T)[1], times[name])
    ratio = [a / b for a, b in zip(times[name], times["softmax"])]
    rates = [cfg.batch_size * T / t for t in times[name]]
    kind = "yes" if runtime.compile else "no"
    table.add(
        name.split(", compiled")[0],
        kind,
        model.num_params(),
        [1000 * t for t in times[name]],
        ratio,
        rates,
        share,
        memory,
        decoding,
    )


# part 4


def quality(bench, runtime, report, rows):
    """Several at a time on a GPU, which a small model leaves idle: what is measured is the loss, not the speed."""
    cuda, root = runtime.device_type == "cuda", os.path.join("out", "gpu")
    common = [
        sys.executable,
        "train.py",
        "config/train_enwik8_small.py",
        f"--device={runtime.device}",
        "--compile=False",
    ]
    common += [f"--dtype={runtime.dtype}"] + ([f"--dataset={bench.dataset}"] if bench.dataset else [])
    if not cuda:
        common += ["--n_layer=1", "--n_embd=32", "--block_size=64", "--max_iters=2", "--eval_iters=1"]

    def train(name):
        folder = os.path.join(root, name.replace(",", "+"))
        shutil.rmtree(os.path.join(ROOT, folder), ignore_errors=True)
        command = [*common, f"--attention_type={name}", f"--out_dir={folder}", f"--max_seconds={rows.left()}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ConfigError((done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1])
        return folder

    folders = []
    with concurrent.futures.ThreadPoolExecutor(max(1, os.cpu_count() - 2) if cuda else 1) as pool:
        futures = {name: pool.submit(train, name) for name in (TYPES if cuda else ["softmax", "gla"])}
        for name, future in futures.items():
            with rows.row(name):
                folders.append(future.result())
                done, wanted = progress(folders[-1])
                if done < wanted:
                    rows.fail(f"{name} was stopped by the time limit after {done} of {wanted} iterations")
    if folders:
        bench.out_dir, bench.split, bench.png = ",".join(folders), "val", os.path.join(root, "quality.png")
        bench_quality(bench, runtime, report)


def progress(folder):
    """Iterations of a run, done and wanted."""
    stored = read_checkpoint(os.path.join(ROOT, folder), "ckpt.pt")
    return stored["iter_num"], stored["config"]["max_iters"]


# make gpu-table

MARKS = "<!-- the GPU's tables begin -->\n", "<!-- the GPU's tables end -->\n"  # of docs/results.md
PATHS = [os.path.join(ROOT, "docs", f"gpu-{part}.json") for part in (1, 2, 3, 4)]
SHOWN = {  # table: what is shown of it; empty: all
    "tests": "",
    "operators": "",
    "types": "",
    "ops": "",
    "steps": "",
    "quality": "attention, parameters (count), trained on (tokens), nats/token, bits/byte",
}


def sections():
    """Markdown of the files of the four parts, those that are there."""
    lines = []
    for path in filter(os.path.exists, PATHS):
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
        machine, tables = found["machine"], found["tables"]
        tokens = {row["folder"]: row["trained on (tokens)"] for row in tables.get("scaling", {"rows": []})["rows"]}
        line = (
            f"{machine['processor']}, {machine['dtype']}, PyTorch {found['versions']['torch']}, {found['time'][:10]}, "
        )
        line += f"matmul peak {machine['matmul_gflops'] / 1000:,.0f} TFLOP/s, copy {machine['copy_gb_s']:,.0f} GB/s."
        lines.append(line)
        for name in (name for name in SHOWN if name in tables):
            old = tables[name]
            columns = SHOWN[name].split(", ") if SHOWN[name] else old["columns"]
            table = Table(name, old["title"], errors(*columns), old["keys"])
            for row in old["rows"]:
                table.add(*((row | {"trained on (tokens)": tokens.get(row.get("folder"))})[c] for c in table.specs))
            lines += ["", old["title"][0].upper() + old["title"][1:] + ":", "", *table.lines()]
        lines.append("")
    return "\n".join(lines)


def write_tables(path="docs/results.md"):
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        before, rest = f.read().split(MARKS[0])
    text = before + MARKS[0] + "\n" + sections() + "\n" + MARKS[1] + rest.split(MARKS[1])[1]
    with open(os.path.join(ROOT, path), "w", encoding="utf-8") as f:
        f.write(text)


if __name__ == "__main__":
    write_tables()
