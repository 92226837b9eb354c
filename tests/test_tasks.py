import hashlib
import itertools
import json
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

import tasks
from lib.flags import UserError
from reward import REWARDS, load_reward
from tasks import Problem, Task, load_task, prompt_ids, take_problems


def sizes(task):
    """How many prompts are in train, validation and test, which must be disjoint."""
    sets = []
    for problems in (task.train, task.validation, task.test):
        sets.append({problem.prompt for problem in problems})
    assert len(set.union(*sets)) == sum(map(len, sets))
    return list(map(len, sets))


def test_splits_of_add_are_disjoint_complete_and_right():
    task = load_task("add")
    assert sizes(task) == [6505, 752, 843]
    for problem in task.test:
        assert sum(map(int, problem.prompt.strip("=").split("+"))) == int(problem.answer)


def test_splits_of_add_show_no_pattern():
    """A linear hash once made a test split in which every sum ended in 0. Each last digit of the
    sums, and of either number, must be about as frequent as any other (chi-square of 9 degrees of
    freedom, p = 0.001)."""
    task = load_task("add")
    for problems in (task.test, task.validation):
        digits = [(p.answer[-1], p.prompt[1], p.prompt[4]) for p in problems]
        expected = len(problems) / 10
        for column in zip(*digits):
            counts = Counter(column)
            assert sum((counts[digit] - expected) ** 2 / expected for digit in "0123456789") < 27.9


def solvable(numbers, target):
    """Whether some way of combining two at a time makes the target."""
    if len(numbers) == 1:
        return numbers[0] == target
    for a, b, *rest in itertools.permutations(numbers):
        results = [a + b, a - b, a * b]
        if b:
            results.append(a / b)
        if any(solvable([*rest, result], target) for result in results):
            return True
    return False


def test_countdown_can_always_be_solved_and_is_always_the_same():
    task = load_task("countdown")
    assert task == load_task("countdown")
    assert sizes(task) == [9709, 1116, 1175]
    for problem in task.test[:60]:
        target, numbers = problem.answer.split(" from ")
        assert solvable(list(map(Fraction, numbers.split())), int(target)), problem
        assert re.findall(r"\d+", problem.prompt) == [*numbers.split(), target]
    assert {problem.difficulty for problem in task.test} == {"numbers 3", "numbers 4"}


def test_take_problems_passes_through_all_problems_each_time_in_another_order():
    problems = [Problem(str(i), "") for i in range(10)]
    taken = take_problems(problems, 0, 20, seed=0)
    for epoch in (taken[:10], taken[10:]):
        assert sorted(problem.prompt for problem in epoch) == list("0123456789")
    assert taken[:10] != taken[10:]
    assert take_problems(problems, 7, 9, seed=0) == taken[7:16]  # as a resumed run does
    assert take_problems(problems, 0, 20, seed=1) != taken


