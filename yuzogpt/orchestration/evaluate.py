"""Benchmarks as Ray tasks: any number of workers, each of which computes the next shard.

In: shards that have no scores yet. Out: shards with their scores, as they come. A worker that dies
costs its shard's time: Ray gives that shard to another.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from yuzogpt.config import EvaluateSettings
from yuzogpt.evaluation import shards
from yuzogpt.evaluation.evaluate import Compute
from yuzogpt.evaluation.passages import Score
from yuzogpt.evaluation.shards import Shard
from yuzogpt.orchestration.cluster import connected, refuse_unreachable
from yuzogpt.orchestration.prepare import user_errors

AHEAD = 2  # shards that are handed out for each worker, so that none waits for the next


def on_ray(settings: EvaluateSettings) -> Compute:
    """Return what computes shards on Ray, which starts when there is something to compute."""
    refuse_unreachable(settings.work.ray_address or os.environ.get("RAY_ADDRESS", ""))

    def compute(left: Sequence[Shard]) -> Iterator[tuple[Shard, list[Score]]]:
        if not left:
            return
        print("starting Ray ...", flush=True)
        cores = os.cpu_count() or 1
        with connected(settings.work.ray_address, cores, ("torch",)), user_errors():
            yield from in_tasks(settings, left)

    return compute


def in_tasks(
    settings: EvaluateSettings, left: Sequence[Shard]
) -> Iterator[tuple[Shard, list[Score]]]:
    """Compute shards in tasks, and yield them as they come."""
    import ray

    workers, resources, threads = places(settings)
    device = settings.device.model_copy(update={"threads": threads})
    task = ray.remote(**resources, max_retries=-1)(shards.compute)
    waiting, running = list(left)[::-1], dict[Any, Shard]()
    while waiting or running:
        while waiting and len(running) < AHEAD * workers:
            shard = waiting.pop()
            sitting = replace(shard.sitting, device=device)
            running[task.remote(replace(shard, sitting=sitting))] = shard
        (done,), _ = ray.wait(list(running), num_returns=1)
        yield running.pop(done), ray.get(done)


def places(settings: EvaluateSettings) -> tuple[int, dict[str, float], int]:
    """Return how many workers there are, what each holds, and its threads."""
    import ray

    have = ray.cluster_resources()
    gpus, cores = int(have.get("GPU", 0)), int(have.get("CPU", 1))
    wanted = settings.work.num_workers
    device = settings.device.device
    if device == "cuda" or (device == "auto" and gpus):
        return wanted if isinstance(wanted, int) else max(1, gpus), {"num_gpus": 1}, 0
    nodes = sum(bool(node["Alive"] and node["Resources"].get("CPU")) for node in ray.nodes()) or 1
    workers = wanted if isinstance(wanted, int) else nodes
    threads = settings.device.threads or max(1, cores // nodes // math.ceil(workers / nodes))
    return workers, {"num_cpus": cores / workers if workers < cores else 1}, threads
