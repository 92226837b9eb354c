import json
from pathlib import Path

import pytest
from conftest import CPU, parse_train

import eval
import train
from eval import Config, compare, details, evaluate, main, respond, summarise
from flags import UserError
from policy import load_policy
from reward import load_reward
from tasks import load_task


def answers_to(answer, *groups, difficulty=""):
    """Rows of responses to problems with one answer, right if they say it to the letter."""
    return [[{"prompt": "?", "answer": answer, "difficulty": difficulty, "response": text, "length": len(text) + 1,
              "finished": True, "right": text.rpartition("</think>")[2] == answer} for text in group]
            for group in groups]


def test_an_evaluation_does_not_depend_on_the_batch_size(base):
    model, tokenizer = load_policy(base, CPU)
    task = load_task("add")
    for temperature, samples in ((0.0, 1), (1.0, 1), (1.0, 4)):
        one, other = (respond(model, tokenizer, task, task.validation[:30], temperature, 8, batch_size=n,
                              samples=samples) for n in (1000, 7))
        assert one == other and [len(group) for group in one] == [samples] * 30
    assert len({row["response"] for group in one for row in group}) > 5
    assert [one[3]] == respond(model, tokenizer, task, task.validation[3:4], 1.0, 8, samples=4)  # in any company
    assert one != respond(model, tokenizer, task, task.validation[:30], 1.0, 8, seed=1, samples=4)


def test_what_training_is_told(base):
    model, tokenizer = load_policy(base, CPU)
    task = load_task("add")
    found = evaluate(model, tokenizer, task, task.validation[:30], 1.0, 8)
    right = sum(text.rpartition("</think>")[2] == p.answer for text, p in zip(found["responses"], task.validation))
    assert found["accuracy"] == right / 30 and found["n"] == 30
    assert set(found) == {"accuracy", "interval", "n", "thinking", "finished", "response_length", "responses"}


def test_pass_and_maj_at_k_of_two_problems():
    """7 7 8 8: pass@1 1/2, pass@2 1 - 1/6, majorities by twos 7 and 8, of all four a tie that the first wins. 9 9 9 7:
    1/4, 1/2; never the majority."""
    groups = answers_to("7", ["7", "7", "8", "8"], ["9", "9", "9", "7"])
    found = details(groups, "exact", load_reward("exact + length"), 8)
    shares = {kind: {k: value["accuracy"] for k, value in found[kind].items()} for kind in ("pass_at", "maj_at")}
    assert shares["pass_at"] == pytest.approx({1: (1 / 2 + 1 / 4) / 2, 2: (5 / 6 + 1 / 2) / 2, 4: 1.0})
    assert shares["maj_at"] == pytest.approx({1: 3 / 8, 2: 1 / 4, 4: 1 / 2})
    assert found["pass_at"][4]["interval"] == (1.0, 1.0) and found["maj_at"][4]["interval"] == (0.0, 1.0)
    assert (found["reward"], found["parts"]) == (3 / 8 + 2, {"exact": 3 / 8, "length": 2.0})
    assert groups[0][0]["parts"] == {"exact": 1.0, "length": 2.0}
    assert summarise(groups)["accuracy"] == 3 / 8


def test_votes_are_counted_after_the_answers_are_brought_to_one_form():
    """By `number`, '7.0' and 'so 7' are one answer with two votes; by `exact`, three answers with a vote each."""
    groups = answers_to("8", ["8", "7.0", "so 7"])
    votes = [details(groups, rule, load_reward(rule), 8)["maj_at"][3]["accuracy"] for rule in ("number", "exact")]
    assert votes == [0.0, 1.0]


def test_strict_and_lenient_stand_side_by_side():
    groups = answers_to("75", ["75"], ["75."], ["It is 75"], ["<think>8+7</think>The answer is 75."], ["76"])
    by_number = details(groups, "number", load_reward("number"), 8)
    assert (by_number["strict"], by_number["lenient"]) == (3 / 5, 4 / 5)
    by_letter = details(groups, "exact", load_reward("exact"), 8)
    assert (by_letter["strict"], by_letter["lenient"]) == (1 / 5, 4 / 5)
    assert "strict" not in details(answers_to("Paris", ["Paris"]), "exact", load_reward("exact"), 8)


