"""The world of workers: how many there are, and which of them this process is.

In: what a launcher knows (torchrun's variables, Ray Train's context, or nothing). Out: a `World`
that shares out rows and adds up numbers. Everything else is the same under every launcher.
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

# For what the watchdog does not see; a checkpoint's writers wait for each other on slow storage.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The set of training workers, and which of them this process is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: dist.ProcessGroup | None = None  # whom the collectives go through; None: the default

    @classmethod
    def of_torchrun(cls) -> "World":
        """Read the variables that torchrun sets; one worker, if there are none."""
        found = ranks.of_torchrun() or ranks.Ranks()
        return cls(found.rank, found.size, found.local_rank, found.local_size)

    def share(self, rows: int) -> range:
        """Return which rows of a global batch this rank computes; sizes differ by at most one."""
        return range(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)

    def sum(self, value: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value, group=self.group)
        return value

    def batches(self, rows: int, batch_size: int) -> list[range]:
        """Cut this rank's share of a global batch into batches: equally many on every rank.

        So that all take part in the same collectives, a rank that has a row less than others may
        end with an empty batch.
        """
        share, most = self.share(rows), math.ceil(rows / self.size)
        count = math.ceil(most / batch_size)
        starts = [min(share.start + index * batch_size, share.stop) for index in range(count + 1)]
        return [range(start, stop) for start, stop in itertools.pairwise(starts)]

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, group=self.group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextlib.contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Raise a UserError of any rank on every rank, so that none waits for one that is gone."""
        mistake: str | None = None
        try:
            yield
        except UserError as error:
            mistake = str(error)
        for found in self.gather(mistake):
            if found is not None:
                raise UserError(found)
