"""What Ray Train's controller does when a worker dies: it tells the user, and loses no time.

In: what the controller sees of the workers. Out: a `failure` record in metrics.jsonl, the rest in
errors.log, and workers that are gone at once, so that others can start. Runs in the controller's
process; Ray calls everything here by keyword, and an exception here would end the run.
"""

import contextlib
import time
from typing import Any

import ray
from ray.train import UserCallback

from yuzogpt import runs
from yuzogpt.config import TrainSettings
from yuzogpt.orchestration.callbacks import (
    ControllerCallback,
    WorkerGroupCallback,
    actors_of,
)
from yuzogpt.orchestration.causes import cause_of, first_to_fail
from yuzogpt.runs.event_log import append_record, parse
from yuzogpt.storage.lease import holder_of
from yuzogpt.storage.run_storage import RunStorage

JUST_NOW = 20.0  # seconds; a failure that was told so recently is the same one


class FailureNotice(UserCallback):  # type: ignore[misc]
    """Tells the user which worker failed, and why."""

    def __init__(self, run: RunStorage, settings: TrainSettings) -> None:
        """`run`: the out_dir."""
        self.run, self.settings = run, settings

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """Write down which worker failed, and why, unless the workers told it themselves."""
        if are_preempted(worker_exceptions):
            return
        rank, error = first_to_fail(worker_exceptions)
        with contextlib.suppress(OSError):
            errors = self.run / runs.ERRORS
            lines = [f"rank {number}: {e}\n" for number, e in sorted(worker_exceptions.items())]
            errors.append("".join(lines).encode())
            if runs.gives_way(self.settings, self.run, holder_of(self.run) or ""):
                return  # the records are those of a run that is not deleted yet
            if not was_just_told(self.run / runs.METRICS):
                see = errors.display_name
                text = f"!!! worker {rank} failed ({cause_of(error)}); see {see}"
                append_record(self.run / runs.METRICS, "failure", text, rank=rank)


def are_preempted(errors: dict[int, Exception]) -> bool:
    """Tell whether workers left because a node is about to go: no failure, and all leave."""
    return any(getattr(error, "preempted", False) for error in errors.values())


def was_just_told(metrics: RunStorage) -> bool:
    """Tell whether the last thing that a run wrote is a failure, of some seconds ago."""
    lines: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        lines = metrics.read().decode(errors="replace").splitlines()
    last = next((record for line in reversed(lines) if (record := parse(line))), None)
    if last is None or last["kind"] != "failure":
        return False
    return time.time() - float(last["time"]) < JUST_NOW


class DisableRayCheckpointState(ControllerCallback):  # type: ignore[misc]
    """Keeps Ray Train from writing its own state into out_dir at each report: nobody reads it.

    On a full disk, or while a store is away, that would end the run.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        """Of all runs in this process."""
        with contextlib.suppress(ImportError):
            from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
                CheckpointManager,
            )

            CheckpointManager._write_state_to_storage = lambda _: None


class KillOrphanedWorkers(WorkerGroupCallback):  # type: ignore[misc]
    """Ends workers that Ray forgets, so that the next ones find room.

    When one dies while the process group is made, Ray 2.60 tries again without ending the others:
    they hold their CPUs or GPUs, for which the next ones then wait for ever.
    """

    def __init__(self) -> None:
        """There are no workers yet."""
        self.group: Any = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Remember the workers. The process group is made next: this callback is the first."""
        self.group = worker_group

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """Ray ended them itself."""
        self.group = None

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """End them before others start."""
        if self.group:
            with contextlib.suppress(Exception):
                for worker in self.group.get_workers():
                    ray.kill(worker.actor)
                self.group.abort()
        self.group = None


class KillGroupOnFailure(WorkerGroupCallback):  # type: ignore[misc]
    """Ends all workers once one of them failed.

    The others only wait for it in a collective. Ray would ask each to leave, and wait 35 s for one
    that is stopped.
    """

    def __init__(self) -> None:
        """There are no workers yet."""
        self.workers: list[Any] = []

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Remember the workers."""
        self.workers = actors_of(worker_group)

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Look at what the controller heard of the workers."""
        errors = worker_group_status.errors
        if errors and not are_preempted(errors):
            for worker in self.workers:
                ray.kill(worker)
            self.workers = []
