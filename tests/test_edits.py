"""Each patch of docs/edits is applied to a copy of the project, which then trains, and shows its effect in a number.

Slow: whoever has changed the code must not see red because a patch no longer fits.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib.files import read_rows
from tasks import load_task, take_problems

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PATCHES = sorted((ROOT / "docs" / "edits").glob("*.patch"))
SMALL = "--prompts_per_step 4 --group_size 4 --max_new_tokens 16 --eval_problems 0 --lr 1e-3"


def edited(*names) -> Path:
    """A copy of the project in the current folder, with patches applied."""
    copy = Path("-".join(["copy", *names])).resolve()
    parts = shutil.ignore_patterns(".*", "runs", "data", "smollm*", "__pycache__", "*.ipynb")
    shutil.copytree(ROOT, copy, ignore=parts)
    for name in names:
        patch = (ROOT / "docs" / "edits" / f"{name}.patch").read_bytes()
        subprocess.run(["patch", "-p1", "--fuzz=0"], cwd=copy, input=patch, check=True)
    return copy


def python(folder, *arguments, status=0) -> str:
    """What python prints, run in a copy of the project."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout


def train(folder, *flags) -> list[dict]:
    """The metrics of a run in a copy of the project."""
    words = " ".join([SMALL, *flags]).split()
    name = f"run-{len(list(folder.glob('runs/*')))}"
    python(folder, "train.py", *words, "--name", name)
    return read_rows(folder / "runs" / name / "metrics.jsonl")


def evaluate(folder, code):
    """Runs code that ends by printing JSON, in a copy of the project."""
    return json.loads(python(folder, "-c", code).splitlines()[-1])


INTERRUPTED = """
import os, signal, train
from lib.flags import parse
from lib.run import Run

def run(flags):
    train.main(parse(train.Config, train.HELP, flags, train.fill)[0])

signal.signal(signal.SIGINT, signal.default_int_handler)
run({flags} + ["--name", "straight"])
record = Run.record

def interrupt(self, metrics, *arguments):
    record(self, metrics, *arguments)
    if metrics["step"] == 2:
        os.kill(os.getpid(), signal.SIGINT)

Run.record = interrupt
run({flags} + ["--name", "cut"])
"""


def assert_resumes_exactly(folder, *flags):
    """A run that Ctrl-C ends in the middle and that is resumed has the metrics and the parameters of the straight
    run."""
    flags = " ".join([SMALL, "--steps 6", *flags]).split()
    straight, cut = folder / "runs" / "straight", folder / "runs" / "cut"
    python(folder, "-c", INTERRUPTED.format(flags=flags), status=128 + signal.SIGINT)
    assert 2 <= len(read_rows(cut / "metrics.jsonl")) < 6
    python(folder, "train.py", "--name", "cut", "--resume")
    metrics = [
        read_rows(run / "metrics.jsonl", lambda key: "second" not in key) for run in (straight, cut)
    ]
    assert len(metrics[0]) == 6
    assert metrics[0] == metrics[1]
    parameters = [
        (run / "checkpoint" / "model.safetensors").read_bytes() for run in (straight, cut)
    ]
    assert parameters[0] == parameters[1]


# Trains one step. rollout, samples, groups: what was sampled; token_grads (B, N): d loss / d log-prob of each
# token; gradient: that of the parameters
WATCH = """
import json

import torch

import loss
import train
from lib.flags import parse
from policy import load_policy
from sample import Sampling

step = {"grads": []}
backward, sample_groups = train.backward, train.sample_groups


def watched_groups(*arguments):
    step["rollout"], step["samples"], step["groups"] = sample_groups(*arguments)
    return step["rollout"], step["samples"], step["groups"]


def watched(batch, token_logprobs, config):
    def watched_logprobs(**options):
        logprobs, entropy = token_logprobs(**options)
        logprobs.register_hook(lambda grad: step["grads"].append((batch.ids, grad)))
        return logprobs, entropy

    found = backward(batch, watched_logprobs, config)
    step["gradient"] = [parameter.grad.clone() for parameter in token_logprobs.args[0].parameters()]
    return found


train.backward, train.sample_groups = watched, watched_groups
flags = FLAGS.split()
train.main(parse(train.Config, train.HELP, flags, train.fill)[0])
rollout, samples, groups = step["rollout"], step["samples"], step["groups"]
B, N = rollout.response_mask.shape
token_grads = torch.zeros(B, N)
for rows, grads in step["grads"]:
    for ids, grad in zip(rows, grads):
        token_grads[(rollout.ids == ids).all(1)] = grad  # equal rows have equal gradients
policy, tokenizer = load_policy("models/add", torch.device("cpu"))  # as it was before the step
plain, entropy = loss.token_logprobs(policy, rollout, Sampling())
"""


