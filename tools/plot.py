"""Draw the curves of several runs in one picture.

    python -m tools.plot runs/add runs/countdown
    python -m tools.plot runs/grpo-* runs/dapo-*

Runs whose names differ only in the number at the end are drawn together, as their mean and a band
from the lowest to the highest: runs/grpo-0 and runs/grpo-1 become "grpo (2 runs)".
"""

import re
from dataclasses import dataclass
from pathlib import Path

from lib.files import read_rows
from lib.flags import UserError, flag, run_script
from lib.plots import plot_runs


@dataclass(frozen=True)
class Config:
    output: str = flag("compare.png", "picture to write")


def group_by_name(runs) -> dict[str, list[Path]]:
    """runs/a-0, runs/a-1, runs/b -> {"a (2 runs)": [runs/a-0, runs/a-1], "b": [runs/b]}"""
    groups = {}
    for folder in map(Path, runs):
        groups.setdefault(re.sub(r"-\d+$", "-", folder.name), []).append(folder)
    named = {}
    for stem, folders in groups.items():
        several = f"{stem.removesuffix('-')} ({len(folders)} runs)"
        named[several if len(folders) > 1 else folders[0].name] = folders
    return named


def main(config, runs) -> None:
    if Path(config.output).suffix != ".png":
        raise UserError(f"--output {config.output}: must end in .png")
    for run in runs:
        if not read_rows(Path(run) / "metrics.jsonl"):
            raise UserError(f"{run}: no run there, or its first step is not done yet")
    groups = group_by_name(runs)
    plot_runs(groups, Path(config.output))
    print(f"{config.output}: the curves of {', '.join(groups)}")


if __name__ == "__main__":
    run_script(main, Config, __doc__, runs={"nargs": "+", "help": "folders of runs"})
