import functools
import hashlib
import http.server
import itertools
import json
import threading
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

import tasks
from flags import UserError
from tasks import Problem, Task, load_task, prompt_ids, stream


def test_splits_of_add_are_disjoint_complete_and_right():
    task = load_task("add")
    splits = [{problem.prompt for problem in split} for split in (task.train, task.validation, task.test)]
    assert [len(split) for split in splits] == [6561, 729, 810]
    assert len(set.union(*splits)) == 8100
    assert all(eval_sum(problem.prompt) == problem.answer for problem in task.test)


def eval_sum(prompt):
    a, b = prompt.rstrip("=").split("+")
    return str(int(a) + int(b))


def test_splits_of_add_show_no_pattern():
    """A linear hash once made a test split in which every sum ended in 0. Each last digit of the sums, and of either
    number, must come up about as often as any other: 81 of 810 expected (chi-square of 9 degrees under 27.9)."""
    task = load_task("add")
    for split in (task.test, task.validation, task.validation[:200]):
        for digit in (lambda p: p.answer[-1], lambda p: p.prompt[1], lambda p: p.prompt[4], lambda p: p.prompt[0]):
            counts = Counter(digit(problem) for problem in split)
            kinds = 9 if "0" not in counts else 10
            expected = len(split) / kinds
            assert sum((counts[str(d)] - expected) ** 2 / expected for d in range(10 - kinds, 10)) < 27.9


def solvable(numbers, target):
    """Whether any way of joining two at a time gets there, in fractions."""
    if len(numbers) == 1:
        return numbers[0] == target
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        a, b = numbers[i], numbers[j]
        if any(solvable([*rest, c], target) for c in (a + b, a - b, a * b, *([a / b] if b else []))):
            return True
    return False


def test_countdown_can_always_be_solved_and_is_always_the_same():
    task = load_task("countdown")
    assert task == load_task("countdown")
    splits = [{problem.prompt for problem in split} for split in (task.train, task.validation, task.test)]
    assert [len(split) for split in splits] == [9720, 1080, 1200] and len(set.union(*splits)) == 12_000
    for problem in task.test[:80]:
        target, _, numbers = problem.answer.partition(" from ")
        assert solvable([Fraction(n) for n in numbers.split()], Fraction(target)), problem
        in_prompt = [word.strip(",.") for word in problem.prompt.split() if word.strip(",.").isdigit()]
        assert in_prompt == [*numbers.split(), target] and 3 <= len(numbers.split()) <= 4
    assert {len(problem.answer.split()) for problem in task.test} == {5, 6}


def test_stream_passes_through_all_problems_each_time_in_another_order():
    problems = [Problem(str(i), "") for i in range(10)]
    names = [problem.prompt for problem in stream(problems, 0, 30, seed=0)]
    assert all(sorted(names[i : i + 10]) == [str(k) for k in range(10)] for i in (0, 10, 20))
    assert names[:10] != names[10:20]
    assert [p.prompt for i in range(0, 30, 4) for p in stream(problems, i, 4, seed=0)][:30] == names
    assert [problem.prompt for problem in stream(problems, 0, 30, seed=1)] != names


def write_lines(name, *lines):
    Path(name).write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return name


def test_jsonl_of_the_users_own():
    rows = [{"prompt": f"p{i}", "answer": i} for i in range(50)]
    task = load_task(write_lines("my.jsonl", *rows[:25], "", *rows[25:]))
    assert (len(task.train), len(task.validation), len(task.test)) == (41, 4, 5)
    assert task.reward == "number"
    rows[7]["answer"] = "yes"
    assert load_task(write_lines("my.jsonl", *rows)).reward == "exact"


@pytest.mark.parametrize(("line", "message"), [
    ({"prompt": "x"}, 'my.jsonl, line 2: "answer" is missing'),
    ({"prompt": "", "answer": "1"}, 'my.jsonl, line 2: "prompt" is missing, empty'),
    ({"prompt": 3, "answer": "1"}, 'my.jsonl, line 2: "prompt" is missing, empty or of the wrong type'),
    ({"prompt": [{"role": "user"}], "answer": "1"}, 'my.jsonl, line 2: "prompt" '),
    ("[1]", "my.jsonl, line 2: not an object"),
    ("{oops", "my.jsonl, line 2: not JSON"),
])
def test_a_bad_line_is_named(line, message):
    write_lines("my.jsonl", {"prompt": "ok", "answer": "1"}, line, {"prompt": "ok too", "answer": "2"})
    with pytest.raises(UserError, match=message):
        load_task("my.jsonl")


