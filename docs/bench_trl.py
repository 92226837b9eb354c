"""One step of this project and one of TRL's GRPOTrainer on the same work, in turn, on one thread.

    pip install trl==1.16.0 peft accelerate datasets   # with requirements.txt, in a new environment
    python docs/bench_trl.py --setting A --steps 10    # times and their ratios
    python docs/bench_trl.py --setting B --only ours   # peak memory: run each in its own process

The work of A, B and C: 16 prompts x 16 responses, a Llama in float32 (hidden 128, 4 layers, 4
heads, random parameters), sampled at temperature 1. The reward is the share of the answer's digits
that are in their place. One AdamW step at 1e-5.

    A: 6 prompt tokens, 16 new, V = 100
    B: 6 prompt tokens, 64 new, V = 30,000
    C: 128 prompt tokens, 64 new, V = 100

and on a real chat model, models/smollm2-135m (python -m tools.smollm), with the conversations of
examples/questions.py (about 60 tokens) and the reward examples.rewards.short:

    R: 4 prompts x 8 responses of 24 tokens
    S: 8 prompts x 16 responses of 64 tokens

Both answer the same prompts in each pair of steps. In the first pair they also get the same
responses: then the norms of their gradients must agree, which is checked. Seconds are CPU seconds
of the process.
"""

import random
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import engine.choose
import train
from engine.learner import Learner
from engine.memory import Memory
from examples import questions
from examples.rewards import short
from lib.estimate import shape
from lib.flags import flag, run_script
from loss import DENOMINATORS, group_weights
from sample import Rollout, Sampling

SETTINGS = {  # P x G responses; rows: in a micro-batch of TRL, the fastest of those tried
    "A": {"P": 16, "G": 16, "prompt": 6, "new": 16, "vocab": 100, "rows": 64},
    "B": {"P": 16, "G": 16, "prompt": 6, "new": 64, "vocab": 30000, "rows": 16},
    "C": {"P": 16, "G": 16, "prompt": 128, "new": 64, "vocab": 100, "rows": 32},
    "R": {"P": 4, "G": 8, "new": 24, "rows": 8},
    "S": {"P": 8, "G": 16, "new": 64, "rows": 8},
}
REAL = Path(__file__).parent.parent / "models" / "smollm2-135m"


@dataclass(frozen=True)
class Config:
    setting: Literal["A", "B", "C", "R", "S"] = flag("A", "the work, see above")
    steps: int = flag(10, "pairs of steps that count, after one that warms up")
    stop_prob: float = flag(0.0, "share of the vocabulary that ends a response: random lengths")
    weights: Literal["natural", "all"] = flag(
        "natural", "all: no response has weight 0, so none is skipped"
    )
    only: Literal["both", "ours", "trl"] = flag("both", "run one, for its memory")
    micro_batch_tokens: int = flag(4096, "ours: tokens per forward pass")
    micro_batch_rows: int = flag(0, "TRL: rows per forward pass; 0: see SETTINGS")


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    if "vocab" not in SETTINGS[config.setting]:
        return AutoTokenizer.from_pretrained(REAL, padding_side="left")
    return make_tokenizer(SETTINGS[config.setting]["vocab"])


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """One token per character: 4 special ones, printable ASCII, newline. The rest are strings of
    digits, which a model may sample though no prompt contains them."""
    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *map(chr, range(32, 127)), "\n"]
    width = 2
    while len(tokens) < vocab:
        tokens += [str(i).zfill(width) for i in range(10**width)]
        width += 1
    vocabulary = {token: i for i, token in enumerate(tokens[:vocab])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def make_model(config: Config) -> tuple[PreTrainedModel, list[int]]:
    """-> the model, the same one at every call, and the ids that end a response"""
    if "vocab" not in SETTINGS[config.setting]:
        model = AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32).eval()
        return model, [model.config.eos_token_id]
    V = SETTINGS[config.setting]["vocab"]
    stop = [2]
    if config.stop_prob:
        stop += range(V - max(1, round(config.stop_prob * V)) + 1, V)
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": stop, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(shape("tiny", vocab_size=V, **ids)).eval()
    model.generation_config = GenerationConfig(**ids)
    return model, stop


