"""Situations in which people of this field report trouble: a wrong prompt, a wrong split, a reward
that reads something else than the person who wrote it. Each once gave a wrong result without a
word."""

import json
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import architectures
import pytest
import torch
from conftest import CPU, parse_train
from safetensors.torch import load_file
from tiny import CHATML, SIZES
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, Gemma3Config

import eval
import reward
import train
from engine.choose import choose
from lib.checks import without_keys
from lib.files import read_rows, write_rows
from lib.flags import UserError
from lib.texts import describe_prompt, token_texts
from loss import NORMALISERS, group_weights
from policy import load_policy, stop_ids
from reward import REWARDS, load_reward, score, votes
from sample import Rollout, Sampling
from tasks import NO_TASK, Problem, Task, load_task, longest_prompts, prompt_ids

ROOT = Path(__file__).parent.parent
SMALL = "--steps=1 --prompts_per_step=2 --group_size=2 --max_new_tokens=4 --eval_problems=0"


def write_problems(rows, name="my.jsonl"):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def many(**columns):
    """30 problems that differ in their prompts only."""
    return [{"prompt": f"{i} + 1?", "answer": str(i + 1), **columns} for i in range(30)]


def run_train(model, *flags):
    return train.main(parse_train(f"--model={model}", *SMALL.split(), *flags))


@pytest.fixture
def chat(folders):
    """chat(template) -> (policy, tokenizer, folder): a copy of a model with this chat template."""

    def make(template=CHATML, architecture="qwen2"):
        shutil.copytree(folders(architecture), "model", dirs_exist_ok=True)
        (Path("model") / "chat_template.jinja").write_text(template)
        return *load_policy("./model", CPU), "./model"

    return make


def change_tokenizer(folder, change):
    path = Path(folder) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    change(tokenizer)
    tokenizer.save(str(path))


# ------------------------------------------------------------------------------------- prompts

SYSTEM = Task("t", [], [], [], "number", system="Be brief.", template="Q: {prompt}")


def as_text(tokenizer, prompt, task=NO_TASK, **columns):
    return tokenizer.decode(prompt_ids(task, Problem(prompt, "1", "", columns), tokenizer))


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


START = "<|im_start|>assistant\n"


def test_a_run_shows_a_prompt_as_the_model_gets_it(chat, capsys):
    *_, folder = chat()
    run_train(folder, f"--task={write_problems(many())}")
    shown = capsys.readouterr().out
    lines = shown.partition("prompt     ")[2].splitlines()
    first = json.loads(Path("my.jsonl").read_text().splitlines()[0])
    assert lines[0].endswith(r"tokens, the last is '\n':")
    assert lines[1:4] == [
        "    | <|im_start|>user",
        f"    | {first['prompt']}<|im_end|>",
        "    | <|im_start|>assistant",
    ]
    assert lines[5] == f"answer     {first['answer']}"


def test_a_long_prompt_is_shown_in_15_lines(load):
    _, tokenizer = load("llama")
    ids = tokenizer("\n".join(f"line  {i}" for i in range(40)))["input_ids"]
    shown = describe_prompt(tokenizer, ids, "75").splitlines()
    assert len(shown) == 15
    assert shown[1] == "    | line  0" and "    | line  39" in shown
    assert "    | ... 28 lines ..." in shown


def append_eos(tokenizer):
    """As tokenizers with add_eos_token do."""
    special = [("<|endoftext|>", 0)]
    ending = processors.TemplateProcessing(single="$A <|endoftext|>", special_tokens=special)
    tokenizer.post_processor = ending


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_prompt_does_not_end_with_end_of_text(folders, architecture):
    shutil.copytree(folders(architecture), "model")
    change_tokenizer("model", append_eos)
    _, tokenizer = load_policy("./model", CPU)
    assert tokenizer("1+1=?")["input_ids"][-1] == tokenizer.eos_token_id
    assert as_text(tokenizer, "1+1=?") == "1+1=?"


