"""All handling of SIGTERM, SIGHUP and SIGINT (Ctrl-C), as context managers.

A closed terminal (SIGHUP) asks a command to end, as SIGTERM does. Only the main thread can handle
signals; in other threads these context managers do nothing.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from yuzogpt.errors import Stopped
from yuzogpt.runtime.ranks import are_started_by_torchrun

# Signals of one kind within this time are one request. Slurm and systemd signal all processes of a
# command, a terminal its whole foreground group, and torchrun then hands the signal to its ranks.
SAME_REQUEST_S = {signal.SIGTERM: 30.0, signal.SIGINT: 0.1}  # a person is slower
SAME_UNDER_TORCHRUN_S = 2.0  # for Ctrl-C, which torchrun hands on after its own clean-up
TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
CTRL_C = "Ctrl-C"
REASONS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: CTRL_C}


@dataclass
class SignalState:
    """The request of this process to stop, shared by nested handlers: a signal is the process's."""

    open_handlers: int = 0
    first: signal.Signals | None = None  # since the outermost handler was set
    received_at: float = 0.0
    is_command: bool = False  # whether the process is this command's alone, not a notebook's

    def is_repeated(self, number: int) -> bool:
        """Return whether a signal says no more than the first one did."""
        if number == signal.SIGINT != self.first:
            return False
        same = SAME_REQUEST_S[signal.Signals(number)]
        if number == signal.SIGINT and are_started_by_torchrun():
            same = SAME_UNDER_TORCHRUN_S
        return time.monotonic() - self.received_at <= same


STATE = SignalState()


class StopSignals:
    """Answers SIGTERM and Ctrl-C in its context; the first signal asks to stop.

    `ask` gets the reason and returns whether the run will stop by itself. If not, `leave` is called
    in the main thread, and raises. `end_at_once` gets the number of a second signal. In a command,
    a thread calls `ask` and `end_at_once`: Python calls a signal's handler only when the main
    thread returns from compiled code, and two signals until then are one.
    """

    def __init__(
        self,
        ask: Callable[[str], bool],
        leave: Callable[[str], None],
        end_at_once: Callable[[int], None] | None = None,
    ) -> None:
        """Without `end_at_once`, only SIGTERM is answered, and a second one kills the process."""
        self.ask, self.leave, self.end_at_once = ask, leave, end_at_once or die
        self.numbers = (signal.SIGTERM, signal.SIGINT) if end_at_once else (signal.SIGTERM,)
        self.has_thread = STATE.is_command and end_at_once is not None
        self.is_decided, self.must_leave = threading.Event(), False
        self.ends = contextlib.ExitStack()

    def __enter__(self) -> "StopSignals":
        if not is_main_thread():
            return self
        if STATE.open_handlers == 0:
            STATE.first = None
        STATE.open_handlers += 1
        self.ends.callback(self._close)
        if self.has_thread:
            self.ends.enter_context(signals_passed_to(self._on_signal))
        for number in self.numbers:
            before = signal.signal(number, self._handle)
            self.ends.callback(signal.signal, number, before)
        try:  # compiled code may have dropped the exception of the outer handler
            if STATE.first is not None and not self.ask(REASONS[STATE.first]):
                self.leave(REASONS[STATE.first])
        except BaseException:
            self.ends.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.ends.close()

    def _close(self) -> None:
        STATE.open_handlers -= 1

    def _on_signal(self, number: int) -> None:
        if number not in self.numbers:
            return
        try:
            if STATE.first is None:
                STATE.first, STATE.received_at = signal.Signals(number), time.monotonic()
                self.must_leave = True  # also if `ask` fails
                self.must_leave = not self.ask(REASONS[STATE.first])
            elif not STATE.is_repeated(number):
                self.end_at_once(number)
        finally:
            self.is_decided.set()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if not self.has_thread:
            self._on_signal(number)
        self.is_decided.wait()
        if self.must_leave:
            self.must_leave = False
            self.leave(REASONS[STATE.first or signal.SIGTERM])


@contextlib.contextmanager
def signals_passed_to(on_signal: Callable[[int], None]) -> Iterator[None]:
    """Call `on_signal` with the number of each signal that this process handles, in a thread."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while number := os.read(reader, 1):
            with contextlib.suppress(Exception):  # the next signal needs this thread
                on_signal(number[0])
        os.close(reader)

    thread = threading.Thread(target=listen, name="stop signals", daemon=True)
    # The thread inherits the mask: what the main thread holds back must not come by this one.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (*TERMINATION_SIGNALS, signal.SIGINT))
    thread.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


def on_sigterm(stop: Callable[[], None]) -> StopSignals:
    """Call `stop` on SIGTERM; another SIGTERM much later ends the process at once."""

    def ask(_reason: str) -> bool:
        stop()
        return True

    return StopSignals(ask, lambda _: None)


def interrupt(_reason: str) -> NoReturn:
    """Raise what Ctrl-C raises."""
    raise KeyboardInterrupt


def die(number: int) -> None:
    """End this process by a signal."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def end_at_once(
    number: int, last_line: Callable[[], str], clean_up: Callable[[], None] = lambda: None
) -> None:
    """End this command after its second signal, whatever it is doing; print a line before.

    In a process that is not the command's own, such as a notebook's, KeyboardInterrupt is raised.
    """
    line = ""
    with contextlib.suppress(Exception):  # damaged files must not keep the command alive
        line = last_line()
    if not STATE.is_command:
        raise KeyboardInterrupt(line)
    try:
        say_now(line and f"yuzogpt: {line}")
        clean_up()
    finally:
        os._exit(128 + number)


def say_now(line: str) -> None:
    """Print a line on stderr from a signal handler, which may have interrupted another print."""
    if line:
        start = "\n" if is_terminal(2) else ""  # a bar may be on the terminal's line
        with contextlib.suppress(OSError):
            os.write(2, f"{start}{line}\n".encode(errors="replace"))


def announce_stop() -> None:
    """Print on a terminal how a first Ctrl-C is answered."""
    if is_terminal(2):
        say_now("stopping after this step, with a checkpoint; Ctrl-C again ends at once")


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

    try:
        with on_sigterm(leave):  # which raises, too, if SIGTERM came before
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
def ctrl_c_ignored() -> Iterator[None]:
    """Ignore Ctrl-C during a clean-up that takes a moment; a second one still ends the command."""
    handler = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    hears_second = STATE.first and isinstance(handler, StopSignals) and handler.has_thread
    if not is_main_thread() or hears_second:
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

    if not is_main_thread():
        yield
        return
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


def exit_on_next_interrupt(status: int = 130) -> None:
    """Make the next Ctrl-C end this process at once: it is about to end, and may be held up."""
    if is_main_thread():
        signal.signal(signal.SIGINT, lambda *_: os._exit(status))
