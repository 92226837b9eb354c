"""Killed, told to stop, out of disk, damaged, fed with nan: docs/reliability.md lists what is promised."""

import ast
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pretrain
import track
import train
from checkpoint import checksum, flaw, lock
from flags import UserError, parse
from policy import load_policy, save_policy
from update import Learner

ROOT = Path(__file__).parent.parent
MOMENTS = 20
FLAGS = ["--device=cpu", "--lr=1e-3", "--prompts_per_step=2", "--group_size=4", "--max_new_tokens=6", "--steps=6",
         "--save_every=2", "--eval_every=6", "--eval_problems=8", "--reward=mine.noisy", "--model=untaught"]
NOISY = "import random\ndef noisy(prompt, response, answer): return len(set(response)) + random.random()\n"


@pytest.fixture
def untaught():
    """Flags of a run of a second, on the built-in model before it has learnt anything, and a reward that draws from
    Python's generator."""
    torch.manual_seed(0)
    tokenizer = pretrain.make_tokenizer()
    save_policy(pretrain.make_model(tokenizer), tokenizer, Path("untaught"))
    Path("mine.py").write_text(NOISY)
    return FLAGS


def left(run: Path) -> dict:
    """What a run leaves, but for times."""
    rows = [{key: value for key, value in row.items() if not key.startswith("seconds")}
            for row in track.read_rows(run / "metrics.jsonl")]
    return {"metrics": rows, "samples": track.read_rows(run / "samples.jsonl"),
            "weights": (run / "checkpoint" / "model.safetensors").read_bytes(),
            "evaluations": [json.loads((run / f"{when}.json").read_text()) for when in ("before", "after")]}


