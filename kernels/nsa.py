"""The three branches of native sparse attention (arXiv 2502.11089, section 3), each causal softmax attention on its
own keys and values:

    nsa_compressed   one key for a block of l tokens, a block every d tokens; block i is seen from token i d + l - 1 on
    nsa_selected     the tokens of the n blocks of l' tokens that the compressed scores rank highest
    nsa_window       the last w tokens

Queries are q (B, T, H, D), the last T tokens of the sequence; keys and values (B, S, Hk, D), Hk heads shared by
G = H / Hk query heads each. Forms: an oracle with dense masks; blocked matrix products on the CPU and, without Triton,
elsewhere. Nothing is ever T x T: scores are made tile by tile, and again in the backward pass.
"""

import math

import torch
import torch.nn.functional as F

from .gla import Workspace, compute_dtype

SIZES = {  # longest sequence: l, d, l', n with the three forced blocks, w
    128: (8, 4, 8, 4, 16),
    256: (16, 8, 16, 4, 32),
    512: (16, 8, 16, 6, 64),
    1024: (32, 16, 32, 8, 128),
    4096: (32, 16, 64, 16, 512),
}
FORCED = 3  # a query's own block, block 0 and the block before its own
QUERIES = 64  # queries in a tile of the compressed and the window branch
ROWS = 64  # scores in a tile of the selected branch, along the queries
SCORES = 2**18  # scores that are worked on at a time, so that they stay in cache
PAIRS = 2**13  # of the selected branch: pairs of a query head and a block


def nsa_sizes(T):
    """(l, d, l', n, w) that are worth their cost at sequences of T: fewer tokens are read than softmax reads."""
    return SIZES[min((x for x in SIZES if x >= T), default=max(SIZES))]


