"""From rewards to the loss: how much each response should gain or lose, and what is minimised.

    L = - sum over rows and tokens of  weight * log pi(token) / denominator

With one update per rollout the gradients of PPO, GRPO, DAPO and CISPO are all -weight * grad log
pi: they differ in the weights (NORMALISERS), in the rows that count (FILTERS) and in the
denominator (DENOMINATORS). What LOSSES adds, ratios and clips, acts from the second update on the
same rollout. RECIPES are methods as published.

Each piece is a short function, chosen by its name. To try your own, write one and add it
to its table: it gets train.py's Config, so it may have a flag of its own.

Sizes: G responses of a group, B rows of all groups, R rows of a part of them, N most tokens of a
response, K tokens of all responses, V tokens that the model knows."""

import torch

from lib.flags import UserError
from sample import policy_distribution

# -------------------------------------------------------------------------------------------------
# NORMALISERS: rewards r (G,) of a group, Config, the rewards of all groups -> weights (G,). Below,
# m and s are the mean and the deviation of the group.


def group_weights(groups, config):
    """P groups of rewards -> (B,) weights, group after group: the advantages."""
    normalise = NORMALISERS[config.normaliser]
    return torch.cat([normalise(rewards, config, groups) for rewards in groups])


def mean(rewards, config=None, groups=None):
    """r - m. (1, 0, 0, 1) -> (0.5, -0.5, -0.5, 0.5). Dr. GRPO, arXiv 2503.20783.

    Measured from the lowest reward, so that equal rewards give exactly 0: else zscore would divide
    rounding errors by a tiny deviation and make weights of them."""
    above = rewards - rewards.min()
    return above - above.mean()


def zscore(rewards, config=None, groups=None, eps=1e-4):
    """(r - m) / s: a rare success weighs more than a common one. (1, 0, 0, 1) -> (1, -1, -1, 1),
    (1, 0, 0, 0) -> (1.73, -0.58, -0.58, -0.58). GRPO, arXiv 2402.03300."""
    return mean(rewards) / (rewards.std(correction=0) + eps)


def loo(rewards, config=None, groups=None):
    """r - mean of the other rewards = (r - m) * G / (G - 1): a baseline that does not depend on
    the response itself, so without bias. (1, 0, 0, 1) -> (2/3, -2/3, -2/3, 2/3). RLOO, arXiv
    2402.14740."""
    G = len(rewards)
    return mean(rewards) * G / max(1, G - 1)


def batch_std(rewards, config, groups, eps=1e-4):
    """(r - m) / deviation over all groups: one scale for the whole batch, so that small
    differences within a group stay small. Lite PPO, arXiv 2508.08221."""
    return mean(rewards) / (torch.cat(groups).std(correction=0) + eps)


def maxrl(rewards, config=None, groups=None, eps=1e-4):
    """(r - m) / m, for rewards from 0 up: the gradient of log m, where `mean` has the gradient of
    m. (1, 0, 0, 0) -> (3, -1, -1, -1), (1, 0, 0, 1) -> (1, -1, -1, 1). MaxRL, arXiv 2602.02710."""
    if rewards.min() < 0:  # a mean below 0 would turn the signs
        reason = f"wants rewards from 0 up, and there is one of {rewards.min():g}"
        raise UserError(
            f"--normaliser maxrl: {reason}: change --reward, or take another normaliser"
        )
    return mean(rewards) / (rewards.mean() + eps)


def softmax(rewards, config, groups=None):
    """G * softmax(r / beta) - 1: reward-weighted regression, centred. For a large beta it is
    `mean` / beta, for a small one only the best response gains."""
    shares = ((rewards - rewards.max()) / config.softmax_beta).exp()
    return shares / shares.mean() - 1


def rank(rewards, config=None, groups=None):
    """(how many of the group are below - how many are above) / (G - 1): only the order counts.
    (0.2, 0.4, 0.9, 0.9) -> (-1, -1/3, 2/3, 2/3)."""
    differences = rewards[:, None] - rewards
    return differences.sign().sum(1) / max(1, len(rewards) - 1)


def best(rewards, config=None, groups=None):
    """1 for the best of the group, shared between ties, else 0. (0.2, 0.4, 0.9, 0.9) -> (0, 0,
    0.5, 0.5). Best of n."""
    is_best = (rewards == rewards.max()).to(rewards.dtype)
    return is_best / is_best.sum()


def positive(rewards, config=None, groups=None):
    """max(r, 0): imitate what was good, learn nothing from the rest. Fast, but entropy collapses.
    RAFT, 2504.11343."""
    return rewards.clamp(min=0)


def raw(rewards, config=None, groups=None):
    """r itself: REINFORCE without a baseline."""
    return rewards


NORMALISERS = {
    f.__name__: f for f in (zscore, mean, loo, batch_std, maxrl, softmax, rank, best, positive, raw)
}


