"""A run under random faults: does it end with the same bits, and how long is each recovery?

    python benchmarks/soak.py DIRECTORY --minutes=60

The real command, `yuzogpt train ... --num_workers=2` on its embedded Ray, trains a small model with
dropout. Faults come at random moments, first each kind once, then at random by their weights:

    worker killed      SIGKILL to one of the two training workers
    killed twice       the same, and again within 15 seconds, while the workers start
    worker stopped     SIGSTOP to one of them, which --hang_timeout_s must notice
    command killed     SIGKILL to the command; then the same command again
    command stopped    SIGTERM to it; then the same command again

The peer is an undisturbed run with as many steps: final weights, optimizer state and every training
loss are compared bit by bit. DIRECTORY must be new; it keeps both runs and their output.
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
STEP_TIMEOUT_S = 300.0
BAR, KILL_INTERVAL_S = 0.97, 600.0  # effective training time with one kill every 10 minutes


class Run:
    """A run that the same command resumes, however often it is killed."""

    def __init__(self, work: Path, name: str, flags: list[str]) -> None:
        """Start the command."""
        self.out_dir, self.name = work / name, name
        self.arguments = [sys.executable, "-m", "yuzogpt", "train", *FLAGS, *flags]
        self.arguments += [f"--data_dir={work / 'corpus'}", f"--out_dir={self.out_dir}"]
        self.mark = uuid.uuid4().hex
        self.environment = {**os.environ, MARK: self.mark}
        self.environment.pop("RAY_ADDRESS", None)
        self.printed = (work / f"{name}.txt").open("ab")
        self.records: list[Record] = []
        self.follower = Follower(LocalStorage(self.out_dir / runs.METRICS), self.records.append)
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
        """Ask the command to stop, and wait until it has saved a checkpoint and ended."""
        self.command.terminate()
        try:
            status = self.command.wait(STEP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise Unexpected(f"{self.name}: not stopped within {STEP_TIMEOUT_S:.0f} s") from None
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

    def wait_for_step(self, mark: int) -> Record:
        """Wait until the loop starts after the first `mark` records; return its first step."""
        deadline = time.monotonic() + STEP_TIMEOUT_S
        while time.monotonic() < deadline:
            new = self.records[mark:]
            starts = [index for index, r in enumerate(new) if r["kind"] == "start"]
            steps = [r for r in new[starts[0] :] if r["kind"] == "train"] if starts else []
            if steps:
                return steps[0]
            if self.command.poll() is not None:
                raise Unexpected(f"{self.name}: the command ended with {self.command.returncode}")
            time.sleep(0.1)
        raise Unexpected(f"{self.name}: no step for {STEP_TIMEOUT_S:.0f} s")

    def __enter__(self) -> Self:
        self.follower.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Interrupt the command if it runs, then kill what is left of it."""
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
    """Something happened that must not; the message says what."""


# --- faults


def kill_worker(run: Run, generator: random.Random) -> None:
    """Send SIGKILL to a worker, if there is one at this moment."""
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        generator.choice(run.workers()).kill()


def kill_twice(run: Run, generator: random.Random) -> None:
    """Send SIGKILL to a worker, and to one of those that replace it."""
    kill_worker(run, generator)
    time.sleep(generator.uniform(0, 15))
    kill_worker(run, generator)


def stop_worker(run: Run, generator: random.Random) -> None:
    """Send SIGSTOP to a worker."""
    generator.choice(run.workers()).suspend()


def kill_command(run: Run, generator: random.Random) -> None:
    """Send SIGKILL to the command; start it again."""
    run.command.kill()
    run.command.wait()
    run.start()


def stop_command(run: Run, generator: random.Random) -> None:
    """Send SIGTERM to the command; start it again."""
    run.stop()
    run.start()


Send = Callable[[Run, random.Random], None]
FAULTS: dict[str, tuple[Send, int]] = {  # with their weights
    "worker killed": (kill_worker, 6),
    "killed twice": (kill_twice, 1),
    "worker stopped": (stop_worker, 1),
    "command killed": (kill_command, 1),
    "command stopped": (stop_command, 1),
}


@dataclass(frozen=True)
class Fault:
    """The cost of one fault."""

    kind: str
    seconds: float  # from the (first) signal to the first step after it
    redone_steps: int


