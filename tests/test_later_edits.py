"""The later edits of docs/edits.md, on the pattern of test_edits.py: each shows its effect in a number."""

import json
import random

import pytest
from test_edits import assert_resumes_exactly, edited, evaluate, python, train, watch

from tasks import Problem
from tools.pretrain import add

pytestmark = pytest.mark.slow

# of each group, in float64: (r - mean) / (deviation + 1e-4)
ZSCORES = """
def zscores(groups):
    return torch.cat([(r - r.mean()) / (r.std(correction=0) + 1e-4) for r in groups])

def gaps_to(expected):  # of the gradients by tokens and by parameters
    (expected * plain).sum().backward()
    pairs = zip(policy.parameters(), step["gradient"])
    token_gap = (token_grads - expected).abs().max() / expected.abs().max()
    return [token_gap.item(), max(((p.grad - g).norm() / g.norm()).item() for p, g in pairs)]
"""

# ----------------------------------------------------------------------------------------- process_reward, tournament


@pytest.mark.parametrize("names", [["process_reward"], ["calculator", "process_reward"]])
def test_each_line_is_pushed_by_its_own_value(names):
    """A response of weight w whose lines have both signs pushes a token of a right line by |w| and one of a wrong
    line by -|w|; what a calculator wrote is not pushed."""
    both_signs, written, *gaps = watch(
        edited(*names),
        "--reward my_process.lines --max_new_tokens 32 --group_size 8 --temperature 1.5",
        ZSCORES
        + """
plain, _ = loss.token_logprobs(policy, rollout, Sampling(1.5))
values = torch.zeros(B, N)
for b, ids in enumerate(rollout.response_ids()):
    line = []
    for n, token in enumerate(ids):
        line.append(n)
        if tokenizer.decode([token]) == ";" or n == len(ids) - 1:
            text = tokenizer.decode([ids[k] for k in line])
            sums = re.findall(r"((?:[0-9]+[+])+[0-9]+)=([0-9]+)", text)
            right = [sum(map(int, left.split("+"))) == int(value) for left, value in sums]
            value = all(right) if sums else reward.number("", samples[b]["response"], samples[b]["answer"])
            values[b, line] = 2.0 * value - 1
            line = []
lengths = torch.tensor([len(ids) for ids in rollout.response_ids()])
z = zscores((values.sum(1) / lengths).double().split(8)).float()[:, None]
mask = rollout.response_mask.float()
both = ((values * mask > 0).any(1) & (values * mask < 0).any(1))[:, None]
expected = -mask * torch.where(both, z.abs() * values.sign(), z) / mask.sum()
print(json.dumps([int((both & (z != 0)).sum()), int(lengths.sum() - mask.sum()), *gaps_to(expected)]))
""".replace("values = torch", "import re, reward\nvalues = torch", 1),
    )
    assert both_signs >= 1
    assert (written > 0) == ("calculator" in names)
    assert gaps[0] < 1e-5 and gaps[1] < 1e-4


def test_a_tournament_by_hand():
    """A short right response, a long one, and a wrong one, then two equal ones: 2, 1 and 0 of 2; a draw each."""
    copy = edited("tournament")
    code = """
import json
from my_tournament import tournament
responses = ["75", "<think>5</think>75", "74", "1", "1"]
print(json.dumps(tournament(["48+27="] * 3 + ["1+1="] * 2, responses, ["75"] * 3 + ["2"] * 2)))
"""
    assert evaluate(copy, code) == [1, 0.5, 0, 0.5, 0.5]
    rows = train(copy, "--reward my_tournament.tournament --steps 2")
    assert [row["reward"] for row in rows] == pytest.approx(
        [0.5, 0.5]
    )  # somebody wins, somebody loses
    python(copy, "eval.py", "runs/run-0", "--limit", 10)
    measured = json.loads((copy / "runs/run-0/eval.json").read_text())
    assert "accuracy" in json.dumps(measured)


# ---------------------------------------------------------------------------------------------------------- soft gate


