"""README.md and docs/ say what the code does: commands, flags, keys, examples, links."""

import json
import re
import runpy
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import parse_train

import lib.flags
import train
from lib.files import read_rows
from loss import RECIPES

ROOT = Path(__file__).parent.parent
PAGES = {path: path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
README = PAGES[ROOT / "README.md"]
REWARDS = PAGES[ROOT / "docs" / "rewards.md"]
EDITS = PAGES[ROOT / "docs" / "edits.md"]
PATCHES = sorted(ROOT.glob("docs/edits/*.patch"))


def without_comments(page):
    return re.sub(r"<!--.*?-->", "", page, flags=re.DOTALL)


def commands():
    """Every command line `python ...` of the pages: in a line of its own or within a sentence."""
    texts = []
    for page in map(without_comments, PAGES.values()):
        texts += [line.partition("  #")[0] for line in page.splitlines() if line.startswith("    ")]
        texts += re.findall(r"(?<!`)`([^`]+)`(?!`)", page)
    parts = [" ".join(part.split()) for text in texts for part in text.split("&&")]
    return sorted({part for part in parts if re.match(r"python (-m \S|\S+\.py\b)", part)})


COMMANDS = commands()


def test_the_commands_are_found():
    assert len(COMMANDS) > 50
    assert "python eval.py runs/add runs/add-2 runs/add-3" in COMMANDS
    assert "python docs/compare.py" in COMMANDS
    assert "    pip install -r requirements.txt && python train.py\n" in README
    assert re.search("(?m)^.*python -m pytest.*$", README)[0].strip() == (
        "pip install -r requirements.txt && python -m pytest"  # .ci/run takes this line and runs it
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_the_flags_of_its_script(command, monkeypatch):
    """Each command goes through its script's own parser, presets and recipes included."""
    words = shlex.split(command)[1:]
    if words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
        return
    if words[0] == "-m":
        script = ROOT / f"{words[1].replace('.', '/')}.py"
        words = words[2:]
    else:
        script = ROOT / words[0]
        words = words[1:]
    assert script.exists()
    if script.parent.name == "tests":
        return
    parsed = []

    def parse_only(main, config_class, doc, fill=None, epilog="", on_error=str, **positionals):
        parsed.append(lib.flags.parse(config_class, doc, words, fill, epilog, **positionals))

    run = Path("runs/add")  # what --resume looks for
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"config": asdict(train.Config())}))
    monkeypatch.setattr(lib.flags, "run_script", parse_only)
    monkeypatch.setattr(sys, "argv", [script.name])
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(script), run_name="__main__")
    else:
        runpy.run_path(str(script), run_name="__main__")
        assert len(parsed) == 1


def test_every_flag_that_is_named_exists():
    """Also in tables and sentences, where there is no command."""
    known = set()
    scripts = *ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("docs/*.py")
    for script in [*scripts, *ROOT.glob("docs/edits/*.patch")]:  # a patch may add a flag
        known |= set(re.findall(r"(?m)^\+?    (\w+): .*= (?:flag|setting)\(", script.read_text()))
    known |= {"help", "collect", "exclude", "no"}  # of argparse, pytest, hf, pip (--no-deps)
    known |= {"nproc_per_node", "nnodes", "shutdown", "rdzv_backend", "rdzv_endpoint"}  # torchrun's
    for path, page in PAGES.items():
        named = set(re.findall(r"--([a-z]\w+)", without_comments(page)))
        assert named - known == set(), path


def test_names_in_tables_exist():
    """Names of metrics, functions and tables of the code. Columns that had been renamed stood in
    docs/troubleshooting.md for weeks."""
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("docs/edits/*.patch")]
    source = "\n".join(path.read_text() for path in scripts if path.parent.name != "tests")
    known = set(re.findall(r"(?m)^\+?[ ]*(?:def|class) (\w+)", source))
    known |= set(re.findall(r"(?m)^\+?[ ]*(\w+)(?:: [^=\n]+)? = ", source))
    known |= set(re.findall(r"(?m)^    (\w+): [\w\[\]]+ *(?:#|$)", source))  # fields of dataclasses
    known |= set(re.findall(r"\"(\w+)\"", source))
    known |= {
        f"eval_{name}{end}" for name in ("accuracy", "mean_reward") for end in ("", "_interval")
    }
    for name in ("README.md", "docs/troubleshooting.md", "docs/metrics.md", "docs/memory.md"):
        rows = re.findall(r"(?m)^\|.*\|$", PAGES[ROOT / name])
        named = {word for row in rows for word in re.findall(r"`([a-z_A-Z]\w+)`", row)}
        assert len(named) > 3 or name == "docs/memory.md"
        assert named - known == set(), name


def test_links_and_pictures_are_there():
    for path, page in PAGES.items():
        page = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)]+)\)", page):
            target, _, anchor = link.partition("#")
            file = path.parent / target if target else path
            assert file.exists(), f"{path}: {link}"
            if anchor:
                titles = re.findall("(?m)^#+ (.*)$", file.read_text())
                anchors = [re.sub("[^a-z0-9 -]", "", title.lower()) for title in titles]
                assert anchor in [text.replace(" ", "-") for text in anchors], f"{path}: {link}"


