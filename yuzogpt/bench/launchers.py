"""The loop of `yuzogpt train`, started in each of its ways for a few steps.

In: settings of a short run in a directory of its own. Out: the seconds of each step, as rank 0
wrote them to metrics.jsonl. Nothing is measured but what a user's run does, too: each is a command
of its own, with the time that its imports take.
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
from yuzogpt.bench.bare import MEMORY
from yuzogpt.config import TrainSettings
from yuzogpt.config.resolve import to_yaml
from yuzogpt.errors import RunFailed, Stopped
from yuzogpt.runs.event_log import read_records, seconds_of_step
from yuzogpt.runtime import ranks

ENDS_WITHIN = 60.0  # seconds; torchrun itself gives its ranks 30


@dataclass(frozen=True)
class Timing:
    """What a short run took."""

    seconds: list[float]  # of each step, those of the warm-up included
    tokens: int  # of a step
    until_first: float  # seconds from the command to the end of the first step
    memory: int | None  # bytes at most: of the GPU, or resident; not known of several processes


def measure(launcher: str, settings: TrainSettings, workers: int, trace: str = "") -> Timing:
    """Run the loop as a command, read off what it took, and delete the run."""
    run = Path(settings.run.out_dir)
    file, log = run.with_suffix(".yaml"), run.with_suffix(".log")
    file.write_text(to_yaml(settings))
    command = [sys.executable, "-m", *arguments(launcher, str(file), workers, trace)]
    began = time.time()
    with log.open("wb") as out:
        status = wait_for(
            subprocess.Popen(
                command, stdout=out, stderr=out, env=environment(), start_new_session=True
            )
        )
    if status:
        said = what_went_wrong(log.read_text(errors="replace").splitlines())
        raise RunFailed(f"{launcher}, {workers} worker(s): {said or f'ended with {status}'}")
    found = timing(run, began)
    shutil.rmtree(run)
    return found


def arguments(launcher: str, file: str, workers: int, trace: str) -> Sequence[str]:
    """Return the module that is run, and its arguments."""
    if launcher == "bare":
        return "yuzogpt.bench.bare", file, *([trace] if trace else [])
    if launcher == "torchrun":
        ranks = "--standalone", f"--nproc_per_node={workers}"
        return "torch.distributed.run", *ranks, "-m", "yuzogpt.training", file
    return "yuzogpt", "train", file, f"--num_workers={workers}"


LAUNCHERS = {name: functools.partial(measure, name) for name in ("torchrun", "ray")}


def environment() -> dict[str, str]:
    """Return this process's variables, without those that would make it one of several ranks."""
    return ranks.without_ranks(dict(os.environ))


def wait_for(child: "subprocess.Popen[bytes]") -> int:
    """Return what a command ends with; one that is interrupted ends first, with all it started."""
    try:
        return child.wait()
    except (KeyboardInterrupt, Stopped) as error:
        is_interrupted = isinstance(error, KeyboardInterrupt)
        child.send_signal(signal.SIGINT if is_interrupted else signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(ENDS_WITHIN)
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def what_went_wrong(lines: Sequence[str]) -> str:
    """Return the line of a log that says it: ours, else an exception's last, else the last."""
    for is_it in (
        lambda line: line.startswith("yuzogpt: "),
        lambda line: re.search(r"Error: \S", line),
        lambda line: line.strip("=- "),
    ):
        for line in reversed(lines):
            if is_it(line):
                return line.removeprefix("yuzogpt: ").strip()
    return ""


def timing(run: Path, began: float) -> Timing:
    """Read off a run what its steps took."""
    train = [record for record in read_records(run / runs.METRICS) if record["kind"] == "train"]
    memory = run / MEMORY
    return Timing(
        seconds=[seconds_of_step(record) for record in train],
        tokens=train[-1]["tokens_per_step"],
        until_first=train[0]["time"] - began,
        memory=int(memory.read_text()) if memory.exists() else None,
    )
