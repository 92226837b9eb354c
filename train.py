"""GRPO on one GPU (or a CPU), read top to bottom. One step of training is

    prompts -> G responses to each -> rewards -> weights -> loss.backward() -> optimizer.step()

and the loss is  -sum(weight * log pi(token)) / number of tokens.  A response with a reward above
those of the other responses to its prompt gets a weight (in other papers: advantage) above 0 and
becomes more likely; one below them becomes less likely.

What is left out, and why. No value network and no advantage estimator: the other responses to the
prompt are the baseline. No clipping: with one optimizer step per rollout the ratio pi / pi_old is
1 and PPO's clip does nothing (--loss clip is for more steps). No reference model and no KL term: a
small learning rate and a reward that cannot be gamed need none (--kl_beta adds both).

    sample.py  generate        reward.py  score        loss.py  weights, losses, token_logprobs
    tasks.py   problems        eval.py    evaluate     engine/  generate, token_logprobs: the same,
    policy.py  load and save   lib/       run folder, checkpoints, plots          but faster

    python train.py                                           # a tiny model learns to think
    python train.py --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k
    python train.py --model FOLDER --task my.jsonl            # your model, your problems
    python train.py --name add --resume                       # resume a run that was stopped
    torchrun --nproc_per_node 4 train.py --task gsm8k ...     # on 4 GPUs (docs/scale.md)
"""

import random
import time
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import ClassVar, Literal

import torch

import engine.choose
from engine.memory import enable_gradient_checkpointing, halve_on_oom, remember_halved
from engine.optimizer import Optimizer
from eval import beside_greedy, evaluate, measures
from lib.batching import micro_batches
from lib.checkpoint import new_checkpoint, restore_random_state, save_state
from lib.checks import check_prompts
from lib.estimate import device_memory, memory_table
from lib.files import write_text
from lib.flags import UserError, check_range, flag, list_presets, run_script
from lib.lora import adapter_off, add_adapter
from lib.metrics import UpdateStatistics, is_idle, rollout_metrics, update_metrics
from lib.plots import plot_run
from lib.processes import by_rows, gather, is_first, processes, share, together
from lib.report import before_and_after, describe_run, model_card
from lib.run import TRACKERS, Run, Tracker, resumed_flags
from loss import BASELINED, DENOMINATORS, FILTERS, LOSSES, NORMALISERS, RECIPES, k2, k3
from policy import (
    DEVICES,
    DTYPES,
    default_learning_rate,
    learning_rate,
    load_policy,
    pick_device,
    save_policy,
    stop_ids,
)
from reward import load_reward, score, token_credit
from sample import Rollout, Sampling, join
from tasks import load_task, longest_prompts, prompt_ids, stable_hash, take_problems


