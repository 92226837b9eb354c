"""Fine-tune a language model by reinforcement (GRPO) on one GPU, or on a CPU.

    python train.py                                                   # a tiny model learns to think: two minutes
    python train.py --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k
    python train.py --model FOLDER --task my.jsonl --reward exact     # your model, your problems
    python train.py --name add --resume                               # go on where a run stopped
"""

import json
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm
from transformers.hf_argparser import HfArg

import pretrain
import track
from eval import evaluate, table
from flags import UserError, run_script
from loss import AGGREGATIONS, BASELINED, FILTERS, LOSSES, NORMALISERS
from policy import Optimizer, load_policy, micro_batches, pick_device, response_logprobs, save_policy, stop_ids
from reward import load_reward, score
from sample import check_room, generate
from tasks import Problem, Task, digest, load_task, prompt_ids, stream

BASE = "models/add"


@dataclass(frozen=True)
class Config:
    # what is learnt, by what
    model: str = HfArg(default=BASE, help="Hugging Face name, model or run folder; the default is built if missing")
    task: str = HfArg(default="add", help="add, countdown, gsm8k, or a .jsonl file of prompts and answers")
    data_dir: str = HfArg(default="", help="folder with the task's files, if it needs some (gsm8k: data/gsm8k)")
    reward: str = HfArg(default="", help="a rule, module.function, model(...), a mixture; default: the task's rule")
    true_reward: str = HfArg(default="", help="what --reward stands for: not learnt from, but watched")
    reward_device: Literal["auto", "cuda", "mps", "cpu"] = HfArg(default="auto", help="auto: that of the policy")
    reward_workers: int = HfArg(default=0, help="threads for slow rewards (calls to a server), 0 for none")
    reward_timeout: float = HfArg(default=10.0, help="seconds a thread's call may take")
    reward_missed: float = HfArg(default=0.0, help="reward of a response whose call took longer")
    # sampling
    prompts_per_step: int = HfArg(default=8, help="P, prompts a step")
    group_size: int = HfArg(default=16, help="G, responses sampled to each prompt")
    max_new_tokens: int = HfArg(default=512, help="tokens after which a response is cut")
    temperature: float = HfArg(default=1.0, help="of the distribution that is sampled from and learnt")
    # weights and loss (loss.py)
    normaliser: Literal[tuple(NORMALISERS)] = HfArg(default="zscore", help="from rewards to weights")
    filter: Literal[tuple(FILTERS)] = HfArg(default="none", help="which responses count")
    aggregation: Literal[tuple(AGGREGATIONS)] = HfArg(default="token", help="what the loss is divided by")
    loss: Literal[tuple(LOSSES)] = HfArg(default="logprob", help="what is minimised")
    # update
    steps: int = HfArg(default=200, help="optimizer steps")
    lr: float = HfArg(default=0.0, help="highest learning rate; 0 takes 2e-4 under 10 M parameters, else 1e-6")
    warmup_steps: int = HfArg(default=10, help="steps over which the rate rises; then it falls to a tenth")
    weight_decay: float = HfArg(default=0.0, help="of AdamW")
    max_grad_norm: float = HfArg(default=1.0, help="longer gradients are scaled down to this norm")
    micro_batch_tokens: int = HfArg(default=16384, help="tokens in one forward pass: memory only, same gradient")
    # looking and keeping
    eval_every: int = HfArg(default=20, help="steps between measurements on held-out problems")
    eval_problems: int = HfArg(default=200, help="held-out problems to measure on, 0 for none")
    save_every: int = HfArg(default=20, help="steps between checkpoints")
    log_samples: int = HfArg(default=4, help="responses a step that samples.jsonl keeps")
    name: str = HfArg(default="", help="of the run; default: the task's, numbered")
    runs_dir: str = HfArg(default="runs", help="folder of the runs")
    resume: bool = HfArg(default=False, help="go on with run --name from its checkpoint, with its flags")
    seed: int = HfArg(default=0, help="same seed, same run (on a CPU to the last bit)")
    device: Literal["auto", "cuda", "mps", "cpu"] = HfArg(default="auto", help="auto: the first of these that is there")
    dtype: Literal["auto", "float32", "bfloat16"] = HfArg(default="auto", help="auto: bfloat16 on cuda, else float32")


PRESETS = {"add": dict(prompts_per_step=32, max_new_tokens=32, steps=100, eval_every=10, eval_problems=500)}
HELP = __doc__ + "".join(
    f"\n--task {task} means, unless given:" + "".join(f" --{flag} {value}" for flag, value in flags.items()) + "\n"
    for task, flags in PRESETS.items()
)


def fill(given: dict) -> dict:
    """Values of the flags that the user did not give: those of the run that goes on, or those that suit the task."""
    if given.get("resume"):
        if not given.get("name"):
            raise UserError("--resume: say which run goes on by --name")
        return track.read_config(Path(given.get("runs_dir", "runs")) / given["name"])
    return PRESETS.get(given.get("task", "add"), {})


