"""Estimate how much memory a run of train.py takes, before you start it. It has train.py's flags.

python -m tools.memory qwen2.5-0.5b --memory_gb 12                 # a shape: no download
python -m tools.memory Qwen/Qwen2.5-0.5B-Instruct --lora_rank 16   # downloads config.json only
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs from any folder

import train
from lib.estimate import SHAPES, device_memory, memory_table, shape
from lib.flags import UserError, check_range, flag, name_error, run_script
from policy import DTYPES, pick_device


@dataclass(frozen=True)
class Config(train.Config):
    longest_prompt: int = flag(256, "tokens of the longest prompt")
    memory_gb: float = flag(0.0, "memory of the GPU; 0: of this machine")

    # the flags that change the estimate; the others of train.py are accepted too
    SHOWN: ClassVar = """prompts_per_step group_size max_new_tokens rows_at_once kl_beta log_kl
        micro_batch_tokens lora_rank load_in_4bit adam_8bit offload gradient_checkpointing device
        dtype longest_prompt memory_gb"""
    CHOICES: ClassVar = {}


def main(config, architecture) -> None:
    train.check(config)
    check_range(config, 1, "longest_prompt")
    check_range(config, 0, "memory_gb")
    try:
        if architecture in SHAPES:
            model_config = shape(architecture)
        else:
            model_config = AutoConfig.from_pretrained(architecture, trust_remote_code=False)
    except (OSError, ValueError) as error:
        names = ", ".join(SHAPES)
        raise UserError(f"{architecture}: not one of {names}: {name_error(error)}") from None
    dtype = DTYPES.get(config.dtype, torch.bfloat16)  # auto: a GPU's
    with FakeTensorMode():  # without storage
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype).eval()
        available = config.memory_gb * 1e9 or device_memory(pick_device(config.device))
        table = memory_table(config, model, available, config.longest_prompt)
    print(table or "Less than a tenth of the memory.\n", end="")


if __name__ == "__main__":
    run_script(main, Config, __doc__, architecture={"help": "a shape, Hugging Face name or folder"})
