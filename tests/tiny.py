"""Folders of tiny models with random weights, as Hugging Face writes them: what the tests load
instead of a download.

    python tests/tiny.py FOLDER TEXT_FILE   # one for each architecture, tokenizers trained on it

Between them they have grouped heads, a sliding window, soft-capping, a chat template, one that
refuses a system turn, pad = eos, and no pad token.
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SIZES = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    head_dim=16,
    max_position_embeddings=1536,
)
ARCHITECTURES = {
    "llama": dict(SIZES, num_key_value_heads=2),
    "qwen2": dict(SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": dict(SIZES, num_key_value_heads=2),
    "gemma2": dict(
        SIZES,
        num_key_value_heads=2,
        sliding_window=8,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=20.0,
        final_logit_softcapping=10.0,
    ),
    "gpt2": dict(n_embd=64, n_layer=2, n_head=4, n_positions=1536),
    "mistral": dict(SIZES, num_key_value_heads=2, sliding_window=8),
    "phi3": dict(SIZES, num_key_value_heads=2),
}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + CHATML
)
TEXT = [
    f"Question: Ann has {a} apples and buys {b} more for ${a * b}.50. How many has she?\nAnswer: {a} + {b} = {a + b}"
    for a in range(20)
    for b in range(20)
]


def make_tokenizer(architecture: str, texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 600 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    pad = {"gpt2": dict(pad_token="<|endoftext|>"), "phi3": {}}.get(
        architecture, dict(pad_token="<|pad|>")
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", **pad)
    fast.chat_template = {"qwen2": CHATML, "qwen3": CHATML, "gemma2": NO_SYSTEM}.get(architecture)
    return fast


def make_folder(
    folder: Path, architecture: str, texts: list[str] | None = None, seed: int = 0, **changes
) -> Path:
    """Writes folder; returns it. Weights are wide enough that greedy choices are clear; the
    vocabulary may be wider than the tokenizer, as it is in Qwen2."""
    tokenizer = make_tokenizer(architecture, texts or TEXT)
    torch.manual_seed(seed)
    ids = dict(
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    config = AutoConfig.for_model(
        architecture,
        vocab_size=600,
        initializer_range=0.2,
        **ids,
        **{**ARCHITECTURES[architecture], **changes},
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    for name in ARCHITECTURES:
        lines = Path(sys.argv[2]).read_text(encoding="utf-8").splitlines()
        print(make_folder(Path(sys.argv[1]) / name, name, lines))
