"""Bad input in bulk: every flag of every script at values that nobody means, damaged files, models and problems.

Each case must end in one sentence and status 2, or work: never in a traceback, and never in a wrong result in silence.

    python -m pytest --collect-only -q tests/test_bad_inputs.py | tail -1          # how many cases there are
"""

import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import matplotlib.figure
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_folder
from transformers import AutoModelForSequenceClassification

import bench
import compare
import eval
import memory
import plot
import pretrain
import reward
import sample
import train
import train_reward
from flags import run_script

SCRIPTS = {"train": train, "eval": eval, "sample": sample, "reward": reward, "pretrain": pretrain,
           "train_reward": train_reward, "compare": compare, "bench": bench, "memory": memory, "plot": plot}
NUMBERS = ["0", "-1", "1000000000000", "nan", "inf", "-inf", "", "many", "1.5", "1e-300", "1e300", "9" * 40]
TEXTS = ["", " ", "no/such", "..", "x" * 300, "\udcff", "-", "$(touch pwned)", "a\nb"]


def flag_cases() -> list[tuple[str, str, str]]:
    """(script, flag, value) for each flag of each script."""
    cases = []
    for script, module in SCRIPTS.items():
        for field in fields(module.Config):
            numeric = field.type in (int, float)
            values = NUMBERS if numeric else ["maybe", ""] if field.type is bool or get_args(field.type) else TEXTS
            cases += [(script, field.name, value) for value in values]
    return cases


class Enough(Exception):
    """Raised where a case has shown that it works and would go on for long."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model, problems, samples and pairs."""
    folder = tmp_path_factory.mktemp("world")
    make_folder(folder / "model", "llama")
    shutil.copytree(folder / "model", folder / "judge_model")
    judge = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    judge.config.pad_token_id = 1
    judge.save_pretrained(folder / "judge_model")
    problems = [{"prompt": f"{a} + {a} =", "answer": str(2 * a)} for a in range(40)]
    samples = [{**problem, "response": response, "length": 2} for problem in problems
               for response in ("2", "2 2")]
    for name, rows in (("problems", problems), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run" / "code").mkdir(parents=True)
    (folder / "run" / "config.json").write_text(json.dumps({"config": {"task": "add", "model": "model", "seed": 0}}))
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    return folder


@pytest.fixture
def outcome(world, monkeypatch, capsys):
    """outcome(script, *words) -> '' if it works, else its one sentence."""
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, path, **_: Path(path).write_bytes(b"png"))
    monkeypatch.setattr(compare, "run", lambda *_: (_ for _ in ()).throw(Enough))
    monkeypatch.chdir(world)
    steps = []

    def stream(problems, start, *rest, stream=train.stream):
        steps.append(start)
        if len(steps) > 2:
            raise Enough
        return stream(problems, start, *rest)

    monkeypatch.setattr(train, "stream", stream)
    positional = {"eval": ["model"], "sample": ["model", "1 + 1 ="], "reward": ["samples.jsonl"],
                  "train_reward": ["samples.jsonl"], "memory": ["tiny"], "plot": ["run"]}
    needed = {
        "train": ["--model=model", "--task=problems.jsonl", "--steps=1", "--eval_problems=0", "--prompts_per_step=1",
                  "--group_size=2", "--max_new_tokens=2", "--device=cpu", "--seed=1"],
        "eval": ["--task=problems.jsonl", "--max_new_tokens=2", "--limit=2", "--device=cpu"],
        "sample": ["--max_new_tokens=2", "--device=cpu"],
        "reward": ["--reward=length - 0.5*number"],
        "pretrain": ["--steps=1", "--batch_size=2", "--output=made", "--device=cpu"],
        "train_reward": ["--model=model", "--label=contains('2 2')", "--output=judge", "--epochs=1",
                         "--device=cpu"],
        "compare": [],
        "bench": ["--prompts_per_step=1", "--group_size=2", "--max_new_tokens=2", "--repeats=1", "--device=cpu"],
        "memory": ["--memory_gb=1"],
        "plot": [],
    }

    def run(script, *words):
        steps.clear()
        given = [word for word in words if word.startswith("--")]
        names = {word.split("=")[0] for word in given}
        flags = [word for word in needed[script] if word.split("=")[0] not in names] + given
        words = flags + ([word for word in words if word not in flags] or positional.get(script, []))
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
        module = SCRIPTS[script]
        positionals = {"eval": dict(models=dict(nargs="+")), "sample": dict(model={}, prompt={}),
                       "reward": dict(file={}), "train_reward": dict(source=dict(nargs="?")), "memory": dict(model={}),
                       "plot": dict(runs=dict(nargs="*"))}.get(script, {})
        try:
            run_script(module.main, module.Config, "", getattr(module, "fill", None), **positionals)
            sentence = ""
        except Enough:
            sentence = ""
        except SystemExit as exit:
            sentence = capsys.readouterr().err.rpartition("\r")[2].splitlines()[-1]
            assert exit.code == 2 and sentence.startswith(f"{script}.py: error: "), (exit.code, sentence)
        for made in ("made", "judge", "runs"):
            shutil.rmtree(made, ignore_errors=True)
        capsys.readouterr()
        return sentence

    return run


