"""`ray job submit`, as README gives it, against a real head with token authentication."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY, TINY
from tests.training.worlds import losses, records, wait_for_start
from yuzogpt import checkpoints, runs
from yuzogpt.storage.run_storage import LocalStorage

pytestmark = pytest.mark.slow

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def started_head():
    """Start a Ray head; yield the address of its jobs API, the client's environment, its logs."""
    port, dashboard = free_port(), free_port()
    directory = tempfile.mkdtemp(prefix="yuzogpt-test-", dir="/tmp")  # short, for socket paths
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
        # So that the job's `python` is the one with the project's packages.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("RAY_AUTH_TOKEN_PATH", None)
    command = [RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    command += [f"--dashboard-port={dashboard}", "--object-store-memory=100000000"]
    command += [f"--dashboard-agent-listen-port={free_port()}"]
    command += [f"--temp-dir={directory}"]
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    wait = threading.Event()
    while True:
        try:
            urllib.request.urlopen(f"{address}/api/jobs/", timeout=5)
        except urllib.error.HTTPError as error:
            assert error.code == 401  # up, and closed to those without the token
            break
        except OSError:
            assert process.poll() is None, "the head did not start"
            wait.wait(0.1)
    try:
        yield address, environment, Path(directory, "session_latest", "logs")
    finally:  # as when the machine loses power
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()
        process.wait(30)
        shutil.rmtree(directory)


def submit(address, environment, flags, *options):
    """Submit the training job as README gives it."""
    command = [RAY, "job", "submit", f"--address={address}", "--working-dir", str(REPOSITORY)]
    command += [*options, "--", "python", "jobs/train_gpt2.py", "shakespeare_char_cpu", *TINY]
    for _ in range(10):  # the API answers some seconds before the agent that starts jobs is there
        result = subprocess.run(
            [*command, *flags, "--num_workers=1", "--log_interval=1"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        if "No available agent to submit job" not in result.stderr:
            break
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_job_loses_its_head_is_submitted_again_and_stopped(corpus_dir, tmp_path):
    run = tmp_path / "run"
    flags = [f"--data_dir={corpus_dir}", "--out_dir=run", f"--storage={tmp_path}"]
    flags += ["--eval_interval=100", "--max_iters=100000"]
    with started_head() as (address, environment, _):
        submit(address, environment, flags, "--no-wait")
        wait_for_start(run, 1, 120)
    with started_head() as (address, environment, logs):
        submit(address, environment, flags, "--no-wait", "--submission-id=second")
        wait_for_start(run, 2, 20)
        stop = [RAY, "job", "stop", f"--address={address}", "second"]
        # It sends SIGTERM.
        subprocess.run(stop, env=environment, check=True, capture_output=True, timeout=60)
        printed = (logs / "job-driver-second.log").read_text()
    assert printed.count("model: ") == 1
    (stopped,) = records(run, "stop")
    assert f"yuzogpt: stopped (SIGTERM) at step {stopped['step']}: kept in {run}" in printed
    assert checkpoints.newest(LocalStorage(run), pytest.fail).state.step == stopped["step"]
    assert not (run / runs.STOP).exists()
    assert sorted(losses(run)) == list(range(1, stopped["step"] + 1))
    assert [start["redone_steps"] > 0 for start in records(run, "start")] == [False, True]
