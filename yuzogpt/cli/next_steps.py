"""The command that comes next, as one can type it: `yuzogpt prepare` ends with it."""

import shlex
import shutil

from yuzogpt.config import PrepareSettings, TrainSettings
from yuzogpt.config.resolve import resolve
from yuzogpt.data.manifest import Manifest
from yuzogpt.storage.paths import as_typed

FINETUNED_TOKENS = 50_000_000  # fewer are too few to learn GPT-2's language from nothing


def after_prepare(settings: PrepareSettings, manifest: Manifest) -> str:
    """Return the command that trains on a corpus, with a preset and a context that fit it."""
    options = settings.corpus
    preset = fitting_preset(str(manifest.tokenizer["kind"]), manifest.tokens("train"))
    recipe = resolve(TrainSettings, [preset], [])
    longest = min(manifest.tokens("train"), manifest.tokens("val")) - 1
    if longest < 1:
        return "too short to train on: a split has one token; prepare a longer text"
    flags = []
    if options.data_dir:
        flags += [f"--data_dir={as_typed(options.data_dir)}", f"--out_dir=out-{options.dataset}"]
    elif options.dataset != recipe.data.dataset:
        flags += [f"--dataset={options.dataset}"]
    if longest < recipe.model.block_size:
        flags += [f"--block_size={1 << longest.bit_length() - 1}"]
    if options.storage:
        flags += [f"--storage={shlex.quote(options.storage)}"]
    return f"next: {' '.join(['yuzogpt train', preset, *flags])}"


def fitting_preset(tokenizer: str, tokens: int) -> str:
    """Return the preset for a corpus of so many training tokens, on this machine."""
    if tokenizer == "char":
        return "shakespeare_char" if shutil.which("nvidia-smi") else "shakespeare_char_fast"
    return "finetune_custom" if tokens < FINETUNED_TOKENS else "gpt2_124m"
