"""The run folder: everything that a run leaves on disk.

runs/<name>/config.json     every flag, versions, device, git commit; of each --resume too
            metrics.jsonl   one object per step; docs/metrics.md defines each key
            samples.jsonl   two groups of responses per step, with rewards and weights
            code/           the scripts as they ran; code-20/ those of a --resume at step 20
            checkpoint/     the policy as a Hugging Face folder, and state.pt to resume from
            checkpoint.old/ the one before it
            curves.png      redrawn while the run trains
            lock            held while a process is at work on the run

run = Run(config)                       # checks the name, makes nothing
config = run.start(config, optimizer)   # makes the folder, or resumes from the checkpoint
for step in run.steps():
    ...
    run.finish(metrics, samples, group_sizes, optimizer, save_model)
"""

import importlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, fields, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryFile

import torch
from tqdm import tqdm

from lib.checkpoint import (
    catch_signals,
    find_checkpoint,
    lock,
    new_checkpoint,
    restore_random_state,
    save_state,
)
from lib.files import (
    append_rows,
    near_folder,
    read_rows,
    write_json,
    write_rows,
    write_text,
    writing,
)
from lib.flags import UserError, align, parse
from lib.metrics import collapse, hint, is_idle, stood_still, tokens_per_second
from lib.plots import plot_run
from lib.processes import gather, is_first, processes
from lib.progress import Progress
from lib.report import before_and_after, model_card
from lib.samples import logged_groups

TRACKERS = ("none", "tensorboard", "trackio", "wandb")
ROOT = Path(__file__).parent.parent


def is_run(folder):
    return (folder / "config.json").exists() and (folder / "code").is_dir()


def read_config(folder) -> dict:
    """The flags of a run. UserError if there is no run, if one of its .json files is damaged, or if
    a flag that eval.py needs is missing."""
    path = folder
    try:
        for path in [*folder.glob("*.json"), folder / "config.json"]:
            content = json.loads(path.read_text())
            if not content:
                raise ValueError
        flags = content["config"]
        range(flags["max_new_tokens"])  # is it a number, and are these texts?
        for name in ("model", "task", "data_dir", "reward", "true_reward"):
            Path(flags[name])
    except Exception:  # a damaged file may raise anything
        near = near_folder(folder) if not folder.exists() else ""
        raise UserError(f"{folder}: no run there, or its {path.name} is damaged{near}") from None
    return flags


def resumed_flags(config_class, known) -> dict:
    """The flags of the run known["name"], without runs_dir. UserError if config_class has no such
    flag, or the flag cannot have such a value."""
    if not known["name"]:
        raise UserError("--resume: say which run by --name")
    folder = Path(known["runs_dir"]) / known["name"]
    saved = read_config(folder)
    words = [f"--{name}={value}" for name, value in saved.items() if value is not None]
    try:
        flags = asdict(parse(config_class, "", words)[0])
    except UserError as error:
        raise UserError(f"{folder}/config.json: is not of this version: {error}") from None
    del flags["runs_dir"]  # the folder may have been moved
    return flags


def flags_of_runs(config, runs, names):
    """The config, where flags that were not given are those of the runs, which must agree in them.

    runs: {"runs/add": its flags}
    """
    for name in names:
        values = list(dict.fromkeys(run[name] for run in runs.values()))
        if getattr(config, name) or not values:
            continue
        if len(values) > 1:
            listed = str(values).strip("[]")
            raise UserError(f"--{name}: the runs differ in it ({listed}), give one for all")
        config = replace(config, **{name: values[0]})
    return config


def after_mistake() -> str:
    """What to do after an error that ended a run. A run without a checkpoint cannot be resumed: its
    folder gets another name, so that the command can be given again."""
    run = Run.current
    if run is None or not run.folder.exists():
        return ""
    if (run.folder / "checkpoint").exists():
        return f" (to resume from the last checkpoint: {run.resume_command()})"
    if not is_first():
        return ""
    failed = run.folder.with_name(f"{run.folder.name}.failed")
    shutil.rmtree(failed, ignore_errors=True)
    run.folder.rename(failed)
    return f" (no checkpoint was saved yet; what there is of the run is now in {failed})"


