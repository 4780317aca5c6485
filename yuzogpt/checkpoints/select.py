"""Which checkpoint of a run: the newest, the best, or the one that a user names.

The directory is the only truth: nothing else says which checkpoint is newest or best.
"""

import contextlib
import math
import re
from collections.abc import Callable
from pathlib import Path

from yuzogpt.checkpoints.format import (
    MANIFEST,
    OPTIMIZER,
    STATE,
    Checkpoint,
    CorruptCheckpoint,
    read_manifest,
    read_state,
    verify,
)
from yuzogpt.console.terminal import complain
from yuzogpt.errors import UserError
from yuzogpt.storage.run_storage import RunStorage
from yuzogpt.storage.untrusted import DamagedFile

STEP_NAME = re.compile(r"step-(0|[1-9][0-9]{0,15})")

OnCorrupt = Callable[[RunStorage, str], None]  # called with a checkpoint and what is wrong with it


def newest(run: RunStorage, on_corrupt: OnCorrupt, *, head_only: bool = False) -> Checkpoint | None:
    """Return the newest checkpoint that a run can resume from and that is whole.

    `on_corrupt` is called for each newer one that is not; `head_only`: only states are verified.
    """
    return first_whole(run, lambda path: resumable(path)[::-1], on_corrupt, head_only=head_only)


def best(run: RunStorage, on_corrupt: OnCorrupt) -> Checkpoint | None:
    """Return the checkpoint with the lowest validation loss whose weights are whole."""
    return first_whole(run, by_validation_loss, on_corrupt, optimizer=False)


def first_whole(
    run: RunStorage,
    in_order: Callable[[Path], list[Path]],
    on_corrupt: OnCorrupt,
    **needed: bool,
) -> Checkpoint | None:
    """Return the first checkpoint, in the order of `in_order(run)`, that is whole.

    A checkpoint that its run deletes while it is read is not corrupt: the rest is listed again.
    """
    seen: set[str] = set()
    while name := next((p.name for p in in_order(run.local) if p.name not in seen), None):
        seen.add(name)
        storage = run / "checkpoints" / name
        try:
            return verify(storage, **needed)
        except CorruptCheckpoint as error:
            if not is_deleted(storage):
                on_corrupt(storage, str(error))
    return None


def is_deleted(storage: RunStorage) -> bool:
    """Return whether a checkpoint was deleted where it is kept: in a store, its manifest."""
    return not (storage / MANIFEST if storage.is_remote else storage).exists()


def find(storage: RunStorage) -> Checkpoint | None:
    """Return the checkpoint in a checkpoint directory, or the best of a run directory.

    None if it is neither; UserError if it holds checkpoints and none is whole.
    """
    name = storage.display_name
    if any(storage.local.glob("train-*.arrow")):
        raise UserError(
            f"{name}: a prepared corpus, not a run; give the out_dir of `yuzogpt train`"
        )
    try:
        if any((storage.local / file).exists() for file in (STATE, MANIFEST)):
            return verify(storage, optimizer=False)
    except CorruptCheckpoint as error:
        if is_deleted(storage):
            return None
        raise UserError(f"{name}: corrupt checkpoint: {error}") from None
    broken: list[str] = []

    def note(checkpoint: RunStorage, reason: str) -> None:
        broken.append(f"{checkpoint.name}: {reason}")
        complain(f"!!! checkpoint {checkpoint.display_name} is corrupt ({reason})")

    checkpoint = best(storage, note)
    if checkpoint is None and broken:
        raise UserError(f"{name}: no checkpoint is whole: {'; '.join(broken)}")
    if checkpoint is None and (storage / "metrics.jsonl").exists():
        raise UserError(f"{name}: this run has no checkpoint yet")
    return checkpoint


def candidates(run: Path) -> list[Path]:
    """Return the checkpoint directories of a run, oldest first, not yet verified."""
    directories = (run / "checkpoints").glob("step-*")
    return sorted((path for path in directories if step_of(path) >= 0), key=step_of)


def resumable(run: Path) -> list[Path]:
    """Return the checkpoints that a run could resume from, oldest first.

    Those without optimizer tensors are left out; those that cannot be read are included, so that
    they are noticed.
    """
    return [path for path in candidates(run) if not is_weights_only(path)]


def is_weights_only(directory: Path) -> bool:
    """Return whether the manifest of a checkpoint names no optimizer tensors."""
    with contextlib.suppress(OSError, DamagedFile):
        return not any(name.startswith(OPTIMIZER) for name in read_manifest(directory).files)
    return False


def step_of(directory: Path) -> int:
    """Return the step in the name of a checkpoint directory; -1 if there is none."""
    match = STEP_NAME.fullmatch(directory.name)
    return int(match[1]) if match else -1


def by_validation_loss(run: Path) -> list[Path]:
    """Return the checkpoint directories of a run, the best first; among equals, the newest.

    Only estimates over as many windows as the newest one's are comparable. Other checkpoints come
    last, as do those with NaN or without an estimate.
    """
    newest_first = candidates(run)[::-1]
    metrics = [read_metrics(directory) for directory in newest_first]
    windows = next((each["val_windows"] for each in metrics if "val_windows" in each), None)

    def loss(index: int) -> float:
        estimate = metrics[index].get("val_loss_estimate", math.nan)
        is_comparable = metrics[index].get("val_windows") == windows
        return estimate if is_comparable and not math.isnan(estimate) else math.inf

    return [newest_first[index] for index in sorted(range(len(metrics)), key=loss)]


def read_metrics(directory: Path) -> dict[str, float]:
    """Return the metrics of a checkpoint; none if it is broken."""
    with contextlib.suppress(OSError, DamagedFile):
        return {name: float(value) for name, value in read_state(directory).metrics.items()}
    return {}
