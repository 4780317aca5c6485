"""The bases of our callbacks, by which Ray Train's controller knows whom to call.

They are of Ray's developer interface, and have no public module. Where they are missing, Ray calls
nothing of ours but what it calls of any user's: workers are then started and replaced more slowly.
"""

from typing import Any

from ray.train import UserCallback

try:
    from ray.train.v2._internal.execution import callback
except ImportError:
    callback = None


def base(name: str) -> Any:
    """Return a base class of Ray Train's, or one that its controller takes and never calls."""
    return getattr(callback, name, None) or type(name, (UserCallback,), {})


ControllerCallback = base("ControllerCallback")
WorkerGroupCallback = base("WorkerGroupCallback")


def actors_of(worker_group: Any) -> list[Any]:
    """Return the actors of a group's workers; none where Ray's names are others."""
    try:
        return [worker.actor for worker in worker_group.get_workers()]
    except AttributeError:
        return []