def token_weights(weights, token_rewards, mask):
    """(B, 1) weights of responses -> the weights of their tokens: as they are, or (B, N) where a
    reward returned a number for each token.

    Numbers of one sign say how much each token matters: weight 1 with (0, 0, 1, 1), or with
    (0, 0, -1, -1), -> (0, 0, 2, 2), the same mean. With numbers of both signs each token's weight
    has its own sign, whatever that of the response: 1 or -1 with (3, 0, 0, -1) -> (3, 0, 0, -1).

    token_rewards: B lists of numbers, or None for a response without
    mask:          (B, N) response mask
    """
    if not any(token_rewards):
        return weights
    numbers = torch.zeros(mask.shape)
    for row, each in zip(numbers, token_rewards):
        row[: len(each or [])] = torch.tensor(each or [])
    numbers = numbers * mask
    sizes = numbers.abs()
    sizes = sizes / sizes.sum(1, keepdim=True)
    sizes = torch.where(sizes.isnan(), 1.0, sizes * mask.sum(1, keepdim=True))
    both_signs = (numbers > 0).any(1, keepdim=True) & (numbers < 0).any(1, keepdim=True)
    return torch.where(both_signs, weights.abs() * numbers.sign(), weights) * sizes


# -------------------------------------------------------------------------------------------------
# FILTERS: rewards (G,) of a group, finished (G,) bool, Config -> which of its responses are trained
# on, (G,) bool. The weights are taken from the whole group, before the filter.


def select(groups, finished, config):
    """P groups of rewards, (B,) bool -> which responses are trained on, (B,) bool."""
    keep = FILTERS[config.filter]
    finished = finished.split([len(rewards) for rewards in groups])
    selected = [keep(*group, config) for group in zip(groups, finished)]
    if config.filter == "resample":  # P groups, where sampling more prompts has found more of them
        found = torch.tensor([bool(group.any()) for group in selected]).cumsum(0)
        enough = found <= config.prompts_per_step
        selected = [group & is_enough for group, is_enough in zip(selected, enough)]
    return torch.cat(selected)


def none(rewards, finished, config=None):
    """All of them. (A row of weight 0 needs no forward pass, but its tokens stay in the
    denominator.)"""
    return torch.ones_like(finished)


def informative(rewards, finished, config=None):
    """Groups whose rewards differ. With centred weights only the denominator changes.
    Reinforce-Rej, 2504.11343."""
    return (rewards.max() != rewards.min()).expand(len(rewards))


def resample(rewards, finished, config=None):
    """The same, P groups of them: train.py samples prompts until there are as many. DAPO, arXiv
    2503.14476."""
    return informative(rewards, finished)


def finished(rewards, finished, config=None):
    """Responses that ended by themselves: a truncated one says little about what it contains.
    DAPO's overlong filter."""
    return finished


def top(rewards, finished, config):
    """The best `top_share` of each group, at least one, and what ties with the last of them.
    Rejection sampling."""
    count = max(1, round(config.top_share * len(rewards)))
    return rewards >= rewards.topk(count).values[-1]


FILTERS = {f.__name__: f for f in (none, informative, resample, finished, top)}

# -------------------------------------------------------------------------------------------------
# DENOMINATORS: token counts (R,) of the selected rows of a minibatch, those of weight 0
# included -> loss_scale (R,), 1 / denominator: it multiplies the loss of each token. It is fixed
# before the step is split into micro-batches, so their size affects memory only.


def token(counts, config=None):
    """1 / all tokens of the minibatch: every token weighs the same, a long response more than a
    short one. DAPO."""
    return (1.0 / counts.sum()).expand(len(counts))


def sequence(counts, config=None):
    """1 / (rows * tokens of the row): every response weighs the same, so a token of a long one
    less: long mistakes are cheap. GRPO as published, 2402.03300."""
    return 1.0 / (counts.clamp(min=1) * len(counts))  # 0: a tool wrote the whole response


def constant(counts, config):
    """1 / (rows * max_new_tokens): the sum over a response's tokens, whatever its length. Dr.
    GRPO."""
    scale = 1.0 / (len(counts) * config.max_new_tokens)
    return torch.full(counts.shape, scale, device=counts.device)


DENOMINATORS = {f.__name__: f for f in (token, sequence, constant)}

# -------------------------------------------------------------------------------------------------
# LOSSES: log-probs (R, N), old_logprobs (R, N), weights (R, 1) or (R, N), response mask (R, N) ->
# loss of each token (R, N), which tokens were clipped (R, N) bool. The ratio is pi / pi_old =
# exp(logprobs - old_logprobs).


def logprob(logprobs, old, weights, mask, config=None):
    """-w log pi: the objective itself, without a ratio. Right for one update per rollout."""
    return -weights * logprobs, torch.zeros_like(mask)


def clip(logprobs, old, weights, mask, config):
    """-min(ratio w, clip(ratio, 1 - clip_low, 1 + clip_high) w): a token that has moved that far
    in its direction has no gradient. PPO, arXiv 1707.06347; GRPO; DAPO with clip_high > clip_low,
    to leave rare tokens room to rise."""
    return clipped_loss((logprobs - old).exp(), weights, mask, config)


