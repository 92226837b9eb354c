import json
import re
import shutil
from itertools import chain
from pathlib import Path

import pytest
from conftest import CPU, parse_train

import engine.choose
import train
from engine.memory import Memory
from engine.sampler import LocalSampler
from eval import Config, Evaluation, details, main, sampling_of_runs
from lib.flags import UserError
from lib.report import results_table
from policy import load_policy
from reward import REWARDS, Rewards, final_answer, load_reward, measures
from sample import Sampling
from tasks import Problem, load_task

ROW = {"prompt": "?", "response": "7", "difficulty": "", "finished": True, "length": 2, "parts": {}}


def details_by(rule, answer, *groups):
    """What `details` finds for groups of responses to problems with one answer."""

    def row(text):
        return ROW | {"response": text, "accuracy": REWARDS[rule]("?", text, answer)}

    rows = [list(map(row, texts)) for texts in groups]
    return details(rows, {"accuracy": rule})


def test_responses_depend_on_neither_the_batch_nor_the_other_problems(base):
    policy, tokenizer = load_policy(base, CPU)
    task = load_task("add")
    forms = engine.choose.Forms(generate=engine.generate.generate)
    sampler = LocalSampler(policy, tokenizer, forms, Memory({}, rows_at_once=16))
    measured = Rewards({"accuracy": "exact"}, load_reward)

    def evaluation(problems, rows=256):
        return Evaluation(sampler, tokenizer, task, problems, measured, Sampling(), 8, rows)

    def ask(problems, rows=256, **options):
        return evaluation(problems, rows).respond(**options)

    problems = task.test[:20]
    assert ask(problems, greedy=True) == ask(problems, greedy=True, rows=7)
    groups = ask(problems, group_size=4)
    assert groups == ask(problems, group_size=4, rows=3)
    assert groups[3:4] == ask(problems[3:4], group_size=4)
    assert groups != ask(problems, group_size=4, seed=1)
    assert len({row["response"] for row in chain(*groups)}) > 20

    # the same problems, where every other response is right
    texts = [group[0]["response"] for group in ask(problems)]
    for i in range(0, 20, 2):
        problems[i] = Problem(problems[i].prompt, final_answer(texts[i]))
    found = evaluation(problems).summary()
    assert (found["responses"], found["accuracy"]["mean"]) == (texts, 0.5)


def test_pass_and_maj_at_k_of_two_problems():
    """7 7 8 8: pass@1 1/2, pass@2 1 - 1/6, majorities by twos 7 and 8, of all four a tie that the
    first wins. 9 9 9 7: 1/4, 1/2; never the majority."""
    found = details_by("exact", "7", "7788", "9997")
    passed, majority = found["pass_at"], found["maj_at"]
    assert list(passed) == list(majority) == [1, 2, 4]
    shares = [share["mean"] for share in chain(passed.values(), majority.values())]
    assert shares == pytest.approx([3 / 8, 4 / 6, 1, 3 / 8, 1 / 4, 1 / 2])


def test_votes_are_counted_after_answers_are_normalised():
    """By `number`, '7.0' and 'so 7' are one answer, with two votes."""
    texts = ["8", "7.0", "so 7"]
    for rule, right in (("number", 0), ("exact", 1)):
        found = details_by(rule, "8", texts)
        assert found["maj_at"][3]["mean"] == right


def task_of_a_file():
    rows = [json.dumps({"prompt": f"{i}?", "answer": i}) for i in range(20)]
    Path("my.jsonl").write_text("\n".join(rows))
    return load_task("my.jsonl")


# task, --reward, --true_reward -> what is measured
MEASURED = """
add | | -> accuracy exact
add | exact | -> accuracy exact
add | number | -> mean_reward number accuracy exact
add | number | exact -> accuracy exact
file | | -> accuracy number
file | stated | -> accuracy stated
file | length | -> mean_reward length
file | exact+format | -> mean_reward exact+format
file | exact+format | exact -> accuracy exact"""


@pytest.mark.parametrize("line", MEASURED.strip().splitlines())
def test_what_is_measured_is_what_was_asked_for(line):
    """The guessed rule of a file counts only if no reward was named. A task with a rule of its own
    keeps its accuracy beside another reward."""
    flags, expected = line.split("->")
    task, *rewards = map(str.strip, flags.split("|"))
    task = task_of_a_file() if task == "file" else load_task("add")
    assert " ".join(chain(*measures(task, *rewards).items())) == expected.strip()


def test_accuracy_by_difficulty():
    rows = [("steps 10", 1.0), ("steps 2", 1.0), ("steps 2", 0.0)]
    groups = [[{**ROW, "difficulty": label, "accuracy": right}] for label, right in rows]
    found = details(groups, {"accuracy": load_reward("exact")})["by_difficulty"]
    assert list(found) == ["steps 2", "steps 10"]
    assert [share["mean"] for share in found.values()] == [0.5, 1]


