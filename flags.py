"""How a frozen dataclass becomes the flags of a script, and how a user's mistake becomes one sentence.

Every script ends in `run_script(main, Config, __doc__)`. HfArgumentParser (transformers) does the parsing.
"""

import argparse
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG,
        errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY}


class UserError(Exception):
    """A mistake of the user's: one sentence with the flag, the value and the cure. run_script exits with 2 on it."""


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def named(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def is_text(text: str) -> bool:
    """Whether it can be encoded: half a surrogate pair cannot, and so neither be tokenised nor printed."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def need(config: Any, least: float, flags: str, most: float = 1e12) -> None:
    """UserError unless each of the flags, named with spaces between, is a number from `least` to `most`."""
    for flag in flags.split():
        value = getattr(config, flag)
        if not value >= least:  # nan too
            raise UserError(f"--{flag} {value}: must be at least {least:g}")
        if value > most:
            raise UserError(f"--{flag} {value}: must be at most {most:g}")


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
    for name, value in values.items():
        if isinstance(value, str) and not is_text(value):
            raise UserError(f"{name} {value!a}: is not UTF-8")
    named = {name: values.pop(name) for name in positionals}
    if fill:
        parser.argument_default = argparse.SUPPRESS
        for action in parser._actions:
            action.default = argparse.SUPPRESS  # what is in the namespace now was on the command line
        given = vars(parser.parse_args(argv))
        values |= {name: value for name, value in fill(given).items() if name in values and name not in given}
    return config_class(**values), named


def run_script(main: Callable, config_class: type, doc: str, fill: Callable | None = None, **positionals: dict) -> None:
    """Parses sys.argv, calls main(config, **positionals) and turns a UserError into one line and exit status 2; so too
    a disk or a memory that is full, which may show anywhere. Ctrl-C ends it without a traceback, with status 130."""
    try:
        config, named = parse(config_class, doc, None, fill, **positionals)
        main(config, **named)
        sys.stdout.flush()
        return
    except BrokenPipeError:  # as in `... | head -1`: nobody reads on, not even what the flush at the end would write
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in DISK:
            raise
        message = f"{error.filename or 'a file'}: {error.strerror}: make room, or choose another place"
    except (MemoryError, RuntimeError) as error:  # torch knows several words for it
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        message = f"the memory does not suffice ({first_line(error)}): lower what is done at once, see --help"
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(2)
