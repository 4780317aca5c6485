"""The optimizers: AdamW, or Muon for the layers' matrices, and their state as named tensors.

State is named by parameter, so that a checkpoint does not depend on the order of parameters.

Next: training/guards.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from yuzogpt.checkpoints.load import NamedTensors
from yuzogpt.config import FinetuningSettings, ModelSettings, OptimizerSettings
from yuzogpt.model.gpt import GPT
from yuzogpt.storage.untrusted import DamagedFile
from yuzogpt.training.finetuning import lr_multiplier
from yuzogpt.training.muon import Muon
from yuzogpt.training.parallel import shard_like, to_local

Kind = Literal["matrix", "embedding", "head", "vector"]


@dataclass(frozen=True)
class Optimizer:
    """One or two torch optimizers that step together; each parameter belongs to one of them."""

    each: tuple[torch.optim.Optimizer, ...]

    def step(self) -> None:
        """Update all weights."""
        for optimizer in self.each:
            optimizer.step()

    def zero_grad(self) -> None:
        """Free all gradients."""
        for optimizer in self.each:
            optimizer.zero_grad(set_to_none=True)

    def set_lr(self, lr: float) -> None:
        """Set the run's learning rate; each group multiplies it by its `rate`."""
        for group in self.groups():
            group["lr"] = lr * group["rate"]

    def groups(self) -> Iterator[dict[str, Any]]:
        """Yield the groups of parameters."""
        for optimizer in self.each:
            yield from optimizer.param_groups

    def parameter_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the optimizer state of a parameter."""
        return next(each.state[parameter] for each in self.each if parameter in each.state)


def build_optimizer(
    model: GPT,
    settings: OptimizerSettings,
    finetuning: FinetuningSettings,
    autocast: torch.dtype | None = None,
) -> Optimizer:
    """Group the trainable parameters; biases and norms are not decayed, as in nanoGPT.

    `autocast`: dtype of Muon's matrix products; None: float32.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, parameter in sorted(trainable, key=lambda item: item[1].dim() < 2):  # matrices first
        kind = parameter_kind(name, parameter)
        by_muon = kind == "matrix" and settings.optimizer == "muon"
        rate = lr_multiplier(name, model.settings.n_layer, finetuning)
        rate *= kind_lr_multiplier(kind, settings, model.settings)
        decay = 0.0 if kind == "vector" else settings.weight_decay
        count = stacked_matrices(name, model.settings) if by_muon else 1
        new = {"params": [], "weight_decay": decay, "rate": rate}
        if by_muon:
            new["matrices"] = count
        group = groups.setdefault((by_muon, kind == "vector", rate, count), new)
        group["params"].append(parameter)
    for_muon = [group for key, group in groups.items() if key[0]]
    for_adamw = [group for key, group in groups.items() if not key[0]]
    each: list[torch.optim.Optimizer] = []
    if for_adamw:
        each.append(build_adamw(for_adamw, settings))
    if for_muon:
        dtype = autocast or torch.float32
        each.append(Muon(for_muon, settings.learning_rate, settings.momentum, dtype))
    return Optimizer(tuple(each))


def build_adamw(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.AdamW:
    """Return AdamW with its state allocated; torch would do that in the first step.

    So the tensors of a checkpoint are known, and a resumed optimizer is loaded like a model.
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


def parameter_kind(name: str, parameter: Tensor) -> Kind:
    """Return the kind of a parameter."""
    if parameter.dim() < 2:
        return "vector"
    if name.startswith("h."):
        return "matrix"
    return "head" if name.startswith("lm_head.") else "embedding"


def kind_lr_multiplier(kind: Kind, settings: OptimizerSettings, shape: ModelSettings) -> float:
    """Return the factor of the learning rate for a kind of parameters.

    muP: Adam's step does not shrink with the gradient, so a wider matrix gets a smaller one; Muon's
    step has the right size at every width.
    """
    rates = {
        "matrix": settings.matrix_rate,
        "embedding": settings.embedding_rate,
        "head": settings.head_rate,
        "vector": 1.0,
    }
    is_scaled = kind == "matrix" and settings.optimizer == "adamw"
    return rates[kind] / (shape.width_ratio if is_scaled else 1.0)


def stacked_matrices(name: str, shape: ModelSettings) -> int:
    """Return how many matrices a parameter of the layers stacks on top of each other."""
    if name.endswith("c_attn.weight"):
        return 3  # queries, keys, values
    return 2 if name.endswith("c_fc.weight") and shape.activation == "swiglu" else 1


def state_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return this rank's optimizer state, each tensor as `name of state/name of parameter`."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for key, value in optimizer.parameter_state(parameter).items()
    }


@torch.no_grad()
def load_state_tensors(model: nn.Module, optimizer: Optimizer, tensors: NamedTensors) -> None:
    """Copy this rank's part of each whole tensor, named as by `state_tensors`, into the optimizer.

    DamagedFile if they are not the tensors of this optimizer.
    """
    own = state_tensors(model, optimizer)
    missing = set(own)
    for name, whole in tensors:
        if name not in missing or own[name].shape != whole.shape:
            raise DamagedFile(f"the optimizer's state: {name[:80]} is not of this run's optimizer")
        to_local(own[name]).copy_(shard_like(whole, own[name]))
        missing.remove(name)
    if missing:
        raise DamagedFile(f"the optimizer's state: {min(missing)} is missing")
