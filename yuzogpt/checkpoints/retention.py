"""Which checkpoints are kept, and how others are removed: deleted, quarantined, or cut to weights.

Next on the line: training/checkpointer.py, which prunes after each checkpoint.
"""

import contextlib
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
from yuzogpt.checkpoints.select import candidates, read_metrics, resumable, step_of
from yuzogpt.storage.run_storage import RunStorage
from yuzogpt.storage.untrusted import DamagedFile

BROKEN_MANIFEST = "manifest.broken.json"  # in a store: of a checkpoint that failed verification


def best_of_each(run: Path, count: int) -> list[Path]:
    """Return the `count` best checkpoints of each number of windows: only these compare.

    A run may resume with another number, which makes none of its older checkpoints worse.
    """
    losses: dict[float | None, list[tuple[float, Path]]] = {}
    for directory in candidates(run)[::-1]:  # among equals the newest is first
        metrics = read_metrics(directory)
        loss = metrics.get("val_loss_estimate", math.nan)
        if math.isfinite(loss):
            losses.setdefault(metrics.get("val_windows"), []).append((loss, directory))
    ranked = [sorted(group, key=lambda pair: pair[0])[:count] for group in losses.values()]
    return [directory for group in ranked for _, directory in group]


def prune(run: RunStorage, successor: Checkpoint, keep_last: int, keep_best: int) -> None:
    """Delete checkpoints that are not kept, now that `successor` was verified.

    Kept are the `keep_last` newest, to resume from, and the weights of the `keep_best` best.
    """
    last = {successor.directory, *resumable(run.local)[-keep_last:]}
    best = best_of_each(run.local, keep_best)
    for directory in candidates(run.local):
        if directory in last:
            continue
        checkpoint = run / "checkpoints" / directory.name
        if directory in best:
            drop_optimizer(checkpoint)
        else:
            discard(checkpoint)


def discard(checkpoint: RunStorage) -> None:
    """Delete a checkpoint, here and in its store."""
    checkpoint.delete_remote(first=MANIFEST)
    remove(checkpoint.local)


def drop_optimizer(checkpoint: RunStorage) -> None:
    """Keep only the weights of a checkpoint; its manifest says so before anything is deleted."""
    try:
        manifest = read_manifest(checkpoint.local)
    except DamagedFile:
        return  # damaged since it was verified: its next reader will say so
    kept = {name: sha for name, sha in manifest.files.items() if not name.startswith(OPTIMIZER)}
    if len(kept) < len(manifest.files):
        rewrite_manifest(checkpoint, manifest.model_copy(update={"files": kept}))
    names = {path.name for path in checkpoint.local.iterdir()} | checkpoint.list_remote().keys()
    for name in names:
        if name.startswith(OPTIMIZER) and "/" not in name:
            (checkpoint / name).delete()


def quarantine(checkpoint: RunStorage) -> str:
    """Put a broken checkpoint where nothing looks for checkpoints; return where that is.

    A local directory gets another name. In a store only the manifest does; the other files stay
    until a checkpoint of that step is written again.
    """
    if checkpoint.is_remote:
        manifest = checkpoint / MANIFEST
        with contextlib.suppress(FileNotFoundError):
            (checkpoint / BROKEN_MANIFEST).write(manifest.read())
        manifest.delete()
        remove(checkpoint.local)
        return f"{checkpoint.name}/{BROKEN_MANIFEST}"
    for attempt in range(1000):
        aside = checkpoint.local.with_name(f"broken-{checkpoint.name}-{attempt}")
        if not aside.exists():
            return checkpoint.local.rename(aside).name
    raise OSError(f"{checkpoint.local}: too many broken checkpoints beside it")


def has_quarantined(run: RunStorage) -> bool:
    is_any_here = any((run.local / "checkpoints").glob("broken-step-*"))
    return is_any_here or any(BROKEN_MANIFEST in names for names in remote_folders(run).values())


def sweep(run: RunStorage) -> None:
    """Delete what a killed writer left unfinished; only the holder of the run's lease may."""
    for leftover in (run.local / "checkpoints").glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in (run.local / "checkpoints").glob("step-*/.*.tmp"):
        leftover.unlink(missing_ok=True)
    for name, files in remote_folders(run).items():
        if not files & {MANIFEST, BROKEN_MANIFEST}:
            (run / "checkpoints" / name).delete_remote(first=MANIFEST)


def clear(run: RunStorage) -> None:
    """Delete all checkpoints of a run, broken ones too."""
    for name in remote_folders(run):
        (run / "checkpoints" / name).delete_remote(first=MANIFEST)
    for directory in candidates(run.local):
        remove(directory)
    for broken in (run.local / "checkpoints").glob("broken-step-*"):
        shutil.rmtree(broken)


def remote_folders(run: RunStorage) -> dict[str, set[str]]:
    """Return the folders of checkpoints in the store, whole or not, with the names in each."""
    folders: dict[str, set[str]] = {}
    for path in map(Path, (run / "checkpoints").list_remote()):
        if step_of(Path(path.parts[0])) >= 0:
            folders.setdefault(path.parts[0], set()).add(path.name)
    return folders
