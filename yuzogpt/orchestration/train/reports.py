"""Reports to Ray Train the checkpoints that it has to evaluate (`--eval_tasks`, validation.py).

All workers report the same complete checkpoints, in order. Others are not reported, because each
would delay the run's end: Ray's controller takes one report each time it polls the workers, every
second, and none while it waits for them to pause. So a thread hands them over.
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
    """Reports of a worker; call it with metrics and a checkpoint."""

    def __init__(self, *, evaluates: bool) -> None:
        """Start the thread; it keeps no process from ending.

        `evaluates`: benchmarks run beside the training; otherwise nothing is reported.
        """
        self.evaluates = evaluates
        self.pending: queue.SimpleQueue[tuple[dict[str, float], RunStorage] | None] = (
            queue.SimpleQueue()
        )
        self.thread = threading.Thread(target=self._hand_over, name="reports", daemon=True)
        self.thread.start()

    def __call__(self, metrics: dict[str, float], checkpoint: RunStorage) -> None:
        """Queue the report of a checkpoint, if Ray has to evaluate it."""
        if self.evaluates and metrics:
            self.pending.put((metrics, checkpoint))

    def finish(self, meanwhile: Callable[[], None]) -> None:
        """Wait until all is reported; call `meanwhile` every 0.5 s."""
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
            except Exception as problem:  # nothing depends on Ray's knowledge, so no run ends here
                complain(f"{checkpoint.name} could not be reported to Ray: {problem}")
