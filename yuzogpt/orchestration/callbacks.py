"""The bases of our callbacks, by which Ray Train's controller knows whom to call.

They are of Ray's developer interface, and have no public module. Where they are missing, Ray calls
nothing of ours but what it calls of any user's: workers are then started and replaced more slowly.
"""

from typing import Any

from ray.train import UserCallback

try:
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
except ImportError:
    ControllerCallback = type("ControllerCallback", (UserCallback,), {})
    WorkerGroupCallback = type("WorkerGroupCallback", (UserCallback,), {})


def actors_of(worker_group: Any) -> list[Any]:
    """Return the actors of a group's workers; none where Ray's names are others."""
    try:
        return [worker.actor for worker in worker_group.get_workers()]
    except AttributeError:
        return []
