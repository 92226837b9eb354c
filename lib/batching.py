"""Rows of similar length in one micro-batch, so that little of it is padding."""

import torch


def micro_batches(lengths, max_tokens) -> list[torch.Tensor]:
    """(B,) lengths -> row indices of each micro-batch, longest rows first.

    A micro-batch has at most `max_tokens` once padded, or a single row. Rows much shorter than its
    longest begin a new one, unless it is still less than a quarter full: padding costs as much as
    tokens. lengths (10, 9, 8, 7, 6), max_tokens 100 -> rows (0, 1, 2) and (3, 4)
    """
    batches = []
    batch = []
    longest = 0
    for row in lengths.argsort(descending=True, stable=True).tolist():
        length = int(lengths[row])
        padded = longest * len(batch)
        full = padded + longest > max_tokens
        uneven = padded > max_tokens / 4 and length < 0.75 * longest
        if not batch or full or uneven:
            batch = []
            batches.append(batch)
            longest = length
        batch.append(row)
    return [torch.tensor(batch) for batch in batches]
