"""The learning rate of each step: a pure function of the step, counted from 0, and its batch size.

With the batch schedule `noise`, the batch size depends on measurements; checkpoints hold them.

config/schedule.py has the formula, so that settings can be checked without torch; batch_size.py has
the schedule of the batch size. Next: training/optimizers.py.
"""

from yuzogpt.config import BatchSettings, OptimizerSettings, ScheduleSettings


def lr_at(step: int, optimizer: OptimizerSettings, schedule: ScheduleSettings) -> float:
    """Return the learning rate of `step`: a linear warmup, then the decay to min_lr."""
    return schedule.lr_at(step, optimizer.learning_rate)


def batch_lr_scale(rows: int, batch: BatchSettings) -> float:
    """Return the learning rate's factor for a batch of `rows`; 1 for a full batch.

    With an exponent of 1/2, the noise of Adam's updates per token of training does not depend on
    the batch size (Malladi et al., 2022).
    """
    return float((rows / batch.global_rows) ** batch.lr_batch_exponent)
