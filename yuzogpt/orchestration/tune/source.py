"""What a sweep's searcher offers to Ray Tune: the next trial, and what is told to it."""

from typing import Protocol

from yuzogpt.tuning.trials import Trial

# Seconds that a stopped trial has for its end before its process goes, and the trial that was to
# follow in it with it: a checkpoint of GPT-2 XL, 19 GB, is written, read back, and hashed.
ENDS_WITHIN = 1800
LOSS, STEP = "best_val_loss", "step"


class Source(Protocol):
    """Where trials come from."""

    @property
    def count(self) -> int:
        """How many there will be."""

    def ask(self) -> Trial | None:
        """Return the next trial; None when all were given out."""

    def tell(self, name: str, loss: float | None) -> None:
        """Record how a trial ended: its best loss, None if it failed."""
