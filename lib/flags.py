"""A frozen dataclass becomes the flags of a script, and a user's mistake becomes one sentence.

Every script ends in `run_script(main, Config, __doc__)`. HfArgumentParser (transformers) parses.
"""

import difflib
import json
import os
import re
import sys
from dataclasses import field as dataclass_field
from dataclasses import fields, make_dataclass
from pathlib import Path
from textwrap import fill as wrap
from typing import get_args

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ  # it has started this process


class UserError(Exception):
    """A mistake of the user's, in one sentence: the flag, the value and the cure."""


WIDTH = 100  # of --help


def flag(default, help, may_change=False):
    """A field of a Config: `lr: float = flag(0.0, "peak learning rate")`

    may_change: whether a run may --resume with another value
    """
    return dataclass_field(default=default, metadata={"help": help, "may_change": may_change})


def setting(default, help):
    """A flag that changes nothing of what is learned from, such as where something runs."""
    return flag(default, help, may_change=True)


def first_line(error):
    """The first line of an error's message, or the name of its type if the message is empty."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def name_error(error):
    """-> "TypeError: unsupported operand" """
    return f"{type(error).__name__}: {first_line(error)}"


def check_range(config, least, flags, most=1e12):
    """UserError unless each of the flags is a number from `least` to `most`.

    flags: names with spaces between, "steps lr"
    """
    for name in flags.split():
        value = getattr(config, name)
        if not value >= least:  # this way round, nan is refused too
            raise UserError(f"--{name} {value}: must be at least {least:g}")
        if value > most:
            raise UserError(f"--{name} {value}: must be at most {most:g}")


def parse(config_class, doc, argv, fill=None, epilog="", **positionals):
    """argv -> (config, positional arguments by name)

    config_class: may have GROUPS, {"model": "model and task"}: for --help, the title of a group of
                  flags by the name of its first flag. CHOICES, {"loss": {"clip": function}}:
                  --help explains them by their docstrings. SHOWN: the flags that --help lists
    doc, epilog: what --help shows before and after the flags
    fill:        gets the value of every flag, returns defaults for the flags that the user left out
    positionals: name -> arguments of `ArgumentParser.add_argument`
    UserError: an unknown flag, a value of the wrong type
    """
    for word in argv:
        if word.encode(errors="ignore").decode() != word:  # half a surrogate pair
            raise UserError(f"{word!a}: is not UTF-8")
    groups = []
    for field in fields(config_class):
        title = getattr(config_class, "GROUPS", {}).get(field.name)
        if title or not groups:
            groups.append((title or "flags", []))
        argument = HfArg(default=field.default, help=field.metadata["help"])
        groups[-1][1].append((field.name, field.type, argument))
    parser = HfArgumentParser(
        [
            make_dataclass("Group", members, namespace={"_argument_group_name": title})
            for title, members in groups
        ],
        allow_abbrev=False,
    )

    def refuse(message):
        if message.endswith("expected one argument"):
            message += " (one that begins with - needs an = before it: --reward=-length)"
        raise UserError(
            message + suggestion(message, [field.name for field in fields(config_class)])
        )

    parser.error = refuse
    parser.format_help = lambda: help_text(parser, config_class, doc, groups, epilog, positionals)
    for name, options in positionals.items():
        parser.add_argument(name, **options)
    if fill:
        parser.set_defaults(**fill(vars(parser.parse_known_args(argv)[0])))
    values = vars(parser.parse_args(argv))
    arguments = {name: values.pop(name) for name in positionals}
    return config_class(**values), arguments


def suggestion(message, flags) -> str:
    """What argparse refuses -> ': did you mean --steps?', or ''"""
    if re.search(r"unrecognized arguments: (?!--\w)", message):
        return ': a value with spaces needs quotes, as in --reward "number + 0.2*format"'
    if wrong := re.search(r"unrecognized arguments: --([^ =]+)", message):
        near = did_you_mean(wrong[1], flags)
        return near and f": {near.replace('mean ', 'mean --')}"
    if wrong := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
        near = did_you_mean(wrong[1], re.findall("[^', ]+", wrong[2]))
        return near and f": {near}"
    return ""


def did_you_mean(word, known) -> str:
    """'step', ['steps', 'seed'] -> 'did you mean steps?';  'xyz' -> ''"""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else ""


def help_text(parser, config_class, doc, groups, epilog, positionals) -> str:
    """What --help shows: the docstring, a line for each flag, and the epilog."""
    lines = [doc.strip(), ""]
    for name, options in positionals.items():
        lines.append(f"{name:<12}{options['help']}")
    lines.append("flags, with their defaults in parentheses; of several values the first is it:")
    explained = getattr(config_class, "CHOICES", {})
    shown = getattr(config_class, "SHOWN", "").split()
    for title, members in groups:
        members = [member for member in members if not shown or member[0] in shown]
        if members:
            lines.append("" if title == "flags" else f"\n{title}:")
        for name, kind, field in members:
            kind = str if name in explained else kind  # the values have lines of their own
            lines.append(flag_line(name, kind, parser.get_default(name), field.metadata["help"]))
            for choice, function in explained.get(name, {}).items():
                lines.append(choice_lines(choice, function.__doc__))
    return "\n".join([*lines, "", epilog, ""])


def flag_line(name, kind, default, text) -> str:
    """'  --lr    peak learning rate (0.0)'. A flag that takes no value has no default."""
    choices = [choice for choice in get_args(kind) if isinstance(choice, str)]
    if choices and default:
        others = [choice for choice in choices if choice != default]
        text += f" ({', '.join([default, *others])})"
    elif default not in ("", None) and kind is not bool:
        text += f" ({default:g})" if isinstance(default, float) else f" ({default})"
    return wrap(f"  {'--' + name:<25} {text}", WIDTH, subsequent_indent=" " * 28)


def choice_lines(name, doc) -> str:
    """A value of a flag with the first sentence of its docstring."""
    sentence = re.split(r"\.(?:\s|$)", " ".join(doc.split()))[0]
    return wrap(f"      {name:<13} {sentence}", WIDTH, subsequent_indent=" " * 20)


def list_presets(flag, presets):
    """'recipe', {"raft": {"loss": "logprob"}} -> '--recipe raft: --loss logprob', for --help"""
    lines = []
    for name, values in presets.items():
        # a line ends between two flags, not between a flag and its value
        settings = " ".join(f"--{flag}\0{value}" for flag, value in values.items())
        line = f"--{flag}\0{name}: {settings}"
        lines.append(wrap(line, WIDTH, subsequent_indent="    ", break_on_hyphens=False))
    return "\n".join(lines).replace("\0", " ")


def run_script(main, config_class, doc, fill=None, epilog="", on_error=str, **positionals):
    """Calls main(config, **arguments) with what `parse` makes of sys.argv.

    on_error: -> what to say after the line of a mistake, such as how to resume; '' for nothing

    A mistake of the user's, a file that cannot be used or a lack of memory ends the script with one
    line and exit status 2. Ctrl-C ends it without a traceback, with status 130.
    """
    try:
        config, arguments = parse(config_class, doc, sys.argv[1:], fill, epilog, **positionals)
        if TORCHRUN:
            from lib.processes import together

            main = together(main)
        main(config, **arguments)
        sys.stdout.flush()
        return
    except BrokenPipeError:  # as in `... | head -1`: avoid a second error in the flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    except (UserError, OSError) as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:  # torch raises several types
        text = repr(error).lower()
        if "memory" not in text or "illegal memory" in text:  # that one is a fault, not a lack
            raise
        message = f"out of memory ({first_line(error)}): lower the sizes, see --help"
    except KeyboardInterrupt:
        sys.exit(130)
    message = " ".join(message.split())
    fail(f"{Path(sys.argv[0]).name}: error: {message}{on_error()}")


def fail(line):
    """Ends with status 2. Where torchrun has started several processes and they fail, only the
    first of them prints its line."""
    if not TORCHRUN:
        print(line, file=sys.stderr)
        sys.exit(2)
    import torch.distributed as dist

    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, is_master=False)
    if store.add("failed", 1) == 1:
        print(f"\n{line}", file=sys.stderr, flush=True)  # below a progress bar
    os._exit(2)  # an ordinary exit might wait for the other processes


def shorten(text, limit=300):
    """Text or chat messages in one line for the screen: "two\\n  words" -> "two words"

    White space is folded, control characters are written as codes (a model could change the
    screen), and a line of more than `limit` characters ends in "..."
    """
    if not isinstance(text, str):
        text = json.dumps(text)
    line = " ".join(text.split())
    line = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", line)
    if len(line) > limit:
        line = f"{line[: limit - 3]}..."
    return line


def align(rows):
    """Columns as wide as their widest cell: [["a", "b"], ["long", "c"]] -> 'a     b\\nlong  c'"""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = map(str.ljust, row, widths)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
