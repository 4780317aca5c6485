"""Exceptions that the command line prints as one line, and what to quote of other errors."""

import difflib
import errno
import os
from collections.abc import Iterable

MAX_QUOTED = 300  # characters of another library's message


class OneLine(Exception):
    """An error whose message is enough."""

    def _render_traceback_(self) -> list[str]:
        """Return what notebooks show (IPython asks by this name): no traceback."""
        return [f"{type(self).__name__}: {self}"]


class UserError(OneLine):
    """A mistake of the user's: one line that says what, where, and what would work.

    The command line prints it without a traceback and exits with status 2.
    """


class InUse(UserError):
    """Another running process holds what was asked for; it may be free later."""


class RunFailed(OneLine):
    """A run that failed through no mistake of the user's: exit status 1."""


class WorkerFailed(Exception):
    """Why one of several workers failed, in one line; the others wait for it: exit status 1."""


class Stopped(OneLine):
    """A run that stopped on request, after writing a checkpoint.

    `status`: the exit status; by default SIGTERM's.
    """

    def __init__(self, line: str, status: int = 143) -> None:
        super().__init__(line)
        self.status = status


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device, or this machine, ran out of memory; torch says it in many ways."""
    is_named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_named or "allocate memory" in str(error)


def reason_of(error: BaseException) -> str:
    """Return what went wrong in a few words: the system's, else the library's."""
    if isinstance(error, OSError) and error.errno:
        is_vague = error.errno == errno.EIO  # also the number of an object store's own errors
        return (error.strerror if is_vague else None) or os.strerror(error.errno)
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, cut off at MAX_QUOTED characters.

    A library may quote what it read, however long that is.
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= MAX_QUOTED else f"{line[:MAX_QUOTED]} ..."


def nearest(name: str, names: Iterable[str]) -> str:
    """Return "did you mean X?" for the closest of `names`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else ""
