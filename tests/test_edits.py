"""Each patch of docs/edits is applied to a copy of the project, which then trains, and shows its effect in a number.

Slow: whoever has changed the code must not see red because a patch no longer fits.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib.files import read_rows

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PATCHES = sorted((ROOT / "docs" / "edits").glob("*.patch"))
SMALL = "--prompts_per_step 4 --group_size 4 --max_new_tokens 16 --eval_problems 0 --lr 1e-3"


def edited(name) -> Path:
    """A copy of the project in the current folder, with a patch applied."""
    copy = Path(name).resolve()
    parts = shutil.ignore_patterns(".*", "runs", "__pycache__", "*.ipynb")
    shutil.copytree(ROOT, copy, ignore=parts)
    patch = (ROOT / "docs" / "edits" / f"{name}.patch").read_bytes()
    subprocess.run(["patch", "-p1", "--fuzz=0"], cwd=copy, input=patch, check=True)
    return copy


def python(folder, *arguments, status=0) -> str:
    """What python prints, run in a copy of the project."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout


def train(folder, *flags) -> list[dict]:
    """The metrics of a run in a copy of the project."""
    words = " ".join([SMALL, *flags]).split()
    name = f"run-{len(list(folder.glob('runs/*')))}"
    python(folder, "train.py", *words, "--name", name)
    return read_rows(folder / "runs" / name / "metrics.jsonl")


def evaluate(folder, code):
    """Runs code that ends by printing JSON, in a copy of the project."""
    return json.loads(python(folder, "-c", code).splitlines()[-1])
