"""The loop of `yuzogpt train`, started in each of its ways for a few steps.

In: settings of a short run in a directory of its own. Out: the seconds of each step, as rank 0
wrote them to metrics.jsonl. Nothing is measured but what a user's run does, too.
"""

import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from yuzogpt import runs
from yuzogpt.config import TrainSettings
from yuzogpt.errors import RunFailed
from yuzogpt.metrics import Listener, Record, read_records
from yuzogpt.overrides import to_yaml
from yuzogpt.training.launch import work_here

TRACED = 3  # steps


@dataclass(frozen=True)
class Timing:
    """What a short run took."""

    seconds: list[float]  # of each step, those of the warm-up included
    tokens: int  # of a step
    until_first: float  # seconds from the command to the end of the first step
    memory: int | None  # bytes at most: of the GPU, or resident; not known of other processes


def run_bare(settings: TrainSettings, trace: Path | None) -> Timing:
    """Run the loop in this process; write a trace of its last steps, if that is wanted."""
    settings, _ = runs.check(settings)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = time.time()
    tracing = tracer(settings.schedule.max_iters, trace) if trace else contextlib.nullcontext()
    with runs.writing(settings) as run, tracing as listener:
        work_here(settings, run, listener or (lambda _: None))
    return timing(run, began, peak_memory())


@contextlib.contextmanager
def tracer(last: int, path: Path) -> Iterator[Listener]:
    """Trace the last steps of a run; yield what must hear of each."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities, profile_memory=True)

    def listen(record: Record) -> None:
        if record["kind"] == "train" and record["step"] == max(0, last - TRACED):
            profiler.start()
        elif record["kind"] == "train" and record["step"] == last:
            profiler.stop()
            profiler.export_chrome_trace(str(path))

    yield listen


def run_torchrun(settings: TrainSettings, workers: int) -> Timing:
    """Run the loop as so many of torchrun's ranks."""
    ranks = ["--standalone", f"--nproc_per_node={workers}", "-m", "yuzogpt.training"]
    return run_command(settings, [*ranks, "{file}"], "torch.distributed.run")


def run_on_ray(settings: TrainSettings, workers: int) -> Timing:
    """Run the loop as so many of Ray Train's workers."""
    return run_command(settings, ["train", "{file}", f"--num_workers={workers}"], "yuzogpt")


LAUNCHERS: dict[str, Callable[[TrainSettings, int], Timing]] = {
    "torchrun": run_torchrun,
    "ray": run_on_ray,
}


def run_command(settings: TrainSettings, arguments: list[str], module: str) -> Timing:
    """Run a module as a command of its own, with the settings in a file."""
    run = Path(settings.run.out_dir)
    file, log = run.with_suffix(".yaml"), run.with_suffix(".log")
    file.write_text(to_yaml(settings))
    command = [sys.executable, "-m", module, *(part.format(file=file) for part in arguments)]
    began = time.time()
    with log.open("wb") as out:
        ended = subprocess.run(
            command, stdout=out, stderr=subprocess.STDOUT, check=False, env=environment()
        )
    if ended.returncode:
        last = log.read_text(errors="replace").splitlines()[-1:] or ["it said nothing"]
        raise RunFailed(f"{module} ended with {ended.returncode}: {last[0]}")
    return timing(run, began, None)


def environment() -> dict[str, str]:
    """Return this process's variables, without those that would make it one of several ranks."""
    return {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}


def timing(run: Path, began: float, memory: int | None) -> Timing:
    """Read off a run's metrics what its steps took."""
    train = [record for record in read_records(run / runs.METRICS) if record["kind"] == "train"]
    return Timing(
        seconds=[record["tokens_per_step"] / record["tokens_per_second"] for record in train],
        tokens=train[-1]["tokens_per_step"],
        until_first=train[0]["time"] - began,
        memory=memory,
    )


def peak_memory() -> int:
    """Return the most memory that this process has had: of the GPU, if it has one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
