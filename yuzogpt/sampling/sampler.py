"""From logits to the next token.

In: logits (B, V) and one random generator a row. Out: token ids (B,). A row's token depends on its
own logits and generator alone, so samples do not depend on what else is in the batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def next_tokens(
    logits: Tensor, temperature: float, top_k: int, generators: Sequence[torch.Generator]
) -> Tensor:
    """Draw one token a row; the likeliest one at temperature 0, or so near to it that it is."""
    if temperature < 1e-5:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    drawn = [
        torch.multinomial(row, 1, generator=generator)
        for row, generator in zip(probabilities.cpu(), generators, strict=True)
    ]
    return torch.cat(drawn).to(logits.device)
