"""Is the GPU path right on this machine, and how fast is it?

    python -m tools.gpu            # on a GPU: random Qwen2.5-0.5B, under 8 minutes
    python -m tools.gpu            # without one: the same checks on the CPU, tiny, under a minute

Nothing is downloaded. Each check runs by itself: a failure is a line of the table, not the end.
"""

import copy
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs from any folder

import engine.choose
import engine.generate
import train
from engine.generate import DecodeState
from engine.learner import Learner
from engine.memory import Memory
from lib.estimate import SHAPES, shape
from lib.flags import first_line, flag, run_script
from lib.head import float32_logits
from policy import pick_device
from tools import bench

LIMIT = 8 * 60  # seconds for all checks
STOP = [1]


@dataclass(frozen=True)
class Config:
    preset: Literal["", *SHAPES] = flag("", "shape of the model; default: qwen2.5-0.5b, CPU: tiny")
    device: Literal["auto", "cuda", "cpu"] = flag("auto", "auto: cuda if available")


class Checks:
    """All checks of a device. A method raises AssertionError where something is wrong, and returns
    a note for the table."""

    def __init__(self, device, preset):
        self.device = device
        self.preset = preset
        on_gpu = device.type == "cuda"
        self.dtypes = [torch.float32, torch.bfloat16]
        self.rows, self.new_tokens = (128, 512) if on_gpu else (16, 24)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def make_model(self, dtype, **changes):
        torch.manual_seed(0)
        config = shape(self.preset, initializer_range=0.05, **changes)
        with self.device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        float32_logits(model)
        return model

    def make_small_model(self):
        """Several of them are trained at a time, and 8 GB must be enough."""
        model = self.make_model(torch.bfloat16, num_hidden_layers=2, vocab_size=16000)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # if they began at 0, two steps would be all of them
                torch.nn.init.normal_(parameter, std=0.05)
        return model

    def prompts(self, model, P=4, length=24) -> list[list[int]]:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(model.config.vocab_size, (P, length), generator=generator).tolist()

    def forms(self, dtype) -> None:
        """train.py would pick the fast forms."""
        model = self.make_model(dtype)
        forms = engine.choose.choose(model, self.prompts(model), STOP, train.Sampling(), 32)
        picked = [form.__module__ for form in (forms.generate, forms.token_logprobs)]
        assert picked == ["engine.generate", "engine.logprobs"], f"picked: {picked}"

    def graphs(self, dtype) -> str:
        """With CUDA graphs and without them the kernels are the same, so the numbers are. Two
        rollouts, so that graphs are replayed."""
        model = self.make_model(dtype)
        arguments = model, self.prompts(model), 4, 40, STOP

        def two_rollouts():
            buffers = {}
            for seeds in ([1, 2, 3, 4], [5, 6, 7, 8]):
                yield engine.generate.generate(*arguments, seeds, rows_at_once=8, buffers=buffers)

        captured = list(two_rollouts())
        with without_graphs():
            plain = list(two_rollouts())
        for one, other in zip(captured, plain):
            assert torch.equal(one.ids, other.ids), f"{(one.ids != other.ids).sum()} tokens differ"
            gap = (one.old_logprobs - other.old_logprobs).abs().max().item()
            assert gap == 0, f"log-probs differ by {gap:.2g}"
        return "" if self.device.type == "cuda" else "without graphs: no GPU"

    def make_learner(self, model, **flags) -> Learner:
        forms = engine.choose.Forms(engine.generate.generate, engine.logprobs.token_logprobs)
        memory = Memory({}, micro_batch_tokens=256)
        return Learner(model, forms, memory, train.Config(**flags))

    def train(self, model, steps, learner=None, **flags) -> Learner:
        """Updates of a model by the responses that it samples."""
        learner = learner or self.make_learner(model, **flags)
        prompts = self.prompts(model)
        for _ in range(steps):
            rollout = engine.generate.generate(model, prompts, 4, 16, STOP, [0, 1, 2, 3])
            weights = torch.linspace(-1, 1, 16, device=self.device).view(16, 1)
            scale = 1 / rollout.response_lengths[:, None]
            columns = *vars(rollout).values(), weights, rollout.old_logprobs, scale
            update = learner.update(train.backward, train.Batch(*columns), 1e-5, on_policy=True)
            assert update.grad_norm > 0, "the gradient is nan"
        return learner

    def resume(self) -> str:
        """Two steps are a step, a file, and a step."""
        straight = self.make_small_model()
        again, cut = copy.deepcopy(straight), copy.deepcopy(straight)
        self.train(straight, 2)
        self.train(again, 2)
        optimizer = self.train(cut, 1).optimizer
        resumed = self.make_small_model()
        resumed.load_state_dict(cut.state_dict())
        learner = self.make_learner(resumed)
        with tempfile.TemporaryDirectory() as folder:
            torch.save(optimizer.state_dict(), f"{folder}/state.pt")
            state = torch.load(f"{folder}/state.pt", weights_only=True, map_location="cpu")
        learner.optimizer.load_state_dict(state)
        self.train(resumed, 1, learner)
        gap, noise = distance(resumed, straight), distance(again, straight)
        assert gap <= max(1e-3, 2 * noise), f"off by {gap:.1g}, a repeated run by {noise:.1g}"
        return f"off by {gap:.1g}, a repeated run by {noise:.1g}"

    def offload(self) -> str:
        here = self.make_small_model()
        there = copy.deepcopy(here)
        self.train(here, 2)
        self.train(there, 2, offload=True)
        # rounded at random by other numbers than on the GPU
        gap = distance(there, here)
        assert gap < 5e-3, f"parameters are off by {gap:.1g}"
        return f"off by {gap:.1g}"

    def out_of_memory(self) -> str:
        """Of 700 MB, which is too little for all rows at once."""
        if self.device.type != "cuda":
            return "needs a GPU"
        model = self.make_model(torch.bfloat16)
        prompts = self.prompts(model, 8)
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(self.device).total_memory
        memory, buffers = Memory({}, rows_at_once=self.rows), {}
        memory.cleanups.append(buffers.clear)

        def sample(rows_at_once):
            engine.generate.generate(
                model, prompts, self.rows // 8, self.new_tokens, [], range(8),
                rows_at_once=rows_at_once, buffers=buffers,
            )  # fmt: skip

        torch.cuda.set_per_process_memory_fraction(
            (torch.cuda.memory_reserved() + 700e6) / total, self.device
        )
        try:
            memory.run(sample, "rows_at_once")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)
        rows = memory.sizes["rows_at_once"]
        assert rows < self.rows, "memory was enough"
        return f"rows_at_once {self.rows} -> {rows}"

    def processes(self) -> None:
        """A group of one process, by the backends of lib/processes.py."""
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", RANK="0", WORLD_SIZE="1")
        with mock.patch.dict(os.environ, address):
            dist.init_process_group(backend)
        try:
            tensor, received = torch.ones(3, device=self.device), [None]
            dist.all_reduce(tensor)
            dist.all_gather_object(received, b"x")
            assert received == [b"x"] and tensor.sum().item() == 3
        finally:
            dist.destroy_process_group()

    def compiled(self) -> str | None:
        """`--fast compile` would compile, and the compiled decode step fits."""
        if self.device.type != "cuda":
            return "needs a GPU"
        model = self.make_model(torch.bfloat16)
        arguments = self.prompts(model), STOP, train.Sampling(), 32
        forms = engine.choose.choose(model, *arguments, "compile")
        assert isinstance(forms.generate, partial), "not compiled"

    def speed(self, fast="auto") -> str | None:
        """Prints what `python -m tools.bench` does: sampling and the update beside transformers'
        and beside what the device could do at best."""
        if fast == "compile" and self.device.type != "cuda":
            return "needs a GPU"
        if self.device.type == "cuda" and torch.cuda.get_device_properties(0).total_memory < 11e9:
            return "needs 12 GB"
        bench.main(
            bench.Config(
                preset=self.preset, prompts_per_step=8, group_size=self.rows // 8,
                prompt_length=100, max_new_tokens=self.new_tokens, repeats=2,
                device=self.device.type, fast=fast,
            )
        )  # fmt: skip

    def all(self) -> dict[str, Callable]:
        checks = {}
        for dtype in self.dtypes:
            name = str(dtype).removeprefix("torch.")
            checks[f"fast forms are plain ones, {name}"] = partial(self.forms, dtype)
            checks[f"graphs change nothing, {name}"] = partial(self.graphs, dtype)
        return checks | {
            "resume": self.resume,
            "offload": self.offload,
            "lack of memory halves": self.out_of_memory,
            "a group of processes": self.processes,
            "speed": self.speed,
            "a compiled decode step": self.compiled,
            "speed, compiled": partial(self.speed, "compile"),
        }


