"""Weights in every format, in and out: our checkpoints, Hugging Face folders, GPT-2's own."""

from yuzogpt.checkpoints.format import (
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    TOKENIZER,
    CorruptCheckpoint,
    State,
    add_metrics,
    begin,
    commit,
    read,
    remove,
    tensor_file,
    verify,
)
from yuzogpt.checkpoints.retention import (
    clear,
    discard,
    drop_optimizer,
    has_quarantined,
    prune,
    quarantine,
    sweep,
)
from yuzogpt.checkpoints.select import (
    best,
    by_validation_loss,
    candidates,
    find,
    newest,
    read_metrics,
    resumable,
    step_of,
)
