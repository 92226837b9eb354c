"""Accuracy of models on the test split of a task, with 95 % intervals.

    python eval.py runs/add                                     # what a run made of its base model, on the run's task
    python eval.py models/add --task add
    python eval.py Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --limit 200
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.hf_argparser import HfArg

import track
from flags import UserError, need, run_script
from policy import load_policy, pick_device, stop_ids
from reward import load_reward, score
from sample import generate
from tasks import Problem, Task, digest, load_task, prompt_ids


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson, 1927): honest at 0 and 1 too. wilson(8, 10) -> (0.490, 0.943)"""
    if n == 0:
        return 0.0, 1.0
    share, spread = successes / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(
    model: PreTrainedModel,
    tokenizer,
    task: Task,
    problems: list[Problem],
    temperature: float,
    max_new_tokens: int,
    seed: int = 0,
    batch_size: int = 256,
) -> dict:
    """One response to each problem, scored by the task's own rule (whatever reward a run learns from).

    -> accuracy (share scored 1), interval (95 %), n, thinking, finished (shares), response_length (tokens), responses.
    A problem's draws come from its own seed, so the numbers do not depend on batch_size.
    """
    reward, rewards, responses, lengths, finished = load_reward(task.reward), [], [], [], []
    for start in tqdm(range(0, len(problems), batch_size), desc="evaluating", leave=False):
        batch = problems[start : start + batch_size]
        seeds = [digest(f"{seed}/{problem.prompt}") for problem in batch]
        rollout = generate(model, [prompt_ids(task, problem, tokenizer) for problem in batch], 1, max_new_tokens,
                           stop_ids(model, tokenizer), seeds, temperature)
        texts = rollout.responses(tokenizer)
        answers = [problem.answer for problem in batch]
        rewards += score(reward, [problem.prompt for problem in batch], texts, answers)[0]
        responses += texts
        lengths += rollout.response_lengths.tolist()
        finished += rollout.finished.tolist()
    n, right = len(problems), sum(value == 1 for value in rewards)
    return {
        "accuracy": right / n,
        "interval": wilson(right, n),
        "n": n,
        "thinking": sum("</think>" in text for text in responses) / n,
        "finished": sum(finished) / n,
        "response_length": sum(lengths) / n,
        "responses": responses,
    }


def table(columns: dict[str, dict[str, dict]]) -> str:
    """{"before": {"greedy": evaluation, "sampled": evaluation}, ...} -> text, a column each."""
    def accuracy(evaluation: dict) -> str:
        low, high = evaluation["interval"]
        return f"{evaluation['accuracy']:.3f} [{low:.3f}, {high:.3f}]"

    rows = {
        "accuracy, greedy": lambda column: accuracy(column["greedy"]),
        "accuracy, sampled": lambda column: accuracy(column["sampled"]),
        "share that thinks": lambda column: f"{column['sampled']['thinking']:.3f}",
        "share that ends": lambda column: f"{column['sampled']['finished']:.3f}",
        "response length": lambda column: f"{column['sampled']['response_length']:.1f} tokens",
    }
    widths = [max(22, len(name)) for name in columns]
    lines = [" " * 19 + "  ".join(name.ljust(width) for name, width in zip(columns, widths))]
    for label, cell in rows.items():
        lines.append(label.ljust(19) + "  ".join(cell(c).ljust(w) for c, w in zip(columns.values(), widths)))
    return "\n".join(line.rstrip() for line in lines)


@dataclass(frozen=True)
class Config:
    task: str = HfArg(default="", help="add, countdown, gsm8k or a .jsonl file; a run brings its own")
    data_dir: str = HfArg(default="", help="folder with the task's files, if it needs some (gsm8k: data/gsm8k)")
    limit: int = HfArg(default=0, help="at most so many test problems, 0 for all")
    temperature: float = HfArg(default=1.0, help="of the sampled accuracy")
    max_new_tokens: int = HfArg(default=0, help="tokens after which a response is cut; 0 takes the run's, or 512")
    batch_size: int = HfArg(default=256, help="problems at once")
    seed: int = HfArg(default=0, help="same seed, same responses")
    device: Literal["auto", "cuda", "mps", "cpu"] = HfArg(default="auto", help="auto: the first of these that is there")
    dtype: Literal["auto", "float32", "bfloat16"] = HfArg(default="auto", help="auto: bfloat16 on cuda, else float32")


def main(config: Config, models: list[str]) -> None:
    need(config, 0, "limit max_new_tokens seed")
    need(config, 1, "batch_size")
    need(config, 1e-4 if config.temperature else 0, "temperature")
    device = pick_device(config.device)
    for name in models:
        run = track.read_config(Path(name)) if track.is_run(Path(name)) else {}
        task_name = config.task or run.get("task") or ""
        if not task_name:
            raise UserError(f"--task: {name} is no run that brings a task of its own, name one: add, gsm8k ...")
        task = load_task(task_name, config.data_dir or run.get("data_dir", ""))
        problems, columns = task.test[: config.limit or None], {}
        limit = config.max_new_tokens or run.get("max_new_tokens", 512)
        for label in [run["model"], name] if run else [name]:
            policy, tokenizer = load_policy(label, device, config.dtype)
            columns[label] = {
                kind: evaluate(policy, tokenizer, task, problems, temperature, limit, config.seed, config.batch_size)
                for kind, temperature in (("greedy", 0.0), ("sampled", config.temperature))
            }
        print(f"\n{len(problems)} test problems of {task.name}; 95 % Wilson intervals; sampled at temperature "
              f"{config.temperature:g}\n\n{table(columns)}")


if __name__ == "__main__":
    help = "model folders, run folders or Hugging Face names"
    run_script(main, Config, __doc__, models=dict(nargs="+", help=help))