class Tracker:
    """Sends metrics to a program that draws them. "none" does nothing.

    tensorboard: files in the run folder
    trackio:     a local database
    wandb:       files in the run folder; WANDB_MODE=online sends them to its server
    """

    def __init__(self, kind):
        """UserError if the package is missing."""
        self.kind = kind
        self.writer = None
        if kind == "none":
            return
        try:
            package = "torch.utils.tensorboard" if kind == "tensorboard" else kind
            self.module = importlib.import_module(package)
        except ImportError:
            raise UserError(
                f"--tracker {kind}: the package is not installed: pip install {kind}"
            ) from None

    def begin(self, folder, config):
        if self.kind == "tensorboard":
            return self.module.SummaryWriter(folder / "tensorboard")
        options = {"project": "grpo-basics", "name": folder.name, "config": config}
        if self.kind == "wandb":
            options |= {"dir": folder, "mode": os.environ.get("WANDB_MODE", "offline")}
        return self.module.init(**options)

    def send(self, folder, config, metrics):
        if self.kind == "none":
            return
        self.writer = self.writer or self.begin(folder, config)
        numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
        step = numbers.pop("step")
        if self.kind != "tensorboard":
            self.writer.log(numbers, step=step)
            return
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()


def is_free(folder):
    """Whether a new run may have this folder: not there, or left by a run killed in its start."""
    if not folder.exists():
        return True
    if folder.is_dir() and all(name == "lock" or ".part" in name for name in os.listdir(folder)):
        with suppress(UserError):  # another process is about to start there
            lock(folder).close()
            return True
    return False


def free_folder(config) -> Path:
    """runs_dir/name; without a name the first free one of runs_dir/task, task-2, task-3 ..."""
    name = config.name
    if name != Path(name).name or name == "..":
        raise UserError(f"--name {name}: must be the name of a folder in --runs_dir, not a path")
    stem = Path(config.task).stem
    folder = Path(config.runs_dir) / (name or stem)
    number = 1
    while not is_free(folder):
        if name:
            raise UserError(
                f"--name {name}: {folder} is there already: choose another name, or --resume"
            )
        number += 1
        folder = folder.with_name(f"{stem}-{number}")
    return folder


def git_commit():
    """None if there is no git, or no repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    with suppress(OSError):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None


def read_code(config) -> dict[str, bytes]:
    """The scripts, their packages and files of own rewards: {"lib/run.py": content}"""
    code = {}
    for part in (".", "lib", "engine", "tools"):
        for script in (ROOT / part).glob("*.py"):
            code[script.relative_to(ROOT).as_posix()] = script.read_bytes()
    for module in re.findall(r"([^\W\d][\w.]*)\.\w", f"{config.reward} {config.true_reward}"):
        file = Path(f"{module.replace('.', '/')}.py")
        # with the files beside it, which it may import
        for script in file.parent.glob("*.py") if file.exists() else ():
            if script.resolve() != ROOT / script:
                code[f"own/{script}"] = script.read_bytes()
    return code


def saved_step(model) -> int | None:
    """The step of a run's checkpoint; None for what is no run."""
    with suppress(Exception):  # not there, or damaged in any way
        file = Path(model) / "checkpoint" / "state.pt"
        return torch.load(file, mmap=True, weights_only=True)["step"]


def moved_base(folder) -> str:
    """A sentence if the run from which this one started has been trained further since, or ''."""
    content = json.loads((folder / "config.json").read_text())
    model = content["config"]["model"]
    then, now = content.get("base_step"), saved_step(model)
    if None in (then, now) or then == now:
        return ""
    return f"{folder} started from step {then} of {model}, which is now at step {now}"


def reward_models(config) -> dict[str, str]:
    """A fingerprint of each folder in model("folder"), by its files and the ends of its weights."""
    found = {}
    names = re.findall(r"""model\(["']([^"']+)["']\)""", f"{config.reward} {config.true_reward}")
    for name in names:
        digest = sha256()
        for file in sorted(Path(name).glob("*.*")):
            with file.open("rb") as opened:
                opened.seek(max(0, file.stat().st_size - 10**6))
                digest.update(file.name.encode() + opened.read())
        found[name] = digest.hexdigest()[:16]
    return found


