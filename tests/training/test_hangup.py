"""A terminal that is closed: SIGHUP asks a command to end as SIGTERM does."""

import os
import pty
import signal
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, TINY
from tests.training.worlds import records, wait_for_step
from tests.waiting import wait_until
from yuzogpt import checkpoints, runs
from yuzogpt.storage.run_storage import LocalStorage

# A command that would look only much later what its workers have written.
SELDOM_LOOKS = """if True:
    import sys
    from yuzogpt import cli
    from yuzogpt.runs.event_log import Follower

    Follower.POLL_INTERVAL_S = 1000
    cli.run(sys.argv[1:])
"""


def on_a_terminal(*arguments):
    """Start a command as the leader of a terminal's session; return it, and the terminal."""
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SELDOM_LOOKS, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        preexec_fn=lambda: os.login_tty(inside),
    )
    os.close(inside)
    return process, terminal


def flags(corpus_dir, out_dir):
    places = [f"--data_dir={corpus_dir}", f"--out_dir={out_dir}"]
    return ["train", *TINY, *places, "--max_iters=100000", "--eval_interval=100000"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "workers", ["--num_workers=0", pytest.param("--num_workers=1", marks=pytest.mark.slow)]
)
def test_a_run_whose_terminal_is_closed_leaves_a_checkpoint(corpus_dir, tmp_path, workers):
    run = tmp_path / "run"
    process, terminal = on_a_terminal(*flags(corpus_dir, run), workers)
    wait_for_step(run, 20)
    os.close(terminal)
    assert process.wait(60) == 143
    (stop,) = records(run, "stop")
    assert stop["step"] >= 20
    assert checkpoints.newest(LocalStorage(run), pytest.fail).state.step == stop["step"]


@pytest.mark.slow
def test_under_nohup_a_closed_terminal_means_nothing(corpus_dir, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "yuzogpt", *flags(corpus_dir, run), "--num_workers=0"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    made = wait_for_step(run, 1)
    process.send_signal(signal.SIGHUP)
    wait_for_step(run, made + 20)
    (run / runs.STOP).write_text("enough for today")
    assert process.wait(60) == 143
    assert records(run, "stop")[0]["reason"] == "enough for today"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_command_that_does_not_train_ends_in_one_line(tmp_path, number):
    """Its ends are done: what holds a directory gives it back."""
    program = f"""if True:
        import sys, threading
        from pathlib import Path
        from yuzogpt.cli import entry_point
        from yuzogpt.storage.lease import Lease
        from yuzogpt.storage.run_storage import LocalStorage

        def main(_):
            with Lease(LocalStorage(Path({str(tmp_path)!r}))):
                print("held", flush=True)
                threading.Event().wait()

        entry_point.main = main
        entry_point.run(["prepare"])
    """
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (
        143,
        "yuzogpt: stopped (SIGTERM); the same command resumes it\n",
    )
    wait_until(lambda: not list(tmp_path.iterdir()))
