"""Parameter groups: each parameter's optimizer, learning rate and weight decay.

Learning rates differ by kind of parameter, by width (muP) and by depth (finetuning.py).
"""

from typing import Any, Literal

from torch import Tensor

from yuzogpt.config import FinetuningSettings, ModelSettings, OptimizerSettings
from yuzogpt.model.gpt import GPT
from yuzogpt.model.layers import ACTIVATIONS
from yuzogpt.training.finetuning import lr_multiplier

Kind = Literal["matrix", "embedding", "head", "vector"]
Group = dict[str, Any]  # as torch's optimizers take it


def parameter_groups(
    model: GPT, settings: OptimizerSettings, finetuning: FinetuningSettings
) -> tuple[list[Group], list[Group]]:
    """Return the groups of the trainable parameters for AdamW, and those for Muon.

    Biases and norms are not decayed, as in nanoGPT.
    """
    groups: dict[tuple[Any, ...], Group] = {}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, parameter in sorted(trainable, key=lambda item: item[1].dim() < 2):  # matrices first
        kind = parameter_kind(name, parameter)
        by_muon = kind == "matrix" and settings.optimizer == "muon"
        rate = lr_multiplier(name, model.settings.n_layer, finetuning)
        rate *= kind_lr_multiplier(kind, settings, model.settings)
        decay = 0.0 if kind == "vector" else settings.weight_decay
        count = stacked_matrices(name, model.settings) if by_muon else 1
        new: Group = {"params": [], "weight_decay": decay, "lr_factor": rate}
        if by_muon:
            new["matrices"] = count
        group = groups.setdefault((by_muon, kind == "vector", rate, count), new)
        group["params"].append(parameter)
    for_muon = [group for key, group in groups.items() if key[0]]
    for_adamw = [group for key, group in groups.items() if not key[0]]
    return for_adamw, for_muon


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
        "matrix": settings.matrix_lr_mult,
        "embedding": settings.embedding_lr_mult,
        "head": settings.head_lr_mult,
        "vector": 1.0,
    }
    is_scaled = kind == "matrix" and settings.optimizer == "adamw"
    return rates[kind] / (shape.width_ratio if is_scaled else 1.0)


def stacked_matrices(name: str, shape: ModelSettings) -> int:
    """Return how many matrices a parameter of the layers stacks on top of each other."""
    if name.endswith("c_attn.weight"):
        return 3  # queries, keys, values
    is_gated = ACTIVATIONS.has(shape.activation, "is_gated")
    return 2 if is_gated and name.endswith("c_fc.weight") else 1
