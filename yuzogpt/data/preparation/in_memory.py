"""From a source to a prepared corpus, in this process: for corpora that fit in memory.

In: the corpus settings. Out: a directory of Arrow blocks with its manifest. The same command again
finds the manifest and does nothing; another source in the same directory is refused.
"""

import functools
from pathlib import Path

from yuzogpt import tokenization
from yuzogpt.config import CorpusSettings
from yuzogpt.data import blocks
from yuzogpt.data.block_writer import BlockWriter, list_array
from yuzogpt.data.blocks import Block, Manifest, PreparedCorpus, refuse_other
from yuzogpt.data.preparation.corpora import Corpus, Source, read_text_file
from yuzogpt.data.preparation.plan import check_disk_space, cleared_bytes
from yuzogpt.data.preparation.records import source_of
from yuzogpt.data.preparation.splits import split_tail
from yuzogpt.errors import UserError
from yuzogpt.storage.atomic_files import write_durably
from yuzogpt.storage.lease import Lease
from yuzogpt.storage.run_storage import LocalStorage
from yuzogpt.tokenization.tokenizer import CharTokenizer, Ids, Tokenizer, gpt2_tokenizer

TOKENS_PER_BLOCK = 2**27
SHOWN_DIGITS = 12  # of a hash, in messages


def prepare_in_memory(
    settings: CorpusSettings, corpus: Corpus, directory: Path
) -> tuple[PreparedCorpus, bool]:
    """Prepare a corpus in `directory`; return it, and whether anything had to be done.

    Raises UserError if the directory holds another corpus, unless `overwrite`.
    """
    done = (directory / blocks.MANIFEST).exists() and not settings.overwrite
    found = blocks.open_corpus(directory) if done else None
    if found and not settings.source:  # no need to download again what is already prepared
        refuse_other(found, "corpus", found.manifest.corpus, corpus.name)
        return found, False
    if settings.source:
        source = read_text_file(Path(settings.source))
    else:
        assert corpus.download is not None
        source = corpus.download()
    if not all(split_tail(source.documents)):
        raise UserError(f"{settings.dataset}: the text is too short to split")
    tokenizer = build_tokenizer(corpus, source)
    if found:
        manifest = found.manifest
        refuse_other(found, "corpus", manifest.corpus, corpus.name)
        check_same_text(found, source)
        refuse_other(found, "tokenizer", manifest.tokenizer["kind"], tokenizer.kind)
        return found, False
    encoded = encode(source, tokenizer)
    size = sum(ids.nbytes for documents in encoded.values() for ids in documents)
    check_disk_space(directory, size - cleared_bytes(directory, settings.overwrite))
    with Lease(LocalStorage(directory)):
        if (directory / blocks.MANIFEST).exists() and not settings.overwrite:
            raise UserError(f"{directory}: another command prepared it just now; run this again")
        if (directory / blocks.STAGING / blocks.PLAN).exists() and not settings.overwrite:
            raise UserError(
                f"{directory}: holds an interrupted preparation of another source; --overwrite "
                "replaces it, --data_dir=DIR keeps both"
            )
        blocks.clear(directory)
        return write_corpus(corpus, source, tokenizer, encoded, directory), True


def check_same_text(found: PreparedCorpus, source: Source) -> None:
    """Raise UserError if a finished corpus was made from another text."""
    recorded = source_of(found)
    if recorded.files is not None:
        refuse_other(found, "source", recorded.name, "one text file")
    old, new = recorded.sha256, source.identity["sha256"]
    if old != new:
        refuse_other(found, "source", f"SHA-256 {old[:SHOWN_DIGITS]}", new[:SHOWN_DIGITS])


def build_tokenizer(corpus: Corpus, source: Source) -> Tokenizer:
    """Return the corpus's tokenizer; a character vocabulary is that of the whole source."""
    if corpus.tokenizer == "char":
        return CharTokenizer.of_text("".join(source.documents))
    return gpt2_tokenizer()


def encode(source: Source, tokenizer: Tokenizer) -> dict[str, list[Ids]]:
    """Split and tokenize; return the ids of each split's documents."""
    splits = zip(("train", "val"), split_tail(source.documents), strict=True)
    return {split: [tokenizer.encode(text) for text in texts] for split, texts in splits}


def write_corpus(
    corpus: Corpus,
    source: Source,
    tokenizer: Tokenizer,
    encoded: dict[str, list[Ids]],
    directory: Path,
) -> PreparedCorpus:
    """Write the blocks, and last the manifest."""
    dtype = tokenization.id_dtype(tokenizer.vocab_size)
    written: list[Block] = []
    for split, documents in encoded.items():
        name = functools.partial(blocks.block_name, split)
        writer = BlockWriter(directory, split, TOKENS_PER_BLOCK, name)
        writer.add(list_array(documents, dtype))
        written += writer.finish()
    write_durably(directory / blocks.TOKENIZER, tokenization.to_bytes(tokenizer))
    manifest = Manifest(
        corpus=corpus.name,
        tokenizer=tokenization.describe(tokenizer),
        source=source.identity,
        split_rule="tail",
        append_end_of_text=False,
        blocks=written,
        rejected={},
    )
    write_durably(directory / blocks.MANIFEST, manifest.to_bytes())
    return blocks.open_corpus(directory)
