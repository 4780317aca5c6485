"""Causal self-attention for every positional encoding, with and without a cache of keys and values.

See gpt.py for shapes. Next: model/layers.py.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yuzogpt.config import ModelSettings
from yuzogpt.model.dropout import Dropout
from yuzogpt.model.positions import AttentionContext, causal_mask
from yuzogpt.runtime.device import CPU_HAS_BFLOAT16

# Explicit attention (matrix products and a softmax) computes the masked half of the scores, too. In
# longer rows that costs more than what it avoids: a flash kernel's conversion to float32.
MAX_EXPLICIT_TOKENS = 512
CPU_SCORES_PER_PASS = 2**22  # about what a CPU's cache holds


class Attention(nn.Module):
    """Causal self-attention with H heads."""

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        """`layer`: its index from 0, for the sites of its dropouts and its place in a cache."""
        super().__init__()
        self.layer = layer
        self.n_head = settings.n_head
        self.qk_norm = settings.qk_norm
        self.is_explicit: bool | None = None  # None: `prefers_explicit` decides
        self.c_attn = nn.Linear(settings.n_embd, 3 * settings.n_embd, bias=settings.bias)
        self.c_proj = nn.Linear(settings.n_embd, settings.n_embd, bias=settings.bias)
        self.attn_drop = Dropout(settings.dropout, site=1 + 3 * layer)
        self.resid_drop = Dropout(settings.dropout, site=2 + 3 * layer)

    def forward(self, x: Tensor, row_keys: Tensor | None, context: AttentionContext) -> Tensor:
        """(B, T, C) -> (B, T, C); token t sees tokens 0 to t."""
        heads = self.c_attn(x).unflatten(-1, (3 * self.n_head, -1)).transpose(1, 2)
        qk, v = heads.split((2 * self.n_head, self.n_head), dim=1)  # (B, 2H, T, D), (B, H, T, D)
        if self.qk_norm:  # without weights; Henry et al., 2020
            qk = F.rms_norm(qk, qk.shape[-1:]).to(v.dtype)
        q, k = context.apply_rotary(qk).chunk(2, dim=1)
        if context.cache is not None:
            y = context.cache.attend(self.layer, q, k, v, context.encoding)
        elif self.attn_drop.is_on() or self._is_explicit(q):
            y = self._explicit_attention(q, k, v, row_keys, context.mask)
        else:
            mask = None if context.mask is None else context.mask.to(q.dtype)
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        y = y.transpose(1, 2).flatten(-2)  # (B, T, C)
        out: Tensor = self.resid_drop(self.c_proj(y), row_keys)
        return out

    def _is_explicit(self, q: Tensor) -> bool:
        if self.is_explicit is None:
            return prefers_explicit(q.shape[2], q.device, q.dtype)
        return self.is_explicit

    def _explicit_attention(
        self, q: Tensor, k: Tensor, v: Tensor, row_keys: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Attend with (T, T) weights per row and head, which are kept for the backward pass.

        Dropout needs this: a flash kernel's masks depend on a row's index in the batch, ours only
        on the row's number in the data. It is also used where it is faster. Under bfloat16, scores
        are rounded to bfloat16, which flash kernels avoid.
        """
        B, H, T, _ = q.shape
        if mask is None:
            positions = torch.arange(T, device=q.device)
            mask = causal_mask(positions, positions, None)
        mask = mask.to(q.dtype)
        if q.device.type != "cpu":
            return self._attend(q, k, v, row_keys, mask)
        rows_per_pass, parts = max(1, CPU_SCORES_PER_PASS // (H * T * T)), []
        for first in range(0, max(1, B), rows_per_pass):  # also if B = 0, for backward
            part = slice(first, first + rows_per_pass)
            keys = None if row_keys is None else row_keys[part]
            parts.append(self._attend(q[part], k[part], v[part], keys, mask))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, row_keys: Tensor | None, mask: Tensor
    ) -> Tensor:
        """(B, H, T, D) -> (B, H, T, D); `mask`: (T, T) or (1, H, T, T)."""
        B, H, T, D = q.shape
        if mask.dim() == 4:
            mask = mask.expand(B, H, T, T).flatten(0, 1)
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B * H, T, D)
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1 / math.sqrt(D))
        weights = self.attn_drop(scores.softmax(dim=-1).view(B, H, T, T), row_keys)
        return torch.bmm(weights.to(v.dtype).flatten(0, 1), v).view(B, H, T, D)


def prefers_explicit(tokens: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether explicit attention is expected to be faster than torch's flash kernel.

    A CPU's flash kernel converts bfloat16 to float32, and takes twice as long.
    """
    is_short = tokens <= MAX_EXPLICIT_TOKENS
    return CPU_HAS_BFLOAT16 and is_short and device.type == "cpu" and dtype == torch.bfloat16
