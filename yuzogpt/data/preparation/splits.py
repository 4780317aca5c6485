"""Which documents are held out for validation: the split rules.

tail     the last tenth of the characters: both Shakespeares, as in nanoGPT
nanogpt  a shuffle with seed 2357 of all documents, its first 0.05% held out: OpenWebText
hash     by each document's own SHA-256, so that the split needs no count and no order

If a rule by content would hold out none, the document with the smallest SHA-256 is held out
(commit.py).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from yuzogpt.config.registry import Registry

TAIL_FRACTION = 0.1
NANOGPT_SEED = 2357

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]


def split_tail(documents: list[str]) -> tuple[list[str], list[str]]:
    """Cut off the last tenth of the characters, in the middle of a document if necessary."""
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


def nanogpt_val_rows(documents: int, fraction: float) -> Rows:
    """Return the rows that nanoGPT holds out, in the order of its val.bin.

    The same as `train_test_split(test_size=fraction, seed=2357, shuffle=True)["test"]` of the
    `datasets` library, which nanoGPT calls: numpy's PCG64 permutes the rows, the first
    ceil(fraction * documents) are the test split. One document at least stays in train.
    """
    count = min(math.ceil(fraction * documents), max(0, documents - 1))
    return np.random.default_rng(NANOGPT_SEED).permutation(documents)[:count].astype(np.int64)


@functools.lru_cache(maxsize=1)
def sorted_val_rows(documents: int, fraction: float) -> Rows:
    """Return the rows that nanoGPT holds out, ascending."""
    return np.sort(nanogpt_val_rows(documents, fraction))


@dataclass(frozen=True)
class Split:
    """Decides for each document, in any task, whether it is held out."""

    rule: str
    fraction: float
    documents: int | None  # in the whole source; only a shuffle needs it

    @property
    def name(self) -> str:
        """Its name in the manifest."""
        return f"{self.rule} {self.fraction}"

    @property
    def is_shuffled(self) -> bool:
        """Whether it decides by a document's row, and orders the val split; else by content."""
        return SPLIT_RULES.has(self.rule, "is_shuffled")

    def is_val(self, first_row: int | None, digests: list[bytes]) -> Mask:
        """Return which of consecutive documents are held out, shape (documents,)."""
        return SPLIT_RULES[self.rule](self, first_row, digests)


# From the row of the first document, which only a shuffle knows, and the SHA-256 of each.
SplitRule = Callable[[Split, int | None, list[bytes]], Mask]
SPLIT_RULES = Registry[SplitRule]("split rule", "is_shuffled")


@SPLIT_RULES.register("nanogpt", help="nanoGPT's shuffle with seed 2357", is_shuffled=True)
def by_shuffle(split: Split, first_row: int | None, digests: list[bytes]) -> Mask:
    """By the document's row alone."""
    assert first_row is not None
    assert split.documents is not None
    held_out = sorted_val_rows(split.documents, split.fraction)
    low, high = np.searchsorted(held_out, [first_row, first_row + len(digests)])
    mask = np.zeros(len(digests), np.bool_)
    mask[held_out[low:high] - first_row] = True
    return mask


@SPLIT_RULES.register("hash", help="by each document's SHA-256")
def by_hash(split: Split, first_row: int | None, digests: list[bytes]) -> Mask:
    """The share of documents with the smallest first 64 bits."""
    numbers = np.frombuffer(b"".join(digest[:8] for digest in digests), ">u8")
    return np.asarray(numbers < np.uint64(split.fraction * 2**64))