def keep_code(folder, code, step):
    """Writes the code into folder/code. Where another one is there, because somebody has edited
    something before --resume, that stays, and today's goes into folder/code-STEP."""
    newest = folder / "code"
    for later in sorted(folder.glob("code-*"), key=lambda later: later.stat().st_mtime):
        newest = later
    before = {
        path.relative_to(newest).as_posix(): path.read_bytes() for path in newest.rglob("*.py")
    }
    target = folder / f"code-{step}" if before else newest
    with writing(target):
        for name in code if before != code else ():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(code[name])
    if before and before != code:
        differ = [name for name in sorted(before | code) if before.get(name) != code.get(name)]
        print(
            f"warning: --resume: {', '.join(differ)} changed since the run was last at work: the "
            f"code before is in {newest}, today's is in {target}"
        )


def rewind(folder, step):
    """Removes what was recorded after `step`: those steps are done again."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = [row for row in read_rows(folder / name) if row["step"] <= step]
        steps = [row["step"] for row in rows]
        if name == "metrics.jsonl" and steps != list(range(1, step + 1)):
            raise UserError(
                f"{folder}/metrics.jsonl: does not have each of the steps 1 to {step}: put the "
                f"file back, or start a new run with --model {folder}"
            )
        write_rows(folder / name, rows)


class Run:
    """A run at work. Of several processes only the first one writes.

    folder:     where it is
    checkpoint: the folder to resume from, or None
    state:      all that a run must remember, saved and loaded whole. A key of your own may be
                added: plain Python types and tensors
    """

    current = None  # the run that this process is at work on, for `after_mistake`

    def __init__(self, config):
        if config.prompts_per_step < processes():
            raise UserError(
                f"--prompts_per_step {config.prompts_per_step}: must be at least {processes()}, "
                "one for each process"
            )
        self.tracker = Tracker(config.tracker)
        self.progress = Progress()
        Run.current = None
        self.folder = self.checkpoint = None
        self.state = {"step": 0, "prompts_seen": 0, "halved": {}}
        if is_first():
            self.open(config)
        self.folder = Path(gather(str(self.folder))[0])
        if not is_first() and config.resume:
            self.find_checkpoint()

    def find_checkpoint(self):
        self.checkpoint, state = find_checkpoint(self.folder)
        self.state = state or self.state

    def open(self, config):
        """A run to resume must be there, with the same flags except each `setting`, and is locked.
        A new one needs a free name where it can be written; nothing is made until `start`."""
        if not config.resume:
            self.folder = free_folder(config)
            parent = next(filter(Path.exists, self.folder.parents))
            with writing(self.folder), TemporaryFile(dir=parent):
                return
        self.folder = Path(config.runs_dir) / config.name
        saved = read_config(self.folder)
        script = self.folder / "code" / "train.py"  # as it was when the run started
        code = script.read_text() if script.is_file() else ""
        free = [field.name for field in fields(config) if field.metadata.get("may_change")]
        for field in fields(config):
            name, value = field.name, getattr(config, field.name)
            is_newer = code and name not in saved and f"    {name}:" not in code
            if is_newer and value == field.default:
                print(f"--{name}: the run is from before this flag and has its default, {value!r}")
                continue
            had = saved.get(name)
            if value != had and not (name in saved and name in ["resume", *free]):
                raise UserError(
                    f"--{name} {value}: the run has {had!r}, and only {', '.join(free)} may change "
                    "on --resume"
                )
        self.check_base_of_others()
        if moved := moved_base(self.folder):
            if config.lora_rank or config.kl_beta or config.log_kl:
                raise UserError(f"--resume: {moved}: it would have another adapter or reference")
            print(f"warning: --resume: {moved}")
        self.lock_file = lock(self.folder)
        self.find_checkpoint()

    def check_base_of_others(self):
        """UserError if another run started from this one: that run's adapter, reference model and
        base would change with this run."""
        changing = [(self.folder / part).resolve() for part in (".", "checkpoint", "best")]
        for other in sorted(self.folder.parent.iterdir()):
            try:
                model = Path(read_config(other)["model"])
            except UserError:  # no run
                continue
            if model.resolve() in changing and other.suffix != ".failed":
                raise UserError(
                    f"--resume: {other} started from {self.folder}, and would change with it. "
                    f"Start a new run instead: --model {self.folder} --name NEW"
                )

    def start(self, config, optimizer, problems=""):
        """Writes config.json and code/. A run that resumes gets its optimizer and random states
        back, and what was recorded after its checkpoint is removed. It says what has changed.

        problems: a fingerprint of the problems
        Returns the config with the run's name filled in.
        """
        if self.checkpoint:
            optimizer.load_state_dict(self.state.pop("optimizer"))
            restore_random_state(self.state)
        step = self.state["step"]
        if step > config.steps:
            raise UserError(f"--steps {config.steps}: {self.folder} has done {step} steps already")
        if not is_first():
            Run.current = self
            self.recent = gather(None)[0]
            self.config = asdict(config)
            return config
        if not config.resume:
            self.folder = free_folder(config)  # again: another process may have been faster
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            self.lock_file = lock(self.folder)
        Run.current = self
        resumed = config.resume
        config = replace(config, name=self.folder.name, resume=False)
        self.config = asdict(config)
        versions = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
        hardware = platform.machine()
        if torch.cuda.is_available() and config.device in ("auto", "cuda"):
            hardware = torch.cuda.get_device_name()
        session = {
            "versions": {"python": platform.python_version(), **versions},
            "device": hardware,
            "threads": torch.get_num_threads(),
            "git_commit": git_commit(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "problems": problems,
            "reward_models": reward_models(config),
            "base_step": saved_step(config.model),
        }
        content = {"config": self.config, **session}
        if resumed:  # what the run began with stays
            content = json.loads((self.folder / "config.json").read_text())
            sessions = [content, *content.get("resumed", [])]
            if sessions[-1].get("problems", problems) != problems:
                print(
                    f"warning: --resume: --task {config.task} has other problems than when the run "
                    f"began: from step {step + 1} on it learns from others, and the "
                    "evaluation before training was of others"
                )
            models = session["reward_models"]
            if sessions[-1].get("reward_models", models) != models:
                print(
                    f"warning: --resume: --reward {config.reward}: a learned reward is another "
                    f"model than when the run was last at work, from step {step + 1} on"
                )
            session = {"step": step, **session}
            content |= {"config": self.config, "resumed": [*sessions[1:], session]}
        self.write_json("config.json", content)
        rewind(self.folder, step)
        if step < config.steps:  # of a shorter run
            (self.folder / "after.json").unlink(missing_ok=True)
        keep_code(self.folder, read_code(config), step)
        self.recent = read_rows(self.folder / "metrics.jsonl")[-11:]  # the last steps
        gather(self.recent)
        return config

    @property
    def is_idle(self) -> bool:
        """Whether each group of the last ten steps had equal rewards."""
        return is_idle(self.recent)

    def steps(self, last):
        """Numbers of the steps to do, with a progress bar. A signal no longer ends the process: the
        step is finished and saved first."""
        self.last = last
        with catch_signals() as self.signals:
            yield from self.progress.steps(self.state["step"] + 1, last)

    def is_due(self, step, every):
        """Whether the step is the last one, or a multiple of `every`."""
        return step == self.last or step % every == 0

    def finish(self, metrics, samples, group_sizes, optimizer, save_model):
        """Records a step; draws curves and saves a checkpoint where they are due. Then, after a
        signal, says how to resume, and exits with 128 + its number, as a shell would.

        save_model: writes model and tokenizer into a folder
        """
        config, step = self.config, metrics["step"]
        # all processes stop at the same step; a signal that comes later is for the next one
        received = [*max(gather(self.signals), key=len)]
        self.record(metrics, samples, group_sizes)
        self.state["step"] = step
        saving = self.is_due(step, config["save_every"])
        if is_first():
            if self.is_due(step, config["eval_every"]) or received:
                plot_run(self.folder)
            if saving and config["true_reward"] and self.track_true_reward(config["save_every"]):
                with new_checkpoint(self.folder, "best") as folder:
                    save_model(folder)
            if saving or received:  # last: a saved final step is a finished run
                with new_checkpoint(self.folder) as folder:
                    save_model(folder)
                    write_text(folder / "README.md", model_card(self.folder, config, step))
                    save_state(folder, {**self.state, "optimizer": optimizer.state_dict()})
        if received and step < self.last:
            gather(None)  # the others wait until the first process has saved
            tqdm.write(f"stopped; step {step} is saved. To resume:\n\n    {self.resume_command()}")
            raise SystemExit(128 + received[0])

    def resume_command(self) -> str:
        command = f"python {sys.argv[0]} --name {shlex.quote(self.folder.name)} --resume"
        if self.folder.parent != Path("runs"):
            command += f" --runs_dir {shlex.quote(str(self.folder.parent))}"
        return command

    def summary(self, task, problems) -> str:
        """What to read at the end."""
        Run.current = None
        table = before_and_after(self.folder, task, problems) if problems else ""
        wanted = {"step", "reward", "updates", "informative", "all_wrong", "all_right", "skipped"}
        rows = read_rows(self.folder / "metrics.jsonl", wanted.__contains__)
        warning = stood_still(rows) or collapse([row["reward"] for row in rows])
        name = shlex.quote(str(self.folder))
        places = [
            ["curves", f"{self.folder}/curves.png", ""],
            ["samples", f"{self.folder}/samples.jsonl", f"python -m tools.show {name}"],
            ["checkpoint", f"{self.folder}/checkpoint", f"python sample.py {name} --chat"],
        ]
        command = f"python eval.py {name}      # on the test problems, unseen in training"
        return "\n\n".join(filter(None, [f"\n{table}".rstrip(), align(places), command, warning]))

    def write_json(self, name, content):
        if is_first():
            write_json(self.folder / name, content)

    def record(self, metrics, samples, group_sizes):
        """Writes a step down: its metrics, and two groups of its samples (lib/samples.py). After
        three steps in a row with skipped updates, writes all samples of the step to bad-step.jsonl
        and raises UserError."""
        metrics |= tokens_per_second(metrics, len(samples))
        self.recent = [*self.recent[-10:], metrics]
        if not is_first():
            return
        path = self.folder / "metrics.jsonl"
        finite = {}
        for key, value in metrics.items():
            if not isinstance(value, float) or math.isfinite(value):  # nan is not JSON
                finite[key] = value
        append_rows(path, [finite])
        step = metrics["step"]
        first = metrics["prompts_seen"] - len(group_sizes)  # the place of the step's first prompt
        log_samples, seed = self.config["log_samples"], self.config["seed"]
        rows = logged_groups(samples, group_sizes, log_samples, step, seed)
        rows = [{"step": step, "prompt_index": first + row["group"], **row} for row in rows]
        append_rows(self.folder / "samples.jsonl", rows)
        self.progress.show(metrics)
        if text := hint(self.recent):
            tqdm.write(text)
        self.tracker.send(self.folder, self.config, metrics)
        if not metrics["skipped"]:
            return
        if [row["skipped"] > 0 for row in self.recent[-3:]] == [True, True, True]:
            path = self.folder / "bad-step.jsonl"
            write_rows(path, [{"step": step, **sample} for sample in samples])
            raise UserError(
                f"step {step}: the third in a row with a loss, a gradient or log-probs "
                f"that are not finite; those updates were skipped. {path} has the samples: start a "
                f"new run with a lower --lr, maybe from the last checkpoint (--model {self.folder})"
            )

    def track_true_reward(self, every):
        """Whether the mean true reward of the last `every` steps is the best so far.

        Warns when reward and true reward diverge: since the true reward was at its best, the reward
        has risen, and the true reward has fallen by more than 0.05.
        """
        wanted = {"step", "reward", "true_reward"}
        rows = read_rows(self.folder / "metrics.jsonl", wanted.__contains__)
        blocks = [rows[first : first + every] for first in range(0, len(rows), every)]
        reward = [fmean(row["reward"] for row in block) for block in blocks]
        true = [fmean(row["true_reward"] for row in block) for block in blocks]
        best = true.index(max(true))
        if reward[-1] > reward[best] and true[-1] < true[best] - 0.05:
            tqdm.write(
                f"warning: since step {blocks[best][-1]['step']} the reward has risen from "
                f"{reward[best]:.3f} to {reward[-1]:.3f}, but the true reward has fallen from "
                f"{true[best]:.3f} to {true[-1]:.3f}: the policy learns what the reward likes, not "
                f"what is right. {self.folder}/best is the policy at its best"
            )
        return best == len(blocks) - 1
