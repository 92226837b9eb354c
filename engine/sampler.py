"""The sampler of a run: samples from the policy itself, in this process. Under torchrun all
processes sample, each for its share of the prompts, and all get all responses."""

import torch

import sample
from lib.processes import gather, share
from lib.progress import Progress
from policy import stop_ids
from sample import Rollout, join


class LocalSampler:
    """prompts -> Rollout. Another sampler, such as an inference server, has the same three names:

    __call__:         see below
    exact:            True: the log-probs stand as they are, and ratios are taken to them, so also
                      where another policy sampled. False: they are of the policy as it is, but
                      rounded otherwise than in the learner, which computes them again
    policy_changed(): called after the updates of a step

    The log-probs are those after the temperature, and tensors are on the policy's device: see
    Rollout.from_lists. Evaluations use the same object, also at temperature 0.
    """

    def __init__(self, policy, tokenizer, forms, memory, progress=None):
        self.policy = policy
        self.tokenizer = tokenizer
        self.generate = forms.generate
        self.memory = memory
        self.progress = progress or Progress()
        self.exact = policy.dtype == torch.float32
        self.buffers = {}  # KV cache and CUDA graphs
        memory.cleanups.append(self.buffers.clear)

    def __call__(self, prompts, group_size, max_new_tokens, seeds, sampling) -> Rollout:
        """`group_size` responses to each of P prompts (token ids), in the order of the prompts.

        seeds: (P,) a prompt's responses depend on its own seed, not on the other prompts
        """
        mine, seeds = share(prompts), share(seeds)
        self.progress.expect(tokens=len(mine) * group_size * max_new_tokens)
        stop = stop_ids(self.policy, self.tokenizer, sampling.stop)

        def generate(rows_at_once):
            return self.generate(
                self.policy, mine, group_size, max_new_tokens, stop, seeds, sampling,
                rows_at_once, self.buffers, sample.interjection(self.tokenizer, sampling),
                self.progress.sampled,
            )  # fmt: skip

        columns = None  # there may be fewer prompts than processes
        if len(mine):
            columns = vars(self.memory.run(generate, "rows_at_once"))
        return join([Rollout(**found) for found in gather(columns) if found])

    def policy_changed(self) -> None:
        """Nothing to do: the next call samples from the changed policy. A server would load it."""
