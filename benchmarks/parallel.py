"""DDP against FSDP2, each with and without activation checkpointing: memory of a rank, and time.

    python benchmarks/parallel.py
    python benchmarks/parallel.py --sizes 124M --rounds 5

Two ranks on this CPU, connected by gloo, float32, one thread each. They use the project's own
`parallelize` and `build_optimizer`, and steps as the loop's. The four ways take turns, each in new
processes. Per rank:

    held     bytes of weights, gradients and optimizer state, counted tensor by tensor
    peak     the highest resident memory (VmHWM) from before the model is built to the last step,
             less the resident memory before. A tiny model is trained in the same way first, so that
             libraries and shared pages are on both sides
    step     seconds; the first one is not counted
"""

import argparse
import gc
import itertools
import multiprocessing
import os
import re
import socket
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from yuzogpt.config import (
    FinetuningSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
    TrainingDeviceSettings,
    TrainSettings,
)
from yuzogpt.model.initialization import initial_weights
from yuzogpt.runtime.device import Hardware
from yuzogpt.runtime.world import World
from yuzogpt.training.guards import clip_grad_norm, reduce_step_stats
from yuzogpt.training.optimizers import build_optimizer, state_tensors
from yuzogpt.training.parallel import parallelize, to_local, warm_up_ddp_buckets
from yuzogpt.training.rendezvous import process_group

RANKS = 2


@dataclass(frozen=True)
class Size:
    """A model, and the rows per rank and step."""

    shape: ModelSettings
    rows: int


TINY = Size(ModelSettings(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=65), 2)
SIZES = {
    "6 x 384": Size(
        ModelSettings(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65), 8
    ),
    "124M": Size(ModelSettings(block_size=256, vocab_size=50257), 2),
    "350M": Size(
        ModelSettings(n_layer=24, n_head=16, n_embd=1024, block_size=256, vocab_size=50257), 2
    ),
}
WAYS = {
    "DDP": ParallelSettings(parallel="ddp"),
    "FSDP2": ParallelSettings(parallel="fsdp"),
    "DDP, activations recomputed": ParallelSettings(parallel="ddp", activation_checkpointing=True),
    "FSDP2, activations recomputed": ParallelSettings(
        parallel="fsdp", activation_checkpointing=True
    ),
}


def run_rank(rank: int, port: int, size: Size, way: ParallelSettings, steps: int) -> dict[str, Any]:
    """Run one rank of a new world, and measure it."""
    numbers = {"RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": RANKS}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    world = World.of_torchrun()
    on_cpu = TrainSettings(device=TrainingDeviceSettings(device="cpu"))
    with process_group(world, on_cpu):
        train(TINY, way, world, 2)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
        before = status("VmRSS")
        found = train(size, way, world, 1 + steps)
        return {**found, "peak": status("VmHWM") - before}


def train(size: Size, way: ParallelSettings, world: World, steps: int) -> dict[str, Any]:
    """Train some steps as the loop does; return the bytes that this rank held, and step times."""
    shape, settings = size.shape, OptimizerSettings()
    hardware = Hardware(torch.device("cpu"), None, False, 1, ())
    assert way.parallel != "auto"
    model = parallelize(shape, initial_weights(shape, 1), way.parallel, way, hardware)
    optimizer = build_optimizer(model.gpt, settings, FinetuningSettings())
    generator = torch.Generator().manual_seed(world.rank)
    rows = torch.randint(shape.vocab_size, (size.rows, shape.block_size + 1), generator=generator)
    ids, targets, keys = rows[:, :-1], rows[:, 1:], torch.zeros(size.rows, dtype=torch.long)
    warm_up_ddp_buckets(model.wrapped, hardware, ids, targets, keys)
    tokens = world.size * targets.numel()
    held, seconds, loss = 0, [], 0.0
    for _ in range(steps):
        started = time.perf_counter()
        losses = model.wrapped(ids, targets, keys)
        (losses.sum() * (world.size / tokens)).backward()
        stats = reduce_step_stats(model, losses.detach().sum(), tokens, False, 0.0, world)
        states = [to_local(s) for s in state_tensors(model.gpt, optimizer).values()]
        tensors = [*model.weights(), *model.gradients(), *states]
        held, loss = sum(tensor.nbytes for tensor in tensors), stats.loss
        del losses, states, tensors
        clip_grad_norm(model, stats.grad_norm, settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return {"held": held, "seconds": seconds[1:], "loss": loss}


def status(name: str) -> int:
    """Return a value of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def run_world(size: Size, way: ParallelSettings, steps: int) -> list[dict[str, Any]]:
    """Run all ranks in new processes; they end with this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(RANKS, mp_context=context) as pool:
        same = (itertools.repeat(value) for value in (port, size, way, steps))
        return list(pool.map(run_rank, range(RANKS), *same))


def measure(name: str, rounds: int, steps: int) -> None:
    """Measure each way, in turn, with a model of one size; print their rows of the table."""
    results: dict[str, list[list[dict[str, Any]]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, worlds in results.items():
            worlds.append(run_world(SIZES[name], WAYS[way], steps))
    losses = [ranks[0]["loss"] for worlds in results.values() for ranks in worlds]
    assert max(losses) - min(losses) < 1e-3, f"the ways do not compute the same: {losses}"
    base = None
    for way, worlds in results.items():
        seconds = [statistics.median(ranks[0]["seconds"]) for ranks in worlds]
        peaks = [max(rank["peak"] for rank in ranks) / 1e6 for ranks in worlds]
        held = max(rank["held"] for rank in worlds[0]) / 1e6
        peak, step = statistics.median(peaks), statistics.median(seconds)
        base = base or (held, peak, step)
        print(
            f"| {name} | {way} | {held:.0f} MB ({held / base[0]:.2f}) "
            f"| {peak:.0f} MB ({peak / base[1]:.2f}; {min(peaks):.0f} to {max(peaks):.0f}) "
            f"| {step:.3f} s ({step / base[2]:.2f}; {min(seconds):.3f} to {max(seconds):.3f}) |",
            flush=True,
        )


def main() -> None:
    """Measure, and print a table; in parentheses: the ratio to DDP, then the range."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["6 x 384", "124M"], choices=SIZES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="in each world, besides the first")
    arguments = parser.parse_args()
    print("| model | way | held by a rank | peak of a rank | step |\n|---|---|---|---|---|")
    for name in arguments.sizes:
        measure(name, arguments.rounds, arguments.steps)


if __name__ == "__main__":
    main()
