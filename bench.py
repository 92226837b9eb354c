"""Speed and memory of sampling and of the update, beside model.generate and beside what the machine can do.

    python bench.py                                                     # a tiny model, on the GPU if there is one
    python bench.py --stop_prob 0.0118 --max_new_tokens 256             # responses that end at random
    python bench.py --preset qwen2.5-0.5b --prompts_per_step 4 --max_new_tokens 506
    python bench.py --against ../other                                  # and the sample.py of another checkout

Weights are random, so nothing is downloaded. What is compared runs in turn. Seconds are CPU seconds on a CPU (set
OMP_NUM_THREADS=1: a thread that waits for another counts too), wall seconds on a GPU. All numbers go to bench.json.
"""

import importlib
import json
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch.profiler import profile
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.hf_argparser import HfArg

import train
from flags import UserError, need, run_script
from loss import choose
from memory import SHAPES, cache_bytes, shape
from policy import Optimizer, pick_device
from sample import Rollout, generate
from update import Learner

PHASES = "generate", "backward", "optimizer"


@dataclass(frozen=True)
class Config:
    preset: Literal[tuple(SHAPES)] = HfArg(default="tiny", help="shape of the model, see memory.py")
    prompts_per_step: int = HfArg(default=16, help="P, prompts")
    group_size: int = HfArg(default=16, help="G, responses to each prompt")
    prompt_length: int = HfArg(default=6, help="tokens of a prompt")
    max_new_tokens: int = HfArg(default=64, help="tokens after which a response is cut")
    stop_prob: float = HfArg(default=0.0, help="share of the vocabulary that ends a response; 0: all have full length")
    micro_batch_tokens: int = HfArg(default=4096, help="tokens in one forward pass of the update")
    repeats: int = HfArg(default=5, help="times that each is run; medians are shown")
    against: str = HfArg(default="", help="folder with another sample.py to run in turn")
    device: Literal["auto", "cuda", "cpu"] = HfArg(default="auto", help="auto: cuda if it is there")


def timed(function: Callable, device: torch.device) -> tuple[float, Any]:
    """-> (seconds, what it returned)"""
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if device.type == "cpu" else time.perf_counter()

    began = now()
    result = function()
    return now() - began, result


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes a second (read or written) of a copy that no cache holds, and operations a second of a matrix product."""
    block, target = torch.zeros(2, 1 << 28, dtype=torch.uint8, device=device)  # 268 MB each
    n = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(n, n, device=device).to(dtype)
    copies, products = ([timed(function, device)[0] for _ in range(6)][1:]
                        for function in (lambda: target.copy_(block), lambda: matrix @ matrix))
    return {"bytes": 2 * block.numel() / median(copies), "operations": 2 * n**3 / median(products)}


def peak_memory(device: torch.device) -> float:
    """GB: the most that tensors took so far on a GPU; on a CPU the whole process (Linux counts it in kB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def count(model: PreTrainedModel, rollout: Rollout, groups: int) -> dict[str, dict[str, float]]:
    """The bytes and operations without which a rollout and its update cannot be had: each prompt run once, no padding.

    Sampling reads the weights once a step and a row's keys and values once a token; a product with a matrix of n
    weights takes 2n operations a token, three times that with its backward pass.
    """
    config = model.config.get_text_config()
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    head, body = head.numel(), model.num_parameters() - len({head, table}) * head.numel()
    starts, ends = rollout.prompt_lengths.double(), rollout.lengths.double()
    prompts, responses = starts.view(groups, -1)[:, 0] - 1, (ends - starts).sum().item()  # its last token is a row's
    seen = ((starts + ends - 1) * (ends - starts) / 2).sum().item()  # keys that all response tokens look at
    attention = 4 * config.num_hidden_layers * config.hidden_size * (seen + (prompts * (prompts + 1) / 2).sum().item())
    operations = 2 * body * (responses + prompts.sum().item()) + 2 * head * responses + attention
    weights = (body + head) * model.dtype.itemsize * (ends - starts).max().item()
    moved = weights + seen * cache_bytes(config, model.dtype.itemsize)
    return {"generate": {"operations": operations, "bytes": moved}, "backward": {"operations": 3 * operations}}


def others(config: Config, arguments: tuple) -> dict[str, Callable]:
    """What `generate` is compared with, on the same arguments: model.generate, and `generate` of another checkout."""
    model, prompts, group_size, most, stop, _ = arguments
    ids = torch.tensor(prompts, device=model.device).repeat_interleave(group_size, 0)

    @torch.no_grad()
    def theirs() -> torch.Tensor:
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, eos_token_id=stop or None,
                              pad_token_id=0, do_sample=True, top_k=0, top_p=1.0)[:, ids.shape[1]:]

    if not config.against:
        return {"model.generate": theirs}
    scripts = {path.stem for path in Path(config.against).glob("*.py")}
    if "sample" not in scripts:
        raise UserError(f"--against {config.against}: there is no sample.py in that folder")
    ours = {name: sys.modules.pop(name) for name in scripts & set(sys.modules)}  # theirs imports its own neighbours
    sys.path.insert(0, config.against)
    module = importlib.import_module("sample")
    sys.path.pop(0)
    sys.modules.update(ours)
    return {"model.generate": theirs, "against": partial(module.generate, *arguments)}


