"""Causal self-attention: the one path for every kind of positions, with and without a cache.

In: the normed residual stream. Out: what is added to it. Shapes: see gpt.py.
"""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from yuzogpt.config import ModelSettings
from yuzogpt.model.dropout import Dropout
from yuzogpt.model.positions import Place


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
        elif self.attn_drop.is_on():
            y = self._attend_with_dropout(q, k, v, rows, place)
        else:
            mask = None if place.mask is None else place.mask.to(q.dtype)
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        y = y.transpose(1, 2).flatten(-2)  # (B, T, C)
        out: Tensor = self.resid_drop(self.c_proj(y), rows)
        return out

    def _attend_with_dropout(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, place: Place
    ) -> Tensor:
        # Flash kernels draw their own masks, by a row's place in the batch; ours come from the
        # row's number, so the weights are spelled out here, at the price of a (T, T) matrix.
        assert place.mask is not None
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, T)
        weights = (scores + place.mask).softmax(dim=-1)
        kept: Tensor = self.attn_drop(weights, rows)
        return kept.to(v.dtype) @ v
