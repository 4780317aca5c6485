"""Finetuning: which parameters are frozen, and each layer's learning rate, by depth.

The depth of a parameter is its distance from the input. For a model of n layers:

    0         wte, wpe: the embeddings (wte is also the output matrix, unless that is untied)
    1 to n    h.0 to h.{n-1}
    n + 1     ln_f, lm_head
"""

from yuzogpt.config import FinetuningSettings
from yuzogpt.model.gpt import GPT


def parameter_depth(name: str, n_layer: int) -> int:
    """Return the depth of a parameter."""
    if name.startswith("h."):
        return int(name.split(".")[1]) + 1
    return n_layer + 1 if name.startswith(("ln_f.", "lm_head.")) else 0


def freeze(model: GPT, layers: int) -> None:
    """Freeze the first `layers` layers and the embeddings.

    They get no gradient, no optimizer state and no weight decay.
    """
    for name, parameter in model.named_parameters():
        if layers and parameter_depth(name, model.settings.n_layer) <= layers:
            parameter.requires_grad_(False)


def lr_multiplier(name: str, n_layer: int, settings: FinetuningSettings) -> float:
    """Return the factor of a parameter's learning rate: smaller for lower layers.

    Discriminative finetuning, from ULMFiT (Howard and Ruder, 2018).
    """
    return float(settings.layer_lr_decay ** (n_layer + 1 - parameter_depth(name, n_layer)))
