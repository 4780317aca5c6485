"""One unit of a source, from text to blocks: the work of one task, wherever it runs.

A unit leaves its train blocks and held-out documents in the staging directory, and last its record,
which marks it done. The bytes depend on the source and the ShardConfig alone, so two tasks that run
the same unit, even at the same time, write the same. Next on the line: commit.py.
"""

import functools
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from yuzogpt import tokenization
from yuzogpt.data.block_writer import BlockWriter, from_offsets
from yuzogpt.data.blocks import TOKENIZER
from yuzogpt.data.manifest import Block
from yuzogpt.data.preparation.readers import IN_FILE, TOO_LONG, Batch, read, read_pieces
from yuzogpt.data.preparation.sources import Unit
from yuzogpt.data.preparation.splits import Split
from yuzogpt.data.preparation.token_buffer import TokenBuffer
from yuzogpt.storage.atomic_files import to_json, write_durably
from yuzogpt.storage.text import decode_pieces
from yuzogpt.tokenization.tokenizer import BytePairTokenizer, Ids, NotTokenizable

EMPTY = "empty"
INVALID_UTF8 = "invalid UTF-8"
NOT_TOKENIZABLE = "not tokenizable"

MAX_DOCUMENT_TOKENS = 2**31 - 1  # a block has int32 offsets


class TooLong(Exception):
    """A file is longer than a document may be."""


@dataclass(frozen=True)
class ShardConfig:
    """What every task must know: where to write, and how."""

    staging: str
    text_column: str
    split: Split
    max_document_bytes: int  # 0: no limit
    block_tokens: int


@dataclass(frozen=True)
class UnitRecord:
    """What a unit became; written once its files are on disk."""

    unit: int
    documents: int
    bytes: int  # of text
    sha256: str  # of its documents' digests, in order
    rejected: dict[str, int]
    train: list[Block]  # by their names in the staging directory
    val: list[Block]
    val_rows: list[int]  # of the unit, ascending
    node: str  # on which it ran
    least_digest: str = ""  # of the hash rule: the smallest digest of its train documents
    least_rows: list[int] = field(default_factory=list)  # rows of train with that digest

    @property
    def blocks(self) -> list[Block]:
        """All blocks that it wrote."""
        return self.train + self.val

    @property
    def tokens(self) -> int:
        return sum(block.tokens for block in self.blocks)


@functools.lru_cache(maxsize=1)
def load_tokenizer(staging: str) -> BytePairTokenizer:
    """Load the corpus's tokenizer, once per process."""
    loaded = tokenization.load(Path(staging) / TOKENIZER)
    assert isinstance(loaded, BytePairTokenizer), "large corpora have GPT-2's tokens"
    return loaded


def tokenize(batch: Batch, config: ShardConfig, tokenizer: BytePairTokenizer) -> pa.Table:
    """Turn documents into tokens, or into the reason of their rejection.

    Returns a row for each document: its tokens (none if it was rejected), the reason (null if it is
    kept), the size of its text in bytes, and their SHA-256.
    """
    rows = zip(batch.documents, batch.reasons, strict=True)
    parts = []
    for is_in_file, run in itertools.groupby(rows, lambda row: row[1] == IN_FILE):
        if is_in_file:
            parts += [tokenize_file(os.fsdecode(path or b""), config, tokenizer) for path, _ in run]
        else:
            parts.append(tokenize_texts(list(run), config, tokenizer))
    return pa.concat_tables(parts)


def tokenize_texts(
    rows: Sequence[tuple[bytes | None, str | None]],
    config: ShardConfig,
    tokenizer: BytePairTokenizer,
) -> pa.Table:
    """Turn documents that are in memory into rows of `tokenize`."""
    decoded = [decode(document, reason, config) for document, reason in rows]
    texts = [text for text, _ in decoded if text is not None]
    ids, ends = tokenizer.encode_documents(texts)
    is_text = np.array([text is not None for text, _ in decoded])
    lengths = np.zeros(len(decoded), np.int64)
    lengths[is_text] = np.diff(ends, prepend=0)
    reasons = [reason for _, reason in decoded]
    for row in np.flatnonzero(is_text & (lengths == 0)):
        reasons[row] = NOT_TOKENIZABLE
    contents = [document or b"" for document, _ in rows]
    digests = [hashlib.sha256(content).digest() for content in contents]
    return to_rows(ids, lengths, reasons, [len(content) for content in contents], digests)


def tokenize_file(path: str, config: ShardConfig, tokenizer: BytePairTokenizer) -> pa.Table:
    """Turn a file that is one document into a row of `tokenize`, reading it in pieces.

    Only its tokens are held in memory.
    """
    ids, digest, size = TokenBuffer(tokenizer.dtype), hashlib.sha256(), 0
    reason: str | None = None

    def texts() -> Iterator[str]:
        nonlocal size
        for text in decode_pieces(read_pieces(path)):
            content = text.encode()
            digest.update(content)
            size += len(content)
            if config.max_document_bytes and size > config.max_document_bytes:
                raise TooLong
            yield text

    try:
        for piece in tokenizer.encode_stream(texts()):
            if ids.size + len(piece) >= MAX_DOCUMENT_TOKENS:
                raise TooLong
            ids.append(piece)
        ids.append(np.array([tokenizer.end_of_text], tokenizer.dtype))
    except TooLong:
        reason = TOO_LONG
    except UnicodeDecodeError:
        reason = INVALID_UTF8
    except NotTokenizable:
        reason = NOT_TOKENIZABLE
    if reason:
        return tokenize_texts([(None, reason)], config, tokenizer)
    return to_rows(ids.tokens, np.array([ids.size]), [None], [size], [digest.digest()])


