"""The fast forms are the plain forms: log-probs, entropies and gradients; `choose` notices where they are not."""

import copy
import types
from pathlib import Path

import architectures
import pytest
import tiny
import torch
import transformers
from conftest import parse_train
from transformers import AutoConfig, AutoModelForCausalLM

import fast
import loss
import sample
import train
from fast.generate import DecodeState, generate
from fast.logprobs import token_logprobs
from fast.memory import enable_gradient_checkpointing, memory_table
from lib.checks import check_causal
from lib.files import read_rows
from lib.flags import UserError
from loss import DENOMINATORS, LOSSES, NORMALISERS, RECIPES
from sample import Sampling

STOP = list(range(100, 200))
PROMPTS = [list(range(5, 25)), [8], [9, 10, 11] * 4]
PLAIN = fast.Forms()
FAST = fast.Forms(generate, token_logprobs)
MIXED, EQUAL, ONE = [0.2, 0.4, 0.9, 0.9], [0.7] * 4, [0.0, 0, 1, 0]


def sample_12(model, sampling=Sampling()):
    """3 prompts of 20, 1 and 12 tokens, 4 responses each of at most 12 tokens, of several lengths."""
    return generate(model, PROMPTS, 4, 12, STOP, [1, 2, 3], sampling)


def gradient(model, total):
    """All of it, as one vector."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)])


def double_loop(model, ids, start, end, temperature):
    """Log-prob and entropy of each response token from a forward pass each, summed up in Python's float64."""
    import math

    values = []
    for place in range(start, end):
        scaled = [
            logit / temperature
            for logit in model(torch.tensor([ids[:place]])).logits[0, -1].tolist()
        ]
        total = math.log(sum(math.exp(value - max(scaled)) for value in scaled)) + max(scaled)
        entropy = -sum(math.exp(value - total) * (value - total) for value in scaled)
        values.append((scaled[ids[place]] - total, entropy))
    return values


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_plain_logprobs_and_entropies_equal_a_double_loop_in_float64(load, architecture):
    model, _ = load(architecture)
    model = copy.deepcopy(model).double()
    rollout = sample_12(load(architecture)[0], Sampling(0.7))
    rows = torch.tensor([9, 0, 5])
    with torch.no_grad():
        logprobs, entropy = loss.token_logprobs(model, rollout, rows, Sampling(0.7))
        for row, found, ent in zip(rows.tolist(), logprobs.tolist(), entropy.tolist()):
            start, end = int(rollout.prompt_lengths[row]), int(rollout.lengths[row])
            expected = double_loop(model, rollout.ids[row].tolist(), start, end, 0.7)
            assert found[: end - start] == pytest.approx([value for value, _ in expected], abs=1e-5)
            assert ent[: end - start] == pytest.approx([value for _, value in expected], abs=1e-5)
            assert not any(found[end - start :]) and not any(ent[end - start :])


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_fast_form_has_the_values_and_gradients_of_the_plain_one(
    load, monkeypatch, architecture, by_hand, holes
):
    """With shared prompts (two architectures have a window of 8), tiles of 5 tokens, and tokens in the row that the
    policy did not write."""
    monkeypatch.setitem(fast.logprobs.TILE, "cpu", 5)
    model, _ = load(architecture)
    sampling = Sampling(0.8)
    rollout = sample_12(model, sampling)
    if holes:
        rollout.response_mask[::2, 2:5] = False
        rollout.old_logprobs *= rollout.response_mask
    rows = torch.arange(12)
    weights = torch.linspace(-1, 2, rollout.response_mask.numel()).view(12, -1)
    shapes = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: shapes.append(args[0].shape)
    )
    for with_entropy in (False, True):
        found, expected = [], []
        for form, out, more in (
            (token_logprobs, found, {"by_hand": by_hand}),
            (loss.token_logprobs, expected, {}),
        ):
            logprobs, entropy = form(
                model, rollout, rows, sampling, with_entropy=with_entropy, **more
            )
            total = (
                (weights * logprobs).sum() + (weights * entropy).sum() * 2
                if with_entropy
                else (weights * logprobs).sum()
            )
            out += [
                logprobs.detach(),
                entropy.detach() if with_entropy else logprobs.detach(),
                gradient(model, total),
            ]
        torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=0)
        assert ((found[2] - expected[2]).norm() / expected[2].norm()).item() < 3e-6
        assert ((rollout.response_mask) | (found[0] == 0)).all()
    hook.remove()
    assert shapes[:2] == [
        (3, 19),
        (12, (rollout.lengths - rollout.prompt_lengths).max()),
    ]  # the prompts once, then the rest
    known = rollout.old_logprobs + 1.0 * rollout.response_mask
    logprobs, _ = token_logprobs(model, rollout, rows, sampling, known=known, by_hand=by_hand)
    assert torch.equal(logprobs, known)  # taken at its word, but with a gradient
    got = gradient(model, (weights * logprobs).sum())
    plain, _ = loss.token_logprobs(model, rollout, rows, sampling)
    whole = gradient(model, (weights * plain).sum())
    assert ((got - whole).norm() / whole.norm()).item() < 3e-6


