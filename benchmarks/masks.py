"""python bench.py --what=inspect --out_dir=out/a: what do masks keep and save?"""

import functools
import itertools
import math

import torch

from benchmarks import maps
from benchmarks.clocks import interleaved
from benchmarks.operators import operator_step, sdpa
from benchmarks.runs import run_folders, runs
from benchmarks.style import colour, heat_map, pale, place, pyplot, save_figure
from config import ConfigError
from data import windows
from data.scoring import token_nats
from kernels.distance import distance, paths
from model import GPT, DistanceAttention


def inspect(bench, runtime, report):
    """For each folder: what its masks keep, by layer and head; what that costs, counted and measured; what rounding
    periods or dropping light candidates does to the loss; and pictures, written to the folder."""
    for folder, model, dataset in runs(bench, runtime):
        layers = {i: b.attn for i, b in enumerate(model.transformer.h) if isinstance(b.attn, DistanceAttention)}
        if not layers:
            raise ConfigError(f"{folder}: no layer of {model.config.attention_type!r} learns a mask by distance")
        print(f"{folder}: {model.config.attention_type}, block_size {model.config.block_size}")
        mask_table(folder, layers, model.config, report)
        mask_costs(folder, layers, model.config, bench, runtime, report)
        mask_changes(folder, model, layers, dataset, bench, runtime, report)
        draw_masks(folder, model, layers, dataset, bench, runtime)


def mask_table(folder, layers, c, report):
    """A row for each head, or one for all heads of a layer, with the path that its training takes."""
    columns = "layer, head, span (tokens), period (tokens), offset (tokens), kept (distances), computed as, "
    with report.table(f"masks of {folder}", f"{folder}: masks", columns + "weights (sigmoid)", keys=2) as out:
        for i, attn in layers.items():
            stats, (table, first) = attn.stats(), attn.log_mask(c.block_size)
            computed = [path for path, _ in paths(table.detach(), first, c.d_head, attn.constant_ones)]
            names = c.mask_mix_candidates.split(",")
            for h in range(len(table)):
                row = [float(stats[name][h]) if name in stats else None for name in ("span", "period", "offset")]
                weights = stats["weight"][h].tolist() if "weight" in stats else []
                shown = " ".join(f"{name} {w:.3f}" for name, w in zip(names, weights))
                out.add(str(i), str(h) if len(table) > 1 else "all", *row, int(stats["kept"][h]), computed[h], shown)