@pytest.mark.parametrize(("script", "flag", "value"), flag_cases())
def test_flag(outcome, script, flag, value):
    outcome(script, f"--{flag}={value}")


def test_flags_that_would_be_taken_for_something_else(outcome):
    """Each of these once ran: with the last problems left out, with a reward for what was late that was no number, with
    weights beyond all bounds, with a run outside of --runs_dir."""
    for script, flag, value in (("eval", "limit", "-1"), ("train", "reward_missed", "nan"), ("train", "lr", "1e12"),
                                ("pretrain", "lr", "1e12"), ("train", "name", "../elsewhere"),
                                ("compare", "seeds", "1")):
        assert f"--{flag} {value.replace('e12', '000000000000.0')}" in outcome(script, f"--{flag}={value}"), flag


GOOD = '{"prompt": "1 + 1 =", "answer": "2"}'
LINES = "".join(f'{{"prompt": "{a} + 1 =", "answer": "{a + 1}"}}\n' for a in range(30))
FILES = {  # what stands in the file -> whether it works; None where that depends on the script
    "nothing": ("", False), "one problem": (GOOD, None), "two problems": (GOOD + "\n" + GOOD.replace("1", "3"), None),
    "spaces": (" \n\t\n", False), "the same problem ten times": (f"{GOOD}\n" * 10, None),
    "byte-order mark": ("\ufeff" + LINES, True), "CRLF": (LINES.replace("\n", "\r\n"), True), "empty lines": (
        LINES.replace("\n", "\n\n \n"), True), "no newline at the end": (LINES.rstrip(), True), "UTF-16": (
        LINES.encode("utf-16"), False), "Latin-1": (LINES.replace("=", "\xe9").encode("latin-1"), False),
    "a stray byte": (LINES.encode() + b"\xff\n", False), "bytes of a ZIP": (b"PK\x03\x04\x14\x00\x08\x00" * 9, False),
    "NUL": (LINES + "\0", False), "form feed in the text": (LINES.replace("1 =", "\\f ="), True), "line separator": (
        LINES.replace("1 =", "\u2028 ="), True),
    **{f"{name} {field}": (LINES + GOOD.replace(old, new) + "\n", works)
       for field, old in (("prompt", '"1 + 1 ="'), ("answer", '"2"'))
       for name, new, works in (
           ("empty", '""', False), ("null", "null", False), ("object", "{}", False), ("empty list", "[]", False),
           ("list of numbers", "[1, 2]", False), ("half a surrogate pair as", '"\\ud83d"', False),
           ("a whole surrogate pair as", '"\\ud83d\\ude00"', True), ("truncated", '"2', False), ("number", "2",
           field == "answer"), ("boolean", "true", field == "answer"), ("nan", "NaN", False),
           ("number of 5,000 digits as", "9" * 5000, False), ("huge number", "1e999", False),
           ("message without a role as", '[{"content": "1"}]', False),
           ("message of null as", '[{"role": "user", "content": null}]', False),
           ("chat message for a model without a template as", '[{"role": "user", "content": "1"}]',
            None if field == "prompt" else False),
           ("spaces as", '"   "', True), ("control characters as", '"\\u0000\\u0007"', True))},
    "no prompt": (LINES + '{"answer": "2"}', False), "no answer": (LINES + '{"prompt": "2"}', False), "other names": (
        LINES.replace("prompt", "question"), False), "capital names": (LINES.replace("prompt", "Prompt"), False),
    "an array": (f"[{GOOD}]", False), "an array a line": (f"[{GOOD}]\n" * 9, False), "text": ("1 + 1 = 2\n", False),
    "a number a line": ("1\n2\n3\n", False), "null a line": ("null\n" * 9, False), "two objects a line": (
        f"{GOOD} {GOOD}\n" * 9, False), "comma at the end": (LINES.replace("}", "},"), False), "single quotes": (
        LINES.replace('"', "'"), False), "a comment": ("// problems\n" + LINES, False), "CSV": ("prompt,answer\n1,2\n",
        False), "indented over lines": (json.dumps(json.loads(GOOD), indent=1), False), "half of a line": (
        LINES[:-9], False), "nested 100,000 deep": ("[" * 100_000 + "\n", False),
    "an answer of 10 MB": (LINES + GOOD.replace("2", "2" * 10_000_000), True),
    "a word of 10 MB outside the fields": (LINES.replace("}", ', "note": "' + "x" * 300_000 + '"}'), True),
}


