"""The fast forms are the plain forms: log-probs, entropies and gradients; `choose` notices where
they are not."""

import contextlib
import copy
import inspect
import itertools
import re
import sys
import types
from pathlib import Path

import architectures
import pytest
import tiny
import torch
import transformers
from conftest import parse_train
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, DynamicCache

import engine.choose
import loss
import sample
import train
from engine.generate import DecodeState, generate
from engine.learner import Learner
from engine.logprobs import token_logprobs
from engine.memory import Memory, enable_gradient_checkpointing
from lib.checks import CACHE, check_causal
from lib.estimate import memory_table, shape
from lib.files import read_rows
from lib.flags import UserError
from lib.head import float32_logits
from loss import DENOMINATORS, LOSSES
from sample import Sampling

STOP = list(range(100, 200))
PROMPTS = [list(range(5, 25)), [8], [9, 10, 11] * 4]
PLAIN = engine.choose.Forms()
FAST = engine.choose.Forms(generate, token_logprobs)


def sample_12(model, sampling=Sampling()):
    """3 prompts of 20, 1 and 12 tokens, 4 responses each of at most 12 tokens, of several
    lengths."""
    return generate(model, PROMPTS, 4, 12, STOP, [1, 2, 3], sampling)


def gradient(model, total):
    """All of it, as one vector."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)])


def assert_close_gradients(found, expected):
    assert ((found - expected).norm() / expected.norm()).item() < 3e-6


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_plain_logprobs_and_entropies_are_those_of_each_row_by_itself(load, architecture):
    """In float64, without padding."""
    model, _ = load(architecture)
    rollout = sample_12(model, Sampling(0.7))
    model = copy.deepcopy(model).double()
    rows = torch.tensor([9, 0, 5])
    with torch.no_grad():
        found = loss.token_logprobs(model, rollout.rows(rows), Sampling(0.7))
        expected = torch.zeros(2, *found[0].shape)
        for r, row in enumerate(rows):
            start, end = rollout.prompt_lengths[row], rollout.lengths[row]
            ids = rollout.ids[row, :end]
            logits = model(ids[None]).logits[0, start - 1 : end - 1]
            distribution = torch.distributions.Categorical(logits=logits / 0.7)
            expected[0, r, : end - start] = distribution.log_prob(ids[start:])
            expected[1, r, : end - start] = distribution.entropy()
    torch.testing.assert_close(torch.stack(found), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_fast_form_has_the_values_and_gradients_of_the_plain_one(
    load, monkeypatch, architecture, by_hand
):
    """With shared prompts (two architectures have a window of 8), tiles of 5 tokens, rows in any
    order, and in every other row tokens that the policy did not write."""
    monkeypatch.setitem(engine.logprobs.TILE, "cpu", 5)
    model = copy.deepcopy(load(architecture)[0])
    rollout = sample_12(model, Sampling(0.8))
    rollout.response_mask[::2, 2:5] = False
    rollout = rollout.rows(torch.arange(12) * 5 % 12)
    mask = rollout.response_mask
    weights = torch.linspace(-1, 2, mask.numel()).view(12, -1)
    shapes = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: shapes.append(args[0].shape)
    )

    def values_and_gradient(form, with_entropy, **options):
        arguments = model, rollout, Sampling(0.8)
        logprobs, entropy = form(*arguments, with_entropy=with_entropy, **options)
        values = torch.stack([logprobs, entropy]) if with_entropy else logprobs
        return values, gradient(model, (weights * values).sum())

    # known log-probs are taken at their word, but have the same gradient
    known = mask.float()
    for with_entropy in (False, True):
        expected = values_and_gradient(loss.token_logprobs, with_entropy)
        shapes.clear()
        for given in (None, known):
            values, found = values_and_gradient(
                token_logprobs, with_entropy, by_hand=by_hand, known=given
            )
            logprobs = values[0] if with_entropy else values
            if given is not None:
                assert torch.equal(logprobs, known)
                logprobs.copy_(expected[0][0] if with_entropy else expected[0])
            torch.testing.assert_close(values, expected[0], atol=1e-5, rtol=0)
            assert_close_gradients(found, expected[1])
        # the prompts once, then the rest
        assert shapes == 2 * [(3, 19), (12, (rollout.lengths - rollout.prompt_lengths).max())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [loss.token_logprobs, token_logprobs])
def test_known_logprobs_are_returned_to_the_last_bit_with_the_gradient_of_the_others(
    load, form, dtype
):
    """In bfloat16 a sampler's log-probs differ from those of a forward pass: a ratio of the first
    update was 1.03, and was clipped."""
    model = copy.deepcopy(load("llama")[0]).to(dtype)
    rollout = sample_12(model)
    arguments = model, rollout, Sampling()
    computed, _ = form(*arguments)
    logprobs, _ = form(*arguments, known=rollout.old_logprobs)
    assert torch.equal(logprobs, rollout.old_logprobs)
    assert (computed != logprobs).any()
    ratio = (logprobs - rollout.old_logprobs).exp()
    weights = torch.linspace(-1, 2, 12)[:, None] * rollout.response_mask
    expected = gradient(model, (weights * computed).sum())
    assert torch.equal(gradient(model, (weights * ratio).sum()), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_backward_equals_plain_autograd(load, name):
    """Every loss, with a KL and an entropy term, ratios on both sides of every bound, holes in the
    mask, in micro-batches of any size, whichever form."""
    model, _ = load("llama")
    rollout = sample_12(model, Sampling(0.8))
    mask = rollout.response_mask
    mask[::2, 2:5] = False
    noise = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    rollout.old_logprobs += 1.5 * noise
    flags = "--kl_beta", 0.1, "--entropy_coef", 0.3, "--temperature", 0.8
    config = types.SimpleNamespace(**vars(parse_train(*flags)) | {"loss": name})
    config.sampling = Sampling(0.8)
    weights = torch.linspace(-1, 2, 12)[:, None]
    ref_logprobs = 0.7 * rollout.old_logprobs
    scale = DENOMINATORS["sequence"](rollout.response_lengths, config)[:, None]
    logprobs, entropy = loss.token_logprobs(model, rollout, Sampling(0.8))
    each, clipped = train.LOSSES[name](logprobs, rollout.old_logprobs, weights, mask, config)
    each = each + 0.1 * (logprobs - ref_logprobs) ** 2 / 2 - 0.3 * entropy
    expected = gradient(model, (each * mask * scale).sum())
    assert clipped.any() or name not in ("clip", "cispo", "gspo")
    batch = train.Batch(*vars(rollout).values(), weights, ref_logprobs, scale)
    for forms in (PLAIN, FAST):
        for tokens in (1, 50, 10**6):
            learner = Learner(model, forms, Memory({}, micro_batch_tokens=tokens), config)
            learner.optimizer.step = lambda *arguments: 0.0  # it would drop the gradient
            learner.update(train.backward, batch, 0.0, on_policy=False)
            found = torch.cat([p.grad.flatten() for p in model.parameters()])
            assert_close_gradients(found, expected)
            model.zero_grad()


def test_a_sampler_out_of_memory_leaves_the_learner_its_gradients(load):
    """They may be at work at the same time, in two threads."""
    model, _ = load("llama")
    memory = Memory({}, rows_at_once=2, micro_batch_tokens=8)
    Learner(model, PLAIN, memory, parse_train())
    parameter = next(model.parameters())
    parameter.grad = torch.ones_like(parameter)
    sizes = []

    def work(size):
        sizes.append(size)
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    memory.run(work, "rows_at_once")
    assert sizes == [2, 1]
    assert parameter.grad is not None


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient_and_no_sample(load, architecture):
    """GPT-2 has dropout, which train mode would turn on: only the layers that recompute may be in
    it, and not while sampling, where train mode drops the KV cache."""
    model = copy.deepcopy(load(architecture)[0])
    rollout = sample_12(model)
    arguments = model, rollout, Sampling()
    expected = gradient(model, loss.token_logprobs(*arguments)[0].sum())
    block = next(layer for layer in model.modules() if isinstance(layer, torch.nn.ModuleList))[0]
    calls = []
    next(block.children()).register_forward_hook(lambda *arguments: calls.append(1))
    enable_gradient_checkpointing(model)
    for form in (loss.token_logprobs, token_logprobs):
        calls.clear()
        assert_close_gradients(gradient(model, form(*arguments)[0].sum()), expected)
        assert len(calls) == 2  # forward, and again in the backward pass
    for form in (generate, sample.generate):
        again = form(model, PROMPTS, 4, 12, STOP, [1, 2, 3])
        assert torch.equal(again.ids, rollout.ids)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_an_rms_norm_in_one_kernel_is_that_of_transformers(load, architecture):
    """Gemma's, which adds 1 to its weight, is left as it is."""
    model, _ = load(architecture)
    on_cuda = types.SimpleNamespace(device=torch.device("cuda"), modules=model.modules)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = model(ids).logits
        with engine.generate.fused_norms(on_cuda):
            forwards = [module for module in model.modules() if "forward" in vars(module)]
            found = model(ids).logits
        assert bool(forwards) == (architecture != "gemma2")
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(model(ids).logits, expected)


