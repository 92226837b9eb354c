"""Seconds of train.py's step in one process or several, on the work of setting C of bench_trl.py.

    export OMP_NUM_THREADS=1
    python docs/bench_scale.py                          # one process
    torchrun --nproc_per_node 2 docs/bench_scale.py     # two, with the same prompts and responses

Prints medians over the steps after the first. Before each exchange the processes wait for each
other, in order to measure apart: the wait for the slower one, and the exchange itself. CPU seconds
are those of the process that took most: what a step takes on idle cores, without waiting.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import bench_trl
import torch.distributed as dist

import engine.optimizer
import train
from lib.files import write_rows
from lib.flags import flag, run_script
from lib.processes import gather, processes, together
from lib.run import Run
from policy import save_policy

REWARD = '''
def score(prompts, responses, answers):
    """The share of the digits that are in place, and a little more: so no weight is 0."""
    rewards = []
    for row, (response, answer) in enumerate(zip(responses, answers)):
        right = sum(x == y for x, y in zip(response, answer)) / len(answer)
        rewards.append(right + 1e-3 * (row % 16))
    return rewards
'''


@dataclass(frozen=True)
class Config:
    steps: int = flag(10, "steps that count, after one that warms up")


def main(config):
    step, steps = Counter(), []
    all_gather, sum_gradients = dist.all_gather_object, engine.optimizer.sum_gradients
    record = Run.record

    def wait():
        began = time.perf_counter()
        if processes() > 1:
            dist.barrier()
        step["waiting"] += time.perf_counter() - began

    def timed_gather(sent, content):
        wait()
        began = time.perf_counter()
        all_gather(sent, content)
        step["exchange"] += time.perf_counter() - began
        step["bytes of the exchange"] += len(content)

    def timed_sum(gradients, parameters):
        wait()
        before = step["exchange"] + step["waiting"]
        began = time.perf_counter()
        summed = sum_gradients(gradients, parameters)
        elsewhere = step["exchange"] + step["waiting"] - before
        step["gradients"] += time.perf_counter() - began - elsewhere
        step["bytes of gradients"] += 4 * sum(parameter.numel() for parameter in parameters)
        return summed

    def timed_record(run, metrics, *rest):
        step.update({"step": metrics["seconds"], "sampling": metrics["seconds_sample"]})
        step["CPU"] += time.process_time()
        step["CPU"] = max(gather(step["CPU"]))
        steps.append(dict(step))
        record(run, metrics, *rest)
        step.clear()
        step["CPU"] = -time.process_time()

    dist.all_gather_object, engine.optimizer.sum_gradients = timed_gather, timed_sum
    Run.record = timed_record

    model, _ = bench_trl.make_model(bench_trl.Config(setting="C"))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        save_policy(model, bench_trl.make_tokenizer(100), Path("model"))
        answers = bench_trl.make_problems(128)
        problems = [{"prompt": prompt, "answer": answer} for prompt, answer in answers.items()]
        write_rows(Path("problems.jsonl"), problems)
        Path("own.py").write_text(REWARD)
        flags = train.Config(
            model=str(Path("model").resolve()),
            task="problems.jsonl",
            reward="own.score",
            prompts_per_step=bench_trl.P,
            group_size=bench_trl.G,
            max_new_tokens=64,
            steps=config.steps + 1,
            eval_problems=0,
            device="cpu",
        )
        with contextlib.redirect_stdout(sys.stderr):
            together(train.main)(flags)
    if os.environ.get("RANK", "0") == "0":
        names = dict.fromkeys(name for found in steps for name in found)
        medians = {name: median(found.get(name, 0) for found in steps[1:]) for name in names}
        print(json.dumps({name: round(number, 4) for name, number in medians.items()}))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
