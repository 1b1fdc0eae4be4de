"""python bench.py --compare=A.json,B.json: which is slower? The tables of all measurements, and their file."""

import json
import math
import os
import platform
import statistics
import time
from dataclasses import asdict

import torch

from benchmarks.clocks import clock_name, copy_bandwidth, matmul_peak
from config import ConfigError
from train import git_commit
from weights import write_atomically


def number(x, decimals=None):
    """With thousands separators and four significant digits, or rounded to `decimals` (below 0: to tens, hundreds)."""
    if isinstance(x, int) or not math.isfinite(x):
        return f"{x:,}"
    decimals = 3 - math.floor(math.log10(abs(x) or 1)) if decimals is None else decimals
    return f"{round(x, decimals):,.{max(0, decimals)}f}"


def spread(values):
    """'median (min - max)', with digits down to a tenth of the range; the range alone where it is more than half."""
    low, middle, high = min(values), statistics.median(values), max(values)
    if low == high:
        return number(middle)
    if high - low > 0.5 * abs(middle):
        low, high = (number(x, 1 - math.floor(math.log10(abs(x) or 1))) for x in (low, high))
        return f"{low} - {high} (wide)"
    decimals = min(math.ceil(1 - math.log10(high - low)), 3 - math.floor(math.log10(high)))
    return f"{number(middle, decimals)} ({number(low, decimals)} - {number(high, decimals)})"


def numbers(text, name):
    try:
        return [int(n) for n in text.split(",")]
    except ValueError:
        raise ConfigError(f"--{name}={text}: write numbers, comma-separated") from None


class Table:
    """Rows of cells under headings that name the unit; the first `keys` cells name a row. A cell is text, a number,
    None or a list: one number for each round. The lowest number of the column `lowest` is printed in bold. As a context
    it prints itself at its end, or what rows it has when an error cuts it."""

    def __init__(self, name, title, columns, keys=1, lowest=None):
        self.name, self.title, self.keys, self.rows, self.lowest = name, title, keys, [], lowest
        self.specs = dict(columns) if isinstance(columns, dict) else dict.fromkeys(columns.split(", "))

    def add(self, *cells):
        self.rows.append(dict(zip(self.specs, cells, strict=True)))

    def contents(self):
        return {"title": self.title, "columns": list(self.specs), "keys": self.keys, "rows": self.rows}

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        if self.rows or error is None:
            self.show()

    def show(self):
        print("\n".join(["", self.title, "", *self.lines()]), flush=True)

    def lines(self):
        """In Markdown, aligned, without the columns that are empty."""
        filled = [name for name in self.specs if any(row[name] is not None for row in self.rows)] or list(self.specs)
        texts = [filled] + [[self.text(name, row[name]) for name in filled] for row in self.rows]
        scores = [row[self.lowest] for row in self.rows if self.lowest and row[self.lowest] is not None]
        if scores:
            row = 1 + [row[self.lowest] for row in self.rows].index(min(scores))
            texts[row][filled.index(self.lowest)] = f"**{texts[row][filled.index(self.lowest)]}**"
        widths = [max(map(len, column)) for column in zip(*texts)]
        numeric = [any(isinstance(row[name], (int, float, list)) for row in self.rows) for name in filled]
        lines = [[c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric)] for row in texts]
        lines[1:1] = [["-" * (w - 1) + (":" if n else "-") for w, n in zip(widths, numeric)]]
        return [f"| {' | '.join(line)} |" for line in lines]

    def text(self, name, cell):
        if cell is None or isinstance(cell, str):
            return cell or "-"
        if isinstance(cell, list):
            return spread(cell)
        return format(cell, self.specs[name]) if self.specs[name] else number(cell)


