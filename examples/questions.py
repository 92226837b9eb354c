"""Write examples/questions.jsonl: 400 questions without a right answer, for a reward that looks at
the form of a response.

    python -m examples.questions

Each prompt is a conversation with a system message and one example turn.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from lib.flags import flag, run_script

THINGS = """
a bridge, a candle, a volcano, a compass, a library, a bicycle, a river, a mirror, a garden, a
clock, a kitchen, a pencil, a desert, a train, a whale, a guitar, a market, a battery, a
lighthouse, a farm, a ladder, a blanket, a telescope, a forest, a hammer, a violin, a window, a
museum, a bakery, a harbour, a spoon, a carpet, a mountain, a magnet, a newspaper, a pillow, a
tunnel, a lemon, a helmet, a school, a camera, a castle, a needle, an island, an umbrella, an
engine, an orchard, an airport, an oven, an owl, a bee, a horse, a spider, a penguin, a turtle, a
rabbit, a fox, a camel, a dolphin, a frog, a doctor, a teacher, a baker, a pilot, a farmer, a
carpenter, a lawyer, a nurse, a painter, a sailor, a poem, a map, a recipe, a letter, a song, a
contract, a diary, a novel, a joke, a speech, a storm, a rainbow, a glacier, a waterfall, a
meadow, a cave, a comet, a valley, a beach, a swamp, a hospital, a theatre, a factory, a bank, a
court, a stadium, a hotel, a church, a prison, a zoo
"""
FORMS = [
    "What is {}?",
    "Tell me something about {}.",
    "Why do people like {}?",
    "What would the world be without {}?",
]
BEFORE = [
    {"role": "system", "content": "You answer in one short sentence."},
    {"role": "user", "content": "What is a chair?"},
    {"role": "assistant", "content": "A chair is a seat for one person."},
]


@dataclass(frozen=True)
class Config:
    output: str = flag("examples/questions.jsonl", "file to write")


def conversations() -> list[list[dict]]:
    things = [thing.strip() for thing in THINGS.replace("\n", " ").split(",")]
    found = []
    for form in FORMS:
        for thing in things:
            question = {"role": "user", "content": form.format(thing)}
            found.append([*BEFORE, question])
    return found


def main(config) -> None:
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in conversations()]
    Path(config.output).write_text("".join(lines))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
