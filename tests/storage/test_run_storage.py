"""A run's storage: what a directory and an object store do alike, against a real S3 server."""

import pytest

from tests.storage.stores import URI
from tests.waiting import wait_until
from yuzogpt import runs
from yuzogpt.errors import UserError
from yuzogpt.runs.event_log import Follower, MetricsLog, append_record
from yuzogpt.storage.run_storage import DRIVER, READER, WORKER, LocalStorage, open_storage


@pytest.mark.slow
def test_records_are_followed_through_the_store(store):
    seen = []
    log = MetricsLog(open_storage(URI, WORKER) / runs.METRICS, -1, None)
    followed = open_storage(URI, DRIVER) / runs.METRICS
    with Follower(followed, seen.append):
        log.write("train", 1, loss=2.0)
        log.write("start", 1)
        wait_until(lambda: len(seen) == 2)
        assert [record["kind"] for record in seen] == ["train", "start"]
        log.write("train", 2, loss=1.0)
        log.close()
        append_record(followed, "failure", "worker 0 failed")
    assert [record["kind"] for record in seen] == ["train", "start", "train", "failure"]


def test_a_store_is_a_type(store, tmp_path):
    checkpoint = open_storage(URI, WORKER) / "checkpoints" / "step-1"
    assert checkpoint.display_name == f"{URI}/checkpoints/step-1"
    assert checkpoint.parent.parent == open_storage(URI, WORKER)
    assert checkpoint.local != (open_storage(URI, DRIVER) / "checkpoints" / "step-1").local
    assert open_storage(str(tmp_path), WORKER) == LocalStorage(tmp_path)
    assert not (LocalStorage(tmp_path) / "s3:" / "run").is_remote
    with pytest.raises(UserError, match="too long"):
        open_storage(f"s3://runs/{'x' * 300}/run", WORKER)
    with pytest.raises(UserError, match="has no folder"):
        open_storage("s3://runs/..", READER)
    with pytest.raises(UserError, match="leads out of its folder"):
        checkpoint / "../../../../victim"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["directory", "store"])
def test_both_kinds_of_storage_do_the_same(store, tmp_path, where):
    folder = LocalStorage(tmp_path) if where == "directory" else open_storage(URI, WORKER)
    file = folder / "file"
    assert not file.exists()
    with pytest.raises(FileNotFoundError):
        file.read()
    file.delete()
    assert file.create(b"1")
    assert not file.create(b"2")
    file.append(b"3")
    assert file.read() == b"13"
    file.delete_if(b"1")
    assert file.read() == b"13"
    file.delete_if(b"13")
    assert not file.exists()
    file.write(b"4")
    file.write(b"5")
    assert (folder / "file").read() == b"5"
    file.delete()
    assert not file.exists()
    if where == "directory":
        assert list(tmp_path.glob(".*")) == []
        assert file.upload() is None
        assert not file.download()
        assert folder.list_remote() == {}
