"""Dropout whose masks are a function of (seed, row number), without a random state.

A row gets the same masks in any batch, on any rank and after any restart. So a checkpoint needs no
random state, a run may change its number of workers, and recomputed activations get equal masks.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from yuzogpt.rng import scramble

LOW_16 = 0xFFFF


def row_keys(seed: int, first_row: int, count: int) -> Tensor:
    """Return the keys of rows `first_row` to `first_row + count`, int32, shape (count,)."""
    seed_hash = scramble(np.array([seed], np.uint64))
    keys = scramble(seed_hash ^ np.arange(first_row, first_row + count, dtype=np.uint64))
    return torch.from_numpy((keys >> np.uint64(32)).astype(np.uint32).view(np.int32))


class Dropout(nn.Module):
    """Zeroes each element with probability p and scales up the others; no-op in eval mode."""

    def __init__(self, p: float, site: int) -> None:
        """`site` numbers the dropouts of a model, so that no two use the same masks."""
        super().__init__()
        self.threshold = min(round(p * 2**16), 2**16 - 1)
        self.offset = (site * 0x3504F333 + 2**31) % 2**32 - 2**31  # wrapped to int32

    def is_on(self) -> bool:
        """Return whether forward changes anything."""
        return self.training and self.threshold > 0

    def forward(self, x: Tensor, row_keys: Tensor | None) -> Tensor:
        """(B, ...) -> the same shape."""
        if not self.is_on():
            return x
        assert row_keys is not None, "dropout in training mode needs the keys of the rows"
        bits = random_16_bits(row_keys + self.offset, math.prod(x.shape[1:]))
        keep = (bits >= self.threshold).view_as(x)
        return x * keep * (2**16 / (2**16 - self.threshold))


def random_16_bits(keys: Tensor, count: int) -> Tensor:
    """Return `count` numbers below 2^16 for each key, shape (len(keys), count).

    A counter is hashed to 32 bits, and each half gives 16 bits (the hash is lowbias32, Wellons,
    2018). int32 arithmetic wraps around; its right shift copies the sign bit, hence the masks.
    """
    counter = torch.arange((count + 1) // 2, device=keys.device, dtype=torch.int32)
    x = counter[None, :] ^ mix(keys)[:, None]
    x = mix(x)
    return torch.cat([x & LOW_16, (x >> 16) & LOW_16], dim=1)[:, :count]


def mix(x: Tensor) -> Tensor:
    """Hash int32 numbers, one to one."""
    x = (x ^ ((x >> 16) & LOW_16)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & LOW_16)
