"""A stopped run resumes as if nothing had happened: evaluations and best checkpoint, too."""

import pytest

from tests.conftest import tiny_settings
from tests.training.worlds import records
from yuzogpt import checkpoints, runs
from yuzogpt.runs.stop_request import StopRequest
from yuzogpt.runtime.world import World
from yuzogpt.storage.run_storage import LocalStorage
from yuzogpt.training import loop
from yuzogpt.training.launch import stopped, work


def train(corpus_dir, out_dir, *flags, stop_at=None):
    """Train in this process; ask it to stop when it writes a record of a kind and a step."""
    settings = runs.check(tiny_settings(corpus_dir, out_dir, *flags)).settings
    stop = StopRequest()

    def ask(record):
        if (record["kind"], record["step"]) == stop_at:
            stop.set("enough")

    with runs.hold_run_dir(settings):
        return work(settings, World(), lambda *_: None, ask, stop)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [9, 1])
def test_an_evaluation_that_a_stop_came_before_is_made_up_for(corpus_dir, tmp_path, kept):
    flags = ("--dropout=0.1", "--max_iters=30", "--eval_interval=5", f"--keep_best={kept}")
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(corpus_dir, whole, *flags)
    assert train(corpus_dir, run, *flags, stop_at=("train", 9)) == "enough"
    assert checkpoints.newest(LocalStorage(run), pytest.fail).state.step == 10
    train(corpus_dir, run, *flags)

    def seen(run, kind, *names):
        return [tuple(record[name] for name in names) for record in records(run, kind)]

    for kind in (
        ("evaluation", "step", "rows_seen", "val_loss_estimate"),
        ("final", "best_step", "val_loss", "best_val_loss"),
    ):
        assert seen(run, *kind) == seen(whole, *kind)

    def metrics(run):
        found = [
            checkpoints.verify(LocalStorage(p), optimizer=False)
            for p in checkpoints.candidates(run)
        ]
        return {checkpoint.state.step: checkpoint.state.metrics for checkpoint in found}

    assert metrics(run) == metrics(whole)
    assert [p.name for p in checkpoints.by_validation_loss(run)] == [
        p.name for p in checkpoints.by_validation_loss(whole)
    ]


def test_a_checkpoint_is_not_written_again_when_the_step_after_it_is_given_up(
    corpus_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "LONG_STEP_S", 0)  # so no step is waited for
    flags = ("--max_iters=40", "--eval_interval=10")
    assert train(corpus_dir, tmp_path / "run", *flags, stop_at=("evaluation", 10)) == "enough"
    newest = checkpoints.newest(LocalStorage(tmp_path / "run"), pytest.fail)
    assert newest.state.step == 10
    assert "val_loss_estimate" in newest.state.metrics
    assert [record["step"] for record in records(tmp_path / "run", "checkpoint")] == [10]


def test_a_stop_keeps_no_weights_that_are_not_finite(corpus_dir, tmp_path):
    run, flags = tmp_path / "run", ("--learning_rate=1e30", "--warmup_iters=0", "--max_iters=3")
    assert train(corpus_dir, run, *flags, stop_at=("train", 1)) == "enough"
    assert checkpoints.candidates(run) == []
    ((step, kept),) = [(stop["step"], stop["kept"]) for stop in records(run, "stop")]
    assert (step, kept) == (2, None)
    line = "stopped (enough) at step 2, which is not kept; the same command resumes it"
    assert str(stopped(LocalStorage(run), "enough", is_recorded=True)) == line
