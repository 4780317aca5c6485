"""From a reference to a model, on the CPU.

In: what references.py found. Out: a GPT with its weights.
"""

from yuzogpt.checkpoints import Checkpoint
from yuzogpt.config import ModelSettings, TrainSettings
from yuzogpt.model import huggingface
from yuzogpt.model.gpt import GPT
from yuzogpt.model.initialization import initialize
from yuzogpt.references import ModelReference, resolve_model, shape_of


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
    model.load_state_dict(checkpoint.model())
    return model


def model_for_training(settings: TrainSettings, resume: Checkpoint | None) -> GPT:
    """Return the model that training starts from: resumed, from other weights, or from scratch."""
    if resume:
        return restore(resume)
    if settings.run.init_from == "scratch":
        model = GPT(settings.model)
        initialize(model, settings.run.seed)
        return model
    pretrained = load_model(resolve_model(settings.run.init_from))
    return adapt(pretrained, settings.model).train()


def adapt(pretrained: GPT, wanted: ModelSettings) -> GPT:
    """Return the pretrained model with the run's dropout, its positions cropped to block_size."""
    shape = pretrained.settings
    assert shape.vocab_size == wanted.vocab_size, "runs.check_start compares them"
    assert shape.block_size >= wanted.block_size, "and these"
    changes = {"dropout": wanted.dropout, "block_size": wanted.block_size}
    model = GPT(shape.model_copy(update=changes))
    weights = pretrained.state_dict()
    weights["wpe.weight"] = weights["wpe.weight"][: wanted.block_size]
    model.load_state_dict(weights)
    return model
