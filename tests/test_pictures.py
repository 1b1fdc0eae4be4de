"""What pictures show, by their lines, labels and colours; and that nothing on them overlaps or is cut off."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest

import bench
import train
from benchmarks import curves, heads, quality, runs, style
from config import ConfigError
from model import ATTENTION


def boxes(texts):
    return [(t.get_text(), t.get_window_extent()) for t in texts if t.get_visible() and t.get_text().strip()]


def legible(figure):
    """Ticks of an axis do not overlap, nor names beside a panel; every text lies within the figure."""
    figure.canvas.draw()
    width, height = figure.get_size_inches() * figure.dpi
    texts = [*figure.texts, *filter(None, (figure._supxlabel, figure._supylabel))]
    for axis in figure.axes:
        texts += [axis.title, axis._left_title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
        for side in (axis.xaxis, axis.yaxis):
            shown = [tick.label1 for tick in side.get_major_ticks() if tick.label1.get_visible()]
            low, high = sorted(side.get_view_interval())
            shown = [label for label, at in zip(shown, side.get_majorticklocs()) if low <= at <= high]
            turned = any(label.get_rotation() % 90 for label in shown)
            for (a, one), (b, two) in itertools.pairwise(boxes(shown)):
                assert turned or not one.overlaps(two), f"ticks {a!r} and {b!r} overlap"
            texts += shown
        for (a, one), (b, two) in itertools.combinations(boxes(axis.texts), 2):
            assert min(one.y1, two.y1) - max(one.y0, two.y0) < 2 or not one.overlaps(two), f"{a!r} is over {b!r}"
    for text, box in boxes(texts):
        assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1, f"{text!r} is cut off"


@pytest.fixture
def drawn(monkeypatch):
    """{name of a picture: its figure}, each legible, in place of the files."""
    found = {}

    def keep(figure, path):
        legible(figure)
        found[str(path).rpartition("/")[2]] = figure

    for module in (curves, quality, heads):
        monkeypatch.setattr(module, "save_figure", keep, raising=False)
    monkeypatch.setattr(style, "save_figure", keep)
    yield found
    style.pyplot().close("all")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_dataset):
    """{name: folder} of softmax with two seeds, gla, and a pattern of both."""
    root, found = tmp_path_factory.mktemp("runs"), {}
    keys = dict(dataset=text_dataset, device="cpu", dtype="float32", n_layer=2, n_head=2, n_embd=16, block_size=16)
    keys |= dict(
        batch_size=4, max_iters=12, warmup_iters=2, learning_rate=1e-2, eval_interval=4, eval_iters=2, log_interval=1
    )
    for name, own in {
        "one": dict(seed=1),
        "two": dict(seed=2),
        "gla": dict(attention_type="gla"),
        "mix": dict(attention_type="gla,softmax"),
    }.items():
        found[name] = str(root / name)
        train.main([f"--{k}={v}" for k, v in (keys | own | dict(out_dir=found[name])).items()])
    return found


def text_colours(panel):
    return {t.get_text(): t.get_color() for t in panel.texts}


def test_every_type_has_a_colour_of_its_own():
    own = {name: style.colour(name) for name in ATTENTION}
    assert len({*own.values()}) == len(ATTENTION) and own.keys() <= style.COLORS.keys()
    channels = {n: [int(c[i : i + 2], 16) for i in (1, 3, 5)] for n, c in style.COLORS.items()}
    for a, b in itertools.combinations(channels, 2):
        assert math.dist(channels[a], channels[b]) > 35, (a, b)
    assert style.colour("gla,softmax") == style.colour("softmax, gla") not in own.values()
    assert style.colour("of a plugin") == style.colour("of a plugin") not in own.values()
    first, second, other = style.lines(["gla", "gla", "softmax"])
    assert first["color"] == own["gla"] and other["color"] == own["softmax"]
    assert (first["linestyle"], first["marker"]) != (second["linestyle"], second["marker"])
    assert second["color"] not in own.values()


@pytest.mark.parametrize("ending, begins", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_name_of_a_picture_is_its_format(trained, tmp_path, ending, begins):
    """Equal runs give equal files; another ending is a mistake that is told in one line."""
    paths = [tmp_path / f"{name}.{ending}" for name in "ab"]
    for path in paths:
        bench.main(["--what=curves", f"--out_dir={trained['gla']}", f"--png={path}", "--device=cpu"])
    assert paths[0].read_bytes().startswith(begins) and paths[0].read_bytes() == paths[1].read_bytes()
    with pytest.raises(ConfigError, match=r"must end in \.png, \.pdf or \.svg"):
        bench.main(["--what=curves", f"--out_dir={trained['gla']}", "--png=a.jpg"])


def test_runs_that_differ_in_their_seed_are_a_group(trained, tmp_path):
    copy = tmp_path / "other"
    shutil.copytree(trained["gla"], copy)
    config = json.loads((copy / "config.json").read_text())
    config["train"]["learning_rate"] = 0.5
    (copy / "config.json").write_text(json.dumps(config))
    found = runs.groups([*trained.values(), str(copy)])
    assert [(g.name, len(g.folders)) for g in found] == [("softmax", 2), ("gla", 1), ("gla,softmax", 1), ("other", 1)]


def test_curves_average_seeds_and_leave_out_the_start(trained, drawn):
    bench.main(["--what=curves", f"--out_dir={','.join(trained.values())}", "--json=", "--device=cpu"])
    panels = {(p.get_xlabel(), p.get_ylabel()): p for p in drawn["curves.png"].axes}
    panel = panels["optimizer steps", "loss, estimate (nats/token)"]
    lines = [line for line in panel.lines if line.get_marker() not in ("", "None")]
    assert len(lines) == 3 and len(panel.collections) == 1  # a band for the two seeds alone
    logs = [runs.read_log(trained[name])[1] for name in ("one", "two")]
    val = [{e["iter"]: e["val_loss"] for e in log if e["split"] == "val"} for log in logs]
    assert list(lines[0].get_xdata()) == [4, 8, 12]
    assert list(lines[0].get_ydata()) == pytest.approx([(val[0][i] + val[1][i]) / 2 for i in (4, 8, 12)])
    assert panel.get_ylim()[1] < val[0][0]  # the untrained model's loss does not flatten the rest
    names = {"softmax", "gla", "gla,softmax"}
    assert text_colours(panel) == {name: style.colour(name) for name in names}
    seconds = panels["training time (s); lower is better", ""]
    assert {t.get_text(): t.get_color() for t in seconds.get_yticklabels()} == text_colours(panel)
    assert panels["training time (s)", "peak memory of the process (MB)"].get_ylim()[0] == 0
    bench.main(["--what=curves", f"--out_dir={trained['one']}", "--json=", "--device=cpu"])
    assert len(drawn["curves.png"].axes) == 3  # no bars of one run


def test_memory_of_a_gpu_is_drawn(trained, drawn, tmp_path):
    copy = tmp_path / "on-gpu"
    shutil.copytree(trained["gla"], copy)
    entries = [json.loads(line) for line in (copy / "log.jsonl").read_text().splitlines()]
    entries = [e | ({"cuda_mb": 5000.0 + e["iter"]} if "loss" in e else {}) for e in entries]
    (copy / "log.jsonl").write_text("\n".join(map(json.dumps, entries)))
    bench.main(["--what=curves", f"--out_dir={copy}", "--json=", "--device=cpu"])
    (panel,) = (p for p in drawn["curves.png"].axes if p.get_ylabel() == "peak memory (MB)")
    assert {t.get_text() for t in panel.texts} == {"gla, of the process", "gla, of the GPU"}
    assert any(list(line.get_ydata()) == [5000.0 + i for i in range(1, 13)] for line in panel.lines)


def test_quality_shows_means_spreads_and_no_line_at_equal_budgets(trained, drawn):
    bench.main(["--what=quality", "--split=val", f"--out_dir={','.join(trained.values())}", "--json=", "--device=cpu"])
    panels = drawn["quality.png"].axes
    scores, losses, context, *costs = panels
    assert scores.get_xlabel() == "val bits per byte; lower is better"
    assert {t.get_text() for t in scores.get_yticklabels()} == {"softmax", "gla", "gla,softmax"}
    assert len(scores.containers) == 1  # the spread of the two seeds
    assert losses.get_xlabel() == "trained on (tokens)"
    drawn_to = {max(line.get_xdata()) for line in losses.lines if line.get_marker() not in ("", "None")}
    assert drawn_to == {12 * 4 * 16}
    assert (
        text_colours(losses) == text_colours(context) == {n: style.colour(n) for n in ("softmax", "gla", "gla,softmax")}
    )
    assert "trained on (tokens)" not in [p.get_xlabel() for p in costs]  # all saw the same


def test_no_row_of_the_overview_lacks_its_baseline(drawn):
    """Several lengths are lines; of one alone softmax has a row, and a line through all rows."""
    keys = ["--device=cpu", "--rounds=2", "--seconds=0.02", "--n_embd=32", "--n_head=2", "--batch_size=1", "--json="]
    for lengths in ("8,16,32", "16"):
        bench.main([*keys, f"--lengths={lengths}", "--attention_type=gla,gsa,none"])
        time = drawn["bench.png"].axes[0]
        if lengths == "16":
            assert [t.get_text() for t in time.get_yticklabels()].count("softmax") == 1
            (base,) = (line for line in time.lines if line.get_linestyle() == ":")
            assert base.get_color() == style.colour("softmax") and time.get_xlim()[0] == 0
            marks = [line for line in time.lines if line.get_marker() == "o" and line.get_color() == base.get_color()]
            assert {*base.get_xdata()} == {*marks[0].get_xdata()} and len(marks) == 1
        else:
            assert text_colours(time) == {name: style.ink(style.colour(name)) for name in ("softmax", "gla", "gsa")}


@pytest.mark.parametrize("name", [name for name in ATTENTION if name != "none"])
def test_maps_have_the_text_on_their_axes_and_a_white_future(name, tiny, tmp_path, drawn):
    train.main(tiny(max_iters=1, attention_type=name))
    folder = f"--out_dir={tmp_path / 'run'}"
    bench.main(["--what=maps", folder, "--text=a $b", "--device=cpu", "--json="])
    panels = [p for p in drawn["maps.png"].axes if p.get_title(loc="left")]
    assert panels[0].get_title(loc="left") == f"layer 0 ({name}), head 0" and len(panels) in (2, 4)
    last = panels[-2 if len(panels) == 4 else -1]
    assert (
        [t.get_text() for t in panels[0].get_yticklabels()]
        == [*"a·$b"]
        == [t.get_text() for t in last.get_xticklabels()]
    )
    image = panels[0].images[0].get_array()
    assert image.mask.sum() == 6 and not image[3].mask.any()
    bench.main(["--what=heads", folder, "--device=cpu", "--json="])
    labels = [p.get_ylabel() for p in drawn["heads.png"].axes]
    if name in ("gla", "gsa", "gdn", "kda", "mamba2"):
        assert heads.COLUMNS["decay"] in labels
    assert ("decay of slots (factor)" in labels) == (name == "gsa")
    assert ("block of the query, layer 0" in labels) == (name == "nsa")


def test_labels_at_ends_are_apart_and_at_their_heights(drawn):
    figure, (panel,) = style.grid(1)
    names = [f"type {i}" for i in range(9)]
    panel.plot([0, 1], [0, 1])
    style.label_ends(panel, [(name, "#123456", 1, 0.5 + 0.001 * i) for i, name in enumerate(names)])
    legible(figure)
    heights = [t.get_position()[1] for t in panel.texts]
    assert heights == sorted(heights) and abs(sum(heights) / 9 - 0.5) < 0.05


def test_the_check_finds_what_cannot_be_read():
    figure, (panel,) = style.grid(1)
    panel.set_xticks([0, 0.01], ["a long tick", "another one"])
    with pytest.raises(AssertionError, match="overlap"):
        legible(figure)
    figure, (panel,) = style.grid(1)
    figure.text(0.95, 0.5, "beyond the edge")
    with pytest.raises(AssertionError, match="cut off"):
        legible(figure)


def seen(code, cone):
    """CIE Lab of a colour #rrggbb as somebody sees it without long or middle cones (Machado et al. 2009), or with."""
    matrices = {
        "all": np.eye(3),
        "without middle": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        "without long": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    }
    channels = np.array([int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(matrices[cone]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.array(to_xyz) @ linear / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("cone", ["all", "without middle", "without long"])
def test_colours_of_types_are_told_apart(cone):
    codes = [style.colour(name) for name in ATTENTION]
    pairs = [(a, b) for i, a in enumerate(codes) for b in codes[:i]]
    assert min(np.linalg.norm(seen(a, cone) - seen(b, cone)) for a, b in pairs) > 15


def test_text_is_dark_enough_to_read():
    for code in [style.colour(name) for name in ATTENTION] + list(style.OTHERS):
        assert style.contrast(style.ink(code)) >= 4.5
    assert style.contrast("#ffffff") == 1 and style.contrast("#000000") == pytest.approx(21)
    assert style.ink("#222222") == "#222222" and style.contrast(style.pale("#222222", 0.5)) < style.contrast("#222222")
