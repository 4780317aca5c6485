"""The KV cache: one slot of block_size tokens per running request, allocated once.

An operating system gives the memory out only as it is written to.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from yuzogpt.config import ModelSettings
from yuzogpt.model.positions import Positions, causal_mask


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one slot: positions `first` to `first + count`."""

    slot: int
    first: int
    count: int

    @property
    def end(self) -> int:
        """The position after the last."""
        return self.first + self.count


class KVCache:
    """Keys and values of `slots` contexts, each of up to block_size tokens."""

    def __init__(
        self, shape: ModelSettings, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        head_size = shape.n_embd // shape.n_head
        size = (shape.n_layer, slots, shape.n_head, shape.block_size, head_size)
        self.keys = torch.empty(size, dtype=dtype, device=device)
        self.values = torch.empty(size, dtype=dtype, device=device)

    def clear(self) -> None:
        """Fill the cache with zeros."""
        self.keys.zero_()
        self.values.zero_()

    def fill_with_same_values(self) -> None:
        """Fill the cache with random numbers, the same ones in all slots."""
        generator = torch.Generator().manual_seed(0)
        for cached in (self.keys, self.values):
            values = torch.randn(cached[:, :1].shape, generator=generator)
            cached.copy_(values.to(cached.device, cached.dtype))


def bytes_per_slot(shape: ModelSettings, dtype: torch.dtype) -> int:
    """Return the memory that a slot needs at full length."""
    return 2 * shape.n_layer * shape.block_size * shape.n_embd * dtype.itemsize


class CacheView:
    """The cache in a forward pass of B rows of T tokens: row i is span i, then padding.

    Attention runs row by row. So the shapes of the arithmetic, and with them its last bits, depend
    on the length of a row's context only, not on the other rows. Rows without a span are padding:
    their output is zero.
    """

    def __init__(self, cache: KVCache, spans: Sequence[Span], B: int, T: int) -> None:
        self.cache = cache
        self.spans = spans
        self.T = T
        device, block_size = cache.keys.device, cache.keys.shape[3]
        firsts = [span.first for span in spans]
        self.slots = torch.tensor([span.slot for span in spans], device=device)
        self.firsts = torch.tensor(firsts, device=device)
        row_firsts = torch.tensor(firsts + [0] * (B - len(spans)), device=device)
        positions = row_firsts[:, None] + torch.arange(T, device=device)
        # (B, T); padding past the context's end may take any position that exists.
        self.token_positions = positions.clamp(max=block_size - 1)
        self.key_positions = torch.arange(block_size, device=device)
        self.masks: dict[int, Tensor | None] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
        """Write k and v into the cache; return the attention output, (B, H, T, D)."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]  # (slots, H, block_size, D)
        self.write(keys, k)
        self.write(values, v)
        outputs = []
        for row, span in enumerate(self.spans):
            if row not in self.masks:  # the same in all layers
                self.masks[row] = self.mask(row, span, positions)
            context = slice(span.slot, span.slot + 1), slice(None), slice(span.end)
            outputs.append(
                F.scaled_dot_product_attention(
                    q[row : row + 1], keys[context], values[context], self.masks[row]
                )
            )
        if len(outputs) < len(q):
            outputs.append(torch.zeros_like(q[len(outputs) :]))
        return torch.cat(outputs)

    def write(self, cached: Tensor, new: Tensor) -> None:
        """Copy the keys or values of new tokens, (B, H, T, D), into a layer's, without padding."""
        if self.T == 1:
            cached[self.slots, :, self.firsts] = new[: len(self.spans), :, 0]
            return
        for row, span in enumerate(self.spans):
            cached[span.slot, :, span.first : span.end] = new[row, :, : span.count]

    def mask(self, row: int, span: Span, positions: Positions) -> Tensor | None:
        """Return the mask to add to a row's scores; None if its one token attends to all."""
        queries, keys = self.token_positions[row], self.key_positions[: span.end]
        bias = positions.bias(queries, keys)
        if self.T == 1 and bias is None:
            return None
        return causal_mask(queries, keys, bias).to(self.cache.keys.dtype)
