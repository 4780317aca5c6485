"""One trial: what it reports, when it is to stop, and how it ends."""

import math

import pytest
import torch

from tests.conftest import tiny_settings
from yuzogpt.training.launch import work_here
from yuzogpt.tuning.trials import Trial, carry_out


def train(settings, listener):
    from yuzogpt import runs

    with runs.writing(settings) as run:
        return work_here(runs.check(settings)[0], run, listener)


@pytest.fixture
def attempt(corpus_dir, tmp_path):
    """Return how a trial is done, and what it reports."""
    trial = Trial(tmp_path / "0003", "0003", {"model.dropout": 0.1})
    trial.write()

    def do(train=train, most=math.inf, steps=30):
        """Do the trial until it has made `most` steps; return its reports, and how it ended."""
        flags = (f"--max_iters={steps}", "--eval_interval=10", "--eval_iters=0")
        settings = tiny_settings(corpus_dir, trial.directory, *flags)
        reports = []

        def report(step, loss):
            reports.append((step, loss))
            return step < most

        goes_on = carry_out(settings, Trial.read(trial.directory), report, train)
        return reports, goes_on, Trial.read(trial.directory)

    return do


def test_a_trial_reports_its_best_loss_so_far(attempt):
    reports, goes_on, trial = attempt()
    assert [step for step, _ in reports] == [0, 10, 20, 30]
    losses = [loss for _, loss in reports]
    assert losses == sorted(losses, reverse=True)
    assert (goes_on, trial.state) == (True, "finished")
    assert attempt(train=None)[0] == reports  # it is over: only told again


def test_a_trial_that_is_told_to_stop_keeps_its_best_weights(attempt):
    reports, goes_on, trial = attempt(most=20, steps=3000)
    assert (goes_on, trial.state) == (False, "stopped")
    assert [step for step, _ in reports] == [0, 10, 20]
    assert trial.evaluations()[-1][0] < 3000
    (kept,) = (trial.directory / "checkpoints").iterdir()
    assert not list(kept.glob("optimizer*"))
    assert not (trial.directory / "stop").exists()


@pytest.mark.parametrize("need", [lambda: torch.empty(2**50), lambda: bytearray(2**62)])
def test_a_trial_that_needs_too_much_memory_has_failed(attempt, need):
    _, goes_on, trial = attempt(lambda settings, listener: need())
    assert (goes_on, trial.state, trial.error) == (True, "failed", "out of memory")


def test_a_mistake_in_the_program_is_no_failed_trial(attempt):
    def train(settings, listener):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        attempt(train)
