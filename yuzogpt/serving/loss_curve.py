"""The loss curve of the served run, a few hundred points for the page.

A long run's history takes seconds to read, so it is read only if it has changed, and reading takes
at most a small share of the time.
"""

import math
import stat
import time
from typing import Any

import numpy as np

from yuzogpt import runs
from yuzogpt.errors import UserError, reason_of
from yuzogpt.report.history import Column, History
from yuzogpt.serving.rate_limited_log import rate_limited_logger

MAX_POINTS = 300
STEP_LIMIT = 2**53  # JavaScript counts to here
MAX_TIME_SHARE = 0.05  # spent reading

log = rate_limited_logger(__name__)


class LossCurve:
    """Training and validation losses by step, up to now."""

    def __init__(self, model: str) -> None:
        """`model`: a run; any other model has an empty curve."""
        self.model = model
        self.version: tuple[int, int] | None = None
        self.next_read = 0.0
        self.curve: dict[str, Any] = {"train": [], "val": []}

    def read(self) -> dict[str, Any]:
        """Return [step, loss] of training, in bins, and of each validation."""
        started = time.monotonic()
        if started < self.next_read:
            return self.curve
        try:
            path = runs.open_for_reading(self.model).local / runs.METRICS
            info = path.stat()
        except (UserError, OSError):  # not a run, or not reachable now
            return self.curve
        if not stat.S_ISREG(info.st_mode):
            return self.curve
        if (info.st_size, info.st_mtime_ns) != self.version:
            self.version = (info.st_size, info.st_mtime_ns)
            try:
                history = History.read(path)
            except Exception as error:  # of any kind: the file may hold anything
                log.warning("%s: no loss curve: %s", path, reason_of(error))
                history = None
            if history:
                train, val = history.train, history.evaluation
                self.curve = {
                    "train": binned(train["step"], train["loss"]),
                    "val": binned(val["step"], val["val_loss_estimate"]),
                }
            self.next_read = time.monotonic() + (time.monotonic() - started) / MAX_TIME_SHARE
        return self.curve


def binned(steps: Column, losses: Column) -> list[tuple[int, float]]:
    """Return at most MAX_POINTS points: the last step and the mean loss of each bin."""
    points = []
    for bin in np.array_split(np.arange(len(steps)), min(MAX_POINTS, max(1, len(steps)))):
        known = losses[bin][np.isfinite(losses[bin])]
        if len(known) and steps[bin[-1]] < STEP_LIMIT:
            points.append((int(steps[bin[-1]]), round(float(known.mean()), 5)))
    return [point for point in points if math.isfinite(point[1])]
