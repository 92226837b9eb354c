import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from test_plot import make_run
from test_structure import ORDER, ROOT

import flags

README = (ROOT / "README.md").read_text()
PAGES = [README, *(path.read_text() for path in ROOT.glob("docs/*.md"))]
QUOTED = [" ".join(quoted.split()) for page in PAGES for quoted in re.findall(r"(?<!`)`([^`]+)`(?!`)", page)]
LINES = [line.strip().partition("  #")[0] for page in PAGES for line in page.splitlines() if line.startswith("    ")]
COMMANDS = sorted({command.strip().removeprefix("python ") for text in QUOTED + LINES for command in text.split("&&")
                   if re.match(r"python \S+\.py\b", command.strip())})


def test_the_commands_are_found():
    scripts = {command.split()[0].removesuffix(".py") for command in COMMANDS}
    assert set(ORDER) - scripts == {"flags", "tasks", "loss", "stats", "checkpoint", "track", "decode",
                                    "policy", "update", "rules", "screen"}
    assert len(COMMANDS) > 30 and "eval.py runs/add runs/add-2 runs/add-3" in COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flags_of_each_command_are_there(command, monkeypatch):
    """Each command of the README and of docs/ goes through its script's own parser, presets and recipes included."""
    script, *words = shlex.split(command)
    assert (ROOT / script).exists()
    if script.startswith("tests/"):
        return
    parsed = []

    def parse_only(main, config_class, doc, fill=None, **positionals):
        parsed.append(flags.parse(config_class, doc, words, fill, **positionals))

    make_run("add")  # what --resume looks for
    monkeypatch.setattr(flags, "run_script", parse_only)
    monkeypatch.setattr(sys, "argv", [script])
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        runpy.run_path(str(ROOT / script), run_name="__main__")
        assert parsed


def test_each_flag_that_is_named_is_a_flag():
    configs = [getattr(importlib.import_module(script), "Config", None) for script in ORDER]
    known = {field for config in configs for field in getattr(config, "__dataclass_fields__", ())}
    known |= set(runpy.run_path(str(ROOT / "docs" / "bench_trl.py"))["Config"].__dataclass_fields__)
    ours = [quoted for quoted in QUOTED if not re.match("jupyter|python -m", quoted)]
    named = {flag for quoted in ours for flag in re.findall(r"--(\w+)", quoted)}
    assert len(named) > 30 and named - known == {"help"}


def test_the_gate_runs_each_script():
    gate = (ROOT / ".ci" / "run").read_text()
    scripts = {command.split()[0] for command in COMMANDS} - {
        "compare.py",  # it takes 20 minutes, and rewrites docs/
        "docs/bench_trl.py"}  # it needs trl
    scripts = {script for script in scripts if not script.startswith("tests/")}
    assert [script for script in sorted(scripts) if f'"$here/{script}"' not in gate] == []
    assert [mode for mode in ("--chat", "--watch", "--list", "--samples") if mode not in gate] == []


def test_every_file_is_explained():
    assert [name for name in ORDER if f"| `{name}.py` |" not in README] == []
    order = " ".join(README.partition("in the order ")[2].partition(".")[0].split())
    assert order == ", ".join(ORDER)


def test_what_is_linked_inside_the_page_is_there():
    titles = [re.sub("[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
              for title in re.findall("(?m)^#+ (.*)$", README)]
    assert [link for link in re.findall(r"\]\(#([^)]*)\)", README) if link not in titles] == []


def test_every_page_and_picture_that_is_shown_is_there():
    shown = set(re.findall(r"\]\(([^)#:]+)\)", README))
    assert [path for path in sorted(shown) if not Path(ROOT / path).exists()] == []


def test_the_change_of_a_reward_fits_rules_as_it_is():
    """Its lines were once those of an older rules.py."""
    change = README.partition("```diff\n")[2].partition("```")[0].splitlines()
    removed = [line[1:] for line in change if line.startswith("-")]
    rules = (ROOT / "rules.py").read_text()
    assert len(removed) == 1 and removed[0] + "\n" in rules
    kept = [line for line in change if not line.startswith("-")]
    namespace = {}
    exec(rules.replace(removed[0], "\n".join(line[1:] for line in kept)), namespace)
    assert namespace["REWARDS"]["close"]("", "it is 77", "75") == 1 / 3