def test_unknown_task_missing_file_and_too_few_lines():
    with pytest.raises(UserError, match=r"--task gms8k: not one of add, countdown, gsm8k, nor a \.jsonl file"):
        load_task("gms8k")
    with pytest.raises(UserError, match=r"gone.jsonl: cannot be read: No such file"):
        load_task("gone.jsonl")
    with pytest.raises(UserError, match="too few"):
        load_task(write_lines("my.jsonl", {"prompt": "ok", "answer": "1"}))


def write_gsm8k(folder, n=40):
    Path(folder).mkdir(parents=True)
    for name in ("train", "test"):
        rows = [{"question": f"What is {name} {i} + 1,000?", "answer": f"1,000+{i} is\n#### {1000 + i:,}"}
                for i in range(n)]
        write_lines(f"{folder}/{name}.jsonl", *rows)


def test_gsm8k_answers_and_validation_come_from_the_right_places():
    write_gsm8k("g")
    task = load_task("gsm8k", "g")
    assert (len(task.train), len(task.validation), len(task.test)) == (38, 2, 40)
    assert all("train" in problem.prompt for problem in task.train + task.validation)
    assert all("test" in problem.prompt for problem in task.test)
    assert task.test[5] == Problem("What is test 5 + 1,000?", "1005")


@pytest.fixture
def server(monkeypatch):
    """A web server of the folder web/, in place of OpenAI's repository."""
    Path("web").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory="web")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(tasks, "GSM8K_URL", f"http://127.0.0.1:{server.server_port}/")
        yield Path("web")
        server.shutdown()


def test_gsm8k_is_fetched_and_checked_when_missing(server, monkeypatch):
    write_gsm8k("g")
    sums = {}
    for name in ("train.jsonl", "test.jsonl"):
        content = Path("g", name).read_bytes()
        (server / name).write_bytes(content)
        sums[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(tasks, "GSM8K_SHA256", sums)
    assert load_task("gsm8k") == load_task("gsm8k", "g")
    assert sorted(path.name for path in Path("data/gsm8k").iterdir()) == ["test.jsonl", "train.jsonl"]
    (server / "train.jsonl").unlink()
    load_task("gsm8k")  # not fetched again


def test_gsm8k_of_a_wrong_content_is_not_written(server):
    (server / "train.jsonl").write_text("changed on the way")
    with pytest.raises(UserError, match="is not the file expected"):
        load_task("gsm8k")
    assert not Path("data").exists()


def test_gsm8k_that_cannot_be_fetched_says_what_to_do(server):
    with pytest.raises(UserError, match=r"cannot be fetched .* --data_dir"):
        load_task("gsm8k")


TASK = Task("t", [], [], [], "exact", system="Be brief.", plain="Q: 1?\nA: 1{eos}\nQ: {prompt}\nA:")


def test_prompts_go_through_the_chat_template_where_there_is_one(load):
    _, tokenizer = load("qwen2")
    text = tokenizer.decode(prompt_ids(TASK, Problem("2+2?", "4"), tokenizer))
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
                    "<|im_start|>assistant\n")
    messages = [{"role": role, "content": "hi"} for role in ("user", "assistant", "user")]
    assert tokenizer.decode(prompt_ids(TASK, Problem(messages, ""), tokenizer)).count("<|im_start|>") == 4


def test_a_template_without_a_system_role_gets_the_instruction_in_the_users_turn(load):
    _, tokenizer = load("gemma2")
    text = tokenizer.decode(prompt_ids(TASK, Problem("2+2?", "4"), tokenizer))
    assert text == "<|im_start|>user\nBe brief.\n\n2+2?<|im_end|>\n<|im_start|>assistant\n"


def test_without_a_template_the_prompt_is_plain_and_shows_how_an_answer_ends(load):
    _, tokenizer = load("llama")
    ids = prompt_ids(TASK, Problem("2+2? {eos}", "4"), tokenizer)
    assert tokenizer.decode(ids) == "Q: 1?\nA: 1<|endoftext|>\nQ: 2+2? {eos}\nA:"
    assert ids.count(tokenizer.eos_token_id) == 1
    with pytest.raises(UserError, match="no chat template"):
        prompt_ids(TASK, Problem([{"role": "user", "content": "hi"}], ""), tokenizer)