def test_soft_gates_and_a_divergence_mask_in_closed_form():
    """The gate's gradient is 4 s (1 - s) ratio w with s = sigmoid(t (ratio - 1)): w at ratio 1. The mask drops 0.5 ->
    0.7 with weight 1 at a cap of 0.15, and keeps 0.5 -> 0.6, 0.01 -> 0.05 and 0.5 -> 0.7 with weight -1."""
    copy = edited("soft_gate")
    gaps, found, masked, mad = evaluate(
        copy,
        """
import json, math, torch
from loss import LOSSES, NORMALISERS
from train import Config
old = torch.tensor([[0.5, 0.5, 0.01, 0.5]], dtype=torch.float64).log()
now = torch.tensor([[0.7, 0.6, 0.05, 0.5]], dtype=torch.float64).log().requires_grad_()
mask, gaps, found, masked = torch.ones(1, 4, dtype=torch.bool), [], [], []
for w, t in ((1.0, 1.0), (-1.0, 1.05)):
    weights = torch.tensor([[w]], dtype=torch.float64)
    loss, clipped = LOSSES["soft_gate"](now, old, weights, mask, Config())
    (grad,) = torch.autograd.grad(loss.sum(), now)
    for k in range(4):
        ratio = math.exp(now[0, k].item() - old[0, k].item())
        s = 1 / (1 + math.exp(-t * (ratio - 1)))
        gaps.append(abs(grad[0, k].item() + 4 * s * (1 - s) * ratio * w))
    found += [clipped.any().item(), grad[0, 3].item()]
    loss, clipped = LOSSES["divergence"](now, old, weights, mask, Config())
    (grad,) = torch.autograd.grad(loss.sum(), now)
    gaps += ((grad + (now - old).exp() * w) * ~clipped).abs()[0].tolist() + grad[clipped].abs().tolist()
    masked.append(clipped[0].tolist())
mad = [NORMALISERS["mad"](torch.tensor(r, dtype=torch.float64)).tolist() for r in ([0, 1, 2, 3, 100], [0, 0, 0, 1])]
print(json.dumps([gaps, found, masked, mad]))
""",
    )
    assert max(gaps) < 1e-12
    assert found == [False, pytest.approx(-1, abs=1e-12), False, pytest.approx(1, abs=1e-12)]
    assert masked == [[True, False, False, False], [False] * 4]
    assert mad[0] == pytest.approx([r / 1.4826 for r in (-2, -1, 0, 1, 98)], abs=1e-12)
    assert mad[1] == [0, 0, 0, 1]
    rows = train(
        copy, "--steps 2 --loss soft_gate --normaliser mad --minibatches 2 --reward length"
    )
    assert all(row["clip_share"] == 0 for row in rows if row["updates"])


# ------------------------------------------------------------------------------------------------------------- engine

SERVER = """
import os, sys, time
sys.path.insert(0, "tests")
os.environ["no_proxy"] = "*"
from stand_in_server import StandIn

server = StandIn()
"""


def test_an_inference_server_samples_and_ratios_make_up_for_it():
    """The server runs in bfloat16, the learner in float32. -min(ratio, cap) w / tokens is the gradient of each token."""
    copy = edited("engine")
    code = (
        ZSCORES
        + """
ratio = (plain - rollout.old_logprobs).exp().detach()
rewards = torch.tensor([sample["reward"] for sample in samples], dtype=torch.float64)
z = zscores(rewards.split(4)).float()[:, None]
mask = rollout.response_mask.float()
off = ((ratio - 1).abs() * mask).max().item()
print(json.dumps([off, server.requests[0]["seed"], *gaps_to(-mask * ratio.clamp(max=1.01) * z / mask.sum())]))
"""
    )
    flags = "--reward length --loss cispo --cispo_cap 1.01 --server {server.url}"
    off, seed, *gaps = watch(copy, flags, code, before=SERVER)
    assert off > 1e-3  # the ratios are not 1
    assert 0 <= seed < 2**31
    assert gaps[0] < 1e-6 and gaps[1] < 1e-4


FAULTS = """
import engine.server, json, train
from lib import files
from lib.flags import UserError, parse
from pathlib import Path

flags = "--prompts_per_step 4 --group_size 4 --max_new_tokens 16 --eval_problems 0 --lr 1e-3 --fast off --save_every 1"
flags += " --reward length --loss cispo"
sample_groups, calls, found = train.sample_groups, [], {}
engine.server.Server.patience = 2

def run(flags):
    train.main(parse(train.Config, train.HELP, flags.split(), train.fill)[0])

def rows(name):
    return files.read_rows(Path(f"runs/{name}/metrics.jsonl"), lambda key: "seconds" not in key and "second" not in key)

run(f"{flags} --steps 15 --server {server.url} --name straight")
found["reward"] = [row["reward"] for row in rows("straight")]
run(f"{flags} --steps 4 --server {server.url} --name short")
for fault in ("fails", "half", "sleeps"):
    def broken(*arguments):
        server.fault = fault if run_state(arguments[0]) == 2 else ""
        return sample_groups(*arguments)

    def run_state(run):
        return run.state["step"]

    train.sample_groups = broken
    try:
        run(f"{flags} --steps 4 --server {server.url} --name {fault}")
    except UserError as error:
        message = str(error)
    train.sample_groups, server.fault = sample_groups, ""
    time.sleep(4 if fault == "sleeps" else 0)  # until it has woken up
    other = StandIn()  # at another address
    done = len(rows(fault))
    run(f"--name {fault} --resume --server {other.url}")
    found[fault] = [message, done, rows(fault) == rows("short")]
print(json.dumps(found))
"""


