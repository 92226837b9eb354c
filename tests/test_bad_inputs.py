"""Bad input in bulk: every flag of every script at values that nobody means, damaged files, models
and problems. Each case must end in one sentence and status 2, or work.

    python -m pytest -m "" --collect-only -q tests/test_bad_inputs.py | tail -1   # how many cases

The quick set has some cases of each kind; `-m slow` has the others.
"""

import json
import math
import re
import runpy
import shutil
import sys
from dataclasses import fields
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import get_args

import matplotlib.figure
import pytest
import tqdm
from safetensors.torch import load_file, save_file
from tiny import make_folder
from transformers import AutoModelForSequenceClassification

import tasks

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:runpy")  # imported already

# the arguments of a run that works, of each script
SCRIPTS = {
    "train": "--model=model --task=problems.jsonl --steps=1 --eval_problems=0 --prompts_per_step=1"
    " --group_size=2 --max_new_tokens=2 --device=cpu --seed=1",
    "eval": "model --task=problems.jsonl --max_new_tokens=2 --limit=2 --device=cpu",
    "sample": "model 1+1= --max_new_tokens=2 --device=cpu",
    "reward": "samples.jsonl --reward=length-0.5*number",
    "tools.pretrain": "--steps=1 --batch_size=2 --output=made --device=cpu",
    "tools.train_reward": "samples.jsonl --model=model --label=length --output=made --epochs=1"
    " --device=cpu",
    "docs.compare": "",
    "tools.bench": "--prompts_per_step=1 --group_size=2 --max_new_tokens=2 --repeats=1"
    " --device=cpu",
    "tools.memory": "tiny --memory_gb=1",
    "tools.runs": "run",
}
NUMBERS = ["0", "-1", "1000000000000", "nan", "inf", "-inf", "", "many", "1.5", "9" * 40]
TEXTS = ["", " ", "no/such", "..", "x" * 300, "\udcff", "-", "$(touch pwned)", "a\nb"]


def mostly_slow(cases, every=15):
    """Parameters of a test: one in `every` is in the quick set, the others marked as slow."""
    parameters = []
    for number, case in enumerate(cases):
        marks = [pytest.mark.slow] if number % every else []
        parameters.append(pytest.param(*case, marks=marks))
    return parameters


def short_id(value):
    return ascii(value)[:20]


def flag_cases():
    """(script, flag, value) for each flag of each script."""
    for script in SCRIPTS:
        flags = {field.name: field.type for field in fields(import_module(script).Config)}
        if script == "tools.memory":  # it also has those of train.py
            flags = {"longest_prompt": int, "memory_gb": float}
        if script == "docs.compare":
            del flags["runs_dir"]  # it would be made beside the sources
        for name, kind in flags.items():
            values = NUMBERS if kind in (int, float) else TEXTS
            if kind is bool or get_args(kind):
                values = ["maybe", ""]
            yield from ((script, name, value) for value in values)


class WorksSoFar(Exception):
    """Raised in a case that has shown that it works and would take long."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model, a reward model, problems, samples and a run."""
    folder = tmp_path_factory.mktemp("world")
    make_folder(folder / "model", "llama")
    shutil.copytree(folder / "model", folder / "judge")
    judge = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    judge.config.pad_token_id = 1
    judge.save_pretrained(folder / "judge")
    problems, samples = [], []
    for a in range(40):
        problem = {"prompt": f"{a} + {a} =", "answer": str(2 * a)}
        problems.append(json.dumps(problem))
        for length in (1, 2):
            sample = {**problem, "response": "2 " * length, "length": length}
            samples.append(json.dumps(sample))
    (folder / "problems.jsonl").write_text("\n".join(problems))
    (folder / "samples.jsonl").write_text("\n".join(samples))
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    return folder


