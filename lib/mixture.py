"""Reward expressions: reads "number + 0.2*format", calls its parts on every response, adds them up.

The text is parsed with `ast` and never run as Python. This file knows no reward: the caller brings
the names and their functions.
"""

import ast
import inspect
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lib.flags import UserError, first_line, name_error, shorten

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
SIGNED = OPERATORS | {ast.USub: operator.neg}  # the minus of -number


@dataclass(frozen=True)
class Mixture:
    tree: ast.expr
    parts: dict[str, Callable]  # {"number": its function, "format": its function}


def arithmetic(node: ast.expr, leaf: Callable, operators: dict):
    """The value of a parsed expression. `leaf` gives the value of a node without an operator.

    3 * (4 + 1), where leaf reads numbers -> 15
    """
    operation = operators.get(type(getattr(node, "op", None)))
    if operation is None:
        return leaf(node)
    if isinstance(node, ast.UnaryOp):
        return operation(arithmetic(node.operand, leaf, operators))
    left = arithmetic(node.left, leaf, operators)
    right = arithmetic(node.right, leaf, operators)
    return operation(left, right)


def parse_mixture(text: str, rules: dict, makers: dict, load_own: Callable) -> Mixture:
    """'number + 0.2*format' -> Mixture. UserError where the syntax is not supported.

    rules:    {"number": function}
    makers:   {"model": function}, which makes a part from a string, for model("runs/rm")
    load_own: gets "my_rewards" and "politeness", for my_rewards.politeness
    """
    calls = [f"{name}(...)" for name in makers]
    known = ", ".join([*rules, "module.name", *calls, "a number", "+ - *"])
    parts = {}

    def add_part(node: ast.expr) -> float:
        match node:
            case ast.Constant(value) if type(value) in (int, float) and is_finite(value):
                return 0.0
            case ast.Name(name) if name in rules:
                function = rules[name]
            case ast.Attribute(ast.Name(module), name):
                function = load_own(module, name)
            case ast.Call(ast.Name(name), [ast.Constant(str(word))], []) if name in makers:
                function = makers[name](word)
            case _:
                raise UserError(f"--reward {ast.unparse(node)}: not one of {known}")
        parts[ast.unparse(node)] = function
        return 0.0  # no value yet: this pass only collects the parts

    try:
        tree = ast.parse(text.strip(), mode="eval").body
        arithmetic(tree, add_part, SIGNED)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        message = f"--reward {shorten(text)}: cannot be read: {first_line(error)}"
        raise UserError(message) from None
    if not parts:
        raise UserError(f"--reward {text}: nothing in it looks at the response")
    return Mixture(tree, parts)


def evaluate_mixture(mixture: Mixture, values: dict) -> list[float]:
    """'number + 0.2*format', {"number": [1, 0], "format": [1, 1]} -> [1.2, 0.2]"""

    def value_of(node: ast.expr):
        if isinstance(node, ast.Constant):
            return float(node.value)
        return torch.tensor(values[ast.unparse(node)], dtype=torch.float64)

    return arithmetic(mixture.tree, value_of, SIGNED).tolist()


def call_part(part: str, function: Callable, columns: dict) -> list[float]:
    """The value of one part for each row.

    columns: {"prompt": [...], "response": [...], "answer": [...]}, and if known length and limit,
             which a function gets if it has parameters of that name. A function whose first
             parameter is `prompts` is called once, with the first three columns as lists.
    UserError names the row for which the function raised, or returned no finite number.
    """
    texts = [columns[name] for name in ("prompt", "response", "answer")]
    prompts, responses, _ = texts
    parameters = list(inspect.signature(function).parameters)
    extra = [name for name in ("length", "limit") if name in parameters]
    if extra and "length" not in columns:
        reason = "looks at the number of tokens (length), which is not given here"
        raise UserError(f"--reward {part}: {reason}")

    def error_at(row: int, reason: str) -> UserError:
        sample = f"prompt: {shorten(prompts[row], 100)}; response: {shorten(responses[row], 100)}"
        return UserError(f"--reward {part}: {reason} ({sample})")

    row = 0
    values = []
    try:
        if parameters[:1] == ["prompts"]:
            values = list(function(*texts))
        else:
            for row, arguments in enumerate(zip(*texts)):
                options = {name: columns[name][row] for name in extra}
                values.append(function(*arguments, **options))
    except Exception as error:  # a function of the user's may raise anything
        raise error_at(row, f"raised {name_error(error)}") from error

    n = len(responses)
    if len(values) != n:
        raise error_at(0, f"returned {len(values)} values for {n} responses, the first")
    for row, value in enumerate(values):
        if not is_finite(value):
            raise error_at(row, f"returned {shorten(repr(value), 50)}, not a finite number")
    return [float(value) for value in values]


def is_finite(value) -> bool:
    try:
        return math.isfinite(value)
    except Exception:  # text, a list, 10**400
        return False
