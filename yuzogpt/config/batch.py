"""The number of rows in each step's global batch.

A schedule is a pure function of the settings and the step, from 0; but for `noise`, whose batch
grows with what the run measures (training/batch_size.py).
"""

from collections.abc import Callable
from typing import Annotated, Self

from pydantic import model_validator

from yuzogpt.config.registry import OneOf, Registry
from yuzogpt.config.section import Count, NonNegative, Positive, Section, setting

# In each schedule, batch_start_rows divides global_rows.
BATCH_SCHEDULES = Registry[Callable[["BatchSettings", int], int]]("batch schedule")


@BATCH_SCHEDULES.register("constant", help="full size from the start")
def constant(batch: "BatchSettings", step: int) -> int:
    """Full size at every step."""
    return batch.global_rows


@BATCH_SCHEDULES.register("linear", help="in equal increments")
def linear(batch: "BatchSettings", step: int) -> int:
    """Add batch_start_rows, again and again, until batch_ramp_iters."""
    made, end = min(step, batch.batch_ramp_iters), batch.batch_ramp_iters
    times = batch.global_rows // batch.batch_start_rows
    return batch.batch_start_rows * (1 + (times - 1) * made // end)


@BATCH_SCHEDULES.register("steps", help="by doubling")
def steps(batch: "BatchSettings", step: int) -> int:
    """Double, at even distances, the last time at batch_ramp_iters."""
    made, end = min(step, batch.batch_ramp_iters), batch.batch_ramp_iters
    doublings = (batch.global_rows // batch.batch_start_rows).bit_length() - 1
    return batch.batch_start_rows << (doublings * made // end)


@BATCH_SCHEDULES.register("noise", help="as the measured gradient noise scale suggests")
def noise(batch: "BatchSettings", step: int) -> int:
    """Return the first size; later ones depend on what the run measures."""
    return batch.batch_start_rows


class BatchSettings(Section):
    """Rows in a step: batch_size x gradient_accumulation_steps, for any number of workers."""

    batch_size: Positive = setting(12, "rows per forward pass, at most", "rows")
    gradient_accumulation_steps: Positive = setting(
        40, "the global batch is this many times batch_size; workers share its rows", "micro-steps"
    )
    batch_schedule: Annotated[str, OneOf("yuzogpt.config.batch:BATCH_SCHEDULES")] = setting(
        "constant", "how the global batch grows to full size", frozen=True
    )
    batch_start_rows: Count = setting(
        0,
        "batch size at step 0, of which all later sizes are multiples; needed unless constant",
        "rows",
        frozen=True,
    )
    batch_ramp_iters: Count = setting(
        0, "linear, steps: step at which the batch reaches full size", "steps", frozen=True
    )
    lr_batch_exponent: NonNegative = setting(
        0.5,
        "learning-rate scaling while the batch grows: lr *= (rows / full_rows) ** this; 0.5: "
        "square-root scaling; 0: none",
        frozen=True,
    )

    @property
    def global_rows(self) -> int:
        """Rows in one optimizer step, over all workers; with a schedule, at full size."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def least_rows(self) -> int:
        """Rows in the smallest optimizer step."""
        return self.rows_at(0)

    def rows_at(self, step: int) -> int:
        """Return the rows of the global batch of `step`."""
        return BATCH_SCHEDULES[self.batch_schedule](self, step)

    @model_validator(mode="after")
    def ramp_ends_at_whole_batch(self) -> Self:
        """The full size is a multiple of the first."""
        rows, first, kind = self.global_rows, self.batch_start_rows, self.batch_schedule
        if kind == "constant":
            return self
        if not first or rows % first:
            raise ValueError(
                f"batch_schedule={kind}: batch_start_rows={first} must divide the whole batch, "
                f"{rows}"
            )
        if kind == "steps" and (rows // first).bit_count() != 1:
            raise ValueError(
                f"batch_schedule=steps doubles: {rows} rows are not batch_start_rows={first} "
                "times 2, 4, 8, ..."
            )
        if kind != "noise" and not self.batch_ramp_iters:
            raise ValueError(f"batch_schedule={kind}: set batch_ramp_iters, where it ends")
        return self
