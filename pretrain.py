"""Makes the tiny base model of the default run, by imitation of written examples.

    python pretrain.py                                  # models/add, about 40 seconds; train.py does it when missing
    python pretrain.py --output models/other --seed 1

It answers sums of two-digit numbers, badly, on purpose: there must be something for reinforcement to find. It is shown
worked examples first ("<think>8+7=15;4+2+1=7;</think>75", always right), and then a mix in which only 30 % are worked:
the rest answer straight away, and 60 % of those are wrong by one in one digit. So it can do the sum when it thinks,
mostly does not think, and is mostly wrong then. Nobody tells it to think: the reward of the answer alone must bring
that out. (Shown the mix from the start, it takes twice as long to learn the working out.)
"""

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.hf_argparser import HfArg

from flags import UserError, need, run_script
from policy import pick_device, response_logprobs, save_policy
from tasks import load_task


@dataclass(frozen=True)
class Config:
    output: str = HfArg(default="models/add", help="folder to write")
    steps: int = HfArg(default=400, help="optimizer steps")
    worked_steps: int = HfArg(default=280, help="how many of them, at first, show worked examples alone")
    batch_size: int = HfArg(default=128, help="examples per step")
    lr: float = HfArg(default=3e-3, help="highest learning rate")
    thinking: float = HfArg(default=0.3, help="share of worked examples in the mix")
    mistakes: float = HfArg(default=0.6, help="share of the others in the mix that are wrong by one in one digit")
    seed: int = HfArg(default=0, help="same seed, same model")
    device: Literal["auto", "cuda", "mps", "cpu"] = HfArg(default="auto", help="auto: the first of these that is there")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character (printable ASCII and the newline), and one each for <think> and </think>."""
    tokens = ["<pad>", "<eos>", "<unk>"] + [chr(code) for code in range(32, 127)] + ["\n"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    # not "special": decoding keeps them, and the reward looks for them
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                   clean_up_tokenization_spaces=False, model_max_length=128)


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of half a million parameters."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=448, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.05,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


def worked(a: int, b: int) -> str:
    """48, 27 -> '<think>8+7=15;4+2+1=7;</think>75';  50, 72 -> '<think>0+2=2;5+7=12;</think>122'"""
    units = a % 10 + b % 10
    carry = "+1" if units > 9 else ""
    return f"<think>{a % 10}+{b % 10}={units};{a // 10}+{b // 10}{carry}={(a + b) // 10};</think>{a + b}"


def hasty(a: int, b: int, mistakes: float, rng: random.Random) -> str:
    """48, 27 -> '75', or with the given probability one digit off by one: '74', '85' ..."""
    digits = [int(digit) for digit in str(a + b)]
    if rng.random() < mistakes:
        place = rng.randrange(len(digits))
        digits[place] = (digits[place] + rng.choice((-1, 1))) % 10
    return "".join(map(str, digits))


def main(config: Config) -> None:
    need(config, 1, "steps batch_size", most=1e6)
    need(config, 0, "worked_steps seed")
    need(config, 0, "thinking mistakes lr", most=1)
    output = Path(config.output)
    if output.exists():
        raise UserError(f"--output {output}: is there already, delete it or choose another")
    device, rng = pick_device(config.device), random.Random(config.seed)
    torch.manual_seed(config.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer).to(device)
    adam = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, config.lr, config.steps, pct_start=0.1, cycle_momentum=False)
    problems = load_task("add").train  # what is held out from training stays unseen here too
    for step in (bar := trange(config.steps, desc=f"teaching the base model {output}", dynamic_ncols=True)):
        rows = []
        for problem in rng.choices(problems, k=config.batch_size):
            a, b = map(int, problem.prompt.rstrip("=").split("+"))
            thinks = step < config.worked_steps or rng.random() < config.thinking
            text = worked(a, b) if thinks else hasty(a, b, config.mistakes, rng)
            rows.append((tokenizer(problem.prompt)["input_ids"],
                         tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]))
        ids = [torch.tensor(prompt + response) for prompt, response in rows]
        lengths = torch.tensor([len(row) for row in ids], device=device)
        prompt_lengths = torch.tensor([len(prompt) for prompt, _ in rows], device=device)
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
        logprobs = response_logprobs(model, ids, prompt_lengths, lengths)
        loss = -logprobs.sum() / (lengths - prompt_lengths).sum()
        if not loss.isfinite():
            raise UserError(f"--lr {config.lr}: the loss is {loss.item()} at step {step + 1}, lower it")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        schedule.step()
        adam.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    aside = output.with_name(f"{output.name}.{os.getpid()}.part")
    save_policy(model.cpu(), tokenizer, aside)
    aside.rename(output)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
