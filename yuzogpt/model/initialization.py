"""How every weight starts.

In: the shape of a GPT. Out: its first weights, in a way that depends on shape and seed alone.

    matrices and embeddings     normal, standard deviation 0.02
    attn.c_proj, mlp.c_proj     normal, 0.02 / sqrt(2 n_layer): 2 n_layer additions to the
                                residual stream keep its variance (GPT-2, section 2.3)
    biases; padding of wte      0
    norms                       weight 1, bias 0
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from yuzogpt.config import ModelSettings
from yuzogpt.model.gpt import GPT


def initial_weights(settings: ModelSettings, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight's name and value, one after the other, on the CPU.

    So a rank that keeps only a part of each never holds more than one of them whole.
    """
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in GPT(settings).named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    residual_std = 0.02 / math.sqrt(2 * settings.n_layer)
    for name, shape in shapes.items():
        if len(shape) < 2:
            yield name, torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
            continue
        std = residual_std if name.endswith("c_proj.weight") else 0.02
        value = torch.empty(shape).normal_(0.0, std, generator=generator)
        if name == "wte.weight":
            value[settings.vocab_size :] = 0.0
        yield name, value


@torch.no_grad()
def initialize(model: GPT, seed: int) -> None:
    """Fill the weights of `model`."""
    for name, value in initial_weights(model.settings, seed):
        model.get_parameter(name).copy_(value)
