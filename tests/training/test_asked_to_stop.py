"""A run that is asked to stop, by a signal or a file: a checkpoint at once, and no step lost."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from tests.conftest import REPOSITORY, TINY, tiny_settings
from tests.training.worlds import (
    Slow,
    exit_codes,
    losses,
    records,
    run_world,
    start_world,
    wait_for_start,
    wait_for_step,
    weights,
)
from tests.waiting import wait_until
from yuzogpt import checkpoints, runs
from yuzogpt.orchestration.train.trainer import track_training
from yuzogpt.runs.stop_request import StopRequest, read_request
from yuzogpt.runtime.world import World
from yuzogpt.storage.run_storage import LocalStorage
from yuzogpt.training.launch import work

DROPOUT = "--dropout=0.1"


@pytest.mark.slow
def test_sigterm_leads_to_a_checkpoint_at_once_and_loses_nothing(corpus_dir, tmp_path):
    flags = (DROPOUT, "--max_iters=120", "--eval_interval=50")
    run_world(2, tiny_settings(corpus_dir, tmp_path / "whole", *flags))
    settings = tiny_settings(corpus_dir, tmp_path / "run", *flags)
    ranks = start_world(2, settings)
    wait_for_step(tmp_path / "run", 60)
    os.kill(ranks[1].pid, signal.SIGTERM)  # one of them is enough
    exit_codes(ranks)
    (stop,) = records(tmp_path / "run", "stop")
    assert stop["reason"] == "SIGTERM"
    assert 60 <= stop["step"] < 120
    assert (
        checkpoints.newest(LocalStorage(tmp_path / "run"), pytest.fail).state.step == stop["step"]
    )
    run_world(2, settings)
    assert [start["redone_steps"] for start in records(tmp_path / "run", "start")] == [0, 0]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert weights(tmp_path / "run", 120) == weights(tmp_path / "whole", 120)


@pytest.mark.slow
def test_torchrun_stops_and_does_not_start_again(corpus_dir, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["--max_restarts=2", "-m", "yuzogpt.training", *TINY, f"--data_dir={corpus_dir}"]
    command += [f"--out_dir={run}", "--max_iters=100000", "--eval_interval=100000"]

    def start():
        pipe, paths = subprocess.PIPE, {"PYTHONPATH": str(REPOSITORY)}
        return subprocess.Popen(
            command, env={**os.environ, **paths}, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )

    agent = start()
    wait_for_start(run, 1, 20)
    (run / runs.STOP).write_text("enough for today")
    output, _ = agent.communicate(timeout=60)
    assert agent.returncode == 0, output
    (stop,) = records(run, "stop")
    line = f"yuzogpt: stopped (enough for today) at step {stop['step']}: kept in {run}; the same "
    assert line in output

    agent = start()
    wait_for_start(run, 2, 20)
    for process in [psutil.Process(agent.pid), *psutil.Process(agent.pid).children()]:
        process.terminate()  # as Slurm does; and torchrun hands it on to the ranks
    agent.communicate(timeout=60)
    stops = records(run, "stop")
    assert [stop["reason"] for stop in stops] == ["enough for today", "SIGTERM"]
    assert checkpoints.newest(LocalStorage(run), pytest.fail).state.step == stops[1]["step"]
    assert [start["redone_steps"] for start in records(run, "start")] == [0, 0]


@pytest.mark.slow
def test_torchrun_starts_again_without_overwriting_what_it_has(corpus_dir, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["--max_restarts=1", "-m", "yuzogpt.training", *TINY, f"--data_dir={corpus_dir}"]
    command += [f"--out_dir={run}", "--max_iters=100000", "--eval_interval=10", "--overwrite"]
    pipe, paths = subprocess.PIPE, {"PYTHONPATH": str(REPOSITORY)}
    agent = subprocess.Popen(
        command, env={**os.environ, **paths}, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )
    wait_for_start(run, 1, 20)
    (rank, *_) = psutil.Process(agent.pid).children()
    rank.kill()
    wait_for_start(run, 2, 1)
    (run / runs.STOP).write_text("enough for today")
    output, _ = agent.communicate(timeout=60)
    assert agent.returncode == 0, output
    first, second = records(run, "start")
    assert first["step"] == 0
    assert second["step"] >= 10


def test_a_file_named_stop_is_enough(corpus_dir, tmp_path):
    settings = runs.check(
        tiny_settings(corpus_dir, tmp_path / "run", "--max_iters=100000", "--eval_interval=100000")
    ).settings

    def ask(record):
        if record["kind"] == "train" and record["step"] == 20:
            (tmp_path / "run" / runs.STOP).write_text("enough for today\n")

    with runs.hold_run_dir(settings):
        stop = StopRequest(lambda: read_request(LocalStorage(tmp_path / "run")))
        assert work(settings, World(), lambda *_: None, ask, stop) == "enough for today"
    assert checkpoints.newest(LocalStorage(tmp_path / "run"), pytest.fail).state.step >= 20
    assert not (tmp_path / "run" / runs.STOP).exists()


def test_a_launcher_elsewhere_knows_of_the_first_step_before_it_is_logged(corpus_dir, tmp_path):
    flags = ("--max_iters=3", "--log_interval=1000")
    settings = runs.check(tiny_settings(corpus_dir, tmp_path / "run", *flags)).settings
    is_training, has_trained = threading.Event(), threading.Event()
    seen = []

    def look(record):
        seen.append((record["kind"], record["step"], has_trained.is_set()))

    with runs.hold_run_dir(settings):
        listener = track_training(is_training, has_trained, look)
        work(settings, World(), lambda *_: None, listener, StopRequest())
    of_steps = [found for found in seen if found[0] in ("start", "first_step", "train")]
    assert of_steps == [("start", 0, False), ("first_step", 1, True), ("train", 3, True)]


class Evaluating:
    """Counts a rank's batches of evaluations in a file, and makes each last 0.2 s if asked to."""

    def __init__(self, directory, first, seconds=0.2):
        """`first`: the batch from which on they are counted and last."""
        self.directory, self.first, self.seconds = directory, first, seconds

    def __call__(self, rank):
        """Be the fault of a rank."""
        from yuzogpt.model.gpt import GPT

        real, seen = GPT.forward, []

        def forward(model, *arguments):
            if not model.training:
                seen.append(None)
                if len(seen) >= self.first:
                    time.sleep(self.seconds)
                    with (self.directory / f"batches-{rank}").open("a") as file:
                        file.write(".")
            return real(model, *arguments)

        GPT.forward = forward


