"""What a response is worth: a rule, a learned model, a function of yours, or a mixture of them.

    python train.py --reward number                                  # a rule: see REWARDS below
    python train.py --reward "number + 0.2*format - 0.001*length"    # a mixture: + - * ( )
    python train.py --reward my_rewards.politeness                   # yours, in my_rewards.py
    python train.py --reward 'number * (1 + 0.5*model("runs/rm"))'   # wrong never outranks right
    python reward.py --reward "number + 0.2*format" responses.jsonl  # scores a file, part by part

A rule is a function of three texts that returns a number. Add yours to this file and to RULES, or
put `def politeness(prompt, response, answer)` into my_rewards.py in the current folder. If it has a
parameter `length` it gets the number of tokens of the response, as `limit` the most allowed. If
its first parameter is `prompts`, it is called once, with three lists, and returns a list.

The lines `response | answer -> reward` in the docstrings are examples, which are run as tests. No
rule runs what a model wrote, and none is slow on any text.
"""

import ast
import operator
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch

from lib.files import is_answer, is_prompt, is_string, read_jsonl
from lib.flags import UserError, align, check_range, flag, run_script, shorten
from lib.mixture import OPERATORS, Mixture, arithmetic, call_part, evaluate_mixture, parse_mixture
from lib.reward_model import RewardModel
from policy import pick_device

NUMBER = re.compile(  # the minus in 8-5, x-5 or (2)-5 is no sign
    r"(?<![0-9A-Za-z)])-?\$?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9])"  # -1,012.50
    r"|(?:(?<![0-9A-Za-z)])-)?\$?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"  # -7, 3.5, .5
)
ANNOUNCEMENT = re.compile(r"####|\banswer is:?", re.IGNORECASE)
LETTER = re.compile(r"(?<![A-Za-z0-9])[A-E](?![A-Za-z0-9])")


def final_answer(response) -> str:
    """What follows the last </think>, or the whole response: '<think>8+7=15</think>75' -> '75'"""
    return response.rpartition("</think>")[2]


def last_number(text) -> str | None:
    """'so 3 x 4 is $1,012.' -> '1012';  'it fell to -7.50 %' -> '-7.5';  'no idea' -> None"""
    found = NUMBER.findall(text)
    if not found:
        return None
    digits = found[-1].replace("$", "").replace(",", "")
    whole, _, decimals = digits.lstrip("-").partition(".")
    value = f"{whole.lstrip('0') or '0'}.{decimals.rstrip('0')}".removesuffix(".")
    negative = digits.startswith("-") and value != "0"
    return f"-{value}" if negative else value


def last_letter(text) -> str | None:
    """'Not (A), so the answer is (C).' -> 'C';  'Because' -> None"""
    found = LETTER.findall(text)
    return found[-1] if found else None


def last_expression(text) -> str | None:
    """'<answer>(3 * 8) / 1</answer>' -> '(3 * 8) / 1';  '3 * 8' -> None"""
    before_end = text.rpartition("</answer>")[0]
    _, tag, expression = before_end.rpartition("<answer>")
    return " ".join(expression.split()) if tag else None


def same(find, response, answer) -> float:
    """1 if `find` (last_number, last_letter) finds the same in the final answer and the answer."""
    found = find(final_answer(response))
    return float(found is not None and found == find(answer))


def exact(prompt, response, answer):
    """1 if the final answer is the reference answer, letter by letter.

    <think>8+7=15;4+2+1=7;</think>75 | 75 -> 1
    75. | 75 -> 0
    """
    return float(final_answer(response) == answer)


def number(prompt, response, answer):
    """1 if the last number of the final answer has the right value.

    It is $1,012.00. | 1012 -> 1
    1012, or was it 1013? | 1012 -> 0
    """
    return same(last_number, response, answer)


def stated(prompt, response, answer):
    """1 if the final answer is the right number alone, or ends with it after #### or "answer is".

    <think>hm</think>1,012 | 1012 -> 1
    8 + 4 = 12. The answer is 12. | 12 -> 1
    so it makes 12 | 12 -> 0
    The answer is 12 apples | 12 -> 0
    """
    text = ANNOUNCEMENT.split(final_answer(response))[-1]
    text = text.strip().removesuffix(".")
    if not NUMBER.fullmatch(text):
        return 0.0
    return same(last_number, text, answer)


def choice(prompt, response, answer):
    """1 if the last letter from A to E that stands by itself in the final answer is right.

    Not (A), so the answer is (C). | C -> 1
    C, though B fits as well | C -> 0
    Because | B -> 0
    """
    return same(last_letter, response, answer)


