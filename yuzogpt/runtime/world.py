"""The world of training workers: this process's rank, and the collectives between ranks.

A launcher creates it from torchrun's variables or Ray Train's context; everything after that is the
same under every launcher.
"""

import contextlib
import datetime
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from yuzogpt.errors import UserError
from yuzogpt.runtime import ranks

# Long, as a checkpoint's writers wait for each other on slow storage; hangs are the watchdog's.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
T = TypeVar("T")


@dataclass(frozen=True)
class World(ranks.Ranks):
    """The set of training workers, and which of them this process is (by `rank` and so on)."""

    group: dist.ProcessGroup | None = None  # of the collectives; None: the default group

    @classmethod
    def of_torchrun(cls) -> "World":
        """Read torchrun's variables; a world of one without them."""
        return cls(**vars(ranks.of_torchrun() or ranks.Ranks()))

    def rows_for_rank(self, rows: int) -> range:
        """Return this rank's rows of a global batch; the sizes of ranks differ by at most one."""
        return range(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)

    def all_reduce_(self, value: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value, group=self.group)
        return value

    def row_ranges(self, rows: int, batch_size: int) -> list[range]:
        """Split this rank's rows of a global batch into as many ranges as every other rank has.

        All ranks must take part in the same collectives, so the last range of a rank with one row
        less than others may be empty.
        """
        own, max_rows = self.rows_for_rank(rows), math.ceil(rows / self.size)
        count = math.ceil(max_rows / batch_size)
        starts = [min(own.start + index * batch_size, own.stop) for index in range(count + 1)]
        return [range(start, stop) for start, stop in itertools.pairwise(starts)]

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, group=self.group)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextlib.contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Raise a UserError of any rank on every rank, so that none waits for one that ended."""
        mistake: str | None = None
        try:
            yield
        except UserError as error:
            mistake = str(error)
        for text in self.gather(mistake):
            if text is not None:
                raise UserError(text)
