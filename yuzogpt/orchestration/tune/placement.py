"""Removes the placement group of a trial's workers if the trial's process was killed.

A trial with several workers notes their group in its directory. Ray keeps a group that an actor
made until the whole command ends; Ray Train's own cleaner asks the dashboard's server, which an
embedded Ray does not have. A process that is killed while its workers start has made no note yet.
"""

import contextlib
from pathlib import Path
from typing import Any

from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup, remove_placement_group

from yuzogpt.errors import UserError
from yuzogpt.orchestration.ray_internals import callback_base, placement_group_id
from yuzogpt.storage.untrusted import read_file

NOTE = ".placement_group"
MAX_NOTE_BYTES = 1000


class PlacementNote(callback_base("WorkerGroupCallback")):  # type: ignore[misc]
    """Keeps the note, in the trial's process."""

    def __init__(self, run: Path) -> None:
        """`run`: the trial's directory."""
        self.note = run / NOTE

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Note the workers' placement group."""
        if group_id := placement_group_id(worker_group):
            self.note.write_text(group_id)

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """Delete the note: Ray Train has removed the group."""
        self.note.unlink(missing_ok=True)


def remove_placement_group_of(run: Path) -> None:
    """Remove the placement group of a trial whose process is gone, or is about to go."""
    for note in run.rglob(NOTE):  # also of its score, which is a run of its own
        with contextlib.suppress(OSError, ValueError, UserError):  # gone, or damaged
            group_id = PlacementGroupID.from_hex(read_file(note, MAX_NOTE_BYTES).decode())
            remove_placement_group(PlacementGroup(group_id))
            note.unlink()
