"""Measure the speed and memory of sampling and of the update.

    python -m tools.bench                                            # a tiny model
    python -m tools.bench --stop_prob 0.0118 --max_new_tokens 256    # responses end at random
    python -m tools.bench --preset qwen2.5-0.5b --prompts_per_step 4 --max_new_tokens 506

Sampling is compared with transformers' model.generate, and both phases with the least time in which
the machine could move the bytes and compute the products that they need. The parameters are random,
so nothing is downloaded. What is compared runs in turn, and medians are shown. Seconds are CPU
seconds on a CPU (set OMP_NUM_THREADS=1: a thread that waits for another counts too), else wall
seconds. All numbers go to bench.json.
"""

import json
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import fast
import train
from fast.memory import SHAPES, cache_bytes, shape
from fast.optimizer import Optimizer
from lib.flags import check_range, flag, run_script
from loss import DENOMINATORS
from policy import pick_device
from sample import Sampling


@dataclass(frozen=True)
class Config:
    preset: Literal[tuple(SHAPES)] = flag("tiny", "shape, see fast/memory.py")
    prompts_per_step: int = flag(16, "P, prompts")
    group_size: int = flag(16, "G, responses to each prompt")
    prompt_length: int = flag(6, "tokens of a prompt")
    max_new_tokens: int = flag(64, "tokens after which a response is truncated")
    stop_prob: float = flag(
        0.0, "share of the vocabulary that ends a response; 0: all have full length"
    )
    repeats: int = flag(5, "times that each is run")
    device: Literal["auto", "cuda", "cpu"] = flag("auto", "auto: cuda if available")


def timed(function, device) -> tuple[float, Any]:
    """-> seconds, what the function returned"""

    def clock() -> float:
        if device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    start = clock()
    result = function()
    return clock() - start, result


def machine_speed(device, dtype) -> dict[str, float]:
    """Bytes per second (read and written) of a copy larger than the caches, and operations per
    second of a large matrix product."""
    source = torch.zeros(1 << 28, dtype=torch.uint8, device=device)  # 268 MB
    target = torch.zeros_like(source)
    n = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(n, n, device=device).to(dtype)
    copies = [timed(lambda: target.copy_(source), device)[0] for _ in range(6)]
    products = [timed(lambda: matrix @ matrix, device)[0] for _ in range(6)]
    return {  # without the first, which warms up
        "bytes": 2 * len(source) / median(copies[1:]),
        "operations": 2 * n**3 / median(products[1:]),
    }


def peak_memory(device) -> float:
    """GB: the most that tensors took so far on a GPU, or the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in kB


def least_work(model, rollout, P) -> dict[str, dict[str, float]]:
    """The bytes and operations that sampling and the update need at least: each prompt is run once,
    and there is no padding.

    A product with a matrix of n parameters takes 2n operations per token, and three times that with
    its backward pass. Sampling reads all parameters at each step, and a row's keys and values for
    each of its tokens.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    tables = head.numel() if head is embedding else 2 * head.numel()
    body = model.num_parameters() - tables

    n = rollout.response_lengths.double()  # (B,)
    p = int(rollout.prompt_lengths[0])  # all prompts have the same length
    response_tokens = n.sum().item()
    prompt_tokens = P * (p - 1)  # the last token of a prompt is run with each response
    # pairs of a token and a token that it attends to
    attended = (n * (2 * p + n - 1) / 2).sum().item()
    attended_in_prompts = P * p * (p - 1) / 2

    operations = 2 * body * (response_tokens + prompt_tokens)
    operations += 2 * head.numel() * response_tokens
    layers = config.num_hidden_layers * config.hidden_size
    operations += 4 * layers * (attended + attended_in_prompts)
    bytes_each = model.dtype.itemsize
    moved = n.max().item() * (body + head.numel()) * bytes_each
    moved += attended * cache_bytes(config, bytes_each)
    return {
        "generate": {"operations": operations, "bytes": moved},
        "update": {"operations": 3 * operations},
    }


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
        top_p=1.0,
    )
    return ids[:, len(prompts[0]) :]