@contextmanager
def without_graphs() -> Iterator[None]:
    """What is sampled within the block captures nothing."""
    create = DecodeState.__init__

    def init(state, *arguments):
        create(state, *arguments)
        state.graphs = None

    with mock.patch.object(DecodeState, "__init__", init):
        yield


def distance(one, other) -> float:
    """The largest relative difference (of norms) between parameters."""
    gaps = []
    for a, b in zip(one.parameters(), other.parameters()):
        gaps.append(((a - b).float().norm() / b.float().norm()).item())
    return max(gaps)


def run_check(check) -> tuple[str, str]:
    """-> result, note"""
    try:
        return "ok", check() or ""
    except AssertionError as error:
        return "WRONG", first_line(error)
    except Exception as error:  # the next check runs all the same
        traceback.print_exc()
        return "ERROR", f"{type(error).__name__}: {first_line(error)[:90]}"


def main(config) -> None:
    device = pick_device(config.device)
    on_gpu = device.type == "cuda"
    preset = config.preset or ("qwen2.5-0.5b" if on_gpu else "tiny")
    name = torch.cuda.get_device_name() if on_gpu else "CPU, no GPU"
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {preset}")
    began, wrong = time.monotonic(), 0
    for label, check in Checks(device, preset).all().items():
        before = time.monotonic()
        result, note = "skipped", "out of time"
        if before - began < LIMIT - 60:
            result, note = run_check(check)
        wrong += result in ("WRONG", "ERROR")
        print(f"{label:36}{result:8}{time.monotonic() - before:6.1f} s  {note}", flush=True)
        if on_gpu:
            torch.cuda.empty_cache()
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
