"""What a response is worth: functions (prompt, response, answer) -> float, chosen by name in REWARDS.

    python train.py --reward number

To write your own, add a function here and one line to REWARDS.
"""

import re
from collections.abc import Callable

from flags import UserError

NUMBER = re.compile(r"(?<![0-9A-Za-z)])-?\$?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9])"  # -1,012.50
                    r"|(?:(?<![0-9A-Za-z)])-)?\$?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")  # -7, 3.5, .5; in 8-5 it is 5


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


def exact(prompt: str, response: str, answer: str) -> float:
    """1.0 if the final answer is the reference to the letter, else 0.0: '<think>8+7=15</think>75' for '75' -> 1.0"""
    return float(final_answer(response) == answer)


def number(prompt: str, response: str, answer: str) -> float:
    """1.0 if the last number of the final answer is the last of the reference, else 0.0: 'It is $1,012.' for '1012'
    -> 1.0"""
    found = last_number(final_answer(response))
    return float(found is not None and found == last_number(answer))


REWARDS: dict[str, Callable[[str, str, str], float]] = {"exact": exact, "number": number}


def load_reward(name: str) -> Callable[[str, str, str], float]:
    """UserError if REWARDS has no such name."""
    if name not in REWARDS:
        raise UserError(f"--reward {name}: not one of {', '.join(REWARDS)}")
    return REWARDS[name]


def score(reward: Callable, prompts: list[str], responses: list[str], answers: list[str]) -> list[float]:
    """The reward of each row."""
    return [reward(*row) for row in zip(prompts, responses, answers, strict=True)]
