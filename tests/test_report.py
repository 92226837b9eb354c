"""Tables for the screen, and what they say about a run."""

import json
import re
from pathlib import Path

from lib.report import before_and_after, results_table
from lib.stats import mean_interval, paired_difference
from tasks import Problem


def test_thinking_is_a_row_only_where_a_response_thinks():
    without, with_some = {"thinking": 0.0, "finished": 1.0}, {"thinking": 0.5, "finished": 1.0}
    assert "thinking" not in results_table({"a": without, "b": without})
    assert re.search(r"thinking +0.000  0.500\n", results_table({"a": without, "b": with_some}))


def write_results(before, after):
    """before.json and after.json of a run, greedy and sampled alike."""
    for when, values in (("before", before), ("after", after)):
        number = {**mean_interval(values), "values": values}
        both = {"greedy": number, "sampled": number}
        responses = [f"{when} {i}" for i in range(len(values))]
        content = {"mean_reward": both, "finished": 1.0, "responses": responses}
        Path(f"{when}.json").write_text(json.dumps(content))


CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "7 * 8?"}]


def test_the_last_table_of_a_run_by_hand():
    """Of 27 problems none were right before, and 20 are after: Wilson's intervals, and that of the
    paired difference, (20 + 1 - 1) / 29. Of a conversation, the question is shown."""
    write_results([0.0] * 27, [1.0] * 20 + [0.0] * 7)
    text = before_and_after(Path(), "my", [Problem(CONVERSATION, "56")] * 27)
    assert re.search(r"mean_reward greedy +0.000 \[0.000, 0.125\] +0.741 \[0.553, 0.868\]", text)
    assert "after against before, mean_reward on the same problems" in text
    low, high = paired_difference(20, 0, 27)
    line = rf"greedy +\+0.741 \[{low:+.3f}, {high:+.3f}\]  better \(20 problems better, 0 worse\)"
    assert re.search(line.replace("[+", r"[\+").replace(" +0", r" \+0"), text)
    assert "\n7 * 8?\n  before: before 0\n  after: after 0\n" in text
    assert "Be brief" not in text


def test_where_one_of_two_runs_has_a_graded_reward_no_interval_is_wilsons():
    write_results([0.0] * 27, [0.5] * 27)
    text = before_and_after(Path(), "my", [Problem("7 * 8?", "56")] * 27)
    assert re.search(r"mean_reward greedy +0.000 \[0.000, 0.000\] +0.500 \[0.500, 0.500\]", text)
