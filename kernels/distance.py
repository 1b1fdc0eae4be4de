"""Attention whose mask depends on the distance between query and key alone, in operations that follow the mask.

    o_t = sum_s p_ts v_s,   p_ts = softmax_s(scale q_t . k_s + table[t - s]),   s <= t      table (H, T), -inf: dropped
    prefix[s, t - s] stands in place of the table for the first P keys                      prefix (H, P, T)

`distance` is the public function. A query that sees no key has output 0. Three forms of the same equations: `dense`,
the oracle; `banded`, which reads the kept distances off the table at each call (nothing can be stale) and computes only
blocks that hold some; `triton`, one kernel over the tiles that hold some, and three backward. Axes: B batch, T time, H
heads, D key width, V value width, C queries a block, W keys that a block sees, n blocks in a segment, R rows (batch and
heads worked on together), N = R * n; M rows of the table: H, or 1 for all heads.
"""

import bisect
import functools
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from . import Case, check, in_autocast, jit, leave_autocast, like_inputs, operator, tl, triton
from .gated import MAX_WIDTH, load_rows, programs, store_rows, widths
from .gla import LOG2E, compute_dtype, dense, joined
from .launch import Kernel, choose, configurations, dot, operand, split, too_long

SEGMENT = 2**18  # scores that the banded form works on at a time, so that its tensors stay in cache
CALLS = 2**13  # scores that take the time of a segment's calls
BLOCKS = (16, 32, 64, 128)  # queries a block
FLAT_BLOCKS = (128, 256)  # queries a block, where SDPA takes the keys that no query of it masks
BATCH = 4  # sequences that the choice of a plan counts with: several share the calls of a segment
HIDDEN = -1e30  # a logit that softmax turns into an exact 0, without the NaN of a row of infinities


# ----------------------------------------------------------------------------- oracle


def distance_dense(q, k, v, table, prefix, scale, constant_ones):
    """All T x T scores, in fp64 for fp64 inputs and fp32 otherwise. Differentiable."""
    (_, T, H, _), dtype = q.shape, compute_dtype(q.dtype)
    far = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)  # (T, T)
    table = drop_ones(table.to(dtype)) if constant_ones else table.to(dtype)
    mask = table[:, far.clamp(min=0)].expand(H, T, T)
    if P := min(prefix.shape[1], T):
        first = prefix[:, torch.arange(P, device=q.device), far[:, :P].clamp(min=0)].to(dtype).expand(H, T, P)
        mask = torch.cat((first, mask[:, :, P:]), 2)
    seen = (far >= 0) & (mask > -math.inf)
    logits = torch.einsum("bthd,bshd->bhts", q.to(dtype), k.to(dtype)) * scale
    logits = torch.where(seen, logits + torch.where(seen, mask, 0.0), HIDDEN)
    p = logits.softmax(-1) * seen.any(-1, keepdim=True)
    return torch.einsum("bhts,bshv->bthv", p, v.to(dtype)).to(v.dtype)


def flat(table):
    """Where a table (H, T) masks neither a distance nor the next: a ramp that begins there has its gradient still."""
    zero = table == 0
    return zero & F.pad(zero[:, 1:], (0, 1), value=True)


def drop_ones(table):
    """The table, without gradient where it is flat."""
    return torch.where(flat(table), 0.0, table)


# ----------------------------------------------------------------------------- the plan


class Plan(NamedTuple):
    """How a head is computed. Tokens `stride` apart are a sequence of their own; in it, blocks of `block` queries see
    the keys of each run of distances (nearest, furthest), and the first `prefix` keys. block 0: causal SDPA. flat: the
    distances below it have no mask; SDPA takes those that all queries of a block see."""

    stride: int
    block: int
    runs: tuple
    prefix: int
    flat: int = 0

    def __str__(self):
        if not self.block:
            return "causal SDPA"
        if self.flat:
            return f"SDPA below {self.flat}, blocks of {self.block} up to {self.runs[0][1]}"
        runs = " ".join(f"{lo}-{hi}" for lo, hi in self.runs)
        return f"blocks of {self.block}, distances {runs}" + (f", stride {self.stride}" if self.stride > 1 else "")


def plans(table, prefix, sdpa=True):
    """A Plan for each row of the table; sdpa: may be PyTorch's kernel where nothing is masked. Neighbours get one plan
    for what either keeps where the calls that this saves are worth the scores that it adds: then `pieces` computes them
    together. A wide head stays apart from narrow ones."""
    kept, T, P = (table > -math.inf).cpu().numpy(), table.shape[1], prefix.shape[1]
    near = flat(table).long().cumprod(1).sum(1).tolist() if sdpa and not P else [0] * len(table)
    groups = []  # (what any row keeps, what all leave unmasked, rows, plan)
    for row, low in zip(kept, near):
        new = row, low, 1, make_plan(row.tobytes(), low, P)
        if groups and groups[-1][3].block and new[3].block:
            either, low, n = groups[-1][0] | row, min(low, groups[-1][1]), groups[-1][2] + 1
            both = make_plan(either.tobytes(), low, P, n)
            apart = sum(cost(plan, T, n) for *_, n, plan in (groups[-1], new))
            if n <= together(both, T) and cost(both, T, n) <= apart:
                groups.pop()
                new = either, low, n, both
        groups.append(new)
    return [plan for *_, n, plan in groups for _ in range(n)]


