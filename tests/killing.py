"""Runs train.py again and again, each time in a process that may kill itself at a chosen moment. test_reliability.py
starts it: importing torch takes longer than a tiny run, and a fork of a process that has imported it takes none.

Reads lines of JSON from its input, {"flags": [...], "phase": name or null, "event": n}: a child runs train.py with the
flags, and dies by SIGKILL at the n-th call, of Python or of C, inside of that phase. Answers each with a line:
{"status": as from os.waitpid, "events": {phase: calls inside of it}}, the events where it was not killed.
"""

import inspect
import json
import os
import signal
import sys

import checkpoint
import plot
import policy
import sample
import track
import train
import update

PHASES = {"generation": [sample.generate], "update": [update.Learner.backward, policy.Optimizer.step],
          "metrics": [track.record],
          "checkpoint": [checkpoint.new_checkpoint, policy.save_policy, checkpoint.save_state], "plot": [plot.plot]}
PHASE_OF = {inspect.unwrap(function).__code__: phase for phase, functions in PHASES.items() for function in functions}


def run(flags: list[str], phase: str | None, event: int, answer: int) -> None:
    inside, events = [], dict.fromkeys(PHASES, 0)

    def listen(frame, kind: str, _) -> None:
        if kind == "call" and frame.f_code in PHASE_OF:
            inside.append(PHASE_OF[frame.f_code])
        if inside and kind in ("call", "c_call"):
            events[inside[-1]] += 1
            if inside[-1] == phase and events[phase] > event:
                os.kill(os.getpid(), signal.SIGKILL)
        if kind == "return" and frame.f_code in PHASE_OF:
            inside.pop()

    sys.argv = ["train.py", *flags]
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    sys.setprofile(listen)
    train.run_script(train.main, train.Config, train.HELP, train.fill)
    sys.setprofile(None)
    os.write(answer, json.dumps(events).encode())


for line in sys.stdin:
    order = json.loads(line)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            run(order["flags"], order["phase"], order["event"], write)
            os._exit(0)
        except BaseException as error:
            os.write(write, json.dumps(repr(error)).encode())
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as pipe:
        events = pipe.read()
    print(json.dumps({"status": os.waitpid(child, 0)[1], "events": json.loads(events or "null")}), flush=True)
