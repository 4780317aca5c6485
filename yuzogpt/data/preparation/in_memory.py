"""Prepares one text in memory, in this process: the text is read, split, tokenized and written.

Out: a directory of Arrow blocks with its manifest, as blocks.py describes it.
"""

import functools
from pathlib import Path
from typing import Any

from yuzogpt import tokenization
from yuzogpt.config import CorpusSettings
from yuzogpt.data import blocks
from yuzogpt.data.block_writer import BlockWriter, list_array
from yuzogpt.data.blocks import PreparedCorpus
from yuzogpt.data.manifest import Block, Manifest
from yuzogpt.data.preparation.corpora import Corpus, Source, read_text_file
from yuzogpt.data.preparation.finished import (
    check_same,
    check_same_text,
    open_finished,
    write_lease,
)
from yuzogpt.data.preparation.plan import check_disk_space, cleared_bytes
from yuzogpt.data.preparation.splits import split_tail
from yuzogpt.errors import UserError
from yuzogpt.storage.atomic_files import write_durably
from yuzogpt.tokenization.tokenizer import CharTokenizer, Ids, Tokenizer, gpt2_tokenizer

TOKENS_PER_BLOCK = 2**27


def prepare_in_memory(
    settings: CorpusSettings, corpus: Corpus, directory: Path
) -> tuple[PreparedCorpus, bool]:
    """Prepare a corpus in `directory`; return it, and whether anything had to be done.

    Raises UserError if the directory holds another corpus, unless `overwrite`.
    """
    overwrite = settings.overwrite
    finished = open_finished(corpus, directory, overwrite=overwrite)
    if finished and not settings.source:  # do not download again what is prepared already
        return finished, False
    if settings.source:
        source = read_text_file(Path(settings.source))
    else:
        assert corpus.download is not None
        source = corpus.download()
    if not all(split_tail(source.documents)):
        raise UserError(f"{settings.dataset}: the text is too short to split")
    tokenizer = build_tokenizer(corpus, source)
    if finished:
        check_same_text(finished, source)
        check_same(finished, "tokenizer", finished.manifest.tokenizer["kind"], tokenizer.kind)
        return finished, False
    encoded = encode(source, tokenizer)
    size = sum(ids.nbytes for documents in encoded.values() for ids in documents)
    check_disk_space(directory, size - cleared_bytes(directory, overwrite))
    with write_lease(directory, overwrite=overwrite):
        if (directory / blocks.STAGING / blocks.PLAN).exists() and not overwrite:
            raise UserError(
                f"{directory}: holds an interrupted preparation of another source; --overwrite "
                "replaces it, --data_dir=DIR keeps both"
            )
        blocks.clear(directory)
        return write_corpus(corpus.name, source.identity, tokenizer, encoded, directory), True


def build_tokenizer(corpus: Corpus, source: Source) -> Tokenizer:
    """Return the corpus's tokenizer; a char tokenizer has the characters of the whole source."""
    if corpus.tokenizer == "char":
        return CharTokenizer.from_text("".join(source.documents))
    return gpt2_tokenizer()


def encode(source: Source, tokenizer: Tokenizer) -> dict[str, list[Ids]]:
    """Split and tokenize; return the ids of each split's documents."""
    splits = zip(("train", "val"), split_tail(source.documents), strict=True)
    return {split: [tokenizer.encode(text) for text in texts] for split, texts in splits}


def write_corpus(
    name: str,
    source: dict[str, Any],
    tokenizer: Tokenizer,
    encoded: dict[str, list[Ids]],
    directory: Path,
) -> PreparedCorpus:
    """Write the blocks, and last the manifest, in which `source` identifies the text."""
    dtype = tokenization.id_dtype(tokenizer.vocab_size)
    written: list[Block] = []
    for split, documents in encoded.items():
        block_name = functools.partial(blocks.block_name, split)
        writer = BlockWriter(directory, split, TOKENS_PER_BLOCK, block_name)
        writer.add(list_array(documents, dtype))
        written += writer.finish()
    write_durably(directory / blocks.TOKENIZER, tokenization.to_bytes(tokenizer))
    manifest = Manifest(
        corpus=name,
        tokenizer=tokenization.describe(tokenizer),
        source=source,
        split_rule="tail",
        append_end_of_text=False,
        blocks=written,
        rejected={},
    )
    write_durably(directory / blocks.MANIFEST, manifest.to_bytes())
    return blocks.open_corpus(directory)
