"""What the tests of evaluation share with pytest."""

from dataclasses import replace

import pytest

from yuzogpt.evaluation import benchmark_files


@pytest.fixture(autouse=True)
def files_of_our_own(monkeypatch):
    """The published files are known by their SHA-256; these are the tests' own."""
    known = {name: replace(one, sha256="") for name, one in benchmark_files.PUBLISHED.items()}
    monkeypatch.setattr(benchmark_files, "PUBLISHED", known)
