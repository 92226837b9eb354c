"""Draw the curves of several runs in one picture.

    python -m tools.plot runs/add runs/countdown
    python -m tools.plot runs/grpo-* runs/dapo-*

Runs whose names differ only in the number at the end are drawn together, as their mean and a band
from the lowest to the highest, if their flags differ only in the seed: "grpo (2 runs)". Where other
flags differ, runs are told apart by them: "grpo-1 --lr 1e-05".
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs from any folder

from lib.files import read_rows
from lib.flags import UserError, flag, run_script
from lib.plots import plot_runs
from lib.run import read_config


@dataclass(frozen=True)
class Config:
    output: str = flag("compare.png", "picture to write")
    x: Literal["step", "responses"] = flag("step", "responses: where steps differ in their size")


# flags in which runs of one family may differ
FREE = "seed", "name", "runs_dir", "tracker", "log_samples", "device", "resume"


def flags_of(folder) -> dict:
    """The flags of a run that must be equal in a family. A folder without config.json has none."""
    path = folder / "config.json"
    flags = read_config(folder) if path.exists() else {}
    return {name: value for name, value in flags.items() if name not in FREE}


def families(runs) -> dict[str, list[Path]]:
    """runs/a-0, runs/a-1 of equal flags, runs/b -> {"a (2 runs)": [runs/a-0, runs/a-1],
    "b": [runs/b]}

    runs/a-0, runs/a-1, runs/a-2, the last with another --lr, the only flag that differs:
    {"a --lr 0.1 (2 runs)": [runs/a-0, runs/a-1], "a-2 --lr 0.2": [runs/a-2]}
    """
    flags = {folder: flags_of(folder) for folder in map(Path, runs)}
    names = {name for one in flags.values() for name in one}
    differ = [name for name in names if len({repr(one.get(name)) for one in flags.values()}) > 1]
    groups = {}
    for folder, own in flags.items():
        text = " ".join(f"--{name} {own.get(name)}" for name in sorted(differ))
        stem = re.sub(r"-\d+$", "", folder.name)
        groups.setdefault((stem, text), []).append(folder)
    stems = [stem for stem, _ in groups]
    named = {}
    for (stem, text), folders in groups.items():
        name = stem if len(folders) > 1 else folders[0].name
        if stems.count(stem) > 1:
            name += f" {text}"
        if len(folders) > 1:
            name += f" ({len(folders)} runs)"
        named[name] = folders
    return named


def main(config, runs) -> None:
    if Path(config.output).suffix != ".png":
        raise UserError(f"--output {config.output}: must end in .png")
    for run in runs:
        if not read_rows(Path(run) / "metrics.jsonl"):
            raise UserError(f"{run}: no run there, or its first step is not done yet")
    groups = families(runs)
    plot_runs(groups, Path(config.output), config.x)
    print(f"{config.output}: the curves of {', '.join(groups)}")


if __name__ == "__main__":
    run_script(main, Config, __doc__, runs={"nargs": "+", "help": "folders of runs"})