@pytest.mark.parametrize("script", ["train", "eval", "reward", "train_reward"])
@pytest.mark.parametrize("name", FILES)
def test_file_of_problems(outcome, world, script, name):
    """reward.py and train_reward.py read samples: the same lines with responses."""
    content, works = FILES[name]
    content = content if isinstance(content, bytes) else content.encode()
    words = {"train": ["--task=given.jsonl"], "eval": ["--task=given.jsonl"]}.get(script, ["given.jsonl"])
    if not words[0].startswith("--"):  # two responses to each prompt
        content = b"\n".join(half.replace(b'"answer"', b'"response": "%s", "length": 3, "answer"' % response)
                             for half, response in ((content, b"2"), (content.removeprefix(b"\xef\xbb\xbf"), b"2 2")))
    (world / "given.jsonl").write_bytes(content)
    sentence = outcome(script, *words)
    assert works is None or (sentence == "") == works, sentence
    assert sentence == "" or "given.jsonl" in sentence or "the prompt is a list of chat messages" in sentence
    assert "unrecognized" not in sentence


def test_a_prompt_of_10_MB(outcome, world):
    (world / "given.jsonl").write_text(LINES + GOOD.replace("1 +", "Ann has 1 " * 1_000_000))
    assert "tokens and --max_new_tokens 2 do not fit into the model's context of 1536" in outcome(
        "train", "--task=given.jsonl")


