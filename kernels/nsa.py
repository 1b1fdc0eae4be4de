"""The three branches of native sparse attention (arXiv 2502.11089, section 3), each causal softmax attention on its
own keys and values:

    nsa_compressed   one key for a block of l tokens, a block every d tokens; block i is seen from token i d + l - 1 on
    nsa_selected     the tokens of the n blocks of l' tokens that the compressed scores rank highest
    nsa_window       the last w tokens

Queries are q (B, T, H, D), the last T tokens of the sequence; keys and values (B, S, Hk, D), Hk heads shared by
G = H / Hk query heads each. Forms: an oracle with dense masks; blocked matrix products, which every device runs;
Triton kernels. Nothing is ever T x T: scores are made tile by tile, and again in the backward pass.
"""

import functools
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

from . import Case, at_once, in_autocast, jit, leave_autocast, like_inputs, operator, tl
from .gla import LOG2E, Workspace, compute_dtype, first_of, regular
from .launch import Kernel, choose, configurations, dot, dot_type, power, split

SIZES = {  # longest sequence: l, d, l', n with the three forced blocks, w
    128: (8, 4, 8, 4, 16),
    256: (16, 8, 16, 4, 32),
    512: (16, 8, 16, 6, 64),
    1024: (32, 16, 32, 8, 128),
    2048: (32, 16, 64, 8, 256),
    4096: (32, 16, 64, 16, 512),
}
FORCED = 3  # a query's own block, block 0 and the block before its own
RESOLUTION = 2.0**-20  # of attention: blocks whose scores are nearer are equal, however they were rounded
QUERIES = 64  # queries in a tile of the compressed and the window branch on a CPU
ROWS = 128  # scores in a tile of the selected branch, along the queries
SCORES = 2**18  # scores that are worked on at a time, so that they stay in cache
PAIRS = 2**14  # of the selected branch: pairs of a query head and a block that are worked on together, at least
FILL = 256  # and such pairs for each block there is: with fewer, most tiles are not full


def nsa_sizes(T):
    """(l, d, l', n, w) that are worth their cost at sequences of T: fewer tokens are read than softmax reads."""
    return SIZES[min((x for x in SIZES if x >= T), default=max(SIZES))]


