"""Reward expressions: reads "number + 0.2*format", calls its parts on every response, adds them up.

The text is parsed with `ast` and never run as Python. This file knows no reward: the caller brings
the names and their functions.
"""

import ast
import inspect
import math
import operator
import runpy
import traceback
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from lib.flags import UserError, did_you_mean, first_line, name_error, shorten

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
TEXTS = "prompt", "response", "answer"  # the first parameters of a function
EXTRA = "length", "limit", "tokens"  # what a function gets where it has such a parameter
NO_DEFAULT = inspect.Parameter.empty
SIGNED = OPERATORS | {ast.USub: operator.neg}  # the minus of -number


@dataclass(frozen=True)
class Mixture:
    tree: ast.expr
    parts: dict  # {"number": its function, "format": its function}

    @property
    def wants_tokens(self) -> bool:
        return any("tokens" in parameters_of(function) for function in self.parts.values())

    @property
    def sees_groups(self) -> bool:
        """Whether one of one's own functions is called once for all responses: it may compare
        those to the same prompt."""
        own = filter(inspect.isfunction, self.parts.values())
        return any(parameters_of(function)[:1] == ["prompts"] for function in own)


def parameters_of(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def columns_of(function) -> dict:
    """Its parameters after the three texts that get a column of the data: name -> its default. With
    NO_DEFAULT the column must be there."""
    parameters = list(inspect.signature(function).parameters.values())[len(TEXTS) :]
    open_ended = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    named = [one for one in parameters if one.kind not in open_ended and one.name not in EXTRA]
    return {one.name: one.default for one in named}


def takes_all_columns(function) -> bool:
    """def mine(prompt, response, answer, **columns) -> True"""
    parameters = inspect.signature(function).parameters.values()
    return any(one.kind is one.VAR_KEYWORD for one in parameters)


def check_columns(part, function, columns):
    """UserError if one of the rows lacks a column that the function must get, or has one with the
    name of something else that it gets.

    columns: for each row, name -> value"""
    for name in set(EXTRA).intersection(parameters_of(function)):
        if any(name in row for row in columns):
            raise UserError(
                f"--reward {part}: its parameter `{name}` is about the response, but the problems "
                f'have a column "{name}" too: give the column another name'
            )
    for name, default in columns_of(function).items():
        for number, row in enumerate(columns, 1):
            if default is NO_DEFAULT and name not in row:
                lacks = f'problem {number} has no column "{name}"'
                raise UserError(f"--reward {part}: has a parameter `{name}`, but {lacks}")


def arithmetic(node, leaf, operators):
    """The value of a parsed expression. `leaf` gives the value of a node without an operator.

    3 * (4 + 1), where leaf reads numbers -> 15
    """
    operation = operators.get(type(getattr(node, "op", None)))
    if operation is None:
        return leaf(node)
    operands = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
    return operation(*[arithmetic(operand, leaf, operators) for operand in operands])


def parse_mixture(text, rules, makers) -> Mixture:
    """'number + 0.2*format' -> Mixture. UserError where the syntax is not supported.

    rules:    {"number": function}
    makers:   {"model": function}, which makes a part from a string, for model("runs/rm")
    """
    calls = [f'{name}("...")' for name in makers]
    known = ", ".join([*rules, "module.name", *calls, "a number", "+ - *"])
    parts = {}

    def add_part(node):
        match node:
            case ast.Constant(value) if type(value) in (int, float) and is_finite(value):
                return 0.0
            case ast.Name(name) if name in rules:
                function = rules[name]
            case ast.Attribute(module, name) if is_dotted(module):
                function = own_function(ast.unparse(module), name)
            case ast.Call(ast.Name(name), [ast.Constant(str(word))], []) if name in makers:
                function = makers[name](word)
            case ast.Call(ast.Name(name)) if name in makers:
                example = f'text in quotes, as in {name}("runs/rm")'
                raise UserError(f"--reward {ast.unparse(node)}: needs one {example}")
            case _:
                word = ast.unparse(node)
                near = did_you_mean(word, rules)
                raise UserError(f"--reward {word}: not one of {known}{near and f': {near}'}")
        parts[ast.unparse(node)] = function
        return 0.0  # no value yet: this pass only collects the parts

    try:
        tree = ast.parse(text.strip(), mode="eval").body
        arithmetic(tree, add_part, SIGNED)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"--reward {shorten(text)}: cannot be read: {first_line(error)}") from None
    if not parts:
        raise UserError(f"--reward {text}: nothing in it looks at the response")
    return Mixture(tree, parts)


@lru_cache
def run_file(path, content) -> dict:
    """The names of a file, which is run once for all parts that come from it. content: a file that
    was edited is run again"""
    return runpy.run_path(str(path))


