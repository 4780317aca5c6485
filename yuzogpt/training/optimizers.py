"""The optimizers: AdamW, or Muon for the layers' matrices, and their state as named tensors.

parameter_groups.py sets the learning rate of each parameter. State is named by parameter, so that a
checkpoint does not depend on the order of the parameters.

Next: training/guards.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from yuzogpt.checkpoints.load import NamedTensors
from yuzogpt.config import FinetuningSettings, OptimizerSettings
from yuzogpt.config.registry import Registry
from yuzogpt.model.gpt import GPT
from yuzogpt.storage.untrusted import DamagedFile
from yuzogpt.training.muon import Muon
from yuzogpt.training.parallel import shard_like, to_local
from yuzogpt.training.parameter_groups import Group, parameter_groups


@dataclass(frozen=True)
class Optimizer:
    """One or two torch optimizers that step together; each parameter belongs to one of them."""

    parts: tuple[torch.optim.Optimizer, ...]

    def step(self) -> None:
        """Update all weights."""
        for optimizer in self.parts:
            optimizer.step()

    def zero_grad(self) -> None:
        """Free all gradients."""
        for optimizer in self.parts:
            optimizer.zero_grad(set_to_none=True)

    def set_lr(self, lr: float) -> None:
        """Set the run's learning rate; each group multiplies it by its own `lr_factor`."""
        for group in self.groups():
            group["lr"] = lr * group["lr_factor"]

    def groups(self) -> Iterator[dict[str, Any]]:
        """Yield the groups of parameters."""
        for optimizer in self.parts:
            yield from optimizer.param_groups

    def parameter_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the optimizer state of a parameter."""
        return next(part.state[parameter] for part in self.parts if parameter in part.state)


# Builds a torch optimizer with its state allocated; the dtype is that of matrix products.
Build = Callable[[list[Group], OptimizerSettings, torch.dtype], torch.optim.Optimizer]
OPTIMIZERS = Registry[Build]("optimizer", "whole_matrices")


def build_optimizer(
    model: GPT,
    settings: OptimizerSettings,
    finetuning: FinetuningSettings,
    muon_dtype: torch.dtype | None = None,
) -> Optimizer:
    """Return the optimizer of the trainable parameters.

    `muon_dtype`: the dtype of Muon's matrix products; None: float32.
    """
    groups, dtype = parameter_groups(model, settings, finetuning), muon_dtype or torch.float32
    return Optimizer(tuple(OPTIMIZERS[name](groups[name], settings, dtype) for name in groups))


@OPTIMIZERS.register("adamw", help="Adam with decoupled weight decay, as in nanoGPT")
def build_adamw(
    groups: list[Group], settings: OptimizerSettings, dtype: torch.dtype
) -> torch.optim.Optimizer:
    """Return AdamW with its state allocated; torch would do that in the first step.

    A checkpoint is loaded by copying into these tensors, as for the weights. All parameters are on
    one device.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    # One kernel for all parameters if the device has one; the arithmetic is the same.
    fused = parameters[0].device.type in ("cpu", "cuda")
    betas = (settings.beta1, settings.beta2)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=fused)
    for parameter in parameters:
        optimizer.state[parameter] = {
            # Fused kernels need this scalar on the parameter's device.
            "step": torch.zeros((), device=parameter.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


@OPTIMIZERS.register("muon", help="orthogonalised updates", whole_matrices=True)
def build_muon(
    groups: list[Group], settings: OptimizerSettings, dtype: torch.dtype
) -> torch.optim.Optimizer:
    """Return Muon; see muon.py."""
    return Muon(groups, settings.learning_rate, settings.momentum, dtype)


def state_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return this rank's optimizer state, named as in `exp_avg/h.0.attn.c_attn.weight`."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for key, value in optimizer.parameter_state(parameter).items()
    }


@torch.no_grad()
def load_state_tensors(model: nn.Module, optimizer: Optimizer, tensors: NamedTensors) -> None:
    """Copy this rank's shard of each unsharded tensor, named as by `state_tensors`.

    Raises DamagedFile if they are not the tensors of this optimizer.
    """
    own = state_tensors(model, optimizer)
    missing = set(own)
    for name, whole in tensors:
        if name not in missing or own[name].shape != whole.shape:
            raise DamagedFile(
                f"the optimizer's state: {name[:80]} does not belong to this run's optimizer"
            )
        to_local(own[name]).copy_(shard_like(whole, own[name]))
        missing.remove(name)
    if missing:
        raise DamagedFile(f"the optimizer's state: {min(missing)} is missing")
