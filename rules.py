"""Rules and heuristics: what a text is worth, as functions (prompt, response, answer) -> float.

    python train.py --reward "number + 0.2*format - 0.001*length"

One that names a parameter `length` gets the tokens of the response too, and `limit` the most that it may have. To add
one, write it and give it a line in REWARDS; reward.py mixes them. Nothing here runs what a model wrote, and nothing
takes long on any text. The lines with an arrow are examples that are run as tests: response | answer -> reward.
"""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

import regex as timed_re  # comes with transformers; re has no time limit

from flags import UserError

NUMBER = re.compile(r"(?<![0-9A-Za-z)])-?\$?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9])"  # -1,012.50
                    r"|(?:(?<![0-9A-Za-z)])-)?\$?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")  # -7, 3.5, .5; in 8-5 it is 5
STATED = re.compile(r"####|\banswer is:?", re.IGNORECASE)
LETTER = re.compile(r"(?<![A-Za-z0-9])[A-E](?![A-Za-z0-9])")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def arithmetic(node: ast.expr, leaf: Callable, operators: dict) -> object:
    """What a parsed expression comes to: the operators given, applied to what `leaf` makes of all other nodes."""
    if isinstance(node, ast.BinOp) and type(node.op) in operators:
        left, right = (arithmetic(side, leaf, operators) for side in (node.left, node.right))
        return operators[type(node.op)](left, right)
    return leaf(node)


def final_answer(response: str) -> str:
    """What stands after the last </think>, or the whole response: '<think>8+7=15</think>75' -> '75'"""
    return response.rpartition("</think>")[2]


def last_number(text: str) -> str | None:
    """'so 3 x 4 is $1,012.' -> '1012';  'it fell to -7.50 %' -> '-7.5';  '10.0' -> '10';  '#### $10' -> '10';
    'no idea' -> None"""
    found = NUMBER.findall(text)
    if not found:
        return None
    sign, digits = ("-" if found[-1].startswith("-") else ""), found[-1].lstrip("-").replace("$", "").replace(",", "")
    whole, _, part = digits.partition(".")
    whole, part = whole.lstrip("0") or "0", part.rstrip("0")
    number = f"{whole}.{part}" if part else whole
    return number if number == "0" else sign + number


def last_letter(text: str) -> str | None:
    """'Not (A), so the answer is (C).' -> 'C';  'Because' -> None"""
    return (LETTER.findall(text) or [None])[-1]


def last_expression(text: str) -> str | None:
    """'<answer>(3 * 8) / 1</answer>' -> '(3 * 8) / 1';  '3 * 8' -> None"""
    _, opened, inside = text.rpartition("</answer>")[0].rpartition("<answer>")
    return " ".join(inside.split()) if opened else None


def exact(prompt: str, response: str, answer: str) -> float:
    """1 if the final answer is the reference to the letter.

    <think>8+7=15;4+2+1=7;</think>75 | 75 -> 1
    75. | 75 -> 0
    """
    return float(final_answer(response) == answer)


def number(prompt: str, response: str, answer: str) -> float:
    """1 if the last number of the final answer has the value of the reference's last.

    It is $1,012.00. | 1012 -> 1
    1012, or was it 1013? | 1012 -> 0
    """
    found = last_number(final_answer(response))
    return float(found is not None and found == last_number(answer))


def stated(prompt: str, response: str, answer: str) -> float:
    """1 if the final answer says that it is one: a number that stands alone, or after "####" or "answer is", and last.

    <think>hm</think>1,012 | 1012 -> 1
    8 + 4 = 12. The answer is 12. | 12 -> 1
    so it makes 12 | 12 -> 0
    The answer is 12 apples | 12 -> 0
    """
    text = STATED.split(final_answer(response))[-1].strip().removesuffix(".")
    return float(NUMBER.fullmatch(text) is not None and last_number(text) == last_number(answer))


def choice(prompt: str, response: str, answer: str) -> float:
    """1 if the last letter A to E that stands alone in the final answer is the reference's.

    Not (A), so the answer is (C). | C -> 1
    C, though B fits as well | C -> 0
    Because | B -> 0
    """
    found = last_letter(final_answer(response))
    return float(found is not None and found == last_letter(answer))


