"""Checkpoints of a run in an object store: how they are uploaded, and downloaded.

The store has the same files under checkpoints/step-N/. Nothing can be renamed there, so the
manifest is the commit: written last, deleted first. The copy in the cache keeps only the metadata,
manifest and state, which say which checkpoints there are, and which is the newest and the best.
Tensors are downloaded when a checkpoint is verified. For a local run these functions do nothing.
"""

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from yuzogpt.checkpoints.format import MANIFEST, STATE, Checkpoint, read, remove, verify
from yuzogpt.checkpoints.retention import remote_folders
from yuzogpt.checkpoints.select import candidates
from yuzogpt.errors import UserError
from yuzogpt.storage.run_storage import READER, RunStorage, open_storage
from yuzogpt.storage.untrusted import MAX_JSON_BYTES

if TYPE_CHECKING:  # torch takes seconds to import
    from yuzogpt.runtime.world import World

METADATA_FILES = (STATE, MANIFEST)


def download_metadata(run: RunStorage) -> None:
    """Make the checkpoints in the cache those of the store, as far as their metadata goes."""
    if not run.is_remote:
        return
    committed = [name for name, files in remote_folders(run).items() if MANIFEST in files]
    for directory in candidates(run.local):
        if directory.name not in committed:
            remove(directory)
    for name in committed:
        download_manifest_and_state(run / "checkpoints" / name)


def download_manifest_and_state(checkpoint: RunStorage) -> None:
    """Download the metadata of one checkpoint; if it was deleted meanwhile, delete the copy."""
    (checkpoint / STATE).download(max_bytes=MAX_JSON_BYTES)
    if not (checkpoint / MANIFEST).download(max_bytes=MAX_JSON_BYTES):
        remove(checkpoint.local)


def open_reference(name: str) -> RunStorage:
    """Return a run or a checkpoint that a reader named by path or URI; download its metadata."""
    storage = open_storage(name, READER)
    try:
        for file in METADATA_FILES:
            (storage / file).download(max_bytes=MAX_JSON_BYTES)
        download_metadata(storage)
    except OSError as error:
        raise UserError(f"{name}: not within reach: {error.strerror}") from None
    return storage


def read_on_all_ranks(
    checkpoint: RunStorage, world: "World", *, optimizer: bool = True
) -> Checkpoint:
    """Return, on every rank, a checkpoint that rank 0 verified; each node downloads its files."""
    if checkpoint.is_remote and world.rank > 0 and world.local_rank == 0:
        download_manifest_and_state(checkpoint)
        verify(checkpoint, optimizer=optimizer)
    world.gather(None)
    return read(checkpoint)


def staging_dir(temporary: RunStorage, rank: int) -> Path:
    """Return where a rank writes its tensor files.

    Ranks of a local run share one directory. Ranks of a run in a store may be on several machines,
    and only the directory of rank 0 becomes the checkpoint's.
    """
    if rank == 0 or not temporary.is_remote:
        return temporary.local
    return temporary.local.with_name(f".step-of-rank-{rank}.tmp")


def upload(staging: Path, checkpoint: RunStorage, hashes: Mapping[str, str]) -> None:
    """Upload tensor files to the folder of their checkpoint in the store, and delete them here.

    OSError if not every byte that was written arrives there.
    """
    if not checkpoint.is_remote:
        return
    for name, expected in hashes.items():
        if (checkpoint / name).upload(staging / name) != expected:
            raise OSError(errno.EIO, "the disk gave other bytes back", str(staging / name))
        (staging / name).unlink()


def publish(checkpoint: RunStorage) -> None:
    """Commit a checkpoint whose tensors are in the store; after an error there is none."""
    if not checkpoint.is_remote:
        return
    names = {path.name for path in checkpoint.local.iterdir()} - {MANIFEST}
    try:
        for name in (*sorted(names), MANIFEST):
            (checkpoint / name).upload()
    except Exception:
        remove(checkpoint.local)
        raise
    drop_local_tensors(checkpoint.parent.parent)


def drop_local_tensors(run: RunStorage) -> None:
    """Delete all files of checkpoints in the cache but their metadata; the store has them."""
    if run.is_remote:
        for path in (run.local / "checkpoints").glob("step-*/*"):
            if path.name not in METADATA_FILES:
                path.unlink(missing_ok=True)


def size_of(checkpoint: RunStorage) -> int:
    if checkpoint.is_remote:
        return sum(checkpoint.list_remote().values())
    return sum(path.stat().st_size for path in checkpoint.local.iterdir())
