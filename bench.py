"""What things cost, and what checkpoints score.

    python bench.py --what=step                            # training steps: against a plain PyTorch stack and the peak
    python bench.py --what=ops                             # attention operators against time, beside SDPA
    python bench.py --what=decode                          # sampling: with the cache, and recomputing the prefix
    python bench.py --what=quality --out_dir=out/a,out/b   # the full evaluation pass over checkpoints
    python bench.py --what=curves --out_dir=out/a,out/b    # loss against steps and time, as a PNG

Timings are medians over interleaved rounds (A B A B), with minimum and maximum, so that a drifting machine favours
none of them.
"""

import functools
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

import config
from config import ConfigError, key
from data import DataError, Dataset, SymbolsCodec, write_meta, write_split
from kernels.gla import gla
from kernels.gsa import gsa
from kernels.nsa import nsa_compressed, nsa_selected, nsa_sizes, nsa_window
from model import GPT, GPTConfig, ModelError
from train import Run, TrainConfig, World, evaluate

NANOGPT_SHAPES = [  # overhead rules; the size of a small character model; a long block
    dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, vocab_size=65),
    dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=16, vocab_size=256),
    dict(n_layer=4, n_head=4, n_embd=256, block_size=1024, batch_size=4, vocab_size=256),
]


@dataclass
class BenchConfig:
    """Benchmark"""

    what: str = key("step", "what to measure", choices=("step", "ops", "decode", "quality", "curves"))
    rounds: int = key(5, "interleaved rounds", low=1)
    seconds: float = key(2.0, "time for each measurement of a round", low=0.01)
    batch_size: int = key(16, "sequences of a step, with a shape given; of ops", low=1)
    tokens: int = key(500, "tokens to sample (decode)", low=1)
    operators: str = key("", "operators, comma-separated; empty: all (ops)")
    lengths: str = key("1024,4096,16384", "sequence lengths (ops)")
    heads: int = key(4, "heads (ops)", low=1)
    key_dim: int = key(64, "key size of a head (ops)", low=1)
    value_dim: int = key(64, "value size of a head (ops)", low=1)
    out_dir: str = key("", "folders of runs, comma-separated (quality, curves)")
    dataset: str = key("", "data set (quality); empty: the one that a checkpoint was trained on")
    split: str = key("val,test", "splits (quality)")
    eval_context: int = key(0, "tokens of context in the full pass; 0: block_size", low=0)
    eval_stride: int = key(0, "step between its windows; 0: its context", low=0)
    eval_batch_size: int = key(16, "windows at once", low=1)
    png: str = key("curves.png", "picture to write (curves)")
    device: str = key("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = key("auto", "autocast precision", choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = key(False, "torch.compile our training step")


def synchronize(device_type):
    if device_type == "cuda":
        torch.cuda.synchronize()


def timed(step, seconds, device_type):
    """Seconds of one call of `step`, the mean over about `seconds` of calls."""
    step()
    synchronize(device_type)
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        step()
        n += 1
        if n % 16 == 0:
            synchronize(device_type)
    synchronize(device_type)
    return (time.perf_counter() - start) / n


def spread(values, digits=1):
    """'median (min - max)'."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} - {high:,.{digits}f})"


def matmul_peak(runtime, seconds):
    """Operations a second of a square product in the run's precision: the highest of many short trials."""
    size = 1024 if runtime.device_type == "cpu" else 8192
    dtype = getattr(torch, runtime.dtype)
    a, b = (torch.randn(size, size, device=runtime.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = [timed(lambda: torch.mm(a, b, out=out), seconds / 20, runtime.device_type) for _ in range(10)]
    return 2 * size**3 / min(times)


# -----------------------------------------------------------------------------
# training step


class PlainBlock(nn.Module):
    """The same block from PyTorch's own modules, and nothing around it: what a training step cannot be slower than."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.ln_1, self.ln_2 = (nn.LayerNorm(c.n_embd, bias=False) for _ in range(2))
        self.qkv = nn.Linear(c.n_embd, 3 * c.n_embd, bias=False)
        self.proj = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(c.n_embd, 4 * c.n_embd, bias=False), nn.GELU(), nn.Linear(4 * c.n_embd, c.n_embd, bias=False)
        )

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(self.ln_1(x)).split(C, dim=2)
        q, k, v = (t.view(B, T, self.c.n_head, -1).transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.ln_2(x))


def plain_step(c, cfg, runtime, idx, targets):
    """A training step of the plain stack: forward, backward, clip, fused AdamW. Returns a callable."""
    wte, wpe = nn.Embedding(c.vocab_size, c.n_embd), nn.Embedding(c.block_size, c.n_embd)
    blocks = nn.Sequential(*(PlainBlock(c) for _ in range(c.n_layer)))
    ln_f = nn.LayerNorm(c.n_embd, bias=False)
    model = nn.ModuleList((wte, wpe, blocks, ln_f)).to(runtime.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    positions = torch.arange(c.block_size, device=runtime.device)

    def step():
        with runtime.autocast():
            x = ln_f(blocks(wte(idx) + wpe(positions)))
            loss = F.cross_entropy(F.linear(x, wte.weight).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def random_dataset(folder, vocab_size, n=200_000):
    """A prepared data set of random ids, so that the whole training step, reader included, is timed."""
    codec = SymbolsCodec([str(i) for i in range(vocab_size)])
    text = " ".join(map(str, torch.randint(vocab_size, (n,)).tolist())).encode()
    splits = {"train": write_split(folder, "train", [text], codec, words=False)}
    write_meta(folder, codec, splits, source="random", sha256="", label="random ids")
    return Dataset(folder)


def our_step(model_config, cfg, runtime, folder):
    dataset = random_dataset(folder, model_config.vocab_size)
    run = Run(cfg, runtime, World(0, 1, 0), dataset, GPT(model_config).to(runtime.device), None)
    if runtime.compile:
        run.objective = torch.compile(run.objective)
    run.model.train()
    return run.step, run.model


def bench_step(shape, bench, runtime):
    """One shape: our whole step (data, forward, backward, clip, AdamW) and the plain stack's, in the same rounds."""
    batch_size = shape.pop("batch_size")
    c = config.build(GPTConfig, shape)
    cfg = TrainConfig(batch_size=batch_size, learning_rate=1e-4, min_lr=1e-5)
    x, y = (torch.randint(c.vocab_size, (batch_size, c.block_size), device=runtime.device) for _ in range(2))
    peaks, ours, plain = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        step, model = our_step(c, cfg, runtime, folder)
        # the plain stack is softmax attention, learned positions and a GELU MLP, whatever stands beside it
        beside = plain_step(c, cfg, runtime, x, y)
        for measure in (step, beside):
            timed(measure, bench.seconds / 2, runtime.device_type)
        for i in range(bench.rounds):
            peaks.append(matmul_peak(runtime, bench.seconds))
            order = ((step, ours), (beside, plain))
            for measure, times in order if i % 2 == 0 else order[::-1]:
                times.append(timed(measure, bench.seconds, runtime.device_type))
    tokens, N = batch_size * c.block_size, model.num_params()
    per_token = 6 * N + 12 * c.n_layer * c.n_head * c.d_head * c.block_size
    rates = [tokens / t for t in ours]
    share = statistics.median(rates) * per_token / max(peaks)
    ratio = [a / b for a, b in zip(ours, plain)]
    print(
        f"{c.attention_type}: n_layer {c.n_layer}, n_head {c.n_head}, n_embd {c.n_embd}, block {c.block_size}, ", end=""
    )
    print(f"batch {batch_size}, vocab {c.vocab_size}: {N:,} parameters, {per_token / 1e6:.2f} MFLOP a token")
    print(f"  step          {spread([1000 * t for t in ours])} ms, {spread(rates, 0)} tokens/s")
    print(f"  plain stack   {spread([1000 * t for t in plain])} ms; ours / plain {spread(ratio, 3)}")
    print(f"  matmul peak   {max(peaks) / 1e9:.0f} GFLOP/s (rounds {spread([p / 1e9 for p in peaks], 0)})")
    print(f"  of the peak   {share:.3f}", flush=True)


# -----------------------------------------------------------------------------
# operators


def sdpa(q, k, v, g, s):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def nsa(q, k, v, g, s):
    """The three branches of native sparse attention with the sizes for T, a key head for all query heads, blocks
    compressed to their means, and gates of 1."""
    sizes, k, v = nsa_sizes(q.shape[1]), k[:, :, :1], v[:, :, :1]
    blocks = (x.unfold(1, sizes[0], sizes[1]).mean(-1) for x in (k, v))  # (B, N, 1, D)
    o, index = nsa_compressed(q, *blocks, *sizes[:4])
    return o + nsa_selected(q, k, v, index, sizes[2]) + nsa_window(q, k, v, sizes[4])


OPERATORS = {  # each takes q, k (B, T, H, K), v (B, T, H, V), log-gates g (B, T, H, K) and slot gates s (B, T, H, 64)
    "softmax": sdpa,
    "gla": lambda q, k, v, g, s: gla(q, k, v, g, gate_min=-1.25)[0],
    "gla_exact": lambda q, k, v, g, s: gla(q, k, v, g)[0],
    "gsa": lambda q, k, v, g, s: gsa(q, k, v, -torch.expm1(s), s, scale=1.0)[0],
    "nsa": nsa,
}


def operator_inputs(B, T, bench, runtime):
    H, K, V = bench.heads, bench.key_dim, bench.value_dim
    options = dict(device=runtime.device, dtype=getattr(torch, runtime.dtype))
    q, k, v = (torch.randn(B, T, H, d, **options) for d in (K, K, V))
    g, s = (F.logsigmoid(torch.randn(B, T, H, d, device=runtime.device)) / 16 for d in (K, 64))
    return [t.requires_grad_() for t in (q, k, v, g, s)]


def operator_step(call, inputs):
    o = call()
    return torch.autograd.grad(o, inputs, torch.ones_like(o), allow_unused=True)


def bench_operators(bench, runtime):
    """Forward, and forward and backward, of each operator at each length, with the ratio to SDPA of the same round."""
    names = [n.strip() for n in bench.operators.split(",") if n.strip()] or list(OPERATORS)
    unknown = [n for n in names if n not in OPERATORS]
    if unknown:
        raise ConfigError(f"--operators: no {unknown[0]!r}; write some of {', '.join(OPERATORS)}")
    names = ["softmax"] + [n for n in names if n != "softmax"]
    H, K, V = bench.heads, bench.key_dim, bench.value_dim
    print(f"batch {bench.batch_size}, {H} heads, keys {K}, values {V}, 64 slots, {bench.rounds} rounds")
    print("| operator | T | forward ms | forward + backward ms | of softmax | us a token |\n" + "|---" * 6 + "|")
    for T in (int(t) for t in bench.lengths.split(",")):
        inputs = operator_inputs(bench.batch_size, T, bench, runtime)
        calls = {name: functools.partial(OPERATORS[name], *inputs) for name in names}
        steps = {name: functools.partial(operator_step, calls[name], inputs) for name in names}
        forward, both = {n: [] for n in names}, {n: [] for n in names}
        for i in range(bench.rounds):
            for name in names if i % 2 == 0 else names[::-1]:
                with torch.no_grad():
                    forward[name].append(1000 * timed(calls[name], bench.seconds / 4, runtime.device_type))
                both[name].append(1000 * timed(steps[name], bench.seconds, runtime.device_type))
        for name in names:
            ratio = spread([a / b for a, b in zip(both[name], both["softmax"])], 3)
            each = 1000 * statistics.median(both[name]) / (bench.batch_size * T)
            row = (name, T, spread(forward[name], 2), spread(both[name], 2), ratio, f"{each:.2f}")
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


# -----------------------------------------------------------------------------
# decoding


def bench_decode(c, bench, runtime):
    """Greedy sampling after 12 tokens, with the cache and recomputing the prefix; the texts must be equal."""
    model = GPT(c).to(runtime.device).eval()
    idx = torch.randint(c.vocab_size, (1, 12), device=runtime.device)
    times = {True: [], False: []}
    texts = {}
    with torch.no_grad(), runtime.autocast():
        for use_cache in times:
            model.generate(idx, 5, temperature=0, use_cache=use_cache)
        for _ in range(bench.rounds):
            for use_cache in times:
                start = time.perf_counter()
                texts[use_cache] = model.generate(idx, bench.tokens, temperature=0, use_cache=use_cache)
                synchronize(runtime.device_type)
                times[use_cache].append(time.perf_counter() - start)
    rates = {cached: [bench.tokens / t for t in ts] for cached, ts in times.items()}
    print(f"{c.attention_type}: n_layer {c.n_layer}, n_embd {c.n_embd}, block {c.block_size}; ", end="")
    print(f"{bench.tokens} tokens after a prompt of 12, batch 1")
    print(f"  cached      {spread(rates[True], 0)} tokens/s")
    print(f"  recomputed  {spread(rates[False], 0)} tokens/s")
    print(f"  cached / recomputed {spread([a / b for a, b in zip(times[False], times[True])])}")
    print(f"  same greedy text: {torch.equal(texts[True], texts[False])}", flush=True)


# -----------------------------------------------------------------------------
# quality


def bench_quality(bench, runtime):
    """The full pass over the splits for each checkpoint folder, as a Markdown table."""
    columns = "folder, attention, parameters, data, split, nats/token, bits/byte, token ppl, word ppl, context, stride"
    print("| " + columns.replace(",", " |") + " |\n" + "|---" * 11 + "|")
    for folder in run_folders(bench):
        model = GPT.from_checkpoint(folder).to(runtime.device)
        if model.loaded.new:
            raise ModelError(f"{folder}: the checkpoint lacks {', '.join(model.loaded.new)}")
        dataset = Dataset(bench.dataset or trained_on(folder))
        if model.config.vocab_size < dataset.vocab_size:
            raise ConfigError(f"{folder}: its vocabulary of {model.config.vocab_size} is not that of {dataset.name}")
        context = bench.eval_context or model.config.block_size
        for name in bench.split.split(","):
            split = dataset.split(name.strip())
            s = evaluate(model, split, context, bench.eval_stride or context, bench.eval_batch_size, runtime)
            word = f"{s['word_perplexity']:.2f}" if s["word_perplexity"] else "-"
            row = (folder, model.config.attention_type, f"{model.num_params():,}", dataset.meta["label"], name)
            row += (
                f"{s['loss']:.6f}",
                f"{s['bits_per_byte']:.6f}",
                f"{s['token_perplexity']:.3f}",
                word,
                context,
                s["stride"],
            )
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


def run_folders(bench):
    folders = [f.strip() for f in bench.out_dir.split(",") if f.strip()]
    if not folders:
        raise ConfigError(f"--what={bench.what} needs --out_dir=FOLDER[,FOLDER...]")
    return folders


def trained_on(folder):
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            return json.load(f)["train"]["dataset"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{folder}/config.json does not say the data set: write --dataset=NAME") from None


# -----------------------------------------------------------------------------
# curves


def read_log(folder):
    """The entries of a run's log.jsonl: (training steps, evaluations)."""
    path = os.path.join(folder, "log.jsonl")
    try:
        with open(path, encoding="utf-8") as f:
            entries = [json.loads(line) for line in f]
    except ValueError:
        raise ConfigError(f"{path} is damaged: a line is not JSON") from None
    if not all(isinstance(e, dict) and "iter" in e for e in entries):
        raise ConfigError(f"{path} is damaged: a line is not an entry of a run")
    return [e for e in entries if "split" not in e], [e for e in entries if "split" in e]


def plot_curves(bench):
    """Training and validation loss of each run against steps and against training time, in one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
    )
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # safe for colour-blind eyes
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for i, folder in enumerate(run_folders(bench)):
        steps, evaluations = read_log(folder)
        val = [e for e in evaluations if e["split"] == "val"]
        if not steps or not val:
            raise ConfigError(f"{folder}/log.jsonl has no training steps or no evaluations yet")
        seconds = {e["iter"]: e["wall_s"] for e in steps + val}
        name, colour = os.path.basename(os.path.normpath(folder)), colours[i % len(colours)]
        for panel, x in zip(panels, ({i: i for i in seconds}, seconds)):
            train = [x[e["iter"]] for e in steps], [e["ce"] for e in steps]
            panel.plot(*train, color=colour, alpha=0.35, label=f"{name}, train")
            val = [e for e in val if e["iter"] in x]
            points = [x[e["iter"]] for e in val], [e["val_loss"] for e in val]
            panel.plot(*points, color=colour, marker="o", markersize=4, label=f"{name}, validation")
    panels[0].set(xlabel="optimizer steps", ylabel="cross-entropy (nats per token)")
    panels[1].set(xlabel="training time (s)")
    panels[0].legend(frameon=False)
    os.makedirs(os.path.dirname(bench.png) or ".", exist_ok=True)
    figure.savefig(bench.png, dpi=110, facecolor="white")
    print(f"wrote {bench.png}")


def main(argv):
    model_config, bench, given = config.load(argv, GPTConfig, BenchConfig)
    if not os.path.basename(bench.png)[1:].endswith(".png"):
        raise ConfigError(f"--png={bench.png}: the name must end in .png")
    if bench.what == "curves":
        plot_curves(bench)
        return 0
    runtime = config.resolve_device(bench.device, bench.dtype, bench.compile)
    versions = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    print(f"{runtime}; {versions}")
    if bench.what == "quality":
        bench_quality(bench, runtime)
        return 0
    if bench.what == "ops":
        bench_operators(bench, runtime)
        return 0
    explicit = {k: getattr(model_config, k) for k in given if hasattr(model_config, k)}
    own = explicit.keys() - {"attention_type"}  # a shape of the user's, or nanoGPT's
    if bench.what == "decode":
        shape = dict(vocab_size=256) if own else {k: v for k, v in NANOGPT_SHAPES[2].items() if k != "batch_size"}
        bench_decode(config.build(GPTConfig, shape | explicit), bench, runtime)
    else:
        shapes = [dict(vocab_size=256, batch_size=bench.batch_size)] if own else NANOGPT_SHAPES
        for shape in shapes:
            bench_step(shape | explicit, bench, runtime)
    return 0


if __name__ == "__main__":
    config.run(main, DataError, ModelError)
