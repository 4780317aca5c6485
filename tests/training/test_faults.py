"""What goes wrong in a run, done to it for real: processes killed and stopped, writes that fail.

Real ranks, connected by gloo; the faults are signals, limits of the system, and NaN in the losses.
"""

import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from tests.conftest import REPOSITORY, TINY, tiny_settings
from tests.training.worlds import (
    FORKSERVER,
    exit_codes,
    losses,
    records,
    run_world,
    start_world,
    wait_for_start,
    wait_for_step,
    weights,
)
from yuzogpt import checkpoints, runs
from yuzogpt.config import GuardSettings, TrainSettings
from yuzogpt.errors import RunFailed
from yuzogpt.model.gpt import GPT
from yuzogpt.training.launch import work
from yuzogpt.training.monitor import Guard, StepTotals
from yuzogpt.training.stopping import StopRequest, read_request
from yuzogpt.training.watchdog import EXIT_STATUS
from yuzogpt.world import World

DROPOUT = "--dropout=0.1"


# --- a process dies


class KillAt:
    """Kills a rank at the nth time that its checkpoint writer syncs or renames a file."""

    def __init__(self, rank, boundary):
        self.rank, self.boundary = rank, boundary

    def __call__(self, rank):
        if rank == self.rank:
            for name in ("fsync", "rename"):
                setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, real):
        def call(*arguments):
            if threading.current_thread().name == "checkpoint":
                self.boundary -= 1
                if self.boundary < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        return call


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


# Synced: model, optimizer, tokenizer, state, manifest, directory; then renamed, and synced again.
# With FSDP: a rank's model and optimizer; the rest as above, but for the two indices.
@pytest.mark.parametrize(
    ("kind", "rank", "boundary", "newest"),
    [
        *(("ddp", 0, boundary, 5 if boundary < 7 else 10) for boundary in range(8)),
        *(("fsdp", rank, boundary, 5) for rank in (0, 1) for boundary in (0, 1)),
        ("fsdp", 0, 7, 5),
        ("fsdp", 0, 9, 10),
    ],
)
def test_killed_at_any_boundary_of_a_checkpoint(
    begun, corpus_dir, tmp_path, kind, rank, boundary, newest
):
    shutil.copytree(begun / kind, tmp_path / "run")
    flags = (DROPOUT, f"--parallel={kind}", "--eval_interval=5", "--max_iters=10")
    settings = tiny_settings(corpus_dir, tmp_path / "run", *flags)
    codes = exit_codes(start_world(2, settings, KillAt(rank, boundary)))
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] != 0
    found = checkpoints.newest(tmp_path / "run", pytest.fail)
    assert found.state.step == newest
    if (kind, rank, boundary) in (("ddp", 0, 3), ("fsdp", 1, 1)):
        run_world(2, settings)
        assert losses(tmp_path / "run") == losses(begun / f"{kind}-whole")
        assert weights(tmp_path / "run", 10) == weights(begun / f"{kind}-whole", 10)
        assert not list((tmp_path / "run" / "checkpoints").glob(".step-*"))


# --- a run is asked to stop


