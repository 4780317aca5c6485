"""Checkpoints of GPT-2 124M: how long a save blocks the loop, and how the write slows steps.

    python benchmarks/checkpoints.py

One process uses the loop's own `AsyncCheckpointer`, float32: weights and AdamW's two moments, 1.49
GB. First saves are measured in a new process each. Then each round trains some steps, copies,
saves, and trains until the checkpoint is written. Peers, in the same run:

    copy         the same tensors, into memory that was allocated and touched before: the least
                 that a consistent checkpoint costs; the stall may be 1.5 times as long
    torch.save   model.state_dict() and optimizer.state_dict() in one file, synced; the loop waits
    nanoGPT      the same with its settings in ckpt.pt, over the previous one; not synced
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from yuzogpt import checkpoints
from yuzogpt.checkpoints.format import State
from yuzogpt.config import (
    CheckpointSettings,
    FinetuningSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
)
from yuzogpt.model.initialization import initial_weights
from yuzogpt.runs.event_log import MetricsLog, read_records
from yuzogpt.runs.stop_request import StopRequest
from yuzogpt.runtime.cores import available_cores
from yuzogpt.runtime.device import Hardware
from yuzogpt.runtime.watchdog import Watchdog
from yuzogpt.runtime.world import World
from yuzogpt.storage.run_storage import LocalStorage
from yuzogpt.training.checkpointer import AsyncCheckpointer
from yuzogpt.training.hooks import LoopHooks
from yuzogpt.training.optimizers import build_optimizer, state_tensors
from yuzogpt.training.parallel import ParallelModel, parallelize

BAR = 1.5  # the longest stall, in times of the copy


class Training:
    """A model in training whose steps are so short that some fit into one write."""

    def __init__(self, n_layer: int, tokens: int) -> None:
        """`n_layer`: fewer than 12 for a quick try."""
        self.shape = ModelSettings(n_layer=n_layer, vocab_size=50257)
        hardware = Hardware(torch.device("cpu"), None, False, available_cores(), ())
        torch.set_num_threads(hardware.threads)
        weights = initial_weights(self.shape, seed=1)
        self.model: ParallelModel = parallelize(
            self.shape, weights, "none", ParallelSettings(), hardware
        )
        self.optimizer = build_optimizer(self.model.gpt, OptimizerSettings(), FinetuningSettings())
        self.ids = torch.randint(self.shape.vocab_size, (1, tokens + 1))

    def step(self) -> None:
        """Forward, backward, AdamW."""
        self.model.wrapped(self.ids[:, :-1], self.ids[:, 1:]).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> list[torch.Tensor]:
        """Return what a checkpoint holds."""
        weights = [parameter.detach() for parameter in self.model.gpt.parameters()]
        return [*weights, *state_tensors(self.model.gpt, self.optimizer).values()]

    def saver(self, run: Path, log: MetricsLog | None) -> AsyncCheckpointer:
        """Return a checkpointer as the loop makes it, before its first step."""
        idle = Watchdog(World(), 100, lambda _: None)
        hooks = LoopHooks(LocalStorage(run), lambda *_: None, lambda: None, StopRequest(), idle)
        settings = CheckpointSettings()
        return AsyncCheckpointer(
            settings, World(), self.model, self.optimizer, b"{}", log, hooks, None
        )


class Copy:
    """A copy of tensors into memory that is in use already."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors
        self.room = [torch.zeros_like(tensor) for tensor in tensors]
        for room in self.room:
            room.fill_(1.0)  # zeros may be pages that are not there yet

    def __call__(self) -> None:
        for room, tensor in zip(self.room, self.tensors, strict=True):
            room.copy_(tensor)


def seconds(call: Callable[[], object]) -> float:
    """Time a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def state(step: int) -> State:
    """Return a checkpoint's state that belongs to no run."""
    return State(step, step, {}, dataset="", tokenizer="", metrics={})


def first_save(n_layer: int, tokens: int, steps: int, directory: str | None) -> float:
    """Return the stall, in seconds, of this process's first save after `steps` steps."""
    training = Training(n_layer, tokens)
    with tempfile.TemporaryDirectory(dir=directory) as run:
        saver = training.saver(Path(run), None)
        for _ in range(steps):
            training.step()
        stall = seconds(lambda: saver.save(state(1)))
        saver.wait()
    return stall


