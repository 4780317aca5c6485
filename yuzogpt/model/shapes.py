"""The names and shapes of a model's weights: counted, and checked where they may be hostile.

This allocates no memory for the model.
"""

import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from yuzogpt.config import ModelSettings
from yuzogpt.model.gpt import GPT
from yuzogpt.storage.untrusted import DamagedFile

LAYER = re.compile(r"h\.(\d+)\.")


def check_shapes(settings: ModelSettings, weights: Mapping[str, Tensor], origin: str) -> None:
    """Raise DamagedFile unless `weights` are exactly the tensors of a GPT with these settings.

    `origin`: the source of settings and weights, for the message.
    """
    layers = {match[1] for name in weights if (match := LAYER.match(name))}
    if len(layers) != settings.n_layer:
        raise DamagedFile(
            f"{origin}: its settings say n_layer={settings.n_layer}, its weights have "
            f"{len(layers)} layers"
        )
    expected = dict(expected_shapes(settings))
    actual = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            raise DamagedFile(
                f"{origin}: {name[:80]} is {format_shape(actual.get(name))}, its settings ask for "
                f"{format_shape(expected.get(name))}"
            )
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise DamagedFile(f"{origin}: {name} is of {tensor.dtype}, not a floating-point type")


def expected_shapes(settings: ModelSettings) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of a GPT's tensors; all of its layers are alike."""
    with torch.device("meta"):
        model = GPT(settings.model_copy(update={"n_layer": 1}))
    for name, tensor in model.state_dict().items():
        layers = range(settings.n_layer) if name.startswith("h.0.") else range(1)
        for layer in layers:
            yield name.replace("h.0.", f"h.{layer}.", 1), tuple(tensor.shape)


def count_weights(settings: ModelSettings) -> int:
    """Count all weights, including positions and padding."""
    return sum(math.prod(shape) for _, shape in expected_shapes(settings))


def count_layer(settings: ModelSettings) -> int:
    """Count the weights of a layer."""
    shapes = expected_shapes(settings)
    return sum(math.prod(shape) for name, shape in shapes if name.startswith("h.0."))


def format_shape(shape: tuple[int, ...] | None) -> str:
    """Return a shape as text."""
    return "missing" if shape is None else " x ".join(map(str, shape[:8])) or "a number"
