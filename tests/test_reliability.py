"""Killed, told to stop, out of disk, damaged, fed with nan: the promises of docs/reliability.md."""

import ast
import json
import math
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import chdir, contextmanager
from pathlib import Path
from unittest.mock import patch

import killing
import pytest
import torch
from conftest import CPU, parse_train
from safetensors.torch import load_file

import eval
import lib.run
import tasks
import train
from engine.learner import Learner
from lib.checkpoint import lock
from lib.files import append_rows, read_rows
from lib.flags import UserError
from lib.run import Run, read_config
from policy import load_policy, save_policy
from reward import load_reward, score
from tools import pretrain

ROOT = Path(__file__).parent.parent
FLAGS = shlex.split("""--model=untaught --device=cpu --lr=1e-3 --prompts_per_step=2 --group_size=4
    --steps=6 --max_new_tokens=6 --save_every=2 --eval_every=6 --eval_problems=8
    --reward=mine.noisy""")
NOISY = """import os, random, signal
calls = []
def noisy(prompt, response, answer):
    calls.append(response)
    if len(calls) == MOMENT: WHAT_HAPPENS
    return len(set(response)) + random.random()
"""


def write_reward(moment=0, what_happens="pass"):
    """mine.noisy: random, and as it is called for the moment-th time something happens. A run calls
    it 16 times in the evaluation before training, then 8 times a step."""
    text = NOISY.replace("MOMENT", str(moment)).replace("WHAT_HAPPENS", what_happens)
    Path("mine.py").write_text(text)


def run_train(*flags):
    with patch.object(lib.run, "plot_run"):  # slow
        return train.main(parse_train(*flags))


def resume(name, *flags):
    return run_train(f"--name={name}", "--resume", *flags)