DROPS = """{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_a_template_that_drops_the_system_role_does_not_drop_the_instruction(chat):
    """Without a word, unlike one that raises. In a conversation too."""
    _, tokenizer, _ = chat(DROPS)
    assert as_text(tokenizer, "2?", SYSTEM) == turn("user", "Be brief.\n\n2?") + START
    talk = [{"role": "system", "content": "Be  kind."}, {"role": "user", "content": "2?"}]
    assert as_text(tokenizer, talk) == turn("user", "Be  kind.\n\n2?") + START
    _, tokenizer, _ = chat(CHATML)
    assert as_text(tokenizer, talk) == turn("system", "Be  kind.") + turn("user", "2?") + START


def test_half_an_assistant_turn_is_continued(chat):
    _, tokenizer, _ = chat()
    talk = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "It is"}]
    assert as_text(tokenizer, talk) == turn("user", "2?") + START + "It is"


READS = "{{ tools | length if tools else '' }}{{ 'quiet' if enable_thinking is false }}" + CHATML


def test_tools_and_settings_of_a_row_go_to_the_template(chat, load):
    _, tokenizer, _ = chat(READS)
    columns = {"tools": [{"type": "function"}], "chat_template_kwargs": {"enable_thinking": False}}
    task = load_task(write_problems(many(**columns)))
    shown = tokenizer.decode(prompt_ids(task, task.train[0], tokenizer))
    assert shown.startswith("1quiet<|im_start|>")
    _, plain = load("llama")  # has no template: nothing could come of them
    with pytest.raises(UserError, match=r'a row has "(tools|chat_template_kwargs)"'):
        prompt_ids(task, task.train[0], plain)


def test_the_date_in_a_prompt_is_always_the_same(chat):
    """Equal runs have equal prompts, before and after midnight."""
    _, tokenizer, _ = chat("{{ strftime_now('%d %b %Y %f') }}" + CHATML)
    shown = as_text(tokenizer, "2?")
    assert shown.startswith("01 Jan 2025 000000<|im_start|>")
    assert shown == as_text(tokenizer, "2?")


def test_the_longest_prompt_is_the_one_of_most_tokens(load):
    """64 long texts, and one of few characters with several tokens each."""
    _, tokenizer = load("llama")
    problems = [Problem("Question: Ann has apples. " * 6 + str(i), "1") for i in range(90)]
    problems.insert(50, Problem("\U0001f9ee" * 60, "1"))
    problems.insert(20, Problem("2?", "1"))
    longest = longest_prompts(NO_TASK, problems, tokenizer)
    lengths = [len(prompt_ids(NO_TASK, problem, tokenizer)) for problem in problems]
    assert len(longest[0]) == max(lengths) == lengths[51] and max(lengths) > 200
    assert len(longest[-1]) == min(lengths)  # an empty one is seen at the start too
    assert len(longest) == 64


# ------------------------------------------------------------------------------------- stop tokens


def test_the_end_of_turn_of_a_template_is_a_stop_token(chat, load):
    """A base model with a chat template: its end of text is another token."""
    policy, tokenizer, _ = chat()
    eos, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert tokenizer.eos_token_id == eos and policy.generation_config.eos_token_id == eos
    assert stop_ids(policy, tokenizer) == [eos, end]
    policy, tokenizer, _ = chat(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    assert stop_ids(policy, tokenizer) == [eos]  # a line break is no token of its own
    assert stop_ids(policy, tokenizer, "<|im_start|>") == [eos, 2]
    with pytest.raises(UserError, match=r"--stop <end>: not a token of its own, as .*<.im_end.>"):
        stop_ids(policy, tokenizer, "<end>")


# ------------------------------------------------------------------------------------- responses


def one_row(tokenizer, prompt, ids, finished):
    ids = tokenizer(prompt)["input_ids"] + ids
    start = len(tokenizer(prompt)["input_ids"])
    mask = torch.ones(1, len(ids) - start, dtype=torch.bool)
    columns = [torch.tensor([n]) for n in (start, len(ids))]
    return Rollout(
        torch.tensor([ids]), *columns, mask, torch.zeros(mask.shape), torch.tensor([finished])
    )


def test_tags_that_are_special_tokens_reach_the_reward(load):
    """`format` was 0 for ever, and `number` paid the number in the thought."""
    _, tokenizer = load("llama")
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    text = "<think>8+7=15, not 99</think>The sum is"
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    assert one_row(tokenizer, "8+7=", ids, True).responses(tokenizer) == [text]
    assert one_row(tokenizer, "8+7=", ids, False).responses(tokenizer) == [text + "<|endoftext|>"]
    assert REWARDS["format"]("", text, "15") == 1
    assert REWARDS["number"]("", text, "99") == 0


@pytest.mark.parametrize("prompt", ["8+7=<think>\n", "8+7= "])
def test_a_thought_that_the_prompt_opens_begins_the_response(load, prompt):
    """`format` was always 0, and half a thought was an answer."""
    _, tokenizer = load("llama")
    opened = "<think>\n" if "<think>" in prompt else ""
    ids = tokenizer("8+7=15</think>15")["input_ids"]
    row = one_row(tokenizer, prompt, ids, False)
    [sample] = row.samples([Problem(prompt, "15")], tokenizer, with_tokens=True)
    assert sample["response"] == opened + "8+7=15</think>15" == "".join(sample["tokens"])
    assert len(sample["tokens"]) == sample["length"] == len(ids)
    assert REWARDS["format"](prompt, sample["response"], "15") == (opened != "")
    [half] = one_row(tokenizer, prompt, ids[:4], False).responses(tokenizer)
    assert REWARDS["number"](prompt, half, "15") == 0 or not opened


TEXTS = [
    "caf\u00e9 \U0001f9ee \u4f60\u597d 75",
    " 75 apples ",
    "x != y , do n't .",
    "\ufffd\U0001f9ee",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("finished", [True, False])
def test_texts_of_tokens_join_to_the_response(load, text, finished):
    _, tokenizer = load("llama")
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer, [5], [*ids, 0] if finished else ids, finished)
    assert "".join(texts) == text
    assert len(texts) == len(ids) + finished
    assert "\ufffd" not in "".join(texts).replace(text, "")
    half = token_texts(tokenizer, [5], ids[:-1], False)  # perhaps half a character
    assert "".join(half) == tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False)


# ------------------------------------------------------------------------------------- the split


def sides(task):
    return [
        {json.dumps(p.prompt, sort_keys=True) for p in part}
        for part in (task.train, task.validation, task.test)
    ]


def test_no_problem_changes_sides_where_a_file_grows():
    """The border was a rank: with one row more, train and validation changed places."""
    rows = [{"prompt": f"{i} + {i}?", "answer": str(2 * i)} for i in range(1000)]
    whole = sides(load_task(write_problems(rows)))
    for part in (rows[:300], rows[200:], rows[::-2]):
        for small, large in zip(sides(load_task(write_problems(part))), whole):
            assert small <= large
    assert 70 < len(whole[1]) < 110 and 80 < len(whole[2]) < 120


def test_equal_conversations_are_on_one_side():
    rows = []
    for i in range(60):
        message = {"role": "user", "content": f"q{i}"}
        rows += [{"prompt": [message]}, {"prompt": [dict(reversed(message.items()))]}]
    train_side, validation, test = sides(load_task(write_problems(rows)))
    assert not train_side & test and not train_side & validation and not validation & test
    assert len(train_side | validation | test) == 60


def test_swapped_sums_are_on_one_side():
    task = load_task("add")
    parts = [
        {frozenset(p.prompt[:-1].split("+")) for p in part}
        for part in (task.train, task.validation, task.test)
    ]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 90 * 91 // 2


# ------------------------------------------------------------------------------------- answers

ANSWERS = [(True, "true"), (75.0, "75.0"), ("1e5", "1e5"), (0.1, "0.1"), (10**25, str(10**25))]


@pytest.mark.parametrize(("value", "text"), ANSWERS)
def test_an_answer_is_the_text_of_the_file(value, text):
    """true became "True", 1e5 became "100000.0"."""
    assert load_task(write_problems(many(answer=value))).train[0].answer == text
    Path("my.jsonl").write_text(
        "".join(f'{{"prompt": "p{i}", "answer": 1e5}}\n' for i in range(30))
    )
    assert load_task("my.jsonl").train[0].answer == "1e5"


@pytest.mark.parametrize("answer", [["75"], {"a": 1}, "", "  \n"])
def test_what_is_no_answer_is_refused(answer):
    with pytest.raises(UserError, match='line 1: "answer" is missing, empty or of the wrong type'):
        load_task(write_problems(many(answer=answer)))


@pytest.mark.parametrize(
    "answer",
    ["75\n", " 75", ".5", "1e5", "1E-5", "+75", "-1,000.5", "\u22125", "1 000", "1\u202f000"],
)
def test_these_are_numbers(answer):
    assert load_task(write_problems(many(answer=answer))).reward == "number"
    assert REWARDS["number"]("", f"It is {answer.strip()}.", answer) == 1


# ------------------------------------------------------------------------------------- rules

NUMBERS = [
    ("1 000 000", "1000000"),
    ("1\u202f000", "1000"),
    ("1\u00a0000", "1000"),
    ("1\u2009000,", "1000"),
    ("1'000", "1000"),
    ("1\u2019000.50", "1000.5"),
    ("in 2020 100 people", "100"),
    ("12.5 100", "100"),
    ("7 50", "50"),
    ("\uff17\uff15", "75"),
    ("x = \uff0d\uff17.\uff15", "-7.5"),
    ("3\uff0c75", "75"),
    (r"\frac12", "0.5"),
    (r"-\frac12", "-0.5"),
    (r"\boxed{\dfrac1{2}}", "0.5"),
    (r"\frac{1}2", "0.5"),
    ("- 75 apples", "75"),
    ("- 3 pears\n- 75 apples", "75"),
    ("\u2022 75", "75"),
    ("- 75", "-75"),
    ("-75 apples", "-75"),
]


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_numbers_are_read_as_a_person_reads_them(text, value):
    assert REWARDS["number"]("", text, value) == 1
    assert REWARDS["number"]("", value, text) == 1  # in a reference answer too


def test_no_answer_has_no_vote_and_equal_answers_have_one():
    """Half a thought was a vote for ''."""
    assert votes("exact", ["<think>a", "", "75", " 75"]) == [None, None, "75", "75"]
    stated = ["The answer is 12.", "#### 12.0", "12", "so it makes 12", "<think>12"]
    assert votes("stated", stated) == ["12", "12", "12", None, None]
    expressions = ["<answer>3 * 8</answer>", "<answer>3*8</answer>", "3*8", "<answer>3 8</answer>"]
    assert votes("countdown", expressions) == ["3*8", "3*8", None, "3 8"]


@pytest.mark.slow
def test_equal_answers_in_latex_have_one_vote():
    pytest.importorskip("math_verify")
    found = votes("math", [r"$\frac{1}{2}$", "0.5", r"$\{1, 2\}$", r"$\{2,1\}$", "hm", "<think>7"])
    assert found == [0, 0, 2, 2, None, None]


# ------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", NORMALISERS)
def test_a_higher_reward_never_gets_a_lower_weight(name):
    """maxrl turned the signs of a group whose mean was below 0. Now it refuses such a group."""
    torch.manual_seed(0)
    config = parse_train("--softmax_beta=0.5", f"--normaliser={name}")
    for low, high in [(0, 1), (0, 1e-3), (-1, 1), (-2, -1), (-1e4, 1e4)]:
        rewards = low + (high - low) * torch.rand(50, 6, dtype=torch.float64)
        rewards[::2] = rewards[::2].round()  # ties
        if name == "maxrl" and low < 0:
            with pytest.raises(UserError, match="--normaliser maxrl: wants rewards from 0 up"):
                group_weights([*rewards], config)
            continue
        weights = group_weights([*rewards], config).view_as(rewards)
        higher = rewards[:, :, None] > rewards[:, None, :]
        assert (weights[:, :, None] >= weights[:, None, :] - 1e-9)[higher].all()
        equal = rewards[:, :, None] == rewards[:, None, :]
        assert (weights[:, :, None] - weights[:, None, :])[equal].abs().max() < 1e-9


def test_differences_of_large_rewards_do_not_vanish(folders):
    """Float32 does not tell 2^24 from 2^24 + 1."""
    Path("mine.py").write_text("def f(prompt, response, answer): return 2**40 + len(set(response))")
    task = write_problems(many())
    run = run_train(folders("llama"), f"--task={task}", "--reward=mine.f", "--log_samples=99")
    groups = defaultdict(list)
    for row in read_rows(run / "samples.jsonl"):
        groups[row["prompt"]].append((row["reward"], row["weight"]))
    differ = [group for group in groups.values() if len({reward for reward, _ in group}) > 1]
    assert differ
    for group in differ:
        assert max(group)[1] > 0 > min(group)[1]


# ------------------------------------------------------------------------------------- rewards


def test_a_reward_gets_the_columns_that_it_names():
    Path("mine.py").write_text("""
