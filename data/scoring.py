"""Scores of a model on a whole split: each target once, independent of how the work is cut.

`evaluate` is the full pass, and `print_scores` prints its figures. The pass and the cheap estimate during training,
`estimate_loss`, both add up `token_nats`. The model and the precision are arguments.
"""

import math

import torch

from config import LARGEST, ConfigError

from . import windows


def context_sizes(value):
    """eval_context as a list, ascending: one number, or several with commas."""
    try:
        sizes = sorted({int(n) for n in str(value).split(",")})
    except ValueError:
        raise ConfigError(f"eval_context={value}: write one number, or several with commas") from None
    if len(sizes) > 1 and sizes[0] < 1 or not 0 <= sizes[-1] <= LARGEST:
        raise ConfigError(f"eval_context={value}: sizes of a context are from 1 to {LARGEST}")
    return sizes


def within_positions(sizes, *models):
    """(those of the sizes that all models have positions for, a line about the others or None)."""
    ends = [m.config.block_size for m in models if m is not None and m.config.pos_emb == "learned"]
    beyond = [n for n in sizes if n > min(ends, default=n)]
    line = f"no score at a context of {', '.join(map(str, beyond))}: learned positions end at block_size="
    return [n for n in sizes if n not in beyond], f"{line}{min(ends)}" if beyond else None


def eval_window(model, dataset, context, stride):
    """(context, stride) of the full pass, from the keys eval_context, one number, and eval_stride; 0: not given."""
    if isinstance(context, str):
        raise ConfigError(f"eval_context={context}: write one number here")
    if dataset.record_len is not None and (context or stride):
        what = f"{dataset.name} is records of {dataset.record_len} tokens, each scored whole"
        raise ConfigError(f"eval_context and eval_stride are for running text: {what}")
    context = context or model.config.block_size
    if stride > context:
        raise ConfigError(f"eval_stride={stride} would skip tokens: the context is {context}")
    if model.config.pos_emb == "learned" and context > model.config.block_size:
        raise ConfigError(f"eval_context={context}: learned positions end at block_size={model.config.block_size}")
    return context, stride or context


@torch.no_grad()
def estimate_loss(model, batches, n, runtime, world, right):
    """{"train", "val"}: nats a scored token over n fixed batches: cheap, for curves; no final figure. right: a dict
    that receives the share of right answers of records."""
    model.eval()
    losses, among = {}, answer_ids(batches.dataset, model)
    for split in ("train", "val"):
        if split in batches.dataset.meta["splits"]:
            nats, count, hits = 0.0, 0, 0
            for x, y in batches.fixed(split, n):
                x, y = x.to(runtime.device), y.to(runtime.device)
                likeliest = None if among is None else []
                nats += token_nats(model, x, y, y >= 0, runtime, likeliest, among)
                count += int((y >= 0).sum())
                hits += int((torch.cat(likeliest) == y[y >= 0]).sum()) if likeliest else 0
            nats, count, hits = world.sum([nats, count, hits])
            losses[split] = nats / count if count else math.nan
            if among is not None:
                right[split] = hits / count if count else math.nan
    model.train()
    return losses


def answer_ids(dataset, model):
    """The ids among which the answer of a record is sought, its labels or all; None of running text."""
    if dataset.record_len is None:
        return None
    ids = list(dataset.labels.values()) if dataset.labels else range(model.config.vocab_size)
    return torch.tensor(ids, device=next(model.parameters()).device)


def with_places(dataset, x, y):
    """A batch (x, y), of records with the positions (B, n) that hold all scored ones: as many of each record as the one
    with most needs, so that shapes follow one number. Without them where that is every position."""
    n = x.size(1) if dataset.record_len is None else int((y >= 0).sum(1).max())
    return (x, y) if n == x.size(1) else (x, y, (y < 0).int().argsort(dim=1, stable=True)[:, :n])


def at(x, places=None):
    """x (B, T, ...) at `places` (B, n), if there are any: (B, n, ...)."""
    if places is None:
        return x
    return x.gather(1, places) if x.dim() == 2 else x.gather(1, places[..., None].expand(-1, -1, x.size(-1)))


def accuracy(logits, targets, among):
    """The share of the scored targets that are the likeliest id `among` some; logits (B, T, V), targets (B, T)."""
    right = among[logits[..., among].argmax(-1)] == targets  # a target that is not scored, -1, is no id
    return right.sum() / (targets >= 0).sum().clamp(min=1)


def share_of(passes, rank, size, progress=None):
    """This process's share of the windows (number, x, y, scored) of a pass, every size-th one. All get as many:
    processes that hold shares of a model meet in each forward pass. In one that is left over nothing is scored."""
    i = -1
    for i, (x, y, scored) in enumerate(passes):
        if i % size == rank:
            yield i, x, y, scored
        if progress is not None:
            progress.update(int(scored.sum()))
    if 0 <= i % size < rank and i >= 0:
        yield i, x, y, torch.zeros_like(scored)


