"""The exceptions that are meant for the user's eyes, and what to quote of others.

The command line prints each as one line.
"""

import errno
import os


class UserError(Exception):
    """What the user got wrong: one line that says what, where, and what would work.

    The command line prints it without a traceback and exits with status 2.
    """


class InUse(UserError):
    """Another living process holds what was asked for: it may be free later."""


class RunFailed(Exception):
    """A run that ended without being done, through no mistake of the user's: exit status 1."""


class Stopped(Exception):
    """A run that was asked to stop and did, with a checkpoint: exit status 143, as of SIGTERM."""


def reason_of(error: BaseException) -> str:
    """Return in a few words what went wrong: the system's, or else those of a library."""
    if isinstance(error, OSError) and error.errno:
        is_vague = error.errno == errno.EIO  # what a store says comes so, too
        return (error.strerror if is_vague else None) or os.strerror(error.errno)
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Return the first line of what a library says, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
