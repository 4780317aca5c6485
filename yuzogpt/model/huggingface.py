"""GPT-2's checkpoints in and out, in Hugging Face's format.

In: a name (gpt2, gpt2-medium, gpt2-large, gpt2-xl) or a local folder. Out: a GPT. And back: a GPT,
as a folder that `transformers` loads. Two layouts of keys are read: the hub's (no prefix, with
masks) and save_pretrained's (prefix `transformer.`). OpenAI's matrices are stored transposed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yuzogpt.config import ModelSettings
from yuzogpt.errors import UserError
from yuzogpt.files import sha256
from yuzogpt.model.gpt import GPT

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What decides the arithmetic, with its default first: another value would be another model.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}

# Linear layers that GPT-2 stores as (in, out); torch's nn.Linear wants (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@dataclass(frozen=True)
class Published:
    """One of OpenAI's checkpoints on the hub, pinned to a revision."""

    revision: str
    sha256: str | None  # of model.safetensors; None: what the hub says of the revision


PUBLISHED = {
    "gpt2": Published(
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
    "gpt2-medium": Published("6dcaa7a952f72f9298047fd5137cd6e4f05f41da", None),
    "gpt2-large": Published("32b71b12589c2f8d625668d2335a01cac3249519", None),
    "gpt2-xl": Published(
        "15ea56dee5df4983c59b2538573817e1667135e2",
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    ),
}


def load(name_or_folder: str) -> GPT:
    """Return a GPT with the weights of a published checkpoint or a local folder."""
    named = name_or_folder in PUBLISHED
    folder = download(name_or_folder) if named else Path(name_or_folder)
    settings = read_config(folder / CONFIG)
    tensors = rename(read_weights(folder))
    model = GPT(settings)
    pad_vocabulary(tensors, model.wte.num_embeddings)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{folder}: not a GPT-2: {name} is {found.get(name)}, "
                f"{CONFIG} asks for {expected.get(name)}"
            )
    model.load_state_dict(tensors)
    return model


def download(name: str) -> Path:
    """Fetch a published checkpoint into Hugging Face's cache, and check its SHA-256."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, published = f"openai-community/{name}", PUBLISHED[name]
    try:
        hf_hub_download(repository, CONFIG, revision=published.revision)
        weights = Path(hf_hub_download(repository, WEIGHTS, revision=published.revision))
        # The cache names a large file by the SHA-256 that the hub has for this revision.
        expected = published.sha256 or weights.resolve().name
    except (LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name}: the weights are neither in Hugging Face's cache nor within reach ({reason}); "
            f"on a machine with web: `hf download {repository} {CONFIG} {WEIGHTS} "
            f"--revision {published.revision} --local-dir DIR`, then give DIR instead of {name}"
        ) from None
    found = sha256(weights)
    if found != expected:
        raise UserError(f"{weights}: SHA-256 is {found}, expected {expected}; delete it")
    return weights.parent


def read_config(path: Path) -> ModelSettings:
    """Translate Hugging Face's config.json."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a Hugging Face folder of a GPT-2")
    config = json.loads(path.read_text(encoding="utf-8"))
    for key, values in REQUIRED.items():
        if config.get(key, values[0]) not in values:
            raise UserError(
                f"{path}: {key} is {config[key]!r}; GPT-2's arithmetic has {values[0]!r}"
            )
    return ModelSettings(
        n_layer=config["n_layer"],
        n_head=config["n_head"],
        n_embd=config["n_embd"],
        block_size=config["n_positions"],
        vocab_size=config["vocab_size"],
        bias=True,
    )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read model.safetensors, or the pieces that its index names."""
    from safetensors.torch import load_file

    index = folder / INDEX
    files = [WEIGHTS]
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for name in files:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name}: no such file; weights are read from safetensors only "
                "(pytorch_model.bin is a pickle: convert it with transformers' save_pretrained)"
            )
        tensors.update(load_file(folder / name))
    return tensors


def rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn either layout of keys into ours, and matrices the right way round."""
    ours: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("transformer.")
        if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the output matrix is wte; the causal masks are not weights
        ours[name] = tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
    return ours


def pad_vocabulary(tensors: dict[str, Tensor], rows: int) -> None:
    """Add the embedding's padding rows, in place."""
    embedding = tensors.get("wte.weight")
    if embedding is not None:
        padding = embedding.new_zeros(max(0, rows - len(embedding)), embedding.shape[1])
        tensors["wte.weight"] = torch.cat([embedding, padding])


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
    (folder / CONFIG).write_text(json.dumps(to_config(settings, end_of_text), indent=2) + "\n")


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
        "vocab_size": settings.vocab_size,
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": settings.dropout,
        "attn_pdrop": settings.dropout,
        "resid_pdrop": settings.dropout,
        "tie_word_embeddings": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }
