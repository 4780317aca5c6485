"""Paths: what is the same place under another name."""

from pathlib import Path

import pytest

from yuzogpt.paths import is_within, is_within_store


def test_a_folder_is_known_behind_symlinks_and_dots(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for path in ("run", "link/checkpoints", "run/../link", "run/not/yet/there"):
        assert is_within(tmp_path / path, tmp_path / "run")
        assert is_within(tmp_path / path, tmp_path / "link")
    for path in ("run2", "run/..", "."):
        assert not is_within(tmp_path / path, tmp_path / "link")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert not is_within(tmp_path / "loop", tmp_path / "run")


@pytest.mark.parametrize(
    ("uri", "is_so"),
    [
        ("s3://b/run", True), ("s3://b//run/", True), ("s3://b/x/../run/./checkpoints", True),
        ("s3://b/run2", False), ("gs://b/run", False), ("s3://c/run", False), ("/b/run", False),
    ],
)  # fmt: skip
def test_a_folder_of_a_store_is_known_by_its_normalised_uri(uri, is_so):
    assert is_within_store(uri, "s3://b/run/") == is_so
    assert is_within_store(str(Path("/b/run")), "/b/run") is False  # no store
