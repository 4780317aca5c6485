"""What connects the loop to whoever started it: a launcher, in this process or another."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from yuzogpt.runs.stop_request import StopRequest
from yuzogpt.runtime.watchdog import Watchdog

# Called by every rank, equally often, for each checkpoint that was evaluated, with its metrics and
# its directory.
Report = Callable[[dict[str, float], Path], None]


@dataclass(frozen=True)
class LoopHooks:
    """What the loop knows of the world around it."""

    run: Path  # where this process finds out_dir
    report: Report
    # Raises RunFailed if out_dir is another command's by now, OSError if that cannot be told.
    refuse_to_write: Callable[[], None]
    stop: StopRequest
    watchdog: Watchdog
