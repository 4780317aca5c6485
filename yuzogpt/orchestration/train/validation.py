"""Benchmarks beside the training (`--eval_tasks`): Ray Train's asynchronous validation.

Each checkpoint that a worker reports with metrics is evaluated in one task, one at a time, on what
the workers leave free. The workers do not wait for it; the command does, at its end.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import Checkpoint, ValidationConfig

from yuzogpt.config import DeviceSettings, TrainSettings
from yuzogpt.evaluation.benchmarks.readers import PreparedTask
from yuzogpt.evaluation.during_training import evaluate_checkpoint, record_failure
from yuzogpt.orchestration.causes import cause_of


def validation(
    settings: TrainSettings, exams: Mapping[str, PreparedTask], cores: int, gpus: int
) -> ValidationConfig | None:
    """Return how checkpoints are evaluated; None: not at all. `cores`, `gpus`: left free."""
    if not exams:
        return None
    use_gpu = gpus > 0 and settings.device.device != "cpu"
    threads = max(1, cores)  # one if the workers have all: they come first
    device = settings.device.model_copy(
        update={"device": "cuda" if use_gpu else "cpu", "dtype": "float32", "threads": threads}
    )
    # No cores are asked for: Ray chooses the least busy node anyway, and would wait forever for
    # cores that were lost with a node.
    resources = {"num_cpus": 0, "num_gpus": 1 if use_gpu else 0, "max_retries": 0}
    return ValidationConfig(
        fn=partial(
            validate,
            out_dir=settings.run.out_dir, exams=exams, device=device, resources=resources,
        ),
        ray_remote_kwargs={"num_cpus": 0},
    )  # fmt: skip


def validate(
    _checkpoint: Checkpoint,
    *,
    name: str,
    out_dir: str,
    exams: Mapping[str, PreparedTask],
    device: DeviceSettings,
    resources: Mapping[str, Any],
) -> dict[str, Any]:
    """Evaluate the checkpoint of that name in a task of its own.

    If the task dies, Ray Train does not see it: it would end the run.
    """
    task = ray.remote(**resources)(evaluate_checkpoint)
    try:
        metrics: dict[str, Any] = ray.get(task.remote(name, out_dir, exams, device))
    except RayError as error:
        record_failure(name, out_dir, exams, cause_of(error))
        return {}
    return metrics


def free_cores_on_a_node(cores: Sequence[int], taken: int) -> int:
    """Return how many cores are free on one node, wherever the workers are."""
    levels = range(max(cores, default=0))
    return next((n for n in levels if sum(max(0, c - n) for c in cores) <= taken), len(levels))
