"""Tokens as text: responses for rewards and people, the text of each token, a prompt to look at."""

import re

from lib.flags import shorten

LINES = 15  # most lines of a prompt on the screen


def decode(tokenizer, ids) -> str:
    """Special tokens are kept, and no space is added or removed."""
    return tokenizer.decode(
        ids,
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
        spaces_between_special_tokens=False,
    )


def opened_thought(tokenizer, prompt) -> str:
    """The <think> in which the prompt ends, as some chat templates have it, or ''."""
    found = re.search(r"<think>\s*$", decode(tokenizer, prompt[-16:]))
    return found[0] if found else ""


def response_text(tokenizer, prompt, response, finished) -> str:
    """A response as rewards and people get it: token ids without the stop token, as text. Other
    special tokens stay, <think> may be one. A <think> in which the prompt ends begins the text."""
    ids = response[: len(response) - finished]
    return opened_thought(tokenizer, prompt) + decode(tokenizer, ids)


def token_texts(tokenizer, prompt, response, finished) -> list[str]:
    """The text of each token. They join to `response_text`: a character of several tokens goes to
    the last of them, a <think> in which the prompt ends to the first, and a stop token has none."""
    ids = response[: len(response) - finished]
    text = decode(tokenizer, ids)
    texts = []
    place = 0  # characters of the text so far
    first, read = 0, 0  # tokens first:read are decoded before, because the first may lose its space
    for i in range(len(ids)):
        before = decode(tokenizer, ids[first:read])
        piece = decode(tokenizer, ids[first : i + 1])[len(before) :]
        if piece.endswith("\ufffd") or not text.startswith(piece, place):
            piece = ""  # a part of a character
        else:
            first, read = read, i + 1
        texts.append(piece)
        place += len(piece)
    if texts:
        texts[-1] += text[place:]
    texts += [""] * finished
    texts[0] = opened_thought(tokenizer, prompt) + texts[0]
    return texts


def describe_prompt(tokenizer, ids, answer) -> str:
    """A prompt as the model gets it, with its special tokens, and the reference answer."""
    lines = decode(tokenizer, ids).split("\n")
    if len(lines) > LINES - 2:
        left_out = len(lines) - (LINES - 3)
        lines = [*lines[:7], f"... {left_out} lines ...", *lines[-(LINES - 10) :]]
    # white space as it is: a model sees two spaces as another token
    shown = ["    | " + (line if len(line) <= 160 else line[:157] + "...") for line in lines]
    last = decode(tokenizer, ids[-1:])
    title = f"prompt     {len(ids)} tokens, the last is {last!r}:"
    return "\n".join([title, *shown, f"answer     {shorten(str(answer), 160)}"]) + "\n"
