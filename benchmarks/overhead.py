"""The step time of the same loop under torchrun and under Ray Train, in alternating pairs.

    python benchmarks/overhead.py                        # forty pairs, 1 and 2 workers
    python benchmarks/overhead.py --pairs 10 --workers 1

Both runs are commands of their own, on random tokens; steps take at least 200 ms. They start once
and then take turns: all processes of one are stopped (SIGSTOP) while those of the other compute for
some seconds. So the two halves of a pair are close in time, and a shared machine whose speed
changes every half minute is equally fast for both. Steps that a stop interrupts, or that begin in
the first half second of a turn, are not counted. A pair's ratio is that of its median steps. The
interval of the median ratio is that of its order statistics, with at least 95% confidence.
"""

import argparse
import contextlib
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from yuzogpt import runs
from yuzogpt.bench.bench import in_directory, short_run
from yuzogpt.bench.launchers import LAUNCHERS, arguments, environment
from yuzogpt.config import BenchSettings, TrainSettings
from yuzogpt.config.resolve import resolve, to_yaml
from yuzogpt.runs.event_log import Record, read_records, seconds_of_step
from yuzogpt.runtime.signals import raising_on_signals

FLAGS = (
    "--n_layer=6 --n_head=4 --n_embd=256 --block_size=128 --batch_size=8 "
    "--gradient_accumulation_steps=2 --device=cpu --dtype=float32"
).split()
WARMUP_S = 40.0  # after 20 s of training, Ray's side starts its spare worker
SETTLE_S = 0.5  # at the beginning of a turn
MIN_STEP_S = 0.2


@dataclass
class Contestant:
    """A run that computes only in its turns."""

    process: "subprocess.Popen[bytes]"
    metrics: Path
    turns: list[tuple[float, float]] = field(default_factory=list)  # start and end

    @classmethod
    def start(
        cls, launcher: str, settings: TrainSettings, workers: int, turn: float
    ) -> "Contestant":
        """Start a run; return when it is warm, and stopped."""
        run = Path(settings.run.out_dir)
        file = run.with_suffix(".yaml")
        file.write_text(to_yaml(settings))
        command = [sys.executable, "-m", *arguments(launcher, str(file), workers, "")]
        with run.with_suffix(".log").open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=out, env=environment(), start_new_session=True
            )
        contestant = cls(process, run / runs.METRICS)
        try:
            contestant.wait_until_warm(turn)
        except BaseException:
            contestant.end()
            raise
        contestant.send(signal.SIGSTOP)
        return contestant

    def wait_until_warm(self, turn: float) -> None:
        """Wait for the warm-up; exit if steps do not fit into turns."""
        while not (steps := self.steps()) or steps[-1]["time"] - steps[0]["time"] < WARMUP_S:
            self.check_alive()
            time.sleep(0.2)
        if (step := statistics.median(map(seconds_of_step, steps))) < MIN_STEP_S:
            sys.exit(f"steps of {step:.3f} s are too short: {MIN_STEP_S} s at least")
        if SETTLE_S + 3 * step > turn:
            sys.exit(f"steps of {step:.3f} s are too long for turns of {turn} s: give --turn")

    def check_alive(self) -> None:
        """Exit if the run has ended."""
        if self.process.poll() is not None:
            log = self.metrics.parent.with_suffix(".log")
            sys.exit(f"the run has ended: {log.read_text(errors='replace')}")

    def steps(self) -> list[Record]:
        """Return the records of its steps so far."""
        if not self.metrics.exists():
            return []
        return [record for record in read_records(self.metrics) if record["kind"] == "train"]

    def send(self, number: int) -> None:
        """Send a signal to all of its processes."""
        for process in family(self.process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def take_turn(self, seconds: float) -> None:
        """Let it compute for some seconds."""
        self.send(signal.SIGCONT)
        start = time.time()
        time.sleep(seconds)
        self.turns.append((start, time.time()))
        self.check_alive()
        self.send(signal.SIGSTOP)

    def medians(self) -> list[float]:
        """Return the median step of each turn, in seconds."""
        steps = [(record["time"], seconds_of_step(record)) for record in self.steps()]
        by_turn = [
            [seconds for at, seconds in steps if at - seconds > start + SETTLE_S and at < end]
            for start, end in self.turns
        ]
        return [statistics.median(seconds) for seconds in by_turn]

    def end(self) -> None:
        """End it, with all processes that it started."""
        members = family(self.process.pid)
        self.send(signal.SIGCONT)
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):  # also if the number is reused
                member.kill()
        self.process.wait()


def family(process: int) -> list[psutil.Process]:
    """Return a process and its descendants; nothing if it is gone."""
    try:
        first = psutil.Process(process)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the order statistics around the median with at least 95% confidence, or the ends."""
    n, ordered = len(ratios), sorted(ratios)
    cut = 0
    while cut + 1 < n / 2 and 2 * sum(math.comb(n, i) for i in range(cut + 2)) / 2**n <= 0.05:
        cut += 1
    return ordered[cut], ordered[n - 1 - cut]


def compare(base: TrainSettings, directory: str, workers: int, pairs: int, turn: float) -> None:
    """Run the pairs and print the ratio."""
    contestants: dict[str, Contestant] = {}
    with contextlib.ExitStack() as ends:
        for name in LAUNCHERS:
            run = in_directory(base, directory, f"{name}-{workers}")
            contestants[name] = Contestant.start(name, run, workers, turn)
            ends.callback(contestants[name].end)
        for pair in range(pairs):
            for name in sorted(contestants, reverse=pair % 2 == 0):  # each is first in half of them
                contestants[name].take_turn(turn)
        medians = {name: contestant.medians() for name, contestant in contestants.items()}
    ratios = [a / b for a, b in zip(medians["ray"], medians["torchrun"], strict=True)]
    low, high = interval(ratios)
    step = statistics.median(medians["torchrun"])
    print(
        f"{workers} worker(s), {pairs} pairs: Ray over torchrun {statistics.median(ratios):.3f} "
        f"({low:.3f} to {high:.3f}); torchrun {1e3 * step:.1f} ms a step",
        flush=True,
    )


def main() -> None:
    """Print a row for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turn", type=float, default=4.0, help="seconds")
    options, flags = parser.parse_known_args()
    steps = int(
        (2 * WARMUP_S + options.pairs * options.turn) / MIN_STEP_S
    )  # more than there is time for
    settings = resolve(BenchSettings, [], [*FLAGS, f"--steps={steps}", *flags])
    with raising_on_signals(), tempfile.TemporaryDirectory() as directory:
        base = short_run(settings, Path(directory))
        for workers in options.workers:
            compare(base, directory, workers, options.pairs, options.turn)


if __name__ == "__main__":
    main()
