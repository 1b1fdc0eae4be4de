"""Native sparse attention: each branch against dense masks in float64, and against two public definitions."""

import importlib.util
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import oracle
from test_attention import make, pieces

import kernels
from kernels import nsa as K
from kernels.launch import Kernel
from kernels.nsa import nsa_compressed, nsa_pairs, nsa_selected, nsa_sizes, nsa_window
from model import GPT, GPTConfig, NSAState, rotate

EXACT, FP32 = 1e-10, 1e-5
SIZES = (8, 4, 8, 4)  # l, d, l', n


@pytest.fixture(autouse=True)
def fresh_seed():
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)  # shown when a test fails
    torch.manual_seed(seed)


def draw(B, T, H, Hk, D, S=None, dtype=torch.float64):
    """q, k, v and the gradient that comes in."""
    q, do = torch.randn(2, B, T, H, D, dtype=dtype)
    k, v = torch.randn(2, B, T if S is None else S, Hk, D, dtype=dtype)
    return q, k, v, do


def draw_compressed(B, T, H, Hk, D, sizes=SIZES, offset=0):
    return draw(B, T, H, Hk, D, max(0, (offset + T - sizes[0]) // sizes[1] + 1))


def some_index(B, T, Hk, n, select_block, offset=0):
    """A query's own block, and others that it may see, each once, in any order, with gaps."""
    index = torch.full((B, T, Hk, n), -1)
    for b, t, h in torch.cartesian_prod(*map(torch.arange, (B, T, Hk))).tolist():
        own = (offset + t) // select_block
        index[b, t, h, 0] = own
        others = torch.randperm(own)[: n - 1]
        index[b, t, h, 1 + torch.randperm(n - 1)[: len(others)]] = others
    return index


def run(f, inputs, dtype):
    """The output of f(q, k, v) and the gradients of q, k and v, in float64."""
    *leaves, do = (x.to(dtype, copy=True) for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    o = f(*leaves)
    assert o.dtype == dtype
    return [x.detach().double() for x in (o, *torch.autograd.grad(o, leaves, do))]


def agree(found, wanted, tolerance):
    for name, x, ref in zip(("o", "dq", "dk", "dv"), found, wanted, strict=True):
        assert x.shape == ref.shape and torch.isfinite(x).all(), name
        error = ((x - ref).norm() / ref.norm().clamp(min=1e-30)).item() if x.numel() else 0.0
        assert error <= tolerance or (x - ref).abs().max() < tolerance, f"{name}: {error:.1e}"


def compare(f, dense, inputs):
    wanted = run(dense, inputs, torch.float64)
    agree(run(f, inputs, torch.float64), wanted, EXACT)
    agree(run(f, inputs, torch.float32), wanted, FP32)


def compare_compressed(inputs, sizes, offset=0):
    def f(q, k, v):
        return nsa_compressed(q, k, v, *sizes, offset=offset)[0]

    def dense(q, k, v):
        return K.nsa_compressed_dense(q, k, v, *sizes, offset)[0]

    compare(f, dense, inputs)
    o, wanted = K.nsa_compressed_dense(*inputs[:3], *sizes, offset)
    for mode in (True, False):  # one token without gradients has a form of its own
        with torch.set_grad_enabled(mode):
            again, found = nsa_compressed(*inputs[:3], *sizes, offset)
        torch.testing.assert_close(again, o, rtol=0, atol=1e-10)
        assert torch.equal(found[..., 0], wanted[..., 0]) and torch.equal(found.sort(-1)[0], wanted.sort(-1)[0])


def compare_selected(inputs, index, select_block):
    def dense(q, k, v):
        return K.nsa_selected_dense(q, k, v, index, select_block)

    for backend in ("torch", "gather"):
        compare(lambda q, k, v: nsa_selected(q, k, v, index, select_block, backend=backend), dense, inputs)  # noqa: B023


def compare_window(inputs, window):
    compare(lambda q, k, v: nsa_window(q, k, v, window), lambda q, k, v: K.nsa_window_dense(q, k, v, window), inputs)


# ----------------------------------------------------------------------------- branches against the oracle

HEADS = [(4, 1), (4, 2), (3, 3), (6, 2)]


@pytest.mark.parametrize("H, Hk", HEADS)
@pytest.mark.parametrize("T", [1, 7, 8, 9, 63, 64, 65, 100, 150])
def test_lengths(T, H, Hk):
    """Shorter than a block, one token more or less than a block or a tile, and no multiple of any of them."""
    compare_compressed(draw_compressed(2, T, H, Hk, 12), SIZES)
    compare_selected(draw(2, T, H, Hk, 12), some_index(2, T, Hk, 4, 8), 8)
    compare_window(draw(2, T, H, Hk, 12), 16)


@pytest.mark.parametrize(
    "sizes", [(8, 8, 8, 3), (8, 2, 16, 5), (16, 8, 16, 6), (4, 4, 12, 4), (32, 16, 64, 16), (1, 1, 1, 3)]
)
def test_sizes_of_blocks(sizes):
    compare_compressed(draw_compressed(1, 150, 2, 1, 8, sizes), sizes)
    compare_selected(draw(1, 150, 2, 1, 8), some_index(1, 150, 1, sizes[3], sizes[2]), sizes[2])


@pytest.mark.parametrize("window", [1, 2, 3, 16, 17, 64, 70, 149, 150, 1000])
def test_sizes_of_windows(window):
    compare_window(draw(2, 150, 2, 1, 8), window)


@pytest.mark.parametrize("T, past", [*((1, past) for past in (6, 8, 16, 24, 31, 100)), (3, 1), (21, 77), (100, 5)])
def test_continuing_a_sequence(T, past):
    """The queries are the last T of past + T tokens."""
    compare_compressed(draw_compressed(2, T, 4, 2, 8, offset=past), SIZES, past)
    compare_selected(draw(2, T, 4, 2, 8, past + T), some_index(2, T, 2, 4, 8, past), 8)
    for window in (3, 16, 1000):
        compare_window(draw(2, T, 4, 2, 8, past + T), window)


@pytest.mark.parametrize("scores, pairs", [(1, 1), (3000, 500), (20_000, 500)])
def test_several_segments(scores, pairs, monkeypatch):
    """Borders between segments, also inside a block and between batch rows."""
    monkeypatch.setattr(K, "SCORES", scores)
    monkeypatch.setattr(K, "PAIRS", pairs)
    monkeypatch.setattr(K, "FILL", 0)
    compare_compressed(draw_compressed(3, 75, 4, 2, 8), SIZES)
    compare_selected(draw(2, 41, 4, 2, 8), some_index(2, 41, 2, 4, 8), 8)
    compare_window(draw(3, 75, 4, 2, 8), 16)


@pytest.mark.parametrize("B, T, S", [(5, 30, 30), (3, 16, 21), (4, 20, 90)])
def test_a_window_in_tiles_of_several_groups(B, T, S):
    q, *_ = inputs = draw(B, T, 4, 2, 8, S)
    q = q.transpose(1, 2).flatten(0, 1).unsqueeze(2)
    places = K.window_tiles(q, -(-T // 16), 8, 16)
    assert places[0][:2] == (0, 4 * B) and len(places) == -(-T // 16)
    compare_window(inputs, 8)


def test_large_scores():
    """Logits in the thousands: the softmax of one key, no overflow."""
    q, k, v, do = draw(1, 70, 2, 1, 8)
    for f in (
        lambda: nsa_compressed(100 * q, k[:, :16] * 100, v[:, :16], *SIZES)[0],
        lambda: nsa_selected(100 * q, 100 * k, v, some_index(1, 70, 1, 4, 8), 8),
        lambda: nsa_window(100 * q, 100 * k, v, 16),
    ):
        assert f().isfinite().all() and f().abs().max() <= v.abs().max() + 1e-9


def test_gradcheck():
    """Against differences, not against the oracle's autograd."""
    leaves = [x.requires_grad_() for x in draw_compressed(1, 12, 2, 1, 3, (4, 2, 4, 3))[:3]]
    assert torch.autograd.gradcheck(lambda *x: nsa_compressed(*x, 4, 2, 4, 3)[0], leaves)
    leaves, index = [x.requires_grad_() for x in draw(1, 11, 2, 1, 3)[:3]], some_index(1, 11, 1, 3, 4)
    assert torch.autograd.gradcheck(lambda *x: nsa_selected(*x, index, 4), leaves)
    assert torch.autograd.gradcheck(lambda *x: nsa_window(*x, 5), leaves)


def test_bf16_computes_in_fp32():
    inputs = [x.bfloat16() for x in draw(1, 70, 2, 1, 16)[:3]]
    index = some_index(1, 70, 1, 4, 8)
    for f in (lambda q, k, v: nsa_selected(q, k, v, index, 8), lambda q, k, v: nsa_window(q, k, v, 16)):
        found, wanted = f(*inputs), f(*(x.double() for x in inputs))
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), wanted, rtol=5e-3, atol=5e-3)


# ----------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("block, stride, select_block", [(32, 16, 64), (8, 4, 8), (8, 8, 8), (16, 4, 32), (12, 4, 24)])
def test_importance_is_the_overlap(block, stride, select_block):
    """The formula of the paper, sum_m sum_n p[(l'/d) j + m - n], against token sets counted one by one."""
    n_blocks, N = 6, (6 * select_block - block) // stride + 1
    tokens = torch.zeros(N, n_blocks * select_block)
    for i in range(N):
        tokens[i, i * stride : i * stride + block] = 1
    shared = tokens.view(N, n_blocks, select_block).sum(-1) / stride
    assert torch.equal(K.overlap(N, block, stride, n_blocks, select_block), shared)
    p = torch.rand(2, 5, N)
    found = K.importance(p, n_blocks - 2, block, stride, select_block)  # of blocks 1 ... n_blocks - 2
    torch.testing.assert_close(found, (p @ shared)[..., 1:-1])
    if (block, stride, select_block) == (32, 16, 64):
        assert shared[3:8, 1].tolist() == [1, 2, 2, 2, 1] and shared[:, 1].sum() == 8


def test_a_block_is_seen_from_its_last_token_on():
    """Block i, of tokens i d ... i d + l - 1: not one token earlier, and not one later."""
    q, k, v, _ = draw_compressed(1, 40, 1, 1, 4)
    before = nsa_compressed(q, k, v, *SIZES)[0]
    for i in range(k.shape[1]):
        edited = v.clone()
        edited[:, i] += 1
        moved = (nsa_compressed(q, k, edited, *SIZES)[0] - before).abs().amax((0, 2, 3)) > 0
        assert moved.nonzero()[0].item() == 4 * i + 7
    assert (before[:, :7] == 0).all()


def test_forced_blocks_and_the_best_of_the_rest():
    """Own, first and previous block always; block 3 because the compressed scores point there, for each group alone."""
    T, N = 64, 15
    q = torch.zeros(1, T, 4, 4, dtype=torch.float64)
    k, v = torch.zeros(1, N, 2, 4, dtype=torch.float64), torch.randn(1, N, 2, 4, dtype=torch.float64)
    q[:, :, 1, 0] = q[:, :, 2, 1] = 10.0  # one head of each group of two asks, the other is indifferent
    k[:, 6, 0, 0] = k[:, 4, 1, 1] = 10.0  # compressed block 6 is block 3, compressed block 4 is block 2
    _, index = nsa_compressed(q, k, v, *SIZES)
    assert index.shape == (1, T, 2, 4)
    assert index[0, 63].sort(-1)[0].tolist() == [[0, 3, 6, 7], [0, 2, 6, 7]]
    assert index[0, 4, 0].tolist() == [0, -1, -1, -1] and index[0, 8, 0].tolist() == [1, 0, -1, -1]
    assert index[0, 23, 0].sort()[0].tolist() == [-1, 0, 1, 2] and index[0, 31, 0].sort()[0].tolist() == [0, 1, 2, 3]
    assert (index[..., 0] == (torch.arange(T) // 8).view(1, T, 1)).all()


def test_the_window_is_as_long_as_said():
    q, k, v, _ = draw(1, 100, 1, 1, 4)
    before = nsa_window(q, k, v, 16)
    for s in (0, 1, 40, 84, 99):
        edited = v.clone()
        edited[:, s] += 1
        moved = (nsa_window(q, k, edited, 16) - before).abs().amax((0, 2, 3)) > 0
        assert moved.nonzero().flatten().tolist() == list(range(s, min(100, s + 16)))


def test_the_table_reads_what_the_specification_says():
    """Keys read by the last query; selected and window ones together no more than half of T."""
    for T, reads in {128: 79, 256: 127, 512: 223, 1024: 447, 2048: 895, 4096: 1791}.items():
        block, stride, select_block, count, window = nsa_sizes(T)
        assert count * select_block + window <= T / 2
        assert (T - block) // stride + 1 + count * select_block + window == reads
    assert nsa_sizes(100) == nsa_sizes(128) and nsa_sizes(129) == nsa_sizes(256) and nsa_sizes(9999) == nsa_sizes(4096)


def test_pairs_are_counted():
    for T in (1, 7, 64, 150):
        sizes = (8, 4, 8, 4, 16)
        q, k, v, _ = draw_compressed(1, T, 1, 1, 4)
        index = nsa_compressed(q, k, v, *SIZES)[1]
        s, t = torch.arange(T), torch.arange(T)[:, None]
        read = int((torch.arange(k.shape[1]) * 4 + 7 <= t).sum()) + int(((t - s >= 0) & (t - s < 16)).sum())
        read += int(((s // 8 == index[0, :, 0].unsqueeze(-1)).any(1) & (s <= t)).sum())
        nominal, executed = nsa_pairs(T, sizes)
        assert nominal == read and executed >= nominal


# ----------------------------------------------------------------------------- public references


def fla_naive():
    if importlib.util.find_spec("fla") is None:
        message = "fla-core is not installed"
        pytest.fail(message) if os.environ.get("NANO_REQUIRE_ORACLES") == "1" else pytest.skip(message)
    pytest.importorskip("triton")
    from fla.ops.nsa import naive

    return naive


@pytest.mark.parametrize("H, Hk", HEADS)
def test_fla_definitions(H, Hk):
    """Selected attention, and with l = d = l' compressed attention and the choice of blocks."""
    naive, (q, k, v, do) = fla_naive(), draw(2, 100, H, Hk, 16, dtype=torch.float32)
    index = some_index(2, 100, Hk, 4, 8)
    wanted = run(lambda q, k, v: naive.naive_nsa_selection(q, k, v, index, 8, 0.25), (q, k, v, do), torch.float32)
    for backend in ("torch", "gather"):
        f = lambda q, k, v: nsa_selected(q, k, v, index, 8, 0.25, backend=backend)  # noqa: B023, E731
        agree(run(f, (q, k, v, do), torch.float32), wanted, FP32)
    sizes = (8, 8, 8, 5)
    q, k, v, do = (x.float() for x in draw_compressed(2, 96, H, Hk, 16, sizes))
    o, index = nsa_compressed(q, k, v, *sizes)
    torch.testing.assert_close(o, naive.naive_nsa_compression(q, k, v, 8, 0.25)[0], rtol=0, atol=2e-6)
    wanted = naive.naive_nsa_topk(q, k, 5, 8, 0.25)
    assert torch.equal(index.sort(-1)[0], wanted.sort(-1)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_blocks_are_chosen_by_recency(dtype):
    """A compressed block that lies half in one selectable block and half in the next gives both the same score, up to
    rounding: the choice must not hang on that, or a step and a forward pass would read different tokens."""
    sizes, (q, k, v, _) = (8, 4, 8, 4), draw_compressed(2, 64, 2, 1, 16, (8, 4, 8, 4))
    q, k, v = q.to(dtype), 0.1 * k.to(dtype), v.to(dtype)
    q[..., 0], k[:, 7, :, 0] = 20.0, 20.0  # tokens 28 to 35: blocks 3 and 4
    index = nsa_compressed(q, k, v, *sizes)[1]
    assert (index[:, 48:56] == 4).any(-1).all() and not (index[:, 48:56] == 3).any()
    assert torch.equal(index.sort(-1)[0], K.nsa_compressed_dense(q, k, v, *sizes)[1].sort(-1)[0])
    for t in range(48, 56):
        one = nsa_compressed(q[:, t : t + 1], k[:, : (t - 7) // 4 + 1], v[:, : (t - 7) // 4 + 1], *sizes, offset=t)[1]
        assert torch.equal(one.sort(-1)[0], index[:, t : t + 1].sort(-1)[0])


def lucidrains(H, Hk, window, count):
    """The public module as far as the definitions agree: no norm, no rotary positions; K and V are those of all
    branches. Its window is one token longer than it says."""
    package = oracle("native_sparse_attention_pytorch")
    theirs = package.SparseAttention(
        dim=32, dim_head=8, heads=H, kv_heads=Hk, sliding_window_size=window - 1, compress_block_size=8,
        compress_block_sliding_stride=4, selection_block_size=8, num_selected_blocks=count, causal=True, norm=False,
    )  # fmt: skip
    theirs.rotary_emb.rotate_queries_with_cached_keys = lambda q, k: (q, k)
    ours = (
        GPT(
            GPTConfig(
                block_size=128,
                vocab_size=9,
                n_layer=1,
                n_head=H,
                n_embd=32,
                head_dim=8,
                attention_type="nsa",
                nsa_kv_head=Hk,
                nsa_window=window,
                nsa_select_count=max(3, count),
            )  # fmt: skip
        )
        .transformer.h[0]
        .attn
    )
    with torch.no_grad():
        qkv, kv = theirs.to_qkv.weight, 2 * Hk * 8
        ours.c_attn.weight.copy_(torch.cat((qkv[: H * 8], *(qkv[H * 8 :],) * 3)))
        assert qkv.shape[0] == H * 8 + kv
        ours.c_proj.weight.copy_(theirs.combine_heads.weight)
    return theirs, ours


def set_gates(ours, gates, theirs=None):
    """The three gates of each head to 0 or 1."""
    bias = torch.tensor(gates, dtype=torch.float64) * 80 - 40
    with torch.no_grad():
        ours.c_gate.weight.zero_()
        ours.c_gate.bias.copy_(bias.repeat_interleave(ours.n_head))
        if theirs is not None:
            theirs.to_strategy_combine[0].bias.copy_(bias.repeat(ours.n_head))


@pytest.mark.parametrize("H, Hk", HEADS)
def test_native_sparse_attention_pytorch(H, Hk):
    """Its window, and its selected branch with every block selected; outputs and gradients of the input."""
    theirs, ours = lucidrains(H, Hk, 17, 16)
    x = torch.randn(2, 96, 32, requires_grad=True)
    for gates in ((0, 0, 1), (0, 1, 0)):
        set_gates(ours, gates, theirs)
        found, wanted = ours(x)[0], theirs(x)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        do = torch.randn_like(found)
        grads = [torch.autograd.grad(y, x, do)[0] for y in (found, wanted)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------- the layer


def softmax_of(attn, x, branch, window=None):
    """What causal softmax attention gives with the keys and values of one branch (1 selected, 2 window)."""
    q, *kv = attn._inputs(x, 0)
    k, v = kv[branch].unbind(2)
    if attn.rope_base is not None:
        q = rotate(q, 0, attn.rope_base)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return attn.c_proj(o.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("pos_emb", ["learned", "rope"])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_degenerate_cases_are_softmax(kv, pos_emb):
    """Everything selected and gates (0, 1, 0); a window as long as T and gates (0, 0, 1)."""
    x = torch.randn(2, 61, 32, dtype=torch.float64)
    attn = make("nsa", n_head=4, nsa_kv_head=kv, nsa_select_count=8, pos_emb=pos_emb)
    set_gates(attn, (0, 1, 0))
    torch.testing.assert_close(attn(x)[0], softmax_of(attn, x, 1), rtol=0, atol=1e-10)
    attn = make("nsa", n_head=4, nsa_kv_head=kv, nsa_window=61, pos_emb=pos_emb)
    set_gates(attn, (0, 0, 1))
    torch.testing.assert_close(attn(x)[0], softmax_of(attn, x, 2), rtol=0, atol=1e-10)


@pytest.mark.parametrize("compress", ["mlp", "mean"])
def test_the_layer_is_its_equation(compress):
    """By hand from the parameters, block by block: compression, the dense branches, gates for each head."""
    attn, T = make("nsa", n_head=4, nsa_kv_head=2, nsa_compress=compress), 61
    block, stride, select_block, count, window = attn.sizes
    x = torch.randn(2, T, 32, dtype=torch.float64)
    q, *kv = attn.c_attn(x).split(list(attn.parts.values()), -1)
    q = q.view(2, T, 4, 8)
    kv = [t.view(2, T, 2, 2, 8) for t in kv]
    blocks = []
    for i in range((T - block) // stride + 1):
        tokens, made = kv[0][:, i * stride : i * stride + block], []
        for j in range(2):  # keys, values
            if compress == "mean":
                made.append(tokens[:, :, j].mean(1))
                continue
            flat = (tokens[:, :, j].transpose(1, 2) + attn.slots[j]).flatten(2)  # (B, Hk, l D)
            made.append(F.gelu(flat @ attn.phi_in[j]) @ attn.phi_out[j])
        blocks.append(torch.stack(made, 1))
    ck, cv = torch.stack(blocks, 1).unbind(2)  # (B, N, Hk, D)
    o_cmp, index = K.nsa_compressed_dense(q, ck, cv, block, stride, select_block, count)
    o_slc = K.nsa_selected_dense(q, *kv[1].unbind(2), index, select_block)
    o_win = K.nsa_window_dense(q, *kv[2].unbind(2), window)
    gate = torch.sigmoid(x @ attn.c_gate.weight.T + attn.c_gate.bias).view(2, T, 3, 4, 1)
    o = gate[:, :, 0] * o_cmp + gate[:, :, 1] * o_slc + gate[:, :, 2] * o_win
    torch.testing.assert_close(attn(x)[0], o.flatten(2) @ attn.c_proj.weight.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("compress", ["mlp", "mean"])
@pytest.mark.parametrize("T", [8, 37, 200])
def test_every_parameter_has_a_gradient(compress, T):
    """T = 8 is the shortest with a compressed block."""
    attn = make("nsa", block_size=256, n_head=4, nsa_compress=compress, nsa_compress_block=8).train()
    y, _ = attn(torch.randn(2, T, 32, dtype=torch.float64))
    (y * torch.randn_like(y)).sum().backward()
    for name, p in attn.named_parameters():
        keys = name == "phi_out" and T == 8  # one block alone is seen by one token: its softmax ignores the key
        assert p.grad.isfinite().all() and (p.grad[int(keys) :].abs().max() > 0), name


def test_a_sequence_shorter_than_a_block_trains():
    attn = make("nsa", n_head=4).train()
    y, _ = attn(torch.randn(2, 5, 32, dtype=torch.float64))
    y.sum().backward()
    assert y.isfinite().all() and attn.c_attn.weight.grad.isfinite().all()


@pytest.mark.parametrize("keys", [dict(), dict(nsa_compress="mean"), dict(nsa_kv_head=4), dict(nsa_window=3)])
@pytest.mark.parametrize("pos_emb", ["rope", "none"])
def test_decoding_far_beyond_the_block(pos_emb, keys, fresh_rng):
    """The caches grow: 300 tokens with room for 64, in one piece, one by one, and mixed."""
    attn = make("nsa", n_head=4, pos_emb=pos_emb, **keys)
    x = torch.randn(2, 300, 32, dtype=torch.float64)
    expected = attn(x)[0]
    for split in ([300], [1] * 300, pieces(300, fresh_rng), [100, 1, 1, 198], [1] * 20 + [280]):
        state = attn.init_state(2, 64)
        found = torch.cat([attn.step(part, state)[0] for part in x.split(split, 1)], 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_a_prefix_gives_the_same_rows():
    attn = make("nsa", n_head=4)
    x = torch.randn(1, 64, 32, dtype=torch.float64)
    y = attn(x)[0]
    for t in range(1, 64):
        torch.testing.assert_close(attn(x[:, :t])[0], y[:, :t], rtol=0, atol=1e-11)


def test_what_the_caches_hold():
    """All blocks and all selected tokens, the window, and the raw tokens of blocks that are not complete."""
    attn = make("nsa", n_head=4)
    state = attn.init_state(2, 64)
    for t in range(1, 64):
        attn.step(torch.randn(2, 1, 32, dtype=torch.float64), state)
        done = max(0, (t - 8) // 4 + 1)
        assert (state.n, state.n_blocks) == (t, done) and state.raw.size(1) == t - 4 * done <= 8
        assert state.window.size(1) == min(t, 16) and state.selected.size(1) == 64


def test_a_step_reads_as_many_tokens_as_the_formula():
    """floor((t + 1 - l) / d) + 1 compressed keys, n blocks of l' tokens up to the query, and w tokens, the query's own
    among them: those rows of the caches have a gradient, and what the other rows hold does not matter."""
    attn, T = make("nsa", block_size=128, n_head=4, nsa_kv_head=2), 128
    block, stride, select_block, count, window = attn.sizes
    x = torch.randn(1, T, 32, dtype=torch.float64)
    for t in (6, 7, 12, 30, 63, 64, 100, 127):
        state = attn.init_state(1, T)
        attn.step(x[:, :t], state)
        caches = [c.detach().clone().requires_grad_() for c in (state.blocks, state.selected, state.window)]

        def step(*caches):
            before = NSAState(T, t, state.n_blocks, state.raw.detach(), *(c * 1 for c in caches))  # noqa: B023
            return attn.step(x[:, t : t + 1], before)[0]  # noqa: B023

        y = step(*caches)
        grads = torch.autograd.grad((y * torch.randn_like(y)).sum(), caches)
        read = [g[0, :, 1].abs().amax(-1) > 0 for g in grads]  # by the values: (tokens, Hk)
        blocks = max(0, (t + 1 - block) // stride + 1)
        chosen = min(count - 1, t // select_block) * select_block + t % select_block + 1
        wanted = blocks, chosen, min(t + 1, window)
        new = blocks - state.n_blocks, 1, 1  # what the step's own token adds
        assert [rows.sum(0).tolist() for rows in read] == [[a - b] * 2 for a, b in zip(wanted, new)]
        for cache, rows in zip(caches, read):
            cache.data.transpose(2, 3)[0][~rows] = 1e3
        torch.testing.assert_close(step(*caches), y, rtol=0, atol=1e-12)
    assert sum(wanted) == blocks + count * select_block + window == 79


@pytest.mark.parametrize("f", ["compressed", "selected", "window"])
def test_rows_and_groups_are_apart(f):
    """Another sequence's or another group's queries, keys and values change nothing, to the last digit."""
    T, index = 75, some_index(3, 75, 2, 4, 8)

    def call(q, k, v):
        if f == "compressed":
            o, chosen = nsa_compressed(q, k[:, :17], v[:, :17], *SIZES)
            return torch.cat((o.flatten(2), chosen.flatten(2).double()), 2)
        o = nsa_selected(q, k, v, index, 8) if f == "selected" else nsa_window(q, k, v, 16)
        return o.flatten(2)

    q, k, v, _ = draw(3, T, 4, 2, 8)
    before = call(q, k, v)
    edited = [x.clone() for x in (q, k, v)]
    for x in edited:
        x[1] = torch.randn_like(x[1])
    after = call(*edited)
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and not torch.equal(before[1], after[1])
    edited = [x.clone() for x in (q, k, v)]
    for x in edited:
        x[:, :, x.shape[2] // 2 :] = torch.randn_like(x[:, :, x.shape[2] // 2 :])
    assert torch.equal(before[..., :16], call(*edited)[..., :16])


def test_strictly_causal_at_long_range():
    """Far more blocks than are selected; and the far past is reached through the selected branch alone."""
    attn = make("nsa", n_head=4, nsa_select_count=3)
    x = torch.randn(1, 200, 32, dtype=torch.float64)
    y = attn(x)[0]
    for t in (0, 7, 8, 100, 103, 199):
        edited = x.clone()
        edited[:, t:] += torch.randn(1, 200 - t, 32, dtype=torch.float64)
        assert (attn(edited)[0][:, :t] - y[:, :t]).abs().max() <= 1e-12 if t else True


def test_layers_have_their_own_attention():
    gpt = GPT(GPTConfig(block_size=64, vocab_size=9, n_layer=3, n_head=4, n_embd=32, attention_type="nsa"))
    first = [{id(p) for p in block.attn.parameters()} for block in gpt.transformer.h]
    assert len(set.union(*first)) == sum(map(len, first)) == 3 * 7


def test_stats():
    attn = make("nsa", n_head=4)
    stats = attn.stats(torch.randn(2, 61, 32, dtype=torch.float64))
    assert stats["gate"].shape == (3, 4) and (stats["gate"] > 0).all() and (stats["gate"] < 1).all()
    reads = stats["reads"]
    assert reads.shape == (8, 8) and (reads.triu(1) == 0).all() and (reads[:, 0] == 1).all()
    torch.testing.assert_close(reads.sum(-1), torch.tensor([1.0, 2, 3, 4, 4, 4, 4, 4]))


@pytest.mark.parametrize(
    "keys, said",
    [
        (dict(nsa_kv_head=3), "nsa_kv_head=3"),
        (dict(nsa_compress_stride=3), "nsa_compress_stride=3"),
        (dict(nsa_compress_block=16), "nsa_compress_block=16"),
        (dict(nsa_select_block=9), "nsa_select_block=9"),
        (dict(nsa_select_count=2), "nsa_select_count=2"),
    ],
)
def test_configs_that_cannot_be(keys, said):
    with pytest.raises(ValueError, match=said) as error:
        GPTConfig(block_size=64, n_head=4, n_embd=32, attention_type="nsa", **keys)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------- the ops


def test_opcheck():
    q, k, v, _ = (x.float().requires_grad_() for x in draw(1, 40, 2, 1, 4))
    index = some_index(1, 40, 1, 4, 8)
    few = [x.detach()[:, :9].requires_grad_() for x in (k, v)]
    torch.library.opcheck(K.compressed_op, (q, *few, 0.5, *SIZES, 0, False))
    torch.library.opcheck(K.selected_op, (q, k, v, index, 0.5, 8, False))
    torch.library.opcheck(K.window_op, (q, k, v, 0.5, 16, False))


def test_gradients_in_one_graph():
    attn = make("nsa", torch.float32, n_head=4).train()
    x = torch.randn(2, 61, 32)

    def f(x):
        return attn(x)[0].square().sum()

    wanted = torch.autograd.grad(f(x), list(attn.parameters()))
    torch._dynamo.reset()
    found = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(x), list(attn.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_strided_inputs_are_left_alone():
    index = some_index(2, 70, 2, 4, 8)
    calls = (
        lambda q, k, v: nsa_compressed(q, k[:, :16], v[:, :16], *SIZES)[0],
        lambda q, k, v: nsa_selected(q, k, v, index, 8),
        lambda q, k, v: nsa_window(q, k, v, 16),
    )
    inputs = draw(2, 70, 4, 2, 8)
    for f in calls:
        strided = [torch.stack([x, x], -1)[..., 0].transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
        strided[3] = inputs[3][:, :1, :1].expand_as(inputs[3])  # as the gradient of a sum arrives
        before = [x.clone() for x in strided]
        leaves = [x.requires_grad_() for x in strided[:3]]
        o = f(*leaves)
        first = torch.autograd.grad(o, leaves, strided[3], retain_graph=True)
        second = torch.autograd.grad(o, leaves, strided[3])
        assert all(map(torch.equal, first, second)) and all(map(torch.equal, before, strided))
        agree([o.detach(), *first], run(f, (*inputs[:3], strided[3].contiguous()), torch.float64), EXACT)


@pytest.mark.parametrize(
    "name, f",
    [
        ("nsa_compressed: q", lambda q, k, i: nsa_compressed(q[0], k[:, :1], k[:, :1], *SIZES)),
        ("nsa_compressed: k must hold the 1", lambda q, k, i: nsa_compressed(q, k, k, *SIZES)),
        ("nsa_compressed: stride", lambda q, k, i: nsa_compressed(q, k[:, :1], k[:, :1], 8, 3, 8, 4)),
        ("nsa_compressed: stride", lambda q, k, i: nsa_compressed(q, k[:, :1], k[:, :1], 8, 4, 4, 4)),
        ("nsa_compressed: select_count", lambda q, k, i: nsa_compressed(q, k[:, :1], k[:, :1], 8, 4, 8, 2)),
        ("nsa_compressed: offset", lambda q, k, i: nsa_compressed(q, k[:, :1], k[:, :1], *SIZES, offset=-1)),
        ("nsa_selected: k and v", lambda q, k, i: nsa_selected(q, k, k[:, 1:], i, 4)),
        ("nsa_selected: k must be at least", lambda q, k, i: nsa_selected(q, k[:, 1:], k[:, 1:], i, 4)),
        ("nsa_selected: index", lambda q, k, i: nsa_selected(q, k, k, i[:, 1:], 4)),
        ("nsa_selected: index", lambda q, k, i: nsa_selected(q, k, k, i.int(), 4)),
        ("nsa_selected: backend", lambda q, k, i: nsa_selected(q, k, k, i, 4, backend="cuda")),
        ("nsa_window: k has 2 heads", lambda q, k, i: nsa_window(q, k.repeat(1, 1, 2, 1), k.repeat(1, 1, 2, 1), 4)),
        ("nsa_window: window", lambda q, k, i: nsa_window(q, k, k, 0)),
        ("nsa_window: q", lambda q, k, i: nsa_window(q[:, :0], k, k, 4)),
    ],
)
def test_errors_name_the_argument(name, f):
    q, k, _, _ = draw(1, 8, 3, 1, 4)
    index = some_index(1, 8, 1, 3, 4)
    nsa_compressed(q, k[:, :1], k[:, :1], *SIZES), nsa_selected(q, k, k, index, 4), nsa_window(q, k, k, 4)
    with pytest.raises(ValueError, match=rf"^{name}") as error:
        f(q, k, index)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------- Triton


def test_triton_under_the_interpreter():
    """The test below, in a process whose kernels run on the CPU."""
    if kernels.triton is None:
        pytest.skip("Triton is not installed")
    if kernels.interpreting():
        pytest.skip("already inside")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", "interpreted", __file__]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=Path(__file__).parent.parent, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout, result.stdout[-4000:]


def compare_triton(T, H, Hk, D, n, select_block, past, dtype=torch.float32, device="cpu", tolerance=FP32):
    """The selected branch; all groups and lengths share one oracle: float64, dense."""
    index = some_index(2, T, Hk, n, select_block, past)
    chosen = index.to(device)
    compare_forms(
        lambda q, k, v: K.nsa_selected_dense(q, k, v, index, select_block),
        lambda q, k, v: nsa_selected(q, k, v, chosen, select_block, backend="triton"),
        draw(2, T, H, Hk, D, T + past), dtype, device, tolerance,
    )  # fmt: skip


def compare_forms(oracle, form, inputs, dtype, device, tolerance):
    inputs = [x.to(dtype).double() for x in inputs]
    wanted = run(oracle, inputs, torch.float64)
    agree([x.cpu() for x in run(form, [x.to(device) for x in inputs], dtype)], wanted, tolerance)


def compare_window_kernels(T, H, Hk, D, window, past, dtype=torch.float32, device="cpu", tolerance=FP32):
    compare_forms(
        lambda q, k, v: K.nsa_window_dense(q, k, v, window),
        lambda q, k, v: nsa_window(q, k, v, window, backend="triton"),
        draw(2, T, H, Hk, D, T + past), dtype, device, tolerance,
    )  # fmt: skip


def compare_compressed_kernels(T, H, Hk, D, sizes, past, dtype=torch.float32, device="cpu", tolerance=FP32):
    blocks = max(0, (T + past - sizes[0]) // sizes[1] + 1)
    inputs, chosen = draw(2, T, H, Hk, D, blocks), []

    def form(q, k, v):
        o, index = nsa_compressed(q, k, v, *sizes, offset=past, backend="triton")
        chosen.append(index.cpu())
        return o

    compare_forms(
        lambda q, k, v: K.nsa_compressed_dense(q, k, v, *sizes, past)[0], form, inputs, dtype, device, tolerance
    )
    if dtype == torch.float32:
        assert torch.equal(
            chosen[0], nsa_compressed(*(x.float() for x in inputs[:3]), *sizes, past, backend="torch")[1]
        )


SHAPES = [(70, 4, 1, 16, 4, 16, 0), (37, 3, 1, 20, 3, 8, 0), (33, 2, 2, 24, 4, 8, 13), (1, 5, 1, 8, 3, 12, 0)]
WIDE = [(300, 8, 2, 64, 8, 32, 0), (99, 4, 4, 128, 5, 64, 9)]
WINDOWS = [(70, 4, 1, 16, 20, 0), (37, 3, 3, 20, 100, 0), (33, 2, 1, 24, 9, 13), (1, 5, 1, 8, 4, 40)]
BLOCKS = [(70, 4, 1, 16, (8, 4, 8, 4), 0), (40, 3, 3, 20, (16, 8, 16, 3), 5), (9, 2, 1, 8, (4, 4, 8, 4), 60)]
WIDE_WINDOWS, WIDE_BLOCKS = [(300, 8, 2, 64, 128, 0)], [(700, 8, 2, 64, (32, 16, 32, 8), 0)]


@pytest.mark.skipif(not kernels.interpreting(), reason="runs inside test_triton_under_the_interpreter")
@pytest.mark.parametrize("T, H, Hk, D, n, select_block, past", SHAPES)
def test_interpreted(T, H, Hk, D, n, select_block, past):
    compare_triton(T, H, Hk, D, n, select_block, past)


@pytest.mark.skipif(not kernels.interpreting(), reason="runs inside test_triton_under_the_interpreter")
@pytest.mark.parametrize("T, H, Hk, D, window, past", WINDOWS)
def test_interpreted_window(T, H, Hk, D, window, past):
    compare_window_kernels(T, H, Hk, D, window, past)


@pytest.mark.skipif(not kernels.interpreting(), reason="runs inside test_triton_under_the_interpreter")
@pytest.mark.parametrize("T, H, Hk, D, sizes, past", BLOCKS)
def test_interpreted_compressed(T, H, Hk, D, sizes, past):
    compare_compressed_kernels(T, H, Hk, D, sizes, past)


@pytest.mark.skipif(not kernels.interpreting(), reason="runs inside test_triton_under_the_interpreter")
def test_interpreted_slices():
    """Keys and values that are slices of a projection, as the model's are, are read where they are."""
    q, kv = draw(2, 50, 4, 1, 16)[0], torch.randn(2, 50, 5, 2, 1, 16, dtype=torch.float64)
    apart = [kv[:, :, 1, i].clone() for i in (0, 1)]
    index = some_index(2, 50, 1, 3, 8)
    for f in (
        lambda k, v: nsa_window(q.float(), k.float(), v.float(), 20, backend="triton"),
        lambda k, v: nsa_selected(q.float(), k.float(), v.float(), index, 8, backend="triton"),
    ):
        assert torch.equal(f(*kv.float()[:, :, 1].unbind(2)), f(*apart))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or kernels.triton is None, reason="needs a GPU and Triton")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, FP32), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("T, H, Hk, D, n, select_block, past", SHAPES + WIDE)
def test_on_a_gpu(T, H, Hk, D, n, select_block, past, dtype, tolerance):
    compare_triton(T, H, Hk, D, n, select_block, past, dtype, "cuda", tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or kernels.triton is None, reason="needs a GPU and Triton")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, FP32), (torch.bfloat16, 1e-2)])
def test_bands_on_a_gpu(dtype, tolerance):
    for shape in WINDOWS + WIDE_WINDOWS:
        compare_window_kernels(*shape, dtype, "cuda", tolerance)
    for shape in BLOCKS + WIDE_BLOCKS:
        compare_compressed_kernels(*shape, dtype, "cuda", tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or kernels.triton is None, reason="needs a GPU and Triton")
@pytest.mark.parametrize("D, select_block", [(64, 32), (128, 64)])
@pytest.mark.parametrize("name, i", [(name, i) for name in K.KERNELS for i in range(len(K.KERNELS[name].configs))])
def test_every_configuration_on_a_gpu(name, i, D, select_block, monkeypatch):
    kernel = K.KERNELS[name]
    monkeypatch.setitem(K.KERNELS, name, Kernel(kernel.function, [kernel.configs[i]], kernel.tiles))
    if name.startswith("chosen"):
        compare_triton(300, 8, 2, D, 8, select_block, 0, torch.bfloat16, "cuda", 1e-2)
    else:
        compare_window_kernels(300, 8, 2, D, 4 * select_block, 0, torch.bfloat16, "cuda", 1e-2)
        compare_compressed_kernels(700, 8, 2, D, (32, 16, 32, 8), 0, torch.bfloat16, "cuda", 1e-2)


def test_a_fallback_says_its_reason_once():
    if kernels.interpreting():
        pytest.skip("the interpreter runs Triton on a CPU")
    q, k, v, _ = draw(1, 9, 2, 1, 4, dtype=torch.float32)
    index = some_index(1, 9, 1, 3, 4)
    kernels._said.clear()
    with pytest.warns(UserWarning, match="nsa_selected runs its PyTorch form: Triton"):
        o = nsa_selected(q, k, v, index, 4, backend="triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(nsa_selected(q, k, v, index, 4, backend="triton"), o)


@pytest.mark.slow
def test_memory_at_4096():
    """B=2 H=4 D=64, forward and backward, in less than 2 GB with Python and torch themselves."""
    code = """if True:
        import resource, torch
        from kernels.nsa import nsa_compressed, nsa_selected, nsa_sizes, nsa_window
        T, (block, stride, select_block, count, window) = 4096, nsa_sizes(4096)
        q, k, v = (torch.randn(2, T, 4, 64, requires_grad=True) for _ in range(3))
        ck, cv = (torch.randn(2, (T - block) // stride + 1, 4, 64, requires_grad=True) for _ in range(2))
        o, index = nsa_compressed(q, ck, cv, block, stride, select_block, count)
        o = o + nsa_selected(q, k, v, index, select_block) + nsa_window(q, k, v, window)
        o.sum().backward()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    """
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=Path(__file__).parent.parent, check=True, capture_output=True, text=True)
    assert int(out.stdout) < 2000, out.stdout
