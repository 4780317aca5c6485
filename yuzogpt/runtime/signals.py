"""Signals that ask a command to end. A terminal that was closed (SIGHUP) asks as SIGTERM does.

In: what to do then. Out: context managers. Only a main thread can handle signals; in others these
do nothing.
"""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from yuzogpt.errors import Stopped

# Seconds for which a second SIGTERM says the same as the first: who signals all processes of a
# command (Slurm, systemd), signals torchrun's ranks twice, because torchrun hands it on.
SAME_SIGTERM = 30.0
LOOKED_WITHIN = 3.0  # seconds, for which Ctrl-C waits for the next look
ENDING = (signal.SIGTERM, signal.SIGHUP)


class Asked:
    """When this process was asked to end, for all handlers that lie in each other."""

    depth = 0
    at: float | None = None


@contextlib.contextmanager
def on_sigterm(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on SIGTERM, instead of ending at once; one that comes much later ends at once."""
    if not is_main_thread():
        yield
        return

    is_told = False

    def tell() -> None:
        nonlocal is_told
        is_told = True
        stop()

    def handle(_signal: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        Asked.at = Asked.at or now
        if not is_told:
            tell()
        elif now - Asked.at > SAME_SIGTERM:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    if Asked.depth == 0:
        Asked.at = None
    Asked.depth += 1
    before = signal.signal(signal.SIGTERM, handle)
    try:
        if Asked.at is not None:  # an outer handler was asked, and compiled code dropped its word
            tell()
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        Asked.depth -= 1


@contextlib.contextmanager
def stopped_by_sigterm(line: str) -> Iterator[None]:
    """Raise Stopped on SIGTERM, also in the middle of one of Ray's calls.

    These hand SystemExit on; of what else a signal's handler raises they make a SystemError.
    """
    is_asked = threading.Event()

    def leave() -> None:
        is_asked.set()
        raise SystemExit

    with on_sigterm(leave):
        try:
            yield
        except SystemExit:
            if is_asked.is_set():
                raise Stopped(line) from None
            raise


@contextlib.contextmanager
def sigterm_held_back() -> Iterator[None]:
    """Let SIGTERM and SIGHUP come at the end. Threads and processes that start meanwhile never get
    them.

    Ray has its own handlers while it starts. And its processes must outlive a signal to all of a
    command (`scancel`, systemd, a closed terminal): the workers are to write a checkpoint still.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def hangup_as_sigterm() -> Iterator[None]:
    """Take SIGHUP for SIGTERM, unless it was ignored at the start (nohup)."""
    if not is_main_thread() or signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        yield
        return
    terminals = [file for file in (0, 1, 2) if is_terminal(file)]

    def handle(_signal: int, _frame: FrameType | None) -> None:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for file in terminals:  # a word to one that is gone would be an error
            os.dup2(nowhere, file)
        os.close(nowhere)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGHUP, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def is_terminal(file: int) -> bool:
    """Return whether an open file is a terminal."""
    try:
        return os.isatty(file)
    except OSError:  # it is closed
        return False


def is_main_thread() -> bool:
    """Return whether this is the thread that handles signals."""
    return threading.current_thread() is threading.main_thread()


class DeferredKeyboardInterrupt:
    """Ctrl-C, raised where the loop looks for a reason to stop: a context manager, and a Place.

    Raised wherever it comes, it may meet a library's C code, which drops it without a word, or ends
    the process. Where nobody looked lately (at the start, in a long step), or when it comes again,
    it is raised at once. Only the main thread is interrupted; elsewhere nothing changes.
    """

    def __init__(self) -> None:
        """Nobody looked yet."""
        self.looked, self.came = -math.inf, False

    def __enter__(self) -> "DeferredKeyboardInterrupt":
        """Wait for Ctrl-C."""
        self.is_mine = threading.current_thread() is threading.main_thread()
        if self.is_mine:
            self.before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave it to whoever had it before."""
        if self.is_mine:
            signal.signal(signal.SIGINT, self.before)

    def __call__(self) -> None:
        """Raise KeyboardInterrupt if it came."""
        self.looked = time.monotonic()
        if self.came:
            raise KeyboardInterrupt

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        again, self.came = self.came, True
        if again or time.monotonic() - self.looked > LOOKED_WITHIN:
            raise KeyboardInterrupt


@contextlib.contextmanager
def interruption_held_back() -> Iterator[list[int]]:
    """Let Ctrl-C come at the end; a second one at once. Yields what came so far.

    In the middle of Ray's import or start it may be raised where compiled code drops it, with a
    lock that is held.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    seen: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
    if seen:
        raise KeyboardInterrupt


@contextlib.contextmanager
def deaf_to_interruption() -> Iterator[None]:
    """Ignore Ctrl-C while what was begun is ended, which takes a moment."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