# ---------------------------------------------------------------------------------------- choose


def choose(model):
    return engine.choose.choose(model, PROMPTS, STOP, Sampling(), 12)


def assert_learns_by(form, model):
    """The gradient is that of the plain form."""
    arguments = model, sample_12(model), Sampling()
    found, expected = (
        gradient(model, each(*arguments)[0].sum()) for each in (form, loss.token_logprobs)
    )
    assert_close_gradients(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_fast_forms_are_chosen_for_the_usual_architectures(load, architecture, dtype):
    model = copy.deepcopy(load(architecture)[0]).to(dtype)
    assert choose(model) == FAST
    assert engine.choose.choose(model, PROMPTS, STOP, Sampling(), 12, "off") == PLAIN


def test_an_edit_of_a_shared_function_is_fast_at_once(load, monkeypatch):
    """policy_distribution cut to the two best tokens: sampler and learner follow, and the forms
    still agree."""

    def two_best(logits, sampling):
        second = logits.float().topk(2, -1).values[..., -1:]
        return logits.float().masked_fill(logits < second, -1e9)

    model, _ = load("llama")
    for module in (sample, loss, engine.logprobs):
        monkeypatch.setattr(module, "policy_distribution", two_best)
    assert choose(model) == FAST
    rollout = sample_12(model)
    logprobs, _ = loss.token_logprobs(model, rollout, Sampling())
    torch.testing.assert_close(rollout.old_logprobs, logprobs, atol=1e-5, rtol=0)
    assert (rollout.old_logprobs.exp()[rollout.response_mask] > 0.01).all()


def test_an_edit_of_token_stats_is_differentiated_by_autograd(load, monkeypatch):
    """Log-probs of twice the logits in the learner alone: the gradient written by hand no longer
    fits, autograd in tiles does."""

    def doubled(logits, tokens, sampling):
        logp = (2 * logits.float()).log_softmax(-1)
        return logp.gather(-1, tokens[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    monkeypatch.setattr(loss, "token_stats", doubled)
    monkeypatch.setattr(engine.logprobs, "token_stats", doubled)
    model, _ = load("llama")
    forms = choose(model)
    assert forms.generate is generate and forms.token_logprobs is not loss.token_logprobs
    assert_learns_by(forms.token_logprobs, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_of_a_plain_form_takes_effect_and_is_said(load, monkeypatch, capsys, dtype):
    model = copy.deepcopy(load("llama")[0]).to(dtype)

    def forced(*arguments, plain=sample.generate):
        rollout = plain(*arguments)
        rollout.ids[torch.arange(8), rollout.prompt_lengths] = 9
        return rollout

    def doubled(*arguments, plain=loss.token_logprobs, **options):
        return [2 * value for value in plain(*arguments, **options)]

    monkeypatch.setattr(sample, "generate", forced)
    monkeypatch.setattr(loss, "token_logprobs", doubled)
    assert choose(model) == engine.choose.Forms(forced, doubled)
    said = capsys.readouterr().out
    assert said.count("LlamaForCausalLM does not fit the fast form of") == 2
    assert "they differ by" in said


def sampled_with(model, monkeypatch, number, sampling=Sampling()):
    """Eight responses to one prompt of five tokens each, where all random numbers are the same."""
    numbers = torch.full((4, 5), number, dtype=torch.float64)
    monkeypatch.setattr(sample, "uniform_numbers", lambda *arguments: numbers)
    return sample.generate(model, PROMPTS[:2], 4, 5, STOP, [0, 1], sampling)


def test_a_random_number_at_the_border_of_two_tokens_is_rounding(load, monkeypatch):
    """Once in a thousand tokens of a large vocabulary both forms choose another token, and go on
    differently."""
    model, _ = load("llama")
    probs = model(torch.tensor(PROMPTS[:1])).logits[0, -1].double().softmax(-1)
    border = probs[:51].sum().item()
    below, above = (sampled_with(model, monkeypatch, border + step) for step in (-1e-6, 1e-6))
    tokens = [rollout.response_ids()[0][0] for rollout in (below, above)]
    assert tokens == [50, 51]
    gap = engine.choose.sampler_difference(below, above, model, Sampling(), 0.0)
    assert gap < 0.1
    # the same tokens for another reason
    above.ids[3, 20] = 57
    gap = engine.choose.sampler_difference(below, above, model, Sampling(), 0.0)
    between = probs[51:57].sum().item()
    assert gap == pytest.approx(between / 10 / 1e-3, rel=1e-3) and gap > 0.5


@pytest.mark.parametrize("what", ["token", "log-prob", "ends early", "finished", "greedy"])
def test_one_row_that_differs_is_enough(load, monkeypatch, what):
    model, _ = load("llama")
    sampling = Sampling(temperature=0 if what == "greedy" else 1)
    found, expected = (sampled_with(model, monkeypatch, 0.3, sampling) for _ in range(2))
    assert engine.choose.sampler_difference(found, expected, model, sampling, 0.0) == 0
    start = found.prompt_lengths[2]
    if what in ("token", "greedy"):
        found.ids[2, start] = 599 - found.ids[2, start]
    if what == "log-prob":
        found.old_logprobs[2, 0] *= 1.1
    if what == "ends early":
        found.lengths[2] -= 1
    if what == "finished":
        found.finished[2] = ~found.finished[2]
    assert engine.choose.sampler_difference(found, expected, model, sampling, 0.0) > 1


@pytest.mark.parametrize("more", ["halved", "bias"])
def test_a_head_that_is_more_than_a_product_gets_the_right_gradient(load, more):
    """A bias is differentiated in tiles; logits halved behind the head's back are left to the plain
    form."""
    model = copy.deepcopy(load("llama")[0])
    if more == "halved":
        model.register_forward_hook(
            lambda module, args, out: out.__setitem__("logits", out.logits / 2)
        )
    else:
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, model.lm_head.out_features))
    forms = choose(model)
    assert (forms.token_logprobs is loss.token_logprobs) == (more == "halved")
    assert_learns_by(forms.token_logprobs, model)


def test_out_of_memory_in_the_check_says_nothing_about_the_form(load, monkeypatch, capsys):
    def starved(*arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine.generate, "generate", starved)
    monkeypatch.setattr(engine.logprobs, "token_logprobs", starved)
    assert choose(load("llama")[0]) == engine.choose.Forms(starved, starved)
    said = "out of memory: the fast forms were not compared with the plain ones, but are used"
    assert capsys.readouterr().out.strip() == said


def test_where_memory_runs_out_short_rows_are_compared(load, monkeypatch, capsys):
    """So an edit of a plain form still takes effect."""

    def doubled(policy, rollout, *arguments, plain=loss.token_logprobs, **options):
        widths.append(rollout.ids.shape[1])
        if widths[-1] > engine.choose.SHORTEST:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
        return [2 * value for value in plain(policy, rollout, *arguments, **options)]

    widths = []
    monkeypatch.setattr(loss, "token_logprobs", doubled)
    assert choose(load("llama")[0]) == engine.choose.Forms(generate, doubled)
    assert widths[0] > engine.choose.SHORTEST >= widths[-1]
    assert "not compared" not in capsys.readouterr().out


def test_the_rows_that_are_compared_are_short_where_a_forward_pass_is_slow(load, monkeypatch):
    """But longer than a window that the masks know nothing of, as gpt_neo has."""
    model = copy.deepcopy(load("llama")[0])

    def affordable(seconds, longest=1024):
        """Where a forward pass takes so long."""
        clock = itertools.count(step=seconds)
        monkeypatch.setattr(engine.choose.time, "perf_counter", lambda: next(clock))
        return engine.choose.affordable_tokens(model, longest)

    assert affordable(1e-3) > 1024
    assert affordable(1.0) == engine.choose.SHORTEST
    model.config.window_size = 50
    assert affordable(1.0) > 50
    assert affordable(1.0, longest=40) == engine.choose.SHORTEST


def test_the_logits_that_the_check_holds_are_bounded(load, monkeypatch):
    """3 rows x tokens x 600 x 4 bytes. It was 1.2 GB for a vocabulary of 152,000."""
    monkeypatch.setattr(engine.choose, "SECONDS", 1e6)
    monkeypatch.setattr(engine.choose, "LOGITS", 3 * 20 * 600 * 4)
    assert engine.choose.affordable_tokens(load("llama")[0], 1024) == 20


def faulty(source, old, new):
    """The function with a change in its text."""
    text = inspect.getsource(source)
    assert text.count(old) == 1, old
    names = dict(vars(sys.modules[source.__module__]))
    exec(text.replace(old, new), names)
    return names[source.__name__]


FAULTS = {
    "the keys of a prompt get no gradient": ("layer.keys[prompt_of_row]", ".detach()"),
    "the values of a prompt get no gradient": ("layer.values[prompt_of_row]", ".detach()"),
    "the prompt of another row": ("layer.keys[prompt_of_row]", ".flip(0)"),
    "positions that are one too high": ("position_ids=positions", " + 1"),
    "padding of a prompt is attended to": ("prompt_columns.where(in_prompt, -1)", ".clamp(min=0)"),
    "a token attends to the one after it": ("attention_masks(policy, positions", " + 1"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "architecture",
    ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "gpt2"))],
)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_more_than_noise(load, monkeypatch, architecture, dtype, fault):
    old, addition = FAULTS[fault]
    changed = faulty(engine.logprobs.response_states, old, old + addition)
    monkeypatch.setattr(engine.logprobs, "response_states", changed)
    model = copy.deepcopy(load(architecture)[0]).to(dtype)
    assert choose(model) == engine.choose.Forms(generate, loss.token_logprobs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_a_tenth_too_large_is_more_than_noise(load, monkeypatch, dtype):
    """As a lost scale would make it."""
    by_hand = engine.logprobs.Head.gradients_by_hand

    def scaled(*arguments):
        return [1.1 * grad for grad in by_hand(*arguments)]

    monkeypatch.setattr(engine.logprobs.Head, "gradients_by_hand", scaled)
    model = copy.deepcopy(load("llama")[0]).to(dtype)
    assert choose(model).token_logprobs.keywords == {"by_hand": False}


def test_a_decode_step_that_cannot_be_compiled_is_said(load, monkeypatch, capsys):
    def broken(policy, dynamic):
        def forward(*arguments, **options):
            raise RuntimeError("no compiler")

        return forward

    monkeypatch.setattr(torch, "compile", broken)
    model, tokenizer = load("llama")
    prompts = [tokenizer(text)["input_ids"] for text in ("2+3=", "4+5=")]
    forms = engine.choose.choose(model, prompts, STOP, Sampling(), 8, "compile")
    assert forms == FAST
    said = capsys.readouterr().out
    assert "--fast compile: the decode step is not compiled (RuntimeError: no compiler)" in said


@pytest.mark.slow
@pytest.mark.parametrize("static, dtype", [(False, torch.float32), (True, torch.bfloat16)])
def test_a_compiled_decode_step_samples_the_same(load, monkeypatch, capsys, static, dtype):
    """static: a cache as CUDA graphs need it. Other numbers of slots and columns are not compiled
    again, except for a single slot, and where a static cache is attended to its end."""
    if static:
        init = engine.generate.SlotCache.__init__
        monkeypatch.setattr(
            engine.generate.SlotCache,
            "__init__",
            lambda cache, slots, columns, static: init(cache, slots, columns, True),
        )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = load("llama")[0].to(dtype)
    float32_logits(model)
    # the prompts of sample_12, and more rows than slots
    forms = engine.choose.choose(model, PROMPTS, STOP, Sampling(), 12, "compile")
    assert "the decode step was compiled in" in capsys.readouterr().out
    rest = STOP, [1, 2, 3], Sampling()
    for N, rows_at_once in ((12, None), (20, 5), (40, 3)):
        found = forms.generate(model, PROMPTS, 4, N, *rest, rows_at_once=rows_at_once)
        expected = generate(model, PROMPTS, 4, N, *rest, rows_at_once=rows_at_once)
        gap = engine.choose.sampler_difference(found, expected, model, Sampling(), 0.01)
        assert gap <= 1, f"{gap} times what rounding explains"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= (4 if static else 2)


@pytest.mark.slow
def test_a_layer_of_a_compiled_step_has_the_kernels_of_the_page(monkeypatch):
    """docs/gpu.md says how many, in code for a CPU, which is made here and not compiled."""
    from torch._inductor.graph import GraphLowering

    class Generated(Exception):
        pass

    def stop(graph):
        raise Generated(getattr(graph.codegen()[0], "value", graph.codegen()[0]))

    def attend(module, query, key, value, attention_mask, scaling=None, capping=True, **kwargs):
        """As on a GPU."""
        R, heads, _, size = query.shape
        query = query.view(R, key.shape[1], heads // key.shape[1], size)
        out = scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
        return out.reshape(R, 1, heads, -1), None

    monkeypatch.setattr(engine.generate, "attend", attend)
    monkeypatch.setattr(GraphLowering, "compile_to_module", stop)
    torch._dynamo.reset()
    config = shape("qwen2.5-0.5b", num_hidden_layers=3, vocab_size=1000)
    model = AutoModelForCausalLM.from_config(config).eval()
    compiled = engine.choose.compile_policy(model)
    with pytest.raises(Exception) as raised:
        generate(model, [[1, 2, 3]], 4, 8, STOP, [0], forward=compiled)
    code = str(raised.value)
    calls = re.findall(r"^ +(?:extern_kernels\.|cpp_fused\w+\(|buf\d+ = torch\.ops)", code, re.M)
    assert len(calls) == 3 * 14 + 2
    page = Path(__file__).parent.parent / "docs" / "gpu.md"
    assert "14 kernels for each layer" in page.read_text()


def test_no_candidates_leave_the_plain_form(load, capsys):
    model, _ = load("llama")
    assert engine.choose.pick(model, sample.generate, [], None) is sample.generate
    assert "(there is none): the plain form is used" in capsys.readouterr().out


def of_each_kind(names, quick):
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


QUICK = ["gpt_neo", "mpt", "mamba", "minimax", "bert"]


@pytest.mark.parametrize("name", of_each_kind(architectures.ARCHITECTURES, QUICK))
def test_each_architecture_samples_and_learns_what_a_forward_pass_gives_or_is_refused(name):
    """Each once went wrong: a window that short rows do not reach (gpt_neo), alibi (mpt), no KV
    cache (mamba), a cache that counts positions wrongly (minimax), a model that looks at later
    tokens (bert). The page says the same."""
    found = architectures.examine(name)
    page = (Path(__file__).parent.parent / "docs" / "reliability.md").read_text()
    if "refused" in found:
        assert f"model {name}: " in found["refused"] and "later tokens" in found["refused"]
    else:
        assert found["gap"] < 1e-3
    if f"transformers {transformers.__version__}" in page:
        cells = [found.get("sampler", "refused"), found.get("update", "")]
        assert f"| {name} | {cells[0]} | {cells[1]} |" in page


def test_rwkv_keeps_its_parameters():
    """In eval mode its forward pass divides some of them, in place: they would be saved so, and
    divided again."""
    model = architectures.make_model("rwkv")
    before = copy.deepcopy(model.state_dict())
    check_causal("rwkv", model)
    model(torch.zeros(1, 4, dtype=torch.long))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(("limit", "fits"), [(60, True), (59, False)])
def test_rows_end_where_longrope_changes_the_positions(monkeypatch, limit, fits):
    """Phi-3's rope: beyond the limit a row has other angles from its first token on, and cached
    keys do not fit."""
    factors = dict(short_factor=[1.0] * 8, long_factor=[4.0] * 8)
    rope = dict(rope_type="longrope", rope_theta=1e4, partial_rotary_factor=1.0, **factors)
    changes = dict(original_max_position_embeddings=limit, rope_parameters=rope)
    monkeypatch.setitem(architectures.ARCHITECTURES, "phi3, longrope", changes)
    if fits:
        assert architectures.examine("phi3, longrope")["gap"] < 1e-3
    else:
        with pytest.raises(UserError, match=f"the model's context of {limit}"):
            architectures.examine("phi3, longrope")


@pytest.mark.parametrize(
    "name",
    of_each_kind(["mamba", "gpt_neo", "bloom", "jamba", "lfm2", "rwkv", "minimax"], ["mamba"]),
)
def test_an_unusual_architecture_trains(name):
    architectures.make_model(name).save_pretrained("model")
    tiny.make_tokenizer("llama", tiny.TEXT).save_pretrained("model")
    Path("my_rewards.py").write_text(
        "def ones(prompt, response, answer): return response.count('1')"
    )
    flags = "--model ./model --reward my_rewards.ones --steps 2 --prompts_per_step 2 --group_size 8"
    run = train.main(parse_train(*flags.split(), "--eval_problems=2", "--max_new_tokens=12"))
    rows = read_rows(run / "metrics.jsonl")
    assert all(row["sampler_gap"] < 1e-3 and row["grad_norm"] > 0 for row in rows)


def test_memory_without_attention_is_estimated_and_what_cannot_be_is_said():
    """Mamba's config has no attention heads: that was once a traceback."""
    model = architectures.make_model("mamba")
    assert "keys and values                 0.00" in memory_table(train.Config(), model, 1.0, 20)
    model.config = None
    said = memory_table(train.Config(), model, 1.0, 20)
    assert said.startswith("memory: no estimate for MambaForCausalLM (") and said.count("\n") == 1


def test_steps_with_plain_and_with_fast_forms_agree(base):
    """Loss and reward to 1e-4, and the held-out accuracy exactly."""
    flags = "--steps 5 --prompts_per_step 2 --group_size 8 --max_new_tokens 16 --eval_problems 10"
    flags += " --temperature 0.8 --reward number+0.1*length --fast"
    runs = []
    for mode in ("auto", "off"):
        run = train.main(parse_train("--model", base, *flags.split(), mode))
        runs.append(read_rows(run / "metrics.jsonl"))
    for one, other in zip(*runs, strict=True):
        for key in ("loss", "reward", "response_length", "eval_accuracy", "entropy", "grad_norm"):
            assert one.get(key) == pytest.approx(other.get(key), abs=1e-4), (one["step"], key)


# ------------------------------------------------------------------- CUDA graphs, without a GPU

META = "gemma3_text olmo2 mixtral starcoder2 granite"


@pytest.mark.parametrize("architecture", [*tiny.ARCHITECTURES, *META.split()])
def test_a_decode_step_looks_at_no_value(monkeypatch, architecture):
    """Tensors on the meta device have no values: a step that ran there looks at none, and can be
    captured."""
    # transformers 5.0 asks for this, and torch does not know it for this device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *arguments: False)
    with torch.device("meta"):
        model = architectures.make_model(architecture).bfloat16()
        model.config.pad_token_id = None  # it would be looked for
        state = DecodeState(model, 6, 4, 64, 16)
        prompts = DynamicCache()
        model(torch.zeros(2, 7, dtype=torch.long), use_cache=True, **{CACHE: prompts})
        state.cache.static = True
        state.cache.set_prompts(prompts)
        state.slots, state.attended = 4, 32
        with torch.no_grad(), engine.generate.decode_attention(model):
            state.decode_step(model, Sampling(0.9))


def capture_by_stand_in(monkeypatch):
    """CUDA graphs played by running the step again: what is replayed must read only tensors that
    stay where they are. -> sizes that were captured, sizes that were replayed"""
    captured, replayed = [], []
    create, step = DecodeState.__init__, DecodeState.decode_step

    def init(self, *arguments):
        create(self, *arguments)
        self.graphs = {}
        self.cache.static = True

    def run(self, policy, sampling):
        sizes = self.slots, self.attended, sampling
        (replayed if sizes in self.graphs else captured).append(sizes)
        graph = self.graphs.setdefault(sizes, lambda: step(self, policy, sampling))
        graph()

    monkeypatch.setattr(DecodeState, "__init__", init)
    monkeypatch.setattr(DecodeState, "run_step", run)
    return captured, replayed


def test_a_captured_step_is_replayed_and_does_the_same(load, monkeypatch):
    def two_rollouts(**options):
        arguments = load("llama")[0], PROMPTS, 4, 20, STOP
        for seeds in ([1, 2, 3], [4, 5, 6]):
            yield generate(*arguments, seeds, rows_at_once=7, **options)

    expected = list(two_rollouts())
    captured, replayed = capture_by_stand_in(monkeypatch)
    buffers = {}
    for rollout, before in zip(two_rollouts(buffers=buffers), expected):
        assert torch.equal(rollout.ids, before.ids)
        torch.testing.assert_close(rollout.old_logprobs, before.old_logprobs, atol=1e-5, rtol=0)
    assert len(buffers) == 1 and 0 < len(captured) < len(replayed)


def test_sampling_goes_on_without_graphs_where_a_capture_fails(load, monkeypatch, capsys):
    """torch leaves its capturing stream current when the capture fails."""
    create = DecodeState.__init__

    def init(self, *arguments):
        create(self, *arguments)
        self.graphs = {}
        self.cache.static = True

    @contextlib.contextmanager
    def capture(graph, pool):
        streams.append("that of the capture")
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    streams = ["default"]
    arguments = load("llama")[0], PROMPTS, 4, 20, STOP, [1, 2, 3]
    expected = generate(*arguments)
    monkeypatch.setattr(DecodeState, "__init__", init)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(DecodeState, "decode_step", only_outside(DecodeState.decode_step, streams))
    rollout = generate(*arguments)
    assert torch.equal(rollout.ids, expected.ids)
    assert streams == ["default", "that of the capture", "default"]
    said = capsys.readouterr().out
    assert "without CUDA graphs" in said and said.count("not permitted when stream") == 1


def only_outside(step, streams):
    """What is captured is not run."""

    def decode_step(*arguments):
        if streams[-1] == "default":
            step(*arguments)

    return decode_step


def test_steps_are_captured_again_only_where_something_has_changed(load, monkeypatch):
    """They were once captured again for each batch with another longest prompt, and never when
    parameters had moved. Another sampling needs other graphs."""
    capture_by_stand_in(monkeypatch)
    model, buffers = copy.deepcopy(load("llama")[0]), {}

    def state_of(prompts, sampling=Sampling()):
        generate(model, prompts, 4, 20, [], list(range(len(prompts))), sampling, buffers=buffers)
        [state] = buffers.values()
        return state

    first = state_of(PROMPTS)
    assert state_of([prompt[:3] for prompt in PROMPTS]) is first  # shorter: there is room
    longer = state_of([[5] * 40] * 3)
    assert longer is not first and state_of(PROMPTS) is longer
    sizes = len(longer.graphs)
    warmer = state_of(PROMPTS, Sampling(1.1))
    assert warmer is longer and len(longer.graphs) > sizes  # other graphs, the same cache
    sizes = len(longer.graphs)
    assert state_of(PROMPTS[:2], Sampling(1.1)) is warmer  # an evaluation asks for fewer rows
    model.load_state_dict({name: p.clone() for name, p in model.state_dict().items()}, assign=True)
    assert state_of(PROMPTS, Sampling(1.1)) is not warmer
