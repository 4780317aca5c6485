"""Ends a command whose embedded Ray does not start, or whose workers do not, with one line.

Ray by itself would wait for minutes, or forever, and say nothing.
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

WORKER_START_TIMEOUT_S = 60.0  # after Ray's log first says that something is wrong
SIGNAL_TIMEOUT_S = 15.0  # for signals held back while Ray starts, which mostly takes 3 s
EXIT_TIMEOUT_S = 20.0  # for the command's own end
POLL_INTERVAL_S = 0.5
LOGS = "ray/session_latest/logs"
EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}
ENDINGS = {signal.SIGTERM: "stopped (SIGTERM)", signal.SIGINT: "interrupted"}


@contextlib.contextmanager
def watch_for_workers(directory: Path) -> Iterator[None]:
    """Raise RunFailed, with the last line of Ray's log, if no worker starts in this context."""
    ended, problems = threading.Event(), list[str]()

    def watch() -> None:
        if problem := wait_for_worker(directory / LOGS, ended):
            problems.append(f"Ray cannot start its workers here: {problem}")
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            if not ended.wait(EXIT_TIMEOUT_S):
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
    while not ended.wait(POLL_INTERVAL_S):
        if any(logs.glob("python-core-worker-*")):
            return None
        problem = last_line(logs / "raylet.err")
        since = (since or time.monotonic()) if problem else None
        if since and time.monotonic() - since > WORKER_START_TIMEOUT_S:
            return problem
    return None


def last_line(log: Path) -> str | None:
    """Return the last line of a log; None if it is empty."""
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace")[-10_000:].splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), None)
    return None


@contextlib.contextmanager
def end_if_stuck(
    interruptions: Sequence[int], directory: Callable[[], Path | None]
) -> Iterator[None]:
    """End this process if Ray's start does not end soon after SIGTERM, or after a Ctrl-C.

    SIGTERM and SIGHUP are blocked in this context; those of SIGINT are in `interruptions`.
    `directory`: of the embedded Ray, if there is one by then.
    """
    ended = threading.Event()

    def watch() -> None:
        since: float | None = None
        while not ended.wait(POLL_INTERVAL_S):
            number = signal.SIGINT if interruptions else signal.SIGTERM
            if not interruptions and not signal.sigpending() & set(TERMINATION_SIGNALS):
                continue
            since = since or time.monotonic()
            if time.monotonic() - since > SIGNAL_TIMEOUT_S:
                line = f"{ENDINGS[number]}; Ray had not started"
                leave(directory(), line, EXIT_STATUS[number])

    threading.Thread(target=watch, name="signals", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def leave(directory: Path | None, line: str, status: int) -> None:
    """End Ray and this process, whose main thread is blocked."""
    complain(f"yuzogpt: {line}")
    if directory:
        end(directory)
    os._exit(status)
