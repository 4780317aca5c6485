"""The optimizer: AdamW, with weight decay on matrices only; its state as named tensors.

In: a model and settings. Out: a torch optimizer, and its state by parameter name, so that a
checkpoint does not depend on the order of parameters.
"""

import torch
from torch import Tensor, nn

from yuzogpt.config import OptimizerSettings
from yuzogpt.loading import NamedTensors
from yuzogpt.training.parallel import local, part_of


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
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=fused)
    # The state exists from the start, not from the first step on: what a checkpoint will hold is
    # known then, and a resumed optimizer is filled like a model.
    for parameter in parameters:
        optimizer.state[parameter] = {
            # A scalar that fused kernels want on the parameter's device.
            "step": torch.zeros((), device=parameter.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what this rank has of the optimizer, as `name of state/name of parameter`."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


@torch.no_grad()
def load_state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: NamedTensors
) -> None:
    """Put back what `state_tensors` named: this rank's part of each whole tensor, bit for bit."""
    own = state_tensors(model, optimizer)
    missing = set(own)
    for name, whole in tensors:
        local(own[name]).copy_(part_of(whole, own[name]))
        missing.remove(name)
    assert not missing, f"no state for {sorted(missing)}"
