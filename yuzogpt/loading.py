"""From a reference to a model, on the CPU.

In: what references.py found. Out: a GPT with its weights, or the weights that training starts from.
"""

from collections.abc import Iterable

from torch import Tensor

from yuzogpt.checkpoints import MODEL, Checkpoint
from yuzogpt.config import ModelSettings, TrainSettings
from yuzogpt.model import huggingface
from yuzogpt.model.gpt import GPT
from yuzogpt.model.initialization import initial_weights
from yuzogpt.references import ModelReference, resolve_model, shape_of

NamedTensors = Iterable[tuple[str, Tensor]]


def load_model(reference: ModelReference) -> GPT:
    """Load a model for reading (eval mode)."""
    checkpoint = reference.checkpoint
    if checkpoint is None:
        return huggingface.load(reference.name).eval()
    try:
        return restore(checkpoint).eval()
    except FileNotFoundError:  # its run goes on, and has replaced it meanwhile
        return load_model(resolve_model(reference.name))


def restore(checkpoint: Checkpoint) -> GPT:
    """Build the model of a checkpoint, with its weights."""
    model = GPT(shape_of(checkpoint))
    model.load_state_dict(dict(checkpoint.tensors(MODEL)))
    return model


def starting_weights(
    settings: TrainSettings, resume: Checkpoint | None
) -> tuple[ModelSettings, NamedTensors]:
    """Return the shape and the weights that training starts from: resumed, another's, or new.

    The weights come one after the other, so that a rank need not hold all of them.
    """
    if resume:
        return shape_of(resume), resume.tensors(MODEL)
    if settings.run.init_from == "scratch":
        return settings.model, initial_weights(settings.model, settings.run.seed)
    pretrained = load_model(resolve_model(settings.run.init_from))
    return adapt(pretrained, settings.model)


def adapt(pretrained: GPT, wanted: ModelSettings) -> tuple[ModelSettings, NamedTensors]:
    """Return the pretrained shape and weights, with the run's dropout, cropped to block_size."""
    shape = pretrained.settings
    assert shape.vocab_size == wanted.vocab_size, "runs.check_start compares them"
    assert shape.block_size >= wanted.block_size, "and these"
    changes = {"dropout": wanted.dropout, "block_size": wanted.block_size}
    weights = pretrained.state_dict()
    weights["wpe.weight"] = weights["wpe.weight"][: wanted.block_size]
    return shape.model_copy(update=changes), weights.items()