def masked_by_ratio(logprobs, old, weights, mask, config):
    """Has the same slope at a ratio of 1 and of 0.37: a probe at these two points once took it for linear."""
    ratio = (logprobs - old).exp()
    return -weights * logprobs * ((ratio > 0.2) & (ratio < 5)), torch.zeros_like(mask)


@pytest.mark.parametrize("name", [*LOSSES, "masked_by_ratio"])
def test_backward_equals_plain_autograd(load, monkeypatch, name):
    """Every loss, with a KL and an entropy term, ratios on both sides of every bound, in micro-batches of any size,
    whichever form."""
    monkeypatch.setitem(train.LOSSES, "masked_by_ratio", masked_by_ratio)
    model, _ = load("llama")
    rollout = sample_12(model)
    noise = torch.randn(rollout.old_logprobs.shape, generator=torch.Generator().manual_seed(0))
    rollout.old_logprobs += 1.5 * noise * rollout.response_mask
    config = types.SimpleNamespace(
        **vars(parse_train("--kl_beta", 0.1, "--entropy_coef", 0.3))
        | {"loss": name, "sampling": Sampling()}
    )
    mask = rollout.response_mask
    weights = torch.linspace(-1, 2, 12)[:, None]
    ref_logprobs = 0.7 * rollout.old_logprobs
    scale = DENOMINATORS["sequence"](rollout.response_lengths, config)
    rows = torch.arange(12)
    logprobs, entropy = loss.token_logprobs(model, rollout, rows, Sampling())
    each, clipped = train.LOSSES[name](logprobs, rollout.old_logprobs, weights, mask, config)
    each = each + 0.1 * (logprobs - ref_logprobs) ** 2 / 2 - 0.3 * entropy
    whole = gradient(model, (each * mask * scale[:, None]).sum())
    if name != "logprob":
        assert clipped.any() or name == "masked_by_ratio"
    for forms in (PLAIN, FAST):
        for tokens in (1, 50, 10**6):
            model.zero_grad()
            train.backward(
                forms, model, rollout, rows, weights, scale, ref_logprobs, False, config, tokens
            )
            got = torch.cat([p.grad.flatten() for p in model.parameters()])
            assert ((got - whole).norm() / whole.norm()).item() < 3e-6
    model.zero_grad()


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_do_not_depend_on_the_order_of_rows(load, recipe):
    """Groups and rows within them in another order: the same gradient, by every recipe."""
    model, _ = load("llama")
    rollout = sample_12(model)
    config = parse_train("--recipe", recipe)
    rewards = torch.tensor([MIXED, EQUAL, ONE])
    groups, within = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    order = (groups[:, None] * 4 + within).flatten()
    gradients = []
    for these, values in ((rollout, rewards), (rollout.rows(order), rewards[groups][:, within])):
        weights = NORMALISERS[config.normaliser](values, config).view(-1, 1)
        scale = DENOMINATORS[config.denominator](these.response_lengths, config)
        model.zero_grad()
        train.backward(FAST, model, these, torch.arange(12), weights, scale, None, True, config, 60)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item() < 3e-6
    model.zero_grad()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient_and_no_sample(load, architecture):
    """GPT-2 has dropout, which train mode would turn on: only the layers that recompute may be in it, and not while
    sampling, where train mode drops the KV cache."""
    model, _ = load(architecture)
    model = copy.deepcopy(model)
    rollout = sample_12(model)
    logprobs, _ = loss.token_logprobs(model, rollout, torch.arange(12), Sampling())
    expected = gradient(model, logprobs.sum())
    block = next(layer for layer in model.modules() if isinstance(layer, torch.nn.ModuleList))[0]
    calls = []
    next(block.children()).register_forward_hook(lambda *arguments: calls.append(1))
    enable_gradient_checkpointing(model)
    for form in (loss.token_logprobs, token_logprobs):
        calls.clear()
        found = gradient(model, form(model, rollout, torch.arange(12), Sampling())[0].sum())
        assert len(calls) == 2  # forward, and again in the backward pass
        assert ((found - expected).norm() / expected.norm()).item() < 3e-6
    assert torch.equal(sample_12(model).ids, rollout.ids)
    assert torch.equal(sample.generate(model, PROMPTS, 4, 12, STOP, [1, 2, 3]).ids, rollout.ids)


