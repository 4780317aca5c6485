"""The exceptions that are meant for the user's eyes: the command line prints them as one line."""


class UserError(Exception):
    """What the user got wrong: one line that says what, where, and what would work.

    The command line prints it without a traceback and exits with status 2.
    """


class RunFailed(Exception):
    """A run that ended without being done, through no mistake of the user's: exit status 1."""


class Stopped(Exception):
    """A run that was asked to stop and did, with a checkpoint: exit status 143, as of SIGTERM."""
