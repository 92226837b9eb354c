"""Measure the speed and memory of sampling and of the update.

    python -m tools.bench                                            # a tiny model
    python -m tools.bench --stop_prob 0.0118 --max_new_tokens 256    # responses end at random
    python -m tools.bench --preset qwen2.5-0.5b --prompts_per_step 4 --max_new_tokens 506

Sampling is compared with transformers' model.generate, and both phases with the least time in which
the machine could move the bytes and compute the products that they need. The parameters are random,
so nothing is downloaded. What is compared runs in turn, and medians are shown. Seconds are CPU
seconds on a CPU (set OMP_NUM_THREADS=1: a thread that waits for another counts too), else wall
seconds.
"""

import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs from any folder

import engine.choose
import train
from engine.learner import Learner
from engine.memory import Memory
from lib.estimate import SHAPES, cache_bytes, shape
from lib.flags import check_range, flag, run_script
from lib.head import float32_logits
from policy import pick_device

try:
    import resource
except ImportError:  # Windows: the memory of the process is not known
    resource = None
from sample import Rollout, Sampling


@dataclass(frozen=True)
class Config:
    preset: Literal[tuple(SHAPES)] = flag("tiny", "shape, see engine/memory.py")
    prompts_per_step: int = flag(16, "P, prompts")
    group_size: int = flag(16, "G, responses to each prompt")
    prompt_length: int = flag(6, "tokens of a prompt")
    max_new_tokens: int = flag(64, "tokens after which a response is truncated")
    stop_prob: float = flag(
        0.0, "share of the vocabulary that ends a response; 0: all have full length"
    )
    repeats: int = flag(5, "times that each is run")
    fast: Literal["auto", "compile"] = flag("auto", "compile: torch.compile for sampling")
    device: Literal["auto", "cuda", "cpu"] = flag("auto", "auto: cuda if available")


def timed(function, device) -> float:
    """The seconds that a call of the function takes."""

    def clock() -> float:
        if device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    start = clock()
    function()
    return clock() - start


def machine_speed(device, dtype) -> tuple[float, float]:
    """Bytes per second (read and written) of a copy larger than the caches, and operations per
    second of a large matrix product."""
    source = torch.zeros(1 << 28, dtype=torch.uint8, device=device)  # 268 MB
    target = torch.zeros_like(source)
    n = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(n, n, device=device).to(dtype)
    # the first run warms up, which does not move the median
    copying = median(timed(lambda: target.copy_(source), device) for _ in range(7))
    multiplying = median(timed(lambda: matrix @ matrix, device) for _ in range(7))
    return 2 * len(source) / copying, 2 * n**3 / multiplying


def peak_memory(device) -> float:
    """GB: the most that tensors took on a GPU since the last reset, or the whole process so far on
    a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if resource is None:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in kB


def least_work(model, rollout, P) -> tuple[float, float]:
    """The bytes and operations that sampling needs at least: each prompt is run once, and there is
    no padding.

    A product with a matrix of n parameters takes 2n operations per token. Sampling reads all
    parameters at each step, and a row's keys and values for each of its tokens.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight.numel()
    body = model.base_model.num_parameters() - model.get_input_embeddings().weight.numel()

    n = rollout.response_lengths.double()  # (B,)
    p = int(rollout.prompt_lengths[0])  # all prompts have the same length
    response_tokens = n.sum().item()
    tokens = response_tokens + P * (p - 1)  # the last token of a prompt is run with each response
    # pairs of a token and a token that it attends to
    attended = (n * (2 * p + n - 1) / 2).sum().item()
    attended_in_prompts = P * p * (p - 1) / 2

    layers = config.num_hidden_layers * config.hidden_size
    operations = 2 * body * tokens + 2 * head * response_tokens
    operations += 4 * layers * (attended + attended_in_prompts)
    bytes_each = model.dtype.itemsize
    moved = n.max().item() * (body + head) * bytes_each
    moved += attended * cache_bytes(config, bytes_each)
    return moved, operations


