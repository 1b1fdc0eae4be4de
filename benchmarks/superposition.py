"""python bench.py --what=superposition --out_dir=out/a: which head of a toy carries which skip trigram?"""

import itertools
import statistics

import torch

from benchmarks.runs import read_log, recipe, run_folders, runs
from benchmarks.style import heat_map, place, save_figure
from config import ConfigError
from data import windows


@torch.no_grad()
def head_outputs(model, idx):
    """What each head of a model of one layer adds to the residual stream, (H, B, T, C), without the output's bias."""
    block, seen = model.transformer.h[0], []
    hook = block.attn.c_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    block.attn(block.ln_1(model.embed(idx, 0)))
    hook.remove()
    (z,), project, H = seen, block.attn.c_proj, block.attn.n_head
    one = torch.eye(H, dtype=z.dtype, device=z.device)[:, None, None, :, None]
    alone = (z.unflatten(-1, (H, -1)) * one).flatten(-2)  # (H, B, T, H D): zeros but for one head
    return project(alone) - project(torch.zeros_like(alone[:1, :1, :1]))


def head_ablation(outputs, wanted, readout):
    """outputs (H, N, C), wanted (N,) ids -> whether head h alone can say each, (H, N): whichever others are removed,
    one at least, the sum of the rest still does. And whether the sum of all does, (N,)."""
    H = len(outputs)
    kept = (torch.arange(1, 2**H)[:, None] >> torch.arange(H)) & 1  # (subsets, H); the last one keeps all
    kept = kept.to(outputs)
    right = readout(torch.einsum("sh,hnc->snc", kept, outputs)).argmax(-1) == wanted
    return torch.stack([right[:-1][kept[:-1, h] > 0].all(0) for h in range(H)]), right[-1]


def superposition(model, x, y, samples=2000, sure=0.99):
    """For each target of the records x, y (N, T): how often the model says it, and which heads carry it, by ablation on
    records of one target. A target is learnt at an accuracy above `sure`; a head represents it if it does so alone in
    that share of the records; learnt and represented by no head, it is distributed: held in superposition."""
    with torch.no_grad():
        pairs = zip(x.split(4096), y.split(4096))
        said = torch.cat([model(a, b)[0].argmax(-1) for a, b in pairs])
    single = ((y >= 0).sum(1) == 1).nonzero()[:samples, 0]
    at = (y[single] >= 0).int().argmax(1)
    wanted, outputs = y[single, at], head_outputs(model, x[single])[:, torch.arange(len(single)), at]
    alone, together = head_ablation(outputs, wanted, model.lm_head)
    rows = []
    for target in sorted(set(y[y >= 0].tolist())):
        mine, scored = wanted == target, y == target
        shares = alone[:, mine].double().mean(1)  # (H,)
        row = {"target": target, "token": int(x[scored][0]), "records": int(scored.sum())}
        row |= {"accuracy": (said[scored] == target).double().mean().item(), "shares": shares.tolist()}
        row["learnt"] = row["accuracy"] > sure
        row["heads"] = [h for h, share in enumerate(row["shares"]) if row["learnt"] and share > sure]
        whole = together[mine].double().mean().item() > sure
        row["distributed"] = row["learnt"] and not row["heads"] and whole
        rows.append(row)
    return rows


def bench_superposition(bench, runtime, report):
    """Which trigrams each folder's toy has learnt, which head represents each, and superposition.png in the folder. Of
    runs that differ by their seed alone, which has the lowest loss."""
    for folder, model, dataset in runs(bench, runtime):
        c, attn = model.config, model.transformer.h[0].attn
        if c.n_layer != 1 or c.mlp != "none" or c.norm != "none" or not 2 <= getattr(attn, "n_head", 0) <= 12:
            needs = "n_layer=1, mlp=none, norm=none and 2 to 12 heads"
            raise ConfigError(f"{folder}: heads are told apart in a model of attention alone: {needs}")
        if dataset.record_len is None:
            raise ConfigError(f"{folder}: {dataset.name} is text: heads are told apart by the targets of records")
        split = dataset.split("test")
        passes = [(x, y) for x, y, _ in windows(split, split.record_len, split.record_len, 4096)]
        x, y = (torch.cat(parts).to(runtime.device) for parts in zip(*passes))
        rows = superposition(model, x, y)
        title = f"{folder}: {c.attention_type}, {attn.n_head} heads, {len(rows)} trigrams"
        columns = {"trigram": "", "records (count)": "", "accuracy (share)": ".4f"}
        columns |= dict.fromkeys(("learnt", "heads", "distributed"))
        with report.table(f"superposition in {folder}", title, columns) as out:
            for row in rows:
                row["name"] = dataset.codec.decode([row["token"]]) + " -> " + dataset.codec.decode([row["target"]])
                yes = ["yes" if row[key] else "no" for key in ("learnt", "distributed")]
                heads = ", ".join(map(str, row["heads"]))
                out.add(row["name"], row["records"], row["accuracy"], yes[0], heads, yes[1])
        report.note(f"{folder}: " + describe_heads(rows, attn.n_head))
        draw_heads(rows, place(bench.png, folder, "superposition", len(run_folders(bench)) > 1))
    for tries in tries_of(run_folders(bench)):
        best = min(tries, key=tries.get)
        report.note(f"{best} has the lowest loss at its end, {tries[best]:.4f}, of {len(tries)} seeds")


def tries_of(folders):
    """[{folder: the mean loss of the last five lines of its log}] of the runs that differ by their seed alone."""
    found = {}
    for folder in folders:
        if steps := read_log(folder)[0]:
            loss = statistics.mean(entry["loss"] for entry in steps[-5:])
            found.setdefault(recipe(folder)[0], {})[folder] = loss
    return [tries for tries in found.values() if len(tries) > 1]


def describe_heads(rows, n_head):
    """One line: what is in superposition, whether each trigram has one head to itself, and which heads have none."""
    used = [h for row in rows for h in row["heads"]]
    unused = ", ".join(str(h) for h in range(n_head) if h not in used) or "none"
    distributed = ", ".join(row["name"] for row in rows if row["distributed"]) or "none"
    apart = all(len(row["heads"]) == 1 for row in rows) and len(set(used)) == len(used)
    line = f"learnt {sum(row['learnt'] for row in rows)} of {len(rows)}; distributed: {distributed}; "
    return line + f"one head for each trigram: {'yes' if apart else 'no'}; unused heads: {unused}"


def draw_heads(rows, path):
    """Heads by trigrams: the share of records that a head can do alone."""
    shares = torch.tensor([row["shares"] for row in rows]).T  # (H, trigrams)
    (H, n), options = shares.shape, dict(cmap="Blues", xlabel="trigram", ylabel="head")
    size, label = (2.2 + 0.8 * n, 1.6 + 0.42 * H), "done by the head alone (share)"
    figure, axes = heat_map(shares, range(H), size, label, **options)
    for h, i in itertools.product(range(H), range(n)):
        share = shares[h, i].item()
        axes.text(i, h, f"{share:.2f}", ha="center", va="center", fontsize=9, color="white" if share > 0.6 else "black")
    state = ["distributed" if row["distributed"] else "" if row["learnt"] else "not learnt" for row in rows]
    axes.set_xticks(range(n), [f"{row['name']}\n{s}" for row, s in zip(rows, state)], fontsize=9)
    save_figure(figure, path)