def countdown(prompt: str, response: str, answer: str) -> float:
    """1 if the last <answer> is an expression that uses each number once and comes to the target.

    <think>3*8=24</think><answer>(3 * 8) / 1</answer> | 24 from 1 3 8 -> 1
    <answer>3 * 8</answer> | 24 from 1 3 8 -> 0
    <answer>24</answer> | 24 from 1 3 8 -> 0
    """
    target, _, numbers = answer.partition(" from ")
    text = last_expression(final_answer(response)) or ""
    if not re.fullmatch("[0-9+*/() -]{1,200}", text):  # short: neither parsing nor the sum takes long
        return 0.0
    used = []

    def leaf(node: ast.expr) -> Fraction:
        if not isinstance(node, ast.Constant):
            raise ValueError("not a number: a sign, a power, a call")
        used.append(node.value)
        return Fraction(node.value)

    try:
        value = arithmetic(ast.parse(text, mode="eval").body, leaf, OPERATORS | {ast.Div: operator.truediv})
    except (SyntaxError, ValueError, ZeroDivisionError):
        return 0.0
    return float(value == int(target) and sorted(used) == sorted(map(int, numbers.split())))


def formatted(prompt: str, response: str, answer: str) -> float:
    """1 if the response opens with one <think>...</think> and an answer follows. Right or wrong: it is easily gamed.

    <think>hm</think>75 | 76 -> 1
    <think>hm</think> | 76 -> 0
    75 | 75 -> 0
    """
    once = response.count("<think>") == response.count("</think>") == 1 and response.lstrip().startswith("<think>")
    return float(once and final_answer(response).strip() != "")


def repetition(prompt: str, response: str, answer: str) -> float:
    """The share of its runs of 4 words that stood in the response before: give it a negative weight.

    one two three four | -> 0
    a b a b a b a b | -> 0.6
    """
    words = response.split()
    runs = list(zip(words, words[1:], words[2:], words[3:]))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def length(prompt: str, response: str, answer: str, length: int) -> float:
    """Tokens of the response, its end among them: give it a small negative weight."""
    return float(length)


def overlong(prompt: str, response: str, answer: str, length: int, limit: int) -> float:
    """0 up to four fifths of the limit, then in a straight line to -1 at the limit. DAPO, arXiv 2503.14476: 80 of at
    most 100 tokens -> 0; 90 -> -0.5; 100 -> -1"""
    return min(0.0, (4 * limit - 5 * length) / limit)


REWARDS: dict[str, Callable] = {"exact": exact, "number": number, "stated": stated, "choice": choice,
                                "countdown": countdown, "format": formatted, "length": length, "overlong": overlong,
                                "repetition": repetition}
# what a final answer comes to by a rule, so that answers can be counted: of two that are equal both are right or none
ANSWERS: dict[str, Callable] = {"number": last_number, "choice": last_letter, "countdown": last_expression}
# a rule that tells right from wrong -> one that wants the form too, and one that takes the number wherever it stands
STRICT_AND_LENIENT = {"exact": ("exact", "number"), "number": ("stated", "number")}


def contains(text: str) -> Callable:
    """contains("75"): 1 if the response, thoughts included, has the text in it, letter by letter.

    so 75 it is | -> 1
    7 5 | -> 0
    """
    return lambda prompt, response, answer: float(text in response)


def matches(pattern: str) -> Callable:
    """regex("^[0-9]+$"): 1 if the pattern is found in the response. A search that takes over 0.1 s counts as not found:
    some patterns, (a+)+b for one, would take years on a text made for them.

    75 | -> 1
    it is 75 | -> 0
    """
    try:
        compiled = timed_re.compile(pattern)
    except timed_re.error as error:
        raise UserError(f'--reward regex("{pattern}"): not a pattern: {error}') from None

    def found(prompt: str, response: str, answer: str) -> float:
        try:
            return float(compiled.search(response, timeout=0.1) is not None)
        except TimeoutError:
            return 0.0

    return found
