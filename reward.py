"""What a response is worth: a rule, a learned model, a function of yours, or a mixture of them.

    python train.py --reward number                                  # a rule: see REWARDS below
    python train.py --reward "number + 0.2*format - 0.001*length"    # a mixture: + - * ( )
    python train.py --reward my_rewards.politeness                   # yours, in my_rewards.py
    python train.py --reward 'number * (1 + 0.5*model("runs/rm"))'   # wrong never outranks right
    python reward.py --reward "number + 0.2*format" responses.jsonl  # scores a file, part by part

A rule is a function of three texts that returns a number. Add yours to this file and to RULES, or
put `def politeness(prompt, response, answer)` into my_rewards.py in the current folder. If it has a
parameter `length` it gets the number of tokens of the response, as `limit` the most allowed. With a
parameter `tokens`, the text of each token, it may return a number for each, see
loss.token_weights. Any other parameter gets the column of that name of your .jsonl file. If its
first parameter is `prompts`, it is called once, with lists, and returns a list.

The lines `response | answer -> reward` in the docstrings are examples, which are run as tests. No
rule runs what a model wrote (`math` computes it), and none is slow on any text.
"""

import ast
import operator
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import ClassVar

import torch

from lib.files import is_string, read_problems
from lib.flags import UserError, align, check_range, flag, run_script, shorten
from lib.mixture import (
    EXTRA,
    OPERATORS,
    TEXTS,
    Mixture,
    arithmetic,
    call_part,
    check_columns,
    evaluate_mixture,
    evaluate_tokens,
    parse_mixture,
)
from lib.processes import gather, share
from lib.reward_model import RewardModel
from lib.run import is_run, read_config
from policy import pick_device

NUMBER = re.compile(  # -> sign, digits
    r"""
    (?<![0-9A-Za-z^]) (?<!\^\{)                     # not the 4 of 0x4b, nor the 2 of m^2 or m^{2}
    (?:
        (?<!\)) (?: (?=.\S) | ^ | (?<=[=:][ ]) )    # no sign: (2)-5, 7 - 5; a sign: - 5, = - 5
        ([-\u2212\u2013]) [ \\$€£]{0,3} (?:[dt]?frac\{)?
    )?
    (
        \.?[0-9]+ (?: [.,/_{}\\!]{1,3} [0-9]+ )*    # 1,012.50, .5, 3/4, \frac{3}{4}, 1,\!000
        (?: [eE][-+]?[0-9]{1,3} | \^\{?-?[0-9] )?   # 1e3; 2^3, which is taken for no number
    )
    (?: [ ]?\[[0-9]+\] )?                           # the note in 75 [1]
    """,
    re.VERBOSE,
)
NUMBER_ALONE = re.compile(
    rf"[\W_]* (?: (?:boxed|[dt]?frac) [\W_]* )* {NUMBER.pattern} [\W_]*", re.VERBOSE
)
# 1 000 with a space of any width or an apostrophe: groups of three digits
THOUSANDS = re.compile(
    r"(?<![0-9.,/])[0-9]{1,3}(?:[ \u00a0\u2007\u2009\u202f'\u2019][0-9]{3})+(?![0-9])"
)
BULLET = re.compile(r"(?m)^[ \t]*[-*\u2022\u2013][ \t]+")
WIDE = {0xFEE0 + ord(sign): sign for sign in "0123456789+-./"}  # as in Chinese and Japanese text
# the A of "B. A bird flew" is an article
LETTER = re.compile(r"(?<![A-Za-z0-9])([A-E])(?![A-Za-z0-9])(?:[.:)*]{1,4} A(?= [a-z]))?")


def final_answer(response) -> str:
    """What follows the last </think>, or the whole response, without white space around it. A
    thought that never ends is no answer.

    '<think>8+7=15</think> 75' -> '75';  '<think>8+7=15' -> ''
    """
    return response.rpartition("</think>")[2].partition("<think>")[0].strip()


def plain_digits(text) -> str:
    r"""Numbers as NUMBER reads them: '1 000' and "1'000" -> '1000', '\frac12' -> '\frac{1}{2}',
    full-width digits in ASCII, '- 75 apples' without the bullet (but '- 75' alone is below 0)"""
    text = THOUSANDS.sub(lambda found: re.sub("[^0-9]", "", found[0]), text.translate(WIDE))
    text = re.sub(r"(frac) ?([0-9])", r"\1{\2}", text)
    text = re.sub(r"(frac\{[0-9]+\}) ?([0-9])", r"\1{\2}", text)
    return text if NUMBER_ALONE.fullmatch(text) else BULLET.sub("", text)