def passed(prompt, response, answer, tests, weight=2): return weight * sum(tests)
def all_passed(prompts, responses, answers, tests): return [sum(test) for test in tests]
def open_ended(prompt, response, answer, **others): return len(others)
def level(prompt, response, answer, **columns): return columns["level"] + 10 * len(columns)
""")
    task = load_task(write_problems(many(tests=[1, 2])))
    reward = load_reward("mine.passed + mine.all_passed + 0*mine.open_ended", problems=task.train)
    assert task.train[0].columns == {"tests": [1, 2]}
    sample = {"prompt": "1?", "response": "1", "answer": "1"}
    rollout_samples = [
        {**sample, "columns": {"tests": [1, 2]}},
        {**sample, "columns": {"tests": [], "weight": 5}},
    ]
    found = score(reward, rollout_samples)
    assert [row["reward"] for row in found] == [6 + 3, 0]
    # a sample's own keys are no columns
    [row] = score(reward, [{**sample, "columns": {"tests": [1]}, "weight": 5, "level": 7}])
    assert row["reward"] == 2 + 1
    level = load_reward("mine.level")
    assert score(level, [{**sample, "columns": {"level": 3, "tests": []}}])[0]["reward"] == 3 + 20
    problems = [*task.train, Problem("1?", "1")]
    with pytest.raises(UserError, match=r'--reward mine.passed: .* `tests`, .* no column "tests"'):
        load_reward("mine.passed", problems=problems)
    load_reward("mine.open_ended", problems=problems)


def test_a_batch_reward_gets_defaults_limits_and_lists():
    """A parameter with a default got [None, None]; a `limit` stayed at its default."""
    Path("mine.py").write_text("""
