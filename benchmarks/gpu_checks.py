"""make gpu PART=1: is every operator and type right on this device, and each configuration of the Triton kernels?"""

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
import types
from xml.etree import ElementTree

import torch

import config
from benchmarks.layers import of_type
from benchmarks.operators import OPERATORS, operator_rows, operator_step, parse_shapes
from model import ATTENTION, GPT, GPTConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TYPES = [*ATTENTION, "gla,softmax"]
BOUNDS = {"float32": 1e-3, "bfloat16": 3e-2}  # of errors, as shares of the norm
WATCHED = ("gla", "delta", "gsa", "performer", "nsa", "gated")  # operators with Triton kernels, whose names begin so
CHECKED = {"cpu": "1x40x2x16x16", "cuda": "2x65x2x64x64,1x200x3x128x128,2x256x2x64x64"}  # B x T x H x K x V


def errors(*columns):
    """The columns of a table, errors with their power of ten."""
    return {column: ".1e" if column.endswith("(error)") else None for column in columns}


def error(found, wanted):
    """Of a tensor from a wanted one in float64, as a share of its norm; 0 for two that are 0."""
    difference = (found.detach().double().cpu() - wanted.detach().cpu()).norm()
    return float(difference / wanted.detach().norm().cpu().clamp(min=1e-30)) if difference else 0.0


def checks(bench, runtime, report, rows):
    if runtime.device_type == "cuda":
        with report.table(
            "tests", "tests marked gpu", "file, passed (tests), failed (tests), skipped (tests)"
        ) as table:
            marked_tests(report, rows, table)
    columns = errors(
        "operator", "dtype", "B x T x H x K x V", "output (error)", "gradients, largest (error)", "bound (error)"
    )
    with report.table("operators", "errors against float64, as shares of the norm", columns, keys=3) as table:
        for shape in parse_shapes(CHECKED[runtime.device_type]):
            for dtype in BOUNDS:
                check_operators(shape, dtype, bench, runtime, rows, table)
    names = (
        "attention",
        "dtype",
        "logits (error)",
        "all gradients (error)",
        "step against forward (error)",
        "bound (error)",
    )
    columns = errors(*names)
    with report.table("types", "a model of two layers, against itself in float64 on the CPU", columns, keys=2) as table:
        for name in TYPES:
            for dtype in BOUNDS:
                with rows.row(f"{name} {dtype}"):
                    check_type(name, dtype, runtime, rows, table)
    if runtime.device_type == "cuda":
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
            subprocess.run(command, cwd=ROOT, stdout=sys.stderr, timeout=rows.left())
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
    with subprocess.Popen([*command, sys.executable, "-m", "benchmarks.gpu_checks"], **run) as process:
        try:
            said = process.communicate(timeout=rows.left())[0]
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
    names = [x for x in OPERATORS if x.startswith(WATCHED)]
    for case in operator_rows(names, (1, 70, 2, 24, 24), bench, runtime).values():
        operator_step(functools.partial(case.call, *case.inputs), case.inputs)
    torch.cuda.synchronize()


if __name__ == "__main__":
    run_kernels()
