"""Where prompts come from: built-in tasks, GSM8K, or a JSONL file of yours.

    python train.py --task add          # sums of two two-digit numbers, generated
    python train.py --task countdown    # reach a target from given numbers, generated
    python train.py --task gsm8k        # grade-school word problems (arXiv 2110.14168), downloaded
    python train.py --task my.jsonl     # a line each: {"prompt": text or messages, "answer": text}

A new task is a function that returns a Task. Add it to TASKS.
"""

import hashlib
import json
import random
import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from lib.files import download, is_text, read_jsonl, read_problems
from lib.flags import UserError
from lib.progress import phase
from lib.prompts import TEMPLATE_COLUMNS, chat_text, encode


@dataclass(frozen=True)
class Problem:
    """A question with its reference answer.

    prompt:     text, or chat messages: [{"role": "user", "content": "48+27="}]. If the last message
                is the assistant's, the response continues it
    difficulty: a label, if the task has one; eval.py measures the accuracy of each
    columns:    what else the row of a .jsonl file has: `tools` and `chat_template_kwargs` go to the
                chat template, and a reward gets the columns that it names as parameters
    """

    prompt: str | list
    answer: str | None  # a rule may not need it
    difficulty: str = field(default="", compare=False)
    columns: dict = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Task:
    """Three disjoint lists of problems, how to prompt a model with them, and what is right.

    train:      train.py learns from these
    validation: train.py measures on these
    test:       only for eval.py
    reward:     name in reward.REWARDS of the rule that gives 1.0 for a right response
    rule_guess: why this rule, where it is guessed from the answers of a .jsonl file
    system:     system message for a chat model
    template:   prompt for a model without a chat template; {prompt} and {eos} are filled in
    """

    name: str
    train: list[Problem]
    validation: list[Problem]
    test: list[Problem]
    reward: str
    system: str = ""
    template: str = "{prompt}"
    rule_guess: str = ""

    def fingerprint(self) -> str:
        """Another text where any problem is another one, or has another place."""
        rows = [[p.prompt, p.answer, p.columns] for p in self.train + self.validation]
        return f"{stable_hash(json.dumps([rows, self.system, self.template])):016x}"


NO_TASK = Task("", [], [], [], reward="")  # prompts are passed on as they are


def stable_hash(text):
    """8 bytes of SHA-256: the same number in every process, and without a pattern."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def same_prompt(problem) -> str:
    """Equal for equal prompts, also where the keys of a message have another order."""
    return json.dumps(problem.prompt, sort_keys=True)


def hold_out(problems, border, identity=same_prompt):
    """-> (held out, the rest). Held out are the problems whose hash is at most `border`, where the
    hashes lie between 0 and 1; at least those of the lowest hash.

    So where a problem goes depends on the problem only: a file may grow or shrink, and no problem
    changes sides. The held-out problems are sorted by their hash: the first few are a random sample
    of them. The hash must have no pattern: with a linear one, all sums that were held out ended
    in 0.

    identity: problems for which this text is equal are on the same side
    """
    hashes = [stable_hash(identity(problem)) / 2**64 for problem in problems]
    border = max(border, min(hashes))
    rest = [problem for problem, place in zip(problems, hashes) if place > border]
    held_out = [pair for pair in zip(hashes, problems) if pair[0] <= border]
    held_out.sort(key=lambda pair: pair[0])
    return [problem for _, problem in held_out], rest


def split(name, problems, reward, *prompting, identity=same_prompt) -> Task:
    """About a tenth of the problems for test, a tenth of the others for validation."""
    test, rest = hold_out(problems, 0.1, identity)
    validation, train = hold_out(rest, 0.19, identity) if rest else ([], [])  # of 0.1 to 1
    if not train:
        few = f"{len(problems)} problems are too few to hold some out, give at least 3"
        raise UserError(f"--task {name}: {few}")
    return Task(Path(name).stem, train, validation, test, reward, *prompting)


@lru_cache(maxsize=2)
def shuffled(n, seed, epoch):
    return random.Random(f"{seed}/{epoch}").sample(range(n), n)


def take_problems(problems, start, count, seed):
    """`count` problems from position `start` of an endless sequence of epochs, each shuffled anew.

    The result depends only on the arguments: a resumed run gets the problems it would have had.
    """
    n = len(problems)
    taken = []
    for position in range(start, start + count):
        order = shuffled(n, seed, position // n)
        taken.append(problems[order[position % n]])
    return taken


ADD_SYSTEM = (
    "Add the two numbers. You may think inside <think></think> first; "
    "then write the sum and nothing else."
)


def same_pair(problem) -> str:
    """Equal for "48+27=" and "27+48=": who knows one of them knows the other."""
    return " ".join(sorted(problem.prompt.strip("=").split("+")))


def add(data_dir) -> Task:
    """The sums "48+27=" -> "75", for all 8,100 pairs of two-digit numbers."""
    problems = []
    for a in range(10, 100):
        for b in range(10, 100):
            carries = (a % 10 + b % 10 > 9) + (a + b > 99)
            problems.append(Problem(f"{a}+{b}=", str(a + b), f"carries {carries}"))
    return split("add", problems, "exact", ADD_SYSTEM, identity=same_pair)


COUNTDOWN_SYSTEM = (
    "Work the problem out inside <think></think> first. Then write one expression inside "
    "<answer></answer>: only the numbers, + - * / and parentheses, no equals sign."
)
COUNTDOWN_TEMPLATE = """\
Question: Use each of the numbers 2, 5 and 9 exactly once to make 13.
<think>2 * 9 = 18, and 18 - 5 = 13: that uses all three.</think>
<answer>2 * 9 - 5</answer>{eos}

