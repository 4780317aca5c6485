"""Stopping a run so that nothing is lost: after its current step, with a checkpoint.

In: SIGTERM (also what `ray job stop`, Slurm and torchrun send), a file named `stop` in out_dir, or
whatever else a launcher asks. Out: the reason, once there is one; the loop looks after every step.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

from yuzogpt.console.terminal import complain
from yuzogpt.runs.directory import PAUSE, STOP
from yuzogpt.storage import mirrors

LOOK_EVERY = 0.25  # seconds; a look costs a system call, on network storage a round trip
ASK_EVERY = 2.0  # seconds, while a request cannot be written

Place = Callable[[], str | None]


class StopRequest:
    """Whether this run was asked to stop, and why."""

    def __init__(self, *places: Place) -> None:
        """`places`: where to look for a reason."""
        self.places = places
        self.reason: str | None = None
        self.looked = 0.0

    def set(self, reason: str) -> None:
        """Ask for it in this process; the first reason stays."""
        self.reason = self.reason or reason

    def close(self) -> None:
        """End what the places began."""
        for place in self.places:
            if isinstance(place, StoredRequest):
                place.close()

    def look(self) -> str | None:
        """Return the reason to stop, if there is one."""
        now = time.monotonic()
        if self.reason is None and now - self.looked >= LOOK_EVERY:
            self.looked = now
            self.reason = next((why for place in self.places if (why := place())), None)
        return self.reason

    def requested_here(self) -> bool:
        """Return whether this rank was asked to stop."""
        return self.look() is not None

    def agreed(self, gather: Callable[[str | None], list[str | None]]) -> str | None:
        """Return the reason of the first rank that was asked to stop; call it on all ranks."""
        return next((reason for reason in gather(self.look()) if reason), None)


def ask_to_stop(run: Path, reason: str, file: str = STOP) -> bool:
    """Ask the run in out_dir to stop, or to pause, from any process that sees it.

    Tell whether that could be written: on a full disk it is an empty file that asks to stop.
    """
    try:
        mirrors.write(run / file, reason.encode())
    except OSError:
        if file != STOP or mirrors.uri_of(run):
            return False
        try:
            (run / file).touch()
        except OSError:
            return False
    return True


def keep_asking(run: Path, reason: str) -> None:
    """Ask the run in out_dir to stop, in a thread, until that is written."""

    def ask() -> None:
        is_said = False
        while not ask_to_stop(run, reason):
            if not is_said:
                where = mirrors.name_of(run / STOP)
                complain(f"!!! {where} cannot be written: tried again")
            is_said = True
            time.sleep(ASK_EVERY)

    threading.Thread(target=ask, name="stop", daemon=True).start()


def read_request(run: Path) -> str | None:
    """Return why the run in out_dir was asked to stop, or else to pause; None if it was not."""
    for file in (STOP, PAUSE):
        with contextlib.suppress(OSError):
            content = mirrors.read(run / file).decode(errors="replace")
            return content.strip()[:200] or f"the file {file}"
    return None


def request_in(run: Path) -> Place:
    """Return where a StopRequest looks for a request in out_dir."""
    return StoredRequest(run) if mirrors.uri_of(run) else lambda: read_request(run)


class StoredRequest:
    """Looks in a store, beside the loop: no step waits for the answer."""

    def __init__(self, run: Path) -> None:
        """Nothing is known before the first look."""
        self.run = run
        self.answer: str | None = None
        self.looked = -mirrors.EVERY
        self.thread = threading.Thread()

    def __call__(self) -> str | None:
        """Return the last answer, and look again when it is time."""
        now = time.monotonic()
        if now - self.looked >= mirrors.EVERY and not self.thread.is_alive():
            self.looked = now
            self.thread = threading.Thread(target=self._look, name="stop", daemon=True)
            self.thread.start()
        return self.answer

    def close(self) -> None:
        """Wait for a look that is going on: a process must not end in the middle of it."""
        if self.thread.is_alive():
            self.thread.join()

    def _look(self) -> None:
        self.answer = read_request(self.run)
