"""GPT-2's architecture (Radford et al., 2019) and newer variants, in plain PyTorch.

Pre-norm blocks. The defaults are GPT-2's: learned positions, one matrix for embedding and output.
inference/engine.py generates text with this class, through a cache of keys and values.

Shapes: B rows, T tokens per row, C channels (n_embd), H heads, D channels per head (C / H),
V vocabulary.

Next: model/attention.py.
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
from yuzogpt.model.positions import POSITION_KINDS, AttentionContext, Cache, causal_mask

LOGITS_PER_PASS = 2**26  # elements: 256 MB in float32
# On a CPU, without gradients: this many fit in its cache, and evaluating is 1.5 times as fast.
CPU_LOGITS_PER_PASS = 2**22


class GPT(nn.Module):
    """A decoder-only transformer; parameter names are those of GPT-2's checkpoints."""

    def __init__(self, settings: ModelSettings) -> None:
        """Allocate the weights; initialization.py or a checkpoint fills them."""
        super().__init__()
        assert settings.vocab_size, "the vocabulary's size comes from the corpus or the checkpoint"
        self.settings = settings
        self.wte = TokenEmbedding(settings.padded_vocab, settings.n_embd)
        self.wpe = POSITION_KINDS[settings.pos_emb](settings)
        self.drop = Dropout(settings.dropout, site=0)  # `site` seeds its masks
        self.h = nn.ModuleList(Block(settings, layer) for layer in range(settings.n_layer))
        self.ln_f = norm(settings)
        self.lm_head: nn.Linear | None = None
        if not settings.tie_embeddings:
            self.lm_head = nn.Linear(settings.n_embd, settings.padded_vocab, bias=False)

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, row_keys: Tensor | None = None
    ) -> Tensor:
        """Return logits, (B, T, V); with targets, (B, T), the loss of each token in nats, (B, T).

        `row_keys`, (B,): the seeds of dropout (see dropout.row_keys), needed in training mode if
        dropout is on. A row's masks then do not depend on its batch or rank.
        """
        T, block_size = ids.shape[1], self.settings.block_size
        assert block_size >= T or self.settings.is_extensible, f"{T} tokens, {block_size=}"
        x = self.hidden(ids, torch.arange(T, device=ids.device), row_keys)
        return self.logits(x) if targets is None else self.losses(x, targets)

    def hidden(
        self,
        ids: Tensor,
        token_positions: Tensor,
        row_keys: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the final activations, (B, T, C), to which the output matrix is applied.

        `token_positions`: (T,); with a cache, (B, T), and the cache has the keys and values of the
        earlier tokens.
        """
        x = self.wpe.embed_positions(self.wte(ids), token_positions)  # (B, T, C)
        x = self.drop(x, row_keys)
        mask = None if cache is not None else self._mask(token_positions)
        rotation = self.wpe.rotation(token_positions)
        context = AttentionContext(self.wpe, rotation, mask, cache)
        for block in self.h:
            x = block(x, row_keys, context)
        normed: Tensor = self.ln_f(x)
        return normed

    def set_explicit_attention(self, is_explicit: bool) -> None:
        """Choose how attention is computed, wherever dropout does not need it explicit."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.is_explicit = is_explicit

    def _mask(self, token_positions: Tensor) -> Tensor | None:
        """Return the mask to add to scores; None if plain causal masking is enough."""
        bias = self.wpe.bias(token_positions, token_positions)
        return None if bias is None else causal_mask(token_positions, token_positions, bias)

    def logits(self, x: Tensor) -> Tensor:
        """Project (..., C) to (..., V), without the logits of the vocabulary's padding."""
        ratio, cap = self.settings.width_ratio, self.settings.logit_softcap
        x = x / ratio if ratio != 1 else x  # muP: logits keep their size as the width grows
        logits = self.wte.project(x) if self.lm_head is None else self.lm_head(x)
        logits = logits[..., : self.settings.vocab_size]
        return cap * torch.tanh(logits / cap) if cap else logits  # Gemma 2 (2024)

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each token, (B, T), from the final activations, (B, T, C).

        With a large vocabulary, the logits of all tokens would be the largest tensors of a step.
        So they are computed for some tokens at a time, and recomputed in the backward pass.
        """
        vectors, labels = x.flatten(0, 1), targets.flatten()  # (B * T, C), (B * T,)
        tokens = self.tokens_at_once(x)
        if len(vectors) <= tokens:
            return self._token_losses(vectors, labels).view_as(targets)
        pairs = zip(torch.split(vectors, tokens), torch.split(labels, tokens), strict=True)
        if torch.is_grad_enabled():
            with separate_rounding(x.device):
                losses = [
                    checkpoint(
                        self._token_losses, *pair, use_reentrant=False, preserve_rng_state=False
                    )
                    for pair in pairs
                ]
        else:
            losses = [self._token_losses(*pair) for pair in pairs]
        return torch.cat(losses).view_as(targets)

    def tokens_at_once(self, x: Tensor) -> int:
        """Return for how many tokens logits are computed at a time."""
        is_cpu_evaluation = x.device.type == "cpu" and not torch.is_grad_enabled()
        logits = CPU_LOGITS_PER_PASS if is_cpu_evaluation else LOGITS_PER_PASS
        return max(1, logits // self.settings.vocab_size)

    def _token_losses(self, vectors: Tensor, targets: Tensor) -> Tensor:
        """(N, C), (N,) -> (N,)."""
        return F.cross_entropy(self.logits(vectors), targets, reduction="none")

    def num_parameters(self) -> int:
        """Count the weights without positions, as nanoGPT does, and without padding."""
        shape = self.settings
        padding = (shape.padded_vocab - shape.vocab_size) * shape.n_embd
        padding *= 1 if shape.tie_embeddings else 2
        positions = sum(p.numel() for p in self.wpe.parameters())
        return sum(p.numel() for p in self.parameters()) - positions - padding


def separate_rounding(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which autocast makes a bfloat16 copy of a matrix for each use of it.

    If all uses shared one copy, autograd would sum their gradients in bfloat16.
    """
    kind = device.type
    if torch.compiler.is_compiling() or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)


class TokenEmbedding(nn.Embedding):
    """A vector for each token; the same matrix projects the final activations to logits."""

    def project(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, rows of the matrix)."""
        return F.linear(x, self.weight)


class Block(nn.Module):
    """Attention, then an MLP, each added to the residual stream."""

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        """`layer`: its index from 0, which gives its dropouts their sites."""
        super().__init__()
        self.ln_1 = norm(settings)
        self.attn = Attention(settings, layer)
        self.ln_2 = norm(settings)
        self.mlp = MLP(settings, site=3 + 3 * layer)

    def forward(self, x: Tensor, row_keys: Tensor | None, context: AttentionContext) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), row_keys, context)
        x = x + self.mlp(self.ln_2(x), row_keys)
        return x
