"""Runs whose number of workers changes (`--num_workers=1..4`), and nodes that are about to go.

Workers write a checkpoint before Ray Train's controller ends them, so that no step is repeated; and
the controller learns within seconds which nodes there are.
"""

import contextlib
import threading
import time
from typing import Any, NoReturn

import ray
from ray.exceptions import RayActorError

from yuzogpt import runs
from yuzogpt.orchestration.ray_internals import (
    callback_base,
    is_node_preempted,
    refresh_node_count,
    worker_actors,
)
from yuzogpt.runs.event_log import append_record
from yuzogpt.runs.stop_request import RETRY_INTERVAL_S, ask_to_stop
from yuzogpt.runtime.world import COLLECTIVE_TIMEOUT
from yuzogpt.storage.run_storage import RunStorage

# Why workers pause. They then wait to be ended, and do not return: a worker that returns has
# finished the run.
RESIZE, PREEMPTION = "other workers", "preemption of a node"
PAUSES = (RESIZE, PREEMPTION)
PAUSE_TIMEOUT_S = 600.0  # after which a paused worker gives up

NODE_POLL_INTERVAL_S = 2.0  # for nodes that came or went; Ray by itself looks every 20 s


class Elastic(callback_base("ControllerCallback"), callback_base("WorkerGroupCallback")):  # type: ignore[misc]
    """Runs in the controller's process; Ray calls it by keyword."""

    def __init__(self, run: RunStorage, reply_timeout_s: float) -> None:
        """`run`: the out_dir; `reply_timeout_s`: for a worker that gives no sign of life."""
        self.run, self.reply_timeout_s = run, reply_timeout_s
        self.run_id = ""
        self.workers: list[Any] = []  # those that train
        self.nodes_checked_at = 0.0
        self.replied_at = 0.0  # when all workers replied last

    def after_controller_start(self, train_run_context: Any) -> None:
        """Remember the run for which the controller asks for resources."""
        self.run_id = getattr(train_run_context, "run_id", "")

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Delete a stale pause request of the previous workers; the new ones must not act on it."""
        with contextlib.suppress(OSError):
            (self.run / runs.PAUSE).delete()

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self.workers = worker_actors(worker_group)

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Forget them."""
        self.workers = []

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Have the nodes counted every few seconds."""
        if worker_group_status.errors:
            self.workers = []
        if time.monotonic() - self.nodes_checked_at >= NODE_POLL_INTERVAL_S:
            self.nodes_checked_at = time.monotonic()
            refresh_node_count(self.run_id)

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Have the nodes counted before the number of workers is decided."""
        with contextlib.suppress(Exception):  # the old count will do, after some failed attempts
            ray.get(refresh_node_count(self.run_id), timeout=5)

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Have the workers write a checkpoint before they end."""
        if not self.workers:
            return
        self.replied_at = time.monotonic()
        deadline, is_requested = self.replied_at + COLLECTIVE_TIMEOUT.total_seconds(), False
        while time.monotonic() < deadline:
            # On a full disk, or while a store is away, the request cannot be written yet.
            is_requested = is_requested or ask_to_stop(self.run, RESIZE, runs.PAUSE)
            if is_requested and self._wait_for_answer():
                break
            if not self._end_silent_workers():
                break
            if not is_requested:
                time.sleep(RETRY_INTERVAL_S)
        with contextlib.suppress(OSError):
            (self.run / runs.PAUSE).delete()

    def _wait_for_answer(self) -> bool:
        """Return whether the workers answered, after 0.5 s at most. Storage may fail once."""
        pause = 0.5 if self.run.is_remote else 0.05
        for _ in range(int(0.5 / pause)):
            with contextlib.suppress(OSError):
                if not (self.run / runs.PAUSE).exists():
                    return True
            time.sleep(pause)
        return False

    def _end_silent_workers(self) -> bool:
        """End all workers if one gives no sign of life for too long; return whether all live.

        A worker that writes for long still replies. If its process is stopped, so is its watchdog.
        """
        requests = [worker.get_metadata.remote() for worker in self.workers]
        replied, silent = ray.wait(requests, num_returns=len(requests), timeout=1)
        try:
            ray.get(replied)
        except RayActorError:
            return False
        now = time.monotonic()
        if not silent:
            self.replied_at = now
        if now - self.replied_at < self.reply_timeout_s:
            return True
        rank = requests.index(silent[0])
        text = (
            f"!!! worker {rank} gives no sign of life for {now - self.replied_at:.0f} s (to resize)"
        )
        with contextlib.suppress(OSError):
            append_record(self.run / runs.METRICS, "failure", text, rank=rank)
        for worker in self.workers:  # Ray's graceful shutdown would wait 35 s
            ray.kill(worker)
        return False


def preemption() -> str | None:
    """Return why to stop if a node of this run's workers is about to go; for a StopRequest."""
    return PREEMPTION if is_node_preempted() else None


def answer_pause(run: RunStorage, rank: int) -> None:
    """Answer a waiting controller: the checkpoint is written."""
    if rank == 0:
        with contextlib.suppress(OSError):
            (run / runs.PAUSE).delete()


def wait_to_be_ended(run: RunStorage, reason: str, rank: int) -> NoReturn:
    """Wait until the controller ends this worker; its checkpoint is written."""
    answer_pause(run, rank)
    if reason == PREEMPTION:
        # As if the node were gone: Ray counts it as a preemption, not as a failure. Otherwise the
        # controller would wait until the node goes.
        raise RayActorError(error_msg=reason, preempted=True)
    threading.Event().wait(PAUSE_TIMEOUT_S)
    raise RuntimeError(f"paused for {reason}, and not ended within {PAUSE_TIMEOUT_S:.0f} s")
