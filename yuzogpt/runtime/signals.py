"""All handling of SIGTERM, SIGHUP and SIGINT (Ctrl-C), as context managers.

A closed terminal (SIGHUP) asks a command to end, as SIGTERM does. Only the main thread can handle
signals; in other threads these context managers do nothing.
"""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from yuzogpt.errors import Stopped

# A second SIGTERM within this time is the same request: Slurm and systemd signal all processes of a
# command, and torchrun forwards the signal to its ranks, which so get it twice.
SAME_SIGTERM_S = 30.0
POLLED_WITHIN_S = 3.0  # Ctrl-C is deferred only if the loop polled within this time
TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@dataclass
class SigtermState:
    """The SIGTERM of this process, shared by nested handlers, as a signal is the process's."""

    open_handlers: int = 0
    received_at: float | None = None  # the first one, since the outermost handler was set


SIGTERM_STATE = SigtermState()


@contextlib.contextmanager
def on_sigterm(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on SIGTERM; another SIGTERM much later ends the process at once."""
    if not is_main_thread():
        yield
        return

    state, is_called = SIGTERM_STATE, False

    def call_stop() -> None:
        nonlocal is_called
        is_called = True
        stop()

    def handle(_signal: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        state.received_at = state.received_at or now
        if not is_called:
            call_stop()
        elif now - state.received_at > SAME_SIGTERM_S:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    if state.open_handlers == 0:
        state.received_at = None
    state.open_handlers += 1
    before = signal.signal(signal.SIGTERM, handle)
    try:
        if state.received_at is not None:  # compiled code dropped the outer handler's exception
            call_stop()
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        state.open_handlers -= 1


@contextlib.contextmanager
def stopped_by_sigterm(line: str) -> Iterator[None]:
    """Raise Stopped on SIGTERM, also in the middle of one of Ray's calls.

    Ray's calls let SystemExit through; any other exception of a signal handler they turn into a
    SystemError.
    """
    is_received = threading.Event()

    def leave() -> None:
        is_received.set()
        raise SystemExit

    with on_sigterm(leave):
        try:
            yield
        except SystemExit:
            if is_received.is_set():
                raise Stopped(line) from None
            raise


@contextlib.contextmanager
def sigterm_held_back() -> Iterator[None]:
    """Defer SIGTERM and SIGHUP to the end. Threads and processes started meanwhile never get them.

    While Ray starts, it sets handlers of its own. And its processes must survive a signal to all
    processes of a command (`scancel`, systemd, a closed terminal): the workers still have to write
    a checkpoint.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TERMINATION_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def hangup_as_sigterm() -> Iterator[None]:
    """Treat SIGHUP as SIGTERM, unless it was ignored from the start (nohup)."""
    if not is_main_thread() or signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        yield
        return
    terminals = [file for file in (0, 1, 2) if is_terminal(file)]

    def handle(_signal: int, _frame: FrameType | None) -> None:
        null = os.open(os.devnull, os.O_RDWR)
        for file in terminals:  # output to a closed terminal would be an error
            os.dup2(null, file)
        os.close(null)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGHUP, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def is_terminal(file: int) -> bool:
    """Return whether a file descriptor is a terminal."""
    try:
        return os.isatty(file)
    except OSError:  # it is closed
        return False


def is_main_thread() -> bool:
    """Return whether this is the thread that handles signals."""
    return threading.current_thread() is threading.main_thread()


class DeferredKeyboardInterrupt:
    """Raises Ctrl-C only where the loop polls for a reason to stop: a StopRequest's source.

    Raised at any other point, KeyboardInterrupt may reach a library's C code, which drops it
    silently or ends the process. It is raised at once if the loop has not polled lately (during
    start-up, in a long step), and on a second Ctrl-C.
    """

    def __init__(self) -> None:
        self.last_poll, self.is_pending = -math.inf, False

    def __enter__(self) -> "DeferredKeyboardInterrupt":
        self.is_handler = is_main_thread()
        if self.is_handler:
            self.before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_handler:
            signal.signal(signal.SIGINT, self.before)

    def __call__(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed."""
        self.last_poll = time.monotonic()
        if self.is_pending:
            raise KeyboardInterrupt

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        is_second, self.is_pending = self.is_pending, True
        if is_second or time.monotonic() - self.last_poll > POLLED_WITHIN_S:
            raise KeyboardInterrupt


@contextlib.contextmanager
def interruption_held_back() -> Iterator[list[int]]:
    """Defer Ctrl-C to the end; a second one is raised at once. Yields the signals received so far.

    During Ray's import or start, KeyboardInterrupt may be dropped by compiled code that holds a
    lock.
    """
    if not is_main_thread():
        yield []
        return
    received: list[int] = []

    def record(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, record)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)
    if received:
        raise KeyboardInterrupt


@contextlib.contextmanager
def deaf_to_interruption() -> Iterator[None]:
    """Ignore Ctrl-C during a clean-up that takes a moment."""
    if not is_main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def raising_on_signals() -> Iterator[None]:
    """Raise Stopped on SIGTERM and KeyboardInterrupt on Ctrl-C, wherever this process is.

    The latter also in a shell's background job, which starts with Ctrl-C ignored.
    """

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise Stopped("stopped (SIGTERM)")

    handlers = {signal.SIGTERM: stop, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def sigterm_handler_kept() -> Iterator[None]:
    """Restore this process's SIGTERM handler after a call that replaces it, such as ray.init."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if is_main_thread():
        signal.signal(signal.SIGTERM, handler)


def exit_on_next_interrupt() -> None:
    """Make the next Ctrl-C end this process at once: it is about to end, and may be held up."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
