"""Where prompts come from: built-in tasks, GSM8K, the user's own JSONL.

    TASKS["add"]            sums of two two-digit numbers, generated
    TASKS["countdown"]      write an expression that uses given numbers and comes to a target, generated
    TASKS["gsm8k"]          grade-school word problems (arXiv 2110.14168), read from files, fetched once if missing
    "my.jsonl"              one object a line: {"prompt": text or chat messages, "answer": text}

A new task is a function that returns a Task, and one line in TASKS.
"""

import dataclasses
import hashlib
import json
import math
import os
import random
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from tqdm import tqdm

from flags import UserError


@dataclass(frozen=True)
class Problem:
    """One question. `prompt` is text, or a list of chat messages {"role", "content"}; `answer` is the reference;
    `difficulty` a label, where the task has one: eval.py measures the accuracy of each."""

    prompt: str | list
    answer: str
    difficulty: str = dataclasses.field(default="", compare=False)


@dataclass(frozen=True)
class Task:
    """Three disjoint lists of problems, and how to put them to a model and check what it says.

    train, validation, test: train.py learns from the first and measures on the second; the third is for eval.py alone
    reward: name in reward.REWARDS of the rule that says what is right (1.0) here
    system: what a chat model is told first
    plain:  the whole prompt of a model without a chat template; {prompt} and {eos} are filled in
    """

    name: str
    train: list[Problem]
    validation: list[Problem]
    test: list[Problem]
    reward: str
    system: str = ""
    plain: str = "{prompt}"


PLAIN = Task("", [], [], [], "")  # a prompt and nothing around it but the chat template

def digest(text: str) -> int:
    """The same number in every process, without a pattern in it: 8 bytes of SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def hold_out(problems: list[Problem], share: float) -> tuple[list[Problem], list[Problem]]:
    """-> (held out, the rest), those held out in the order of their hashes, so that any first few are a fair sample.

    Chosen by the hash of the prompt: the choice depends on nothing else and shows no pattern (a linear hash once held
    out just the sums that end in 0), and the same prompt twice is never on both sides.
    """
    hashed = [(digest(json.dumps(problem.prompt)), problem) for problem in problems]
    values = sorted({value for value, _ in hashed})
    border = values[max(1, round(share * len(values))) - 1]
    held = sorted((pair for pair in hashed if pair[0] <= border), key=lambda pair: pair[0])
    return [problem for _, problem in held], [problem for value, problem in hashed if value > border]


@lru_cache(maxsize=2)
def shuffled(n: int, seed: int, lap: int) -> list[int]:
    return random.Random(f"{seed}/{lap}").sample(range(n), n)


def stream(problems: list[Problem], start: int, count: int, seed: int) -> list[Problem]:
    """`count` problems from place `start` of an endless sequence that passes through all of them, each time in another
    order. It depends on its arguments alone, so a run that is resumed goes on with the problems it would have had."""
    n = len(problems)
    return [problems[shuffled(n, seed, place // n)[place % n]] for place in range(start, start + count)]


def add(data_dir: str) -> Task:
    """"48+27=" -> "75", for all 8,100 pairs of two-digit numbers: 810 to test, 729 to validate, 6,561 to train."""
    problems = [Problem(f"{a}+{b}=", str(a + b), f"carries {(a % 10 + b % 10 > 9) + (a + b > 99)}")
                for a in range(10, 100) for b in range(10, 100)]
    test, rest = hold_out(problems, 0.1)
    validation, train = hold_out(rest, 0.1)
    system = "Add the two numbers. You may think inside <think></think> first; then write the sum and nothing else."
    return Task("add", train, validation, test, reward="exact", system=system)


COUNTDOWN_SYSTEM = (
    "Work the problem out inside <think></think> first. Then write one expression inside <answer></answer>: only the "
    "numbers, + - * / and parentheses, no equals sign."
)
COUNTDOWN_PLAIN = """\
Question: Use each of the numbers 2, 5 and 9 exactly once to make 13.
<think>2 * 9 = 18, and 18 - 5 = 13: that uses all three.</think>
<answer>2 * 9 - 5</answer>{eos}

Question: {prompt}
"""


def countdown(data_dir: str) -> Task:
    """12,000 problems of 3 or 4 numbers below 100 and a target below 1,000, always the same, each with a solution."""
    rng, problems = random.Random(0), {}
    while len(problems) < 12_000:
        numbers = sorted(rng.randint(1, 99) for _ in range(rng.choice((3, 4))))
        left = rng.sample(numbers, len(numbers))
        while len(left) > 1:  # two at random become one: the way there is the solution
            a, b = left.pop(), left.pop()
            ways = [a + b, a * b] + [a - b] * (a > b) + [a // b] * (a % b == 0)
            left.insert(rng.randrange(len(left) + 1), rng.choice(ways))
        if left[0] < 1000:
            *first, last = map(str, numbers)
            prompt = f"Use each of the numbers {', '.join(first)} and {last} exactly once to make {left[0]}."
            problems[prompt] = Problem(prompt, f"{left[0]} from {' '.join(map(str, numbers))}",
                                       f"numbers {len(numbers)}")
    test, rest = hold_out(list(problems.values()), 0.1)
    validation, train = hold_out(rest, 0.1)
    return Task("countdown", train, validation, test, "countdown", COUNTDOWN_SYSTEM, COUNTDOWN_PLAIN)


GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
GSM8K_SHA256 = {
    "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}
GSM8K_SYSTEM = (
    "Solve the problem. Reason step by step inside <think></think>, then give the final answer as a number, last."
)
# Each worked answer ends in the model's own end-of-text token: a base model shown no end would write problems forever.
GSM8K_PLAIN = """\
Question: A baker fills 4 trays with 6 rolls each and sells 15 rolls. How many rolls are left?
Answer: There are 4 * 6 = 24 rolls. After selling 15, 24 - 15 = 9 are left. The answer is 9{eos}

