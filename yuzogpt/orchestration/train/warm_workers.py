"""Warm workers: idle processes, so that a worker that died is replaced in seconds.

Each training worker gets one beside it, which has imported torch, FSDP and Ray Train: most of what
a new worker waits for. They wait in a system call until they are needed, because Ray's own loop
wakes up 100 times a second. Ray has no public way for this. If it fails, workers start as usual.
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

WARM_UP_AFTER_S = 20.0  # of training, so that the start of a run is not slowed down
REPLY_TIMEOUT_S = 0.5  # the first worker was asked WARM_UP_AFTER_S before
KEEP_ALIVE_S = 10**7
IMPORTS = ("ray.train.torch", "torch.distributed.fsdp", "yuzogpt.training.launch")

LOCK = "spares.lock"  # in the private directory of an embedded Ray


def setup_hook() -> dict[str, str]:
    """Return the variables with which worker processes wait until they are needed."""
    return process_setup_hook(f"{__name__}.{wait_until_needed.__name__}")


def wait_until_needed() -> None:
    """Import what every training worker imports; wait while no worker is needed."""
    for name in IMPORTS:
        with contextlib.suppress(ImportError):
            import_module(name)
    with contextlib.suppress(OSError), (private_directory() / LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)


class WarmWorkers(callback_base("WorkerGroupCallback")):  # type: ignore[misc]
    """Runs in the command's process, which holds the lock while no worker is needed."""

    def __init__(self) -> None:
        self.group: Any = None
        self.runtime_env: Any = None  # reference to the first worker's reply
        self.trains_since = 0.0
        self.lock = (private_directory() / LOCK).open("w")

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: workers get a copy of the run's settings, and do not use this."""
        return {}

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """Remember the workers, and since when they train."""
        with contextlib.suppress(BlockingIOError):  # a stopped process may hold it
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.group, self.trains_since = worker_group, time.monotonic()
        with contextlib.suppress(Exception):
            self.runtime_env = worker_group.execute_single_async(0, runtime_environment)

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Release the waiting processes, even if the previous workers did not end cleanly."""
        fcntl.flock(self.lock, fcntl.LOCK_UN)

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Forget the workers; others may be needed."""
        fcntl.flock(self.lock, fcntl.LOCK_UN)
        self.group = None

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Start warm workers once the workers have trained for a while."""
        if worker_group_status.errors:
            self.group = None
        if self.group and time.monotonic() - self.trains_since > WARM_UP_AFTER_S:
            with contextlib.suppress(Exception):
                # With a timeout: a stopped worker would block the controller forever.
                start_warm_workers(self.group, ray.get(self.runtime_env, timeout=REPLY_TIMEOUT_S))
            self.group = None


def runtime_environment() -> str:
    """Return this process's runtime environment: it takes no work with another one."""
    return str(ray.get_runtime_context().get_runtime_env_string())


def start_warm_workers(group: Any, runtime_env: str) -> None:
    """Ask each node for as many processes as it has workers, with the same environment."""
    nodes = {node["NodeID"]: node for node in ray.nodes()}
    job_id = ray.get_runtime_context().get_job_id()
    for node_id, count in Counter(worker_nodes(group)).items():
        node = nodes[node_id]
        address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
        prestart_workers(address, job_id, count, runtime_env, KEEP_ALIVE_S)
