"""Benchmarks as Ray tasks: any number of workers, each of which computes the next shard.

Shards come back with their scores in the order in which they are done. If a worker dies, Ray gives
its shard to another one.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from yuzogpt.config import EvaluateSettings
from yuzogpt.console.terminal import note
from yuzogpt.errors import UserError
from yuzogpt.evaluation import shards
from yuzogpt.evaluation.evaluate import Compute
from yuzogpt.evaluation.passages import Score
from yuzogpt.evaluation.shards import Shard
from yuzogpt.orchestration.causes import raised_as_ours
from yuzogpt.orchestration.cluster import check_reachable, connected, cores_of_nodes
from yuzogpt.orchestration.environment import cluster_address
from yuzogpt.runtime.cores import available_cores, threads_asked

MAX_RETRIES = 5  # of a shard whose worker died; a batch too large for memory kills every worker
QUEUE_DEPTH_PER_WORKER = 2  # shards handed out, so that no worker waits for the next one


def on_ray(settings: EvaluateSettings) -> Compute:
    """Return what computes shards on Ray, which starts when there is something to compute."""
    check_reachable(cluster_address(settings.workers.ray_address))

    def compute(remaining: Sequence[Shard]) -> Iterator[tuple[Shard, list[Score]]]:
        if not remaining:
            return
        note("starting Ray ...")
        cores = available_cores()
        with (
            connected(settings.workers.ray_address, cores, ("torch",)),
            raised_as_ours("evaluation"),
        ):
            yield from in_tasks(settings, remaining)

    return compute


def in_tasks(
    settings: EvaluateSettings, remaining: Sequence[Shard]
) -> Iterator[tuple[Shard, list[Score]]]:
    """Compute shards in tasks, and yield them as they come."""
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    workers, resources, threads = share_out(settings, gpus, cores_of_nodes() or [1])
    device = settings.device.model_copy(update={"threads": threads})
    task = ray.remote(**resources, max_retries=MAX_RETRIES)(shards.score_shard)
    waiting, running = list(remaining)[::-1], dict[Any, Shard]()
    while waiting or running:
        while waiting and len(running) < QUEUE_DEPTH_PER_WORKER * workers:
            shard = waiting.pop()
            job = replace(shard.job, device=device)
            running[task.remote(replace(shard, job=job))] = shard
        (done,), _ = ray.wait(list(running), num_returns=1)
        yield running.pop(done), ray.get(done)


def share_out(
    settings: EvaluateSettings, gpus: int, cores: Sequence[int]
) -> tuple[int, dict[str, float], int]:
    """Return how many workers there are, what each holds, and its threads.

    `cores`: of each node. A worker asks for what the smallest one has: for more, Ray would wait
    forever.
    """
    num_workers, device = settings.workers.num_workers, settings.device.device
    if device == "cuda" and not gpus:
        raise UserError("--device=cuda: Ray has no GPU; use --device=cpu")
    if gpus and device in ("auto", "cuda"):
        return num_workers if isinstance(num_workers, int) else gpus, {"num_gpus": 1}, 0
    workers = num_workers if isinstance(num_workers, int) else len(cores)
    of_each = max(1, min(cores) // math.ceil(workers / len(cores)))
    threads = settings.device.threads or threads_asked() or of_each
    return workers, {"num_cpus": of_each}, threads
