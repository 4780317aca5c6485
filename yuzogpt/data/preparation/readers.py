"""Reads the documents of a unit in bounded memory, whatever a file holds and however large it is.

Documents come in batches of about 1 MB. A line of JSON or text, or a cell of parquet, is skipped if
it is longer than MAX_DOCUMENT_BYTES (or than `--max_document_bytes`, if that is more). A large file
that is one document is not read here: the tokenizer reads it in pieces. Next: shards.py.
"""

import codecs
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from yuzogpt.data.preparation.sources import Unit, compression_of, reading
from yuzogpt.errors import UserError
from yuzogpt.storage.filesystems import open_filesystem, scheme_of
from yuzogpt.storage.text import other_encoding, plain, why_not_utf8

BATCH_BYTES = 2**20  # of text, from the reader to the tokenizer
MAX_DOCUMENT_BYTES = 2**24  # held at once, unless a setting says more
MAX_WHOLE_BYTES = 2**22  # of a file that is one document; larger ones are read in pieces
MAX_BATCH_ROWS = 128  # of parquet: lengths differ, and a batch is decoded whole
LOCAL_BUFFER_BYTES, REMOTE_BUFFER_BYTES = 2**20, 2**23  # of a parquet column, read at once

# Why a document is rejected, as the manifest counts it.
MISSING = "without text"
INVALID_JSON = "invalid JSON"
TOO_LONG = "too long"
# Not a rejection: the document is the path of a file with the text.
IN_FILE = "in a file"


@dataclass(frozen=True)
class Batch:
    """Consecutive documents of a unit; None and a reason for each that is rejected."""

    documents: list[bytes | None]
    reasons: list[str | None]


def read(unit: Unit, text_column: str, max_document_bytes: int) -> Iterator[Batch]:
    """Read a unit's documents, a batch at a time; UserError if its file is damaged."""
    limit = max(MAX_DOCUMENT_BYTES, max_document_bytes)
    with reading(unit.path):
        if unit.format == "parquet":
            documents = read_parquet(unit, text_column, limit)
        elif unit.format == "text":
            documents = (read_whole(path) for path in (unit.path, *unit.more_paths))
        elif unit.format == "jsonl":
            documents = (parse_line(line, text_column) for line in read_lines(unit, limit))
        else:
            lines = read_lines(unit, limit)
            documents = ((line, TOO_LONG if line is None else None) for line in lines)
        yield from batched(documents)


def peek(units: list[Unit], text_column: str) -> Iterator[tuple[int, bytes]]:
    """Yield the first documents, each after the number of bytes that it takes of its file."""
    for unit in units:
        with reading(unit.path):
            if unit.format == "jsonl":
                for line in read_lines(unit, MAX_DOCUMENT_BYTES):
                    yield len(line or b"") + 1, parse_line(line, text_column)[0] or b""
                continue
            for batch in read(unit, text_column, 0):
                for document, reason in zip(batch.documents, batch.reasons, strict=True):
                    if document and reason == IN_FILE:
                        document = next(read_pieces(os.fsdecode(document)))
                    yield len(document or b""), document or b""


def count_documents(unit: Unit) -> int:
    """Count a unit's documents; the unit is read if its file does not record the number."""
    if unit.documents is not None:
        return unit.documents
    with reading(unit.path):
        return sum(1 for _ in read_lines(unit, MAX_DOCUMENT_BYTES))


def check_first_line(units: list[Unit], text_column: str) -> None:
    """Raise UserError if the first line of JSON has no such column, which is probably misspelt."""
    path = units[0].path
    with reading(path):
        lines = read_lines(units[0], MAX_DOCUMENT_BYTES)
        line = next((line for line in lines if line is not None), None)
    if line is None:
        return
    if other_encoding(line):
        raise UserError(f"{path}: {why_not_utf8(line)}")
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise UserError(f"{path}: its first line is not JSON") from None
    if not isinstance(value, dict) or text_column not in value:
        columns = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        raise UserError(
            f"--text_column={text_column}: not in {path}, whose first line has {columns}"
        )