@torch.no_grad()
def evaluate(model, split, context, stride, batch_size, runtime, share=(0, 1), reduce=None, progress=None, each=None):
    """Score the targets of a split once each, in eval mode: sum of nats over count.

    Of running text they are tokens 1 .. N-1: window k begins at k * stride and gives each token it scores up to
    `context` tokens to look at. Independent of the batch size and of the number of processes: share is (rank, size) of
    this one, and reduce sums a list of numbers over all. runtime has the device and autocast(). Returns loss (nats a
    token), token_perplexity, what was counted, and of text bits_per_byte (over the bytes of the scored tokens) and
    word_perplexity (None where words are not counted); of records accuracy, also of each of several parts, and, with
    labels, `label_scores`. each: a
    list that receives, for each batch, what it scored (B, T), the nats there, in order, in float64, and of records
    which of them were right."""
    (rank, size), reduce = share, reduce or list
    was_training = model.training
    model.eval()
    nats, count, right, each_part = 0.0, 0, 0, [[0, 0] for _ in split.parts]  # targets and right answers
    of = [part for part, (_, _, n, _) in zip(each_part, split.parts) for _ in range(0, n, batch_size)]
    ids = torch.tensor(list(split.labels.values()), device=runtime.device) if split.labels else None
    confusion = torch.zeros(len(ids), len(ids), dtype=torch.long) if split.labels else None
    for i, x, y, scored in share_of(windows(split, context, stride, batch_size), rank, size, progress):
        likeliest = None if split.record_len is None else []
        y = y.to(runtime.device)
        single = None if each is None else []
        nats += token_nats(model, x.to(runtime.device), y, scored, runtime, likeliest, ids, single)
        if single:
            each.append((scored, torch.cat(single).cpu()))
        count += int(scored.sum())
        if likeliest:
            true, likeliest = y[scored.to(y.device)], torch.cat(likeliest)
            hits = true == likeliest
            right += int(hits.sum())
            of[i][0], of[i][1] = of[i][0] + len(hits), of[i][1] + int(hits.sum())
            if single:
                each[-1] += (hits.cpu(),)
            if ids is not None:
                rows, columns = ((t[:, None] == ids).long().argmax(1) for t in (true, likeliest))
                pairs = torch.bincount(rows * len(ids) + columns, minlength=len(ids) ** 2)
                confusion += pairs.view(len(ids), len(ids)).cpu()
    model.train(was_training)
    nats, count, right = reduce([nats, count, right])
    scores = {"split": split.name, "loss": nats / count, "token_perplexity": perplexity(nats, count)}
    scores |= {"tokens": int(count), "context": context, "stride": stride}
    if split.record_len is not None:
        scores |= {"context": split.record_len, "stride": split.record_len, "accuracy": right / count}
        if split.labels:
            table = [int(n) for n in reduce(confusion.flatten().tolist())]
            table = [table[i : i + len(ids)] for i in range(0, len(table), len(ids))]
            scores |= label_scores(table, list(split.labels))
        if len(split.parts) > 1:
            sums = [reduce(part) for part in each_part]
            named = zip(split.parts, sums)
            scores["parts"] = [
                {"part": name, "targets": int(n), "accuracy": hit / n} for (name, *_), (n, hit) in named if n
            ]
        return scores
    return scores | {
        "bits_per_byte": nats / math.log(2) / split.scored_bytes,
        "word_perplexity": perplexity(nats, split.n_words) if split.n_words else None,
        "bytes": split.scored_bytes,
        "words": split.n_words,
    }


def label_scores(confusion, names):
    """Precision, recall and F1 of each label, and their means over all labels (macro), from the counts of true labels
    (rows) called each label (columns). A quotient of nothing is 0."""
    support, called = [sum(row) for row in confusion], [sum(column) for column in zip(*confusion)]
    right = [confusion[i][i] for i in range(len(names))]
    precision, recall = ([r / max(n, 1) for r, n in zip(right, of)] for of in (called, support))
    f1 = [2 * r / max(n + m, 1) for r, n, m in zip(right, called, support)]
    scores = {key: sum(v) / len(names) for key, v in (("precision", precision), ("recall", recall), ("f1", f1))}
    scores |= {"majority": max(support) / sum(support), "confusion": confusion}
    labels = zip(names, support, precision, recall, f1)
    return scores | {"labels": [dict(zip(("label", "support", "precision", "recall", "f1"), row)) for row in labels]}


@torch.no_grad()
def label_probabilities(model, ids, record_len, labels, runtime):
    """{label: probability}, the likeliest first: the model's at the last token, renormalised over the labels. A text of
    more than one record is read in records, the last of them up to its end; the mean over them is the answer."""
    length = min(record_len, len(ids))
    starts = [*range(0, len(ids) - length, length), len(ids) - length]
    records = torch.tensor([ids[s : s + length] for s in starts])
    total = 0.0
    for x in records.split(64):
        logits = model.lm_head(model.hidden(x.to(runtime.device))[0][:, -1])  # (n, V)
        total = total + logits[:, list(labels.values())].cpu().double().softmax(-1).sum(0)
    return dict(sorted(zip(labels, (total / len(starts)).tolist()), key=lambda pair: -pair[1]))


