"""Write the whole model of a run that trained an adapter (--lora_rank), for programs that load no
adapters and for new runs: python -m tools.merge runs/NAME [--output FOLDER]"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs from any folder

from engine.optimizer import round_stochastically
from lib.files import whole
from lib.flags import UserError, flag, run_script
from lib.lora import CONFIG, find_base, save_merged
from policy import DTYPES, load_policy


@dataclass(frozen=True)
class Config:
    output: str = flag("", "folder to write; default: merged in the folder of the run")
    dtype: Literal["auto", *DTYPES] = flag("auto", "auto: that of the base model")


def main(config, run) -> None:
    output = Path(config.output or f"{run}/merged")
    if output.exists():
        raise UserError(f"--output {output}: is there already, choose another folder")
    folders = [path for path in (Path(run, "checkpoint"), Path(run)) if (path / CONFIG).is_file()]
    if not folders:
        raise UserError(f"{run}: holds no adapter to merge")
    cpu = torch.device("cpu")
    base, _ = find_base(folders[0], False, cpu, torch.float32)
    of_base = AutoConfig.from_pretrained(base, trust_remote_code=False).dtype
    dtype = of_base if config.dtype == "auto" else DTYPES[config.dtype]
    trained_in = str(of_base).removeprefix("torch.")
    model, tokenizer = load_policy(run, cpu, trained_in if trained_in in DTYPES else "float32")

    def convert(weight, i):
        # to the nearest, most of the adapter's change would be lost (docs/precision.md)
        return round_stochastically(weight, i) if dtype == torch.bfloat16 else weight

    with whole(output) as folder:
        save_merged(model, folder, dtype, convert)
        tokenizer.save_pretrained(folder)
    print(f"{output}/: a Hugging Face folder in {str(dtype).removeprefix('torch.')}")


if __name__ == "__main__":
    run_script(main, Config, __doc__, run={"help": "folder of a run, or of an adapter"})
