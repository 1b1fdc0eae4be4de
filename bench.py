"""What things cost, and what checkpoints score.

    python bench.py                                        # the overview: cost of a layer of each attention type
    python bench.py --what=step                            # training steps: against a plain PyTorch stack and the peak
    python bench.py --what=step --beside=softmax --attention_type=adaptive_span   # of types, in the same rounds
    python bench.py --what=ops                             # attention operators against time, beside SDPA
    python bench.py --what=decode                          # sampling: with the cache, and recomputing the prefix
    python bench.py --what=quality --out_dir=out/a,out/b   # the full evaluation pass over checkpoints
    python bench.py --what=quality --out_dir=out/a,out/b --eval_context=512,1024,2048   # beyond the trained context
    python bench.py --what=curves --out_dir=out/a,out/b    # loss against steps and time, as a PNG
    python bench.py --what=inspect --out_dir=out/a         # what masks keep, what that costs, and pictures of it
    python bench.py --what=heads --out_dir=out/a           # gates, decays and states of heads, by layer
    python bench.py --what=maps --out_dir=out/a --text="def main("   # attention maps, of any type that has one
    python bench.py --what=superposition --out_dir=out/a   # which head of a toy carries which skip trigram
    python bench.py --what=gpu --part=1                    # on a GPU: right, fast, learning; see benchmarks/gpu.py
    python bench.py --what=all                             # all that needs no run; with --out_dir, quality and curves
    python bench.py --compare=A.json,B.json --fail_below=0.95   # the speeds of two files, for who changed a kernel

Each question is a file of benchmarks/. Timings are medians over interleaved rounds (A B A B), with minimum and maximum,
so that a drifting machine favours none of them; a range of more than half is printed alone, marked `wide`. Shares of
the matmul peak count what a forward pass executes three times; shares of the copy bandwidth the weights, states and
keys that a token must read. Every table goes into --json as well, after each part of --what=all:

    schema    1
    what      the value of --what, `time` when it ended (UTC), `commit` of the code
    machine   device, dtype, threads, processor, clock (Python's time.NAME, or CUDA events); matmul_gflops, copy_gb_s
    versions  python, torch
    config    bench: every key of this script; model: the keys that were given
    tables    {name: {title, columns, keys, rows}}: a row has a cell for each column, its unit in the column's name, and
              its first `keys` cells name it. A cell is text, a number, null, or a list: one number for each round
    notes     lines printed under the tables
"""

import signal
from dataclasses import dataclass

if __name__ == "__main__":  # Ctrl-C while modules load is no traceback of theirs
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

import config
from benchmarks import (
    curves,
    decoding,
    gpu,
    heads,
    layers,
    maps,
    masks,
    operators,
    quality,
    steps,
    style,
    superposition,
    tables,
)
from config import ConfigError, key
from data import DataError
from model import ATTENTION, GPTConfig
from weights import ModelError

WHATS = ("overview", "step", "ops", "decode", "quality", "curves", "inspect", "heads", "maps", "superposition")
WHATS += ("gpu", "all")


