"""What connects the loop to whoever started it: a launcher, in this process or another."""

from collections.abc import Callable
from dataclasses import dataclass

from yuzogpt.runs.stop_request import StopRequest
from yuzogpt.runtime.watchdog import Watchdog
from yuzogpt.storage.run_storage import RunStorage

# Called by every rank, equally often, for each checkpoint that was evaluated, with its metrics and
# where it is kept.
Report = Callable[[dict[str, float], RunStorage], None]


@dataclass(frozen=True)
class LoopHooks:
    """What the loop knows of the world around it."""

    run: RunStorage  # out_dir
    report: Report
    # Raises RunFailed if out_dir is another command's by now, OSError if that cannot be told.
    refuse_to_write: Callable[[], None]
    stop: StopRequest
    watchdog: Watchdog
