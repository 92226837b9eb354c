"""Write the whole model of a run that trained an adapter (--lora_rank), for programs that load no
adapters and for new runs: python -m tools.merge runs/NAME [--output FOLDER]"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs from any folder

from lib.files import whole
from lib.flags import UserError, flag, run_script
from lib.lora import CONFIG, find_base, save_merged
from policy import DTYPES, load_policy


@dataclass(frozen=True)
class Config:
    output: str = flag("", "folder to write; default: merged in the folder of the run")


def main(config, run) -> None:
    output = Path(config.output or f"{run}/merged")
    if output.exists():
        raise UserError(f"--output {output}: is there already, choose another folder")
    folders = [path for path in (Path(run, "checkpoint"), Path(run)) if (path / CONFIG).is_file()]
    if not folders:
        raise UserError(f"{run}: holds no adapter to merge")
    cpu = torch.device("cpu")
    base, _ = find_base(folders[0], False, cpu, torch.float32)
    dtype = str(AutoConfig.from_pretrained(base, trust_remote_code=False).dtype)[len("torch.") :]
    model, tokenizer = load_policy(run, cpu, dtype if dtype in DTYPES else "float32")
    with whole(output) as folder:
        save_merged(model, folder)
        tokenizer.save_pretrained(folder)
    print(f"{output}/: a Hugging Face folder in {dtype}")


if __name__ == "__main__":
    run_script(main, Config, __doc__, run={"help": "folder of a run, or of an adapter"})
