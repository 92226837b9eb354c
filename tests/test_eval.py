import itertools
import json
import shutil
from pathlib import Path

import pytest
from conftest import CPU, parse_train

import fast
import train
from eval import Config, details, evaluate, main, respond, summarise
from lib.flags import UserError
from lib.report import results_table
from lib.stats import compare_greedy, compare_sampled
from policy import load_policy
from reward import load_reward
from sample import Sampling
from tasks import load_task


def answers_to(answer, *groups, difficulty=""):
    """Rows of responses to problems with one answer, right if they are the answer exactly."""
    found = []
    for group in groups:
        found.append([])
        for text in group:
            row = {"prompt": "?", "response": text, "answer": answer, "difficulty": difficulty}
            right = text.rpartition("</think>")[2] == answer
            row |= {"length": len(text) + 1, "finished": True, "right": right}
            found[-1].append(row)
    return found


def test_responses_depend_on_neither_the_batch_size_nor_the_other_problems(base):
    policy, tokenizer = load_policy(base, CPU)
    task = load_task("add")
    forms = fast.Forms(generate=fast.generate.generate)

    def ask(problems=task.test[:20], form=respond, temperature=1.0, **options):
        sampling = Sampling(temperature)
        return form(forms, policy, tokenizer, task, problems, sampling, 8, **options)

    assert ask(temperature=0) == ask(temperature=0, batch_size=7)
    groups = ask(samples=4)
    assert groups == ask(samples=4, batch_size=9)
    assert [groups[3]] == ask([task.test[3]], samples=4)
    assert groups != ask(samples=4, seed=1)
    rows = list(itertools.chain(*groups))
    assert len(rows) == 80 and len({row["response"] for row in rows}) > 20
    for i, row in enumerate(rows):
        assert (row["prompt"], row["answer"]) == (
            task.test[i // 4].prompt,
            task.test[i // 4].answer,
        )
        assert row["right"] == (row["response"].rpartition("</think>")[2] == row["answer"])

    found = ask(form=evaluate)
    rows = list(itertools.chain(*ask()))
    assert found["responses"] == [row["response"] for row in rows]
    assert found["accuracy"] == sum(row["right"] for row in rows) / 20 > 0


def test_pass_and_maj_at_k_of_two_problems():
    """7 7 8 8: pass@1 1/2, pass@2 1 - 1/6, majorities by twos 7 and 8, of all four a tie that the
    first wins. 9 9 9 7: 1/4, 1/2; never the majority."""
    groups = answers_to("7", "7788", "9997")
    found = details(groups, "exact", load_reward("exact + length"), 8)
    shares = {}
    for kind in ("pass_at", "maj_at"):
        shares[kind] = [found[kind][k]["accuracy"] for k in (1, 2, 4)]
    assert shares["pass_at"] == pytest.approx([3 / 8, 4 / 6, 1])
    assert shares["maj_at"] == pytest.approx([3 / 8, 1 / 4, 1 / 2])
    assert found["pass_at"][4]["interval"] == (1.0, 1.0)
    assert found["maj_at"][4]["interval"] == (0.0, 1.0)
    assert (found["reward"], found["parts"]) == (2 + 3 / 8, {"exact": 3 / 8, "length": 2})
    assert groups[0][0]["parts"] == {"exact": 1, "length": 2}
    assert summarise(groups)["accuracy"] == 3 / 8


def test_votes_are_counted_after_answers_are_normalised():
    """By `number`, '7.0' and 'so 7' are one answer with two votes; by `exact`, two with one each."""
    groups = answers_to("8", ["8", "7.0", "so 7"])
    votes = []
    for rule in ("number", "exact"):
        votes.append(details(groups, rule, load_reward(rule), 8)["maj_at"][3]["accuracy"])
    assert votes == [0, 1]


def test_strict_and_lenient():
    texts = ["75", "75.", "It is 75", "<think>8+7</think>The answer is 75.", "76"]
    groups = answers_to("75", *([text] for text in texts))
    for rule, strict in (("number", 3 / 5), ("exact", 1 / 5)):
        found = details(groups, rule, load_reward(rule), 8)
        assert (found["strict"], found["lenient"]) == (strict, 4 / 5)
    paris = answers_to("Paris", ["Paris"])
    assert "strict" not in details(paris, "exact", load_reward("exact"), 8)


def test_accuracy_by_difficulty():
    groups = answers_to("7", "7", difficulty="steps 10")
    groups += answers_to("7", "7", "8", difficulty="steps 2")
    found = details(groups, "exact", load_reward("exact"), 8)["by_difficulty"]
    accuracies = [(level, value["accuracy"], value["n"]) for level, value in found.items()]
    assert accuracies == [("steps 2", 0.5, 2), ("steps 10", 1, 1)]


def test_greedy_answers_are_compared_by_an_exact_test():
    """6 gained and none lost has p = 2 / 2^6, 5 gained has 2 / 2^5."""
    before = [False] * 6 + [True] * 10
    found = compare_greedy(before, [True] * 16)
    low, high = found.pop("interval")
    assert 0 < low < 6 / 16 < high
    counts = {"gained": 6, "lost": 0, "p": 1 / 32}
    assert found == {"difference": 6 / 16, **counts, "verdict": "better"}
    assert compare_greedy([True] * 16, before)["verdict"] == "worse"
    found = compare_greedy(before, [False] + [True] * 15)
    assert (found["p"], found["verdict"]) == (1 / 16, "no difference seen")


def test_sampled_answers_are_compared_problem_by_problem():
    """The same half gained on every problem is no noise, however much the problems differ."""
    before = [0.0] * 8 + [0.5] * 8
    after = [0.5] * 8 + [1.0] * 8
    better = {"difference": 0.5, "interval": (0.5, 0.5), "verdict": "better"}
    assert compare_sampled(before, after) == better
    assert compare_sampled(after, before)["verdict"] == "worse"
    found = compare_sampled(before, after[::-1])  # 1 gained on half of them, 0 on the others
    assert found["difference"] == 0.5
    assert found["interval"] == pytest.approx((0.25, 0.75), abs=0.07)  # 0.5 +- 1.96 * 0.5 / 4
    assert compare_sampled([0.0, 1.0] * 8, [1.0, 0.0] * 8)["verdict"] == "no difference seen"


def test_the_table_has_every_number():
    """Also one that nobody has heard of."""
    distinct = (i / 1000 for i in itertools.count(101))
    written = []

    def number():
        written.append(next(distinct))
        return written[-1]

    def share(**more):
        return {"accuracy": number(), "interval": (number(), number()), "n": 8, **more}

    results = {}
    for name in ("base", "run"):
        more = {
            "reward": number(),
            "unheard of": number(),
            "parts": {"format": number()},
            "pass_at": {2: share(), 16: share()},
            "by_difficulty": {"steps 2": share()},
        }
        results[name] = {"greedy": share(), "sampled": share(**more)}
    table = results_table(results)
    assert [value for value in written if f"{value:.3f}" not in table] == []
    [line] = [line for line in table.splitlines() if line.startswith("pass@16 ")]
    cells = [results[name]["sampled"]["pass_at"][16]["accuracy"] for name in ("base", "run")]
    assert [float(word) for word in line.split() if word[-1].isdigit()] == cells


@pytest.fixture(scope="session")
def trained(base, tmp_path_factory):
    """A run of a step, in a folder of runs."""
    folder = tmp_path_factory.mktemp("trained") / "runs" / "one"
    flags = [
        "--reward",
        "number + 0.1*length",
        "--lr",
        1e-2,
        "--eval_problems",
        5,
        "--device",
        "cpu",
    ]
    sizes = ["--steps", 1, "--prompts_per_step", 2, "--group_size", 4, "--max_new_tokens", 8]
    return train.main(parse_train("--model", base, "--name", folder.name, *sizes, *flags)).resolve()


def test_x(trained):
    print(trained)
