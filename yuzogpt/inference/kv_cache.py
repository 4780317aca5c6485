"""Keys and values of the tokens that a model has seen, for each slot.

In: the keys and values of new tokens. Out: what their queries see. Memory is reserved once, for all
slots at full length; an operating system gives it out as it is written to.
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
    """Room for the keys and values of `slots` contexts."""

    def __init__(
        self, shape: ModelSettings, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Reserve it."""
        head = shape.n_embd // shape.n_head
        size = (shape.n_layer, slots, shape.n_head, shape.block_size, head)  # D last, T before it
        self.keys = torch.empty(size, dtype=dtype, device=device)
        self.values = torch.empty(size, dtype=dtype, device=device)

    def clear(self) -> None:
        """Write zeros everywhere."""
        self.keys.zero_()
        self.values.zero_()

    def fill_with_same_values(self) -> None:
        """Write numbers everywhere, in all slots the same."""
        generator = torch.Generator().manual_seed(0)
        for kept in (self.keys, self.values):
            one = torch.randn(kept[:, :1].shape, generator=generator)
            kept.copy_(one.to(kept.device, kept.dtype))

    def view(self, spans: Sequence[Span], B: int, T: int) -> "CacheView":
        """Return the cache as a forward pass of B rows of T tokens sees it."""
        return CacheView(self, spans, B, T)


def bytes_per_slot(shape: ModelSettings, dtype: torch.dtype) -> int:
    """Return how much memory a slot needs at full length."""
    return 2 * shape.n_layer * shape.block_size * shape.n_embd * dtype.itemsize


class CacheView:
    """The cache in one forward pass: row i of the batch is span i, padded to T tokens.

    Rows attend one by one. So the shapes of the arithmetic, and with them its last bits, depend on
    how long a row's context is, and not on which other rows there are. Rows without a span are
    padding and see nothing.
    """

    def __init__(self, cache: KVCache, spans: Sequence[Span], B: int, T: int) -> None:
        """Find the positions of all tokens; padding takes any that exist."""
        self.cache = cache
        self.spans = spans
        self.T = T
        device, length = cache.keys.device, cache.keys.shape[3]
        firsts = [span.first for span in spans]
        self.slots = torch.tensor([span.slot for span in spans], device=device)
        self.firsts = torch.tensor(firsts, device=device)
        first = firsts + [0] * (B - len(spans))
        steps = torch.arange(T, device=device)
        at = torch.tensor(first, device=device)[:, None] + steps
        self.at = at.clamp(max=length - 1)  # (B, T)
        self.keys_at = torch.arange(length, device=device)
        self.masks: dict[int, Tensor | None] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
        """Write k and v; return what q sees, (B, H, T, D)."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]  # (slots, H, length, D)
        self.write(keys, k)
        self.write(values, v)
        seen = []
        for row, span in enumerate(self.spans):
            if row not in self.masks:  # the same in all layers
                self.masks[row] = self.mask(row, span, positions)
            past = slice(span.slot, span.slot + 1), slice(None), slice(span.end)
            seen.append(
                F.scaled_dot_product_attention(
                    q[row : row + 1], keys[past], values[past], self.masks[row]
                )
            )
        if len(seen) < len(q):
            seen.append(torch.zeros_like(q[len(seen) :]))
        return torch.cat(seen)

    def write(self, kept: Tensor, new: Tensor) -> None:
        """Put the keys or values of new tokens, (B, H, T, D), into a layer's, without padding."""
        if self.T == 1:
            kept[self.slots, :, self.firsts] = new[: len(self.spans), :, 0]
            return
        for row, span in enumerate(self.spans):
            kept[span.slot, :, span.first : span.end] = new[row, :, : span.count]

    def mask(self, row: int, span: Span, positions: Positions) -> Tensor | None:
        """Return what is added to the scores of a row; None where its one token sees all."""
        queries_at, keys_at = self.at[row], self.keys_at[: span.end]
        bias = positions.bias(queries_at, keys_at)
        if self.T == 1 and bias is None:
            return None
        return causal_mask(queries_at, keys_at, bias).to(self.cache.keys.dtype)
