"""What the name of a model refers to: one resolver for sampling, finetuning, export and evaluation.

In: a run directory (its best checkpoint) or a checkpoint directory, also in an object store, a
Hugging Face folder, or gpt2, gpt2-medium, gpt2-large, gpt2-xl. Out: where the weights are, the
shape of the model, and the tokenizer. Needs no torch, so that mistakes show at once; load.py makes
the model from it.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from yuzogpt import checkpoints, tokenization
from yuzogpt.checkpoints import remote
from yuzogpt.checkpoints.format import Checkpoint
from yuzogpt.checkpoints.pretrained import CONFIG, PUBLISHED, read_config
from yuzogpt.config import ModelSettings
from yuzogpt.errors import UserError
from yuzogpt.storage.untrusted import DamagedFile
from yuzogpt.tokenization import huggingface
from yuzogpt.tokenization.tokenizer import Tokenizer

GPT2_VOCABULARY = 50257


@dataclass(frozen=True)
class ModelReference:
    """A model that exists, as far as is known without loading it."""

    name: str
    shape: ModelSettings
    checkpoint: Checkpoint | None  # None: a published name or a Hugging Face folder

    def tokenizer(self) -> Tokenizer:
        if self.checkpoint:
            return tokenization.load(self.checkpoint.directory / checkpoints.TOKENIZER)
        if self.name in PUBLISHED:
            return tokenization.gpt2_tokenizer()
        tokenizer = huggingface.read_tokenizer(Path(self.name))
        if tokenizer is None and self.shape.vocab_size == GPT2_VOCABULARY:
            return tokenization.gpt2_tokenizer()
        if tokenizer is None:
            raise UserError(
                f"{self.name}: its {self.shape.vocab_size} tokens are not GPT-2's, and the folder "
                "has no tokenizer; add its tokenizer.json"
            )
        if tokenizer.vocab_size != self.shape.vocab_size:
            raise UserError(
                f"{self.name}: its tokenizer has {tokenizer.vocab_size} tokens, its model "
                f"{self.shape.vocab_size}; they do not belong together"
            )
        return tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether it is known which tokenizer belongs to the model."""
        if self.checkpoint or self.shape.vocab_size == GPT2_VOCABULARY:
            return True
        return huggingface.has_tokenizer(Path(self.name))


def resolve_model(name: str, context: int = 0) -> ModelReference:
    """Return what `name` refers to; UserError if there is no model.

    `context`: its context length in tokens; 0: as in training.
    """
    return with_context(find_model(name), context)


def with_context(reference: ModelReference, context: int) -> ModelReference:
    """Return a model with another context length; UserError if it has no positions for it."""
    shape = reference.shape
    if not context:
        return reference
    if context > shape.block_size and not shape.is_extensible:
        raise UserError(
            f"--context={context}: {reference.name} has learned positions, for "
            f"{shape.block_size} tokens; rotary and alibi extend past their block_size"
        )
    return replace(reference, shape=shape.model_copy(update={"block_size": context}))


def find_model(name: str) -> ModelReference:
    """Return what `name` refers to, as it was trained."""
    if name in PUBLISHED:
        return ModelReference(name, PUBLISHED[name].shape, None)
    if Path(name, CONFIG).is_file():
        return ModelReference(name, read_config(Path(name, CONFIG)), None)
    checkpoint = checkpoints.find(remote.open_reference(name))
    if checkpoint is None:
        raise UserError(
            f"{name}: no model here; give a run or checkpoint directory, a Hugging Face folder, "
            f"or one of {', '.join(PUBLISHED)}"
        )
    return ModelReference(name, shape_of(checkpoint), checkpoint)


def shape_of(checkpoint: Checkpoint) -> ModelSettings:
    """Return the shape of a checkpoint's model; the rest of its settings may be of any version."""
    try:
        shape = ModelSettings.model_validate(checkpoint.state.settings.get("model", {}))
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, item["loc"])) for item in error.errors()[:8])
        raise UserError(
            f"{checkpoint.directory}: a model of another version of YuzoGPT; not known: {wrong}"
        ) from None
    if not shape.vocab_size:
        raise DamagedFile(f"{checkpoint.directory}: settings.model.vocab_size: none")
    return shape