def in_new_process(*arguments: Any) -> float:
    """Run `first_save` in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(first_save, *arguments).result()


class Rounds:
    """Rounds of: steps alone, the copy, a save, and steps while it is written."""

    def __init__(self, training: Training, run: Path, steps: int) -> None:
        """`steps`: without a write, in each round."""
        self.training, self.run, self.steps = training, run, steps
        self.log = MetricsLog(LocalStorage(run / "metrics.jsonl"), -1, None)
        self.copy = Copy(training.tensors())
        self.copies: list[float] = []
        self.stalls: list[float] = []
        self.writes: list[float] = []
        self.alone: list[float] = []
        self.beside: list[float] = []
        self.saver = training.saver(run, self.log)
        training.step()  # the first one is slower
        self.saver.wait()

    def another(self) -> None:
        """Do one round."""
        self.alone += [seconds(self.training.step) for _ in range(self.steps)]
        self.copies.append(seconds(self.copy))
        number = 1 + len(self.stalls)
        self.stalls.append(seconds(lambda: self.saver.save(state(number))))
        while True:
            took = seconds(self.training.step)
            if self.saver.writing.done():
                break  # a part of this step was alone
            self.beside.append(took)
        self.saver.wait()
        self.writes.append(read_records(self.run / "metrics.jsonl")[-1]["write_seconds"])


def torch_save(training: Training, path: Path, *, nanogpt: bool) -> float:
    """Save the blocking way; return the seconds."""
    content: dict[str, Any] = {
        "model": training.model.gpt.state_dict(),
        "optimizer": training.optimizer.parts[0].state_dict(),
    }
    if nanogpt:
        shape = training.shape.model_dump()
        content |= {"model_args": shape, "iter_num": 1, "best_val_loss": 1.0, "config": shape}

    def save() -> None:
        with path.open("wb") as file:
            torch.save(content, file)
            if not nanogpt:
                file.flush()
                os.fsync(file.fileno())

    took = seconds(save)
    os.sync()
    return took


def size_of(directory: Path) -> int:
    """Return the bytes of all files of a directory."""
    return sum(path.stat().st_size for path in directory.iterdir())


def spread(values: list[float]) -> str:
    """Return the median, the range and the count."""
    return (
        f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f}, {len(values)})"
    )


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6, help="without a write, in each round")
    parser.add_argument("--tokens", type=int, default=64, help="in a step")
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--directory", help="where to write; default: a temporary directory")
    arguments = parser.parse_args()
    firsts: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(arguments.rounds):
        for steps, stalls in firsts.items():
            stalls.append(
                in_new_process(arguments.n_layer, arguments.tokens, steps, arguments.directory)
            )
    training = Training(arguments.n_layer, arguments.tokens)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        run = Path(directory)
        rounds = Rounds(training, run, arguments.steps)
        for number in range(arguments.rounds):
            rounds.another()
            print(
                f"round {number + 1}: copy {rounds.copies[-1]:.3f} s, stall "
                f"{rounds.stalls[-1]:.3f} s, write {rounds.writes[-1]:.1f} s",
                flush=True,
            )
        ours = size_of(checkpoints.candidates(run)[-1])
        blocking: dict[str, list[float]] = {"torch.save": [], "nanoGPT": []}
        for _ in range(arguments.rounds):
            for name, times in blocking.items():
                path = run / f"{name}.pt"
                times.append(torch_save(training, path, nanogpt=name == "nanoGPT"))
        theirs = {name: (run / f"{name}.pt").stat().st_size for name in blocking}
        rounds.log.close()
    report(firsts, rounds, ours, blocking, theirs)


def report(
    firsts: dict[int, list[float]],
    rounds: Rounds,
    ours: int,
    blocking: dict[str, list[float]],
    theirs: dict[str, int],
) -> None:
    """Print everything as a Markdown table."""
    copy = statistics.median(rounds.copies)
    held = sum(tensor.nbytes for tensor in rounds.copy.tensors)
    alone = statistics.median(rounds.alone)
    lost = sum(rounds.beside) - alone * len(rounds.beside)
    print(f"\n| {held / 1e9:.2f} GB of tensors | |\n|---|---|")
    print(f"| copy into touched memory | {spread(rounds.copies)} |")
    stalls = {
        "a run's first save, after one step": firsts[1],
        "a first save before any step, as no run does": firsts[0],
        "later saves": rounds.stalls,
    }
    for name, found in stalls.items():
        ratio = statistics.median(found) / copy
        print(f"| stall, {name} | {spread(found)}; {ratio:.2f} times the copy (bar {BAR}) |")
    print(f"| write, beside the steps | {spread(rounds.writes)} |")
    print(f"| step alone | {spread(rounds.alone)} |")
    if rounds.beside:
        slower = statistics.median(rounds.beside) / alone
        print(f"| step beside the write | {spread(rounds.beside)}, {slower:.2f} times |")
        each = lost / len(rounds.stalls) + statistics.median(rounds.stalls)
        print(f"| training time lost to a checkpoint, stall included | {each:.2f} s |")
    for name, times in blocking.items():
        ratio = ours / theirs[name]
        print(
            f"| {name}, blocking | {spread(times)}; {theirs[name]:,} bytes, ours {ours:,}: "
            f"{ratio:.4f} |"
        )


if __name__ == "__main__":
    main()
