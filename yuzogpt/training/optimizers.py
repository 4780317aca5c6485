"""The optimizers: AdamW, or Muon for the layers' matrices; their state as named tensors.

In: a model, of which not all need learn, and settings. Out: optimizers that step together, and
their state by parameter name, so that a checkpoint does not depend on the order of parameters.
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
from yuzogpt.training.finetuning import rate_of
from yuzogpt.training.muon import Muon
from yuzogpt.training.parallel import local, part_of

Kind = Literal["matrix", "embedding", "head", "vector"]


@dataclass(frozen=True)
class Optimizer:
    """What updates the weights: each parameter belongs to one of them."""

    each: tuple[torch.optim.Optimizer, ...]

    def step(self) -> None:
        """Update all weights."""
        for optimizer in self.each:
            optimizer.step()

    def zero_grad(self) -> None:
        """Let go of all gradients."""
        for optimizer in self.each:
            optimizer.zero_grad(set_to_none=True)

    def set_learning_rate(self, lr: float) -> None:
        """Set the run's learning rate; each group's is its share of it."""
        for group in self.groups():
            group["lr"] = lr * group["rate"]

    def groups(self) -> Iterator[dict[str, Any]]:
        """Yield the groups of parameters."""
        for optimizer in self.each:
            yield from optimizer.param_groups

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return what is remembered of a parameter."""
        return next(each.state[parameter] for each in self.each if parameter in each.state)


def build_optimizer(
    model: GPT,
    settings: OptimizerSettings,
    finetuning: FinetuningSettings,
    autocast: torch.dtype | None = None,
) -> Optimizer:
    """Group the parameters that learn; biases and norms are not decayed, as in nanoGPT.

    `autocast`: what matrix products are computed in; None: in float32.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, parameter in sorted(learning, key=lambda item: item[1].dim() < 2):  # matrices first
        kind = kind_of(name, parameter)
        by_muon = kind == "matrix" and settings.optimizer == "muon"
        rate = rate_of(name, model.settings.n_layer, finetuning)
        rate *= group_rate(kind, settings, model.settings)
        decay = 0.0 if kind == "vector" else settings.weight_decay
        count = matrices_in(name, model.settings) if by_muon else 1
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
    """Return AdamW with its state; there from the start, not from the first step on.

    So what a checkpoint will hold is known, and a resumed optimizer is filled like a model.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    # One kernel for all parameters, where the device has one; the same arithmetic otherwise.
    fused = parameters[0].device.type in ("cpu", "cuda")
    betas = (settings.beta1, settings.beta2)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=fused)
    for parameter in parameters:
        optimizer.state[parameter] = {
            # A scalar that fused kernels want on the parameter's device.
            "step": torch.zeros((), device=parameter.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def kind_of(name: str, parameter: Tensor) -> Kind:
    """Return what sort of weight a parameter is."""
    if parameter.dim() < 2:
        return "vector"
    if name.startswith("h."):
        return "matrix"
    return "head" if name.startswith("lm_head.") else "embedding"


def group_rate(kind: Kind, settings: OptimizerSettings, shape: ModelSettings) -> float:
    """Return the learning rate of a sort of weights, over the run's.

    muP: Adam's step does not shrink with the gradient, so that of a wider matrix is made smaller;
    Muon's has the right size at every width.
    """
    rates = {
        "matrix": settings.matrix_lr_mult,
        "embedding": settings.embedding_lr_mult,
        "head": settings.head_lr_mult,
        "vector": 1.0,
    }
    is_scaled = kind == "matrix" and settings.optimizer == "adamw"
    return rates[kind] / (shape.width_ratio if is_scaled else 1.0)


def matrices_in(name: str, shape: ModelSettings) -> int:
    """Return how many matrices a parameter of the layers is, one on top of the other."""
    if name.endswith("c_attn.weight"):
        return 3  # queries, keys, values
    return 2 if name.endswith("c_fc.weight") and shape.activation == "swiglu" else 1


def state_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return what this rank has of the optimizers, as `name of state/name of parameter`."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for key, value in optimizer.state_of(parameter).items()
    }


@torch.no_grad()
def load_state_tensors(model: nn.Module, optimizer: Optimizer, tensors: NamedTensors) -> None:
    """Put back what `state_tensors` named: this rank's part of each whole tensor, bit for bit.

    DamagedFile if they are not those of this optimizer.
    """
    own = state_tensors(model, optimizer)
    missing = set(own)
    for name, whole in tensors:
        if name not in missing or own[name].shape != whole.shape:
            raise DamagedFile(f"the optimizer's state: {name[:80]} is not of this run's optimizer")
        local(own[name]).copy_(part_of(whole, own[name]))
        missing.remove(name)
    if missing:
        raise DamagedFile(f"the optimizer's state: {min(missing)} is missing")