def make_problems(config: Config, count: int = 4096) -> dict[str, str]:
    """{prompt: answer}. A prompt is a number of characters long: '12+34=', and before it worked
    examples where there is room. Of a real model it is a conversation as its chat template writes
    it, and there is no answer."""
    if "vocab" not in SETTINGS[config.setting]:
        conversations = questions.conversations()
        random.Random(0).shuffle(conversations)
        write = partial(
            load_tokenizer(config).apply_chat_template, tokenize=False, add_generation_prompt=True
        )
        return dict.fromkeys(map(write, conversations), "")
    length = SETTINGS[config.setting]["prompt"]
    rng = random.Random(0)
    answers = {}
    for k in rng.sample(range(8100), count):
        first = rng.choices(range(10, 100), k=15)
        second = rng.choices(range(10, 100), k=15)
        examples = "".join(f"{a}+{b}={a + b}\n" for a, b in zip(first, second))
        a, b = 10 + k // 90, 10 + k % 90
        answers[(examples + f"{a}+{b}=")[-length:]] = str(a + b)
    return answers


def score(responses: list[str], answers: list[str], config: Config) -> list[float]:
    """The share of the answer's characters that are in their place, or `short` where there is no
    answer. With --weights all a little is added that differs within a group, so that no response
    has weight 0."""
    rewards = []
    G = SETTINGS[config.setting]["G"]
    for row, (response, answer) in enumerate(zip(responses, answers)):
        if answer:
            reward = sum(x == y for x, y in zip(response, answer)) / len(answer)
        else:
            reward = short("", response, "")
        if config.weights == "all":
            reward += 1e-3 * (row % G)
        rewards.append(reward)
    return rewards


class Ours:
    """This project's step, by the functions that train.py calls. log: a record of each step."""

    def __init__(self, config: Config):
        setting = SETTINGS[config.setting]
        self.config = config
        self.P, self.G = setting["P"], setting["G"]
        self.flags = train.Config(max_new_tokens=setting["new"])
        self.model, self.stop = make_model(config)
        self.tokenizer = load_tokenizer(config)
        self.answers = make_problems(config)
        self.prompts = [self.tokenizer(prompt)["input_ids"] for prompt in self.answers]
        self.forms = engine.choose.choose(
            self.model, self.prompts[:8], self.stop, Sampling(), self.flags.max_new_tokens
        )
        rows = self.P * self.G
        memory = Memory({}, micro_batch_tokens=config.micro_batch_tokens, rows_at_once=rows)
        self.learner = Learner(self.model, self.forms, memory, self.flags)
        self.buffers = {}
        self.log = []

    def sample(self, prompts: list[list[int]]) -> Rollout:
        first = len(self.log) * self.P
        seeds = list(range(first, first + self.P))
        N = self.flags.max_new_tokens
        return self.forms.generate(
            self.model, prompts, self.G, N, self.stop, seeds, Sampling(), buffers=self.buffers
        )

    def step(self, prompts: list[list[int]]) -> None:
        P, G = self.P, self.G
        start = time.process_time()
        rollout = self.sample(prompts)
        sampled = time.process_time()

        answers = [self.answers[self.tokenizer.decode(prompt)] for prompt in prompts]
        answers = [answer for answer in answers for _ in range(G)]
        # as TRL does: a response of this project would keep its special tokens
        texts = self.tokenizer.batch_decode(rollout.response_ids(), skip_special_tokens=True)
        rewards = score(texts, answers, self.config)
        weights = group_weights(torch.tensor(rewards).split(G), self.flags)[:, None]
        scale = DENOMINATORS[self.flags.denominator](rollout.response_lengths, self.flags)
        assert self.learner.sampler_gap(rollout, 0) < 1e-4  # as train.py does in each step
        extra = {"weights": weights, "ref_logprobs": rollout.old_logprobs}
        batch = train.Batch(**vars(rollout), **extra, loss_scale=scale[:, None])
        batch = batch.rows(train.contributes(weights, self.flags))
        update = self.learner.update(train.backward, batch, 1e-5, on_policy=True)
        self.log.append(
            {
                "step": time.process_time() - start,
                "sampling": sampled - start,
                "reward": mean(rewards),
                "tokens": int(rollout.response_lengths.sum()),
                "norm": update.grad_norm,
                "trained": len(batch.ids) / (P * G),
            }
        )


