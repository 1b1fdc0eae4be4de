"""make gpu PART=N runs python bench.py --what=gpu --part=N: is all of it right on a GPU, is it fast, does it learn?

    1  every operator and type against float64, forward and gradients; the tests marked gpu; compute-sanitizer
    2  operators beside PyTorch's attention and flash-linear-attention, replayed as CUDA graphs
    3  whole training steps of each type at the size of config/train_enwik8.py, and decoding
    4  each type trained by config/train_enwik8_small.py: bits per byte

On a CPU the same with tiny sizes: that shows that a part runs before a machine is borrowed for it. A row that fails is
noted and the others go on; the exit status is 1 after a failure and after an error above its bound. No row begins after
--limit seconds.
"""

import concurrent.futures
import contextlib
import copy
import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from xml.etree import ElementTree

import torch

import config
from benchmarks.clocks import first_calls, interleaved, peak_memory
from benchmarks.layers import of_type
from benchmarks.operators import OPERATORS, operator_rows, operator_step, operators_at, parse_shapes
from benchmarks.quality import bench_quality
from benchmarks.steps import our_step
from config import ConfigError
from model import ATTENTION, GPT, GPTConfig
from train import TrainConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TYPES = [*ATTENTION, "gla,softmax"]
BOUNDS = {"float32": 1e-3, "bfloat16": 3e-2}  # of errors, as shares of the norm
WATCHED = ("gla", "gsa", "performer", "nsa")  # operators with Triton kernels, whose names begin so
CHECKED = {"cpu": "1x40x2x16x16", "cuda": "2x65x2x64x64,1x200x3x128x128"}  # B x T x H x K x V
TIMED = {
    "cpu": "1x64x2x16x16",
    "cuda": "8x1024x8x64x64,32x1024x6x64x128,4x4096x16x128x128,1x32768x16x128x128",
}


class Rows:
    """Runs one row after the other. An error of a row is noted, and no row begins after the limit."""

    def __init__(self, bench, report):
        self.end, self.report, self.failed = time.perf_counter() + bench.limit, report, False

    @contextlib.contextmanager
    def row(self, name):
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            self.fail(f"{name} failed: {type(error).__name__}: {text}")
        self.report.write(quiet=True)

    def fail(self, text):
        self.failed = True
        self.report.note(text)

    def late(self, name):
        if time.perf_counter() > self.end:
            self.fail(f"{name} was left out: the time limit")
            return True
        return False


def bench_gpu(bench, runtime, report):
    if runtime.device_type not in CHECKED:
        raise ConfigError(f"--what=gpu runs on cuda, and on a cpu to be tried out, not on {runtime.device_type}")
    rows = Rows(bench, report)
    (checks, operators, steps, quality)[bench.part - 1](bench, runtime, report, rows)
    if rows.failed:
        raise ConfigError("some rows failed or were left out: see above")


def error(found, wanted):
    """Of a tensor from a wanted one in float64, as a share of its norm; 0 for two that are 0."""
    difference = (found.detach().double().cpu() - wanted.detach().cpu()).norm()
    return float(difference / wanted.detach().norm().cpu().clamp(min=1e-30)) if difference else 0.0


# part 1


def checks(bench, runtime, report, rows):
    if runtime.device_type == "cuda":
        with report.table(
            "tests", "tests marked gpu", "file, passed (tests), failed (tests), skipped (tests)"
        ) as table:
            marked_tests(report, rows, table)
    columns = "operator, dtype, B x T x H x K x V, output (error), largest of the gradients (error), bound (error)"
    with report.table("operators", "errors against float64, as shares of the norm", columns, keys=3) as table:
        for shape in parse_shapes(CHECKED[runtime.device_type]):
            for dtype in BOUNDS:
                check_operators(shape, dtype, bench, runtime, rows, table)
    columns = "attention, dtype, logits (error), all gradients (error), step against forward (error), bound (error)"
    with report.table("types", "a model of two layers, against itself in float64 on the CPU", columns, keys=2) as table:
        for name in TYPES:
            for dtype in BOUNDS:
                with rows.row(f"{name} {dtype}"):
                    check_type(name, dtype, runtime, rows, table)
    if runtime.device_type == "cuda" and not rows.late("compute-sanitizer"):
        sanitize(report, rows)


def check_operators(shape, dtype, bench, runtime, rows, table):
    label, place = "x".join(map(str, shape)), config.Runtime(runtime.device, dtype, False, runtime.why)
    bench = types.SimpleNamespace(spans="40", offsets=bench.offsets, peers=False)
    for name in OPERATORS:
        with rows.row(f"{name} {dtype} {label}"):
            for row, case in operator_rows([name], shape, bench, place).items():
                o = case.call(*case.inputs)
                do = torch.randn(o.shape, device=o.device, dtype=o.dtype)
                grads = torch.autograd.grad(o, case.inputs, do)
                exact = [x.detach().double().requires_grad_() for x in case.inputs]
                wanted = case.oracle(*exact)
                off = error(o, wanted)
                wanted = torch.autograd.grad(wanted, exact, do.double())
                worst = max(map(error, grads, wanted))
                table.add(row, dtype, label, off, worst, BOUNDS[dtype])
                if not max(off, worst) < BOUNDS[dtype]:
                    rows.fail(f"{row} {dtype} {label}: an error above its bound")


