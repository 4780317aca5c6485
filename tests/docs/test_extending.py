"""docs/extending.md: each addition is short and one file; as written, all work together."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.docs.pages import blocks

DIFFS = [text for _, text in blocks(REPOSITORY / "docs" / "extending.md", "diff")]
MAX_LINES = 30
TESTS = (
    "tests/docs/extended.py",
    "tests/config/test_registry.py",
    "tests/training/test_choices.py",
)


@pytest.mark.parametrize("diff", DIFFS, ids=lambda diff: diff.split()[1])
def test_an_addition_is_one_file_and_short(diff):
    assert len(re.findall("^[+]{3} ", diff, re.M)) == 1
    assert diff.count("\n") <= MAX_LINES


@pytest.mark.slow
def test_all_additions_work_together(tmp_path):
    for name in ("yuzogpt", "tests", "docs", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "images")
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=ignored)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    for diff in DIFFS:
        subprocess.run(["git", "apply"], input=diff, cwd=tmp_path, text=True, check=True)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "", *TESTS],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
