"""A run whose workers come and go (`--num_workers=1..4`), and nodes that are about to go.

In: what Ray Train's controller decides. Out: workers that write a checkpoint before they are taken
away, so that no step is done twice, and a controller that knows at once which nodes there are.
"""

import contextlib
import threading
import time
from typing import Any, NoReturn

import ray
from ray.exceptions import RayActorError

from yuzogpt import runs
from yuzogpt.orchestration.callbacks import (
    ControllerCallback,
    WorkerGroupCallback,
    actors_of,
)
from yuzogpt.runs.event_log import append_record
from yuzogpt.runs.stop_request import RETRY_INTERVAL_S, ask_to_stop
from yuzogpt.runtime.world import COLLECTIVE_TIMEOUT
from yuzogpt.storage.run_storage import RunStorage

# Why workers stop for a while: they wait for their end then, where others would return, because a
# worker that returns has finished the run.
RESIZE, PREEMPTION = "other workers", "preemption of a node"
PAUSES = (RESIZE, PREEMPTION)
ENDED_WITHIN = 600.0  # seconds, after which a waiting worker gives up waiting

LOOK_EVERY = 2.0  # seconds, for nodes that came or went; Ray by itself looks every 20
COORDINATOR = "AutoscalingCoordinator"  # Ray's actor that knows which nodes there are


class Elastic(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Runs in the controller's process; Ray calls it by keyword."""

    def __init__(self, run: RunStorage, patience: float) -> None:
        """`run`: the out_dir; `patience`: seconds for a worker that gives no sign of life."""
        self.run, self.patience = run, patience
        self.requester = ""
        self.workers: list[Any] = []  # those that train
        self.looked = 0.0
        self.heard = 0.0  # when all workers answered last

    def after_controller_start(self, train_run_context: Any) -> None:
        """Remember under which name the controller asks for resources."""
        self.requester = f"train-{getattr(train_run_context, 'run_id', '')}"

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Forget a wish that the workers before did not answer: these would wait in vain."""
        with contextlib.suppress(OSError):
            (self.run / runs.PAUSE).delete()

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """There are workers that train."""
        self.workers = actors_of(worker_group)

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """There are none any more."""
        self.workers = []

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Look for nodes now and then."""
        if worker_group_status.errors:
            self.workers = []
        if time.monotonic() - self.looked >= LOOK_EVERY:
            self.looked = time.monotonic()
            self._look()

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Look for nodes before it is decided how many workers there can be."""
        with contextlib.suppress(Exception):  # the old count will do, after some futile attempts
            ray.get(self._look(), timeout=5)

    def _look(self) -> Any:
        with contextlib.suppress(Exception):
            coordinator = ray.get_actor(COORDINATOR, namespace=COORDINATOR)
            return coordinator.get_reserved_resources.remote(self.requester, True)

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Let workers that train write a checkpoint before they end."""
        if not self.workers:
            return
        self.heard = time.monotonic()
        deadline, is_asked = self.heard + COLLECTIVE_TIMEOUT.total_seconds(), False
        while time.monotonic() < deadline:
            # On a full disk, or while a store is away, the request cannot be written yet.
            is_asked = is_asked or ask_to_stop(self.run, RESIZE, runs.PAUSE)
            if is_asked and self._wait_for_answer():
                break
            if not self._end_silent_workers():
                break
            if not is_asked:
                time.sleep(RETRY_INTERVAL_S)
        with contextlib.suppress(OSError):
            (self.run / runs.PAUSE).delete()

    def _wait_for_answer(self) -> bool:
        """Wait half a second at most; tell whether workers answered. Storage may fail once."""
        pause = 0.5 if self.run.is_remote else 0.05
        for _ in range(int(0.5 / pause)):
            with contextlib.suppress(OSError):
                if not (self.run / runs.PAUSE).exists():
                    return True
            time.sleep(pause)
        return False

    def _end_silent_workers(self) -> bool:
        """End all workers if one gives no sign of life for too long; tell whether all live.

        One that writes for long still answers. Of one that is stopped its watchdog is stopped, too.
        """
        asked = [worker.get_metadata.remote() for worker in self.workers]
        answered, silent = ray.wait(asked, num_returns=len(asked), timeout=1)
        try:
            ray.get(answered)
        except RayActorError:
            return False
        now = time.monotonic()
        if not silent:
            self.heard = now
        if now - self.heard < self.patience:
            return True
        rank = asked.index(silent[0])
        text = f"!!! worker {rank} gives no sign of life for {now - self.heard:.0f} s (to resize)"
        with contextlib.suppress(OSError):
            append_record(self.run / runs.METRICS, "failure", text, rank=rank)
        for worker in self.workers:  # Ray would ask each to leave, and wait 35 s
            ray.kill(worker)
        return False


def preemption() -> str | None:
    """Tell whether a node of this run's workers is about to go; for a StopRequest.

    Ray's public way to ask waits until all workers do.
    """
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        return PREEMPTION if get_train_context().preemption_context.preemption_info else None
    except (ImportError, AttributeError):  # where Ray's names are others
        return None


def answer_pause(run: RunStorage, rank: int) -> None:
    """Tell a controller that waits for it that the checkpoint is written."""
    if rank == 0:
        with contextlib.suppress(OSError):
            (run / runs.PAUSE).delete()


def wait_for_the_end(run: RunStorage, reason: str, rank: int) -> NoReturn:
    """Wait, the checkpoint being written, until the controller ends this worker."""
    answer_pause(run, rank)
    if reason == PREEMPTION:
        # What Ray sees of a worker whose node is gone: counted as a preemption, not as a failure.
        # Without it the controller would wait until the node goes.
        raise RayActorError(error_msg=reason, preempted=True)
    threading.Event().wait(ENDED_WITHIN)
    raise RuntimeError(f"paused for {reason}, and not ended within {ENDED_WITHIN:.0f} s")
