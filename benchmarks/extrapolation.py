"""python bench.py --what=quality --out_dir=out/a,out/b --eval_context=512,1024: how good is a longer context?"""

import os

from benchmarks import style
from benchmarks.runs import groups, runs
from benchmarks.tables import Table
from data.scoring import context_sizes, eval_window, evaluate, within_positions

TITLE = "full pass over whole splits, by the size of the context (bits/byte)"


def columns(sizes):
    names = dict.fromkeys(("folder", "attention", "positions", "split", "trained in (tokens)"))
    return names | {f"{n} (bits/byte)": ".4f" for n in sizes}


def bench_contexts(bench, runtime, report):
    """A row for each checkpoint folder and split, a column for each size of the context, and a figure."""
    sizes = context_sizes(bench.eval_context)
    with report.table("contexts", TITLE, columns(sizes), keys=4) as table:
        for folder, model, dataset in runs(bench, runtime):
            reached, beyond = within_positions(sizes, model)
            for part in bench.split.split(","):
                split, rows = dataset.split(part.strip()), []
                for size in reached:
                    context, stride = eval_window(model, dataset, size, bench.eval_stride)
                    rows.append(evaluate(model, split, context, stride, bench.eval_batch_size, runtime))
                add_row(table, sizes, folder, model, split.name, rows)
            if beyond:
                report.note(f"{folder}: {beyond}")
    draw(table.rows, sizes, bench.png or "out/contexts.png")


def show_run(cfg, model, rows, beyond):
    """The table and the figure of one run, from what the full pass gave."""
    sizes = context_sizes(cfg.eval_context)
    with Table("contexts", TITLE, columns(sizes), keys=4) as table:
        for split in dict.fromkeys(row["split"] for row in rows):
            add_row(table, sizes, cfg.out_dir, model, split, [row for row in rows if row["split"] == split])
    if beyond:
        print(beyond)
    draw(table.rows, sizes, os.path.join(cfg.out_dir, "contexts.png"))


def add_row(table, sizes, folder, model, split, rows):
    c, found = model.config, {row["context"]: row["bits_per_byte"] for row in rows}
    table.add(folder, c.attention_type, c.pos_emb, split, c.block_size, *(found.get(n) for n in sizes))


def draw(rows, sizes, path):
    """Bits per byte against the size of the context, of the first split, a line for each group of runs that differ in
    their seed alone; a dotted line where training ended."""
    split, ends = rows[0]["split"], []
    rows = {row["folder"]: row for row in rows if row["split"] == split}
    found = groups(list(rows))
    figure, (panel,) = style.grid(1, 7.2, style.height(len(found), 4.6))
    for group in found:
        cells = [{n: rows[folder][f"{n} (bits/byte)"] for n in sizes} for folder in group.folders]
        curves = [{n: bits for n, bits in own.items() if bits is not None} for own in cells]
        end = style.band(panel, curves, group.line)
        ends += [(group.name, group.line["color"], *end)] if end else []
    for n in {row["trained in (tokens)"] for row in rows.values()}:
        panel.axvline(n, color="grey", linestyle=":", zorder=0)
    panel.set(xlabel="context (tokens; dotted: the one in training)", ylabel=f"{split} bits per byte; lower is better")
    style.tokens_axis(panel, sizes)
    style.label_ends(panel, ends)
    if any(len(group.folders) > 1 for group in found):
        figure.supxlabel(style.SPREAD, fontsize=style.SMALL)
    style.save_figure(figure, path)
