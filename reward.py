"""What a response is worth: a rule, a heuristic, a learned model, your own function, or a mixture of them.

    python train.py --reward number                                  # a rule: a name in rules.py
    python train.py --reward "number + 0.2*format - 0.001*length"    # a mixture: + - * and parentheses
    python train.py --reward my_rewards.politeness                   # yours: def politeness(prompt, response, answer)
    python train.py --reward 'number * (1 + 0.5*model("runs/rm"))'   # gated: wrong never outranks right
    python reward.py --reward "number + 0.2*format" responses.jsonl  # scores a file, shows every part

A file of yours stands in the current folder. A function whose first parameter is called `prompts` gets the whole batch,
as three lists, and returns a list; any other gets one response and returns a number.
"""

import ast
import importlib.util
import inspect
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.hf_argparser import HfArg

from flags import UserError, first_line, named, need, run_script
from policy import UNREADABLE, context_length, pick_device
from rules import OPERATORS, REWARDS, arithmetic, contains, matches
from tasks import is_answer, is_prompt, read_jsonl
from track import shorten
from update import micro_batches


class RewardModel:
    """A learned judge: any Hugging Face model for sequence classification with one output, and its tokenizer.

    bounded: sigmoid(score - mean score of the answers preferred in its training), in (0, 1), instead of the raw score
    """

    def __init__(self, name: str, device: torch.device, bounded: bool = True, **options):
        """options: for from_pretrained. UserError: nothing there to load, or not one output."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self.model = AutoModelForSequenceClassification.from_pretrained(
                name, dtype=dtype, use_safetensors=True, trust_remote_code=False, **options)
        except UNREADABLE as error:
            raise UserError(f'model("{name}"): cannot be loaded as a reward model: {first_line(error)}') from None
        if self.model.config.num_labels != 1:
            raise UserError(f'model("{name}"): has {self.model.config.num_labels} outputs, a reward model has one; '
                            "train_reward.py makes one of a language model")
        self.model.to(device).eval()
        self.special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        self.bounded, self.mean_chosen = bounded, getattr(self.model.config, "mean_chosen_score", 0.0)

    def ids(self, prompt: str | list, response: str) -> list[int]:
        """The tokens of an exchange: by the model's own chat template, or without one prompt, response, end of text.

        A response that spells out special tokens (the end of its turn, praise from the user) must not get them."""
        for token in self.special:
            response = response.replace(token, " ")
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        if self.tokenizer.chat_template:
            return self.tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": response}],
                                                      return_dict=False)
        text = "\n".join(turn["content"] for turn in turns) + response
        ids, end = self.tokenizer(text)["input_ids"], [self.tokenizer.eos_token_id]
        return ids if end in ([None], ids[-1:]) else ids + end  # some tokenizers have none, or add it by themselves

    def scores(self, rows: list[list[int]], tokens: int = 16384) -> Tensor:
        """B rows of token ids -> (B,) float32 raw scores, in batches of at most so many tokens, padding included."""
        rows = [row[-(context_length(self.model) or len(row)) :] for row in rows]
        lengths = torch.tensor([len(row) for row in rows])
        # The head reads the last token that is not padding, and finds it by its id, which may equal that of the end of
        # text. So padding is a token that no row holds.
        used = {token for row in rows for token in row}
        padding = next(token for token in range(len(used) + 1) if token not in used)
        self.model.config.get_text_config().pad_token_id = padding
        batches, scores = micro_batches(lengths, tokens), []
        for batch in batches:
            ids = torch.full((len(batch), int(lengths[batch].max())), padding)
            for i, row in enumerate(batch.tolist()):
                ids[i, : lengths[row]] = torch.tensor(rows[row])
            mask = torch.arange(ids.shape[1]) < lengths[batch, None]
            logits = self.model(ids.to(self.model.device), attention_mask=mask.long().to(self.model.device)).logits
            scores.append(logits[:, 0].float())
        return torch.cat(scores)[torch.cat(batches).argsort().to(self.model.device)]

    @torch.no_grad()
    def __call__(self, prompts: list, responses: list[str], answers: list[str]) -> list[float]:
        scores = self.scores([self.ids(*row) for row in zip(prompts, responses)])
        return (torch.sigmoid(scores - self.mean_chosen) if self.bounded else scores).tolist()


@dataclass(frozen=True)
class Reward:
    """A mixture: its expression, the function of each part by the part's own words, and how slow ones are called."""

    tree: ast.expr
    parts: dict[str, Callable]
    workers: int = 0  # threads that call the user's functions, 0 for none
    timeout: float = 0.0  # seconds that a thread's call may take
    missed: float = 0.0  # what a call that takes longer counts as


