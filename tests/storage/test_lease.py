"""One writer: a living holder is respected, a dead one is not waited for."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.conftest import REPOSITORY
from tests.waiting import wait_until
from yuzogpt.errors import RunFailed, UserError
from yuzogpt.storage import lease
from yuzogpt.storage.lease import LEASE, Lease
from yuzogpt.storage.run_storage import LocalStorage

HOLDER = """
import sys, threading
from pathlib import Path
from yuzogpt.storage.lease import Lease
from yuzogpt.storage.run_storage import LocalStorage
with Lease(LocalStorage(Path(sys.argv[1]))):
    print("held", flush=True)
    threading.Event().wait()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lease of tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_a_living_holder_is_respected(holder, tmp_path):
    with (
        pytest.raises(UserError, match=f"in use by process {holder.pid}"),
        Lease(LocalStorage(tmp_path)),
    ):
        pass


def test_a_killed_holder_is_not_waited_for(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LEASE).exists()
    with Lease(LocalStorage(tmp_path)) as mine:
        assert json.loads((tmp_path / LEASE).read_text())["id"] == mine.holder["id"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_lease_of_another_machine_expires(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "EXPIRES_AFTER", 0.5)
    monkeypatch.setattr(lease, "HEARTBEAT", 0.2)
    stale = {"id": "x", "process": 1, "host": "gone", "boot": "", "namespace": "", "beat": 3}
    (tmp_path / LEASE).write_text(json.dumps(stale))
    with Lease(LocalStorage(tmp_path)):
        pass
    for left in (b"", b"\0" * 100, b'{"id": '):  # of a power loss while it was written
        (tmp_path / LEASE).write_bytes(left)
        with Lease(LocalStorage(tmp_path)):
            pass


def test_a_process_with_a_recycled_number_is_not_the_holder(tmp_path):
    before_reboot = {**lease.describe_process(os.getpid()), "id": "x", "beat": 3, "started": "1"}
    (tmp_path / LEASE).write_text(json.dumps(before_reboot))
    with Lease(LocalStorage(tmp_path)):
        pass


def test_a_living_holder_whose_heart_is_slow_keeps_its_lease(holder, tmp_path):
    holder.send_signal(signal.SIGSTOP)
    with (
        pytest.raises(UserError, match=f"in use by process {holder.pid}"),
        Lease(LocalStorage(tmp_path)),
    ):
        pass
    holder.send_signal(signal.SIGCONT)


def test_a_lease_that_was_removed_is_created_again(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT", 0.05)
    with Lease(LocalStorage(tmp_path)) as mine:
        (tmp_path / LEASE).unlink()
        wait_until((tmp_path / LEASE).exists)
        assert lease.holder_of(LocalStorage(tmp_path)) == mine.holder["id"]
    assert list(tmp_path.iterdir()) == []


def test_a_lease_that_is_gone_after_a_standstill_was_anothers(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT", 0.05)
    monkeypatch.setattr(lease, "EXPIRES_AFTER", 0.0)  # any pause is one
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(RunFailed, match="another command took over"), Lease(LocalStorage(tmp_path)):
        (tmp_path / LEASE).unlink()
        threading.Event().wait(60)
    assert list(tmp_path.iterdir()) == []


def test_a_lease_that_cannot_be_read_is_not_anothers(tmp_path):
    (tmp_path / LEASE).mkdir()
    with pytest.raises(OSError, match="not a regular file"):
        lease.holder_of(LocalStorage(tmp_path))


def test_a_holder_that_lost_its_lease_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT", 0.05)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # not what Ray left of another test
    with (
        pytest.raises(RunFailed, match="another command took over"),
        Lease(LocalStorage(tmp_path)) as mine,
    ):
        (tmp_path / LEASE).write_text(json.dumps({**mine.holder, "id": "another"}))
        threading.Event().wait(60)  # its work, which is interrupted
    assert json.loads((tmp_path / LEASE).read_text())["id"] == "another"
