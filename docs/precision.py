"""The figures and the picture of docs/precision.md.

    python docs/precision.py curves                  # runs in float32, nearest, stochastic
    python docs/precision.py share --model FOLDER    # weights that change, by rate
    python docs/precision.py forms --model FOLDER    # rounding, the fast form, and faults of it
    python docs/precision.py gap --model FOLDER      # between sampler and learner, by the head
    python docs/precision.py plot                    # docs/precision.png

A CPU without units for bfloat16 is 60 times slower in it than in float32. So products are computed
in float32 from bfloat16 numbers and rounded once, as a GPU does; --native leaves that out.
"""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.logprobs
import engine.optimizer
import loss
import sample
import train
from engine import choose
from lib.files import read_rows
from lib.flags import flag, parse, run_script
from policy import load_policy
from sample import Sampling

matplotlib.use("Agg")
import matplotlib.pyplot as plt

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.bmm.default, aten.addmm.default)
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
MODES = ("float32", "nearest", "stochastic")


class FloatProducts(TorchDispatchMode):
    """bfloat16 products, computed in float32 and rounded once."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        first = arguments[0] if arguments else None
        if not (torch.is_tensor(first) and first.dtype == torch.bfloat16):
            return function(*arguments, **options)
        inputs = [widen(argument) for argument in arguments]
        if function is aten.mm.out:
            return options["out"].copy_(torch.mm(*inputs))
        options = {name: widen(option) for name, option in options.items()}
        if function in PRODUCTS:
            return function(*inputs, **options).bfloat16()
        if function is ATTENTION:
            out, normaliser = function(*inputs, **options)
            return out.bfloat16(), normaliser
        if function is ATTENTION_BACKWARD:
            return tuple(gradient.bfloat16() for gradient in function(*inputs, **options))
        return function(*arguments, **options)


def widen(thing):
    if torch.is_tensor(thing) and thing.dtype == torch.bfloat16:
        return thing.float()
    return thing


def curves(config):
    """A run for each mode and seed."""
    stochastic = engine.optimizer.round_stochastically
    for seed in map(int, config.seeds.split(",")):
        for mode in config.modes.split(","):
            nearest = mode == "nearest"
            rounding = (lambda values, *key: values.bfloat16()) if nearest else stochastic
            engine.optimizer.round_stochastically = rounding
            dtype = "float32" if mode == "float32" else "bfloat16"
            words = [
                *config.flags.split(),
                "--model",
                config.model,
                "--dtype",
                dtype,
                "--seed",
                str(seed),
            ]
            words += ["--name", f"{config.name}-{mode}-{seed}", "--runs_dir", config.folder]
            emulate = dtype == "bfloat16" and not config.native
            with FloatProducts() if emulate else contextlib.nullcontext():
                train.main(parse(train.Config, train.HELP, words, train.fill)[0])


def share(config):
    """Of the weights of a model that starts on bfloat16 numbers, after each has moved by some
    distance: the share whose bfloat16 copy is another one, and how much of the move is in the
    copies (1: all of it, on average)."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.bfloat16)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    sign = torch.where(torch.rand(weights.shape) < 0.5, -1.0, 1.0)
    print("            nearest            at random")
    print("moved by    changed     moved  changed     moved")
    for distance in (1e-7, 1e-6, 1e-5, 1e-4, 1e-3):
        masters = weights.float() + distance * sign
        line = f"{distance:8.0e}"
        for copies in (masters.bfloat16(), engine.optimizer.round_stochastically(masters, 0)):
            changed = (copies != weights).float().mean()
            moved = ((copies.float() - weights.float()) * sign).double().mean() / distance
            line += f"{changed:11.3f}{moved:10.3f}"
        print(line)


