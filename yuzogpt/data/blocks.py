"""The Arrow block format: tokens on disk, one row a document, mapped into memory and never copied.

In: arrays of token ids. Out: a directory of `train-00000.arrow` ..., `val-00000.arrow` ... and a
manifest.json, which is written last and is the commit mark. A block is an uncompressed Arrow IPC
file with exactly one record batch of one column, `tokens: list<uint16>` (uint32 for large
vocabularies), so that the column's flat values are the token stream. Next on the line: batches.py.
"""

import contextlib
import functools
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from yuzogpt import tokenizers
from yuzogpt.errors import UserError
from yuzogpt.files import cache_directory, cache_path, sha256, sync_file, to_json, write_durably
from yuzogpt.tokenizers import Ids, Tokenizer

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
STAGING = ".preparing"  # inside the directory: what is not committed yet
PLAN = "plan.json"  # in STAGING: what is being prepared
VERIFIED = "verified-blocks.json"  # in the cache
STAGE_STATS = "ray-data-stats.txt"  # how Ray Data fared
BY_PRODUCTS = ("train.bin", "val.bin", STAGE_STATS)  # beside the blocks; not part of the corpus


@dataclass(frozen=True)
class Block:
    """What the manifest records of one block file."""

    file: str
    split: str
    documents: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a prepared corpus is: everything but the tokens."""

    corpus: str
    tokenizer: dict[str, Any]
    source: dict[str, Any]
    split_rule: str
    append_end_of_text: bool
    blocks: list[Block]
    rejected: dict[str, int]
    format: int = FORMAT_VERSION

    def to_bytes(self) -> bytes:
        """Return the content of manifest.json."""
        return to_json(asdict(self))

    def tokens(self, split: str) -> int:
        """Count the tokens of a split."""
        return sum(block.tokens for block in self.blocks if block.split == split)


class TokenStream:
    """The tokens of a split: its blocks, mapped, as if they were one array."""

    def __init__(self, blocks: Sequence[npt.NDArray[Any]]) -> None:
        """`blocks`: the flat tokens of each block, in order."""
        self.blocks = blocks
        # Where each block begins in the stream, and last, where the stream ends.
        self.starts = np.cumsum([0, *(len(block) for block in blocks)], dtype=np.int64)

    def __len__(self) -> int:
        """Count the tokens."""
        return int(self.starts[-1])

    def read(self, start: int, count: int) -> Ids:
        """Return `count` tokens from `start`, shape (count,); a view where one block holds them."""
        index = int(np.searchsorted(self.starts, start, side="right")) - 1
        offset = start - int(self.starts[index])
        piece = self.blocks[index][offset : offset + count]
        if len(piece) == count:
            return piece
        pieces = [piece]
        while (missing := count - sum(map(len, pieces))) > 0:
            index += 1
            pieces.append(self.blocks[index][:missing])
        return np.concatenate(pieces)

    def read_rows(self, starts: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
        """Return `count` tokens from each start, shape (len(starts), count).

        Blocks are looked up for all rows at once. One gather a block would be no faster: rows of a
        batch lie in about as many blocks as there are.
        """
        blocks = np.searchsorted(self.starts, starts, side="right") - 1
        offsets = starts - self.starts[blocks]
        out = np.empty((len(starts), count), np.int64)
        where = zip(starts.tolist(), blocks.tolist(), offsets.tolist(), strict=True)
        for row, (start, block, offset) in zip(out, where, strict=True):
            piece = self.blocks[block][offset : offset + count]
            row[:] = piece if len(piece) == count else self.read(start, count)
        return out


@dataclass(frozen=True)
class PreparedCorpus:
    """A directory of blocks, opened."""

    directory: Path
    manifest: Manifest
    fingerprint: str  # the dataset's identity: the SHA-256 of manifest.json, as it lies there

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return tokenizers.load(self.directory / TOKENIZER)

    def stream(self, split: str) -> TokenStream:
        """Map the blocks of `split` into memory."""
        blocks = [block for block in self.manifest.blocks if block.split == split]
        return TokenStream([map_block(self.directory / block.file) for block in blocks])

    def check(self) -> None:
        """Look whether all files are there, without reading blocks; UserError names what is not."""
        for block in self.manifest.blocks:
            path = self.directory / block.file
            if not path.is_file():
                raise damaged(path, "it is missing")
            size = path.stat().st_size
            if size != block.bytes:
                raise damaged(path, f"it has {size:,} bytes, the manifest says {block.bytes:,}")
        path = self.directory / TOKENIZER
        if not path.is_file() or sha256(path) != self.manifest.tokenizer["fingerprint"]:
            raise damaged(path, "it is not the tokenizer that the manifest names")

    def verify(self, *, anew: bool = False) -> None:
        """Compare every block with the manifest; UserError names the first that differs.

        A hash is remembered by size, modification time and inode, once per node, so that a
        restart does not read everything again; `anew` reads it all the same.
        """
        self.check()
        remembered = VerifiedBlocks(forget=anew)
        for block in self.manifest.blocks:
            path = self.directory / block.file
            if remembered.sha256(path) != block.sha256:
                raise damaged(path, "its SHA-256 is not the manifest's")
        remembered.save()


class VerifiedBlocks:
    """This node's memory of hashes, keyed by what changes when a file does."""

    def __init__(self, *, forget: bool) -> None:
        """Read what earlier runs remembered; an unreadable memory is an empty one."""
        self.known: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError, UserError):
            self.known = {} if forget else json.loads((cache_path() / VERIFIED).read_text())
        self.used: dict[str, str] = {}

    def sha256(self, path: Path) -> str:
        """Return the file's SHA-256, reading it only if it is new or was touched."""
        stat = path.stat()
        key = f"{path}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
        self.used[key] = self.known.get(key) or sha256(path)
        return self.used[key]

    def save(self) -> None:
        """Remember for the next run."""
        if not self.used.items() <= self.known.items():
            # A memory, no more: without it files are read again.
            with contextlib.suppress(OSError, UserError):
                write_durably(cache_directory() / VERIFIED, to_json(self.known | self.used))


