"""The Arrow block format: tokens on disk, one row a document, mapped into memory and never copied.

In: arrays of token ids. Out: a directory of `train-00000.arrow` ..., `val-00000.arrow` ... and a
manifest.json, which is written last and is the commit mark. A block is an uncompressed Arrow IPC
file with exactly one record batch of one column, `tokens: list<uint16>` (uint32 for large
vocabularies), so that the column's flat values are the token stream. Next on the line: batches.py.
"""

import contextlib
import functools
import hashlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ConfigDict, Field

from yuzogpt import tokenization
from yuzogpt.data.block_files import check_ids, damaged, map_documents
from yuzogpt.data.preparation.token_buffer import TokenBuffer
from yuzogpt.errors import UserError, reason_of
from yuzogpt.storage.atomic_files import (
    cache_directory,
    cache_path,
    naming,
    sha256,
    sync_file,
    to_json,
    write_durably,
)
from yuzogpt.storage.untrusted import (
    DamagedFile,
    Sha256,
    Untrusted,
    parse_json,
    read_file,
    read_json,
)
from yuzogpt.tokenization.tokenizer import Ids, Tokenizer, TokenizerFacts

FORMAT_VERSION = 1
SPARE_TOKENS = 2**21  # beyond a full block: what comes at once
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
STAGING = ".preparing"  # inside the directory: what is not committed yet
PLAN = "plan.json"  # in STAGING: what is being prepared
VERIFIED = "verified-blocks.json"  # in the cache
STAGE_STATS = "ray-data-stats.txt"  # how Ray Data fared
SOURCE_TIMES = "source-times.json"  # when the files of the source were last changed
# Beside the blocks; not part of the corpus.
BY_PRODUCTS = ("train.bin", "val.bin", STAGE_STATS, SOURCE_TIMES)


# A manifest may be somebody else's: types are exact, and files have the names that we write.
EXACTLY = ConfigDict(strict=True, extra="ignore")
Whole = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class Block:
    """What the manifest records of one block file."""

    __pydantic_config__ = EXACTLY

    file: Annotated[str, Field(pattern=r"^(unit-\d{6,}-)?(train|val)-\d{3,}\.arrow$")]
    split: Annotated[str, Field(pattern=r"^(train|val)$")]
    documents: Whole
    tokens: Annotated[int, Field(ge=0, lt=2**31)]  # int32 offsets
    bytes: Whole
    sha256: Sha256


@dataclass(frozen=True)
class Manifest:
    """What a prepared corpus is: everything but the tokens."""

    __pydantic_config__ = EXACTLY

    corpus: str
    tokenizer: TokenizerFacts
    source: dict[str, Any]
    split_rule: str
    append_end_of_text: bool
    blocks: list[Block]
    rejected: dict[str, Whole]
    format: int = FORMAT_VERSION

    def to_bytes(self) -> bytes:
        """Return the content of manifest.json."""
        return to_json(asdict(self))

    def tokens(self, split: str) -> int:
        """Count the tokens of a split."""
        return sum(block.tokens for block in self.blocks if block.split == split)


class Version(Untrusted):
    """What every version's manifest says."""

    format: int


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
        return tokenization.load(self.directory / TOKENIZER)

    def stream(self, split: str) -> TokenStream:
        """Map the blocks of `split` into memory."""
        blocks = [block for block in self.manifest.blocks if block.split == split]
        return TokenStream([tokens_of(self.documents(block)) for block in blocks])

    def documents(self, block: Block) -> pa.ListArray:
        """Map the documents of a block into memory; DamagedFile if it is not the manifest's."""
        return map_documents(self.directory / block.file, block.documents, block.tokens)

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

        All ids are within the vocabulary, too. What was found is remembered by size, modification
        time and inode, once per node, so that a restart does not read everything again; `anew`
        reads it all the same.
        """
        self.check()
        remembered = VerifiedBlocks(forget=anew)
        for block in self.manifest.blocks:
            path = self.directory / block.file
            if remembered.sha256(path) != block.sha256:
                raise damaged(path, "its SHA-256 is not the manifest's")
            documents = self.documents(block)
            if not remembered.has_ids_below(path, self.vocab_size):
                check_ids(path, tokens_of(documents), self.vocab_size)
                remembered.note_ids_below(path, self.vocab_size)
        remembered.save()

    @property
    def vocab_size(self) -> int:
        """How many ids the tokenizer has."""
        return int(self.manifest.tokenizer["vocab_size"])


class VerifiedBlocks:
    """This node's memory of hashes, keyed by what changes when a file does."""

    def __init__(self, *, forget: bool) -> None:
        """Read what earlier runs remembered; an unreadable memory is an empty one."""
        self.known: dict[str, str] = {}
        with contextlib.suppress(OSError, UserError):
            self.known = {} if forget else read_json(cache_path() / VERIFIED, dict[str, str])
        self.used: dict[str, str] = {}

    def sha256(self, path: Path) -> str:
        """Return the file's SHA-256, reading it only if it is new or was touched."""
        key = self._key(path)
        self.used[key] = self.known.get(key) or sha256(path)
        return self.used[key]

    def has_ids_below(self, path: Path, vocab_size: int) -> bool:
        """Return whether a file's ids were found to be of a vocabulary of this size."""
        return f"{self._key(path)}:{vocab_size}" in self.known

    def note_ids_below(self, path: Path, vocab_size: int) -> None:
        """Remember that a file's ids are of a vocabulary of this size."""
        self.used[f"{self._key(path)}:{vocab_size}"] = "ids"

    def _key(self, path: Path) -> str:
        stat = path.stat()
        return f"{path}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"

    def save(self) -> None:
        """Remember for the next run."""
        if not self.used.items() <= self.known.items():
            # A memory, no more: without it files are read again.
            with contextlib.suppress(OSError, UserError):
                write_durably(cache_directory() / VERIFIED, to_json(self.known | self.used))