def run_trl(config: Config, ours: Ours | None) -> list[dict]:
    """Trains with TRL; after each of its steps comes one of ours. -> a record of each step"""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    setting = SETTINGS[config.setting]
    P, G = setting["P"], setting["G"]
    rows = config.micro_batch_rows or setting["rows"]
    log = []
    record = {}  # of the current step

    def reward(completions, answer, **kwargs):
        rewards = score(completions, answer, config)
        record["reward"] = mean(rewards)
        return rewards

    def sample(prompts, *args, **kwargs):
        start = time.process_time()
        if ours and not log:  # the first pair learns from the same responses
            rollout = ours.sample(prompts[::G])
            responses, logprobs = [], None
            for b, ids in enumerate(rollout.ids.tolist()):
                responses.append(ids[rollout.prompt_lengths[b] : rollout.lengths[b]])
        else:
            responses, logprobs = sample_trl(prompts, *args, **kwargs)
        record["sampling"] = time.process_time() - start
        record["prompts"] = prompts[::G]
        record["tokens"] = sum(map(len, responses))
        return responses, logprobs

    def clip(*args, **kwargs):
        norm = clip_trl(*args, **kwargs)
        record["norm"] = float(norm)
        return norm

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            if not log:
                record["start"] = time.process_time()

        def on_step_end(self, *args, **kwargs):
            log.append({**record, "step": time.process_time() - record["start"]})
            if ours:
                ours.step(record["prompts"])
            record["start"] = time.process_time()  # here, so that fetching the next batch counts

    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            seed=0,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=P * G // rows,
            num_generations=G,
            max_completion_length=setting["new"],
            temperature=1.0,
            beta=0.0,
            num_iterations=1,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            max_steps=config.steps + 1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            logging_steps=1000,
        )
        problems = make_problems(config)
        data = [{"prompt": prompt, "answer": answer} for prompt, answer in problems.items()]
        trainer = GRPOTrainer(
            make_model(config)[0],
            reward,
            arguments,
            Dataset.from_list(data),
            processing_class=load_tokenizer(config),
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        sample_trl, trainer._generate_single_turn = trainer._generate_single_turn, sample
        clip_trl, trainer.accelerator.clip_grad_norm_ = trainer.accelerator.clip_grad_norm_, clip
        trainer.train()
    return log


def report(ours: list[dict], trl: list[dict], G: int) -> None:
    """Medians over all pairs except the first, and medians of the pairs' ratios."""
    first, *ours = ours
    first_trl, *trl = trl
    # they differ by what rewards are divided by: TRL's deviation has G - 1 in it, ours G
    norms = first["norm"], first_trl["norm"] * (G / (G - 1)) ** 0.5
    if abs(norms[0] / norms[1] - 1) > 1e-3:
        raise AssertionError(f"the gradients of the same responses differ: {norms}")
    for row in (*ours, *trl):
        row["the rest"] = row["step"] - row["sampling"]

    print(f"{'CPU seconds':24}{'TRL':>12}{'ours':>12}{'ratio':>12}")
    for name in ("step", "sampling", "the rest"):
        columns = [
            median(row[name] for row in trl),
            median(row[name] for row in ours),
            median(theirs[name] / own[name] for theirs, own in zip(trl, ours)),
        ]
        print(f"{name:24}" + "".join(f"{column:12.3f}" for column in columns))
    for name, form in (("tokens", ",.0f"), ("reward", ".4f"), ("norm", ".4f")):
        columns = [format(mean(row[name] for row in rows), form) for rows in (trl, ours)]
        print(f"mean {name:19}" + "".join(f"{column:>12}" for column in columns))
    print(f"{'rows with a weight':36}{mean(row['trained'] for row in ours):12.2f}")
    print(f"gradient norm of the first rollout: TRL {norms[1]:.5f}, ours {norms[0]:.5f}")


def main(config: Config) -> None:
    torch.set_num_threads(1)
    ours = None if config.only == "trl" else Ours(config)
    if config.only == "ours":
        for step in range(config.steps + 1):
            ours.step(ours.prompts[step * ours.P : (step + 1) * ours.P])
        log = ours.log
    else:
        log = run_trl(config, ours)
    if config.only == "both":
        report(ours.log, log, ours.G)
        return
    seconds = median(row["step"] for row in log[1:])
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(f"only {config.only}: {seconds:.3f} CPU s per step, peak memory {megabytes:,.0f} MB")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
