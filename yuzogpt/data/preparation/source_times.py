"""When the files of a source were last changed: a file beside the corpus, and no part of it.

In: a source's files. Out: the file that is compared when the same command comes again. It is apart
from the manifest, whose bytes do not depend on the machine.
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
    """Remember when each file was last changed, where its store tells."""
    times = {real_path(file): file.modified for file in files if file.modified}
    write_durably(directory / SOURCE_TIMES, to_json(times))


def read_times(directory: Path) -> dict[str, str]:
    """Return when each file was last changed, by its path; nothing is known without the file."""
    with contextlib.suppress(FileNotFoundError, DamagedFile):
        return read_json(directory / SOURCE_TIMES, dict[str, str])
    return {}


def real_path(file: SourceFile) -> str:
    """Return the path that means the same file to every command."""
    return file.path if scheme_of(file.path) else os.path.realpath(file.path)