def nsa_pairs(T, sizes, G=1):
    """Pairs of a query and a key in a sequence of T, (read, executed in tiles): the three branches together."""
    block, stride, select_block, count, window = sizes
    blocks, own = max(0, (T - block) // stride + 1), -(-T // select_block)
    c = min(max(16, min(window, QUERIES)), T)
    chosen = sum(min(t // select_block, count - 1) * select_block for t in range(T))
    read = sum(max(0, (t + 1 - block) // stride + 1) + t % select_block + 1 + min(t + 1, window) for t in range(T))
    ends = [min(T, t + QUERIES) for t in range(block - 1, T, QUERIES)]
    compressed = sum((b - a) * ((b - block) // stride + 1) for a, b in zip([block - 1, *ends], ends)) if blocks else 0
    rest = own * select_block * max(8, ROWS // G) // 2  # half a tile for each block
    return read + chosen, compressed + chosen + T * select_block + rest + -(-T // c) * c * (min(window, T) + c)


# ----------------------------------------------------------------------------- oracle


def dense(q, k, v, mask, scale=None):
    """Softmax attention under a mask (B or 1, H or 1, T, S): o (B, T, H, D), p (B, H, T, S); nothing seen gives 0."""
    G = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(G, 2), v.repeat_interleave(G, 2)
    s = torch.einsum("bthd,bshd->bhts", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    p = s.masked_fill(~mask, -math.inf).softmax(-1).masked_fill(~mask, 0.0)
    return torch.einsum("bhts,bshd->bthd", p, v), p


def overlap(N, block, stride, n_blocks, select_block):
    """(N, n_blocks): the tokens that compressed block i and selectable block j share, in strides."""
    a, b = torch.arange(N)[:, None] * stride, torch.arange(n_blocks) * select_block
    shared = torch.minimum(a + block, b + select_block) - torch.maximum(a, b)
    return shared.clamp(min=0) / stride


def nsa_compressed_dense(q, k, v, block, stride, select_block, select_count, offset=0, scale=None):
    """The oracle of nsa_compressed: o, and the chosen blocks (B, T, Hk, n), -1 where there are fewer."""
    (B, T, H, _), (N, Hk) = q.shape, k.shape[1:3]
    t = torch.arange(offset, offset + T)
    o, p = dense(q, k, v, torch.arange(N) * stride + block - 1 <= t[:, None], scale)
    n_blocks = (offset + T - 1) // select_block + 1
    weight = overlap(N, block, stride, n_blocks, select_block).to(p.dtype)
    score = p.view(B, Hk, H // Hk, T, N).sum(2) @ weight  # (B, Hk, T, n_blocks)
    index = torch.full((B, T, Hk, min(select_count, n_blocks)), -1)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (B, Hk, T))).tolist():
        own = (offset + i) // select_block
        forced = list(dict.fromkeys((own, 0, max(own - 1, 0))))
        rest = sorted((j for j in range(own) if j not in forced), key=lambda j: -score[b, h, i, j].item())
        chosen = (forced + rest)[:select_count]
        index[b, i, h, : len(chosen)] = torch.tensor(chosen)
    return o, index


def nsa_selected_dense(q, k, v, index, select_block, scale=None):
    T, H, S, Hk = *q.shape[1:3], *k.shape[1:3]
    s, t = torch.arange(S), torch.arange(S - T, S)
    chosen = (s // select_block == index[..., None]).any(3).transpose(1, 2)  # (B, Hk, T, S)
    return dense(q, k, v, chosen.repeat_interleave(H // Hk, 1) & (s <= t[:, None]), scale)[0]


def nsa_window_dense(q, k, v, window, scale=None):
    T, S = q.shape[1], k.shape[1]
    distance = torch.arange(S - T, S)[:, None] - torch.arange(S)
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
    some = max(1, SCORES // (QUERIES * G * max(1, n_blocks)))
    for n in range(0, N, some):
        for lo in range(max(0, block - 1 - offset), T, QUERIES):
            hi = min(T, lo + QUERIES)
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


def compressed_forward(q, k, v, scale, block, stride, select_block, select_count, offset):
    """o (B, T, H, D) and the chosen blocks (B, T, Hk, n)."""
    B, T, H, D = q.shape
    Hk, like = k.shape[2], q
    q, k, v = grouped(q, Hk, scale), grouped(k, Hk).squeeze(2), grouped(v, Hk).squeeze(2)
    o, new = torch.zeros_like(q), Workspace(q)
    own = torch.arange(offset, offset + T, device=q.device) // select_block
    index = own.new_full((q.shape[0], T, min(select_count, (offset + T - 1) // select_block + 1)), -1)
    forced = torch.stack((own, torch.where(own > 0, 0, -1), torch.where(own > 1, own - 1, -1)), -1)
    index[..., :FORCED] = forced[:, : index.shape[2]]
    for rows, lo, hi, seen in compressed_tiles(q, k, block, stride, offset):
        _, p = compressed_probabilities(q, k, rows, lo, hi, seen, block, stride, offset, new)
        o[rows, lo:hi] = new.bmm(p, v[rows, :seen]).view(-1, hi - lo, *o.shape[2:])
        n_blocks = (offset + hi - 1) // select_block - 2  # candidates of the last query: 1 ... own - 2
        count = min(n_blocks, index.shape[2] - FORCED)
        if count > 0:
            p = p.unflatten(1, (hi - lo, -1)).sum(2)  # over the group's heads
            score = importance(p, n_blocks, block, stride, select_block)
            late = torch.arange(1, n_blocks + 1, device=q.device) > own[lo:hi, None] - 2
            score, best = score.masked_fill_(late, -1.0).topk(count, -1, sorted=False)
            index[rows, lo:hi, FORCED : FORCED + count] = (best + 1).masked_fill_(score < 0, -1)
    index = index.view(B, Hk, T, -1).transpose(1, 2).contiguous()
    return ungrouped(o, like), index


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

    block (tiles): each tile's block.  query (tiles r): each place's query, -1 in the rest of a block's last tile.
    place (M, n): where a pair went, 0 for none, which `real` is false for.
    """

    def __init__(self, index, n_blocks, r):
        (M, n), device = index.shape, index.device
        self.real = index >= 0
        block, order = torch.where(self.real, index, n_blocks).flatten().sort(stable=True)
        count = torch.bincount(block, minlength=n_blocks + 1)[:n_blocks]
        tiles = (count + r - 1) // r
        self.block = torch.repeat_interleave(torch.arange(n_blocks, device=device), tiles)
        jump = (tiles.cumsum(0) - tiles) * r - (count.cumsum(0) - count)
        pairs = M * n - int((~self.real).sum())
        block, order = block[:pairs], order[:pairs]
        place = torch.arange(pairs, device=device) + jump[block]
        self.query = order.new_full((self.block.shape[0] * r,), -1)
        self.query[place] = order // n
        self.place = order.new_zeros(M * n)
        self.place[order] = place
        self.place = self.place.view(M, n)

    def heads(self, G):
        """The places of each query head's pairs, (M G, n)."""
        return (self.place.unsqueeze(1) * G + torch.arange(G, device=self.place.device).view(-1, 1)).flatten(0, 1)


def selected_tiles(q, k, index, select_block):
    """Stretches of the N T queries, each as tiles: (lo, hi, Tiles, gather) with gather(x, new) the rows of x (N T, G D)
    at the tiles' places."""
    (N, T, G, _), n, n_blocks = q.shape, index.shape[2], k.shape[1]
    first = torch.arange(N, device=q.device).view(-1, 1, 1) * n_blocks
    index = torch.where(index < 0, -1, index + first).flatten(0, 1)  # blocks numbered over all groups
    step, r = max(1, PAIRS // (n * G)), max(8, ROWS // G)
    for lo in range(0, N * T, step):
        hi = min(N * T, lo + step)
        yield lo, hi, Tiles(index[lo:hi], N * n_blocks, r)


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
    s.view(-1, diagonal.shape[1]).index_add_(0, tiles.place[:, 0], diagonal[own])


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
        top = top.flatten()[place].masked_fill_(~real, -math.inf)  # (M G, n)
        highest = top.amax(-1, keepdim=True)
        weight = top.sub_(highest).exp_()
        total = (weight * total.flatten()[place]).sum(-1, keepdim=True)
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
        level = lse[query].masked_fill_(tiles.query.unsqueeze(1) < 0, math.inf)  # no pair: probabilities of 0
        qt, kt, vt = gather(rows, tiles, lo, new), gather_blocks(ks, tiles, new), gather_blocks(vs, tiles, new)
        dot = gather(dos, tiles, lo, new)
        p = torch.baddbmm(level.neg_().view(shape), qt, kt.mT, out=new(*qt.shape[:2], select_block))
        mask_own(p, tiles, own, diagonal)
        p.exp_()
        dv.flatten(0, 1).index_add_(0, tiles.block, new.bmm(p.mT, dot))
        ds = torch.baddbmm(delta[query].neg_().view(shape), dot, vt.mT, out=new(*p.shape)).mul_(p)
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
        """Its part of x (B, S, Hk, D), and where that lies here, (B, kept, Hk, D). Earlier keys are seen by no query."""
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

    def view(self, n, lo, hi, width=None, start=0):
        """Group n, tiles lo to hi: (hi - lo, w + c, D), or a part of each."""
        _, L, D = self.x.shape
        shape = hi - lo, self.w + self.c if width is None else width, D
        return self.x.as_strided(shape, (self.c * D, D, 1), (n * L + lo * self.c + start) * D)

    def add(self, n, lo, hi, x):
        """Adds x (hi - lo, w + c, D) to the view, in parts that do not overlap."""
        for start in range(0, self.w + self.c, self.c):
            part = x[:, start : start + self.c]
            self.view(n, lo, hi, part.shape[1], start).add_(part)


def window_shape(T, S, window):
    """w and c: a window never longer than the sequence; as many queries in a tile as a window, within bounds."""
    w = min(window, S)
    return w, min(max(16, min(w, QUERIES)), T)


def window_tiles(q, tiles, w, c):
    N, G = q.shape[0], q.shape[2]
    step = max(1, SCORES // (c * G * (w + c)))
    return [(n, lo, min(tiles, lo + step)) for n in range(N) for lo in range(0, tiles, step)]


def window_queries(x, Hk, c, factor=1.0):
    """(B, T, H, D) -> (N, tiles c, G, D), filled up with zeros."""
    x = grouped(x, Hk, factor)
    return F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % c)) if x.shape[1] % c else x


def window_mask(c, w, like):
    """(c, 1, w + c): key u is u - w tokens after the tile's first query."""
    distance = torch.arange(c, device=like.device)[:, None] + w - torch.arange(w + c, device=like.device)
    return open_or_shut((distance >= 0) & (distance < w), like).unsqueeze(1)


def window_probabilities(q, k, n, lo, hi, mask, new):
    """The tiles' queries (hi - lo, c G, D) and probabilities (hi - lo, c G, w + c)."""
    new.taken = 0
    c = k.c
    q = q[n, lo * c : hi * c].view(hi - lo, -1, q.shape[-1])
    s = new.bmm(q, k.view(n, lo, hi).mT)
    s.unflatten(1, (c, -1)).add_(mask)
    for i in range(lo, min(hi, -(-k.at // c))):  # before the first key there is nothing
        s[i - lo, :, : k.at - i * c] = -math.inf
    return q, torch.softmax(s, -1, out=new(*s.shape))


def window_forward(q, k, v, scale, window):
    (w, c), like, Hk, T = window_shape(q.shape[1], k.shape[1], window), q, k.shape[2], q.shape[1]
    q = window_queries(q, Hk, c, scale)
    k, v = (Band(x, T, c, w).read(x) for x in (k, v))
    o, new, mask = torch.empty_like(q), Workspace(q), window_mask(c, w, q)
    for n, lo, hi in window_tiles(q, q.shape[1] // c, w, c):
        _, p = window_probabilities(q, k, n, lo, hi, mask, new)
        place = o[n, lo * c : hi * c].view(hi - lo, -1, o.shape[-1])
        torch.bmm(p, v.view(n, lo, hi), out=place)
    return ungrouped(o[:, :T], like)


def window_backward(q, k, v, do, scale, window):
    (w, c), like, Hk, T = window_shape(q.shape[1], k.shape[1], window), (q, k, v), k.shape[2], q.shape[1]
    q, do = window_queries(q, Hk, c, scale), window_queries(do, Hk, c)
    (k, v), (dk, dv) = (Band(x, T, c, w).read(x) for x in (k, v)), (Band(x, T, c, w) for x in (k, v))
    dq, new, mask = torch.empty_like(q), Workspace(q), window_mask(c, w, q)
    for n, lo, hi in window_tiles(q, q.shape[1] // c, w, c):
        qs, p = window_probabilities(q, k, n, lo, hi, mask, new)
        dos = do[n, lo * c : hi * c].view(qs.shape)
        dv.add(n, lo, hi, new.bmm(p.mT, dos))
        ds = softmax_backward(p, new.bmm(dos, v.view(n, lo, hi).mT))
        dk.add(n, lo, hi, new.bmm(ds.mT, qs))
        place = dq[n, lo * c : hi * c].view(qs.shape)
        torch.baddbmm(place, ds, k.view(n, lo, hi), beta=0, alpha=scale, out=place)
    return ungrouped(dq[:, :T], like[0]), dk.write(like[1]), dv.write(like[2])


# ----------------------------------------------------------------------------- ops


def new_like(*xs):
    return tuple(x.new_empty(x.shape) for x in xs)


def op(name, schema):
    return torch.library.custom_op(f"nanoattention::{name}", mutates_args=(), schema=schema)


@op(
    "nsa_compressed",
    "(Tensor q, Tensor k, Tensor v, float scale, int block, int stride, int select_block, int select_count, int offset)"
    " -> (Tensor, Tensor)",
)
def compressed_op(q, k, v, scale, block, stride, select_block, select_count, offset):
    return compressed_forward(q, k, v, scale, block, stride, select_block, select_count, offset)


@compressed_op.register_fake
def _(q, k, v, scale, block, stride, select_block, select_count, offset):
    n_blocks = (offset + q.shape[1] - 1) // select_block + 1
    index = q.new_empty(q.shape[0], q.shape[1], k.shape[2], min(select_count, n_blocks), dtype=torch.long)
    return q.new_empty(q.shape), index


@op(
    "nsa_compressed_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor do, float scale, int block, int stride, int offset)"
    " -> (Tensor, Tensor, Tensor)",
)
def compressed_backward_op(q, k, v, do, scale, block, stride, offset):
    return tuple(compressed_backward(q, k, v, do, scale, block, stride, offset))


@compressed_backward_op.register_fake
def _(q, k, v, do, *_):
    return new_like(q, k, v)


def compressed_context(ctx, inputs, output):
    q, k, v, ctx.scale, ctx.block, ctx.stride, _, _, ctx.offset = inputs
    ctx.save_for_backward(q, k, v)
    ctx.mark_non_differentiable(output[1])


def compressed_autograd(ctx, do, _):
    grads = compressed_backward_op(*ctx.saved_tensors, do, ctx.scale, ctx.block, ctx.stride, ctx.offset)
    return *grads, *(None,) * 6


compressed_op.register_autograd(compressed_autograd, setup_context=compressed_context)


@op("nsa_selected", "(Tensor q, Tensor k, Tensor v, Tensor index, float scale, int select_block) -> (Tensor, Tensor)")
def selected_op(q, k, v, index, scale, select_block):
    return selected_forward(q, k, v, index, scale, select_block)


@selected_op.register_fake
def _(q, k, v, index, scale, select_block):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=compute_dtype(q.dtype))


@op(
    "nsa_selected_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor index, Tensor o, Tensor lse, Tensor do, float scale, int select_block)"
    " -> (Tensor, Tensor, Tensor)",
)
def selected_backward_op(q, k, v, index, o, lse, do, scale, select_block):
    return tuple(selected_backward(q, k, v, index, o, lse, do, scale, select_block))


@selected_backward_op.register_fake
def _(q, k, v, *_):
    return new_like(q, k, v)


def selected_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.select_block = inputs
    ctx.save_for_backward(*tensors, *output)


def selected_autograd(ctx, do, _):
    return *selected_backward_op(*ctx.saved_tensors, do, ctx.scale, ctx.select_block), None, None, None


selected_op.register_autograd(selected_autograd, setup_context=selected_context)


@op("nsa_window", "(Tensor q, Tensor k, Tensor v, float scale, int window) -> Tensor")
def window_op(q, k, v, scale, window):
    return window_forward(q, k, v, scale, window)


@window_op.register_fake
def _(q, k, v, scale, window):
    return q.new_empty(q.shape)


@op(
    "nsa_window_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor do, float scale, int window) -> (Tensor, Tensor, Tensor)",
)
def window_backward_op(q, k, v, do, scale, window):
    return window_backward(q, k, v, do, scale, window)


@window_backward_op.register_fake
def _(q, k, v, *_):
    return new_like(q, k, v)


def window_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def window_autograd(ctx, do):
    return *window_backward_op(*ctx.saved_tensors, do, ctx.scale, ctx.window), None, None


window_op.register_autograd(window_autograd, setup_context=window_context)


# ----------------------------------------------------------------------------- public


def nsa_compressed(q, k, v, block, stride, select_block, select_count, offset=0, scale=None):
    """o (B, T, H, D) and the chosen blocks (B, T, Hk, n), own block first, -1 where there are fewer.

    k, v (B, N, Hk, D): block i stands for tokens i * stride ... i * stride + block - 1 and is seen by those from its
    last token on; a query that sees none gets 0.  Of the blocks of select_block tokens, select_count are chosen for a
    group of heads: a query's own, block 0, the one before its own, and those with the largest sum of probabilities.
    The choice has no gradient.  offset: the position of the first query.
    """
    check("nsa_compressed", q, k, v)
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
    return compressed_op(q, k, v, scaling(q, scale), block, stride, select_block, select_count, offset)


def nsa_selected(q, k, v, index, select_block, scale=None, backend="auto"):
    """o (B, T, H, D): attention to the tokens of the chosen blocks, up to the query.

    k, v (B, S, Hk, D), S >= T: the queries are the last T of S tokens.  index (B, T, Hk, n): block numbers, the query's
    own first, -1 for none; no block twice.  backend: auto | torch | gather, the last for the few queries of a decoding
    step.
    """
    check("nsa_selected", q, k, v, longer=True)
    if index.dim() != 4 or index.shape[:3] != (*q.shape[:2], k.shape[2]) or index.dtype != torch.long:
        wanted = (*q.shape[:2], k.shape[2])
        raise ValueError(f"nsa_selected: index must be int64 {wanted} and n, got {index.dtype} {tuple(index.shape)}")
    if backend not in ("auto", "torch", "gather"):
        raise ValueError(f"nsa_selected: backend must be auto, torch or gather, got {backend!r}")
    if backend == "gather":
        return selected_gathered(q, k, v, index, select_block, scaling(q, scale))
    return selected_op(q, k, v, index, scaling(q, scale), select_block)[0]


def nsa_window(q, k, v, window, scale=None):
    """o (B, T, H, D): attention to the last `window` tokens, the query's own among them. k, v (B, S, Hk, D), S >= T."""
    check("nsa_window", q, k, v, longer=True)
    if window < 1:
        raise ValueError(f"nsa_window: window must be at least 1, got {window}")
    return window_op(q, k, v, scaling(q, scale), window)


def scaling(q, scale):
    return float(q.shape[3] ** -0.5 if scale is None else scale)


def check(name, q, k, v, longer=False):
    for what, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"{name}: {what} must be a float (B, T, H, D), got {x.dtype} {tuple(x.shape)}")
    if min(q.shape) < 1:
        raise ValueError(f"{name}: q must have no dimension of 0, got {tuple(q.shape)}")
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"{name}: k and v must be (B, S, Hk, D) like q {tuple(q.shape)}, got {tuple(k.shape)}")
    if k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{name}: k has {k.shape[2]} heads, which do not divide the {q.shape[2]} of q")
    if longer and k.shape[1] < q.shape[1]:
        raise ValueError(f"{name}: k must be at least as long as q, {q.shape[1]}, got {k.shape[1]}")
