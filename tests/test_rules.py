import ast
import random
import re
import time
import warnings
from pathlib import Path

import pytest

import rules
from rules import REWARDS, contains, countdown, exact, final_answer, last_number, matches, number

RULES = {**REWARDS, "contains": contains("75"), "regex": matches("^[0-9]+$")}
EXAMPLES = [
    (name, *re.fullmatch(r"(.*?) \| ?(.*?) ?-> (\S+)", line.strip()).groups())
    for name, function in (*REWARDS.items(), ("contains", contains), ("regex", matches))
    for line in function.__doc__.split("\n")[1:]
    if " -> " in line and " | " in line
]


@pytest.mark.parametrize(("name", "response", "answer", "reward"), EXAMPLES)
def test_the_examples_in_the_docstrings(name, response, answer, reward):
    assert RULES[name]("", response, answer) == pytest.approx(float(reward))


def test_every_rule_of_texts_has_two_examples_or_more():
    counted = [name for name, *_ in EXAMPLES]
    assert all(counted.count(name) >= 2 for name in RULES if name not in ("length", "overlong"))


def test_overlong_falls_in_a_straight_line_over_the_last_fifth():
    assert [rules.overlong("", "", "", length, 100) for length in (1, 80, 85, 90, 100)] == [0, 0, -0.25, -0.5, -1]
    assert rules.length("", "abc", "", 7) == 7.0


@pytest.mark.parametrize(("text", "expected"), [
    ("so 3 x 4 is $1,012.", "1012"), ("1,012.", "1012"), ("-7", "-7"), ("10.0", "10"), ("#### $10", "10"),
    ("it fell to -7.50 %", "-7.5"), ("50%", "50"), ("$-3", "-3"), ("-$3", "-3"), ("no idea", None), ("", None),
    ("8-5", "5"), ("(2)-5", "5"), ("x = -5", "-5"), ("007", "7"), ("0.50", "0.5"), (".5", "0.5"), ("-0", "0"),
    ("1,2,3", "3"), ("1,234,567.80 dollars", "1234567.8"), ("3 and 4.", "4"), ("v2", "2"), ("-0.0", "0"),
    ("١٢", None), ("12,34", "34"), ("2/3", "3"), ("1" * 5000, "1" * 5000),
])
def test_last_number(text, expected):
    assert last_number(text) == expected


def test_number_compares_values_not_spellings():
    assert number("", "The total is $1,012.00.", "1012") == 1.0
    assert number("", "It is 1012, or was it 1013", "1012") == 0.0
    assert number("", "", "1012") == 0.0
    assert number("", "none", "none") == 0.0


def test_only_what_follows_the_last_think_tag_is_the_answer():
    assert final_answer("<think>a</think>b</think>c") == "c"
    assert exact("", "75</think>", "75") == 0.0
    assert exact("", "75 ", "75") == 0.0
    assert number("", "12</think>", "12") == 0.0


@pytest.mark.parametrize(("expression", "answer", "reward"), [
    ("7 // 2 + 9", "12 from 2 7 9", 0),  # comes to 12 in whole numbers
    ("3.5 * 2", "7 from 2 3 5", 0),  # the digits are those of 3, 5 and 2
    ("9**99**88", "9 from 9 88 99", 0),  # a bare eval never comes back
    ("99**98**97", "9 from 97 98 99", 0),
    ("9" * 30 + "**" + "9" * 30, "9 from 9", 0),
    ("(" * 10_000 + "1", "1 from 1", 0),
    ("(" * 10_000 + "1" + ")" * 10_000, "1 from 1", 0),
    ("-" * 10_000 + "1", "1 from 1", 0),
    ("(" * 99 + "1" + ")" * 99, "1 from 1", 1),
    ("(" * 199 + "1", "1 from 1", 0),
    ("-" * 199 + "1", "1 from 1", 0),
    ("٣ * 8", "24 from 3 8", 0),  # digits of another script
    ("\uff13*8", "24 from 3 8", 0),
    ("1_0 + 2", "12 from 2 10", 0),
    ("0x1F + 2", "33 from 2 31", 0),
    ("007 + 2", "9 from 2 7", 0),
    ("True + 2", "3 from 1 2", 0),
    ("-3 + 8", "5 from 3 8", 0),  # a sign is no operation on two numbers
    ("8 + +3", "11 from 3 8", 0),
    ("~3 + 8", "4 from 3 8", 0),
    ("8 % 3", "2 from 3 8", 0),
    ("8(3)", "24 from 3 8", 0),
    ("(8, 3)", "24 from 3 8", 0),
    ("8 / 0", "0 from 0 8", 0),
    ("3 * 8 = 24", "24 from 3 8", 0),
    ("24", "24 from 3 8", 0),
    ("8 * 3 * 1", "24 from 3 8", 0),  # a number too many
    ("3 * 8", "24 from 1 3 8", 0),  # one too few
    ("8 * 8 / 8 * 3", "24 from 3 8", 0),  # one twice
    ("", "24 from 3 8", 0),
    ("3 *\n 8\n", "24 from 3 8", 1),  # over several lines
    ("1 / 3 * 9", "3 from 1 3 9", 1),  # in floats it is not quite 3 for many such
    ("49 / 49 / 49 * 49", "1 from 49 49 49 49", 1),
    ("2 * 9 - 5", "13 from 2 5 9", 1),
])
def test_countdown_is_neither_fooled_nor_hung(expression, answer, reward):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Python warns of 8(3), and a warning is text on the user's screen
        started = time.perf_counter()
        assert countdown("", f"<think>3 * 8 = 24</think><answer>{expression}</answer>", answer) == reward
    assert time.perf_counter() - started < 1  # keeps a hang out; no timing


