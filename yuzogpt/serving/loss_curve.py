"""The loss curve of the run that is served, while it goes on.

In: a run directory. Out: a few hundred points of it, for the page. A long run's history takes
seconds to read, so it is read only when it has changed, and for a small share of the time.
"""

import math
import stat
import time
from typing import Any

import numpy as np

from yuzogpt import runs
from yuzogpt.errors import UserError, reason_of
from yuzogpt.report.history import Column, History
from yuzogpt.serving.sparing import sparing_logger

POINTS = 300
MOST_STEPS = 2**53  # what JavaScript counts to
SHARE = 0.05  # of the time, at most

log = sparing_logger(__name__)


class LossCurve:
    """Losses by step, as far as the run has come."""

    def __init__(self, model: str) -> None:
        """`model`: a run; of anything else there is no curve."""
        self.model = model
        self.stamp: tuple[int, int] | None = None
        self.not_before = 0.0
        self.curve: dict[str, Any] = {"train": [], "val": []}

    def read(self) -> dict[str, Any]:
        """Return [step, loss] of training, in bins, and of each look at the validation loss."""
        started = time.monotonic()
        if started < self.not_before:
            return self.curve
        try:
            path = runs.open_for_reading(self.model).local / runs.METRICS
            found = path.stat()
        except (UserError, OSError):  # not a run, or not within reach now
            return self.curve
        if not stat.S_ISREG(found.st_mode):
            return self.curve
        if (found.st_size, found.st_mtime_ns) != self.stamp:
            self.stamp = (found.st_size, found.st_mtime_ns)
            try:
                history = History.read(path)
            except Exception as error:  # of whatever kind: the file may be anything
                log.warning("%s: no loss curve: %s", path, reason_of(error))
                history = None
            if history:
                train, val = history.train, history.evaluation
                self.curve = {
                    "train": binned(train["step"], train["loss"]),
                    "val": binned(val["step"], val["val_loss_estimate"]),
                }
            self.not_before = time.monotonic() + (time.monotonic() - started) / SHARE
        return self.curve


def binned(steps: Column, losses: Column) -> list[tuple[int, float]]:
    """Return at most POINTS points: of each bin its last step and its mean loss."""
    points = []
    for bin in np.array_split(np.arange(len(steps)), min(POINTS, max(1, len(steps)))):
        known = losses[bin][np.isfinite(losses[bin])]
        if len(known) and steps[bin[-1]] < MOST_STEPS:
            points.append((int(steps[bin[-1]]), round(float(known.mean()), 5)))
    return [point for point in points if math.isfinite(point[1])]
