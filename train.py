"""Fine-tune a language model by reinforcement (GRPO) on one GPU, or on a CPU.

    python train.py                                                   # a tiny model learns to think: two minutes
    python train.py --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k
    python train.py --model FOLDER --task my.jsonl --reward exact     # your model, your problems
    python train.py --name add --resume                               # go on where a run stopped
"""

import random
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm
from transformers.hf_argparser import HfArg

import pretrain
import track
from checkpoint import find_checkpoint, leave, listening, load_state, lock, new_checkpoint, save_state
from eval import evaluate, report
from flags import UserError, need, run_script
from loss import AGGREGATIONS, BASELINED, FILTERS, LOSSES, NORMALISERS, RECIPES, choose, k3
from memory import table
from plot import plot
from policy import Optimizer, adapter_off, add_adapter, learning_rate, load_policy, pick_device, save_policy, stop_ids
from reward import load_reward, score
from sample import check_room, choose_sampler, join
from tasks import digest, load_task, prompt_ids, stream
from update import Learner, within_memory

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
    rows_at_once: int = HfArg(default=0, help="responses decoded at once, 0 for all; the others wait for one to end")
    sampler: Literal["fast", "generate"] = HfArg(default="fast", help="generate: the slower model.generate")
    # weights and loss (loss.py)
    recipe: Literal[tuple(RECIPES)] | None = HfArg(default=None, help="a published method: fills in what is not given")
    normaliser: Literal[tuple(NORMALISERS)] = HfArg(default="zscore", help="from rewards to weights")
    softmax_beta: float = HfArg(default=0.5, help="of --normaliser softmax: small looks at the best alone")
    filter: Literal[tuple(FILTERS)] = HfArg(default="none", help="which responses count")
    keep: float = HfArg(default=0.5, help="of --filter top: share of each group")
    resample_tries: int = HfArg(default=4, help="of --filter resample: at most so many times P prompts a step")
    aggregation: Literal[tuple(AGGREGATIONS)] = HfArg(default="token", help="what the loss is divided by")
    loss: Literal[tuple(LOSSES)] = HfArg(default="logprob", help="what is minimised")
    clip_low: float = HfArg(default=0.2, help="of --loss clip, gspo: the ratio counts down to 1 - this")
    clip_high: float = HfArg(default=0.2, help="of --loss clip, gspo: the ratio counts up to 1 + this")
    cispo_cap: float = HfArg(default=5.0, help="of --loss cispo: the ratio counts up to this")
    kl_beta: float = HfArg(default=0.0, help="weight of KL(policy || starting policy) in the loss, as k2")
    log_kl: bool = HfArg(default=False, help="record KL(policy || starting policy), which takes a second model")
    # update
    steps: int = HfArg(default=200, help="rollouts to learn from; an optimizer step each, but for the next two flags")
    updates_per_rollout: int = HfArg(default=1, help="passes over a rollout; above 1 choose a --loss with ratios")
    minibatches: int = HfArg(default=1, help="optimizer steps that a pass is divided into")
    lr: float = HfArg(default=0.0, help="highest learning rate; 0 takes 2e-4 under 10 M parameters, else 1e-6")
    warmup_steps: int = HfArg(default=10, help="steps over which the rate rises; then it falls to a tenth")
    weight_decay: float = HfArg(default=0.0, help="of AdamW")
    max_grad_norm: float = HfArg(default=1.0, help="longer gradients are scaled down to this norm")
    micro_batch_tokens: int = HfArg(default=4096, help="tokens in one forward pass: memory only, same gradient")
    lora_rank: int = HfArg(default=0, help="trains adapters of this rank alone (needs peft), 0 for all weights")
    offload: bool = HfArg(default=False, help="keeps float32 weights and Adam's moments in the host's memory")
    gradient_checkpointing: bool = HfArg(default=False, help="runs layers again on the way back: slower, less memory")
    # looking and keeping
    eval_every: int = HfArg(default=20, help="steps between measurements on held-out problems")
    eval_problems: int = HfArg(default=200, help="held-out problems to measure on, 0 for none")
    save_every: int = HfArg(default=20, help="steps between checkpoints")
    log_samples: int = HfArg(default=4, help="responses a step that samples.jsonl keeps")
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = HfArg(default="none", help="send metrics there too")
    name: str = HfArg(default="", help="of the run; default: the task's, numbered")
    runs_dir: str = HfArg(default="runs", help="folder of the runs")
    resume: bool = HfArg(default=False, help="go on with run --name from its checkpoint, with its flags")
    seed: int = HfArg(default=0, help="same seed, same run (on a CPU to the last bit)")
    device: Literal["auto", "cuda", "mps", "cpu"] = HfArg(default="auto", help="auto: the first of these that is there")
    dtype: Literal["auto", "float32", "bfloat16"] = HfArg(default="auto", help="auto: bfloat16 on cuda, else float32")


