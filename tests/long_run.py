"""2,000 steps of a tiny run: memory, open files and threads must be at the end what they were after step 200.

    python tests/long_run.py            # in an empty folder; a minute or two

Prints the figures; ends with status 1 where something has grown. Linux: it reads /proc.
"""

import os
import statistics
import sys
import threading
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pretrain  # noqa: E402
import track  # noqa: E402
import train  # noqa: E402
from flags import parse  # noqa: E402
from policy import save_policy  # noqa: E402

STEPS, EARLY = 2000, 200
FLAGS = ["--model=untaught", "--device=cpu", "--prompts_per_step=1", "--group_size=2", "--max_new_tokens=2",
         f"--steps={STEPS}", "--eval_every=40",
         "--eval_problems=2", "--log_samples=2", "--reward=noise.noise", "--name=long"]


def size() -> dict[str, int]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"memory (MiB)": pages * os.sysconf("SC_PAGE_SIZE") >> 20, "open files": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(), "threads of the system": len(os.listdir("/proc/self/task"))}


torch.manual_seed(0)
tokenizer = pretrain.make_tokenizer()
save_policy(pretrain.make_model(tokenizer), tokenizer, Path("untaught"))
# never two rewards alike: each step is learnt from
Path("noise.py").write_text("import random\ndef noise(prompt, response, answer): return random.random()\n")
sizes = {}


def record(run, metrics, *rest, record=track.record):
    record(run, metrics, *rest)
    if metrics["step"] % 100 == 0:
        sizes[metrics["step"]] = size()


track.record = record
run = train.main(parse(train.Config, train.HELP, FLAGS, train.fill)[0])
rows, samples = (track.read_rows(run / f"{name}.jsonl") for name in ("metrics", "samples"))
seconds = [statistics.median(row["seconds"] for row in part) for part in (rows[EARLY - 100 : EARLY + 100], rows[-200:])]
for name, early in sizes[EARLY].items():
    print(f"{name}: {early} after {EARLY} steps, {sizes[STEPS][name]} after {STEPS}")
print(f"seconds a step: {seconds[0]:.4f} around step {EARLY}, {seconds[1]:.4f} at the end (medians of 200)")
print(f"samples.jsonl: {len(samples)} lines; run folder: {sum(path.is_file() for path in run.rglob('*'))} files")
grown = [name for name, early in sizes[EARLY].items() if sizes[STEPS][name] > early * (1.03 if "MiB" in name else 1)]
assert len(rows) == STEPS and all(row["updates"] == 1 for row in rows) and len(samples) <= 2 * STEPS
sys.exit(f"grown: {', '.join(grown)}" if grown else 0)