def watch(folder, flags, code, before=""):
    """Runs `before`, a step of a run under WATCH, and code that ends by printing JSON. The flags may use names of
    `before` in braces."""
    flags = f"{SMALL} --steps 1 {flags}"
    flags = f"f{flags!r}" if before else repr(flags)
    return evaluate(folder, before + WATCH.replace("FLAGS", flags) + code)


def test_top_p_draws_from_the_nucleus():
    """(0.4, 0.1, 0.3, 0.2) at top_p 0.6: the tokens of 0.4 and 0.3, at 4/7 and 3/7."""
    counts, logprobs, entropy, shape = evaluate(
        edited("top_p"),
        """
import json
import torch
from loss import token_stats
from sample import Sampling, policy_distribution, sample_token
sampling = Sampling(top_p=0.6)
logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log().repeat(700, 1)
uniforms = (torch.arange(700, dtype=torch.float64) + 0.5) / 700
tokens, _ = sample_token(logits.clone(), uniforms, sampling)
logprobs, entropy = token_stats(logits[:2], torch.tensor([0, 2]), sampling)
no_values = torch.empty(2, 9, device="meta")  # as in a CUDA graph
shape = policy_distribution(no_values, sampling).shape
print(json.dumps([tokens.bincount(minlength=4).tolist(), logprobs.exp().tolist(), entropy[0].item(), list(shape)]))
""",
    )
    assert counts == [400, 0, 300, 0]
    assert logprobs == pytest.approx([4 / 7, 3 / 7])
    assert entropy == pytest.approx(0.6829, abs=1e-4)  # -4/7 log 4/7 - 3/7 log 3/7
    assert shape == [2, 9]


def test_top_p_is_learned_by_the_fast_forms_as_it_is_sampled():
    folder = edited("top_p")
    rows = train(folder, "--steps 5 --top_p 0.9 --temperature 1.2")
    assert max(row["sampler_gap"] for row in rows) < 1e-5
    chosen, gap = evaluate(
        folder,
        """
import json
import torch
import engine.choose, loss
from policy import load_policy
from sample import Sampling, generate
policy, tokenizer = load_policy("models/add", torch.device("cpu"))
prompts = [tokenizer("48+27=").input_ids, tokenizer("5+2=").input_ids]
sampling = Sampling(1.2, top_p=0.9)
forms = engine.choose.choose(policy, prompts, [], sampling, 16)
chosen = forms == engine.choose.Forms(engine.generate.generate, engine.logprobs.token_logprobs)
rollout = generate(policy, prompts, 8, 16, [], [0, 1], sampling)
found = [
    engine.choose.values_and_gradients(form, policy, rollout, sampling)
    for form in (forms.token_logprobs, loss.token_logprobs)
]
print(json.dumps([chosen, max(engine.choose.differences(*found))]))
""",
    )
    assert chosen
    assert gap < 1e-4


def test_a_run_with_top_p_is_evaluated_with_it():
    """So small a top_p leaves only the likeliest token, so that sampled responses are the greedy ones."""
    folder = edited("top_p")
    train(folder, "--steps 1 --top_p 0.001")
    python(folder, "eval.py", "runs/run-0", "--limit", "40")
    lines = (folder / "runs" / "run-0" / "responses.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    greedy, sampled = (
        [row["response"] for row in rows if row["decoding"] == kind]
        for kind in ("greedy", "sampled")
    )
    assert len(greedy) == 80
    assert greedy == sampled


def test_the_curriculum_takes_prompts_of_success_near_a_half():
    """Of the distances 0, 0.25, 0.5, 0.5 and 0.125 the two smallest; two new prompts beside them."""
    folder = edited("curriculum")
    train(folder, "--steps 1")
    path = folder / "runs" / "run-0" / "checkpoint" / "state.pt"
    state = torch.load(path, weights_only=True)
    assert len(state["success"]) == 4
    torch.save({**state, "success": {5: 0.5, 7: 0.25, 9: 1.0, 11: 0.0, 13: 0.625}}, path)
    prompts, rewards, success = watch(
        folder,
        "--name run-0 --resume --steps 2",
        """
state = torch.load("runs/run-0/checkpoint/state.pt", weights_only=True)
prompts = [sample["prompt"] for sample in samples]
print(json.dumps([prompts, [sample["reward"] for sample in samples], state["success"][5]]))
""",
    )
    problems = load_task("add", "").train
    expected = [problems[5], problems[13], *take_problems(problems, 4, 2, seed=0)]
    assert prompts[::4] == [problem.prompt for problem in expected]
    assert success == sum(rewards[:4]) / 4  # of problem 5, which came first


def test_a_curriculum_resumes_exactly():
    assert_resumes_exactly(edited("curriculum"))


