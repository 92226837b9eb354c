from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import parse_train
from matplotlib.figure import Figure

from lib.files import read_rows, write_json, write_rows
from lib.plots import CURVES, plot_evaluation, plot_run, plot_runs, smooth


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
        for number, panel in enumerate(figure.axes):
            drawn[panel.get_title() or f"right of {number}"] = panel
        Path(path).touch()

    monkeypatch.setattr(Figure, "savefig", savefig)
    return drawn


def draw(*names, x="step", **pooled):
    """Runs by themselves, and pooled ones by the name of their curve."""
    groups = {name: [Path("runs", name)] for name in names}
    groups |= {name: [Path("runs", each) for each in several] for name, several in pooled.items()}
    plot_runs(groups, Path("compare.png"), x)


def test_several_runs_of_one_name_become_one_curve_with_a_band(panels):
    for name, steps, reward in (("lr-0", 2, 0.2), ("lr-1", 3, 0.5), ("grpo", 2, 0.9)):
        make_run(name, steps, reward)
    draw("grpo", lr=["lr-0", "lr-1"])
    panel = panels[CURVES["reward"]]
    lines, labels = panel.get_legend_handles_labels()
    assert labels == ["grpo", "lr"]
    single, group = lines
    assert group.get_xdata().tolist() == [1, 2]  # the steps of both
    assert [*group.get_ydata(), *single.get_ydata()] == pytest.approx([0.35, 0.35, 0.9, 0.9])
    band = panel.collections[1].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((0.2, 0.5))


def test_curves_are_smoothed_over_seven_steps_and_short_ones_less():
    spike = [0.0] * 15 + [7.0] + [0.0] * 15
    assert smooth(spike)[12:19] == [1.0] * 7
    assert smooth(spike[5:25]) == pytest.approx([0] * 8 + [7 / 5] * 5 + [0] * 7)
    assert smooth([0, 0, 0, 12, 0, 0]) == [0, 0, 0, 12, 0, 0]


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
    assert panels["part of the reward: length"].lines[0].get_ydata().tolist() == [10, 11]
    [right] = [panel for panel in panels.values() if panel.get_ylabel()]
    assert right.get_ylabel() == "true reward"  # in the panel of the reward
    assert right.lines[0].get_ydata().tolist() == [0.1, 0.2]
    # what does not vary has no panel
    assert "part of the reward: exact" not in panels and CURVES["kl"] not in panels


def change(run, **columns):
    """Gives a run that make_run made other values of some metrics."""
    rows = read_rows(Path(run) / "metrics.jsonl")
    for i, row in enumerate(rows):
        row |= {name: values[i] for name, values in columns.items()}
    write_rows(Path(run) / "metrics.jsonl", rows)


def test_groups_are_stacked_by_their_outcomes(panels):
    """Of step 1 a half is all wrong, of step 2 a quarter all right: 0.5 and then 0.75 are mixed."""
    run = make_run("one", 2, 0.5)
    change(run, informative=[0.5, 0.75], all_wrong=[0.5, 0.0], all_right=[0.0, 0.25])
    plot_run(Path(run))
    areas = panels["groups by their responses"].collections
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in areas]
    assert [area.get_label() for area in areas] == ["all wrong", "mixed", "all right"]
    assert tops == pytest.approx([0.5, 1, 1])


def test_a_run_that_stands_still_shows_that_all_groups_are_wrong(panels):
    """What does not vary has no panel, but this is the one that explains the run."""
    run = make_run("one", 2, 0.0)
    change(run, informative=[0.0, 0.0], all_wrong=[1.0, 1.0], all_right=[0.0, 0.0])
    plot_run(Path(run))
    [wrong, *_] = panels["groups by their responses"].collections
    assert wrong.get_paths()[0].vertices[:, 1].max() == 1
    assert CURVES["eval_accuracy"] in panels and CURVES["grad_norm"] not in panels


def test_truncated_responses_and_a_gradient_that_was_scaled_down(panels):
    run = make_run("one", 2, 0.5, max_grad_norm=1.0)
    change(run, response_length=[8, 9], finished=[0.75, 1.0], grad_norm=[3.0, 0.5])
    plot_run(Path(run))
    [right] = [panel for panel in panels.values() if panel.get_ylabel()]
    assert right.get_ylabel() == "share truncated"
    assert right.lines[0].get_ydata().tolist() == [0.25, 0]
    area = panels[CURVES["grad_norm"]].collections[-1].get_paths()[0].get_extents()
    assert (area.ymin, area.ymax) == (1, 3)


def test_runs_that_coincide_have_other_dashes(panels):
    make_run("a", 2, 0.5)
    make_run("b", 2, 0.5)
    draw("a", "b")
    lines, _ = panels[CURVES["reward"]].get_legend_handles_labels()
    assert [line.get_linestyle() for line in lines] == ["-", "--"]
    assert panels[CURVES["reward"]].get_ylim() == pytest.approx((-0.03, 1.03))


def test_over_responses_a_run_that_samples_more_has_no_lead(panels):
    """Both have a reward of 0.1 for each 32 responses; one takes 64 of them per step."""
    for name, prompts in (("few", 2), ("many", 4)):
        run = make_run(name, 3, 0.5, group_size=16)
        seen = [prompts * step for step in (1, 2, 3)]
        change(run, prompts_seen=seen, reward=[0.05 * prompts for prompts in seen])
    draw("few", "many", x="responses")
    lines, _ = panels[CURVES["reward"]].get_legend_handles_labels()
    assert lines[0].get_xdata().tolist() == [32, 64, 96]
    assert lines[1].get_xdata().tolist() == [64, 128, 192]
    few, many = [dict(zip(line.get_xdata(), line.get_ydata())) for line in lines]
    assert few[64] == pytest.approx(many[64])


def test_an_evaluation_has_lines_over_k_and_bars_elsewhere(panels):
    def result(shift):
        number = {"mean": 0.5 + shift, "interval": [0.4 + shift, 0.6 + shift]}
        over_k = {k: number for k in (1, 2, 4)}
        return {"accuracy": {"greedy": number, "sampled": number}, "pass_at": over_k}

    plot_evaluation({"base": result(0), "run": result(0.3)}, Path("eval.png"))
    [base, run] = panels["pass@k, sampled"].lines
    assert base.get_xdata().tolist() == run.get_xdata().tolist() == [1, 2, 4]
    assert base.get_ydata().tolist() == [0.5] * 3
    heights = [bar.get_height() for bar in panels["accuracy"].patches]
    assert heights == pytest.approx([0.5, 0.5, 0.8, 0.8])
