"""Numbers that go wrong: steps that are skipped, and what the guard makes of losses."""

import math
import random

import pytest

from tests.conftest import tiny_settings
from tests.training.worlds import losses, records, train_here
from yuzogpt import checkpoints
from yuzogpt.config import GuardSettings
from yuzogpt.errors import RunFailed
from yuzogpt.model.gpt import GPT
from yuzogpt.storage.run_storage import LocalStorage
from yuzogpt.training.guards import Guard, StepStats
from yuzogpt.training.loop import Validation

# --- numbers go wrong


def poison(monkeypatch, steps, micro_steps=3):
    """Multiply the losses of some steps by NaN."""
    real, calls = GPT.forward, []

    def forward(model, *arguments):
        out = real(model, *arguments)
        if model.training:
            calls.append(None)
            # The first call settles nothing in a world of one; micro-steps are counted from 1.
            if math.ceil(len(calls) / micro_steps) in steps:
                out = out * math.nan
        return out

    monkeypatch.setattr(GPT, "forward", forward)


def test_a_step_with_nan_is_skipped_and_the_next_one_runs(corpus_dir, tmp_path, monkeypatch):
    poison(monkeypatch, {7})
    train_here(tiny_settings(corpus_dir, tmp_path / "run", "--max_iters=30"))
    by_step = losses(tmp_path / "run")
    assert by_step[7] is None
    assert all(math.isfinite(loss) for step, loss in by_step.items() if step != 7)
    assert by_step[30] < by_step[1]
    (skip,) = records(tmp_path / "run", "skip")
    assert skip["step"] == 7
    train_records = {record["step"]: record for record in records(tmp_path / "run", "train")}
    assert (train_records[7]["skipped"], train_records[8]["skipped"]) == (1, 0)
    assert train_records[8]["rows_seen"] == 8 * 12  # the rows of the skipped step are behind us
    state = checkpoints.newest(LocalStorage(tmp_path / "run"), pytest.fail).state
    assert state.guard["skipped"] == 1
    assert all(math.isfinite(value) for value in state.guard.values())


@pytest.mark.parametrize("rate", ["1e30", "1e12"])
def test_weights_that_a_step_spoilt_become_no_checkpoint_and_the_run_fails(
    corpus_dir, tmp_path, rate
):
    """The loss before that step was a number, as was the gradient."""
    flags = [f"--learning_rate={rate}", "--warmup_iters=0", "--eval_interval=1", "--max_iters=3"]
    with pytest.raises(RunFailed, match="the weights diverged by the last step, 3: val loss nan"):
        train_here(tiny_settings(corpus_dir, tmp_path / "run", *flags))
    assert math.isfinite(losses(tmp_path / "run")[1])
    estimates = [r["val_loss_estimate"] for r in records(tmp_path / "run", "evaluation")]
    assert estimates[1] is None
    assert checkpoints.candidates(tmp_path / "run") == []
    assert not records(tmp_path / "run", "final")  # so the same command says it again
    (failure,) = records(tmp_path / "run", "failure")
    assert "\n" not in failure["text"]


def at_estimate(monkeypatch, number, change):
    """Call `change` with the model before each estimate from the nth on; return what it returns."""
    real, calls = Validation.estimate, []

    def estimate(validation, model):
        calls.append(None)
        changed = change(model) if len(calls) >= number else None
        found = real(validation, model)
        return found if changed is None else changed

    monkeypatch.setattr(Validation, "estimate", estimate)


def test_an_evaluation_that_is_not_finite_pushes_no_good_checkpoint_out(
    corpus_dir, tmp_path, monkeypatch
):
    """Weights may be finite, and what comes of them not."""
    at_estimate(monkeypatch, 3, lambda _: math.nan)  # of steps 0, 2, 4, ...
    flags = ["--eval_interval=2", "--max_iters=9", "--keep_last=1"]
    train_here(tiny_settings(corpus_dir, tmp_path / "run", *flags))
    kept = [checkpoints.step_of(path) for path in checkpoints.candidates(tmp_path / "run")]
    assert kept == [2]


def test_a_weight_that_is_nan_fails_the_run_though_no_loss_shows_it(
    corpus_dir, tmp_path, monkeypatch
):
    """One of the rows that fill the vocabulary up."""

    def spoil(model):
        model.wte.weight.data[-1, 0] = math.nan

    at_estimate(monkeypatch, 3, spoil)
    settings = tiny_settings(corpus_dir, tmp_path / "run", "--max_iters=5", "--eval_interval=2")
    with pytest.raises(RunFailed, match=r"the weights diverged by the last step, 5: val loss \d"):
        train_here(settings)
    assert checkpoints.newest(LocalStorage(tmp_path / "run"), pytest.fail).state.step == 4


def test_many_such_steps_in_a_row_end_the_run_with_a_report(corpus_dir, tmp_path, monkeypatch):
    poison(monkeypatch, range(20, 1000))
    with pytest.raises(RunFailed) as error:
        train_here(
            tiny_settings(
                corpus_dir, tmp_path / "run", "--max_iters=100", "--max_nonfinite_steps=4"
            )
        )
    text = str(error.value)
    assert "step 23 is number 4 in a row to be skipped: loss nan" in text
    assert "weights are those of step 19" in text
    assert "\n" not in text
    (failure,) = records(tmp_path / "run", "failure")
    assert (failure["reason"], failure["text"]) == ("gave up", text)


# --- what the guards make of losses


def judged(losses_of_steps, **settings):
    guard = Guard(GuardSettings(**settings))
    found = []
    for loss in losses_of_steps:
        verdict = guard.check(StepStats(loss, False, 0.0, [1.0]))
        found.append((verdict, guard.should_apply(verdict), guard.should_abort()))
    return found


def test_a_spike_is_noticed_and_skipped_if_asked_for():
    noise = random.Random(1)
    calm = [3 + noise.uniform(-0.05, 0.05) for _ in range(100)]
    assert {verdict for verdict, _, _ in judged(calm)} == {"healthy"}
    assert judged([*calm, 8.0, 3.0])[-2:] == [("spike", True, False), ("healthy", True, False)]
    skipping = judged([*calm, 8.0, 3.0], skip_spikes=True)
    assert skipping[-2:] == [("spike", False, False), ("healthy", True, False)]
    assert judged([*calm, 8.0], spike_sigmas=0)[-1][0] == "healthy"


def test_a_loss_that_stays_high_stops_being_a_spike_and_ends_nothing():
    noise = random.Random(1)
    calm = [3 + noise.uniform(-0.05, 0.05) for _ in range(100)]
    shifted = judged([*calm, *[8.0] * 60], skip_spikes=True)[100:]
    assert shifted[0][0] == "spike"
    assert shifted[-1][0] == "healthy"
    assert not any(gives_up for _, _, gives_up in shifted)


def test_a_guard_remembers_finite_numbers_only():
    guard = Guard(GuardSettings())
    for loss in (3.0, math.nan, math.inf, 2.0):
        guard.should_apply(guard.check(StepStats(loss, False, 0.0, [1.0])))
    assert guard.mean == 2.5
    assert Guard.from_state(guard.settings, guard.state_dict()) == guard
    assert guard.check(StepStats(2.0, False, 0.0, [math.nan])) == "not finite"


def test_the_last_steps_are_in_the_metrics(corpus_dir, tmp_path):
    train_here(tiny_settings(corpus_dir, tmp_path / "run", "--max_iters=20", "--log_interval=7"))
    assert list(losses(tmp_path / "run")) == [7, 14, 20]
