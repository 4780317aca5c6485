"""Which checkpoint of a run: the newest, the best, or the one that a user names.

In: the directory of a run. Out: its checkpoints in order, or one of them that was verified. The
directory is the only truth: nothing else says which checkpoint is newest or best.
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
    read,
    read_manifest,
    verify,
)
from yuzogpt.console.terminal import complain
from yuzogpt.errors import UserError
from yuzogpt.storage import mirrors
from yuzogpt.storage.untrusted import DamagedFile

STEP = re.compile(r"step-(0|[1-9][0-9]{0,15})")


def newest(
    run: Path, on_corrupt: Callable[[Path, str], None], *, head_only: bool = False
) -> Checkpoint | None:
    """Return the newest checkpoint that a run can go on from, whole.

    `on_corrupt` is told of each newer one that is not whole; `head_only`: as far as states tell.
    """
    return first_whole(lambda: resumable(run)[::-1], on_corrupt, head_only=head_only)


def best(run: Path, on_corrupt: Callable[[Path, str], None]) -> Checkpoint | None:
    """Return the checkpoint with the lowest validation loss whose weights are whole."""
    return first_whole(lambda: by_validation_loss(run), on_corrupt, optimizer=False)


def first_whole(
    listed: Callable[[], list[Path]], on_corrupt: Callable[[Path, str], None], **needed: bool
) -> Checkpoint | None:
    """Return the first of those that are listed that is whole.

    One that its run deleted while it was read is not corrupt: what is there now is listed again.
    """
    seen: set[Path] = set()
    while directory := next((path for path in listed() if path not in seen), None):
        seen.add(directory)
        try:
            return verify(directory, **needed)
        except CorruptCheckpoint as error:
            if not is_gone(directory):
                on_corrupt(directory, str(error))
    return None


def is_gone(directory: Path) -> bool:
    """Tell whether a checkpoint was deleted, there where it is kept."""
    is_mirror = mirrors.uri_of(directory) is not None
    return not mirrors.exists(directory / MANIFEST if is_mirror else directory)


def find(reference: str) -> Checkpoint | None:
    """Return the checkpoint that a run directory (its best) or checkpoint directory means.

    None if it is neither; UserError if it holds checkpoints and none is whole.
    """
    directory, name = Path(reference), mirrors.name_of(Path(reference))
    try:
        if (directory / STATE).exists() or (directory / MANIFEST).exists():
            return verify(directory, optimizer=False)
    except CorruptCheckpoint as error:
        if is_gone(directory):
            return None
        raise UserError(f"{name}: corrupt checkpoint: {error}") from None
    broken: list[str] = []

    def tell(path: Path, reason: str) -> None:
        broken.append(f"{path.name}: {reason}")
        complain(f"!!! checkpoint {mirrors.name_of(path)} is corrupt ({reason})")

    found = best(directory, tell)
    if found is None and broken:
        raise UserError(f"{name}: no checkpoint is whole: {'; '.join(broken)}")
    if found is None and mirrors.exists(directory / "metrics.jsonl"):
        raise UserError(f"{name}: this run has no checkpoint yet")
    return found


def candidates(run: Path) -> list[Path]:
    """Return the checkpoint directories of a run, oldest first, not yet verified."""
    found = (run / "checkpoints").glob("step-*")
    return sorted((path for path in found if step_of(path) >= 0), key=step_of)


def resumable(run: Path) -> list[Path]:
    """Return those that a run could go on from, oldest first: not kept for their weights only.

    What is broken beyond telling is among them, so that it is noticed.
    """
    return [path for path in candidates(run) if not is_weights_only(path)]


def is_weights_only(directory: Path) -> bool:
    """Tell whether a checkpoint was kept for its weights: its manifest names no optimizer's."""
    with contextlib.suppress(OSError, DamagedFile):
        return not any(name.startswith(OPTIMIZER) for name in read_manifest(directory).files)
    return False


def step_of(directory: Path) -> int:
    """Return the step of a checkpoint directory by its name, -1 if it has none."""
    found = STEP.fullmatch(directory.name)
    return int(found[1]) if found else -1


def by_validation_loss(run: Path) -> list[Path]:
    """Return the checkpoint directories of a run, the best first.

    Only estimates over as many windows as the newest one's compare; others come last, as do NaN
    and none at all. Among equals the newest is first.
    """
    newest_first = candidates(run)[::-1]
    metrics = [read_metrics(directory) for directory in newest_first]
    comparable = next((found["val_windows"] for found in metrics if "val_windows" in found), None)

    def loss(index: int) -> float:
        found = metrics[index].get("val_loss_estimate", math.nan)
        same = metrics[index].get("val_windows") == comparable
        return found if same and not math.isnan(found) else math.inf

    return [newest_first[index] for index in sorted(range(len(metrics)), key=loss)]


def read_metrics(directory: Path) -> dict[str, float]:
    """Return the metrics of a checkpoint that may be broken: none, then."""
    with contextlib.suppress(OSError, DamagedFile):
        return {name: float(value) for name, value in read(directory).state.metrics.items()}
    return {}