class Report:
    """What this run prints and writes: see the top of this file."""

    def __init__(self, bench, runtime, model_keys, what=None):
        self.path, self.tables, self.notes, self.peaks = bench.json, {}, [], {}
        self.what = what or bench.what
        self.runtime, self.config = runtime, {"bench": asdict(bench), "model": model_keys}
        self.commit = git_commit()  # before a picture in the repository is written again

    def table(self, name, title, columns, keys=1, lowest=None):
        self.tables[name] = Table(name, title, columns, keys, lowest)
        return self.tables[name]

    def note(self, text):
        self.notes.append(text)
        print(text, flush=True)

    def measure_machine(self, seconds):
        """Operations and bytes a second that nothing here can exceed: each figure is read beside them."""
        gflops, copied = matmul_peak(self.runtime, seconds) / 1e9, copy_bandwidth(self.runtime, seconds) / 1e9
        self.peaks = {"matmul_gflops": gflops, "copy_gb_s": copied}
        print(f"matmul peak {number(gflops)} GFLOP/s, copy bandwidth {number(copied)} GB/s", flush=True)
        load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count()
        if self.runtime.device_type == "cpu" and load > 0.5 * cores:
            hint = "" if torch.get_num_threads() == 1 else "; OMP_NUM_THREADS=1 times by the processor's own clock"
            self.note(f"load average {load:.1f} on {cores} cores: other work shares them{hint}")

    def share_of_peak(self, forward, seconds):
        """The measured matmul peak's share of a forward and backward pass, for each round: operations that the forward
        pass executes (None: nobody counted them), and twice as many for the backward pass, which executes no fewer."""
        return None if forward is None else [3 * forward / 1e9 / self.peaks["matmul_gflops"] / s for s in seconds]

    def share_of_bandwidth(self, bytes, seconds):
        """The measured copy bandwidth's share of reading so many bytes, for each round: what a cache holds is read
        faster than that, and then no share is given."""
        shares = [bytes / 1e9 / self.peaks["copy_gb_s"] / s for s in seconds]
        return shares if max(shares) <= 1 else "above 1: from caches"

    def write(self, quiet=False):
        """After each part of a measurement, what there is until then."""
        if not self.path or not any(t.rows for t in self.tables.values()):
            return
        r = self.runtime
        machine = {"device": r.device, "dtype": r.dtype, "threads": torch.get_num_threads(), "processor": processor(r)}
        machine["clock"] = "events" if r.device_type == "cuda" else clock_name(r.device_type)
        found = {"schema": 1, "what": self.what, "machine": machine | self.peaks}
        found |= {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": self.commit}
        found |= {"versions": {"python": platform.python_version(), "torch": torch.__version__}, "config": self.config}
        found |= {"tables": {name: table.contents() for name, table in self.tables.items()}, "notes": self.notes}
        text = json.dumps(found, indent=1)
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        write_atomically(self.path, lambda f: f.write(text.encode()))
        if not quiet:
            print(f"wrote {self.path}")


def processor(runtime):
    if runtime.device_type == "cuda":
        return torch.cuda.get_device_name(runtime.device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def read_report(path):
    """{(table, first cells): row} of a file that this script wrote."""
    try:
        with open(path, encoding="utf-8") as f:
            tables = json.load(f)["tables"]
        return {(n, *(row[c] for c in t["columns"][: t["keys"]])): row for n, t in tables.items() for row in t["rows"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path}: not a file that bench.py wrote") from None


TIMES, RATES = ("(ms)", "(us)", "ns/token"), ("tokens/s", "(tokens/s)")  # how columns that hold what was timed end


def compare(bench, report):
    """The speed of what the second file of --compare timed over the first's: lowest, middle and highest that the rounds
    allow. Where softmax was timed in the same rounds it is divided out, and not judged itself: a machine that is
    slower than it was does not count. Returns 1 if a middle is below --fail_below."""
    paths = [path.strip() for path in bench.compare.split(",")]
    if len(paths) != 2:
        raise ConfigError(f"--compare={bench.compare}: write two files, A.json,B.json")
    (a, b), slow = (read_report(path) for path in paths), 0
    common = [(key, c) for key in a if key in b for c in a[key] if c.endswith(TIMES + RATES)]
    common = [(key, c) for key, c in common if all(isinstance(row[key].get(c), list) for row in (a, b))]
    if not common:
        raise ConfigError(f"--compare={bench.compare}: nothing that was timed is in both files")
    columns = "table, row, measured, A (in its unit), B (in its unit), speed of B / A (ratio), beside softmax (ratio), "
    columns += "too slow"
    with report.table("compare", f"A is {paths[0]}, B is {paths[1]}; above 1 is faster", columns, keys=3) as table:
        for key, column in common:
            cells, reference, beside = (a[key][column], b[key][column]), (key[0], "softmax", *key[2:]), None
            if reference in a and reference in b and key != reference:
                by_round = [[x / y for x, y in zip(f[key][column], f[reference][column])] for f in (a, b)]
                beside = speed_ratio(*by_round, column)
            speed = speed_ratio(*cells, column)
            others = any(k in b and (k[0], *k[2:]) == (key[0], *key[2:]) for k in a if k != key)
            judged = None if key == reference and others else beside or speed
            below = judged is not None and statistics.median(judged) < bench.fail_below
            slow += below
            verdict = f"below {bench.fail_below:g}" if below else None
            table.add(key[0], ", ".join(map(str, key[1:])), column, *cells, speed, beside, verdict)
    if alone := len(a.keys() ^ b.keys()):
        report.note(f"{alone} rows are in one of the files alone")
    return int(slow > 0)


def speed_ratio(a, b, column):
    """[lowest, middle, highest] speed of rounds b over rounds a, which are rates or times by their column's name."""
    a, b = (a, b) if column.endswith(RATES) else (b, a)
    return [min(b) / max(a), statistics.median(b) / statistics.median(a), max(b) / min(a)]