def test_credit_goes_to_what_follows_the_thought():
    """A response's weight w times N tokens / K after </think>, over all tokens of the step, for each of the K. The
    gradient is that of plain autograd on these."""
    thoughts, token_gap, gradient_gap = watch(
        edited("token_weights"),
        "--reward my_tokens.after_thought --max_new_tokens 32 --group_size 8",
        """
from reward import number
rewards = torch.tensor([2 * number("", s["response"], s["answer"]) - 1 for s in samples]).view(-1, 8)
z = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=0, keepdim=True) + 1e-4)
expected = torch.zeros(B, N)
thoughts = 0
for b, ids in enumerate(rollout.response_ids()):
    after = range(len(ids))
    for n in range(len(ids) - 1):
        if tokenizer.decode(ids[: n + 1]).endswith("</think>"):
            after = range(n + 1, len(ids))
    thoughts += z.view(-1)[b].item() != 0 and len(after) < len(ids)
    expected[b, after] = z.view(-1)[b] * len(ids) / len(after)
expected = -expected / rollout.response_mask.sum()
(expected * plain).sum().backward()
gaps = [(p.grad - g).norm() / g.norm() for p, g in zip(policy.parameters(), step["gradient"])]
token_gap = (token_grads - expected).abs().max() / expected.abs().max()
print(json.dumps([thoughts, token_gap.item(), max(gaps).item()]))
""",
    )
    assert thoughts >= 3
    assert token_gap < 1e-5
    assert gradient_gap < 1e-4


def test_sgd_by_hand():
    """v1 = g1, v2 = 0.9 v1 + g2, w2 = w0 - lr v1 - lr v2; one moment in the memory estimate."""
    gap, moments = evaluate(
        edited("sgd"),
        """
import json
import torch
from lib.estimate import estimate
from engine.optimizer import Optimizer
from policy import load_policy
from train import Config
policy, _ = load_policy("models/add", torch.device("cpu"))
optimizer = Optimizer(policy, 0.0)
weight = next(policy.parameters())
before = weight.detach().clone()
g1, g2 = torch.randn_like(before), torch.randn_like(before)
for grad in (g1, g2):
    weight.grad = grad.clone()
    optimizer.step(0.1, max_grad_norm=1e9)
expected = before - 0.1 * g1 - 0.1 * (0.9 * g1 + g2)
moments = estimate(Config(), policy, 0, 1)["optimizer"] / (4 * policy.num_parameters())
print(json.dumps([(weight - expected).abs().max().item(), moments]))
""",
    )
    assert gap < 1e-6
    assert moments == 1


def test_muon_makes_the_update_of_a_matrix_orthogonal():
    """Gradients with singular values from 1 to 30 change a matrix by nearly equal ones. Embeddings follow AdamW,
    whose first step has the size lr in each entry."""
    ratios, adam = evaluate(
        edited("muon"),
        """
import json
import torch
from engine.optimizer import Optimizer
from policy import load_policy
policy, _ = load_policy("models/add", torch.device("cpu"))
optimizer = Optimizer(policy, 0.0)
layer = policy.get_decoder().layers[0]
matrices = [layer.self_attn.q_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight]
embedding = policy.get_input_embeddings().weight
before = [weight.detach().clone() for weight in [*matrices, embedding]]
for weight in matrices:
    u, s, v = torch.linalg.svd(torch.randn_like(weight), full_matrices=False)
    weight.grad = u @ torch.linspace(1, 30, len(s)).diag() @ v
embedding.grad = torch.randn_like(embedding)
optimizer.step(0.01, max_grad_norm=1e9)
changes = [weight.detach() - old for weight, old in zip([*matrices, embedding], before)]
values = [torch.linalg.svdvals(change) for change in changes[:-1]]
print(json.dumps([[(s.max() / s.min()).item() for s in values], changes[-1].abs().mean().item()]))
""",
    )
    assert max(ratios) < 2
    assert adam == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_an_optimizer_resumes_exactly(name):
    assert_resumes_exactly(edited(name), "--lr 1e-2")


def test_only_the_fifth_of_the_highest_entropy_is_trained_on():
    """All weights are 1, so that every token would have a gradient. Micro-batches of any size train the same tokens."""
    folder = edited("entropy_tokens")
    (folder / "my_rewards.py").write_text("def one(prompt, response, answer):\n    return 1.0\n")
    trained = []
    for size in (50, 4096):
        share, lowest, highest, tokens, scale = watch(
            folder,
            f"--reward my_rewards.one --normaliser raw --micro_batch_tokens {size}",
            """
mask = rollout.response_mask
trained = token_grads != 0
rest = mask & ~trained
scale = token_grads[trained].unique() * mask.sum()
numbers = [trained.sum() / mask.sum(), entropy[trained].min(), entropy[rest].max()]
print(json.dumps([*[number.item() for number in numbers], trained.tolist(), scale.tolist()]))
""",
        )
        assert 0.19 < share < 0.26  # responses begin alike: what ties with the border is in
        assert lowest > highest
        assert scale == pytest.approx([-1])  # the denominator counts all tokens
        trained.append(tokens)
    assert trained[0] == trained[1]
