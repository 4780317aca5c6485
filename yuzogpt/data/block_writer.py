"""Writing blocks: documents' token ids -> Arrow IPC files, each with its entry in the manifest."""

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from yuzogpt.data.manifest import Block
from yuzogpt.data.preparation.token_buffer import TokenBuffer
from yuzogpt.storage.atomic_files import naming, sha256, sync_file
from yuzogpt.tokenization.tokenizer import Ids

SPARE_TOKENS = 2**21  # room beyond a full block for the documents that arrive in one batch


def list_array(documents: Sequence[Ids], dtype: npt.DTypeLike) -> pa.ListArray:
    """Return one Arrow array of documents, from an array of ids for each."""
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    values = np.concatenate([*documents, np.empty(0, dtype)]).astype(dtype, copy=False)
    return from_offsets(offsets, pa.array(values))


def from_offsets(offsets: npt.NDArray[np.int64], values: pa.Array) -> pa.ListArray:
    """Return a block's column from its flat tokens and the offsets of its documents."""
    assert offsets[-1] < 2**31, "a block's int32 offsets hold fewer than 2^31 tokens"
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


def joined(chunks: Sequence[pa.ListArray]) -> pa.ListArray:
    """Concatenate documents; the values of the result are exactly their tokens."""
    values = pa.concat_arrays([chunk.flatten() for chunk in chunks])
    lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in chunks])
    return from_offsets(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), values)


class BlockWriter:
    """Writes documents in order as blocks of at most `block_tokens`; no document is split."""

    def __init__(
        self, directory: Path, split: str, block_tokens: int, name: Callable[[int], str]
    ) -> None:
        """`name(n)`: file name of the n-th block. A longer document gets a block of its own."""
        self.directory = directory
        self.split = split
        self.block_tokens = block_tokens
        self.name = name
        self.lengths: list[npt.NDArray[np.int64]] = []  # of the buffered documents
        self.tokens: TokenBuffer | None = None
        self.written: list[Block] = []

    def add(self, documents: pa.ListArray) -> None:
        """Add the next documents; full blocks are written."""
        if not len(documents):
            return
        ids = documents.flatten().to_numpy()
        if len(documents) == 1 and len(ids) > self.block_tokens:  # large: not copied
            self.finish()
            self._write_block(np.array([0, len(ids)]), ids)
            return
        self.tokens = self.tokens or TokenBuffer(ids.dtype, self.block_tokens + SPARE_TOKENS)
        self.tokens.append(ids)
        self.lengths.append(np.diff(documents.offsets.to_numpy()).astype(np.int64))
        if self.tokens.size > self.block_tokens:
            self._write(self.tokens, last=False)

    def finish(self) -> list[Block]:
        """Write the rest; return the entries of all blocks."""
        if self.tokens and self.lengths:
            self._write(self.tokens, last=True)
        return self.written

    def _write(self, buffer: TokenBuffer, *, last: bool) -> None:
        """Write full blocks of as many documents as fit (at least one); if `last`, the rest too."""
        lengths = np.concatenate(self.lengths)
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        start = 0
        while start < len(lengths) and (last or buffer.size - bounds[start] > self.block_tokens):
            before = int(bounds[start])
            fitting = int(np.searchsorted(bounds, before + self.block_tokens, side="right")) - 1
            stop = max(start + 1, fitting)
            tokens = buffer.tokens[before : bounds[stop]]
            self._write_block(bounds[start : stop + 1] - before, tokens)
            start = stop
        buffer.drop(int(bounds[start]))
        self.lengths = [lengths[start:]] if start < len(lengths) else []

    def _write_block(self, offsets: npt.NDArray[np.int64], tokens: Ids) -> None:
        documents = from_offsets(offsets, pa.array(tokens))  # not copied
        path = self.directory / self.name(len(self.written))
        self.written.append(write_block(path, self.split, documents))


def write_block(path: Path, split: str, documents: pa.ListArray) -> Block:
    """Write one block; return its manifest entry. `documents` must not be a slice."""
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