def count_tokens(responses, stop) -> int:
    """(B, N) tokens -> how many there are up to the first stop token of each row, inclusive."""
    is_stop = torch.isin(responses, torch.tensor(stop, dtype=torch.long, device=responses.device))
    stops_before = is_stop.cumsum(1) - is_stop.long()
    return int((stops_before == 0).sum())


def make_update(forms, model, rollout) -> Callable:
    """A function that updates the model with learning rate 0, so that the model stays the same, and
    returns the number of response tokens. Every response has a weight."""
    flags = train.Config()
    rows = torch.arange(len(rollout.ids), device=model.device)
    weights = torch.randn(len(rows), 1).to(model.device)
    loss_scale = DENOMINATORS[flags.denominator](rollout.response_lengths, flags)
    optimizer = Optimizer(model, weight_decay=0.0)

    def update() -> int:
        train.backward(
            forms,
            model,
            rollout,
            rows,
            weights,
            loss_scale,
            ref_logprobs=None,
            on_policy=True,
            config=flags,
            micro_batch_tokens=flags.micro_batch_tokens,
        )
        optimizer.step(lr=0.0, max_grad_norm=1.0)
        return int(rollout.response_lengths.sum())

    return update


def report(config, found) -> str:
    """The table: medians, the seconds that the machine would need at best, the share reached."""
    speed = found["machine"]
    copies = f"{speed['bytes'] / 1e9:.1f} GB/s"
    multiplies = f"{speed['operations'] / 1e9:,.0f} GFLOP/s"
    lines = [
        f"{config.preset} in {found['dtype']}; {found['device']}: copies {copies}, {multiplies}",
        f"{'':16}{'tokens/s':>12}{'seconds':>10}{'at best':>10}{'share':>8}{'peak GB':>9}",
    ]
    for name, runs in found["seconds"].items():
        seconds = median(runs)
        line = f"{name:16}{median(found['tokens/s'][name]):12,.0f}{seconds:10.4f}"
        if name in found["needs"]:
            best = max(amount / speed[unit] for unit, amount in found["needs"][name].items())
            line += f"{best:10.4f}{best / seconds:8.2f}"
        else:
            line += 18 * " "
        lines.append(line + f"{found['memory'][name]:9.2f}")
    pairs = zip(found["tokens/s"]["generate"], found["tokens/s"]["model.generate"])
    ratio = median(ours / theirs for ours, theirs in pairs)
    lines.append(f"generate is {ratio:.2f} times as fast as model.generate")
    return "\n".join(lines)


def main(config) -> None:
    sizes = "prompts_per_step group_size prompt_length max_new_tokens repeats"
    check_range(config, 1, sizes, most=1e6)
    check_range(config, 0, "stop_prob", most=1)
    device = pick_device(config.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(shape(config.preset), dtype=dtype).eval()
    V = model.config.vocab_size
    P, G, N = config.prompts_per_step, config.group_size, config.max_new_tokens
    stop = list(range(V - round(config.stop_prob * V), V))
    prompts = torch.randint(V, (P, config.prompt_length)).tolist()
    sampling = Sampling()
    forms = fast.choose(model, prompts, stop, sampling, N)
    arguments = (model, prompts, G, N, stop, range(P), sampling)
    buffers = {}
    rollout = forms.generate(*arguments, buffers=buffers)

    def sample() -> int:
        new = forms.generate(*arguments, buffers=buffers)
        return int(new.response_lengths.sum())

    def reference() -> int:
        return count_tokens(transformers_generate(model, prompts, G, N, stop), stop)

    update = make_update(forms, model, rollout)
    work = {"generate": sample, "update": update, "model.generate": reference}
    seconds, speed, memory = defaultdict(list), defaultdict(list), {}
    for repeat in range(config.repeats + 1):
        for name, function in work.items():
            took, tokens = timed(function, device)
            if repeat == 0:  # warms up, and shows the memory
                memory[name] = peak_memory(device)
            else:
                seconds[name].append(took)
                speed[name].append(tokens / took)
    found = {
        "config": asdict(config),
        "dtype": str(dtype),
        "device": device.type,
        "seconds": seconds,
        "tokens/s": speed,
        "memory": memory,
        "machine": machine_speed(device, dtype),
        "needs": least_work(model, rollout, P),
    }
    Path("bench.json").write_text(json.dumps(found, indent=1) + "\n")
    print(report(config, found))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
