"""Who may write to a run in an object store, against a real S3 server."""

import json
import os
import signal
import threading

import pytest

from tests.conftest import TINY, names, yuzogpt
from tests.storage.stores import URI, get, put
from yuzogpt.errors import RunFailed, UserError
from yuzogpt.storage import lease, run_storage
from yuzogpt.storage.lease import LEASE, Lease
from yuzogpt.storage.run_storage import DRIVER, open_storage


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_one_line_before_ray_starts(store, corpus_dir, tmp_path):
    flags = [*TINY, f"--data_dir={corpus_dir}"]
    missing = yuzogpt("train", *flags, "--out_dir=s3://nobucket/run")
    nobody = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    silent = yuzogpt("train", *flags, f"--out_dir={URI}", **nobody)
    for result in (missing, silent):
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1, result.stderr
        assert "s3://" in result.stderr
        assert "Ray" not in result.stdout


@pytest.mark.slow
def test_a_second_command_is_refused(store, corpus_dir):
    with Lease(open_storage(URI, DRIVER)):
        result = yuzogpt(
            "train", *TINY, f"--data_dir={corpus_dir}", f"--out_dir={URI}", "--num_workers=0"
        )
        assert result.returncode == 2
        assert f"{URI}: in use by process {os.getpid()}" in result.stderr
    assert LEASE not in names(store)


@pytest.mark.slow
def test_of_two_that_come_at_once_one_holds_the_lease(store, monkeypatch):
    monkeypatch.setattr(run_storage, "STORE_SETTLE_S", 0.5)
    held, refused, done = [], [], threading.Event()

    def take(number):
        try:
            with Lease(open_storage(URI, DRIVER)) as mine:
                held.append(mine.holder["id"])
                done.wait(20)
        except UserError:
            refused.append(number)
            done.set()

    threads = [threading.Thread(target=take, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(held), len(refused)) == (1, 1)


@pytest.mark.slow
def test_a_lease_of_another_machine_expires(store, monkeypatch):
    monkeypatch.setattr(lease, "EXPIRES_AFTER", 0.5)
    monkeypatch.setattr(lease, "HEARTBEAT", 0.2)
    stale = {"id": "x", "process": 1, "host": "gone", "boot": "", "namespace": "", "beat": 3}
    for left in (json.dumps(stale).encode(), b'{"id": '):
        put(store, LEASE, left)
        with Lease(open_storage(URI, DRIVER)) as mine:
            assert json.loads(get(store, LEASE))["id"] == mine.holder["id"]
        assert LEASE not in names(store)


def test_a_holder_that_lost_its_lease_ends(store, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT", 0.05)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    directory = open_storage(URI, DRIVER)
    with (
        pytest.raises(RunFailed, match=f"{URI}: another command took over"),
        Lease(directory) as mine,
    ):
        put(store, LEASE, json.dumps({**mine.holder, "id": "another"}).encode())
        threading.Event().wait(60)  # its work, which is interrupted
