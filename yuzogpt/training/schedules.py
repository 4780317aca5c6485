"""The learning rate and the batch of each step: pure functions of the step.

In: a step, from 0. Out: a learning rate; rows. The one batch that is no such function is that of
the gradient's noise scale (batch_size.py): it is part of a run's state.
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


def rows_at(step: int, batch: BatchSettings) -> int:
    """Return the rows of the global batch of `step`.

    linear: start_rows * floor(1 + (n - 1) * step / ramp_iters), n times the first batch being the
    whole. steps: log2(n) doublings, equally far apart, the last at ramp_iters. noise: the first
    batch; what comes then is the run's own.
    """
    whole, first, ramp = batch.global_rows, batch.start_rows, batch.ramp_iters
    if batch.batch_schedule == "constant":
        return whole
    if batch.batch_schedule == "noise":
        return first
    if step >= ramp:
        return whole
    times = whole // first
    if batch.batch_schedule == "linear":
        return first * (1 + (times - 1) * step // ramp)
    doublings = times.bit_length() - 1
    return first << (doublings * step // ramp)


def batch_factor(rows: int, batch: BatchSettings) -> float:
    """Return what the learning rate is multiplied by for a batch of so many rows.

    With a power of 1/2, Adam's noise a token stays the same (Malladi et al., 2022).
    """
    return float((rows / batch.global_rows) ** batch.batch_lr_power)