def damaged(path: Path | str, reason: str) -> UserError:
    """Return the error for a corpus that is not what its manifest says."""
    return UserError(f"{path}: damaged: {reason}; prepare the corpus again with --overwrite")


def open_corpus(directory: Path) -> PreparedCorpus:
    """Open a prepared corpus by its manifest; UserError if there is none or it is not readable."""
    path = directory / MANIFEST
    if not path.is_file():
        if (directory / STAGING).is_dir():
            raise UserError(f"{directory}: not prepared to its end; the same `prepare` goes on")
        raise UserError(
            f"{directory}: no prepared corpus here; `yuzogpt prepare {directory.name}` makes one"
        )
    content = path.read_bytes()
    fingerprint = hashlib.sha256(content).hexdigest()
    return PreparedCorpus(directory, parse_manifest(content, str(path)), fingerprint)


def parse_manifest(content: bytes, origin: str) -> Manifest:
    """Read a manifest; UserError for another version's, or what is none."""
    try:
        found = json.loads(content)
        if found["format"] != FORMAT_VERSION:
            raise UserError(
                f"{origin}: format {found['format']}; this version reads {FORMAT_VERSION}"
            )
        found["blocks"] = [Block(**block) for block in found["blocks"]]
        return Manifest(**{name: found[name] for name in Manifest.__annotations__})
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(origin, f"not a manifest ({error!r})") from None


def refuse_other(found: PreparedCorpus, what: str, old: str, new: str) -> None:
    """Raise UserError if the directory was prepared from something else."""
    if old != new:
        raise UserError(
            f"{found.directory}: holds a corpus with another {what}: {old}, not {new}; "
            "--overwrite replaces it, --data_dir=DIR keeps both"
        )


def list_array(documents: Sequence[Ids], dtype: npt.DTypeLike) -> pa.ListArray:
    """Put documents' ids, one array each, into one Arrow array."""
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    values = np.concatenate([*documents, np.empty(0, dtype)]).astype(dtype, copy=False)
    return from_offsets(offsets, pa.array(values))


def from_offsets(offsets: npt.NDArray[np.int64], values: pa.Array) -> pa.ListArray:
    """Make the column of a block from its flat tokens and where its documents begin and end."""
    assert offsets[-1] < 2**31, "a block's int32 offsets hold fewer than 2^31 tokens"
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


