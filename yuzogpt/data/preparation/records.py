"""A preparation's own files, validated when read: they may be damaged, or somebody else's.

A damaged file in the staging directory counts as missing, so its unit is run again. Only a damaged
plan is an error, since nothing else says whose staged files these are.
"""

import contextlib
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from yuzogpt.data.blocks import MANIFEST, PLAN, SOURCE_TIMES, PreparedCorpus
from yuzogpt.data.manifest import Block
from yuzogpt.data.preparation.shards import UnitRecord, record_path
from yuzogpt.data.preparation.sources import SourceFile, Unit
from yuzogpt.storage.atomic_files import to_json, write_durably
from yuzogpt.storage.filesystems import scheme_of
from yuzogpt.storage.untrusted import DamagedFile, Sha256, Untrusted, parse_json, read_json

COUNTS = "counts.json"

Size = Annotated[int, Field(ge=0, lt=2**63)]
DIGEST = re.compile("[0-9a-f]{64}")


class RecordedFile(Untrusted):
    """A file of a source, in a manifest."""

    name: str
    bytes: Size


class RecordedSource(Untrusted):
    """The source of a finished corpus."""

    name: str
    sha256: Sha256
    bytes: Size
    files: list[RecordedFile] | None = None  # None: one text
    settings: dict[str, Any] | None = None


def recorded_source(corpus: PreparedCorpus) -> RecordedSource:
    """Return the source of a finished corpus; DamagedFile if its manifest does not record it."""
    origin = f"{corpus.directory / MANIFEST}: source"
    return parse_json(to_json(corpus.manifest.source), RecordedSource, origin)


def read_identity(staging: Path) -> dict[str, Any] | None:
    """Return the identity of an interrupted preparation, or None; DamagedFile if it is damaged."""
    try:
        return read_json(staging / PLAN, dict[str, Any])
    except FileNotFoundError:
        return None


def read_counts(staging: Path, units: Sequence[Unit]) -> list[int] | None:
    """Return the number of documents of each unit; None if they must be counted."""
    try:
        counts = read_json(staging / COUNTS, list[Size])
    except (FileNotFoundError, DamagedFile):
        return None
    return counts if len(counts) == len(units) else None


def read_record(staging: Path, unit: Unit) -> UnitRecord | None:
    """Return the record of a unit if it is done and all its files are there; None if not."""
    try:
        record = read_json(record_path(staging, unit.index), UnitRecord)
    except (FileNotFoundError, DamagedFile):
        return None
    is_done = matches_unit(record, unit) and all(is_whole_file(staging, b) for b in record.blocks)
    return record if is_done else None


def matches_unit(record: UnitRecord, unit: Unit) -> bool:
    """Return whether a record is as its unit writes it. Names are checked: they become paths."""
    counts = [record.documents, record.bytes, *record.rejected.values()]
    for split, blocks in (("train", record.train), ("val", record.val)):
        for index, block in enumerate(blocks):
            name = f"unit-{unit.index:06d}-{split}-{index:03d}.arrow"
            if (block.file, block.split) != (name, split) or not DIGEST.fullmatch(block.sha256):
                return False
            counts += [block.documents, block.tokens, block.bytes]
    rows, documents = record.val_rows, sum(block.documents for block in record.train)
    return (
        record.unit == unit.index
        and unit.documents in (None, record.documents)
        and DIGEST.fullmatch(record.sha256) is not None
        and all(0 <= count < 2**63 for count in counts)
        and len(rows) == sum(block.documents for block in record.val)
        and rows == sorted({row for row in rows if 0 <= row < record.documents})
        and re.fullmatch("([0-9a-f]{64})?", record.least_digest) is not None
        and all(0 <= row < documents for row in record.least_rows)
    )


def is_whole_file(staging: Path, block: Block) -> bool:
    """Return whether a staged file exists, has its full size, and is no link."""
    try:
        status = (staging / block.file).lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == block.bytes


def write_times(directory: Path, files: Sequence[SourceFile]) -> None:
    """Write the modification time of each file, if its store knows it.

    By these, the same command detects changed files. They are no part of the manifest, whose bytes
    do not depend on the machine.
    """
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
