"""GPT-2's published checkpoints and Hugging Face folders: everything that needs no torch.

In: a name (gpt2, gpt2-medium, gpt2-large, gpt2-xl) or a local folder. Out: the shape of its model,
and where its weights are, so that mistakes show before anything starts. huggingface.py reads them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from yuzogpt.config import ModelSettings
from yuzogpt.errors import UserError
from yuzogpt.storage.atomic_files import sha256
from yuzogpt.storage.untrusted import DamagedFile, Untrusted, first_mistake, read_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Keys that decide the arithmetic, and the values that we compute; the default is first.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


class WeightIndex(Untrusted):
    """The content of an index: which tensor is in which file beside it."""

    weight_map: dict[str, Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*\.safetensors$")]]


@dataclass(frozen=True)
class Published:
    """One of OpenAI's checkpoints on the hub, pinned to a revision."""

    revision: str
    sha256: str | None  # of model.safetensors; None: as the hub has it for the revision
    n_layer: int
    n_head: int
    n_embd: int

    @property
    def shape(self) -> ModelSettings:
        """The shape of the model; all four have GPT-2's vocabulary and context."""
        return ModelSettings(
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
            block_size=1024,
            vocab_size=50257,
            bias=True,
        )


PUBLISHED = {
    "gpt2": Published(
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
        *(12, 12, 768),
    ),
    "gpt2-medium": Published("6dcaa7a952f72f9298047fd5137cd6e4f05f41da", None, *(24, 16, 1024)),
    "gpt2-large": Published("32b71b12589c2f8d625668d2335a01cac3249519", None, *(36, 20, 1280)),
    "gpt2-xl": Published(
        "15ea56dee5df4983c59b2538573817e1667135e2",
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
        *(48, 25, 1600),
    ),
}


def download(name: str) -> Path:
    """Download a published checkpoint into Hugging Face's cache, and check its SHA-256."""
    from huggingface_hub import hf_hub_download

    published = PUBLISHED[name]
    check_hub_reachable(name)
    try:
        for file in (CONFIG, WEIGHTS):
            path = Path(hf_hub_download(repository(name), file, revision=published.revision))
    except OSError as error:  # the hub's own errors are OSErrors, too
        raise out_of_reach(name, error) from None
    if not (published.sha256 or path.is_symlink()):
        raise UserError(
            f"{path}: cannot be checked, since a cache without links does not keep its SHA-256; "
            f"give {path.parent} instead of {name}"
        )
    # The link names a blob, and that is named by the SHA-256 that the hub has for this revision;
    # the blob may itself be a link, to a file that repositories share, of another name.
    expected, actual = published.sha256 or path.readlink().name, sha256(path)
    if actual != expected:
        was = f"SHA-256 is {actual[:12]}, expected {expected[:12]}"
        raise UserError(f"{path.resolve()}: {was}; delete it")
    return path.parent


def check_hub_reachable(name: str) -> None:
    """Raise UserError if a published checkpoint is not in the cache and the hub does not answer.

    Asks the hub once: a download would retry for most of a minute, and print a line each time.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    revision = PUBLISHED[name].revision
    cached = [
        try_to_load_from_cache(repository(name), file, revision=revision)
        for file in (CONFIG, WEIGHTS)
    ]
    if all(isinstance(path, str) for path in cached):
        return
    try:
        get_hf_file_metadata(hf_hub_url(repository(name), WEIGHTS, revision=revision))
    except Exception as error:  # whatever HTTP client the library has in this version
        raise out_of_reach(name, error) from None


def out_of_reach(name: str, error: Exception) -> UserError:
    """Return an error that says how to download the weights on another machine."""
    lines = str(error).splitlines() or [repr(error)]
    return UserError(
        f"{name}: the weights are neither in Hugging Face's cache nor within reach ({lines[0]}); "
        f"on a machine with internet: `hf download {repository(name)} {CONFIG} {WEIGHTS} "
        f"--revision {PUBLISHED[name].revision} --local-dir DIR`, then give DIR instead of {name}"
    )


def repository(name: str) -> str:
    """Return where the hub has a published checkpoint."""
    return f"openai-community/{name}"


def read_config(path: Path) -> ModelSettings:
    """Translate Hugging Face's config.json; missing keys have GPT-2's values."""
    try:
        config = read_json(path, dict[str, Any])
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; expected a Hugging Face folder of a GPT-2"
        ) from None
    for key, values in REQUIRED.items():
        if config.get(key, values[0]) not in values:
            raise UserError(
                f"{path}: {key} is {config[key]!r:.80}; GPT-2's arithmetic has {values[0]!r}"
            )
    try:
        return ModelSettings(
            n_layer=config.get("n_layer", 12),
            n_head=config.get("n_head", 12),
            n_embd=config.get("n_embd", 768),
            block_size=config.get("n_positions", 1024),
            vocab_size=config.get("vocab_size", 50257),
            bias=True,
        )
    except ValidationError as error:
        raise DamagedFile(f"{path}: not the config of a GPT-2: {first_mistake(error)}") from None


def weight_files(folder: Path) -> list[Path]:
    """Return the files of the weights: model.safetensors, or the files that its index names."""
    index, names = folder / INDEX, [WEIGHTS]
    if index.exists():
        names = sorted(set(read_json(index, WeightIndex).weight_map.values()))
    for name in names:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name}: no such file; weights are read from safetensors only "
                "(pytorch_model.bin is a pickle: convert it with transformers' save_pretrained)"
            )
    return [folder / name for name in names]
