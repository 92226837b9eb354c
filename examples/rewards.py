"""Rewards of one's own: python train.py --reward examples.rewards.short ..."""


def short(prompt, response, answer):
    """1 for at most 12 words that end with a full stop.

    A bridge joins two sides of a river. -> 1
    A bridge joins two sides -> 0
    """
    return float(len(response.split()) <= 12 and response.rstrip().endswith("."))
