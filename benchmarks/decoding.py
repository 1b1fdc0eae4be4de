"""python bench.py --what=decode: what does a sampled token cost, with the cache or without, and by its position?"""

import functools
import itertools
import time
from unittest import mock

import torch
from torch.nn import functional as F

from benchmarks.clocks import fresh, interleaved, state_bytes
from benchmarks.layers import of_type
from benchmarks.tables import numbers
from config import ConfigError
from model import GPT, matrices


def bench_decode(c, bench, runtime, report):
    """Greedy sampling after 12 tokens, with the cache and recomputing the prefix; the texts must be equal."""
    model = GPT(c).to(runtime.device).eval()
    idx = torch.randint(c.vocab_size, (1, 12), device=runtime.device)
    times, texts = {True: [], False: []}, {}
    with torch.no_grad(), runtime.autocast():
        read = keys_read(lambda: model.generate(idx, bench.tokens, temperature=0))[1]
        model.generate(idx, 5, temperature=0, use_cache=False)
        for _ in range(bench.rounds):
            for use_cache in times:
                start = time.perf_counter()
                texts[use_cache] = model.generate(idx, bench.tokens, temperature=0, use_cache=use_cache)
                texts[use_cache][0, -1].item()  # the last token is there
                times[use_cache].append(time.perf_counter() - start)
    rates = {cached: [bench.tokens / t for t in ts] for cached, ts in times.items()}
    columns = "attention, n_layer (layers), n_embd (channels), block (tokens), cached (tokens/s), "
    columns += "of the copy bandwidth (share), recomputed (tokens/s), cached / recomputed (ratio), same greedy text"
    with report.table("decode", f"{bench.tokens} tokens after 12, batch 1", columns, keys=4) as table:
        ratio = [a / b for a, b in zip(times[False], times[True])]
        same = "yes" if torch.equal(texts[True], texts[False]) else "no"
        read += bench.tokens * fixed_bytes(model, model.init_state(1).layers)
        share = report.share_of_bandwidth(read, times[True])
        table.add(c.attention_type, c.n_layer, c.n_embd, c.block_size, rates[True], share, rates[False], ratio, same)
    if c.pos_emb != "learned":  # learned positions end with the block
        bench_positions(model, bench, runtime, report)


@torch.inference_mode()
def bench_positions(model, bench, runtime, report):
    """The cost of one token by its position in a text, beside softmax attention in the same rounds, and the bytes that
    the state holds."""
    models, positions = {model.config.attention_type: model}, numbers(bench.positions, "positions")
    if min(positions) < 1:
        raise ConfigError(f"--positions={bench.positions}: write at least 1")
    if "softmax" not in models:
        models["softmax"] = GPT(of_type(vars(model.config), "softmax")).to(runtime.device).eval()
    states = {}
    with runtime.autocast():
        for name, pos in itertools.product(models, positions):
            state = models[name].init_state(1)
            for piece in torch.randint(model.config.vocab_size, (1, pos), device=runtime.device).split(1024, 1):
                state = models[name].step(piece, state)[1]
            states[name, pos] = state
        token = torch.randint(model.config.vocab_size, (1, 1), device=runtime.device)
        calls = {row: functools.partial(models[row[0]].step, token) for row in states}
        inputs = {row: fresh(state) for row, state in states.items()}
        read = {row: keys_read(functools.partial(call, *inputs[row]())) for row, call in calls.items()}
        times = interleaved(calls, 4 * bench.rounds, bench.seconds / 8, runtime, "positions", inputs=inputs)
    columns = "attention, position (tokens), a token (us), of the first position (ratio), of softmax (ratio), "
    columns += "read (keys), state (bytes), of the copy bandwidth (share)"
    with report.table("positions", "one token, by its position in the text", columns, keys=2) as table:
        for (name, pos), state in states.items():
            seconds, (keys, of_keys) = times[name, pos], read[name, pos]
            ratios = [[a / b for a, b in zip(seconds, times[x])] for x in ((name, positions[0]), ("softmax", pos))]
            share = report.share_of_bandwidth(of_keys + fixed_bytes(models[name], state.layers), seconds)
            table.add(name, pos, [1e6 * t for t in seconds], *ratios, keys or None, state_bytes(state.layers), share)


def keys_read(step):
    """(keys, bytes of them and of their values) that softmax attention reads while `step` runs, over all heads,
    counted where they reach PyTorch."""
    plain, read = F.scaled_dot_product_attention, [(0, 0)]

    def counted(q, k, v, **options):
        read.append((k.shape[:3].numel(), k.nbytes + v.nbytes))
        return plain(q, k, v, **options)

    with mock.patch.object(F, "scaled_dot_product_attention", counted):
        step()
    return tuple(map(sum, zip(*read)))


def fixed_bytes(model, layers):
    """Bytes that each token reads wherever it stands: the matrices, and the states that do not grow. With those of
    keys_read it is what a token reads at the least: `gated` and `nsa` read keys that nobody counts."""
    kept = [s for block, s in zip(model.transformer.h, layers) if not block.attn.keeps_keys]
    return sum(w.nbytes for w in matrices(model)) + state_bytes(kept)