def f(prompts, responses, answers, limit, length, tokens, level=2, weight=3.0):
    assert isinstance(weight, float) and isinstance(level, list), (weight, level)
    return [limit + len(t) + n + v for n, t, v in zip(length, tokens, level)]
""")
    sample = {"prompt": "1?", "response": "1", "answer": "1", "length": 5, "tokens": ["1", ""]}
    rows = [{**sample, "columns": {"level": 100}}, sample]
    found = score(load_reward("mine.f"), rows, limit=1000)
    assert [row["reward"] for row in found] == [1107, 1009]


def test_a_template_that_ignores_tools_is_named(chat, capsys):
    *_, folder = chat()
    task = write_problems(many(tools=[{"name": "f"}], chat_template_kwargs={"lang": "de"}))
    run_train(folder, f"--task={task}")
    said = capsys.readouterr().out
    assert 'ignores the "tools"' in said and 'ignores the "chat_template_kwargs"' in said


def test_a_run_hands_the_columns_to_its_reward(folders):
    Path("mine.py").write_text("""
def noted(prompt, response, answer, note): return float(note == "n" + answer)
""")
    rows = [{**row, "note": f"n{row['answer']}"} for row in many()]
    run = run_train(
        folders("llama"),
        f"--task={write_problems(rows)}",
        "--reward=mine.noted",
        "--eval_problems=2",
    )
    [row] = read_rows(run / "metrics.jsonl")
    assert row["reward"] == row["eval_mean_reward"] == 1


def test_characters_that_the_tokenizer_lacks_are_named(base, capsys):
    task = write_problems([{"prompt": f"é{i}", "answer": str(i)} for i in range(30)])
    run_train(base, f"--task={task}")
    said = "warning: the tokenizer does not know some characters of the prompts, and writes <unk>"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("name", ["length", "limit"])
def test_a_column_is_not_taken_for_a_number_of_the_response(name):
    """ "Write {length} words": the reward got the tokens of the response."""
    Path("mine.py").write_text(f"def f(prompt, response, answer, {name}): return {name}")
    task = load_task(write_problems(many(**{name: 45})))
    with pytest.raises(UserError, match=f'`{name}`.*have a column "{name}" too'):
        load_reward("mine.f", problems=task.train)


@pytest.mark.parametrize(
    "parameters",
    [
        "response, answer, prompt",
        "response, answer, x",
        "p, answer, response",
        "answers, prompts, r",
    ],
)
def test_texts_in_another_order_are_refused(parameters):
    Path("mine.py").write_text(f"def f({parameters}): return 1")
    with pytest.raises(UserError, match=rf"mine.f: .*\({parameters}\), .* \(prompt, response, ans"):
        load_reward("mine.f")


def test_a_file_is_scored_as_in_training(folders, capsys):
    """A default was taken from the sample's own keys, and the limit was another."""
    Path("mine.py").write_text("""
def f(prompt, response, answer, limit, weight=1.0, level=0): return weight * limit + level
""")
    run = run_train(
        folders("llama"), f"--task={write_problems(many(level=100))}", "--reward=mine.f",
        "--max_new_tokens=7",
    )  # fmt: skip
    [row] = read_rows(run / "metrics.jsonl")
    assert row["reward"] == 107
    capsys.readouterr()
    reward.main(reward.Config(reward="mine.f"), str(run / "samples.jsonl"))
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "107.000"
    # one of the user's own: its rows are the problems
    write_rows(Path("own.jsonl"), [{"prompt": "1", "response": "1", "answer": "1", "weight": 3}])
    reward.main(reward.Config(reward="mine.f", limit=2), "own.jsonl")
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "6.000"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("lambda prompts, r, a: dict.fromkeys(range(len(r)), 1.0)", "returned a dict, not a list"),
        ("lambda prompts, r, a: 'ab'", "returned a str, not a list"),
        ("lambda prompt, r, a: []", r"returned \[\], not a finite number"),
        ("lambda prompt, r, a, tokens=(): []", r"returned \[\], not a finite number"),
    ],
)
def test_what_a_reward_must_not_return(function, message):
    """The keys of the dict were paid, and [] was 0."""
    Path("mine.py").write_text(f"f = {function}")
    samples = [{"prompt": "1?", "response": text, "answer": "1", "tokens": []} for text in "ab"]
    with pytest.raises(UserError, match=f"--reward mine.f: {message}"):
        score(load_reward("mine.f"), samples)