PRESETS = {"add": dict(prompts_per_step=32, max_new_tokens=32, steps=100, eval_every=10, eval_problems=500)}
HELP = __doc__ + "".join(
    f"\n--{kind} {name} means, unless given:" + "".join(f" --{flag} {value}" for flag, value in flags.items()) + "\n"
    for kind, table in (("task", PRESETS), ("recipe", RECIPES)) for name, flags in table.items()
)


def fill(given: dict) -> dict:
    """Values of flags that the user did not give: those of the run that goes on, or of the recipe and the task."""
    if given.get("resume"):
        if not given.get("name"):
            raise UserError("--resume: say which run goes on by --name")
        return track.read_config(Path(given.get("runs_dir", "runs")) / given["name"])
    return PRESETS.get(given.get("task", "add"), {}) | RECIPES.get(given.get("recipe"), {})


def check(config: Config) -> None:
    """UserError for a value that cannot work."""
    need(config, 1, "resample_tries steps micro_batch_tokens eval_every save_every")
    need(config, 1, "prompts_per_step group_size max_new_tokens minibatches updates_per_rollout", most=1e6)
    need(config, 0, "clip_low clip_high kl_beta warmup_steps eval_problems log_samples seed rows_at_once")
    need(config, 0, "lr weight_decay keep", most=1)
    need(config, 0, "reward_workers lora_rank", most=1e4)
    need(config, -1e9, "reward_missed", most=1e9)
    need(config, 1e-4, "temperature reward_timeout softmax_beta cispo_cap max_grad_norm", most=1e9)
    if config.prompts_per_step * config.group_size > 1e6:
        raise UserError(f"--group_size {config.group_size}: times --prompts_per_step is over a million, lower either")
    if config.group_size == 1 and config.normaliser in BASELINED:
        raise UserError(f"--group_size 1: --normaliser {config.normaliser} compares within a group, give at least 2")


