"""A block file, mapped into memory: only if it is what its manifest says, and what Arrow can trust.

In: a path, and what the manifest records of the block. Out: its documents, an Arrow array whose
buffers are the file's own bytes. Arrow itself follows any offset that a file holds, also out of its
buffers; so a block is validated each time it is mapped, and all its ids once per node.
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
# What pyarrow raises for a file that is no Arrow, or one that leads out of itself.
NOT_ARROW = (pa.ArrowException, ValueError, IndexError, OSError, OverflowError, MemoryError)


def damaged(path: Path | str, reason: str) -> DamagedFile:
    """Return the error for a corpus that is not what its manifest says."""
    return DamagedFile(f"{path}: damaged: {reason}; prepare the corpus again with --overwrite")


def map_documents(
    path: Path, documents: int | None = None, tokens: int | None = None
) -> pa.ListArray:
    """Return the documents of a block, memory-mapped; how many there must be, if that is known.

    Raises UserError for a file that cannot be read, DamagedFile for one that is not such a block.
    """
    content = map_file(path)
    try:
        column = only_column(pa.ipc.open_file(pa.BufferReader(content)), path)
        column.validate(full=True)  # offsets: within the values, ascending
    except NOT_ARROW as error:
        raise damaged(path, first_line(error)) from None
    values = column.values
    if column.null_count or values.null_count:
        raise damaged(path, "it has nulls")
    first, last = (column.offsets[place].as_py() for place in (0, -1))
    if first != 0 or last != len(values):
        raise damaged(path, "its documents are not all of its tokens")
    if len(values) and not is_slice_of(values.buffers()[1], content):
        raise damaged(path, "it is compressed")
    for what, found, expected in (
        ("documents", len(column), documents),
        ("tokens", len(values), tokens),
    ):
        if expected not in (None, found):
            raise damaged(path, f"it has {found:,} {what}, the manifest says {expected:,}")
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
    """Return the column of a block, not yet validated."""
    if reader.schema.names != [COLUMN] or reader.schema.types[0] not in TYPES:
        columns = ", ".join(f"{field.name}: {field.type}" for field in reader.schema)
        raise damaged(path, f"its columns are {columns[:200] or 'none'}, not {COLUMN}: {TYPES[0]}")
    if reader.num_record_batches != 1:
        raise damaged(path, f"{reader.num_record_batches} record batches, expected one")
    return reader.get_batch(0).column(0)


def is_slice_of(buffer: pa.Buffer, content: pa.Buffer) -> bool:
    """Return whether a buffer is a part of a mapped file."""
    start = int(buffer.address) - int(content.address)
    return 0 <= start <= int(content.size) - int(buffer.size)


def check_ids(path: Path, ids: npt.NDArray[Any], vocab_size: int) -> None:
    """Raise DamagedFile if the vocabulary has no such ids."""
    most = int(np.max(ids, initial=0))
    if most >= vocab_size:
        raise damaged(path, f"it has the id {most:,}, of a vocabulary of {vocab_size:,}")
