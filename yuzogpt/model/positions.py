"""Position encodings: the one interface through which positions enter the model and its cache.

An encoding acts on the embeddings (`embed_positions`), on queries and keys (`rotation`), or on the
scores of attention (`bias`). Positions count from 0. Keys are cached after they are rotated.

    learned   a vector per position, added to the token's embedding (GPT-2); none past block_size
    rotary    queries and keys are rotated by angles that grow with the position, so that their
              product depends on the distance (RoFormer; Su et al., 2021)
    alibi     scores fall with the distance of the key, at a different rate in each head
              (Press et al., 2022)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yuzogpt.config import ModelSettings
from yuzogpt.config.registry import Registry

ROTARY_BASE = 10_000.0  # the slowest pair of channels rotates once in 2 pi times this many tokens


class Positions(nn.Module):
    """A position encoding; subclasses override what they act on."""

    def embed_positions(self, x: Tensor, token_positions: Tensor) -> Tensor:
        """(B, T, C) -> the same; `token_positions`: (T,) or (B, T)."""
        return x

    def rotation(self, token_positions: Tensor) -> Tensor | None:
        """Return cosine and sine per pair of channels, (2, T, D / 2) or (2, B, 1, T, D / 2)."""
        return None

    def bias(self, query_positions: Tensor, key_positions: Tensor) -> Tensor | None:
        """Return the bias of the scores, (1, H, Tq, Tk), for positions (Tq,) and (Tk,)."""
        return None


POSITION_KINDS = Registry[Callable[[ModelSettings], Positions]]("position kind", "is_bounded")


@POSITION_KINDS.register("learned", help="a vector per position", is_bounded=True)
class LearnedPositions(Positions):
    """A learned vector per position, added to the token's embedding."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(settings.block_size, settings.n_embd))

    def embed_positions(self, x: Tensor, token_positions: Tensor) -> Tensor:
        """(B, T, C) -> the same."""
        return x + F.embedding(token_positions, self.weight)


@POSITION_KINDS.register("rotary", help="rotated queries and keys, also beyond block_size")
class RotaryPositions(Positions):
    """Rotated queries and keys; channels i and i + D / 2 are a pair, as in GPT-NeoX."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.pairs = settings.n_embd // settings.n_head // 2

    def rotation(self, token_positions: Tensor) -> Tensor:
        """Return cosine and sine of position * base^(-pair / pairs)."""
        pair = torch.arange(self.pairs, device=token_positions.device, dtype=torch.float32)
        frequencies = torch.exp(pair * (-math.log(ROTARY_BASE) / self.pairs))
        angles = token_positions[..., None].float() * frequencies  # (T, D / 2) or (B, T, D / 2)
        if token_positions.dim() == 2:
            angles = angles[:, None]  # for all heads
        return torch.stack((angles.cos(), angles.sin()))


@POSITION_KINDS.register("alibi", help="scores that fall with the distance, also beyond block_size")
class AlibiPositions(Positions):
    """Scores that fall with the distance, at a different rate in each head."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.heads = settings.n_head

    def bias(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Return -slope * distance, (1, H, Tq, Tk): a CPU has no kernel for three dimensions."""
        distance = (query_positions[:, None] - key_positions).float()
        return -self.slopes(query_positions.device)[None, :, None, None] * distance

    def slopes(self, device: torch.device) -> Tensor:
        """Return the slope of each head, (H,).

        For n heads, a power of two: 2^(-8 / n), 2^(-16 / n), ...; further heads take every second
        slope of the series for 2n heads.
        """
        power = 1 << (self.heads.bit_length() - 1)
        head = torch.arange(self.heads, device=device, dtype=torch.float32)
        exponents = torch.where(
            head < power, -8 * (head + 1) / power, -4 * (2 * (head - power) + 1) / power
        )
        return torch.exp2(exponents)


class Cache(Protocol):
    """Keys and values of earlier tokens."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
        """Store k and v, and return the attention of q; all are (B, H, T, D)."""


@dataclass(frozen=True)
class AttentionContext:
    """What every layer of a forward pass needs to know of positions, computed once."""

    encoding: Positions
    rotation: Tensor | None
    mask: Tensor | None  # added to scores, (T, T) or (1, H, T, T); None: only causal
    cache: Cache | None = None  # keys and values of earlier tokens

    def apply_rotary(self, x: Tensor) -> Tensor:
        """Rotate queries or keys, (B, H, T, D), by their positions."""
        if self.rotation is None:
            return x
        cos, sin = self.rotation
        first, second = x.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return rotated.to(x.dtype)


def causal_mask(query_positions: Tensor, key_positions: Tensor, bias: Tensor | None) -> Tensor:
    """Return the mask to add to scores, (Tq, Tk) or (1, H, Tq, Tk): `bias`, -inf for later keys."""
    later = key_positions > query_positions[:, None]
    if bias is None:
        bias = torch.zeros(later.shape, device=later.device)
    return bias.masked_fill(later, -math.inf)