def test_fifteen_steps_from_a_server_learn_and_one_that_breaks_loses_nothing():
    found = evaluate(edited("engine"), SERVER + FAULTS)
    reward = found.pop("reward")
    assert sum(reward[-5:]) / 5 > sum(reward[:5]) / 5 + 1  # the mean length, of at most 16
    for message, done, equal in found.values():
        assert message.startswith("--server http://") and "\n" not in message
        assert done == 2 and equal
    assert set(found) == {"fails", "half", "sleeps"}


# -------------------------------------------------------------------------------------------------------- one step late

LATE = """
import copy, json, time, torch
import loss, train
from lib.flags import parse
from engine.learner import Learner
from engine.sampler import LocalSampler

update, call, gaps, ratios, policies = Learner.update, LocalSampler.__call__, [], [], []

def slow_call(self, *arguments):
    time.sleep(2)
    return call(self, *arguments)

def slow_update(self, backward, batch, lr, on_policy):
    time.sleep(2)
    policies.append(copy.deepcopy(self.policy))
    sampled_by = policies[max(0, len(policies) - 2)]  # that of the step before
    was = loss.token_logprobs(sampled_by, batch, self.config.sampling)[0].detach()
    now = loss.token_logprobs(self.policy, batch, self.config.sampling)[0]
    gaps.append((was - batch.old_logprobs).abs().max().item())

    def watched(part, token_logprobs, config):
        found = backward(part, token_logprobs, config)
        ratio = (now - was).detach().exp()
        expected = (-ratio.clamp(max=config.cispo_cap) * batch.weights * now * batch.loss_scale * batch.response_mask).sum()
        grads = torch.autograd.grad(expected, list(self.policy.parameters()))
        ratios.append([max(((p.grad - g).norm() / g.norm()).item() for p, g in zip(self.policy.parameters(), grads)),
            ((ratio - 1) * batch.response_mask).abs().max().item()])
        return found

    return update(self, watched, batch, lr, on_policy)

Learner.update, LocalSampler.__call__ = slow_update, slow_call
flags = "--prompts_per_step 4 --group_size 4 --max_new_tokens 16 --eval_problems 0 --lr 1e-3 --warmup_steps 0 --steps 6"
flags += " --fast off --reward length --loss cispo"
train.main(parse(train.Config, train.HELP, flags.split(), train.fill)[0])
seconds = [json.loads(line)["seconds"] for line in open("runs/add/metrics.jsonl")]
print(json.dumps([gaps, ratios, seconds]))
"""


def test_one_step_late_has_real_ratios_and_saves_time():
    gaps, ratios, seconds = evaluate(edited("one_step_late"), LATE)
    assert max(gaps) < 1e-5  # old log-probs are those of the policy that sampled
    assert max(gap for gap, _ in ratios) < 1e-5  # the gradient is that of autograd with the ratio
    assert ratios[0][1] < 1e-5 and max(off for _, off in ratios[1:]) > 1e-3
    assert min(seconds[1:]) < 4  # two seconds of sampling beside two of learning


def test_one_step_late_resumes_exactly():
    assert_resumes_exactly(edited("one_step_late"), "--loss cispo --reward length")


def test_one_step_late_with_a_server_resumes_exactly():
    code = (
        SERVER
        + """
import json, shutil, train
from lib import files
from lib.flags import parse
from pathlib import Path

flags = "--prompts_per_step 4 --group_size 4 --max_new_tokens 16 --eval_problems 0 --lr 1e-3 --fast off --save_every 3"
flags += f" --reward length --loss cispo --steps 6 --name straight --server {server.url}"
runs = [Path("runs/straight"), Path("runs/cut")]
train.main(parse(train.Config, train.HELP, flags.split(), train.fill)[0])
shutil.copytree(*runs)
shutil.rmtree(runs[1] / "checkpoint")
train.main(parse(train.Config, train.HELP, ["--name", "cut", "--resume"], train.fill)[0])
rows = [files.read_rows(run / "metrics.jsonl", lambda key: "second" not in key) for run in runs]
bits = [(run / "checkpoint/model.safetensors").read_bytes() for run in runs]
print(json.dumps([len(rows[0]), rows[0] == rows[1], bits[0] == bits[1], [row.get("ratio_max", 1) for row in rows[0]]]))
"""
    )
    steps, same_rows, same_bits, ratios = evaluate(edited("engine", "one_step_late"), code)
    assert steps == 6 and same_rows and same_bits
    assert max(ratios) > 1.01