def write_lines(name, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(name).write_text("\n".join(lines))
    return name


def test_jsonl_of_the_users_own():
    """Each of 50 prompts is there twice: a prompt is never on both sides."""
    rows = [{"prompt": f"p{i % 50}", "answer": i / 2, "difficulty": 3} for i in range(100)]
    task = load_task(write_lines("my.jsonl", *rows[:25], "", *rows[25:]))
    assert sizes(task) == [38, 6, 6]
    assert (len(task.test), task.reward, task.test[0].difficulty) == (12, "number", "3")


@pytest.mark.parametrize(
    "answer", [1e-7, 1e20, "-1,012.50", "yes", "\u0667", "7,5", "1.2.3", "12abc", "1024 768"]
)
def test_the_rule_of_a_file_is_guessed_from_its_answers(answer):
    """`number` where each answer is one that the rule `number` can read."""
    rows = [{"prompt": f"p{i}", "answer": answer if i == 7 else i / 2} for i in range(20)]
    task = load_task(write_lines("my.jsonl", *rows))
    readable = REWARDS["number"]("", f"It is {answer}.", str(answer)) == 1
    rule, count = ("number", 20) if answer in (1e-7, 1e20, "-1,012.50") else ("exact", 19)
    assert (task.reward, task.rule_guess) == (rule, f"{count} of 20 answers are plain numbers")
    assert readable or rule == "exact"


def test_an_answer_may_be_missing_where_no_rule_wants_one():
    rows = [{"prompt": f"p{i}"} for i in range(20)]
    task = load_task(write_lines("my.jsonl", *rows))
    assert task.train[0].answer is None
    load_reward("format - 0.1*length", problems=task.train)
    for rule in ("exact", "0.1*format + number"):
        wanting = rule.split()[-1]
        with pytest.raises(UserError, match=f'--reward {wanting}: wants an "answer", .*: p'):
            load_reward(rule, problems=task.train)


BAD_LINES = """
{"prompt": "x", "answer": ""} -> "answer" is missing, empty or of the wrong type
{"prompt": "x", "answer": NaN} -> "answer" is missing
{"prompt": "", "answer": "1"} -> "prompt" is missing
{"prompt": 3, "answer": "1"} -> "prompt" is missing
{"prompt": [{"role": "user"}], "answer": "1"} -> "prompt" is missing
[1] -> not an object
{oops -> not JSON"""


@pytest.mark.parametrize("case", BAD_LINES.strip().splitlines())
def test_a_bad_line_is_named(case):
    line, message = case.split(" -> ")
    good = {"prompt": "ok", "answer": "1"}
    with pytest.raises(UserError, match=f"my.jsonl, line 2: {message}"):
        load_task(write_lines("my.jsonl", good, line, good))


def test_unknown_task_missing_file_and_too_few_lines():
    write_lines("few.jsonl", {"prompt": "ok", "answer": "1"})
    for name, message in {
        "gms8k": r"--task gms8k: not one of add, countdown, gsm8k.*, nor a \.jsonl file",
        "gone.jsonl": "gone.jsonl: cannot be read: No such file",
        "few.jsonl": "--task few.jsonl: 1 problems are too few",
    }.items():
        with pytest.raises(UserError, match=message):
            load_task(name)


def test_gsm8k_is_downloaded_once_and_checked(monkeypatch):
    """From a folder in place of OpenAI's repository: missing, then wrong, then right."""
    web = Path("web").resolve()
    monkeypatch.setattr(tasks, "GSM8K_URL", f"{web.as_uri()}/")
    with pytest.raises(UserError, match=r"cannot be fetched .* --data_dir"):
        load_task("gsm8k")
    web.mkdir()
    sums = {}
    for name in ("train.jsonl", "test.jsonl"):
        answer = "500+500\n= so\n#### 1,000"
        write_lines(
            web / name, *({"question": f"{i} of {name}?", "answer": answer} for i in range(40))
        )
        sums[name] = hashlib.sha256((web / name).read_bytes()).hexdigest()
    with pytest.raises(UserError, match="is not the file expected"):
        load_task("gsm8k")
    assert not Path("data").exists()
    monkeypatch.setattr(tasks, "GSM8K_SHA256", sums)
    task = load_task("gsm8k")
    assert task.test[5] == Problem("5 of test.jsonl?", "1000")
    assert task.test[5].difficulty == "lines 2"
    assert sizes(task) == [38, 2, 40]
    (web / "train.jsonl").unlink()
    assert load_task("gsm8k") == task == load_task("gsm8k", "data/gsm8k")


PLAIN = "Q: 1?\nA: 1{eos}\nQ: {prompt}\nA:"
TASK = Task("t", [], [], [], "exact", system="Be brief.", template=PLAIN)
START = "<|im_start|>assistant\n"


def as_text(tokenizer, prompt):
    return tokenizer.decode(prompt_ids(TASK, Problem(prompt, "4"), tokenizer))


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def test_prompts_go_through_the_chat_template_if_there_is_one(load):
    _, tokenizer = load("qwen2")
    assert as_text(tokenizer, "2?") == turn("system", "Be brief.") + turn("user", "2?") + START
    messages = [{"role": "user", "content": "hi"}]
    assert as_text(tokenizer, messages * 2) == turn("user", "hi") * 2 + START
    _, tokenizer = load("gemma2")  # its template refuses the system role
    assert as_text(tokenizer, "2?") == turn("user", "Be brief.\n\n2?") + START
    _, tokenizer = load("llama")  # has none
    with pytest.raises(UserError, match="no chat template"):
        as_text(tokenizer, messages)


def test_without_a_chat_template_the_task_has_one_that_shows_how_an_answer_ends(load):
    _, tokenizer = load("llama")
    ids = prompt_ids(TASK, Problem("2? {eos}", ""), tokenizer)
    assert tokenizer.decode(ids) == "Q: 1?\nA: 1<|endoftext|>\nQ: 2? {eos}\nA:"
    assert ids.count(tokenizer.eos_token_id) == 1
