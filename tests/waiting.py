"""Waiting for what other processes and threads do."""

import subprocess
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    is_so: Callable[[], T],
    process: "subprocess.Popen[str] | subprocess.Popen[bytes] | None" = None,
    seconds: float = 120,
) -> T:
    """Wait until something is so, or there; return it. `process`: must live until then."""
    wait, deadline = threading.Event(), time.monotonic() + seconds
    while not (found := is_so()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"not within {seconds} s"
        wait.wait(0.02)
    return found
