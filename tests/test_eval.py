import json
import shutil
from itertools import chain
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
from reward import final_answer, load_reward
from sample import Sampling
from tasks import Problem, load_task


def answers_to(answer, *groups, difficulty=""):
    """Groups of rows, of responses to problems with one answer."""
    shared = {"prompt": "?", "answer": answer, "difficulty": difficulty, "finished": True}
    found = []
    for texts in groups:
        rows = [{**shared, "response": text, "length": len(text) + 1} for text in texts]
        found.append([{**row, "right": final_answer(row["response"]) == answer} for row in rows])
    return found


def details_by(rule, groups):
    return details(groups, rule, load_reward(f"{rule} + length"), 8)


def test_responses_depend_on_neither_the_batch_size_nor_the_other_problems(base):
    policy, tokenizer = load_policy(base, CPU)
    task = load_task("add")
    forms = fast.Forms(generate=fast.generate.generate)

    def ask(problems, form=respond, temperature=1.0, **options):
        sampling = Sampling(temperature)
        return form(forms, policy, tokenizer, task, problems, sampling, 8, **options)

    problems = task.test[:20]
    assert ask(problems, temperature=0) == ask(problems, temperature=0, batch_size=7)
    groups = ask(problems, samples=4)
    assert groups == ask(problems, samples=4, batch_size=9)
    assert groups[3:4] == ask(problems[3:4], samples=4)
    assert groups != ask(problems, samples=4, seed=1)
    assert len({row["response"] for row in chain(*groups)}) > 20

    # the same problems, where every other response is right
    texts = [group[0]["response"] for group in ask(problems)]
    for i in range(0, 20, 2):
        problems[i] = Problem(problems[i].prompt, final_answer(texts[i]))
    found = ask(problems, evaluate)
    assert (found["responses"], found["accuracy"]) == (texts, 0.5)


def test_pass_and_maj_at_k_of_two_problems():
    """7 7 8 8: pass@1 1/2, pass@2 1 - 1/6, majorities by twos 7 and 8, of all four a tie that the
    first wins. 9 9 9 7: 1/4, 1/2; never the majority."""
    groups = answers_to("7", "7788", "9997")
    found = details_by("exact", groups)
    passed, majority = found["pass_at"], found["maj_at"]
    shares = [share["accuracy"] for share in passed.values()]
    assert shares == pytest.approx([3 / 8, 4 / 6, 1])
    assert [share["accuracy"] for share in majority.values()] == [3 / 8, 1 / 4, 1 / 2]
    assert list(passed) == list(majority) == [1, 2, 4]
    assert passed[4]["interval"] == (1, 1) and majority[4]["interval"] == (0, 1)
    assert (found["reward"], found["parts"]) == (2 + 3 / 8, {"exact": 3 / 8, "length": 2})
    assert groups[0][0]["parts"] == {"exact": 1, "length": 2}
    assert summarise(groups)["accuracy"] == 3 / 8


def test_votes_are_counted_after_answers_are_normalised():
    """By `number`, '7.0' and 'so 7' are one answer, with two votes."""
    groups = answers_to("8", ["8", "7.0", "so 7"])
    assert details_by("number", groups)["maj_at"][3]["accuracy"] == 0
    assert details_by("exact", groups)["maj_at"][3]["accuracy"] == 1


def test_strict_and_lenient():
    texts = ["75", "75.", "It is 75", "<think>8+7</think>The answer is 75.", "76"]
    groups = answers_to("75", *zip(texts))
    for rule, strict in (("number", 3 / 5), ("exact", 1 / 5)):
        found = details_by(rule, groups)
        assert (found["strict"], found["lenient"]) == (strict, 4 / 5)
    assert "strict" not in details_by("exact", answers_to("Paris", ["Paris"]))
    assert summarise(groups)["thinking"] == 1 / 5


def test_accuracy_by_difficulty():
    groups = answers_to("7", "7", difficulty="steps 10")
    groups += answers_to("7", "7", "8", difficulty="steps 2")
    found = details_by("exact", groups)["by_difficulty"]
    accuracies = [(level, share["accuracy"], share["n"]) for level, share in found.items()]
    assert accuracies == [("steps 2", 0.5, 2), ("steps 10", 1, 1)]


def test_greedy_answers_are_compared_by_an_exact_test():
    """6 gained and none lost has p = 2 / 2^6, 5 gained has 2 / 2^5."""
    before = [False] * 6 + [True] * 10
    found = compare_greedy(before, [True] * 16)
    low, high = found.pop("interval")
    assert 0 < low < found["difference"] == 6 / 16 < high
    assert (found["gained"], found["lost"], found["p"]) == (6, 0, 1 / 32)
    assert found["verdict"] == "better"
    assert compare_greedy([True] * 16, before)["verdict"] == "worse"
    assert compare_greedy(before[1:], [True] * 15)["verdict"] == "no difference seen"


