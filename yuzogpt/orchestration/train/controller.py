"""Ray Train's controller, in the command's own process instead of one of its own.

In: what Ray Train gives its controller. Out: its result. For a Ray that has one node and one
command, which end together, and for the trials of such a command. A process of the controller's
takes seconds of a core to start; and each of Ray's that waits for work wakes up a hundred times a
second, beside a training that wants all cores. Ray has no public way for this: where its names are
others, it starts its own.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# The controller writes about failures here, which the user is told of in a line.
LOGGER = "ray.train"


def run_here(make: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """Make a controller and run it to its end; return its result.

    Ctrl-C and SIGTERM come through, in the middle of whatever it does; its workers are ended then.
    """
    loop = asyncio.new_event_loop()  # asyncio.run would hold Ctrl-C back
    with hide_controller_actor(), contextlib.closing(loop):
        controller = make(**given)  # which turns Ray Train's log on
        with no_logging():
            running = loop.create_task(controller.run())
            try:
                loop.run_until_complete(running)
            except BaseException:
                leave(loop, running, controller)
                raise
        return controller.get_result()


def leave(loop: asyncio.AbstractEventLoop, running: "asyncio.Task[None]", controller: Any) -> None:
    """End a controller that was interrupted, wherever it was, and its workers."""
    running.cancel()
    with contextlib.suppress(BaseException):  # what has interrupted it, once more
        loop.run_until_complete(running)
    with contextlib.suppress(Exception):
        controller.get_worker_group().abort()


@contextlib.contextmanager
def no_logging() -> Iterator[None]:
    """Keep Ray Train's log still in this context: what ended a run is in its errors.log."""
    logger = logging.getLogger(LOGGER)
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def hide_controller_actor() -> Iterator[None]:
    """Have workers told of no controller in this context: they cannot call this process."""
    from ray.runtime_context import RuntimeContext

    whose = getattr(RuntimeContext, "current_actor", None)
    RuntimeContext.current_actor = None
    try:
        yield
    finally:
        RuntimeContext.current_actor = whose
