"""One step of this project and one of TRL's GRPOTrainer on the same work, in turn, in one process, on one thread.

    pip install trl==1.16.0 peft accelerate datasets            # beside requirements.txt, in an environment of its own
    python docs/bench_trl.py --setting A --steps 10             # times and their ratios
    python docs/bench_trl.py --setting B --only ours            # peak memory: each alone, in a process of its own

The work: 16 prompts x 16 responses, a Llama in float32 (hidden 128, 4 layers, 4 heads, random weights), sampled at
temperature 1, reward the share of the answer's digits that stand in their place, one AdamW step at 1e-5.

    A: 6 prompt tokens, 16 new, V = 100   B: 6 prompt tokens, 64 new, V = 30,000   C: 128 prompt tokens, 64 new, V = 100

Both answer the same prompts in each pair of steps. In the first pair they are given the same responses too: then the
norms of their gradients must agree, and that is checked. Seconds are CPU seconds of the process.
"""

import random
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.hf_argparser import HfArg

import train
from flags import run_script
from loss import choose
from memory import shape
from policy import Optimizer
from sample import Rollout, generate
from update import Learner

P, G = 16, 16
SETTINGS = {  # rows: of TRL's micro-batch, the fastest of those tried
    "A": dict(prompt=6, new=16, vocab=100, rows=64),
    "B": dict(prompt=6, new=64, vocab=30000, rows=16),
    "C": dict(prompt=128, new=64, vocab=100, rows=32),
}


@dataclass(frozen=True)
class Config:
    setting: Literal["A", "B", "C"] = HfArg(default="A", help="the work, as above")
    steps: int = HfArg(default=10, help="pairs of steps to take the median of, after one to warm up")
    stop_prob: float = HfArg(default=0.0, help="share of the vocabulary that ends a response: random lengths")
    weights: Literal["natural", "all"] = HfArg(default="natural", help="all: none has weight 0, so none is skipped")
    only: Literal["both", "ours", "trl"] = HfArg(default="both", help="one alone, for its memory")
    micro_batch_tokens: int = HfArg(default=4096, help="ours; train.py's default")
    micro_batch_rows: int = HfArg(default=0, help="TRL's; 0 takes that of SETTINGS")


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A token a character: 4 special ones, printable ASCII, newline. The rest are strings of digits, which a model may
    sample though no prompt contains them."""
    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *map(chr, range(32, 127)), "\n"]
    width = 2
    while len(tokens) < vocab:
        tokens += [str(i).zfill(width) for i in range(10**width)]
        width += 1
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens[:vocab])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>",
                                   eos_token="<eos>", unk_token="<unk>", padding_side="left")


def make_model(config: Config):
    """-> (model, the same one at every call, ids that end a response)"""
    V = SETTINGS[config.setting]["vocab"]
    stop = [2, *range(V - max(1, round(config.stop_prob * V)) + 1, V)] if config.stop_prob else [2]
    torch.manual_seed(0)
    ids = dict(bos_token_id=1, eos_token_id=stop, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(shape("tiny", vocab_size=V, **ids)).eval()
    model.generation_config = GenerationConfig(**ids)
    return model, stop


def problems(length: int, n: int = 4096) -> dict[str, str]:
    """prompt -> answer. A prompt is `length` characters: '12+34=', after worked examples where there is room."""
    draw, answers = random.Random(0), {}
    for k in draw.sample(range(8100), n):
        examples = "".join(f"{a}+{b}={a + b}\n" for a, b in zip(*(draw.choices(range(10, 100), k=15) for _ in "ab")))
        a, b = 10 + k // 90, 10 + k % 90
        answers[(examples + f"{a}+{b}=")[-length:]] = str(a + b)
    return answers


def score(responses: list[str], answers: list[str], every: bool) -> list[float]:
    """The share of the answer's characters in their place. every: plus a little that differs within a group, so that no
    response has weight 0."""
    return [sum(x == y for x, y in zip(response, answer)) / len(answer) + every * 1e-3 * (row % G)
            for row, (response, answer) in enumerate(zip(responses, answers))]


class Ours:
    """This project's step, by the functions that train.py calls. log: a record of each step."""

    def __init__(self, config: Config):
        setting = SETTINGS[config.setting]
        self.config, self.most, self.log = config, setting["new"], []
        self.model, self.stop = make_model(config)
        self.tokenizer, self.answers = make_tokenizer(setting["vocab"]), problems(setting["prompt"])
        self.normalise, _, self.aggregate, self.token_losses = choose(train.Config(max_new_tokens=self.most))
        self.learner, self.optimizer, self.kept = Learner(self.model), Optimizer(self.model, weight_decay=0.0), {}

    def sample(self, prompts: list[list[int]]) -> Rollout:
        first = len(self.log) * P
        return generate(self.model, prompts, G, self.most, self.stop, list(range(first, first + P)),
                        kept=self.kept)

    def step(self, prompts: list[list[int]]) -> None:
        began = time.process_time()
        rollout = self.sample(prompts)
        sampled = time.process_time()
        answers = [self.answers[self.tokenizer.decode(prompt)] for prompt in prompts for _ in range(G)]
        values = score(rollout.responses(self.tokenizer), answers, self.config.weights == "all")
        weights = self.normalise(torch.tensor(values).view(P, G)).flatten()
        update = self.learner.backward(rollout, weights.nonzero()[:, 0], self.token_losses, rollout.logprobs,
                                       rollout.logprobs, weights, self.aggregate(rollout.response_lengths),
                                       self.config.micro_batch_tokens)
        norm = self.optimizer.step(1e-5, max_grad_norm=1.0)
        assert update["sampler_gap"] < 1e-4, update
        self.log.append({"step": time.process_time() - began, "sampling": sampled - began, "reward": mean(values),
                         "tokens": int(rollout.response_lengths.sum()), "norm": norm,
                         "trained": (weights != 0).float().mean().item()})


