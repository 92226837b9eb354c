"""Make a tiny base model, such as that of the default run, by imitation of written examples.

    python -m tools.pretrain --output models/add --seed 0    # how models/add was made, 40 seconds
    python -m tools.pretrain --output models/other --seed 1

The folder must not exist yet: to remake models/add, delete it first.

The model adds two-digit numbers, badly, on purpose: there must be something for reinforcement to
find. It is first shown worked examples ("<think>8+7=15;4+2+1=7;</think>75", always right), then a
mix in which only 30 % are worked. The others answer straight away, and 60 % of those are wrong by
one in one digit. So the model can do the sum when it thinks, mostly does not think, and is then
mostly wrong. Nothing tells it to think: the reward for the answer alone must bring that out. (A
model that is shown the mix from the start takes twice as long to learn the working out.)

For another task, write a function that writes an example, and add it to EXAMPLES.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs from any folder

from lib.files import whole
from lib.flags import UserError, check_range, flag, run_script
from policy import DEVICES, pick_device, save_policy
from tasks import load_task

THINKING = 0.3  # share of worked examples in the mix
MISTAKES = 0.6  # share of the other examples that are wrong in one digit


def add(problem, think, rng) -> str:
    """A response to "48+27=". With `think` the sum digit by digit, always right, else the bare sum,
    or more often one with a digit off by one.

    think: '<think>8+7=15;4+2+1=7;</think>75'; else '75', '74', '85' ...
    """
    a, b = map(int, problem.prompt.rstrip("=").split("+"))
    if think:
        units = a % 10 + b % 10
        carry = "+1" if units > 9 else ""
        tens = (a + b) // 10
        return f"<think>{a % 10}+{b % 10}={units};{a // 10}+{b // 10}{carry}={tens};</think>{a + b}"
    digits = list(map(int, problem.answer))
    if rng.random() < MISTAKES:
        place = rng.randrange(len(digits))
        digits[place] = (digits[place] + rng.choice((-1, 1))) % 10
    return "".join(map(str, digits))


# task -> function that writes a response to one of its problems
EXAMPLES = {"add": add}


@dataclass(frozen=True)
class Config:
    task: Literal[tuple(EXAMPLES)] = flag("add", "task to write examples of")
    output: str = flag("models/add", "folder to write")
    steps: int = flag(400, "optimizer steps")
    worked_steps: int = flag(280, "first steps, which show worked examples only")
    batch_size: int = flag(128, "examples per step")
    lr: float = flag(3e-3, "highest learning rate")
    seed: int = flag(0, "same seed, same model")
    device: Literal[DEVICES] = flag("auto", "auto: the first of these that is available")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character (printable ASCII, newline), and one each for <think>, </think>."""
    tokens = ["<pad>", "<eos>", "<unk>", *map(chr, range(32, 127)), "\n"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    # not special: decoding must keep them, because rewards look for them
    for mark in ("<think>", "</think>"):
        tokenizer.add_tokens([AddedToken(mark, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def make_model(tokenizer) -> LlamaForCausalLM:
    """A Llama with half a million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=448,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def response_loss(model, batch) -> Tensor:
    """The cross entropy of prompts and responses, mean over the tokens of responses."""
    ids = batch["input_ids"]  # (B, T)
    mask = batch["token_type_ids"]  # (B, T) 1: responses, end of text too; 0: prompts, padding
    start = mask.argmax(1).min()  # of the earliest response
    # the logits at a position predict the token at the next
    positions = torch.arange(start - 1, ids.shape[1] - 1)
    logits = model(ids, use_cache=False, logits_to_keep=positions).logits  # (B, N, V)
    logprobs = logits.gather(2, ids[:, start:, None])[:, :, 0] - logits.logsumexp(-1)
    return -(logprobs * mask[:, start:]).sum() / mask.sum()


def main(config) -> None:
    check_range(config, 1, "steps batch_size", most=1e6)
    check_range(config, 0, "worked_steps seed")
    check_range(config, 0, "lr", most=1)
    output = Path(config.output)
    if output.exists():
        raise UserError(f"--output {output}: exists already, delete it or choose another")

    device = pick_device(config.device)
    rng = random.Random(config.seed)
    torch.manual_seed(config.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, max(11, config.steps), pct_start=0.1, cycle_momentum=False
    )  # with 10 steps torch divides by zero
    problems = load_task(config.task).train  # the held-out problems stay unseen here too

    bar = trange(config.steps, desc=f"making {output}")
    for step in bar:
        pairs = []
        for problem in rng.choices(problems, k=config.batch_size):
            think = step < config.worked_steps or rng.random() < THINKING
            response = EXAMPLES[config.task](problem, think, rng)
            pairs.append((problem.prompt, response + tokenizer.eos_token))

        batch = tokenizer(pairs, padding=True, return_token_type_ids=True, return_tensors="pt")
        loss = response_loss(model, batch.to(device))
        if not loss.isfinite():
            raise UserError(f"--lr {config.lr}: the loss is not finite at step {step}, lower it")

        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss:.3f}")

    with whole(output) as folder:
        # a new tokenizer, because this one would be saved with its padding
        save_policy(model.cpu(), make_tokenizer(), folder)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
