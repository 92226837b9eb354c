"""--help, and what is said to somebody who has mistyped a flag, a rule or a name."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import eval
import lib.flags
import reward
import sample
import train
from lib.checks import check_prompts
from lib.flags import UserError, did_you_mean, flag_line, shorten
from lib.run import read_config
from loss import DENOMINATORS, FILTERS, LOSSES, NORMALISERS, RECIPES
from policy import load_policy
from tasks import load_task
from tools import memory

ROOT = Path(__file__).parent.parent


def shown_help(module, capsys, **positionals):
    fill = getattr(module, "fill", None)
    epilog = getattr(module, "HELP", "")
    with pytest.raises(SystemExit):
        lib.flags.parse(module.Config, module.__doc__, ["--help"], fill, epilog, **positionals)
    return capsys.readouterr().out


def test_help_has_one_line_for_each_flag(capsys):
    """100 columns; the default in parentheses; no spelling twice."""
    text = shown_help(train, capsys)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    for name in [field.name for field in fields(train.Config)]:
        found = [line for line in lines if line.startswith(f"  --{name} ")]
        assert len(found) == 1 and len(found[0]) > 30, name
    assert "-per-step" not in text and "(default" not in text and " ()" not in text
    assert re.search(r"--temperature +sampling .* \(1\)", text)
    assert re.search(r"--dtype +.* \(auto, float32, bfloat16\)", text)


def test_help_explains_each_choice_and_recipe(capsys):
    text = shown_help(train, capsys)
    for table in (NORMALISERS, FILTERS, DENOMINATORS, LOSSES):
        for name, function in table.items():
            assert f"      {name:<13} {' '.join(function.__doc__.split()[:2])}" in text
    for name in RECIPES:
        assert f"\n--recipe {name}: --normaliser {RECIPES[name]['normaliser']}" in text
    assert re.search(r"--normaliser +turns rewards into weights \(zscore\)", text)


def test_the_default_that_help_shows_is_that_of_the_recipe():
    """Of several values the default comes first, and a preset changes the default."""
    kind = train.Config.__dataclass_fields__["fast"].type
    assert flag_line("fast", kind, "off", "text").endswith("text (off, auto, compile)")


def test_the_rules_stand_in_help_of_reward(capsys):
    text = shown_help(reward, capsys, file={"help": "a file"})
    for name in reward.REWARDS:
        assert f"      {name:<13} " in text
    assert "file        a file" in text


def test_the_help_of_memory_has_only_flags_that_change_the_estimate(capsys):
    text = shown_help(memory, capsys)
    named = set(re.findall(r"(?m)^  --(\w+)", text))
    assert {"lora_rank", "memory_gb", "group_size", "dtype"} <= named
    assert not {"lr", "reward", "normaliser", "name", "steps"} & named
    assert "sampling:" in text and "update:" not in text


def test_what_is_not_needed_for_help_is_not_imported():
    """Matplotlib takes half a second; tools.smollm, peft and others are heavier still."""
    code = "import sys, train; print([name for name in sys.modules if name in sys.argv])"
    words = ["matplotlib", "peft", "bitsandbytes", "math_verify", "datasets"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def refused(*words):
    with pytest.raises(UserError) as error:
        lib.flags.parse(train.Config, "", list(words), train.fill)
    return str(error.value)


def test_did_you_mean():
    assert refused("--step", "3").endswith("did you mean --steps?")
    assert refused("--recipe=dap").endswith("did you mean dapo?")
    assert refused("--normaliser", "z-score").endswith("did you mean zscore?")
    assert "did you mean" not in refused("--qqqq", "3")
    assert refused("--reward", "number", "+", "0.2*format").endswith(
        'a value with spaces needs quotes, as in --reward "number + 0.2*format"'
    )
    with pytest.raises(UserError, match=r"--reward numbr: not one of .*: did you mean number\?"):
        reward.load_reward("2*numbr + format")
    assert did_you_mean("xyz", ["steps"]) == ""


def test_a_run_or_model_that_is_not_there_is_named_with_its_neighbour():
    Path("runs/add").mkdir(parents=True)
    nothing = r"runs/ad: there is no such folder: did you mean runs/add\?"
    with pytest.raises(UserError, match=nothing):
        eval.main(eval.Config(), ["runs/ad"])
    with pytest.raises(UserError, match=nothing):
        load_policy("runs/ad", None)
    with pytest.raises(UserError, match=r"runs/ad: no run there.*did you mean runs/add\?"):
        read_config(Path("runs/ad"))


def test_a_prompt_in_the_place_of_the_model():
    with pytest.raises(UserError, match=r'is taken for the model.* sample.py MODEL "PROMPT"'):
        sample.main(sample.Config(), "48+27=")


def test_countdown_needs_another_model_than_the_built_in_one(folders):
    policy, tokenizer = load_policy(str(ROOT / "models" / "add"), sample.pick_device("cpu"))
    problem = load_task("countdown").train[0]
    prompt = sample.prompt_ids(load_task("countdown"), problem, tokenizer)
    with pytest.raises(UserError, match="context is 128: these problems need another --model"):
        check_prompts(policy, [prompt], 1)


def test_a_file_with_other_keys_is_told_which_it_has():
    Path("raw.jsonl").write_text(json.dumps({"question": "1+1=", "answer": "#### 2"}))
    with pytest.raises(UserError, match=r'"prompt" is missing.*: the line has question, answer'):
        load_task("raw.jsonl")


def test_the_built_in_model_is_found_from_any_folder():
    """Each test has a folder of its own, in which there is no models/."""
    policy, _ = load_policy("models/add", sample.pick_device("cpu"))
    assert Path(policy.name_or_path).resolve() == ROOT / "models" / "add"
    with pytest.raises(UserError, match="models/sub: there is no such folder"):
        load_policy("models/sub", None)


@pytest.mark.slow
@pytest.mark.parametrize("tool", sorted(path.stem for path in (ROOT / "tools").glob("[a-z]*.py")))
def test_tools_run_as_scripts_from_any_folder(tool):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, ROOT / "tools" / f"{tool}.py", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", ["an illegal memory access was encountered", "CUDA out of memory"])
def test_a_fault_of_a_kernel_is_not_taken_for_a_lack_of_memory(text, monkeypatch, capsys):
    def fails(config):
        raise RuntimeError(f"CUDA error: {text}")

    monkeypatch.setattr(sys, "argv", ["sample.py"])
    with pytest.raises(RuntimeError if "illegal" in text else SystemExit):
        lib.flags.run_script(fails, memory.Config, "")
    assert ("lower the sizes" in capsys.readouterr().err) == ("illegal" not in text)


def test_text_of_a_model_cannot_change_the_screen():
    assert shorten("a\n\n  b\x1b[31m\x07 \u00e9") == "a b\\x1b[31m\\x07 \u00e9"
    assert shorten("word " * 99, 10) == "word wo..."
