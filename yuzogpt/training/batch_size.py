"""The global batch of each step, and the noise scale that one of its schedules follows.

In: the settings; for the schedule `noise`, the norms of gradients. Out: rows. What is measured is
part of a run's state, so that a resumed run grows as an undisturbed one would.

The noise scale (McCandlish et al., 2018, appendix A.1) is the batch, in rows, at which the noise of
a gradient is as large as the gradient itself: far below it, twice the rows are worth nearly twice
the steps; far above, they are worth nothing. It takes the squared norms of two gradients at the
same weights, one over a part b of the rows, one over all B of them:

    |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b)      trace = (|g_b|^2 - |g_B|^2) / (1/b - 1/B)
    noise scale = trace / |G|^2, each averaged over steps before
"""

import math
from dataclasses import asdict, dataclass

from yuzogpt.config import BatchSettings
from yuzogpt.runtime.world import World

MEASURED_EVERY = 4  # steps
DECAY = 0.95  # of the running means: about the last 20 measurements
WARM_AFTER = 20  # measurements, before which the batch stays as it is


@dataclass
class GlobalBatch:
    """How many rows a step has."""

    settings: BatchSettings
    rows: int = 0  # noise: of the next step
    measured: int = 0
    trace: float = 0.0  # of the covariance of a row's gradient; running means, like the next
    square: float = 0.0  # |G|^2

    @classmethod
    def remembering(cls, settings: BatchSettings, memory: dict[str, float]) -> "GlobalBatch":
        """Return it with what a checkpoint kept; a new one for an empty memory."""
        batch = cls(settings, rows=settings.rows_at(0))
        vars(batch).update({name: memory[name] for name in batch.memory() if name in memory})
        return batch

    def memory(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        if self.settings.batch_schedule != "noise":
            return {}
        return {name: value for name, value in asdict(self).items() if name != "settings"}

    def rows_at(self, step: int) -> int:
        """Return the rows of a step; of the schedule `noise`, of the next one alone."""
        is_measured = self.settings.batch_schedule == "noise"
        return self.rows if is_measured else self.settings.rows_at(step)

    def most_in_pass(self, step: int, world: World) -> int:
        """Return how many rows a forward pass may hold: a measured step has two or more passes."""
        if not self.is_measured_at(step, world):
            return self.settings.batch_size
        return min(self.settings.batch_size, self.rows // world.size // 2)

    def is_measured_at(self, step: int, world: World) -> bool:
        """Tell whether the noise is looked at in a step; every rank must have two rows for it."""
        is_growing = self.rows < self.settings.global_rows
        is_due = self.settings.batch_schedule == "noise" and step % MEASURED_EVERY == 0
        return is_due and is_growing and self.rows >= 2 * world.size

    def measure(self, part: int, part_square: float, square: float) -> None:
        """Take in |g|^2 over `part` rows and over all; grow, if the noise asks for it."""
        whole = self.rows
        if part >= whole or not math.isfinite(part_square + square):
            return
        decay = min(DECAY, self.measured / (self.measured + 1))  # a plain mean, to begin with
        found = (whole * square - part * part_square) / (whole - part)
        trace = (part_square - square) / (1 / part - 1 / whole)
        self.square = decay * self.square + (1 - decay) * found
        self.trace = decay * self.trace + (1 - decay) * trace
        self.measured += 1
        if self.measured >= WARM_AFTER:
            first, most = self.settings.batch_start_rows, self.settings.global_rows
            wanted = min(self.noise_scale, most)
            self.rows = max(self.rows, int(wanted // first) * first)

    @property
    def noise_scale(self) -> float:
        """The noise scale, in rows; infinite as long as no gradient shows through the noise."""
        return self.trace / self.square if self.square > 0 else math.inf
