"""How good models are on the test problems of a task, and whether one is better than another.

    python eval.py runs/add                             # a run beside its base model
    python eval.py runs/add --samples 16                # also pass@k and maj@k, up to k = 16
    python eval.py runs/add runs/add-2 runs/add-3       # several runs
    python eval.py Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --limit 200

Writes eval.json (all numbers), eval.png and responses.jsonl (every response) into the folder of the
run; for several models, or a model that is no run, into runs/eval. Intervals are 95 % intervals.
"""

import gc
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Literal

from transformers import PreTrainedTokenizerBase

from engine.choose import choose
from engine.memory import Memory
from engine.sampler import LocalSampler
from lib.checks import check_prompts
from lib.files import find_model, write_json, write_rows
from lib.flags import UserError, check_range, flag, run_script
from lib.plots import plot_evaluation
from lib.progress import Progress
from lib.report import comparison_text, results_table
from lib.run import flags_of_runs, is_run, moved_base, read_config
from lib.stats import at_k, compare_values, mean_interval, right_or_wrong
from policy import DEVICES, DTYPES, load_policy, pick_device, stop_ids
from reward import Rewards, load_measures, load_reward, votes
from sample import Sampling, sample_and_score, sampling_of
from tasks import Problem, Task, load_task, longest_prompts, stable_hash

GROUP = 8  # responses to a prompt where a reward compares them and --samples is not given


