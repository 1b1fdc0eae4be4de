"""What README.md and docs/ say, beside what was measured and what runs."""

import importlib.util
import json
import pathlib
import re
import statistics

import pytest

import bench
import model
from benchmarks import card, layers

ROOT = pathlib.Path(bench.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
CELLS = {
    part: json.loads((ROOT / "docs" / "card" / f"{part}.json").read_text())["cells"] for part in ("language", "recall")
}
TOUR = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))


def script(name):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def figures():
    return script("figures")


def measured(name, page):
    """A committed JSON file of bench.py, of a commit without changes of its own, which the page names."""
    found = json.loads((ROOT / "docs" / name).read_text())
    assert found["commit"] and not found["commit"].endswith("-dirty") and found["machine"]["processor"]
    assert found["commit"][:7] in page
    return found


def test_results_show_the_committed_costs():
    sweep = measured("bench.json", RESULTS)["tables"]["sweep"]["rows"]
    tables = layers.summary(sweep, "", "")
    assert len(tables) == 2 and "(bench.png)" in RESULTS
    for table in tables:
        assert "\n".join(table.lines()) in RESULTS, f"paste the table {table.name!r} of bench.py into docs/results.md"
    assert {row["attention"] for row in tables[0].rows} <= set(model.ATTENTION)


def test_results_show_the_committed_scores():
    """Each type's parameters, seeds, mean and deviation."""
    found = measured("compare.json", RESULTS)
    for row in found["tables"]["over seeds"]["rows"]:
        mean, deviation = row["mean (bits/byte)"], row["standard deviation (bits/byte)"]
        cells = f"{row['parameters (count)']:,} | {row['seeds (count)']} | {mean:.3f} ± {deviation:.3f}"
        assert cells in RESULTS, f"{row['attention']}: {cells} is not in docs/results.md"


def test_toys_show_the_committed_heads():
    measured("superposition.json", (ROOT / "docs" / "toys.md").read_text(encoding="utf-8"))


def test_the_first_table_shows_the_card(figures):
    found = [line.split(" | ") for line in re.findall(r"^\| `(.*) \|$", README, re.M)]
    rows = {cells[0].rstrip("`"): cells[3:] for cells in found if len(cells) > 8}  # type, idea, cost; figures
    rows.pop("attention_type", None)
    assert list(rows.items()) == list(figures.first_table().items()), "python docs/figures.py prints the rows"
    for name, (bits, recall, *_) in rows.items():  # once more, from the JSON alone
        for cell, part, stage, digits in ((bits, "language", "enwik8", 3), (recall, "recall", "recall", 2)):
            own = [c["score"] for c in CELLS[part] if (c["stage"], c["attention"]) == (stage, name)]
            own = [s["bits/byte"] if part == "language" else s["by part"]["16 pairs in 64"] for s in own]
            mean, deviation = (round(f(own), digits) for f in (statistics.mean, statistics.stdev))
            assert [float(x) for x in cell.replace("*", "").split(" ± ")] == [mean] + [deviation] * (deviation > 0), (
                name
            )
    assert set(model.ATTENTION) < set(rows)


def test_results_show_the_committed_card():
    assert "\n".join(card.table(card.Card(ROOT / "docs" / "card"))) in RESULTS, "paste what make card-table prints"


def test_pictures_are_there():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for path in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / path).read_bytes()[:4] == b"\x89PNG", path


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
            target = page.parent / path if path else page
            assert target.is_file(), f"{page.name}: {path}"
            if anchor:
                heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
                anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
                assert anchor in anchors, f"{page.name}: #{anchor}"


def test_the_notebook_was_run_as_it_is():
    """Its cells in order, each once, without an error; .ci/run runs them again."""
    cells = [cell for cell in TOUR["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert (ROOT / "docs" / "tour.ipynb").stat().st_size < 150_000


def test_a_cell_gives_what_jupyter_shows(capsys):
    runner, names = script("notebook"), {}
    pytest.importorskip("matplotlib.pyplot").close("all")  # figures of other tests
    run = lambda source: runner.run_cell(source, names, 3)  # noqa: E731
    assert run("x = 2") == run("x;") == run("None") == []
    printed, value = run("print('a\\nb')\nx + 1")
    assert printed == {"name": "stdout", "output_type": "stream", "text": ["a\n", "b\n"]}
    assert (value["data"], value["execution_count"]) == ({"text/plain": ["3"]}, 3)
    (figure,) = run("import matplotlib.pyplot as plt\nplt.plot([x]);")
    assert figure["data"]["image/png"].startswith("iVBOR") and run("x = 1") == []
    with pytest.raises(ZeroDivisionError):
        run("1 / 0")
    assert capsys.readouterr().out == ""


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 230 and len(README.encode()) <= 16_000