def test_a_run_is_sampled_as_it_sampled_in_training():
    hot, cold = {"temperature": 1.5, "lr": 1}, {"temperature": 0.5, "lr": 2}
    assert sampling_of_runs({"a": hot, "b": hot}, 0) == Sampling(1.5)
    assert sampling_of_runs({"a": hot, "b": cold}, 1) == Sampling(1)
    assert sampling_of_runs({}, 0) == sampling_of_runs({"older than a field": {}}, 0) == Sampling(1)
    with pytest.raises(UserError, match="--temperature: the runs differ"):
        sampling_of_runs({"a": hot, "b": cold}, 0)


RESULT = """{"accuracy": {"greedy": {"mean": 0.111, "interval": [0.101, 0.121]},
"sampled": {"mean": 0.131, "interval": [0.122, 0.142]}}, "new number": 0.150,
"parts": {"format": 0.151}, "pass_at": {"16": {"mean": 0.161, "interval": [0.152, 0.172]}},
"by_difficulty": {"steps 2": {"mean": 0.181, "interval": [0.173, 0.191]}}}"""


def test_the_table_has_every_number():
    other = RESULT.replace("0.1", "0.8")
    table = results_table({"base": json.loads(RESULT), "run": json.loads(other)})
    number = re.compile(r"0\.\d+")
    assert set(number.findall(table)) == set(number.findall(RESULT + other))
    assert re.search(r"pass@16 +0.161 \[0.152, 0.172\] +0.861 \[0.852, 0.872\]\n", table)


def test_a_run_is_measured_beside_its_base(base, capsys, monkeypatch):
    sizes = """--steps 1 --lr 1e-2 --prompts_per_step 2 --group_size 4 --max_new_tokens 8
        --eval_problems 5"""
    flags = ["--name", "one", "--reward", "number + 0.1*length", "--warmup_steps", "1"]
    folder = train.main(parse_train("--model", base, *flags, *sizes.split()))
    run = str(folder)
    before = json.loads((folder / "before.json").read_text())
    assert before["responses"][2] in capsys.readouterr().out

    # several models: no run's folder gets the files
    other = Path(shutil.copytree(folder, "runs/other"))
    config = other / "config.json"
    config.write_text(config.read_text().replace('"max_new_tokens": 8', '"max_new_tokens": 6'))
    for flags, models, message in [
        ({}, [run, "runs/other"], r"--max_new_tokens: the runs differ in it \(8, 6\), give one"),
        ({}, [base], "--task: none of the models is a run"),
        ({"output": config}, [run], "--output .* cannot be written to"),
    ]:
        with pytest.raises(UserError, match=message):
            main(Config(**flags), models)
    sizes = {"limit": 8, "samples": 2}
    several = main(Config(max_new_tokens=8, rows_at_once=5, **sizes), [run, "runs/other"])
    assert Path("runs/eval/eval.json").exists() and not (folder / "eval.json").exists()
    pairs = {(pair["before"], pair["after"]): pair["greedy"] for pair in several["comparisons"]}
    assert [*pairs] == [(base, run), (base, "runs/other"), (run, "runs/other")]
    assert pairs[run, "runs/other"]["difference"] == 0 != pairs[base, run]["difference"]

    # in float32 the plain form gives the same responses
    with monkeypatch.context() as patch:
        patch.setattr(engine.generate, "generate", None)
        found = main(Config(fast="off", **sizes), [run])
    shown = capsys.readouterr().out
    assert results_table(found["models"]) in shown and f"{run} against {base}" in shown
    assert found["models"].items() <= several["models"].items()
    assert found["reward"] == "number + 0.1*length"
    assert (folder / "eval.png").exists()
    assert json.loads((folder / "eval.json").read_text())["n"] == found["n"] == 8
    # 2 models, 8 test problems, 1 greedy and 2 sampled responses
    rows = list(map(json.loads, (folder / "responses.jsonl").read_text().splitlines()))
    assert len(rows) == 48
    assert {row["prompt"] for row in rows} == {p.prompt for p in load_task("add").test[:8]}
    [pair] = found["comparisons"]
    assert (pair["before"], pair["after"], pair["measured"]) == (base, run, "mean_reward")
    gained = [found["models"][name]["mean_reward"]["sampled"]["mean"] for name in (base, run)]
    assert pair["sampled"]["difference"] == pytest.approx(gained[1] - gained[0])
    assert pair["sampled"]["difference"] != 0


def test_a_response_that_does_not_fit_into_the_context_is_named(base):
    """The sentence once spoke of a prompt of 502 tokens, which the comparison of forms had made."""
    with pytest.raises(UserError, match=r"prompt of \d tokens and --max_new_tokens 512 do not fit"):
        main(Config(task="add", limit=3), [base])
