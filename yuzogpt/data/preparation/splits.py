"""Which documents are held out for validation: the split rules.

tail     the last tenth of the characters: both Shakespeares, as in nanoGPT
nanogpt  a shuffle with seed 2357 of all documents, its first 0.05% held out: OpenWebText
hash     by each document's own SHA-256, so that the split needs no count and no order; if it
         would hold out none, the document with the smallest is held out (commit.py)
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

TAIL_FRACTION = 0.1
NANOGPT_SEED = 2357
VAL_FRACTION = 0.0005  # nanoGPT's, for OpenWebText

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

    rule: Literal["nanogpt", "hash"]
    fraction: float
    documents: int | None  # in the whole source; only the nanogpt rule needs it

    @property
    def name(self) -> str:
        """Its name in the manifest."""
        return f"{self.rule} {self.fraction}"

    def is_val(self, first_row: int | None, digests: list[bytes]) -> Mask:
        """Return which of consecutive documents are held out, shape (documents,)."""
        if self.rule == "hash":
            numbers = np.frombuffer(b"".join(digest[:8] for digest in digests), ">u8")
            return np.asarray(numbers < np.uint64(self.fraction * 2**64))
        assert first_row is not None
        assert self.documents is not None
        held_out = sorted_val_rows(self.documents, self.fraction)
        low, high = np.searchsorted(held_out, [first_row, first_row + len(digests)])
        mask = np.zeros(len(digests), np.bool_)
        mask[held_out[low:high] - first_row] = True
        return mask
