"""`yuzogpt export`: from a run to a folder that other programs load.

In: a model that resolve.py found, and a folder that does not exist. Out: that folder, complete or
not at all, in Hugging Face's format: weights, config, and the tokenizer's files.
"""

import shutil
import uuid
from pathlib import Path

from yuzogpt.checkpoints.resolve import ModelReference
from yuzogpt.config import ModelSettings
from yuzogpt.errors import RunFailed, UserError
from yuzogpt.storage.atomic_files import sync_directory, sync_file
from yuzogpt.tokenization import huggingface as tokenizer_files

# Of the model's settings, those that Hugging Face's GPT-2 has one value of: the default.
FIXED = (
    "pos_emb", "norm", "activation", "qk_norm", "logit_softcap", "tie_embeddings", "mup_base_width"
)  # fmt: skip


def to_huggingface(reference: ModelReference, folder: Path) -> None:
    """Write a model and its tokenizer; the folder gets its name when it is complete."""
    check_no_other_parts(reference)
    tokenizer = reference.tokenizer()
    files = tokenizer_files.to_files(tokenizer, reference.shape.block_size)

    # Only now torch, which takes seconds to import: mistakes have shown by here.
    from safetensors import SafetensorError

    from yuzogpt.checkpoints import huggingface
    from yuzogpt.checkpoints.load import load_model

    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        huggingface.save(load_model(reference), temporary, tokenizer.end_of_text)
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        for path in temporary.iterdir():
            sync_file(path)
        sync_directory(temporary)
        temporary.rename(folder)
    except SafetensorError as error:  # the disk is full, say
        raise RunFailed(f"{folder}: not written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_directory(folder.parent)


def check_no_other_parts(reference: ModelReference) -> None:
    """Raise UserError if the model has parts that Hugging Face's GPT-2 has not."""
    gpt2 = ModelSettings()
    others = [name for name in FIXED if getattr(reference.shape, name) != getattr(gpt2, name)]
    if others:
        settings = ", ".join(f"{name}={getattr(reference.shape, name)}" for name in others)
        raise UserError(
            f"{reference.name}: Hugging Face's GPT-2 has no {settings}; only models of GPT-2's own "
            "parts can be exported"
        )
