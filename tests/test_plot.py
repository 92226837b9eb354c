import json
from pathlib import Path

import pytest

import plot
from flags import UserError


def make_run(name, steps=2, reward=0.5, **flags):
    """A run folder with everything that a picture is drawn from."""
    config = {"task": "add", "model": "models/add", "recipe": None, "steps": 4, "seed": 0, "name": name,
              "runs_dir": "runs", "resume": False} | flags
    folder = Path("runs") / name
    (folder / "code").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": config}))
    row = dict.fromkeys(plot.CURVES, reward) | {"eval_interval": [0.4, 0.6], "true_reward": reward}
    rows = [{"step": step, **row} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def figures(monkeypatch):
    """The figures that a test draws, instead of files."""
    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.append(figure))
    return drawn


def test_runs_that_differ_in_their_seed_alone_become_one_curve_with_a_band(figures):
    make_run("lr-0", reward=0.2)
    make_run("lr-1", reward=0.5, seed=1, model="models/add-1", steps=3)
    make_run("grpo", reward=0.9, recipe="grpo")
    plot.main(plot.Config(), ["runs/lr-0", "runs/lr-1", "runs/grpo"])
    panel = figures[0].axes[0]
    family, other = panel.lines
    assert [family.get_label(), other.get_label()] == ["lr (2 seeds)", "grpo"]
    assert list(family.get_xdata()) == [1, 2] and list(family.get_ydata()) == pytest.approx([0.35, 0.35])
    assert list(other.get_ydata()) == pytest.approx([0.9, 0.9])
    band = panel.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((0.2, 0.5))


def test_curves_are_smoothed_over_seven_steps():
    assert plot.smooth([0, 0, 0, 7, 0, 0, 0, 0]) == pytest.approx([7 / 4, 7 / 5, 7 / 6, 1, 1, 7 / 6, 7 / 5, 0])


def test_held_out_accuracy_starts_where_the_base_model_stands(figures):
    run = make_run("one")
    (run / "before.json").write_text(json.dumps({"sampled": {"accuracy": 0.1, "interval": [0.0, 0.2]}}))
    plot.main(plot.Config(), [str(run)])
    assert [list(panel.lines[0].get_ydata()) for panel in figures[0].axes[:2]] == [[0.5, 0.5], [0.1, 0.5, 0.5]]


def test_the_list_says_what_runs_there_are(capsys):
    make_run("b", recipe="dapo", steps=3)
    make_run("a", steps=0)
    (Path("runs") / "notes").mkdir()
    plot.main(plot.Config(list=True), [])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["name", "task", "model", "recipe", "steps", "reward", "accuracy"],
                     ["a", "add", "models/add", "-", "0/4", "-", "-"],
                     ["b", "add", "models/add", "dapo", "3/4", "0.500", "0.500"]]


@pytest.mark.parametrize(("runs", "flags", "message"), [
    ([], {}, "name the folders of the runs"),
    (["runs/a", "runs/none"], {}, "runs/none: no run there"),
    (["runs/a"], dict(output="a.xyz"), "--output a.xyz: must end in .png"),
    (["runs/a"], dict(output="nowhere/a.png"), "nowhere/a.png: cannot be written: No such file"),
])
def test_what_cannot_be_drawn_is_said_in_a_sentence(runs, flags, message):
    make_run("a")
    with pytest.raises(UserError, match=message):
        plot.main(plot.Config(**flags), runs)
