from conftest import CPU

from eval import evaluate
from policy import load_policy
from tasks import load_task


def test_an_evaluation_does_not_depend_on_the_batch_size(base):
    model, tokenizer = load_policy(base, CPU)
    task = load_task("add")
    one, other = (
        evaluate(model, tokenizer, task, task.validation[:30], 1.0, 8, batch_size=n) for n in (30, 7)
    )
    assert one == other
    assert one["n"] == 30 and len(set(one["responses"])) > 5
    assert (
        evaluate(model, tokenizer, task, task.validation[:30], 1.0, 8, seed=1)["responses"]
        != one["responses"]
    )
    right = sum(
        text.rpartition("</think>")[2] == p.answer for text, p in zip(one["responses"], task.validation)
    )
    assert one["accuracy"] == right / 30
