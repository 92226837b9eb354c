"""How good models are on the test split of a task, with 95 % intervals, and whether one is better than another.

    python eval.py runs/add                                     # a run beside its base model, on the run's task
    python eval.py runs/add --samples 16                        # and pass@k and maj@k, of 16 responses to each problem
    python eval.py runs/add runs/add-2 runs/add-3               # a row each
    python eval.py Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --limit 200

Writes eval.json (all numbers), eval.png and responses.jsonl (every response) into the run's folder, or into runs/eval
for several models, or one that is no run.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.hf_argparser import HfArg

import track
from flags import UserError, need, run_script
from plot import plot_evaluation
from policy import load_policy, pick_device, stop_ids
from reward import Reward, load_reward, score
from rules import ANSWERS, STRICT_AND_LENIENT, final_answer, last_number
from sample import choose_sampler
from stats import bootstrap, maj_at_k, mcnemar, paired_difference, pass_at_k, wilson
from tasks import Problem, Task, digest, load_task, prompt_ids
from update import within_memory


def respond(
    model: PreTrainedModel, tokenizer, task: Task, problems: list[Problem], temperature: float, max_new_tokens: int,
    seed: int = 0, batch_size: int = 256, samples: int = 1, label: str = "evaluating", sampler: Callable | None = None,
) -> list[list[dict]]:
    """-> for each problem its responses: prompt, answer, difficulty, response, length (tokens), finished, and right, by
    the task's own rule (whatever reward a run learns from).

    A problem's draws come from its own seed, so what it gets depends neither on batch_size (responses at once) nor on
    which other problems there are. sampler: None chooses."""
    rule, stop, groups = load_reward(task.reward), stop_ids(model, tokenizer), []
    prompts = [prompt_ids(task, problem, tokenizer) for problem in problems]
    sampler = sampler or choose_sampler(model, prompts[:8], max_new_tokens, stop)
    at_once, kept = max(1, batch_size // samples), {}
    with tqdm(total=len(problems), desc=label, leave=False, dynamic_ncols=True) as bar:
        for part in (slice(start, start + at_once) for start in range(0, len(problems), at_once)):
            batch = problems[part]
            seeds = [digest(f"{seed}/{problem.prompt}") for problem in batch]
            work = partial(sampler, model, prompts[part], samples, max_new_tokens, stop, seeds, temperature, kept=kept)
            rollout, batch_size = within_memory(work, batch_size, "--batch_size", kept.clear)
            rows = [{"prompt": problem.prompt, "answer": problem.answer, "difficulty": problem.difficulty}
                    for problem in batch for _ in range(samples)]
            columns = rollout.responses(tokenizer), rollout.response_lengths.tolist(), rollout.finished.tolist()
            values = score(rule, [row["prompt"] for row in rows], columns[0], [row["answer"] for row in rows])[0]
            for row, *found, value in zip(rows, *columns, values):
                row |= dict(zip(("response", "length", "finished"), found)) | {"right": value == 1}
            groups += [rows[start : start + samples] for start in range(0, len(rows), samples)]
            bar.update(len(batch))
    return groups


def accuracy(groups: list[list[dict]]) -> dict:
    """Share of right responses and its 95 % interval: Wilson's for one response a problem, bootstrap over problems for
    more, since responses to one problem are alike."""
    n, shares = len(groups), [average(group, "right") for group in groups]
    if all(len(group) == 1 for group in groups):
        interval = wilson(round(sum(shares)), n)
    else:
        interval = bootstrap(torch.tensor(shares, dtype=torch.float64)[:, None])[0]
    return {"accuracy": sum(shares) / n, "interval": interval, "n": n}


def average(rows: list[dict], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def summarise(groups: list[list[dict]]) -> dict:
    """accuracy (share that is right), interval (95 %), n (problems), thinking, finished (shares), response_length
    (tokens)"""
    rows = [row for group in groups for row in group]
    thinking = sum("</think>" in row["response"] for row in rows) / len(rows)
    return {**accuracy(groups), "thinking": thinking, "finished": average(rows, "finished"),
            "response_length": average(rows, "length")}


def evaluate(model: PreTrainedModel, tokenizer, task: Task, problems: list[Problem], temperature: float,
             max_new_tokens: int, **options) -> dict:
    """One response to each problem: what `summarise` says of them, and the responses. options: those of `respond`"""
    groups = respond(model, tokenizer, task, problems, temperature, max_new_tokens, **options)
    return {**summarise(groups), "responses": [row["response"] for group in groups for row in group]}


def details(groups: list[list[dict]], rule: str, reward: Reward, max_new_tokens: int) -> dict:
    """What eval.json says beyond `summarise`: the reward and its parts; accuracy by the strict and the lenient form of
    the task's rule, where it has them, and by difficulty; pass@k and maj@k where there are several responses to a
    problem. Adds the rewards to the rows."""
    rows = [row for group in groups for row in group]
    columns = [[row[key] for row in rows] for key in ("prompt", "response", "answer", "length")]
    rewards, parts = score(reward, *columns, max_new_tokens)
    for row, value, *values in zip(rows, rewards, *parts.values()):
        row |= {"reward": value, "parts": dict(zip(parts, values))}
    found = {"reward": average(rows, "reward"), "parts": {part: sum(v) / len(v) for part, v in parts.items()}}
    if rule in STRICT_AND_LENIENT and all(last_number(answer) for answer in columns[2]):
        for form, name in zip(("strict", "lenient"), STRICT_AND_LENIENT[rule]):
            values = score(load_reward(name), *columns[:3])[0]
            found[form] = values.count(1) / len(values)
    levels = defaultdict(list)
    for group in groups:
        levels[group[0]["difficulty"]].append(group)
    if len(levels) > 1:
        found["by_difficulty"] = {level: accuracy(levels[level]) for level in sorted(levels, key=lambda x: (len(x), x))}
    if (samples := len(groups[0])) > 1:
        ks = [2**i for i in range(samples.bit_length()) if 2**i < samples] + [samples]
        answer = ANSWERS.get(rule, str)
        votes = [[answer(final_answer(row["response"])) for row in group] for group in groups]
        right = [[row["right"] for row in group] for group in groups]
        values = torch.tensor([[pass_at_k(sum(r), samples, k) for k in ks] + [maj_at_k(v, r, k) for k in ks]
                               for v, r in zip(votes, right)], dtype=torch.float64)
        means = [{"accuracy": mean, "interval": interval}
                 for mean, interval in zip(values.mean(0).tolist(), bootstrap(values))]
        found |= {"pass_at": dict(zip(ks, means)), "maj_at": dict(zip(ks, means[len(ks) :]))}
    return found


def compare(before: dict[str, list], after: dict[str, list]) -> dict[str, dict]:
    """{"greedy": groups, "sampled": groups} of two models on the same problems -> for each the difference, its 95 %
    interval, and a verdict. Of greedy answers by McNemar's exact test; of sampled ones by whether 0 is in the interval,
    bootstrapped over problems, so that what both models find hard does not count as noise."""
    old, new = ([group[0]["right"] for group in each["greedy"]] for each in (before, after))
    n, gained, lost = len(old), sum(b > a for a, b in zip(old, new)), sum(a > b for a, b in zip(old, new))
    p, interval = mcnemar(gained, lost), paired_difference(gained, lost, n)
    greedy = {"difference": (gained - lost) / n, "interval": interval, "gained": gained, "lost": lost, "p": p,
              "verdict": "no difference seen" if p >= 0.05 else "better" if gained > lost else "worse"}
    shares = [[average(group, "right") for group in each["sampled"]] for each in (before, after)]
    differences = torch.tensor(shares[1], dtype=torch.float64) - torch.tensor(shares[0], dtype=torch.float64)
    low, high = bootstrap(differences[:, None])[0]
    sampled = {"difference": differences.mean().item(), "interval": (low, high),
               "verdict": "better" if low > 0 else "worse" if high < 0 else "no difference seen"}
    return {"greedy": greedy, "sampled": sampled}


def table(results: dict[str, dict[str, dict]]) -> str:
    """{name: {"greedy": evaluation, "sampled": evaluation}} -> for the screen, a line each: accuracies; and below them
    what else there is to say of the sampled responses."""
    accuracies, rest = [], []
    for name, found in results.items():
        sampled = found["sampled"]
        shown = {"greedy": found["greedy"], "sampled": sampled}
        for kind in ("pass", "maj"):
            shown |= {f"{kind}@{k}": value for k, value in list(sampled.get(f"{kind}_at", {}).items())[-1:]}
        accuracies.append({"": name} | {title: "{:.3f} [{:.3f}, {:.3f}]".format(value["accuracy"], *value["interval"])
                                        for title, value in shown.items()})
        titles = "strict", "lenient", "thinking", "finished", "reward"
        shares = {title: sampled[title] for title in titles if title in sampled}
        shares |= sampled["parts"] if len(sampled.get("parts", {})) > 1 else {}
        rest.append({"": name, "tokens": f"{sampled['response_length']:.1f}"}
                    | {title: f"{value:.3f}" for title, value in shares.items()})
    return "\n\n".join(track.align([list(rows[0]), *(list(row.values()) for row in rows)])
                       for rows in (accuracies, rest))


def report(run: Path, task: Task, problems: list[Problem]) -> None:
    """Prints what training changed on held-out problems, and three of them in full."""
    before, after = (json.loads((run / f"{when}.json").read_text()) for when in ("before", "after"))
    print(f"\n{len(problems)} held-out problems of task {task.name}, 95 % Wilson intervals\n")
    print(table({"before": before, "after": after}))
    for i, problem in enumerate(problems[:3]):
        print(f"\n{track.shorten(problem.prompt)}")
        for label, column in (("before:", before), ("after: ", after)):
            print(f"  {label} {track.shorten(column['sampled']['responses'][i])}")


@dataclass(frozen=True)
class Config:
    task: str = HfArg(default="", help="add, countdown, gsm8k or a .jsonl file; a run brings its own")
    data_dir: str = HfArg(default="", help="folder with the task's files, if it needs some (gsm8k: data/gsm8k)")
    limit: int = HfArg(default=0, help="at most so many test problems, 0 for all")
    samples: int = HfArg(default=1, help="responses to each problem; above 1 there is pass@k and maj@k")
    temperature: float = HfArg(default=1.0, help="of the sampled accuracy")
    max_new_tokens: int = HfArg(default=0, help="tokens after which a response is cut; 0 takes the run's, or 512")
    reward: str = HfArg(default="", help="a mean to report beside the accuracy; default: the run's, or the task's rule")
    batch_size: int = HfArg(default=256, help="responses at once: memory and speed only, same numbers")
    seed: int = HfArg(default=0, help="same seed, same responses")
    output: str = HfArg(default="", help="folder to write into; default: that of the run, or runs/eval")
    device: Literal["auto", "cuda", "mps", "cpu"] = HfArg(default="auto", help="auto: the first of these that is there")
    dtype: Literal["auto", "float32", "bfloat16"] = HfArg(default="auto", help="auto: bfloat16 on cuda, else float32")


def settle(config: Config, runs: dict[str, dict]) -> tuple[Task, str, int]:
    """-> the task, the reward and max_new_tokens, which must be the same for all. UserError for a bad flag."""
    need(config, 0, "limit max_new_tokens seed")
    need(config, 1, "samples batch_size", most=1e6)
    need(config, 1e-4, "temperature", most=1e9)  # greedy is measured in any case
    agreed = {}
    for flag in ("task", "data_dir", "max_new_tokens", "reward"):
        values = {run[flag]: None for run in runs.values()} if not (flag == "reward" and config.task) else {}
        if not getattr(config, flag) and len(values) > 1:
            raise UserError(f"--{flag}: the runs differ in it ({', '.join(map(repr, values))}), give one for all")
        agreed[flag] = getattr(config, flag) or next(iter(values), "")
    if not agreed["task"]:
        raise UserError("--task: none of the models is a run that brings a task of its own, name one: add, gsm8k ...")
    task = load_task(agreed["task"], agreed["data_dir"])
    return task, agreed["reward"] or task.reward, agreed["max_new_tokens"] or 512


def describe(pair: dict) -> str:
    """A comparison for the screen."""
    lines = [f"{pair['after']} against {pair['before']}, on the same problems:"]
    for kind in ("greedy", "sampled"):
        difference, (low, high), verdict = (pair[kind][key] for key in ("difference", "interval", "verdict"))
        lines.append(f"    {kind:7}  {difference:+.3f} [{low:+.3f}, {high:+.3f}]  {verdict}")
    lines[1] += " ({gained} gained, {lost} lost; exact McNemar test: p = {p:.2g})".format(**pair["greedy"])
    return "\n".join(lines)


def main(config: Config, models: list[str]) -> dict:
    """Evaluates the models, and before each run the model that it set out from; returns what eval.json says."""
    runs = {name: track.read_config(Path(name)) for name in models if track.is_run(Path(name))}
    task, reward_text, limit = settle(config, runs)
    device, problems = pick_device(config.device), task.test[: config.limit or None]
    reward = load_reward(reward_text, device)
    output = Path(config.output or (models[0] if list(runs) == models and len(models) == 1 else "runs/eval"))
    bases = {name: runs[name]["model"] if name in runs else models[0] for name in models}  # what each is compared with

    groups, results = {}, {}
    for name in dict.fromkeys(label for pair in bases.items() for label in pair[::-1]):
        policy, tokenizer = load_policy(name, device, config.dtype)
        groups[name] = {
            kind: respond(policy, tokenizer, task, problems, temperature, limit, config.seed, config.batch_size,
                          samples, f"{name}, {kind}")
            for kind, temperature, samples in (("greedy", 0.0, 1), ("sampled", config.temperature, config.samples))
        }
        results[name] = {kind: {**summarise(found), **details(found, task.reward, reward, limit)}
                         for kind, found in groups[name].items()}
    comparisons = [{"before": base, "after": name, **compare(groups[base], groups[name])}
                   for name, base in bases.items() if name != base]
    print(f"\n{len(problems)} test problems of {task.name}; to each a greedy response and {config.samples} sampled at "
          f"temperature {config.temperature:g}; 95 % intervals\n")
    print("\n\n".join([table(results), *map(describe, comparisons)]))

    found = {"task": task.name, "n": len(problems), "samples": config.samples, "temperature": config.temperature,
             "max_new_tokens": limit, "reward": reward_text, "seed": config.seed, "models": results,
             "comparisons": comparisons}
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "responses.jsonl").unlink(missing_ok=True)
        for name, kinds in groups.items():
            for kind, rows in kinds.items():
                track.append(output / "responses.jsonl", [{"model": name, "decoding": kind, **row}
                                                          for group in rows for row in group])
        track.write_json(output / "eval.json", found)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written to: {error.strerror}") from None
    plot_evaluation(results, output / "eval.png")
    print(f"\n{output}/: eval.json, eval.png, responses.jsonl")
    return found


if __name__ == "__main__":
    help = "model folders, run folders or Hugging Face names"
    run_script(main, Config, __doc__, models=dict(nargs="+", help=help))