# ------------------------------------------------------------------------------------------------------------ choose


def choose(model, sampling=Sampling()):
    return fast.choose(model, PROMPTS, STOP, sampling, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_fast_forms_are_chosen_for_the_usual_architectures(load, architecture, dtype):
    model = copy.deepcopy(load(architecture)[0]).to(dtype)
    assert choose(model) == FAST
    assert fast.choose(model, PROMPTS, STOP, Sampling(), 12, "off") == PLAIN


def test_an_edit_of_a_shared_function_is_fast_at_once(load, monkeypatch):
    """policy_distribution cut to the two best tokens: sampler and learner follow, and the forms still agree."""

    def two_best(logits, sampling):
        second = logits.float().topk(2, -1).values[..., -1:]
        return logits.float().masked_fill(logits < second, -1e9)

    model, _ = load("llama")
    for module in (sample, loss, fast.logprobs):
        monkeypatch.setattr(module, "policy_distribution", two_best)
    assert choose(model) == FAST
    rollout = FAST.generate(model, PROMPTS, 4, 12, STOP, [1, 2, 3])
    logprobs, _ = loss.token_logprobs(model, rollout, torch.arange(12), Sampling())
    torch.testing.assert_close(rollout.old_logprobs, logprobs, atol=1e-5, rtol=0)
    assert (rollout.old_logprobs.exp()[rollout.response_mask] > 0.01).all()


def test_an_edit_of_token_stats_is_differentiated_by_autograd(load, monkeypatch):
    """Log-probs of twice the logits in the learner alone: the gradient written by hand no longer fits, autograd in
    tiles does."""

    def doubled(logits, tokens, sampling):
        logp = (2 * logits.float()).log_softmax(-1)
        return logp.gather(-1, tokens[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    monkeypatch.setattr(loss, "token_stats", doubled)
    monkeypatch.setattr(fast.logprobs, "token_stats", doubled)
    forms = choose(load("llama")[0])
    assert forms.generate is generate
    assert forms.token_logprobs.func is token_logprobs and forms.token_logprobs.keywords == {
        "by_hand": False
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_of_a_plain_form_takes_effect_and_is_said(load, monkeypatch, capsys, dtype):
    model = copy.deepcopy(load("llama")[0]).to(dtype)
    before = sample.generate, loss.token_logprobs

    def forced(*arguments, **more):
        rollout = before[0](*arguments, **more)
        rollout.ids[torch.arange(len(rollout.ids)), rollout.prompt_lengths] = 9
        return rollout

    monkeypatch.setattr(sample, "generate", forced)
    monkeypatch.setattr(
        loss, "token_logprobs", lambda *a, **k: [2 * value for value in before[1](*a, **k)]
    )
    forms = choose(model)
    assert (forms.generate, forms.token_logprobs) == (sample.generate, loss.token_logprobs)
    said = capsys.readouterr().out
    assert (
        said.count("LlamaForCausalLM does not fit the fast form of") == 2
        and "they differ by" in said
    )


@pytest.mark.parametrize("more", ["halved", "bias"])
def test_a_head_that_is_more_than_a_product_gets_the_right_gradient(load, more):
    """A bias is differentiated in tiles; logits halved behind the head's back are left to the plain form."""
    model = copy.deepcopy(load("llama")[0])
    if more == "halved":
        model.register_forward_hook(
            lambda module, args, out: out.__setitem__("logits", out.logits / 2)
        )
    else:
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, model.lm_head.out_features))
    forms = choose(model)
    assert (forms.token_logprobs is loss.token_logprobs) == (more == "halved")
    rollout = sample_12(model)
    found, whole = (
        gradient(model, form(model, rollout, torch.arange(12), Sampling())[0].sum())
        for form in (forms.token_logprobs, loss.token_logprobs)
    )
    assert ((found - whole).norm() / whole.norm()).item() < 3e-6


def test_out_of_memory_in_the_check_says_nothing_about_the_form(load, monkeypatch):
    def starved(*arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fast.generate, "generate", starved)
    monkeypatch.setattr(fast.logprobs, "token_logprobs", starved)
    assert choose(load("llama")[0]) == fast.Forms(starved, starved)


def of_each_kind(names, quick):
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


QUICK = ["gpt_neo", "mpt", "mamba", "minimax", "bert"]


@pytest.mark.parametrize("name", of_each_kind(architectures.ARCHITECTURES, QUICK))
def test_each_architecture_samples_and_learns_what_a_forward_pass_gives_or_is_refused(name):
    """Each once went wrong: a window that short rows do not reach (gpt_neo), alibi (mpt), no KV cache (mamba), a cache
    that counts positions wrongly (minimax), a model that looks at later tokens (bert). The page says the same."""
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
    """In eval mode its forward pass divides some of them, in place: they would be saved so, and divided again."""
    model = architectures.make_model("rwkv")
    before = copy.deepcopy(model.state_dict())
    check_causal("rwkv", model)
    model(torch.zeros(1, 4, dtype=torch.long))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(("limit", "fits"), [(60, True), (59, False)])
def test_rows_end_where_longrope_changes_the_positions(monkeypatch, limit, fits):
    """Phi-3's rope: beyond the limit a row has other angles from its first token on, and cached keys do not fit."""
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
    flags = "--model ./model --reward my_rewards.ones --steps 2 --prompts_per_step 2"
    run = train.main(parse_train(*flags.split(), "--eval_problems", 2))
    rows = read_rows(run / "metrics.jsonl")
    assert all(row["sampler_gap"] < 1e-3 and row["grad_norm"] > 0 for row in rows)


def test_memory_without_attention_is_estimated_and_what_cannot_be_is_said():
    """Mamba's config has no attention heads: that was once a traceback."""
    model = architectures.make_model("mamba")
    assert "keys and values                 0.00" in memory_table(train.Config(), model, 1.0, 20)
    model.config = None
    said = memory_table(train.Config(), model, 1.0, 20)
    assert said.startswith("memory: no estimate for MambaForCausalLM (") and said.count("\n") == 1


def test_ten_steps_with_plain_and_with_fast_forms_agree(base):
    """Loss and reward to 1e-4, and the held-out accuracy exactly."""
    rows = []
    for mode in ("auto", "off"):
        flags = (
            "--model",
            base,
            "--steps",
            10,
            "--prompts_per_step",
            4,
            "--eval_problems",
            20,
            "--fast",
            mode,
        )
        run = train.main(parse_train(*flags, "--reward", "exact + 0.1*length"))
        rows.append(read_rows(run / "metrics.jsonl"))
    for one, other in zip(*rows, strict=True):
        for key in ("loss", "reward", "response_length", "eval_accuracy", "entropy", "grad_norm"):
            assert one.get(key) == pytest.approx(other.get(key), abs=1e-4), (one["step"], key)


# ------------------------------------------------------------------------------------- CUDA graphs, without a GPU

META = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gpt2": {},
    "mistral": {},
    "phi3": {},
    "gemma3_text": {},
    "olmo2": {},
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "starcoder2": {},
    "granite": {},
}


@pytest.mark.parametrize("architecture", META)
def test_a_decode_step_looks_at_no_value(monkeypatch, architecture):
    """Tensors on the meta device have no values: a step that ran there looks at none, and can be captured."""
    # transformers 5.0 asks for this, and torch does not know it for this device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *arguments: False)
    sizes = dict(tiny.SIZES, num_key_value_heads=2, vocab_size=600, pad_token_id=0)
    config = AutoConfig.for_model(
        architecture, **{**sizes, **tiny.ARCHITECTURES.get(architecture, {}), **META[architecture]}
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        state = DecodeState(model, 6, 4, 64, 16)
        keys = torch.zeros(2, 3, 2, 7, 16, dtype=torch.bfloat16)
        if architecture == "gpt2":
            keys = torch.zeros(2, 3, 4, 7, 16, dtype=torch.bfloat16)
        layers = [
            types.SimpleNamespace(keys=keys[0], values=keys[1])
        ] * config.get_text_config().num_hidden_layers
        state.cache.set_prompts(types.SimpleNamespace(layers=layers))
        state.slots, state.attended = 4, 32
        state.cache.static = True
        state.cache.resize(None, 32)
        state.cache.tensors = [
            t.new_zeros(4, t.shape[1], 64, t.shape[3]) for t in state.cache.tensors
        ]
        with torch.no_grad(), fast.generate.decode_attention(model):
            state.decode_step(model, Sampling(0.9))


def capture_by_stand_in(monkeypatch):
    """CUDA graphs played by running the step again: what is replayed must read only tensors that stay where they are.
    -> [captured, replayed]"""
    counts = [0, 0]
    create, run_step = DecodeState.__init__, DecodeState.run_step

    class Graph:
        def __init__(self, step):
            self.step = step
            counts[0] += 1

        def replay(self):
            counts[1] += 1
            self.step()

    def init(self, *arguments):
        create(self, *arguments)
        self.graphs = {}
        self.cache.static = True

    def run(self, policy, sampling):
        sizes = (self.slots, self.attended)
        if sizes in self.graphs:
            run_step(self, policy, sampling)
            return
        graphs, self.graphs = self.graphs, None
        run_step(self, policy, sampling)
        self.graphs = graphs

        def step():
            kept = self.slots, self.attended
            self.slots, self.attended = sizes
            self.decode_step(policy, sampling)
            self.slots, self.attended = kept

        self.graphs[sizes] = Graph(step)

    monkeypatch.setattr(DecodeState, "__init__", init)
    monkeypatch.setattr(DecodeState, "run_step", run)
    return counts


def test_a_captured_step_is_replayed_and_does_the_same(load, monkeypatch):
    model, _ = load("llama")
    expected = [
        generate(model, PROMPTS, 4, 20, STOP, seeds, rows_at_once=7)
        for seeds in ([1, 2, 3], [4, 5, 6])
    ]
    counts, buffers = capture_by_stand_in(monkeypatch), {}
    for before, seeds in zip(expected, ([1, 2, 3], [4, 5, 6])):
        again = generate(model, PROMPTS, 4, 20, STOP, seeds, rows_at_once=7, buffers=buffers)
        assert torch.equal(again.ids, before.ids)
        torch.testing.assert_close(again.old_logprobs, before.old_logprobs, atol=1e-5, rtol=0)
    assert len(buffers) == 1 and 0 < counts[0] < counts[1]


def test_steps_are_captured_again_only_where_something_has_changed(load, monkeypatch):
    """They were once captured again for each batch with another longest prompt, and never when parameters had moved.
    Another sampling needs other graphs."""
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
    warmer = state_of(PROMPTS, Sampling(1.1))
    assert warmer is not longer
    model.load_state_dict({name: p.clone() for name, p in model.state_dict().items()}, assign=True)
    assert state_of(PROMPTS, Sampling(1.1)) is not warmer
