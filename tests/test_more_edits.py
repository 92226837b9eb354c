"""The edits of docs/edits.md, on the pattern of test_edits.py: each trains, and shows its effect in a number."""

import json
import re

import pytest
from test_edits import SMALL, edited, evaluate, python, train

from lib.files import read_rows

pytestmark = pytest.mark.slow
PARSE = """
import copy, json, torch
import engine.choose, loss, sample, train
from lib.flags import parse
from policy import load_policy, stop_ids

def config_of(flags):
    return parse(train.Config, train.HELP, flags.split(), train.fill)[0]
"""
ADD = """
policy, tokenizer = load_policy("models/add", torch.device("cpu"))
prompts = [tokenizer(text)["input_ids"] for text in ("48+27=", "50+72=", "99+11=")]
stop = stop_ids(policy, tokenizer)
"""

# ------------------------------------------------------------------------------------------------------------ replay

# kl_beta: no row is dropped, so that the first 16 of an update are the fresh ones
SPY = """
from engine.learner import Learner

steps, update = [], Learner.update

def spy(self, backward, batch, lr, on_policy):
    learner = self.logprobs(self.policy, batch.rows(slice(16)))
    steps.append((batch, learner, on_policy))
    return update(self, backward, batch, lr, on_policy)

def row_of(rollout, b):  # as bits
    end, n = int(rollout.lengths[b]), int(rollout.response_lengths[b])
    ids, logprobs = rollout.ids[b, :end], rollout.old_logprobs[b, :n]
    return *ids.tolist(), *logprobs.view(torch.int32).tolist()

Learner.update = spy
train.main(config)
found = {"on_policy": [], "fresh_gap": [], "steps_back": [], "lengths": []}
sampled = [{row_of(rollout, b) for b in range(16)} for rollout, _, _ in steps]
for t, (rollout, learner, on_policy) in enumerate(steps):
    fresh = rollout.rows(slice(16))
    found["on_policy"].append(on_policy)
    found["fresh_gap"].append((learner - fresh.old_logprobs[:, : learner.shape[1]]).abs().max().item())
    found["lengths"].append(fresh.response_lengths.double().mean().item())
    back = []
    for b in range(16, len(rollout.ids)):
        row = row_of(rollout, b)
        back.append(next((t - past for past in reversed(range(t)) if row in sampled[past]), None))
    found["steps_back"].append(back)
print(json.dumps(found))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replayed_rows_keep_the_logprobs_of_the_policy_that_sampled_them(dtype):
    copy = edited("replay")
    flags = f"{SMALL} --steps 9 --loss clip --replay 4 --reward length --kl_beta 0.01 --dtype {dtype} --name replay"
    found = evaluate(copy, f"{PARSE}\nconfig = config_of('{flags}'){SPY}")
    assert found["on_policy"] == [False] * 9  # every row has a real ratio
    # in bfloat16 the learner's own pass, to the bit
    assert max(found["fresh_gap"]) < (1e-5 if dtype == "float32" else 1e-30)
    back = found["steps_back"]
    assert [len(step) for step in back] == [0] + [16] * 8
    assert set().union(*back) == {1, 2, 3, 4}  # each row is found, with the same bits
    rows = read_rows(copy / "runs" / "replay" / "metrics.jsonl")
    assert [row["response_length"] for row in rows] == pytest.approx(found["lengths"])
    assert [row["reward"] for row in rows] == pytest.approx(found["lengths"])


def test_a_run_with_replay_resumes_exactly(monkeypatch):
    copy = edited("replay")
    (copy / "my_rewards.py").write_text("""
import os, signal
calls = []

def cut(prompt, response, answer, length):
    calls.append(1)
    if len(calls) == 16 * 3 and "CUT" in os.environ:
        os.kill(os.getpid(), signal.SIGINT)
    return length
""")
    flags = (
        f"{SMALL} --steps 7 --loss cispo --replay 4 --reward my_rewards.cut --kl_beta 0.1".split()
    )
    python(copy, "train.py", *flags, "--name", "straight")
    monkeypatch.setenv("CUT", "1")
    python(copy, "train.py", *flags, "--name", "resumed", status=130)
    monkeypatch.delenv("CUT")
    assert len(read_rows(copy / "runs/resumed/metrics.jsonl")) == 3
    python(copy, "train.py", "--name", "resumed", "--resume")
    runs = [copy / "runs" / name for name in ("straight", "resumed")]
    one, other = ((run / "checkpoint/model.safetensors").read_bytes() for run in runs)
    assert one == other
    rows = [read_rows(run / "metrics.jsonl", lambda key: "second" not in key) for run in runs]
    assert rows[0] == rows[1]


def test_replay_needs_ratios():
    copy = edited("replay")
    python(copy, "train.py", *SMALL.split(), "--replay", 4, "--steps", 1, status=2)


# --------------------------------------------------------------------------------------------------------- two turns

REPLY = "<think>Check it.</think>"
# What both samplers give where something else writes too, and the gradient of the fast form beside that
# of the tokens of the policy by hand, and of all tokens
WRITTEN = """
from functools import partial

