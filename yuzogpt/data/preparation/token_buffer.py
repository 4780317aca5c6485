"""A growing array of tokens: those of a document or a block, held once while they are gathered."""

import numpy as np
import numpy.typing as npt

from yuzogpt.tokenization.tokenizer import Ids

MAX_RESERVED = 2**26  # tokens


class TokenBuffer:
    """An array of tokens that grows."""

    def __init__(self, dtype: npt.DTypeLike, capacity: int = 2**16) -> None:
        """`capacity`: tokens that fit without a copy; memory is used only as they come."""
        self.array = np.empty(min(capacity, MAX_RESERVED), dtype)
        self.size = 0

    def append(self, ids: Ids) -> None:
        """Add tokens at the end."""
        needed = self.size + len(ids)
        if needed > len(self.array):  # the system gives memory when it is written to
            grown = np.empty(max(needed, 2 * len(self.array)), self.array.dtype)
            grown[: self.size] = self.tokens
            self.array = grown
        self.array[self.size : needed] = ids
        self.size = needed

    def drop(self, count: int) -> None:
        """Remove the first tokens."""
        self.size -= count
        self.array[: self.size] = self.array[count : count + self.size].copy()

    @property
    def tokens(self) -> Ids:
        """All tokens: a view, until more are added or some dropped."""
        return self.array[: self.size]