MODEL_FILES = "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
DAMAGE = {"missing": None, "empty": lambda old: b"", "half": lambda old: old[: len(old) // 2], "{}": lambda old: b"{}",
          "[]": lambda old: b"[]", "null": lambda old: b"null", "bytes": lambda old: b"\xff\xfe\x00" * 50,
          "a folder": "folder"}
USES = {"train": ["train", "--model=given"], "eval": ["eval", "given"], "sample": ["sample", "given", "1 + 1 ="],
        "reward": ["train", '--reward=model("given")'], "train_reward": ["train_reward", "--model=given"]}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", MODEL_FILES)
def test_model_folder(outcome, world, use, file, damage):
    """As a policy in three scripts, as a reward model, as what a reward model is made of."""
    source = world / ("judge_model" if use == "reward" else "model")
    shutil.rmtree(world / "given", ignore_errors=True)
    shutil.copytree(source, world / "given")
    path, change = world / "given" / file, DAMAGE[damage]
    old = path.read_bytes()
    path.unlink()
    if change == "folder":
        path.mkdir()
    elif change:
        path.write_bytes(change(old))
    sentence = outcome(*USES[use])
    absent, judge = damage in ("missing", "{}", "a folder"), use in ("reward", "train_reward")
    works = {"generation_config.json": absent or judge, "tokenizer_config.json": absent and judge}.get(file, False)
    assert (sentence == "") == works, sentence
    assert works or "given" in sentence


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


MODELS = {  # what is done to a folder -> what the sentence says; none if it works
    "no end-of-text token": (lambda folder: change_json(folder / "tokenizer_config.json", eos_token=None), "eos_token"),
    "fewer tokens in the model than in the tokenizer": (lambda folder: shrink(folder, "!"), "another model's"),
    "end of text beyond the vocabulary": (lambda folder: shrink(folder, "a"), "ends by token"),
    "a weight is missing": (lambda folder: change_weights(
        folder / "model.safetensors", lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight")),
        "1 of its weights are not in its files, model.layers.1.mlp.up_proj.weight"),
    "a weight of another shape": (lambda folder: change_weights(
        folder / "model.safetensors", lambda weights: weights.update({"model.norm.weight": torch.ones(3)})),
        "cannot be loaded"),
    "code of its own": (lambda folder: change_json(
        folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.A", "AutoModelForCausalLM": "own.B"}),
        "cannot be loaded"),
    "an unknown architecture": (lambda folder: change_json(folder / "config.json", model_type="gpt-9"), "gpt-9"),
    "no causal language model": (lambda folder: change_json(folder / "config.json", model_type="vit"), "cannot be"),
    "a layer too many": (lambda folder: change_json(folder / "config.json", num_hidden_layers=3), "weights are not in"),
    "no layers": (lambda folder: change_json(folder / "config.json", num_hidden_layers=-1), ""),
    "heads that do not fit": (lambda folder: change_json(folder / "config.json", num_attention_heads=7), "cannot be"),
    "a size that is text": (lambda folder: change_json(folder / "config.json", hidden_size="wide"), "cannot be loaded"),
    "pickled weights alone": (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
                              "no file named model.safetensors"),
    "an empty folder": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "model_type"),
    "a context of 1": (lambda folder: change_json(folder / "config.json", max_position_embeddings=1), "context of 1"),
    "a template that is wrong": (lambda folder: (folder / "chat_template.jinja").write_text("{% for %}"), "template"),
    "a template that raises": (lambda folder: (folder / "chat_template.jinja").write_text(
        "{{ raise_exception('no') }}"), "refuses the prompt: no"),
    "a template that calls": (lambda folder: (folder / "chat_template.jinja").write_text(
        "{{ messages.__class__.__mro__[1].__subclasses__() }}"), "refuses the prompt"),
    "a template of nothing": (lambda folder: (folder / "chat_template.jinja").write_text(""), "a prompt is empty"),
}


def shrink(folder, end):
    """A model of 10 tokens with a tokenizer of hundreds. Token 4 is "!"."""
    change_json(folder / "config.json", vocab_size=10, eos_token_id=4)
    change_json(folder / "generation_config.json", eos_token_id=4)
    change_json(folder / "tokenizer_config.json", eos_token=end)
    change_weights(folder / "model.safetensors", lambda weights: weights.update(
        {name: weights[name][:10].clone() for name in weights if "embed" in name or "lm_head" in name}))


@pytest.mark.parametrize("script", ["train", "eval", "sample"])
@pytest.mark.parametrize("name", MODELS)
def test_model(outcome, world, script, name):
    change, expected = MODELS[name]
    shutil.rmtree(world / "given", ignore_errors=True)
    shutil.copytree(world / "model", world / "given")
    change(world / "given")
    sentence = outcome(*USES[script])
    assert expected in sentence and (sentence != "" or not expected)


RUN_FILES = ["config.json", "metrics.jsonl", "samples.jsonl", "lock", "checkpoint", "checkpoint/config.json",
             "checkpoint/model.safetensors", "checkpoint/state.pt", "checkpoint/tokenizer.json",
             "checkpoint/checksums.json"]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", RUN_FILES)
def test_run_folder(outcome, world, file, damage):
    """--resume of a run of one step, with one checkpoint."""
    if not (world / "kept").exists():
        outcome("train", "--name=run", "--runs_dir=kept", "--resample_tries=1")
    shutil.rmtree(world / "given", ignore_errors=True)
    shutil.copytree(world / "kept", world / "given")
    path, change = world / "given" / "run" / file, DAMAGE[damage]
    old = path.read_bytes() if path.is_file() else b""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if change == "folder":
        path.mkdir()
    elif change:
        path.write_bytes(change(old))
    sentence = outcome("train", "--name=run", "--runs_dir=given", "--resume", "--steps=2")
    works = {"checkpoint": damage == "missing", "samples.jsonl": damage != "a folder", "lock": damage != "a folder"}
    assert (sentence == "") == works.get(file, False), sentence
    assert sentence == "" or "given" in sentence


EXPRESSIONS = [
    "", " ", "exakt", "1", "number +", "+", "number number", "number / 2", "number ** 2", "number % 2", "(", ")",
    "number)", "number; number", "lambda: 1", "__import__('os')", "os.system", "number.__class__", "[number]",
    "number if 1 else 0", "not number", "number == 1", "number and exact", "1e999*number", "nan*number", "number(1)",
    "contains()", "contains(1)", "contains('a', 'b')", "contains(text='a')", "regex('(')", "regex('[')", "regex('*')",
    "regex('\\\\')", "model('')", "model('no/such')", "model('model')", "model('..')", "raw_model('problems.jsonl')",
    "model(number)", "no_such_file.function", "sys.exit", "'number'", "f'{1}'", "number\x00", "n\u00fcmber",
    "-" * 5000 + "number", "(" * 5000 + "number", "number" + "+number" * 20000, "length*1e308*1e308",
    "1e39*length - 1e39", "True*number", "1j*number", "10**9*number", "...", "# number", "print(number)", "open('x')",
    "number@number", "number := 1", "*number", "number,", "exec('1')",
]


@pytest.mark.parametrize("flag", ["reward", "true_reward"])
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_reward_expression(outcome, expression, flag):
    sentence = outcome("train", f"--{flag}={expression}")
    assert ("--reward" in sentence or "model(" in sentence) == (expression != "")