def assert_whole(run: Path) -> None:
    """Nothing under a final name is half written."""
    for path in run.glob("*.json"):
        json.loads(path.read_text())
    for checkpoint in run.glob("checkpoint"), run.glob("checkpoint.old"):
        assert [flaw(folder) for folder in checkpoint] in ([], [None])
    if (run / "curves.png").exists():
        assert (run / "curves.png").read_bytes().endswith(b"IEND\xaeB`\x82")
    steps = [row["step"] for row in track.read_rows(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


def test_killed_at_20_moments_a_run_comes_out_the_same(untaught):
    """Four runs or more, killed up to five times each, once in each phase, at a random call inside of it."""
    server = subprocess.Popen([sys.executable, ROOT / "tests" / "killing.py"], stdin=subprocess.PIPE, text=True,
                              stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})

    def train(name, phase=None, event=0):
        """-> whether it was killed, calls in each phase"""
        again = ["--resume"] if (Path("runs") / name / "config.json").exists() else untaught
        print(json.dumps({"flags": [f"--name={name}", *again], "phase": phase, "event": event}), file=server.stdin,
              flush=True)
        answer = json.loads(server.stdout.readline())
        assert answer["status"] in (0, signal.SIGKILL), answer
        return answer["status"] == signal.SIGKILL, answer["events"]

    _, events = train("straight")
    straight, rng, killed, name = left(Path("runs/straight")), random.Random(0), [], "run-0"
    while len(killed) < MOMENTS:
        for phase in rng.sample(list(events), len(events)):
            if len(killed) == MOMENTS:
                break
            died, _ = train(name, phase, rng.randrange(events[phase] // (1 if phase == "plot" else 2)))
            if not died:
                break
            killed.append(phase)
            assert_whole(Path("runs") / name)
        if died:
            train(name)
        assert left(Path("runs") / name) == straight, name
        name = f"run-{len(killed)}"
    server.stdin.close()
    assert server.wait() == 0
    print("killed in", dict(Counter(killed)))
    assert set(killed) == set(events)


def config(*flags):
    return parse(train.Config, train.HELP, list(flags), train.fill)[0]


def test_killed_before_its_first_checkpoint_a_run_begins_again(untaught):
    straight = train.main(config(*untaught, "--name=straight"))
    run = Path("runs/early")
    run.mkdir()
    (run / "config.json.part").write_text("{")  # killed in its first moments: the name is still free
    run = train.main(config(*untaught, "--name=early"))
    shutil.rmtree(run / "checkpoint")
    shutil.rmtree(run / "checkpoint.old")
    (run / "metrics.jsonl").write_text('{"step": 1, "rew')
    assert left(train.main(config("--name=early", "--resume"))) == left(straight)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(untaught, capsys, number, status):
    """It comes while step 3 of 6 is being rewarded; checkpoints are due after 2, 4 and 6."""
    straight = train.main(config(*untaught, "--name=straight"))
    Path("mine.py").write_text(f"import os\n{NOISY.replace('noisy', 'quiet')}calls = []\n"
                               "def noisy(*row):\n"
                               f"    calls.append(os.kill(os.getpid(), {number:d}) if len(calls) == 19 else 0)\n"
                               "    return quiet(*row)\n")
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as exit:
        train.main(config(*untaught, "--name=told", "--runs_dir=my runs"))
    assert exit.value.code == status and signal.getsignal(number) == before
    assert "--name told --resume --runs_dir 'my runs'\n" in capsys.readouterr().out
    run = Path("my runs/told")
    assert [row["step"] for row in track.read_rows(run / "metrics.jsonl")] == [1, 2, 3]
    assert_whole(run)
    Path("mine.py").write_text(NOISY)
    assert left(train.main(config("--name=told", "--resume", "--runs_dir=my runs"))) == left(straight)


@pytest.fixture
def heeded():
    """SIGINT raises KeyboardInterrupt, also where a shell has started the tests in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_does_not_wait(untaught, heeded):
    Path("mine.py").write_text("import os, signal\ndef twice(prompt, response, answer):\n"
                               "    os.kill(os.getpid(), signal.SIGINT)\n    return 0.0\n")
    with pytest.raises(KeyboardInterrupt):
        train.main(config(*untaught, "--name=told", "--reward=mine.twice"))
    assert track.read_rows(Path("runs/told/metrics.jsonl")) == []


@pytest.mark.parametrize("line", ['{"step": 2, "rew', "5", "[]", "\0\0"])
def test_a_damaged_line_of_metrics_is_named(line):
    """The second of three; the last one, cut short by a crash, is left out."""
    path = Path("metrics.jsonl")
    path.write_text('{"step": 1}\n{"step": 2')
    assert track.read_rows(path) == [{"step": 1}]
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: is damaged"):
        track.read_rows(path)


DAMAGES = {"state.pt": lambda path: path.write_bytes(path.read_bytes()[:-100]),
           "model.safetensors": lambda path: flip(path, -7), "tokenizer.json": lambda path: path.unlink(),
           "checksums.json": lambda path: path.write_text(""), "config.json": lambda path: flip(path, 30)}


def flip(path: Path, place: int) -> None:
    """One bit is not what it was."""
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(untaught, capsys):
    """Steps 5 and 6 are done again from the checkpoint of step 4, to the same end."""
    run = train.main(config(*untaught, "--name=hurt"))
    straight = left(run)
    for file, damage in DAMAGES.items():
        damage(run / "checkpoint" / file)
        assert left(train.main(config("--name=hurt", "--resume"))) == straight
        assert f"runs/hurt/checkpoint/{file}" in capsys.readouterr().err
        assert_whole(run)
    for checkpoint in ("checkpoint", "checkpoint.old"):
        flip(run / checkpoint / "state.pt", 50)
    with pytest.raises(UserError, match=r"hurt/checkpoint/state.pt is damaged, .*checkpoint.old/state.pt is damaged"):
        train.main(config("--name=hurt", "--resume"))


def test_a_full_disk_ends_the_run_in_a_sentence_and_costs_nothing(untaught, monkeypatch, capsys):
    """No file may grow beyond 1 MB: the third checkpoint fails in its weights, and the second is gone on from."""
    run = train.main(config(*untaught, "--name=full", "--steps=4"))
    before = flaw(run / "checkpoint"), (run / "checkpoint" / "state.pt").read_bytes()
    monkeypatch.setattr(sys, "argv", ["train.py", "--name=full", "--resume", "--steps=6"])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    try:
        with pytest.raises(SystemExit) as exit:
            train.run_script(train.main, train.Config, train.HELP, train.fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    error = capsys.readouterr().err.rpartition("\r")[2].splitlines()[-1]
    assert exit.value.code == 2 and "runs/full/checkpoint: cannot be written" in error and "File too large" in error
    assert before == (flaw(run / "checkpoint"), (run / "checkpoint" / "state.pt").read_bytes()) and before[0] is None
    train.main(config("--name=full", "--resume", "--steps=6"))
    with pytest.raises(UserError, match=r"/dev/full: cannot be written .*No space left"):
        track.append(Path("/dev/full"), [{"step": 1}])
    with pytest.raises(UserError, match="--runs_dir /proc: /proc/add cannot be made"):
        train.main(config(*untaught, "--runs_dir=/proc"))


def bad_numbers(where: str, steps: list[int], monkeypatch) -> None:
    """From here on the loss, the gradient, the sampler's or the learner's log-probs hold a nan in the given steps."""
    count = []

    def backward(learner, rollout, *rest, backward=Learner.backward):
        count.append(0)
        bad = len(count) in steps
        if bad and where == "sampled":
            rollout.logprobs[0, 0] = math.nan
        with monkeypatch.context() as patch:
            if bad and where == "learner":
                real = Learner.read_off
                patch.setattr(Learner, "read_off", lambda *row: real(*row) * math.nan)
            update = backward(learner, rollout, *rest)
        if bad and where == "gradient":
            learner.model.lm_head.weight.grad[3, 3] = math.inf
        return update | ({"loss": math.inf} if bad and where == "loss" else {})

    monkeypatch.setattr(Learner, "backward", backward)


@pytest.mark.parametrize("where", ["loss", "gradient", "sampled", "learner"])
def test_numbers_that_are_not_finite_make_no_update(untaught, monkeypatch, where):
    bad_numbers(where, [2, 3], monkeypatch)
    run = train.main(config(*untaught, "--name=bad", "--steps=4", "--save_every=1"))
    rows = track.read_rows(run / "metrics.jsonl")
    assert [(row["updates"], row["skipped"]) for row in rows] == [(1, 0), (0, 1), (0, 1), (1, 0)]
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    assert all(weight.isfinite().all() for weight in load_file(run / "checkpoint" / "model.safetensors").values())


def test_after_three_bad_steps_in_a_row_the_run_stops_and_keeps_their_samples(untaught, monkeypatch):
    bad_numbers("loss", [2, 4, 5, 6], monkeypatch)
    with pytest.raises(UserError, match=r"step 6: the third in a row .* runs/bad/bad-step.jsonl has the samples"):
        train.main(config(*untaught, "--name=bad"))
    samples = track.read_rows(Path("runs/bad/bad-step.jsonl"))
    assert len(samples) == 8 and {sample["step"] for sample in samples} == {6}
    assert set(samples[0]) >= {"prompt", "response", "reward", "weight"}


def rows_of(entropies, rewards, accuracy=0.5):
    return [{"step": step + 1, "entropy": entropy, "reward": reward, "accuracy": accuracy}
            for step, (entropy, reward) in enumerate(zip(entropies, rewards))]


def test_a_collapse_is_reported_once_as_it_happens(tmp_path, capsys):
    """Steady, then learning with little entropy left, then none; steady, up, then down to where it began."""
    rows = rows_of([1.0] * 10 + [0.06] * 20 + [0.04] * 20, [0.2, 0.3] * 10 + [0.9, 0.8] * 10 + [0.3, 0.2] * 5)
    said = []
    for step in range(10, 60, 10):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:step]))
        track.warn_of_collapse(tmp_path)
        said.append(capsys.readouterr().out)
    assert said[:3] == ["", "", ""]
    assert "entropy has fallen from 1.000 to 0.040" in said[3] and "--kl_beta" in said[3] and "reward" not in said[3]
    assert "reward has fallen from 0.850 to 0.250" in said[4] and "entropy" not in said[4]
    noise = random.Random(0)
    for rows in (rows_of([1.0] * 2000, [noise.gauss(0.5, 0.1) for _ in range(2000)]),  # noise is no collapse,
                 rows_of([1.0] * 10 + [0.01] * 10, [0.3] * 10 + [0.98] * 10, accuracy=0.98)):  # nor is having learnt it
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        track.warn_of_collapse(tmp_path)
        assert capsys.readouterr().out == ""


def test_two_processes_cannot_work_on_one_run_and_a_lock_dies_with_its_process(tmp_path):
    """The other process takes the lock, and is killed."""
    run = tmp_path / "run"
    run.mkdir()
    other = subprocess.Popen([sys.executable, "-c", "import fcntl, sys, time; file = open(sys.argv[1], 'a'); "
                              "fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(600)",
                              run / "lock"], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"--name run: another process is at work on {run}"):
        lock(run)
    assert track.new_run(str(tmp_path), "", "run.jsonl")[0].name == "run-2"
    other.kill()
    other.wait()
    assert lock(run)


FORBIDDEN = {"eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.loads",
             "shelve.open", "numpy.load", "joblib.load", "yaml.load", "subprocess.getoutput"}


def test_nothing_in_the_sources_executes_what_was_downloaded_or_generated():
    """No eval, exec, shell or pickle of others; torch.load with weights_only; from_pretrained without code of the hub,
    weights from safetensors alone. Files imported are the user's own: --reward module.function, bench.py --against."""
    loads, pretrained = 0, 0
    for path in ROOT.glob("*.py"):
        tree = ast.parse(path.read_text())
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name, flags = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert name not in FORBIDDEN and "shell" not in flags, f"{path.name}: {ast.unparse(call)}"
            if name == "torch.load":
                loads += 1
                assert flags["weights_only"] == "True", path.name
            if name.endswith(".from_pretrained") and not name.startswith("GenerationConfig"):
                pretrained += 1
                assert flags["trust_remote_code"] == "False", path.name
                assert "Model" not in name or flags["use_safetensors"] == "True", path.name
            if name.endswith("exec_module"):
                assert path.name in ("reward.py", "bench.py")
    assert (loads, pretrained) == (1, 5)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("pwned"),)


def test_a_malicious_checkpoint_is_refused(untaught):
    """A pickle that would run code on loading: as the weights of a model, and as the state of a run, sums adapted."""
    run = train.main(config(*untaught, "--name=evil", "--steps=2"))
    torch.save({"optimizer": Bomb()}, run / "checkpoint" / "state.pt")
    sums = json.loads((run / "checkpoint" / "checksums.json").read_text())
    sums["state.pt"] = checksum(run / "checkpoint" / "state.pt")
    (run / "checkpoint" / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(UserError, match=r"state.pt: is not the state of this run: Weights only load failed"):
        train.main(config("--name=evil", "--resume", "--steps=3"))
    (run / "checkpoint" / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb()}, run / "checkpoint" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no file named model.safetensors"):
        load_policy("runs/evil", torch.device("cpu"))
    assert not Path("pwned").exists()
    torch.load(run / "checkpoint" / "pytorch_model.bin", weights_only=False)
    assert Path("pwned").exists()  # so it was one
