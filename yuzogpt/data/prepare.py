"""From a source to a prepared corpus, in this process: for corpora that fit in memory.

In: the corpus settings. Out: a directory of Arrow blocks with its manifest. The same command again
finds the manifest and does nothing; another source in the same directory is refused.
"""

from pathlib import Path

import numpy as np

from yuzogpt import tokenizers
from yuzogpt.config import CorpusSettings
from yuzogpt.data import blocks
from yuzogpt.data.blocks import Block, Manifest, PreparedCorpus
from yuzogpt.data.corpora import Corpus, Source, find_corpus, read_text_file
from yuzogpt.errors import UserError
from yuzogpt.files import write_durably
from yuzogpt.lease import Lease
from yuzogpt.tokenizers import CharTokenizer, Ids, Tokenizer, gpt2_tokenizer

TAIL_FRACTION = 0.1  # nanoGPT's Shakespeare: the last tenth of the characters is val
TOKENS_PER_BLOCK = 2**27


def prepare(settings: CorpusSettings, directory: Path) -> tuple[PreparedCorpus, bool]:
    """Prepare a corpus in `directory`; return it, and whether anything had to be done.

    Raises UserError if the directory holds another corpus, unless `overwrite`.
    """
    corpus = find_corpus(settings.dataset, settings.tokenizer, bool(settings.source))
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
        refuse_other(found, "source", manifest.source["sha256"], source.identity["sha256"])
        refuse_other(found, "tokenizer", manifest.tokenizer["kind"], tokenizer.kind)
        return found, False
    with Lease(directory):
        if (directory / blocks.MANIFEST).exists() and not settings.overwrite:
            raise UserError(f"{directory}: another command prepared it just now; run this again")
        blocks.clear(directory)
        return write_corpus(corpus, source, tokenizer, directory), True


def build_tokenizer(corpus: Corpus, source: Source) -> Tokenizer:
    """Return the corpus's tokenizer; a character vocabulary is that of the whole source."""
    if corpus.tokenizer == "char":
        return CharTokenizer.of_text("".join(source.documents))
    return gpt2_tokenizer()


def refuse_other(found: PreparedCorpus, what: str, old: str, new: str) -> None:
    """Raise UserError if the directory was prepared from something else."""
    if old != new:
        raise UserError(
            f"{found.directory}: holds a corpus with another {what}: {old}, not {new}; "
            "--overwrite replaces it, --data_dir=DIR keeps both"
        )


def write_corpus(
    corpus: Corpus, source: Source, tokenizer: Tokenizer, directory: Path
) -> PreparedCorpus:
    """Tokenize, split, write the blocks, and last the manifest."""
    splits = dict(zip(("train", "val"), split_tail(source.documents), strict=True))
    dtype = tokenizers.id_dtype(tokenizer.vocab_size)
    written: list[Block] = []
    for split, documents in splits.items():
        ids = [encode(document, tokenizer, corpus.append_end_of_text) for document in documents]
        for index, group in enumerate(group_by_size(ids)):
            path = directory / blocks.block_name(split, index)
            written.append(blocks.write_block(path, split, group, dtype))
    write_durably(directory / blocks.TOKENIZER, tokenizers.to_bytes(tokenizer))
    manifest = Manifest(
        corpus=corpus.name,
        tokenizer={
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text,
            "fingerprint": tokenizers.fingerprint(tokenizer),
        },
        source=source.identity,
        split_rule=corpus.split_rule,
        append_end_of_text=corpus.append_end_of_text,
        blocks=written,
        rejected={},
    )
    write_durably(directory / blocks.MANIFEST, manifest.to_bytes())
    return blocks.open_corpus(directory)


def split_tail(documents: list[str]) -> tuple[list[str], list[str]]:
    """Cut off the last tenth of the characters, in the middle of a document if need be."""
    cut = int(sum(map(len, documents)) * (1 - TAIL_FRACTION))
    train, val = [], []
    for document in documents:
        head, tail = document[:cut], document[cut:]
        cut = max(0, cut - len(document))
        if head:
            train.append(head)
        if tail:
            val.append(tail)
    return train, val


def encode(document: str, tokenizer: Tokenizer, append_end_of_text: bool) -> Ids:
    """Tokenize one document."""
    ids = tokenizer.encode(document)
    if append_end_of_text:
        assert tokenizer.end_of_text is not None
        return np.append(ids, np.array(tokenizer.end_of_text, ids.dtype))
    return ids


def group_by_size(documents: list[Ids]) -> list[list[Ids]]:
    """Put whole documents together into blocks of about TOKENS_PER_BLOCK tokens."""
    groups: list[list[Ids]] = [[]]
    size = 0
    for document in documents:
        if groups[-1] and size + len(document) > TOKENS_PER_BLOCK:
            groups.append([])
            size = 0
        groups[-1].append(document)
        size += len(document)
    return groups
