"""The training loop without a launcher: `python -m yuzogpt.bench.bare FILE [TRACE]`.

FILE has the settings of a short run. The run's directory also gets its peak memory, and TRACE a
profiler's trace of the last steps.
"""

import resource
import sys
from pathlib import Path

import torch

from yuzogpt import runs
from yuzogpt.config import TrainSettings
from yuzogpt.config.bench import TRACED_STEPS
from yuzogpt.config.resolve import resolve
from yuzogpt.errors import RunFailed, UserError
from yuzogpt.runs.event_log import Listener, Record
from yuzogpt.training.launch import work_here

PEAK_MEMORY_FILE = "memory.txt"  # bytes
STATUS = Path("/proc/self/status")  # on Linux


def main(file: str, trace: str = "") -> None:
    """Run the loop."""
    run = runs.check(resolve(TrainSettings, [file], []))
    last = run.settings.schedule.max_iters
    listener = tracer(last, Path(trace)) if trace else lambda _: None
    with run.hold():
        work_here(run.settings, run.storage, listener)
    (run.storage.local / PEAK_MEMORY_FILE).write_text(str(peak_memory()))


def tracer(last: int, path: Path) -> Listener:
    """Return a listener that traces the last steps of a run and writes the trace."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities, profile_memory=True)

    def listen(record: Record) -> None:
        if record["kind"] == "train" and record["step"] == last - TRACED_STEPS:
            profiler.start()
        elif record["kind"] == "train" and record["step"] == last:
            profiler.stop()
            profiler.export_chrome_trace(str(path))

    return listen


def peak_memory() -> int:
    """Return this process's peak memory in bytes: the GPU's if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if STATUS.exists():  # a process inherits getrusage's value from the one that started it
        status = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (UserError, RunFailed) as error:
        sys.exit(f"yuzogpt: {error}")
