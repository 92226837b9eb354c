"""GRPO on one GPU (or a CPU), read top to bottom. One step of training is

    prompts -> G responses to each -> rewards -> weights -> loss.backward() -> optimizer.step()

and the loss is  -sum(weight * log pi(token)) / number of response tokens.  A response with a reward
above those of the other responses to its prompt gets a weight (in other papers: advantage) above 0
and becomes more likely; one below them becomes less likely.

What is left out, and why. No value network and no advantage estimator: the other responses to the
prompt are the baseline. No clipping: with one optimizer step per rollout the ratio pi / pi_old is
1 and PPO's clip does nothing (--loss clip is for more steps). No reference model and no KL term: a
small learning rate and a reward that cannot be gamed need none (--kl_beta adds both).

    sample.py  generate             loss.py  weights, losses, token_logprobs
    reward.py  score                eval.py  evaluate
    tasks.py   problems             engine/  generate and token_logprobs again, faster
    policy.py  load and save        lib/     run folder, checkpoints, plots

Sizes in comments: P prompts, G responses to each, B = P * G rows, R rows of a part of them, N most
tokens of a response.

    python train.py                                           # a tiny model learns to think
    python train.py --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k
    python train.py --model FOLDER --task my.jsonl            # your model, your problems
    python train.py --name add --resume                       # resume a run that was stopped
    torchrun --nproc_per_node 4 train.py --task gsm8k ...     # on 4 GPUs (docs/scale.md)
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch

from engine.learner import Learner
from engine.sampler import LocalSampler
from engine.start import prepare
from eval import Evaluation
from lib.flags import UserError, check_range, flag, list_presets, run_script, setting
from lib.metrics import rollout_metrics, update_metrics
from lib.run import Run, after_mistake, resumed_flags
from loss import (
    DENOMINATORS,
    FILTERS,
    LOSSES,
    NORMALISERS,
    RECIPES,
    group_weights,
    k2,
    k3,
    select,
    token_weights,
)
from policy import fill_in, load_reference, save_policy, start_policy
from reward import load_rewards
from sample import Rollout, Sampling, join, sample_and_score
from tasks import load_task, stable_hash, take_problems


@dataclass(frozen=True)
class Config:  # a `setting` may change on --resume, a `flag` may not
    # model, task, reward
    model: str = flag("models/add", "Hugging Face name, model folder or run folder")
    task: str = flag("add", "add, countdown, gsm8k, or a .jsonl file of prompts and answers")
    data_dir: str = flag("", "folder with the task's files (gsm8k: data/gsm8k)")
    reward: str = flag("", "rule, module.function, model(...) or mixture; default: the task's rule")
    true_reward: str = flag("", "the reward that really counts: logged, not trained on")
    # sampling
    prompts_per_step: int = flag(8, "P, prompts per step")
    group_size: int = flag(16, "G, responses to each prompt")
    max_new_tokens: int = flag(512, "tokens after which a response is truncated")
    temperature: float = flag(1.0, "sampling temperature; the loss uses the same")
    stop: str = flag("", "more tokens that end a response, such as <|im_end|>")
    rows_at_once: int = setting(0, "most responses sampled at once, the rest are queued; 0: all")
    fast: Literal["auto", "off", "compile"] = setting(
        "auto", "off: plain sampler and log-probs, slower; compile: torch.compile (docs/gpu.md)"
    )
    # weights and loss (loss.py)
    recipe: Literal[tuple(RECIPES)] | None = flag(
        None, "published method: sets flags of this group"
    )
    normaliser: Literal[tuple(NORMALISERS)] = flag("zscore", "turns rewards into weights")
    softmax_beta: float = flag(0.5, "with --normaliser softmax: small values keep only the best")
    filter: Literal[tuple(FILTERS)] = flag("none", "which responses are trained on")
    top_share: float = flag(0.5, "with --filter top: share of each group that is kept")
    resample_tries: int = flag(4, "with --filter resample: most batches of P prompts a step")
    denominator: Literal[tuple(DENOMINATORS)] = flag("token", "what the loss is divided by")
    loss: Literal[tuple(LOSSES)] = flag("logprob", "what is minimised")
    clip_low: float = flag(0.2, "with --loss clip, gspo: ratios are clipped below 1 - this")
    clip_high: float = flag(0.2, "with --loss clip, gspo: ratios are clipped above 1 + this")
    cispo_cap: float = flag(5.0, "with --loss cispo: ratios are capped here")
    kl_beta: float = flag(0.0, "adds this times KL(policy || starting policy), as k2")
    log_kl: bool = flag(False, "record KL(policy || starting policy): needs a second model")
    entropy_coef: float = flag(0.0, "subtracts this times the entropy at each response token")
    # update
    steps: int = setting(200, "training steps: rollout, then update")
    updates_per_rollout: int = flag(
        1, "epochs over a rollout; above 1 use --loss clip, cispo or gspo"
    )
    minibatches: int = flag(1, "optimizer steps per epoch; above 1 likewise")
    lr: float = flag(0.0, "peak learning rate; 0: by the size of the model, and LoRA (policy.py)")
    warmup_steps: int = flag(-1, "steps up to the peak of --lr; -1: a tenth of --steps, at most 10")
    weight_decay: float = flag(0.0, "AdamW weight decay")
    max_grad_norm: float = flag(1.0, "gradients are scaled down to at most this norm")
    # memory
    micro_batch_tokens: int = setting(4096, "tokens per forward pass: affects memory only")
    lora_rank: int = flag(0, "train only adapters of this rank (needs peft); 0: all parameters")
    load_in_4bit: bool = flag(False, "with --lora_rank: frozen weights in 4 bits (bitsandbytes)")
    adam_8bit: bool = flag(False, "Adam's moments in 8 bits (needs bitsandbytes)")
    offload: bool = flag(False, "keep float32 masters and Adam's moments in the host's memory")
    gradient_checkpointing: bool = setting(False, "recompute activations: slower, less memory")
    # evaluation and logging
    eval_every: int = setting(20, "steps between evaluations, besides the first and last one")
    eval_problems: int = flag(200, "held-out problems to evaluate on, 0 for none")
    save_every: int = setting(20, "steps between checkpoints; the last step has one too")
    log_samples: int = setting(16, "most responses of each of two groups a step in samples.jsonl")
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = setting(
        "none", "also send metrics there"
    )
    name: str = setting("", "name of the run; default: the task's, numbered")
    runs_dir: str = setting("runs", "folder of the runs")
    resume: bool = flag(False, "resume run --name from its checkpoint, with its flags")
    seed: int = flag(0, "same seed, same run (on a CPU to the last bit)")
    device: Literal["auto", "cuda", "mps", "cpu"] = setting(
        "auto", "auto: the first of the others that is available"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto", "auto: bfloat16 on cuda, else float32"
    )

    @property
    def sampling(self) -> Sampling:
        """What the sampler and the learner must agree on."""
        return Sampling(temperature=self.temperature, stop=self.stop)


Config.GROUPS = {  # titles in --help, by the first flag of each
    "model": "model, task, reward",
    "prompts_per_step": "sampling",
    "recipe": "weights and loss (loss.py)",
    "steps": "update",
    "micro_batch_tokens": "memory",
    "eval_every": "evaluation and logging",
}

Config.CHOICES = {  # --help has a line for each of these
    "normaliser": NORMALISERS,
    "filter": FILTERS,
    "denominator": DENOMINATORS,
    "loss": LOSSES,
}

ADD = dict(prompts_per_step=32, max_new_tokens=32, steps=60, warmup_steps=10)
ADD |= dict(eval_every=10, eval_problems=500)
PRESETS = {"add": ADD}  # defaults of the flags for a task
HELP = f"{list_presets('task', PRESETS)}\n{list_presets('recipe', RECIPES)}"


def fill(known) -> dict:
    """Defaults of flags: those of the resumed run, or of the task and the recipe."""
    if known["resume"]:
        return resumed_flags(Config, known)
    return PRESETS.get(known["task"], {}) | RECIPES.get(known["recipe"], {})


def check(config) -> None:
    """UserError for a value that cannot work."""
    check_range(config, 1, "resample_tries steps micro_batch_tokens eval_every save_every")
    check_range(
        config,
        1,
        "prompts_per_step group_size max_new_tokens minibatches updates_per_rollout",
        most=1e6,
    )
    check_range(config, 0, "clip_low clip_high kl_beta eval_problems log_samples rows_at_once seed")
    check_range(config, -1, "warmup_steps")
    check_range(config, 0, "lr weight_decay top_share", most=1)
    check_range(config, 0, "lora_rank", most=1e4)
    if config.load_in_4bit and not config.lora_rank:
        raise UserError("--load_in_4bit: 4-bit weights cannot be trained, add --lora_rank 16")
    check_range(config, -1e4, "entropy_coef", most=1e4)
    check_range(config, 1e-4, "temperature softmax_beta cispo_cap max_grad_norm", most=1e9)
    G = config.group_size
    if config.prompts_per_step * G > 1e6:
        raise UserError(f"--group_size {G}: times --prompts_per_step is over a million")
    if G == 1 and config.normaliser not in ("positive", "raw"):  # these compare with nothing
        raise UserError(f"--group_size 1: --normaliser {config.normaliser} needs at least 2")


@dataclass
class Batch(Rollout):
    """A rollout with what the loss needs besides. A column of your own goes here: a field, (B,) or
    (B, N), which `rows` and the micro-batches take along."""

    weights: torch.Tensor  # (B, 1) or (B, N): the advantages
    ref_logprobs: torch.Tensor  # (B, N), under the starting policy; zeros where no KL is wanted
    loss_scale: torch.Tensor  # (B, 1), 1 / denominator

    def row_weights(self) -> torch.Tensor:
        """(B,) the mean weight of a row's tokens."""
        if self.weights.shape[1] == 1:
            return self.weights[:, 0]
        return (self.weights * self.response_mask).sum(1) / self.response_lengths.clamp(min=1)


