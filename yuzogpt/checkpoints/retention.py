"""Which checkpoints are kept, and how the others go: deleted, set aside, or reduced to weights."""

import math
import shutil
from pathlib import Path

from yuzogpt.checkpoints.format import (
    MANIFEST,
    OPTIMIZER,
    Checkpoint,
    read_manifest,
    remove,
    rewrite_manifest,
)
from yuzogpt.checkpoints.select import candidates, read_metrics, resumable
from yuzogpt.storage import mirrors
from yuzogpt.storage.untrusted import DamagedFile


def best_of_each(run: Path, count: int) -> list[Path]:
    """Return the best checkpoints of a run: so many of each number of windows, as these compare.

    A run may go on with another number, which makes none of its older checkpoints worse.
    """
    losses: dict[float | None, list[tuple[float, Path]]] = {}
    for directory in candidates(run)[::-1]:  # among equals the newest is first
        found = read_metrics(directory)
        loss = found.get("val_loss_estimate", math.nan)
        if math.isfinite(loss):
            losses.setdefault(found.get("val_windows"), []).append((loss, directory))
    ranked = [sorted(group, key=lambda one: one[0])[:count] for group in losses.values()]
    return [directory for group in ranked for _, directory in group]


def quarantine(directory: Path) -> Path:
    """Move a broken checkpoint aside, where nothing looks for checkpoints; nothing is deleted."""
    for attempt in range(1000):
        aside = directory.with_name(f"broken-{directory.name}-{attempt}")
        if not aside.exists():
            return directory.rename(aside)
    raise OSError(f"{directory}: too many broken checkpoints beside it")


def prune(run: Path, successor: Checkpoint, keep_last: int, keep_best: int) -> None:
    """Delete what is not kept, now that `successor` was verified.

    Kept are the `keep_last` newest, to go on from, and the weights of the `keep_best` best.
    """
    last = {successor.directory, *resumable(run)[-keep_last:]}
    best = best_of_each(run, keep_best)
    for directory in candidates(run):
        if directory in last:
            continue
        if directory in best:
            drop_optimizer(directory)
        else:
            discard(directory)


def discard(directory: Path) -> None:
    """Delete a checkpoint, here and in its store."""
    mirrors.delete_folder(directory, first=MANIFEST)
    remove(directory)


def drop_optimizer(directory: Path) -> None:
    """Keep only the weights of a checkpoint; its manifest says so before anything is deleted."""
    try:
        manifest = read_manifest(directory)
    except DamagedFile:
        return  # damaged since it was verified: its next reader will say so
    gone = [name for name in manifest.files if name.startswith(OPTIMIZER)]
    if gone:
        kept = {name: hash for name, hash in manifest.files.items() if name not in gone}
        rewrite_manifest(directory, manifest.model_copy(update={"files": kept}))
    here = [path.name for path in directory.iterdir()]
    for name in {*here, *mirrors.listing(directory)}:
        if name.startswith(OPTIMIZER):
            mirrors.delete(directory / name)


def sweep(run: Path) -> None:
    """Delete what a killed writer left half done; only the holder of the run's lease may."""
    for leftover in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
