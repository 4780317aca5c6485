"""The exceptions that are meant for the user's eyes, and what to quote of others.

The command line prints each as one line.
"""

import difflib
import errno
import os
from collections.abc import Iterable

MAX_QUOTED = 300  # characters of what others say


class UserError(Exception):
    """What the user got wrong: one line that says what, where, and what would work.

    The command line prints it without a traceback and exits with status 2.
    """


class InUse(UserError):
    """Another living process holds what was asked for: it may be free later."""


class RunFailed(Exception):
    """A run that ended without being done, through no mistake of the user's: exit status 1."""


class WorkerFailed(Exception):
    """What ended one of several workers, in one line; the others wait for it: exit status 1."""


class Stopped(Exception):
    """A run that was asked to stop and did, with a checkpoint: exit status 143, as of SIGTERM."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a device, or this machine, had no memory left; torch has many ways to say so."""
    is_named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_named or "allocate memory" in str(error)


def reason_of(error: BaseException) -> str:
    """Return in a few words what went wrong: the system's, or else those of a library."""
    if isinstance(error, OSError) and error.errno:
        is_vague = error.errno == errno.EIO  # what a store says comes so, too
        return (error.strerror if is_vague else None) or os.strerror(error.errno)
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Return the first line of what a library says, for a message of one line.

    A library may quote what it read, however long: the end of that is left out.
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= MAX_QUOTED else f"{line[:MAX_QUOTED]} ..."


def nearest(name: str, names: Iterable[str]) -> str:
    """Return "did you mean X?" for the closest of `names`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else ""