Question: Tom reads 12 pages a day from Monday to Friday and 30 pages on Saturday. How many pages does he read in all?
Answer: From Monday to Friday he reads 5 * 12 = 60 pages. With Saturday, 60 + 30 = 90. The answer is 90{eos}

Question: {prompt}
Answer:"""


def gsm8k(data_dir: str) -> Task:
    """7,473 problems to train, of which 5 % are held out to validate, and 1,319 to test (arXiv 2110.14168)."""
    files = [fetch(Path(data_dir or "data/gsm8k"), name, GSM8K_SHA256[name]) for name in ("train.jsonl", "test.jsonl")]
    train, test = ([Problem(line["question"], line["answer"].rpartition("####")[2].strip().replace(",", ""),
                             f"lines {len(line['answer'].strip().splitlines()) - 1}")  # of the worked solution
                    for line in read_jsonl(file, {"question": is_text, "answer": is_text})] for file in files)
    validation, train = hold_out(train, 0.05)
    return Task("gsm8k", train, validation, test, reward="number", system=GSM8K_SYSTEM, plain=GSM8K_PLAIN)


TASKS = {"add": add, "countdown": countdown, "gsm8k": gsm8k}


def load_task(name: str, data_dir: str = "") -> Task:
    """A task by its name in TASKS, or from a .jsonl file of the user's. UserError: no such task, or a bad line."""
    if name in TASKS:
        return TASKS[name](data_dir)
    if not name.endswith(".jsonl"):
        raise UserError(f"--task {name}: not one of {', '.join(TASKS)}, nor a .jsonl file")
    lines = read_jsonl(Path(name), {"prompt": is_prompt, "answer": is_answer})
    problems = [Problem(line["prompt"], str(line["answer"]), str(line.get("difficulty", ""))) for line in lines]
    test, rest = hold_out(problems, 0.1)
    validation, train = hold_out(rest, 0.1) if rest else ([], [])
    if not train:
        raise UserError(f"--task {name}: {len(problems)} problems are too few to hold some out, give at least 3")
    numbers = all(problem.answer.lstrip("-").replace(",", "").replace(".", "", 1).isdecimal() for problem in problems)
    return Task(Path(name).stem, train, validation, test, reward="number" if numbers else "exact")


def is_text(value) -> bool:
    return isinstance(value, str) and value != ""


def is_answer(value) -> bool:
    return is_text(value) or (isinstance(value, (int, float)) and math.isfinite(value))


def is_prompt(value) -> bool:
    """Text, or chat messages: {"role": text, "content": text} each"""
    if not isinstance(value, list):
        return is_text(value)
    return value != [] and all(
        isinstance(turn, dict) and is_text(turn.get("role")) and is_text(turn.get("content")) for turn in value
    )


def read_jsonl(path: Path, fields: dict[str, Callable[[Any], bool]]) -> list[dict]:
    """One object a line, with at least the given fields, of which the functions approve. Empty lines are passed over,
    a byte-order mark too. UserError names the file, and the line where there is one."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}, save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not an object with {' and '.join(fields)}")
        for field, fits in fields.items():
            if field not in row or not fits(row[field]):
                raise UserError(f'{path}, line {number}: "{field}" is missing, empty or of the wrong type')
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: no problems in it")
    return rows


def fetch(folder: Path, name: str, sha256: str) -> Path:
    """folder/name, fetched from GSM8K_URL if it is not there: checked, and written whole or not at all."""
    path = folder / name
    if path.exists():
        return path
    content, seen = bytearray(), hashlib.sha256()
    try:
        with urllib.request.urlopen(GSM8K_URL + name, timeout=30) as response:
            size = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=size, unit="B", unit_scale=True, desc=f"fetching {name}") as bar:
                while block := response.read(1 << 16):
                    content += block
                    seen.update(block)
                    bar.update(len(block))
    except OSError as error:
        raise UserError(f"{path} is not there and {GSM8K_URL}{name} cannot be fetched ({error}): get the file by other "
                        "means, or name its folder with --data_dir") from None
    if seen.hexdigest() != sha256:
        raise UserError(f"{GSM8K_URL}{name} is not the file expected (SHA-256 {seen.hexdigest()}), nothing was written")
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{name}.{os.getpid()}.part"
    aside.write_bytes(content)
    aside.replace(path)
    return path


def prompt_ids(task: Task, problem: Problem, tokenizer) -> list[int]:
    """The token ids that are put to the model: through the tokenizer's chat template if it has one, else task.plain."""
    prompt = problem.prompt
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise UserError("the prompt is a list of chat messages, but the model's tokenizer has no chat template: "
                            "give prompts as text, or use a chat model")
        return tokenizer(task.plain.replace("{eos}", tokenizer.eos_token).replace("{prompt}", prompt))["input_ids"]
    messages, system = prompt, []
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
        system = [{"role": "system", "content": task.system}] if task.system else []
    try:
        return tokenizer.apply_chat_template(system + messages, add_generation_prompt=True, return_dict=False)
    except TemplateError as error:
        if not system:
            raise UserError(f"the model's chat template refuses the prompt: {error}") from None
    # some templates (Gemma's) know no system role: say it at the head of the user's turn
    messages = [{"role": "user", "content": f"{task.system}\n\n{prompt}"}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
