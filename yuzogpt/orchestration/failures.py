"""What Ray Train's controller does when a worker dies: it tells the user, then starts again.

In: the exceptions of the workers. Out: a notice in metrics.jsonl, and the rest in errors.log.
"""

import contextlib
from pathlib import Path

from ray.train import UserCallback

from yuzogpt import runs
from yuzogpt.metrics import append_record


class FailureNotice(UserCallback):  # type: ignore[misc]
    """Runs in the controller's process; Ray calls it by keyword."""

    def __init__(self, run: Path) -> None:
        """`run`: the out_dir."""
        self.run = run

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """Write down which worker failed, and why."""
        rank, first = min(worker_exceptions.items(), key=lambda item: item[0])
        text = f"!!! worker {rank} failed ({summary(first)}); see {self.run / runs.ERRORS}"
        whom = rank
        with contextlib.suppress(OSError):  # an exception here would end the run
            with (self.run / runs.ERRORS).open("a", encoding="utf-8") as file:
                for rank, error in sorted(worker_exceptions.items()):
                    file.write(f"rank {rank}: {error}\n")
            append_record(self.run / runs.METRICS, "failure", text, rank=whom)


def summary(error: Exception) -> str:
    """Return the sentence of an error that says what happened: its last line's first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].split(". ")[0] if lines else type(error).__name__
