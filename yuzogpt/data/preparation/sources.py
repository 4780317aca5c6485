"""Lists a source: parquet, JSON lines or plain text, on this machine or in an object store.

Files are in sorted order, which is part of the source's identity, since it decides nanoGPT's split.
They are split into units, each of which one task reads, tokenizes and writes. Units depend on the
files alone, never on the number of workers. Next on the line: readers.py.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from yuzogpt.errors import UserError, first_line, reason_of
from yuzogpt.storage.filesystems import is_store_error, list_files, open_filesystem, scheme_of
from yuzogpt.storage.paths import is_within

Format = Literal["parquet", "jsonl", "text", "lines"]

FORMATS: dict[str, Format] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".md": "text",
}
TEXT_TYPES = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary())
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

UNIT_BYTES = 16 * 2**20  # of text: about a second of tokenizing, and a block of a few MB


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    name: str  # within the source's folder: part of its identity
    path: str  # as open_filesystem takes it
    bytes: int
    modified: str  # shows that a file was replaced while its preparation was interrupted


@dataclass(frozen=True)
class Unit:
    """A piece of a file: row groups of parquet, bytes of uncompressed lines, or the whole file.

    The exception is plain text whose files are documents: there a unit has many small files.
    """

    path: str
    format: Format
    start: int
    stop: int
    bytes: int  # of text for parquet, else of the file; progress counts them
    documents: int | None = None  # None: known only once it is read
    index: int = 0  # in the source
    first_row: int | None = None  # in the source; None: the files before must be read
    more_paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Listing:
    """The files and units of a source, whose text is not read yet."""

    files: list[SourceFile]
    units: list[Unit]
    skipped: list[str]  # files of no known format
    own: list[str]  # files of the corpus that is prepared, which are left out

    @property
    def name(self) -> str:
        """What the manifest and messages call it."""
        return f"{len(self.files)} {self.units[0].format} files"

    @property
    def documents(self) -> int | None:
        """The number of documents; None if they must be counted."""
        counts = [unit.documents for unit in self.units]
        return None if None in counts else sum(count or 0 for count in counts)

    @property
    def bytes(self) -> int:
        """The bytes of all units."""
        return sum(unit.bytes for unit in self.units)


def list_source(source: str, text_column: str, by_line: bool, data_dir: Path) -> Listing:
    """List a source's files and split them into units.

    `by_line`: each line of plain text is a document; else each file is. `data_dir`: where the
    corpus goes, which may lie inside the source's folder. Raises UserError if files have no known
    format, several formats, damage, no such column, or no documents.
    """
    scheme = scheme_of(source)
    prefix = f"{scheme}://" if scheme else ""
    folder, infos = list_files(source)
    if not scheme and Path(folder).resolve() == data_dir.resolve():
        raise UserError(f"--data_dir={data_dir}: is the source's folder; choose another")
    own = [] if scheme else [i.path for i in infos if is_within(Path(i.path), data_dir)]
    if len(own) == len(infos):
        raise UserError(f"--data_dir={data_dir}: the source lies in it; choose another")
    infos = [info for info in infos if info.path not in set(own)]
    known = [info for info in infos if format_of(info.path)]
    if not known:
        raise UserError(f"--source={source}: no {', '.join(FORMATS)} file there (.gz, .zst too)")
    formats = sorted({str(format_of(info.path)) for info in known})
    if len(formats) > 1:
        raise UserError(f"--source={source}: files of several formats ({', '.join(formats)})")
    files = [
        SourceFile(
            name=info.path.removeprefix(folder).lstrip("/"),
            path=prefix + info.path,
            bytes=int(info.size or 0),
            modified=str(info.mtime_ns or ""),
        )
        for info in known
    ]
    if formats == ["text"] and not by_line:
        units = assign_row_numbers(group_files(files))
    else:
        units = assign_row_numbers(unit for file in files for unit in split_file(file, text_column))
    skipped = sorted(info.base_name for info in infos if not format_of(info.path))
    listing = Listing(files, units, skipped, own)
    if not units or listing.documents == 0:
        raise UserError(f"--source={source}: no document there")
    return listing


def format_of(path: str) -> Format | None:
    """Return the format that a file's name says, if it is known."""
    name = path.rpartition("/")[2].lower()
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    stem, dot, suffix = name.rpartition(".")
    return FORMATS.get(f"{dot}{suffix}") if stem else None


def compression_of(path: str) -> str | None:
    """Return the compression that a file's name says."""
    name = path.lower()
    return next((kind for suffix, kind in COMPRESSIONS.items() if name.endswith(suffix)), None)


def assign_row_numbers(pieces: Iterable[Unit]) -> list[Unit]:
    """Set each unit's index and, as far as documents are counted, its first row in the source."""
    units: list[Unit] = []
    row: int | None = 0
    for index, piece in enumerate(pieces):
        units.append(replace(piece, index=index, first_row=row))
        row = None if row is None or piece.documents is None else row + piece.documents
    return units


def split_file(file: SourceFile, text_column: str) -> list[Unit]:
    """Split one file into units, not yet numbered."""
    kind = format_of(file.path)
    assert kind is not None
    if kind == "parquet":
        return split_parquet(file, text_column)
    kind = "lines" if kind == "text" else kind
    step = max(1, file.bytes) if compression_of(file.path) else UNIT_BYTES
    return [
        Unit(file.path, kind, start, min(file.bytes, start + step), min(step, file.bytes - start))
        for start in range(0, file.bytes, step)
    ]


def group_files(files: list[SourceFile]) -> Iterator[Unit]:
    """Group files that are documents into units of about UNIT_BYTES, not yet numbered."""
    paths: list[str] = []
    size = 0
    for file in files:
        paths.append(file.path)
        size += file.bytes
        if size >= UNIT_BYTES or file is files[-1]:
            first, *more = paths
            yield Unit(first, "text", 0, 0, size, len(paths), more_paths=tuple(more))
            paths, size = [], 0


def split_parquet(file: SourceFile, text_column: str) -> list[Unit]:
    """Group row groups into units of about UNIT_BYTES of text, not yet numbered."""
    filesystem, inside = open_filesystem(file.path)
    with reading(file.path), filesystem.open_input_file(inside) as opened:
        metadata = pq.read_metadata(opened)
        schema = metadata.schema.to_arrow_schema()
    if schema.names.count(text_column) > 1:
        raise UserError(f"--text_column={text_column}: {file.path} has several of that name")
    if text_column not in schema.names:
        columns = ", ".join(schema.names)
        raise UserError(f"--text_column={text_column}: not in {file.path}, which has {columns}")
    kind = schema.field(text_column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not any(kind.equals(text) for text in TEXT_TYPES):
        raise UserError(f"--text_column={text_column}: {kind} in {file.path}, not text")
    units: list[Unit] = []
    start = size = documents = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        leaves = [group.column(leaf) for leaf in range(group.num_columns)]
        size += sum(c.total_uncompressed_size for c in leaves if c.path_in_schema == text_column)
        documents += group.num_rows
        if size >= UNIT_BYTES or index == metadata.num_row_groups - 1:
            units.append(Unit(file.path, "parquet", start, index + 1, size, documents))
            start, size, documents = index + 1, 0, 0
    return units


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Raise UserError for a source file that cannot be read; a bug's own error stays what it is."""
    try:
        yield
    except Exception as error:
        if not is_store_error(error):
            raise
        if isinstance(error, OSError) and error.errno:  # the system's, not about the content
            raise UserError(f"{path}: not readable: {reason_of(error)}") from None
        raise UserError(f"{path}: damaged or not readable: {first_line(error)}") from None
