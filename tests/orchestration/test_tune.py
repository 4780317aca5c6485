"""`yuzogpt tune` as a command: a sweep from a pretrained model, and what may happen to it."""

import contextlib
import json
import math
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY, yuzogpt
from tests.orchestration.clusters import newest_worker, started
from tests.training.worlds import records
from tests.waiting import wait_until
from yuzogpt.runs.event_log import read_records
from yuzogpt.tuning.sweep import SIGNATURE
from yuzogpt.tuning.trials import Trial

pytestmark = pytest.mark.slow
CANARY = "c0ffee" * 6 + "cafe"  # as long as a key of W&B's

# Of a pretrained model's shape: what TINY says of it is left out.
FLAGS = (
    "--batch_size=4 --gradient_accumulation_steps=3 --block_size=16 --warmup_iters=5 "
    "--max_iters=60 --lr_decay_iters=60 --eval_interval=10 --eval_iters=0 --device=cpu "
    "--dtype=float32 --threads=1 --learning_rate=1e-4 "
    "--search.learning_rate={loguniform:[1e-4,1e-1]} --search.dropout={uniform:[0,0.3]}"
).split()


@pytest.fixture
def sweep(corpus_dir, pretrained, tmp_path):
    """Return how a sweep is started, in a directory of the test's."""

    def command(name, *flags):
        places = [f"--data_dir={corpus_dir}", f"--out_dir={tmp_path / name}"]
        return ["tune", *FLAGS, *places, f"--init_from={pretrained}", *flags]

    return command


