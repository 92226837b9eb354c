"""The learner of a run: log-probs and updates, in micro-batches that fit into the memory. Under
torchrun each process does its share of the rows."""

from functools import partial
from itertools import chain

import torch

from engine.optimizer import Optimizer
from lib.batching import micro_batches
from lib.lora import adapter_off
from lib.metrics import UpdateStatistics
from lib.processes import gather, share
from lib.progress import Progress


class Learner:
    """What is done with the rows of a rollout. A trainer on several machines would have the same
    two methods, `logprobs` and `update`."""

    def __init__(self, policy, forms, memory, config, progress=None):
        self.policy = policy
        self.token_logprobs = forms.token_logprobs
        self.memory = memory
        self.config = config
        self.progress = progress or Progress()
        self.optimizer = Optimizer(
            policy, config.weight_decay, config.offload, config.seed, config.adam_8bit
        )

    def in_micro_batches(self, work, batch, undo=None) -> list:
        """(indices, work(those rows of the batch)) for each micro-batch of this process's share.
        undo: see Memory.run"""
        rows = share(torch.arange(len(batch.ids), device=batch.ids.device))

        def run(micro_batch_tokens):
            results = []
            for indices in micro_batches(batch.lengths[rows].cpu(), micro_batch_tokens):
                part = rows[indices.to(rows.device)]
                results.append((part, work(batch.rows(part))))
            return results

        # a micro-batch has at least one row
        return self.memory.run(run, "micro_batch_tokens", int(batch.lengths.max()), undo)

    @torch.no_grad()
    def logprobs(self, model, rollout, adapter=True) -> torch.Tensor:
        """(B, N) log-probs of the responses, 0 outside the mask. adapter=False: without the adapter
        of --lora_rank, so of the model that it was added to."""

        def work(part):
            return self.token_logprobs(model, part, self.config.sampling)[0]

        if adapter:
            results = self.in_micro_batches(work, rollout)
        else:
            with adapter_off(self.policy):
                results = self.in_micro_batches(work, rollout)
        logprobs = torch.zeros_like(rollout.old_logprobs)
        for rows, values in chain(*gather(results)):
            logprobs[rows] = values
        return logprobs

    def sampler_gap(self, rollout, step) -> float:
        """The largest difference between the log-probs of sampler and learner, in two rows; other
        rows in each step."""
        B = len(rollout.ids)
        few = rollout.rows(torch.tensor([step % B, (step + B // 2) % B]))
        return (self.logprobs(self.policy, few) - few.old_logprobs).abs().max().item()

    def update(self, backward, batch, lr, on_policy) -> UpdateStatistics:
        """One optimizer step on the gradient that backward(rows of the batch, ...) leaves.

        on_policy: the log-probs may be taken for known: those in old_logprobs, with their own
                   gradient
        """

        def work(part):
            token_logprobs = partial(
                self.token_logprobs, self.policy, part, self.config.sampling,
                part.old_logprobs if on_policy else None,
            )  # fmt: skip
            loss, *numbers = backward(part, token_logprobs, self.config)
            self.progress.trained(len(part.ids))
            return loss.item(), *(each if each is None else each.detach() for each in numbers)

        self.progress.expect(rows=len(share(batch.ids)))
        statistics = UpdateStatistics(on_policy)
        results = self.in_micro_batches(work, batch, undo=self.optimizer.zero_grad)
        for rows, (loss, logprobs, clipped, entropy) in results:
            old, mask = batch.old_logprobs[rows], batch.response_mask[rows]
            statistics.add(loss, logprobs, old, clipped, mask, entropy)
        statistics.gather()
        # nan where loss or gradient are not finite: then nothing was changed
        statistics.grad_norm = self.optimizer.step(lr, self.config.max_grad_norm, statistics.loss)
        return statistics
