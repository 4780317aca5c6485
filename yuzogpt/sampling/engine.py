"""Decoding: a prompt grows, one token at a time, in a batch of samples.

In: a model and the ids of a prompt. Out: the ids of each sample. The whole context is computed
again for each token: simple, and right at any length.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from yuzogpt.hardware import Hardware
from yuzogpt.model.gpt import GPT
from yuzogpt.sampling.sampler import next_tokens


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Sequence[int],
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    hardware: Hardware,
) -> Tensor:
    """Return one continuation of `prompt` for each seed, shape (len(seeds), max_new_tokens).

    Past block_size the context slides: the model sees the last block_size tokens.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    start = torch.tensor(prompt, dtype=torch.long, device=hardware.device)
    ids = start.repeat(len(seeds), 1)  # (B, T)
    for _ in range(max_new_tokens):
        context = ids[:, -model.settings.block_size :]
        with hardware.autocasting():
            logits = model(context)[:, -1]  # (B, V)
        token = next_tokens(logits, temperature, top_k, generators)
        ids = torch.cat([ids, token[:, None]], dim=1)
    return ids[:, len(prompt) :]
