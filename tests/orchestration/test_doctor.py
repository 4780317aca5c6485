"""`yuzogpt doctor` on this machine, as a command. Clusters are examined in tests/hosts."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.conftest import REPOSITORY, yuzogpt
from tests.orchestration.clusters import started

pytestmark = pytest.mark.slow


@pytest.fixture
def one_core():
    """This process, and those that it starts, may use one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def test_this_machine_is_sound(tmp_path, one_core):
    storage = tmp_path / "shared"
    storage.mkdir()
    result = yuzogpt("doctor", f"--storage={storage}", "--json", "--min_disk_gb=0.1")
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert found["verdict"] == "sound"
    (node,) = found["nodes"].values()
    assert (node["cores"], node["quota"]) == (1, 1.0)
    assert not node["problems"]
    assert set(node["versions"]) >= {"python", "torch", "ray"}
    (stored,) = found["storage"].values()
    assert stored["written"] > 0
    assert list(storage.iterdir()) == []  # it leaves nothing


def test_a_cluster_that_asks_for_no_token_is_a_fault():
    with started(head_cpus=1, nodes=1) as cluster:
        flags = (f"--ray_address={cluster.address}", "--num_nodes=2", "--min_disk_gb=0.1")
        result = yuzogpt("doctor", *flags, RAY_AUTH_MODE="disabled")
    assert result.returncode == 1
    assert "token authentication is off" in result.stdout
    assert "RAY_JOB_STOP_WAIT_TIME_S: not set: 3 s" in result.stdout
    assert "2 node(s): 1 fault(s)" in result.stderr


def test_storage_that_cannot_be_written_is_a_fault(tmp_path):
    (tmp_path / "file").touch()
    result = yuzogpt("doctor", f"--storage={tmp_path / 'file'}", "--min_disk_gb=0.1")
    assert result.returncode == 1
    assert "cannot be written" in result.stdout
    assert result.stderr.strip().startswith("yuzogpt: 1 node(s): 1 fault(s)")


def test_a_doctor_that_is_stopped_leaves_nothing(tmp_path):
    """`ray job stop` sends SIGTERM."""
    storage = tmp_path / "shared"
    storage.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "yuzogpt", "doctor", f"--storage={storage}", "--min_disk_gb=0.1"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait = threading.Event()
    while not any(storage.iterdir()):
        assert process.poll() is None, process.communicate()
        wait.wait(0.001)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors.strip().endswith("yuzogpt: stopped (SIGTERM)")
    assert list(storage.iterdir()) == []


def test_a_gpu_driver_that_hangs_is_named(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 300\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = yuzogpt("doctor", "--min_disk_gb=0.1", PATH=path)
    assert "nvidia-smi does not answer within 10 s" in result.stdout
    assert "TCP ports" not in result.stdout
    assert "warning(s)" in result.stdout
