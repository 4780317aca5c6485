"""From staged units to a prepared corpus: the val split gathered, blocks named, the manifest last.

A crash at any moment leaves either the staged units, from which the same command resumes, or the
whole corpus.
"""

import functools
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from yuzogpt import tokenization
from yuzogpt.data import blocks
from yuzogpt.data.block_files import map_documents
from yuzogpt.data.block_writer import BlockWriter, from_offsets, joined, write_block
from yuzogpt.data.blocks import PreparedCorpus
from yuzogpt.data.manifest import Block, Manifest
from yuzogpt.data.preparation.plan import Plan
from yuzogpt.data.preparation.records import write_times
from yuzogpt.data.preparation.shards import UnitRecord
from yuzogpt.data.preparation.sources import Unit
from yuzogpt.data.preparation.splits import nanogpt_val_rows
from yuzogpt.storage.atomic_files import sync_directory, write_durably

TOKENS_PER_MOVE = 2**20

# Rows of staged train blocks, by their files.
Rows = dict[str, list[int]]


def commit(plan: Plan) -> PreparedCorpus:
    """Gather, name and commit what the units wrote."""
    pa.default_memory_pool().release_unused()  # memory of units that ran in this process
    done = [(unit, finished_record(plan, unit)) for unit in plan.listing.units]
    staged = [block for _, record in done for block in record.train]
    is_val_empty = not any(record.val for _, record in done)
    by_content = is_val_empty and not plan.shard_config.split.is_shuffled
    moved = smallest_by_hash([record for _, record in done]) if by_content else {}
    written = write_train(plan, staged, moved)
    written += write_val(plan, itertools.chain(held_out(plan, done), take_documents(plan, moved)))
    sync_directory(plan.directory)
    write_durably(plan.directory / blocks.TOKENIZER, tokenization.to_bytes(plan.tokenizer))
    write_times(plan.directory, plan.listing.files)
    manifest = make_manifest(plan, [record for _, record in done], written)
    write_durably(plan.directory / blocks.MANIFEST, manifest.to_bytes())
    blocks.clear_staging(plan.directory)
    return blocks.open_corpus(plan.directory)


def finished_record(plan: Plan, unit: Unit) -> UnitRecord:
    record = plan.record(unit)
    assert record is not None, f"unit {unit.index} is not done"
    return record


def smallest_by_hash(records: Sequence[UnitRecord]) -> Rows:
    """Return the rows of the document with the smallest SHA-256: it is held out if no other is.

    A slightly larger val_fraction would hold it out, too. Its copies come with it. Empty if all
    documents are copies of one.
    """
    smallest = min((r.least_digest for r in records if r.least_digest), default="")
    rows: Rows = {}
    for record in (record for record in records if record.least_digest == smallest):
        ends = np.cumsum([block.documents for block in record.train])
        for row in record.least_rows:
            index = int(np.searchsorted(ends, row, side="right"))
            block = record.train[index]
            rows.setdefault(block.file, []).append(row - int(ends[index]) + block.documents)
    total = sum(block.documents for record in records for block in record.train)
    return {} if sum(map(len, rows.values())) == total else rows


def take_documents(plan: Plan, rows: Rows) -> Iterator[pa.ListArray]:
    """Yield documents of staged train blocks."""
    for file, indices in rows.items():
        yield map_documents(plan.staging / file).take(pa.array(indices))


def write_train(plan: Plan, staged: Sequence[Block], without: Rows) -> list[Block]:
    """Give train blocks their names in the corpus; those with rows of `without` lose them."""
    written: list[Block] = []
    for block in staged:
        rows = without.get(block.file, [])
        if not rows:
            written.append(name_block(plan, block, len(written)))
        elif len(rows) < block.documents:
            path = plan.directory / blocks.block_name("train", len(written))
            staged_path = plan.staging / block.file
            written.append(write_block(path, "train", without_rows(staged_path, rows)))
    return written


