"""Says why a run has become several times slower than it began: who else uses its cores.

In: the seconds of each step, without evaluations and checkpoints. Out: a line, if for a while steps
take much longer per token than the first ones did.
"""

import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from yuzogpt.runtime.cores import cores_of_time, own_cores, throttled_seconds

SKIPPED_STEPS = 3  # of the first ones, which warm up
FIRST_STEPS = 20  # whose median is how fast the run began
WINDOW_S = 5.0  # of steps, which are compared with the first ones
SLOW_WINDOWS = 4  # one after the other: the run is slow
FACTOR = 3.0
PAGES_PER_SECOND = 50  # read from disk: more than this slows a run down


@dataclass(frozen=True)
class Usage:
    """Counters of this process's cores, in seconds since some moment."""

    at: float
    busy: float  # of all processes
    own: float  # of this process
    stolen: float  # by the host of a virtual machine
    throttled: float  # while the CPU quota of a container was spent
    pages: float  # that this process had to wait for

    @classmethod
    def now(cls) -> "Usage":
        """Read the counters."""
        cores = own_cores()
        mine = [each for core, each in enumerate(psutil.cpu_times(percpu=True)) if core in cores]
        own = os.times()
        return cls(
            at=time.monotonic(),
            busy=sum(each.user + each.nice + each.system for each in mine),
            own=own.user + own.system,
            stolen=sum(each.steal for each in mine),
            throttled=throttled_seconds(),
            pages=resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
        )


def read_usage() -> Usage | None:
    """Return the counters now; None where the system is not Linux."""
    return Usage.now() if own_cores() else None


class SlowdownReport:
    """Compares the time of steps with that of the first ones."""

    def __init__(self, read: Callable[[], Usage | None] = read_usage) -> None:
        """`read`: the counters of the cores."""
        self.read, self.local_ranks = read, 1
        self.first: list[float] = []  # seconds per token of the first steps
        self.usage: Usage | None = None  # when the first slow window began
        self.seconds = self.tokens = 0.0  # of this window's steps
        self.factors: list[float] = []  # of the slow windows
        self.steps = 0

    def after_step(self, seconds: float, tokens: int) -> str:
        """Count a step; return a line if the run has become slow, else an empty string.

        It is said once, until steps are fast again.
        """
        self.steps += 1
        if self.steps <= SKIPPED_STEPS:
            return ""
        if len(self.first) < FIRST_STEPS:
            self.first.append(seconds / tokens)
            self.usage = self.read() if len(self.first) == FIRST_STEPS else None
            return ""
        self.seconds, self.tokens = self.seconds + seconds, self.tokens + tokens
        if self.seconds < WINDOW_S:
            return ""
        factor = self.seconds / self.tokens / statistics.median(self.first)
        self.seconds = self.tokens = 0.0
        if factor < FACTOR:
            self.factors, self.usage = [], self.read()
            return ""
        self.factors.append(factor)
        if len(self.factors) != SLOW_WINDOWS:
            return ""
        middle, now = statistics.median(self.factors), self.read()
        line = f"!!! steps take {middle:.1f} times as long as when the command started"
        if self.usage is None or now is None:
            return line
        return f"{line}: {reason(self.usage, now, self.local_ranks)}"


def reason(before: Usage, now: Usage, local_ranks: int) -> str:
    """Return why steps are slow, and what would help; `local_ranks`: of this run, on this node."""
    seconds, cores = max(now.at - before.at, 1e-3), cores_of_time()
    throttled = (now.throttled - before.throttled) / seconds
    stolen = (now.stolen - before.stolen) / seconds
    others = (now.busy - before.busy - local_ranks * (now.own - before.own)) / seconds
    pages = (now.pages - before.pages) / seconds
    if throttled > 0.2:
        return (
            f"the CPU quota of {cores:g} cores stops them {throttled:.0%} of the time; raise it, "
            "or set a smaller --threads"
        )
    if pages > PAGES_PER_SECOND:
        return (
            f"{pages:,.0f} pages a second are read from disk: memory is short, or the corpus is on "
            "a slow disk"
        )
    if stolen > 0.2 * cores:
        return f"the host of this virtual machine keeps {stolen:.1f} of its {cores:g} cores"
    if others > 0.25:
        return (
            f"other programs use {others:.1f} of {cores:g} cores; end them, lower their priority "
            "(nice), or set a smaller --threads"
        )
    return "no other program uses the cores; the processor may be hot, or save power"
