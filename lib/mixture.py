"""Reward expressions: reads "number + 0.2*format", calls its parts on every response, adds them up.

The text is parsed with `ast` and never run as Python. This file knows no reward: the caller brings
the names and their functions.
"""

import ast
import inspect
import math
import operator
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


def parse_mixture(text: str, rules: dict, makers: dict) -> Mixture:
    """'number + 0.2*format' -> Mixture. UserError where the syntax is not supported.

    rules:    {"number": function}
    makers:   {"model": function}, which makes a part from a string, for model("runs/rm")
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
                function = own_function(module, name)
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


def own_function(module: str, name: str) -> Callable:
    """The function `name` of module.py in the current folder. UserError if it is not there."""
    where = f"--reward {module}.{name}"
    path = Path(f"{module}.py").resolve()
    if not path.exists():
        raise UserError(f"{where}: there is no {module}.py in the current folder")
    try:
        function = runpy.run_path(str(path)).get(name)
    except Exception as error:  # the user's file may raise anything
        raise UserError(f"{where}: {path} raised {name_error(error)}") from error
    if not callable(function):
        raise UserError(f"{where}: there is no function {name} in {path}")
    return function


def evaluate_mixture(mixture: Mixture, values: dict) -> list[float]:
    """'number + 0.2*format', {"number": [1, 0], "format": [1, 1]} -> [1.2, 0.2]"""

    def value_of(node: ast.expr):
        if isinstance(node, ast.Constant):
            return float(node.value)
        return torch.tensor(values[ast.unparse(node)], dtype=torch.float64)

    return arithmetic(mixture.tree, value_of, SIGNED).tolist()


def call_part(part: str, function: Callable, rows: list[dict], limit: int) -> list[float]:
    """The value of one part for each row.

    rows:  {"prompt", "response", "answer"} each, and "length" if it is known
    limit: most tokens of a response. A function with a parameter `length` or `limit` gets that
           number too. One whose first parameter is `prompts` is called once, with three lists.
    UserError names the row for which the function raised, or returned no finite number.
    """
    texts = [[row[name] for row in rows] for name in ("prompt", "response", "answer")]
    parameters = list(inspect.signature(function).parameters)
    extra = [name for name in ("length", "limit") if name in parameters]
    if extra and not all(isinstance(row.get("length"), int) for row in rows):
        reason = "looks at the number of tokens (length), which is not given here"
        raise UserError(f"--reward {part}: {reason}")

    def error_at(i: int, reason: str) -> UserError:
        prompt, response = shorten(rows[i]["prompt"], 100), shorten(rows[i]["response"], 100)
        return UserError(f"--reward {part}: {reason} (prompt: {prompt}; response: {response})")

    i = 0
    values = []
    try:
        if parameters[:1] == ["prompts"]:
            values = list(function(*texts))
        else:
            for i, arguments in enumerate(zip(*texts)):
                numbers = {"length": rows[i].get("length"), "limit": limit}
                values.append(function(*arguments, **{name: numbers[name] for name in extra}))
    except Exception as error:  # a function of the user's may raise anything
        raise error_at(i, f"raised {name_error(error)}") from error

    if len(values) != len(rows):
        count = f"returned {len(values)} values for {len(rows)} responses"
        raise error_at(0, f"{count}, the first")
    for i, value in enumerate(values):
        if not is_finite(value):
            raise error_at(i, f"returned {shorten(repr(value), 50)}, not a finite number")
    return [float(value) for value in values]


def is_finite(value) -> bool:
    try:
        return math.isfinite(value)
    except Exception:  # text, a list, 10**400
        return False
