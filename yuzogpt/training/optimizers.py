"""The optimizer: AdamW, with weight decay on matrices only; its state as named tensors.

In: a model, of which not all need learn, and settings. Out: a torch optimizer, and its state by
parameter name, so that a checkpoint does not depend on the order of parameters.
"""

from typing import Any

import torch
from torch import Tensor, nn

from yuzogpt.config import FinetuningSettings, OptimizerSettings
from yuzogpt.loading import NamedTensors
from yuzogpt.model.gpt import GPT
from yuzogpt.training.finetuning import rate_of
from yuzogpt.training.parallel import local, part_of


def build_optimizer(
    model: GPT, settings: OptimizerSettings, finetuning: FinetuningSettings
) -> torch.optim.AdamW:
    """Return AdamW; biases and norms (one-dimensional) are not decayed, as in nanoGPT."""
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for _, p in learning]
    groups: dict[tuple[bool, float], dict[str, Any]] = {}  # matrices first
    for name, parameter in sorted(learning, key=lambda item: item[1].dim() < 2):
        is_matrix = parameter.dim() >= 2
        rate = rate_of(name, model.settings.n_layer, finetuning)
        decay = settings.weight_decay if is_matrix else 0.0
        new = {"params": [], "weight_decay": decay, "rate": rate}
        groups.setdefault((is_matrix, rate), new)["params"].append(parameter)
    # One kernel for all parameters, where the device has one; the same arithmetic otherwise.
    fused = parameters[0].device.type in ("cpu", "cuda")
    betas = (settings.beta1, settings.beta2)
    optimizer = torch.optim.AdamW(
        list(groups.values()), lr=settings.learning_rate, betas=betas, fused=fused
    )
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


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the run's learning rate; each group's is its share of it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what this rank has of the optimizer, as `name of state/name of parameter`."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
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
