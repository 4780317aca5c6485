"""Benchmarks beside the training: Ray Train's asynchronous validation.

In: the exams of `--eval_tasks`. Out: for each checkpoint that a worker reports with metrics, one
task, one at a time, on what the workers leave free. The workers do not wait for it; the command
does, at its end.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from ray.train import Checkpoint
from ray.train.v2.api.validation_config import ValidationConfig

from yuzogpt.config import DeviceSettings, TrainSettings
from yuzogpt.evaluation.beside_training import evaluate_checkpoint
from yuzogpt.evaluation.tasks import Exam

ATTEMPTS_AGAIN = 3  # where a task's process dies


def validation(
    settings: TrainSettings, exams: Mapping[str, Exam], spare: Mapping[str, int]
) -> ValidationConfig | None:
    """Return how checkpoints are evaluated; None: not at all. `spare`: what no worker holds."""
    if not exams:
        return None
    gpu = spare.get("GPU", 0) > 0 and settings.device.device != "cpu"
    threads = max(1, spare.get("CPU", 0))  # one, where the workers have all: they come first
    device = settings.device.model_copy(
        update={"device": "cuda" if gpu else "cpu", "dtype": "float32", "threads": threads}
    )
    return ValidationConfig(
        fn=partial(validate, out_dir=settings.run.out_dir, exams=exams, device=device),
        ray_remote_kwargs={
            "num_cpus": 0 if gpu else max(0, spare.get("CPU", 0)),
            "num_gpus": 1 if gpu else 0,
            "max_retries": ATTEMPTS_AGAIN,
        },
    )


def validate(
    _checkpoint: Checkpoint,
    *,
    name: str,
    out_dir: str,
    exams: Mapping[str, Exam],
    device: DeviceSettings,
) -> dict[str, Any]:
    """Evaluate the checkpoint of that name."""
    return evaluate_checkpoint(name, out_dir, exams, device)
