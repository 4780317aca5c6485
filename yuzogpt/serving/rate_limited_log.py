"""Log lines that any client can cause: at most one of each kind per interval.

A kind is a message before its values are filled in. The next line of a kind says how many were
left out.
"""

import logging
import time

LOG_INTERVAL_S = 10.0
MAX_KINDS = 100


class RateLimitFilter(logging.Filter):
    """Passes one record of each kind per interval."""

    def __init__(self, interval_s: float = LOG_INTERVAL_S) -> None:
        super().__init__()
        self.interval_s = interval_s
        self.passed: dict[tuple[str, object], tuple[float, int]] = {}  # when; left out since

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True if a record is to be logged; add to it how many like it were left out."""
        kind = (str(record.msg), record.exc_info and record.exc_info[0])
        now = time.monotonic()
        last, left_out = self.passed.get(kind, (now - self.interval_s, 0))
        if now - last < self.interval_s:
            self.passed[kind] = last, left_out + 1
            return False
        if len(self.passed) >= MAX_KINDS:
            self.passed.clear()
        self.passed[kind] = now, 0
        if left_out:
            message = record.getMessage().rstrip()
            record.msg, record.args = f"{message} ({left_out} more since the last such line)", ()
        return True


def rate_limited_logger(name: str) -> logging.Logger:
    """Return the logger of a name, with such a filter."""
    logger = logging.getLogger(name)
    if not any(isinstance(each, RateLimitFilter) for each in logger.filters):
        logger.addFilter(RateLimitFilter())
    return logger
