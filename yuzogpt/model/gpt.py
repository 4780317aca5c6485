"""GPT-2's architecture (Radford et al., 2019), and its younger variants, in plain PyTorch.

In: token ids. Out: logits, or with targets the loss of each token. Pre-norm blocks; as GPT-2 has
it, learned positions and one matrix for embedding and output. The parts: positions.py,
attention.py, layers.py. Next on the line: training/loop.py; for decoding, with a cache of keys and
values, sampling/engine.py.

Shapes: B rows, T tokens in a row, C channels (n_embd), H heads, D channels of a head (C / H),
V vocabulary.
"""

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from yuzogpt.config import ModelSettings
from yuzogpt.model.attention import Attention
from yuzogpt.model.dropout import Dropout
from yuzogpt.model.layers import MLP, norm
from yuzogpt.model.positions import KINDS, Cache, Place, causal_mask

LOGITS_AT_ONCE = 2**26  # numbers: 256 MB in float32
LOGITS_IN_CACHE = 2**22  # what a CPU need not write to memory: 1.5 times as fast


class GPT(nn.Module):
    """A decoder-only transformer; parameter names are those of GPT-2's checkpoints."""

    def __init__(self, settings: ModelSettings) -> None:
        """Allocate the weights; initialization.py or a checkpoint fills them."""
        super().__init__()
        assert settings.vocab_size, "the vocabulary's size comes from the corpus or the checkpoint"
        self.settings = settings
        self.wte = TokenEmbedding(settings.padded_vocab, settings.n_embd)
        self.wpe = KINDS[settings.pos_emb](settings)
        self.drop = Dropout(settings.dropout, site=0)
        self.h = nn.ModuleList(Block(settings, layer) for layer in range(settings.n_layer))
        self.ln_f = norm(settings)
        self.lm_head: nn.Linear | None = None
        if not settings.tie_embeddings:
            self.lm_head = nn.Linear(settings.n_embd, settings.padded_vocab, bias=False)

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Return logits, (B, T, V); with targets, (B, T), the loss of each token in nats, (B, T).

        `rows`, (B,), are the keys of dropout (see dropout.row_keys): needed in training mode if
        dropout is on, so that a row's masks do not depend on which batch or rank it is in.
        """
        T, most = ids.shape[1], self.settings.block_size
        assert most >= T or self.settings.is_extensible, f"{T} tokens, block_size {most}"
        at = torch.arange(T, device=ids.device)
        x = self.hidden(ids, at, rows)
        return self.logits(x) if targets is None else self.losses(x, targets)

    def hidden(
        self, ids: Tensor, at: Tensor, rows: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Return what the output matrix is applied to, (B, T, C).

        `at`: positions, (T,), or (B, T) with a cache, which then holds what stands before.
        """
        x = self.wpe.add(self.wte(ids), at)  # (B, T, C)
        x = self.drop(x, rows)
        mask = None if cache is not None else self._mask(at)
        place = Place(self.wpe, self.wpe.rotation(at), mask, cache)
        for block in self.h:
            x = block(x, rows, place)
        normed: Tensor = self.ln_f(x)
        return normed

    def _mask(self, at: Tensor) -> Tensor | None:
        """Return what is added to scores; None where they are causal and no more."""
        bias = self.wpe.bias(at, at)
        return None if bias is None else causal_mask(at, at, bias)

    def logits(self, x: Tensor) -> Tensor:
        """Project (..., C) to (..., V); the matrix's padding rows are cut off."""
        ratio, cap = self.settings.width_ratio, self.settings.logit_softcap
        x = x / ratio if ratio != 1 else x  # muP
        logits = self.wte.project(x) if self.lm_head is None else self.lm_head(x)
        logits = logits[..., : self.settings.vocab_size]
        return cap * torch.tanh(logits / cap) if cap else logits  # Gemma 2 (2024)

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each token, (B, T), of (B, T, C).

        Of a large vocabulary the logits of all tokens would be the largest tensors of a step: they
        are computed for some tokens at a time, and again in the backward pass.
        """
        vectors, wanted = x.flatten(0, 1), targets.flatten()
        at_once = self.tokens_at_once(x)
        if len(vectors) <= at_once:
            return self._losses_of(vectors, wanted).view_as(targets)
        pairs = zip(torch.split(vectors, at_once), torch.split(wanted, at_once), strict=True)
        if torch.is_grad_enabled():
            with rounding_apart(x.device):
                losses = [
                    checkpoint(
                        self._losses_of, *pair, use_reentrant=False, preserve_rng_state=False
                    )
                    for pair in pairs
                ]
        else:
            losses = [self._losses_of(*pair) for pair in pairs]
        return torch.cat(losses).view_as(targets)

    def tokens_at_once(self, x: Tensor) -> int:
        """Return for how many vectors logits are computed at a time, where few are kept of them."""
        is_in_cache = x.device.type == "cpu" and not torch.is_grad_enabled()
        most = LOGITS_IN_CACHE if is_in_cache else LOGITS_AT_ONCE
        return max(1, most // self.settings.vocab_size)

    def _losses_of(self, vectors: Tensor, targets: Tensor) -> Tensor:
        """(N, C), (N,) -> (N,)."""
        return F.cross_entropy(self.logits(vectors), targets, reduction="none")

    def num_parameters(self) -> int:
        """Count the weights, without positions and padding, as nanoGPT does."""
        shape = self.settings
        padding = (shape.padded_vocab - shape.vocab_size) * shape.n_embd
        padding *= 1 if shape.tie_embeddings else 2
        positions = sum(p.numel() for p in self.wpe.parameters())
        return sum(p.numel() for p in self.parameters()) - positions - padding


def rounding_apart(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which autocast rounds a matrix for each use of it.

    With one rounded copy for all uses, autograd would add up their gradients in bfloat16.
    """
    kind = device.type
    if torch.compiler.is_compiling() or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)


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
        self.ln_1 = norm(settings)
        self.attn = Attention(settings, layer)
        self.ln_2 = norm(settings)
        self.mlp = MLP(settings, site=3 + 3 * layer)

    def forward(self, x: Tensor, rows: Tensor | None, place: Place) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), rows, place)
        x = x + self.mlp(self.ln_2(x), rows)
        return x
