"""The cells of the notebook run as they stand, and it is kept with its outputs."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CELLS = json.loads((ROOT / "walkthrough.ipynb").read_text())["cells"]


@pytest.mark.slow
def test_the_cells_run_and_leave_nothing_behind(monkeypatch, capsys):
    """Without Jupyter, one after the other in one namespace. Each prints about what is stored."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    os.symlink(ROOT / "models", "models")
    names = {}
    for cell in CELLS:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "walkthrough.ipynb", "exec"), names)
            printed = "".join("".join(output.get("text", "")) for output in cell["outputs"])
            assert capsys.readouterr().out.split()[:2] == printed.split()[:2]
    assert names["good"].mean() > 0 > names["bad"].mean()
    assert [row["step"] for row in names["metrics"]] == list(range(1, 21))
    assert [path.name for path in Path().iterdir()] == ["models"]
    pyplot = names["plt"]
    assert len(pyplot.get_fignums()) == 4
    pyplot.close("all")


def test_it_is_kept_with_its_outputs():
    outputs = []
    for cell in CELLS:
        if cell["cell_type"] == "code":
            assert cell["outputs"], "".join(cell["source"])
            assert all("".join(each.get("text", "picture")).strip() for each in cell["outputs"])
            outputs += cell["outputs"]
    assert all(output["output_type"] != "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert (ROOT / "walkthrough.ipynb").stat().st_size < 300_000
