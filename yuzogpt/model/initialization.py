"""The initial distribution of every weight; a function of shape, settings and seed alone.

By default as GPT-2 (init_std 0.02, residual_init scaled):

    matrices and embeddings     normal, standard deviation init_std
    attn.c_proj, mlp.c_proj     their outputs enter the residual stream.
                                scaled: init_std / sqrt(2 n_layer), so that 2 n_layer additions keep
                                its variance (GPT-2, section 2.3);
                                plain: init_std; zero: 0, so that a new block changes nothing
    biases; padding of the vocabulary    0
    norms                       weight 1, bias 0

muP (Yang et al., 2022; Adam's column of table 8): in a model m times as wide as the base, the
matrices of the blocks start smaller by sqrt(m). The rest of muP is in gpt.py (logits times 1 / m)
and training/optimizers.py (learning rate of these matrices times 1 / m). Wider models should have
more heads, not wider ones: scores are scaled by 1 / sqrt(D), as in GPT-2.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from yuzogpt.config import InitializationSettings, ModelSettings
from yuzogpt.model.gpt import GPT

GPT2 = InitializationSettings()


def initial_weights(
    shape: ModelSettings, seed: int, settings: InitializationSettings = GPT2
) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight's name and value, one after the other, on the CPU.

    So a rank that keeps a shard of each never holds more than one whole weight.
    """
    with torch.device("meta"):
        sizes = {name: p.shape for name, p in GPT(shape).named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    for name, size in sizes.items():
        if len(size) < 2:
            yield name, torch.full(size, 1.0 if name.endswith("weight") else 0.0)
            continue
        std = standard_deviation(name, shape, settings)
        value = torch.empty(size).normal_(0.0, std, generator=generator)
        if name in ("wte.weight", "lm_head.weight"):
            value[shape.vocab_size :] = 0.0
        yield name, value


def standard_deviation(name: str, shape: ModelSettings, settings: InitializationSettings) -> float:
    """Return the standard deviation of a matrix's initial values."""
    std = settings.init_std
    if not name.startswith("h."):
        return std
    if name.endswith("c_proj.weight"):
        std *= {"scaled": (2 * shape.n_layer) ** -0.5, "plain": 1.0, "zero": 0.0}[
            settings.residual_init
        ]
    return std / math.sqrt(shape.width_ratio)


@torch.no_grad()
def initialize(model: GPT, seed: int) -> None:
    """Fill the weights of a whole model, for tests and benchmarks; runs use checkpoints/load.py."""
    for name, value in initial_weights(model.settings, seed):
        model.get_parameter(name).copy_(value)
