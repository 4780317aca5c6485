"""A Ray that has one node and one command, without what only a cluster needs.

In: nothing, or what Ray Train is given. Out: fewer processes: each costs a second or more of a core
while the user waits. Ray has no public way for this, so nothing depends on it: where Ray's names
are others, it starts as ever.
"""

import contextlib
from collections.abc import Iterable, Iterator
from inspect import signature
from typing import Any

from yuzogpt.orchestration.train.loopback import OnLoopback

# Methods of Ray's node that start: the autoscaler, what carries workers' output to the driver (we
# switch that off), and the server behind the dashboard and the interfaces for jobs and states.
NEEDLESS = ("start_monitor", "start_log_monitor", "start_api_server")
# Of Ray Train. The first removes the placement group of a dead controller, and asks that server: a
# command's ends with all of Ray; for a trial's there is placement.py. The second shares out
# datasets: we have none. Workers wait 3 s for the process of each.
NEEDLESS_CALLBACKS = ("PlacementGroupCleanerCallback", "DatasetsCallback")
# What is replaced of a TorchTrainer, and what is called of its controller.
OF_TRAINER = ("_create_default_callbacks", "_initialize_and_run_controller")
OF_CONTROLLER = ("run", "get_result")


@contextlib.contextmanager
def minimal_node_services() -> Iterator[None]:
    """Start a node in this context with its GCS, its raylet and their agents alone."""
    found: dict[str, Any] = {}
    with contextlib.suppress(ImportError):
        from ray._private.node import Node

        found = {name: getattr(Node, name) for name in NEEDLESS if hasattr(Node, name)}
    for name in found:
        setattr(Node, name, do_nothing)
    try:
        yield
    finally:
        for name, method in found.items():
            setattr(Node, name, method)


@contextlib.contextmanager
def kill_node_immediately() -> Iterator[None]:
    """Kill a node's processes in this context: a wish to end (SIGTERM) would not reach them."""
    patient = None
    with contextlib.suppress(ImportError, AttributeError):
        from ray._private.node import Node

        patient = Node.kill_all_processes
    if patient is None or "allow_graceful" not in signature(patient).parameters:
        yield
        return
    Node.kill_all_processes = lambda node, **given: patient(
        node, **{**given, "allow_graceful": False}
    )
    try:
        yield
    finally:
        Node.kill_all_processes = patient


def do_nothing(*_: Any, **__: Any) -> None:
    """Stand in for what a single node does not need."""


def single_node_trainer() -> Any:
    """Return a TorchTrainer for workers on one node and without datasets; Ray's, where need be."""
    from ray.train.torch import TorchTrainer

    try:
        from ray.train.v2._internal.execution.controller import TrainController
        from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
    except ImportError:
        return TorchTrainer
    if not has_all(TorchTrainer, OF_TRAINER) or not has_all(TrainController, OF_CONTROLLER):
        return TorchTrainer
    from yuzogpt.orchestration.train.controller import run_here

    class OneNode(FixedScalingPolicy):  # type: ignore[misc]
        """Asks no autoscaler for room: there is none, and its actor takes 3 s to start."""

        after_controller_start = _maybe_send_resource_request = do_nothing

    class LeanTrainer(TorchTrainer):  # type: ignore[misc]
        """Starts its workers without the actors that a cluster has, its controller's too."""

        def _create_default_callbacks(self) -> list[Any]:
            made = super()._create_default_callbacks()
            return [one for one in made if type(one).__name__ not in NEEDLESS_CALLBACKS]

        def _initialize_and_run_controller(self, **given: Any) -> Any:
            if type(given.get("scaling_policy")) is FixedScalingPolicy:
                given["scaling_policy"] = OneNode(self.scaling_config)
            return run_here(TrainController, given)

    return LeanTrainer


def has_all(owner: type, names: Iterable[str]) -> bool:
    """Return whether a class has all of these attributes."""
    return all(hasattr(owner, name) for name in names)


def torch_config(timeout: int, *, on_loopback: bool = False) -> Any:
    """Return how workers are connected, within so many seconds: a single one to nobody.

    `on_loopback`: they are on this machine, and no other is to reach their store.
    """
    from ray.train.torch import TorchConfig

    if not hasattr(TorchConfig, "backend_cls") or not hasattr(
        TorchConfig().backend_cls, "on_start"
    ):
        return TorchConfig(timeout_s=timeout)

    class SeveralConnected(TorchConfig().backend_cls):  # type: ignore[misc]
        """Makes a process group, whose threads look about all the time, for more than one."""

        def on_start(self, worker_group: Any, *rest: Any, **named: Any) -> None:
            if len(worker_group) > 1:
                group = OnLoopback(worker_group) if on_loopback else worker_group
                super().on_start(group, *rest, **named)

    class LeanConfig(TorchConfig):  # type: ignore[misc]
        """Names it."""

        backend_cls = SeveralConnected

    return LeanConfig(timeout_s=timeout)
