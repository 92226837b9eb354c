from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import parse_train
from matplotlib.figure import Figure

from lib.files import read_rows, write_json, write_rows
from lib.flags import UserError
from lib.plots import CURVES, plot_run, smooth
from tools import plot


def make_run(name, steps, reward, **flags):
    """A run folder whose curves are all flat."""
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    if flags:
        config = asdict(parse_train(f"--name={name}"))
        write_json(folder / "config.json", {"config": {**config, **flags}})
    row = dict.fromkeys([*CURVES, "true_reward"], reward)
    for name in ("accuracy", "mean_reward"):
        row[f"eval_{name}_interval"] = [reward - 0.1, reward + 0.1]
    write_rows(folder / "metrics.jsonl", [{"step": step, **row} for step in range(1, steps + 1)])
    return str(folder)


@pytest.fixture
def panels(monkeypatch):
    """The panels that a test draws, by title."""
    drawn = {}

    def savefig(figure, path, **options):
        drawn.update((panel.get_title(), panel) for panel in figure.axes)
        Path(path).touch()

    monkeypatch.setattr(Figure, "savefig", savefig)
    return drawn


def test_runs_that_differ_only_in_their_number_become_one_curve_with_a_band(panels):
    runs = [make_run("lr-0", 2, 0.2), make_run("lr-1", 3, 0.5), make_run("grpo-1", 2, 0.9)]
    plot.main(plot.Config(), runs)
    panel = panels[CURVES["reward"]]
    lines, labels = panel.get_legend_handles_labels()
    assert labels == ["lr (2 runs)", "grpo-1"]
    group, single = lines
    assert group.get_xdata().tolist() == [1, 2]  # the steps of both
    assert [*group.get_ydata(), *single.get_ydata()] == pytest.approx([0.35, 0.35, 0.9, 0.9])
    band = panel.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((0.2, 0.5))


def test_runs_with_other_flags_are_not_averaged_as_if_they_were_seeds(panels):
    runs = [make_run(f"grpo-{i}", 2, 0.2, seed=i, lr=1e-5) for i in range(2)]
    runs += [make_run("grpo-2", 2, 0.9, seed=2, lr=3e-5), make_run("b-1", 2, 0.9, lr=1e-5)]
    plot.main(plot.Config(), runs)
    _, labels = panels[CURVES["reward"]].get_legend_handles_labels()
    assert labels == ["grpo --lr 1e-05 (2 runs)", "grpo-2 --lr 3e-05", "b-1"]


def test_curves_are_smoothed_over_seven_steps():
    assert smooth([0, 0, 0, 12, 0, 0]) == pytest.approx([3, 2.4, 2, 2, 2.4, 3])


def test_the_held_out_accuracy_starts_with_the_base_model(panels):
    run = Path(make_run("one", 2, 0.5))
    before = {"sampled": {"mean": 0.1, "interval": [0.0, 0.2]}}
    write_json(run / "before.json", {"accuracy": before})
    plot_run(run)
    [line] = panels[CURVES["eval_accuracy"]].lines
    assert line.get_xydata().tolist() == [[0, 0.1], [1, 0.5], [2, 0.5]]


def test_parts_and_a_true_reward_have_panels(panels):
    run = Path(make_run("one", 2, 0.5))
    rows = [{**row, "reward/exact": 0.3} for row in read_rows(run / "metrics.jsonl")]
    for row in rows:
        row["reward/length"] = 9.0 + row["step"]
        row["true_reward"] = row["step"] / 10
    write_rows(run / "metrics.jsonl", rows)
    plot_run(run)
    found = {"part of the reward: length": [10, 11], CURVES["true_reward"]: [0.1, 0.2]}
    for title, values in found.items():
        assert panels[title].lines[0].get_ydata().tolist() == values
    # what does not vary has no panel
    assert "part of the reward: exact" not in panels and CURVES["kl"] not in panels


def test_what_cannot_be_drawn_is_said_in_a_sentence():
    with pytest.raises(UserError, match="runs/none: no run there"):
        plot.main(plot.Config(), [make_run("a", 2, 0.5), "runs/none"])
    with pytest.raises(UserError, match=r"--output a.xyz: must end in .png"):
        plot.main(plot.Config("a.xyz"), ["runs/a"])
