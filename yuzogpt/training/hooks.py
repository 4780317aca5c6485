"""Callbacks and handles that a launcher passes to the training loop."""

from collections.abc import Callable
from dataclasses import dataclass

from yuzogpt.runs.stop_request import StopRequest
from yuzogpt.runtime.watchdog import Watchdog
from yuzogpt.storage.run_storage import RunStorage

# Called by every rank, equally often, for each checkpoint that was evaluated: with its metrics and
# where it is kept.
Report = Callable[[dict[str, float], RunStorage], None]


@dataclass(frozen=True)
class LoopHooks:
    """The loop's connections to the process that runs it."""

    run_dir: RunStorage  # out_dir
    report: Report
    # Raises RunFailed if another command writes to out_dir by now, OSError if that is unknown.
    check_still_holder: Callable[[], None]
    stop: StopRequest
    watchdog: Watchdog

    def heartbeat(self, phase: str) -> None:
        """Record progress, and notice requests to stop; only the loop's own thread calls this."""
        self.watchdog.heartbeat(phase)
        self.stop.look()
