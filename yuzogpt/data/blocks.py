"""A prepared corpus: blocks of tokens on disk, memory-mapped as one token stream per split.

A corpus is a directory of `train-00000.arrow` ..., `val-00000.arrow` ... and a manifest.json, which
is written last: a directory without one is not a corpus. A block is an uncompressed Arrow IPC file
of one column, `tokens: list<uint16>` (uint32 for large vocabularies), with one list per document;
the flat values of the column are the token stream. It has nothing to do with `block_size`, the
model's context length. block_writer.py writes blocks; manifest.py is the schema of the manifest.

Next: data/batches.py.
"""

import functools
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from yuzogpt import tokenization
from yuzogpt.data.block_files import check_ids, damaged, map_documents
from yuzogpt.data.manifest import Block, Manifest, parse_manifest
from yuzogpt.data.verified_blocks import VerifiedBlocks
from yuzogpt.errors import UserError, reason_of
from yuzogpt.storage.atomic_files import sha256
from yuzogpt.storage.untrusted import read_file
from yuzogpt.tokenization.tokenizer import Ids, Tokenizer

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
STAGING = ".preparing"  # subdirectory for files that are not committed yet
PLAN = "plan.json"  # in STAGING: what the preparation in progress does
STAGE_STATS = "ray-data-stats.txt"  # Ray Data's execution statistics
SOURCE_TIMES = "source-times.json"  # modification times of the source's files
# Other files of a corpus directory; the .bin files are in nanoGPT's format (`inspect`).
BY_PRODUCTS = ("train.bin", "val.bin", STAGE_STATS, SOURCE_TIMES)


class TokenStream:
    """The tokens of a split: its memory-mapped blocks, addressed as one array."""

    def __init__(self, blocks: Sequence[npt.NDArray[Any]]) -> None:
        """`blocks`: the flat tokens of each block, in order."""
        self.blocks = blocks
        # Start of each block in the stream; the last entry is the stream's length.
        self.starts = np.cumsum([0, *(len(block) for block in blocks)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, count: int) -> Ids:
        """Return `count` tokens from `start`, shape (count,); a view if they lie in one block."""
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

        Blocks are looked up for all starts at once. The rows of a batch are scattered, about one
        per block, so grouping them by block would not be faster.
        """
        blocks = np.searchsorted(self.starts, starts, side="right") - 1
        offsets = starts - self.starts[blocks]
        out = np.empty((len(starts), count), np.int64)
        places = zip(starts.tolist(), blocks.tolist(), offsets.tolist(), strict=True)
        for row, (start, block, offset) in zip(out, places, strict=True):
            piece = self.blocks[block][offset : offset + count]
            row[:] = piece if len(piece) == count else self.read(start, count)
        return out


@dataclass(frozen=True)
class PreparedCorpus:
    """An opened corpus directory."""

    directory: Path
    manifest: Manifest
    fingerprint: str  # identity of the dataset: SHA-256 of the bytes of manifest.json

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that produced the tokens."""
        return tokenization.load(self.directory / TOKENIZER)

    def stream(self, split: str) -> TokenStream:
        """Map the blocks of `split` into memory."""
        blocks = [block for block in self.manifest.blocks if block.split == split]
        return TokenStream([tokens_of(self.documents(block)) for block in blocks])

    def documents(self, block: Block) -> pa.ListArray:
        """Map a block's documents into memory. Raises DamagedFile if the manifest differs."""
        return map_documents(self.directory / block.file, block.documents, block.tokens)

    def check(self) -> None:
        """Compare the sizes of all files with the manifest, without reading blocks.

        Raises UserError for the first that is missing or differs.
        """
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

    def verify(self, *, reread: bool = False) -> None:
        """Compare the contents of all blocks with the manifest, and their ids with the vocabulary.

        Raises UserError for the first that differs. Results are cached per node by size,
        modification time and inode, so that a restart does not read everything again; `reread`
        ignores the cache.
        """
        self.check()
        verified = VerifiedBlocks(reread=reread)
        for block in self.manifest.blocks:
            path = self.directory / block.file
            if verified.sha256(path) != block.sha256:
                raise damaged(path, "its SHA-256 is not the manifest's")
            documents = self.documents(block)
            if not verified.has_ids_below(path, self.vocab_size):
                check_ids(path, tokens_of(documents), self.vocab_size)
                verified.note_ids_below(path, self.vocab_size)
        verified.save()

    @property
    def vocab_size(self) -> int:
        """The number of ids of the tokenizer."""
        return int(self.manifest.tokenizer["vocab_size"])


def open_corpus(directory: Path) -> PreparedCorpus:
    """Open a prepared corpus by its manifest; UserError if it is missing or unreadable."""
    path = directory / MANIFEST
    if not path.is_file():
        if (directory / STAGING).is_dir():
            raise UserError(
                f"{directory}: its preparation was interrupted; the same `prepare` command "
                "resumes it"
            )
        raise UserError(
            f"{directory}: no prepared corpus here; `yuzogpt prepare {directory.name}` makes one"
        )
    try:
        content = read_file(path)
    except OSError as error:
        raise UserError(f"{path}: not readable: {reason_of(error)}") from None
    fingerprint = hashlib.sha256(content).hexdigest()
    return PreparedCorpus(directory, parse_manifest(content, str(path)), fingerprint)


def tokens_of(documents: pa.ListArray) -> npt.NDArray[Any]:
    """Return the flat tokens of a block's documents, shape (tokens,), without a copy."""
    values = documents.values
    dtype = np.dtype(values.type.to_pandas_dtype())
    # Not `to_numpy`: there pyarrow imports pandas, which takes 0.2 s.
    buffer = values.buffers()[1] if len(values) else b""
    return np.frombuffer(buffer, dtype, len(values), values.offset * dtype.itemsize)


def block_name(split: str, index: int) -> str:
    """Return the file name of a split's n-th block in a corpus."""
    return f"{split}-{index:05d}.arrow"


def clear(directory: Path) -> None:
    """Delete a prepared corpus, the manifest first."""
    (directory / MANIFEST).unlink(missing_ok=True)
    for path in block_files(directory):
        path.unlink()
    for name in (TOKENIZER, *BY_PRODUCTS):
        (directory / name).unlink(missing_ok=True)
    clear_staging(directory)


def clear_staging(directory: Path) -> None:
    """Delete uncommitted files, the plan first: after a crash in here, the rest is not resumed."""
    if (directory / STAGING).exists():
        (directory / STAGING / PLAN).unlink(missing_ok=True)
        shutil.rmtree(directory / STAGING)


def block_files(directory: Path) -> Iterator[Path]:
    """Yield the block files of a directory, and temporary files that a crash left behind."""
    for pattern in ("train-*.arrow", "val-*.arrow", ".*.arrow.tmp"):
        yield from directory.glob(pattern)