def test_a_file_of_rewards_runs_once_for_all_its_parts():
    Path("mine.py").write_text("""
with open("runs.txt", "a") as file: file.write("x")
def a(prompt, response, answer): return 1
def b(prompt, response, answer): return 2
""")
    load_reward("mine.a + mine.b")
    load_reward("mine.b")
    assert Path("runs.txt").read_text() == "x"
    Path("mine.py").write_text("def a(prompt, response, answer): return 3")
    sample = {"prompt": "1?", "response": "1", "answer": "1"}
    assert score(load_reward("mine.a"), [sample])[0]["reward"] == 3  # an edit counts


TOURNAMENT = """
from collections import defaultdict
def longest(prompts, responses, answers):
    groups = defaultdict(list)
    for prompt, response in zip(prompts, responses):
        groups[prompt].append(len(response))
    return [float(len(r) == max(groups[p]) > min(groups[p])) for p, r in zip(prompts, responses)]
def size(prompts, responses, answers):
    return [prompts.count(prompt) for prompt in prompts]
"""


def test_a_reward_that_compares_the_responses_to_a_prompt_is_evaluated_in_groups(folders, capsys):
    """With one response each, it said "no difference seen" of a run that had learned much."""
    Path("mine.py").write_text(TOURNAMENT)
    models = [folders("llama"), folders("qwen3")]
    flags = dict(reward="mine.longest", max_new_tokens=4, device="cpu", limit=3)
    content = eval.main(eval.Config(task=write_problems(many()), **flags), models)
    assert (
        "--reward mine.longest: may compare the responses to a prompt: 8" in capsys.readouterr().out
    )
    [comparison] = content["comparisons"]
    assert content["samples"] == eval.GROUP and comparison["measured"] == "mean_reward"
    for result in content["models"].values():
        assert 0 < result["mean_reward"]["sampled"]["mean"] < 1

    flags_of_run = ["--reward=mine.longest", "--eval_problems=3", "--max_new_tokens=4"]
    run = run_train(models[0], "--task=my.jsonl", *flags_of_run)
    [row] = read_rows(run / "metrics.jsonl")
    assert row["eval_mean_reward"] > 0  # of one response each it would be 0

    run = run_train(models[0], "--task=my.jsonl", "--reward=mine.size", *flags_of_run[1:])
    before = json.loads((run / "before.json").read_text())["mean_reward"]
    assert before["greedy"]["values"] == before["sampled"]["values"] == [eval.GROUP] * 3

    content = eval.main(eval.Config(task="add", **flags), models)  # has an accuracy
    assert "the accuracy is measured instead" in capsys.readouterr().out
    [comparison] = content["comparisons"]
    assert content["samples"] == 1 and comparison["measured"] == "accuracy"
    run = run_train(models[0], "--task=add", *flags_of_run, "--group_size=4")
    [row] = read_rows(run / "metrics.jsonl")
    assert row["reward"] > 0 and "eval_accuracy" in row and "eval_mean_reward" not in row


