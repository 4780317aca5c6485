"""Callbacks of Ray Train's controller for workers that die: notify the user, replace them at once.

A `failure` record goes to metrics.jsonl, the rest to errors.log. The other workers are killed, so
that new ones can start. Ray calls everything here by keyword, in the controller's process; an
exception here would end the run.
"""

import contextlib
import time
from typing import Any

import ray
from ray.train import UserCallback

from yuzogpt import runs
from yuzogpt.config import TrainSettings
from yuzogpt.orchestration.causes import cause_of, first_to_fail
from yuzogpt.orchestration.ray_internals import (
    callback_base,
    disable_checkpoint_state,
    worker_actors,
)
from yuzogpt.runs.event_log import append_record, parse
from yuzogpt.storage.lease import holder_of
from yuzogpt.storage.run_storage import RunStorage

SAME_FAILURE_S = 20.0  # a failure that was recorded so recently is the same one


class FailureNotice(UserCallback):  # type: ignore[misc]
    """Records which worker failed, and why."""

    def __init__(self, run: RunStorage, settings: TrainSettings) -> None:
        """`run`: the out_dir."""
        self.run, self.settings = run, settings

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """Record which worker failed, and why, unless the workers did so themselves."""
        if are_preempted(worker_exceptions):
            return
        rank, error = first_to_fail(worker_exceptions)
        with contextlib.suppress(OSError):
            errors = self.run / runs.ERRORS
            lines = [f"rank {rank}: {error}\n" for rank, error in sorted(worker_exceptions.items())]
            errors.append("".join(lines).encode())
            if runs.gives_way(self.settings.run, self.run, holder_of(self.run) or ""):
                return  # the records belong to a run that is not deleted yet
            if not was_just_recorded(self.run / runs.METRICS):
                see = errors.display_name
                text = f"!!! worker {rank} failed ({cause_of(error)}); see {see}"
                append_record(self.run / runs.METRICS, "failure", text, rank=rank)


def are_preempted(errors: dict[int, Exception]) -> bool:
    """Return whether workers left because a node is about to go: no failure, and all leave."""
    return any(getattr(error, "preempted", False) for error in errors.values())


def was_just_recorded(metrics: RunStorage) -> bool:
    """Return whether a run's last record is a failure of some seconds ago."""
    lines: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        lines = metrics.read().decode(errors="replace").splitlines()
    last = next((record for line in reversed(lines) if (record := parse(line))), None)
    if last is None or last["kind"] != "failure":
        return False
    return time.time() - float(last["time"]) < SAME_FAILURE_S


class DisableRayCheckpointState(callback_base("ControllerCallback")):  # type: ignore[misc]
    """Keeps Ray Train from writing its own state into out_dir at each report: nobody reads it.

    On a full disk, or while a store is not reachable, that would end the run.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        """Do so for all runs in this process."""
        disable_checkpoint_state()


class KillOrphanedWorkers(callback_base("WorkerGroupCallback")):  # type: ignore[misc]
    """Ends workers that Ray forgets, so that the next ones find room.

    If one dies while the process group is made, Ray 2.60 tries again without ending the others.
    They hold their CPUs or GPUs, for which the next ones would wait forever.
    """

    def __init__(self) -> None:
        self.group: Any = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Remember the workers. The process group is made next: this callback comes first."""
        self.group = worker_group

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """Forget them: Ray ended them itself."""
        self.group = None

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """End them before others start."""
        if self.group:
            with contextlib.suppress(Exception):
                for worker in worker_actors(self.group):
                    ray.kill(worker)
                self.group.abort()
        self.group = None


class KillGroupOnFailure(callback_base("WorkerGroupCallback")):  # type: ignore[misc]
    """Kills the whole worker group as soon as one worker fails.

    The others are blocked in a collective, and Ray's graceful shutdown would wait 35 s for a
    stopped one.
    """

    def __init__(self) -> None:
        self.workers: list[Any] = []

    def after_worker_group_start(self, worker_group: Any) -> None:
        self.workers = worker_actors(worker_group)

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Kill all workers if one has failed."""
        errors = worker_group_status.errors
        if errors and not are_preempted(errors):
            for worker in self.workers:
                ray.kill(worker)
            self.workers = []
