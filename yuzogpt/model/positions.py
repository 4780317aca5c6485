"""Where tokens stand: the one way in which positions enter the model, its attention and its cache.

In: activations, and the position of each token in its context, counted from 0. Out: activations
that know them. A kind of positions acts in one or more of three places: on what enters the first
layer (`add`), on queries and keys (`turn`), on the scores of attention (`bias`). Keys are cached
after `turn`. Learned positions act in the first place only.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class Positions(Protocol):
    """One kind of positions."""

    def add(self, x: Tensor, at: Tensor) -> Tensor:
        """(B, T, C) -> the same; `at`: (T,) or (B, T)."""

    def turn(self, x: Tensor, at: Tensor) -> Tensor:
        """Queries or keys, (B, H, T, D) -> the same."""

    def bias(self, queries_at: Tensor, keys_at: Tensor) -> Tensor | None:
        """Return what is added to scores, (H, Tq, Tk), for positions (Tq,) and (Tk,)."""


class Cache(Protocol):
    """Keys and values of earlier tokens."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
        """Keep k and v; return what q sees, (B, H, T, D), as they all are."""


@dataclass(frozen=True)
class Place:
    """Where the tokens of a forward pass stand, and what is kept of those before them."""

    positions: Positions
    at: Tensor  # (T,), or (B, T) with a cache
    cache: Cache | None = None


class LearnedPositions(nn.Embedding):
    """A vector for each position, added to the tokens' own (GPT-2)."""

    def add(self, x: Tensor, at: Tensor) -> Tensor:
        """(B, T, C) -> the same."""
        added: Tensor = x + self(at)
        return added

    def turn(self, x: Tensor, at: Tensor) -> Tensor:
        """Leave queries and keys as they are."""
        return x

    def bias(self, queries_at: Tensor, keys_at: Tensor) -> Tensor | None:
        """Leave scores as they are."""
        return None


def causal_mask(queries_at: Tensor, keys_at: Tensor, bias: Tensor | None) -> Tensor:
    """Return what is added to scores, (Tq, Tk) or (H, Tq, Tk): `bias`, and no key that is later."""
    later = keys_at > queries_at[:, None]
    if bias is None:
        bias = torch.zeros(later.shape, device=later.device)
    return bias.masked_fill(later, -math.inf)