@torch.no_grad()
def transformers_generate(model, prompts, group_size, max_new_tokens, stop) -> Tensor:
    """The same by transformers' own method -> (B, N) response tokens."""
    ids = torch.tensor(prompts, device=model.device).repeat_interleave(group_size, 0)
    ids = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        eos_token_id=stop or None,
        pad_token_id=0,
        do_sample=True,
        top_k=0,
    )
    return ids[:, len(prompts[0]) :]


def count_tokens(responses, stop) -> int:
    """(B, N) tokens -> how many there are up to the first stop token of each row, inclusive."""
    is_stop = torch.isin(responses, torch.tensor(stop, dtype=torch.long, device=responses.device))
    stops_before = is_stop.cumsum(1) - is_stop.long()
    return int((stops_before == 0).sum())


def update(learner, rollout) -> None:
    """An update with learning rate 0, so that the model stays the same. Every response has a
    weight."""
    B = len(rollout.ids)
    weights = torch.randn(B, 1).to(rollout.ids.device)
    scale = 1.0 / rollout.response_lengths[:, None]
    batch = train.Batch(*vars(rollout).values(), weights, rollout.old_logprobs, scale)
    learner.update(train.backward, batch, lr=0.0, on_policy=True)


def main(config) -> None:
    sizes = "prompts_per_step group_size prompt_length max_new_tokens repeats"
    check_range(config, 1, sizes, most=1e6)
    check_range(config, 0, "stop_prob", most=1)
    device = pick_device(config.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(shape(config.preset), dtype=dtype).eval()
    float32_logits(model)
    V = model.config.vocab_size
    P, G, N = config.prompts_per_step, config.group_size, config.max_new_tokens
    stop = list(range(V - round(config.stop_prob * V), V))
    prompts = torch.randint(V, (P, config.prompt_length)).tolist()
    sampling = Sampling()
    forms = engine.choose.choose(model, prompts, stop, sampling, N, config.fast)
    buffers = {}
    flags = train.Config()
    memory = Memory({}, micro_batch_tokens=flags.micro_batch_tokens)
    learner = Learner(model, forms, memory, flags)

    def sample() -> Rollout:
        return forms.generate(model, prompts, G, N, stop, range(P), sampling, buffers=buffers)

    def reference() -> Tensor:
        torch.manual_seed(0)  # the same responses each time
        return transformers_generate(model, prompts, G, N, stop)

    rollout = sample()
    work = {
        "generate": sample,
        "update": partial(update, learner, rollout),
        "model.generate": reference,
    }
    seconds = {name: [] for name in work}
    memory = {}
    for _ in range(config.repeats + 1):  # the first warms up
        for name, function in work.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds[name].append(timed(function, device))
            memory[name] = max(memory.get(name, 0), peak_memory(device))

    tokens = dict.fromkeys(work, int(rollout.response_lengths.sum()))
    tokens["model.generate"] = count_tokens(reference(), stop)
    copying, computing = machine_speed(device, dtype)
    moved, operations = least_work(model, rollout, P)
    best = {  # seconds; a backward pass takes twice the operations of the forward pass
        "generate": max(moved / copying, operations / computing),
        "update": 3 * operations / computing,
    }
    print(f"{config.preset} in {dtype} on {device.type}, which copies {copying / 1e9:.1f} GB/s")
    print(f"and multiplies matrices at {computing / 1e9:,.0f} GFLOP/s")
    print("                    tokens/s   seconds  peak GB   at best   share")
    rates = {}
    for name in work:
        typical = median(seconds[name][1:])
        rates[name] = tokens[name] / typical
        line = f"{name:16}{rates[name]:12,.0f}{typical:10.4f}{memory[name]:9.2f}"
        if name in best:
            line += f"{best[name]:10.4f}{best[name] / typical:8.2f}"
        print(line)
    ratio = rates["generate"] / rates["model.generate"]
    print(f"generate is {ratio:.2f} times as fast as model.generate")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