def disturb(run: Run, minutes: float, pause: float, generator: random.Random) -> list[Fault]:
    """Send faults for some minutes, each kind at least once; stop the run; return the faults."""
    faults: list[Fault] = []
    deadline = time.monotonic() + 60 * minutes
    coming = generator.sample(list(FAULTS), len(FAULTS))
    run.wait_for_step(0)
    while coming or time.monotonic() < deadline:
        time.sleep(generator.uniform(0, 2 * pause))
        weights = [weight for _, weight in FAULTS.values()]
        kind = coming.pop() if coming else generator.choices(list(FAULTS), weights)[0]
        mark, sent = len(run.records), time.time()
        FAULTS[kind][0](run, generator)
        first = run.wait_for_step(mark)
        redone = sum(r["redone_steps"] for r in run.records[mark:] if r["kind"] == "start")
        faults.append(Fault(kind, first["time"] - sent, redone))
        print(
            f"{len(faults)}: {kind}: {faults[-1].seconds:.1f} s, {redone} steps redone, resumed at "
            f"step {first['step']}",
            flush=True,
        )
    run.stop()
    return faults


# --- results


def prepare(work: Path) -> None:
    """Prepare a corpus from the README, which is always there."""
    source = Path(__file__).parents[1] / "README.md"
    command = [sys.executable, "-m", "yuzogpt", "prepare", "soak", f"--source={source}"]
    subprocess.run([*command, "--tokenizer=char", f"--data_dir={work / 'corpus'}"], check=True)


def losses(run: Path) -> dict[int, float]:
    """Return the loss of each step; Unexpected if one is missing or duplicate."""
    train = [record for record in read_records(run / runs.METRICS) if record["kind"] == "train"]
    if [record["step"] for record in train] != list(range(1, len(train) + 1)):
        raise Unexpected(f"{run}: steps are missing, out of order or duplicate")
    return {record["step"]: record["loss"] for record in train}


def differences(disturbed: Path, undisturbed: Path, step: int) -> list[str]:
    """Return what differs, bit for bit, after `step` steps."""
    different = []
    ours, theirs = losses(disturbed), losses(undisturbed)
    if len(ours) != step:
        different.append(f"{len(ours)} steps, not {step}")
    other = [at for at in range(1, step + 1) if ours.get(at) != theirs.get(at)]
    if other:
        different.append(f"the losses of {len(other)} steps, from step {other[0]} on")
    for kind in (checkpoints.MODEL, checkpoints.OPTIMIZER):
        file = Path("checkpoints", f"step-{step}", checkpoints.tensor_file(kind, 0, 1))
        if (disturbed / file).read_bytes() != (undisturbed / file).read_bytes():
            different.append(str(file))
    broken = list((disturbed / "checkpoints").glob("broken-*"))
    if broken:
        different.append(f"{len(broken)} corrupt checkpoints were quarantined")
    return different


def summary_of(run: Path) -> Summary:
    """Return the summary that `yuzogpt report` prints."""
    history = History.read(run / runs.METRICS)
    assert history
    return summarize(run, history)


def pace(run: Path) -> float:
    """Return the seconds of a step, evaluations and checkpoints included."""
    times = [r["time"] for r in read_records(run / runs.METRICS) if r["kind"] == "train"]
    return float((times[-1] - times[0]) / (len(times) - 1))


def report(faults: list[Fault], disturbed: Path, step_seconds: float, interval: int) -> None:
    """Print the table of faults, and a projection to one kill every 10 minutes."""
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
            f"| {1 - lost / KILL_INTERVAL_S:.1%} |"
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
        effective = 1 - (recovery + redone_seconds) / KILL_INTERVAL_S
        longest = 2 * ((1 - BAR) * KILL_INTERVAL_S - recovery)
        enough = f"which holds with checkpoints up to {longest:.0f} s apart"
        print(
            f"one worker killed every 10 minutes: {recovery:.1f} s of recovery and "
            f"{redone_seconds:.1f} s done again: {effective:.1%} effective (bar {BAR:.0%}), "
            f"{enough if longest > 0 else 'which the recovery alone is too long for'}"
        )


def main() -> None:
    """Run with faults, run the peer, compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pause", type=float, default=20, help="mean seconds between faults")
    parser.add_argument("--checkpoint_interval", type=int, default=50, help="steps")
    parser.add_argument("--hang_timeout_s", type=float, default=10, help="seconds")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing stays behind
    work: Path = arguments.directory.resolve()
    work.mkdir(parents=True)
    prepare(work)
    flags = [f"--checkpoint_interval={arguments.checkpoint_interval}"]
    flags += [f"--hang_timeout_s={arguments.hang_timeout_s}"]
    try:
        with Run(work, "disturbed", [*flags, f"--max_iters={ENDLESS}"]) as run:
            generator = random.Random(arguments.seed)
            faults = disturb(run, arguments.minutes, arguments.pause, generator)
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
