"""Callbacks and handles that a launcher passes to the training loop."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from yuzogpt.runs.stop_request import StopRequest
from yuzogpt.runtime.watchdog import Watchdog

# Called by every rank, equally often, for each checkpoint that was evaluated: with its metrics and
# its directory.
Report = Callable[[dict[str, float], Path], None]


@dataclass(frozen=True)
class LoopHooks:
    """The loop's connections to the process that runs it."""

    run_dir: Path  # out_dir, as this process finds it
    report: Report
    # Raises RunFailed if another command writes to out_dir by now, OSError if that is unknown.
    check_still_holder: Callable[[], None]
    stop: StopRequest
    watchdog: Watchdog

    def heartbeat(self, phase: str) -> None:
        """Record progress, and notice requests to stop; only the loop's own thread calls this."""
        self.watchdog.heartbeat(phase)
        self.stop.look()
