"""How every picture looks: one colour for each attention type, axes, ticks, labels at the ends of lines, formats."""

import colorsys
import math
import os
import statistics
import zlib

from config import ConfigError, printable

COLORS = {  # light and dark alternate within a hue, so that colour-blind readers tell them apart too
    "softmax": "#222222",
    "adaptive_span": "#631903",
    "mask_mix": "#f99509",
    "gla": "#0633f8",
    "gsa": "#1382f9",
    "deltanet": "#22bcef",
    "gdn": "#03633c",
    "kda": "#78be8f",
    "mamba2": "#6f6f03",
    "performer": "#89277c",
    "nsa": "#dd0658",
    "gated": "#140385",
    "gated_output": "#d7a65d",
    "none": "#8c8c8c",
}
OTHERS = ("#00a6d6", "#b25de0", "#5b8c00", "#d9381e", "#7d5a00", "#4358c8", "#c9a100", "#008060")  # types of plugins
CATEGORIES = ("#0b5fa5", "#c1440e", "#2fb5aa", "#e08e0b", "#a3123f", "#7a8f1e", "#6a3d9a", "#8a6d3b")  # no types
MARKERS, DASHES = "os^Dv<>phPX*", ("-", "--", ":", "-.")
FORMATS = (".png", ".pdf", ".svg")
SPREAD = "mean over seeds; bars, bands: ± one standard deviation; short marks: seeds"
SMALL = 10  # points of labels at lines and cells


def colour(name):
    """Of an attention type. A pattern of layers mixes its types' colours; a type of a plugin has one by its name."""
    if name in COLORS:
        return COLORS[name]
    types = [part.strip() for part in name.split(",")]
    if len(types) == 1:
        return OTHERS[zlib.crc32(name.encode()) % len(OTHERS)]
    parts = [[int(colour(part)[i : i + 2], 16) for i in (1, 3, 5)] for part in types]
    return "#" + "".join(f"{round(statistics.mean(channel)):02x}" for channel in zip(*parts))