def nsa_pairs(T, sizes, G=1):
    """Pairs of a query and a key in a sequence of T, (read, executed in tiles): the three branches together."""
    block, stride, select_block, count, window = sizes
    w, c = window_shape(T, T, window)
    chosen = sum(min(t // select_block, count - 1) * select_block for t in range(T))
    read = sum(max(0, (t + 1 - block) // stride + 1) + t % select_block + 1 + min(t + 1, window) for t in range(T))
    ends = [min(T, t + QUERIES) for t in range(block - 1, T, QUERIES)]
    compressed = sum((b - a) * ((b - block) // stride + 1) for a, b in zip([block - 1, *ends], ends))
    return read + chosen, compressed + selected_pairs(T, select_block, count, G) + -(-T // c) * c * (w + c)


def operations(T, sizes, H, Hk, D, mean=True):
    """(nominal, executed) of a sequence of T: the pairs that are read, and those in the tiles of a training step; both
    with what compresses the blocks, their mean or an MLP of 2 D hidden channels, but for the slots: one product for
    a whole batch."""
    block, stride = sizes[:2]
    N = max(0, (T - block) // stride + 1)
    first, second = (0, block * D) if mean else (4 * block * D * D, 4 * D * D)
    run = N and N + block // stride - 1  # of the MLP's first matrix; N blocks have so many parts
    read, executed = (4 * H * D * pairs for pairs in nsa_pairs(T, sizes, H // Hk))
    return read + 2 * Hk * N * (first + second), executed + 2 * Hk * (run * first + N * second)


def selected_pairs(T, select_block, count, G):
    """Pairs in the tiles of the selected branch. What queries choose beside the forced blocks depends on the data: it
    counts as spread evenly over their candidates."""
    block, tiles = np.arange(-(-T // select_block)), 0
    step, r = stretch(min(count, len(block)), G, len(block))
    for first in range(0, T, step):
        own = np.arange(first, min(T, first + step))[:, None] // select_block
        chosen = np.minimum((count - FORCED) / np.maximum(own - 2, 1), 1.0) * (block < own)  # (t, blocks)
        chosen[(block == 0) | (block == own) | (block == own - 1)] = 1.0
        tiles += int(np.ceil(chosen.sum(0) / r - 1e-6).sum())
    return tiles * r * select_block


# ----------------------------------------------------------------------------- oracle


def dense(q, k, v, mask, scale=None):
    """Softmax attention under a mask (B or 1, H or 1, T, S): o (B, T, H, D), p (B, H, T, S); nothing seen gives 0."""
    G = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(G, 2), v.repeat_interleave(G, 2)
    s = torch.einsum("bthd,bshd->bhts", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    p = s.masked_fill(~mask, -math.inf).softmax(-1).masked_fill(~mask, 0.0)
    return torch.einsum("bhts,bshd->bthd", p, v), p


def overlap(N, block, stride, n_blocks, select_block, device=None):
    """(N, n_blocks): the tokens that compressed block i and selectable block j share, in strides."""
    a, b = torch.arange(N, device=device)[:, None] * stride, torch.arange(n_blocks, device=device) * select_block
    shared = torch.minimum(a + block, b + select_block) - torch.maximum(a, b)
    return shared.clamp(min=0) / stride


def nsa_compressed_dense(q, k, v, block, stride, select_block, select_count, offset=0, scale=None):
    """The oracle of nsa_compressed: o, and the chosen blocks (B, T, Hk, n), -1 where there are fewer."""
    (B, T, H, _), (N, Hk) = q.shape, k.shape[1:3]
    t = torch.arange(offset, offset + T, device=q.device)
    o, p = dense(q, k, v, torch.arange(N, device=q.device) * stride + block - 1 <= t[:, None], scale)
    n_blocks = (offset + T - 1) // select_block + 1
    weight = overlap(N, block, stride, n_blocks, select_block, q.device).to(p.dtype)
    score = (p.view(B, Hk, H // Hk, T, N).sum(2) @ weight).cpu()  # (B, Hk, T, n_blocks)
    index = torch.full((B, T, Hk, min(select_count, n_blocks)), -1)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (B, Hk, T))).tolist():
        own = (offset + i) // select_block
        forced = list(dict.fromkeys((own, 0, max(own - 1, 0))))
        rank = {j: (round(score[b, h, i, j].item() / RESOLUTION), j) for j in range(own) if j not in forced}
        rest = sorted(rank, key=rank.get, reverse=True)  # of equal ones the most recent
        chosen = (forced + rest)[:select_count]
        index[b, i, h, : len(chosen)] = torch.tensor(chosen)
    return o, index.to(q.device)


def nsa_selected_dense(q, k, v, index, select_block, scale=None):
    T, H, S, Hk = *q.shape[1:3], *k.shape[1:3]
    s, t = torch.arange(S, device=q.device), torch.arange(S - T, S, device=q.device)
    chosen = (s // select_block == index[..., None]).any(3).transpose(1, 2)  # (B, Hk, T, S)
    return dense(q, k, v, chosen.repeat_interleave(H // Hk, 1) & (s <= t[:, None]), scale)[0]


def nsa_window_dense(q, k, v, window, scale=None):
    T, S = q.shape[1], k.shape[1]
    distance = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
    return dense(q, k, v, (distance >= 0) & (distance < window), scale)[0]


def selected_gathered(q, k, v, index, select_block, scale):
    """The tokens of the chosen blocks gathered for each query: what decoding reads, (B, T, Hk, n l', D)."""
    (B, T, H, D), (S, Hk), dtype = q.shape, k.shape[1:3], compute_dtype(q.dtype)
    token = (index[..., None] * select_block + torch.arange(select_block, device=q.device)).flatten(3)
    b, h = torch.arange(B, device=q.device).view(-1, 1, 1, 1), torch.arange(Hk, device=q.device).view(-1, 1)
    own = torch.arange(S - T, S, device=q.device).view(-1, 1, 1)
    seen = (token >= 0) & (token <= own)
    token = token.clamp(0, S - 1)
    k, v = k[b, token, h].to(dtype), v[b, token, h].to(dtype)
    s = (q.to(dtype) * scale).view(B, T, Hk, -1, D) @ k.mT  # (B, T, Hk, G, n l')
    p = s.masked_fill(~seen.unsqueeze(3), -math.inf).softmax(-1)
    return (p @ v).view(B, T, H, D).to(q.dtype)


# ----------------------------------------------------------------------------- blocked PyTorch
#
# N = B Hk groups. Inside, a group's G query heads lie side by side, (N, T, G, D), so that they are rows of one product
# with the keys that they share.


def grouped(x, Hk, factor=1.0):
    """(B, T, H, D) -> (N, T, G, D), in the precision that is computed in, times a factor."""
    x = x.to(compute_dtype(x.dtype)).unflatten(2, (Hk, -1)).transpose(1, 2)
    return torch.mul(x, factor, out=x.new_empty(x.shape)).flatten(0, 1)


def ungrouped(x, like):
    """(N, T, G, D) -> (B, T, H, D), contiguous."""
    return like.new_empty(like.shape).copy_(x.unflatten(0, (like.shape[0], -1)).transpose(1, 2).flatten(2, 3))


def softmax_backward(p, dp):
    """The scores' gradient, in place of dp."""
    return torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)


def open_or_shut(mask, like):
    """What is added to scores: 0 where the mask is true, else -inf."""
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(~mask, -math.inf)


# compressed


def compressed_tiles(q, k, block, stride, offset):
    """Groups, queries lo to hi and the blocks that the last of them sees. Queries that see none are in no tile."""
    (N, T, G, _), n_blocks = q.shape, k.shape[1]
    row, size = G * max(1, n_blocks), at_once(SCORES, q)
    rows = QUERIES if size == SCORES else max(QUERIES, size // (N * row))  # on a GPU few launches
    some = max(1, size // (rows * row))
    for n in range(0, N, some):
        for lo in range(max(0, block - 1 - offset), T, rows):
            hi = min(T, lo + rows)
            yield slice(n, min(N, n + some)), lo, hi, (offset + hi - block) // stride + 1


def compressed_probabilities(q, k, rows, lo, hi, seen, block, stride, offset, new):
    """The tile's queries (n, (hi - lo) G, D) and their probabilities (n, (hi - lo) G, seen)."""
    new.taken = 0
    q = q[rows, lo:hi].flatten(1, 2)
    s = new.bmm(q, k[rows, :seen].mT)
    by_all = (offset + lo + 1 - block) // stride + 1
    if by_all < seen:
        t = torch.arange(offset + lo, offset + hi, device=q.device)
        i = torch.arange(by_all, seen, device=q.device)
        mask = open_or_shut(i * stride + block - 1 <= t[:, None], s)
        s.unflatten(1, (hi - lo, -1))[..., by_all:].add_(mask.unsqueeze(1))
    return q, torch.softmax(s, -1, out=new(*s.shape))


def compressed_forward(q, k, v, scale, block, stride, select_block, select_count, offset, by_triton):
    """o (B, T, H, D), the chosen blocks (B, T, Hk, n), and of the Triton form the logs of the sums."""
    B, T, H, D = q.shape
    Hk, like, lse = k.shape[2], q, q.new_empty(0)
    if by_triton:
        o, lse = band_fwd(q, k, v, scale, offset, offset + T, stride, block - 1)
    q, k, v = grouped(q, Hk, scale), grouped(k, Hk).squeeze(2), grouped(v, Hk).squeeze(2)
    o, new = o if by_triton else torch.zeros_like(q), Workspace(q)
    own = torch.arange(offset, offset + T, device=q.device) // select_block
    index = own.new_full((q.shape[0], T, min(select_count, (offset + T - 1) // select_block + 1)), -1)
    forced = torch.stack((own, torch.where(own > 0, 0, -1), torch.where(own > 1, own - 1, -1)), -1)
    index[..., :FORCED] = forced[:, : index.shape[2]]
    for rows, lo, hi, seen in compressed_tiles(q, k, block, stride, offset):
        _, p = compressed_probabilities(q, k, rows, lo, hi, seen, block, stride, offset, new)
        if not by_triton:
            o[rows, lo:hi] = new.bmm(p, v[rows, :seen]).view(-1, hi - lo, *o.shape[2:])
        n_blocks = (offset + hi - 1) // select_block - 2  # candidates of the last query: 1 ... own - 2
        count = min(n_blocks, index.shape[2] - FORCED)
        if count > 0:
            p = p.unflatten(1, (hi - lo, -1)).sum(2)  # over the group's heads
            score = importance(p, n_blocks, block, stride, select_block)
            candidate = torch.arange(1, n_blocks + 1, device=q.device)
            rank = ranked(score, n_blocks).masked_fill_(candidate > own[lo:hi, None] - 2, -1)
            rank, best = rank.topk(count, -1, sorted=False)
            index[rows, lo:hi, FORCED : FORCED + count] = (best + 1).masked_fill_(rank < 0, -1)
    index = index.view(B, Hk, T, -1).transpose(1, 2).contiguous()
    return o if by_triton else ungrouped(o, like), index, lse


def compressed_token(q, k, v, scale, block, stride, select_block, select_count, offset):
    """The output and the blocks of one query, as decoding asks for them."""
    (B, _, H, D), (N, Hk), own, dtype = q.shape, k.shape[1:3], offset // select_block, compute_dtype(q.dtype)
    index = torch.full((B, 1, Hk, min(select_count, own + 1)), own, device=q.device)
    index[..., 1:2], index[..., 2:3] = 0, own - 1
    if N == 0:
        return torch.zeros_like(q), index
    heads = (q.to(dtype) * scale).view(B, Hk, -1, D)
    p = torch.softmax(heads @ k.to(dtype).permute(0, 2, 3, 1), -1)  # (B, Hk, G, N)
    count = min(own - 2, index.shape[3] - FORCED)
    if count > 0:
        score = importance(p.detach().sum(2), own - 2, block, stride, select_block)
        index[:, 0, :, FORCED:] = ranked(score, own - 2).topk(count, -1, sorted=False)[1] + 1
    return (p @ v.to(dtype).transpose(1, 2)).view(B, 1, H, D).to(q.dtype), index


def ranked(score, n_blocks):
    """Integers in the order of the scores of blocks 1 ... n_blocks, in place; of equal ones the last is the largest."""
    candidate = torch.arange(1, n_blocks + 1, device=score.device)
    return score.div_(RESOLUTION).round_().long().mul_(n_blocks + 1).add_(candidate)  # no two are equal


def importance(p, n_blocks, block, stride, select_block):
    """The scores of blocks 1 ... n_blocks from p (n, t, seen): compressed block i counts in block j by the tokens that
    the two share, in strides. Written as l/d shifted sums over l'/d neighbours; none of them is beyond `seen`."""
    r = select_block // stride
    return sum(p.narrow(-1, r - n, r * n_blocks) for n in range(block // stride)).unflatten(-1, (-1, r)).sum(-1)


def compressed_backward(q, k, v, do, scale, block, stride, offset):
    Hk, like = k.shape[2], (q, k, v)
    q, do, k, v = grouped(q, Hk, scale), grouped(do, Hk), grouped(k, Hk).squeeze(2), grouped(v, Hk).squeeze(2)
    dq, dk, dv, new = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), Workspace(q)
    for rows, lo, hi, seen in compressed_tiles(q, k, block, stride, offset):
        qs, p = compressed_probabilities(q, k, rows, lo, hi, seen, block, stride, offset, new)
        dos = do[rows, lo:hi].flatten(1, 2)
        dv[rows, :seen] += new.bmm(p.mT, dos)
        ds = softmax_backward(p, new.bmm(dos, v[rows, :seen].mT))
        dk[rows, :seen] += new.bmm(ds.mT, qs)
        torch.mul(new.bmm(ds, k[rows, :seen]).view(-1, hi - lo, *dq.shape[2:]), scale, out=dq[rows, lo:hi])
    return [ungrouped(x, y) for x, y in zip((dq, dk.unsqueeze(2), dv.unsqueeze(2)), like)]


# selected
#
# The pairs of a query and a block that it chose are sorted by block and cut into tiles of pairs with the same block:
# a tile is one product of gathered queries with the block's keys, however small the group. The own block is a query's
# first choice, so the diagonal is the only place with a mask.


class Tiles:
    """index (M, n): the blocks of M queries, -1 for none.

    block (tiles): each tile's block.  first (blocks + 1): each block's first tile.
    query (tiles r): each place's query, -1 in the rest of a block's last tile.
    place (M, n): where a pair went, 0 for none, which `real` is false for.
    """

    def __init__(self, index, n_blocks, r):
        (M, n), device = index.shape, index.device
        self.real = index >= 0
        block, order = torch.where(self.real, index, n_blocks).flatten().sort(stable=True)
        count = torch.bincount(block, minlength=n_blocks + 1)[:n_blocks]
        tiles = (count + r - 1) // r
        self.block = torch.repeat_interleave(torch.arange(n_blocks, device=device), tiles)
        self.first = F.pad(tiles.cumsum(0), (1, 0))
        jump = self.first[:-1] * r - (count.cumsum(0) - count)
        pairs = M * n - int((~self.real).sum())
        block, order = block[:pairs], order[:pairs]
        place = torch.arange(pairs, device=device) + jump.index_select(0, block)
        self.query = order.new_full((self.block.shape[0] * r,), -1)
        self.query[place] = order // n
        self.place = order.new_zeros(M * n)
        self.place[order] = place
        self.place = self.place.view(M, n)

    def heads(self, G):
        """The places of each query head's pairs, (M G, n)."""
        return (self.place.unsqueeze(1) * G + torch.arange(G, device=self.place.device).view(-1, 1)).flatten(0, 1)


def stretch(n, G, n_blocks):
    """Queries that are tiled together where each chose n of the blocks, and those of a tile."""
    return max(1, max(PAIRS, FILL * n_blocks) // (n * G)), max(8, ROWS // G)


def selected_tiles(q, k, index, select_block):
    """Stretches of the N T queries, each as tiles: (lo, hi, Tiles, gather) with gather(x, new) the rows of x (N T, G D)
    at the tiles' places."""
    (N, T, G, _), n_blocks = q.shape, k.shape[1]
    (step, r), index = stretch(index.shape[2], G, n_blocks), numbered(index, n_blocks)
    for lo in range(0, N * T, step):
        hi = min(N * T, lo + step)
        yield lo, hi, Tiles(index[lo:hi], N * n_blocks, r)


def numbered(index, n_blocks):
    """index (N, T, n) -> (N T, n), the blocks numbered over all groups."""
    first = torch.arange(index.shape[0], device=index.device).view(-1, 1, 1) * n_blocks
    return torch.where(index < 0, -1, index + first).flatten(0, 1)


def in_blocks(x, Hk, select_block):
    """(B, S, Hk, D) -> (N, blocks, l', D), the last one filled up with zeros."""
    x = grouped(x, Hk).squeeze(2)
    return F.pad(x, (0, 0, 0, -x.shape[1] % select_block)).unflatten(1, (-1, select_block))


def gather(x, tiles, lo, new):
    """Rows of x (N T, G, D) at the tiles' places: (tiles, r G, D)."""
    query = tiles.query.clamp(min=0) + lo
    out = torch.index_select(x, 0, query, out=new(query.shape[0], *x.shape[1:]))
    return out.view(tiles.block.shape[0], -1, x.shape[-1])


def gather_blocks(x, tiles, new):
    return torch.index_select(x, 0, tiles.block, out=new(tiles.block.shape[0], *x.shape[1:]))


def mask_own(s, tiles, own, diagonal):
    """Adds -inf to later tokens of a query's own block; s (tiles, r G, l'), own (M): the query's place in its block."""
    s.view(-1, diagonal.shape[1]).index_add_(0, tiles.place[:, 0], diagonal.index_select(0, own))


def diagonal_mask(select_block, G, like):
    i = torch.arange(select_block, device=like.device)
    return open_or_shut(i <= i[:, None], like).repeat(1, G)  # (l', G l')


def selected_forward(q, k, v, index, scale, select_block):
    """o (B, T, H, D) and the log of the sums of exponentials (B, T, H)."""
    like, offset, Hk = q, k.shape[1] - q.shape[1], k.shape[2]
    q, k, v, index = grouped(q, Hk, scale), *(in_blocks(x, Hk, select_block) for x in (k, v)), index.transpose(1, 2)
    (N, T, G, D), new = q.shape, Workspace(q)
    o, lse, diagonal = torch.empty_like(q), q.new_empty(N, T, G), diagonal_mask(select_block, G, q)
    rows, ks, vs = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    for lo, hi, tiles in selected_tiles(q, k, index.flatten(0, 1), select_block):
        new.taken = 0
        s = new.bmm(gather(rows, tiles, lo, new), gather_blocks(ks, tiles, new).mT)
        own = (torch.arange(lo, hi, device=q.device) % T + offset) % select_block
        mask_own(s, tiles, own, diagonal)
        top = s.amax(-1, keepdim=True)
        total = s.sub_(top).exp_().sum(-1)
        part = new.bmm(s, gather_blocks(vs, tiles, new))  # (tiles, r G, D)
        place, real = tiles.heads(G), tiles.real.repeat_interleave(G, 0)
        top = torch.take(top, place).masked_fill_(~real, -math.inf)  # (M G, n)
        highest = top.amax(-1, keepdim=True)
        weight = top.sub_(highest).exp_()
        total = (weight * torch.take(total, place)).sum(-1, keepdim=True)
        weight /= total
        o.view(N * T * G, D)[lo * G : hi * G] = F.embedding_bag(
            place, part.flatten(0, 1), per_sample_weights=weight, mode="sum"
        )
        lse.view(-1)[lo * G : hi * G] = (highest + total.log()).squeeze(1)
    return ungrouped(o, like), lse.unflatten(0, (-1, Hk)).transpose(1, 2).flatten(2).contiguous()


def selected_backward(q, k, v, index, o, lse, do, scale, select_block):
    like, offset, Hk = (q, k, v), k.shape[1] - q.shape[1], k.shape[2]
    lse, delta = (x.unflatten(2, (Hk, -1)).transpose(1, 2).flatten(0, 2) for x in (lse, row_products(do, o)))
    q, do, index = grouped(q, Hk, scale), grouped(do, Hk), index.transpose(1, 2)
    k, v = (in_blocks(x, Hk, select_block) for x in (k, v))
    (N, T, G, D), new = q.shape, Workspace(q)
    dq, dk, dv, diagonal = torch.empty_like(q), *map(torch.zeros_like, (k, v)), diagonal_mask(select_block, G, q)
    rows, dos, ks, vs = (x.flatten(0, 1) for x in (q, do, k, v))
    for lo, hi, tiles in selected_tiles(q, k, index.flatten(0, 1), select_block):
        new.taken = 0
        shape = tiles.block.shape[0], -1, 1
        query = tiles.query.clamp(min=0) + lo
        own = (torch.arange(lo, hi, device=q.device) % T + offset) % select_block
        level = lse.index_select(0, query)
        level.masked_fill_(tiles.query.unsqueeze(1) < 0, math.inf)  # no pair: probabilities of 0
        qt, kt, vt = gather(rows, tiles, lo, new), gather_blocks(ks, tiles, new), gather_blocks(vs, tiles, new)
        dot_rows = gather(dos, tiles, lo, new)
        p = torch.baddbmm(level.neg_().view(shape), qt, kt.mT, out=new(*qt.shape[:2], select_block))
        mask_own(p, tiles, own, diagonal)
        p.exp_()
        dv.flatten(0, 1).index_add_(0, tiles.block, new.bmm(p.mT, dot_rows))
        ds = torch.baddbmm(delta.index_select(0, query).neg_().view(shape), dot_rows, vt.mT, out=new(*p.shape)).mul_(p)
        dk.flatten(0, 1).index_add_(0, tiles.block, new.bmm(ds.mT, qt))
        part = new.bmm(ds, kt).flatten(0, 1)
        weight = tiles.real.repeat_interleave(G, 0).to(part.dtype).mul_(scale)
        dq.view(N * T * G, D)[lo * G : hi * G] = F.embedding_bag(
            tiles.heads(G), part, per_sample_weights=weight, mode="sum"
        )
    dk, dv = (x.flatten(1, 2)[:, : like[1].shape[1]].unsqueeze(2) for x in (dk, dv))
    return [ungrouped(x, y) for x, y in zip((dq, dk, dv), like)]


def row_products(a, b):
    """(B, T, H, D), (B, T, H, D) -> (B, T, H)."""
    dtype = compute_dtype(a.dtype)
    return (a.to(dtype) * b.to(dtype)).sum(-1)


# window
#
# A tile of c queries sees w + c keys, its own and the w before its first (one more than needed, for even sizes).


class Band:
    """Keys or values with w rows before them, so that the tiles' keys are overlapping views of one tensor."""

    def __init__(self, like, T, c, w):
        B, S, Hk, D = like.shape
        self.c, self.w, self.kept = c, w, min(S, T + w)
        self.at = w + T - self.kept  # the first row that holds a key
        self.x = like.new_zeros(B * Hk, w + -(-T // c) * c, D, dtype=compute_dtype(like.dtype))

    def inner(self, x):
        """Its part of x (B, S, Hk, D), and the place of that part here. Earlier keys are seen by no query."""
        place = self.x[:, self.at : self.at + self.kept].unflatten(0, (x.shape[0], -1))
        return x[:, x.shape[1] - self.kept :], place.transpose(1, 2)

    def read(self, x):
        x, place = self.inner(x)
        place.copy_(x)
        return self

    def write(self, like):
        out = like.new_zeros(like.shape)
        x, place = self.inner(out)
        x.copy_(place)
        return out

    def view(self, place, width=None, start=0):
        """The keys of the tiles of `window_tiles`: (tiles, w + c, D), or a part of each."""
        (n, m, lo, hi), (_, L, D) = place, self.x.shape
        shape = (m - n) * (hi - lo), self.w + self.c if width is None else width, D
        return self.x.as_strided(shape, ((self.c if m - n == 1 else L) * D, D, 1), (n * L + lo * self.c + start) * D)

    def add(self, place, x):
        """Adds x (tiles, w + c, D) to the view, in parts that do not overlap."""
        for start in range(0, self.w + self.c, self.c):
            part = x[:, start : start + self.c]
            self.view(place, part.shape[1], start).add_(part)


def window_shape(T, S, window):
    """w and c: a window never longer than the sequence; as many queries in a tile as a window, within bounds."""
    w = min(window, S)
    return w, min(max(16, min(w, QUERIES)), T)


def window_tiles(q, tiles, w, c):
    """(n, m, lo, hi): tiles lo to hi of groups n to m, several of one of the two."""
    N, G = q.shape[0], q.shape[2]
    step = max(1, at_once(SCORES, q) // (c * G * (w + c)))
    if tiles < min(N, step):
        return [(n, min(N, n + step), lo, lo + 1) for n in range(0, N, step) for lo in range(tiles)]
    return [(n, n + 1, lo, min(tiles, lo + step)) for n in range(N) for lo in range(0, tiles, step)]


def window_rows(x, place, c):
    """The tiles' rows of x (N, tiles c, G, D): (tiles, c G, D), a view."""
    n, m, lo, hi = place
    return x[n:m, lo * c : hi * c].unflatten(1, (hi - lo, c)).flatten(0, 1).flatten(1, 2)


def window_queries(x, Hk, c, factor=1.0):
    """(B, T, H, D) -> (N, tiles c, G, D), filled up with zeros."""
    x = grouped(x, Hk, factor)
    return F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % c)) if x.shape[1] % c else x


def window_mask(c, w, like):
    """(c, 1, w + c): key u is u - w tokens after the tile's first query."""
    distance = torch.arange(c, device=like.device)[:, None] + w - torch.arange(w + c, device=like.device)
    return open_or_shut((distance >= 0) & (distance < w), like).unsqueeze(1)


def window_probabilities(q, k, place, mask, new):
    """The tiles' queries (tiles, c G, D) and probabilities (tiles, c G, w + c)."""
    new.taken = 0
    (n, m, lo, hi), c = place, k.c
    q = window_rows(q, place, c)
    s = new.bmm(q, k.view(place).mT)
    s.unflatten(1, (c, -1)).add_(mask)
    for i in range(lo, min(hi, -(-k.at // c))):  # before the first key there is nothing
        s.unflatten(0, (m - n, hi - lo))[:, i - lo, :, : k.at - i * c] = -math.inf
    return q, torch.softmax(s, -1, out=new(*s.shape))


def window_forward(q, k, v, scale, window):
    (w, c), like, Hk, T = window_shape(q.shape[1], k.shape[1], window), q, k.shape[2], q.shape[1]
    q = window_queries(q, Hk, c, scale)
    k, v = (Band(x, T, c, w).read(x) for x in (k, v))
    o, new, mask = torch.empty_like(q), Workspace(q), window_mask(c, w, q)
    for place in window_tiles(q, q.shape[1] // c, w, c):
        _, p = window_probabilities(q, k, place, mask, new)
        torch.bmm(p, v.view(place), out=window_rows(o, place, c))
    return ungrouped(o[:, :T], like)


def window_backward(q, k, v, do, scale, window):
    (w, c), like, Hk, T = window_shape(q.shape[1], k.shape[1], window), (q, k, v), k.shape[2], q.shape[1]
    q, do = window_queries(q, Hk, c, scale), window_queries(do, Hk, c)
    (k, v), (dk, dv) = (Band(x, T, c, w).read(x) for x in (k, v)), (Band(x, T, c, w) for x in (k, v))
    dq, new, mask = torch.empty_like(q), Workspace(q), window_mask(c, w, q)
    for place in window_tiles(q, q.shape[1] // c, w, c):
        qs, p = window_probabilities(q, k, place, mask, new)
        dos, dqs = (window_rows(x, place, c) for x in (do, dq))
        dv.add(place, new.bmm(p.mT, dos))
        ds = softmax_backward(p, new.bmm(dos, v.view(place).mT))
        dk.add(place, new.bmm(ds.mT, qs))
        torch.baddbmm(dqs, ds, k.view(place), beta=0, alpha=scale, out=dqs)
    return ungrouped(dq[:, :T], like[0]), dk.write(like[1]), dv.write(like[2])


# ----------------------------------------------------------------------------- Triton
#
# Two kinds of kernels, each with an output, the queries' gradients and the keys' gradients.
#
#     band      compressed and window: key j stands at the time j stride + lead, and a query sees those of the last
#               `window` tokens. A program has BM queries of one head, or BN keys with all queries that see them.
#     chosen    selected: a program has one query with its G heads, and walks over its blocks; or one block with all
#               pairs that chose it, sorted by block. Nothing is kept for a pair, and nothing waits for the host.
#
# q, do, o, dq are (B, T, H, D) and k, v, dk, dv (B, S, Hk, D), read where they are: SQ, SD, SK numbers a token.
# Logs of sums (B, T, H) have base 2.


@jit
def rows_of(p, o_r, S, D, m_r, BD: tl.constexpr):
    """Rows o_r of what p points to, S numbers apart: (rows, BD)."""
    o_d = tl.arange(0, BD)
    return tl.load(p + o_r.to(tl.int64)[:, None] * S + o_d[None, :], mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)


@jit
def write_rows(p, b_x, o_r, S, D, m_r, BD: tl.constexpr):
    o_d = tl.arange(0, BD)
    mask = m_r[:, None] & (o_d < D)[None, :]
    tl.store(p + o_r.to(tl.int64)[:, None] * S + o_d[None, :], b_x.to(p.dtype.element_ty), mask=mask)


@jit
def attend(b_q, b_k, b_v, m_s, b_top, b_total, b_o, scale, DOT: tl.constexpr):
    """Takes more keys into the softmax of the queries: the highest score, the sum and the sum of values so far."""
    b_s = tl.where(m_s, dot(b_q, tl.trans(b_k), DOT) * (scale * LOG2E), float("-inf"))
    b_new = tl.maximum(b_top, tl.max(b_s, 1))
    b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p, b_old = tl.exp2(b_s - b_base[:, None]), tl.exp2(b_top - b_base)
    return b_new, b_total * b_old + tl.sum(b_p, 1), b_o * b_old[:, None] + dot(b_p, b_v, DOT)


@jit
def close(b_top, b_total, b_o):
    """The output and the log of the sum. A query that saw nothing has 0 for both."""
    m_some = b_total > 0.0
    b_total = tl.where(m_some, b_total, 1.0)
    return b_o / b_total[:, None], tl.where(m_some, b_top + tl.log2(b_total), 0.0)


@jit
def query_gradient(b_q, b_k, b_v, b_do, b_lse, b_delta, m_s, scale, DOT: tl.constexpr):
    """The queries' gradient from some keys, without scale."""
    b_s = dot(b_q, tl.trans(b_k), DOT) * (scale * LOG2E) - b_lse[:, None]
    b_p = tl.exp2(tl.where(m_s, b_s, float("-inf")))
    return dot(b_p * (dot(b_do, tl.trans(b_v), DOT) - b_delta[:, None]), b_k, DOT)


@jit
def key_gradients(b_q, b_k, b_v, b_do, b_lse, b_delta, m_s, scale, DOT: tl.constexpr):
    """The gradients of keys, without scale, and of values from some queries; scores and m_s are (keys, queries)."""
    b_s = dot(b_k, tl.trans(b_q), DOT) * (scale * LOG2E) - b_lse[None, :]
    b_p = tl.exp2(tl.where(m_s, b_s, float("-inf")))
    b_ds = b_p * (dot(b_v, tl.trans(b_do), DOT) - b_delta[None, :])
    return dot(b_ds, b_q, DOT), dot(b_p, b_do, DOT)


@jit
def seen_keys(t_first, t_last, S, window, stride, lead):
    """The first key that one of the queries from t_first to t_last sees, and the one after the last."""
    low = (tl.maximum(t_first - window + 1 - lead, 0) + stride - 1) // stride
    return low, tl.minimum(S, (tl.maximum(t_last - lead, -stride) + stride) // stride)


@jit
def nsa_band_kernel(
    p_q, p_k, p_v, p_o, p_lse, SQ, SK, scale, T, S, H, offset, window, stride, lead,
    D: tl.constexpr, BD: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Attention of BM queries of a head."""
    i_m, i_bh = split(tl.program_id(0), tl.cdiv(T, BM))
    i_n = i_bh // G  # of the B Hk groups
    o_m = i_m * BM + tl.arange(0, BM)
    m_m, b_t = o_m < T, o_m + offset
    p_k, p_v = p_k + first_of(i_n, S, SK, H // G, D), p_v + first_of(i_n, S, SK, H // G, D)
    b_q = rows_of(p_q + first_of(i_bh, T, SQ, H, D), o_m, SQ, D, m_m, BD)
    b_top, b_total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, BD], tl.float32)
    low, high = seen_keys(i_m * BM + offset, tl.minimum(T, i_m * BM + BM) - 1 + offset, S, window, stride, lead)
    for j in range(low // BN * BN, high, BN):
        o_n = j + tl.arange(0, BN)
        b_k, b_v = rows_of(p_k, o_n, SK, D, o_n < high, BD), rows_of(p_v, o_n, SK, D, o_n < high, BD)
        b_far = b_t[:, None] - (o_n * stride + lead)[None, :]
        m_s = (b_far >= 0) & (b_far < window) & (o_n < high)[None, :]
        b_top, b_total, b_o = attend(b_q, b_k, b_v, m_s, b_top, b_total, b_o, scale, DOT)
    b_o, b_lse = close(b_top, b_total, b_o)
    write_rows(p_o + first_of(i_bh, T, H * D, H, D), b_o, o_m, H * D, D, m_m, BD)
    tl.store(p_lse + first_of(i_bh, T, H, H, 1) + o_m * H, b_lse, mask=m_m)


@jit
def nsa_band_query_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dq, SQ, SK, SD, scale, T, S, H, offset, window, stride, lead,
    D: tl.constexpr, BD: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradients of BM queries of a head."""
    i_m, i_bh = split(tl.program_id(0), tl.cdiv(T, BM))
    i_n = i_bh // G
    o_m = i_m * BM + tl.arange(0, BM)
    m_m, b_t = o_m < T, o_m + offset
    p_k, p_v = p_k + first_of(i_n, S, SK, H // G, D), p_v + first_of(i_n, S, SK, H // G, D)
    b_q = rows_of(p_q + first_of(i_bh, T, SQ, H, D), o_m, SQ, D, m_m, BD)
    b_do = rows_of(p_do + first_of(i_bh, T, SD, H, D), o_m, SD, D, m_m, BD)
    o_row = first_of(i_bh, T, H, H, 1) + o_m * H
    b_lse, b_delta = tl.load(p_lse + o_row, mask=m_m, other=0.0), tl.load(p_delta + o_row, mask=m_m, other=0.0)
    b_dq = tl.zeros([BM, BD], tl.float32)
    low, high = seen_keys(i_m * BM + offset, tl.minimum(T, i_m * BM + BM) - 1 + offset, S, window, stride, lead)
    for j in range(low // BN * BN, high, BN):
        o_n = j + tl.arange(0, BN)
        b_k, b_v = rows_of(p_k, o_n, SK, D, o_n < high, BD), rows_of(p_v, o_n, SK, D, o_n < high, BD)
        b_far = b_t[:, None] - (o_n * stride + lead)[None, :]
        m_s = (b_far >= 0) & (b_far < window) & (o_n < high)[None, :]
        b_dq += query_gradient(b_q, b_k, b_v, b_do, b_lse, b_delta, m_s, scale, DOT)
    write_rows(p_dq + first_of(i_bh, T, H * D, H, D), b_dq * scale, o_m, H * D, D, m_m, BD)


@jit
def nsa_band_key_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv, SQ, SK, SD, scale, T, S, H, offset, window, stride, lead,
    D: tl.constexpr, BD: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradients of BN keys and values of a group, over its heads and the queries that see one of the keys."""
    i_s, i_n = split(tl.program_id(0), tl.cdiv(S, BN))
    o_n = i_s * BN + tl.arange(0, BN)
    m_n, b_time = o_n < S, o_n * stride + lead
    place = first_of(i_n, S, SK, H // G, D)
    b_k, b_v = rows_of(p_k + place, o_n, SK, D, m_n, BD), rows_of(p_v + place, o_n, SK, D, m_n, BD)
    b_dk, b_dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BD], tl.float32)
    low = tl.maximum(i_s * BN * stride + lead - offset, 0) // BM
    last = (tl.minimum(S, i_s * BN + BN) - 1) * stride + lead + window - 1 - offset  # the last query that sees a key
    tiles = tl.cdiv(tl.maximum(tl.minimum(T, last + 1), 0), BM) - low
    for i in range(0, tl.maximum(tiles, 0) * G):
        i_bh, o_m = i_n * G + i % G, (low + i // G) * BM + tl.arange(0, BM)
        m_m, o_row = o_m < T, first_of(i_bh, T, H, H, 1) + o_m * H
        b_q = rows_of(p_q + first_of(i_bh, T, SQ, H, D), o_m, SQ, D, m_m, BD)
        b_do = rows_of(p_do + first_of(i_bh, T, SD, H, D), o_m, SD, D, m_m, BD)
        b_lse, b_delta = tl.load(p_lse + o_row, mask=m_m, other=0.0), tl.load(p_delta + o_row, mask=m_m, other=0.0)
        b_far = (o_m + offset)[None, :] - b_time[:, None]
        m_s = (b_far >= 0) & (b_far < window) & m_m[None, :] & m_n[:, None]
        b_k_more, b_v_more = key_gradients(b_q, b_k, b_v, b_do, b_lse, b_delta, m_s, scale, DOT)
        b_dk += b_k_more
        b_dv += b_v_more
    place = first_of(i_n, S, H // G * D, H // G, D)
    write_rows(p_dk + place, b_dk * scale, o_n, H // G * D, D, m_n, BD)
    write_rows(p_dv + place, b_dv, o_n, H // G * D, D, m_n, BD)


@jit
def nsa_chosen_kernel(
    p_q, p_k, p_v, p_index, p_o, p_lse, SQ, SK, scale, T, S, H, n,
    D: tl.constexpr, BD: tl.constexpr, G: tl.constexpr, R: tl.constexpr, LS: tl.constexpr, BS: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Attention of a query's G heads to the blocks that it chose."""
    i_t, i_n = split(tl.program_id(0), T)
    i_b, i_h = i_n // (H // G), i_n % (H // G) * G
    o_r = tl.arange(0, R)
    m_r, t, i_t = o_r < G, i_t + S - T, i_b.to(tl.int64) * T + i_t
    place = first_of(i_n, S, SK, H // G, D)
    b_q = rows_of(p_q + i_t * SQ + i_h * D, o_r, D, D, m_r, BD)  # (R, BD)
    b_top, b_total = tl.full([R], float("-inf"), tl.float32), tl.zeros([R], tl.float32)
    b_o = tl.zeros([R, BD], tl.float32)
    for i in range(0, n):
        block = tl.load(p_index + (i_t * (H // G) + i_n % (H // G)) * n + i).to(tl.int32)
        o_s = tl.arange(0, BS)
        m_s = (block >= 0) & (o_s < LS) & (block * LS + o_s <= t)
        b_k = rows_of(p_k + place, block * LS + o_s, SK, D, m_s, BD)
        b_v = rows_of(p_v + place, block * LS + o_s, SK, D, m_s, BD)
        b_top, b_total, b_o = attend(b_q, b_k, b_v, m_s[None, :], b_top, b_total, b_o, scale, DOT)
    b_o, b_lse = close(b_top, b_total, b_o)
    write_rows(p_o + (i_t * H + i_h) * D, b_o, o_r, D, D, m_r, BD)
    tl.store(p_lse + i_t * H + i_h + o_r, b_lse, mask=m_r)


@jit
def nsa_chosen_query_kernel(
    p_q, p_k, p_v, p_index, p_do, p_lse, p_delta, p_dq, SQ, SK, SD, scale, T, S, H, n,
    D: tl.constexpr, BD: tl.constexpr, G: tl.constexpr, R: tl.constexpr, LS: tl.constexpr, BS: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """The gradients of a query's G heads."""
    i_t, i_n = split(tl.program_id(0), T)
    i_b, i_h = i_n // (H // G), i_n % (H // G) * G
    o_r = tl.arange(0, R)
    m_r, t, i_t = o_r < G, i_t + S - T, i_b.to(tl.int64) * T + i_t
    place, o_row = first_of(i_n, S, SK, H // G, D), i_t * H + i_h + o_r
    b_q, b_do = (
        rows_of(p_q + i_t * SQ + i_h * D, o_r, D, D, m_r, BD),
        rows_of(p_do + i_t * SD + i_h * D, o_r, D, D, m_r, BD),
    )
    b_lse, b_delta = tl.load(p_lse + o_row, mask=m_r, other=0.0), tl.load(p_delta + o_row, mask=m_r, other=0.0)
    b_dq = tl.zeros([R, BD], tl.float32)
    for i in range(0, n):
        block = tl.load(p_index + (i_t * (H // G) + i_n % (H // G)) * n + i).to(tl.int32)
        o_s = tl.arange(0, BS)
        m_s = (block >= 0) & (o_s < LS) & (block * LS + o_s <= t)
        b_k = rows_of(p_k + place, block * LS + o_s, SK, D, m_s, BD)
        b_v = rows_of(p_v + place, block * LS + o_s, SK, D, m_s, BD)
        b_dq += query_gradient(b_q, b_k, b_v, b_do, b_lse, b_delta, m_s[None, :], scale, DOT)
    write_rows(p_dq + (i_t * H + i_h) * D, b_dq * scale, o_r, D, D, m_r, BD)


@jit
def nsa_chosen_key_kernel(
    p_q, p_k, p_v, p_query, p_first, p_do, p_lse, p_delta, p_dk, p_dv, SQ, SK, SD, scale, T, S, H, n_blocks,
    D: tl.constexpr, BD: tl.constexpr, G: tl.constexpr, R: tl.constexpr, LS: tl.constexpr, BS: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """The gradients of a block's keys and values. p_query: the queries (B Hk T) of all pairs, sorted by block; p_first:
    the block's first pair. R rows are R // G pairs with their heads."""
    i_s, i_n = split(tl.program_id(0), n_blocks)
    i_b, i_h = i_n // (H // G), i_n % (H // G) * G
    o_s, o_r = tl.arange(0, BS), tl.arange(0, R)
    o_key = i_s * LS + o_s
    m_k = (o_s < LS) & (o_key < S)
    place = first_of(i_n, S, SK, H // G, D)
    b_k, b_v = rows_of(p_k + place, o_key, SK, D, m_k, BD), rows_of(p_v + place, o_key, SK, D, m_k, BD)
    b_dk, b_dv = tl.zeros([BS, BD], tl.float32), tl.zeros([BS, BD], tl.float32)
    p_q, p_do = p_q + i_b.to(tl.int64) * T * SQ + i_h * D, p_do + i_b.to(tl.int64) * T * SD + i_h * D
    end = tl.load(p_first + i_n * n_blocks + i_s + 1)
    for i in range(tl.load(p_first + i_n * n_blocks + i_s), end, R // G):
        m_r = (o_r // G < R // G) & (i + o_r // G < end)
        b_t, o_d = (tl.load(p_query + i + o_r // G, mask=m_r, other=0) % T).to(tl.int32), tl.arange(0, BD)
        o_row = (i_b.to(tl.int64) * T + b_t) * H + i_h + o_r % G
        mask, o_q = m_r[:, None] & (o_d < D)[None, :], (o_r % G)[:, None] * D + o_d[None, :]
        b_q = tl.load(p_q + b_t.to(tl.int64)[:, None] * SQ + o_q, mask=mask, other=0.0)
        b_do = tl.load(p_do + b_t.to(tl.int64)[:, None] * SD + o_q, mask=mask, other=0.0)
        b_lse, b_delta = tl.load(p_lse + o_row, mask=m_r, other=0.0), tl.load(p_delta + o_row, mask=m_r, other=0.0)
        m_s = m_r[None, :] & m_k[:, None] & (o_key[:, None] <= (b_t + S - T)[None, :])
        b_k_more, b_v_more = key_gradients(b_q, b_k, b_v, b_do, b_lse, b_delta, m_s, scale, DOT)
        b_dk += b_k_more
        b_dv += b_v_more
    place = first_of(i_n, S, H // G * D, H // G, D)
    write_rows(p_dk + place, b_dk * scale, o_key, H // G * D, D, m_k, BD)
    write_rows(p_dv + place, b_dv, o_key, H // G * D, D, m_k, BD)


TILED, WARPS = "BM BN num_warps num_stages", "num_warps num_stages"
SMALL = dict(BM=32, BN=32, num_warps=4, num_stages=1)
KERNELS = {
    "band": Kernel(nsa_band_kernel, configurations(TILED, (64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 4, 1)), fp32=SMALL),
    "band_query": Kernel(
        nsa_band_query_kernel, configurations(TILED, (64, 64, 8, 2), (64, 32, 4, 2), (64, 32, 4, 1)), fp32=SMALL
    ),
    "band_key": Kernel(
        nsa_band_key_kernel, configurations(TILED, (64, 32, 4, 2), (64, 64, 8, 2), (32, 32, 4, 1)), fp32=SMALL
    ),
    "chosen": Kernel(nsa_chosen_kernel, configurations(WARPS, (4, 2), (2, 2), (4, 1))),
    "chosen_query": Kernel(
        nsa_chosen_query_kernel,
        configurations(WARPS, (2, 2), (4, 2), (4, 1)),
        fp32=dict(num_warps=4, num_stages=1),
    ),
    "chosen_key": Kernel(
        nsa_chosen_key_kernel,
        configurations(WARPS, (8, 1), (8, 2), (4, 2), (4, 1)),
    ),
}
STEPS = ("keys / BN", "keys / BN", "G queries / BM", "blocks chosen", "blocks chosen", "G pairs of the block / R")
for kernel, steps in zip(KERNELS.values(), STEPS):
    kernel.serial = steps
MAX_WIDTH, MAX_GROUP = 128, 64  # of heads and selected blocks; of query heads that share keys
FP32_WIDTH = 64  # of heads in fp32: wider tiles do not fit into the registers
PAIR_ROWS, PAIR_ROWS_FP32 = 32, 16  # query heads in a step of the block's program


def launch(name, programs, *args, **constants):
    KERNELS[name].launch(lambda meta: (programs(meta),), *args, **constants)


def in_place(q, k, v):
    """q (B, T, H, D), k and v (B, S, Hk, D) in one type, as they are if their tokens stand at equal distances, and the
    numbers a token of q and of k; the constants of a launch."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in (q, k, v)))
    q, k, v = (x if regular(x) else x.contiguous() for x in (x.to(dtype) for x in (q, k, v)))
    k, v = (k, v) if k.stride() == v.stride() else (k.contiguous(), v.contiguous())
    D = q.shape[3]
    dot = "fp16" if dtype == torch.float16 else dot_type(dtype)
    return q, k, v, q.stride(1), k.stride(1), dict(D=D, BD=power(D), G=q.shape[2] // k.shape[2], DOT=dot)


def gradient_inputs(q, o, do):
    """do in q's type, its numbers a token, and the rows of do o (B, T, H)."""
    delta = row_products(do, o)
    do = do.to(q.dtype) if regular(do) else do.to(q.dtype).contiguous()
    return do, do.stride(1), delta


def band_fwd(q, k, v, scale, offset, window, stride, lead):
    """o and the logs of the sums, in one launch."""
    dtype, (q, k, v, SQ, SK, constants) = q.dtype, in_place(q, k, v)
    (B, T, H, _), S = q.shape, k.shape[1]
    o, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    sizes = scale, T, S, H, offset, min(window, offset + T), stride, lead
    launch("band", lambda c: -(-T // c["BM"]) * B * H, q, k, v, o, lse, SQ, SK, *sizes, **constants)
    return o.to(dtype), lse


def band_bwd(q, k, v, o, lse, do, scale, offset, window, stride, lead):
    """dq, dk, dv, in two launches."""
    dtypes = [x.dtype for x in (q, k, v)]
    q, k, v, SQ, SK, constants = in_place(q, k, v)
    do, SD, delta = gradient_inputs(q, o, do)
    (B, T, H, _), (_, S, Hk, _) = q.shape, k.shape
    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    inputs, sizes = (q, k, v, do, lse, delta), (scale, T, S, H, offset, min(window, offset + T), stride, lead)
    launch("band_query", lambda c: -(-T // c["BM"]) * B * H, *inputs, grads[0], SQ, SK, SD, *sizes, **constants)
    launch("band_key", lambda c: -(-S // c["BN"]) * B * Hk, *inputs, *grads[1:], SQ, SK, SD, *sizes, **constants)
    return tuple(x.to(dtype) for x, dtype in zip(grads, dtypes))


def selected_fwd(q, k, v, index, scale, select_block):
    """o and the logs of the sums, in one launch."""
    dtype, (q, k, v, SQ, SK, constants) = q.dtype, in_place(q, k, v)
    (B, T, H, _), Hk = q.shape, k.shape[2]
    constants |= dict(R=power(constants["G"]), LS=select_block, BS=power(select_block))
    o, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    sizes = SQ, SK, scale, T, k.shape[1], H, index.shape[3]
    launch("chosen", lambda c: T * B * Hk, q, k, v, index.contiguous(), o, lse, *sizes, **constants)
    return o.to(dtype), lse


def selected_bwd(q, k, v, index, o, lse, do, scale, select_block):
    """dq, dk, dv, in two launches."""
    dtypes, (q, k, v, SQ, SK, constants) = [x.dtype for x in (q, k, v)], in_place(q, k, v)
    do, SD, delta = gradient_inputs(q, o, do)
    (B, T, H, _), (_, S, Hk, _), n = q.shape, k.shape, index.shape[3]
    n_blocks = -(-S // select_block)
    constants |= dict(R=power(constants["G"]), LS=select_block, BS=power(select_block))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    sums, sizes = (do, lse, delta), (SQ, SK, SD, scale, T, S, H)
    launch("chosen_query", lambda c: T * B * Hk, q, k, v, index.contiguous(), *sums, dq, *sizes, n, **constants)
    block = numbered(index.transpose(1, 2).flatten(0, 1), n_blocks).flatten()
    block, order = torch.where(block < 0, B * Hk * n_blocks, block).sort(stable=True)
    first = torch.searchsorted(block, torch.arange(B * Hk * n_blocks + 1, device=block.device))
    constants |= dict(R=max(PAIR_ROWS_FP32 if q.dtype == torch.float32 else PAIR_ROWS, constants["R"]))
    pairs = order.div_(n, rounding_mode="floor"), first
    launch("chosen_key", lambda c: B * Hk * n_blocks, q, k, v, *pairs, *sums, dk, dv, *sizes, n_blocks, **constants)
    return tuple(x.to(dtype) for x, dtype in zip((dq, dk, dv), dtypes))


def fp32_sizes(constants):
    """For the report."""
    return dict(R=PAIR_ROWS_FP32) if "R" in constants else {}


def aot_specs():
    """(name, kernel, signature, constants) of every kernel and configuration, for the report. Default first."""
    specs = []
    for name, launched in KERNELS.items():
        kernel, kinds = launched.function, dict.fromkeys(("p_lse", "p_delta"), "*fp32") | dict(scale="fp32")
        kinds |= dict.fromkeys(("p_index", "p_query", "p_first"), "*i64") | dict.fromkeys(("SQ", "SK", "SD"), "i32:16")
        for width, select_block, (i, config) in itertools.product((64, 128), (32, 64), enumerate(launched.configs)):
            constants = dict(D=width, BD=width, G=4, DOT="bf16", **config)
            if name.startswith("chosen"):
                rows = PAIR_ROWS if name == "chosen_key" else 16
                constants |= dict(R=rows, LS=select_block, BS=select_block)
            elif select_block > 32:
                continue
            signature = {x: kinds.get(x, "*bf16" if x[:2] == "p_" else "i32") for x in kernel.arg_names}
            signature = {x: kind for x, kind in signature.items() if x not in constants}
            label = f" {select_block}" if name.startswith("chosen") else ""
            specs.append((f"nsa_{name} {width}{label} #{i}", kernel, signature, constants))
    return specs


# ----------------------------------------------------------------------------- ops


compressed_op = operator(
    "nsa_compressed",
    "(Tensor q, Tensor k, Tensor v, float scale, int block, int stride, int select_block, int select_count, int offset,"
    " bool by_triton) -> (Tensor, Tensor, Tensor)",
)(compressed_forward)


@compressed_op.register_fake
def _(q, k, v, scale, block, stride, select_block, select_count, offset, by_triton):
    n_blocks = (offset + q.shape[1] - 1) // select_block + 1
    index = q.new_empty(q.shape[0], q.shape[1], k.shape[2], min(select_count, n_blocks), dtype=torch.long)
    return q.new_empty(q.shape), index, sums_like(q, by_triton)


def sums_like(q, by_triton):
    return q.new_empty(q.shape[:3], dtype=torch.float32) if by_triton else q.new_empty(0)


@operator(
    "nsa_compressed_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor do, float scale, int block, int stride, int offset)"
    " -> (Tensor, Tensor, Tensor)",
)
def compressed_backward_op(q, k, v, o, lse, do, scale, block, stride, offset):
    if len(lse):
        return band_bwd(q, k, v, o, lse, do, scale, offset, offset + q.shape[1], stride, block - 1)
    return tuple(compressed_backward(q, k, v, do, scale, block, stride, offset))


compressed_backward_op.register_fake(like_inputs(3))


def compressed_context(ctx, inputs, output):
    q, k, v, ctx.scale, ctx.block, ctx.stride, _, _, ctx.offset, by_triton = inputs
    o, index, lse = output
    ctx.save_for_backward(q, k, v, o if by_triton else q.new_empty(0), lse)
    ctx.mark_non_differentiable(index, lse)


def compressed_autograd(ctx, do, *_):
    grads = compressed_backward_op(*ctx.saved_tensors, do, ctx.scale, ctx.block, ctx.stride, ctx.offset)
    return *grads, *(None,) * 7


compressed_op.register_autograd(compressed_autograd, setup_context=compressed_context)


@operator(
    "nsa_selected",
    "(Tensor q, Tensor k, Tensor v, Tensor index, float scale, int select_block, bool by_triton) -> (Tensor, Tensor)",
)
def selected_op(q, k, v, index, scale, select_block, by_triton):
    return (selected_fwd if by_triton else selected_forward)(q, k, v, index, scale, select_block)


@selected_op.register_fake
def _(q, k, v, index, scale, select_block, by_triton):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=compute_dtype(q.dtype))


@operator(
    "nsa_selected_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor index, Tensor o, Tensor lse, Tensor do, float scale, int select_block,"
    " bool by_triton) -> (Tensor, Tensor, Tensor)",
)
def selected_backward_op(q, k, v, index, o, lse, do, scale, select_block, by_triton):
    return tuple((selected_bwd if by_triton else selected_backward)(q, k, v, index, o, lse, do, scale, select_block))


selected_backward_op.register_fake(like_inputs(3))


def selected_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.select_block, ctx.by_triton = inputs
    ctx.save_for_backward(*tensors, *output)


def selected_autograd(ctx, do, _):
    grads = selected_backward_op(*ctx.saved_tensors, do, ctx.scale, ctx.select_block, ctx.by_triton)
    return *grads, None, None, None, None


selected_op.register_autograd(selected_autograd, setup_context=selected_context)


@operator("nsa_window", "(Tensor q, Tensor k, Tensor v, float scale, int window, bool by_triton) -> (Tensor, Tensor)")
def window_op(q, k, v, scale, window, by_triton):
    if by_triton:
        return band_fwd(q, k, v, scale, k.shape[1] - q.shape[1], window, 1, 0)
    return window_forward(q, k, v, scale, window), q.new_empty(0)


window_op.register_fake(lambda q, k, v, scale, window, by_triton: (q.new_empty(q.shape), sums_like(q, by_triton)))


@operator(
    "nsa_window_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor do, float scale, int window)"
    " -> (Tensor, Tensor, Tensor)",
)
def window_backward_op(q, k, v, o, lse, do, scale, window):
    if len(lse):
        return band_bwd(q, k, v, o, lse, do, scale, k.shape[1] - q.shape[1], window, 1, 0)
    return window_backward(q, k, v, do, scale, window)


window_backward_op.register_fake(like_inputs(3))


def window_context(ctx, inputs, output):
    q, k, v, ctx.scale, ctx.window, by_triton = inputs
    o, lse = output
    ctx.save_for_backward(q, k, v, o if by_triton else q.new_empty(0), lse)
    ctx.mark_non_differentiable(lse)


def window_autograd(ctx, do, _):
    return *window_backward_op(*ctx.saved_tensors, do, ctx.scale, ctx.window), None, None, None


window_op.register_autograd(window_autograd, setup_context=window_context)


# ----------------------------------------------------------------------------- public


def nsa_compressed(q, k, v, block, stride, select_block, select_count, offset=0, scale=None, backend="auto"):
    """o (B, T, H, D) and the chosen blocks (B, T, Hk, n), own block first, -1 where there are fewer.

    k, v (B, N, Hk, D): block i stands for tokens i * stride ... i * stride + block - 1 and is seen by those from its
    last token on; a query that sees none gets 0.  Of the blocks of select_block tokens, select_count are chosen for a
    group of heads: a query's own, block 0, the one before its own, and those with the largest sum of probabilities.
    The choice has no gradient.  offset: the position of the first query.  backend: auto | triton | torch.
    """
    check("nsa_compressed", q, k, v, backend)
    q, k, v = in_autocast(q, k, v)
    if min(block, stride) < 1 or block % stride or select_block % stride or block > select_block:
        sizes = f"block={block}, stride={stride}, select_block={select_block}"
        raise ValueError(f"nsa_compressed: stride must divide block and select_block, the larger: {sizes}")
    if select_count < FORCED:
        raise ValueError(f"nsa_compressed: select_count must be at least {FORCED}, got {select_count}")
    if offset < 0:
        raise ValueError(f"nsa_compressed: offset must be at least 0, got {offset}")
    seen = max(0, (offset + q.shape[1] - block) // stride + 1)
    if k.shape[1] != seen:
        raise ValueError(f"nsa_compressed: k must hold the {seen} complete blocks, got {k.shape[1]}")
    sizes = block, stride, select_block, select_count, offset
    if backend == "auto" and q.shape[1] == 1 and not torch.is_grad_enabled():
        return compressed_token(q, k, v, scaling(q, scale), *sizes)
    by_triton = seen > 0 and choose("nsa_compressed", backend, q, too_large(q, 1, q.shape[2] // k.shape[2])) == "triton"
    return compressed_op(q, k, v, scaling(q, scale), *sizes, by_triton)[:2]


def nsa_selected(q, k, v, index, select_block, scale=None, backend="auto"):
    """o (B, T, H, D): attention to the tokens of the chosen blocks, up to the query.

    k, v (B, S, Hk, D), S >= T: the queries are the last T of S tokens.  index (B, T, Hk, n): block numbers, the query's
    own first, -1 for none; no block twice.  backend: auto | triton | torch | gather, the last for the few queries of a
    decoding step.
    """
    check("nsa_selected", q, k, v, backend, longer=True, own=("gather",))
    q, k, v = in_autocast(q, k, v)
    if index.dim() != 4 or index.shape[:3] != (*q.shape[:2], k.shape[2]) or index.dtype != torch.long:
        wanted = (*q.shape[:2], k.shape[2])
        raise ValueError(f"nsa_selected: index must be int64 {wanted} and n, got {index.dtype} {tuple(index.shape)}")
    if backend == "gather":
        with leave_autocast(q):
            return selected_gathered(q, k, v, index, select_block, scaling(q, scale))
    backend = choose("nsa_selected", backend, q, too_large(q, select_block, q.shape[2] // k.shape[2]))
    return selected_op(q, k, v, index, scaling(q, scale), select_block, backend == "triton")[0]


def nsa_window(q, k, v, window, scale=None, backend="auto"):
    """o (B, T, H, D): attention to the last `window` tokens, the query's own among them. k, v (B, S, Hk, D), S >= T.
    backend: auto | triton | torch."""
    check("nsa_window", q, k, v, backend, longer=True)
    q, k, v = in_autocast(q, k, v)
    if window < 1:
        raise ValueError(f"nsa_window: window must be at least 1, got {window}")
    if backend == "auto" and q.shape[1] == 1:  # a decoded token: all that is left is seen
        q, k, v = q.transpose(1, 2), k[:, -window:].transpose(1, 2), v[:, -window:].transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, scale=scaling(q, scale), enable_gqa=True).transpose(1, 2)
    by_triton = choose("nsa_window", backend, q, too_large(q, 1, q.shape[2] // k.shape[2])) == "triton"
    return window_op(q, k, v, scaling(q, scale), window, by_triton)[0]


def too_large(q, select_block, G):
    """What the Triton kernels do not take, or None."""
    D = q.shape[3]
    if q.dtype == torch.float32 and D > FP32_WIDTH:
        return f"the Triton kernels take float32 heads up to {FP32_WIDTH} wide"
    limits = f"the Triton kernels take heads and blocks up to {MAX_WIDTH} wide, groups up to {MAX_GROUP}"
    return limits if max(D, select_block) > MAX_WIDTH or G > MAX_GROUP else None


def scaling(q, scale):
    return float(q.shape[3] ** -0.5 if scale is None else scale)


def check(name, q, k, v, backend, longer=False, own=()):
    for what, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"{name}: {what} must be a float (B, T, H, D), got {x.dtype} {tuple(x.shape)}")
    if min(q.shape) < 1:
        raise ValueError(f"{name}: q must have no dimension of 0, got {tuple(q.shape)}")
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"{name}: k and v must be (B, S, Hk, D) like q {tuple(q.shape)}, got {tuple(k.shape)}")
    if k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{name}: k has {k.shape[2]} heads, which do not divide the {q.shape[2]} of q")
    if backend not in ("auto", "triton", "torch", *own):
        names = ("auto", "triton", "torch", *own)
        raise ValueError(f"{name}: backend must be {', '.join(names[:-1])} or {names[-1]}, got {backend!r}")
    if longer and k.shape[1] < q.shape[1]:
        raise ValueError(f"{name}: k must be at least as long as q, {q.shape[1]}, got {k.shape[1]}")


def branches(q, k, v, dense=False):
    """All three with the sizes for T, a key head for all query heads, blocks compressed to their means, gates of 1."""
    sizes, k, v = nsa_sizes(q.shape[1]), k[:, :, :1], v[:, :, :1]
    compressed, selected, window = nsa_compressed, nsa_selected, nsa_window
    if dense:
        compressed, selected, window = nsa_compressed_dense, nsa_selected_dense, nsa_window_dense
    dtype = compute_dtype(q.dtype)
    blocks = (x.to(dtype).unfold(1, sizes[0], sizes[1]).mean(-1) for x in (k, v))  # (B, N, 1, D)
    o, index = compressed(q, *blocks, *sizes[:4])
    return o + selected(q, k, v, index, sizes[2]) + window(q, k, v, sizes[4])


def case(q, k, v, **_):
    """What is timed, where values are as wide as keys."""
    (B, T, H, D), oracle = q.shape, functools.partial(branches, dense=True)
    executed = B * operations(T, nsa_sizes(T), H, 1, D)[1]
    return {"nsa": Case(branches, [q, k, v], oracle, executed)} if v.shape[3] == D else {}


CASES = {"nsa": case}
