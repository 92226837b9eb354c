"""How a frozen dataclass becomes the flags of a script, and how a user's mistake becomes one sentence.

Every script ends in `run_script(main, Config, __doc__)`. HfArgumentParser (transformers) does the parsing.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser


class UserError(Exception):
    """A mistake of the user's: one sentence with the flag, the value and the cure. run_script exits with 2 on it."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the docstring, one spelling of each flag, and the default of every flag that has one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30)

    def _get_help_string(self, action):
        return action.help if action.default in (None, "") else super()._get_help_string(action)

    def _format_action_invocation(self, action):
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        kind = {int: "N", float: "X"}.get(action.type, "") or ("" if action.choices or action.nargs == "?" else "TEXT")
        return f"{action.option_strings[0]} {kind or '|'.join(map(str, action.choices or []))}"


def parse(
    config_class: type,
    doc: str,
    argv: list[str] | None = None,
    fill: Callable[[dict], dict] | None = None,
    **positionals: dict,
) -> tuple[Any, dict]:
    """argv -> (config, positional arguments by name).

    fill:        from the flags that the user gave to values for flags that the user did not give (presets, recipes)
    positionals: name -> arguments of `ArgumentParser.add_argument`
    Exits with 2 and one line on an unknown flag or a value of the wrong type; raises UserError where `fill` does.
    """
    parser = HfArgumentParser(
        config_class,
        prog=Path(sys.argv[0]).name,
        description=doc,
        usage=argparse.SUPPRESS,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    for name, options in positionals.items():
        parser.add_argument(name, **options)
    values = vars(parser.parse_args(argv))
    named = {name: values.pop(name) for name in positionals}
    if fill:
        parser.argument_default = argparse.SUPPRESS
        for action in parser._actions:
            action.default = argparse.SUPPRESS  # what is in the namespace now was on the command line
        given = vars(parser.parse_args(argv))
        values |= {name: value for name, value in fill(given).items() if name in values and name not in given}
    return config_class(**values), named


def run_script(main: Callable, config_class: type, doc: str, fill: Callable | None = None, **positionals: dict) -> None:
    """Parses sys.argv, calls main(config, **positionals) and turns a UserError into one line and exit status 2."""
    try:
        config, named = parse(config_class, doc, None, fill, **positionals)
        main(config, **named)
        sys.stdout.flush()
    except BrokenPipeError:  # as in `... | head -1`: nobody reads on, not even what the flush at the end would write
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