@functools.lru_cache(4096)
def make_plan(kept, flat, prefix, heads=1):
    """The cheapest plan for a row of kept distances, the first `flat` of them unmasked, by `cost`. A gap is worth a run
    of its own where it is longer than a block; distances that are all multiples of some number fall into that many
    shorter sequences."""
    offsets, T = np.flatnonzero(np.frombuffer(kept, dtype=bool)), len(kept)
    if flat == T:
        return Plan(1, 0, (), 0)
    stride = 1 if prefix or len(offsets) < 2 else max(1, int(np.gcd.reduce(offsets)))
    candidates = [Plan(stride, block, runs_of(offsets // stride, block), prefix) for block in BLOCKS]
    candidates += [Plan(1, block, ((0, int(offsets[-1])),), 0, flat) for block in FLAT_BLOCKS if flat > block]
    return min(candidates, key=lambda plan: cost(plan, T, heads))


def runs_of(offsets, block):
    if not len(offsets):
        return ()
    cuts = np.flatnonzero(np.diff(offsets) > block) + 1
    return tuple((int(run[0]), int(run[-1])) for run in np.split(offsets, cuts))


@functools.lru_cache(4096)
def cost(plan, T, heads=1):
    """Nanoseconds of a forward and backward pass over heads that go together, fitted on one AVX-512 core: scores, of
    which small blocks make fewer and slower ones, and the calls of each segment."""
    if plan.flat:
        parts = edges(plan, T)
        sums = ((z - a) * (14.5 * (z - a) + 9 * (a - lo) + 21 * (lo - start)) for a, z, lo, start in parts)
        return BATCH * heads * sum(sums) + 1_500_000 * len(parts)
    parts, rows = segments(plan, -(-T // plan.stride)), BATCH * heads
    scores = sum(n * plan.block * width for _, n, _, width in parts)
    calls = len(parts) * -(-rows // together(plan, T))
    return plan.stride * (rows * scores * (10.7 + 80 / plan.block) + 100_000 * calls)


@functools.lru_cache(4096)
def together(plan, T):
    """Heads or sequences whose blocks fit a segment; 1 where those of one fill it."""
    if plan.flat:
        return T
    parts = segments(plan, -(-T // plan.stride))
    return max(1, SEGMENT // max([1] + [n * plan.block * width for _, n, _, width in parts]))


@functools.lru_cache(4096)
def segments(plan, T):
    """(first query, blocks, [(run, furthest distance, keys of the run)], keys of a block) of each segment. Blocks near
    the start have fewer keys, and a segment those of its last block: it ends where that would waste more scores than
    the calls of one more segment cost, a share of them where several rows are worked on together. Blocks without a key
    are in none."""
    C = plan.block
    found, a = [], 0 if plan.prefix else min((lo for lo, _ in plan.runs), default=0) // C * C
    bearable = CALLS // max(1, SEGMENT // (T * max(1, seen_runs(plan, T)[1])))
    while a < T:
        n, waste, width = 1, 0, seen_runs(plan, a)[1]
        while a + n * C < T:
            wider = seen_runs(plan, a + n * C)[1]
            waste += n * C * (wider - width)
            if waste > bearable or C * (n + 1) * wider > SEGMENT:
                break
            n, width = n + 1, wider
        found.append((a, n, *seen_runs(plan, a + (n - 1) * C)))
        a += n * C
    return found


def seen_runs(plan, last):
    """The runs that a block beginning at `last` sees, and the keys in them."""
    seen = [(i, lo, min(hi, last)) for i, (lo, hi) in enumerate(plan.runs) if lo < last + plan.block]
    seen = [(i, hi, hi - lo + plan.block) for i, lo, hi in seen]
    return seen, plan.prefix + sum(w for _, _, w in seen)


def executed_pairs(plan, T):
    """Query-key pairs that a forward pass computes for one head and sequence."""
    if not plan.block:
        return T * (T + 1) // 2
    if plan.flat:
        return sum((z - a) * ((z - a + 1) / 2 + a - start) for a, z, _, start in edges(plan, T))
    lengths = [len(range(r, T, plan.stride)) for r in range(min(plan.stride, T))]
    return sum(n * plan.block * width for t in lengths for _, n, _, width in segments(plan, t))


# ----------------------------------------------------------------------------- windows: SDPA and an edge
#
# Softmax over parts of the keys: each part has its output and its log-sum-exp, and the whole is their mean with weights
# e^(lse_part - lse). Given the whole's o and lse, a part's backward pass is its own.


def edges(plan, T):
    """(a, z, lo, start) of each block of queries a .. z-1: SDPA takes the keys from lo on, which no query masks, the
    block's own ones causally; the edge has those from start to lo."""
    found, reach = [], plan.runs[0][1]
    for a in range(0, T, plan.block):
        z = min(a + plan.block, T)
        found.append((a, z, max(0, z - plan.flat), max(0, min(a - reach, z - plan.flat))))
    return found


class Window:
    """One plan with a flat part over q, k, v (b, h, T, D); table (h or 1, T)."""

    def __init__(self, plan, table, q, k, v, scale):
        self.q, self.k, self.v = (x.contiguous() for x in (q, k, v))
        self.scale, self.parts = scale, edges(plan, q.shape[2])
        self.C, self.flat, self.reach = plan.block, plan.flat, plan.runs[0][1]
        far = self.reach + torch.arange(self.C)[:, None] - torch.arange(self.reach - self.flat + self.C)
        self.far = far.to(table.device)  # (C, W), distances of the edge's keys, from a - reach on
        hidden = torch.cat((table[:, : self.reach + 1], table.new_full((len(table), self.C), HIDDEN)), 1)
        self.bias = hidden.clamp(min=HIDDEN)[:, self.far]  # (h or 1, C, W)

    def columns(self, part):
        """The place of an edge in `far` and `bias`."""
        a, z, lo, start = part
        return slice(0, z - a), slice(start - a + self.reach, lo - a + self.reach)

    def scores(self, part):
        """Of an edge, (b h, z - a, lo - start)."""
        a, z, lo, start = part
        bias = self.bias[(slice(None), *self.columns(part))]
        bias = bias.expand(*self.q.shape[:2], *bias.shape[1:]).flatten(0, 1)
        return torch.baddbmm(bias, self.rows(self.q, a, z), self.rows(self.k, start, lo).mT, alpha=self.scale)

    def rows(self, x, a, z):
        """Tokens a .. z-1 of x (b, h, T, D) as (b h, z - a, D)."""
        return x.flatten(0, 1)[:, a:z].to(self.bias.dtype)

    def near(self, part):
        """(keys, whether they are the block's own) of each call of SDPA."""
        a, z, lo, _ = part
        return [(slice(a, z), True)] + ([(slice(lo, a), False)] if lo < a else [])

    def forward(self, o):
        """Writes o (b, h, T, D). Returns the log-sum-exp (b, h, T)."""
        lse = self.bias.new_empty(o.shape[:3])
        for part in self.parts:
            a, z, lo, start = part
            q = self.q[:, :, a:z]
            found = [flash(q, self.k[:, :, s], self.v[:, :, s], self.scale, own) for s, own in self.near(part)]
            if start < lo:
                p = self.scores(part)
                most = p.amax(-1, keepdim=True)
                total = p.sub_(most).exp_().sum(-1, keepdim=True)
                y = torch.bmm(p, self.rows(self.v, start, lo)).div_(total)
                found.append((y.view(*q.shape[:2], -1, y.shape[2]), total.log_().add_(most).view(q.shape[:3])))
            torch.logsumexp(torch.stack([x for _, x in found]), 0, out=lse[:, :, a:z])
            o[:, :, a:z] = sum(y * (x - lse[:, :, a:z]).exp().unsqueeze(-1) for y, x in found)
        return lse

    def backward(self, do, o, lse, dtable):
        """dq, dk, dv. Adds to dtable (h or 1, T)."""
        dq, dk, dv = (torch.zeros_like(x, dtype=self.bias.dtype) for x in (self.q, self.k, self.v))
        do, o, sums = do.contiguous(), o.contiguous(), torch.zeros_like(self.bias)
        for part in self.parts:
            a, z, lo, start = part
            whole = do[:, :, a:z], self.q[:, :, a:z], o[:, :, a:z], lse[:, :, a:z].contiguous()
            for s, own in self.near(part):
                grads = flash_backward(*whole[:2], self.k[:, :, s], self.v[:, :, s], *whole[2:], self.scale, own)
                for into, grad, place in zip((dq, dk, dv), grads, (slice(a, z), s, s)):
                    into[:, :, place] += grad
            if start == lo:
                continue
            p = self.scores(part).sub_(whole[3].flatten(0, 1).unsqueeze(-1)).exp_()
            g, q, y = (self.rows(x, a, z) for x in (do, self.q, o))
            k, v = (self.rows(x, start, lo) for x in (self.k, self.v))
            ds = torch.bmm(g, v.mT).sub_((g * y).sum(-1, True)).mul_(p)
            total = ds.view(-1, len(sums), *ds.shape[1:]).sum(0)
            sums[(slice(None), *self.columns(part))] += total
            self.rows(dq, a, z).baddbmm_(ds, k, alpha=self.scale)
            self.rows(dk, start, lo).baddbmm_(ds.mT, q, alpha=self.scale)
            self.rows(dv, start, lo).baddbmm_(p.mT, g)
        along = dtable.new_zeros(len(dtable), self.reach + self.C)
        along.index_add_(1, self.far.flatten(), sums.flatten(1))
        dtable[:, self.flat : self.reach + 1] += along[:, self.flat : self.reach + 1]
        return dq, dk, dv


# ----------------------------------------------------------------------------- banded PyTorch
#
# A block holds all keys of its queries, so its softmax is whole: the forward keeps nothing, the backward computes the
# scores again. Windows of neighbouring blocks overlap: one row alone reads them in place, by strides; their gradients
# are added slice by slice.


class Workspace:
    """Tensors that every segment asks for in the same order and that the next one overwrites: fresh memory costs more
    than arithmetic here, each page of it is a fault."""

    def __init__(self, like, dtype):
        self.like, self.dtype, self.blocks, self.views, self.taken = like, dtype, {}, {}, 0

    def __call__(self, *shape):
        i, size = self.taken, math.prod(shape)
        self.taken += 1
        if (i, shape) not in self.views:
            if i not in self.blocks or self.blocks[i].numel() < size:
                self.blocks[i] = self.like.new_empty(size, dtype=self.dtype)
            self.views[i, shape] = self.blocks[i][:size].view(shape)
        return self.views[i, shape]

    def bmm(self, a, b):
        return torch.bmm(a, b, out=self(a.shape[0], a.shape[1], b.shape[2]))


class Band:
    """One plan over one sequence, for the m rows of `table` (m, T) and `prefix` (m, P, T): their bias, and the windows
    of the blocks. m is 1 or the number of heads."""

    def __init__(self, plan, table, prefix, T):
        self.plan, self.C, self.P, self.T, self.m = plan, plan.block, plan.prefix, T, len(table)
        self.parts = segments(plan, T)
        before = [hi - a for a, _, runs, _ in self.parts for _, hi, _ in runs]
        self.front = max([0, *before])  # rows of zeros before the first key
        self.rows = self.front + -(-T // self.C) * self.C
        C = self.C
        hidden = table.new_full((len(table), C), HIDDEN)
        r = torch.arange(C, device=table.device)[:, None]
        self.index, self.bias = [], []
        for lo, hi in plan.runs:
            run = torch.cat((hidden, table[:, lo : hi + 1].clamp(min=HIDDEN), hidden), 1)
            c = torch.arange(hi - lo + C, device=table.device)
            self.index.append(r + (hi - lo + C) - c)  # (C, W): place of distance r + hi - c in the run
            self.bias.append(run[:, self.index[-1]])  # (m, C, W)
        self.first = None
        if self.P:
            far = torch.arange(self.rows - self.front, device=table.device)[:, None]
            far = far - torch.arange(self.P, device=table.device)
            self.far = far.clamp(0, T - 1).expand(len(table), -1, -1)
            self.first = prefix.clamp(min=HIDDEN).mT.gather(1, self.far).masked_fill(far < 0, HIDDEN)  # (m, T + pad, P)

    def load(self, x, new):
        """x (b, h, T, D) with zeros before and after: (R, rows, D)."""
        out = new(*x.shape[:2], self.rows, x.shape[3])
        out[:, :, : self.front] = 0
        out[:, :, self.front : self.front + self.T] = x
        out[:, :, self.front + self.T :] = 0
        return out.flatten(0, 1)

    def queries(self, x, part, dtype):
        """The segment's queries, of x (b, h, T, D): (N, C, D), where there is one row of whole blocks a view."""
        a, n = part[:2]
        x = x[:, :, a : a + n * self.C].to(dtype)
        if missing := n * self.C - x.shape[2]:
            x = F.pad(x, (0, 0, 0, missing))
        return x.reshape(-1, self.C, x.shape[3])

    def store(self, into, x, part, factor=1.0):
        """Writes factor * x (N, C, D) to the segment of into (b, h, T, D)."""
        a, n = part[:2]
        place = into[:, :, a : a + n * self.C]
        torch.mul(x.view(*into.shape[:2], -1, x.shape[2])[:, :, : place.shape[2]], factor, out=place)

    def strided(self, x, part):
        """The windows of a segment as views (R, n, W, D) of x (R, rows, D), one for the prefix and one for each run."""
        (R, L, D), (a, n, runs, _) = x.shape, part
        step = (L * D, self.C * D, D, 1)
        views = [x[:, None, self.front : self.front + self.P].expand(R, n, self.P, D)] if self.P else []
        return views + [x.as_strided((R, n, w, D), step, (self.front + a - hi) * D) for _, hi, w in runs]

    def keys(self, x, part):
        views = self.strided(x, part)
        x = views[0] if len(views) == 1 else torch.cat(views, 2)
        return x.reshape(-1, *x.shape[2:])

    def probabilities(self, q, k, part, scale, new):
        """softmax over each query's window, (N, C, W)."""
        a, n, runs, W = part
        C, place = self.C, self.P
        s = new(q.shape[0], C, W)
        tiles = s.view(-1, self.m, n, C, W)
        if self.P:
            tiles[..., : self.P] = self.first[:, a : a + n * C].view(-1, n, C, self.P)
        for i, _, w in runs:
            tiles[..., place : place + w] = self.bias[i][:, None, :, -w:]
            place += w
        torch.baddbmm(s, q, k.mT, alpha=scale, out=s)
        place = self.P
        for _, hi, w in runs:  # no keys before the first; those of the prefix have their own columns
            for i in range(n):
                before = min(w, hi - a - i * C + self.P)
                if before > 0:
                    tiles[:, :, i, :, place : place + before] = HIDDEN
            place += w
        return torch.softmax(s, -1, out=s)

    def add_keys(self, into, grad, part):
        """Adds grad (N, W, D), by window, to into (R, rows, D)."""
        (a, n, runs, W), (R, L, D) = part, into.shape
        grad, step, place = grad.view(R, n, W, D), (L * D, self.C * D, D, 1), self.P
        if self.P:
            into[:, self.front : self.front + self.P] += grad[:, :, : self.P].sum(1)
        for _, hi, w in runs:
            for c in range(0, w, self.C):
                m = min(self.C, w - c)
                view = into.as_strided((R, n, m, D), step, (self.front + a - hi + c) * D)
                view.add_(grad[:, :, place + c : place + c + m])
            place += w

    def table_gradient(self, runs, dtable):
        """Sums the gradient of each run's bias along its diagonals."""
        for (lo, hi), index, grad in zip(self.plan.runs, self.index, runs):
            sums = grad.new_zeros(self.m, hi - lo + 1 + 2 * self.C).index_add_(1, index.flatten(), grad.flatten(1))
            dtable[:, lo : hi + 1] += sums[:, self.C : -self.C]


def row_groups(x, heads, band):
    """Slices of (batch, heads) to work on together: one row alone where its blocks fill a segment."""
    fits = max(1, SEGMENT // max([1] + [n * band.C * width for _, n, _, width in band.parts]))
    B, H = x.shape[0], len(range(*heads.indices(x.shape[2])))
    h = min(H, fits)
    b = min(B, fits // h) if h == H else 1
    for j in range(0, H, h):
        for i in range(0, B, b):
            yield slice(i, i + b), slice(heads.start + j, heads.start + min(H, j + h))


def pieces(q, v, table, prefix, constant_ones):
    """(rows of the table, heads, plan, band, tokens) of all that is computed apart; one row serves all heads."""
    (_, T, H, _), i = q.shape, 0
    found = plans(table, prefix, sdpa=constant_ones and q.device.type == "cpu" and q.shape == v.shape)
    for plan, same in itertools.groupby(found):
        end = i + len(list(same))
        apart = not plan.block or plan.flat or not (plan.runs or plan.prefix)
        while i < end:
            rows = slice(i, end if apart else min(end, i + together(plan, T)))
            heads, i = rows if len(table) > 1 else slice(0, H), rows.stop
            if apart:
                yield rows, heads, plan, None, slice(None)
                continue
            for r in range(min(plan.stride, T)):
                time = slice(r, T, plan.stride)
                band = Band(plan, table[rows, :: plan.stride], prefix[rows], len(range(r, T, plan.stride)))
                yield rows, heads, plan, band, time


def blind_queries(table, prefix):
    """(H or 1, T): queries that see no key at all. Rare: a mask without the token itself."""
    P, T = prefix.shape[1:]
    seen = (table > -math.inf).cummax(1).values
    if P:
        t = torch.arange(T, device=table.device)
        s = torch.arange(min(P, T), device=table.device)
        far = t - s[:, None]
        first = (prefix[:, s[:, None], far.clamp(min=0)] > -math.inf) & (far >= 0)
        band = torch.zeros_like(seen)
        band[:, P:] = seen[:, :-P] if T > P else seen[:, :0]
        seen = band | first.any(1)
    return ~seen


def banded_forward(q, k, v, table, prefix, scale, constant_ones):
    """o (B, T, H, V), and the log-sum-exp (B, H, T) of heads that took SDPA."""
    dtype = compute_dtype(q.dtype)
    table, prefix = table.to(dtype), prefix.to(dtype)
    o, lse = v.new_empty(v.shape), q.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=dtype)
    new = Workspace(q, dtype)
    for rows, heads, plan, band, time in pieces(q, v, table, prefix, constant_ones):
        if not plan.block:
            xs = (x[:, :, heads].transpose(1, 2) for x in (q, k, v))
            y, lse[:, heads] = flash(*xs, scale)
            o[:, :, heads] = y.transpose(1, 2)
        elif plan.flat:
            xs = (x[:, :, heads].transpose(1, 2) for x in (q, k, v))
            lse[:, heads] = Window(plan, table[rows], *xs, scale).forward(o[:, :, heads].transpose(1, 2))
        elif band is None:
            o[:, :, heads] = 0
        for rows, some in row_groups(q, heads, band) if band else ():
            new.taken = 0
            qs, ks, vs, out = (x[rows, time, some].transpose(1, 2) for x in (q, k, v, o))
            ks, vs = band.load(ks, new), band.load(vs, new)
            start = new.taken
            for part in band.parts:
                new.taken = start
                p = band.probabilities(band.queries(qs, part, dtype), band.keys(ks, part), part, scale, new)
                band.store(out, new.bmm(p, band.keys(vs, part)), part)
    blind = blind_queries(table, prefix)
    return o.masked_fill_(blind.T[None, :, :, None], 0.0) if blind.any() else o, lse


def banded_backward(q, k, v, table, prefix, o, lse, do, scale, constant_ones):
    """Gradients of q, k, v, table and prefix."""
    dtype, shapes = compute_dtype(q.dtype), (table, prefix)
    table, prefix = table.to(dtype), prefix.to(dtype)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dtable, dprefix = torch.zeros_like(table), torch.zeros_like(prefix)
    blind = blind_queries(table, prefix)
    do = do.masked_fill(blind.T[None, :, :, None], 0.0) if blind.any() else do
    new = Workspace(q, dtype)
    for i, heads, plan, band, time in pieces(q, v, table, prefix, constant_ones):
        if not plan.block:
            xs = (x[:, :, heads].transpose(1, 2) for x in (do, q, k, v, o))
            for into, grad in zip((dq, dk, dv), flash_backward(*xs, lse[:, heads], scale)):
                into[:, :, heads] = grad.transpose(1, 2)
        elif plan.flat:
            qs, ks, vs, ys, dys = (x[:, :, heads].transpose(1, 2) for x in (q, k, v, o, do))
            grads = Window(plan, table[i], qs, ks, vs, scale).backward(dys, ys, lse[:, heads], dtable[i])
            for into, grad in zip((dq, dk, dv), grads):
                into[:, :, heads] = grad.transpose(1, 2)
        elif band is None:
            for into in (dq, dk, dv):
                into[:, :, heads] = 0
        if band is None:
            continue
        sums = [torch.zeros_like(bias) for bias in band.bias]
        dfirst = torch.zeros_like(band.first) if band.P else None
        for rows, some in row_groups(q, heads, band):
            new.taken = 0
            views = [x[rows, time, some].transpose(1, 2) for x in (q, do, dq, dk, dv, k, v)]
            ks, vs = (band.load(x, new) for x in views[5:])
            dks, dvs = new(*ks.shape).zero_(), new(*vs.shape).zero_()
            start = new.taken
            for part in band.parts:
                new.taken = start
                segment_backward(band, part, *views[:3], ks, vs, dks, dvs, sums, dfirst, scale, new)
            for place, grad, factor in ((views[3], dks, scale), (views[4], dvs, 1.0)):
                torch.mul(grad[:, band.front : band.front + band.T].view(*place.shape), factor, out=place)
        band.table_gradient(sums, dtable[i, :: plan.stride])
        if band.P:
            dfirst[:, band.T :] = 0
            dprefix[i] = torch.zeros_like(prefix[i]).mT.scatter_add(1, band.far, dfirst).mT
    dtable = dtable.masked_fill(flat(table), 0.0) if constant_ones else dtable
    dq = dq.masked_fill_(blind.T[None, :, :, None], 0.0) if blind.any() else dq
    return dq, dk, dv, dtable.to(shapes[0].dtype), dprefix.to(shapes[1].dtype)


def segment_backward(band, part, q, do, dq, ks, vs, dks, dvs, sums, dfirst, scale, new):
    """Writes the segment of dq, adds to dks, dvs, to the sums of each run's bias and to the prefix's."""
    a, n, runs, _ = part
    q, do = (band.queries(x, part, ks.dtype) for x in (q, do))
    k, v = band.keys(ks, part), band.keys(vs, part)
    p = band.probabilities(q, k, part, scale, new)
    dp = new.bmm(do, v.mT)
    ds = torch._softmax_backward_data(dp, p, -1, p.dtype, grad_input=dp)
    band.store(dq, new.bmm(ds, k), part, scale)
    band.add_keys(dks, new.bmm(ds.mT, q), part)
    band.add_keys(dvs, new.bmm(p.mT, do), part)
    total, place = ds.view(-1, band.m, n, *ds.shape[1:]), band.P
    total = total.sum(0).sum(1) if band.m > 1 else total.flatten(0, 2).sum(0, keepdim=True)  # (m, C, W)
    for i, _, w in runs:
        sums[i][:, :, -w:] += total[:, :, place : place + w]
        place += w
    if band.P:
        dfirst[:, a : a + n * band.C] += ds.view(-1, band.m, n * band.C, ds.shape[2])[..., : band.P].sum(0)


def flash(q, k, v, scale, causal=True):
    """SDPA of (B, H, T, D) and its log-sum-exp."""
    q, k, v = in_rows(q, k, v)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def flash_backward(do, q, k, v, o, lse, scale, causal=True):
    do, q, k, v, o = in_rows(do, q, k, v, o)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(do, q, k, v, o, lse, 0.0, causal, scale=scale)


def in_rows(*xs):
    """Each x, or a copy where its rows are torn or overlap: the kernel does not look at the strides inside them."""
    whole = (x.stride(3) == 1 and x.stride(2) >= x.size(3) for x in xs)
    return [x if fits else x.clone(memory_format=torch.contiguous_format) for x, fits in zip(xs, whole)]


# ----------------------------------------------------------------------------- Triton
#
#     forward    o and the log of each softmax's denominator, base 2; a tile of queries goes along its tiles of keys
#     query      dq, along the keys
#     key        dk and dv, along the queries
#     table      the table's gradient, along a diagonal of tiles
#
# A mask by distance keeps or drops whole diagonals of tiles. The list of kept ones is made on the table's device: a
# change of the kept set is a change of data, and nothing waits for the GPU. A tile without a mask reads none. The
# table's gradient costs two more products a tile, and 2 BT atomic additions for up to RUN tiles, not BT^2 for each.

if triton:
    LOWEST = tl.constexpr(HIDDEN)


def tile_size(dtype, width):
    """Queries and keys of a tile, for heads `width` wide: fp32 needs thrice the registers."""
    return 64 if dtype != torch.float32 else 32 if width <= 64 else 16


def diagonals(table, size, constant_ones):
    """(M, 3, n) for a table (M, T) and diagonals of tiles 0 .. n - 1: those that hold a kept distance, in order; how
    many of them are not beyond each; and of each, 1 if it has a mask, 2 if that has a gradient. Diagonal i has the
    distances size (i - 1) + 1 .. size (i + 1) - 1."""
    kept = table > -math.inf
    asked = torch.stack((kept, table != 0, kept & ~flat(table) if constant_ones else kept))  # (3, M, T)
    asked = F.pad(asked, (0, -table.shape[1] % size)).unflatten(2, (-1, size))
    own, before = asked.any(3), asked[..., 1:].any(3)
    own[..., 1:] |= before[..., :-1]
    some, masked, slope = own.int()
    masked[:, 0] = 1  # the diagonal cuts the first
    order = some.argsort(dim=1, descending=True, stable=True)
    return torch.stack((order, some.cumsum(1), masked + 2 * slope), 1).int()


@jit
def pair_bias(p_table, p_first, t, s, T, P, PREFIX: tl.constexpr):
    """The log-mask of queries t and keys s, base 2; -inf where the key is later."""
    far = t - s
    inside = (far >= 0) & (far < T)
    b_bias = tl.load(p_table + far, mask=inside & (s >= P), other=float("-inf"))
    if PREFIX:
        b_bias = tl.where(s < P, tl.load(p_first + s * T + far, mask=inside & (s < P), other=float("-inf")), b_bias)
    return b_bias * LOG2E


@jit
def query_tiles(p_tiles, i_t, n, first):
    """How many tiles of keys the tile i_t of queries sees, and how many of them are of first keys."""
    first = tl.minimum(first, i_t + 1)
    return first + tl.load(p_tiles + n + i_t - first, mask=i_t >= first, other=0), first


@jit
def key_tile(p_tiles, x, i_t, first):
    """The x-th of them."""
    i_s = i_t - tl.load(p_tiles + x - first, mask=x >= first, other=0)
    return tl.where(x < first, x, i_s)


@jit
def distance_forward_kernel(
    p_q, p_k, p_v, p_table, p_first, p_tiles, p_o, p_lse, T, H, M, D, V, P, scale,
    BT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    n = tl.cdiv(T, BT)
    i_t, i_bh = split(tl.program_id(0), n)
    i_t = n - 1 - i_t  # the longest first
    row, i_m = (i_bh // H).to(tl.int64) * T * H + i_bh % H, i_bh % H % M
    p_q, p_k, p_v, p_o = p_q + row * D, p_k + row * D, p_v + row * V, p_o + row * V
    p_table, p_first, p_tiles = p_table + i_m * T, p_first + i_m.to(tl.int64) * P * T, p_tiles + i_m * 3 * n
    o_x, o_d, o_v = tl.arange(0, BT), tl.arange(0, BD), tl.arange(0, BV)
    o_t = i_t * BT + o_x
    b_q = load_rows(p_q, o_t, H * D, o_t < T, o_d, D)  # (BT, BD)
    b_top, b_z = tl.full([BT], LOWEST, tl.float32), tl.zeros([BT], tl.float32)
    b_o = tl.zeros([BT, BV], tl.float32)
    steps, first = query_tiles(p_tiles, i_t, n, tl.cdiv(P, BT))
    for x in range(0, steps):
        i_s = key_tile(p_tiles, x, i_t, first)
        o_s = i_s * BT + o_x
        b_k = load_rows(p_k, o_s, H * D, o_s < T, o_d, D)  # (BT, BD)
        b_v = load_rows(p_v, o_s, H * V, o_s < T, o_v, V)  # (BT, BV)
        b_s = dot(b_q, tl.trans(operand(b_k, DOT)), DOT) * (scale * LOG2E)
        if (tl.load(p_tiles + 2 * n + i_t - i_s) % 2 == 1) | (x < first):
            b_s += pair_bias(p_table, p_first, o_t[:, None], o_s[None, :], T, P, PREFIX)
        b_before = b_top
        b_top = tl.maximum(b_top, tl.max(b_s, 1))
        b_shrink = tl.exp2(b_before - b_top)
        b_p = tl.exp2(b_s - b_top[:, None])
        b_z = b_z * b_shrink + tl.sum(b_p, 1)
        b_o = b_o * b_shrink[:, None] + dot(b_p, b_v, DOT)
    b_z = tl.where(b_z > 0.0, b_z, 1.0)  # a query that sees no key
    store_rows(p_o, b_o / b_z[:, None], o_t, H * V, o_t < T, o_v, V)
    tl.store(p_lse + i_bh.to(tl.int64) * T + o_t, b_top + tl.log2(b_z), mask=o_t < T)


@jit
def distance_query_kernel(
    p_q, p_k, p_v, p_table, p_first, p_tiles, p_do, p_lse, p_delta, p_dq, T, H, M, D, V, P, scale,
    BT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    n = tl.cdiv(T, BT)
    i_t, i_bh = split(tl.program_id(0), n)
    i_t = n - 1 - i_t
    row, i_m = (i_bh // H).to(tl.int64) * T * H + i_bh % H, i_bh % H % M
    p_q, p_k, p_v, p_do = p_q + row * D, p_k + row * D, p_v + row * V, p_do + row * V
    p_table, p_first, p_tiles = p_table + i_m * T, p_first + i_m.to(tl.int64) * P * T, p_tiles + i_m * 3 * n
    o_x, o_d, o_v = tl.arange(0, BT), tl.arange(0, BD), tl.arange(0, BV)
    o_t = i_t * BT + o_x
    b_q = load_rows(p_q, o_t, H * D, o_t < T, o_d, D)  # (BT, BD)
    b_do = load_rows(p_do, o_t, H * V, o_t < T, o_v, V)  # (BT, BV)
    b_lse = tl.load(p_lse + i_bh.to(tl.int64) * T + o_t, mask=o_t < T, other=float("inf"))
    b_delta = tl.load(p_delta + row + o_t * H, mask=o_t < T, other=0.0)
    b_dq = tl.zeros([BT, BD], tl.float32)
    steps, first = query_tiles(p_tiles, i_t, n, tl.cdiv(P, BT))
    for x in range(0, steps):
        i_s = key_tile(p_tiles, x, i_t, first)
        o_s = i_s * BT + o_x
        b_k = load_rows(p_k, o_s, H * D, o_s < T, o_d, D)  # (BT, BD)
        b_v = load_rows(p_v, o_s, H * V, o_s < T, o_v, V)  # (BT, BV)
        b_s = dot(b_q, tl.trans(operand(b_k, DOT)), DOT) * (scale * LOG2E)
        if (tl.load(p_tiles + 2 * n + i_t - i_s) % 2 == 1) | (x < first):
            b_s += pair_bias(p_table, p_first, o_t[:, None], o_s[None, :], T, P, PREFIX)
        b_r = dot(b_do, tl.trans(operand(b_v, DOT)), DOT) - b_delta[:, None]
        b_dq += dot(tl.exp2(b_s - b_lse[:, None]) * b_r, b_k, DOT)
    store_rows(p_dq + row * D, b_dq * scale, o_t, H * D, o_t < T, o_d, D)


@jit
def distance_key_kernel(
    p_q, p_k, p_v, p_table, p_first, p_tiles, p_do, p_lse, p_delta, p_dk, p_dv, T, H, M, D, V, P, scale,
    BT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """Tiles are transposed: keys by queries."""
    n = tl.cdiv(T, BT)
    i_s, i_bh = split(tl.program_id(0), n)
    row, i_m = (i_bh // H).to(tl.int64) * T * H + i_bh % H, i_bh % H % M
    p_q, p_k, p_v, p_do = p_q + row * D, p_k + row * D, p_v + row * V, p_do + row * V
    p_table, p_first, p_tiles = p_table + i_m * T, p_first + i_m.to(tl.int64) * P * T, p_tiles + i_m * 3 * n
    o_x, o_d, o_v = tl.arange(0, BT), tl.arange(0, BD), tl.arange(0, BV)
    o_s = i_s * BT + o_x
    b_k = load_rows(p_k, o_s, H * D, o_s < T, o_d, D)  # (BT, BD)
    b_v = load_rows(p_v, o_s, H * V, o_s < T, o_v, V)  # (BT, BV)
    b_dk, b_dv = tl.zeros([BT, BD], tl.float32), tl.zeros([BT, BV], tl.float32)
    whole = i_s * BT < P  # all queries see first keys
    steps = tl.where(whole, n - i_s, tl.load(p_tiles + 2 * n - 1 - i_s))
    for x in range(0, steps):
        far = tl.where(whole, x, tl.load(p_tiles + x))  # in tiles
        o_t = (i_s + far) * BT + o_x
        b_q = load_rows(p_q, o_t, H * D, o_t < T, o_d, D)  # (BT, BD)
        b_do = load_rows(p_do, o_t, H * V, o_t < T, o_v, V)  # (BT, BV)
        b_lse = tl.load(p_lse + i_bh.to(tl.int64) * T + o_t, mask=o_t < T, other=float("inf"))
        b_delta = tl.load(p_delta + row + o_t * H, mask=o_t < T, other=0.0)
        b_s = dot(b_k, tl.trans(operand(b_q, DOT)), DOT) * (scale * LOG2E)
        if (tl.load(p_tiles + 2 * n + far) % 2 == 1) | whole:
            b_s += pair_bias(p_table, p_first, o_t[None, :], o_s[:, None], T, P, PREFIX)
        b_p = tl.exp2(b_s - b_lse[None, :])
        b_dv += dot(b_p, b_do, DOT)
        b_p *= dot(b_v, tl.trans(operand(b_do, DOT)), DOT) - b_delta[None, :]
        b_dk += dot(b_p, b_q, DOT)
    store_rows(p_dk + row * D, b_dk * scale, o_s, H * D, o_s < T, o_d, D)
    store_rows(p_dv + row * V, b_dv, o_s, H * V, o_s < T, o_v, V)


@jit
def distance_table_kernel(
    p_q, p_k, p_v, p_table, p_tiles, p_do, p_lse, p_delta, p_dtable, T, H, M, D, V, P, scale,
    BT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Up to RUN tiles of one diagonal, whose pairs have the same distances: their sum, then its along its diagonals."""
    n = tl.cdiv(T, BT)
    far, i = split(tl.program_id(0), n)
    i_run, i_bh = split(i, tl.cdiv(n, RUN))
    row, i_m = (i_bh // H).to(tl.int64) * T * H + i_bh % H, i_bh % H % M
    p_q, p_k, p_v, p_do = p_q + row * D, p_k + row * D, p_v + row * V, p_do + row * V
    o_x, o_d, o_v = tl.arange(0, BT), tl.arange(0, BD), tl.arange(0, BV)
    start, kind = i_run * RUN, tl.load(p_tiles + (i_m * 3 + 2) * n + far)
    stop = tl.where(kind >= 2, tl.minimum(n - far, start + RUN), 0)
    if start < stop:
        b_far = far * BT + o_x[:, None] - o_x[None, :]
        b_bias = tl.load(p_table + i_m * T + b_far, mask=(b_far >= 0) & (b_far < T), other=float("-inf")) * LOG2E
        b_sum = tl.zeros([BT, BT], tl.float32)
        for i_s in range(start, stop):
            o_s, o_t = i_s * BT + o_x, (i_s + far) * BT + o_x
            b_q = load_rows(p_q, o_t, H * D, o_t < T, o_d, D)  # (BT, BD)
            b_do = load_rows(p_do, o_t, H * V, o_t < T, o_v, V)  # (BT, BV)
            b_k = load_rows(p_k, o_s, H * D, o_s < T, o_d, D)  # (BT, BD)
            b_v = load_rows(p_v, o_s, H * V, o_s < T, o_v, V)  # (BT, BV)
            b_lse = tl.load(p_lse + i_bh.to(tl.int64) * T + o_t, mask=o_t < T, other=float("inf"))
            b_delta = tl.load(p_delta + row + o_t * H, mask=o_t < T, other=0.0)
            b_s = dot(b_q, tl.trans(operand(b_k, DOT)), DOT) * (scale * LOG2E) + b_bias - b_lse[:, None]
            b_p = tl.exp2(tl.where(o_s[None, :] >= P, b_s, float("-inf")))
            b_sum += b_p * (dot(b_do, tl.trans(operand(b_v, DOT)), DOT) - b_delta[:, None])
        turn = (
            o_x[:, None] - o_x[None, :]
        )  # row r of the turned sum has the distance far BT + x, or BT less, in column x
        b_sum = tl.gather(b_sum, (turn + BT) % BT, 1)
        o_f = far * BT + o_x
        p_dtable += i_bh % H * T
        tl.atomic_add(p_dtable + o_f, tl.sum(tl.where(turn >= 0, b_sum, 0.0), 0), mask=o_f < T, sem="relaxed")
        b_less, m_f = tl.sum(tl.where(turn >= 0, 0.0, b_sum), 0), (far > 0) & (o_f < T + BT)
        tl.atomic_add(p_dtable + o_f - BT, b_less, mask=m_f, sem="relaxed")


RUN, WARPS = 64, "num_warps num_stages"
KERNELS = {
    "forward": Kernel(
        distance_forward_kernel,
        configurations(WARPS, (4, 2), (8, 2), (4, 1)),
        fp32=dict(num_warps=4, num_stages=1),
        serial="T / BT",
    ),
    "query": Kernel(distance_query_kernel, configurations(WARPS, (4, 1), (8, 1), (8, 2)), serial="T / BT"),
    "key": Kernel(
        distance_key_kernel,
        configurations(WARPS, (8, 1), (4, 1), (8, 2)),
        fp32=dict(num_warps=8, num_stages=2),
        serial="T / BT",
    ),
    "table": Kernel(
        distance_table_kernel,
        configurations(WARPS, (8, 2), (8, 1), (4, 1)),
        serial=f"{RUN}",
        zeroed=["p_dtable"],
    ),
}


def fp32_sizes(constants):
    """For the report."""
    return dict(BT=tile_size(torch.float32, constants["BD"]))


def distance_fwd(q, k, v, table, prefix, tiles, scale):
    """o and the log of each softmax's denominator (B, H, T), base 2, in one launch."""
    dtype, (B, T, H, _) = v.dtype, q.shape
    q, k, v, table, prefix = *dense(q, k, v), table.float().contiguous(), prefix.float().contiguous()
    o, lse, P = torch.empty_like(v), q.new_empty(B, H, T, dtype=torch.float32), prefix.shape[1]
    size = tile_size(q.dtype, max(q.shape[3], v.shape[3]))
    sizes = dict(H=H, M=len(table), P=P, scale=scale, BT=size, PREFIX=P > 0)
    args = q, k, v, table, prefix, tiles, o, lse, T
    KERNELS["forward"].launch(programs(B, H, T, "BT"), *args, **sizes, **widths(q, v))
    return o.to(dtype), lse


def distance_bwd(q, k, v, table, prefix, tiles, o, lse, do, scale, constant_ones, masks):
    """Gradients of q, k, v, table and prefix, in two launches, and one for the table."""
    like, (B, T, H, _), P = (q, k, v, table, prefix), q.shape, prefix.shape[1]
    delta = (o.float() * do.float()).sum(-1)  # (B, T, H)
    q, k, v, do, table, prefix = *dense(q, k, v, do), table.float().contiguous(), prefix.float().contiguous()
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    args, size = (q, k, v, table, prefix, tiles, do, lse, delta), tile_size(q.dtype, max(q.shape[3], v.shape[3]))
    sizes = dict(H=H, M=len(table), P=P, scale=scale, BT=size, **widths(q, v))
    KERNELS["query"].launch(programs(B, H, T, "BT"), *args, dq, T, PREFIX=P > 0, **sizes)
    KERNELS["key"].launch(programs(B, H, T, "BT"), *args, dk, dv, T, PREFIX=P > 0, **sizes)
    dtable, dprefix = table.new_zeros(H, T), torch.zeros_like(prefix)
    if masks:
        runs = triton.cdiv(triton.cdiv(T, size), RUN)
        rest = q, k, v, table, tiles, do, lse, delta, dtable
        KERNELS["table"].launch(programs(B * runs, H, T, "BT"), *rest, T, RUN=RUN, **sizes)
        dprefix = prefix_gradient(q, k, v, prefix, lse, delta, do, scale) if P else dprefix
    dtable = dtable.sum(0, keepdim=True) if len(table) < H else dtable
    dtable = dtable.masked_fill(flat(table), 0.0) if constant_ones else dtable
    return tuple(x.to(y.dtype) for x, y in zip((dq, dk, dv, dtable, dprefix), like))


def prefix_gradient(q, k, v, prefix, lse, delta, do, scale):
    """Of the masks of the first keys, which are few: from their whole columns of pairs, (B, H, T, P)."""
    T, P = q.shape[1], min(q.shape[1], prefix.shape[1])
    q, k, v, do = (x.transpose(1, 2).float() for x in (q, k[:, :P], v[:, :P], do))
    far = torch.arange(T, device=q.device)[:, None] - torch.arange(P, device=q.device)  # (T, P)
    bias = prefix[:, torch.arange(P, device=q.device), far.clamp(min=0)].masked_fill(far < 0, -math.inf)
    p = (scale * q @ k.mT + bias - lse.unsqueeze(-1) * math.log(2)).exp()
    ds = (p * (do @ v.mT - delta.transpose(1, 2).unsqueeze(-1))).sum(0)  # (H, T, P)
    ds = ds.sum(0, keepdim=True) if len(prefix) < len(ds) else ds
    s = torch.arange(P, device=q.device)[:, None]
    grad = ds.mT.gather(2, (torch.arange(T, device=q.device) + s).clamp(max=T - 1).expand(len(ds), -1, -1))
    return F.pad(grad.masked_fill(torch.arange(T, device=q.device) + s >= T, 0.0), (0, 0, 0, prefix.shape[1] - P))


def aot_specs():
    """(name, kernel, signature, constants) of every kernel and configuration, for the report. Default first."""
    bf16, specs = {"p_q", "p_k", "p_v", "p_o", "p_do", "p_dq", "p_dk", "p_dv"}, []
    for name, kernel in KERNELS.items():
        for width, prefix in ((64, False), (128, False), (64, True))[: 2 if name == "table" else 3]:
            for i, option in enumerate(kernel.options({})):
                names = kernel.function.arg_names
                constants = dict(BT=64, BD=width, BV=width, DOT="bf16", PREFIX=prefix, RUN=RUN, **option)
                constants = {x: constants[x] for x in constants if x in names or x[:4] == "num_"}
                signature = {x: "*bf16" if x in bf16 else "*fp32" for x in names if x[:2] == "p_"} | {"p_tiles": "*i32"}
                signature |= dict.fromkeys("THMP", "i32") | dict.fromkeys("DV", "i32:16") | {"scale": "fp32"}
                form = f"distance_{name}{' prefix' if prefix else ''} {width} #{i}"
                specs.append((form, kernel.function, signature, constants))
    return specs


# ----------------------------------------------------------------------------- op


@operator(
    "distance",
    "(Tensor q, Tensor k, Tensor v, Tensor table, Tensor prefix, Tensor tiles, float scale, bool constant_ones,"
    " str backend) -> (Tensor, Tensor)",
)
def distance_op(q, k, v, table, prefix, tiles, scale, constant_ones, backend):
    if backend == "triton":
        return distance_fwd(q, k, v, table, prefix, tiles, scale)
    return banded_forward(q, k, v, table, prefix, scale, constant_ones)


@distance_op.register_fake
def _(q, k, v, table, prefix, tiles, scale, constant_ones, backend):
    B, T, H, _ = q.shape
    return v.new_empty(v.shape), q.new_empty(B, H, T, dtype=compute_dtype(q.dtype))


@operator(
    "distance_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor table, Tensor prefix, Tensor tiles, Tensor o, Tensor lse, Tensor do,"
    " float scale, bool constant_ones, bool masks, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def distance_backward_op(q, k, v, table, prefix, tiles, o, lse, do, scale, constant_ones, masks, backend):
    if backend == "triton":
        return distance_bwd(q, k, v, table, prefix, tiles, o, lse, do, scale, constant_ones, masks)
    return banded_backward(q, k, v, table, prefix, o, lse, do, scale, constant_ones)


distance_backward_op.register_fake(like_inputs(5))


def setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.constant_ones, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)


def backward(ctx, do, *_):
    masks = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    grads = distance_backward_op(*ctx.saved_tensors, do, ctx.scale, ctx.constant_ones, masks, ctx.backend)
    return *grads, None, None, None, None


distance_op.register_autograd(backward, setup_context=setup_context)


# ----------------------------------------------------------------------------- decoding

GATHERED = 512  # kept keys of a head: up to here one copy for all heads costs less than the calls of each


@dataclass
class BandCache:
    """Keys and values of the last tokens, (B, H, 2 reach, D): a ring of twice what the masks reach, so that a window is
    always one slice. `heads`: what is read together. `first`: the log-mask of the first keys, which stay in k_first,
    v_first. Queries, keys and values come and go as (B, t, H, D)."""

    reach: int
    heads: list
    first: torch.Tensor
    seen: int = 0  # tokens so far
    end: int = 0  # slots filled
    k: torch.Tensor = None
    v: torch.Tensor = None
    k_first: torch.Tensor = None
    v_first: torch.Tensor = None

    @classmethod
    def of(cls, table, first):
        """An empty cache for the masks table (H, L + 1) and first (H or 1, P, L + 1), or None. The last column stands
        for all distances from L on: only the first keys are seen from there."""
        H, columns = table.shape
        rows = [(row[:-1] > -math.inf).nonzero()[:, 0].flip(0) for row in table]
        reach, heads, h = max([1] + [int(r[0]) + 1 for r in rows if len(r)]), [], 0
        while h < H:
            n = next((n for n in range(1, H - h) if not torch.equal(rows[h], rows[h + n])), H - h)
            heads.append(HeadGroup.of(slice(h, h + n), rows[h], table[h : h + n, rows[h]]))
            h += n
        longest = max(len(row) for row in rows)
        if len(heads) > 1 and longest <= GATHERED and min(len(row) for row in rows):
            far = torch.stack([torch.cat((row[:1].expand(longest - len(row)), row)) for row in rows])  # (H, O)
            extra = torch.arange(longest) < torch.tensor([[longest - len(row)] for row in rows])
            heads = [HeadGroup.of(slice(0, H), far, table.gather(1, far).masked_fill(extra.to(far.device), -math.inf))]
        return cls(reach, heads, table.new_empty(1, 0, columns) if first is None else first)

    def append(self, k, v):
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, H, t, D)
        L, t, P = self.reach, k.size(2), self.first.size(1)
        if self.k is None:
            shape = (*k.shape[:2], 2 * L, k.size(3))
            self.k, self.v = k.new_empty(shape), v.new_empty(shape)
            self.k_first, self.v_first = (
                k.new_empty(*k.shape[:2], 0, k.size(3)),
                v.new_empty(*v.shape[:2], 0, v.size(3)),
            )
        if self.k_first.size(2) < P:
            missing = P - self.k_first.size(2)
            self.k_first = torch.cat((self.k_first, k[:, :, :missing]), 2)
            self.v_first = torch.cat((self.v_first, v[:, :, :missing]), 2)
        keep = max(0, min(self.end, L - t)) if self.end + t > 2 * L else self.end
        for ring, new in ((self.k, k), (self.v, v)):
            if keep < self.end:
                ring[:, :, :keep] = ring[:, :, self.end - keep : self.end].clone()
            ring[:, :, keep : keep + min(t, L)] = new[:, :, -L:]
        self.seen, self.end = self.seen + t, keep + min(t, L)

    def last(self, n):
        """Keys and values of the last n tokens, (B, n, H, D) each."""
        return tuple(ring[:, :, self.end - n : self.end].transpose(1, 2) for ring in (self.k, self.v))

    def read(self, q):
        """The output (B, 1, H, D) of the last token's query q, of that shape."""
        q, P, at = q.transpose(1, 2), self.first.size(1), self.seen - 1
        oldest = at - P  # the furthest distance that is read from the ring; the first keys are read apart
        outputs = []
        for group in self.heads:
            heads, far, bias = group.heads, group.far, group.bias
            if group.places is None:
                if oldest < self.reach - 1:
                    far, bias = far.clamp(max=max(0, oldest)), bias.masked_fill(far > oldest, -math.inf)
                rows = torch.arange(len(far), device=far.device)[:, None]
                k, v = (ring[:, rows, self.end - 1 - far] for ring in (self.k, self.v))
            else:
                skip = bisect.bisect_left(group.places, -oldest)  # distances before the start
                bias = bias[:, skip:] if skip else bias
                k, v = (group.slots(ring, self.end - 1, skip) for ring in (self.k, self.v))
            if P:
                n = min(P, self.seen)
                x = (at - torch.arange(n, device=q.device)).clamp(max=self.first.size(2) - 1)
                first = self.first.expand(q.size(1), -1, -1)[heads, torch.arange(n, device=q.device), x]
                bias = torch.cat((first, bias), 1)
                k, v = (torch.cat(ts, 2) for ts in ((self.k_first[:, heads, :n], k), (self.v_first[:, heads, :n], v)))
            if not bias.size(1):
                outputs.append(torch.zeros_like(q[:, heads]))
                continue
            y = F.scaled_dot_product_attention(q[:, heads], k, v, attn_mask=bias[None, :, None].to(q.dtype))
            if not group.sees_itself and (P or oldest < self.reach - 1):  # its first tokens may be blind
                y = y.masked_fill((bias == -math.inf).all(1)[:, None, None], 0.0)
            outputs.append(y)
        return joined(outputs, 1).transpose(1, 2)


class HeadGroup(NamedTuple):
    """Heads that one call reads. Positions are integers of the host: nothing waits for a device."""

    heads: slice
    far: torch.Tensor  # their kept distances from far to near, (O,) or for each head (h, O)
    bias: torch.Tensor  # the log-mask of these, (h, O)
    places: list | None  # -far, ascending; None where heads differ
    step: int | None  # the even spacing of `far`
    sees_itself: bool  # distance 0 is kept by all of them

    @classmethod
    def of(cls, heads, far, bias):
        itself = bool(((far == 0) & (bias > -math.inf)).any(1).all())
        if far.dim() == 2:
            return cls(heads, far, bias, None, None, itself)
        places = (-far).tolist()
        steps = {b - a for a, b in zip(places, places[1:])} or {1}
        return cls(heads, far, bias, places, steps.pop() if len(steps) == 1 else None, itself)

    def slots(self, ring, last, skip):
        """ring (B, H, 2 reach, D) at the kept distances before slot `last`, without the `skip` furthest ones: a view
        where they are evenly spaced."""
        if self.step is None or skip == len(self.places):
            return ring[:, self.heads, last - self.far[skip:]]
        return ring[:, self.heads, last + self.places[skip] : last + self.places[-1] + 1 : self.step]


# ----------------------------------------------------------------------------- public


def paths(table, prefix, width, constant_ones=False):
    """(what computes it, query-key pairs that a forward pass computes) for each row of the table, on the table's device
    and of its precision; width: the larger of D and V."""
    T = table.shape[1]
    prefix = table.new_empty(len(table), 0, T) if prefix is None else prefix
    if backend_of("auto", table, width, prefix) == "torch":
        return [(str(plan), executed_pairs(plan, T)) for plan in plans(table, prefix, constant_ones)]
    size = tile_size(torch.bfloat16, width)
    n = -(-T // size)
    first = min(n, -(-prefix.shape[1] // size))
    counts = diagonals(table, size, constant_ones)[:, 1, : n - first].sum(1).tolist()
    tiles = [m + sum(n - i for i in range(first)) for m in counts]  # those of first keys are seen by all
    return [(f"Triton, {m} of {n * (n + 1) // 2} tiles of {size}", m * size**2) for m in tiles]


@torch.no_grad()
def operations(table, prefix, H, D, V, constant_ones=False):
    """(nominal, executed) of a sequence as long as the table: pairs that the masks keep, and those in the blocks of a
    training step."""
    T, P = table.shape[1], 0 if prefix is None else prefix.shape[1]
    each = 2 * (D + V) * H // len(table)
    seen = ((table > -math.inf).sum(0) * (T - torch.arange(T, device=table.device))).sum()
    executed = sum(pairs for _, pairs in paths(table, prefix, max(D, V), constant_ones))
    for s in range(min(T, P)):  # the first keys have masks of their own
        seen += (prefix[:, s, : T - s] > -math.inf).sum() - (table[:, : T - s] > -math.inf).sum()
    return each * int(seen), each * executed


def distance(q, k, v, table, prefix=None, scale=None, backend="auto", constant_ones=False):
    """Attention under a log-mask by distance. Returns o (B, T, H, V).

    q, k (B, T, H, D)   v (B, T, H, V)   table (H or 1, T) log-mask of distances 0 .. T-1, -inf drops one
    prefix (H or 1, P, T) log-mask of the first P keys by distance, in place of the table   scale: D^-1/2 unless given
    backend: auto (triton on a GPU, else banded) | banded | triton | dense. Dropped distances are not computed, and have
    gradient 0.
    constant_ones: where the table is flat at 0, which masks nothing, it is a constant: it has gradient 0 and, on a CPU,
    becomes PyTorch's attention. So it is where the table needs no gradient.
    """
    check_inputs(q, k, v, table, prefix, backend)
    q, k, v = in_autocast(q, k, v)  # the mask keeps its precision
    prefix = table.new_empty(table.shape[0], 0, table.shape[1]) if prefix is None else prefix
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    constant_ones = constant_ones or not (torch.is_grad_enabled() and table.requires_grad)
    if backend == "dense":
        with leave_autocast(q):
            return distance_dense(q, k, v, table, prefix, scale, constant_ones)
    width = max(q.shape[3], v.shape[3])
    backend, tiles = backend_of(backend, q, width, prefix), torch.empty(0, dtype=torch.int32, device=q.device)
    if backend == "triton":
        tiles = diagonals(table.detach(), tile_size(q.dtype, width), constant_ones)
    return distance_op(q, k, v, table, prefix, tiles, scale, constant_ones, backend)[0]


def backend_of(backend, x, width, prefix):
    """triton or torch, for inputs like x and the wider of keys and values."""
    wide = f"the Triton kernels take heads up to {MAX_WIDTH} wide" if width > MAX_WIDTH else None
    obstacle = wide or too_long(math.prod(prefix.shape[1:]))
    return choose("distance", "torch" if backend == "banded" else backend, x, obstacle)


def check_inputs(q, k, v, table, prefix, backend):
    check("distance", q, k, v, backend, "auto", "banded", "triton", "dense")
    _, T, H, _ = q.shape
    if table.shape not in ((H, T), (1, T)):
        raise ValueError(f"distance: table must be {(H, T)} or {(1, T)}, got {tuple(table.shape)}")
    if prefix is not None and (prefix.dim() != 3 or (prefix.shape[0], prefix.shape[2]) != tuple(table.shape)):
        raise ValueError(f"distance: prefix must be ({table.shape[0]}, P, {T}), got {tuple(prefix.shape)}")


def masked(q, k, v, table, constant_ones=False):
    """What is timed of a mask by distance."""
    call = functools.partial(distance, constant_ones=constant_ones)
    sizes = q.shape[2], q.shape[3], v.shape[3]
    executed = len(q) * operations(table, None, *sizes, constant_ones)[1]
    return Case(call, [q, k, v, table.requires_grad_()], functools.partial(call, backend="dense"), executed)


def span_cases(q, k, v, spans=(256,), **_):
    """As adaptive spans call it, for each span, a ramp of 32 included."""
    found, x = {}, torch.arange(q.shape[1], device=q.device)
    for span in spans:
        table = ((span - x) / 32).clamp(0, 1).log().repeat(q.shape[2], 1)
        case = found[f"span {span}"] = masked(q, k, v, table, constant_ones=True)
        if q.is_cuda:  # the form that Triton's must beat
            banded = functools.partial(case.call, backend="banded")
            found[f"span {span}, banded"] = case._replace(call=banded, executed=None)
    return found


def mix_case(q, k, v, offsets=range(5), **_):
    """As mixtures of masks call it: weights of some distances."""
    table = torch.full((1, q.shape[1]), -math.inf, device=q.device)
    kept = [o for o in offsets if o < q.shape[1]]
    table[0, kept] = -torch.rand(len(kept), device=q.device)
    return {f"mask_mix of {len(kept)}": masked(q, k, v, table)}


CASES = {"span": span_cases, "mask_mix": mix_case}
