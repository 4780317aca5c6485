"""Spare workers: processes that stand ready, so that a worker that died is replaced in seconds.

In: the workers of a run that trains. Out: as many idle processes beside them, with everything
imported that takes its time (torch, FSDP, Ray Train), which is most of what a new worker waits for.
They wait in a system call until they are wanted: Ray's own loop wakes up a hundred times a second.
Ray has no public way for this, so nothing depends on it: if it fails, workers start as they always
do.
"""

import contextlib
import fcntl
import time
from collections import Counter
from importlib import import_module
from typing import Any

import ray

from yuzogpt.orchestration.embedded import private_directory
from yuzogpt.orchestration.ray_internals import (
    callback_base,
    prestart_workers,
    process_setup_hook,
    worker_nodes,
)

READY_AFTER = 20.0  # seconds of training, so that the start of a run is not slowed down
ANSWERED_WITHIN = 0.5  # seconds; the first worker was asked READY_AFTER seconds before
KEPT_FOR = 10**7  # seconds
NEEDED = ("ray.train.torch", "torch.distributed.fsdp", "yuzogpt.training.launch")

LOCK = "spares.lock"  # in the private directory of an embedded Ray


def setup_hook() -> dict[str, str]:
    """Return the variables with which worker processes wait until they are needed."""
    return process_setup_hook(f"{__name__}.{wait_until_needed.__name__}")


def wait_until_needed() -> None:
    """Import what every training worker imports; wait while no worker is wanted."""
    for name in NEEDED:
        with contextlib.suppress(ImportError):
            import_module(name)
    with contextlib.suppress(OSError), (private_directory() / LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)


class WarmWorkers(callback_base("WorkerGroupCallback")):  # type: ignore[misc]
    """Runs in the command's process, which holds the lock while no worker is wanted."""

    def __init__(self) -> None:
        """There are no workers yet."""
        self.group: Any = None
        self.made_for: Any = None  # the answer that the first worker owes us
        self.trains_since = 0.0
        self.lock = (private_directory() / LOCK).open("w")

    def __getstate__(self) -> dict[str, Any]:
        """Workers get a copy, with all that was set for their run, and make no use of it."""
        return {}

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """Remember the workers, and since when they train."""
        with contextlib.suppress(BlockingIOError):  # by a process that stands still, say
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.group, self.trains_since = worker_group, time.monotonic()
        with contextlib.suppress(Exception):
            self.made_for = worker_group.execute_single_async(0, runtime_environment)

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Workers are wanted, also where those before were not ended in good order."""
        fcntl.flock(self.lock, fcntl.LOCK_UN)

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Forget the workers; others may be wanted."""
        fcntl.flock(self.lock, fcntl.LOCK_UN)
        self.group = None

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Start spares once the workers have trained for a while."""
        if worker_group_status.errors:
            self.group = None
        if self.group and time.monotonic() - self.trains_since > READY_AFTER:
            with contextlib.suppress(Exception):
                # Not waited for: a worker that stands still would hold up the controller for ever.
                start_spares(self.group, ray.get(self.made_for, timeout=ANSWERED_WITHIN))
            self.group = None


def runtime_environment() -> str:
    """Return what this process was made for: it serves no work with another."""
    return str(ray.get_runtime_context().get_runtime_env_string())


def start_spares(group: Any, made_for: str) -> None:
    """Ask each node for as many processes as it has workers, made like them."""
    nodes = {node["NodeID"]: node for node in ray.nodes()}
    job_id = ray.get_runtime_context().get_job_id()
    for node_id, count in Counter(worker_nodes(group)).items():
        node = nodes[node_id]
        address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
        prestart_workers(address, job_id, count, made_for, KEPT_FOR)
