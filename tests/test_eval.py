import json
import re
import shutil
from itertools import chain
from pathlib import Path

import pytest
from conftest import CPU, parse_train

import fast
import train
from eval import Config, compare, details, evaluate, main, respond, summarise
from lib.flags import UserError
from lib.report import results_table
from lib.stats import compare_greedy, compare_sampled
from policy import load_policy
from reward import final_answer, load_reward
from sample import Sampling
from tasks import Problem, load_task


def answers_to(answer, *groups, difficulty=""):
    """Groups of rows, of responses to problems with one answer."""
    shared = {"prompt": "?", "answer": answer, "difficulty": difficulty}
    shared |= {"finished": True, "length": 2}

    def row(text):
        return {**shared, "response": text, "right": final_answer(text) == answer}

    return [list(map(row, texts)) for texts in groups]


def details_by(rule, groups):
    return details(groups, rule, load_reward(f"{rule} + length"), 8)


def test_responses_depend_on_neither_the_batch_nor_the_other_problems(base):
    policy, tokenizer = load_policy(base, CPU)
    task = load_task("add")
    forms = fast.Forms(generate=fast.generate.generate)

    def ask(problems, form=respond, temperature=1.0, **options):
        sampling = Sampling(temperature)
        return form(forms, policy, tokenizer, task, problems, sampling, 8, **options)

    problems = task.test[:20]
    assert ask(problems, temperature=0) == ask(problems, temperature=0, rows_at_once=7)
    groups = ask(problems, samples=4)
    assert groups == ask(problems, samples=4, rows_at_once=3)
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
    assert list(passed) == list(majority) == [1, 2, 4]
    shares = [share["accuracy"] for share in chain(passed.values(), majority.values())]
    assert shares == pytest.approx([3 / 8, 4 / 6, 1, 3 / 8, 1 / 4, 1 / 2])
    assert passed[4]["interval"] == (1, 1) and majority[4]["interval"] == (0, 1)
    assert (found["reward"], found["parts"]) == (2 + 3 / 8, {"exact": 3 / 8, "length": 2})


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
    assert list(found) == ["steps 2", "steps 10"]
    assert [share["accuracy"] for share in found.values()] == [0.5, 1]


def test_two_models_are_compared_greedy_and_sampled():
    wrong, right = answers_to("7", "8"), answers_to("7", "7")
    found = compare({"greedy": wrong, "sampled": right}, {"greedy": right, "sampled": wrong})
    assert [found[kind]["difference"] for kind in ("greedy", "sampled")] == [1, -1]


def test_greedy_answers_are_compared_by_an_exact_test():
    """6 gained and none lost has p = 2 / 2^6, 5 gained has 2 / 2^5."""
    before, after = [False] * 6 + [True] * 10, [True] * 16
    found = compare_greedy(before, after)
    low, high = found["interval"]
    assert 0 < low < found["difference"] == 6 / 16 < high
    assert (found["gained"], found["lost"], found["p"]) == (6, 0, 1 / 32)
    assert found["verdict"] == "better"
    assert compare_greedy(after, before)["verdict"] == "worse"
    assert compare_greedy(before[1:], after[1:])["verdict"] == "no difference seen"


def test_sampled_answers_are_compared_problem_by_problem():
    """The same half gained on every problem is no noise, however much the problems differ."""
    before, after = [0.0, 0.5] * 8, [0.5, 1.0] * 8
    better = {"difference": 0.5, "interval": (0.5, 0.5), "verdict": "better"}
    assert compare_sampled(before, after) == better
    assert compare_sampled(after, before)["verdict"] == "worse"
    # 1 gained on half of them, 0 on the others: 0.5 +- 1.96 * 0.5 / 4
    found = compare_sampled(before, after[::-1])
    assert found["interval"] == pytest.approx((0.255, 0.745), abs=0.07)
    assert compare_sampled(before, before[::-1])["verdict"] == "no difference seen"


RESULT = """{"greedy": {"accuracy": 0.111, "interval": [0.101, 0.121], "n": 8},
"sampled": {"accuracy": 0.131, "interval": [0.122, 0.142], "n": 8, "new number": 0.150,
"parts": {"format": 0.151}, "pass_at": {"16": {"accuracy": 0.161, "interval": [0.152, 0.172]}},
"by_difficulty": {"steps 2": {"accuracy": 0.181, "interval": [0.173, 0.191], "n": 4}}}}"""


def test_the_table_has_every_number():
    other = RESULT.replace("0.1", "0.8")
    table = results_table({"base": json.loads(RESULT), "run": json.loads(other)})
    number = re.compile(r"0\.\d+")
    assert set(number.findall(table)) == set(number.findall(RESULT + other))
    assert re.search(r"pass@16 +0.161 \[0.152, 0.172\] +0.861 \[0.852, 0.872\]\n", table)


def test_a_run_is_measured_beside_its_base(base, capsys, monkeypatch):
    sizes = "--steps 1 --prompts_per_step 2 --group_size 4 --max_new_tokens 8 --eval_problems 5"
    flags = ["--name", "one", "--reward", "number + 0.1*length", "--device", "cpu"]
    folder = train.main(parse_train("--model", base, *flags, *sizes.split()))
    run = str(folder)
    before = json.loads((folder / "before.json").read_text())
    assert before["sampled"]["responses"][2] in capsys.readouterr().out

    # several models: no run's folder gets the files
    other = Path(shutil.copytree(folder, "runs/other"))
    config = other / "config.json"
    config.write_text(config.read_text().replace('"max_new_tokens": 8', '"max_new_tokens": 6'))
    for flags, models, message in [
        ({}, [run, str(other)], r"--max_new_tokens: the runs differ in it \(8, 6\), give one"),
        ({}, [base], "--task: none of the models is a run"),
        ({"output": config}, [run], "--output .* cannot be written to"),
    ]:
        with pytest.raises(UserError, match=message):
            main(Config(**flags), models)
    several = main(Config(max_new_tokens=8, limit=8, samples=2, rows_at_once=5), [run, str(other)])
    assert Path("runs/eval/eval.json").exists() and not (folder / "eval.json").exists()

    def no_fast_form(*arguments, **options):
        raise AssertionError("the fast form ran")

    # in float32 the plain form gives the same responses
    with monkeypatch.context() as patch:
        patch.setattr(fast.generate, "generate", no_fast_form)
        found = main(Config(limit=8, samples=2, fast="off"), [run])
    shown = capsys.readouterr().out
    assert results_table(found["models"]) in shown and f"{run} against {base}" in shown
    assert found["models"].items() <= several["models"].items()
    assert found["reward"] == "number + 0.1*length"
    assert (folder / "eval.json").exists() and (folder / "eval.png").exists()
    # 2 models, 8 problems, 1 greedy and 2 sampled responses
    assert len((folder / "responses.jsonl").read_text().splitlines()) == 48
    [pair] = found["comparisons"]
    assert (pair["before"], pair["after"]) == (base, run)
