"""The examples that docs/real-model.md runs."""

import json
from pathlib import Path

from examples import problems, questions
from examples.rewards import about, short


def rows_of(path):
    return list(map(json.loads, path.read_text().splitlines()))


def test_questions_are_conversations_of_one_kind():
    questions.main(questions.Config(output="questions.jsonl"))
    prompts = [row["prompt"] for row in rows_of(Path("questions.jsonl"))]
    assert len(prompts) == len({prompt[-1]["content"] for prompt in prompts}) == 400
    assert all(
        [m["role"] for m in prompt] == ["system", "user", "assistant", "user"] for prompt in prompts
    )


def only_of_its_kind(text):
    kind, words = text.split(": ")
    [word] = set(words.split(", ")) & set(problems.KINDS[kind].split())
    return word


def test_the_answers_of_the_problems_are_right():
    """Each by its own arithmetic, from the question as text."""
    problems.main(problems.Config(folder=".", count=50))
    right = {
        "sums": lambda text: sum(map(int, text.strip("=").split("+"))),
        "differences": lambda text: eval(text.strip("=")),
        "products": lambda text: eval(text.strip("=")),
        "largest": lambda text: max(map(int, text.split(", "))),
        "kinds": only_of_its_kind,
    }
    for name, work_out in right.items():
        rows = rows_of(Path(f"{name}.jsonl"))
        assert len(rows) > 20
        for row in rows:
            asked = row["prompt"][-1]["content"]
            assert str(work_out(asked)) == row["answer"]
            # the example turns are right, and are not the question
            turns = row["prompt"][1:-1]
            assert len(turns) == 4 and asked not in {turn["content"] for turn in turns}
            for user, assistant in (turns[:2], turns[2:]):
                assert str(work_out(user["content"])) == assistant["content"]


def test_the_rewards_by_their_examples():
    question = [{"role": "user", "content": "What is a bridge?"}]
    assert short(question, "A bridge joins two sides of a river.", None) == 1
    assert short(question, "A bridge joins two sides", None) == 0
    assert short(question, "word " * 12 + ".", None) == 0  # 13 words
    assert about(question, "Bridges join two sides.", None) == 1
    assert about(question, "A chair is a seat for one person.", None) == 0
