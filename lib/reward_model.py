"""A learned reward: a Hugging Face model for sequence classification, as `model("runs/rm")`."""

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lib.batching import micro_batches
from lib.flags import UserError, first_line
from lib.prompts import freeze_date


class RewardModel:
    """A learned reward: a Hugging Face model for sequence classification with one output.

    bounded: sigmoid(score - mean score of the preferred responses in its training), in (0, 1),
             instead of the raw score
    options: for from_pretrained. With num_labels=1 a language model gets a new head, at random;
             no other parameter may be missing
    UserError: it cannot be loaded, has not one output, or parameters are missing
    """

    def __init__(self, name, device, bounded=True, **options):
        options["dtype"] = torch.bfloat16 if device.type == "cuda" else torch.float32
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                name,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
        except Exception as error:  # transformers, tokenizers and safetensors raise many kinds
            raise UserError(
                f'model("{name}"): cannot be loaded as a reward model: {first_line(error)}'
            ) from None
        if model.config.num_labels != 1:
            raise UserError(
                f'model("{name}"): has {model.config.num_labels} outputs, a reward model has one; '
                "train_reward.py makes one of a language model"
            )
        needed = f"{model.base_model_prefix}." if "num_labels" in options else ""
        # transformers would fill them with random numbers
        missing = sorted(key for key in info["missing_keys"] if key.startswith(needed))
        if missing:
            raise UserError(
                f'model("{name}"): {len(missing)} of its parameters are not in its files, '
                f"{missing[0]} for one"
            )
        self.model = model.to(device).eval()
        self.bounded = bounded
        # as BERT: it was trained on pairs of texts with a token between them
        self.is_encoder = None not in (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id)
        self.has_truncated = False

    def ids(self, prompt, response) -> list[int]:
        """Token ids of prompt and response, by the reward model's chat template if it has one.

        A response could spell out special tokens, to end its turn and praise itself as the user:
        they are removed.
        """
        for token in self.tokenizer.added_tokens_decoder.values():
            if token.special:
                response = response.replace(token.content, " ")
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        if self.tokenizer.chat_template:
            if messages[-1]["role"] == "assistant":  # a turn that the response continues
                *messages, half = messages
                response = half["content"] + response
            messages = [*messages, {"role": "assistant", "content": response}]
            template = freeze_date(self.tokenizer.get_chat_template())
            return self.tokenizer.apply_chat_template(
                messages, chat_template=template, return_dict=False
            )
        text = "\n".join(message["content"] for message in messages)
        if self.is_encoder:
            return self.tokenizer(text, response)["input_ids"]
        ids = self.tokenizer(text + response)["input_ids"]
        eos = self.tokenizer.eos_token_id
        if eos is not None and ids[-1:] != [eos]:  # some tokenizers add it themselves
            ids.append(eos)
        return ids

    def scores(self, rows, tokens=16384) -> torch.Tensor:
        """B rows of token ids -> (B,) float32 raw scores, in micro-batches of at most `tokens`."""
        config = self.model.config.get_text_config()
        room = getattr(config, "max_position_embeddings", None) or 0
        longest = max(map(len, rows))
        if 0 < room < longest and not self.has_truncated:
            self.has_truncated = True
            end = "end" if self.is_encoder else "beginning"
            tqdm.write(
                f"warning: the reward model reads at most {room} tokens, and a prompt with its "
                f"response has {longest}: the {end} is truncated"
            )
        # an encoder has its score at the first token, others at the last; room 0 keeps all
        part = slice(room or None) if self.is_encoder else slice(-room, None)
        rows = [torch.tensor(row[part]) for row in rows]
        lengths = torch.tensor(list(map(len, rows)))
        # The model reads the score at the last token that is not padding, and knows padding by its
        # id, which may be that of the end of text. So pad with an id that is no row's last.
        last = {int(row[-1]) for row in rows}
        config.pad_token_id = min(set(range(len(last) + 1)) - last)
        scores = torch.zeros(len(rows), device=self.model.device)
        for batch in micro_batches(lengths, tokens):
            ids = pad_sequence([rows[i] for i in batch], True, config.pad_token_id)  # (R, T)
            mask = torch.arange(ids.shape[1]) < lengths[batch, None]
            ids = ids.to(scores.device)
            logits = self.model(ids, attention_mask=mask.to(ids)).logits  # (R, 1)
            scores[batch] = logits[:, 0].float()
        return scores

    @torch.no_grad()
    def __call__(self, prompts, responses, answers):
        scores = self.scores(list(map(self.ids, prompts, responses)))
        if self.bounded:
            scores = torch.sigmoid(scores - getattr(self.model.config, "mean_chosen_score", 0.0))
        return scores.tolist()
