"""Shows what a prepared corpus holds, verifies it, or exports nanoGPT's train.bin and val.bin."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from yuzogpt.console import terminal
from yuzogpt.console.terminal import say
from yuzogpt.data.block_files import check_ids
from yuzogpt.data.blocks import PreparedCorpus
from yuzogpt.data.preparation.records import recorded_source
from yuzogpt.errors import UserError
from yuzogpt.storage.atomic_files import naming

SHOWN_CHARACTERS = 200  # of each document
BAR_WIDTH = 40  # characters of the longest bar
SPLITS = ("train", "val")


def show(corpus: PreparedCorpus, examples: int) -> None:
    """Print a corpus's identity, counts, lengths of documents and `examples` of its documents."""
    corpus.check()
    manifest = corpus.manifest
    source, tokenizer = recorded_source(corpus), manifest.tokenizer
    say(f"{manifest.corpus} in {corpus.directory}")
    say(f"source: {source.name}, {source.bytes:,} bytes, SHA-256 {source.sha256[:12]}")
    say(f"tokenizer: {tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens")
    say(f"split rule: {manifest.split_rule}; fingerprint {corpus.fingerprint[:12]}")
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in manifest.rejected.items())
    say(f"rejected documents: {rejected or 'none'}\n")
    columns = ("split", "blocks", "documents", "tokens", "bytes")
    rows = [count_row(corpus, split) for split in SPLITS]
    terminal.console().print(terminal.table(columns, rows, numeric=columns[1:]))
    say("\ntokens of a document, end of text included:")
    for line in histogram(lengths(corpus)):
        say(line)
    for title, text in sample_documents(corpus, examples):
        say(f"\n--- {title}")
        say(text)


def count_row(corpus: PreparedCorpus, split: str) -> list[str]:
    """Return a split's row of the table: blocks, documents, tokens and bytes."""
    chosen = [block for block in corpus.manifest.blocks if block.split == split]
    counts = (
        len(chosen),
        sum(block.documents for block in chosen),
        sum(block.tokens for block in chosen),
        sum(block.bytes for block in chosen),
    )
    return [split, *(f"{count:,}" for count in counts)]


def documents(corpus: PreparedCorpus, split: str) -> Iterator[pa.ListArray]:
    """Yield the documents of each block of a split, memory-mapped."""
    for block in corpus.manifest.blocks:
        if block.split == split:
            yield corpus.documents(block)


def lengths(corpus: PreparedCorpus) -> npt.NDArray[np.int64]:
    """Return the number of tokens of every document, shape (documents,)."""
    by_block = [
        np.diff(column.offsets.to_numpy())
        for split in SPLITS
        for column in documents(corpus, split)
    ]
    return np.concatenate([np.empty(0, np.int64), *by_block]).astype(np.int64)


def histogram(counts: npt.NDArray[np.int64]) -> list[str]:
    """Return one line with a bar for each power of two, from the smallest that is not empty."""
    if not len(counts):
        return ["  no documents"]
    powers = np.ceil(np.log2(np.maximum(counts, 1))).astype(int)
    bins = np.bincount(powers)
    first = int(np.flatnonzero(bins)[0])
    return [
        f"  up to {2**power:>10,}  {number:>12,}  {'#' * round(BAR_WIDTH * number / bins.max())}"
        for power, number in enumerate(bins)
        if power >= first
    ]


def sample_documents(corpus: PreparedCorpus, count: int) -> Iterator[tuple[str, str]]:
    """Yield titles and beginnings of evenly spaced documents of the train split."""
    chosen = [block for block in corpus.manifest.blocks if block.split == "train"]
    total = sum(block.documents for block in chosen)
    for row in sorted({total * nth // count for nth in range(min(count, total))}):
        index = row
        for block in chosen:
            if index < block.documents:
                ids = corpus.documents(block)[index].values.to_numpy()
                shown = ids[:SHOWN_CHARACTERS]
                check_ids(corpus.directory / block.file, shown, corpus.vocab_size)
                text = corpus.tokenizer.decode(shown.tolist())
                is_cut = len(ids) > SHOWN_CHARACTERS or len(text) > SHOWN_CHARACTERS
                end = " ..." if is_cut else ""
                yield f"document {row:,}, {len(ids):,} tokens", text[:SHOWN_CHARACTERS] + end
                break
            index -= block.documents


def verify(corpus: PreparedCorpus) -> str:
    """Hash every block again; UserError names the first that is damaged."""
    corpus.verify(reread=True)
    size = sum(block.bytes for block in corpus.manifest.blocks)
    return f"verified: {len(corpus.manifest.blocks):,} blocks, {size:,} bytes, all as they were"


def export_bin(corpus: PreparedCorpus) -> list[Path]:
    """Write train.bin and val.bin beside the blocks, as nanoGPT's data loader reads them."""
    if corpus.manifest.tokenizer["vocab_size"] > 2**16:
        raise UserError(f"{corpus.directory}: nanoGPT's format holds 16-bit tokens only")
    corpus.verify()
    written = []
    for split in SPLITS:
        path = corpus.directory / f"{split}.bin"
        temporary = path.with_name(f".{path.name}.tmp")
        with naming(path), temporary.open("wb") as file:
            for column in documents(corpus, split):
                file.write(column.values.to_numpy())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        written.append(path)
    return written
