"""The optimizer: AdamW, with weight decay on matrices only; its state as named tensors.

In: a model and settings. Out: a torch optimizer, and its state by parameter name, so that a
checkpoint does not depend on the order of parameters.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from yuzogpt.config import OptimizerSettings


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Return AdamW; biases and norms (one-dimensional) are not decayed, as in nanoGPT."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    # One kernel for all parameters, where the device has one; the same arithmetic otherwise.
    fused = parameters[0].device.type in ("cpu", "cuda")
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=fused)


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's tensors as `name of state/name of parameter`."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `state_tensors` returned, bit for bit."""
    parameters = dict(model.named_parameters())
    for path, value in tensors.items():
        key, name = path.split("/")
        parameter = parameters[name]
        # AdamW's count of steps is a scalar that fused kernels want on the parameter's device.
        optimizer.state[parameter][key] = value.to(parameter.device)