def last_number(text) -> str | None:
    """'so 3 x 4 is $1,012.' -> '1012';  'it fell to -7.50 %' -> '-15/2';  'no idea' -> None"""
    try:
        [(sign, digits)] = NUMBER.findall(plain_digits(text))[-1:]
        digits = re.sub(r"[{\\]?,[}\\!]*(?=[0-9]{3}(?![0-9]))", "", digits)  # 1,012,000 -> 1012000
        value = Fraction(digits.replace("}{", "/"))
        return str(-value if sign else value)
    except (ValueError, ZeroDivisionError):  # there is none; 1,2345; 1/0; thousands of digits
        return None


def stated_number(text) -> str | None:
    """'12.' -> '12';  '8+4=12. The answer is 12.' -> '12';  'so it makes 12' -> None"""
    text = re.split(r"(?i)####|\banswer is:?", text)[-1]
    return last_number(text) if NUMBER_ALONE.fullmatch(plain_digits(text)) else None


def last_letter(text) -> str | None:
    """'Not (A), so the answer is (C).' -> 'C';  'Because' -> None"""
    return next(reversed(LETTER.findall(text)), None)


def last_expression(text) -> str | None:
    """'<answer>(3 * 8) / 1</answer>' -> '(3*8)/1';  '3 * 8' -> None"""
    before_end = text.rpartition("</answer>")[0]
    _, tag, expression = before_end.rpartition("<answer>")
    return re.sub(r" ?([-+*/()]) ?", r"\1", " ".join(expression.split())) if tag else None


def same(find, response, answer) -> float:
    """1 if `find` (last_number, last_letter) finds the same in the final answer and the answer."""
    found = find(final_answer(response))
    return float(found is not None and found == find(answer))


def exact(prompt, response, answer):
    """1 if the final answer is the reference answer, letter by letter. White space around either
    does not count.

    <think>8+7=15;4+2+1=7;</think> 75 | 75 -> 1
    75. | 75 -> 0
    """
    return float(final_answer(response) == answer.strip())


def number(prompt, response, answer):
    r"""1 if the last number of the final answer has the right value.

    It is $1,012.00. | 1012 -> 1
    \boxed{-\frac{3}{2}\text{ m}^2} | -1.5 -> 1
    1e3 | 1000 -> 1
    1012, or was it 1013? | 1012 -> 0
    3/4 | 4 -> 0
    7,5 | 5 -> 0

    It knows neither words nor formulas, so beware of these:

    74, not 75 | 75 -> 1
    2 1/2 | 0.5 -> 1
    2\sqrt{3} | 3 -> 1
    """
    return same(last_number, response, answer)


def stated(prompt, response, answer):
    """1 if the final answer is the right number alone, or ends with it after #### or "answer is".

    <think>hm</think>1,012 | 1012 -> 1
    **$12**. | 12 -> 1
    8 + 4 = 12. The answer is 12. | 12 -> 1
    so it makes 12 | 12 -> 0
    The answer is 12 apples | 12 -> 0
    """
    found = stated_number(final_answer(response))
    return float(found is not None and found == last_number(answer))