from engine.generate import generate
from engine.logprobs import token_logprobs

write = sample.interjection(tokenizer, sampling)
rollout = sample.generate(policy, prompts, 8, 40, stop, [1, 2, 3], sampling, interject=write)
fast = generate(policy, prompts, 8, 40, stop, [1, 2, 3], sampling, interject=write)
samplers = [
    (one.float() - other.float()).abs().max().item()
    for one, other in zip(vars(rollout).values(), vars(fast).values())
]
rows = []
for ids, mask in zip(rollout.response_ids(), rollout.response_mask.tolist()):
    rows.append({"tokens": tokenizer.batch_decode([[token] for token in ids]), "mask": mask[: len(ids)]})
outside = rollout.old_logprobs[~rollout.response_mask].abs().max().item()

policy.double()  # else rounding alone is 1e-6
weights = torch.linspace(-1, 2, 24)[:, None]
scale = torch.full((24, 1), 0.1)
batch = train.Batch(*vars(rollout).values(), weights, torch.zeros_like(rollout.old_logprobs), scale)
train.backward(batch, partial(token_logprobs, policy, batch, sampling), train.Config())
found = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])

def by_hand(with_written):
    policy.zero_grad()
    for b, row in enumerate(rows):
        start, ids = int(rollout.prompt_lengths[b]), rollout.ids[b : b + 1]
        logp = policy(ids).logits[0].log_softmax(-1)
        total = 0.0
        for n, by_policy in enumerate(row["mask"]):
            if by_policy or with_written:
                total = total - 0.1 * weights[b, 0] * logp[start + n - 1, ids[0, start + n]]
        total.backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])

