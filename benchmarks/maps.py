"""python bench.py --what=maps --out_dir=out/a: which earlier tokens does each head read? Attention maps of any type.

A map A (H, T, T) says what a head's output is made of: o_t = sum_s A_ts v_s, before norms, gates of the output and the
output projection. Where a type's `stats` have an `attention_map`, it is that. Elsewhere the layer runs once more with
unit vectors e_s in place of the values that reach its operator, whose output for e_s is column s. This is exact where
the output is linear in the values with all else held: for gla, gsa, the delta rule, mamba2 (whose step dt_s, a factor
of the value, is put into A, and whose skip D x_t into its diagonal), and for a plugin that calls such an operator once.
Such weights may be negative and need not sum to one. Of nsa the maps of the three branches are added, each times its
gate; the weight of a compressed block is spread evenly over its tokens, which is exact for nsa_compress=mean, and for
an MLP says only which block was read. `none` has no map.
"""

import contextlib
import functools
import math
import types
from unittest import mock

import torch

from benchmarks import style
from benchmarks.runs import run_folders, runs
from config import ConfigError
from kernels.delta import delta
from kernels.distance import distance
from kernels.gated import gated
from kernels.gla import gla
from kernels.gsa import gsa
from kernels.nsa import nsa_compressed, nsa_selected, nsa_window
from kernels.performer import performer
from model import Mamba2, NativeSparseAttention, rotate

OPERATORS = (gla, gsa, delta, performer, distance, gated)  # (q, k, v, ...) -> o, or o and what is no output
TOKENS = 24  # of a map, unless --text has more
LONGEST = 64
SIGNS = {" ": "·", "\n": "↵", "\t": "⇥"}


def draw_all(bench, runtime, report):
    """For each folder a picture, maps.png: a panel for each layer and head, the text on its axes, the future white."""
    several = len(run_folders(bench)) > 1
    for folder, model, dataset in runs(bench, runtime):
        path = style.place(bench.png, folder, "maps", several) if several or not bench.png else bench.png
        layers = range(model.config.n_layer)
        if not draw_maps(model, layers, *words(bench.text, model, dataset, runtime), path):
            raise ConfigError(f"{folder}: no layer of {model.config.attention_type!r} has an attention map")


def words(text, model, dataset, runtime):
    """(ids (1, T), the text of each) of --text, or of the beginning of the validation split."""
    codec, most = dataset.codec, min(LONGEST, model.config.block_size)
    beginning = min(TOKENS, most, dataset.record_len or most)
    ids = [int(i) for i in (codec.encode(text)[:most] if text else dataset.split("val").tokens[:beginning])]
    if not ids:
        raise ConfigError("--text has no token")
    names = ["".join(SIGNS.get(c, c if c.isprintable() else "?") for c in codec.decode([i])) for i in ids]
    return torch.tensor([ids], device=runtime.device), [name[:9] or "?" for name in names]


def attention_map(attn, x):
    """(H, T, T) of the first sequence of a layer's input x (B, T, C), or None: see the top of this file."""
    x = x[:1]
    if (found := attn.stats(x).get("attention_map")) is not None:
        return found.float()
    if isinstance(attn, NativeSparseAttention):
        return branches_map(attn, x)
    found, T = [], x.size(1)

    def unit(operator, q, k, v, *rest, **options):
        eye = torch.eye(T, dtype=v.dtype, device=v.device)[None, :, None].expand(1, T, v.size(2), T)
        given = operator(q, k, eye, *rest, **{k: o for k, o in options.items() if k != "initial_state"})
        found.append((given[0] if isinstance(given, tuple) else given)[0].transpose(0, 1))  # (H, T, T)
        return operator(q, k, v, *rest, **options)

    with torch.no_grad(), watched(attn, unit):
        attn(x)
        if len(found) != 1:
            return None
        weights = found[0].float()
        if isinstance(attn, Mamba2):
            (*_, g), _, _ = attn._inputs(x, None)
            dt = -g[0].T / attn.log_a.exp()[:, None]  # (H, T)
            weights = weights * dt[:, None].float() + torch.diag_embed(attn.skip[:, None].expand_as(dt)).float()
    return weights


@contextlib.contextmanager
def watched(attn, call):
    """The operators that a layer calls, by their names in the files of its classes or by its own `operator`, become
    call(operator, q, k, v, ...)."""
    with contextlib.ExitStack() as stack:
        scopes = {}
        for cls in type(attn).__mro__:
            functions = [f for f in vars(cls).values() if isinstance(f, types.FunctionType)]
            scopes |= {id(f.__globals__): f.__globals__ for f in functions if not f.__module__.startswith("torch")}
        for scope in scopes.values():
            own = {name: op for name, value in scope.items() for op in OPERATORS if value is op}
            replaced = {name: functools.partial(call, op) for name, op in own.items()}
            stack.enter_context(mock.patch.dict(scope, replaced))
        if (operator := getattr(attn, "operator", None)) in OPERATORS:
            stack.enter_context(mock.patch.object(attn, "operator", functools.partial(call, operator)))
        yield


