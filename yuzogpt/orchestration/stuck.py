"""An embedded Ray that does not start, or whose workers do not: the command ends with a line.

In: its private directory, in which its processes write their logs. Out: RunFailed, or the end that
SIGTERM and Ctrl-C ask for. Ray by itself would wait for minutes, or for ever, and say nothing.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from yuzogpt.console.terminal import complain
from yuzogpt.errors import RunFailed
from yuzogpt.orchestration.leftovers import end
from yuzogpt.runtime.signals import TERMINATION_SIGNALS

WORKERS_WITHIN = 60.0  # seconds, after Ray's log first says that something is wrong
OBEYED_WITHIN = 15.0  # seconds, for what is held back while Ray starts: it mostly takes 3
ENDED_WITHIN = 20.0  # seconds, for the command's own end
LOOK_EVERY = 0.5  # seconds
LOGS = "ray/session_latest/logs"
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}
SAID = {signal.SIGTERM: "stopped (SIGTERM)", signal.SIGINT: "interrupted"}


@contextlib.contextmanager
def workers_watched(directory: Path) -> Iterator[None]:
    """Raise RunFailed if no worker can be started in this context: what Ray's log says of it."""
    ended, problems = threading.Event(), list[str]()

    def watch() -> None:
        if problem := wait_for_worker(directory / LOGS, ended):
            problems.append(f"Ray cannot start its workers here: {problem}")
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            if not ended.wait(ENDED_WITHIN):
                leave(directory, problems[0], 1)

    threading.Thread(target=watch, name="workers", daemon=True).start()
    try:
        yield
    except BaseException:
        if problems:
            raise RunFailed(problems[0]) from None
        raise
    finally:
        ended.set()


def wait_for_worker(logs: Path, ended: threading.Event) -> str | None:
    """Wait until a worker has started; return what Ray says if none does for too long."""
    since: float | None = None
    while not ended.wait(LOOK_EVERY):
        if any(logs.glob("python-core-worker-*")):
            return None
        said = last_line_of(logs / "raylet.err")
        since = (since or time.monotonic()) if said else None
        if since and time.monotonic() - since > WORKERS_WITHIN:
            return said
    return None


def last_line_of(log: Path) -> str | None:
    """Return the last line of a log; None if it says nothing."""
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace")[-10_000:].splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), None)
    return None


@contextlib.contextmanager
def obeyed(interruptions: Sequence[int], directory: Callable[[], Path | None]) -> Iterator[None]:
    """End this process if Ray's start does not end soon after SIGTERM, or after a Ctrl-C.

    SIGTERM and SIGHUP are blocked in this context; what came of SIGINT is in `interruptions`.
    `directory`: of the embedded Ray, if there is one by then.
    """
    ended = threading.Event()

    def watch() -> None:
        since: float | None = None
        while not ended.wait(LOOK_EVERY):
            number = signal.SIGINT if interruptions else signal.SIGTERM
            if not interruptions and not signal.sigpending() & set(TERMINATION_SIGNALS):
                continue
            since = since or time.monotonic()
            if time.monotonic() - since > OBEYED_WITHIN:
                line = f"{SAID[number]}; Ray had not started"
                leave(directory(), line, STATUS[number])

    threading.Thread(target=watch, name="signals", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def leave(directory: Path | None, line: str, status: int) -> None:
    """End Ray and this process, whose main thread stands still."""
    complain(f"yuzogpt: {line}")
    if directory:
        end(directory)
    os._exit(status)