def countdown(prompt, response, answer):
    """1 if the last <answer> is an expression that uses each number once and makes the target.

    <think>3*8=24</think><answer>(3 * 8) / 1</answer> | 24 from 1 3 8 -> 1
    <answer>3 * 8</answer> | 24 from 1 3 8 -> 0
    <answer>24</answer> | 24 from 1 3 8 -> 0
    """
    target, _, numbers = answer.partition(" from ")
    expression = last_expression(final_answer(response)) or ""
    if not re.fullmatch("[0-9+*/() -]{1,200}", expression):  # a long one may be slow to parse
        return 0.0
    used = []

    def use_number(node) -> Fraction:
        if not isinstance(node, ast.Constant):
            raise ValueError("a sign, a power or a call")
        used.append(node.value)
        return Fraction(node.value)

    try:
        tree = ast.parse(expression, mode="eval").body
        value = arithmetic(tree, use_number, OPERATORS | {ast.Div: operator.truediv})
    except (SyntaxError, ValueError, ZeroDivisionError):
        return 0.0
    each_once = sorted(used) == sorted(map(int, numbers.split()))
    return float(each_once and value == int(target))


def format(prompt, response, answer):
    """1 if the response starts with its only <think>...</think> and an answer follows, right or
    wrong: easily gamed, so give it a small factor.

    <think>hm</think>75 | 76 -> 1
    <think>hm</think> | 76 -> 0
    75 | 75 -> 0
    """
    starts = response.lstrip().startswith("<think>")
    once = response.count("<think>") == response.count("</think>") == 1
    return float(starts and once and final_answer(response).strip() != "")


def length(prompt, response, answer, length):
    """Tokens of the response, the stop token included: give it a small negative factor."""
    return float(length)


def overlong(prompt, response, answer, length, limit):
    """0 up to four fifths of the limit, then in a straight line to -1. DAPO, arXiv 2503.14476.
    limit 100: length 80 -> 0, 90 -> -0.5, 100 -> -1"""
    return min(0.0, (4 * limit - 5 * length) / limit)


RULES = exact, number, stated, choice, countdown, format, length, overlong
REWARDS = {rule.__name__: rule for rule in RULES}
RIGHT_OR_WRONG = set(REWARDS) - {"length", "overlong"}  # rules that give 1 or 0
# for majority votes: final answer -> what the rule compares
ANSWERS = {"number": last_number, "choice": last_letter, "countdown": last_expression}


def load_reward(text, device="cpu") -> Mixture:
    """'number + 0.2*format' -> what `score` takes. UserError where the syntax is not supported."""
    device = torch.device(device)
    makers = {
        "model": lambda name: RewardModel(name, device),
        "raw_model": lambda name: RewardModel(name, device, bounded=False),
    }
    return parse_mixture(text, REWARDS, makers)


def score(reward, samples, limit=0) -> list[dict]:
    """Samples {"prompt", "response", "answer", "length"} -> {"reward", "parts"} for each.

    '2*number + format' -> [{"reward": 3.0, "parts": {"number": 1.0, "format": 1.0}}, ...]
    limit: most tokens that a response may have; "length" is needed only by parts that look at it
    UserError names the sample: a part raised, or returned what is not a finite number
    """
    parts = {}
    for part, function in reward.parts.items():
        parts[part] = call_part(part, function, samples, limit)
    scores = []
    for i, value in enumerate(evaluate_mixture(reward, parts)):
        if not abs(value) < 1e15:  # its square must fit into float32
            response = shorten(samples[i]["response"], 100)
            raise UserError(f"--reward: {value:g} is too large a number (response: {response})")
        scores.append({"reward": value, "parts": {part: parts[part][i] for part in parts}})
    return scores


def read_samples(path) -> list[dict]:
    """The lines of a .jsonl file, each with prompt, response and answer."""
    fields = {"prompt": is_prompt, "response": is_string, "answer": is_answer}
    return [{**row, "answer": str(row["answer"])} for row in read_jsonl(Path(path), fields)]


@dataclass(frozen=True)
class Config:
    reward: str = flag("number", "what to score with")
    limit: int = flag(512, "the most tokens of a response, for the rule overlong")


def main(config, file):
    check_range(config, 1, "limit")
    samples = read_samples(file)
    scores = score(load_reward(config.reward, pick_device("auto")), samples, config.limit)
    rows = [[found["reward"], *found["parts"].values()] for found in scores]
    means = [sum(column) / len(rows) for column in zip(*rows)]
    table = [["reward", *scores[0]["parts"], "response"]]
    for numbers, text in zip([*rows, means], [*(row["response"] for row in samples), "mean"]):
        table.append([*map("{:.3f}".format, numbers), shorten(text, 80)])
    print(align(table))


if __name__ == "__main__":
    file = dict(help="a run's samples.jsonl, or lines of prompt, response and answer")
    run_script(main, Config, __doc__, file=file)
