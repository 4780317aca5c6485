"""GPT-2's architecture (Radford et al., 2019), in plain PyTorch.

In: token ids. Out: logits, or with targets the loss of each token. Pre-norm blocks, learned
positions, one matrix for embedding and output. Next on the line: training/loop.py; for decoding,
with a cache of keys and values, sampling/engine.py.

Shapes: B rows, T tokens in a row, C channels (n_embd), H heads, D channels of a head (C / H),
V vocabulary.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yuzogpt.config import ModelSettings
from yuzogpt.model.dropout import Dropout
from yuzogpt.model.positions import Cache, LearnedPositions, Place, causal_mask


class GPT(nn.Module):
    """A decoder-only transformer; parameter names are those of GPT-2's checkpoints."""

    def __init__(self, settings: ModelSettings) -> None:
        """Allocate the weights; initialization.py or a checkpoint fills them."""
        super().__init__()
        assert settings.vocab_size, "the vocabulary's size comes from the corpus or the checkpoint"
        self.settings = settings
        padded_vocab = -(-settings.vocab_size // settings.vocab_multiple) * settings.vocab_multiple
        self.wte = TokenEmbedding(padded_vocab, settings.n_embd)
        self.wpe = LearnedPositions(settings.block_size, settings.n_embd)
        self.drop = Dropout(settings.dropout, site=0)
        self.h = nn.ModuleList(Block(settings, layer) for layer in range(settings.n_layer))
        self.ln_f = LayerNorm(settings)

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Return logits, (B, T, V); with targets, (B, T), the loss of each token in nats, (B, T).

        `rows`, (B,), are the keys of dropout (see dropout.row_keys): needed in training mode if
        dropout is on, so that a row's masks do not depend on which batch or rank it is in.
        """
        T = ids.shape[1]
        assert self.settings.block_size >= T, f"{T} tokens, block_size {self.settings.block_size}"
        at = torch.arange(T, device=ids.device)
        logits = self.logits(self.hidden(ids, at, rows))
        if targets is None:
            return logits
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view_as(targets)

    def hidden(
        self, ids: Tensor, at: Tensor, rows: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Return what the output matrix is applied to, (B, T, C).

        `at`: positions, (T,), or (B, T) with a cache, which then holds what stands before.
        """
        x = self.wpe.add(self.wte(ids), at)  # (B, T, C)
        x = self.drop(x, rows)
        place = Place(self.wpe, at, cache)
        for block in self.h:
            x = block(x, rows, place)
        normed: Tensor = self.ln_f(x)
        return normed

    def logits(self, x: Tensor) -> Tensor:
        """Project (B, T, C) to (B, T, V); the embedding's padding rows are cut off."""
        return self.wte.project(x)[..., : self.settings.vocab_size]

    def num_parameters(self) -> int:
        """Count the weights, without positions and padding, as nanoGPT does."""
        padded_vocab, n_embd = self.wte.weight.shape
        padding = (padded_vocab - self.settings.vocab_size) * n_embd
        return sum(p.numel() for p in self.parameters()) - self.wpe.weight.numel() - padding


class TokenEmbedding(nn.Embedding):
    """A vector for each token; the same matrix, at the end, gives each token's logit."""

    def project(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, rows of the matrix)."""
        return F.linear(x, self.weight)


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each added to the residual stream."""

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        """`layer` counts from 0; it keeps the dropout masks of layers apart."""
        super().__init__()
        self.ln_1 = LayerNorm(settings)
        self.attn = Attention(settings, layer)
        self.ln_2 = LayerNorm(settings)
        self.mlp = MLP(settings, site=3 + 3 * layer)

    def forward(self, x: Tensor, rows: Tensor | None, place: Place) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), rows, place)
        x = x + self.mlp(self.ln_2(x), rows)
        return x


class Attention(nn.Module):
    """Causal self-attention with H heads."""

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        """`layer` counts from 0; it names its dropouts, and its part of a cache."""
        super().__init__()
        self.layer = layer
        self.n_head = settings.n_head
        self.c_attn = nn.Linear(settings.n_embd, 3 * settings.n_embd, bias=settings.bias)
        self.c_proj = nn.Linear(settings.n_embd, settings.n_embd, bias=settings.bias)
        self.attn_drop = Dropout(settings.dropout, site=1 + 3 * layer)
        self.resid_drop = Dropout(settings.dropout, site=2 + 3 * layer)

    def forward(self, x: Tensor, rows: Tensor | None, place: Place) -> Tensor:
        """(B, T, C) -> (B, T, C); token t sees tokens 0 to t."""
        q, k, v = (
            part.unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, H, T, D)
            for part in self.c_attn(x).chunk(3, dim=-1)
        )
        q, k = place.positions.turn(q, place.at), place.positions.turn(k, place.at)
        if place.cache is not None:
            y = place.cache.attend(self.layer, q, k, v, place.positions)
        elif self.attn_drop.is_on():
            y = self._attend_with_dropout(q, k, v, rows, place)
        else:
            bias = place.positions.bias(place.at, place.at)
            mask = None if bias is None else causal_mask(place.at, place.at, bias)
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        y = y.transpose(1, 2).flatten(-2)  # (B, T, C)
        out: Tensor = self.resid_drop(self.c_proj(y), rows)
        return out

    def _attend_with_dropout(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, place: Place
    ) -> Tensor:
        # Flash kernels draw their own masks, by a row's place in the batch; ours come from the
        # row's number, so the weights are spelled out here, at the price of a (T, T) matrix.
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, T)
        bias = place.positions.bias(place.at, place.at)
        weights = (scores + causal_mask(place.at, place.at, bias)).softmax(dim=-1)
        kept: Tensor = self.attn_drop(weights, rows)
        return kept.to(v.dtype) @ v


class MLP(nn.Module):
    """Two linear layers with GPT-2's GELU (the tanh approximation) between."""

    def __init__(self, settings: ModelSettings, site: int) -> None:
        """`site`: number of its dropout."""
        super().__init__()
        self.c_fc = nn.Linear(settings.n_embd, 4 * settings.n_embd, bias=settings.bias)
        self.c_proj = nn.Linear(4 * settings.n_embd, settings.n_embd, bias=settings.bias)
        self.drop = Dropout(settings.dropout, site)

    def forward(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = F.gelu(self.c_fc(x), approximate="tanh")
        out: Tensor = self.drop(self.c_proj(x), rows)
        return out


class LayerNorm(nn.Module):
    """Layer norm whose bias can be left out."""

    def __init__(self, settings: ModelSettings) -> None:
        """Normalizes over the C channels."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(settings.n_embd))
        self.bias = nn.Parameter(torch.zeros(settings.n_embd)) if settings.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)