gaps = [((by_hand(kind) - found).norm() / found.norm()).item() for kind in (False, True)]
print(json.dumps({"samplers": samplers, "rows": rows, "outside": outside, "gaps": gaps}))
"""


def check_written(copy):
    """The rows of WRITTEN, whose numbers are right."""
    found = evaluate(copy, PARSE + "sampling = sample.Sampling()" + ADD + WRITTEN)
    assert max(found["samplers"]) < 1e-5 and found["outside"] == 0
    # the gradient is that of the policy's own tokens, and not that of all tokens
    assert found["gaps"][0] < 1e-6 and found["gaps"][1] > 0.01
    return found["rows"]


def evaluated(run, limit):
    """The responses of eval.py, which needs no flag for what else writes."""
    python(run.parent.parent, "eval.py", run, "--limit", limit)
    return [json.loads(line) for line in (run / "responses.jsonl").read_text().splitlines()]


def test_the_environment_writes_between_two_turns():
    copy = edited("two_turns")
    both = 0
    for row in check_written(copy):
        tokens = row["tokens"]
        if "<eos>" not in tokens:
            assert all(row["mask"])
            continue
        first = tokens.index("<eos>") + 1
        count = min(11, len(tokens) - first)  # tokens of the reply
        reply = "".join(tokens[first : first + count])
        assert reply == REPLY if count == 11 else REPLY.startswith(reply)
        rest = len(tokens) - first - count
        assert row["mask"] == [True] * first + [False] * count + [True] * rest
        both += tokens[first:].count("<eos>") == 1 and tokens[-1] == "<eos>"
    assert both > 6
    rows = train(copy, "--steps 3 --max_new_tokens 40 --reward length")
    assert max(row["sampler_gap"] for row in rows) < 1e-5
    rows = [row for row in evaluated(copy / "runs/run-0", 10) if row["finished"]]
    assert len(rows) > 10 and all(row["response"].count(REPLY) == 1 for row in rows)


# -------------------------------------------------------------------------------------------------------- calculator


def sums_of(text):
    """'8+7=15;14+2+1=6' -> [True, False]: whether each is right. The policy may write more digits."""
    sums = re.findall(r"([0-9]+(?:\+[0-9]+)+)=(\d+)", text)
    sums = [(left.split("+"), value) for left, value in sums]
    readable = [(left, value) for left, value in sums if not any(re.match("0.", n) for n in left)]
    return [value.startswith(str(sum(map(int, left)))) for left, value in readable]


def test_a_calculator_writes_the_value_of_each_sum():
    copy = edited("calculator")
    calls, several = 0, 0
    for row in check_written(copy):
        tokens, mask = row["tokens"], row["mask"]
        begins = [n for n in range(1, len(mask)) if mask[n - 1] and not mask[n]]
        for n in begins:
            length = next((k for k in range(n, len(mask)) if mask[k]), len(mask)) - n
            call = re.search(r"[0-9+]+=$", "".join(tokens[:n]))[0][:-1]
            value = str(eval(call))
            assert "".join(tokens[n : n + length]) == value[:length]
            assert length == len(value) or n + length == len(mask)  # truncated
        calls += len(begins)
        several += len(begins) > 1
    assert calls > 6 and several > 2
    rows = train(copy, "--steps 3 --max_new_tokens 32 --reward length")
    assert max(row["sampler_gap"] for row in rows) < 1e-5
    rows = [row for row in evaluated(copy / "runs/run-0", 40) if row["finished"]]
    right = [each for row in rows for each in sums_of(row["response"])]
    assert len(right) > 10 and all(right)


# ---------------------------------------------------------------------------------------------------------- new task

PALINDROMES = {
    "beadaeb": 1,
    "<think>daeb</think>beaddaeb": 1,
    "beadabdaeb": 0,
    "bead": 0,
    "daebbead": 0,
    "<think>beadaeb": 0,
}


def test_a_task_of_its_own_is_learned():
    copy = edited("new_task")
    code = f"import json, reward; print(json.dumps([reward.palindrome('', text, 'bead') for text in {list(PALINDROMES)}]))"
    assert evaluate(copy, code) == [*PALINDROMES.values()]
    flags = (
        "--task palindrome --output models/palindrome --steps 120 --worked_steps 60 --batch_size 64"
    )
    python(copy, "-m", "tools.pretrain", *flags.split())
    train(
        copy,
        "--model models/palindrome --task palindrome --prompts_per_step 16 --group_size 8",
        "--max_new_tokens 24 --steps 25 --eval_every 25 --eval_problems 200 --lr 5e-4",
    )
    before, after = accuracies(copy / "runs/run-0")
    assert before < 0.35 and after > before + 0.12


def accuracies(run):
    """Of sampled responses, before and after a run."""
    for name in ("before.json", "after.json"):
        yield json.loads((run / name).read_text())["accuracy"]["sampled"]["mean"]


# ------------------------------------------------------------------------------------------------------ distillation

BY_HAND = """
rollout = sample.generate(policy, prompts, 4, 40, stop, [1, 2, 3], sampling)
teacher = copy.deepcopy(policy)
with torch.no_grad():
    for parameter in teacher.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
rollout.response_mask[:, 1] = False
found = loss.teacher_kl(policy, teacher, rollout, sampling)
expected = torch.zeros_like(found)
for b in range(12):
    start, end = int(rollout.prompt_lengths[b]), int(rollout.lengths[b])
    ids = rollout.ids[b : b + 1, :end]
    p, q = [(model(ids).logits[0] / 0.7).softmax(-1) for model in (policy, teacher)]
    for n in range(end - start):
        if n != 1:
            at = start + n - 1
            expected[b, n] = (p[at] * (p[at] / q[at]).log()).sum()
print(json.dumps([(found - expected).abs().max().item(), found.sum().item()]))
"""


def test_the_kl_to_a_teacher_is_exact():
    gap, total = evaluate(
        edited("distillation"), PARSE + "sampling = sample.Sampling(0.7)" + ADD + BY_HAND
    )
    assert gap < 1e-4 < 1 < total


def test_a_pupil_becomes_its_teacher_without_rewards():
    copy = edited("distillation")
    flags = "--prompts_per_step 16 --group_size 8 --max_new_tokens 32 --lr 5e-4 --eval_problems 100 --eval_every 100"
    train(copy, flags, "--steps 30")
    teacher = [*accuracies(copy / "runs/run-0")]
    rows = train(copy, flags, "--steps 20 --reward 0*length --teacher runs/run-0")
    kl = [row["loss"] for row in rows]  # nothing else is in the loss: all weights are 0
    assert min(kl[:3]) > 0.3 and max(kl[-3:]) < 0.1
    pupil = [*accuracies(copy / "runs/run-1")]
    assert pupil[0] == teacher[0] < 0.4 and pupil[1] > teacher[1] - 0.1 > 0.6
