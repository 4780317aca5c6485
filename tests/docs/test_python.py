"""The notebook, the script and the page about Python run as they are written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, make_text
from tests.docs.pages import blocks

PAGE = REPOSITORY / "docs" / "python.md"
EXAMPLES = REPOSITORY / "examples"
# As a notebook's kernel does: one cell after the other, in a running event loop.
KERNEL = """
import asyncio, json, sys
async def run(names):
    for cell in json.load(sys.stdin):
        exec(cell, names)
asyncio.run(run({"__name__": "__main__"}))
"""


def cells(notebook: Path) -> list[str]:
    """Return the code of a notebook's cells."""
    found = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def run(directory: Path, *arguments: str, stdin: str = "") -> str:
    """Run Python in a directory; return what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments], input=stdin, cwd=directory,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path):
    printed = run(tmp_path, "-c", KERNEL, stdin=json.dumps(cells(EXAMPLES / "quickstart.ipynb")))
    assert "Rough winds do shake the darling buds" in printed.replace("\n", "") or (
        "do shake the darling buds of May" in printed
    )


@pytest.mark.slow
def test_the_page_about_python_runs(tmp_path):
    (tmp_path / "book.txt").write_text(make_text(30_000))
    code = [text for _, text in blocks(PAGE, "python")]
    assert len(code) > 3
    assert "resuming at step 20" in run(tmp_path, "-c", KERNEL, stdin=json.dumps(code))


@pytest.mark.slow
def test_the_script_compares_two_runs(tmp_path):
    (tmp_path / "book.txt").write_text(make_text(30_000))
    printed = run(tmp_path, str(EXAMPLES / "api.py"), "book.txt")
    assert "/out-lr-0.003: val loss " in printed
