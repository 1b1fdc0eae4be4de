"""Attention maps of any type, and the pictures of them."""

import pytest
import torch
from torch import nn

from benchmarks import maps
from kernels.gla import gla
from model import ATTENTION, GPT, Attention, GPTConfig

T, C = 21, 32


def layer(name, **keys):
    shape = dict(n_layer=1, n_head=4, n_embd=C, block_size=32, pos_emb="none", vocab_size=20, bias=False)
    attn = ATTENTION[name](GPTConfig(attention_type=name, **shape | keys)).eval()
    for p in attn.parameters():  # beyond the values that layers begin with, where heads hardly differ
        p.data += 0.1 * torch.randn_like(p)
    return attn


def values_and_output(attn, x, monkeypatch):
    """The values (T, H, D) that reach the layer's operator, or SDPA, and what comes out of it."""
    seen = []

    def watch(operator, q, k, v, *rest, **options):
        o = operator(q, k, v, *rest, **options)
        seen.append((v[0], (o[0] if isinstance(o, tuple) else o)[0]))
        return o

    def watch_sdpa(plain, q, k, v, **options):
        o = plain(q, k, v, **options)
        seen.append((v[0].transpose(0, 1), o[0].transpose(0, 1)))
        return o

    plain = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda *a, **o: watch_sdpa(plain, *a, **o))
    with maps.watched(attn, watch):
        attn(x)
    (found,) = seen
    return found


@pytest.mark.parametrize("name", [name for name in ATTENTION if name not in ("none", "nsa")])
def test_a_map_times_the_values_is_the_output(name, fresh_rng, monkeypatch):
    """Of every type, with the values that reach its operator. Nothing of the future is in it."""
    attn, x = layer(name), torch.randn(2, T, C)
    weights = maps.attention_map(attn, x)
    v, o = values_and_output(attn, x[:1], monkeypatch)
    if name == "mamba2":  # the map is of the input of the step, and has the skip in its diagonal
        (_, _, v, g), (plain, _), _ = attn._inputs(x[:1], None)
        o, v = (gla(*attn._inputs(x[:1], None)[0], scale=1.0)[0] + attn.skip[:, None] * plain)[0], plain[0]
    torch.testing.assert_close(torch.einsum("hts,shd->thd", weights, v.float()), o.float(), rtol=1e-3, atol=1e-4)
    assert weights.shape == (attn.n_head, T, T) and float(weights.triu(1).abs().max()) < 1e-6
    assert float(weights.abs().max()) > 1e-3


@pytest.mark.parametrize("pos_emb", ["none", "rope"])
def test_the_map_of_sparse_attention(pos_emb, fresh_rng):
    """Compressed to means, each branch is linear in its values: gates times maps times values are the output."""
    keys = dict(nsa_compress_block=4, nsa_compress_stride=2, nsa_select_block=4, nsa_select_count=3, nsa_window=6)
    attn, x = layer("nsa", nsa_compress="mean", pos_emb=pos_emb, nsa_kv_head=2, **keys), torch.randn(1, T, C)
    with torch.no_grad():
        v = torch.randn(1, T, 2, attn.d_head)  # the same in all branches
        q, raw, selected, window = attn._inputs(x, 0)
        raw, selected, window = (torch.stack((kv[:, :, 0], v), 2) for kv in (raw, selected, window))
        attn.c_proj = nn.Identity()
        expected = attn._attend(x, q, attn._compress(raw), selected, window, 0, "auto")[0].view(T, 4, -1)
    weights = maps.attention_map(attn, x)
    found = torch.einsum("hts,shd->thd", weights, v[0].repeat_interleave(2, 1))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert float(weights.triu(1).abs().max()) < 1e-6


class Doubled(Attention):
    """A type of a plugin that calls an operator by a name of its own file."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.c_attn = 2, nn.Linear(config.n_embd, 3 * config.n_embd)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, -1)) for part in self.c_attn(x).chunk(3, -1))
        return gla(q, k, v, torch.full(q.shape[:3], -0.2))[0].flatten(2), torch.zeros(())


def test_a_type_of_a_plugin_has_a_map(fresh_rng, monkeypatch):
    attn, x = Doubled(GPTConfig(n_embd=C, n_head=2)), torch.randn(1, T, C)
    weights = maps.attention_map(attn, x)
    v, o = values_and_output(attn, x, monkeypatch)
    torch.testing.assert_close(torch.einsum("hts,shd->thd", weights, v), o, rtol=1e-3, atol=1e-4)
    assert globals()["gla"] is maps.gla  # nothing stays replaced


def test_layers_share_one_scale(fresh_rng, monkeypatch, tmp_path):
    """The largest weight of all layers, those of the first three queries left out."""
    config = GPTConfig(attention_type="softmax", n_layer=2, n_head=2, n_embd=C, block_size=T, vocab_size=7)
    model, drawn = GPT(config).eval(), []
    torch.nn.init.normal_(model.transformer.h[1].attn.c_attn.weight, std=1.0)  # its weights are far larger
    draw = maps.draw_layer
    monkeypatch.setattr(maps, "draw_layer", lambda *args: drawn.append((args[3], draw(*args))) or drawn[-1][1])
    idx = torch.randint(7, (1, T))
    assert maps.draw_maps(model, [0, 1], idx, ["x"] * T, str(tmp_path / "maps.png")) == 2
    largest = [weights[:, 3:].max().item() for weights, _ in drawn]
    assert largest[1] > 1.5 * largest[0]
    assert [image.norm.vmax for _, image in drawn] == pytest.approx([largest[1]] * 2)


def test_none_has_no_map():
    assert maps.attention_map(layer("none"), torch.randn(1, T, C)) is None
