"""Ray Train for a Ray of one node and one command, which end together: with fewer processes.

The controller runs in the command's own process, and so in a trial's. A controller actor takes 3 s
of a core to start, and each idle process of Ray's wakes up 100 times a second, which slows down
training on few cores (benchmarks/README.md: steps take 1.041 instead of 1.016 times torchrun's).
Ray has no public way for this; without its private names it starts what it starts on a cluster.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from yuzogpt.orchestration.ray_internals import (
    CONTROLLER,
    CURRENT_ACTOR,
    POLICY,
    UNUSED_CALLBACKS,
    do_nothing,
    has,
    optional,
    replaced,
    resolve,
)


def single_node_trainer() -> Any:
    """Return a TorchTrainer for one node without datasets; Ray's own where its names differ."""
    from ray.train.torch import TorchTrainer

    if not has("single_node"):
        return TorchTrainer
    controller, fixed_policy = resolve(CONTROLLER), resolve(POLICY)
    unused = [optional(name) for name in UNUSED_CALLBACKS]

    class SilentPolicy(fixed_policy):  # type: ignore[misc, valid-type]
        """Asks no autoscaler for room: there is none, and its actor takes 3 s to start."""

        after_controller_start = _maybe_send_resource_request = do_nothing

    class SingleNodeTrainer(TorchTrainer):  # type: ignore[misc]
        """Starts its workers without the actors that a cluster has, its controller's too."""

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [callback for callback in callbacks if type(callback) not in unused]

        def _initialize_and_run_controller(self, **options: Any) -> Any:
            if type(options.get("scaling_policy")) is fixed_policy:
                options["scaling_policy"] = SilentPolicy(self.scaling_config)
            return run_in_process(controller, options)

    return SingleNodeTrainer


def run_in_process(make_controller: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """Make a controller and run it to its end; return its result.

    Ctrl-C and SIGTERM interrupt it wherever it is; its workers are ended then.
    """
    loop = asyncio.new_event_loop()  # asyncio.run would hold Ctrl-C back
    # No worker can call this process.
    with replaced(CURRENT_ACTOR, None), no_running_loop(), contextlib.closing(loop):
        controller = make_controller(**options)  # turns Ray Train's log on
        with no_logging("ray.train"):  # failures: the user sees one line, errors.log has the rest
            running = loop.create_task(controller.run())
            try:
                loop.run_until_complete(running)
            except BaseException:
                abort(loop, running, controller)
                raise
        return controller.get_result()


@contextlib.contextmanager
def no_running_loop() -> Iterator[None]:
    """Let this thread run a loop, also inside of a notebook's: its cells run in one."""
    before = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio._set_running_loop(before)


def abort(loop: asyncio.AbstractEventLoop, running: "asyncio.Task[None]", controller: Any) -> None:
    """End a controller that was interrupted, and its workers."""
    running.cancel()
    with contextlib.suppress(BaseException):  # the interruption itself, again
        loop.run_until_complete(running)
    with contextlib.suppress(Exception):
        controller.get_worker_group().abort()


@contextlib.contextmanager
def no_logging(name: str) -> Iterator[None]:
    """Silence a logger in this context."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def torch_config(timeout_s: int, wrap_group: Callable[[Any], Any] | None = None) -> Any:
    """Return how workers are connected; a single worker needs no process group.

    `wrap_group` returns what stands between Ray Train's backend and its group of workers.
    """
    from ray.train.torch import TorchConfig

    if not has("torch_backend"):
        return TorchConfig(timeout_s=timeout_s)

    class SeveralConnected(TorchConfig().backend_cls):  # type: ignore[misc]
        """Makes a process group, whose threads poll all the time, for more than one worker."""

        def on_start(self, worker_group: Any, *rest: Any, **named: Any) -> None:
            if len(worker_group) > 1:
                group = wrap_group(worker_group) if wrap_group else worker_group
                super().on_start(group, *rest, **named)

    class SeveralConnectedConfig(TorchConfig):  # type: ignore[misc]
        """Names it."""

        backend_cls = SeveralConnected

    return SeveralConnectedConfig(timeout_s=timeout_s)
