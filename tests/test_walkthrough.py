import json
import os
from pathlib import Path

import reward

ROOT = Path(__file__).parent.parent
CELLS = json.loads((ROOT / "walkthrough.ipynb").read_text())["cells"]


def test_the_cells_run_as_they_stand(base, monkeypatch):
    """Without Jupyter, one after the other in one namespace. The base model of the tests hardly gets a sum right, so
    here a 7 is right."""
    monkeypatch.setitem(reward.REWARDS, "exact", lambda prompt, response, answer: float("7" in response))
    monkeypatch.setenv("MPLBACKEND", "agg")
    Path("models").mkdir()
    os.symlink(base, "models/add")
    names = {}
    for cell in CELLS:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "walkthrough.ipynb", "exec"), names)
    assert len(names["good"]) > 0 and names["good"].mean() > 0 > names["bad"].mean()
    assert [row["step"] for row in names["metrics"]] == list(range(21))
    pyplot = names["plt"]
    assert len(pyplot.get_fignums()) == 4
    pyplot.close("all")


def test_it_is_kept_with_its_outputs_and_defines_nothing():
    for cell in CELLS:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            assert cell["outputs"], source
            assert "def " not in source and "class " not in source
            assert all(output["output_type"] != "error" for output in cell["outputs"])
    pictures = [output for cell in CELLS for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert len(pictures) == 4
    assert (ROOT / "walkthrough.ipynb").stat().st_size < 300_000