# Batches of 4 of the split's 124 windows, on each of two ranks: 16 in all of it, 1 in an estimate.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "first"),
    [
        (("--max_iters=10", "--eval_iters=0"), 16 + 3),  # on the way
        (("--max_iters=5", "--eval_iters=0"), 16 + 3),  # after the last step
        (("--max_iters=5", "--eval_iters=2"), 1 + 1 + 3),  # of the whole split, at the end
    ],
)
def test_an_evaluation_is_not_waited_for_and_comes_after_the_checkpoint(
    corpus_dir, tmp_path, flags, first
):
    run, flags = tmp_path / "run", (DROPOUT, "--eval_interval=5", *flags)
    settings = tiny_settings(corpus_dir, run, *flags)
    ranks = start_world(2, settings, Evaluating(tmp_path, first))
    counted = tmp_path / "batches-1"
    wait_until(lambda: counted.exists())
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert exit_codes(ranks) == [1, 0]  # rank 0 says why
    assert len(counted.read_text()) < 10
    assert [(stop["step"], stop["reason"]) for stop in records(run, "stop")] == [(5, "SIGTERM")]
    newest = checkpoints.newest(LocalStorage(run), pytest.fail)
    assert newest.state.step == 5
    assert ("val_loss_estimate" in newest.state.metrics) == ("--eval_iters=2" in flags)

    run_world(2, settings)
    run_world(2, tiny_settings(corpus_dir, tmp_path / "whole", *flags))

    def seen(run):
        kinds = ("evaluation", "final")
        found = [record for kind in kinds for record in records(run, kind)]
        return [{key: record[key] for key in record if key != "time"} for record in found]

    assert seen(run) == seen(tmp_path / "whole")
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_the_first_evaluation_is_not_waited_for_either(corpus_dir, tmp_path):
    run = tmp_path / "run"
    settings = tiny_settings(corpus_dir, run, "--max_iters=3", "--eval_iters=0")
    ranks = start_world(2, settings, Evaluating(tmp_path, first=3))
    wait_until(lambda: (tmp_path / "batches-0").exists())
    os.kill(ranks[0].pid, signal.SIGTERM)
    exit_codes(ranks)
    assert [stop["step"] for stop in records(run, "stop")] == [0]
    assert not records(run, "evaluation")
    assert checkpoints.candidates(run) == []
    run_world(2, settings)
    assert sorted(losses(run)) == [1, 2, 3]


@pytest.mark.slow
def test_a_long_step_is_not_waited_for(corpus_dir, tmp_path):
    # Two micro-steps of 0.3 s on one rank, one on the other; the bound is 0.3 s here.
    flags = ("--max_iters=40", "--eval_interval=40", "--num_workers=2")
    settings = tiny_settings(corpus_dir, tmp_path / "run", DROPOUT, *flags)
    ranks = start_world(2, settings, Slow(0.3))
    made = wait_for_step(tmp_path / "run", 3)
    os.kill(ranks[0].pid, signal.SIGTERM)
    exit_codes(ranks)
    (stop,) = records(tmp_path / "run", "stop")
    assert made <= stop["step"] <= made + 1
    run_world(2, settings)
    run_world(2, tiny_settings(corpus_dir, tmp_path / "whole", DROPOUT, *flags))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert weights(tmp_path / "run", 40) == weights(tmp_path / "whole", 40)
