"""Tells Ray Train of checkpoints, so that a Ray result knows the newest one.

In: checkpoints that are whole, in each worker equally many. Out: reports, in their order: of those
that Ray is to evaluate, and of the newest at the run's end. More would only hold that up: Ray's
controller takes one each time it looks at the workers, every second, and none while it waits for
them to pause. So a thread hands them over, too, and neither the loop nor a checkpoint waits.
"""

import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.v2.api.validation_config import ValidationTaskConfig

from yuzogpt import mirrors
from yuzogpt.filesystems import open_filesystem


class Reports:
    """What a worker has to report; call it with metrics and a checkpoint's directory."""

    def __init__(self, *, evaluates: bool) -> None:
        """Start the thread; it keeps no process from ending.

        `evaluates`: have Ray evaluate (validation.py) what the loop evaluated.
        """
        self.evaluates = evaluates
        self.newest: tuple[dict[str, float], Path] | None = None  # unless it was reported
        self.pending: queue.SimpleQueue[tuple[dict[str, float], Path] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._hand_over, name="reports", daemon=True)
        self.thread.start()

    def __call__(self, metrics: dict[str, float], checkpoint: Path) -> None:
        """Report a checkpoint, soon, or at the end."""
        self.newest = metrics, checkpoint
        if self.evaluates and metrics:
            self._report_newest()

    def finish(self, meanwhile: Callable[[], None]) -> None:
        """Wait until all is reported, and do `meanwhile` again and again."""
        self._report_newest()
        self.pending.put(None)
        while self.thread.is_alive():
            meanwhile()
            self.thread.join(0.5)

    def _report_newest(self) -> None:
        if self.newest:
            self.pending.put(self.newest)
        self.newest = None

    def _hand_over(self) -> None:
        while (report := self.pending.get()) is not None:
            metrics, checkpoint = report
            name = mirrors.name_of(checkpoint)
            filesystem, path = open_filesystem(name)
            try:
                ray.train.report(
                    metrics,
                    Checkpoint(path, filesystem),
                    checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
                    validation=self.evaluates and metrics and ValidationTaskConfig({"name": name}),
                )
            except Exception as problem:  # what Ray knows decides nothing, so no run ends for it
                print(f"{checkpoint.name} could not be reported to Ray: {problem}", file=sys.stderr)