def cispo(logprobs, old, weights, mask, config):
    """-stopgrad(min(ratio, cispo_cap)) w log pi: importance sampling with a bound; no token loses
    its gradient. MiniMax-M1, arXiv 2506.13585."""
    ratio = (logprobs - old).exp().detach()
    loss = -ratio.clamp(max=config.cispo_cap) * weights * logprobs
    return loss, (ratio > config.cispo_cap) & mask


def gspo(logprobs, old, weights, mask, config):
    """`clip` with one ratio for the response, (pi / pi_old)^(1 / length). The ratio hardly moves,
    so clip_low and clip_high are small. The ratio belongs to the whole response, so the weight must
    too. arXiv 2507.18071."""
    if weights.shape[1] > 1:
        raise UserError("--loss gspo: has one ratio per response, so weights must be (B, 1)")
    change = ((logprobs - old) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return clipped_loss(change.exp().expand_as(logprobs), weights, mask, config)


def clipped_loss(ratio, weights, mask, config):
    """Ratios (R, N) -> the loss of PPO, and where it is clipped."""
    unclipped = ratio * weights
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * weights
    return -torch.minimum(unclipped, clipped) * mask, (clipped < unclipped) & mask


LOSSES = {f.__name__: f for f in (logprob, clip, cispo, gspo)}

# -------------------------------------------------------------------------------------------------
# How far the policy is from a reference: estimates of KL(pi || ref) for each token, sampled from
# pi (Schulman, 2020).


def k2(logprobs, ref_logprobs):
    """(log pi - log ref)^2 / 2: the one to train on, its mean gradient is that of KL(pi || ref)."""
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs, ref_logprobs):
    """ref / pi - 1 - log(ref / pi): the one to log, unbiased and never below 0. In a loss its mean
    gradient would be that of KL(ref || pi)."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.expm1() - log_ratio


# -------------------------------------------------------------------------------------------------
# RECIPES: methods as published, as flags of train.py; a flag that is not named keeps its default.
# They do not include KL terms (GRPO's: --kl_beta 0.04), the number of updates per rollout, or
# rewards: Reinforce-Rej gives -1 for a wrong answer; with 0 it learns only from right ones.

CLIP = {"loss": "clip", "clip_low": 0.2, "clip_high": 0.2}
RECIPES = {
    "grpo": {"normaliser": "zscore", "denominator": "sequence", **CLIP},
    "dr_grpo": {"normaliser": "mean", "denominator": "constant", **CLIP},
    "dapo": {
        "normaliser": "zscore",
        "filter": "resample",
        "denominator": "token",
        **CLIP,
        "clip_high": 0.28,
    },
    "lite_ppo": {"normaliser": "batch_std", "denominator": "token", **CLIP},
    "gspo": {
        "normaliser": "zscore",
        "denominator": "sequence",
        "loss": "gspo",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
    },
    "cispo": {"normaliser": "zscore", "denominator": "token", "loss": "cispo", "cispo_cap": 5.0},
    "rloo": {"normaliser": "loo", "denominator": "constant", "loss": "logprob"},
    "maxrl": {"normaliser": "maxrl", "denominator": "token", "loss": "logprob"},
    "raft": {"normaliser": "positive", "denominator": "sequence", "loss": "logprob"},
    "reinforce_rej": {
        "normaliser": "raw",
        "filter": "informative",
        "denominator": "sequence",
        "loss": "logprob",
    },
    "expert_iteration": {
        "normaliser": "best",
        "filter": "informative",
        "denominator": "sequence",
        "loss": "logprob",
    },
}

# -------------------------------------------------------------------------------------------------
# Log-probs of a rollout. engine/logprobs.py has the fast form, with the same arguments.


def token_stats(logits, tokens, sampling):
    """(K, V) logits, (K,) tokens -> (K,) log-probs of the tokens, (K,) entropies in nats of the
    distributions that they were sampled from."""
    logp = policy_distribution(logits, sampling).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, tokens[:, None])[:, 0], entropy


def token_logprobs(policy, rollout, sampling, known=None, with_entropy=False):
    """A rollout of R rows -> (R, N) float32 log-probs of the response tokens, and (R, N) entropies,
    both differentiable, 0 where response_mask is False.

    No attention mask is needed: attention is causal and padding is on the right.
    known:        (R, N) log-probs, if the policy is still the one that sampled: the values are
                  exactly these, with the same gradient. So rounding moves no ratio away from 1, and
                  the fast form saves a matrix product
    with_entropy: the fast form returns entropies only if asked
    """
    # made from lengths, not from pad ids: pad may equal EOS, and EOS must be trained on
    mask = rollout.response_mask
    row, column = mask.nonzero(as_tuple=True)  # (K,) each: where the response tokens are
    position = rollout.prompt_lengths[row] + column  # (K,) where those tokens stand in ids
    ids = rollout.ids[:, : int(rollout.lengths.max())]
    logits = policy(ids, use_cache=False).logits
    logits = logits[row, position - 1]  # (K, V): the logits at a position predict the next token
    logprobs, entropy = token_stats(logits, ids[row, position], sampling)
    if known is not None:
        logprobs = known[mask] + (logprobs - logprobs.detach())
    zeros = torch.zeros(mask.shape, device=ids.device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy)
