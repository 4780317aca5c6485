"""The one exception that is meant for the user's eyes."""


class UserError(Exception):
    """What the user got wrong: one line that says what, where, and what would work.

    The command line prints it without a traceback and exits with status 2.
    """


class RunFailed(Exception):
    """A run that ended without being done, through no mistake of the user's: exit status 1."""