def test_sigterm_leads_to_a_checkpoint_at_once_and_loses_nothing(corpus_dir, tmp_path):
    flags = (DROPOUT, "--max_iters=120", "--eval_interval=50")
    run_world(2, tiny_settings(corpus_dir, tmp_path / "whole", *flags))
    settings = tiny_settings(corpus_dir, tmp_path / "run", *flags)
    ranks = start_world(2, settings)
    wait_for_step(tmp_path / "run", 60)
    asked = time.monotonic()
    os.kill(ranks[1].pid, signal.SIGTERM)  # one of them is enough
    exit_codes(ranks)
    assert time.monotonic() - asked < 30
    (stop,) = records(tmp_path / "run", "stop")
    assert stop["reason"] == "SIGTERM"
    assert 60 <= stop["step"] < 120
    assert checkpoints.newest(tmp_path / "run", pytest.fail).state.step == stop["step"]
    run_world(2, settings)
    assert [start["redone_steps"] for start in records(tmp_path / "run", "start")] == [0, 0]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert weights(tmp_path / "run", 120) == weights(tmp_path / "whole", 120)


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
    assert "yuzogpt: stopped (enough for today) with a checkpoint" in output

    agent = start()
    wait_for_start(run, 2, 20)
    for process in [psutil.Process(agent.pid), *psutil.Process(agent.pid).children()]:
        process.terminate()  # as Slurm does; and torchrun hands it on to the ranks
    agent.communicate(timeout=60)
    stops = records(run, "stop")
    assert [stop["reason"] for stop in stops] == ["enough for today", "SIGTERM"]
    assert checkpoints.newest(run, pytest.fail).state.step == stops[1]["step"]
    assert [start["redone_steps"] for start in records(run, "start")] == [0, 0]


def test_a_file_named_stop_is_enough(corpus_dir, tmp_path):
    settings, _ = runs.check(
        tiny_settings(corpus_dir, tmp_path / "run", "--max_iters=100000", "--eval_interval=100000")
    )

    def ask(record):
        if record["kind"] == "train" and record["step"] == 20:
            (tmp_path / "run" / runs.STOP).write_text("enough for today\n")

    with runs.writing(settings):
        stop = StopRequest(lambda: read_request(tmp_path / "run"))
        assert work(settings, World(), lambda *_: None, ask, stop) == "enough for today"
    assert checkpoints.newest(tmp_path / "run", pytest.fail).state.step >= 20
    assert not (tmp_path / "run" / runs.STOP).exists()


# --- a rank stands still


def start_long_run(corpus_dir, run):
    """Start two ranks that notice a hang after 3 s, and wait until they train."""
    flags = ("--max_iters=100000", "--eval_interval=100000", "--hang_timeout=3")
    ranks = start_world(2, tiny_settings(corpus_dir, run, *flags))
    wait_for_step(run, 20)
    return ranks


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_and_the_others_end(corpus_dir, tmp_path, victim):
    ranks = start_long_run(corpus_dir, tmp_path / "run")
    stopped = time.monotonic()
    os.kill(ranks[victim].pid, signal.SIGSTOP)
    ranks[1 - victim].join(30)
    took = time.monotonic() - stopped
    ranks[victim].kill()
    assert ranks[1 - victim].exitcode == EXIT_STATUS
    assert took < 3 + 5
    (failure,) = records(tmp_path / "run", "failure")
    assert failure["text"].startswith(f"!!! worker {victim} on ")
    assert "gives no sign of life" in failure["text"]


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
        corpus_dir, tmp_path / "run", "--max_iters=100000", "--hang_timeout=3",
    )  # fmt: skip
    codes = exit_codes(start_world(2, settings, HangAt(1, 40)))
    assert codes == [EXIT_STATUS] * 2
    (failure,) = records(tmp_path / "run", "failure")
    assert failure["text"].startswith("!!! worker 1 on ")
    assert "stands still for" in failure["text"]


def be_an_only_worker(settings, fault):
    """Be what Ray Train starts for `--num_workers=1`."""
    fault(0)
    checked, _ = runs.check(TrainSettings.model_validate(settings))
    with runs.writing(checked):
        work(checked, World(), lambda *_: None, None, StopRequest(), is_restarted=True)


def exit_code_of_only_worker(settings, fault):
    """Start such a worker, wait for its end, and return its exit status."""
    said = settings.model_dump(exclude_unset=True)
    process = FORKSERVER.Process(target=be_an_only_worker, args=(said, fault))
    process.start()
    return exit_codes([process])[0]


