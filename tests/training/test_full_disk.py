"""Checkpoints that cannot be written, or were damaged: the run reports them, and continues."""

import math
import os
import resource
import shutil
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, TINY, tiny_settings
from tests.training.worlds import exit_codes, losses, records, start_world, train_here
from yuzogpt import checkpoints, runs
from yuzogpt.errors import RunFailed, UserError
from yuzogpt.storage.run_storage import LocalStorage


def test_a_checkpoint_that_cannot_be_written_is_said_and_tried_again(corpus_dir, tmp_path):
    """Files may not grow past a limit for a while: what a full disk does to writes."""
    flags = ("--max_iters=40", "--eval_interval=10")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(record):
        if record["kind"] == "checkpoint" and record["step"] == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        if record["kind"] == "notice" and "could not be written" in record["text"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    try:
        train_here(tiny_settings(corpus_dir, tmp_path / "run", *flags), limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (notice,) = [r["text"] for r in records(tmp_path / "run", "notice") if "!!!" in r["text"]]
    assert notice.startswith("!!! checkpoint step-20 could not be written (File too large)")
    assert sorted(losses(tmp_path / "run")) == list(range(1, 41))
    kept = {checkpoints.step_of(path) for path in checkpoints.candidates(tmp_path / "run")}
    assert {30, 40} <= kept
    assert 20 not in kept
    assert not list((tmp_path / "run" / "checkpoints").glob(".step-*"))


def test_a_disk_that_stays_full_ends_the_run(corpus_dir, tmp_path):
    settings = tiny_settings(corpus_dir, tmp_path / "run", "--max_iters=100", "--eval_interval=10")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(RunFailed, match="3 checkpoints in a row"):
            train_here(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_a_disk_that_is_full_before_the_first_file_names_it(corpus_dir, tmp_path):
    places = [f"--data_dir={corpus_dir}", f"--out_dir={tmp_path / 'run'}", "--num_workers=0"]
    command = [sys.executable, "-m", "yuzogpt", "train", *TINY, *places]
    result = subprocess.run(
        ["sh", "-c", 'ulimit -f 1; exec "$@"', "sh", *command],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr == f"yuzogpt: {tmp_path / 'run' / runs.SETTINGS}: File too large\n"


def test_too_little_room_is_said_before_anything_starts(corpus_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match=r"take 1.1 MB, of .* each, 1 bytes are free"):
        runs.check(tiny_settings(corpus_dir, tmp_path / "run"))


@pytest.mark.parametrize(
    ("flags", "weights"),
    [(("--keep_last=2",), 10), (("--keep_last=1", "--keep_best=0"), 6), (("--max_iters=9",), 3)],
)
def test_there_is_room_for_as_many_checkpoints_as_lie_there_at_once(
    corpus_dir, tmp_path, monkeypatch, flags, weights
):
    """Weights and two moments; one is written before an older one goes; of the best, weights."""
    flags = ("--max_iters=100", "--eval_interval=10", *flags)
    settings = runs.check(tiny_settings(corpus_dir, tmp_path / "run", *flags)).settings
    free = weights * 4 * settings.model.matrix_weights
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    runs.check(settings)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 1, free - 1))
    with pytest.raises(UserError, match="a smaller --keep_last"):
        runs.check(settings)


class Full:
    """Lets the files of one rank not grow past a limit, from its nth checkpoint on."""

    def __init__(self, rank, checkpoint):
        self.rank, self.checkpoint = rank, checkpoint

    def __call__(self, rank):
        if rank != self.rank:
            return
        from yuzogpt.training import checkpointer

        real, calls = checkpointer.write_tensors, []

        def write_tensors(*arguments):
            calls.append(None)
            is_full = math.ceil(len(calls) / 2) == self.checkpoint  # two files a checkpoint
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (5_000 if is_full else hard, hard))
            return real(*arguments)

        checkpointer.write_tensors = write_tensors


@pytest.mark.slow
def test_the_full_disk_of_one_rank_holds_up_no_other(corpus_dir, tmp_path):
    flags = ("--parallel=fsdp", "--max_iters=40", "--eval_interval=10")
    settings = tiny_settings(corpus_dir, tmp_path / "run", *flags)
    assert exit_codes(start_world(2, settings, Full(1, 2))) == [0, 0]
    (notice,) = [r["text"] for r in records(tmp_path / "run", "notice") if "!!!" in r["text"]]
    assert notice.startswith("!!! checkpoint step-20 could not be written (File too large)")
    kept = [checkpoints.step_of(path) for path in checkpoints.candidates(tmp_path / "run")]
    assert kept == [30, 40]


def test_a_damaged_old_checkpoint_does_not_end_the_run(corpus_dir, tmp_path):
    def damage(record):
        if record["kind"] == "train" and record["step"] == 25:
            for path in (tmp_path / "run" / "checkpoints").glob("step-*/manifest.json"):
                path.write_text('{"format": 2, "fi')

    flags = ("--max_iters=50", "--eval_interval=10")
    train_here(tiny_settings(corpus_dir, tmp_path / "run", *flags), damage)
    assert checkpoints.newest(LocalStorage(tmp_path / "run"), pytest.fail).state.step == 50
    assert records(tmp_path / "run", "final")


def test_what_only_the_weights_are_left_of_says_so(corpus_dir, tmp_path):
    train_here(tiny_settings(corpus_dir, tmp_path / "run", "--max_iters=5"))
    checkpoints.drop_optimizer(LocalStorage(tmp_path / "run" / "checkpoints" / "step-5"))
    with pytest.raises(UserError, match="only weights are left, step-5; start from them"):
        runs.check(tiny_settings(corpus_dir, tmp_path / "run", "--max_iters=9"))
