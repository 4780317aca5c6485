"""Ranks that die or hang, for real: killed and stopped by signals, waiting for ever.

Real ranks, connected by gloo.
"""

import os
import re
import shutil
import signal
import threading
from pathlib import Path

import pytest

from tests.conftest import tiny_settings
from tests.training.worlds import (
    FORKSERVER,
    Slow,
    exit_codes,
    losses,
    records,
    run_world,
    start_world,
    wait_for_step,
    weights,
)
from yuzogpt import checkpoints, runs
from yuzogpt.config import TrainSettings
from yuzogpt.model.gpt import GPT
from yuzogpt.runs.stop_request import StopRequest
from yuzogpt.runtime.watchdog import EXIT_STATUS
from yuzogpt.runtime.world import World
from yuzogpt.storage.run_storage import LocalStorage
from yuzogpt.training.launch import work

pytestmark = pytest.mark.slow

DROPOUT = "--dropout=0.1"


# --- a process dies


class KillAt:
    """Kills a rank where its checkpoint writer is about to make a named thing durable.

    `point`: the name of the file or directory that is synced, or "rename".
    """

    def __init__(self, rank, point):
        self.rank, self.point = rank, point

    def __call__(self, rank):
        if rank == self.rank:
            self.kill_before("fsync", lambda file: Path(f"/proc/self/fd/{file}").resolve().name)
            self.kill_before("rename", lambda *_: "rename")

    def kill_before(self, function, name_of):
        real = getattr(os, function)

        def call(*arguments):
            is_writer = threading.current_thread().name == "checkpoint"
            if is_writer and re.fullmatch(self.point, name_of(*arguments)):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        setattr(os, function, call)


@pytest.fixture(scope="module")
def begun(corpus_dir, tmp_path_factory):
    """Two runs with a checkpoint at step 5, and the same ones at step 10, undisturbed."""
    root = tmp_path_factory.mktemp("begun")
    for kind in ("ddp", "fsdp"):
        flags = (DROPOUT, f"--parallel={kind}", "--eval_interval=5")
        run_world(2, tiny_settings(corpus_dir, root / kind, *flags, "--max_iters=5"))
        shutil.copytree(root / kind, root / f"{kind}-whole")
        run_world(2, tiny_settings(corpus_dir, root / f"{kind}-whole", *flags, "--max_iters=10"))
    return root


TEMPORARY = r"\.step-10\..*\.tmp"  # the directory of a checkpoint until it is renamed
# In the order in which they are synced; before the rename, the run has the checkpoint before.
FILES = ("model.safetensors", "optimizer.safetensors", "tokenizer.json", "state.json",
         "manifest.json")  # fmt: skip
KILLED = [
    *(("ddp", 0, point, 5) for point in (*FILES, TEMPORARY, "rename")),
    ("ddp", 0, "checkpoints", 10),
    *(
        ("fsdp", rank, f"{kind}-0000{rank + 1}-of-00002.safetensors", 5)
        for rank in (0, 1)
        for kind in ("model", "optimizer")
    ),
    ("fsdp", 0, TEMPORARY, 5),
    ("fsdp", 0, "checkpoints", 10),
]


@pytest.mark.parametrize(("kind", "rank", "point", "newest"), KILLED)
def test_killed_at_any_point_of_a_checkpoint(
    begun, corpus_dir, tmp_path, kind, rank, point, newest
):
    shutil.copytree(begun / kind, tmp_path / "run")
    flags = (DROPOUT, f"--parallel={kind}", "--eval_interval=5", "--max_iters=10")
    settings = tiny_settings(corpus_dir, tmp_path / "run", *flags)
    codes = exit_codes(start_world(2, settings, KillAt(rank, point)))
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] != 0
    found = checkpoints.newest(LocalStorage(tmp_path / "run"), pytest.fail)
    assert found.state.step == newest
    if (kind, point) == ("ddp", "state.json") or rank == 1:
        run_world(2, settings)
        assert losses(tmp_path / "run") == losses(begun / f"{kind}-whole")
        assert weights(tmp_path / "run", 10) == weights(begun / f"{kind}-whole", 10)
        assert not list((tmp_path / "run" / "checkpoints").glob(".step-*"))


