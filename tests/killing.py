"""Runs train.py again and again, each time in a process that may kill itself at a chosen moment.

test_reliability.py starts it: importing torch takes longer than a tiny run, and a fork of a process
that has imported it takes none. Reads lines of JSON with the arguments of `run`, and answers each
with a line: {"status": as from os.waitpid, "events": see `run`, null if it was killed}.
"""

import inspect
import json
import os
import signal
import sys

import fast.generate
import lib.plots
import sample
import train
from fast.optimizer import Optimizer
from lib.checkpoint import new_checkpoint, save_state
from lib.flags import run_script
from lib.run import Run
from policy import save_policy

PHASES = {
    "generation": [fast.generate.generate, sample.generate],
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


def run(folder, flags, phase, event, answer):
    """Runs train.py in a folder, and dies by SIGKILL at the event-th call, of Python or of C,
    inside of a phase. Phase "": lives, and writes {phase: calls inside of it} into the pipe. None: lives,
    and is several times faster.
    """
    os.chdir(folder)
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
    os.write(answer, json.dumps(events).encode())


print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            run(**order, answer=write)
            os._exit(0)
        except BaseException as error:
            os.write(write, json.dumps(repr(error)).encode())
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as pipe:
        events = json.loads(pipe.read() or "null")
    status = os.waitpid(child, 0)[1]
    print(json.dumps({"status": status, "events": events}), flush=True)