@pytest.mark.parametrize(("response", "reward"), [
    ("<answer>3*8</answer> or rather <answer>3+8</answer>", 0),  # the last word counts
    ("<answer>3+8</answer> no: <answer>3*8</answer>", 1),
    ("<think><answer>3*8</answer></think>", 0),
    ("<think>so</think>3*8", 0),
    ("<answer>3*8", 0),
    ("3*8</answer>", 0),
    ("<answer><answer>3*8</answer>", 1),
    ("<answer>3*8</answer></answer>", 0),
    ("<answer>" * 5000 + "3*8" + "</answer>" * 5000, 0),
])
def test_countdown_reads_the_last_answer_block(response, reward):
    assert countdown("", response, "24 from 3 8") == reward


def test_a_pattern_that_would_take_years_counts_as_not_found():
    started = time.perf_counter()
    assert matches("(a+)+b")("", "a" * 5000, "") == 0.0
    assert time.perf_counter() - started < 5
    assert matches("(a+)+b")("", "aab", "") == 1.0


PIECES = ["<think>", "</think>", "<answer>", "</answer>", "75", "A", "(B)", "3 * 8", "1,012", "$", ".", ",", "-", "**",
          "(", ")", "\n", " ", "\0", "٣", "é", "\ud800", "a a a a a", "0x1F", "1_0", "__import__('os')", "9" * 300]
RIGHT = {"exact": ("<think>7</think>75", "75"), "number": ("It is 1,012.", "1012"), "choice": ("So (B).", "B"),
         "countdown": ("<think>3</think><answer>3 * 8</answer>", "24 from 3 8")}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_takes_any_text(name):
    """Random pieces, and right answers with pieces put in and cut out: no error, a finite number in its range, the same
    number twice. (Kept short by seeds, so that a failure can be looked at again.)"""
    rng, rule = random.Random(name), RULES[name]
    for i in range(1000):
        response, answer = RIGHT.get(name, ("75", "75"))
        if i % 2:
            response = "".join(rng.choices(PIECES, k=rng.randrange(20)))
        else:
            cut, paste = sorted(rng.choices(range(len(response) + 1), k=2))
            response = response[:cut] + rng.choice(PIECES) + response[paste:]
        more = {"length": (len(response),), "overlong": (len(response), 10_000)}.get(name, ())
        value = rule("", response, answer, *more)
        assert isinstance(value, float) and value == rule("", response, answer, *more)
        assert -1 <= value < 10_000 if more else 0 <= value <= 1
    for response, answer in [RIGHT[name]] if name in RIGHT else []:
        assert rule("", response, answer) == 1.0


@pytest.mark.parametrize("text", ["1," * 50_000, "<think>" * 20_000, "A" * 100_000, "a b c " * 30_000, "-$" * 50_000,
                                  "1" * 100_000, "111," * 30_000 + "1111", "<answer>" * 20_000])
@pytest.mark.parametrize("name", [name for name in RULES if name not in ("length", "overlong")])
def test_a_rule_does_not_hang_on_a_long_text(name, text):
    """A hundred thousand characters; a rule whose time grows with their square would take minutes."""
    started = time.perf_counter()
    RULES[name]("", text, "75" if name != "countdown" else "24 from 3 8")
    assert time.perf_counter() - started < 2


def test_nothing_here_runs_what_a_model_wrote():
    for name in ("rules", "reward"):
        tree = ast.parse(Path(rules.__file__).with_name(f"{name}.py").read_text())
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not called & {"eval", "exec", "compile", "__import__", "ast.literal_eval"}