@torch.no_grad()
def branches_map(attn, x):
    """nsa's, from its three operators with unit vectors for values, as many at once as a head is wide."""
    q, raw, selected, window = attn._inputs(x, 0)
    blocks, (block, stride, select_block, _, width) = attn._compress(raw), attn.sizes
    index = nsa_compressed(q, *blocks.unbind(2), *attn.sizes[:4])[1]
    turned = rotate(q, 0, attn.rope_base)
    kinds = [
        (blocks[:, :, 0], lambda k, v: nsa_compressed(q, k, v, *attn.sizes[:4])[0]),
        (selected[:, :, 0], lambda k, v: nsa_selected(turned, k, v, index, select_block)),
        (window[:, :, 0], lambda k, v: nsa_window(turned, k, v, width)),
    ]
    total = 0
    for gate, (k, call) in zip(attn._gates(x).unbind(2), kinds):  # gate (1, T, H)
        n, D = k.size(1), k.size(3)
        eye = torch.eye(n, dtype=k.dtype, device=k.device)
        parts = [torch.nn.functional.pad(part, (0, D - part.size(1))) for part in eye.split(D, 1)] if n else []
        columns = [call(k, part[None, :, None].expand_as(k))[0] for part in parts]  # (T, H, D)
        weights = torch.cat(columns, -1)[..., :n] if columns else q.new_zeros(*q.shape[1:3], 0)  # (T, H, n)
        if n != x.size(1) or k is kinds[0][0]:  # blocks: over the tokens of each
            spread = q.new_zeros(n, x.size(1))
            for i in range(n):
                spread[i, i * stride : i * stride + block] = 1 / block
            weights = weights @ spread
        total = total + gate[0, ..., None] * weights
    return total.transpose(0, 1).float()


def draw_maps(model, layers, idx, names, path):
    """A row for each of these layers that has a map, a panel for each head; the picture is not written where none has.
    Weights that are at least 0 are drawn by their root, so that light ones are seen, and on one scale for all layers;
    others by sign, as a share of the head's largest. Returns the number of rows."""
    entries = model.trace(idx)
    maps = {i: attention_map(model.transformer.h[i].attn, entries[i][0]) for i in layers}
    maps = {i: a.cpu() for i, a in maps.items() if a is not None}
    if not maps:
        return 0
    T, H, plt = idx.size(1), max(map(len, maps.values())), style.pyplot()
    # the first queries have few keys, and large weights: they may be above the scale
    top = max(float(a[:, min(3, T - 1) :].max()) for a in maps.values())
    side = max(1.9, 0.4 + 0.105 * T)
    size = (side * H + 1.4, side * len(maps) + 0.5)
    figure, axes = plt.subplots(len(maps), H, figsize=size, layout="constrained", squeeze=False)
    for row, (i, weights) in zip(axes, maps.items()):
        image = draw_layer(row, i, model.config.types()[i], weights, top)
        for h, panel in enumerate(row[: len(weights)]):
            below, beside = i == [*maps][-1] or h >= len(maps[[*maps][-1]]), h == 0
            turn = 90 if max(map(len, names)) > 1 else 0
            panel.set_xticks(range(T), names if below else [""] * T, fontsize=7, rotation=turn)
            panel.set_yticks(range(T), names if beside else [""] * T, fontsize=7)
        signed = image.norm.vmin < 0
        bar = figure.colorbar(
            image, ax=list(row), fraction=0.04, pad=0.01, aspect=25, extend="neither" if signed else "max"
        )
        bar.set_label("weight / head's largest" if signed else "weight", fontsize=style.SMALL)
        bar.ax.tick_params(labelsize=8)
    figure.supxlabel("key: the token that is read", fontsize=style.SMALL)
    figure.supylabel("query: the token that reads", fontsize=style.SMALL)
    style.save_figure(figure, path)
    return len(maps)


def draw_layer(row, i, name, weights, top):
    """The heads of layer i, weights (H, T, T), on a scale up to top; returns an image of its colours."""
    from matplotlib.colors import PowerNorm

    T, signed = weights.size(-1), bool((weights < -1e-6).any())
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    if signed:
        weights = weights / weights.abs().amax((1, 2), keepdim=True).clamp(min=1e-30)
        kind = dict(cmap="RdBu_r", vmin=-1, vmax=1)
    else:
        weights = weights.clamp(min=0)
        kind = dict(cmap="viridis", norm=PowerNorm(0.5, 0, top if top > 0 else 1.0))
    for h, panel in enumerate(row):
        if h >= len(weights):
            panel.set_axis_off()
        else:
            image = panel.imshow(weights[h].masked_fill(future, math.nan).numpy(), interpolation="nearest", **kind)
            panel.set_title(f"layer {i} ({name}), head {h}", fontsize=9)
            panel.grid(False)
            panel.tick_params(length=0, pad=2)
            panel.spines[:].set_visible(False)
    return image