Question: {prompt}
"""


def countdown(data_dir) -> Task:
    """12,000 problems with 3 or 4 numbers below 100 and a target below 1,000, always the same."""
    rng = random.Random(0)
    problems = {}
    while len(problems) < 12_000:
        numbers = sorted(rng.randint(1, 99) for _ in range(rng.choice((3, 4))))
        target = random_target(numbers, rng)
        if target >= 1000:
            continue
        *first, last = map(str, numbers)
        listed = f"{', '.join(first)} and {last}"
        prompt = f"Use each of the numbers {listed} exactly once to make {target}."
        answer = f"{target} from {' '.join(map(str, numbers))}"
        problems[prompt] = Problem(prompt, answer, f"numbers {len(numbers)}")
    problems = list(problems.values())
    return split("countdown", problems, "countdown", COUNTDOWN_SYSTEM, COUNTDOWN_TEMPLATE)


def random_target(numbers, rng):
    """Combines two random numbers until one is left, so there always is a solution."""
    left = rng.sample(numbers, len(numbers))
    while len(left) > 1:
        a = left.pop()
        b = left.pop()
        results = [a + b, a * b]
        if a > b:
            results.append(a - b)
        if a % b == 0:
            results.append(a // b)
        left.insert(rng.randrange(len(left) + 1), rng.choice(results))
    return left[0]


GSM8K_URL = (
    "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
)
GSM8K_SHA256 = {
    "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}
GSM8K_SYSTEM = (
    "Solve the problem. Reason step by step inside <think></think>, "
    "then give the final answer as a number, last."
)
# the examples end with {eos}, so that a base model knows when to stop
GSM8K_TEMPLATE = """\
Question: A baker fills 4 trays with 6 rolls each and sells 15 rolls. How many rolls are left?
Answer: There are 4 * 6 = 24 rolls. After selling 15, 24 - 15 = 9 are left. The answer is 9{eos}

Question: Tom reads 12 pages a day from Monday to Friday and 30 pages on Saturday. How many \
pages does he read in all?
Answer: From Monday to Friday he reads 5 * 12 = 60 pages. With Saturday, \
60 + 30 = 90. The answer is 90{eos}

