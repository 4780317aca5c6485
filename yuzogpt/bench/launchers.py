"""Run the loop of `yuzogpt train` for a few steps with each launcher, and read its step times.

Each run is a command of its own, as a user's would be, so imports are measured, too. Step times are
those that rank 0 writes to metrics.jsonl.
"""

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from yuzogpt import runs
from yuzogpt.bench.bare import PEAK_MEMORY_FILE
from yuzogpt.config import TrainSettings
from yuzogpt.config.resolve import to_yaml
from yuzogpt.errors import RunFailed, Stopped
from yuzogpt.runs.event_log import read_records, seconds_of_step
from yuzogpt.runtime import ranks

STOP_TIMEOUT_S = 60.0  # torchrun itself gives its ranks 30 s


@dataclass(frozen=True)
class Timing:
    """The time and memory of a short run."""

    seconds: list[float]  # of each step, with the warm-up
    tokens: int  # per step
    seconds_to_first_step: float  # from the command to the end of the first step
    memory_bytes: int | None  # peak, of the GPU or resident; None for several processes


def measure(launcher: str, settings: TrainSettings, workers: int, trace: str = "") -> Timing:
    """Run the loop as a command, return its timing, and delete the run."""
    run = Path(settings.run.out_dir)
    file, log = run.with_suffix(".yaml"), run.with_suffix(".log")
    file.write_text(to_yaml(settings))
    command = [sys.executable, "-m", *arguments(launcher, str(file), workers, trace)]
    start = time.time()
    with log.open("wb") as out:
        status = wait_for(
            subprocess.Popen(
                command, stdout=out, stderr=out, env=environment(), start_new_session=True
            )
        )
    if status:
        error = find_error(log.read_text(errors="replace").splitlines())
        raise RunFailed(f"{launcher}, {workers} worker(s): {error or f'ended with {status}'}")
    timing = read_timing(run, start)
    shutil.rmtree(run)
    return timing


def arguments(launcher: str, file: str, workers: int, trace: str) -> Sequence[str]:
    """Return the module to run, and its arguments."""
    if launcher == "bare":
        return "yuzogpt.bench.bare", file, *([trace] if trace else [])
    if launcher == "torchrun":
        ranks = "--standalone", f"--nproc_per_node={workers}"
        return "torch.distributed.run", *ranks, "-m", "yuzogpt.training", file
    return "yuzogpt", "train", file, f"--num_workers={workers}"


LAUNCHERS = {name: functools.partial(measure, name) for name in ("torchrun", "ray")}


def environment() -> dict[str, str]:
    """Return this process's variables without those that would make the command a rank."""
    return ranks.without_ranks(dict(os.environ))


def wait_for(child: "subprocess.Popen[bytes]") -> int:
    """Return a command's exit status; on SIGTERM or Ctrl-C stop it first, with all its children."""
    try:
        return child.wait()
    except (KeyboardInterrupt, Stopped) as error:
        is_interrupted = isinstance(error, KeyboardInterrupt)
        child.send_signal(signal.SIGINT if is_interrupted else signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_TIMEOUT_S)
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def find_error(lines: Sequence[str]) -> str:
    """Return a log's last line of our own, else its last exception, else its last line."""
    for is_match in (
        lambda line: line.startswith("yuzogpt: "),
        lambda line: re.search(r"Error: \S", line),
        lambda line: line.strip("=- "),
    ):
        for line in reversed(lines):
            if is_match(line):
                return line.removeprefix("yuzogpt: ").strip()
    return ""


def read_timing(run: Path, start: float) -> Timing:
    """Return the timing of a run from its files."""
    steps = [record for record in read_records(run / runs.METRICS) if record["kind"] == "train"]
    memory = run / PEAK_MEMORY_FILE
    return Timing(
        seconds=[seconds_of_step(record) for record in steps],
        tokens=steps[-1]["tokens_per_step"],
        seconds_to_first_step=steps[0]["time"] - start,
        memory_bytes=int(memory.read_text()) if memory.exists() else None,
    )
