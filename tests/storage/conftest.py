"""An object store for the tests of this folder."""

import pytest

from yuzogpt.storage import background_uploader, run_storage


@pytest.fixture
def store(s3, tmp_path, monkeypatch):
    """A bucket named `runs`, and an empty cache."""
    s3.create_bucket(Bucket="runs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(run_storage, "STORE_SETTLE_S", 0.05)
    monkeypatch.setattr(background_uploader, "SYNC_INTERVAL_S", 0.2)
    return s3