def load_reward(text: str, device: torch.device | str = "cpu", workers: int = 0, timeout: float = 0.0,
                missed: float = 0.0) -> Reward:
    """'number + 0.2*format' -> Reward. Read with ast, never with eval. UserError for what is not in the language."""
    device, parts = torch.device(device), {}
    makers = {"regex": matches, "contains": contains, "model": lambda name: RewardModel(name, device),
              "raw_model": lambda name: RewardModel(name, device, bounded=False)}

    def leaf(node: ast.expr) -> float:
        match node:
            case ast.Constant(value=value) if type(value) in (int, float) and math.isfinite(value):
                return 0.0
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return arithmetic(operand, leaf, OPERATORS)
            case ast.Name(id=name) if name in REWARDS:
                part = REWARDS[name]
            case ast.Attribute(value=ast.Name(id=module), attr=name):
                part = own_function(module, name)
            case ast.Call(func=ast.Name(id=name), args=[ast.Constant(value=str(text))], keywords=[]) if name in makers:
                part = makers[name](text)
            case _:
                raise UserError(f"--reward {ast.unparse(node)}: not one of {', '.join(REWARDS)}, module.name, "
                                f"{', '.join(f'{name}(...)' for name in makers)}, a number, + - *")
        parts[ast.unparse(node)] = part
        return 0.0

    try:
        tree = ast.parse(text.strip(), mode="eval").body
        arithmetic(tree, leaf, OPERATORS)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"--reward {shorten(text)}: cannot be read: {first_line(error)}") from None
    if not parts:
        raise UserError(f"--reward {text}: nothing in it looks at the response")
    return Reward(tree, parts, workers, timeout, missed)


def own_function(module: str, name: str) -> Callable:
    """The function `name` of module.py in the current folder. UserError if it is not there."""
    path = Path(f"{module}.py").resolve()
    if not path.exists():
        raise UserError(f"--reward {module}.{name}: there is no {module}.py in the current folder")
    spec = importlib.util.spec_from_file_location(module, path)
    loaded = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(loaded)
    except Exception as error:  # the user's file may raise anything
        raise UserError(f"--reward {module}.{name}: {path} raised {named(error)}") from error
    if not callable(getattr(loaded, name, None)):
        raise UserError(f"--reward {module}.{name}: there is no function {name} in {path}")
    return getattr(loaded, name)


def score(reward: Reward, prompts: list, responses: list[str], answers: list[str], lengths: list[int] | None = None,
          limit: int = 0) -> tuple[list[float], dict[str, list[float]]]:
    """B rows, the tokens of each response and the most they may have -> B rewards, and B values of each part.

    UserError that names the sample: a part raised, or returned what is no finite number, or too few or too many values;
    or it looks at the tokens, and `lengths` is None.
    """
    columns = {"prompt": prompts, "response": responses, "answer": answers}
    if lengths is not None:
        columns |= {"length": lengths, "limit": [limit] * len(lengths)}
    parts = {part: values_of(part, function, columns, reward) for part, function in reward.parts.items()}

    def leaf(node: ast.expr) -> Tensor | float:
        if isinstance(node, ast.UnaryOp):
            return -arithmetic(node.operand, leaf, OPERATORS)
        if isinstance(node, ast.Constant):
            return node.value
        return torch.tensor(parts[ast.unparse(node)], dtype=torch.float64)

    totals = arithmetic(reward.tree, leaf, OPERATORS).tolist()
    for total, response in zip(totals, responses):
        if not abs(total) < 1e15:  # squares must fit into float32
            raise UserError(f"--reward: {total:g} is too large a number (response: {shorten(response, 100)})")
    return totals, parts