def check_type(name, dtype, runtime, rows, table):
    c = config.build(GPTConfig, dict(n_layer=2, n_head=2, n_embd=64, block_size=100, vocab_size=65))
    exact = GPT(of_type(vars(c), name)).double()
    model = copy.deepcopy(exact).float().to(runtime.device)
    idx = torch.randint(c.vocab_size, (2, c.block_size + 1))
    found, context = [], torch.autocast(runtime.device_type, getattr(torch, dtype), enabled=dtype != "float32")
    for m, device, around in ((exact, "cpu", contextlib.nullcontext()), (model, runtime.device, context)):
        with around:
            logits, loss = m(idx[:, :-1].to(device), idx[:, 1:].to(device))[:2]
        loss.backward()
        grads = [p.grad.flatten().double().cpu() for p in m.parameters() if p.grad is not None]
        found.append((logits.detach().double().cpu(), torch.cat(grads)))
    model.eval()
    with torch.no_grad(), context:
        state, stepped = model.init_state(2), []
        for token in idx[:, :-1].to(runtime.device).split(1, 1):
            out, state = model.step(token, state)
            stepped.append(out)
        stepped = torch.cat([x.view(2, 1, -1) for x in stepped], 1)
        whole = model(idx[:, :-1].to(runtime.device), idx[:, 1:].to(runtime.device))[0]
    errors = [error(b, a) for a, b in zip(*found)] + [error(stepped, whole.double())]
    table.add(name, dtype, *errors, BOUNDS[dtype])
    if not max(errors) < BOUNDS[dtype]:
        rows.fail(f"{name} {dtype}: an error above its bound")


def marked_tests(report, rows, table):
    """Each kernel configuration among them. A line for each file, and the first line of each failure."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "junit.xml")
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={path}"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(12, os.cpu_count()))]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, cwd=ROOT, stdout=sys.stderr, timeout=max(1, rows.end - time.perf_counter()))
        if not os.path.exists(path):
            return rows.fail("the tests marked gpu did not end")
        cases = ElementTree.parse(path).getroot().iter("testcase")
    files = {}
    for case in cases:
        counts = files.setdefault(case.get("classname", "").split(".")[-1], [0, 0, 0])
        bad = [x for x in case if x.tag in ("failure", "error")]
        counts[1 if bad else 2 if case.find("skipped") is not None else 0] += 1
        if bad:
            rows.fail(f"{case.get('name')}: {' '.join(bad[0].get('message', '').split())[:300]}")
    for name, counts in sorted(files.items()):
        table.add(name, *counts)
    if not files:
        rows.fail("no test is marked gpu")


def sanitize(report, rows):
    """Out-of-bounds accesses of every operator, forward and backward, at one shape."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return report.note("compute-sanitizer is not on this machine")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9"]
    command += [option for name in WATCHED for option in ("--kernel-name", f"kernel_substring={name}_")]
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = dict(cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    with subprocess.Popen([*command, sys.executable, "-m", "benchmarks.gpu"], **run) as process:
        try:
            said = process.communicate(timeout=max(1, rows.end - time.perf_counter()))[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the program that it watches too
            return rows.fail("compute-sanitizer did not end within the limit")
    last = (said.strip() or "no output").splitlines()[-1]
    report.note(f"compute-sanitizer, exit status {process.returncode}: {last}")
    rows.failed |= process.returncode != 0


def run_kernels():
    """What compute-sanitizer watches: a ragged length, widths that are no power of two."""
    bench, runtime = (
        types.SimpleNamespace(spans="9", offsets="0,1,3", peers=False),
        config.resolve_device("cuda", "auto"),
    )
    for case in operator_rows([*WATCHED, "gla_exact"], (1, 70, 2, 24, 24), bench, runtime).values():
        operator_step(functools.partial(case.call, *case.inputs), case.inputs)
    torch.cuda.synchronize()


# part 2


def operators(bench, runtime, report, rows):
    columns = "operator, B x T x H x K x V, forward (ms), forward + backward (ms), of softmax (ratio), ns/token, "
    columns += "of the matmul peak (share), peak memory (MiB)"
    bench.peers = runtime.device_type == "cuda" and importlib.util.find_spec("fla") is not None
    title = f"operators: 64 slots, 256 features, {bench.rounds} rounds; memory beyond the inputs, forward + backward"
    with report.table("ops", title, columns, keys=2) as table:
        for shape in parse_shapes(TIMED[runtime.device_type]):
            for name in [n for n in OPERATORS if n != "softmax"]:
                label, before = f"{name} {'x'.join(map(str, shape))}", len(table.rows)
                if not rows.late(label):
                    with rows.row(label):
                        operators_at(shape, ["softmax", name], bench, runtime, report, table)
                if [*OPERATORS][1] != name:  # softmax stands there already
                    table.rows[before:] = [row for row in table.rows[before:] if row["operator"] != "softmax"]


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
                return our_step(model, cfg, place, folder)

            reference = make("softmax")[0]
            for name in TYPES:
                label = f"{name}{', compiled' if compiled else ''}"
                if not rows.late(label):
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
        left = rows.end - time.perf_counter()
        command = [*common, f"--attention_type={name}", f"--out_dir={folder}", f"--max_seconds={max(1, left)}"]
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
    if folders:
        bench.out_dir, bench.split, bench.png = ",".join(folders), "val", os.path.join(root, "quality.png")
        bench_quality(bench, runtime, report)


if __name__ == "__main__":
    run_kernels()
