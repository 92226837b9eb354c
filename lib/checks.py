"""Whether a model can be a policy, and whether prompts fit it, said in a sentence before torch says
it in a traceback."""

import sys

import torch
import transformers
from packaging.version import Version

from lib.flags import UserError, name_error

# the argument and the output that hold the KV cache: renamed in transformers 5.24
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
LATER = "its logits at a token depend on later tokens"


def context_length(model) -> int | None:
    """The most tokens of prompt and response together, or None where the model names no limit."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        # longer rows turn their keys by other angles, but cached keys stay as they are
        limit = rope.get("original_max_position_embeddings", limit)
    return limit


def check_prompts(policy, prompts, max_new_tokens) -> None:
    """UserError unless every prompt has a token and fits into the model's context with its
    response."""
    longest = max(map(len, prompts))
    if min(map(len, prompts)) == 0:
        raise UserError("a prompt is empty: the model needs at least one token to start from")
    highest = max(map(max, prompts))
    vocabulary = policy.get_input_embeddings().num_embeddings
    if highest >= vocabulary:
        knows = f"but the model knows {vocabulary}: its tokenizer is another model's"
        raise UserError(f"a prompt has token {highest}, {knows}")
    room = context_length(policy)
    if room is not None and longest >= room:
        raise UserError(
            f"a prompt has {longest} tokens, and the model's context is {room}: these problems "
            "need another --model, with a longer context"
        )
    if room is not None and longest + max_new_tokens > room:
        raise UserError(
            f"a prompt of {longest} tokens and --max_new_tokens {max_new_tokens} do not fit into "
            f"the model's context of {room}: lower the flag, or leave that prompt out"
        )


def check_causal(name, model) -> None:
    """UserError unless a row has the same logits as when the model reads it token by token, as the
    sampler does. A model whose cache gives other logits, or that has none, does without."""
    if hasattr(model.config, "rescale_every"):  # RWKV would divide its parameters, for good
        model.config.rescale_every = 0
    if reason := misfit(model):
        why = "it gives other logits than a forward pass" if reason == LATER else reason
        slow = "each new token reads the whole row, which is slow"
        print(f"{name}: its KV cache cannot be used ({why}): {slow}", file=sys.stderr)
        model.register_forward_pre_hook(read_all, with_kwargs=True)
        model.register_forward_hook(keep_ids)
        if reason := misfit(model):
            kind = f"{type(model).__name__} cannot sample token by token"
            raise UserError(f"model {name}: {kind} ({reason}): take a causal language model")


@torch.no_grad()
def misfit(model) -> str:
    """'' where two short rows have the same logits at once and token by token, else what is
    wrong."""
    count = model.get_input_embeddings().num_embeddings
    ids = torch.arange(24, device=model.device).view(2, 12) % count
    steps, cache = [], None
    try:
        expected = model(ids, use_cache=False).logits.float()
        for new in ids.split([5] + [1] * 7, 1):
            output = model(new, use_cache=True, logits_to_keep=1, **{CACHE: cache})
            steps.append(output.logits[:, -1].float())
            cache = output[CACHE]
    except Exception as error:  # a model may raise anything
        return name_error(error)
    gap = (torch.stack(steps, 1) - expected[:, 4:]).std()
    # bfloat16: rounding may lead to other experts
    if gap > expected.std() * (5e-5 if model.dtype == torch.float32 else 0.2):
        return LATER
    return ""


def read_all(model, arguments, options) -> tuple[tuple, dict]:
    """Before a forward pass: the ids of the row so far stand for the cache, and are read again."""
    past = options.pop(CACHE, None)
    ids = arguments[0] if past is None else torch.cat([past, arguments[0]], 1)
    return (ids,), {**options, "use_cache": False}


def keep_ids(model, arguments, output) -> None:
    output[CACHE] = arguments[0]


def without_keys(model) -> str:
    """Why no fast form fits a hybrid: '' for a model of attention layers only."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    attention = {"attention", "full_attention", "sliding_attention", "chunked_attention"}
    if others := sorted({*kinds} - attention - {"moe", "mlp"}):
        return f"its layers of type {', '.join(others)} keep a state instead of keys and values"
    return ""


def freeze_unused(model) -> int:
    """Of a model that also sees or hears, only the language model is trained: the rest gets no
    gradient from text, and would cost 16 bytes a parameter in the optimizer. Returns how many
    parameters are frozen."""
    if model.config.get_text_config() is model.config:
        return 0
    used = {*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()}
    unused = [parameter for parameter in model.parameters() if parameter not in used]
    for parameter in unused:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in unused)