def check(config: Config) -> None:
    """UserError for a value that cannot work."""
    for flag in ("prompts_per_step", "group_size", "max_new_tokens", "steps", "micro_batch_tokens", "eval_every",
                 "save_every"):
        if getattr(config, flag) < 1:
            raise UserError(f"--{flag} {getattr(config, flag)}: must be at least 1")
    for flag in ("temperature", "reward_timeout", "max_grad_norm"):
        if not 0 < getattr(config, flag) < float("inf"):
            raise UserError(f"--{flag} {getattr(config, flag)}: must be above 0")
    for flag in ("lr", "reward_workers", "warmup_steps", "weight_decay", "eval_problems", "log_samples", "seed"):
        if not 0 <= getattr(config, flag) < float("inf"):
            raise UserError(f"--{flag} {getattr(config, flag)}: must not be below 0")
    if config.group_size == 1 and config.normaliser in BASELINED:
        raise UserError(f"--group_size 1: --normaliser {config.normaliser} compares the responses of a group, "
                        "give at least 2")


def learning_rate(step: int, config: Config) -> float:
    """Steps count from 1. Rises to --lr over the warm-up, then falls in a straight line to a tenth at the last step."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * (1 - 0.9 * done)


def main(config: Config) -> Path:
    """Trains; returns the run folder."""
    # 0. set-up: the task, the policy, the optimizer and the run folder
    check(config)
    device = pick_device(config.device)
    task = load_task(config.task, config.data_dir)
    reward_device = device if config.reward_device == "auto" else pick_device(config.reward_device)
    reward = load_reward(config.reward or task.reward, reward_device, config.reward_workers, config.reward_timeout,
                         config.reward_missed)
    truth = load_reward(config.true_reward or task.reward)
    run = Path(config.runs_dir) / config.name
    source = str(track.find_checkpoint(run)) if config.resume else config.model
    if source == BASE and not Path(BASE).exists():
        pretrain.main(pretrain.Config(output=BASE, device=config.device))
    policy, tokenizer = load_policy(source, device, config.dtype)
    optimizer, stop = Optimizer(policy, config.weight_decay), stop_ids(policy, tokenizer)
    if config.lr == 0:
        config = replace(config, lr=2e-4 if policy.num_parameters() < 10e6 else 1e-6)
    longest = sorted(task.train + task.validation, key=lambda problem: len(str(problem.prompt)))[-16:]
    check_room(policy, [prompt_ids(task, problem, tokenizer) for problem in longest], config.max_new_tokens)
    held_out = task.validation[: config.eval_problems]

    def measure(temperature: float) -> dict:
        return evaluate(policy, tokenizer, task, held_out, temperature, config.max_new_tokens)

    if config.resume:
        state = torch.load(Path(source) / "state.pt", weights_only=True, map_location="cpu")
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng"])
        random.setstate(state["python_rng"])
        first_step, drawn = state["step"] + 1, state["drawn"]
        if first_step > config.steps:
            raise UserError(f"--resume: {run} has done its {config.steps} steps, give it more by --steps")
        track.rewind(run, state["step"])
    else:
        run, first_step, drawn = track.new_run(config.runs_dir, config.name, config.task), 1, 0
        config = replace(config, name=run.name)
        torch.manual_seed(config.seed)  # nothing of ours draws from these two, a reward of yours may
        random.seed(config.seed)
    track.record_start(run, replace(config, resume=False), device)
    if held_out and not config.resume:
        track.write_json(run / "before.json", {"greedy": measure(0.0), "sampled": measure(config.temperature)})

    bar = tqdm(range(first_step, config.steps + 1), initial=first_step - 1, total=config.steps, dynamic_ncols=True)
    for step in bar:
        started = time.perf_counter()

        # 1. prompts: take P problems from the task
        problems = stream(task.train, drawn, config.prompts_per_step, config.seed)
        prompts = [prompt_ids(task, problem, tokenizer) for problem in problems]
        seeds = [digest(f"{config.seed}/{drawn + p}") for p in range(len(problems))]
        drawn += len(problems)

        # 2. generate: G responses to each, B = P * G rows
        rollout = generate(policy, prompts, config.group_size, config.max_new_tokens, stop, seeds, config.temperature)
        responses = rollout.responses(tokenizer)
        generated = time.perf_counter()

        # 3. reward: score every response
        rows = [problem for problem in problems for _ in range(config.group_size)]
        lengths = rollout.response_lengths.cpu()
        columns = [row.prompt for row in rows], responses, [row.answer for row in rows], lengths.tolist()
        values, parts = score(reward, *columns, config.max_new_tokens)
        rewards = torch.tensor(values).view(-1, config.group_size)  # (P, G)
        true_rewards = score(truth, *columns, config.max_new_tokens)[0]

        # 4. weigh: how much each response should gain or lose
        finished = rollout.finished.cpu()
        weights = NORMALISERS[config.normaliser](rewards).flatten()  # (B,)
        keep = FILTERS[config.filter](rewards, finished.view_as(rewards)).flatten()  # (B,) bool
        factors = torch.zeros(len(rows))
        factors[keep] = AGGREGATIONS[config.aggregation](lengths[keep], config.max_new_tokens)
        trained = (keep & (weights != 0)).nonzero()[:, 0]  # rows of weight 0 have no gradient: they are not run

        # 5. update: minimise -E[w * log pi(response | prompt)], in micro-batches
        loss, gap = 0.0, 0.0
        for micro in micro_batches(rollout.lengths.cpu()[trained], config.micro_batch_tokens):
            index = trained[micro]
            logprobs = response_logprobs(policy, *rollout.rows(index), config.temperature)  # (R, N)
            sampled = rollout.logprobs[index.to(device), : logprobs.shape[1]]
            per_token = LOSSES[config.loss](logprobs, sampled, weights[index, None].to(device))
            micro_loss = (per_token.sum(1) * factors[index].to(device)).sum()
            micro_loss.backward()
            loss += micro_loss.item()
            gap = max(gap, (logprobs.detach() - sampled).abs().max().item())
        lr = learning_rate(step, config)
        grad_norm = optimizer.step(lr, config.max_grad_norm) if len(trained) else 0.0

        # 6. repeat: record, evaluate, checkpoint, plot
        metrics = {
            "step": step,
            "reward": rewards.mean().item(),
            "reward_std": rewards.std(1, correction=0).mean().item(),
            "informative": (rewards.amax(1) != rewards.amin(1)).float().mean().item(),
            **{f"reward/{part}": sum(column) / len(rows) for part, column in parts.items()},
            "true_reward": sum(true_rewards) / len(rows),
            "accuracy": sum(value == 1 for value in true_rewards) / len(rows),
            "thinking": sum("</think>" in response for response in responses) / len(rows),
            "response_length": lengths.float().mean().item(),
            "finished": finished.float().mean().item(),
            "entropy": -(rollout.logprobs.sum() / lengths.sum()).item(),
            "trained": len(trained) / len(rows),
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "sampler_gap": gap,
            "drawn": drawn,
            "seconds_generate": generated - started,
            "seconds": time.perf_counter() - started,
        }
        last = step == config.steps
        if held_out and (last or step % config.eval_every == 0):
            after = measure(config.temperature)
            metrics |= {"eval_accuracy": after["accuracy"], "eval_interval": after["interval"]}
        track.append(run / "metrics.jsonl", [metrics])
        track.append(run / "samples.jsonl", [
            {"step": step, "prompt": columns[0][b], "response": responses[b], "answer": columns[2][b],
             "length": columns[3][b], "reward": values[b], "parts": {part: column[b] for part, column in parts.items()},
             "true_reward": true_rewards[b], "weight": weights[b].item()}
            for b in weights.argsort(descending=True)[:: max(1, len(rows) // max(1, config.log_samples))]
        ][: config.log_samples])
        if last or step % config.save_every == 0:
            if config.true_reward and track.watch(run, config.save_every):
                with track.new_checkpoint(run, "best") as folder:
                    save_policy(policy, tokenizer, folder)
            with track.new_checkpoint(run) as folder:
                save_policy(policy, tokenizer, folder)
                torch.save({"optimizer": optimizer.state_dict(), "step": step, "drawn": drawn,
                            "torch_rng": torch.get_rng_state(), "python_rng": random.getstate()}, folder / "state.pt")
        if last or step % config.eval_every == 0:
            track.plot(run)
        bar.set_postfix(reward=f"{metrics['reward']:.3f}", length=f"{metrics['response_length']:.1f}")
        tqdm.write(track.one_line(metrics))

    if held_out and (run / "before.json").exists():
        track.write_json(run / "after.json", {"greedy": measure(0.0), "sampled": after})
        report(run, task, held_out)
    print(f"\n{run}/: curves.png, metrics.jsonl, samples.jsonl, checkpoint/ (a Hugging Face folder), config.json, code/"
          f"\n\n    python eval.py {run}      # on the test problems, which training has not touched")
    return run


def report(run: Path, task: Task, problems: list[Problem]) -> None:
    """Prints what training changed on held-out problems, and three of them in full."""
    before, after = (json.loads((run / f"{when}.json").read_text()) for when in ("before", "after"))
    print(f"\n{len(problems)} held-out problems of task {task.name}, 95 % Wilson intervals\n")
    print(table({"before": before, "after": after}))
    for i, problem in enumerate(problems[:3]):
        print(f"\n{track.shorten(problem.prompt)}")
        for label, column in (("before:", before), ("after: ", after)):
            print(f"  {label} {track.shorten(column['sampled']['responses'][i])}")


if __name__ == "__main__":
    run_script(main, Config, HELP, fill)
