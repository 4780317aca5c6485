"""The number of rows in each step's global batch; one schedule follows the gradient noise scale.

The measurements are part of a run's state, so that the batch of a resumed run grows as that of an
uninterrupted one would.

The noise scale (McCandlish et al., 2018, appendix A.1) is the batch size, in rows, at which the
noise of a gradient is as large as the gradient itself. Far below it, twice the rows are worth
nearly twice the steps; far above it, more rows are worth nothing. It is estimated from the squared
norms of two gradients at the same weights, over b of the rows and over all B of them:

    |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b)      trace = (|g_b|^2 - |g_B|^2) / (1/b - 1/B)
    noise scale = trace / |G|^2, each averaged over earlier steps
"""

import math
from dataclasses import asdict, dataclass
from typing import Literal

from yuzogpt.config import BatchSettings
from yuzogpt.runtime.world import World
from yuzogpt.training.guards import StepStats

MEASURE_INTERVAL_STEPS = 4
EMA_DECAY = 0.95  # of the running means: about the last 20 measurements
WARMUP_MEASUREMENTS = 20  # before these, the batch does not grow


@dataclass
class GlobalBatch:
    """The number of rows of each step."""

    settings: BatchSettings
    # State that checkpoints hold, for the schedule `noise`.
    rows: int = 0  # of the next step
    measured: int = 0  # measurements so far
    trace: float = 0.0  # of the covariance of a row's gradient: a running mean
    square: float = 0.0  # |G|^2: a running mean

    @classmethod
    def from_state(cls, settings: BatchSettings, state: dict[str, float]) -> "GlobalBatch":
        """Return the batch with a checkpoint's state; a new one if the state is empty."""
        batch = cls(settings, rows=settings.rows_at(0))
        vars(batch).update({name: state[name] for name in batch.state_dict() if name in state})
        return batch

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        if self.settings.batch_schedule != "noise":
            return {}
        return {name: value for name, value in asdict(self).items() if name != "settings"}

    def rows_at(self, step: int) -> int:
        """Return the rows of a step; for the schedule `noise`, `step` must be the next one."""
        is_measured = self.settings.batch_schedule == "noise"
        return self.rows if is_measured else self.settings.rows_at(step)

    def max_rows_per_micro_step(self, step: int, world: World) -> int:
        """Return the most rows of a micro-step on a rank; a measured step has at least two."""
        if not self.measures_noise_at(step, world):
            return self.settings.batch_size
        return min(self.settings.batch_size, self.rows // world.size // 2)

    def measures_noise_at(self, step: int, world: World) -> bool:
        """Return whether a step measures the noise; every rank needs two rows for that."""
        is_growing = self.rows < self.settings.global_rows
        is_due = self.settings.batch_schedule == "noise" and step % MEASURE_INTERVAL_STEPS == 0
        return is_due and is_growing and self.rows >= 2 * world.size

    def measure(self, micro_rows: int, micro_sq_norm: float, sq_norm: float) -> None:
        """Update from |g|^2 over `micro_rows` rows and over all; grow if the noise is larger."""
        rows = self.rows
        if micro_rows >= rows or not math.isfinite(micro_sq_norm + sq_norm):
            return
        decay = min(EMA_DECAY, self.measured / (self.measured + 1))  # a plain mean at first
        square = (rows * sq_norm - micro_rows * micro_sq_norm) / (rows - micro_rows)
        trace = (micro_sq_norm - sq_norm) / (1 / micro_rows - 1 / rows)
        self.square = decay * self.square + (1 - decay) * square
        self.trace = decay * self.trace + (1 - decay) * trace
        self.measured += 1
        if self.measured >= WARMUP_MEASUREMENTS:
            increment, max_rows = self.settings.batch_start_rows, self.settings.global_rows
            target = min(self.noise_scale, max_rows)
            self.rows = max(self.rows, int(target // increment) * increment)

    @property
    def noise_scale(self) -> float:
        """The noise scale in rows; infinite while no gradient is visible in the noise."""
        return self.trace / self.square if self.square > 0 else math.inf


def update_noise_scale(
    batch: GlobalBatch,
    stats: StepStats,
    max_rows: int,
    parallel: Literal["none", "ddp", "fsdp"],
    world: World,
) -> None:
    """Measure the noise from the gradient of a step and that of its first micro-batch."""
    rows_of_rank = min(max_rows, batch.rows // world.size)  # in the first micro-step
    micro_rows = rows_of_rank * (world.size if parallel == "fsdp" else 1)
    # A micro-batch's gradient is divided by the rows of the whole batch, and DDP averages ranks.
    scale = batch.rows / (world.size * rows_of_rank)
    batch.measure(micro_rows, stats.micro_grad_sq_norm * scale**2, stats.grad_norm**2)
