"""The learning rate of each step: a pure function of the step and its batch.

In: a step, from 0. Out: a learning rate. (Its rows: BatchSettings.rows_at, or batch_size.py for
the schedule by noise.)
"""

import math

from yuzogpt.config import BatchSettings, OptimizerSettings, ScheduleSettings


def lr_at(step: int, optimizer: OptimizerSettings, schedule: ScheduleSettings) -> float:
    """Return the learning rate of `step`: linear warmup, the decay, then min_lr.

    wsd (warmup, stable, decay): MiniCPM (Hu et al., 2024).
    """
    peak, end = optimizer.learning_rate, schedule.lr_decay_iters
    if not schedule.decay_lr:
        return peak
    if step < schedule.warmup_iters:
        return peak * (step + 1) / (schedule.warmup_iters + 1)
    if step >= end:
        return schedule.min_lr
    begin = schedule.warmup_iters
    if schedule.lr_schedule == "wsd":
        begin = max(begin, end - schedule.cooldown_iters)
    progress = max(0, step - begin) / (end - begin)
    left = 1 - progress
    if schedule.lr_schedule == "cosine":
        left = (1 + math.cos(math.pi * progress)) / 2
    return schedule.min_lr + (peak - schedule.min_lr) * left


def batch_factor(rows: int, batch: BatchSettings) -> float:
    """Return what the learning rate is multiplied by for a batch of so many rows.

    With a power of 1/2, Adam's noise a token stays the same (Malladi et al., 2022).
    """
    return float((rows / batch.global_rows) ** batch.batch_lr_power)
