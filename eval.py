"""How good models are on the test problems of a task, and whether one is better than another.

    python eval.py runs/add                             # a run beside its base model
    python eval.py runs/add --samples 16                # also pass@k and maj@k, up to k = 16
    python eval.py runs/add runs/add-2 runs/add-3       # several runs
    python eval.py Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --limit 200

Writes eval.json (all numbers), eval.png and responses.jsonl (every response) into the folder of the
run; for several models, or a model that is no run, into runs/eval. Intervals are 95 % intervals.
"""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
from tqdm import tqdm
from transformers.hf_argparser import HfArg

import fast
from fast.memory import halve_on_oom
from lib.files import write_json, write_rows
from lib.flags import UserError, align, check_range, run_script, shorten
from lib.mixture import Mixture
from lib.plots import plot_evaluation
from lib.run import is_run, read_config
from lib.stats import bootstrap, maj_at_k, mcnemar, paired_difference, pass_at_k, wilson
from policy import load_policy, pick_device, stop_ids
from reward import ANSWERS, STRICT_AND_LENIENT, final_answer, last_number, load_reward, score
from sample import Sampling
from tasks import Problem, Task, load_task, prompt_ids, stable_hash

Groups = list[list[dict]]  # for each problem its responses, see `respond`


def respond(
    forms: fast.Forms,
    model,
    tokenizer,
    task: Task,
    problems: list[Problem],
    sampling: Sampling,
    max_new_tokens: int,
    seed: int = 0,
    batch_size: int = 256,
    samples: int = 1,
    label: str = "evaluating",
) -> Groups:
    """-> a group of `samples` rows for each problem: prompt, answer, difficulty, response, length
    (tokens), finished, and right by the task's own rule, whatever a run was rewarded for.

    batch_size: responses sampled at a time. It changes no response, and neither do the other
                problems: each problem has a seed of its own.
    """
    stop = stop_ids(model, tokenizer)
    sizes = {"batch_size": batch_size}
    buffers = {}
    rows = []
    count = max(1, batch_size // samples)
    for start in tqdm(range(0, len(problems), count), label, leave=False):
        batch = problems[start : start + count]
        prompts = [prompt_ids(task, problem, tokenizer) for problem in batch]
        seeds = [stable_hash(f"{seed}/{problem.prompt}") for problem in batch]
        arguments = model, prompts, samples, max_new_tokens, stop, seeds, sampling
        generate = partial(forms.generate, *arguments, buffers=buffers)
        rollout = halve_on_oom(generate, sizes, "batch_size", undo=buffers.clear)

        texts = rollout.responses(tokenizer)
        lengths = rollout.response_lengths.tolist()
        finished = rollout.finished.tolist()
        for b, text in enumerate(texts):  # row b answers problem b // samples
            row = asdict(batch[b // samples])
            row |= {"response": text, "length": lengths[b], "finished": finished[b]}
            rows.append(row)

    values, _ = score_rows(rows, load_reward(task.reward), max_new_tokens)
    for row, value in zip(rows, values):
        row["right"] = value == 1
    return [rows[start : start + samples] for start in range(0, len(rows), samples)]


def score_rows(rows: list[dict], reward: Mixture, max_new_tokens: int) -> tuple[list, dict]:
    """-> the reward of each row, and its parts"""
    columns = [[row[key] for row in rows] for key in ("prompt", "response", "answer", "length")]
    return score(reward, *columns, max_new_tokens)


def average(rows: list[dict], key: str) -> float:
    return fmean(row[key] for row in rows)


def bootstrapped(values: list[float]) -> dict:
    """One value per problem -> mean, and its interval from problems that are drawn again."""
    column = torch.tensor(values, dtype=torch.float64)[:, None]
    return {"accuracy": fmean(values), "interval": bootstrap(column)[0]}


def accuracy(groups: Groups) -> dict:
    """Share of right responses, its interval, and n, the number of problems.

    Wilson's interval for one response per problem. For more the bootstrap over problems, because
    the responses to one problem are alike.
    """
    n = len(groups)
    shares = [average(group, "right") for group in groups]
    found = bootstrapped(shares)
    if len(groups[0]) == 1:
        found["interval"] = wilson(round(sum(shares)), n)
    return {**found, "n": n}


def summarise(groups: Groups) -> dict:
    """accuracy, interval, n, thinking and finished (shares), response_length (tokens)"""
    rows = list(chain(*groups))
    return {
        **accuracy(groups),
        "thinking": fmean("</think>" in row["response"] for row in rows),
        "finished": average(rows, "finished"),
        "response_length": average(rows, "length"),
    }


def evaluate(*arguments, **options) -> dict:
    """`summarise` for one response to each problem, and the responses. Arguments: see `respond`."""
    groups = respond(*arguments, **options)
    return {**summarise(groups), "responses": [group[0]["response"] for group in groups]}


def details(groups: Groups, rule: str, reward: Mixture, max_new_tokens: int) -> dict:
    """What eval.json has beyond `summarise`. Adds reward and parts to each row.

    strict, lenient: accuracies by variants of the task's rule, if the answers are numbers
    """
    rows = list(chain(*groups))
    rewards, parts = score_rows(rows, reward, max_new_tokens)
    for i, row in enumerate(rows):
        row["reward"] = rewards[i]
        row["parts"] = {part: values[i] for part, values in parts.items()}
    found = {"reward": fmean(rewards), "parts": {part: fmean(parts[part]) for part in parts}}

    if rule in STRICT_AND_LENIENT and all(last_number(row["answer"]) for row in rows):
        for form, name in zip(("strict", "lenient"), STRICT_AND_LENIENT[rule]):
            values, _ = score_rows(rows, load_reward(name), max_new_tokens)
            found[form] = fmean(value == 1 for value in values)
    return {**found, **by_difficulty(groups), **at_k(groups, rule)}


def by_difficulty(groups: Groups) -> dict:
    """The accuracy at each difficulty, if there are several: "steps 2" comes before "steps 10"."""
    levels = defaultdict(list)
    for group in groups:
        levels[group[0]["difficulty"]].append(group)
    if len(levels) == 1:
        return {}
    order = sorted(levels, key=lambda level: (len(level), level))
    return {"by_difficulty": {level: accuracy(levels[level]) for level in order}}


def at_k(groups: Groups, rule: str) -> dict:
    """pass@k (one of k is right) and maj@k (the majority of k is) for k = 1, 2, 4 ... samples."""
    samples = len(groups[0])
    if samples == 1:
        return {}
    normalise = ANSWERS.get(rule, str)
    right = [[row["right"] for row in group] for group in groups]
    votes = [[normalise(final_answer(row["response"])) for row in group] for group in groups]
    pass_at = {}
    maj_at = {}
    for k in [2**i for i in range(20) if 2**i < samples] + [samples]:
        pass_at[k] = bootstrapped([pass_at_k(sum(each), samples, k) for each in right])
        maj_at[k] = bootstrapped([maj_at_k(*pair, k) for pair in zip(votes, right)])
    return {"pass_at": pass_at, "maj_at": maj_at}


def compare(before: dict[str, Groups], after: dict[str, Groups]) -> dict[str, dict]:
    """Two models on the same problems, {"greedy": groups, "sampled": groups} each -> the difference
    of their accuracies, its interval, and a verdict.

    greedy:  by McNemar's exact test, from the problems that one of the two has right
    sampled: by whether 0 is in the interval, bootstrapped over problems: what both models find
             hard is no noise
    """
    change = {}  # of each problem's share of right responses
    for kind in ("greedy", "sampled"):
        pairs = zip(before[kind], after[kind])
        change[kind] = [average(new, "right") - average(old, "right") for old, new in pairs]

    gained = change["greedy"].count(1)
    lost = change["greedy"].count(-1)
    n = len(change["greedy"])
    p = mcnemar(gained, lost)
    greedy = {"difference": (gained - lost) / n, "interval": paired_difference(gained, lost, n)}
    greedy |= {"gained": gained, "lost": lost, "p": p, "verdict": "no difference seen"}
    if p < 0.05:
        greedy["verdict"] = "better" if gained > lost else "worse"

    low, high = bootstrapped(change["sampled"])["interval"]
    sampled = {"difference": fmean(change["sampled"]), "interval": (low, high)}
    sampled["verdict"] = "better" if low > 0 else "worse" if high < 0 else "no difference seen"
    return {"greedy": greedy, "sampled": sampled}


def results_table(results: dict[str, dict]) -> str:
    """{name: {"greedy": evaluation, "sampled": evaluation}} -> a column per model: both accuracies,
    and below them all other numbers of the sampled responses."""
    columns = {}
    for name, result in results.items():
        columns[name] = number_texts({**result, **result["sampled"]})
        del columns[name]["accuracy"]  # stands in the line "sampled"
    lines = [["", *columns]]
    for title in columns[name]:
        lines.append([title, *(column[title] for column in columns.values())])
    return align(lines)


def number_texts(numbers: dict, prefix: str = "") -> dict[str, str]:
    """{"reward": 0.9, "pass_at": {2: {"accuracy": 0.5, "interval": (0.4, 0.6)}}}
    -> {"reward": "0.900", "pass@2": "0.500 [0.400, 0.600]"}"""
    texts = {}
    for key, value in numbers.items():
        title = f"{prefix}{key}".replace("_at ", "@")
        if isinstance(value, float):
            texts[title] = f"{value:.3f}"
        elif isinstance(value, dict) and "interval" in value:
            low, high = value["interval"]
            texts[title] = f"{value['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
        elif isinstance(value, dict):
            texts |= number_texts(value, f"{key} ")
    return texts


def print_comparison(pair: dict) -> None:
    print(f"\n{pair['after']} against {pair['before']}, on the same problems:")
    for kind in ("greedy", "sampled"):
        found = pair[kind]
        low, high = found["interval"]
        difference = f"{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        print(f"    {kind:7}  {difference}  {found['verdict']}")
    counts = "{gained} problems gained, {lost} lost; exact McNemar test: p = {p:.2g}"
    print(f"    greedy:  {counts.format(**pair['greedy'])}")


def report(run_folder: Path, task: Task, problems: list[Problem]) -> None:
    """Prints what training changed on held-out problems, and three of them in full."""
    results = {}
    for when in ("before", "after"):
        results[when] = json.loads((run_folder / f"{when}.json").read_text())
    print(f"\n{len(problems)} held-out problems of task {task.name}, 95 % Wilson intervals\n")
    print(results_table(results))
    for i, problem in enumerate(problems[:3]):
        print(f"\n{shorten(problem.prompt)}")
        for when, result in results.items():
            print(f"  {when}: {shorten(result['sampled']['responses'][i])}")


@dataclass(frozen=True)
class Config:
    task: str = HfArg(default="", help="add, countdown, gsm8k or a .jsonl file; default: the run's")
    data_dir: str = HfArg(default="", help="folder with the task's files, if it needs some")
    limit: int = HfArg(default=0, help="at most so many test problems; 0: all")
    samples: int = HfArg(default=1, help="responses per problem; above 1 also pass@k and maj@k")
    temperature: float = HfArg(default=1.0, help="of the sampled responses; others are greedy")
    max_new_tokens: int = HfArg(default=0, help="most tokens of a response; 0: the run's, or 512")
    reward: str = HfArg(default="", help="to report its mean; default: the run's, or the task's")
    batch_size: int = HfArg(default=256, help="responses sampled at a time; changes no number")
    seed: int = HfArg(default=0, help="same seed, same responses")
    output: str = HfArg(default="", help="folder to write into; default: the run's, or runs/eval")
    device: Literal["auto", "cuda", "mps", "cpu"] = HfArg(default="auto", help="auto: GPU if there")
    dtype: Literal["auto", "float32", "bfloat16"] = HfArg(default="auto", help="auto: bfloat16 on GPU")


def fill_in(config: Config, runs: dict[str, dict]) -> Config:
    """Takes the flags that were not given from the runs, which must agree in them."""
    flags = ["task", "data_dir", "max_new_tokens"]
    if not config.task:
        flags.append("reward")  # that of a run is for the task of the run
    for flag in flags:
        values = list(dict.fromkeys(run[flag] for run in runs.values()))
        if getattr(config, flag) or not values:
            continue
        if len(values) > 1:
            listed = ", ".join(map(repr, values))
            raise UserError(f"--{flag}: the runs differ in it ({listed}), give one for all")
        config = replace(config, **{flag: values[0]})
    return config


def main(config: Config, models: list[str]) -> dict:
    """Evaluates the models, and the base model of each run. Returns the content of eval.json."""
    check_range(config, 0, "limit max_new_tokens seed")
    check_range(config, 1, "samples batch_size", most=1e6)
    check_range(config, 1e-4, "temperature", most=1e9)
    runs = {name: read_config(Path(name)) for name in models if is_run(Path(name))}
    config = fill_in(config, runs)
    if not config.task:
        reason = "none of the models is a run that brings a task of its own"
        raise UserError(f"--task: {reason}, name one: add, gsm8k ...")
    task = load_task(config.task, config.data_dir)
    problems = task.test[: config.limit or None]
    max_new_tokens = config.max_new_tokens or 512
    device = pick_device(config.device)
    reward_text = config.reward or task.reward
    reward = load_reward(reward_text, device)
    output = Path(models[0] if list(runs) == models else "runs/eval")
    if config.output:
        output = Path(config.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written to: {error.strerror}") from None

    # a run is compared with its base model, any other model with the first
    pairs = []
    for name in models:
        pairs.append((runs[name]["model"] if name in runs else models[0], name))
    sampled = Sampling(config.temperature)
    kinds = {"greedy": (Sampling(0), 1), "sampled": (sampled, config.samples)}
    responses, results, rows = {}, {}, []
    for name in dict.fromkeys(chain(*pairs)):
        policy, tokenizer = load_policy(name, device, config.dtype)
        ids = sorted((prompt_ids(task, problem, tokenizer) for problem in problems), key=len)
        stop = stop_ids(policy, tokenizer)
        forms = fast.choose(policy, ids[-3:], stop, sampled, max_new_tokens)
        responses[name], results[name] = {}, {}
        for kind, (sampling, samples) in kinds.items():
            label = f"{name}, {kind}"
            arguments = forms, policy, tokenizer, task, problems, sampling, max_new_tokens
            groups = respond(*arguments, config.seed, config.batch_size, samples, label)
            found = summarise(groups) | details(groups, task.reward, reward, max_new_tokens)
            responses[name][kind] = groups
            results[name][kind] = found
            for row in chain(*groups):
                rows.append({"model": name, "decoding": kind, **row})

    sampled = f"{config.samples} sampled at temperature {config.temperature:g}"
    print(f"\n{len(problems)} test problems of {task.name}, for each a greedy response and {sampled}\n")
    print(results_table(results))
    comparisons = []
    for base, name in pairs:
        if base != name:
            comparisons.append({"before": base, "after": name})
            comparisons[-1] |= compare(responses[base], responses[name])
            print_comparison(comparisons[-1])
    content = {
        "task": task.name,
        "n": len(problems),
        "samples": config.samples,
        "temperature": config.temperature,
        "max_new_tokens": max_new_tokens,
        "reward": reward_text,
        "seed": config.seed,
        "models": results,
        "comparisons": comparisons,
    }
    write_rows(output / "responses.jsonl", rows)
    write_json(output / "eval.json", content)
    plot_evaluation(results, output / "eval.png")
    print(f"\n{output}/: eval.json, eval.png, responses.jsonl")
    return content


if __name__ == "__main__":
    models = dict(nargs="+", help="model folders, run folders or Hugging Face names")
    run_script(main, Config, __doc__, models=models)
