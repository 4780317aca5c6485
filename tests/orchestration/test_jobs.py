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
from tests.training.worlds import losses

pytestmark = pytest.mark.slow

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def head(tmp_path_factory):
    """A Ray head of its own; yields the address of its jobs API, and the client's environment."""
    port, dashboard = free_port(), free_port()
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        # So that the job's `python` is the one with the project's packages.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("RAY_AUTH_TOKEN_PATH", None)
    command = [RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    command += [f"--dashboard-port={dashboard}", "--object-store-memory=100000000"]
    command += [f"--dashboard-agent-listen-port={free_port()}"]
    directory = tempfile.mkdtemp(prefix="yuzogpt-test-", dir="/tmp")  # short, for socket paths
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
    yield address, environment
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.kill()
    process.wait(30)
    shutil.rmtree(directory)


def test_a_submitted_job_trains_and_keeps_its_run(head, corpus_dir, tmp_path):
    address, environment = head
    job = ["python", "jobs/train_gpt2.py", "shakespeare_char_cpu", *TINY]
    job += [f"--data_dir={corpus_dir}", "--out_dir=run", f"--storage={tmp_path}"]
    submit = [RAY, "job", "submit", f"--address={address}", "--working-dir", str(REPOSITORY)]
    for _ in range(10):  # the API answers some seconds before the agent that starts jobs is there
        result = subprocess.run(
            [*submit, "--", *job, "--num_workers=1", "--max_iters=10", "--log_interval=1"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        if "No available agent to submit job" not in result.stderr:
            break
    assert result.returncode == 0, result.stdout + result.stderr
    assert "best checkpoint: " in result.stdout
    assert result.stdout.count("model: ") == 1
    assert sorted(losses(tmp_path / "run")) == list(range(1, 11))
