import os

# before torch and transformers are imported, and for the scripts that tests start
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a hub
os.environ["OMP_NUM_THREADS"] = (
    "1"  # tiny matrices, and two threads on a busy machine wait for each other
)

import pytest
import tiny
import torch

import train
from lib.flags import parse
from lib.mixture import run_file
from policy import load_policy
from tools import pretrain

CPU = torch.device("cpu")


def parse_train(*flags):
    """The Config of train.py for these flags, presets and recipes filled in."""
    return parse(train.Config, train.HELP, [str(flag) for flag in flags], train.fill)[0]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test runs in an empty folder: runs/ and models/ of one are not seen by another. Nor are
    its rewards, with what they remember: the folder may have the name of a former one."""
    monkeypatch.chdir(tmp_path)
    run_file.cache_clear()


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Model folders, made when first asked for: folders('llama')."""
    made = {}

    def folder(architecture, **changes):
        key = architecture, *sorted(changes.items())
        if key not in made:
            made[key] = tiny.make_folder(
                tmp_path_factory.mktemp(architecture), architecture, **changes
            )
        return str(made[key])

    return folder


@pytest.fixture
def load(folders):
    """(model, tokenizer) of an architecture, in float32 on the CPU."""
    return lambda architecture, **changes: load_policy(folders(architecture, **changes), CPU)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The built-in base model after a short schooling: it answers in digits, and is mostly
    wrong."""
    folder = tmp_path_factory.mktemp("models") / "base"
    pretrain.main(
        pretrain.Config(output=str(folder), steps=60, worked_steps=10, batch_size=64, device="cpu")
    )
    return str(folder)
