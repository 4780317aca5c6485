"""Stopping a run so that nothing is lost: after its current step, with a checkpoint.

In: Ctrl-C, SIGTERM (which `ray job stop`, Slurm and torchrun send), a file named `stop` in out_dir,
or another source of a launcher. Out: the reason to stop, if any; the loop asks after every step.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable

from yuzogpt import checkpoints
from yuzogpt.console.terminal import complain
from yuzogpt.runs.directory import PAUSE, STOP
from yuzogpt.storage import background_uploader
from yuzogpt.storage.run_storage import RunStorage

POLL_INTERVAL_S = 0.25  # a poll costs a system call, on network storage a round trip
POLLED_WITHIN_S = 3.0  # longer ago, the loop is not near its next poll
RETRY_INTERVAL_S = 2.0  # while a request cannot be written

StopSource = Callable[[], str | None]  # returns the reason to stop, if there is one


class StopRequest:
    """Whether this run was asked to stop, and why."""

    def __init__(self, *sources: StopSource) -> None:
        """`sources` are asked in this order."""
        self.sources = sources
        self.reason: str | None = None
        self.last_poll = -math.inf
        self.step: int | None = None  # the last one that this process made

    def set(self, reason: str) -> None:
        """Ask this process to stop; the first reason stays."""
        self.reason = self.reason or reason

    def will_answer_soon(self) -> bool:
        """Return whether the loop will soon answer, or has steps to keep: not during start-up."""
        return self.step is not None or time.monotonic() - self.last_poll <= POLLED_WITHIN_S

    def close(self) -> None:
        """Wait for the threads of the sources."""
        for source in self.sources:
            if isinstance(source, RemoteStopSource):
                source.close()

    def look(self) -> str | None:
        """Return the reason to stop, if there is one."""
        now = time.monotonic()
        if self.reason is None and now - self.last_poll >= POLL_INTERVAL_S:
            self.last_poll = now
            self.reason = next((reason for ask in self.sources if (reason := ask())), None)
        return self.reason

    def requested_here(self) -> bool:
        """Return whether this rank was asked to stop."""
        return self.look() is not None

    def agreed(self, gather: Callable[[str | None], list[str | None]]) -> str | None:
        """Return the reason of the first rank that was asked to stop; call it on all ranks."""
        return next((reason for reason in gather(self.look()) if reason), None)


def ask_to_stop(run: RunStorage, reason: str, name: str = STOP) -> bool:
    """Ask the run in out_dir to stop, or to pause, from any process that sees it.

    Return whether the request is written. On a full disk, an empty file asks to stop.
    """
    file = run / name
    try:
        file.write(reason.encode())
    except OSError:
        if name != STOP or run.is_remote:
            return False
        try:
            file.local.touch()
        except OSError:
            return False
    return True


def keep_asking(run: RunStorage, reason: str) -> None:
    """Ask the run in out_dir to stop, in a thread that retries until the request is written."""

    def ask() -> None:
        has_complained = False
        while not ask_to_stop(run, reason):
            if not has_complained:
                complain(f"!!! {(run / STOP).display_name} cannot be written: tried again")
            has_complained = True
            time.sleep(RETRY_INTERVAL_S)

    threading.Thread(target=ask, name="stop", daemon=True).start()


def read_request(run: RunStorage) -> str | None:
    """Return why the run in out_dir was asked to stop, or else to pause; None if it was not."""
    for name in (STOP, PAUSE):
        with contextlib.suppress(OSError):
            content = (run / name).read().decode(errors="replace")
            return content.strip()[:200] or f"the file {name}"
    return None


def stop_source(run: RunStorage) -> StopSource:
    """Return a source of requests to stop: the files in out_dir."""
    return RemoteStopSource(run) if run.is_remote else lambda: read_request(run)


class RemoteStopSource:
    """Polls a store in a thread, so that no step waits for the answer."""

    def __init__(self, run: RunStorage) -> None:
        self.run = run
        self.reason: str | None = None
        self.last_poll = -background_uploader.SYNC_INTERVAL_S
        self.thread = threading.Thread()

    def __call__(self) -> str | None:
        """Return the answer of the last poll, and start another when it is time."""
        now = time.monotonic()
        is_due = now - self.last_poll >= background_uploader.SYNC_INTERVAL_S
        if is_due and not self.thread.is_alive():
            self.last_poll = now
            self.thread = threading.Thread(target=self._poll, name="stop", daemon=True)
            self.thread.start()
        return self.reason

    def close(self) -> None:
        """Wait for a poll to end: the process must not end in the middle of it."""
        if self.thread.is_alive():
            self.thread.join()

    def _poll(self) -> None:
        self.reason = read_request(self.run)


def lost_steps(run: RunStorage, made: int | None) -> str:
    """Return a line about what a run loses that ends now: the steps that no checkpoint holds.

    `made`: steps made; None: only the workers, in other processes, know the exact number.
    """
    kept = max(map(checkpoints.step_of, checkpoints.resumable(run.local)), default=0)
    if made is None:
        lost = f"all steps after {kept} are lost"
    elif made <= kept:
        lost = "nothing is lost"
    else:
        lost = f"steps {kept + 1} to {made} are lost" if made > kept + 1 else f"step {made} is lost"
    return f"ended at once: {lost}; the same command resumes from step {kept}"