def backward(batch, token_logprobs, config):
    """Adds the gradient of the loss over the rows of a batch: a sum, so micro-batches add up.

    token_logprobs: -> (B, N) log-probs of the policy as it is now, and entropies if asked for
    Returns what metrics.jsonl wants to know: loss, log-probs, which tokens were clipped, entropies.
    """
    with_entropy = config.entropy_coef != 0
    logprobs, entropy = token_logprobs(with_entropy=with_entropy)
    mask, old = batch.response_mask, batch.old_logprobs
    token_loss, clipped = LOSSES[config.loss](logprobs, old, batch.weights, mask, config)
    if config.kl_beta:
        token_loss = token_loss + config.kl_beta * k2(logprobs, batch.ref_logprobs)
    if with_entropy:
        token_loss = token_loss - config.entropy_coef * entropy
    # a term of your own goes here; if it concerns rows of weight 0, say so in `contributes` (rows
    # that --filter left out never come here)

    loss = (token_loss * mask * batch.loss_scale).sum()
    loss.backward()
    return loss, logprobs, clipped, entropy if with_entropy else None


def contributes(weights, config):
    """(B, 1) or (B, N) weights -> (B,) bool: rows that have a gradient. The others are dropped,
    since they need no forward pass."""
    if config.kl_beta or config.entropy_coef:  # these terms do not depend on the weight
        return torch.ones_like(weights[:, 0], dtype=torch.bool)
    return (weights != 0).any(1)


