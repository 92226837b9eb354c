import io
import json
import sys
from pathlib import Path

import pytest
from conftest import CPU
from test_plot import make_run

import sample
import screen
from flags import UserError
from sample import Config


def test_colours_on_a_terminal_alone(monkeypatch):
    assert screen.paint("right", "green") == "right"  # captured output is no terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert screen.paint("right", "green") == "\033[32mright\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert screen.paint("right", "green") == "right"


def test_two_columns_by_hand():
    """Halves of 5 characters: 'a b c d' folds after its third character, the second line of the left has no partner."""
    shown = screen.columns(("a bcde f\nx", "grey"), ("12345678", "grey"), 12)
    assert shown.splitlines() == ["a      12345", "bcde   678", "f", "x"]


def test_the_same_prompts_before_and_after(base, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run = make_run("one", model=base, data_dir="")
    (run / "checkpoint").symlink_to(base)  # nothing learnt: both sides must say the same to the same prompts
    sample.main(Config(prompts=2, samples=3, max_new_tokens=4, device="cpu"), str(run))
    blocks = capsys.readouterr().out.split("\n\n")
    assert [block.splitlines()[0] for block in blocks[1:]] == [
        problem.prompt for problem in screen.load_task("add").validation[:2]]
    for block in blocks[1:]:
        lines = block.rstrip("\n").splitlines()[1:]
        assert len(lines) >= 3 and all(line[:39].rstrip() == line[41:] for line in lines)
    with pytest.raises(UserError, match="is no run, which would bring prompts of its own"):
        sample.main(Config(device="cpu"), base)


def test_what_is_said_of_a_cut_response_is_not_scored(base, capsys):
    """' [cut at 75 tokens]' once made 75 the last number of a response to 48+27=."""
    run = make_run("one", model=base, data_dir="", task="sums.jsonl")
    (run / "checkpoint").symlink_to(base)
    Path("sums.jsonl").write_text("".join(json.dumps({"prompt": f"{a}+1=", "answer": 75}) + "\n" for a in range(20)))
    screen.before_and_after(run, 1, 1, CPU, lambda *rest: [("7", " [cut at 75 tokens]")])
    assert capsys.readouterr().out.splitlines()[-1].startswith("- 7 [cut at 75 tokens]")


def test_a_chat_keeps_the_conversation(load, monkeypatch, capsys):
    seen = []

    def respond(model, tokenizer, task, prompt, samples, number):
        seen.append([turn["content"] for turn in prompt] if isinstance(prompt, list) else prompt)
        return [(f"answer {number}", " [cut]")]

    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    screen.chat(*load("qwen2"), respond)
    assert seen == [["one"], ["one", "answer 1", "two"]]
    assert capsys.readouterr().out == "answer 1 [cut]\nanswer 3 [cut]\n\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n" + "a long line " * 400 + "\n"))
    screen.chat(*load("qwen2"), respond)
    assert len(seen[-1]) == 1  # no room for the first turn beside it
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    screen.chat(*load("llama"), respond)
    assert seen[-2:] == ["one", "two"]


def test_chat_with_a_model(load, folders, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    sample.main(Config(chat=True, max_new_tokens=3, device="cpu"), folders("qwen2"))
    assert capsys.readouterr().out.strip()


def test_watching_a_run_until_it_has_done_its_steps(monkeypatch, capsys):
    run = make_run("one", steps=4)
    log, row = run / "samples.jsonl", {"prompt": "1+1=", "response": "2", "reward": 1.0, "weight": 0.5}

    def write(*steps):
        with log.open("a") as file:
            file.writelines(json.dumps({"step": step, **row}) + "\n" for step in steps)

    write(1, 2, 2)
    monkeypatch.setattr(screen.time, "sleep", lambda pause: write(3, 4) if pause else None)
    sample.main(Config(watch=True), str(run))
    shown = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["step 2", "step 2", "step 3", "step 4"]
    with pytest.raises(UserError, match="--watch runs/none: no run there"):
        sample.main(Config(watch=True), "runs/none")