# --- a rank hangs


def start_long_run(corpus_dir, run):
    """Start two ranks that notice a hang after 3 s, and wait until they train."""
    flags = ("--max_iters=100000", "--eval_interval=100000", "--hang_timeout_s=3")
    ranks = start_world(2, tiny_settings(corpus_dir, run, *flags))
    wait_for_step(run, 20)
    return ranks


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_and_the_others_end(corpus_dir, tmp_path, victim):
    ranks = start_long_run(corpus_dir, tmp_path / "run")
    os.kill(ranks[victim].pid, signal.SIGSTOP)
    ranks[1 - victim].join(60)  # gloo itself would wait for 30 minutes
    ranks[victim].kill()
    assert ranks[1 - victim].exitcode == EXIT_STATUS
    (failure,) = records(tmp_path / "run", "failure")
    assert failure["text"].startswith(f"!!! worker {victim} on ")
    assert "sent no heartbeat for" in failure["text"]


class HangAt:
    """Makes a rank wait for ever in the middle of a step: its process lives, its loop does not."""

    def __init__(self, rank, call):
        self.rank, self.call = rank, call

    def __call__(self, rank):
        real = GPT.forward

        def forward(model, *arguments):
            self.call -= model.training
            if self.call == 0 and rank == self.rank:
                threading.Event().wait()
            return real(model, *arguments)

        GPT.forward = forward


def test_a_rank_that_waits_for_ever_is_named(corpus_dir, tmp_path):
    settings = tiny_settings(
        corpus_dir, tmp_path / "run", "--max_iters=100000", "--hang_timeout_s=3",
    )  # fmt: skip
    codes = exit_codes(start_world(2, settings, HangAt(1, 40)))
    assert codes == [EXIT_STATUS] * 2
    (failure,) = records(tmp_path / "run", "failure")
    assert failure["text"].startswith("!!! worker 1 on ")
    assert "made no progress for" in failure["text"]


def be_an_only_worker(settings, fault):
    """Be what Ray Train starts for `--num_workers=1`."""
    fault(0)
    checked = runs.check(TrainSettings.model_validate(settings)).settings
    with runs.hold_run_dir(checked):
        work(checked, World(), lambda *_: None, None, StopRequest(), is_restarted=True)


def exit_code_of_only_worker(settings, fault):
    """Start such a worker, wait for its end, and return its exit status."""
    said = settings.model_dump(exclude_unset=True)
    process = FORKSERVER.Process(target=be_an_only_worker, args=(said, fault))
    process.start()
    return exit_codes([process])[0]


def test_an_only_worker_that_waits_for_ever_ends(corpus_dir, tmp_path):
    flags = ("--max_iters=100000", "--hang_timeout_s=1")
    settings = tiny_settings(corpus_dir, tmp_path / "run", *flags)
    assert exit_code_of_only_worker(settings, HangAt(0, 40)) == EXIT_STATUS
    (failure,) = records(tmp_path / "run", "failure")
    assert failure["text"].startswith("!!! worker 0 on ")
    assert "made no progress for" in failure["text"]


def test_a_slow_step_is_no_hang(corpus_dir, tmp_path):
    flags = ("--batch_size=12", "--gradient_accumulation_steps=1", "--max_iters=3")
    settings = tiny_settings(corpus_dir, tmp_path / "run", *flags, "--hang_timeout_s=0.5")
    assert exit_code_of_only_worker(settings, Slow(1)) == 0
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3]


def test_a_stall_that_cannot_be_written_down_ends_the_others_too(corpus_dir, tmp_path):
    ranks = start_long_run(corpus_dir, tmp_path / "run")
    os.kill(ranks[1].pid, signal.SIGSTOP)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    ranks[0].join(30)
    ranks[1].kill()
    assert ranks[0].exitcode == EXIT_STATUS
