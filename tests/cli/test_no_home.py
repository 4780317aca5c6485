"""Users without a home that can be written: containers with another uid, read-only systems."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, TINY
from yuzogpt.errors import UserError
from yuzogpt.storage import atomic_files

STRANGER = "12345"  # a uid that no passwd file names


@pytest.fixture
def stranger(tmp_path):
    """A function that runs a command as a uid without a name, with HOME as given, or without."""
    if os.getuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("only root can become another user, by setpriv")
    place = tmp_path / "place"
    place.mkdir()
    os.chown(place, int(STRANGER), int(STRANGER))
    # It may read everything, since what is tested may lie in root's home; and write nothing.
    become = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups"]
    become += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]

    def run(*arguments, home=None):
        kept = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
        result = subprocess.run(
            [*become, sys.executable, "-m", "yuzogpt", *arguments],
            cwd=place,
            env={**kept, "PYTHONPATH": str(REPOSITORY), **({"HOME": str(home)} if home else {})},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if "setpriv:" in result.stderr:
            pytest.skip(result.stderr)
        return result

    run.place = place
    return run


def training(corpus, out_dir, *flags):
    return ["train", *TINY, f"--data_dir={corpus}", f"--out_dir={out_dir}", "--max_iters=3", *flags]


@pytest.mark.slow
@pytest.mark.parametrize("home", ["unset", "missing", "read-only"])
def test_it_trains_without_a_home(stranger, corpus_dir, tmp_path, home):
    homes = {"unset": None, "missing": tmp_path / "nowhere", "read-only": tmp_path}
    result = stranger(
        *training(corpus_dir, stranger.place / "run", "--num_workers=0"), home=homes[home]
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert not (tmp_path / "nowhere").exists()
    assert [path.name for path in stranger.place.iterdir()] == ["run"]


@pytest.mark.slow
def test_it_trains_on_ray_without_a_home(stranger, corpus_dir):
    result = stranger(*training(corpus_dir, stranger.place / "run", "--num_workers=1"))
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize("home", [None, "/dev/null"])
def test_where_a_cache_is_needed_one_line_names_the_way_out(stranger, corpus_dir, home):
    result = stranger(*training(corpus_dir, "s3://bucket/run", "--num_workers=0"), home=home)
    assert result.returncode == 2
    assert result.stderr.startswith("yuzogpt: no cache: ")
    assert "XDG_CACHE_HOME=DIR" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_home_that_is_not_there_is_not_made(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="No such file or directory"):
        atomic_files.cache_directory()
    assert not (tmp_path / "nowhere").exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "made"))
    assert atomic_files.cache_directory() == tmp_path / "made" / "yuzogpt"
