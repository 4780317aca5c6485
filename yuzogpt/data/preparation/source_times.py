"""The modification times of a source's files, in a file beside the corpus.

The same command compares them to detect changed files. They are not in the manifest, whose bytes do
not depend on the machine.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from yuzogpt.data.blocks import SOURCE_TIMES
from yuzogpt.data.preparation.sources import SourceFile
from yuzogpt.storage.atomic_files import to_json, write_durably
from yuzogpt.storage.filesystems import scheme_of
from yuzogpt.storage.untrusted import DamagedFile, read_json


def write_times(directory: Path, files: Sequence[SourceFile]) -> None:
    """Write the modification time of each file, if its store knows it."""
    times = {real_path(file): file.modified for file in files if file.modified}
    write_durably(directory / SOURCE_TIMES, to_json(times))


def read_times(directory: Path) -> dict[str, str]:
    """Return modification times by path; empty if the file is missing or damaged."""
    with contextlib.suppress(FileNotFoundError, DamagedFile):
        return read_json(directory / SOURCE_TIMES, dict[str, str])
    return {}


def real_path(file: SourceFile) -> str:
    """Return a path that is the same for every command: without links, if it is local."""
    return file.path if scheme_of(file.path) else os.path.realpath(file.path)