def outcome(run):
    """What a run leaves, except times."""
    rows = read_rows(run / "metrics.jsonl", lambda key: "second" not in key)
    return {
        "metrics": rows,
        "samples": read_rows(run / "samples.jsonl"),
        "weights": (run / "checkpoint" / "model.safetensors").read_bytes(),
        "evaluations": [(run / f"{when}.json").read_text() for when in ("before", "after")],
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a run of a second, runs/straight: of the built-in model before it has learned
    anything, with a reward that uses Python's random generator."""
    folder = tmp_path_factory.mktemp("finished")
    with chdir(folder):
        torch.manual_seed(0)
        tokenizer = pretrain.make_tokenizer()
        save_policy(pretrain.make_model(tokenizer), tokenizer, Path("untaught"))
        write_reward()
        run_train(*FLAGS, "--name=straight")
    return folder


@pytest.fixture
def run(finished):
    """The finished run, copied into the test's own folder."""
    shutil.copytree(finished, ".", dirs_exist_ok=True)
    return Path("runs/straight")


@pytest.fixture
def straight(run):
    return outcome(run)


@pytest.fixture(scope="module")
def fork():
    """Starts processes that have imported what they need: that takes longer than a tiny run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killing"])
    with patch.dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT}/tests"):
        yield context


@pytest.fixture
def killable(fork):
    """killable("run", phase, n) trains or resumes, see tests/killing.py -> whether it was killed,
    calls in each phase"""

    def train(name, phase=None, event=0):
        started = (Path("runs") / name / "config.json").exists()
        flags = [f"--name={name}", *(["--resume"] if started else FLAGS)]
        result, pipe = fork.Pipe(duplex=False)
        process = fork.Process(target=killing.run, args=(flags, phase, event, pipe))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0, result.recv() if process.exitcode == 0 else None

    return train


def assert_whole(run):
    """Nothing under a final name is half written."""
    for path in run.glob("*.json"):
        json.loads(path.read_text())
    for name in ("checkpoint", "checkpoint.old"):
        if (run / name).exists():
            torch.load(run / name / "state.pt", weights_only=True)
            load_file(run / name / "model.safetensors")
    if (run / "curves.png").exists():
        assert (run / "curves.png").read_bytes().endswith(b"IEND\xaeB`\x82")
    steps = [row["step"] for row in read_rows(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


def test_killed_twice_a_run_comes_out_the_same(killable, straight):
    """In the update of its first step, and when it writes its first checkpoint."""
    for phase in ("update", "checkpoint"):
        assert killable("killed", phase, 10)[0]
        assert_whole(Path("runs/killed"))
    killable("killed")
    assert outcome(Path("runs/killed")) == straight


@pytest.mark.slow
def test_killed_at_20_moments_a_run_comes_out_the_same(killable, straight):
    """Each run is killed up to five times, once in each phase, at a random call inside of it."""
    rng = random.Random(0)
    _, events = killable("undisturbed", "")
    killed = []
    while len(killed) < 20:
        name = f"run-{len(killed)}"
        for phase in rng.sample(list(events), len(events))[: 20 - len(killed)]:
            # a run that resumes makes fewer calls: half of them are surely made
            event = rng.randrange(events[phase] // (1 if phase == "plot" else 2))
            if not killable(name, phase, event)[0]:
                break
            killed.append(phase)
            assert_whole(Path("runs") / name)
        killable(name)
        assert outcome(Path("runs") / name) == straight
    assert set(killed) == set(events)


def test_killed_before_its_first_checkpoint_a_run_starts_again(run, straight):
    early = Path("runs/early")
    early.mkdir()
    (early / "config.7.part.json").write_text("{")  # killed in its first moments
    assert Run(parse_train("--name=early")).folder == early  # the name is still free
    shutil.rmtree(run / "checkpoint")
    shutil.rmtree(run / "checkpoint.old")
    (run / "metrics.jsonl").write_text('{"step": 1, "rew')
    assert outcome(resume("straight")) == straight


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGINT, 130),
        (signal.SIGHUP, 129),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_step_saves_and_says_how_to_resume(straight, capsys, number, status):
    """It comes while step 3 of 6 is being rewarded; checkpoints are due after 2, 4 and 6."""
    write_reward(16 + 2 * 8 + 4, f"os.kill(os.getpid(), {number:d})")
    default = signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler
    around = signal.signal(number, default)  # the tests may run under nohup
    with pytest.raises(SystemExit) as exit:
        run_train(*FLAGS, "--name=told", "--runs_dir=my runs")
    assert exit.value.code == status
    assert signal.signal(number, around) == default
    assert "--name told --resume --runs_dir 'my runs'\n" in capsys.readouterr().out
    assert len(read_rows(Path("my runs/told/metrics.jsonl"))) == 3
    write_reward()
    assert outcome(resume("told", "--runs_dir=my runs")) == straight


def test_nohup_keeps_a_run_alive(run):
    write_reward(20, "os.kill(os.getpid(), signal.SIGHUP)")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run_train(*FLAGS, "--name=told")
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


CLOSED = """
import os, pty, sys, time
child, terminal = pty.fork()
if child == 0:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
deadline = time.monotonic() + 300
while not os.path.exists("runs/closed/metrics.jsonl") or not os.path.getsize("runs/closed/metrics.jsonl"):
    os.read(terminal, 10_000)
    assert time.monotonic() < deadline
os.close(terminal)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_a_closed_terminal_ends_the_step_and_saves_it(run):
    """Every line that is printed after it would raise an error."""
    flags = [*FLAGS, "--name=closed", "--steps=100000", "--save_every=100000"]
    command = [sys.executable, "-c", CLOSED, str(ROOT / "train.py"), *flags]
    assert subprocess.run(command, check=False, timeout=300).returncode == 129
    steps = len(read_rows(Path("runs/closed/metrics.jsonl")))
    state = torch.load("runs/closed/checkpoint/state.pt", weights_only=True)
    assert state["step"] == steps > 0


def test_what_changed_before_a_resume_is_said_and_kept(run, capsys):
    """config.json and code/ were overwritten; other problems were learned from without a word."""
    first = json.loads((run / "config.json").read_text())
    resume("straight", "--steps=7")
    assert "warning" not in capsys.readouterr().out
    assert not list(run.glob("code-*"))
    assert Path("mine.py").read_text() == (run / "code" / "own" / "mine.py").read_text()

    write_reward(what_happens="print()")
    (run / "code" / "loss.py").write_text("# as it was")
    resume("straight", "--steps=8")
    said = capsys.readouterr().out
    assert "warning: --resume: loss.py, own/mine.py changed" in said
    assert f"today's is in {run}/code-7" in said
    assert (run / "code" / "loss.py").read_text() == "# as it was"
    assert (run / "code-7" / "loss.py").read_text() == (ROOT / "loss.py").read_text()
    assert (run / "code-7" / "own" / "mine.py").read_text() == Path("mine.py").read_text()

    with patch.object(tasks.Task, "fingerprint", lambda task: "another"):
        resume("straight", "--steps=9")
    said = capsys.readouterr().out
    assert "warning: --resume: --task add has other problems than when the run began" in said
    assert "changed since" not in said and not (run / "code-8").exists()

    Path("helper.py").write_text("")  # the reward may import it
    with patch.object(lib.run, "reward_models", lambda config: {"judge": "another"}):
        resume("straight", "--steps=10")
    said = capsys.readouterr().out
    assert "own/helper.py changed" in said
    assert "a learned reward is another model than when the run was last at work" in said

    now = json.loads((run / "config.json").read_text())
    assert {**now, "config": 0, "resumed": 0} == {**first, "config": 0, "resumed": 0}
    assert now["config"]["steps"] == 10
    assert [session["step"] for session in now["resumed"]] == [6, 7, 8, 9]


def test_a_learned_reward_has_another_fingerprint_after_another_training():
    Path("judge").mkdir()
    config = train.Config(reward='0.5*model("judge")', true_reward="raw_model('./judge')")
    found = []
    for weights in (b"0" * 2_000_000 + b"1", b"0" * 2_000_000 + b"2"):
        Path("judge/model.safetensors").write_bytes(weights)
        found.append(lib.run.reward_models(config))
    assert found[0].keys() == found[1].keys() == {"judge", "./judge"}
    assert found[0]["judge"] == found[0]["./judge"] != found[1]["judge"]


def test_a_run_that_another_one_started_from_stays_as_it_is(run, capsys):
    """The other's adapter, its reference model and its base would be another model."""
    folder = run_train(*FLAGS, "--name=first", "--steps=1")
    for name, more in {"second": "--runs_dir=runs", "kl": "--kl_beta=0.1"}.items():
        run_train(*FLAGS, f"--model={folder}", f"--name={name}", "--steps=1", more)
    merged = save_merged(folder)
    run_train(*FLAGS, f"--model={merged}", "--name=a-copy", "--steps=1")
    with pytest.raises(UserError, match=r"kl started from .*first, .* --model .*first --name"):
        run_train("--name=first", "--resume", "--steps=2")
    for name in ("second", "kl"):  # where it cannot be seen
        Path("elsewhere").mkdir(exist_ok=True)
        shutil.move(folder.with_name(name), f"elsewhere/{name}")
    run_train("--name=first", "--resume", "--steps=2")

    capsys.readouterr()
    run_train("--runs_dir=elsewhere", "--name=second", "--resume", "--steps=2")
    said = f"elsewhere/second started from step 1 of {folder}, which is now at step 2"
    assert f"warning: --resume: {said}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"kl started from .* another adapter or reference"):
        run_train("--runs_dir=elsewhere", "--name=kl", "--resume", "--steps=2")
    eval.main(eval.Config(limit=2, device="cpu"), ["elsewhere/second"])
    assert f"warning: {said}" in capsys.readouterr().out


def save_merged(folder):
    """A copy within the run's folder, as tools.merge writes it."""
    return shutil.copytree(folder / "checkpoint", folder / "merged")


def test_a_model_card_has_no_numbers_of_a_shorter_run(run):
    """Until the run has come to its end again."""
    card = Path("runs/straight/checkpoint/README.md")
    assert "accuracy" in card.read_text() or "mean_reward" in card.read_text()
    write_reward(16 // 2 + 8 * 3, "os.kill(os.getpid(), signal.SIGINT)")
    with pytest.raises(SystemExit):
        resume("straight", "--steps=20")
    assert "On held-out problems" not in card.read_text()
    write_reward()
    resume("straight", "--steps=12")
    assert "On held-out problems" in card.read_text()


def test_a_second_signal_stops_at_once(run):
    write_reward(20, "[os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run_train(*FLAGS, "--name=told")
    finally:
        signal.signal(signal.SIGINT, before)
    assert read_rows(Path("runs/told/metrics.jsonl")) == []


@pytest.mark.parametrize("line", ['{"step": 2, "rew', "5", "[]", "\0\0", "{}", '{"step": "2"}'])
def test_a_damaged_line_of_metrics_is_named(line):
    """The second of three. Only the last may be cut short, by a crash: it is left out."""
    path = Path("metrics.jsonl")
    path.write_text('{"step": 1}\n{"step": 2')
    assert read_rows(path) == [{"step": 1}]
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: is damaged"):
        read_rows(path)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = [("state.pt", cut_short), ("config.json", cut_short), ("tokenizer.json", Path.unlink)]


@pytest.mark.parametrize(("file", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    run, straight, capsys, file, damage
):
    """Steps 5 and 6 are done again from the checkpoint of step 4, to the same end."""
    damage(run / "checkpoint" / file)
    assert outcome(resume("straight")) == straight
    assert f"warning: {run}/checkpoint/{file} cannot be read" in capsys.readouterr().err
    assert_whole(run)


def test_killed_between_two_renames_a_run_comes_out_the_same(run, straight, capsys):
    """The checkpoint before it has its new name, the newest does not have it yet."""
    (run / "checkpoint").rename(run / "checkpoint.part")
    assert outcome(resume("straight")) == straight
    assert "resuming from the checkpoint before it" in capsys.readouterr().err


def test_two_damaged_checkpoints_are_named(run):
    cut_short(run / "checkpoint" / "model.safetensors")
    (run / "checkpoint.old" / "state.pt").unlink()
    with pytest.raises(UserError, match=r"checkpoint/model.safetensors .*checkpoint.old/state.pt"):
        resume("straight")


@contextmanager
def largest_file(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_the_run_in_a_sentence_and_costs_nothing(run):
    """No file may grow beyond 1 MB: the next checkpoint fails in its weights."""
    before = outcome(run)["weights"]
    message = "runs/straight/checkpoint: cannot be written .*File too large"
    with largest_file(1_000_000), pytest.raises(UserError, match=message):
        resume("straight", "--steps=8")
    assert outcome(run)["weights"] == before
    assert_whole(run)
    resume("straight", "--steps=8")
    with pytest.raises(UserError, match=r"/dev/full: cannot be written .*No space left"):
        append_rows(Path("/dev/full"), [{"step": 1}])


def test_a_full_disk_names_the_folder_that_is_written(run):
    """Not the script that is copied into it, as once."""
    message = "^runs/full/code: cannot be written"
    with largest_file(4_000), pytest.raises(UserError, match=message) as error:
        run_train(*FLAGS, "--name=full")
    assert str(ROOT) not in str(error.value)


def test_a_folder_that_cannot_be_written_is_named_before_the_model_is_loaded():
    Path("runs").touch()
    with pytest.raises(UserError, match="runs/add: cannot be written"):
        run_train("--model=no/such/model")


@pytest.mark.parametrize("file", ["metrics.jsonl", "samples.jsonl"])
def test_a_file_deleted_while_the_run_trains_ends_it(run, file):
    """It came back with the later steps only, and the run ended as if nothing had happened."""
    write_reward(20, f"os.remove('runs/deleted/{file}')")
    with pytest.raises(UserError, match=f"runs/deleted/{file}: cannot be written"):
        run_train(*FLAGS, "--name=deleted")


def test_a_reward_cannot_change_the_problem():
    """A conversation that it empties: the next prompt of the problem was once empty too."""
    Path("mine.py").write_text("""
def one(prompt, response, answer): return float(prompt.clear() is None)
def all(prompts, responses, answers): return [float(prompt.clear() is None) for prompt in prompts]
""")
    sample = {"prompt": [{"role": "user", "content": "1+1="}], "response": "2", "answer": "2"}
    assert score(load_reward("mine.one + mine.all"), [sample])[0]["reward"] == 2
    assert sample["prompt"] == [{"role": "user", "content": "1+1="}]


def test_no_minibatch_is_without_a_row(run, monkeypatch):
    """A million of them were once made for 8 rows."""
    counts = []

    def count(lengths, config, denominator=train.DENOMINATORS["token"]):
        counts.append(len(lengths))
        return denominator(lengths, config)

    monkeypatch.setitem(train.DENOMINATORS, "token", count)
    run_train(*FLAGS, "--name=many", "--steps=1", "--minibatches=99", "--updates_per_rollout=2")
    assert counts == [1] * 16


def bad_numbers(where, steps, monkeypatch):
    """From here on, numbers of the given steps are not finite."""
    count = []

    def update(learner, backward, batch, *rest, update=Learner.update):
        count.append(0)
        bad = math.inf if len(count) in steps else 0.0

        def spoiled(batch, token_logprobs, config):
            loss, *numbers = backward(batch, token_logprobs, config)
            if where == "gradient":
                learner.policy.lm_head.weight.grad[3, 3] += bad
            return loss + (bad if where == "loss" else 0.0), *numbers

        if where == "sampled":
            batch.old_logprobs = batch.old_logprobs + bad
        return update(learner, spoiled, batch, *rest)

    monkeypatch.setattr(Learner, "update", update)


@pytest.mark.parametrize("where", ["loss", "gradient", "sampled"])
def test_numbers_that_are_not_finite_make_no_update(run, monkeypatch, where):
    bad_numbers(where, [2, 3], monkeypatch)
    bad = run_train(*FLAGS, "--name=bad", "--steps=4", "--eval_problems=0")
    rows = read_rows(bad / "metrics.jsonl")
    assert [(row["updates"], row["skipped"]) for row in rows] == [(1, 0), (0, 1), (0, 1), (1, 0)]
    for row in rows:
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert all(map(math.isfinite, numbers))
    for name in ("checkpoint", "checkpoint.old"):
        weights = load_file(bad / name / "model.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())


def test_after_three_bad_steps_in_a_row_the_run_stops_and_keeps_their_samples(run, monkeypatch):
    bad_numbers("loss", [1, 3, 4, 5], monkeypatch)
    with pytest.raises(UserError, match=r"step 5: the third in a row .* runs/bad/bad-step.jsonl"):
        run_train(*FLAGS, "--name=bad")
    samples = read_rows(Path("runs/bad/bad-step.jsonl"))
    assert [sample["step"] for sample in samples] == [5] * 8
    assert samples[0]["response"] is not None


def test_two_processes_cannot_work_on_one_run_and_a_lock_dies_with_its_process():
    """The other process takes the lock, and is killed."""
    folder = Path("runs/add")
    folder.mkdir(parents=True)
    program = """import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(20)"""
    command = [sys.executable, "-c", program, folder / "lock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="--name add: another process is at work on runs/add"):
            lock(folder)
        assert Run(parse_train()).folder == Path("runs/add-2")
        other.kill()
    assert lock(folder)


CHANGES = """
recipe=dapo -> --recipe dapo: the run has None, and only ... rows_at_once, ... may change on --resume
model=nope -> --model nope: the run has 'untaught'
lr=0.1 -> --lr 0.1: the run has 0.001
offload -> --offload True: the run has False
dtype=bfloat16 -> --dtype bfloat16: the run has 'float32'
steps=3 -> --steps 3: runs/straight has done 6 steps already"""


@pytest.mark.parametrize("line", CHANGES.strip().splitlines())
def test_what_is_learned_from_cannot_change_on_resume(run, line):
    change, message = line.split(" -> ")
    before = (run / "config.json").read_text()
    with pytest.raises(UserError) as error:
        resume("straight", f"--{change}")
    assert all(part in str(error.value) for part in message.split(" ... "))
    assert (run / "config.json").read_text() == before


def test_other_flags_may_change_on_resume_and_the_folder_may_move(run, straight):
    """The learning rate follows the number of steps. Sizes that save memory only change
    rounding."""
    run_train(*FLAGS, "--name=short", "--steps=2")
    Path("elsewhere").mkdir()
    Path("runs/short").rename("elsewhere/short")
    flags = "--save_every=9 --eval_every=3 --log_samples=1 --micro_batch_tokens=20 --rows_at_once=3"
    flags += " --gradient_checkpointing --fast=off --tracker=none --device=cpu --runs_dir=elsewhere"
    moved = resume("short", "--steps=6", *flags.split())
    rows = read_rows(moved / "metrics.jsonl")
    assert [row["lr"] for row in rows[2:]] == [row["lr"] for row in straight["metrics"][2:]]
    config = read_config(Path("elsewhere/short"))
    assert (config["steps"], config["fast"], config["runs_dir"]) == (6, "off", "elsewhere")


# what is changed in the flags (null: left out), what the sentence says
CONFIGS = """
{"old": 3} -> --old=3
{"prompts_per_step": null} -> --prompts_per_step 8: the run has None
{"steps": null} -> --steps 8: the run has None
{"lr": "0.001"} -> --lr 0.001: the run has '0.001'
{"task": 5} -> config.json
{"steps": "many"} -> config.json: is not of this version: argument --steps: invalid int value
{"group_size": 4.5} -> --group_size
{"loss": "square"} -> invalid choice: 'square'
["steps", 6] -> config.json"""


def test_a_run_from_before_a_flag_resumes_and_says_so(run, capsys):
    """Somebody adds a flag to Config, and resumes a run of yesterday."""
    content = json.loads((run / "config.json").read_text())
    del content["config"]["adam_8bit"]
    (run / "config.json").write_text(json.dumps(content))
    code = run / "code" / "train.py"
    lines = [line for line in code.read_text().splitlines() if "    adam_8bit:" not in line]
    code.write_text("\n".join(lines))
    resume("straight", "--steps=8")
    said = "--adam_8bit: the run is from before this flag and has its default, False"
    assert said in capsys.readouterr().out
    assert read_config(run)["adam_8bit"] is False


@pytest.mark.parametrize("line", CONFIGS.strip().splitlines())
def test_a_config_that_does_not_fit_is_named(run, line):
    """As another version of the scripts wrote it, or a hand."""
    changes, expected = line.split(" -> ")
    changes = json.loads(changes)
    content = json.loads((run / "config.json").read_text())
    if isinstance(changes, dict):
        flags = content["config"] | changes
        changes = {name: flags[name] for name in flags if name not in changes or flags[name]}
    (run / "config.json").write_text(json.dumps({**content, "config": changes}))
    with pytest.raises(UserError) as error:
        resume("straight", "--steps=8")
    assert expected in str(error.value)


FORBIDDEN = shlex.split("""eval exec compile os.system os.popen pickle.load pickle.loads
    marshal.loads shelve.open numpy.load joblib.load yaml.load subprocess.getoutput""")


def test_nothing_in_the_sources_executes_what_was_downloaded_or_generated():
    """No eval, exec, shell or pickle; torch.load with weights_only; from_pretrained without code of
    the hub, weights only from safetensors. A file of Python is run for --reward module.function."""
    checked = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[lft]*/*.py")]:
        if path.parent.name == "tests":
            continue
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func)
            flags = {word.arg: ast.unparse(word.value) for word in call.keywords}
            where = f"{path}, line {call.lineno}"
            checked.add(name)
            assert name not in FORBIDDEN and "shell" not in flags, where
            if name == "torch.load":
                assert flags["weights_only"] == "True", where
            if name.endswith(".from_pretrained") and name != "GenerationConfig.from_pretrained":
                assert flags["trust_remote_code"] == "False", where
                if "Model" in name and "gguf_file" not in flags:  # numbers too, without code
                    assert flags["use_safetensors"] == "True", where
            if name.startswith("runpy.") or name.endswith("exec_module"):
                assert path.name == "mixture.py", where
    assert checked >= {"torch.load", "AutoModelForCausalLM.from_pretrained", "runpy.run_path"}


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("pwned"),)


def test_a_malicious_checkpoint_is_refused(run):
    """A pickle that would run code on loading: as the state of a run, and as weights."""
    folder = run / "checkpoint"
    shutil.rmtree(run / "checkpoint.old")
    torch.save({"optimizer": Bomb()}, folder / "state.pt")
    with pytest.raises(UserError, match=r"checkpoint/state.pt cannot be read .Weights only load"):
        resume("straight", "--steps=8")
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no file named model.safetensors"):
        load_policy(str(run), CPU)
    assert not Path("pwned").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert Path("pwned").exists()  # so it was one