def test_every_key_of_a_run_is_documented():
    """A run with all optional terms, so that every key is there but those of truncated
    responses."""
    flags = "--steps=2 --prompts_per_step=2 --group_size=8 --max_new_tokens=8 --eval_problems=2"
    terms = "--updates_per_rollout=2 --loss=clip --log_kl=True --entropy_coef=0.01"
    reward = ["--reward", "exact + 0.1*format"]
    model = ["--model", ROOT / "models" / "add"]
    run = train.main(parse_train(*model, *flags.split(), *terms.split(), *reward))
    metrics, documented = PAGES[ROOT / "docs" / "metrics.md"].split("## metrics.jsonl")
    rows = read_rows(run / "metrics.jsonl")
    keys = {re.sub("^reward/.*", "reward/PART", key) for row in rows for key in row}
    assert {"kl", "clip_share", "reward/PART", "eval_mean_reward"} <= keys
    assert {key for key in keys if f"`{key}`" not in documented} == set()
    for name in [path.name for path in run.iterdir()]:
        assert name in metrics
    for key in read_rows(run / "samples.jsonl")[0]:
        assert f"`{key}`" in metrics


def test_the_table_of_edits_has_each_patch_with_its_lines_and_files():
    rows = re.findall(r"(?m)^\| \[(\w+)\]\(edits/\1\.patch\) \| .* \| (.*) \| (.*) \|$", EDITS)
    assert sorted(name for name, *_ in rows) == sorted(path.stem for path in PATCHES)
    for name, lines, files in rows:
        patch = (ROOT / "docs" / "edits" / f"{name}.patch").read_text()
        added = len(re.findall(r"(?m)^\+(?!\+\+ )", patch))
        removed = len(re.findall(r"(?m)^-(?!-- )", patch))
        assert lines == (f"+{added} -{removed}" if removed else f"+{added}"), name
        assert files.replace(" (new)", "").split(", ") == re.findall(r"(?m)^\+\+\+ b/(.*)$", patch)


def test_a_recipe_stands_in_the_table_as_it_is():
    page = PAGES[ROOT / "docs" / "recipes.md"]
    rows = re.findall(r"(?m)^\| `(\w+)` \|(.*)$", page)
    rows = [(RECIPES[name], row) for name, row in rows if name in RECIPES]
    assert len(rows) > 5
    for recipe, row in rows:
        for flag in ("normaliser", "denominator", "loss", "filter"):
            assert f" `{recipe.get(flag, 'none')}`" in row


def run_code(page):
    """The python blocks of a page, in one namespace."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block, names)
    return names


def test_rewards_of_ones_own():
    names = run_code(REWARDS)
    assert names["contains"]("", "It is PARIS.", "Paris") == 1
    assert names["contains"]("", "It is Rome.", "Paris") == 0
    assert names["boxed"]("", r"\boxed{7} no, \boxed{ 8 }", "8") == 1
    assert names["boxed"]("", r"\boxed{8} no, \boxed{7}", "8") == 0
    assert names["boxed"]("", "8", "8") == 0
    assert names["not_too_long"]("", "", "", length=25, limit=100) == 0.75
    assert names["unlike_the_others"](["", "", ""], ["a", "b", "a"], ["", "", ""]) == [0, 1, 0]
    brief = run_code(README)["brief"]
    assert brief("", "8", "8") == 1 - 0.5 / 200
    assert brief("", "word " * 300 + "8", "8") == 0.5
    assert brief("", "7", "8") == 0


def test_slow_calls_are_made_in_parallel_and_miss_their_limit():
    """Each response waits a hundredth of a second per character: the longest one misses."""
    judged = run_code(REWARDS)["judged"]
    responses = ["75", "74", "7" * 50, *["75"] * 20]
    texts = ["48+27="] * 23, responses, ["75"] * 23
    assert judged(*texts, seconds=0.25, missed=-1.0) == [1, 0, -1, *[1] * 20]


def test_the_weights_of_the_trap():
    names = run_code(REWARDS)
    expected = torch.tensor([1.73, -0.58, -0.58, -0.58])
    for name in ("zscore_form", "zscore_right"):
        torch.testing.assert_close(names[name], expected, atol=0.005, rtol=0)
    torch.testing.assert_close(names["mean_form"], torch.tensor([0.15, -0.05, -0.05, -0.05]))
    assert "(1.73, -0.58, -0.58, -0.58)" in README


def test_help_has_groups_of_flags_and_the_recipes_after_them(capsys):
    with pytest.raises(SystemExit):
        lib.flags.parse(train.Config, train.__doc__, ["--help"], train.fill, train.HELP)
    shown = capsys.readouterr().out
    places = ["sampling:", "--temperature", "weights and loss", "--normaliser", "--recipe dapo: --"]
    assert sorted(places, key=shown.index) == places