# ---------------------------------------------------------------------------------------------------------- warm start


def write_sums(path):
    """40 sums, each with a worked solution."""
    rng = random.Random(0)
    rows = []
    for _ in range(40):
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        problem = Problem(f"{a}+{b}=", str(a + b))
        row = {"prompt": problem.prompt, "answer": problem.answer}
        rows.append({**row, "solution": add(problem, True, rng)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("warm_steps", [1, 0])
def test_gold_responses_first_alone_and_then_in_each_group(warm_steps):
    """Warm: the gradient is that of the cross-entropy, the mean over the gold tokens. Then: that of all rows of the
    group. The metrics are those of the policy's own responses."""
    copy = edited("warm_start")
    write_sums(copy / "sums.jsonl")
    gold, *gaps = watch(
        copy,
        f"--task sums.jsonl --warm_steps {warm_steps} --max_new_tokens 32",
        ZSCORES
        + f"""
rows = [json.loads(line) for line in open("sums.jsonl")]
solutions = {{row["prompt"]: row["solution"] for row in rows}}
gold = all(sample["response"] == solutions[sample["prompt"]] for sample in samples[3::4])
mask = rollout.response_mask.float()
if {warm_steps}:
    gold_rows = (torch.arange(B) % 4 == 3)[:, None]
    gold_mask = mask * gold_rows
    token_grads *= gold_rows  # a row of the policy's own may be equal to one of them
    expected = -gold_mask / gold_mask.sum()
else:
    rewards = torch.tensor([sample["reward"] for sample in samples], dtype=torch.float64)
    expected = -mask * zscores(rewards.split(4)).float()[:, None] / mask.sum()
[row] = [json.loads(line) for line in open("runs/sums/metrics.jsonl")]
own = [samples[b] for b in range(B) if b % 4 != 3]
for key, name in (("reward", "reward"), ("response_length", "length")):
    gold = gold and abs(row[key] - sum(sample[name] for sample in own) / len(own)) < 1e-9
print(json.dumps([gold, *gaps_to(expected)]))
""",
    )
    assert gold
    assert gaps[0] < 1e-5 and gaps[1] < 1e-4


def test_problems_keep_the_worked_solutions_of_gsm8k():
    solutions = evaluate(
        edited("warm_start"),
        """
import json, tasks
from pathlib import Path
tasks.download = lambda *arguments: None
for name in tasks.GSM8K_SHA256:
    rows = [{"question": f"{n} + 1?", "answer": f"{n} + 1 = {n + 1}\\n#### {n + 1}"} for n in range(40)]
    Path(name).write_text("".join(json.dumps(row) + "\\n" for row in rows))
print(json.dumps([problem.columns["solution"] for problem in tasks.gsm8k(".").test[:2]]))
""",
    )
    assert solutions == ["0 + 1 = 1\n#### 1", "1 + 1 = 2\n#### 2"]


# ------------------------------------------------------------------------------------------------------ adaptive groups


def test_more_responses_only_where_the_first_rewards_are_equal():
    """Groups of 4 and of 16. The weights are those of each group by hand, and no response comes twice."""
    copy = edited("adaptive_groups")
    sizes, equal, other, *gaps = watch(
        copy,
        "--prompts_per_step 12 --group_size 16 --first_responses 4 --max_new_tokens 32",
        ZSCORES
        + """
sizes = [len(group) for group in groups]
starts = [sum(sizes[:p]) for p in range(12)]
responses = rollout.response_ids()
rewards = torch.tensor([sample["reward"] for sample in samples], dtype=torch.float64)
equal = [len(set(rewards[start : start + 4].tolist())) == 1 for start in starts]
prompts = [len({sample["prompt"] for sample in samples[s : s + n]}) for s, n in zip(starts, sizes)]
other = [responses[s : s + 4] != responses[s + 4 : s + 8] for s, n in zip(starts, sizes) if n == 16]
mask = rollout.response_mask.float()
expected = -mask * zscores(rewards.split(sizes)).float()[:, None] / mask.sum()
print(json.dumps([sizes, equal, prompts == [1] * 12 and all(other), *gaps_to(expected)]))
""",
    )
    assert set(sizes) == {4, 16}
    assert [size == 16 for size in sizes] == equal
    assert other
    assert gaps[0] < 1e-5 and gaps[1] < 1e-4


def test_adaptive_groups_that_are_off_change_nothing():
    parameters = []
    for copy in (edited(), edited("adaptive_groups")):
        train(copy, "--steps 3")
        parameters.append((copy / "runs/run-0/checkpoint/model.safetensors").read_bytes())
    assert parameters[0] == parameters[1]
