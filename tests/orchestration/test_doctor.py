"""`yuzogpt doctor` on this machine, as a command. Clusters are examined in tests/hosts."""

import json

import pytest

from tests.conftest import yuzogpt
from tests.orchestration.clusters import started

pytestmark = pytest.mark.slow


def test_this_machine_is_sound(tmp_path):
    storage = tmp_path / "shared"
    storage.mkdir()
    result = yuzogpt("doctor", f"--storage={storage}", "--json", "--least_disk=0.1")
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert found["verdict"] == "sound"
    (node,) = found["nodes"].values()
    assert set(node["versions"]) >= {"python", "torch", "ray"}
    (stored,) = found["storage"].values()
    assert stored["written"] > 0
    assert list(storage.iterdir()) == []  # it leaves nothing


def test_a_cluster_that_asks_for_no_token_is_a_fault():
    with started(head_cpus=1, nodes=1) as cluster:
        flags = (f"--ray_address={cluster.address}", "--num_nodes=2", "--least_disk=0.1")
        result = yuzogpt("doctor", *flags, RAY_AUTH_MODE="disabled")
    assert result.returncode == 1
    assert "token authentication is off" in result.stdout
    assert "RAY_JOB_STOP_WAIT_TIME_S: not set: 3 s" in result.stdout
    assert "2 node(s): 1 fault(s)" in result.stderr


def test_storage_that_cannot_be_written_is_a_fault(tmp_path):
    (tmp_path / "file").touch()
    result = yuzogpt("doctor", f"--storage={tmp_path / 'file'}", "--least_disk=0.1")
    assert result.returncode == 1
    assert "cannot be written" in result.stdout
    assert result.stderr.strip().startswith("yuzogpt: 1 node(s): 1 fault(s)")