def perplexity(nats, count):
    return math.inf if nats / count >= 700 else math.exp(nats / count)  # nan stays nan


def token_nats(model, x, y, scored, runtime, likeliest=None, among=None, each=None, chunk=2**25):
    """Sum of -log p(y) over the scored positions, in float64. x, y (B, T), scored (B, T) bool. Logits exist for at most
    `chunk` entries at once. The device sums in float32, where a uniform model's sum V is exact, and the host takes the
    logarithm in float64, which some devices lack: that model gives exactly log V.
    likeliest: a list that receives the likeliest ids at the scored positions, of the ids `among` if given; each: one
    that receives the nats there."""
    with runtime.autocast():
        hidden, _ = model.hidden(x)
        hidden, y = hidden[scored.to(x.device)], y[scored.to(x.device)]  # (n, C), (n,)
        total = 0.0
        rows = chunk // model.config.vocab_size + 1
        for h, t in zip(hidden.split(rows), y.split(rows)):
            logits = model.lm_head(h).float()
            if likeliest is not None:
                likeliest.append(logits.argmax(-1) if among is None else among[logits[:, among].argmax(-1)])
            top = logits.amax(-1, keepdim=True)
            sums, over = (logits - top).exp().sum(-1), (top - logits.gather(1, t[:, None]))[:, 0]  # (n,) each
            nats = sums.cpu().double().log() + over.cpu().double()
            total += nats.sum().item()
            if each is not None:
                each.append(nats)
    return total


def print_scores(scores, label, seconds):
    line = f"{label} {scores['split']}: {scores['loss']:.6f} nats a token, "
    if "accuracy" in scores:
        line += f"accuracy {scores['accuracy']:.6f}"
        if "labels" in scores:
            line += f" (majority class {scores['majority']:.6f}), macro precision {scores['precision']:.6f}, "
            line += f"recall {scores['recall']:.6f}, F1 {scores['f1']:.6f}"
        print(f"{line} ({scores['tokens']:,} targets in records of {scores['context']}, {seconds:.0f} s)")
        for part in scores.get("parts", []):
            print(f"  {part['part']}: accuracy {part['accuracy']:.6f} ({part['targets']:,} targets)")
        if "labels" in scores:
            print_labels(scores)
        return
    words = f", word perplexity {scores['word_perplexity']:.4g}" if scores["word_perplexity"] else ""
    print(
        f"{line}{scores['bits_per_byte']:.6f} bits per byte, token perplexity {scores['token_perplexity']:.4f}{words} "
        f"({scores['tokens']:,} tokens, context {scores['context']}, stride {scores['stride']}, {seconds:.0f} s)"
    )


def print_labels(scores):
    """The scores of each label, and what its records were called, as a Markdown table."""
    names = [row["label"] for row in scores["labels"]]
    print("| label | targets | precision | recall | F1 | " + " | ".join(f"called {name}" for name in names) + " |")
    print("|---" * (5 + len(names)) + "|")
    for row, counts in zip(scores["labels"], scores["confusion"]):
        cells = [row["label"], row["support"], *(f"{row[key]:.4f}" for key in ("precision", "recall", "f1")), *counts]
        print("| " + " | ".join(map(str, cells)) + " |")


@torch.no_grad()
def compare_with_teacher(model, teacher, batches, runtime, reduce=list, chunk=2**24):
    """Means over the scored tokens of `batches` of (x, y): KL(teacher || student) in nats, the cross-entropy of both,
    and how often both find the same token likeliest."""
    was_training = model.training
    model.eval()
    kl, ours, theirs, agreed, count = 0.0, 0.0, 0.0, 0.0, 0
    for x, y in batches:
        x, y = x.to(runtime.device), y.to(runtime.device)
        with runtime.autocast():
            hidden, wanted = (m.hidden(x)[0][y >= 0] for m in (model, teacher))  # (n, C)
            y, rows = y[y >= 0], chunk // model.config.vocab_size + 1
            for h, w, t in zip(hidden.split(rows), wanted.split(rows), y.split(rows)):
                q, p = (m.lm_head(z).float().log_softmax(-1) for m, z in ((model, h), (teacher, w)))
                kl += (p.exp() * (p - q)).sum(-1).cpu().double().sum().item()
                ours, theirs = (a - b.gather(1, t[:, None]).cpu().double().sum() for a, b in ((ours, q), (theirs, p)))
                agreed += (q.argmax(-1) == p.argmax(-1)).sum().item()
                count += len(t)
    model.train(was_training)
    *sums, count = reduce([kl, float(ours), float(theirs), agreed, count])
    means = [s / count if count else math.nan for s in sums]
    return dict(zip(("kl", "student_ce", "teacher_ce", "agreement"), means))


def describe_comparison(c):
    ours, theirs = (f"{perplexity(c[name], 1):.3f}" for name in ("student_ce", "teacher_ce"))
    agreed = f"same likeliest token {100 * c['agreement']:.1f} %"
    return f"KL from the teacher {c['kl']:.4f} nats a token, token perplexity {ours} (teacher {theirs}), {agreed}"
