"""A run under random faults: does it end with the same bits, and what does each fault cost?

    python benchmarks/soak.py DIRECTORY --minutes=60

The real command, `yuzogpt train ... --num_workers=2` on its embedded Ray: a small model, dropout
on. At random moments, each kind once and then at random, more of those that are frequent in life:

    worker killed      SIGKILL for one of the two training workers
    killed twice       the same, and again within 15 seconds, while the workers start
    worker stopped     SIGSTOP for one of them; --hang_timeout is to notice
    command killed     SIGKILL for the command; then the same command again
    command stopped    SIGTERM for it; then the same command again

The peer is an undisturbed run of as many steps: final weights, optimizer state and every training
loss are compared bit by bit. DIRECTORY must be new; it keeps both runs, and what they printed.
"""

import argparse
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from yuzogpt import checkpoints, runs
from yuzogpt.report.history import History
from yuzogpt.report.summary import Summary, summarize
from yuzogpt.runs.event_log import Follower, Record, read_records
from yuzogpt.storage.run_storage import LocalStorage

FLAGS = (
    "--n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --dropout=0.1 --batch_size=8 "
    "--gradient_accumulation_steps=2 --learning_rate=1e-3 --warmup_iters=100 "
    "--lr_decay_iters=100000 --eval_interval=1000 --eval_iters=2 --device=cpu --dtype=float32 "
    "--threads=1 --num_workers=2 --max_failures=1000000"
).split()
ENDLESS = 10**9  # steps
MARK = "YUZOGPT_SOAK"  # in the environment of all processes of a run
GIVE_UP = 300.0  # seconds without a step
BAR, EVERY = 0.97, 600.0  # effective training time with one kill every 10 minutes


