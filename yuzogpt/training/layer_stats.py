"""Statistics of each layer in one step: gradient norm, weight norm, size of the update."""

import math

import torch

from yuzogpt.runtime.torch_internals import subtract, vector_norms
from yuzogpt.runtime.world import World
from yuzogpt.training.guards import StepStats
from yuzogpt.training.parallel import ParallelModel


def layer_name(name: str) -> str:
    """Return the layer that a parameter belongs to: wte, wpe, h.0, h.1, ..., ln_f."""
    return ".".join(name.split(".")[:2]) if name.startswith("h.") else name.split(".")[0]


def non_finite_layers(model: ParallelModel, stats: StepStats) -> list[str]:
    """Return the layers whose gradient is not finite, in the model's order."""
    pairs = zip(model.trainable_parameters(), stats.grad_norms, strict=True)
    return list(dict.fromkeys(layer_name(name) for name, norm in pairs if not math.isfinite(norm)))


class LayerStats:
    """Compares the weights before and after one step; until then it holds a copy of them."""

    def __init__(self, model: ParallelModel) -> None:
        """Call it before the optimizer's step."""
        self.model = model
        self.before = [weight.clone() for weight in model.weights()]

    def compute(self, stats: StepStats, world: World) -> dict[str, dict[str, float]]:
        """Return the norms of each trainable layer, and its update relative to its weights.

        Call it after the optimizer's step, on every rank.
        """
        weights = self.model.weights()
        updates = subtract(weights, self.before)
        squares = torch.stack([*vector_norms(weights), *vector_norms(updates)]) ** 2
        if self.model.kind == "fsdp":
            world.all_reduce_(squares)
        values = squares.tolist()
        sums: dict[str, list[float]] = {}
        for index, name in enumerate(self.model.trainable_parameters()):
            gradient = stats.grad_norms[index] ** 2
            layer = sums.setdefault(layer_name(name), [0.0, 0.0, 0.0])
            for column, value in enumerate((gradient, values[index], values[len(weights) + index])):
                layer[column] += value
        return {
            name: {
                "grad_norm": math.sqrt(gradient),
                "weight_norm": math.sqrt(weight),
                "update_to_weight": math.sqrt(update / weight) if weight else 0.0,
            }
            for name, (gradient, weight, update) in sums.items()
        }