def choice(prompt, response, answer):
    """1 if the last letter from A to E that stands by itself in the final answer is right.

    Not (A), so the answer is (C). | C -> 1
    B. A bird flew | B -> 1
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
    try:
        tree = ast.parse(expression, mode="eval").body
        operators = OPERATORS | {ast.Div: operator.truediv}
        value = arithmetic(tree, lambda number: Fraction(number.value), operators)
    except (SyntaxError, AttributeError, ZeroDivisionError):  # a sign, a power: has no value
        return 0.0
    used = map(int, re.findall("[0-9]+", expression))
    each_once = sorted(used) == sorted(map(int, numbers.split()))
    return float(each_once and value == int(target))


def format(prompt, response, answer):
    """1 if the response starts with its only <think>...</think> and an answer follows, right or
    wrong. Neither may be empty. Easily gamed, so give it a small factor.

    <think>hm</think>75 | 76 -> 1
    <think> </think>75 | 75 -> 0
    <think>hm</think> | 76 -> 0
    75 | 75 -> 0
    """
    once = response.count("think>") == 2  # either tag
    form = r"(?s)\s*<think>[^!-~\w]*[!-~\w].*</think>[^!-~\w]*[!-~\w]"  # U+200B is not seen
    return float(once and re.match(form, response) is not None)


def math(prompt, response, answer):
    r"""1 if the final answer equals the reference answer in LaTeX, by the package math-verify.

    1/2 | \frac{1}{2} -> 1
    \boxed{\{2, 1\}} | \{1, 2\} -> 1
    $(1, 2)$ | [1, 2) -> 0
    no solution | no solution -> 1

    More than a plain number or fraction must stand in $...$ or \boxed{...}. It has a second to read
    the answer, and one to compare it. Only in the main thread: the time limit is a signal.
    """
    from math_verify import parse, verify  # slow to import

    text = final_answer(response)
    if text and text == answer.strip():  # an answer in words, which math-verify cannot read
        return 1.0
    found = parse(text, parsing_timeout=1)
    return float(verify(parse(f"${answer}$"), found, timeout_seconds=1))


def length(prompt, response, answer, length):
    """Tokens of the response, the stop token included: give it a small negative factor."""
    return float(length)


def overlong(prompt, response, answer, length, limit):
    """0 up to four fifths of the limit, then in a straight line to -1. DAPO, arXiv 2503.14476.
    limit 100: length 80 -> 0, 90 -> -0.5, 100 -> -1"""
    return min(0.0, (4 * limit - 5 * length) / limit)


RULES = exact, number, stated, choice, countdown, math, format, length, overlong
REWARDS = {rule.__name__: rule for rule in RULES}
# rules that give only 1 or 0: their mean is called accuracy. All except format need an answer
RIGHT_OR_WRONG = {"exact", "number", "stated", "choice", "countdown", "math", "format"}
# for majority votes: final answer -> what the rule compares, None where there is no answer
ANSWERS = {
    "number": last_number,
    "stated": stated_number,
    "choice": last_letter,
    "countdown": last_expression,
}


def votes(rule, responses) -> list:
    """What each of several responses answers, by the rule: equal answers are equal, and None is no
    answer. By `stated`: '12', 'The answer is 12.0', 'hm' -> '12', '12', None"""
    answers = [final_answer(response) for response in responses]
    if rule == "math":
        return math_votes(answers)
    read = ANSWERS.get(rule, str)
    return [read(answer) or None for answer in answers]


def math_votes(answers) -> list:
    """The index of the first answer that math-verify finds equal, None where it finds no answer."""
    from math_verify import parse, verify  # slow to import

    found = [parse(answer, parsing_timeout=1) for answer in answers]
    first = {}  # text of the answer -> index
    for i, one in enumerate(found):
        if one and str(one) not in first:
            equals = (j for j in first.values() if verify(found[j], one, timeout_seconds=1))
            first[str(one)] = next(equals, i)
    return [first[str(one)] if one else None for one in found]


def load_reward(text, device=torch.device("cpu"), problems=()) -> Mixture:
    """'number + 0.2*format' -> what `score` takes. UserError where the syntax is not supported, or
    one of the problems lacks the answer that a rule wants, or the column that a function wants."""
    makers = {
        "model": lambda name: RewardModel(name, device),
        "raw_model": lambda name: RewardModel(name, device, bounded=False),
    }
    reward = parse_mixture(text, REWARDS, makers)
    if "math" in reward.parts and not find_spec("math_verify"):
        raise UserError(
            "--reward math: needs the package math-verify, install it by: pip install math-verify"
        )
    for part, function in reward.parts.items():
        check_columns(part, function, [problem.columns for problem in problems])
    for rule in RIGHT_OR_WRONG.intersection(reward.parts) - {"format"}:
        for problem in problems:
            if problem.answer is None:
                prompt = shorten(problem.prompt, 100)
                raise UserError(f'--reward {rule}: wants an "answer", which this lacks: {prompt}')
    return reward


def score(reward, samples, limit=0) -> list[dict]:
    """Samples {"prompt", "response", "answer", "length"} -> {"reward", "parts"} for each, and
    "token_rewards" where a part returned a number for each token.

    '2*number + format' -> [{"reward": 3.0, "parts": {"number": 1.0, "format": 1.0}}, ...]
    limit: most tokens that a response may have; "length" is needed only by parts that look at it
    UserError names the sample: a part raised, or returned what is not a finite number
    """
    found = {
        part: call_part(part, function, samples, limit) for part, function in reward.parts.items()
    }
    totals = {
        part: [sum(value) if isinstance(value, list) else value for value in values]
        for part, values in found.items()
    }
    scores = []
    for i, value in enumerate(evaluate_mixture(reward, totals)):
        if not abs(value) < 1e15:  # its square must fit into float32
            response = shorten(samples[i]["response"], 100)
            raise UserError(f"--reward: {value:g} is too large a number (response: {response})")
        scored = {"reward": value, "parts": {part: totals[part][i] for part in totals}}
        token_rewards = evaluate_tokens(reward, {part: found[part][i] for part in found})
        if token_rewards is not None:
            scored["token_rewards"] = token_rewards
        scores.append(scored)
    return scores


class Rewards:
    """Several rewards, each under the name that its values have in a sample.

    mixtures: {"reward": what is trained on, "true_reward": what really counts}
    texts:    the same as the user writes them
    """

    def __init__(self, texts, load):
        self.texts = texts
        self.mixtures = {name: load(text) for name, text in texts.items()}

    @property
    def wants_tokens(self) -> bool:
        return any(mixture.wants_tokens for mixture in self.mixtures.values())

    def score(self, samples, limit, group_size=1) -> list[dict]:
        """The samples with the value of each reward, the parts of the first, and its token_rewards
        if it has them. Several processes score whole groups each, and all get all."""
        starts = range(0, len(samples), group_size)
        groups = [samples[start : start + group_size] for start in starts]
        mine = [dict(sample) for group in share(groups) for sample in group]
        scores = {}  # by text: the same reward may have two names
        for name, mixture in self.mixtures.items():
            text = self.texts[name]
            if text not in scores:
                scores[text] = score(mixture, mine, limit)
            for sample, scored in zip(mine, scores[text]):
                sample[name] = scored["reward"]
        first, *_ = self.texts.values()
        for sample, scored in zip(mine, scores[first]):
            sample.pop("tokens", None)
            sample |= {name: scored[name] for name in scored if name != "reward"}
        return [*chain(*gather(mine))]


def measures(task, reward, true_reward="") -> dict[str, str]:
    """What an evaluation measures: name -> reward, as text. Models are compared by the first.

    mean_reward: the mean of --true_reward or else --reward, unless that is the rule below
    accuracy:    the share right by a rule of RIGHT_OR_WRONG: the task's own, or for a JSONL file
                 (whose rule is only guessed) the one that would be the mean reward
    """
    text = true_reward or reward or task.reward
    rule = text if task.rule_guess else task.reward
    found = {}
    if text != rule or rule not in RIGHT_OR_WRONG:
        found["mean_reward"] = text
    if rule in RIGHT_OR_WRONG:
        found["accuracy"] = rule
    return found


def load_measures(task, reward, true_reward, load) -> Rewards:
    """`measures` with its rewards, which `load` loads. A reward that compares the responses to a
    prompt says little of a model, so where there is an accuracy that alone is measured."""
    texts = measures(task, reward, true_reward)
    found = Rewards(texts, load)
    if "accuracy" in texts and any(mixture.sees_groups for mixture in found.mixtures.values()):
        return Rewards({"accuracy": texts["accuracy"]}, load)
    return found


def load_rewards(task, reward, true_reward, device="auto") -> tuple[Rewards, Rewards]:
    """-> what a run scores its responses by, and what its evaluations measure.

    The first has "reward", which is trained on, and "true_reward", which really counts: by default
    the rule that says right or wrong. Where that is so, its values are called "accuracy" too.
    """
    # cached: a learned reward is loaded once
    load = lru_cache(partial(load_reward, device=pick_device(device), problems=task.train))
    measured = load_measures(task, reward, true_reward, load)
    rule = measured.texts.get("accuracy")
    trained = {"reward": reward or task.reward}
    trained["true_reward"] = true_reward or rule or trained["reward"]
    if trained["true_reward"] == rule:
        trained["accuracy"] = rule
    return Rewards(trained, load), measured


@dataclass(frozen=True)
class Config:
    reward: str = flag("number", "what to score with")
    limit: int = flag(0, "most tokens of a response, for overlong; 0: the run's, or 512")

    CHOICES: ClassVar = {"reward": REWARDS}  # --help has a line for each rule


def read_samples(file) -> tuple[list[dict], dict]:
    """A file of prompts, responses and answers -> samples for `score`, and if the file is in a run
    folder the flags of the run, else {}."""
    samples = read_problems(Path(file), {"response": is_string})
    for row in samples:
        if "finished" not in row:  # written by hand: what else is in the row are columns
            row["columns"] = {name: row[name] for name in row if name not in (*TEXTS, *EXTRA)}
    folder = Path(file).parent
    return samples, read_config(folder) if is_run(folder) else {}


def main(config, file):
    check_range(config, 0, "limit")
    samples, flags = read_samples(file)
    limit = config.limit or flags.get("max_new_tokens", 512)
    scores = score(load_reward(config.reward, pick_device("auto")), samples, limit)
    rows = [[found["reward"], *found["parts"].values()] for found in scores]
    means = [sum(column) / len(rows) for column in zip(*rows)]
    table = [["reward", *scores[0]["parts"], "response"]]
    for numbers, text in zip([*rows, means], [*(row["response"] for row in samples), "mean"]):
        table.append([*map("{:.3f}".format, numbers), shorten(text, 80)])
    print(align(table))


if __name__ == "__main__":
    file = dict(help="a run's samples.jsonl, or lines of prompt, response and answer")
    run_script(main, Config, __doc__, file=file)