@dataclass
class BenchConfig:
    """Benchmark"""

    what: str = key("overview", "what to measure", choices=WHATS)
    rounds: int = key(5, "interleaved rounds", low=1)
    seconds: float = key(2.0, "time for each measurement of a round", low=0.01)
    lengths: str = key("128,256,512,1024,2048,4096,8192", "lengths of a context (overview)")
    limit: float = key(
        100.0, "seconds after which no round begins, but for the first two (overview), or row (gpu)", low=0.0
    )
    part: int = key(1, "1 checks, 2 operators, 3 steps, 4 quality (gpu)", low=1, high=4)
    check: bool = key(True, "compare outputs with those of the oracle before timing (overview, ops)")
    batch_size: int = key(0, "sequences of a call; 0: 4096 tokens (overview), 16 with a shape given (step)", low=0)
    tokens: int = key(500, "tokens to sample (decode, gpu)", low=1)
    positions: str = key("10,10000", "tokens before the one that is timed, comma-separated (decode)")
    operators: str = key("", "operators, comma-separated; empty: all (ops)")
    shapes: str = key("2x1024x4x64x64,2x4096x4x64x64,2x16384x4x64x64", "B x T x H x key size x value size, ... (ops)")
    peers: bool = key(False, "other implementations beside ours, from requirements-peers.txt (ops)")
    autotune: bool = key(False, "try every configuration of the Triton kernels first (ops)")
    beside_file: str = key("", "model.py of nanoGPT or like it, in place of the plain stack (step)")
    beside: str = key("", "attention types of new models, their steps timed in the same rounds (step)")
    spans: str = key("256", "spans of `span`, a ramp of 32 included (ops)")
    offsets: str = key("0,1,2,3,4", "distances that `mask_mix` keeps (ops)")
    out_dir: str = key("", "folders of runs, comma-separated (all but overview, ops and decode)")
    prune: float = key(0.02, "the loss without candidates below this share of the largest (inspect)", low=0.0, high=1.0)
    inspect_batch_size: int = key(4, "sequences of the timed attention (inspect)", low=1)
    text: str = key("", "text of the attention maps; empty: from the validation split (inspect, maps)")
    dataset: str = key("", "data set (quality); empty: the one that a checkpoint was trained on")
    split: str = key("val,test", "splits (quality)")
    eval_context: int | str = key(
        0, "tokens of context in the full pass, or several sizes with commas; 0: block_size", low=0
    )
    eval_stride: int = key(0, "step between its windows; 0: its context", low=0)
    eval_batch_size: int = key(16, "windows at once", low=1)
    png: str = key("", "picture to write, .png, .pdf or .svg; empty: one of out/ or of the run's folder")
    compare: str = key("", "instead of measuring, compare two files that --json wrote: A.json,B.json")
    fail_below: float = key(0.0, "exit status 1 where the speed of B is below this share of A's (compare)", low=0.0)
    json: str = key("out/bench.json", "file to write the tables to; empty: none")
    device: str = key("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = key("auto", "autocast precision", choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = key(False, "torch.compile our training step")


def measure(what, explicit, bench, runtime, report):
    """One of the kinds of measurement; `explicit` are the keys of the model that were given."""
    own = explicit.keys() - {"attention_type", "plugin"}  # a shape of the user's, or nanoGPT's
    if what == "overview":  # of --what=all too, whose block_size is that of the models
        explicit = {k: v for k, v in explicit.items() if k != "block_size" or bench.what == what}
        types = explicit.get("attention_type", ",".join(ATTENTION)).split(",")
        layers.overview([t.strip() for t in types], layers.LAYER | explicit, bench, runtime, report)
    elif what == "step" and bench.beside:
        c = config.build(GPTConfig, dict(vocab_size=256) | explicit)
        steps.steps_beside(steps.models_beside(c, bench), bench, runtime, report)
    elif what == "step":
        shapes = [dict(vocab_size=256, batch_size=bench.batch_size or 16)] if own else steps.NANOGPT_SHAPES
        steps.bench_steps([shape | explicit for shape in shapes], bench, runtime, report)
    elif what == "decode":
        shape = dict(vocab_size=256) if own else {k: v for k, v in steps.NANOGPT_SHAPES[2].items() if k != "batch_size"}
        decoding.bench_decode(config.build(GPTConfig, shape | explicit), bench, runtime, report)
    else:
        parts = dict(ops=operators.bench_operators, quality=quality.bench_quality, curves=curves.plot_curves)
        parts |= dict(
            inspect=masks.inspect,
            heads=heads.bench_heads,
            maps=maps.draw_all,
            superposition=superposition.bench_superposition,
            gpu=gpu.bench_gpu,
        )
        parts[what](bench, runtime, report)


def main(argv):
    model_config, bench, given = config.load(argv, GPTConfig, BenchConfig)
    style.check_name(bench.png)
    if bench.what == "all" and bench.png:
        raise ConfigError("--png names one picture: without it --what=all writes one for each kind")
    runtime = config.resolve_device(bench.device, bench.dtype, bench.compile, training=bench.what == "step")
    explicit = config.explicit(model_config, given)
    report = tables.Report(bench, runtime, explicit)
    if bench.compare:
        return tables.compare(bench, report)
    print(f"{runtime}; torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    whats = [bench.what]
    if bench.what == "all":
        whats = ["overview", "ops", "step", "decode"] + (["quality", "curves"] if bench.out_dir else [])
    if {"overview", "step", "ops", "decode", "inspect", "gpu"} & set(whats):
        report.measure_machine(bench.seconds)
    failed = False
    for what in whats:
        try:
            measure(what, explicit, bench, runtime, report)
        except Exception as error:
            report.notes.append(f"{what} failed: {type(error).__name__}: {' '.join(str(error).split())}")
            if len(whats) == 1:
                raise
            print(report.notes[-1], flush=True)
            failed = True
        except KeyboardInterrupt:
            report.note(f"{what} was interrupted")
            raise
        finally:
            report.write()
    return int(failed)


if __name__ == "__main__":
    config.run(main, DataError, ModelError)