def test_sampled_answers_are_compared_problem_by_problem():
    """The same half gained on every problem is no noise, however much the problems differ."""
    before = [0.0] * 8 + [0.5] * 8
    after = [0.5] * 8 + [1.0] * 8
    better = {"difference": 0.5, "interval": (0.5, 0.5), "verdict": "better"}
    assert compare_sampled(before, after) == better
    assert compare_sampled(after, before)["verdict"] == "worse"
    # 1 gained on half of them, 0 on the others: 0.5 +- 1.96 * 0.5 / 4
    found = compare_sampled(before, after[::-1])
    assert found["interval"] == pytest.approx((0.255, 0.745), abs=0.07)
    assert compare_sampled(before, before[::-1])["verdict"] == "no difference seen"


def test_the_table_has_every_number():
    written = []

    def number():
        written.append(0.101 + len(written) / 1000)
        return written[-1]

    def share(**more):
        return {"accuracy": number(), "interval": (number(), number()), "n": 8, **more}

    results = {}
    for name in ("base", "run"):
        more = {"pass_at": {2: share(), 16: share()}, "by_difficulty": {"steps 2": share()}}
        more |= {"parts": {"format": number()}, "new number": number()}
        results[name] = {"greedy": share(), "sampled": share(**more)}
    table = results_table(results)
    assert [value for value in written if f"{value:.3f}" not in table] == []
    last = [f"{results[name]['sampled']['new number']:.3f}" for name in results]
    assert ["new", "number", *last] in [line.split() for line in table.splitlines()]


def train_a_step(base):
    """-> the run folder"""
    sizes = "--steps 1 --prompts_per_step 2 --group_size 4 --max_new_tokens 8 --eval_problems 5"
    flags = ["--name", "one", "--reward", "number + 0.1*length", "--device", "cpu"]
    return train.main(parse_train("--model", base, *flags, *sizes.split()))


def test_a_run_is_measured_beside_its_base(base, capsys):
    folder = train_a_step(base)
    run = str(folder)
    before = json.loads((folder / "before.json").read_text())
    shown = capsys.readouterr().out  # ends with a report
    assert before["sampled"]["responses"][2] in shown
    assert results_table({"before": before}).splitlines()[1] in shown

    found = main(Config(limit=12, samples=2), [run])
    shown = capsys.readouterr().out
    assert results_table(found["models"]) in shown and f"{run} against {base}" in shown
    assert found["reward"] == "number + 0.1*length"
    assert json.loads((folder / "eval.json").read_text())["comparisons"][0]["after"] == run
    assert (folder / "eval.png").read_bytes().startswith(b"\x89PNG")

    rows = list(map(json.loads, (folder / "responses.jsonl").read_text().splitlines()))
    assert len(rows) == 2 * 12 * (1 + 2)
    sampled = found["models"][run]["sampled"]
    assert sampled["reward"] == pytest.approx(sum(row["reward"] for row in rows[-24:]) / 24)
    [pair] = found["comparisons"]
    for kind in ("greedy", "sampled"):
        old, new = (found["models"][name][kind]["accuracy"] for name in (base, run))
        assert pair[kind]["difference"] == pytest.approx(new - old)
    again = main(Config(limit=12, samples=2, batch_size=5), [run, base])
    assert again["models"] == found["models"]


def test_several_runs_and_flags_that_cannot_be(base):
    folder = train_a_step(base)
    run, other = str(folder), shutil.copytree(folder, "runs/other")
    config = (folder / "config.json").read_text()
    assert '"max_new_tokens": 8' in config
    Path(other, "config.json").write_text(config.replace('_tokens": 8', '_tokens": 6'))
    for flags, models, message in [
        ({}, [run, other], r"--max_new_tokens: the runs differ in it \(8, 6\), give one for all"),
        ({}, [base], "--task: none of the models is a run"),
        ({"samples": 0}, [run], "--samples 0: must be at least 1"),
        ({"temperature": 0.0}, [run], "--temperature 0.0: must be at least 0.0001"),
        ({"output": f"{run}/config.json"}, [run], "--output .* cannot be written to"),
    ]:
        with pytest.raises(UserError, match=message):
            main(Config(**flags), models)
    # no run's folder gets what is said of several
    main(Config(max_new_tokens=2, limit=1), [run, other])
    assert Path("runs/eval/eval.json").exists() and not (folder / "eval.json").exists()