def forms(config):
    """How far apart rounding and faults are: the fast form's difference from the plain one in
    multiples of what engine/choose.py allows, and those of the faults in tests/test_forms.py."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from test_forms import FAULTS, faulty

    model, _ = load_policy(config.model, torch.device("cpu"), "bfloat16")
    prompts = torch.arange(10, 29).split([12, 7])
    with FloatProducts():
        rollout = sample.generate(model, [ids.tolist() for ids in prompts], 2, 8, [], [0, 1])
        few = rollout.rows([0, 1, -1])

        def measure(token_logprobs):
            return choose.values_and_gradients(token_logprobs, model, few, Sampling())

        expected = measure(loss.token_logprobs)
        with choose.rounded_otherwise(model):
            noise = choose.differences(measure(loss.token_logprobs), expected)
        print(f"{'rounding, relative':48}{max(noise):8.3f}", flush=True)
        fast = engine.logprobs.response_states
        changes = {name: faulty(fast, old, old + more) for name, (old, more) in FAULTS.items()}
        for name, states in {"the fast form": fast, **changes}.items():
            engine.logprobs.response_states = states
            gaps = choose.differences(measure(engine.logprobs.token_logprobs), expected)
            times = choose.times_noise(gaps, noise, torch.bfloat16)
            print(f"{name:48}{times:8.2f}", flush=True)


def gap(config):
    """How far the log-probs of the sampler are from those of the learner, in bfloat16, with logits
    in bfloat16 and in float32."""
    model, tokenizer = load_policy(config.model, torch.device("cpu"), "bfloat16")
    questions = "Why is the sky blue?", "What is 27 + 48?"
    turns = [[{"role": "user", "content": question}] for question in questions]
    options = dict(add_generation_prompt=True, return_dict=False)
    prompts = [tokenizer.apply_chat_template(turn, **options) for turn in turns]
    head = model.get_output_embeddings()
    print("logits            mean    largest")
    for name in ("float32", "bfloat16"):
        if name == "bfloat16":
            del head.forward  # that of lib/head.py
        with FloatProducts(), torch.no_grad():
            rollout = sample.generate(model, prompts, 8, 48, [tokenizer.eos_token_id], [0, 1])
            logprobs, _ = loss.token_logprobs(model, rollout, Sampling())
        gaps = (logprobs - rollout.old_logprobs).abs()[rollout.response_mask]
        print(f"in {name:10}{gaps.mean():9.4f}{gaps.max():11.3f}", flush=True)


def plot(config):
    figure, axes = plt.subplots(figsize=(7, 3.5))
    for mode, colour in zip(MODES, ("black", "tab:red", "tab:blue")):
        for run in sorted(Path(config.folder).glob(f"{config.name}-{mode}-*")):
            rewards = [row["reward"] for row in read_rows(run / "metrics.jsonl")]
            label = mode if run.name.endswith("-0") else None
            axes.plot(range(1, len(rewards) + 1), rewards, color=colour, label=label, alpha=0.7)
            after = run / "after.json"
            if after.is_file():
                print(run.name, rewards[-1], json.loads(after.read_text()))
    axes.set(xlabel="step", ylabel="reward")
    axes.legend()
    figure.tight_layout()
    figure.savefig(config.output, dpi=100)


@dataclass(frozen=True)
class Config:
    model: str = flag("models/add", "model folder")
    folder: str = flag("runs/precision", "folder of the runs of curves")
    name: str = flag("add", "name of these runs")
    seeds: str = flag("0,1,2", "seeds of curves")
    modes: str = flag(",".join(MODES), "which curves")
    flags: str = flag("", "flags of train.py for curves, in quotes")
    output: str = flag("docs/precision.png", "picture that plot writes")
    native: bool = flag(False, "bfloat16 as this machine does it")


def main(config, what):
    WHAT[what](config)


WHAT = {function.__name__: function for function in (curves, share, forms, gap, plot)}

if __name__ == "__main__":
    what = dict(choices=list(WHAT), help="what to measure or draw")
    run_script(main, Config, __doc__, what=what)