def to_rows(
    ids: Ids,
    lengths: npt.NDArray[np.int64],
    reasons: list[str | None],
    sizes: list[int],
    digests: list[bytes],
) -> pa.Table:
    """Return the rows of `tokenize`."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return pa.table(
        {
            "tokens": from_offsets(offsets, pa.array(ids)),
            "reason": pa.array(reasons, pa.string()),
            "bytes": pa.array(sizes, pa.int64()),
            "digest": pa.array(digests, pa.binary(32)),
        }
    )


def decode(
    document: bytes | None, reason: str | None, config: ShardConfig
) -> tuple[str | None, str | None]:
    """Return a document's text, or why it is rejected."""
    if document is None:
        return None, reason
    if not document:
        return None, EMPTY
    if config.max_document_bytes and len(document) > config.max_document_bytes:
        return None, TOO_LONG
    try:
        return document.decode(), None
    except UnicodeDecodeError:
        return None, INVALID_UTF8


class UnitWriter:
    """Writes one unit: `add` its batches in order, then `finish`."""

    def __init__(self, unit: Unit, config: ShardConfig) -> None:
        self.unit = unit
        self.config = config
        self.staging = Path(config.staging)
        self.train = self._block_writer("train")
        self.val = self._block_writer("val")
        self.val_rows: list[int] = []
        self.documents = 0
        self.train_documents = 0
        self.least_digest = b""
        self.least_rows: list[int] = []
        self.bytes = 0
        self.rejected: Counter[str] = Counter()
        self.digest = hashlib.sha256()

    def add(self, batch: pa.Table) -> None:
        """Add the next documents; write blocks as they fill."""
        digests: list[bytes] = batch["digest"].to_pylist()
        row = self.unit.first_row
        is_val = self.config.split.is_val(None if row is None else row + self.documents, digests)
        kept = batch["reason"].is_null().to_numpy()
        for writer, mask in ((self.train, kept & ~is_val), (self.val, kept & is_val)):
            documents = batch["tokens"]
            if not mask.all():
                documents = documents.filter(pa.array(mask))
            for chunk in documents.chunks:
                writer.add(chunk)
        if not self.config.split.is_shuffled:
            self._note_smallest([digests[row] for row in np.flatnonzero(kept & ~is_val)])
        self.val_rows += [self.documents + int(row) for row in np.flatnonzero(kept & is_val)]
        self.rejected.update(reason for reason in batch["reason"].to_pylist() if reason)
        self.digest.update(b"".join(digests))
        self.documents += len(batch)
        self.bytes += pc.sum(batch["bytes"]).as_py() or 0

    def _note_smallest(self, digests: list[bytes]) -> None:
        """Remember the rows of the train documents with the smallest digest."""
        smallest = min(digests, default=b"")
        if smallest and (not self.least_digest or smallest < self.least_digest):
            self.least_digest, self.least_rows = smallest, []
        self.least_rows += [
            self.train_documents + row
            for row, digest in enumerate(digests)
            if digest == self.least_digest
        ]
        self.train_documents += len(digests)

    def finish(self, node: str = "") -> UnitRecord:
        """Write what is left, and last the record that marks the unit done."""
        expected = self.unit.documents
        if expected is not None and self.documents != expected:
            raise RuntimeError(
                f"unit {self.unit.index} of {self.unit.path}: read {self.documents} documents, "
                f"expected {expected}"
            )
        record = UnitRecord(
            unit=self.unit.index,
            documents=self.documents,
            bytes=self.bytes,
            sha256=self.digest.hexdigest(),
            rejected=dict(sorted(self.rejected.items())),
            train=self.train.finish(),
            val=self.val.finish(),
            val_rows=self.val_rows,
            node=node,
            least_digest=self.least_digest.hex(),
            least_rows=self.least_rows,
        )
        write_durably(record_path(self.staging, record.unit), to_json(asdict(record)))
        return record

    def _block_writer(self, split: str) -> BlockWriter:
        unit = self.unit.index
        return BlockWriter(
            self.staging,
            split,
            self.config.block_tokens,
            lambda index: f"unit-{unit:06d}-{split}-{index:03d}.arrow",
        )


def run_unit(unit: Unit, config: ShardConfig, tokenizer: BytePairTokenizer, node: str = "") -> None:
    """Read, tokenize and write a unit; UserError for a damaged source."""
    writer = UnitWriter(unit, config)
    for batch in read(unit, config.text_column, config.max_document_bytes):
        writer.add(tokenize(batch, config, tokenizer))
    writer.finish(node)


def record_path(staging: Path, unit: int) -> Path:
    """Return where a unit's record lies."""
    return staging / f"unit-{unit:06d}.json"
