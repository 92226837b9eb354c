"""Prompts as chat templates and tokenizers make them, without what they lose or add in silence."""

import json
import re
from datetime import datetime
from functools import lru_cache

from lib.flags import UserError, first_line

# columns of a problem that go to the chat template
TEMPLATE_COLUMNS = {"tools", "chat_template_kwargs"}
TODAY = datetime(2025, 1, 1)  # in every chat template that asks for the date


def encode(texts, tokenizer) -> list[list[int]]:
    """Token ids of prompts. A special token that the tokenizer appends is removed: after its own
    end-of-text token a model would begin something new."""
    specials = set(tokenizer.all_special_ids)
    # a chat template writes the special tokens itself
    prompts = tokenizer(texts, add_special_tokens=tokenizer.chat_template is None)["input_ids"]
    for text, ids in zip(texts, prompts):
        while ids and ids[-1] in specials:
            if text.rstrip().endswith(tokenizer.convert_ids_to_tokens(ids[-1])):
                break
            ids.pop()
    return prompts


def chat_text(messages, columns, tokenizer) -> str:
    """The text of a conversation. Where the template has no system role, its text is put before the
    first user message.

    columns: what else a problem has; of it "tools" and "chat_template_kwargs" go to the template
    """
    without = without_system(messages)
    try:
        text = apply_template(messages, columns, tokenizer)
    except UserError:
        if without == messages:
            raise
        text = ""
    lost = [row for row in messages if row["role"] == "system" and not is_in(row["content"], text)]
    if lost and without != messages:
        # the template refuses the system role (Gemma's), or drops it without a word
        text = apply_template(without, columns, tokenizer)
    return text


def is_in(part, text) -> bool:
    """Whether a text contains another one, whatever the white space."""
    return " ".join(part.split()) in " ".join(text.split())


def without_system(messages) -> list[dict]:
    """System messages are put before the text of the first user message, if there is one."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    for i, message in enumerate(others):
        if system and message["role"] == "user":
            others[i] = {**message, "content": "\n\n".join([*system, message["content"]])}
            return others
    return messages


def apply_template(messages, columns, tokenizer) -> str:
    """The chat template's text, up to where the response begins. UserError: it refuses them."""
    half = messages[-1]["role"] == "assistant"  # a turn that the response continues
    options = {"add_generation_prompt": not half, "continue_final_message": half}
    try:
        options |= columns.get("chat_template_kwargs") or {}
        tools = columns.get("tools")
        template = freeze_date(tokenizer.get_chat_template(None, tools))
        return tokenizer.apply_chat_template(
            messages, tools, chat_template=template, tokenize=False, **options
        )
    except Exception as error:  # of jinja2, or of what a template calls
        reason = first_line(error)
        raise UserError(f"the model's chat template refuses the prompt: {reason}") from None


def shared_prompting(problems, system) -> tuple[str, dict]:
    """The system message and the TEMPLATE_COLUMNS that all problems of a .jsonl file have, so that
    another prompt can be given in the same way. Where they differ: `system`, {}."""
    found = set()
    for problem in problems:
        first = problem.prompt[0] if isinstance(problem.prompt, list) else {"role": "user"}
        text = first["content"] if first["role"] == "system" else system
        names = problem.columns.keys() & TEMPLATE_COLUMNS
        columns = {name: problem.columns[name] for name in names}
        found.add(json.dumps([text, columns], sort_keys=True))
    return json.loads(found.pop()) if len(found) == 1 else (system, {})


@lru_cache
def freeze_date(template) -> str:
    """Equal runs have equal prompts: 'on {{ strftime_now("%Y") }}' -> 'on {{ "2025" }}'"""

    def write(call):
        return json.dumps(TODAY.strftime(call[2]))

    return re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", write, template)
