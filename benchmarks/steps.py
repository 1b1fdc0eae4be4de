"""python bench.py --what=step: what does a training step cost, beside plain PyTorch, another repository's model.py
(--beside_file) or (--beside) other types?"""

import contextlib
import importlib.util
import io
import statistics
import tempfile

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

import config
from benchmarks.clocks import first_calls, interleaved, matmul_peak
from benchmarks.layers import of_type
from benchmarks.runs import run_folders
from config import ConfigError
from data import Dataset, SymbolsCodec, write_meta, write_split
from model import GPT, GPTConfig
from parallel import World
from train import Run, TrainConfig

NANOGPT_SHAPES = [  # overhead rules; the size of a small character model; a long block
    dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, vocab_size=65),
    dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=16, vocab_size=256),
    dict(n_layer=4, n_head=4, n_embd=256, block_size=1024, batch_size=4, vocab_size=256),
]


class PlainBlock(nn.Module):
    """The same block from PyTorch's own modules, and nothing around it: what a training step cannot be slower than."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.ln_1, self.ln_2 = (nn.LayerNorm(c.n_embd, bias=False) for _ in range(2))
        self.qkv = nn.Linear(c.n_embd, 3 * c.n_embd, bias=False)
        self.proj = nn.Linear(c.n_embd, c.n_embd, bias=False)
        up, down = nn.Linear(c.n_embd, 4 * c.n_embd, bias=False), nn.Linear(4 * c.n_embd, c.n_embd, bias=False)
        self.mlp = nn.Sequential(up, nn.GELU(), down)

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


def file_step(path, c, cfg, runtime, dataset):
    """A training step of the GPT in a file with nanoGPT's interface: GPT(GPTConfig(...)), configure_optimizers and
    model(idx, targets) -> (logits, loss). As in nanoGPT's train.py, each step draws its batch, and a CPU computes in
    float32."""
    spec = importlib.util.spec_from_file_location("beside_file", path)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")
        with contextlib.redirect_stdout(io.StringIO()):  # it says its sizes
            model = module.GPT(module.GPTConfig(dropout=0.0, **{name: getattr(c, name) for name in names}))
            optimizer = model.to(runtime.device).configure_optimizers(0.1, 1e-4, (0.9, 0.95), runtime.device_type)
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"--beside_file={path}: no GPT and GPTConfig with nanoGPT's interface: {said}") from None
    tokens = dataset.split("train").tokens

    def step():
        places = torch.randint(len(tokens) - c.block_size, (cfg.batch_size,)).tolist()
        rows = np.stack([tokens[i : i + c.block_size + 1] for i in places]).astype(np.int64)
        idx = torch.from_numpy(rows).to(runtime.device)
        with runtime.autocast() if runtime.device_type != "cpu" else contextlib.nullcontext():
            _, loss = model(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
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


def our_run(model, cfg, runtime, folder):
    dataset = random_dataset(tempfile.mkdtemp(dir=folder), model.config.vocab_size)
    run = Run(cfg, runtime, World(0, 1, 0), dataset, model.to(runtime.device), None)
    if runtime.compile:
        run.objective = torch.compile(run.objective)
    run.model.train()
    return run


def bench_steps(shapes, bench, runtime, report):
    columns = "attention, n_layer (layers), n_head (heads), n_embd (channels), block (tokens), batch (sequences), "
    columns += "vocabulary (ids), parameters (count), step (ms), tokens/s, plain stack (ms), ours / plain (ratio), "
    columns += "nanoGPT's count (MFLOP/token), of the peak by it (share), of the matmul peak (share)"
    plain = bench.beside_file or "softmax attention from torch.nn"
    title = f"training steps, {bench.rounds} rounds; the plain stack is {plain}"
    with report.table("step", title, columns, keys=7) as table:
        for shape in shapes:
            bench_step(shape, bench, runtime, report, table)


def bench_step(shape, bench, runtime, report, table):
    """One shape: our whole step (data, forward, backward, clip, AdamW) and the plain stack's, in the same rounds."""
    batch_size = shape.pop("batch_size")
    c = config.build(GPTConfig, shape)
    cfg = TrainConfig(batch_size=batch_size, learning_rate=1e-4, min_lr=1e-5)
    x, y = (torch.randint(c.vocab_size, (batch_size, c.block_size), device=runtime.device) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        run = our_run(GPT(c), cfg, runtime, folder)
        # the plain stack is softmax attention, learned positions and a GELU MLP, whatever stands beside it
        if bench.beside_file:
            beside = file_step(bench.beside_file, c, cfg, runtime, run.dataset)
        else:
            beside = plain_step(c, cfg, runtime, x, y)
        if runtime.compile:
            first_calls({c.attention_type: run.step}, "compiling", report)
        calls, pick = {"ours": run.step, "plain": beside}, statistics.mean  # a step waits for its data now and then
        times = interleaved(calls, bench.rounds, bench.seconds, runtime, c.attention_type, pick=pick)
    ours, plain = ([1000 * t for t in ts] for ts in times.values())
    peak = max(report.peaks["matmul_gflops"], matmul_peak(runtime, bench.seconds) / 1e9)  # the machine drifts
    report.peaks["matmul_gflops"] = peak
    tokens, N = batch_size * c.block_size, run.model.num_params()
    rates, counted, share = [1000 * tokens / t for t in ours], None, None
    if c.attention_type == "softmax":  # what it takes for attention is softmax attention's, of a full T x T
        counted = 6 * N + 12 * c.n_layer * c.n_head * c.d_head * c.block_size
        share = statistics.median(rates) * counted / 1e9 / peak
    executed = report.share_of_peak(batch_size * run.model.flops(c.block_size)[1], [t / 1000 for t in ours])
    row = (c.attention_type, c.n_layer, c.n_head, c.n_embd, c.block_size, batch_size, c.vocab_size, N)
    row += (ours, rates, plain, [a / b for a, b in zip(ours, plain)], counted and counted / 1e6, share, executed)
    table.add(*row)


def models_beside(c, bench):
    """{name: model}: a new model of each type of --beside, then what is compared with the first of them: the models of
    --out_dir, or a new one of `c`. The shape is the latter's."""
    folders = run_folders(bench) if bench.out_dir else []
    models = {f: GPT.from_checkpoint(f) for f in folders} or {c.attention_type: GPT(c)}
    shape, types = next(iter(models.values())).config, [t.strip() for t in bench.beside.split(",")]
    for name, model in models.items():
        if any(getattr(model.config, k) != getattr(shape, k) for k in ("n_layer", "n_embd", "block_size")):
            raise ConfigError(f"{name}: models that are timed beside each other must have one shape")
    return {name: GPT(of_type(vars(shape), name)) for name in types} | models


def steps_beside(models, bench, runtime, report):
    """Whole training steps of several models in the same rounds, masks held as they are; the operations of their
    attention, forward, as a share of the first one's."""
    batch_size = bench.batch_size or 16
    cfg = TrainConfig(batch_size=batch_size, learning_rate=1e-4, min_lr=1e-5, mask_learning_rate=0.0)
    first, c = next(iter(models)), next(iter(models.values())).config
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: our_run(model, cfg, runtime, folder).step for name, model in models.items()}
        if runtime.compile:
            first_calls(steps, "compiling", report)
        times = interleaved(steps, bench.rounds, bench.seconds, runtime, "steps", pick=statistics.mean)
    title = f"training steps: n_layer {c.n_layer}, n_head {c.n_head}, n_embd {c.n_embd}, block {c.block_size}, "
    title += f"batch {batch_size}; operations of attention, forward, as a share of {first}'s"
    columns = f"model, kept (distances), nominal (share), executed (share), step (ms), of {first}'s (ratio), "
    columns += "of the matmul peak (share)"
    full = attention_flops(models[first])[0]
    with report.table("steps beside", title, columns) as table:
        for name, model in models.items():
            kept = [stats["kept"].float() for b in model.transformer.h if "kept" in (stats := b.attn.stats())]
            kept = float(torch.cat(kept).mean()) if kept else None
            ms, ratio = [1000 * t for t in times[name]], [a / b for a, b in zip(times[name], times[first])]
            share = report.share_of_peak(batch_size * model.flops(c.block_size)[1], times[name])
            table.add(name, kept, *(f / full for f in attention_flops(model)), ms, ratio, share)


def attention_flops(model):
    T = model.config.block_size
    return [sum(f) for f in zip(*(block.attn.flops(T) for block in model.transformer.h))]