class Run:
    """A run of the command: the same one again, however often it was killed."""

    def __init__(self, work: Path, name: str, flags: list[str]) -> None:
        """Start it."""
        self.out_dir, self.name = work / name, name
        self.arguments = [sys.executable, "-m", "yuzogpt", "train", *FLAGS, *flags]
        self.arguments += [f"--data_dir={work / 'corpus'}", f"--out_dir={self.out_dir}"]
        self.mark = uuid.uuid4().hex
        self.environment = {**os.environ, MARK: self.mark}
        self.environment.pop("RAY_ADDRESS", None)
        self.printed = (work / f"{name}.txt").open("ab")
        self.heard: list[Record] = []
        self.follower = Follower(LocalStorage(self.out_dir / runs.METRICS), self.heard.append)
        self.start()

    def start(self) -> None:
        """Start the command; a session of its own keeps the terminal's Ctrl-C from it."""
        self.command = subprocess.Popen(
            self.arguments,
            env=self.environment,
            stdout=self.printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def stop(self) -> None:
        """Ask the command to stop, and wait until it has, with a checkpoint."""
        self.command.terminate()
        try:
            status = self.command.wait(GIVE_UP)
        except subprocess.TimeoutExpired:
            raise Unexpected(f"{self.name}: not stopped within {GIVE_UP:.0f} s") from None
        if status != 143:
            raise Unexpected(f"{self.name}: stopped with status {status}")

    def workers(self) -> list[psutil.Process]:
        """Return the training workers of the command."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.command.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        found.append(process)
        return found

    def trains(self, mark: int) -> Record:
        """Wait until the loop began after `mark` (in what was heard); return its first step."""
        deadline = time.monotonic() + GIVE_UP
        while time.monotonic() < deadline:
            new = self.heard[mark:]
            starts = [index for index, r in enumerate(new) if r["kind"] == "start"]
            steps = [r for r in new[starts[0] :] if r["kind"] == "train"] if starts else []
            if steps:
                return steps[0]
            if self.command.poll() is not None:
                raise Unexpected(f"{self.name}: the command ended with {self.command.returncode}")
            time.sleep(0.1)
        raise Unexpected(f"{self.name}: no step for {GIVE_UP:.0f} s")

    def __enter__(self) -> Self:
        self.follower.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Leave nothing running: what is not done by now is interrupted, then killed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.command.send_signal(signal.SIGINT)
            self.command.wait(30)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark:
                    process.kill()
        self.command.wait()
        self.follower.__exit__()
        self.printed.close()


class Unexpected(Exception):
    """What must not happen; the message says what did."""


# --- faults


def kill_worker(run: Run, chance: random.Random) -> None:
    """SIGKILL for a worker, if there is one at this moment."""
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        chance.choice(run.workers()).kill()


def kill_twice(run: Run, chance: random.Random) -> None:
    """SIGKILL for a worker, and for one of those that take over."""
    kill_worker(run, chance)
    time.sleep(chance.uniform(0, 15))
    kill_worker(run, chance)


def stop_worker(run: Run, chance: random.Random) -> None:
    """SIGSTOP for a worker."""
    chance.choice(run.workers()).suspend()


def kill_command(run: Run, chance: random.Random) -> None:
    """SIGKILL for the command; the same again."""
    run.command.kill()
    run.command.wait()
    run.start()


def stop_command(run: Run, chance: random.Random) -> None:
    """SIGTERM for the command; the same again."""
    run.stop()
    run.start()


Send = Callable[[Run, random.Random], None]
FAULTS: dict[str, tuple[Send, int]] = {  # with how often they are, compared to each other
    "worker killed": (kill_worker, 6),
    "killed twice": (kill_twice, 1),
    "worker stopped": (stop_worker, 1),
    "command killed": (kill_command, 1),
    "command stopped": (stop_command, 1),
}


@dataclass(frozen=True)
class Fault:
    """What one fault cost."""

    kind: str
    seconds: float  # from the (first) signal to the first step after it
    redone_steps: int


def disturb(run: Run, minutes: float, pause: float, chance: random.Random) -> list[Fault]:
    """Send faults for so long, each kind at least once; then stop the run.

    Returns what became of them.
    """
    faults: list[Fault] = []
    deadline = time.monotonic() + 60 * minutes
    coming = chance.sample(list(FAULTS), len(FAULTS))
    run.trains(0)
    while coming or time.monotonic() < deadline:
        time.sleep(chance.uniform(0, 2 * pause))
        weights = [weight for _, weight in FAULTS.values()]
        kind = coming.pop() if coming else chance.choices(list(FAULTS), weights)[0]
        mark, sent = len(run.heard), time.time()
        FAULTS[kind][0](run, chance)
        first = run.trains(mark)
        redone = sum(r["redone_steps"] for r in run.heard[mark:] if r["kind"] == "start")
        faults.append(Fault(kind, first["time"] - sent, redone))
        print(
            f"{len(faults)}: {kind}: {faults[-1].seconds:.1f} s, {redone} steps redone, goes on at "
            f"step {first['step']}",
            flush=True,
        )
    run.stop()
    return faults


# --- what came of it


def prepare(work: Path) -> None:
    """Make a corpus of the README: text that is always at hand."""
    source = Path(__file__).parents[1] / "README.md"
    command = [sys.executable, "-m", "yuzogpt", "prepare", "soak", f"--source={source}"]
    subprocess.run([*command, "--tokenizer=char", f"--data_dir={work / 'corpus'}"], check=True)


def losses(run: Path) -> dict[int, float]:
    """Return the loss of each step; Unexpected if one is missing or there twice."""
    train = [record for record in read_records(run / runs.METRICS) if record["kind"] == "train"]
    if [record["step"] for record in train] != list(range(1, len(train) + 1)):
        raise Unexpected(f"{run}: steps are missing, out of order or there twice")
    return {record["step"]: record["loss"] for record in train}


def differences(disturbed: Path, undisturbed: Path, step: int) -> list[str]:
    """Return what is not the same, bit for bit, after `step` steps."""
    found = []
    ours, theirs = losses(disturbed), losses(undisturbed)
    if len(ours) != step:
        found.append(f"{len(ours)} steps, not {step}")
    other = [at for at in range(1, step + 1) if ours.get(at) != theirs.get(at)]
    if other:
        found.append(f"the losses of {len(other)} steps, from step {other[0]} on")
    for kind in (checkpoints.MODEL, checkpoints.OPTIMIZER):
        file = Path("checkpoints", f"step-{step}", checkpoints.tensor_file(kind, 0, 1))
        if (disturbed / file).read_bytes() != (undisturbed / file).read_bytes():
            found.append(str(file))
    broken = list((disturbed / "checkpoints").glob("broken-*"))
    if broken:
        found.append(f"{len(broken)} corrupt checkpoints were set aside")
    return found


def summary_of(run: Path) -> Summary:
    """Return what `yuzogpt report` says of a run."""
    history = History.read(run / runs.METRICS)
    assert history
    return summarize(run, history)


def pace(run: Path) -> float:
    """Return the seconds of a step, evaluations and checkpoints included."""
    times = [r["time"] for r in read_records(run / runs.METRICS) if r["kind"] == "train"]
    return float((times[-1] - times[0]) / (len(times) - 1))


def report(faults: list[Fault], disturbed: Path, step_seconds: float, interval: int) -> None:
    """Print the table of faults, and the projection."""
    print("| fault | times | seconds to the next step | steps redone | one every 10 minutes |")
    print("|---|---|---|---|---|")
    for kind in FAULTS:
        found = [fault for fault in faults if fault.kind == kind]
        if not found:
            continue
        seconds = [fault.seconds for fault in found]
        redone = [fault.redone_steps for fault in found]
        lost = statistics.median(seconds) + statistics.mean(redone) * step_seconds
        print(
            f"| {kind} | {len(found)} | median {statistics.median(seconds):.1f}, at most "
            f"{max(seconds):.1f} | median {statistics.median(redone):.0f}, at most {max(redone)} "
            f"| {1 - lost / EVERY:.1%} |"
        )
    said = summary_of(disturbed)
    print(
        f"\nthis run: {said.step} steps, {said.wall / 60:.1f} minutes, {len(said.restarts)} "
        f"restarts, effective training time {said.effective:.1%}; a step takes "
        f"{1e3 * step_seconds:.0f} ms, checkpoints every {interval} steps "
        f"({interval * step_seconds:.1f} s)"
    )
    for cause, seconds_lost in said.lost_by_cause.items():
        print(f"  lost to {cause}: {seconds_lost:.0f} s")
    killed = [fault for fault in faults if fault.kind == "worker killed"]
    if killed:
        recovery = statistics.median(fault.seconds for fault in killed)
        redone_seconds = statistics.mean(fault.redone_steps for fault in killed) * step_seconds
        effective = 1 - (recovery + redone_seconds) / EVERY
        longest = 2 * ((1 - BAR) * EVERY - recovery)
        enough = f"which holds with checkpoints up to {longest:.0f} s apart"
        print(
            f"one worker killed every 10 minutes: {recovery:.1f} s of recovery and "
            f"{redone_seconds:.1f} s done again: {effective:.1%} effective (bar {BAR:.0%}), "
            f"{enough if longest > 0 else 'which the recovery alone is too long for'}"
        )


def main() -> None:
    """Disturb a run, run its peer, compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pause", type=float, default=20, help="mean seconds between faults")
    parser.add_argument("--checkpoint_interval", type=int, default=50, help="steps")
    parser.add_argument("--hang_timeout", type=float, default=10, help="seconds")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing stays behind
    work: Path = arguments.directory.resolve()
    work.mkdir(parents=True)
    prepare(work)
    flags = [f"--checkpoint_interval={arguments.checkpoint_interval}"]
    flags += [f"--hang_timeout={arguments.hang_timeout}"]
    try:
        with Run(work, "disturbed", [*flags, f"--max_iters={ENDLESS}"]) as run:
            chance = random.Random(arguments.seed)
            faults = disturb(run, arguments.minutes, arguments.pause, chance)
        disturbed = run.out_dir
        step = max(losses(disturbed))
        print(f"stopped at step {step}; now as many without a fault", flush=True)
        with Run(work, "undisturbed", [*flags, f"--max_iters={step}"]) as run:
            if run.command.wait():
                raise Unexpected(f"undisturbed: ended with {run.command.returncode}")
        found = differences(disturbed, run.out_dir, step)
    except Unexpected as error:
        sys.exit(f"{error}; see {work}")
    report(faults, disturbed, pace(run.out_dir), arguments.checkpoint_interval)
    print("different: " + "; ".join(found) if found else "the same, bit for bit")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