def tokens(responses: Rollout | torch.Tensor, stop: list[int]) -> int:
    """Tokens of all responses, those after the first stop token not among them."""
    if not isinstance(responses, torch.Tensor):
        return int(responses.response_lengths.sum())
    ends = torch.isin(responses, torch.tensor(stop, dtype=torch.long, device=responses.device)).long()
    return int((ends.cumsum(1) - ends == 0).sum())


def updates(config: Config, model: PreTrainedModel, rollout: Rollout) -> dict[str, Callable]:
    """The two halves of an update in which every response has a weight. At learning rate 0 the model stays the same."""
    optimizer, token_losses, device = Optimizer(model, 0.0), choose(train.Config())[3], model.device
    weights = torch.randn(len(rollout.ids), generator=torch.Generator().manual_seed(0)).to(device)
    factors = (1 / rollout.response_lengths.sum()).expand(len(weights))
    rows = torch.arange(len(weights), device=device)
    arguments = rollout, rows, token_losses, rollout.logprobs, rollout.logprobs, weights, factors
    return {"backward": partial(Learner(model).backward, *arguments, micro_batch_tokens=config.micro_batch_tokens),
            "optimizer": partial(optimizer.step, lr=0.0, max_grad_norm=1.0)}


def busiest(function: Callable, device: torch.device) -> dict[str, float]:
    """The operations that take most of the time, and their shares of it."""
    with profile() as profiler:
        function()
    kind = f"self_{'cpu' if device.type == 'cpu' else 'device'}_time_total"
    times = {event.key.removeprefix("aten::"): getattr(event, kind) for event in profiler.key_averages()}
    return {name: times[name] / sum(times.values()) for name in sorted(times, key=times.get, reverse=True)[:4]}


def report(config: Config, model: PreTrainedModel, found: dict) -> str:
    """The table: medians, the seconds that the machine's own speed would allow, and the share of it reached."""
    speed, needs, machine = found["tokens/s"], found["needs"], found["machine"]
    seconds = {name: median(runs) for name, runs in found["seconds"].items()}
    floors = {phase: max(needs[phase][what] / machine[what] for what in needs[phase]) for phase in needs}
    lines = [f"{config.preset} in {model.dtype} on {model.device.type}, which copies {machine['bytes'] / 1e9:.1f} GB/s "
             f"and multiplies {machine['operations'] / 1e9:,.0f} GFLOP/s",
             f"{'':16}{'tokens/s':>12}{'seconds':>10}{'at best':>10}{'share':>8}{'peak GB':>9}"]
    for name, took in seconds.items():
        floor = f"{floors[name]:10.4f}{floors[name] / took:8.2f}" if name in floors else " " * 18
        memory = f"{found['memory'][name]:9.2f}" if name in PHASES else ""
        lines.append(f"{name:16}{median(speed[name]):12,.0f}{took:10.4f}{floor}{memory}".rstrip())
    for name in list(seconds)[len(PHASES):]:
        ratio = median(ours / theirs for ours, theirs in zip(speed["generate"], speed[name]))
        lines.append(f"generate is {ratio:.2f} times as fast as {name}")
    phases = {name: seconds[name] / sum(seconds[name] for name in PHASES) for name in PHASES}
    for name, shares in {"a step": phases, **found["busiest"]}.items():
        lines.append(f"the time of {name}: " + ", ".join(f"{key} {share:.0%}" for key, share in shares.items()))
    return "\n".join(lines)


def main(config: Config) -> None:
    """Everything in turn; the first round warms up and shows the memory."""
    need(config, 1, "prompts_per_step group_size prompt_length max_new_tokens micro_batch_tokens repeats", most=1e6)
    need(config, 0, "stop_prob", most=1)
    device = pick_device(config.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(shape(config.preset), dtype=dtype).eval()
    V = model.config.vocab_size
    stop = list(range(V - round(config.stop_prob * V), V))
    prompts = torch.randint(V, (config.prompts_per_step, config.prompt_length)).tolist()
    arguments = model, prompts, config.group_size, config.max_new_tokens, stop, list(range(len(prompts)))
    rollout = generate(*arguments)
    work = {"generate": partial(generate, *arguments, kept={}), **updates(config, model, rollout),
            **others(config, arguments)}
    seconds, speed, memory = defaultdict(list), defaultdict(list), {}
    for repeat, (name, function) in product(range(config.repeats + 1), work.items()):
        took, result = timed(function, device)
        memory.setdefault(name, peak_memory(device))
        if repeat > 0:
            seconds[name].append(took)
            speed[name].append(tokens(rollout if name in PHASES[1:] else result, stop) / took)
    found = {"config": asdict(config), "seconds": seconds, "tokens/s": speed, "memory": memory,
             "machine": machine(device, dtype), "needs": count(model, rollout, len(prompts)),
             "busiest": {name: busiest(work[name], device) for name in PHASES[:2]}}
    Path("bench.json").write_text(json.dumps(found, indent=1) + "\n")
    print(report(config, model, found))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