@dataclass
class Evaluation:
    """Measures a model on problems that it does not learn from."""

    sampler: Callable  # see engine/sampler.py
    tokenizer: PreTrainedTokenizerBase
    task: Task
    problems: list[Problem]
    measured: Rewards  # models are compared by the first
    sampling: Sampling
    max_new_tokens: int
    # responses sampled per call. It changes no response, and neither do the other problems: each
    # problem has a seed of its own
    rows: int = 256
    label: str = "evaluating"

    def respond(self, greedy=False, group_size=1, seed=0) -> list[list[dict]]:
        """A group for each problem, with a sample for each of its responses: see
        sample.sample_and_score, and the difficulty of the problem."""
        sampling = replace(self.sampling, temperature=0) if greedy else self.sampling
        groups = []
        count = max(1, self.rows // group_size)
        responses = len(self.problems) * group_size
        progress = getattr(self.sampler, "progress", Progress())
        with progress.evaluating(self.label, responses) as bar:
            for start in range(0, len(self.problems), count):
                problems = self.problems[start : start + count]
                seeds = [stable_hash(f"{seed}/{problem.prompt}") for problem in problems]
                _, samples = sample_and_score(
                    problems, seeds, group_size, self.max_new_tokens, sampling,
                    self.task, self.tokenizer, self.sampler, self.measured,
                )  # fmt: skip
                for p, problem in enumerate(problems):
                    group = samples[p * group_size : (p + 1) * group_size]
                    groups.append([{**row, "difficulty": problem.difficulty} for row in group])
                bar.update(len(samples))
        return groups

    def summary(self, greedy=False) -> dict:
        """`summarise` for one sampled response to each problem (or a group, see group_size), and
        the responses. greedy: what is measured is measured for greedy responses as well."""
        measured = self.measured.texts
        size = group_size(self.measured)
        if greedy:
            at_zero = with_values(self.respond(greedy=True, group_size=size), measured)
        groups = self.respond(group_size=size)
        found = with_values(groups, measured)
        found["responses"] = [group[0]["response"] for group in groups]
        return beside_greedy(at_zero, found, measured) if greedy else found

    def metrics(self, summary) -> dict:
        """What metrics.jsonl keeps of a summary."""
        numbers = {}
        for name in self.measured.texts:
            sampled = summary[name].get("sampled", summary[name])
            numbers[f"eval_{name}"] = sampled["mean"]
            numbers[f"eval_{name}_interval"] = sampled["interval"]
        return numbers


def group_size(measured) -> int:
    """Responses to each problem that an evaluation needs: one, unless the reward that is measured
    compares the responses to a prompt."""
    return GROUP if any(mixture.sees_groups for mixture in measured.mixtures.values()) else 1


def means(groups, key) -> list[float]:
    """The mean of a row's `key` for each problem."""
    return [fmean(row[key] for row in group) for group in groups]


def mean_of(groups, name, graded=()) -> dict:
    """{"mean": 0.5, "interval": (0.4, 0.6)}"""
    return mean_interval(means(groups, name), proportion=name not in graded)


def summarise(groups, measured, graded=()) -> dict:
    """The mean of each measure with its interval; thinking and finished (shares), response_length
    (tokens).

    measured: the names of what is measured
    graded:   names of the measures with values other than 0 and 1 in any of the compared runs
    """
    rows = list(chain(*groups))
    numbers = {name: mean_of(groups, name, graded) for name in measured}
    return {
        **numbers,
        "thinking": fmean("</think>" in row["response"] for row in rows),
        "finished": fmean(row["finished"] for row in rows),
        "response_length": fmean(row["length"] for row in rows),
    }


def with_values(groups, measured) -> dict:
    """`summarise`, and for each measure its value for each problem."""
    numbers = summarise(groups, measured)
    for name in measured:
        numbers[name]["values"] = means(groups, name)
    return numbers


def beside_greedy(greedy, sampled, measured) -> dict:
    """Two of `summarise` -> the sampled one, with what is measured for both."""
    both = {name: {"greedy": greedy[name], "sampled": sampled[name]} for name in measured}
    return {**sampled, **both}


def details(groups, measured, graded=()) -> dict:
    """What eval.json has beyond `summarise`: the parts of a mixture, each difficulty if there are
    several ("steps 2" before "steps 10"), and pass@k and maj@k if there are several responses."""
    first, *_ = measured
    numbers = {}
    parts = list(groups[0][0]["parts"])
    if len(parts) > 1:
        rows = list(chain(*groups))
        numbers["parts"] = {part: fmean(row["parts"][part] for row in rows) for part in parts}
    levels = defaultdict(list)
    for group in groups:
        levels[group[0]["difficulty"]].append(group)
    if len(levels) > 1:
        order = sorted(levels, key=lambda level: (len(level), level))
        numbers["by_difficulty"] = {level: mean_of(levels[level], first, graded) for level in order}
    if "accuracy" in measured and len(groups[0]) > 1:
        rule = measured["accuracy"]
        right = [[row["accuracy"] == 1 for row in group] for group in groups]
        answers = [votes(rule, [row["response"] for row in group]) for group in groups]
        numbers |= at_k(answers, right)
    return numbers


def sampling_of_runs(runs, temperature, stop="") -> Sampling:
    """How the runs sampled, in which they must agree; with another temperature if it is not 0, and
    other stop tokens if some are given."""
    found = {sampling_of(flags) for flags in runs.values()} or {Sampling()}
    if temperature:
        found = {replace(sampling, temperature=temperature) for sampling in found}
    if stop:
        found = {replace(sampling, stop=stop) for sampling in found}
    if len(found) > 1:
        raise UserError(f"--temperature: the runs differ in how they sampled ({found})")
    return found.pop()


@dataclass(frozen=True)
class Config:
    task: str = flag("", "add, countdown, gsm8k or a .jsonl file; default: the run's")
    data_dir: str = flag("", "folder with the task's files, if it needs some")
    limit: int = flag(0, "most test problems; 0: all")
    samples: int = flag(1, "responses per problem; above 1 also pass@k and maj@k")
    temperature: float = flag(0.0, "0: the run's, or 1; greedy is measured as well")
    max_new_tokens: int = flag(0, "most tokens of a response; 0: the run's, or 512")
    stop: str = flag("", "more tokens that end a response; default: the run's")
    reward: str = flag("", "what is measured; default: the run's, or the task's rule")
    rows_at_once: int = flag(256, "responses sampled in parallel; changes no number")
    seed: int = flag(0, "same seed, same responses")
    fast: Literal["auto", "off", "compile"] = flag(
        "auto", "off: sample.py's plain `generate`, as edited; compile: torch.compile"
    )
    output: str = flag("", "folder to write into; default: the run's, or runs/eval")
    device: Literal[DEVICES] = flag("auto", "auto: the first of the others that is available")
    dtype: Literal["auto", *DTYPES] = flag("auto", "auto: bfloat16 on cuda, else float32")


def main(config, models) -> dict:
    """Evaluates the models, and the base model of each run. Returns the content of eval.json."""
    check_range(config, 0, "limit max_new_tokens seed temperature")
    check_range(config, 1, "samples rows_at_once", most=1e6)
    for name in models:
        find_model(name)  # a folder that is not there is named before anything else
    runs = {name: read_config(Path(name)) for name in models if is_run(Path(name))}
    for name, flags in runs.items():
        flags["reward"] = flags["true_reward"] or flags["reward"]
        if moved := moved_base(Path(name)):
            if flags.get("lora_rank"):
                raise UserError(f"{moved}: its adapter does not fit that model")
            print(f"warning: {moved}: it is compared with that")
    shared = ["task", "data_dir", "max_new_tokens"]
    if not config.task:
        shared.append("reward")  # that of a run is for the task of the run
    config = flags_of_runs(config, runs, shared)
    if not config.task:
        raise UserError("--task: none of the models is a run that brings its own, name one")
    N = config.max_new_tokens or 512
    device = pick_device(config.device)
    task = load_task(config.task, config.data_dir)
    problems = task.test[: config.limit or None]
    config = replace(config, max_new_tokens=N, reward=config.reward or task.reward)
    load = partial(load_reward, device=device, problems=problems)
    measured = load_measures(task, config.reward, "", load)
    first, *_ = measured.texts
    may_compare = f"--reward {config.reward}: may compare the responses to a prompt"
    if config.reward not in measured.texts.values():
        print(f"{may_compare}, and says little of a model: the accuracy is measured instead")
    size = group_size(measured)
    if config.samples < size:
        config = replace(config, samples=size)
        print(f"{may_compare}: {size} are sampled for each (--samples)")
    one_run = len(models) == 1 and models[0] in runs
    output = Path(config.output or (models[0] if one_run else "runs/eval"))
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written to: {error.strerror}") from None

    # a run is compared with its base model, any other model with the first
    bases = {name: runs[name]["model"] if name in runs else models[0] for name in models}
    in_4_bits = [flags["model"] for flags in runs.values() if flags.get("load_in_4bit")]
    sampled = sampling_of_runs(runs, config.temperature, config.stop)
    groups, results, rows = {}, {}, []
    for name in dict.fromkeys(chain(*zip(bases.values(), bases))):
        policy, tokenizer = load_policy(name, device, config.dtype, name in in_4_bits)
        prompts = longest_prompts(task, problems, tokenizer)
        check_prompts(policy, prompts, N)
        stop = stop_ids(policy, tokenizer, sampled.stop)
        forms = choose(policy, prompts, stop, sampled, N, config.fast)
        memory = Memory({}, rows_at_once=config.rows_at_once)
        sampler = LocalSampler(policy, tokenizer, forms, memory)
        evaluation = Evaluation(
            sampler, tokenizer, task, problems, measured, sampled, N, config.rows_at_once, name
        )
        groups[name] = {
            "greedy": evaluation.respond(greedy=True, group_size=size, seed=config.seed),
            "sampled": evaluation.respond(group_size=config.samples, seed=config.seed),
        }
        for kind, found in groups[name].items():
            rows += [{"model": name, "decoding": kind, **row} for row in chain(*found)]
        del policy, forms, memory, sampler, evaluation  # room for the next model
        gc.collect()

    # by the values of all models, so that their intervals are of one kind
    names = measured.texts
    graded = {name for name in names if not right_or_wrong(row[name] for row in rows)}
    for name, found in groups.items():
        summaries = [summarise(found[kind], names, graded) for kind in found]
        results[name] = beside_greedy(*summaries, names)
        results[name] |= details(found["sampled"], names, graded)

    kinds = f"greedy, and {config.samples} sampled at temperature {sampled.temperature:g}"
    print(f"\n{len(problems)} test problems of {task.name}, responses to each: {kinds}")
    if task.rule_guess:
        total = len(task.train + task.validation + task.test)
        print(f"({config.task} has {total} problems: the others are for training and validation)")
    print()
    print(results_table(results))
    comparisons = []
    pairs = [(base, name) for name, base in bases.items()]
    pairs += [(models[0], name) for name in models[1:]]  # the runs with each other
    for base, name in dict.fromkeys(pairs):
        if name != base:
            pair = {"before": base, "after": name, "measured": first}
            for kind in ("greedy", "sampled"):
                values = [means(groups[model][kind], first) for model in (base, name)]
                pair[kind] = compare_values(*values)
            comparisons.append(pair)
            print("\n" + comparison_text(pair))

    content = {**asdict(config), "n": len(problems), "models": results, "comparisons": comparisons}
    write_rows(output / "responses.jsonl", rows)
    write_json(output / "eval.json", content)
    plot_evaluation(results, output / "eval.png")
    print(f"\n{output}/: eval.json, eval.png, responses.jsonl")
    return content


if __name__ == "__main__":
    models = dict(nargs="+", help="model folders, run folders or Hugging Face names")
    run_script(main, Config, __doc__, models=models)
