"""Checkpoints of a run in an object store: how they get there, and back.

In: checkpoints in a mirror (mirrors.py). Out: the same files under checkpoints/step-N/ in the
store. There, where nothing can be renamed, the manifest is the commit: written last, deleted first.
A mirror keeps the heads alone, manifest and state: they tell which checkpoints there are, and which
is the newest and the best. Tensors are fetched when a checkpoint is verified.
"""

import contextlib
import errno
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from yuzogpt import checkpoints
from yuzogpt.checkpoints.format import MANIFEST, STATE, Checkpoint
from yuzogpt.errors import UserError
from yuzogpt.storage import mirrors
from yuzogpt.storage.untrusted import MAX_JSON_BYTES

if TYPE_CHECKING:  # torch takes seconds to import
    from yuzogpt.runtime.world import World

HEAD = (STATE, MANIFEST)
BROKEN = "manifest.broken.json"  # the manifest of what failed verification


def pull_heads(run: Path) -> None:
    """Make the checkpoints of a mirror those of its store, as far as their heads go."""
    if not mirrors.uri_of(run):
        return
    folders = stored_folders(run)
    committed = [directory for directory, names in folders.items() if MANIFEST in names]
    for directory in checkpoints.candidates(run):
        if directory not in committed:
            checkpoints.remove(directory)
    for directory in committed:
        pull_head(directory)


def pull_head(directory: Path) -> None:
    """Bring manifest and state of one checkpoint; none is left here if it is gone meanwhile."""
    mirrors.pull(directory / STATE, max_bytes=MAX_JSON_BYTES)
    if not mirrors.pull(directory / MANIFEST, max_bytes=MAX_JSON_BYTES):
        checkpoints.remove(directory)


def pull_reference(uri: str) -> Path:
    """Return a mirror of what a reader named, a run or a checkpoint, with its heads."""
    directory = mirrors.directory_of(uri, mirrors.READER)
    try:
        for name in HEAD:
            mirrors.pull(directory / name, max_bytes=MAX_JSON_BYTES)
        pull_heads(directory)
    except OSError as error:
        raise UserError(f"{uri}: not within reach: {error.strerror}") from None
    return directory


def on_every_node(directory: Path, world: "World", *, optimizer: bool = True) -> Checkpoint:
    """Return a checkpoint that rank 0 verified, on every rank; each node fetches what it lacks."""
    if mirrors.uri_of(directory) and world.rank > 0 and world.local_rank == 0:
        pull_head(directory)
        checkpoints.verify(directory, optimizer=optimizer)
    world.gather(None)
    return checkpoints.read(directory)


def room_of(temporary: Path, rank: int) -> Path:
    """Return where a rank writes its files: together, or in a mirror in a directory of its own."""
    if rank == 0 or not mirrors.uri_of(temporary):
        return temporary
    return temporary.with_name(f".step-of-rank-{rank}.tmp")


def send(room: Path, directory: Path, hashes: Mapping[str, str]) -> None:
    """Copy tensor files to the folder of their checkpoint in the store; they are not kept here.

    OSError if not every byte that was written is there.
    """
    if not mirrors.uri_of(room):
        return
    for name, expected in hashes.items():
        if mirrors.push(room / name, directory / name) != expected:
            raise OSError(errno.EIO, "the disk gave other bytes back", str(room / name))
        (room / name).unlink()


def publish(directory: Path) -> None:
    """Commit a checkpoint whose tensors are in the store; an error leaves none, here either."""
    if not mirrors.uri_of(directory):
        return
    names = {path.name for path in directory.iterdir()} - {MANIFEST}
    try:
        for name in (*sorted(names), MANIFEST):
            mirrors.push(directory / name)
    except Exception:
        checkpoints.remove(directory)
        raise
    keep_heads(directory.parent.parent)


def set_aside(directory: Path) -> str:
    """Put a broken checkpoint where nothing looks for checkpoints; return where that is.

    In a store its manifest gets another name, and the rest stays until that step is written anew.
    """
    if not mirrors.uri_of(directory):
        return checkpoints.quarantine(directory).name
    with contextlib.suppress(FileNotFoundError):
        mirrors.write(directory / BROKEN, mirrors.read(directory / MANIFEST))
    mirrors.delete(directory / MANIFEST)
    checkpoints.remove(directory)
    return f"{directory.name}/{BROKEN}"


def has_broken(run: Path) -> bool:
    """Tell whether a checkpoint of a run was set aside."""
    is_any_here = any((run / "checkpoints").glob("broken-step-*"))
    return is_any_here or any(BROKEN in names for names in stored_folders(run).values())


def sweep(run: Path) -> None:
    """Delete what a killed writer left half done; only the holder of the run's lease may."""
    checkpoints.sweep(run)
    for leftover in (run / "checkpoints").glob("step-*/.*.tmp"):
        leftover.unlink(missing_ok=True)
    folders = stored_folders(run)
    for directory, names in folders.items():
        if not names & {MANIFEST, BROKEN}:
            mirrors.delete_folder(directory, MANIFEST)


def clear(run: Path) -> None:
    """Delete all checkpoints of a run, broken ones too."""
    for directory in stored_folders(run):
        mirrors.delete_folder(directory, MANIFEST)
    for directory in checkpoints.candidates(run):
        checkpoints.remove(directory)
    for broken in (run / "checkpoints").glob("broken-step-*"):
        shutil.rmtree(broken)


def stored_folders(run: Path) -> dict[Path, set[str]]:
    """Return the folders of checkpoints in the store, whole or not, with the names in each."""
    folders: dict[Path, set[str]] = {}
    for path in map(Path, mirrors.listing(run / "checkpoints")):
        directory = run / "checkpoints" / path.parts[0]
        if checkpoints.step_of(directory) >= 0:
            folders.setdefault(directory, set()).add(path.name)
    return folders


def keep_heads(run: Path) -> None:
    """Delete of the checkpoints in a mirror all but their heads; the store has the rest."""
    if mirrors.uri_of(run):
        for path in (run / "checkpoints").glob("step-*/*"):
            if path.name not in HEAD:
                path.unlink(missing_ok=True)


def size_of(directory: Path) -> int:
    """Return the bytes of a checkpoint."""
    if mirrors.uri_of(directory):
        return sum(mirrors.listing(directory).values())
    return sum(path.stat().st_size for path in directory.iterdir())