def learning_rate(step, config) -> float:
    """Steps count from 1. Rises to --lr over the warm-up, then falls in a straight line to a
    tenth."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * (1 - 0.9 * progress)


def sample_groups(run, task, tokenizer, sampler, rewards, config):
    """G responses to each of P prompts -> B = P * G rows, prompt by prompt, as a Rollout and as
    dicts, and the rewards of each group, P times (G,).

    --filter resample: batches of P prompts, until P groups have rewards that differ.
    """
    P, G = config.prompts_per_step, config.group_size
    # after ten steps without such a group one batch is enough
    several = config.filter == "resample" and not run.is_idle
    rollouts, samples = [], []
    for _ in range(config.resample_tries if several else 1):
        seen = run.state["prompts_seen"]
        # a curriculum goes here; what it remembers is a key of run.state
        problems = take_problems(task.train, seen, P, config.seed)
        seeds = [stable_hash(f"{config.seed}/{seen + p}") for p in range(P)]
        run.state["prompts_seen"] += P
        rollout, scored = sample_and_score(
            problems, seeds, G, config.max_new_tokens, config.sampling,
            task, tokenizer, sampler, rewards,
        )  # fmt: skip
        rollouts.append(rollout)
        samples += scored
        # of all batches so far; in float64, since float32 would not tell 2^24 from 2^24 + 1
        all_rewards = torch.tensor([sample["reward"] for sample in samples], dtype=torch.float64)
        groups = all_rewards.split(G)
        informative = [group for group in groups if group.max() != group.min()]
        if len(informative) >= P:
            break
    return join(rollouts), samples, groups


def main(config):
    """Trains; returns the run folder."""
    check(config)
    run = Run(config)
    task = load_task(config.task, config.data_dir)
    rewards, measured = load_rewards(task, config.reward, config.true_reward, config.device)
    policy, tokenizer = start_policy(config, run.checkpoint)
    reference = load_reference(config, policy)
    config = fill_in(config, policy)  # --lr, --warmup_steps, --dtype if not given
    # fast or plain forms of generate and token_logprobs; sizes that halve when memory runs out
    forms, memory = prepare(policy, tokenizer, task, measured, config, run.state)
    learner = Learner(policy, forms, memory, config, run.progress)
    sampler = LocalSampler(policy, tokenizer, forms, memory, run.progress)
    evaluation = Evaluation(
        sampler, tokenizer, task, task.validation[: config.eval_problems], measured,
        config.sampling, config.max_new_tokens, memory.sizes["rows_at_once"],
    )  # fmt: skip
    config = run.start(config, learner.optimizer, task.fingerprint())
    if evaluation.problems and run.state["step"] == 0:
        run.write_json("before.json", evaluation.summary(greedy=True))

    for step in run.steps(config.steps):
        clock = time.perf_counter()
        # ---------------------------------------------------------- 1. sample and score
        rollout, samples, groups = sample_groups(run, task, tokenizer, sampler, rewards, config)
        seconds_sample = time.perf_counter() - clock

        # ---------------------------------------------------------- 2. weights
        selected = select(groups, rollout.finished.cpu(), config)  # (B,) bool
        weights = group_weights(groups, config).where(selected, 0.0)[:, None]  # (B, 1)
        token_rewards = [sample.get("token_rewards") for sample in samples]
        weights = token_weights(weights, token_rewards, rollout.response_mask.cpu())
        weights = weights.float().to(policy.device)  # (B, 1), or (B, N)
        selected = selected.to(policy.device)

        # ---------------------------------------------------------- 3. log-probs to compare with
        sampler_gap = learner.sampler_gap(rollout, step)
        compares = config.loss != "logprob" or config.kl_beta > 0  # to old or reference log-probs
        if not sampler.exact and (compares or reference):
            rollout.old_logprobs = learner.logprobs(policy, rollout)
        # Are old_logprobs what the first update would compute? Then it need not do so again. Yes if
        # the learner has just computed them; and if the loss has no ratio, since then only the
        # gradient counts. No if they come from another engine: then the ratio must be a real one.
        known = not compares or not sampler.exact
        ref_logprobs = torch.zeros_like(rollout.old_logprobs)  # (B, N)
        if reference:
            ref_logprobs = learner.logprobs(reference, rollout, adapter=False)

        # ---------------------------------------------------------- 4. update
        batch = Batch(
            **vars(rollout), weights=weights, ref_logprobs=ref_logprobs,
            loss_scale=torch.zeros_like(weights),
        )  # fmt: skip
        lr = learning_rate(step, config)
        selected_rows = selected.nonzero()[:, 0]
        minibatches = min(config.minibatches, len(selected_rows))
        updates = []
        for _ in range(config.updates_per_rollout):
            for i in range(minibatches):
                part = batch.rows(selected_rows[i::minibatches])  # a part of every group
                scale = DENOMINATORS[config.denominator](part.response_lengths, config)  # (R,)
                part.loss_scale = scale[:, None]
                part = part.rows(contributes(part.weights, config))
                if len(part.ids):
                    on_policy = known and not updates
                    # calls `backward` for each micro-batch, then optimizer.step()
                    updates.append(learner.update(backward, part, lr, on_policy))
        sampler.policy_changed()

        # ---------------------------------------------------------- 5. record, evaluate, save
        metrics = {"step": step, "sampler_gap": sampler_gap, "lr": lr}
        metrics |= rollout_metrics(batch, samples, groups)
        metrics["trained"] = (selected & contributes(weights, config)).float().mean().item()
        if reference:
            # both are 0 outside the mask
            kl = k3(batch.old_logprobs, ref_logprobs).sum() / batch.response_mask.sum()
            metrics["kl"] = kl.item()
        metrics |= update_metrics(updates)
        metrics |= {"prompts_seen": run.state["prompts_seen"], **memory.sizes}
        metrics["batches_drawn"] = len(groups) // config.prompts_per_step
        metrics |= {"seconds_sample": seconds_sample, "seconds": time.perf_counter() - clock}
        if evaluation.problems and run.is_due(step, config.eval_every):
            found = evaluation.summary(greedy=step == config.steps)
            metrics |= evaluation.metrics(found)
            if step == config.steps:
                run.write_json("after.json", found)
        for sample, weight in zip(samples, batch.row_weights().tolist()):
            sample["weight"] = weight
        run.finish(
            metrics, samples, [len(group) for group in groups], learner.optimizer,
            lambda folder: save_policy(policy, tokenizer, folder),
        )  # fmt: skip
    print(run.summary(task.name, evaluation.problems))
    return run.folder


if __name__ == "__main__":
    run_script(main, Config, __doc__, fill, HELP, after_mistake)