@pytest.fixture
def outcome(world, monkeypatch, capsys):
    """outcome(script, "--flag=value", ...) -> "" if it works, else its one sentence."""
    monkeypatch.chdir(world)
    calls = []

    def take_problems(*arguments, take_problems=tasks.take_problems):
        calls.append(arguments)
        if len(calls) > 2:
            raise WorksSoFar
        return take_problems(*arguments)

    def no_bar(*arguments):
        raise WorksSoFar

    monkeypatch.setattr(tasks, "take_problems", take_problems)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda _, path, **__: path.touch())

    def run(script, *words):
        if script == "docs.compare":
            monkeypatch.setattr(tqdm, "tqdm", no_bar)
        given = {word.partition("=")[0] for word in words}
        usual = [word for word in SCRIPTS[script].split() if word.partition("=")[0] not in given]
        if words and not words[0].startswith("-"):  # instead of model, samples.jsonl ...
            usual = usual[1:]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *words, *usual])
        calls.clear()
        sentence = ""
        try:
            runpy.run_module(script, run_name="__main__")
        except WorksSoFar:
            pass
        except SystemExit as exit:
            sentence = capsys.readouterr().err.rpartition("\r")[2].splitlines()[-1]
            assert exit.code == 2
            assert sentence.startswith(f"{script}.py: error: ")
        shutil.rmtree("made", ignore_errors=True)
        shutil.rmtree("runs", ignore_errors=True)
        return sentence

    return run


@pytest.mark.parametrize(("script", "flag", "value"), mostly_slow(flag_cases(), 40))
def test_flag(outcome, script, flag, value):
    outcome(script, f"--{flag}={value}")


def test_flags_that_would_be_taken_for_something_else(outcome):
    """Each once ran: without the last problems, beyond all bounds, outside of --runs_dir."""
    assert "--name .." in outcome("train", "--name=..")
    assert "--limit -1" in outcome("eval", "--limit=-1")
    assert "--lr 1000000000000.0" in outcome("train", "--lr=1e12")
    assert "--name ../elsewhere" in outcome("train", "--name=../elsewhere")
    assert "--seeds 1" in outcome("docs.compare", "--seeds=1")


GOOD = '{"prompt": "1 + 1 =", "answer": "2"}'
LINES = "".join(GOOD.replace("1 +", f"{a} +") + "\n" for a in range(30))
FIELDS = ['""', "null", "{}", "[]", '"\\ud83d"', '"2', "NaN", "9" * 5000, "1e999"]
FIELDS += ['[{"content": "1"}]', '[{"role": "user", "content": null}]']
BAD_FILES = ["", " \n\t\n", LINES.encode("utf-16"), LINES.replace("=", "\xe9").encode("latin-1")]
BAD_FILES += [LINES.encode() + b"\xff\n", b"PK\x03\x04\x14\x00" * 9, LINES + "\0", f"[{GOOD}]"]
BAD_FILES += [LINES.replace("prompt", "question"), "1\n2\n", f"{GOOD} {GOOD}\n" * 9]
BAD_FILES += [LINES.replace("}", "},"), "prompt,answer\n1,2\n", LINES[:-9], "[" * 100_000 + "\n"]
BAD_FILES += [LINES + GOOD.replace('"1 + 1 ="', value) for value in FIELDS]
# an answer may be missing
BAD_FILES += [LINES + GOOD.replace('"2"', value.replace("null", "[1]")) for value in FIELDS]
GOOD_FILES = ["\ufeff" + LINES, LINES.replace("\n", "\r\n"), LINES.replace("\n", "\n\n \n")]
GOOD_FILES += [LINES.rstrip(), LINES.replace("1 =", "\\f ="), LINES.replace("1 =", "\u2028 =")]
GOOD_FILES += [LINES + GOOD.replace("2", "2" * 10_000_000), LINES + GOOD.replace('"2"', "2")]
FILES = [(content, False) for content in BAD_FILES] + [(content, True) for content in GOOD_FILES]


