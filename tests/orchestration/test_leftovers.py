"""What killed commands leave of an embedded Ray is deleted; what others left never is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from yuzogpt.orchestration import leftovers
from yuzogpt.orchestration.leftovers import OWNER, PREFIX, is_left_over, make_directory, sweep
from yuzogpt.storage.lease import describe_process


@pytest.fixture
def shared(tmp_path, monkeypatch) -> Path:
    """A shared temporary directory of the test's own."""
    monkeypatch.setattr(leftovers, "SHARED_DIRECTORY", tmp_path / "tmp")
    leftovers.SHARED_DIRECTORY.mkdir()
    return leftovers.SHARED_DIRECTORY


@pytest.fixture(scope="module")
def gone() -> str:
    """The owner.json of a command that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = json.dumps(describe_process(ended.pid))
    ended.communicate()
    return owner


def leave_behind(directory: Path, owner: str) -> Path:
    """Make the directory of a Ray whose command is gone; return a file in it."""
    directory.mkdir(mode=0o700)
    (directory / OWNER).write_text(owner)
    (directory / "ray" / "session").mkdir(parents=True)
    file = directory / "ray" / "session" / "log"
    file.touch()
    return file


def test_what_a_killed_command_left_is_deleted_and_links_are_not_followed(shared, gone, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis").touch()
    left = shared / f"{PREFIX}left"
    leave_behind(left, gone)
    (left / "ray" / "latest").symlink_to(home)
    (left / "latest").symlink_to(home)
    mine = make_directory()
    sweep()
    assert list(shared.iterdir()) == [mine]
    assert (home / "thesis").exists()


def test_a_link_of_anothers_to_a_home_deletes_nothing(shared, gone, tmp_path):
    home = tmp_path / "home"
    kept = leave_behind(home, gone)
    (shared / f"{PREFIX}x").symlink_to(home)
    sweep()
    assert kept.exists()
    assert (home / OWNER).exists()


def fifo(owner: Path, _gone: str) -> None:
    os.mkfifo(owner)


def link(owner: Path, gone: str) -> None:
    theirs = owner.parent / "theirs.json"
    theirs.write_text(gone)
    owner.symlink_to(theirs)


def numbered(process: object):
    def write(owner: Path, gone: str) -> None:
        owner.write_text(json.dumps({**json.loads(gone), "process": process}))

    return write


def open_to_all(owner: Path, _gone: str) -> None:
    owner.write_text(_gone)
    owner.parent.chmod(0o755)


HOSTILE = {
    "a FIFO": fifo,
    "a link": link,
    "a folder": lambda owner, _: owner.mkdir(),
    "endless": lambda owner, _: owner.symlink_to("/dev/zero"),
    "large": lambda owner, gone: owner.write_text(gone + " " * 2**20),
    "deep": lambda owner, _: owner.write_text("[" * 10**6),
    "a list": lambda owner, _: owner.write_text("[]"),
    "no JSON": lambda owner, _: owner.write_bytes(b"\xff"),
    "no process": numbered(None),
    "all processes": numbered(-1),
    "its own group": numbered(0),
    "a huge number": numbered(10**30),
    "a directory that is open to all": open_to_all,
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_a_directory_that_is_not_plainly_ours_is_left_alone(hostile, shared, gone):
    directory = shared / f"{PREFIX}x"
    kept = leave_behind(directory, gone)
    (directory / OWNER).unlink()
    hostile(directory / OWNER, gone)
    sweep()
    assert kept.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make what belongs to another")
def test_a_directory_of_another_user_is_left_alone(shared, gone):
    kept = leave_behind(shared / f"{PREFIX}x", gone)
    assert is_left_over(shared / f"{PREFIX}x")
    os.chown(shared / f"{PREFIX}x", 65534, 65534)
    sweep()
    assert kept.exists()
