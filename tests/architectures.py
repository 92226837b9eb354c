"""Which form of the sampler and of the update each architecture of transformers is trained by, and
how far its log-probs are from those of a forward pass over the whole row.

    python tests/architectures.py               # the table of docs/reliability.md
    python tests/architectures.py mamba bert    # some of its rows

Each is a tiny model with random parameters, made from its config.
"""

import sys
from contextlib import redirect_stdout
from inspect import signature
from pathlib import Path

import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.choose
import loss
import sample
import train
from lib.checks import check_causal
from lib.estimate import memory_table
from lib.flags import UserError
from sample import Sampling

# a config gets those that it knows; windows are shorter than the rows
SIZES = dict(
    tiny.SIZES,
    num_key_value_heads=2,
    vocab_size=600,
    initializer_range=0.2,
    init_std=0.2,
    ffn_dim=128,
    rotary_dim=8,
    mamba_n_heads=4,
    num_experts_per_tok=2,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=1,
)
EXPERTS = "num_experts num_local_experts n_routed_experts"
WIDTHS = """sliding_window window_size attention_window_size attention_chunk_size
    moe_intermediate_size shared_expert_intermediate_size"""
SIZES |= dict.fromkeys(EXPERTS.split(), 4) | dict.fromkeys(WIDTHS.split(), 32)
MIXED = ["linear_attention", "full_attention"]
SLIDING = ["sliding_attention", "full_attention"]
# a comma begins the name of a variant
NAMES = """gpt2 gpt_neo gpt_neox gptj codegen opt bloom falcon falcon,alibi mpt llama
    llama4_text mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next gemma gemma2
    gemma3_text phi phi3 stablelm starcoder2 olmo olmo2 granite granitemoe cohere cohere2 glm
    glm4 persimmon nemotron smollm3 deepseek_v2 deepseek_v3 dbrx jamba bamba falcon_h1 mamba
    mamba2 recurrent_gemma rwkv xlstm lfm2 lfm3 minimax qwen3_5_text granitemoehybrid olmo_hybrid
    nemotron_h olmo3 gemma4_text ministral3 hunyuan_v1_dense ernie4_5 exaone4 biogpt xglm bert
    roberta roberta,is_decoder"""
ARCHITECTURES = {name.replace(",", ", "): {} for name in NAMES.split()}
MOE = dict(num_key_value_heads=4, first_k_dense_replace=1)
# what else the config needs
ARCHITECTURES |= {
    "gpt_neo": dict(num_layers=2, attention_types=[[["global", "local"], 1]]),
    "falcon, alibi": dict(alibi=True),
    "llama4_text": dict(layer_types=["chunked_attention", "full_attention"]),
    "qwen3_next": dict(layer_types=MIXED),
    "gemma3_text": dict(layer_types=SLIDING),
    "cohere": dict(logit_scale=1.0),
    "cohere2": dict(logit_scale=1.0, layer_types=SLIDING),
    "deepseek_v2": MOE,
    "deepseek_v3": dict(MOE, n_group=2, topk_group=1),
    "dbrx": dict(
        d_model=64,
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8),
        ffn_config=dict(ffn_hidden_size=64),
    ),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "bamba": dict(attn_layer_indices=[1]),
    "falcon_h1": dict(mamba_d_ssm=128),
    "mamba2": dict(num_heads=8),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"]),
    "rwkv": dict(rescale_every=1),
    "xlstm": dict(hidden_size=128, num_heads=4),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "qwen3_5_text": dict(layer_types=MIXED),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "olmo_hybrid": dict(layer_types=MIXED),
    "olmo3": dict(layer_types=SLIDING),
    "gemma4_text": dict(layer_types=SLIDING),
    "exaone4": dict(layer_types=SLIDING),
    "minimax": dict(layer_types=MIXED, block_size=16),
    "nemotron_h": dict(
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=2,
        ssm_state_size=16,
        chunk_size=16,
        moe_shared_expert_intermediate_size=32,
    ),
    "roberta, is_decoder": dict(is_decoder=True),
}
PROMPTS = [list(range(5, 25)), [8, 9], [9, 10, 11] * 4]
STOP = list(range(100, 105))
TOKENS = 40


def make_model(name):
    model_type = name.partition(",")[0]
    config_class = type(AutoConfig.for_model(model_type))
    known = {*signature(config_class).parameters, *config_class.attribute_map}
    sizes = {size: SIZES[size] for size in SIZES if size in known}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**sizes, **ARCHITECTURES[name]})
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def forward_logprobs(model, rollout):
    """(B, N) log-probs of the responses, each row by itself: no padding, no cache."""
    expected = torch.zeros_like(rollout.old_logprobs)
    spans = zip(rollout.prompt_lengths.tolist(), rollout.lengths.tolist())
    for row, (start, end) in enumerate(spans):
        ids = rollout.ids[row, :end]
        logprobs = model(ids[None], use_cache=False).logits[0].log_softmax(-1)
        expected[row, : end - start] = logprobs[:-1].gather(1, ids[1:, None])[start - 1 :, 0]
    return expected


def examine(name) -> dict:
    """What train.py does before its first step, and a rollout: {"sampler": "fast", "update":
    "plain", "gap": 1e-6}, or {"refused": the sentence}."""
    model = make_model(name)
    try:
        check_causal(name, model)
    except UserError as error:
        return {"refused": str(error)}
    memory_table(train.Config(), model, 1.0, len(PROMPTS[0]))
    forms = engine.choose.choose(model, PROMPTS, STOP, Sampling(), TOKENS)
    rollout = forms.generate(model, PROMPTS, 4, TOKENS, STOP, [1, 2, 3])
    learned, _ = forms.token_logprobs(model, rollout, Sampling())
    expected = forward_logprobs(model, rollout)
    gaps = [(found - expected).abs().max().item() for found in (rollout.old_logprobs, learned)]
    sampler = "plain" if forms.generate is sample.generate else "fast"
    if model._forward_pre_hooks:
        sampler += ", no cache"
    update = "plain" if forms.token_logprobs is loss.token_logprobs else "fast"
    return {"sampler": sampler, "update": update, "gap": max(gaps)}


if __name__ == "__main__":
    logging.set_verbosity_error()
    print("| architecture | sampler | update | gap |\n|---|---|---|---|")
    for name in sys.argv[1:] or ARCHITECTURES:
        with redirect_stdout(sys.stderr):
            found = examine(name)
        cells = ["refused", "", ""]
        if "refused" not in found:
            cells = [found["sampler"], found["update"], f"{found['gap']:.0e}"]
        print("|", " | ".join([name, *cells]), "|", flush=True)
