"""Checkpoints: whole or not there, with all that an exact resume needs. Also locks and signals.

<run>/checkpoint/       the policy as a Hugging Face folder, and state.pt
<run>/checkpoint.old/   the one before it
<run>/checkpoint.bad/   one that could not be read
"""

import json
import os
import random
import shutil
import signal
import stat
import sys
from contextlib import contextmanager, suppress

import torch
from safetensors import safe_open
from tqdm import tqdm

from lib.files import sync, writing
from lib.flags import UserError, first_line

try:
    import fcntl
except ImportError:  # Windows: runs are not locked there
    fcntl = None


@contextmanager
def new_checkpoint(folder, name="checkpoint"):
    """A folder to write into. At the end of the block it becomes folder/name.

    The checkpoint before it is kept as checkpoint.old; under any other name it is deleted.
    """
    final = folder / name
    aside = folder / f"{name}.part"
    old = folder / f"{name}.old"
    outdated = folder / f"{name}.old.part"
    with writing(final):
        for leftover in (aside, outdated):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        aside.mkdir()
        yield aside
        # the metrics too: a checkpoint must not be ahead of them
        for path in [aside, *aside.rglob("*"), *folder.glob("*.jsonl")]:
            sync(path)
        if old.exists():
            old.rename(outdated)
        if final.exists():
            final.rename(old if name == "checkpoint" else outdated)
        aside.rename(final)
        sync(folder)
        shutil.rmtree(outdated, ignore_errors=True)


def save_state(folder, state):
    """Writes state.pt: `state`, the random states of torch and Python, and the names of the other
    files in the folder: a missing one is noticed by `read_checkpoint`."""
    state = {**state, "torch_rng": torch.get_rng_state(), "python_rng": random.getstate()}
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    state["files"] = [str(path.relative_to(folder)) for path in folder.rglob("*.*")]
    torch.save(state, folder / "state.pt")


def restore_random_state(state):
    torch.set_rng_state(state["torch_rng"])
    random.setstate(state["python_rng"])
    if "cuda_rng" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda_rng"])


def read_checkpoint(folder) -> dict:
    """The state in state.pt. UserError names a file that is damaged or missing.

    Pickled code is refused, never executed.
    """
    path = folder / "state.pt"
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        for path in [folder / name for name in state["files"]]:
            path.stat()  # is the file there?
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            if path.suffix == ".safetensors":
                safe_open(path, "pt")  # checks that the file has the length it should have
    except Exception as error:  # a damaged file may raise anything
        raise UserError(f"{path} cannot be read ({first_line(error)})") from None
    return state


def find_checkpoint(folder) -> tuple:
    """The folder of a run's newest checkpoint, and its state. (None, None) if there is none.

    If it is damaged, or was being replaced when the run was killed, the one before it takes its
    place, with a warning. UserError if both are damaged.
    """
    newest = folder / "checkpoint"
    old = folder / "checkpoint.old"
    if not newest.exists() and not old.exists():
        return None, None
    try:
        return newest, read_checkpoint(newest)
    except UserError as error:
        problem = error
    try:
        state = read_checkpoint(old)
    except UserError as error:
        raise UserError(f"{folder}: no checkpoint to resume from: {problem}, {error}") from None
    print(f"warning: {problem}: resuming from the checkpoint before it", file=sys.stderr)
    bad = folder / "checkpoint.bad"
    shutil.rmtree(bad, ignore_errors=True)
    if newest.exists():
        newest.rename(bad)
    old.rename(newest)
    return newest, state


def lock(folder):
    """Locks folder/lock until the file that is returned is closed, or the process dies.

    UserError if another process holds the lock.
    """
    file = (folder / "lock").open("a")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"--name {folder.name}: another process is at work on {folder}") from None
    except OSError:  # a file system without locks
        pass
    return file


def leave_terminal():
    """What is printed from now on goes nowhere, unless it goes into a file: the terminal is gone,
    and writing to it would raise an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        if not stat.S_ISREG(os.fstat(output).st_mode):
            os.dup2(nowhere, output)
    os.close(nowhere)


@contextmanager
def catch_signals():
    """Yields a list, into which the first SIGINT, SIGTERM or SIGHUP (a closed terminal) is put: the
    caller can stop cleanly. A second signal has its usual effect at once."""
    received = []
    before = {}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def remember(number, frame):
        received.append(number)
        restore()
        if number == getattr(signal, "SIGHUP", None):
            leave_terminal()
        name = signal.Signals(number).name
        tqdm.write(f"{name}: finishing this step and saving it; once more to stop at once")

    with suppress(ValueError):  # only the main thread may set handlers
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            # nohup has SIGHUP ignored, and that is meant
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                before[number] = signal.signal(number, remember)
    try:
        yield received
    finally:
        restore()