def values_of(part: str, function: Callable, columns: dict[str, list], reward: Reward) -> list[float]:
    """One part's value of each row."""
    prompts, responses, answers = (columns[name] for name in ("prompt", "response", "answer"))
    def sample(i: int) -> str:
        return f"(prompt: {shorten(prompts[i], 100)}; response: {shorten(responses[i], 100)})"

    def call(i: int, function: Callable):
        try:
            return function()
        except Exception as error:  # the user's function may raise anything: the sample that did it must be named
            raise UserError(f"--reward {part}: raised {named(error)} {sample(i)}") from error

    def one(i: int):
        return call(i, lambda: function(prompts[i], responses[i], answers[i], **{k: columns[k][i] for k in counted}))

    n, parameters = len(prompts), list(inspect.signature(function).parameters)
    counted = [name for name in ("length", "limit") if name in parameters]
    if counted and "length" not in columns:
        raise UserError(f"--reward {part}: looks at the number of tokens (length), which is not given here")
    if parameters[:1] == ["prompts"]:
        values = call(0, lambda: list(function(prompts, responses, answers)))
        if len(values) != n:
            raise UserError(f"--reward {part}: returned {len(values)} values for {n} responses, the first {sample(0)}")
    else:
        values = in_threads(one, reward, part, n) if reward.workers else [one(i) for i in range(n)]
    for i, value in enumerate(values):
        with suppress(TypeError, ValueError, OverflowError):
            if math.isfinite(value):
                continue
        raise UserError(f"--reward {part}: returned {shorten(repr(value), 50)}, not a finite number {sample(i)}")
    return [float(value) for value in values]


def in_threads(call: Callable, reward: Reward, part: str, n: int) -> list:
    """[call(0), ..., call(n - 1)], some at a time, with the stated value for a call that takes too long.

    A thread cannot be stopped: a late one is left to itself, and its place goes to the next call. As a daemon it does
    not keep the program alive either, as those of a ThreadPoolExecutor would."""
    def work(future: Future, i: int) -> None:
        try:
            future.set_result(call(i))
        except UserError as error:
            future.set_exception(error)

    values, late, waiting, running = [reward.missed] * n, 0, list(range(n))[::-1], {}
    while waiting or running:
        while waiting and len(running) < reward.workers:
            i, future = waiting.pop(), Future()
            running[future] = i, time.monotonic() + reward.timeout
            threading.Thread(target=work, args=(future, i), daemon=True).start()
        wait(running, max(0.0, min(end for _, end in running.values()) - time.monotonic()), FIRST_COMPLETED)
        for future, (i, end) in list(running.items()):
            if future.done():
                values[i] = future.result()
            elif time.monotonic() >= end:
                late += 1
            else:
                continue
            del running[future]
    if late:
        tqdm.write(f"--reward {part}: {late} of {n} calls took over {reward.timeout:g} s: they count {reward.missed:g}")
    return values


def read_samples(path: Path) -> tuple[list, list[str], list[str], list[int] | None]:
    """A .jsonl of samples -> prompts, responses, answers, and lengths in tokens if each line has one."""
    rows = read_jsonl(path, {"prompt": is_prompt, "response": lambda text: isinstance(text, str), "answer": is_answer})
    prompts, responses, lengths = ([row.get(field) for row in rows] for field in ("prompt", "response", "length"))
    known = all(isinstance(length, int) for length in lengths)
    return prompts, responses, [str(row["answer"]) for row in rows], lengths if known else None


@dataclass(frozen=True)
class Config:
    reward: str = HfArg(default="number", help="what to score with")
    limit: int = HfArg(default=512, help="tokens after which responses were cut: `overlong` looks at it")


def main(config: Config, file: str) -> None:
    need(config, 1, "limit")
    reward = load_reward(config.reward, pick_device("auto"))
    prompts, responses, answers, lengths = read_samples(Path(file))
    totals, parts = score(reward, prompts, responses, answers, lengths, config.limit)
    table = {"reward": totals} | (parts if list(parts) != [config.reward] else {})
    print("  ".join(f"{name:>10}" for name in table), " response")
    for i, response in enumerate(responses):
        print("  ".join(f"{values[i]:{max(10, len(name))}.3f}" for name, values in table.items()),
              f" {shorten(response, 80)}")
    print("  ".join(f"{sum(values) / len(values):{max(10, len(name))}.3f}" for name, values in table.items()), " mean")


if __name__ == "__main__":
    run_script(main, Config, __doc__, file=dict(help="a run's samples.jsonl, or lines of prompt, response and answer"))
