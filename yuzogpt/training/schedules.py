"""The learning rate of each step: a pure function of the step and its batch.

In: a step, from 0. Out: a learning rate. (Its rows: BatchSettings.rows_at, or batch_size.py for
the schedule by noise.)
"""

from yuzogpt.config import BatchSettings, OptimizerSettings, ScheduleSettings


def lr_at(step: int, optimizer: OptimizerSettings, schedule: ScheduleSettings) -> float:
    """Return the learning rate of `step`: linear warmup, the decay, then min_lr."""
    return schedule.lr_at(step, optimizer.learning_rate)


def batch_factor(rows: int, batch: BatchSettings) -> float:
    """Return what the learning rate is multiplied by for a batch of so many rows.

    With a power of 1/2, Adam's noise a token stays the same (Malladi et al., 2022).
    """
    return float((rows / batch.global_rows) ** batch.lr_batch_exponent)
