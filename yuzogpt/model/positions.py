"""Where tokens stand: the one way in which positions enter the model, its attention and its cache.

In: activations, and the position of each token in its context, counted from 0. Out: activations
that know them. A kind of positions acts in one or more of three places: on what enters the first
layer (`add`), on queries and keys (`rotation`), on the scores of attention (`bias`). Keys are
cached after they are turned.

    learned   a vector for each position, added to the tokens' own (GPT-2); none past block_size
    rotary    queries and keys are turned by angles that grow with the position, so that their
              product depends on the distance (RoFormer; Su et al., 2021)
    alibi     the further back a key, the lower its score, in each head at another rate
              (Press et al., 2022)
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yuzogpt.config import ModelSettings

ROTARY_BASE = 10_000.0  # the slowest pair of channels turns once in 2 pi times this many tokens


class Positions(nn.Module):
    """One kind of positions; each overrides what it acts on."""

    def add(self, x: Tensor, at: Tensor) -> Tensor:
        """(B, T, C) -> the same; `at`: (T,) or (B, T)."""
        return x

    def rotation(self, at: Tensor) -> Tensor | None:
        """Return cosine and sine of each pair of channels, (2, T, D / 2) or (2, B, 1, T, D / 2)."""
        return None

    def bias(self, queries_at: Tensor, keys_at: Tensor) -> Tensor | None:
        """Return what is added to scores, (1, H, Tq, Tk), for positions (Tq,) and (Tk,)."""
        return None


class LearnedPositions(Positions):
    """A vector for each position, added to the tokens' own."""

    def __init__(self, settings: ModelSettings) -> None:
        """Room for block_size positions."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(settings.block_size, settings.n_embd))

    def add(self, x: Tensor, at: Tensor) -> Tensor:
        """(B, T, C) -> the same."""
        return x + F.embedding(at, self.weight)


class RotaryPositions(Positions):
    """Queries and keys are turned; channels i and i + D / 2 are a pair, as in GPT-NeoX."""

    def __init__(self, settings: ModelSettings) -> None:
        """No weights: angles are computed where they are needed."""
        super().__init__()
        self.pairs = settings.n_embd // settings.n_head // 2

    def rotation(self, at: Tensor) -> Tensor:
        """Return cosine and sine of `at` * base^(-pair / pairs)."""
        pair = torch.arange(self.pairs, device=at.device, dtype=torch.float32)
        frequencies = torch.exp(pair * (-math.log(ROTARY_BASE) / self.pairs))
        angles = at[..., None].float() * frequencies  # (T, D / 2), or (B, T, D / 2)
        if at.dim() == 2:
            angles = angles[:, None]  # for all heads
        return torch.stack((angles.cos(), angles.sin()))


class AlibiPositions(Positions):
    """Scores fall with the distance, in each head at another rate."""

    def __init__(self, settings: ModelSettings) -> None:
        """No weights: slopes are computed where they are needed."""
        super().__init__()
        self.heads = settings.n_head

    def bias(self, queries_at: Tensor, keys_at: Tensor) -> Tensor:
        """Return -slope * distance, (1, H, Tq, Tk): with three dimensions, CPUs have no kernel."""
        distance = (queries_at[:, None] - keys_at).float()
        return -self.slopes(queries_at.device)[None, :, None, None] * distance

    def slopes(self, device: torch.device) -> Tensor:
        """Return the rate of each head, (H,).

        2^(-8 / n), 2^(-16 / n), ... for n heads, a power of two; further heads take every other of
        the series for 2n.
        """
        power = 1 << (self.heads.bit_length() - 1)
        head = torch.arange(self.heads, device=device, dtype=torch.float32)
        exponents = torch.where(
            head < power, -8 * (head + 1) / power, -4 * (2 * (head - power) + 1) / power
        )
        return torch.exp2(exponents)


KINDS: dict[str, type[Positions]] = {
    "learned": LearnedPositions,
    "rotary": RotaryPositions,
    "alibi": AlibiPositions,
}


class Cache(Protocol):
    """Keys and values of earlier tokens."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
        """Keep k and v; return what q sees, (B, H, T, D), as they all are."""


@dataclass(frozen=True)
class Place:
    """Where the tokens of a forward pass stand: found once, used by every layer."""

    positions: Positions
    rotation: Tensor | None
    mask: Tensor | None  # what is added to scores, (T, T) or (1, H, T, T); None: causal, no more
    cache: Cache | None = None  # what is kept of the tokens before

    def turn(self, x: Tensor) -> Tensor:
        """Turn queries or keys, (B, H, T, D)."""
        if self.rotation is None:
            return x
        cos, sin = self.rotation
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return turned.to(x.dtype)


def causal_mask(queries_at: Tensor, keys_at: Tensor, bias: Tensor | None) -> Tensor:
    """Return what is added to scores, (Tq, Tk) or (1, H, Tq, Tk): `bias`, and no later key."""
    later = keys_at > queries_at[:, None]
    if bias is None:
        bias = torch.zeros(later.shape, device=later.device)
    return bias.masked_fill(later, -math.inf)