@dataclass(frozen=True)
class Config:
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
    rows_at_once: int = flag(0, "most responses sampled in parallel, the rest are queued; 0: all")
    fast: Literal["auto", "off"] = flag("auto", "off: plain sampler and log-probs: same, slower")
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
    steps: int = flag(200, "training steps: rollout, then update")
    updates_per_rollout: int = flag(
        1, "epochs over a rollout; above 1 use --loss clip, cispo or gspo"
    )
    minibatches: int = flag(1, "optimizer steps per epoch; above 1 likewise")
    lr: float = flag(0.0, "peak; 0: 2e-4 under 10 M parameters, 1e-5 with LoRA, else 1e-6")
    warmup_steps: int = flag(10, "steps over which --lr is reached; then it falls to a tenth")
    weight_decay: float = flag(0.0, "AdamW weight decay")
    max_grad_norm: float = flag(1.0, "gradients are scaled down to at most this norm")
    # memory
    micro_batch_tokens: int = flag(4096, "tokens per forward pass: affects memory only")
    lora_rank: int = flag(0, "train only adapters of this rank (needs peft); 0: all parameters")
    load_in_4bit: bool = flag(False, "with --lora_rank: frozen weights in 4 bits (bitsandbytes)")
    offload: bool = flag(False, "keep float32 masters and Adam's moments in the host's memory")
    gradient_checkpointing: bool = flag(False, "recompute activations: slower, less memory")
    # evaluation and logging
    eval_every: int = flag(20, "steps between evaluations on held-out problems")
    eval_problems: int = flag(200, "held-out problems to evaluate on, 0 for none")
    save_every: int = flag(20, "steps between checkpoints")
    log_samples: int = flag(16, "most responses of each of two groups a step in samples.jsonl")
    tracker: Literal[TRACKERS] = flag("none", "also send metrics there")
    name: str = flag("", "name of the run; default: the task's, numbered")
    runs_dir: str = flag("runs", "folder of the runs")
    resume: bool = flag(False, "resume run --name from its checkpoint, with its flags")
    seed: int = flag(0, "same seed, same run (on a CPU to the last bit)")
    device: Literal[DEVICES] = flag("auto", "auto: the first of the others that is available")
    dtype: Literal["auto", *DTYPES] = flag("auto", "auto: bfloat16 on cuda, else float32")

    GROUPS: ClassVar = {  # titles in --help, by the first flag of each
        "model": "model, task, reward",
        "prompts_per_step": "sampling",
        "recipe": "weights and loss (loss.py)",
        "steps": "update",
        "micro_batch_tokens": "memory",
        "eval_every": "evaluation and logging",
    }

    CHOICES: ClassVar = {  # --help has a line for each of these
        "normaliser": NORMALISERS,
        "filter": FILTERS,
        "denominator": DENOMINATORS,
        "loss": LOSSES,
    }

    @property
    def sampling(self) -> Sampling:
        """What the sampler and the learner must agree on."""
        return Sampling(self.temperature)


ADD = dict(prompts_per_step=32, max_new_tokens=32, steps=60, eval_every=10, eval_problems=500)
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
    check_range(config, processes(), "prompts_per_step")  # one for each GPU
    check_range(
        config,
        0,
        "clip_low clip_high kl_beta warmup_steps eval_problems log_samples rows_at_once seed",
    )
    check_range(config, 0, "lr weight_decay top_share", most=1)
    check_range(config, 0, "lora_rank", most=1e4)
    if config.load_in_4bit and not config.lora_rank:
        raise UserError("--load_in_4bit: 4-bit weights cannot be trained, add --lora_rank 16")
    check_range(config, -1e4, "entropy_coef", most=1e4)
    check_range(config, 1e-4, "temperature softmax_beta cispo_cap max_grad_norm", most=1e9)
    G = config.group_size
    if config.prompts_per_step * G > 1e6:
        raise UserError(f"--group_size {G}: times --prompts_per_step is over a million")
    if G == 1 and config.normaliser in BASELINED:
        raise UserError(f"--group_size 1: --normaliser {config.normaliser} needs at least 2")


def backward(
    forms,
    policy,
    rollout,
    rows,
    weights,
    loss_scale,
    ref_logprobs,
    on_policy,
    config,
    micro_batch_tokens,
):
    """Adds the gradient of the loss over `rows` (indices) of a rollout. Micro-batches of at most
    micro_batch_tokens save memory: the gradient is the same for any size.

    weights:      (B, 1) or (B, N)
    loss_scale:   (B,), 1 / denominator
    ref_logprobs: (B, N), or None where no KL is wanted
    on_policy:    the policy is still the one that sampled, so its log-probs are known
    """
    with_entropy = config.entropy_coef != 0
    statistics = UpdateStatistics()
    for micro_batch in micro_batches(rollout.lengths[rows].cpu(), micro_batch_tokens):
        r = rows[micro_batch.to(rows.device)]  # (R,)
        mask = rollout.response_mask[r]  # (R, N) tokens that the policy wrote
        old = rollout.old_logprobs[r]  # (R, N)
        logprobs, entropy = forms.token_logprobs(
            policy, rollout, r, config.sampling, old if on_policy else None, with_entropy
        )

        token_loss, clipped = LOSSES[config.loss](logprobs, old, weights[r], mask, config)
        if config.kl_beta:
            token_loss = token_loss + config.kl_beta * k2(logprobs, ref_logprobs[r])
        if with_entropy:
            token_loss = token_loss - config.entropy_coef * entropy
        # a term of your own goes here (entropy: ask token_logprobs for it). Rows of weight 0 are
        # left out, see has_gradient

        loss = (token_loss * mask * loss_scale[r, None]).sum()
        loss.backward()
        statistics.add(loss, logprobs, old, clipped, mask, entropy if with_entropy else None)
    return statistics