def without_rows(path: Path, rows: Sequence[int]) -> pa.ListArray:
    """Return the documents of a block except those of some rows, which ascend.

    The block is read once and the kept tokens are moved within its memory: a copy would raise the
    peak of a whole preparation.
    """
    documents = map_documents(path)  # which validates it
    offsets = np.frombuffer(documents.buffers()[1], np.int32, len(documents) + 1)
    content = bytearray(path.stat().st_size)
    with path.open("rb") as file:
        file.readinto(content)
    whole = pa.py_buffer(content)
    values = pa.ipc.open_file(pa.BufferReader(whole)).get_batch(0).column(0).values
    dtype = np.dtype(values.type.to_pandas_dtype())
    offset = values.buffers()[1].address - whole.address
    tokens = np.frombuffer(content, dtype, len(values), offset)
    end = 0
    for before, row in zip((-1, *rows), (*rows, len(documents)), strict=True):
        for start in range(offsets[before + 1], offsets[row], TOKENS_PER_MOVE):
            piece = tokens[start : min(start + TOKENS_PER_MOVE, offsets[row])]
            tokens[end : end + len(piece)] = piece
            end += len(piece)
    lengths = np.delete(np.diff(offsets), rows)
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return from_offsets(ends, pa.array(tokens[:end]))


def name_block(plan: Plan, block: Block, index: int) -> Block:
    """Give a train block its name in the corpus; its staged name stays until the end."""
    name = blocks.block_name("train", index)
    final = plan.directory / name
    final.unlink(missing_ok=True)
    try:
        os.link(plan.staging / block.file, final)
    except OSError:  # a file system without hard links
        (plan.staging / block.file).rename(final)
    return replace(block, file=name)


def write_val(plan: Plan, chunks: Iterable[pa.ListArray]) -> list[Block]:
    """Write the held-out documents of all units."""
    name = functools.partial(blocks.block_name, "val")
    writer = BlockWriter(plan.directory, "val", plan.shard_config.block_tokens, name)
    for documents in chunks:
        writer.add(documents)
    return writer.finish()


def held_out(plan: Plan, done: list[tuple[Unit, UnitRecord]]) -> Iterator[pa.ListArray]:
    """Yield the held-out documents, in the order of the source or of nanoGPT's shuffle."""
    split = plan.shard_config.split
    parts = ((unit, record, read_staged(plan, record)) for unit, record in done if record.val)
    if not split.is_shuffled:
        for _, _, documents in parts:
            yield documents
        return
    assert split.documents is not None
    by_row: dict[int, pa.ListArray] = {}
    for unit, record, documents in parts:
        assert unit.first_row is not None
        for index, row in enumerate(record.val_rows):
            by_row[unit.first_row + row] = documents[index : index + 1]
    for row in nanogpt_val_rows(split.documents, split.fraction).tolist():
        if row in by_row:  # else it was rejected
            yield by_row[row]


def read_staged(plan: Plan, record: UnitRecord) -> pa.ListArray:
    """Return the held-out documents of a unit."""
    chunks = [
        map_documents(plan.staging / block.file, block.documents, block.tokens)
        for block in record.val
    ]
    return chunks[0] if len(chunks) == 1 else joined(chunks)  # mapped, not copied


def make_manifest(plan: Plan, records: list[UnitRecord], written: list[Block]) -> Manifest:
    """Return the manifest: what the corpus is, and where every document of the source went."""
    listing = plan.listing
    digests = "".join(record.sha256 for record in records)
    rejected = sum((Counter(record.rejected) for record in records), Counter())
    return Manifest(
        corpus=plan.corpus,
        tokenizer=tokenization.describe(plan.tokenizer),
        source={
            "name": listing.name,
            "files": [{"name": file.name, "bytes": file.bytes} for file in listing.files],
            "documents": sum(record.documents for record in records),
            "bytes": sum(record.bytes for record in records),
            "sha256": hashlib.sha256(bytes.fromhex(digests)).hexdigest(),
            "settings": plan.settings,
        },
        split_rule=plan.shard_config.split.name,
        append_end_of_text=True,
        blocks=written,
        rejected=dict(sorted(rejected.items())),
    )
