"""What a run goes on from: checkpoints that are whole, the state beside the weights, the run's lock, signals.

A file or folder that has its final name is whole: it was written under a name that ends in .part, and renamed when it
was on the disk. So a process may be killed at any moment. docs/reliability.md lists the promises and their tests.
"""

import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import TextIO

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from flags import UserError, first_line

try:
    import fcntl
except ImportError:  # Windows: runs are not locked there
    fcntl = None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """UserError where the disk does not take what is written: it is full, read-only, gone."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # of Python, of torch.save, of save_pretrained
        raise UserError(f"{path}: cannot be written ({first_line(error)}): is the disk full, or read-only? What was "
                        "there before is whole") from error


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk and not only on their way."""
    if os.name == "posix":  # Windows does not open folders, and files only to write
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    aside = path.with_name(path.name + ".part")
    with writing(path):
        aside.write_text(text, encoding="utf-8")
        sync(aside)
        aside.replace(path)


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


@contextmanager
def new_checkpoint(folder: Path, name: str = "checkpoint") -> Iterator[Path]:
    """A folder to write into, which takes the place of folder/name when the block has ended well and it is on the disk.
    The checkpoint before becomes checkpoint.old. The last file, checksums.json, has the SHA-256 of all the others."""
    final, aside, old, gone = (folder / f"{name}{state}" for state in ("", ".part", ".old", ".old.part"))
    with writing(final):
        for left in (aside, gone):  # by a crash
            shutil.rmtree(left, ignore_errors=True)
        aside.mkdir()
        yield aside
        files = [path for path in sorted(aside.rglob("*")) if path.is_file()]
        for path in [*files, *folder.glob("*.jsonl")]:  # the steps up to here too
            sync(path)
        write_json(aside / "checksums.json", {path.relative_to(aside).as_posix(): checksum(path) for path in files})
        if old.exists():
            old.rename(gone)
        if final.exists():
            final.rename(old if name == "checkpoint" else gone)
        aside.rename(final)
        sync(folder)
        shutil.rmtree(gone, ignore_errors=True)


def checksum(path: Path) -> str:
    """SHA-256, read in pieces: the optimizer's state may be larger than the memory that is left."""
    seen = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            seen.update(piece)
    return seen.hexdigest()


def flaw(checkpoint: Path) -> str | None:
    """The first file of a checkpoint that is missing or not what was written, and None if it is whole."""
    try:
        sums = json.loads((checkpoint / "checksums.json").read_text())
        for name, expected in {"state.pt": "", **sums}.items():
            if checksum(checkpoint / name) != expected:
                return f"{checkpoint / name} is damaged"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except (ValueError, TypeError):
        return f"{checkpoint}/checksums.json is damaged"
    return None


def find_checkpoint(folder: Path) -> Path | None:
    """folder/checkpoint; if that is damaged, or gone in a crash between two renames, the one before it takes its place,
    with a warning that names the file. None if the run has not come to its first. UserError if both are damaged."""
    final, old, bad = (folder / f"checkpoint{state}" for state in ("", ".old", ".bad"))
    if not final.exists() and not old.exists():
        return None
    if (problem := flaw(final)) and (worse := flaw(old)):
        raise UserError(f"{folder}: no checkpoint to go on from: {problem}, {worse}")
    if problem:
        print(f"warning: {problem}: going on from the checkpoint before it", file=sys.stderr)
        shutil.rmtree(bad, ignore_errors=True)
        if final.exists():
            final.rename(bad)
        old.rename(final)
    return final


def save_state(checkpoint: Path, optimizer, step: int, drawn: int) -> None:
    """Writes state.pt: what else than the policy's weights the next step depends on."""
    torch.save({"optimizer": optimizer.state_dict(), "step": step, "drawn": drawn, "torch_rng": torch.get_rng_state(),
                "python_rng": random.getstate()}, checkpoint / "state.pt")


def load_state(checkpoint: Path, optimizer) -> tuple[int, int]:
    """Reads it back -> steps done, problems drawn. UserError for a file that holds more than numbers: none is run."""
    try:
        state = torch.load(checkpoint / "state.pt", weights_only=True, map_location="cpu")
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng"])
        random.setstate(state["python_rng"])
        return state["step"], state["drawn"]
    except (UnpicklingError, OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint}/state.pt: is not the state of this run: {first_line(error)}") from None


def listening(steps: range, received: list[int]) -> Iterator[int]:
    """Yields the steps. The first SIGINT or SIGTERM is put into `received`, for the loop to end well; a second one acts
    at once, as if nobody had listened."""
    def listen(number: int, frame) -> None:
        received.append(number)
        restore()
        tqdm.write(f"{signal.Signals(number).name}: finishing this step and saving it; once more to stop at once")

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {}
    with suppress(ValueError):  # not in the main thread: signals are not for us
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, listen)
    try:
        yield from steps
    finally:
        restore()


def leave(run: Path, step: int, number: int) -> None:
    """Says how to go on from a step that is saved, and exits with 130 after SIGINT, 143 after SIGTERM."""
    elsewhere = "" if run.parent == Path("runs") else f" --runs_dir {shlex.quote(str(run.parent))}"
    tqdm.write(f"stopped; step {step} is saved. To go on:\n\n"
               f"    python {sys.argv[0]} --name {shlex.quote(run.name)} --resume{elsewhere}")
    raise SystemExit(128 + number)


def lock(folder: Path) -> TextIO:
    """folder/lock, held until the file is closed, which the system does when a process dies: no lock is ever stale.
    UserError if another process holds it."""
    file = (folder / "lock").open("a")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"--name {folder.name}: another process is at work on {folder}") from None
    except OSError:  # a file system without locks
        pass
    return file
