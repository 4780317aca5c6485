"""What Ray Train costs a step: the same loop under torchrun and under Ray, in alternated pairs.

    python benchmarks/overhead.py                        # forty pairs, 1 and 2 workers
    python benchmarks/overhead.py --pairs 10 --workers 1

Both runs are commands of their own, on random tokens; steps take at least 200 ms. They are begun
once and then take turns: all processes of the one stand still (SIGSTOP) while those of the other
compute for some seconds. So a pair's halves lie side by side, and a machine whose speed changes
every half minute, as shared ones do, is the same for both. Steps that a stop has cut, or that began
in the first half second of a turn, do not count. A pair's ratio is that of its medians. The
interval is that of the median ratio's order statistics, at least 95%.
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
WARM = 40.0  # seconds of training: after 20, Ray's side starts a spare worker, once
SETTLED = 0.5  # seconds after the begin of a turn
SHORTEST = 0.2  # seconds of a step


@dataclass
class Contestant:
    """A run that computes in its turns alone."""

    process: "subprocess.Popen[bytes]"
    metrics: Path
    turns: list[tuple[float, float]] = field(default_factory=list)  # from, to

    @classmethod
    def start(
        cls, launcher: str, settings: TrainSettings, workers: int, turn: float
    ) -> "Contestant":
        """Begin a run; return when it has trained for a while, and stands still."""
        run = Path(settings.run.out_dir)
        file = run.with_suffix(".yaml")
        file.write_text(to_yaml(settings))
        command = [sys.executable, "-m", *arguments(launcher, str(file), workers, "")]
        with run.with_suffix(".log").open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=out, env=environment(), start_new_session=True
            )
        one = cls(process, run / runs.METRICS)
        try:
            one.wait_until_warm(turn)
        except BaseException:
            one.end()
            raise
        one.send(signal.SIGSTOP)
        return one

    def wait_until_warm(self, turn: float) -> None:
        """Return when it has trained for a while; leave if its steps do not fit into turns."""
        while not (steps := self.steps()) or steps[-1]["time"] - steps[0]["time"] < WARM:
            self.must_live()
            time.sleep(0.2)
        if (step := statistics.median(map(seconds_of_step, steps))) < SHORTEST:
            sys.exit(f"steps of {step:.3f} s are too short: {SHORTEST} s at least")
        if SETTLED + 3 * step > turn:
            sys.exit(f"steps of {step:.3f} s are too long for turns of {turn} s: give --turn")

    def must_live(self) -> None:
        """Leave if it has ended."""
        if self.process.poll() is not None:
            log = self.metrics.parent.with_suffix(".log")
            sys.exit(f"it ended: {log.read_text(errors='replace')}")

    def steps(self) -> list[Record]:
        """Return what is known of its steps."""
        if not self.metrics.exists():
            return []
        return [record for record in read_records(self.metrics) if record["kind"] == "train"]

    def send(self, number: int) -> None:
        """Send a signal to all of its processes."""
        for one in family(self.process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(number)

    def take_turn(self, seconds: float) -> None:
        """Let it compute for a while."""
        self.send(signal.SIGCONT)
        began = time.time()
        time.sleep(seconds)
        self.turns.append((began, time.time()))
        self.must_live()
        self.send(signal.SIGSTOP)

    def medians(self) -> list[float]:
        """Return the median step of each turn, in seconds."""
        steps = [(record["time"], seconds_of_step(record)) for record in self.steps()]
        of_turns = [
            [took for at, took in steps if at - took > began + SETTLED and at < ended]
            for began, ended in self.turns
        ]
        return [statistics.median(each) for each in of_turns]

    def end(self) -> None:
        """End it, with all that it started."""
        members = family(self.process.pid)
        self.send(signal.SIGCONT)
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        for one in members:
            with contextlib.suppress(psutil.NoSuchProcess):  # nor another of that number
                one.kill()
        self.process.wait()


def family(process: int) -> list[psutil.Process]:
    """Return a process and all that descend from it; nobody, if it is gone."""
    try:
        first = psutil.Process(process)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the order statistics that enclose the median with at least 95%, or the extremes."""
    n, ordered = len(ratios), sorted(ratios)
    cut = 0
    while cut + 1 < n / 2 and 2 * sum(math.comb(n, i) for i in range(cut + 2)) / 2**n <= 0.05:
        cut += 1
    return ordered[cut], ordered[n - 1 - cut]


def compare(base: TrainSettings, directory: str, workers: int, pairs: int, turn: float) -> None:
    """Print what the pairs came to."""
    contestants: dict[str, Contestant] = {}
    with contextlib.ExitStack() as ends:
        for name in LAUNCHERS:
            run = in_directory(base, directory, f"{name}-{workers}")
            contestants[name] = Contestant.start(name, run, workers, turn)
            ends.callback(contestants[name].end)
        for pair in range(pairs):
            for name in sorted(contestants, reverse=pair % 2 == 0):  # who is first, changes
                contestants[name].take_turn(turn)
        found = {name: one.medians() for name, one in contestants.items()}
    ratios = [a / b for a, b in zip(found["ray"], found["torchrun"], strict=True)]
    low, high = interval(ratios)
    step = statistics.median(found["torchrun"])
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
    wanted, flags = parser.parse_known_args()
    steps = int((2 * WARM + wanted.pairs * wanted.turn) / SHORTEST)  # more than there is time for
    settings = resolve(BenchSettings, [], [*FLAGS, f"--steps={steps}", *flags])
    with raising_on_signals(), tempfile.TemporaryDirectory() as directory:
        base = short_run(settings, Path(directory))
        for workers in wanted.workers:
            compare(base, directory, workers, wanted.pairs, wanted.turn)


if __name__ == "__main__":
    main()