def joined(chunks: Sequence[pa.ListArray]) -> pa.ListArray:
    """Put documents together in one array whose values are their tokens and nothing else."""
    values = pa.concat_arrays([chunk.flatten() for chunk in chunks])
    lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in chunks])
    return from_offsets(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), values)


class BlockWriter:
    """Writes documents, in order, as blocks of at most so many tokens; no document is cut."""

    def __init__(
        self, directory: Path, split: str, block_tokens: int, name: Callable[[int], str]
    ) -> None:
        """`name`: of the n-th block. A document of more than `block_tokens` has its own block."""
        self.directory = directory
        self.split = split
        self.block_tokens = block_tokens
        self.name = name
        self.waiting: list[pa.ListArray] = []
        self.tokens_waiting = 0
        self.written: list[Block] = []

    def add(self, documents: pa.ListArray) -> None:
        """Take the next documents; blocks that are full are written."""
        if len(documents):
            self.waiting.append(documents)
            self.tokens_waiting += len(documents.flatten())
        if self.tokens_waiting > self.block_tokens:
            self._write(last=False)

    def finish(self) -> list[Block]:
        """Write what is left; return all that was written."""
        if self.waiting:
            self._write(last=True)
        return self.written

    def _write(self, *, last: bool) -> None:
        """Write full blocks, each of as many documents as fit and one at least; `last`: all."""
        documents = joined(self.waiting)
        ends = documents.offsets.to_numpy()[1:]
        start = 0
        while self.tokens_waiting > (0 if last else self.block_tokens) or (
            last and start < len(documents)  # documents without tokens
        ):
            before = int(ends[start - 1]) if start else 0
            fitting = int(np.searchsorted(ends, before + self.block_tokens, side="right"))
            stop = max(start + 1, fitting)
            path = self.directory / self.name(len(self.written))
            block = write_block(path, self.split, joined([documents[start:stop]]))
            self.written.append(block)
            self.tokens_waiting -= block.tokens
            start = stop
        self.waiting = [documents[start:]] if start < len(documents) else []


def write_block(path: Path, split: str, documents: pa.ListArray) -> Block:
    """Write one block and return its entry in the manifest. `documents`: no slice of others."""
    batch = pa.record_batch([documents], names=["tokens"])
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    sync_file(temporary)
    digest = sha256(temporary)
    size = temporary.stat().st_size
    temporary.replace(path)
    return Block(path.name, split, len(documents), len(documents.values), size, digest)


def map_block(path: Path) -> npt.NDArray[Any]:
    """Return the flat tokens of a block, memory-mapped, shape (tokens,)."""
    column = map_documents(path)
    return np.asarray(column.values.to_numpy(zero_copy_only=True))


def map_documents(path: Path) -> pa.ListArray:
    """Return the documents of a block, memory-mapped."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.num_record_batches != 1:
            raise damaged(path, f"{reader.num_record_batches} record batches, expected one")
        return reader.get_batch(0).column(0)
    except (OSError, pa.ArrowInvalid) as error:
        raise damaged(path, str(error)) from None


def block_name(split: str, index: int) -> str:
    """Return the file name of a split's n-th block in a corpus."""
    return f"{split}-{index:05d}.arrow"


def clear(directory: Path) -> None:
    """Remove a prepared corpus, the commit mark first."""
    (directory / MANIFEST).unlink(missing_ok=True)
    for path in block_files(directory):
        path.unlink()
    for name in (TOKENIZER, *BY_PRODUCTS):
        (directory / name).unlink(missing_ok=True)
    clear_staging(directory)


def clear_staging(directory: Path) -> None:
    """Remove what is not committed; its plan first, so that half of it is never gone on with."""
    if (directory / STAGING).exists():
        (directory / STAGING / PLAN).unlink(missing_ok=True)
        shutil.rmtree(directory / STAGING)


def block_files(directory: Path) -> Iterator[Path]:
    """Yield the block files of a directory, and what a crash left of them."""
    for pattern in ("train-*.arrow", "val-*.arrow", ".*.arrow.tmp"):
        yield from directory.glob(pattern)
