"""The loop in a process, and no launcher: `python -m yuzogpt.bench.bare FILE [TRACE]`.

In: the settings of a short run. Out: that run, and in it how much memory it took at most; a trace
of its last steps, if there is a file for it.
"""

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from yuzogpt import runs
from yuzogpt.config import TrainSettings
from yuzogpt.config.bench import TRACED
from yuzogpt.config.resolve import resolve
from yuzogpt.errors import RunFailed, UserError
from yuzogpt.runs.event_log import Listener, Record
from yuzogpt.training.launch import work_here

MEMORY = "memory.txt"  # bytes
STATUS = Path("/proc/self/status")  # Linux's


def main(file: str, trace: str = "") -> None:
    """Be the run."""
    settings, _ = runs.check(resolve(TrainSettings, [file], []))
    tracing = tracer(settings.schedule.max_iters, Path(trace)) if trace else do_not_trace()
    with runs.hold_run_dir(settings) as run, tracing as listener:
        work_here(settings, run, listener)
    (run.local / MEMORY).write_text(str(peak_memory()))


@contextlib.contextmanager
def do_not_trace() -> Iterator[Listener]:
    """Yield what hears of each step, and does nothing."""
    yield lambda _: None


@contextlib.contextmanager
def tracer(last: int, path: Path) -> Iterator[Listener]:
    """Trace the last steps of a run; yield what must hear of each."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities, profile_memory=True)

    def listen(record: Record) -> None:
        if record["kind"] == "train" and record["step"] == last - TRACED:
            profiler.start()
        elif record["kind"] == "train" and record["step"] == last:
            profiler.stop()
            profiler.export_chrome_trace(str(path))

    yield listen


def peak_memory() -> int:
    """Return the most memory that this process has had: of the GPU, if it has one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if STATUS.exists():  # what getrusage says, a process inherits from the one that started it
        found = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(found["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (UserError, RunFailed) as error:
        sys.exit(f"yuzogpt: {error}")
