"""The commands of README and of the tutorial run as they are written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, make_text
from tests.docs.pages import README, TUTORIAL, blocks, name_of

NOT_RUN = "not run: "  # and why


def run_blocks(page: Path, directory: Path) -> list[str]:
    """Run a page's blocks of bash one after the other; return what each printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)}
    printed = []
    for marker, text in blocks(page, "bash"):
        if marker.startswith(NOT_RUN):
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=directory, env=environment, capture_output=True, text=True, timeout=600,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        printed.append(done.stdout)
    return printed


@pytest.mark.parametrize("page", [README, TUTORIAL], ids=name_of)
def test_a_block_that_is_not_run_says_why(page):
    markers = [marker for marker, _ in blocks(page, "bash")]
    assert all(not marker or marker.startswith(NOT_RUN) for marker in markers)
    assert "" in markers


@pytest.mark.slow
def test_the_commands_of_readme_run(tmp_path):
    assert any("learning_rate: 0.0003" in text for text in run_blocks(README, tmp_path))


@pytest.mark.slow
def test_the_tutorial_leads_to_a_served_model(tmp_path):
    (tmp_path / "book.txt").write_text(make_text(120_000))
    printed = run_blocks(TUTORIAL, tmp_path)
    assert '"text"' in printed[-1]
    assert (tmp_path / "out-book" / "report.html").is_file()
    resumed, finished = printed[-5:-3]
    assert "resuming at step 100" in resumed
    assert "finished" in finished


def test_a_block_that_fails_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- not run: why -->\n```bash\nfalse\n```\n\n```bash\nfalse | true\n```\n")
    with pytest.raises(AssertionError, match="false"):
        run_blocks(page, tmp_path)