Question: {prompt}
Answer:"""


def gsm8k(data_dir) -> Task:
    """7,473 problems, 5 % of them for validation, and 1,319 for test (arXiv 2110.14168)."""
    splits = {}
    for name, sha256 in GSM8K_SHA256.items():
        path = Path(data_dir or "data/gsm8k") / name
        download(GSM8K_URL + name, path, sha256)
        splits[name] = []
        for row in read_jsonl(path, {"question": is_text, "answer": is_text}):
            worked, _, answer = row["answer"].rpartition("####")
            difficulty = f"lines {len(worked.strip().splitlines())}"
            answer = answer.strip().replace(",", "")
            splits[name].append(Problem(row["question"], answer, difficulty))
    validation, train = hold_out(splits["train.jsonl"], 0.05)
    return Task(
        "gsm8k", train, validation, splits["test.jsonl"], "number", GSM8K_SYSTEM, GSM8K_TEMPLATE
    )


TASKS = {"add": add, "countdown": countdown, "gsm8k": gsm8k}
PLAIN_NUMBER = re.compile(  # -1,012.5, 1 012, +75, .5, 1e-07
    r"\s*[-+\u2212]?(([0-9]+|[0-9]{1,3}([,' \u00a0\u2009\u202f\u2019][0-9]{3})+)(\.[0-9]+)?"
    r"|\.[0-9]+)([eE][-+]?[0-9]{1,3})?\s*"
)


def load_task(name, data_dir="") -> Task:
    """A task by its name in TASKS, or from a .jsonl file, whose rule is `number` if all answers are
    plain numbers, else `exact`. UserError: no such task, a bad line."""
    if name in TASKS:
        return TASKS[name](data_dir)
    if not name.endswith(".jsonl"):
        raise UserError(f"--task {name}: not one of {', '.join(TASKS)}, nor a .jsonl file")
    problems = []
    for row in read_problems(Path(name)):
        columns = {key: row[key] for key in row if key not in ("prompt", "answer")}
        difficulty = str(row.get("difficulty", ""))
        problems.append(Problem(row["prompt"], row["answer"], difficulty, columns))
    numbers = [problem for problem in problems if PLAIN_NUMBER.fullmatch(problem.answer or "")]
    task = split(name, problems, "number" if numbers == problems else "exact")
    guess = f"{len(numbers)} of {len(problems)} answers are plain numbers"
    return replace(task, rule_guess=guess)


# -------------------------------------------------------------------------------------------------
# How a model is prompted


def prompt_ids(task, problem, tokenizer) -> list[int]:
    """The token ids that the model gets."""
    [ids] = encode([prompt_text(task, problem, tokenizer)], tokenizer)
    return ids


def prompt_text(task, problem, tokenizer) -> str:
    """The text that the model gets, by the tokenizer's chat template or by task.template."""
    prompt = problem.prompt
    is_chat = isinstance(prompt, list)
    if tokenizer.chat_template is None:
        for name in problem.columns.keys() & TEMPLATE_COLUMNS:
            raise UserError(f'a row has "{name}", but the model\'s tokenizer has no chat template')
        if is_chat:
            raise UserError(
                "the prompt is a list of chat messages, but the model's tokenizer has no chat "
                "template: give prompts as text, or use a chat model"
            )
        return task.template.replace("{eos}", tokenizer.eos_token).replace("{prompt}", prompt)

    messages = prompt if is_chat else [{"role": "user", "content": prompt}]
    if task.system and not is_chat:
        messages = [{"role": "system", "content": task.system}, *messages]
    return chat_text(messages, problem.columns, tokenizer)


@phase("measuring the lengths of prompts")
def longest_prompts(task, problems, tokenizer):
    """Token ids of the longest prompts, longest first, and at the end those of the shortest."""
    found = []
    size = 1000
    starts = range(0, len(problems), size)
    for start in tqdm(starts, "reading prompts", leave=False, disable=len(problems) <= 10_000):
        batch = problems[start : start + size]
        found += encode([prompt_text(task, problem, tokenizer) for problem in batch], tokenizer)
        found.sort(key=len, reverse=True)
        found = found[:63] + found[63:][-1:]
    return found