def test_an_only_worker_that_waits_for_ever_ends(corpus_dir, tmp_path):
    flags = ("--max_iters=100000", "--hang_timeout=1")
    settings = tiny_settings(corpus_dir, tmp_path / "run", *flags)
    assert exit_code_of_only_worker(settings, HangAt(0, 40)) == EXIT_STATUS
    (failure,) = records(tmp_path / "run", "failure")
    assert failure["text"].startswith("!!! worker 0 on ")
    assert "stands still for" in failure["text"]


def test_a_slow_step_is_no_hang(corpus_dir, tmp_path):
    flags = ("--batch_size=12", "--gradient_accumulation_steps=1", "--max_iters=3")
    settings = tiny_settings(corpus_dir, tmp_path / "run", *flags, "--hang_timeout=0.5")
    assert exit_code_of_only_worker(settings, Slow(1)) == 0
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3]


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


def train(corpus_dir, out_dir, *flags):
    settings, _ = runs.check(tiny_settings(corpus_dir, out_dir, DROPOUT, *flags))
    with runs.writing(settings):
        work(settings, World(), lambda *_: None, None, StopRequest())


def test_a_step_with_nan_is_skipped_and_the_next_one_runs(corpus_dir, tmp_path, monkeypatch):
    poison(monkeypatch, {7})
    train(corpus_dir, tmp_path / "run", "--max_iters=30")
    by_step = losses(tmp_path / "run")
    assert by_step[7] is None
    assert all(math.isfinite(loss) for step, loss in by_step.items() if step != 7)
    assert by_step[30] < by_step[1]
    (skip,) = records(tmp_path / "run", "skip")
    assert skip["step"] == 7
    train_records = {record["step"]: record for record in records(tmp_path / "run", "train")}
    assert (train_records[7]["skipped"], train_records[8]["skipped"]) == (1, 0)
    assert train_records[8]["rows_seen"] == 8 * 12  # the rows of the skipped step are behind us
    state = checkpoints.newest(tmp_path / "run", pytest.fail).state
    assert state.guard["skipped"] == 1
    assert all(math.isfinite(value) for value in state.guard.values())


def test_many_such_steps_in_a_row_end_the_run_with_a_report(corpus_dir, tmp_path, monkeypatch):
    poison(monkeypatch, range(20, 1000))
    with pytest.raises(RunFailed) as error:
        train(corpus_dir, tmp_path / "run", "--max_iters=100", "--max_skipped=4")
    text = str(error.value)
    assert "step 23 is the 4th in a row to be skipped: loss nan" in text
    assert "weights are those of step 19" in text
    assert "\n" not in text
    (failure,) = records(tmp_path / "run", "failure")
    assert (failure["reason"], failure["text"]) == ("gave up", text)


# --- the disk is full


