"""Log lines that strangers cause: few of them, however many strangers there are.

In: log records. Out: at most one of a kind in a while, which says how many were left out. A kind is
a message before its values are filled in.
"""

import logging
import time

EVERY = 10.0  # seconds
MOST_KINDS = 100


class Sparing(logging.Filter):
    """Passes one record of each kind in `every` seconds."""

    def __init__(self, every: float = EVERY) -> None:
        """`every`: seconds."""
        super().__init__()
        self.every = every
        self.passed: dict[tuple[str, object], tuple[float, int]] = {}  # when; left out since

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log a record; add to it how many like it were left out."""
        kind = (str(record.msg), record.exc_info and record.exc_info[0])
        now = time.monotonic()
        since, left_out = self.passed.get(kind, (now - self.every, 0))
        if now - since < self.every:
            self.passed[kind] = since, left_out + 1
            return False
        if len(self.passed) >= MOST_KINDS:
            self.passed.clear()
        self.passed[kind] = now, 0
        if left_out:
            message = record.getMessage().rstrip()
            record.msg, record.args = f"{message} ({left_out} more since the last such line)", ()
        return True


def sparing_logger(name: str) -> logging.Logger:
    """Return a logger that has such a filter."""
    logger = logging.getLogger(name)
    if not any(isinstance(one, Sparing) for one in logger.filters):
        logger.addFilter(Sparing())
    return logger
