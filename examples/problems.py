"""Write examples/*.jsonl: five tasks with right answers, to find one that can be learned.

    python -m examples.problems

A task can be learned where the model is right now and then: pass@8 of 0.3 to 0.9, see
docs/real-model.md.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from lib.flags import flag, run_script


def conversation(system, examples, question):
    """Chat messages: a system message, example turns (question, answer), and the question."""
    messages = [{"role": "system", "content": system}]
    for asked, answered in examples:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answered})
    return [*messages, {"role": "user", "content": question}]


def sums(rng):
    """ "48+27=" -> "75" """
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return f"{a}+{b}=", str(a + b)


def differences(rng):
    """ "48-27=" -> "21" """
    a, b = sorted((rng.randint(10, 99), rng.randint(10, 99)), reverse=True)
    return f"{a}-{b}=", str(a - b)


def products(rng):
    """ "7*8=" -> "56" """
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    return f"{a}*{b}=", str(a * b)


def largest(rng):
    """ "48, 27, 91" -> "91" """
    numbers = rng.sample(range(10, 100), 3)
    return ", ".join(map(str, numbers)), str(max(numbers))


KINDS = {
    "animal": "dog cat horse cow sheep goat lion tiger "
    "wolf bear rabbit mouse frog eagle duck shark",
    "fruit": "apple banana orange lemon peach pear plum cherry grape melon mango strawberry",
    "tool": "hammer saw drill spade wrench chisel axe rake pliers screwdriver",
    "colour": "red blue green yellow purple brown pink grey black white",
    "country": "France Spain Italy Japan China India Brazil Egypt Canada Mexico Norway Peru",
    "vehicle": "car bus truck train bicycle ship boat plane tram van",
    "drink": "water milk tea coffee juice wine beer lemonade cocoa soda",
    "job": "doctor nurse teacher farmer baker lawyer pilot judge plumber painter",
}


def kinds(rng):
    """ "fruit: red, banana, pilot" -> "banana" """
    three = rng.sample(list(KINDS), 3)
    words = [rng.choice(KINDS[kind].split()) for kind in three]
    wanted = rng.randrange(3)
    return f"{three[wanted]}: {', '.join(words)}", words[wanted]


SYSTEM = {
    "sums": "Add the two numbers. Answer with the sum only.",
    "differences": "Subtract the second number from the first. Answer with the difference only.",
    "products": "Multiply the two numbers. Answer with the product only.",
    "largest": "Which of the three numbers is the largest? Answer with that number only.",
    "kinds": "Which of the three words is of that kind? Answer with that word only.",
}
MAKERS = {f.__name__: f for f in (sums, differences, products, largest, kinds)}


@dataclass(frozen=True)
class Config:
    folder: str = flag("examples", "folder to write into")
    count: int = flag(2000, "problems to draw for a task; equal ones are written once")


def main(config) -> None:
    for name, make in MAKERS.items():
        rng = random.Random(0)
        examples = [make(rng) for _ in range(2)]
        problems = {make(rng) for _ in range(config.count)} - {*examples}
        lines = []
        for question, answer in sorted(problems):
            prompt = conversation(SYSTEM[name], examples, question)
            lines.append(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
        Path(config.folder, f"{name}.jsonl").write_text("".join(lines))
        print(f"{config.folder}/{name}.jsonl: {len(lines)} problems")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
