"""Rewards of one's own, used in docs/real-model.md:

python train.py --reward examples.rewards.short ...
python reward.py --reward "examples.rewards.short * examples.rewards.about" responses.jsonl
"""


def short(prompt, response, answer):
    """1 for at most 12 words that end with a full stop.

    A bridge joins two sides of a river. -> 1
    A bridge joins two sides -> 0
    """
    return float(len(response.split()) <= 12 and response.rstrip().endswith("."))


def about(prompt, response, answer):
    """1 if the response names the last word of the question: what the question is about. It is not
    trained on. A policy that only learns to say something short would lose it.

    What is a bridge? A bridge joins two sides. -> 1
    What is a bridge? A chair is a seat for one person. -> 0
    """
    question = prompt[-1]["content"]
    subject = question.split()[-1].strip("?.").lower()
    return float(subject in response.lower())
