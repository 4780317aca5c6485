"""Paths: the same directory under another name, and what a URI may name."""

import os
from pathlib import Path

import pytest

from yuzogpt.errors import UserError
from yuzogpt.storage.paths import absolute, directory_or_store, is_within, is_within_store


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


def test_the_root_and_a_home_as_storage_are_what_they_say(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert directory_or_store("/", "", "out_dir") == "/"
    assert directory_or_store("run/", "~/x", "out_dir") == f"{tmp_path}/x/run"


@pytest.mark.parametrize(
    ("path", "storage", "message"),
    [
        ("~nosuchuser/run", "", "--out_dir=~nosuchuser/run: there is no such user"),
        ("run", "~nosuchuser", "--storage=~nosuchuser: there is no such user"),
        (os.fsdecode(b"r\xe9sultats"), "/tmp", r"--out_dir=/tmp/r\xe9sultats: not UTF-8"),
        ("a\0b", "/tmp", "has a character that no path can have"),
    ],
)
def test_paths_that_cannot_be_are_one_line(path, storage, message):
    with pytest.raises(UserError) as error:
        absolute(path, storage, "out_dir")
    assert message in str(error.value)
    str(error.value).encode()  # can be printed anywhere