def is_dotted(node) -> bool:
    """Whether an expression is a name, or names with dots between: folder.module"""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def own_function(module, name):
    """The function `name` of module.py in the current folder, or for folder.module of a file in a
    folder. UserError if it is not there."""
    where = f"--reward {module}.{name}"
    file = f"{module.replace('.', '/')}.py"
    path = Path(file).resolve()
    if not path.exists():
        raise UserError(f"{where}: there is no {file} in the current folder")
    try:
        function = run_file(path, path.read_bytes()).get(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's file may raise anything, SystemExit too
        raise UserError(f"{where}: {path} raised {name_error(error)}{place_of(error)}") from error
    try:
        first = parameters_of(function)[: len(TEXTS)]
    except (TypeError, ValueError):  # not a function, or a built-in such as max
        raise UserError(
            f"{where}: there is no function {name} in {path}, or it is a built-in one"
        ) from None
    # they are passed by their place, so another order would mix them up in silence
    for place, parameter in enumerate(first):
        text = parameter.removesuffix("s")
        if text in TEXTS and place != TEXTS.index(text):
            raise UserError(
                f"{where}: its first parameters are ({', '.join(first)}), and must be "
                f"({', '.join(TEXTS)})"
            )
    return function


def evaluate_mixture(mixture, values) -> list[float]:
    """'number + 0.2*format', {"number": [1, 0], "format": [1, 1]} -> [1.2, 0.2]"""

    def value_of(node):
        if isinstance(node, ast.Constant):
            return float(node.value)
        return torch.tensor(values[ast.unparse(node)], dtype=torch.float64)

    return arithmetic(mixture.tree, value_of, SIGNED).tolist()


def evaluate_tokens(mixture, values) -> list[float] | None:
    """The mixture for each token of one response. What is a number for the whole response is spread
    evenly where it is added, and is a factor where it multiplies. None: nothing is per token.

    'number + 2*mine.steps', {"number": 1.0, "mine.steps": [0.0, 0.5]} -> [0.5, 1.5]
    """

    def value_of(node):
        value = node.value if isinstance(node, ast.Constant) else values[ast.unparse(node)]
        is_list = isinstance(value, list)
        return torch.tensor(value, dtype=torch.float64) if is_list else float(value)

    def spread(operation):
        def apply(*operands):
            count = max(len(one) for one in operands if torch.is_tensor(one))
            return operation(*(one if torch.is_tensor(one) else one / count for one in operands))

        def either(*operands):
            return (apply if any(map(torch.is_tensor, operands)) else operation)(*operands)

        return either

    added = {kind: spread(SIGNED[kind]) for kind in (ast.Add, ast.Sub)}
    found = arithmetic(mixture.tree, value_of, SIGNED | added)
    return found.tolist() if torch.is_tensor(found) else None


def call_part(part, function, rows, limit) -> list[float | list[float]]:
    """The value of one part for each row: a number, or a list with one for each token, whose value
    is their sum.

    rows:  {"prompt", "response", "answer"} each, and "length" and "tokens" (texts) if known
    limit: most tokens of a response. A function with a parameter `length`, `tokens` or `limit` gets
           that too, and only one with `tokens` may return a list. Another parameter gets the
           column of its name, of row["columns"], and **others all that are left.
           A function whose first parameter is `prompts` is called once, with three lists, and
           lists of the others too; a row without a column gets the default of the parameter.
    UserError names the row for which the function raised, or returned no finite number.
    """
    names = parameters_of(function)
    for name in ("length", "tokens"):
        if name in names and any(row.get(name) is None for row in rows):
            raise UserError(f"--reward {part}: looks at `{name}`, which is not given here")

    def error_at(i, reason):
        prompt = shorten(rows[i]["prompt"], 100)
        response = shorten(rows[i]["response"], 100)
        return UserError(f"--reward {part}: {reason} (prompt: {prompt}; response: {response})")

    columns = [row.get("columns", {}) for row in rows]
    check_columns(part, function, columns)
    wanted = columns_of(function)
    if takes_all_columns(function):
        wanted |= {name: None for row in columns for name in row if name not in names}
    # copies: a function may change the list of messages that is its prompt
    texts = [[deepcopy(row[name]) for row in rows] for name in ("prompt", "response", "answer")]

    def call(row, others, *texts):
        known = {**row, "limit": limit}
        more = {name: known[name] for name in EXTRA if name in names}
        more |= {name: deepcopy(others[name]) for name in wanted if name in others}
        return function(*texts, **more)

    values = []
    try:
        if names[:1] == ["prompts"]:
            more = {}
            for name, default in wanted.items():
                if any(name in row for row in columns):
                    more[name] = [deepcopy(row.get(name, default)) for row in columns]
            for name in set(EXTRA).intersection(names):
                more[name] = limit if name == "limit" else [row[name] for row in rows]
            found = function(*texts, **more)
            if isinstance(found, (dict, set, str)):
                raise error_at(0, f"returned a {type(found).__name__}, not a list, the first")
            found = list(found)
            if len(found) != len(rows):
                reason = f"returned {len(found)} values for {len(rows)} responses, the first"
                raise error_at(0, reason)
        else:
            found = map(call, rows, columns, *texts)
        for i, value in enumerate(found):
            # [] is not the list of a row without texts of its tokens
            tokens = rows[i].get("tokens")
            per_token = isinstance(value, list) and tokens and len(value) == len(tokens)
            if not is_finite(sum(value) if per_token else value):
                raise error_at(i, f"returned {shorten(repr(value), 50)}, not a finite number")
            values.append([*map(float, value)] if per_token else float(value))
    except (KeyboardInterrupt, UserError):
        raise
    except BaseException as error:  # a function of the user's may raise anything
        reason = f"raised {name_error(error)}{place_of(error)}"
        raise error_at(len(values), reason) from error
    return values


def place_of(error) -> str:
    """' in my_rewards.py, line 7': the last place in a file of the current folder, or ''."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).parent == Path.cwd()]
    return f" in {Path(own[-1].filename).name}, line {own[-1].lineno}" if own else ""


def is_finite(value):
    try:
        return math.isfinite(value)
    except Exception:  # text, a list, 10**400
        return False
