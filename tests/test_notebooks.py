"""The notebooks run from top to bottom, hold no stored output, and show what they say."""

import json
from pathlib import Path

import matplotlib
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path, capsys, monkeypatch):
    matplotlib.use("agg")
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    names: dict = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "clear the outputs before committing"
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
    matplotlib.pyplot.close("all")
    printed = capsys.readouterr().out
    if path.stem == "hybrid":
        assert names["losses"][-1] < 0.5 * names["losses"][0]
    assert len(printed.splitlines()) >= 4


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 2
