"""The learning rate of each step: a pure function of the step."""

import math

from yuzogpt.config import OptimizerSettings, ScheduleSettings


def lr_at(step: int, optimizer: OptimizerSettings, schedule: ScheduleSettings) -> float:
    """Return the learning rate of `step` (from 0): linear warmup, cosine decay, then min_lr."""
    peak = optimizer.learning_rate
    if not schedule.decay_lr:
        return peak
    if step < schedule.warmup_iters:
        return peak * (step + 1) / (schedule.warmup_iters + 1)
    if step >= schedule.lr_decay_iters:
        return schedule.min_lr
    progress = (step - schedule.warmup_iters) / (schedule.lr_decay_iters - schedule.warmup_iters)
    return schedule.min_lr + (peak - schedule.min_lr) * (1 + math.cos(math.pi * progress)) / 2
