"""Whether prompts fit a model, said in a sentence before torch says it in a traceback."""

from lib.flags import UserError


def context_length(model) -> int | None:
    """The most tokens of prompt and response together, or None where the model names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


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
    if room is not None and longest + max_new_tokens > room:
        raise UserError(
            f"a prompt of {longest} tokens and --max_new_tokens {max_new_tokens} do not fit into "
            f"the model's context of {room}: lower the flag, or leave that prompt out"
        )
