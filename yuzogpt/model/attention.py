"""Causal self-attention: the one path for every kind of positions, with and without a cache.

In: the normed residual stream. Out: what is added to it. Shapes: see gpt.py.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yuzogpt.config import ModelSettings
from yuzogpt.model.dropout import Dropout
from yuzogpt.model.positions import Place, causal_mask
from yuzogpt.runtime.device import CPU_HAS_BFLOAT16

LONGEST_SPELLED_OUT = 512  # tokens: then there is too much that the causal mask throws away
SCORES_AT_ONCE = 2**22  # on a CPU: about what its cache holds


class Attention(nn.Module):
    """Causal self-attention with H heads."""

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        """`layer` counts from 0; it names its dropouts, and its part of a cache."""
        super().__init__()
        self.layer = layer
        self.n_head = settings.n_head
        self.qk_norm = settings.qk_norm
        self.c_attn = nn.Linear(settings.n_embd, 3 * settings.n_embd, bias=settings.bias)
        self.c_proj = nn.Linear(settings.n_embd, settings.n_embd, bias=settings.bias)
        self.attn_drop = Dropout(settings.dropout, site=1 + 3 * layer)
        self.resid_drop = Dropout(settings.dropout, site=2 + 3 * layer)

    def forward(self, x: Tensor, rows: Tensor | None, place: Place) -> Tensor:
        """(B, T, C) -> (B, T, C); token t sees tokens 0 to t."""
        heads = self.c_attn(x).unflatten(-1, (3 * self.n_head, -1)).transpose(1, 2)
        qk, v = heads.split((2 * self.n_head, self.n_head), dim=1)  # (B, 2H, T, D), (B, H, T, D)
        if self.qk_norm:  # without weights; Henry et al., 2020
            qk = F.rms_norm(qk, qk.shape[-1:]).to(v.dtype)
        q, k = place.turn(qk).chunk(2, dim=1)
        if place.cache is not None:
            y = place.cache.attend(self.layer, q, k, v, place.positions)
        elif self.attn_drop.is_on() or prefers_explicit(q):
            y = self._explicit_attention(q, k, v, rows, place.mask)
        else:
            mask = None if place.mask is None else place.mask.to(q.dtype)
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        y = y.transpose(1, 2).flatten(-2)  # (B, T, C)
        out: Tensor = self.resid_drop(self.c_proj(y), rows)
        return out

    def _explicit_attention(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Attend with (T, T) weights for each row and head, which the backward pass needs, too.

        For dropout: flash kernels draw their own masks, by a row's place in the batch; ours come
        from the row's number. And where it is faster. In bfloat16, scores are rounded to it.
        """
        B, H, T, _ = q.shape
        if mask is None:
            at = torch.arange(T, device=q.device)
            mask = causal_mask(at, at, None)
        mask = mask.to(q.dtype)
        if q.device.type != "cpu":
            return self._weigh(q, k, v, rows, mask)
        count, parts = max(1, SCORES_AT_ONCE // (H * T * T)), []
        for first in range(0, max(1, B), count):  # a rank may have no rows
            part = slice(first, first + count)
            keys = None if rows is None else rows[part]
            parts.append(self._weigh(q[part], k[part], v[part], keys, mask))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _weigh(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, mask: Tensor) -> Tensor:
        """(B, H, T, D) -> the same; `mask`: (T, T) or (1, H, T, T)."""
        B, H, T, D = q.shape
        if mask.dim() == 4:
            mask = mask.expand(B, H, T, T).flatten(0, 1)
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B * H, T, D)
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1 / math.sqrt(D))
        weights = self.attn_drop(scores.softmax(dim=-1).view(B, H, T, T), rows)
        return torch.bmm(weights.to(v.dtype).flatten(0, 1), v).view(B, H, T, D)


def prefers_explicit(q: Tensor) -> bool:
    """Tell whether plain products beat torch's flash kernel for queries (B, H, T, D).

    A CPU's flash kernel computes with bfloat16 numbers in float32: it takes twice as long.
    """
    is_short = q.shape[2] <= LONGEST_SPELLED_OUT
    return CPU_HAS_BFLOAT16 and is_short and q.device.type == "cpu" and q.dtype == torch.bfloat16