def contrast(code):
    """Of a colour #rrggbb on white (WCAG 2.1): text needs 4.5."""
    channels = (int(code[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 1.05 / (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05)


def ink(code):
    """The colour in which text of that colour is written: as dark as it must be to be read on white."""
    while contrast(code) < 4.5:
        code = pale(code, -0.05)
    return code


def pale(code, share):
    """The colour of a code #rrggbb with that share of white, or of black below 0."""
    hue, light, colourful = colorsys.rgb_to_hls(*(int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)))
    rgb = colorsys.hls_to_rgb(hue, light + (1 - light if share > 0 else light) * share, colourful)
    return "#" + "".join(f"{round(255 * x):02x}" for x in rgb)


def lines(types):
    """How the line of each is drawn, for a list of attention types: the colour is the type's. The second of one type is
    paler, with dashes and another marker; a pattern of layers has dashes too."""
    found, names = [], [*COLORS]
    for i, name in enumerate(types):
        nth = types[:i].count(name)
        own = names.index(name) if name in names else zlib.crc32(name.encode())
        dashes = DASHES[(nth + ("," in name)) % len(DASHES)]
        code = pale(colour(name), 0.55 * nth / max(1, types.count(name) - 1))
        found.append(dict(color=code, linestyle=dashes, marker=MARKERS[(own + nth) % len(MARKERS)], markersize=5))
    return found


def check_name(path):
    """ConfigError where the name of a picture has no ending that is known."""
    name = os.path.basename(path)
    if path and os.path.splitext(name)[1] not in FORMATS:
        raise ConfigError(f"--png={printable(path)}: the name must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


def place(png, folder, name, several=False):
    """Where one of several pictures goes: FOLDER/NAME.png, or beside --png=STEM.EXT as STEM-NAME.EXT, with the folder's
    name too where there are several folders."""
    if not png:
        return os.path.join(folder, f"{name}.png")
    stem, ending = os.path.splitext(png)
    return "-".join([stem, *([os.path.basename(os.path.normpath(folder))] if several else []), name]) + ending


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install matplotlib") from None

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.titlesize": 12, "axes.titlelocation": "left"})
    plt.rcParams.update({"legend.frameon": False, "legend.fontsize": SMALL, "text.parse_math": False})
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "", "pdf.fonttype": 42})  # text stays text
    return plt


def save_figure(figure, path):
    """On white, with a margin of its own, so that it reads the same on a dark page. Equal figures are equal files."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    undated = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}[os.path.splitext(path)[1]]
    figure.savefig(path, dpi=140, facecolor="white", metadata=undated)
    pyplot().close(figure)
    print(f"wrote {path}")


def apart(heights, gap):
    """Sorted heights, moved as little as needed to be `gap` apart: neighbours that touch spread around their mean."""
    groups = [[h] for h in sorted(heights)]
    while True:
        centres = [statistics.mean(group) for group in groups]
        for i in range(len(groups) - 1):
            if centres[i + 1] - centres[i] < gap * (len(groups[i]) + len(groups[i + 1])) / 2 - 1e-9:
                groups[i : i + 2] = [groups[i] + groups[i + 1]]
                break
        else:
            return [c + gap * (k - (len(g) - 1) / 2) for c, g in zip(centres, groups) for k in range(len(g))]


def label_ends(axis, ends):
    """Name lines at the right of a panel whose limits are final. ends: [(name, colour, x, y of the line's end)]. A thin
    line leads from a label that had to move to its end."""
    figure = axis.figure
    figure.draw_without_rendering()  # now the panel has its size
    inches = axis.get_window_extent().height / figure.dpi
    gap = 1.25 * SMALL / 72 / inches
    to_axes = axis.transData + axis.transAxes.inverted()
    ends = [(*to_axes.transform((x, y)), name, code) for name, code, x, y in ends if math.isfinite(y)]
    ends = sorted((min(max(y, 0.0), 1.0), min(x, 1.0), name, code) for x, y, name, code in ends)
    heights = apart([y for y, *_ in ends], gap)
    move = max(0.0, heights[-1] - 1) - max(0.0, -heights[0]) if heights and heights[-1] - heights[0] < 1 else 0.0
    for (y, x, name, code), height in zip(ends, heights):
        where = dict(color=code, transform=axis.transAxes, clip_on=False)
        thin = where | dict(scalex=False, scaley=False, marker="", linewidth=0.8)
        axis.plot((x, 1.02), (y, y), linestyle=":" if x < 0.9 else "-", alpha=0.7, **thin)
        axis.plot((1.02, 1.06), (y, height - move), alpha=0.7, **thin)
        axis.text(1.075, height - move, name, va="center", fontsize=SMALL, **where | dict(color=ink(code)))


def tokens_axis(axis, lengths):
    """A logarithmic axis of lengths, each of which is named; of many every second one."""
    axis.set_xscale("log", base=2)
    named = sorted(lengths)[:: -(-len(lengths) // 8)]
    axis.set_xticks(named, [f"{T:,}" for T in named], rotation=45 if len(named) > 4 else 0)
    axis.minorticks_off()


def thousands(x, _=None):
    """A number of a large count on an axis: 20 k, 1.5 M."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(x) >= size:
            return f"{x / size:g}{unit}"
    return f"{x:g}"


def log_ticks(axis):
    """The ticks 1, 2, 5, 10, ... of a logarithmic axis, as plain numbers. Its ends are such ticks."""
    plt, ends = pyplot(), axis.get_data_interval()
    ticks = sorted(m * 10.0**e for e in range(-9, 13) for m in (1, 2, 5))
    axis.set_view_interval(max(t for t in ticks if t <= ends[0]), min(t for t in ticks if t >= ends[1]), ignore=True)
    axis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(plt.FuncFormatter(lambda y, _: f"{y:,g}"))
    axis.set_minor_locator(plt.NullLocator())


def scale(axis, xs):
    """The x axis of costs: logarithmic where they span more than a factor of 8, with few, readable ticks."""
    if max(xs) > 8 * min(xs) > 0:
        axis.set_xscale("log")
        first, last = math.floor(math.log10(min(xs))), math.ceil(math.log10(max(xs)))
        ticks = [m * 10**e for e in range(first, last + 1) for m in ((1, 3) if last - first < 4 else (1,))]
        axis.set_xticks([t for t in ticks if 0.6 * min(xs) < t < 1.6 * max(xs)])
        axis.minorticks_off()
    else:
        axis.locator_params(axis="x", nbins=4)
    axis.xaxis.set_major_formatter(thousands)
    axis.margins(x=0.1)


def band(axis, curves, line, at=None, **more):
    """The mean of curves [{x: y}] over the x that all have, and a band of one standard deviation (n - 1) to each side
    of it, where there are several; at: {x: where it is drawn}. Returns the mean's last point, or None."""
    xs = [x for x in curves[0] if all(x in curve for curve in curves) and (at is None or x in at)]
    if not xs:
        return None
    mean, places = [statistics.mean(curve[x] for curve in curves) for x in xs], [at[x] if at else x for x in xs]
    line = line | ({"marker": ""} if len(xs) > 25 else {}) | more
    if len(curves) > 1:
        spread = [statistics.stdev(curve[x] for curve in curves) for x in xs]
        low, high = ([m + sign * s for m, s in zip(mean, spread)] for sign in (-1, 1))
        axis.fill_between(places, low, high, color=line["color"], alpha=0.18, linewidth=0)
    axis.plot(places, mean, **line)
    return places[-1], mean[-1]


def dots(axis, rows, xlabel, best="low"):
    """A row for each [(name, line, scores)]: a dot at the mean, a bar of one standard deviation (n - 1) to each side,
    and a pale mark for each score; the best at the top. A name has its row's colour."""
    rows = sorted(rows, key=lambda row: statistics.mean(row[2]), reverse=best == "low")
    for y, (_, line, scores) in enumerate(rows):
        code, marker, mean = line["color"], line["marker"], statistics.mean(scores)
        if len(scores) > 1:
            axis.plot(scores, [y] * len(scores), "|", color=code, alpha=0.6, markersize=9)
            axis.errorbar(mean, y, xerr=statistics.stdev(scores), color=code, capsize=3, linewidth=1.6)
        axis.plot(mean, y, marker=marker, color=code, markersize=6)
    axis.set(xlabel=f"{xlabel}; {'lower' if best == 'low' else 'higher'} is better")
    axis.margins(x=0.12)
    name_rows(axis, [name for name, *_ in rows], [line["color"] for _, line, _ in rows])


def name_rows(axis, names, colours):
    """Names of rows 0, 1, ... at the left, each in its colour; few rows stand at the top."""
    axis.set_ylim(len(names) - 0.3 - max(len(names) + 0.4, 5), len(names) - 0.3)
    axis.set_yticks(range(len(names)), names, fontsize=SMALL)
    for label, code in zip(axis.get_yticklabels(), colours):
        label.set_color(ink(code))
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.locator_params(axis="x", nbins=5)


def height(names, least=3.7):
    """Inches of a panel at whose lines' ends so many names fit."""
    return max(least, 1.3 + 1.3 * SMALL / 72 * names)


def grid(n, width=5.0, height=3.7, columns=2):
    """A figure of n panels, in rows of `columns`, and a list of the panels; the rest of the last row stays empty."""
    columns = min(columns, n)
    rows = -(-n // columns)
    size = width * columns, height * rows
    figure, panels = pyplot().subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for panel in panels.flat[n:]:
        panel.remove()
    return figure, list(panels.flat[:n])


def heat_map(values, rows, size, label, vmax=1, cmap="viridis", **options):
    """A figure and its axes: a matrix whose rows have names, and what its colours mean."""
    figure, axes = pyplot().subplots(figsize=size, layout="constrained")
    image = axes.imshow(values.numpy(), aspect="auto", interpolation="nearest", cmap=cmap, vmin=0, vmax=vmax)
    axes.set(yticks=range(len(rows)), **options)
    axes.set_yticklabels(rows, fontsize=9)
    axes.grid(False)
    bar = figure.colorbar(image, orientation="horizontal" if size[1] < 3 else "vertical", aspect=30)
    bar.set_label(label, fontsize=SMALL)
    return figure, axes