@pytest.mark.parametrize("script", ["train", "eval", "reward"])
@pytest.mark.parametrize(("content", "works"), mostly_slow(FILES), ids=short_id)
def test_file_of_problems(outcome, script, content, works):
    """reward.py reads the same lines with responses."""
    content = content if isinstance(content, bytes) else content.encode()
    words = ["--task=given.jsonl"]
    if script == "reward":
        words = ["given.jsonl"]
        content = content.replace(b'"answer"', b'"response": "2", "length": 1, "answer"')
    Path("given.jsonl").write_bytes(content)
    sentence = outcome(script, *words)
    assert (sentence == "") == works
    assert works or "given.jsonl" in sentence


@pytest.mark.slow
def test_a_prompt_of_10_MB(outcome):
    Path("given.jsonl").write_text(LINES + GOOD.replace("1 +", "Ann has 1 " * 1_000_000))
    sentence = outcome("train", "--task=given.jsonl")
    assert "a prompt has 3000004 tokens, and the model's context is 1536" in sentence


DAMAGES = {
    "missing": None,
    "empty": lambda content: b"",
    "cut short": lambda content: content[: len(content) // 2],
    "{}": lambda content: b"{}",
    "[]": lambda content: b"[]",
    "bytes": lambda content: b"\xff\xfe\x00" * 50,
}


def make_damaged(source, file, damage):
    """A copy of a folder, "given", in which one file is damaged."""
    shutil.rmtree("given", ignore_errors=True)
    shutil.copytree(source, "given")
    path = Path("given") / file
    content = path.read_bytes()
    path.unlink()
    if change := DAMAGES[damage]:
        path.write_bytes(change(content))


USES = {
    "policy": ["train", "--model=given"],
    "evaluated": ["eval", "given"],
    "sampled": ["sample", "given", "1+1="],
    "reward model": ["train", '--reward=model("given")'],
    "base of a reward model": ["tools.train_reward", "--model=given"],
}
MODEL_FILES = "config.json generation_config.json model.safetensors tokenizer.json"


@pytest.mark.parametrize(
    ("use", "file", "damage"), mostly_slow(product(USES, MODEL_FILES.split(), DAMAGES))
)
def test_model_folder(outcome, use, file, damage):
    """Generation settings may be missing, and are not needed by a reward model."""
    judge = "reward" in use
    make_damaged("judge" if use == "reward model" else "model", file, damage)
    sentence = outcome(*USES[use])
    works = file == "generation_config.json" and (judge or damage in ("missing", "{}"))
    assert (sentence == "") == works
    assert works or "given" in sentence


# what is changed in the settings -> what the sentence says
SETTINGS = """
{"eos_token": null} -> eos_token
{"vocab_size": 10} -> cannot be loaded
{"model_type": "own", "auto_map": {"AutoConfig": "own.A"}} -> cannot be loaded
{"model_type": "vit"} -> cannot be loaded
{"num_hidden_layers": 3} -> parameters are not in
{"num_attention_heads": 7} -> cannot be
{"hidden_size": "wide"} -> cannot be loaded
{"max_position_embeddings": 1} -> the model's context is 1
{"chat_template": "{% for %}"} -> template
{"chat_template": "{{ raise_exception('no') }}"} -> refuses the prompt: no
{"chat_template": "{{ messages.__class__.__mro__ }}"} -> refuses the prompt
{"chat_template": "{{ '' }}"} -> a prompt is empty
{"chat_template": "{{ messages[0].content + 1 }}"} -> refuses the prompt
{"chat_template": "{{ 1 // 0 }}"} -> refuses the prompt"""


@pytest.mark.parametrize("use", ["policy", "evaluated"])
@pytest.mark.parametrize(("line",), mostly_slow(zip(SETTINGS.strip().splitlines()), 4))
def test_model_settings(outcome, use, line):
    changes, expected = line.split(" -> ")
    make_damaged("model", "generation_config.json", "missing")
    for path in Path("given").glob("*config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | json.loads(changes)))
    assert expected in outcome(*USES[use])


@pytest.mark.parametrize("eos", ["end", [2, "end"], [[2]], 2.5, {"id": 2}])
def test_a_stop_token_that_is_no_number(outcome, eos):
    make_damaged("model", "generation_config.json", "missing")
    Path("given/generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    for use in ("policy", "evaluated", "sampled"):
        assert "given" in outcome(*USES[use])


@pytest.mark.parametrize("use", ["policy", "evaluated", "sampled"])
def test_a_model_whose_parameters_are_nan(outcome, use):
    """train.py once made its steps without an update, and ended as if all were well."""
    make_damaged("model", "generation_config.json", "missing")
    weights = load_file("model/model.safetensors")
    weights = {name: weight * math.nan for name, weight in weights.items()}
    save_file(weights, "given/model.safetensors", {"format": "pt"})
    assert "log-probs are nan" in outcome(*USES[use])


RUN_FILES = """config.json metrics.jsonl samples.jsonl before.json checkpoint/config.json
checkpoint/model.safetensors checkpoint/state.pt checkpoint/tokenizer.json"""


@pytest.mark.parametrize(("file", "damage"), mostly_slow(product(RUN_FILES.split(), DAMAGES)))
def test_run_folder(outcome, file, damage):
    """--resume of a run of one step, with one checkpoint. Samples are not needed, and without
    before.json there is no table at the end."""
    flags = "--name=run", "--eval_problems=1"
    if not Path("one_step").exists():
        outcome("train", *flags, "--runs_dir=one_step")
    make_damaged("one_step", f"run/{file}", damage)
    sentence = outcome("train", *flags, "--runs_dir=given", "--resume", "--steps=2")
    not_needed = file == "samples.jsonl" or (file, damage) == ("before.json", "missing")
    assert (sentence == "") == not_needed
    assert sentence == "" or "given" in sentence


EXPRESSIONS = r"""
exakt | 1 | number + | number ** 2 | ) | number; number | lambda: 1 | os.system | number.__class__
not number | number == 1 | 1e999*number | number(1) | model('') | model('no/such') | model('model')
model(number) | no_such_file.function | sys.exit | 'number' | length*1e308*1e308
1e39*length - 1e39 | True*number | ... | number := 1 | number, | exec('1')"""
EXPRESSIONS = [*re.split(r" \| |\n", EXPRESSIONS.strip()), " ", "number\0"]
EXPRESSIONS += ["-" * 5000 + "number", "(" * 5000 + "number", "number" + "+number" * 20000]


OWN = """import sys
def leave(prompt, response, answer): sys.exit(0)
def stop(prompt, response, answer): raise GeneratorExit
def huge(prompt, response, answer): return 10**5000
def empty(prompts, responses, answers): prompts.clear()
"""
OWN_REWARDS = """
leaves.anything -> leaves.py raised SystemExit: 0
own.leave -> own.leave: raised SystemExit: 0
own.stop -> own.stop: raised GeneratorExit
own.huge -> own.huge: raised ValueError: Exceeds the limit
own.empty -> own.empty: raised TypeError"""


@pytest.mark.parametrize("line", OWN_REWARDS.strip().splitlines())
def test_a_reward_of_the_users(outcome, line):
    """sys.exit(0) in it once ended the program without a word, and with status 0."""
    Path("own.py").write_text(OWN)
    Path("leaves.py").write_text("import sys\nsys.exit(0)")
    reward, expected = line.split(" -> ")
    assert expected in outcome("train", f"--reward={reward}")


def test_a_value_that_looks_like_a_flag(outcome):
    sentence = outcome("train", "--reward", "-length*2", "--reward=number")
    assert "one that begins with - needs an =" in sentence


@pytest.mark.parametrize(("expression",), mostly_slow(zip(EXPRESSIONS)), ids=short_id)
def test_reward_expression(outcome, expression):
    sentence = outcome("train", f"--reward={expression}")
    assert "--reward" in sentence or "model(" in sentence