# ------------------------------------------------------------------------------------- models


def test_what_sees_images_is_not_trained(load, capsys):
    """It went into the optimizer, 16 bytes a parameter, and got no gradient."""
    _, tokenizer = load("qwen2")
    text = {**SIZES, "num_key_value_heads": 2, "vocab_size": 600, "sliding_window": 8}
    text |= {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1, "initializer_range": 0.2}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vision |= {"num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
    model = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=vision))
    model.save_pretrained("sees")
    tokenizer.save_pretrained("sees")
    Path("mine.py").write_text("def f(prompt, response, answer): return len(set(response))")
    run = run_train("./sees", f"--task={write_problems(many())}", "--reward=mine.f", "--lr=0.01")
    assert "M parameters for images or sound are not trained" in capsys.readouterr().out
    before = load_file("sees/model.safetensors")
    after = load_file(run / "checkpoint" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("vision" in name or "multi_modal" in name for name in changed)
    seeing = sum(before[name].numel() for name in before if "language_model" not in name)
    state = torch.load(run / "checkpoint" / "state.pt", weights_only=True)["optimizer"]
    moments = sum(t.numel() for t in tensors_in(state))
    assert moments < 3.1 * (sum(t.numel() for t in before.values()) - seeing)


def tensors_in(thing):
    if torch.is_tensor(thing):
        yield thing
    for part in (
        thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list) else ()
    ):
        yield from tensors_in(part)


WINDOWS = """
import os, runpy, signal, sys
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # what they need is not ours
import torch.distributed
for name in ("fcntl", "resource"):
    sys.modules[name] = None
del os.sysconf, signal.SIGHUP
sys.argv[:2] = sys.argv[1:2]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_windows_without_cuda(folders):
    """Python there has no fcntl, resource, os.sysconf and SIGHUP."""
    command = [sys.executable, "-c", WINDOWS, str(ROOT / "train.py"), *SMALL.split()]
    command += [f"--model={folders('llama')}", f"--task={write_problems(many())}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "there is no estimate" in done.stdout


def test_a_hybrid_is_told_why_it_is_slow(capsys):
    """It was "IndexError: list index out of range"."""
    model = architectures.make_model("qwen3_next")
    choose(model, [[5, 6, 7]], [0], Sampling(), 4)
    said = capsys.readouterr().out
    assert "layers of type linear_attention keep a state instead of keys and values" in said
    assert without_keys(architectures.make_model("gemma3_text")) == ""