def test_accuracy_by_difficulty():
    groups = [*answers_to("7", ["7"], ["8"], difficulty="steps 2"), *answers_to("7", ["7"], difficulty="steps 10")]
    found = details(groups, "exact", load_reward("exact"), 8)["by_difficulty"]
    assert [(level, value["accuracy"], value["n"]) for level, value in found.items()] == [
        ("steps 2", 0.5, 2), ("steps 10", 1.0, 1)]
    assert "by_difficulty" not in details(groups[:2], "exact", load_reward("exact"), 8)


def test_two_models_are_compared_on_the_same_problems():
    """Greedy: 6 gained and none lost has p = 1/32, 5 gained has 1/16. Sampled: the same half point gained on every
    problem is no noise at all, however much the problems differ."""
    old = {"greedy": answers_to("7", *[["8"]] * 6, *[["7"]] * 10),
           "sampled": answers_to("7", *[["8", "8"]] * 8, *[["7", "8"]] * 8)}
    new = {"greedy": answers_to("7", *[["7"]] * 16),
           "sampled": answers_to("7", *[["7", "8"]] * 8, *[["7", "7"]] * 8)}
    found = compare(old, new)
    assert [found["greedy"][key] for key in ("p", "verdict", "difference")] == [1 / 32, "better", 6 / 16]
    assert found["sampled"] == {"difference": 0.5, "interval": (0.5, 0.5), "verdict": "better"}
    assert [each["verdict"] for each in compare(new, old).values()] == ["worse", "worse"]
    new["greedy"][0][0]["right"] = False
    assert compare(old, new)["greedy"]["verdict"] == "no difference seen"
    assert compare(old, old)["sampled"]["verdict"] == "no difference seen"


@pytest.fixture
def run_of(base):
    """Trains for a step: run_of(name, *flags) -> its folder."""
    return lambda name, *flags: str(train.main(parse_train(
        "--model", base, "--name", name, "--steps", 1, "--prompts_per_step", 2, "--group_size", 4, "--lr", 1e-2,
        "--max_new_tokens", 8, "--eval_problems", 0, "--device", "cpu", *flags)))


def test_a_run_is_measured_beside_its_base(base, run_of, capsys):
    run = run_of("one", "--reward", "number + 0.1*length")
    found = main(Config(limit=12, samples=2), [run])
    shown = capsys.readouterr().out
    assert list(found["models"]) == [base, run] and f"{run} against {base}, on the same problems" in shown
    assert "pass@2" in shown and "maj@2" in shown and found["reward"] == "number + 0.1*length"
    assert json.loads((Path(run) / "eval.json").read_text())["comparisons"][0]["after"] == run
    assert (Path(run) / "eval.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (Path(run) / "responses.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 12 * (1 + 2)
    sampled = [row["right"] for row in rows if row["model"] == run and row["decoding"] == "sampled"]
    assert found["models"][run]["sampled"]["accuracy"] == sum(sampled) / 24
    again = main(Config(limit=12, samples=2, batch_size=5), [run, base])
    assert again["models"] == found["models"] and Path("runs/eval/eval.json").exists()


def test_models_that_cannot_be_compared(base, run_of):
    one, other = run_of("one"), run_of("two", "--max_new_tokens", 6)
    for flags, models, message in [
        ({}, [one, other], r"--max_new_tokens: the runs differ in it \(8, 6\), give one for all"),
        ({}, [base], "--task: none of the models is a run"),
        (dict(samples=0), [one], "--samples 0: must be at least 1"),
        (dict(temperature=0.0), [one], "--temperature 0.0: must be at least 0.0001"),
        (dict(output=str(Path(one) / "config.json"), limit=1), [one], "--output .* cannot be written to"),
    ]:
        with pytest.raises(UserError, match=message):
            main(Config(**flags), models)


def test_the_report_of_a_run(base, run_of, capsys):
    run_of("one", "--eval_problems", 5)
    shown = capsys.readouterr().out
    before = json.loads(Path("runs/one/before.json").read_text())
    assert eval.table({"before": before}).splitlines()[1] in shown
    assert before["sampled"]["responses"][2] in shown
