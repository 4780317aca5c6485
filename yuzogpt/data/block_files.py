"""Memory-maps a block file after checking that it matches its manifest and is safe for Arrow.

Arrow follows any offset in a file, even one that leads out of its buffers. So a block is validated
each time it is mapped; its ids are checked once per node.
"""

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from yuzogpt.errors import UserError, first_line, reason_of
from yuzogpt.storage.untrusted import DamagedFile, open_regular

COLUMN = "tokens"
TYPES = (pa.list_(pa.uint16()), pa.list_(pa.uint32()))
# What pyarrow raises for a file that is not Arrow, or whose offsets lead out of it.
ARROW_ERRORS = (pa.ArrowException, ValueError, IndexError, OSError, OverflowError, MemoryError)


def damaged(path: Path | str, reason: str) -> DamagedFile:
    """Return the error for a file of a corpus that does not match its manifest."""
    return DamagedFile(f"{path}: damaged: {reason}; prepare the corpus again with --overwrite")


def map_documents(
    path: Path, documents: int | None = None, tokens: int | None = None
) -> pa.ListArray:
    """Return the documents of a block, memory-mapped.

    `documents`, `tokens`: the expected counts, if known. UserError if the file cannot be read,
    DamagedFile if it is not such a block.
    """
    content = map_file(path)
    try:
        column = only_column(pa.ipc.open_file(pa.BufferReader(content)), path)
        column.validate(full=True)  # offsets: within the values, ascending
    except ARROW_ERRORS as error:
        raise damaged(path, first_line(error)) from None
    values = column.values
    if column.null_count or values.null_count:
        raise damaged(path, "it has nulls")
    first, last = (column.offsets[index].as_py() for index in (0, -1))
    if first != 0 or last != len(values):
        raise damaged(path, "its documents do not cover all of its tokens")
    if len(values) and not is_within(values.buffers()[1], content):
        raise damaged(path, "it is compressed")
    for what, actual, expected in (
        ("documents", len(column), documents),
        ("tokens", len(values), tokens),
    ):
        if expected not in (None, actual):
            raise damaged(path, f"it has {actual:,} {what}, the manifest says {expected:,}")
    return column


def map_file(path: Path) -> pa.Buffer:
    """Return the bytes of a regular file, memory-mapped, read-only."""
    try:
        with open_regular(path) as file:
            return pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        raise damaged(path, "it is missing") from None
    except OSError as error:
        raise UserError(f"{path}: not readable: {reason_of(error)}") from None
    except ValueError:
        raise damaged(path, "it is empty") from None


def only_column(reader: pa.ipc.RecordBatchFileReader, path: Path) -> pa.ListArray:
    """Return the column of a block, before it is validated."""
    if reader.schema.names != [COLUMN] or reader.schema.types[0] not in TYPES:
        columns = ", ".join(f"{field.name}: {field.type}" for field in reader.schema)
        raise damaged(path, f"its columns are {columns[:200] or 'none'}, not {COLUMN}: {TYPES[0]}")
    if reader.num_record_batches != 1:
        raise damaged(path, f"{reader.num_record_batches} record batches, expected one")
    return reader.get_batch(0).column(0)


def is_within(buffer: pa.Buffer, content: pa.Buffer) -> bool:
    """Return whether a buffer lies within a mapped file."""
    start = int(buffer.address) - int(content.address)
    return 0 <= start <= int(content.size) - int(buffer.size)


def check_ids(path: Path, ids: npt.NDArray[Any], vocab_size: int) -> None:
    """Raise DamagedFile if an id is not below `vocab_size`."""
    largest = int(np.max(ids, initial=0))
    if largest >= vocab_size:
        raise damaged(path, f"it has the id {largest:,}; the vocabulary has {vocab_size:,}")
