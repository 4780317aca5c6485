"""GPT-2's checkpoints in and out, in Hugging Face's format.

In: a name (gpt2, gpt2-medium, gpt2-large, gpt2-xl) or a local folder. Out: its shape and weights.
And back: a GPT, as a folder that `transformers` loads. Two layouts of keys are read: the hub's (no
prefix, with masks) and save_pretrained's (prefix `transformer.`). OpenAI's matrices are stored
transposed. pretrained.py has the part that needs no torch.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from yuzogpt.checkpoints.pretrained import (
    CONFIG,
    PUBLISHED,
    WEIGHTS,
    download,
    read_config,
    weight_files,
)
from yuzogpt.checkpoints.safetensors_file import read_tensors
from yuzogpt.config import ModelSettings
from yuzogpt.model.gpt import GPT
from yuzogpt.model.shapes import check_shapes

GENERATION_CONFIG = "generation_config.json"
# Linear layers that GPT-2 stores as (in, out); torch's nn.Linear has (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def read(name_or_folder: str) -> tuple[ModelSettings, dict[str, Tensor]]:
    """Return the shape and the weights of a published checkpoint or a local folder.

    They are memory-mapped: a tensor is read when it is used.
    """
    is_named = name_or_folder in PUBLISHED
    folder = download(name_or_folder) if is_named else Path(name_or_folder)
    shape = read_config(folder / CONFIG)
    tensors = {
        name: pad(tensor, shape) if name == "wte.weight" else tensor
        for name, tensor in renamed(folder)
    }
    check_shapes(shape, tensors, f"{folder}: not a GPT-2")
    return shape, tensors


def renamed(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a folder in either layout, with our names and in our orientation."""
    for path in weight_files(folder):
        for key, tensor in read_tensors(path):
            name = key.removeprefix("transformer.")
            if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
                continue  # the output matrix is wte; the causal masks are not weights
            yield name, tensor.t() if name.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor


def pad(embedding: Tensor, shape: ModelSettings) -> Tensor:
    """Add the embedding's padding rows, if it has one row for each token."""
    if embedding.shape != (shape.vocab_size, shape.n_embd):
        return embedding  # its shape is wrong, and will be refused
    return F.pad(embedding, (0, 0, 0, shape.padded_vocab - shape.vocab_size))


def save(model: GPT, folder: Path, end_of_text: int | None) -> None:
    """Write `model` as a Hugging Face folder, without the embedding's padding.

    GPT-2 has biases everywhere; a model without them is written with zeros, which is the same.
    """
    from safetensors.torch import save_file

    settings = model.settings
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.float()
        if name == "wte.weight":
            tensor = tensor[: settings.vocab_size]
        if name.endswith(".weight") and not settings.bias and not name.startswith(("wte", "wpe")):
            tensors[f"transformer.{name.removesuffix('weight')}bias"] = torch.zeros(len(tensor))
        tensor = tensor.t() if name.endswith(TRANSPOSED) else tensor
        tensors[f"transformer.{name}"] = tensor.contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for name, content in (
        (CONFIG, to_config(settings, end_of_text)),
        (GENERATION_CONFIG, to_generation_config(settings, end_of_text)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def to_config(settings: ModelSettings, end_of_text: int | None) -> dict[str, Any]:
    """Return Hugging Face's config.json for a model of this shape."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_layer": settings.n_layer,
        "n_head": settings.n_head,
        "n_embd": settings.n_embd,
        "n_positions": settings.block_size,
        "n_ctx": settings.block_size,
        "torch_dtype": "float32",
        "vocab_size": settings.vocab_size,
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": settings.dropout,
        "attn_pdrop": settings.dropout,
        "resid_pdrop": settings.dropout,
        "tie_word_embeddings": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }


def to_generation_config(settings: ModelSettings, end_of_text: int | None) -> dict[str, Any]:
    """Return generation_config.json; without it `pipeline` generates 256 tokens too many.

    The length counts prompt and text together: each token has a position.
    """
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_text)
    return {"max_length": settings.block_size, **({} if end_of_text is None else ids)}