def start(arguments, **environment):
    """Start a command; it runs beside the test."""
    return subprocess.Popen(
        [sys.executable, "-m", "yuzogpt", *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outcome(directory):
    """Return what sweep.json says."""
    return json.loads((directory / "sweep.json").read_text())


def found_by(directory):
    """Return of each trial what must not depend on what happened on the way."""
    keys = ("name", "values", "state", "best_val_loss_estimate", "best_step", "evaluations")
    return [{key: trial[key] for key in keys} for trial in outcome(directory)["trials"]]


def steps_of(run):
    """Return how many steps a run has made."""
    return max((r["step"] for r in read_records(run / "metrics.jsonl")), default=0)


def process_of(run):
    """Return the process that holds a run now."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads((run / ".lease.json").read_text())["process"]
    return None


def mentions(directory, text):
    """Return whether a file in a directory contains a text."""
    found = subprocess.run(["grep", "-rqF", text, directory], capture_output=True, check=False)
    return found.returncode == 0


def test_a_sweep_of_twelve(sweep, tmp_path):
    directory = tmp_path / "sweep"
    flags = ("--num_samples=12", "--max_concurrent_trials=2", "--final_seeds=2")
    process = start(sweep("sweep", *flags), WANDB_API_KEY=CANARY)
    holders, private_seen = set(), 0
    while process.poll() is None:
        for run in (directory / "trials").glob("*"):
            if holder := process_of(run):
                holders.add(holder)
        for private in directory.glob(".tune-*"):  # Ray Tune's own files
            with contextlib.suppress(FileNotFoundError):  # it ends with the sweep
                assert stat.S_IMODE(private.stat().st_mode) == 0o700
            assert not mentions(private, CANARY)
            private_seen += 1
        time.sleep(0.02)  # polled for what is gone in the end
    printed = process.communicate()[0]
    assert process.returncode == 0, printed
    assert not mentions(directory, CANARY)
    assert private_seen
    assert not list(directory.glob(".tune-*"))
    # Trials follow each other in processes that stay; Tune may start another now and then.
    assert 2 <= len(holders) <= 6

    found = outcome(directory)
    trials = found["trials"]
    assert len(trials) == 12
    assert trials[0]["values"] == {"optimizer.learning_rate": 1e-4, "model.dropout": 0.0}
    states = [trial["state"] for trial in trials]
    assert set(states) == {"finished", "stopped"}
    for trial in trials:
        run = directory / "trials" / trial["name"]
        if trial["state"] == "stopped":
            assert all(step < 60 for step, _ in trial["evaluations"])
        # A stopped one may lose its process before its first checkpoint is written.
        kept = list((run / "checkpoints").glob("step-*"))
        assert len(kept) == 1 or (trial["state"] == "stopped" and not kept)
        assert not list(run.glob("checkpoints/*/optimizer*"))
        assert not (run / ".lease.json").exists()
    best = min(trials, key=lambda trial: trial["best_val_loss_estimate"])
    assert found["best"] == best["name"] != "0000"
    assert list((directory / "trials" / best["name"] / "checkpoints").glob("step-*"))
    assert f"winner: trial {best['name']}" in printed

    assert found["comparison"]["default"]["seeds"] == found["comparison"]["tuned"]["seeds"] == 2
    assert found["comparison"]["tuned"]["mean"] < found["comparison"]["default"]["mean"]
    for final in found["final"]:
        (scored,) = records(directory / "final" / final["name"] / "score", "eval_only")
        assert scored["val_loss"] == final["score"]
    for plot in ("losses.png", "parameters.png", "importance.png"):
        assert (directory / plot).read_bytes().startswith(b"\x89PNG")

    # The winner is an ordinary preset, the same sweep is finished, and a longer one continues it.
    again = yuzogpt(*sweep("sweep", *flags))
    assert again.returncode == 0
    assert "finished; a larger --num_samples continues it" in again.stdout
    assert "starting Ray" not in again.stdout
    out_dir = f"--out_dir={tmp_path / 'best'}"
    trained = yuzogpt("train", str(directory / "best.yaml"), out_dir, "--num_workers=0")
    assert trained.returncode == 0, trained.stderr
    (start_record,) = records(tmp_path / "best", "start")
    assert start_record["step"] == 0
    refused = yuzogpt(*sweep("sweep", *flags, "--search.dropout={uniform:[0,0.2]}"))
    assert refused.returncode == 2
    assert "another sweep: search: " in refused.stderr


def test_killed_trials_and_a_killed_command_change_nothing(sweep, tmp_path):
    """A trial whose loss is not finite fails, and the others go on; three times the same sweep."""
    flags = ["--num_samples=6", "--search_algorithm=random", "--scheduler=none", "--final_seeds=0"]
    flags += ["--max_nonfinite_steps=2", "--search.grad_clip={choice:[1.0]}", "--max_iters=100"]
    flags += ["--search.redecay={choice:[20..100,20..100@1e30]}"]  # some end badly
    undisturbed = yuzogpt(*sweep("undisturbed", *flags))
    assert undisturbed.returncode == 0, undisturbed.stdout + undisturbed.stderr
    expected = found_by(tmp_path / "undisturbed")
    failed = [trial for trial in outcome(tmp_path / "undisturbed")["trials"] if trial["error"]]
    assert 0 < len(failed) < 6
    assert all(trial["state"] == "failed" for trial in failed)
    assert all("in a row to be skipped" in trial["error"] for trial in failed)

    directory = tmp_path / "disturbed"
    process = start(sweep("disturbed", *flags))
    first = directory / "trials" / "0000"
    wait_until(lambda: steps_of(first) > 15, process)
    os.kill(process_of(first), signal.SIGKILL)  # the process of a trial
    third = directory / "trials" / "0003"
    wait_until(lambda: steps_of(third) > 5, process)
    process.kill()
    process.communicate()
    ended = {
        path.parent.name
        for path in directory.glob("trials/*/trial.json")
        if json.loads(path.read_text())["state"] != "waiting"
    }
    assert ended
    mtimes = {name: (directory / "trials" / name / "trial.json").stat().st_mtime for name in ended}
    steps = {name: steps_of(directory / "trials" / name) for name in ended}

    rerun = yuzogpt(*sweep("disturbed", *flags))
    assert rerun.returncode == 0, rerun.stdout + rerun.stderr
    assert found_by(directory) == expected
    assert outcome(directory)["best"] == outcome(tmp_path / "undisturbed")["best"]
    for name in ended:  # not run again, and not said to be
        assert f"\n{name} kept: " in rerun.stdout
        assert f"\n{name} starts" not in rerun.stdout
        assert f"\n{name} finished" not in rerun.stdout
        run = directory / "trials" / name
        assert (run / "trial.json").stat().st_mtime == mtimes[name]
        assert steps_of(run) == steps[name]
    assert len(records(first, "start")) >= 2  # it resumed after its process was killed


def test_a_combination_that_training_does_not_take_fails_at_once_with_the_reason(sweep, tmp_path):
    flags = ["--search_algorithm=grid", "--search.learning_rate=", "--search.dropout="]
    flags += ["--search.lr_schedule={choice:[cosine,wsd]}", "--search.cooldown_iters={grid:[0,5]}"]
    flags += ["--scheduler=none", "--final_seeds=0", "--max_iters=10"]
    result = yuzogpt(*sweep("sweep", *flags))
    assert result.returncode == 0, result.stdout + result.stderr
    trials = outcome(tmp_path / "sweep")["trials"]
    assert len(trials) == 4
    (failed,) = (trial for trial in trials if trial["state"] == "failed")
    why = "cooldown_iters 0, lr_schedule wsd: lr_schedule=wsd: set cooldown_iters, the length"
    assert failed["error"].startswith(why)
    assert f"!!! {failed['name']} failed: {why}" in result.stdout
    assert "1 of 4 trials failed" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
    assert "tried" not in failed["error"]


def test_a_trial_whose_process_dies_too_often_has_failed(sweep, tmp_path):
    """As it does where the system's memory is not enough. The sweep continues."""
    directory = tmp_path / "sweep"
    flags = ["--num_samples=2", "--max_concurrent_trials=1", "--max_failures=0", "--max_iters=150"]
    flags += ["--scheduler=none", "--final_seeds=0"]
    process = start(sweep("sweep", *flags))
    first = directory / "trials" / "0000"
    wait_until(lambda: steps_of(first) > 5, process)
    os.kill(process_of(first), signal.SIGKILL)
    printed = process.communicate(timeout=240)[0]
    assert process.returncode == 0, printed
    died, other = outcome(directory)["trials"]
    assert (died["state"], other["state"]) == ("failed", "finished")
    assert died["error"].endswith("tried 1 times")
    assert f"!!! 0000 failed: {died['error']}" in printed
    assert outcome(directory)["best"] == "0001"


def test_trials_of_two_workers_on_a_cluster(sweep, tmp_path):
    """One of the workers is killed, then the command; Ray keeps nothing of it."""
    directory = tmp_path / "sweep"
    flags = ["--num_samples=2", "--num_workers=2", "--final_seeds=0", "--scheduler=none"]
    flags += ["--max_iters=200", "--eval_interval=20"]
    first = directory / "trials" / "0000"
    with started(head_cpus=2, nodes=0) as cluster:
        command = sweep("sweep", *flags, f"--ray_address={cluster.address}")
        process = start(command, RAY_AUTH_MODE="disabled")
        wait_until(lambda: steps_of(first) > 30, process)
        os.kill(newest_worker(), signal.SIGKILL)
        wait_until(lambda: len(records(first, "start")) == 2, process)
        process.kill()
        process.communicate()
        wait_until(lambda: cluster.do("groups") == "0", cluster.process)
        rerun = yuzogpt(*command, RAY_AUTH_MODE="disabled")
        assert rerun.returncode == 0, rerun.stdout + rerun.stderr
        assert cluster.do("groups") == "0"
    found = outcome(directory)["trials"]
    assert [trial["state"] for trial in found] == ["finished", "finished"]
    assert all(math.isfinite(trial["best_val_loss_estimate"]) for trial in found)
    assert [start["workers"] for start in records(first, "start")] == [2, 2, 2]
    assert len(records(first, "failure")) == 1


def test_trials_of_two_workers_whose_processes_are_killed_leave_room_for_the_next(sweep, tmp_path):
    """The first trial's is killed as often as it may be, and once more; there is room for one."""
    directory = tmp_path / "sweep"
    flags = ["--num_samples=2", "--num_workers=2", "--final_seeds=0", "--scheduler=none"]
    flags += ["--max_failures=1", "--max_iters=60", "--eval_interval=20"]
    trials = [directory / "trials" / name for name in ("0000", "0001")]
    process = start(sweep("sweep", *flags))
    for begun in (1, 2):
        wait_until(lambda: len(records(trials[0], "start")) == begun, process)  # noqa: B023
        os.kill(process_of(trials[0]), signal.SIGKILL)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert [trial["state"] for trial in outcome(directory)["trials"]] == ["failed", "finished"]
    assert not [*directory.rglob(".placement_group")]


def test_stopped_trials_of_two_workers_leave_room_for_the_finals(sweep, tmp_path):
    directory = tmp_path / "sweep"
    flags = ["--num_samples=3", "--num_workers=2", "--final_seeds=1", "--grace_steps=10"]
    done = yuzogpt(*sweep("sweep", *flags))
    assert done.returncode == 0, done.stdout + done.stderr
    found = outcome(directory)
    assert "stopped" in {trial["state"] for trial in found["trials"]}
    assert found["comparison"]["tuned"]["seeds"] == 1


def test_a_sweep_that_is_asked_to_stop_says_so_in_a_line(sweep, tmp_path):
    process = start(sweep("sweep", "--num_samples=4"))
    wait_until(lambda: steps_of(tmp_path / "sweep" / "trials" / "0000") > 5, process)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 143, printed
    assert printed.strip().endswith("yuzogpt: stopped (SIGTERM); the same command resumes it")
    assert "Traceback" not in printed


def test_a_sweep_is_not_deleted_for_one_that_cannot_start(sweep, tmp_path):
    directory = tmp_path / "sweep"
    Trial(directory / "trials" / "0000", "0000", state="finished").write()
    (directory / "settings.yaml").write_text(SIGNATURE)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    result = yuzogpt(*sweep("sweep", "--overwrite", "--device=cuda"))
    assert result.returncode == 2
    assert "there are 0 GPU(s) here" in result.stderr
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--num_workers=1..2", "a sweep needs one number"),
        ("--num_workers=0", "a sweep needs Ray"),
        ("--wandb_log", "a sweep's trials are not sent"),
        ("--search_algorithm=grid", "loguniform is a range"),
        ("--init_from=gpt2", "vocabulary"),
        ("--block_size=64", "it has positions for 32 tokens"),
        ("--init_from=resume", "every trial starts at step 0"),
        ("--eval_only", "a sweep trains"),
        ("--eval_tasks=lambada", "not evaluated on benchmarks"),
        ("--search.freeze_layers={choice:[0,9]}", "freeze_layers"),
        ("--search.block_size={choice:[8,16]}", "cannot be searched"),
    ],
)
def test_mistakes_are_one_line_before_ray_starts(sweep, tmp_path, flag, says):
    result = yuzogpt(*sweep("sweep", flag))
    assert result.returncode == 2
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert "starting Ray" not in result.stdout
    assert not (tmp_path / "sweep").exists()
