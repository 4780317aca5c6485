"""A prepared corpus of random tokens: the cost of a step does not depend on the text."""

import itertools
from pathlib import Path

import numpy as np

from yuzogpt import tokenization
from yuzogpt.checkpoints.resolve import GPT2_VOCABULARY
from yuzogpt.data.preparation.corpora import CORPORA
from yuzogpt.data.preparation.in_memory import write_corpus
from yuzogpt.errors import UserError
from yuzogpt.tokenization.tokenizer import CharTokenizer, Tokenizer, gpt2_tokenizer

FIRST_CODE_POINT = 0x4E00  # an arbitrary one
SURROGATES = range(0xD800, 0xE000)  # not characters: UTF-8 cannot encode them
MAX_CHARACTERS = 0x110000 - FIRST_CODE_POINT - len(SURROGATES)
TINYSHAKESPEARE_CHARACTERS = 65


def make_tokenizer(dataset: str, vocab_size: int) -> Tokenizer:
    """Return GPT-2's tokenizer, or one of characters if the corpus or the size needs it."""
    of_characters = dataset in CORPORA and CORPORA[dataset].tokenizer == "char"
    if vocab_size in (0, GPT2_VOCABULARY) and not of_characters:
        return gpt2_tokenizer()
    if vocab_size > MAX_CHARACTERS:
        raise UserError(
            f"--vocab_size={vocab_size}: a synthetic corpus has at most {MAX_CHARACTERS:,} tokens"
        )
    points = (point for point in range(FIRST_CODE_POINT, 0x110000) if point not in SURROGATES)
    characters = itertools.islice(points, vocab_size or TINYSHAKESPEARE_CHARACTERS)
    return CharTokenizer("".join(map(chr, characters)))


def write_random_corpus(directory: Path, tokenizer: Tokenizer, train: int, val: int) -> None:
    """Write a corpus with `train` and `val` tokens in its splits."""
    directory.mkdir(parents=True)
    dtype, generator = tokenization.id_dtype(tokenizer.vocab_size), np.random.default_rng(1)
    encoded = {
        split: [generator.integers(0, tokenizer.vocab_size, count).astype(dtype)]
        for split, count in (("train", train), ("val", val))
    }
    source = {"name": "random tokens", "sha256": ""}
    write_corpus("synthetic", source, tokenizer, encoded, directory)
