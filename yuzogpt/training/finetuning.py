"""What of a pretrained model learns, and how fast: by how far a parameter is from the input.

In: a parameter's name. Out: whether it is frozen, and its learning rate over the run's. Depths, for
a model of n layers:

    0         wte, wpe: the embeddings. wte is the output matrix, too, unless it has its own
    1 to n    h.0 to h.{n-1}
    n + 1     ln_f, lm_head
"""

from yuzogpt.config import FinetuningSettings
from yuzogpt.model.gpt import GPT


def depth_of(name: str, n_layer: int) -> int:
    """Return how far from the input a parameter is."""
    if name.startswith("h."):
        return int(name.split(".")[1]) + 1
    return n_layer + 1 if name.startswith(("ln_f.", "lm_head.")) else 0


def freeze(model: GPT, layers: int) -> None:
    """Take the first `layers` layers, and the embeddings below them, out of what learns.

    They get no gradient, no state of the optimizer and no weight decay.
    """
    for name, parameter in model.named_parameters():
        if layers and depth_of(name, model.settings.n_layer) <= layers:
            parameter.requires_grad_(False)


def rate_of(name: str, n_layer: int, settings: FinetuningSettings) -> float:
    """Return a parameter's learning rate over the run's: the less, the lower it is.

    ULMFiT's discriminative finetuning (Howard and Ruder, 2018).
    """
    return float(settings.layer_lr_decay ** (n_layer + 1 - depth_of(name, n_layer)))
