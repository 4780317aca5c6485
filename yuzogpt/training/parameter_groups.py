"""Parameter groups: each parameter's optimizer, learning rate and weight decay.

Learning rates differ by kind of parameter, by width (muP) and by depth (finetuning.py).
"""

from typing import Any, Literal

from torch import Tensor

from yuzogpt.config import FinetuningSettings, ModelSettings, OptimizerSettings
from yuzogpt.config.registry import has_trait
from yuzogpt.model.gpt import GPT
from yuzogpt.model.layers import ACTIVATIONS
from yuzogpt.training.finetuning import lr_multiplier

Kind = Literal["matrix", "embedding", "head", "vector"]
Group = dict[str, Any]  # as torch's optimizers take it


def parameter_groups(
    model: GPT, settings: OptimizerSettings, finetuning: FinetuningSettings
) -> dict[str, list[Group]]:
    """Return the groups of the trainable parameters, by the name of their optimizer.

    Biases and norms are not decayed, as in nanoGPT. An optimizer of whole matrices gets the number
    of `matrices` that each of its parameters stacks.
    """
    groups: dict[tuple[Any, ...], Group] = {}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, parameter in sorted(trainable, key=lambda item: item[1].dim() < 2):  # matrices first
        kind = parameter_kind(name, parameter)
        optimizer = settings.optimizer if kind == "matrix" else "adamw"
        is_whole = kind == "matrix" and updates_whole_matrices(settings)
        rate = lr_multiplier(name, model.settings.n_layer, finetuning)
        rate *= kind_lr_multiplier(kind, settings, model.settings)
        decay = 0.0 if kind == "vector" else settings.weight_decay
        count = stacked_matrices(name, model.settings) if is_whole else 1
        new: Group = {"params": [], "weight_decay": decay, "lr_factor": rate}
        if is_whole:
            new["matrices"] = count
        group = groups.setdefault((optimizer, kind == "vector", rate, count), new)
        group["params"].append(parameter)
    by_optimizer: dict[str, list[Group]] = {}
    for (optimizer, *_), group in groups.items():
        by_optimizer.setdefault(optimizer, []).append(group)
    return by_optimizer


def updates_whole_matrices(settings: OptimizerSettings) -> bool:
    """Return whether the layers' matrices are not updated element by element."""
    return has_trait(settings, "optimizer", "whole_matrices")


def parameter_kind(name: str, parameter: Tensor) -> Kind:
    """Return the kind of a parameter."""
    if parameter.dim() < 2:
        return "vector"
    if name.startswith("h."):
        return "matrix"
    return "head" if name.startswith("lm_head.") else "embedding"


def kind_lr_multiplier(kind: Kind, settings: OptimizerSettings, shape: ModelSettings) -> float:
    """Return the factor of the learning rate for a kind of parameters.

    muP: the step of Adam, and of its like, does not shrink with the gradient, so a wider matrix
    gets a smaller one; the step of a whole matrix has the right size at every width.
    """
    rates = {
        "matrix": settings.matrix_lr_mult,
        "embedding": settings.embedding_lr_mult,
        "head": settings.head_lr_mult,
        "vector": 1.0,
    }
    is_scaled = kind == "matrix" and not updates_whole_matrices(settings)
    return rates[kind] / (shape.width_ratio if is_scaled else 1.0)


def stacked_matrices(name: str, shape: ModelSettings) -> int:
    """Return how many matrices a parameter of the layers stacks on top of each other."""
    if name.endswith("c_attn.weight"):
        return 3  # queries, keys, values
    is_gated = ACTIVATIONS.has(shape.activation, "is_gated")
    return 2 if is_gated and name.endswith("c_fc.weight") else 1
