import threading
import time
from pathlib import Path

import pytest

from flags import UserError
from reward import load_reward, score

ROWS = ["1+1=", "2+2=", "3+3="], ["2", "<think>2+2=4</think>4", "7"], ["2", "4", "6"]


@pytest.mark.parametrize(("text", "rewards"), [
    ("exact", [1, 1, 0]),
    ("exact + format", [1, 2, 0]),
    ("exact * (1 + 0.5*format) - 0.1*length", [0.8, 0.5, -0.1]),
    ("-exact - -1", [0, 0, 1]),
    ("2 - 1 - exact", [0, 0, 1]),  # from left to right
    ('contains("think") + regex("^[0-9]$")', [1, 1, 1]),
    (' 1e-1*exact ', [0.1, 0.1, 0]),
])
def test_mixtures_worked_out_by_hand(text, rewards):
    assert score(load_reward(text), *ROWS, [2, 10, 1], 99)[0] == pytest.approx(rewards)


def test_every_part_is_shown():
    _, parts = score(load_reward('exact + 3*contains("7") - 0*exact'), *ROWS)
    assert parts == {"exact": [1, 1, 0], "contains('7')": [0, 0, 1]}


@pytest.mark.parametrize(("text", "message"), [
    ("exakt", "--reward exakt: not one of exact, number"),
    ("exact / 2", r"--reward exact / 2: not one of"),
    ("exact ** 2", "not one of"), ("exact +", "--reward exact \\+: cannot be read"), ("", "cannot be read"),
    ("exact\0", "cannot be read"), ("2", "nothing in it looks at the response"), ("exact + True", "--reward True: not"),
    ("exact + 1e999", "not one of"), ("exact + 1j", "not one of"), ("exact if 1 else 2", "not one of"),
    ("exact == 1", "not one of"), ("(lambda: 1)()", "not one of"), ("[exact][0]", "not one of"),
    ("__import__('os')", "not one of"), ("eval('1')", "not one of"), ("contains(7)", "not one of"),
    ("contains('a', 'b')", "not one of"), ("contains", "not one of"), ("exact.real.imag", "not one of"),
    ("exact('a')", "not one of"), ("contains(text='a')", "not one of"), ("+exact", "not one of"),
    ('regex("(")', r'--reward regex\("\("\): not a pattern'), ("gone.f", "there is no gone.py in the current folder"),
    ("mine.f", "there is no function f in"), ("bad.f", "bad.py raised ZeroDivisionError: division by zero"),
])
def test_what_is_not_in_the_language_is_refused_in_one_sentence(text, message):
    Path("mine.py").write_text("f = 3")
    Path("bad.py").write_text("1 / 0")
    with pytest.raises(UserError, match=message):
        load_reward(text)


def test_your_own_functions_get_a_response_or_the_whole_batch():
    Path("mine.py").write_text(
        "def one(prompt, response, answer): return len(prompt) + (response == answer)\n"
        "def batch(prompts, responses, answers): return [len(prompts) * i for i in range(len(responses))]\n"
        "def counted(prompt, response, answer, length, limit): return length / limit\n")
    rewards, parts = score(load_reward("mine.one + 10*mine.batch + 100*mine.counted"), *ROWS, [5, 10, 20], 20)
    assert parts == {"mine.one": [5, 4, 4], "mine.batch": [0, 3, 6], "mine.counted": [0.25, 0.5, 1]}
    assert rewards == [30, 84, 164]
    with pytest.raises(UserError, match=r"mine\.counted: looks at the number of tokens"):
        score(load_reward("mine.counted"), *ROWS)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("body", "message"), [
    ("prompt, response, answer): return {'7': 1 / 0 if response == '7' else 1}.get(response, 1)",
     r"mine.f: raised ZeroDivisionError: division by zero \(prompt: 3\+3=; response: 7\)"),
    ("prompt, response, answer): return float('nan' if response == '7' else 1)",
     r"mine.f: returned nan, not a finite number \(prompt: 3\+3=; response: 7\)"),
    ("prompt, response, answer): return float('inf')", r"returned inf, .* \(prompt: 1\+1="),
    ("prompt, response, answer): return 10**400", "returned 1000"),
    ("prompt, response, answer): return None", "returned None"),
    ("prompt, response, answer): return '1.0'", "returned '1.0'"),
    ("prompt, response, answer): return [1.0]", "returned \\[1.0\\]"),
    ("prompt): return 1.0", "raised TypeError"), ("): return 1.0", "raised TypeError"),
    ("prompts, responses, answers): return [1.0, 2.0]", r"returned 2 values for 3 responses, the first \(prompt: 1"),
    ("prompts, responses, answers): return 1.0", "raised TypeError"),
    ("prompts, responses, answers): return [1.0, float('nan'), 1.0]", r"returned nan, .* \(prompt: 2\+2="),
])
def test_a_failing_function_is_named_with_the_sample_that_did_it(body, message, workers):
    Path("mine.py").write_text(f"def f({body}\n")
    with pytest.raises(UserError, match=message) as error:
        score(load_reward("exact + mine.f", workers=workers, timeout=9.0), *ROWS)
    assert "\n" not in str(error.value)


def test_slow_calls_run_side_by_side_and_late_ones_get_the_stated_value(capsys):
    """Of 12 calls two never come back before the test ends: their places go to others, the rest keep their order."""
    Path("mine.py").write_text(
        "import threading\nhang, running, most = threading.Event(), [], []\n"
        "def f(prompt, response, answer):\n"
        "    running.append(response)\n    most.append(len(running))\n"
        "    hang.wait(60 if response in ('0', '5') else 0.02)\n    running.remove(response)\n"
        "    return int(response)\n")
    reward = load_reward("mine.f", workers=3, timeout=1.0, missed=-1.0)
    rows = [""] * 12, [str(i) for i in range(12)], [""] * 12
    started = time.perf_counter()
    rewards, _ = score(reward, *rows)
    assert time.perf_counter() - started < 20
    assert rewards == [-1, 1, 2, 3, 4, -1, 6, 7, 8, 9, 10, 11]
    assert "--reward mine.f: 2 of 12 calls took over 1 s: they count -1" in capsys.readouterr().out
    names = reward.parts["mine.f"].__globals__
    assert 2 <= max(names["most"]) <= 5  # three at a time, and the two left behind
    assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())
    names["hang"].set()