def open_corpus(directory: Path) -> PreparedCorpus:
    """Open a prepared corpus by its manifest; UserError if there is none or it is not readable."""
    path = directory / MANIFEST
    if not path.is_file():
        if (directory / STAGING).is_dir():
            raise UserError(f"{directory}: not prepared to its end; the same `prepare` goes on")
        raise UserError(
            f"{directory}: no prepared corpus here; `yuzogpt prepare {directory.name}` makes one"
        )
    try:
        content = read_file(path)
    except OSError as error:
        raise UserError(f"{path}: not readable: {reason_of(error)}") from None
    fingerprint = hashlib.sha256(content).hexdigest()
    return PreparedCorpus(directory, parse_manifest(content, str(path)), fingerprint)


def parse_manifest(content: bytes, origin: str) -> Manifest:
    """Read a manifest; UserError for another version's, or what is none."""
    try:
        version = parse_json(content, Version, origin).format
        if version != FORMAT_VERSION:
            raise UserError(f"{origin}: format {version}; this version reads {FORMAT_VERSION}")
        manifest = parse_json(content, Manifest, origin)
        for block in manifest.blocks:
            if not block.file.startswith(f"{block.split}-"):  # a staged one, or another split's
                raise DamagedFile(f"it has a block {block.file} of {block.split}")
        return manifest
    except DamagedFile as error:
        reason = str(error).removeprefix(f"{origin}: ")
        raise damaged(origin, f"not a manifest ({reason})") from None


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
        self.lengths: list[npt.NDArray[np.int64]] = []  # of the documents that wait
        self.tokens: TokenBuffer | None = None
        self.written: list[Block] = []

    def add(self, documents: pa.ListArray) -> None:
        """Take the next documents; blocks that are full are written."""
        if not len(documents):
            return
        ids = documents.flatten().to_numpy()
        if len(documents) == 1 and len(ids) > self.block_tokens:  # not copied: it may be large
            self.finish()
            self._write_block(np.array([0, len(ids)]), ids)
            return
        self.tokens = self.tokens or TokenBuffer(ids.dtype, self.block_tokens + SPARE_TOKENS)
        self.tokens.append(ids)
        self.lengths.append(np.diff(documents.offsets.to_numpy()).astype(np.int64))
        if self.tokens.size > self.block_tokens:
            self._write(self.tokens, last=False)

    def finish(self) -> list[Block]:
        """Write what is left; return all that was written."""
        if self.tokens and self.lengths:
            self._write(self.tokens, last=True)
        return self.written

    def _write(self, waiting: TokenBuffer, *, last: bool) -> None:
        """Write full blocks, each of as many documents as fit and one at least; `last`: all."""
        lengths = np.concatenate(self.lengths)
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        start = 0
        while start < len(lengths) and (last or waiting.size - bounds[start] > self.block_tokens):
            before = int(bounds[start])
            fitting = int(np.searchsorted(bounds, before + self.block_tokens, side="right")) - 1
            stop = max(start + 1, fitting)
            tokens = waiting.tokens[before : bounds[stop]]
            self._write_block(bounds[start : stop + 1] - before, tokens)
            start = stop
        waiting.drop(int(bounds[start]))
        self.lengths = [lengths[start:]] if start < len(lengths) else []

    def _write_block(self, offsets: npt.NDArray[np.int64], tokens: Ids) -> None:
        documents = from_offsets(offsets, pa.array(tokens))  # not copied
        path = self.directory / self.name(len(self.written))
        self.written.append(write_block(path, self.split, documents))


def write_block(path: Path, split: str, documents: pa.ListArray) -> Block:
    """Write one block and return its entry in the manifest. `documents`: no slice of others."""
    batch = pa.record_batch([documents], names=["tokens"])
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with naming(path):
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        sync_file(temporary)
    digest = sha256(temporary)
    size = temporary.stat().st_size
    temporary.replace(path)
    return Block(path.name, split, len(documents), len(documents.values), size, digest)


def tokens_of(documents: pa.ListArray) -> npt.NDArray[Any]:
    """Return the flat tokens of a block's documents, shape (tokens,); nothing is copied."""
    values = documents.values
    dtype = np.dtype(values.type.to_pandas_dtype())
    # Not `to_numpy`, for which pyarrow imports pandas: a fifth of a second of a command's start.
    buffer = values.buffers()[1] if len(values) else b""
    return np.frombuffer(buffer, dtype, len(values), values.offset * dtype.itemsize)


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
