"""`--overwrite`: what it may delete, when it does, and what is left where it does not."""

import pytest

from tests.conftest import tiny_settings
from tests.training.worlds import train_here
from yuzogpt import runs
from yuzogpt.errors import UserError


def tree(directory):
    """Return every file below a directory, with its content."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def old_run(corpus_dir, tmp_path_factory):
    """A finished run. Copy it before it is changed."""
    out_dir = tmp_path_factory.mktemp("old") / "run"
    train_here(tiny_settings(corpus_dir, out_dir, "--max_iters=4", "--eval_interval=2"))
    return out_dir


@pytest.mark.parametrize(
    ("out_dir", "start"),
    [("run", "link"), ("link", "run"), ("run", "other/../run"), ("run", "link/checkpoints/step-4")],
)
def test_what_a_run_starts_from_is_known_whatever_its_path(
    old_run, corpus_dir, tmp_path, out_dir, start
):
    (tmp_path / "run").symlink_to(old_run)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "other").mkdir()
    flags = ("--overwrite", f"--init_from={tmp_path / start}")
    with pytest.raises(UserError, match="--overwrite would delete"):
        runs.check(tiny_settings(corpus_dir, tmp_path / out_dir, *flags))
