"""python -m benchmarks.processes: does a loss depend on the number of processes, or on what each of them holds?

    python -m benchmarks.processes                               # 1 process; 2 and 4 with DDP, and with FSDP2
    python -m benchmarks.processes --attention_type=gla --max_iters=50 --out_dir=out/processes-gla

The same run at the same global batch, once for each number of processes: keys are those of train.py. Prints a Markdown
table: losses of some steps, and the largest differences from one process over all steps and evaluations.
"""

import os
import subprocess
import sys

import config
from benchmarks.runs import read_log
from benchmarks.tables import Table
from config import ConfigError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUN = dict(
    dataset="enwik8", device="cpu", dtype="float32", n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=4,
    gradient_accumulation_steps=4, max_iters=30, warmup_iters=5, learning_rate=1e-3, min_lr=1e-4, eval_interval=10,
    eval_iters=4, log_interval=1, out_dir="out/processes",
)  # fmt: skip
GROUPS = ((1, "ddp"), (2, "ddp"), (4, "ddp"), (2, "fsdp"), (4, "fsdp"))  # processes, and what each holds


def launch(keys, processes, parallel):
    """Train in so many processes; the losses of the steps, and the validation losses, {iteration: nats}."""
    folder = os.path.join(keys["out_dir"], f"{parallel}-{processes}")
    started = [sys.executable]
    if processes > 1:
        started += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    options = [f"--{k}={v}" for k, v in (keys | dict(out_dir=folder, parallel=parallel)).items()]
    command = [*started, os.path.join(ROOT, "train.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise ConfigError(f"{processes} processes, {parallel}: {done.stderr.strip().splitlines()[-1]}")
    steps, evaluations, _ = read_log(folder)
    losses = {entry["iter"]: entry["loss"] for entry in steps}
    return losses, {entry["iter"]: entry["val_loss"] for entry in evaluations if "val_loss" in entry}


def main(argv):
    keys = RUN | dict(argument.removeprefix("--").partition("=")[::2] for argument in argv)
    keys = {k: type(RUN.get(k, ""))(v) for k, v in keys.items()}
    found = {group: launch(keys, *group) for group in GROUPS}
    losses, scores = found[GROUPS[0]]
    shown = [n for n in (1, *range(10, keys["max_iters"] + 1, 10)) if n in losses]
    columns = {"processes": "", "parallel": ""} | {f"step {n} (nats)": ".6f" for n in shown}
    columns |= {"validation (nats)": ".6f", "largest difference, steps": ".1e", "largest difference, validation": ".1e"}
    title = f"{len(losses)} steps of {keys['batch_size'] * keys['gradient_accumulation_steps']} sequences; differences "
    with Table("processes", title + "are from one process, in nats", columns, keys=2) as table:
        for (n, parallel), (ours, validation) in found.items():
            far = (max(abs(a[i] - b[i]) for i in a) for a, b in ((losses, ours), (scores, validation)))
            last = validation[max(validation)]
            table.add(str(n), parallel if n > 1 else "-", *(ours[i] for i in shown), last, *far)
    return 0


if __name__ == "__main__":
    config.run(main, ConfigError)