def mask_costs(folder, layers, c, bench, runtime, report):
    """Operations of one sequence's forward pass, and the time of a forward and backward pass beside SDPA's."""
    T, shape = c.block_size, (bench.inspect_batch_size, c.block_size, c.n_head, c.d_head)
    q, k, v = (torch.randn(shape, device=runtime.device, requires_grad=True) for _ in range(3))
    full = 4 * c.n_head * c.d_head * (T * (T + 1) // 2)
    title = f"{folder}: cost at T {T}, batch {shape[0]}, {bench.rounds} rounds; operations as a share of softmax's"
    columns = "layer, nominal (share), executed (share), forward + backward (ms), of softmax's time (ratio), "
    columns += "of the matmul peak (share)"
    with report.table(f"costs of {folder}", title, columns) as out:
        for i, attn in layers.items():
            mask = [m if m is None else m.detach().requires_grad_() for m in attn.log_mask(T)]
            inputs = [q, k, v] + [m for m in mask if m is not None]
            attention = functools.partial(distance, q, k, v, *mask, constant_ones=attn.constant_ones)
            ours = functools.partial(operator_step, attention, inputs)
            plain = functools.partial(operator_step, functools.partial(sdpa, q, k, v), [q, k, v])
            times = interleaved({"ours": ours, "plain": plain}, bench.rounds, bench.seconds / 4, runtime, f"layer {i}")
            ours, ratio = times["ours"], [a / b for a, b in zip(*times.values())]
            nominal, executed = attn.flops(T)
            share = report.share_of_peak(shape[0] * executed, ours)
            out.add(str(i), nominal / full, executed / full, [1000 * t for t in ours], ratio, share)


def mask_changes(folder, model, layers, dataset, bench, runtime, report):
    """The loss on a part of the validation split, as trained and with simpler masks."""
    split, context, losses = dataset.split("val"), model.config.block_size, {}

    def loss():
        nats = count = 0
        for x, y, scored in itertools.islice(windows(split, context, context, bench.eval_batch_size), 4):
            nats += token_nats(model, x.to(runtime.device), y.to(runtime.device), scored, runtime)
            count += int(scored.sum())
        return nats / count

    with torch.no_grad():
        losses["as trained"] = loss()
        for name in dict.fromkeys([attn.simplify(bench.prune) for attn in layers.values()]):
            if name:
                losses[name] = loss()
    columns = {"masks": "", "loss (nats/token)": ".5f", "difference (nats/token)": "+.5f"}
    with report.table(f"losses of {folder}", f"{folder}: loss on a part of the validation split", columns) as out:
        for name, value in losses.items():
            out.add(name, value, value - losses["as trained"])


def draw_masks(folder, model, layers, dataset, bench, runtime):
    """Pictures: spans.png, kept.png, weights.png (mixtures), attention.png."""
    model = GPT.from_checkpoint(folder).to(runtime.device).eval()  # as trained again
    layers, plt = {i: model.transformer.h[i].attn for i in layers}, pyplot()
    H, T = model.config.n_head, model.config.block_size
    stats = {i: attn.stats() for i, attn in layers.items()}
    names = [f"{i}.{h}" for i in layers for h in range(H)]

    several = len(run_folders(bench)) > 1
    path = functools.partial(place, bench.png, folder, several=several)

    code = colour(model.config.types()[min(layers)])
    figure, axes = plt.subplots(figsize=(max(5, 0.35 * len(names)), 3.6), layout="constrained")
    axes.bar(
        range(len(names)), torch.cat([s["kept"] for s in stats.values()]).cpu(), color=pale(code, 0.6), label="kept"
    )
    if all("span" in s for s in stats.values()):
        spans = torch.cat([s["span"] for s in stats.values()]).cpu()
        axes.plot(range(len(names)), spans, "o", color=code, label="span, without its ramp")
    axes.set(xlabel="layer.head", ylabel="distances (tokens)", xticks=range(len(names)))
    axes.set_xticklabels(names, rotation=90, fontsize=9)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    save_figure(figure, path("spans"))

    masks = torch.cat([attn.log_mask(T)[0].detach().expand(H, -1) for attn in layers.values()]).exp().cpu()
    reach = int((masks > 0).nonzero()[:, 1].max()) + 1
    kept = masks[:, :reach].masked_fill(masks[:, :reach] == 0, math.nan)
    options = dict(xlabel="distance (tokens); white: dropped", ylabel="layer.head")
    size = 9, 1.2 + 0.22 * len(names)
    save_figure(heat_map(kept, names, size, "mask (factor of a weight)", vmax=None, **options)[0], path("kept"))

    mixed = {i: s["weight"].cpu() for i, s in stats.items() if "weight" in s}
    if mixed:
        weights, candidates = torch.cat(list(mixed.values())), model.config.mask_mix_candidates.split(",")
        rows = [str(i) if len(w) == 1 else f"{i}.{h}" for i, w in mixed.items() for h in range(len(w))]
        size = 2.5 + 0.5 * len(candidates), 1.6 + 0.25 * len(weights)
        options = dict(xlabel="mask", ylabel="layer" if len(rows) == len(mixed) else "layer.head")
        figure, axes = heat_map(weights, rows, size, "weight (sigmoid of alpha)", **options)
        axes.set_xticks(range(len(candidates)), [c.strip() for c in candidates], rotation=45, ha="right")
        save_figure(figure, path("weights"))

    maps.draw_maps(model, layers, *maps.words(bench.text, model, dataset, runtime), path("attention"))
