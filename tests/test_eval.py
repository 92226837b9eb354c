import pytest
from conftest import CPU

from eval import evaluate, wilson
from policy import load_policy
from tasks import load_task


def test_wilson_intervals_worked_out_by_hand():
    """8 of 10: middle (0.8 + z2/20) / (1 + z2/10) = 0.71674, half width 0.22659, with z2 = 3.84146."""
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)
    assert wilson(0, 0) == (0.0, 1.0)


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
