"""Runs train.py in a process that may kill itself at a chosen moment, for test_reliability.py."""

import inspect
import os
import signal
import sys

import engine.generate
import lib.plots
import sample
import train
from engine.optimizer import Optimizer
from lib.checkpoint import new_checkpoint, save_state
from lib.flags import run_script
from lib.run import Run
from policy import save_policy

PHASES = {
    "generation": [engine.generate.generate, sample.generate],
    "update": [train.backward, Optimizer.step],
    "metrics": [Run.record],
    "checkpoint": [new_checkpoint, save_policy, save_state],
    "plot": [lib.plots.plot_run],
}
PHASE_OF = {
    inspect.unwrap(function).__code__: phase
    for phase, functions in PHASES.items()
    for function in functions
}


def run(flags, phase, event, pipe):
    """Runs train.py, and dies by SIGKILL at the event-th call, of Python or of C, inside of a
    phase. Phase "": lives, and sends {phase: calls inside of it} through the pipe. None: lives, and
    is several times faster."""
    phases = []  # that the program is in at the moment, the innermost last
    events = dict.fromkeys(PHASES, 0)

    def listen(frame, kind, _):
        if kind == "call" and frame.f_code in PHASE_OF:
            phases.append(PHASE_OF[frame.f_code])
        if phases and kind in ("call", "c_call"):
            events[phases[-1]] += 1
            if phases[-1] == phase and events[phase] > event:
                os.kill(os.getpid(), signal.SIGKILL)
        if kind == "return" and frame.f_code in PHASE_OF:
            phases.pop()

    sys.argv = ["train.py", *flags]
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if phase is not None:
        sys.setprofile(listen)
    run_script(train.main, train.Config, train.__doc__, train.fill, train.HELP)
    sys.setprofile(None)
    pipe.send(events)
