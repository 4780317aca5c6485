"""One trial: what it reports, when it is to stop, and how it ends."""

import json
import math
import os

import pytest
import torch

from tests.conftest import tiny_settings
from yuzogpt.runs.event_log import read_records
from yuzogpt.storage.untrusted import DamagedFile
from yuzogpt.training.launch import work_here
from yuzogpt.tuning.trials import Trial, run_trial


def train(settings, listener):
    from yuzogpt import runs

    with runs.hold_run_dir(settings) as run:
        return work_here(runs.check(settings).settings, run, listener)


@pytest.fixture
def attempt(corpus_dir, tmp_path):
    """Return a function that runs a trial."""
    trial = Trial(tmp_path / "0003", "0003", {"model.dropout": 0.1})
    trial.write()

    def do(train=train, most=math.inf, steps=30):
        """Run the trial for at most `most` steps; return its reports, and how it ended."""
        flags = (f"--max_iters={steps}", "--eval_interval=10", "--eval_iters=0")
        settings = tiny_settings(corpus_dir, trial.directory, *flags)
        reports = []

        def report(step, loss):
            reports.append((step, loss))
            return step < most

        is_wanted = run_trial(settings, Trial.read(trial.directory), report, train)
        return reports, is_wanted, Trial.read(trial.directory)

    return do


def test_a_trial_reports_its_best_loss_so_far(attempt):
    reports, is_wanted, trial = attempt()
    assert [step for step, _ in reports] == [0, 10, 20, 30]
    losses = [loss for _, loss in reports]
    assert losses == sorted(losses, reverse=True)
    assert (is_wanted, trial.state) == (True, "finished")
    assert attempt(train=None)[0] == reports  # it has ended: its losses are only reported again


def test_a_trial_that_is_asked_to_stop_keeps_its_best_weights(attempt):
    reports, is_wanted, trial = attempt(most=20, steps=3000)
    assert (is_wanted, trial.state) == (False, "stopped")
    assert [step for step, _ in reports] == [0, 10, 20]
    assert trial.evaluations()[-1][0] < 3000
    (kept,) = (trial.directory / "checkpoints").iterdir()
    assert not list(kept.glob("optimizer*"))
    assert not (trial.directory / "stop").exists()


def test_a_trial_that_falls_behind_at_its_last_step_has_finished(attempt):
    reports, is_wanted, trial = attempt(most=30)
    assert (is_wanted, trial.state) == (False, "finished")
    assert [step for step, _ in reports] == [0, 10, 20, 30]
    kinds = [record["kind"] for record in read_records(trial.directory / "metrics.jsonl")]
    assert "final" in kinds  # its last evaluation was not cut off


def test_a_trial_that_lost_its_process_after_its_last_step_has_finished(attempt):
    class Killed(BaseException):
        pass

    def killed_at_the_end(settings, listener):
        train(settings, listener)
        raise Killed

    with pytest.raises(Killed):
        attempt(killed_at_the_end, most=30)
    _, is_wanted, trial = attempt(most=30)
    assert (is_wanted, trial.state) == (False, "finished")


@pytest.mark.parametrize("need", [lambda: torch.empty(2**50), lambda: bytearray(2**62)])
def test_a_trial_that_needs_too_much_memory_has_failed(attempt, need):
    _, is_wanted, trial = attempt(lambda settings, listener: need())
    assert (is_wanted, trial.state, trial.error) == (True, "failed", "out of memory")


def test_a_mistake_in_the_program_is_no_failed_trial(attempt):
    def train(settings, listener):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        attempt(train)


GOOD = {"name": "0003", "values": {"model.dropout": 0.1}, "state": "finished"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "should be an object"),
        ({**GOOD, "name": "../../0003"}, "name: "),
        ({**GOOD, "name": 3}, "name: "),
        ({**GOOD, "state": "sleeping"}, "state: "),
        ({**GOOD, "values": {"model.dropout": [1]}}, "values.model.dropout"),
        ({**GOOD, "values": {"run.out_dir": "/"}}, "'run.out_dir' is not searched"),
        ({**GOOD, "values": 3}, "values: "),
        ({**GOOD, "score": "low"}, "score: "),
    ],
)
def test_a_damaged_trial_is_one_line_that_names_the_file(tmp_path, content, says):
    directory = tmp_path / "0003"
    directory.mkdir()
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / "trial.json").write_text(text)
    with pytest.raises(DamagedFile) as caught:
        Trial.read(directory)
    assert str(caught.value).startswith(f"{directory / 'trial.json'}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    (directory / "trial.json").unlink()
    assert Trial.read(directory) is None
    os.mkfifo(directory / "trial.json")
    with pytest.raises(DamagedFile, match="not a regular file"):
        Trial.read(directory)


@pytest.mark.parametrize(
    "record", [{"step": None}, {"step": "1"}, {"step": 1, "val_loss_estimate": "low"}]
)
def test_a_damaged_evaluation_is_none(tmp_path, record):
    whole = {"kind": "evaluation", "step": 2, "val_loss_estimate": 1.5}
    lines = [json.dumps(one) for one in ({"kind": "evaluation", **record}, whole)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    assert Trial(tmp_path, "0003").evaluations() == [(2, 1.5)]
