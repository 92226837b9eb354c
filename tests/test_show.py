"""tools.show: what a person sees of the groups of a run, as text and as a page."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import CPU, parse_train
from test_progress import Terminal

import train
from lib.files import write_json, write_rows
from lib.flags import UserError
from policy import load_policy
from tools import show

EVIL = "<script>document.title = 'run'</script>\x1b[31m<img src=x onerror='document.title = 1'>"


def make_run(*steps):
    """A run folder. steps: lists of groups, a group is a list of rows."""
    folder = Path("runs/seen")
    (folder / "code").mkdir(parents=True)
    write_json(folder / "config.json", {"config": asdict(train.Config(model="no/such"))})
    rows = []
    for step, groups in enumerate(steps, 1):
        for g, group in enumerate(groups):
            keys = {"step": step, "group": g, "group_size": 4, "drawn": g == 1}
            rows += [{**keys, **row} for row in group]
    write_rows(folder / "samples.jsonl", rows)
    reward = {"reward": 0.25, "informative": 0.5}
    write_rows(
        folder / "metrics.jsonl", [{"step": step + 1, **reward} for step in range(len(steps))]
    )
    return str(folder)


def row(reward, weight, response, **changes):
    prompt = {"prompt": "48+27=", "answer": "75", "response": response}
    numbers = {"reward": reward, "weight": weight, "length": 4, "finished": True}
    return {**prompt, **numbers, "parts": {"exact": reward}, **changes}


GROUPS = [
    [row(0.0, -1.0, EVIL), row(1.0, 1.0, "75\nor so", finished=False)],
    [row(0.5, 0.0, "7", parts={"exact": 0.0, "format": 1.0})] * 4,
]


def test_the_newest_step_as_text(capsys):
    """Best first; nothing that a model wrote reaches the terminal as a control character."""
    show.main(show.Config(), make_run([], GROUPS))
    shown = capsys.readouterr().out
    assert "step 2 of runs/seen: mean reward 0.250, 50% of the groups" in shown
    lines = shown.splitlines()
    header = [line.split()[:1] for line in lines].index(["reward"])
    best, after, worst = lines[header + 1 : header + 4]
    assert best.split() == ["1.000", "+1.00", "4", "75"]
    assert after.split() == ["or", "so", "[truncated]"] and after.index("or") == best.index("75")
    assert worst.split()[:3] == ["0.000", "-1.00", "4"] and "\\u001b[31m<img" in worst
    assert "\x1b" not in shown
    assert "2 of its 4 responses" in shown
    assert "exact 0, format 1" in shown and "this group teaches nothing" in shown


def test_a_group_of_equal_rewards_that_has_weights_teaches_something(capsys):
    """As with --normaliser positive. A response of no tokens is shown as such."""
    show.main(show.Config(), make_run([[row(1.0, 1.0, "75"), row(1.0, 1.0, "")]]))
    shown = capsys.readouterr().out
    assert "teaches nothing" not in shown and "(empty)" in shown


def test_weights_are_green_and_red_on_a_terminal_only(monkeypatch):
    run = make_run(GROUPS)
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    show.main(show.Config(), run)
    assert "\x1b[32m    +1.00\x1b[0m" in screen.getvalue()
    assert "\x1b[31m    -1.00\x1b[0m" in screen.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", plain := Terminal())
    show.main(show.Config(), run)
    assert "\x1b" not in plain.getvalue()


def test_what_cannot_be_shown_is_said_in_a_sentence():
    run = make_run(GROUPS, GROUPS)
    with pytest.raises(UserError, match="--step 7: runs/seen has the steps 1 to 2"):
        show.main(show.Config(step=7), run)
    with pytest.raises(UserError, match="runs/seen has no checkpoint yet"):
        show.main(show.Config(tokens=True), run)
    write_rows(Path(run, "samples.jsonl"), [{"step": 1, "response": "7"}])
    with pytest.raises(UserError, match="older version"):
        show.main(show.Config(), run)
    write_rows(Path(run, "samples.jsonl"), [])
    with pytest.raises(UserError, match="has no responses"):
        show.main(show.Config(), run)
    with pytest.raises(UserError, match="runs/none"):
        show.main(show.Config(), "runs/none")


def test_a_page_holds_all_steps_and_escapes_what_a_model_wrote():
    show.main(show.Config(html="page.html"), make_run(GROUPS, GROUPS, GROUPS))
    text = Path("page.html").read_text()
    assert text.count("<section ") == 3
    assert text.count("<script>") == 1 and "<img" not in text and "\x1b" not in text
    assert "src=" not in text.replace("&lt;img src=x", "") and "href" not in text


def test_tokens_have_their_log_probs_under_the_base_and_the_checkpoint(base):
    """The first token by a forward pass of the prompt; texts that make up the response again."""
    flags = """--steps 1 --prompts_per_step 4 --group_size 8 --max_new_tokens 6 --eval_problems 0
        --lr 1e-2 --warmup_steps 0 --temperature 0.7 --reward length --device cpu"""
    folder = train.main(parse_train("--model", base, *flags.split()))
    steps = show.read_steps(folder, 1, True)
    flags = json.loads((folder / "config.json").read_text())["config"]
    show.add_changes(steps.values(), folder, flags, CPU)
    rows = [row for groups in steps.values() for group in groups for row in group]
    gaps = []
    for row in rows:
        texts, before, after = zip(*row["changes"])
        ends = "<eos>" * row["finished"]
        assert "".join(texts) == row["response"] + ends and len(texts) == row["length"]
        for name, found in ((base, before[0]), (folder, after[0])):
            policy, tokenizer = load_policy(str(name), CPU)
            with torch.no_grad():
                logits = policy(torch.tensor([tokenizer(row["prompt"])["input_ids"]])).logits[0, -1]
            [token] = tokenizer.convert_tokens_to_ids(texts[:1])
            assert found == pytest.approx((logits / 0.7).log_softmax(-1)[token].item(), abs=1e-4)
        gaps.append(abs(after[0] - before[0]))
    assert max(gaps) > 0.1  # the step has changed the model
    page = show.page(folder, steps, str)
    assert page.count("<span class='") == sum(len(row["changes"]) for row in rows)


def test_a_prompt_is_shown_as_the_model_got_it(folders):
    """With what the row gives the chat template, and a <think> that it opens only once."""
    shutil.copytree(folders("qwen2"), "model")
    template = "{{ note }}{{ messages[0].content }}{% if add_generation_prompt %}<think>{% endif %}"
    Path("model/chat_template.jinja").write_text(template)
    options = {"chat_template_kwargs": {"note": "Brief. "}, "level": 3}
    rows = [{"prompt": f"{i}?", "answer": str(i), **options} for i in range(30)]
    write_rows(Path("my.jsonl"), rows)
    flags = "--steps 1 --prompts_per_step 2 --group_size 4 --max_new_tokens 6 --eval_problems 0"
    model = ["--model=./model", "--task=my.jsonl", "--reward=length", "--device=cpu"]
    folder = train.main(parse_train(*model, *flags.split()))
    flags = json.loads((folder / "config.json").read_text())["config"]
    steps = show.read_steps(folder, 1, True)
    group = steps[1][0]
    prompt = show.prompt_reader(folder, flags)(group[0])
    assert prompt == f"Brief. {group[0]['prompt']}<think>"
    show.add_changes(steps.values(), folder, flags, CPU)
    for row in group:
        texts = "".join(text for text, _, _ in row["changes"])
        assert "<think>" + texts.removesuffix("<|endoftext|>") == row["response"]


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no Chromium is installed: apt-get install chromium")
def test_a_browser_shows_one_step_and_the_slider_moves_it():
    """Nothing that a model wrote runs: the title stays."""
    show.main(show.Config(html="page.html"), make_run(GROUPS, GROUPS, GROUPS))
    text = Path("page.html").read_text()
    move = "<script>slider.value = 0; slider.oninput()</script>"
    Path("moved.html").write_text(text.replace("</html>", f"{move}</html>"))
    for name, hidden in (("page", [True, True, False]), ("moved", [False, True, True])):
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command.append(Path(f"{name}.html").resolve().as_uri())
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        sections = re.findall("<section([^>]*)>", done.stdout)
        assert ["hidden" in attributes for attributes in sections] == hidden
        number = 1 if name == "moved" else 3
        assert f"<output>step {number}</output>" in done.stdout
        assert "<title>Groups of runs/seen</title>" in done.stdout
        assert "&lt;img" in done.stdout and "<img" not in done.stdout
