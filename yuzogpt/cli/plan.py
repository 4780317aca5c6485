"""What a training run would be, for --dry_run: parameters, tokens, epochs, memory, time."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from yuzogpt.config import TrainSettings, with_changes
from yuzogpt.config.resolve import load_yaml
from yuzogpt.console.quantities import in_bytes, time_left
from yuzogpt.data.blocks import open_corpus
from yuzogpt.errors import UserError
from yuzogpt.runs.directory import METRICS, SETTINGS
from yuzogpt.runs.listing import last_records
from yuzogpt.storage.filesystems import scheme_of
from yuzogpt.storage.paths import absolute_or_remote

STATE_BYTES = 16  # of a weight in float32, its gradient, and AdamW's two moments
ACTIVATION_BYTES = 34  # of a token, channel and layer in bfloat16: Korthikanti et al. 2022, eq. 1
LOGIT_BYTES = 8  # of a token and word: the logits in float32, and their gradient


def describe(settings: TrainSettings) -> Iterator[str]:
    """Yield lines about a run; only one if its corpus is not within reach yet."""
    data, model, batch = settings.data, settings.model, settings.batch
    try:
        path = data.data_dir or f"data/{data.dataset}"
        directory = absolute_or_remote(path, settings.run.storage, "data_dir")
        if scheme_of(directory):
            raise UserError(f"{directory}: in a store, and read only to train")
        corpus = open_corpus(Path(directory))
    except UserError as error:
        yield f"no estimates: {error}"
        return
    size = model.vocab_size or corpus.vocab_size
    model = with_changes(settings, {"model.vocab_size": size}).model
    per_step = batch.global_rows * model.block_size
    tokens, known = settings.schedule.max_iters * per_step, corpus.manifest.tokens("train")
    yield f"parameters: about {model.matrix_weights / 1e6:,.2f}M"
    yield f"tokens a step: {batch.global_rows:,} rows x {model.block_size:,} = {per_step:,}"
    yield (
        f"epochs: {tokens / known:,.2f}: {settings.schedule.max_iters:,} steps see {tokens:,} "
        f"tokens, the corpus has {known:,}"
    )
    channels = model.n_layer * model.n_embd * ACTIVATION_BYTES
    activations = channels + model.padded_vocab * LOGIT_BYTES
    activations *= min(batch.batch_size, batch.global_rows) * model.block_size
    yield (
        f"memory of a worker: about {in_bytes(STATE_BYTES * model.matrix_weights)} for weights, "
        f"gradients and optimizer, and {in_bytes(activations)} for activations (without fsdp, in "
        "bfloat16)"
    )
    run, speed = fastest(settings)
    if run:
        left = time_left(tokens / speed)
        yield f"time: about {left}, at the {speed:,.0f} tokens/s of {run}, which has this model"
    else:
        work = 6 * model.matrix_weights * tokens
        yield f"time: not known, since no run here has this model; in all {work:.2g} FLOP"
        yield "(6 x parameters x tokens); `yuzogpt bench` with the same words measures a step"


def fastest(settings: TrainSettings) -> tuple[str, float]:
    """Return the run of this model in this directory that is fastest, and its tokens/s."""
    shape, best = settings.model.model_dump(exclude={"vocab_size"}), ("", 0.0)
    for path in sorted(Path().glob(f"*/{SETTINGS}")):
        try:
            found: Any = load_yaml(path.read_bytes(), str(path), yaml.SafeLoader)
            is_same = all(found["model"].get(name) == value for name, value in shape.items())
        except (OSError, UserError, KeyError, TypeError, AttributeError):
            continue
        records = last_records(path.parent / METRICS)
        speeds = [r["tokens_per_second"] for r in records if "tokens_per_second" in r]
        if is_same and speeds and statistics.median(speeds) > best[1]:
            best = path.parent.name, statistics.median(speeds)
    return best
