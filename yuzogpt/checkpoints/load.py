"""Loads a model that resolve.py found, on the CPU: a GPT with its weights, or the weights alone."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from yuzogpt.checkpoints import huggingface
from yuzogpt.checkpoints.format import MODEL, Checkpoint
from yuzogpt.checkpoints.resolve import ModelReference, resolve_model, shape_of
from yuzogpt.config import TrainSettings
from yuzogpt.errors import UserError
from yuzogpt.model.gpt import GPT
from yuzogpt.model.initialization import initial_weights
from yuzogpt.model.shapes import check_shapes

NamedTensors = Iterable[tuple[str, Tensor]]


def load_model(reference: ModelReference, exact: bool = False) -> GPT:
    """Load a model for reading (eval mode); `exact`: as `read_weights` has it."""
    shape, weights = reference.shape, read_weights(reference, exact)
    cut_positions(weights, shape.block_size)
    with torch.device("meta"):
        model = GPT(shape)
    # Memory-mapped, so processes of a node share the pages that none changes.
    model.load_state_dict({k: tensor.float() for k, tensor in weights.items()}, assign=True)
    return model.eval()


def read_weights(reference: ModelReference, exact: bool = False) -> dict[str, Tensor]:
    """Return the weights of a model, memory-mapped: a tensor is read when it is used.

    If its run has deleted the checkpoint meanwhile, return its successor's, unless `exact`.
    """
    if reference.checkpoint is None:
        _, weights = huggingface.read(reference.name)
        return weights
    try:
        weights = dict(reference.checkpoint.tensors(MODEL))
    except FileNotFoundError:
        if exact:
            raise
        return read_weights(resolve_model(reference.name))
    # `--context` of the reference may be another; the weights are those of the checkpoint itself.
    shape = shape_of(reference.checkpoint)
    check_shapes(shape, weights, str(reference.checkpoint.directory))
    return weights


@dataclass(frozen=True)
class Start:
    """Another model's weights, from which training starts; the same on all ranks."""

    reference: ModelReference
    sha256: str  # as `weights_hash` has it; empty: published weights


def starting_weights(
    settings: TrainSettings, resume: Checkpoint | None, start: Start | None
) -> NamedTensors:
    """Return the weights that training starts from: resumed, another model's, or new.

    They come one after the other, so that a rank does not hold all of them.
    """
    if resume:
        check_shapes(settings.model, dict(resume.tensors(MODEL)), str(resume.directory))
        return resume.tensors(MODEL)
    if start is None:
        return initial_weights(settings.model, settings.run.seed, settings.initialization)
    try:
        weights = read_weights(start.reference, exact=True)
    except FileNotFoundError:
        raise UserError(
            f"{start.reference.name}: deleted meanwhile, by its run; the same command starts from "
            "a newer one"
        ) from None
    cut_positions(weights, settings.model.block_size)
    return weights.items()


def cut_positions(weights: dict[str, Tensor], block_size: int) -> None:
    """Drop learned positions past a shorter context."""
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][:block_size]