def test_a_checkpoint_that_cannot_be_written_is_said_and_tried_again(corpus_dir, tmp_path):
    """Files may not grow past a limit for a while: what a full disk does to writes."""
    settings, _ = runs.check(
        tiny_settings(corpus_dir, tmp_path / "run", "--max_iters=40", "--eval_interval=10")
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(record):
        if record["kind"] == "checkpoint" and record["step"] == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        if record["kind"] == "notice" and "could not be written" in record["text"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    try:
        with runs.writing(settings):
            work(settings, World(), lambda *_: None, limit, StopRequest())
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
    settings, _ = runs.check(
        tiny_settings(corpus_dir, tmp_path / "run", "--max_iters=100", "--eval_interval=10")
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with runs.writing(settings), pytest.raises(RunFailed, match="3 checkpoints in a row"):
            work(settings, World(), lambda *_: None, None, StopRequest())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_too_little_room_is_said_before_anything_starts(corpus_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(runs.UserError, match="a checkpoint takes"):
        runs.check(tiny_settings(corpus_dir, tmp_path / "run"))


class Slow:
    """Makes each forward pass of a rank take a while."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self, rank):
        from yuzogpt.training import loop

        loop.LONG_STEP = self.seconds
        real = GPT.forward

        def forward(model, *arguments):
            time.sleep(self.seconds * model.training)
            return real(model, *arguments)

        GPT.forward = forward


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


# --- one rank alone is in trouble


class Full:
    """Lets the files of one rank not grow past a limit, from its nth checkpoint on."""

    def __init__(self, rank, checkpoint):
        self.rank, self.checkpoint = rank, checkpoint

    def __call__(self, rank):
        if rank != self.rank:
            return
        from yuzogpt.training import saving

        real, calls = saving.write_tensors, []

        def write_tensors(*arguments):
            calls.append(None)
            is_full = math.ceil(len(calls) / 2) == self.checkpoint  # two files a checkpoint
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (5_000 if is_full else hard, hard))
            return real(*arguments)

        saving.write_tensors = write_tensors


def test_the_full_disk_of_one_rank_holds_up_no_other(corpus_dir, tmp_path):
    flags = ("--parallel=fsdp", "--max_iters=40", "--eval_interval=10")
    settings = tiny_settings(corpus_dir, tmp_path / "run", *flags)
    assert exit_codes(start_world(2, settings, Full(1, 2))) == [0, 0]
    (notice,) = [r["text"] for r in records(tmp_path / "run", "notice") if "!!!" in r["text"]]
    assert notice.startswith("!!! checkpoint step-20 could not be written (File too large)")
    kept = [checkpoints.step_of(path) for path in checkpoints.candidates(tmp_path / "run")]
    assert kept == [30, 40]


def test_a_damaged_old_checkpoint_does_not_end_the_run(corpus_dir, tmp_path):
    settings, _ = runs.check(
        tiny_settings(corpus_dir, tmp_path / "run", "--max_iters=50", "--eval_interval=10")
    )

    def damage(record):
        if record["kind"] == "train" and record["step"] == 25:
            for path in (tmp_path / "run" / "checkpoints").glob("step-*/manifest.json"):
                path.write_text('{"format": 2, "fi')

    with runs.writing(settings):
        work(settings, World(), lambda *_: None, damage, StopRequest())
    assert checkpoints.newest(tmp_path / "run", pytest.fail).state.step == 50
    assert records(tmp_path / "run", "final")


def test_a_stall_that_cannot_be_written_down_ends_the_others_too(corpus_dir, tmp_path):
    ranks = start_long_run(corpus_dir, tmp_path / "run")
    os.kill(ranks[1].pid, signal.SIGSTOP)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    ranks[0].join(30)
    ranks[1].kill()
    assert ranks[0].exitcode == EXIT_STATUS


def test_what_only_the_weights_are_left_of_says_so(corpus_dir, tmp_path):
    train(corpus_dir, tmp_path / "run", "--max_iters=5")
    checkpoints.drop_optimizer(tmp_path / "run" / "checkpoints" / "step-5")
    with pytest.raises(runs.UserError, match="only weights are left, step-5; start from them"):
        runs.check(tiny_settings(corpus_dir, tmp_path / "run", DROPOUT, "--max_iters=9"))


# --- what the guards make of losses


def judged(losses_of_steps, **settings):
    guard = Guard(GuardSettings(**settings))
    found = []
    for loss in losses_of_steps:
        verdict = guard.judge(StepTotals(loss, False, 0.0, [1.0]))
        found.append((verdict, guard.takes(verdict), guard.gives_up()))
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
        guard.takes(guard.judge(StepTotals(loss, False, 0.0, [1.0])))
    assert guard.mean == 2.5
    assert Guard.remembering(guard.settings, guard.memory()) == guard
    assert guard.judge(StepTotals(2.0, False, 0.0, [math.nan])) == "not finite"


def test_the_last_steps_are_in_the_metrics(corpus_dir, tmp_path):
    train(corpus_dir, tmp_path / "run", "--max_iters=20", "--log_interval=7")
    assert list(losses(tmp_path / "run")) == [7, 14, 20]
