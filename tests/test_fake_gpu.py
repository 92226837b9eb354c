"""The CUDA path on fake CUDA tensors, without a GPU: no mix of CPU and CUDA tensors, and within the
decode step, which is captured as a CUDA graph, no look at a value and no copy between devices.

torch for CPUs has no device guard for CUDA. Two lines of C++ register one that does nothing. Fake
tensors have no values, so the looks at values outside the decode step are replaced. What this
cannot see: whether the numbers are right (python -m tools.gpu, on a GPU)."""

import collections
import contextlib
import ctypes
import dataclasses
import shutil
import subprocess
import types
from functools import partial
from pathlib import Path
from unittest import mock

import architectures
import pytest
import tiny
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import engine.generate
import engine.logprobs
import engine.optimizer
import loss
import train
from engine.generate import DecodeState, decode_attention, fused_norms
from engine.optimizer import Optimizer
from lib.estimate import shape
from lib.head import float32_logits
from sample import Sampling

CUDA = torch.device("cuda", 0)
OTHERS = "gemma3_text olmo2 mixtral starcoder2 granite"
QUICK = ("llama", "gemma2")
NAMES = [
    pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
    for name in (*tiny.ARCHITECTURES, *OTHERS.split())
]
GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)"""
# operators that launch no kernel
VIEWS = """view _unsafe_view expand slice select unsqueeze squeeze transpose t permute alias detach
    as_strided split split_with_sizes unbind empty empty_like new_empty device lift_fresh"""


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    if torch.cuda.is_available():
        pytest.skip("here is a real GPU: python -m tools.gpu")
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("guard")
    (folder / "guard.cpp").write_text(GUARD)
    root = Path(torch.__file__).parent
    paths = [f"-I{root}/include", f"-L{root}/lib", "-lc10"]
    command = ["g++", "-std=c++20", "-fPIC", "-shared", "-o", "guard.so", "guard.cpp", *paths]
    subprocess.run(command, cwd=folder, check=True)
    ctypes.CDLL(str(folder / "guard.so"))


@pytest.fixture(autouse=True)
def fake_cuda(guard):
    capability = mock.patch("torch.cuda.get_device_capability", lambda *arguments: (8, 9))
    with capability, FakeTensorMode():
        yield


class Kernels(TorchDispatchMode):
    """Counts operators that launch a kernel, and those that copy between devices."""

    def __init__(self):
        super().__init__()
        self.counts, self.crossings = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        name = function.overloadpacket.__name__
        if name not in VIEWS.split():
            self.counts[name] += 1
        tensors = [thing for thing in (*arguments, out) if torch.is_tensor(thing)]
        if name not in ("_to_copy", "copy_"):  # a number on the CPU may be an argument
            tensors = [tensor for tensor in tensors if tensor.dim()]
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.crossings[name] += 1
        return out


def make_model(config, dtype=torch.bfloat16):
    """config: or the name of an architecture"""
    with CUDA:
        if isinstance(config, str):
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)  # .to(dtype) cannot swap fake parameters
            try:
                model = architectures.make_model(config)
            finally:
                torch.set_default_dtype(before)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    float32_logits(model)
    return model


def decode(model, rows=8, slots=4, columns=128, N=64, temperature=0.9) -> Kernels:
    """A decode step of all slots, after a prefill and a step that has dropped slots."""
    state = DecodeState(model, rows, slots, columns, N)
    with torch.no_grad():
        state.prefill(model, [[1, 2, 3, 4], [1, 2]], rows // 2, [5], [0, 1])
        state.slots, state.attended = slots, 64
        state.cache.resize(None, 64)
        index = torch.arange(2, device=CUDA)
        state.cache.load_prompts(index, index // 4)
        state.cache.resize(index, 64)
        with decode_attention(model), fused_norms(model), Kernels() as kernels:
            state.decode_step(model, Sampling(temperature))
    assert not kernels.crossings, "copies between devices in a captured step"
    return kernels


@pytest.mark.parametrize("name", NAMES)
def test_a_decode_step_stays_on_the_device(name):
    decode(make_model(name))


def test_a_greedy_decode_step_stays_on_the_device():
    decode(make_model(shape("tiny")), temperature=0)


def test_a_copy_between_devices_would_be_noticed(monkeypatch):
    def to_the_host(logits, uniforms, sampling):
        return logits.cpu().argmax(-1).to(CUDA), uniforms.float()

    monkeypatch.setattr(engine.generate, "sample_token", to_the_host)
    with pytest.raises(AssertionError, match="copies between devices"):
        decode(make_model(shape("tiny")))


@pytest.mark.slow
def test_the_kernels_of_a_decode_step_of_qwen_are_those_of_the_page(monkeypatch):
    """docs/gpu.md says how many they are. torch for CPUs has no kernel for a whole RMSNorm: a
    product stands for it."""
    monkeypatch.setattr(engine.generate, "rms_norm", lambda states, weight, eps: states * weight)
    kernels = decode(make_model(shape("qwen2.5-0.5b")), 128, 128, 640, 512)
    page = Path(__file__).parent.parent / "docs" / "gpu.md"
    assert f"{sum(kernels.counts.values()):,} kernels" in page.read_text()


def make_batch(R=6, T=20, N=8) -> train.Batch:
    def lengths(n):
        return torch.full((R,), n, device=CUDA)

    ids = torch.zeros(R, T, dtype=torch.long, device=CUDA)
    mask = torch.ones(R, N, dtype=torch.bool, device=CUDA)
    zeros = torch.zeros(R, N, device=CUDA)
    finished = lengths(1).bool()
    rollout = ids, lengths(T - N), lengths(T), mask, zeros, finished
    column = torch.ones(R, 1, device=CUDA)
    return train.Batch(*rollout, column, zeros, column)


@contextlib.contextmanager
def looks_at_values():
    """Outside the decode step: all masks are full, all lengths those of make_batch."""
    getitem = Tensor.__getitem__

    def nonzero(self, as_tuple=False):
        zeros = [torch.zeros(self.numel(), dtype=torch.long, device=CUDA) for _ in self.shape]
        return tuple(zeros) if as_tuple else torch.stack(zeros, 1)

    def index(self, key):
        if torch.is_tensor(key) and key.dtype == torch.bool:
            return self.flatten(0, key.dim() - 1)
        return getitem(self, key)

    def unique(self, dim=None, return_inverse=False):
        return getitem(self, slice(2)), torch.zeros(len(self), dtype=torch.long, device=CUDA)

    replaced = {
        "nonzero": nonzero,
        "__getitem__": index,
        "unique": unique,
        "__int__": lambda self: 12,
        "__float__": lambda self: 1.0,
        "item": lambda self: 1.0,
        "__bool__": lambda self: True,
        "backward": lambda self: None,  # autograd's engine wants a real accelerator
    }
    stream = types.SimpleNamespace(synchronize=lambda: None)
    generator = types.SimpleNamespace(manual_seed=lambda seed: None)
    with (
        mock.patch.multiple(Tensor, **replaced),
        mock.patch.object(FakeTensor, "tolist", lambda self: list(range(len(self)))),
        mock.patch.object(torch.cuda, "current_stream", lambda: stream),
        mock.patch.object(engine.optimizer.torch, "Generator", lambda device: generator),
    ):
        yield


def update(model, offload=False, form=engine.logprobs.token_logprobs, **flags) -> Optimizer:
    config = dataclasses.replace(train.Config(), **flags)
    optimizer = Optimizer(model, 0.0, offload)
    with looks_at_values():
        batch = make_batch()
        arguments = model, batch, Sampling(), batch.old_logprobs
        train.backward(batch, partial(form, *arguments), config)
        head = engine.logprobs.Head(model, Sampling(), True, False)
        if head.by_hand:
            states = torch.zeros(48, head.linear.weight.shape[1], dtype=model.dtype, device=CUDA)
            tokens = torch.zeros(48, dtype=torch.long, device=CUDA)
            grads = [torch.zeros(48, device=CUDA)]
            with torch.no_grad():
                for gradient in head.gradients_by_hand(states, tokens, grads):
                    assert gradient.device == CUDA
            logits = head.linear(states.requires_grad_())  # where autograd differentiates the head
            assert logits.dtype == torch.float32
            product = logits.grad_fn
            if model.dtype == torch.bfloat16:
                for gradient in product.apply(logits.detach()):
                    assert gradient.device == CUDA and gradient.dtype == torch.bfloat16
        for i, parameter in enumerate(optimizer.parameters):
            parameter.grad = torch.zeros_like(parameter)
            if parameter.dtype != torch.float32:
                optimizer.add_gradient(i, parameter)
        optimizer.step(1e-3, 1.0)
        optimizer.load_state_dict(optimizer.state_dict())
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offload", [False, True])
def test_an_update_mixes_no_devices(offload, dtype):
    optimizer = update(make_model(shape("tiny"), dtype), offload)
    assert optimizer.masters[0].device.type == ("cpu" if offload else "cuda")
    assert optimizer.parameters[0].device == CUDA


@pytest.mark.parametrize(
    "options",
    [{"entropy_coef": 0.1}, {"form": loss.token_logprobs}, {"loss": "clip"}, {"kl_beta": 0.1}],
)
def test_other_updates_mix_no_devices(options):
    update(make_model(shape("tiny")), **options)


@pytest.mark.parametrize("name", NAMES)
def test_an_update_of_each_architecture_mixes_no_devices(name):
    update(make_model(name))
