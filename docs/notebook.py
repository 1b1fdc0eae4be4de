"""Run the cells of docs/tour.ipynb from top to bottom, and write their outputs into the file.

    python docs/notebook.py            # after an edit
    python docs/notebook.py --check    # run only: an error in a cell, or more than a minute, is exit status 1

A cell's output is what Jupyter shows: what it prints, the value of its last line, and its open figures.
"""

import ast
import base64
import contextlib
import io
import json
import os
import pathlib
import sys
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TOUR = pathlib.Path(__file__).resolve().parent / "tour.ipynb"
LIMIT = 60  # seconds


def run_cell(source, names, count):
    """The outputs of one cell, whose names go into `names`."""
    tree, printed, outputs = ast.parse(source), io.StringIO(), []
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(";") else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {count}", "exec"), names)
        value = eval(compile(ast.Expression(last.value), f"cell {count}", "eval"), names) if last else None
    if printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines(printed.getvalue())})
    if value is not None:
        data = {"text/plain": lines(repr(value))}
        outputs.append({"data": data, "execution_count": count, "metadata": {}, "output_type": "execute_result"})
    for number in plt.get_fignums():
        png = io.BytesIO()
        plt.figure(number).savefig(png, dpi=80, facecolor="white", metadata={"Software": None})
        data = {"image/png": base64.b64encode(png.getvalue()).decode() + "\n", "text/plain": ["<Figure>"]}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    plt.close("all")
    return outputs


def lines(text):
    """A text as notebooks store it."""
    return text.splitlines(keepends=True)


def run_notebook(notebook):
    """Put the outputs of all cells in place of those that are there."""
    names, count = {"__name__": "__main__"}, 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            cell["outputs"], cell["execution_count"] = run_cell("".join(cell["source"]), names, count), count


def main(argv):
    notebook = json.loads(TOUR.read_text(encoding="utf-8"))
    os.chdir(TOUR.parent)  # where Jupyter starts
    start = time.perf_counter()
    run_notebook(notebook)
    seconds = time.perf_counter() - start
    print(f"{TOUR.name} ran in {seconds:.0f} s")
    if argv != ["--check"]:
        TOUR.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(seconds > LIMIT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