def read_parquet(
    unit: Unit, text_column: str, limit: int
) -> Iterator[tuple[bytes | None, str | None]]:
    """Read row groups; the bytes of documents are not decoded yet.

    A column is read through a buffer: without one, pyarrow first reads that of a whole row group.
    """
    filesystem, inside = open_filesystem(unit.path)
    buffer_size = REMOTE_BUFFER_BYTES if scheme_of(unit.path) else LOCAL_BUFFER_BYTES
    mean = unit.bytes // max(1, unit.documents or 1)
    with filesystem.open_input_file(inside) as opened:
        file = pq.ParquetFile(opened, pre_buffer=False, buffer_size=buffer_size)
        batches = file.iter_batches(
            batch_size=min(MAX_BATCH_ROWS, max(1, BATCH_BYTES // max(1, mean))),
            row_groups=range(unit.start, unit.stop),
            columns=[text_column],
            use_threads=False,
        )
        for batch in batches:
            # As binary: Arrow does not check that strings are UTF-8, and Python would raise.
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            column = column.cast(pa.large_binary())
            too_long = pc.greater(pc.binary_length(column), limit)
            if pc.any(too_long).as_py():
                column = pc.if_else(too_long, pa.scalar(None, column.type), column)
            for text, is_too_long in zip(column.to_pylist(), too_long.to_pylist(), strict=True):
                reason = TOO_LONG if is_too_long else MISSING if text is None else None
                yield text, reason


def read_whole(path: str) -> tuple[bytes | None, str | None]:
    """Return the content of a file that is one document, or its path if it is large."""
    with reading(path), open_stream(path) as stream:
        content = stream.read(MAX_WHOLE_BYTES + 1)
    if len(content) > MAX_WHOLE_BYTES:
        return os.fsencode(path), IN_FILE
    return plain(content), None


def read_pieces(path: str) -> Iterator[bytes]:
    """Yield the bytes of a file, one piece at a time."""
    with reading(path), open_stream(path) as stream:
        while piece := stream.read(BATCH_BYTES):
            yield piece


def parse_line(line: bytes | None, text_column: str) -> tuple[bytes | None, str | None]:
    """Return the text of a JSON line, or the reason why there is none."""
    if line is None:
        return None, TOO_LONG
    try:
        # Decoded here: json.loads takes bytes that look like UTF-16 or UTF-32 for these.
        value = json.loads(line.decode("utf-8-sig", "surrogatepass"))
    except UnicodeDecodeError:
        return line, None  # counted as invalid UTF-8 where text is decoded
    except (ValueError, RecursionError):  # the latter: nested thousands deep
        return None, INVALID_JSON
    text = value.get(text_column) if isinstance(value, dict) else None
    if not isinstance(text, str):
        return None, MISSING
    # A lone surrogate ("\ud800") has no UTF-8: these bytes do not decode later, and are counted.
    return text.encode("utf-8", "surrogatepass"), None


def read_lines(unit: Unit, limit: int) -> Iterator[bytes | None]:
    """Yield the lines that begin in a unit's bytes, without their line ends.

    Yields None for a line of more than `limit` bytes. Skips a file's byte order mark and, in JSON,
    blank lines.
    """
    stop = None if compression_of(unit.path) else unit.stop
    limit += len(b"\r\n")
    with open_stream(unit.path) as stream:
        position = unit.start
        if unit.start:  # the unit before has the line of the byte before
            stream.seek(unit.start - 1)
            position = skip_line(stream, unit.start - 1, stop)
        while stop is None or position < stop:
            line = stream.readline(limit)
            if not line:
                return
            is_first, position = position == 0, position + len(line)
            if len(line) == limit and not line.endswith(b"\n"):
                position = skip_line(stream, position, stop)
                yield None
                continue
            if is_first:
                line = line.removeprefix(codecs.BOM_UTF8)
            if unit.format == "jsonl":
                line = line.rstrip(b"\r\n")
                if line.strip():
                    yield line
            else:
                yield from line.removesuffix(b"\n").removesuffix(b"\r").split(b"\r")


def skip_line(stream: io.BufferedReader, position: int, stop: int | None) -> int:
    """Read to the end of a line, or beyond `stop`; return the position after it."""
    while stop is None or position < stop:
        piece = stream.readline(BATCH_BYTES)
        position += len(piece)
        if not piece or piece.endswith(b"\n"):
            break
    return position


def batched(rows: Iterable[tuple[bytes | None, str | None]]) -> Iterator[Batch]:
    """Group documents into batches of about BATCH_BYTES."""
    documents: list[bytes | None] = []
    reasons: list[str | None] = []
    size = 0
    for document, reason in rows:
        documents.append(document)
        reasons.append(reason)
        size += len(document or b"")
        if size >= BATCH_BYTES:
            yield Batch(documents, reasons)
            documents, reasons, size = [], [], 0
    if documents:
        yield Batch(documents, reasons)


def open_stream(path: str) -> io.BufferedReader:
    """Open a file, decompressed."""
    filesystem, inside = open_filesystem(path)
    compression = compression_of(path)
    if compression:
        opened = filesystem.open_input_stream(inside, compression=compression)
    else:
        opened = filesystem.open_input_file(inside)
    return io.BufferedReader(opened, buffer_size=BATCH_BYTES)
