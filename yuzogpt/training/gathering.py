"""Tensors for a checkpoint's files: which rank writes which, gathered from the shards of all ranks.

ddp     rank 0 holds everything, and writes one file
fsdp    each rank writes one file of whole tensors, gathered from all ranks one by one
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from yuzogpt.checkpoints.format import MODEL
from yuzogpt.runtime.world import World
from yuzogpt.training.parallel import shard_rows

NamedTensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class FileLayout:
    """The tensors in each file of a checkpoint, for the weights and for the optimizer's state."""

    live: Mapping[str, NamedTensors]  # by kind of file: the tensors as training uses them
    parts: list[list[str]]  # for each file, which is for each rank that writes: names of weights

    def names(self, kind: str, part: int) -> list[str]:
        """Return the tensors of a file: its weights, or the optimizer's state of these."""
        weights = self.parts[part]
        if kind == MODEL:
            return weights
        in_part = set(weights)
        return [path for path in self.live[kind] if path.partition("/")[2] in in_part]

    def gathered_tensors(self, kind: str, copies: NamedTensors, world: World) -> Iterator[Tensor]:
        """Yield the whole tensors of this rank's file; take part in gathering the other ranks'.

        The ranks take turns tensor by tensor, so that all write at the same time.
        """
        names = [self.names(kind, part) for part in range(len(self.parts))]
        for turn in itertools.zip_longest(*names):
            for owner, name in enumerate(turn):
                if name is None:
                    continue
                if len(self.parts) > 1:
                    whole = gather(copies[name], self.live[kind][name], owner, world)
                else:
                    whole = copies.get(name)
                if whole is not None and owner == world.rank:
                    yield whole


def gather(copy: Tensor, live: Tensor, owner: int, world: World) -> Tensor | None:
    """Return a whole tensor on rank `owner`, from the copies of all ranks' shards."""
    if not isinstance(live, DTensor):  # such as AdamW's count of steps
        return copy
    rows = len(shard_rows(live.shape[0], 0, world.size))
    padded = torch.zeros(rows, *live.shape[1:], dtype=copy.dtype)
    padded[: len(copy)] = copy
    is_owner = owner == world.rank
    shards = [torch.empty_like(padded) for _ in range(world.size)] if is_owner else None
    dist.gather(padded, shards, dst=owner, group=world.group)
    return torch.cat(shards)[: live.shape[0]] if shards else None


def partition_by_size(tensors: NamedTensors, parts: int) -> list[list[str]]:
    """Split names into parts of about equally many elements, each with at least one tensor."""
    parts = min(parts, len(tensors))
    names: list[list[str]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].numel()):
        smallest = sizes.index(min(sizes))
        names[smallest].append(name)
        sizes[smallest] += tensor.numel()
    order = {name: index for index, name in enumerate(tensors)}
    return [sorted(part, key=order.__getitem__) for part in names]
