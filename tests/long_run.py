"""2,000 steps of a tiny run: memory, open files and threads must be at the end what they were after
step 200.

    python tests/long_run.py            # in an empty folder; a minute or two

Prints the figures; ends with status 1 if something has grown. Linux: it reads /proc.
"""

import os
import sys
import threading
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from lib.files import read_rows
from lib.flags import parse
from lib.run import Run
from policy import save_policy
from tools import pretrain

STEPS = 2000
EARLY = 200
FLAGS = f"""--model=untaught --device=cpu --prompts_per_step=1 --group_size=2 --max_new_tokens=2
    --steps={STEPS} --eval_every=40 --eval_problems=2 --log_samples=2 --reward=noise.noise
    --name=long"""
# never two equal rewards: each step is learned from
NOISE = "import random\ndef noise(prompt, response, answer): return random.random()\n"


def process_size():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory (MiB)": pages * os.sysconf("SC_PAGE_SIZE") >> 20,
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "threads of the system": len(os.listdir("/proc/self/task")),
    }


torch.manual_seed(0)
tokenizer = pretrain.make_tokenizer()
save_policy(pretrain.make_model(tokenizer), tokenizer, Path("untaught"))
Path("noise.py").write_text(NOISE)
sizes = {}


def record(run, metrics, *rest, record=Run.record):
    record(run, metrics, *rest)
    sizes[metrics["step"]] = process_size()


Run.record = record
run = train.main(parse(train.Config, train.HELP, FLAGS.split(), train.fill)[0])
rows = read_rows(run / "metrics.jsonl")
samples = read_rows(run / "samples.jsonl")
assert [row["updates"] for row in rows] == [1] * STEPS
assert len(samples) <= 2 * STEPS

grown = []
for name, early in sizes[EARLY].items():
    late = sizes[STEPS][name]
    print(f"{name}: {early} after {EARLY} steps, {late} after {STEPS}")
    if late > early * (1.03 if "MiB" in name else 1):
        grown.append(name)
seconds = [row["seconds"] for row in rows]
around, end = median(seconds[EARLY - 100 : EARLY + 100]), median(seconds[-200:])
print(f"seconds per step: {around:.4f} around step {EARLY}, {end:.4f} at the end (medians of 200)")
sys.exit(f"grown: {', '.join(grown)}" if grown else 0)
