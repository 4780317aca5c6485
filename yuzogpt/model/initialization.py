"""How every weight starts.

In: a GPT with unset weights. Out: the same one, filled, in a way that depends on the seed alone.

    matrices and embeddings     normal, standard deviation 0.02
    attn.c_proj, mlp.c_proj     normal, 0.02 / sqrt(2 n_layer): 2 n_layer additions to the
                                residual stream keep its variance (GPT-2, section 2.3)
    biases; padding of wte      0
    norms                       weight 1, bias 0
"""

import math

import torch

from yuzogpt.model.gpt import GPT


@torch.no_grad()
def initialize(model: GPT, seed: int) -> None:
    """Fill the weights of `model`, on the CPU, so that every device starts alike."""
    generator = torch.Generator().manual_seed(seed)
    residual_std = 0.02 / math.sqrt(2 * model.settings.n_layer)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            std = residual_std if name.endswith("c_proj.weight") else 0.02
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
    model.wte.weight[model.settings.vocab_size :] = 0.0
