"""Tells Ray Train of the checkpoints that it is to evaluate.

In: checkpoints that are whole, in each worker equally many. Out: reports, in their order, of those
that the loop evaluated, where benchmarks are wanted beside the training (validation.py). Others
would only hold up a run's end: Ray's controller takes one report each time it looks at the workers,
every second, and none while it waits for them to pause; so a thread hands them over, too.
"""

import queue
import threading
from collections.abc import Callable

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode, ValidationTaskConfig

from yuzogpt.console.terminal import complain
from yuzogpt.storage.filesystems import open_filesystem
from yuzogpt.storage.run_storage import RunStorage


class Reports:
    """What a worker has to report; call it with metrics and a checkpoint."""

    def __init__(self, *, evaluates: bool) -> None:
        """Start the thread; it keeps no process from ending.

        `evaluates`: benchmarks are wanted; else Ray is told of nothing.
        """
        self.evaluates = evaluates
        self.pending: queue.SimpleQueue[tuple[dict[str, float], RunStorage] | None] = (
            queue.SimpleQueue()
        )
        self.thread = threading.Thread(target=self._hand_over, name="reports", daemon=True)
        self.thread.start()

    def __call__(self, metrics: dict[str, float], checkpoint: RunStorage) -> None:
        """Report a checkpoint, soon, if Ray is to evaluate it."""
        if self.evaluates and metrics:
            self.pending.put((metrics, checkpoint))

    def finish(self, meanwhile: Callable[[], None]) -> None:
        """Wait until all is reported, and do `meanwhile` again and again."""
        self.pending.put(None)
        while self.thread.is_alive():
            meanwhile()
            self.thread.join(0.5)

    def _hand_over(self) -> None:
        while (report := self.pending.get()) is not None:
            metrics, checkpoint = report
            name = checkpoint.display_name
            filesystem, path = open_filesystem(name)
            try:
                ray.train.report(
                    metrics,
                    Checkpoint(path, filesystem),
                    checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
                    validation=ValidationTaskConfig({"name": name}),
                )
            except Exception as problem:  # what Ray knows decides nothing, so no run ends for it
                complain(f"{checkpoint.name} could not be reported to Ray: {problem}")