def has_gradient(weights, config):
    """(B, 1) or (B, N) weights -> (B,) bool: rows that contribute to the gradient. The others need
    no forward pass."""
    if config.kl_beta or config.entropy_coef:  # these terms do not depend on the weight
        return torch.ones_like(weights[:, 0], dtype=torch.bool)
    return (weights != 0).any(1)


@torch.no_grad()
def all_logprobs(forms, policy, rollout, sampling, micro_batch_tokens):
    """(B, N) log-probs of a rollout's responses, 0 outside the mask."""
    logprobs = torch.zeros_like(rollout.old_logprobs)
    for rows in micro_batches(rollout.lengths.cpu(), micro_batch_tokens):
        rows = rows.to(logprobs.device)
        logprobs[rows], _ = forms.token_logprobs(policy, rollout, rows, sampling)
    return logprobs


def main(config) -> Path:
    """Trains; returns the run folder."""
    # ---------------------------------------------------------- set-up
    check(config)
    P, G, limit = config.prompts_per_step, config.group_size, config.max_new_tokens
    sampling = config.sampling
    at_zero = replace(sampling, temperature=0)  # greedy
    device = pick_device(config.device)
    tracker = Tracker(config.tracker)
    run = Run(config)
    task = load_task(config.task, config.data_dir)
    held_out = task.validation[: config.eval_problems]
    # cached: the same text is the same object, and a learned reward is loaded once
    load = lru_cache(partial(load_reward, device=device, problems=task.train))
    reward = load(config.reward or task.reward)
    measured_texts = measures(task, config.reward, config.true_reward)
    measured = {name: load(text) for name, text in measured_texts.items()}
    true_reward = measured.get("accuracy", reward)
    if config.true_reward:
        true_reward = load(config.true_reward)

    start = run.checkpoint if run.checkpoint and not config.lora_rank else config.model
    policy, tokenizer = load_policy(str(start), device, config.dtype, config.load_in_4bit)
    stop = stop_ids(policy, tokenizer)
    lr = config.lr or default_learning_rate(policy, config.lora_rank)
    config = replace(config, lr=lr, dtype=str(policy.dtype).removeprefix("torch."))
    torch.manual_seed(config.seed)  # for a new adapter and rewards; sampling has its own generators
    random.seed(config.seed)
    add_adapter(policy, config.lora_rank, run.checkpoint)
    reference = None  # what the run started from, also after --resume
    if config.kl_beta or config.log_kl:
        reference = policy  # without its adapter, see below
        if not config.lora_rank:
            reference, _ = load_policy(config.model, device, config.dtype)

    longest = longest_prompts(task, task.train + held_out, tokenizer)
    check_prompts(policy, longest, limit)
    ends = tokenizer.convert_ids_to_tokens(stop)
    print(describe_run(config, policy, task, measured_texts, ends), end="")
    print(memory_table(config, policy, device_memory(device), len(longest[0])), end="")
    if config.gradient_checkpointing:  # not before: the estimate counts what it would recompute
        enable_gradient_checkpointing(policy)
    # generate, and token_logprobs for the update: the fast ones if they agree with the plain ones
    forms = engine.choose.choose(policy, longest, stop, sampling, limit, config.fast)
    asked = forms, policy, tokenizer, task, held_out
    run_evaluation = partial(evaluate, *asked, measured=measured, max_new_tokens=limit)

    optimizer = Optimizer(policy, config.weight_decay, config.offload)
    # all that a run must remember, with the optimizer and the random states; saved and loaded whole
    state = {"step": 0, "prompts_seen": 0, "halved": {}}
    if run.state:
        state = run.state
        optimizer.load_state_dict(state.pop("optimizer"))
        restore_random_state(state)
    sizes = {
        "rows_at_once": config.rows_at_once or P * G,
        "micro_batch_tokens": config.micro_batch_tokens,
    }
    sizes = remember_halved(sizes, state["halved"])
    buffers = {}  # the sampler's KV cache and CUDA graphs

    def free_memory():
        optimizer.zero_grad()
        buffers.clear()

    # these get sizes[name] as an argument of that name, and run again with half of it where memory
    # runs out
    halving = partial(halve_on_oom, sizes=sizes, undo=free_memory)
    generate = partial(halving, forms.generate, name="rows_at_once", buffers=buffers)
    halving_tokens = partial(halving, name="micro_batch_tokens")
    compute_logprobs = by_rows(partial(halving_tokens, all_logprobs, forms))

    config = run.start(config, device, state["step"], tracker)
    if held_out and state["step"] == 0:
        greedy, sampled = run_evaluation(sampling=at_zero), run_evaluation(sampling=sampling)
        run.write_json("before.json", beside_greedy(greedy, sampled, measured))

    for step in run.steps(state["step"] + 1, config.steps):
        started, seconds_generate = time.perf_counter(), 0.0

        # ---------------------------------------------------------- 1. sample and score
        rollouts, samples = [], []
        # --filter resample: until P groups are informative, unless none was for ten steps
        more = config.filter == "resample" and not is_idle(run.recent)
        for _ in range(config.resample_tries if more else 1):
            seen = state["prompts_seen"]
            # a curriculum goes here; what it remembers is a key of `state`
            problems = take_problems(task.train, seen, P, config.seed)
            prompts = [prompt_ids(task, problem, tokenizer) for problem in problems]
            seeds = [stable_hash(f"{config.seed}/{seen + p}") for p in range(P)]
            state["prompts_seen"] += P

            began = time.perf_counter()
            rollout = generate(policy, share(prompts), G, limit, stop, share(seeds), sampling)
            seconds_generate += time.perf_counter() - began

            with_tokens = reward.wants_tokens or true_reward.wants_tokens
            new = rollout.samples(share(problems), tokenizer, with_tokens)
            scores = score(reward, new, limit)
            true_scores = scores if true_reward is reward else score(true_reward, new, limit)
            for sample, scored, true in zip(new, scores, true_scores):  # the reward and its parts
                sample.pop("tokens", None)
                sample |= {**scored, "true_reward": true["reward"]}
            for columns, rows in gather((vars(rollout), new)):  # each GPU gets those of all
                rollouts.append(Rollout(**columns))
                samples += rows
            rewards = torch.tensor([sample["reward"] for sample in samples]).view(-1, G)  # (P, G)
            if FILTERS["informative"](rewards, None)[:, 0].sum() >= P:
                break
        rollout = join(rollouts)  # B = P * G rows: row b answers prompt b // G (resample: more)

        # ---------------------------------------------------------- 2. weights
        group_weights = NORMALISERS[config.normaliser](rewards, config)  # (P, G): the advantages
        finished = rollout.finished.view(-1, G).cpu()
        selected = FILTERS[config.filter](rewards, finished, config)  # (P, G) bool
        row_weights = group_weights.where(selected, 0.0).view(-1, 1)  # (B, 1)
        credit = token_credit(samples, rollout.response_mask.cpu())  # (B, 1), or (B, N)
        weights = (row_weights * credit).to(device)
        selected = selected.flatten().to(device)  # (B,)
        for sample, weight in zip(samples, row_weights[:, 0].tolist()):
            sample["weight"] = weight

        # ---------------------------------------------------------- 3. old and reference log-probs
        least = int(rollout.lengths.max())  # a micro-batch has at least one row
        few = rollout.rows(slice(2))
        learner_logprobs = compute_logprobs(policy, few, sampling, least=least)
        sampler_gap = (learner_logprobs - few.old_logprobs).abs().max().item()
        if policy.dtype == torch.bfloat16 and (config.loss != "logprob" or reference):
            # the sampler's differ from a forward pass by rounding: ratios would not start at 1
            rollout.old_logprobs = compute_logprobs(policy, rollout, sampling, least=least)
        ref_logprobs = None
        if reference:
            with adapter_off(policy):
                ref_logprobs = compute_logprobs(reference, rollout, sampling, least=least)

        right_or_wrong = true_reward is measured.get("accuracy")
        metrics = {"step": step, "sampler_gap": sampler_gap}
        metrics |= rollout_metrics(rollout, samples, rewards, row_weights, right_or_wrong)
        metrics["trained"] = (selected & has_gradient(weights, config)).float().mean().item()
        if reference:
            kl = k3(rollout.old_logprobs, ref_logprobs).sum() / rollout.response_mask.sum()
            metrics["kl"] = kl.item()

        # ---------------------------------------------------------- 4. update
        lr = learning_rate(step, config.lr, config.warmup_steps, config.steps)
        counts = rollout.response_lengths  # (B,)
        selected_rows = selected.nonzero()[:, 0]
        minibatches = min(config.minibatches, len(selected_rows))
        updates = []
        for _ in range(config.updates_per_rollout):
            for i in range(minibatches):
                rows = selected_rows[i::minibatches]  # a part of every group
                loss_scale = torch.zeros(len(weights), device=device)  # (B,)
                loss_scale[rows] = DENOMINATORS[config.denominator](counts[rows], config)
                rows = rows[has_gradient(weights[rows], config)]
                if len(rows) == 0:
                    continue
                on_policy = not updates
                arguments = forms, policy, rollout, share(rows), weights, loss_scale, ref_logprobs
                update = halving_tokens(backward, *arguments, on_policy, config, least=least)
                update.gather()
                # nan where loss or gradient are not finite: then the step is skipped
                update.grad_norm = optimizer.step(lr, config.max_grad_norm, update.loss)
                updates.append(update)

        # ---------------------------------------------------------- 5. record, evaluate, save
        metrics |= update_metrics(updates)
        metrics |= {"lr": lr, "prompts_seen": state["prompts_seen"], **sizes}
        metrics |= {"batches_drawn": len(rewards) // P, "seconds_generate": seconds_generate}
        metrics["seconds"] = time.perf_counter() - started

        if held_out and run.is_due(step, config.eval_every):
            after = run_evaluation(sampling=sampling)
            for name in measured:
                metrics[f"eval_{name}"] = after[name]["mean"]
                metrics[f"eval_{name}_interval"] = after[name]["interval"]
            if step == config.steps:
                greedy = run_evaluation(sampling=at_zero)
                run.write_json("after.json", beside_greedy(greedy, after, measured))
        run.record(metrics, samples, config.log_samples)
        state["step"] = step
        if is_first():
            if run.is_due(step, config.eval_every) or run.stop_requested:
                plot_run(run.folder)
            checkpoint_due = run.is_due(step, config.save_every)
            if checkpoint_due and config.true_reward and run.track_true_reward(config.save_every):
                with new_checkpoint(run.folder, "best") as folder:
                    save_policy(policy, tokenizer, folder)
            if checkpoint_due or run.stop_requested:  # last: a saved final step is a finished run
                card = model_card(run.folder, config, config.reward or task.reward, step)
                with new_checkpoint(run.folder) as folder:
                    save_policy(policy, tokenizer, folder)
                    write_text(folder / "README.md", card)
                    save_state(folder, {**state, "optimizer": optimizer.state_dict()})
        run.exit_if_stopped(step)

    if held_out:
        print("\n" + before_and_after(run.folder, task.name, held_out))
    print(f"\npython eval.py {run.folder}      # on the test problems, unseen in training")
    return run.folder


if __name__ == "__main__":
    run_script(together(main), Config, __doc__, fill, HELP)
