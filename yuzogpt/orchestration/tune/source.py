"""The interface between a sweep's search and Ray Tune: the next trial, and how one ended."""

from typing import Protocol

from yuzogpt.tuning.trials import Trial

# Time that a stopped trial has for its end before its process is killed, and with it the trial that
# would follow there: a checkpoint of GPT-2 XL, 19 GB, is written, read back, and hashed.
STOP_TIMEOUT_S = 1800
LOSS, STEP = "best_val_loss", "step"


class Source(Protocol):
    """Where trials come from."""

    @property
    def count(self) -> int:
        """How many there will be."""

    def ask(self) -> Trial | None:
        """Return the next trial; None when all were given out."""

    def tell(self, name: str, loss: float | None) -> None:
        """Note how a trial ended."""