def main(config: Config) -> Path:
    """Trains; returns the run folder."""
    # 0. set-up: the task, the policy, the optimizer and the run folder
    check(config)
    P, G, N = config.prompts_per_step, config.group_size, config.max_new_tokens
    device = pick_device(config.device)
    task, tracker = load_task(config.task, config.data_dir), track.Tracker(config.tracker)
    reward_device = device if config.reward_device == "auto" else pick_device(config.reward_device)
    reward = load_reward(config.reward or task.reward, reward_device, config.reward_workers, config.reward_timeout,
                         config.reward_missed)
    truth = load_reward(config.true_reward or task.reward) if config.reward or config.true_reward else reward
    run = Path(config.runs_dir) / config.name
    _held, checkpoint = (lock(run), find_checkpoint(run)) if config.resume else (None, None)  # None yet: from step 1
    source = str(checkpoint or config.model)
    if source == BASE and not Path(BASE).exists():
        pretrain.main(pretrain.Config(output=BASE, device=config.device))
    policy, tokenizer = load_policy(config.model if config.lora_rank else source, device, config.dtype)
    if config.lr == 0:
        config = replace(config, lr=2e-4 if policy.num_parameters() < 10e6 else 1e-5 if config.lora_rank else 1e-6)
    torch.manual_seed(config.seed)  # adapters start at random; nothing else of ours draws from these two, a reward may
    random.seed(config.seed)
    if config.lora_rank:
        add_adapter(policy, config.lora_rank, checkpoint and checkpoint / "adapter")
    optimizer, stop = Optimizer(policy, config.weight_decay, config.offload), stop_ids(policy, tokenizer)
    longest = sorted(task.train + task.validation, key=lambda problem: len(str(problem.prompt)))[-16:]
    longest = [prompt_ids(task, problem, tokenizer) for problem in longest]
    check_room(policy, longest, N)
    sampler = choose_sampler(policy, longest[:8], N, stop, config.sampler)
    print(table(config, policy, device, max(map(len, longest))), end="")
    held_out = task.validation[: config.eval_problems]
    with_kl = config.kl_beta > 0 or config.log_kl  # the reference: what the run set out from, resumed or not
    learner = Learner(policy, config.temperature, config.gradient_checkpointing)
    reference = learner if with_kl and config.lora_rank else Learner(
        load_policy(config.model, device, config.dtype)[0], config.temperature) if with_kl else None
    normalise, select, aggregate, token_losses = choose(config)
    rows_at_once, tokens, kept = config.rows_at_once or P * G, config.micro_batch_tokens, {}  # kept: sampler's buffers

    def measure(temperature: float) -> dict:
        return evaluate(policy, tokenizer, task, held_out, temperature, N, sampler=sampler)

    done, drawn = load_state(checkpoint, optimizer) if checkpoint else (0, 0)
    if done >= config.steps:
        raise UserError(f"--resume: {run} has done its {config.steps} steps, give it more by --steps")
    if not config.resume:
        run, _held = track.new_run(config.runs_dir, config.name, config.task)  # the lock: held until main returns
    track.rewind(run, done)
    config = replace(config, name=run.name, resume=False)
    track.record_start(run, config, device)
    if held_out and not done:
        track.write_json(run / "before.json", {"greedy": measure(0.0), "sampled": measure(config.temperature)})

    steps, signals = range(done + 1, config.steps + 1), []  # signals: what has asked the run to end
    for step in (bar := tqdm(listening(steps, signals), initial=done, total=config.steps, dynamic_ncols=True)):
        started, seconds_generate = time.perf_counter(), 0.0
        rollouts, samples = [], []
        for _ in range(config.resample_tries if config.filter == "resample" else 1):
            # 1. prompts: take P problems from the task
            problems = stream(task.train, drawn, P, config.seed)
            prompts = [prompt_ids(task, problem, tokenizer) for problem in problems]
            seeds = [digest(f"{config.seed}/{drawn + p}") for p in range(len(problems))]
            drawn += len(problems)

            # 2. generate: G responses to each, B = P * G rows
            began = time.perf_counter()
            work = partial(sampler, policy, prompts, G, N, stop, seeds, config.temperature, kept=kept)
            made, rows_at_once = within_memory(work, rows_at_once, "--rows_at_once", kept.clear)
            rollouts.append(made)
            seconds_generate += time.perf_counter() - began

            # 3. reward: score every response
            rows = [problem for problem in problems for _ in range(G)]
            columns = ([row.prompt for row in rows], made.responses(tokenizer), [row.answer for row in rows],
                       made.response_lengths.tolist())
            values, parts = score(reward, *columns, N)
            true_values = values if truth is reward else score(truth, *columns, N)[0]
            own_parts = [dict(zip(parts, row)) for row in zip(*parts.values())]
            names = "prompt", "response", "answer", "length", "reward", "parts", "true_reward"
            samples += [dict(zip(names, row)) for row in zip(*columns, values, own_parts, true_values)]
            rewards = torch.tensor([sample["reward"] for sample in samples]).view(-1, G)  # (P, G)
            if (rewards.amax(1) != rewards.amin(1)).sum() >= P:
                break

        # 4. weigh: how much each response should gain or lose
        rollout = join(rollouts)
        finished = rollout.finished.cpu()
        keep = select(rewards, finished.view_as(rewards)).flatten()  # (B,) bool
        weights = normalise(rewards).flatten().where(keep, 0.0)  # (B,), measured against the whole group
        trained = keep & ((weights != 0) | (config.kl_beta > 0))  # the others have no gradient: they are not run

        # 5. update: minimise -E[w * log pi(response | prompt)], in micro-batches
        lengths, then = rollout.response_lengths, rollout.logprobs  # (B,), and (B, N) of the policy that sampled
        with adapter_off(policy):  # with an adapter the policy itself is the reference
            start = reference.logprobs(rollout, tokens) if reference else then
        if policy.dtype == torch.bfloat16 and config.loss != "logprob":  # ratios need the learner's own rounding
            then = learner.logprobs(rollout, tokens)
        lr, updates = learning_rate(step, config.lr, config.warmup_steps, config.steps), []
        for batch in keep.nonzero()[:, 0].tensor_split(config.minibatches) * config.updates_per_rollout:
            factors = torch.zeros(len(samples))
            factors[batch] = aggregate(lengths.cpu()[batch])
            batch = batch[trained[batch]].to(device)
            if len(batch):
                work = partial(learner.backward, rollout, batch, token_losses, then, start, weights.to(device),
                               factors.to(device))
                update, tokens = within_memory(work, tokens, "--micro_batch_tokens", optimizer.drop)
                updates.append(update | {"grad_norm": optimizer.step(lr, config.max_grad_norm, sum(update.values()))})

        # 6. repeat: record, evaluate, checkpoint, plot
        metrics = {
            "step": step,
            **track.describe(samples, rewards, weights, lengths.cpu(), finished),
            "entropy": -(rollout.logprobs.sum() / lengths.sum()).item(),
            "trained": trained.sum().item() / len(samples),
            **track.summarise(updates),
            **({"kl": (k3(then, start).sum() / lengths.sum()).item()} if reference else {}),
            "lr": lr,
            "draws": len(rollouts),
            "drawn": drawn,
            "rows_at_once": rows_at_once,
            "micro_batch_tokens": tokens,
            "seconds_generate": seconds_generate,
            "seconds": time.perf_counter() - started,
        }
        last = step == config.steps
        if held_out and (last or step % config.eval_every == 0):
            after = measure(config.temperature)
            metrics |= {"eval_accuracy": after["accuracy"], "eval_interval": after["interval"]}
            if last:
                track.write_json(run / "after.json", {"greedy": measure(0.0), "sampled": after})
        bar.set_postfix(reward=f"{metrics['reward']:.3f}", length=f"{metrics['response_length']:.1f}")
        tqdm.write(track.one_line(metrics))
        track.record(run, metrics, samples, weights, config.log_samples)
        tracker.send(run, config, metrics)
        asked, due = bool(signals), last or step % config.save_every == 0
        if last or asked or step % config.eval_every == 0:
            plot(run)
        if due and config.true_reward and track.watch(run, config.save_every):
            with new_checkpoint(run, "best") as folder:
                save_policy(policy, tokenizer, folder)
        if due or asked:  # comes last: a run whose last step is saved is done
            with new_checkpoint(run) as folder:
                save_policy(policy, tokenizer, folder)
                save_state(folder, optimizer, step, drawn)
        if asked and not last:
            leave(run, step, signals[0])

    if held_out and (run / "before.json").exists():
        report(run, task, held_out)
    print(f"\n{run}/: curves.png, metrics.jsonl, samples.jsonl, checkpoint/ (a Hugging Face folder), config.json, code/"
          f"\n\n    python eval.py {run}      # on the test problems, which training has not touched")
    return run


if __name__ == "__main__":
    run_script(main, Config, HELP, fill)