def run_trl(config: Config, ours: Ours | None) -> list[dict]:
    """Trains by TRL; a step of ours after each of its own. -> a record of each of TRL's steps"""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    setting, log, record = SETTINGS[config.setting], [], {}
    rows = config.micro_batch_rows or setting["rows"]

    def reward(completions, answer, **others):
        values = score(completions, answer, config.weights == "all")
        record["reward"] = mean(values)
        return values

    def sample(prompts, *others, **more):
        began = time.process_time()
        if ours and not log:  # the first pair learns from the same responses
            rollout = ours.sample(prompts[::G])
            spans = zip(rollout.ids.tolist(), rollout.prompt_lengths.tolist(), rollout.lengths.tolist())
            responses, logprobs = [ids[start:end] for ids, start, end in spans], None
        else:
            responses, logprobs = sample_trl(prompts, *others, **more)
        record.update(sampling=time.process_time() - began, prompts=prompts[::G], tokens=sum(map(len, responses)))
        return responses, logprobs

    def clip(*others, **more):
        norm = clip_trl(*others, **more)
        record["norm"] = float(norm)
        return norm

    class Clock(TrainerCallback):
        def on_step_begin(self, *others, **more):
            if not record:
                record["began"] = time.process_time()

        def on_step_end(self, *others, **more):
            log.append({**record, "step": time.process_time() - record["began"]})
            if ours:
                ours.step(record["prompts"])
            record["began"] = time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, seed=0,
            per_device_train_batch_size=rows, gradient_accumulation_steps=P * G // rows, num_generations=G,
            max_completion_length=setting["new"], temperature=1.0, beta=0.0, num_iterations=1, learning_rate=1e-5,
            lr_scheduler_type="constant", max_steps=config.steps + 1, report_to="none", save_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False, logging_steps=1000)
        data = [{"prompt": prompt, "answer": answer} for prompt, answer in problems(setting["prompt"]).items()]
        trainer = GRPOTrainer(make_model(config)[0], reward, arguments, Dataset.from_list(data),
                              processing_class=make_tokenizer(setting["vocab"]), callbacks=[Clock()])
        trainer.remove_callback(PrinterCallback)
        sample_trl, trainer._generate_single_turn = trainer._generate_single_turn, sample
        clip_trl, trainer.accelerator.clip_grad_norm_ = trainer.accelerator.clip_grad_norm_, clip
        trainer.train()
    return log


def report(ours: list[dict], trl: list[dict]) -> None:
    """Medians over all pairs but the first, and medians of the pairs' ratios."""
    (first, *ours), (first_trl, *trl) = ours, trl
    # the same but for the deviation that rewards are divided by: TRL takes that of a sample (G - 1), not of the group
    norms = first["norm"], first_trl["norm"] * (G / (G - 1)) ** 0.5
    assert abs(norms[0] / norms[1] - 1) < 1e-3, f"the gradients of the same responses differ: {norms}"
    print(f"{'':24}{'TRL':>12}{'ours':>12}{'ratio':>12}")
    for name, value in (("step, CPU s", lambda row: row["step"]), ("  sampling", lambda row: row["sampling"]),
                        ("  the rest", lambda row: row["step"] - row["sampling"])):
        pairs = [(value(a), value(b)) for a, b in zip(trl, ours)]
        columns = *map(median, zip(*pairs)), median(a / b for a, b in pairs)
        print(f"{name:24}" + "".join(f"{column:12.3f}" for column in columns))
    for name, form in (("tokens", ",.0f"), ("reward", ".4f"), ("norm", ".4f")):
        columns = (format(mean([row[name] for row in rows]), form) for rows in (trl, ours))
        print(f"mean {name:19}" + "".join(f"{column:>12}" for column in columns))
    print(f"{'rows with a weight':36}{mean([row['trained'] for row in ours]):12.2f}")
    print(f"gradient norm of the first, common rollout: TRL {norms[1]:.5f}, ours {norms[0]:.5f}")


def main(config: Config) -> None:
    torch.set_num_threads(1)
    ours = None if config.only == "trl" else Ours(config)
    if config.only == "ours":
        prompts = [ours.tokenizer(prompt)["input_ids"] for prompt in ours.answers]
        for step in range(config.steps + 1):
            ours.step(prompts[step * P : (step + 1) * P])
    log = ours.log if config.only == "ours" else run_trl(config, ours)
    if config.only == "both":
        report(ours.log, log)
    else:
        seconds, kilobytes = median(row["step"] for row in log[1:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{config.only} alone: {seconds:.3f} CPU s a step, peak memory {kilobytes * 1024 / 1e6:,.0f} MB")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
