"""A first signal asks to stop, a second one ends at once; a full disk keeps nobody from asking."""

import contextlib
import math
import os
import resource
import signal
import subprocess
import sys
import threading

import pytest

from tests.conftest import REPOSITORY, tiny_settings
from yuzogpt import runs
from yuzogpt.errors import Stopped
from yuzogpt.orchestration.train import trainer
from yuzogpt.runs import stop_request
from yuzogpt.runs.stop_request import StopRequest, ask_to_stop, keep_asking, read_request
from yuzogpt.runtime import signals
from yuzogpt.runtime.signals import StopSignals, interrupt, on_sigterm
from yuzogpt.storage.run_storage import LocalStorage


def send(number):
    os.kill(os.getpid(), number)
    signal.sigtimedwait([], 0)  # Python's handler has run when this returns


def test_a_first_signal_asks_and_a_second_one_ends(monkeypatch):
    before, heard = signal.getsignal(signal.SIGINT), []

    def ask(reason):
        heard.append(reason)
        return True

    with StopSignals(ask, pytest.fail, heard.append):
        send(signal.SIGTERM)
        send(signal.SIGTERM)  # the same request once more
        assert heard == ["SIGTERM"]
        send(signal.SIGINT)
        assert heard == ["SIGTERM", signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is before
    heard.clear()
    with StopSignals(ask, pytest.fail, heard.append):
        monkeypatch.setitem(signals.SAME_REQUEST_S, signal.SIGINT, math.inf)
        send(signal.SIGINT)
        send(signal.SIGINT)  # a wrapper hands on what its terminal sent to all
        assert heard == ["Ctrl-C"]
        monkeypatch.setitem(signals.SAME_REQUEST_S, signal.SIGINT, -1)
        send(signal.SIGINT)
        assert heard == ["Ctrl-C", signal.SIGINT]


@pytest.mark.parametrize("is_command", [False, True])
def test_where_nothing_would_stop_by_itself_a_signal_ends_the_context(monkeypatch, is_command):
    monkeypatch.setattr(signals.STATE, "is_command", is_command)
    with pytest.raises(KeyboardInterrupt), StopSignals(lambda _: False, interrupt, pytest.fail):
        send(signal.SIGINT)


BUSY = """
import hashlib, os, signal, sys, threading
from yuzogpt.runtime import signals

def ask(reason):
    asked.set()
    {answer}

def press():
    is_busy.wait()
    os.kill(os.getpid(), signal.SIGINT)
    asked.wait()
    os.kill(os.getpid(), signal.SIGINT)

def last_line():
    {says}

is_busy, asked = threading.Event(), threading.Event()
signals.STATE.is_command = True
signals.SAME_REQUEST_S[signal.SIGINT] = -1
end = lambda number: signals.end_at_once(number, last_line)
with signals.StopSignals(ask, signals.interrupt, end):
    threading.Thread(target=press).start()
    sys.setswitchinterval(60)  # no other thread runs until the main thread is in compiled code
    is_busy.set()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)  # compiled code, which no signal interrupts
    print("not reached")
"""


@pytest.mark.parametrize(
    ("answer", "says", "line"),
    [
        ("return True", "return 'ended'", "yuzogpt: ended\n"),
        ("raise ValueError", "raise ValueError", ""),
    ],
)
def test_a_second_signal_ends_a_command_that_is_in_compiled_code(answer, says, line):
    ended = subprocess.run(
        [sys.executable, "-c", BUSY.format(answer=answer, says=says)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", line)


def test_a_request_that_fails_ends_the_context(monkeypatch):
    monkeypatch.setattr(signals.STATE, "is_command", True)

    def ask(_reason):
        raise ValueError

    with pytest.raises(KeyboardInterrupt), StopSignals(ask, interrupt, pytest.fail):
        send(signal.SIGINT)


def test_ctrl_c_waits_for_steps_and_for_a_loop_that_polls():
    stop = StopRequest()
    assert not stop.will_answer_soon()  # during start-up there is nothing to keep
    stop.look()
    assert stop.will_answer_soon()
    stop.last_poll -= 2 * stop_request.POLLED_WITHIN_S
    assert not stop.will_answer_soon()
    stop.step = 1
    assert stop.will_answer_soon()


@pytest.mark.parametrize(
    ("made", "lost"),
    [
        (0, "nothing is lost"),
        (120, "nothing is lost"),
        (121, "step 121 is lost"),
        (137, "steps 121 to 137 are lost"),
        (None, "all steps after 120 are lost"),  # known to workers in other processes
    ],
)
def test_a_command_that_ends_at_once_says_what_is_lost(tmp_path, made, lost):
    (tmp_path / "checkpoints/step-120").mkdir(parents=True)
    line = stop_request.lost_steps(LocalStorage(tmp_path), made)
    assert line == f"ended at once: {lost}; the same command resumes from step 120"


def test_a_full_disk_keeps_nobody_from_asking(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # files can be made, and hold nothing
    try:
        assert ask_to_stop(LocalStorage(tmp_path), "SIGTERM")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_request(LocalStorage(tmp_path))


def test_what_cannot_be_asked_is_said_and_asked_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stop_request, "RETRY_INTERVAL_S", 0.01)
    run = tmp_path / "run"
    keep_asking(LocalStorage(run), "SIGTERM")
    wait = threading.Event()
    while "cannot be written: tried again" not in capsys.readouterr().err:
        wait.wait(0.01)
    run.mkdir()
    while read_request(LocalStorage(run)) != "SIGTERM":
        wait.wait(0.01)


def test_a_request_whose_exception_compiled_code_dropped_is_heard_by_the_next_handler():
    heard = []
    with on_sigterm(lambda: heard.append("outer")):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.sigtimedwait([], 0)
        with on_sigterm(lambda: heard.append("inner")):
            assert heard == ["outer", "inner"]
        os.kill(os.getpid(), signal.SIGTERM)  # the same request once more
        signal.sigtimedwait([], 0)
    assert heard == ["outer", "inner"]


def test_a_dropped_sigterm_stops_the_next_call():
    with on_sigterm(lambda: None):
        send(signal.SIGTERM)
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Stopped, match="in the call"), signals.stopped_by_sigterm("in the call"):
            pytest.fail("not reached")
        assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.slow
def test_a_dropped_ctrl_c_interrupts_a_run_on_ray(corpus_dir, tmp_path):
    run = runs.check(tiny_settings(corpus_dir, tmp_path / "run"))
    with StopSignals(trainer.is_idle, trainer.leave, pytest.fail):
        with contextlib.suppress(KeyboardInterrupt):  # as an exception in a `__del__` is
            send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            trainer.train_connected(run)


def test_other_threads_leave_signals_alone():
    before, done = [signal.getsignal(n) for n in signals.TERMINATION_SIGNALS], []

    def use():
        with signals.raising_on_signals(), signals.hangup_as_sigterm(), on_sigterm(pytest.fail):
            signals.exit_on_next_interrupt()
        done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert done == [signal.getsignal(signal.SIGINT)]
    assert before == [signal.getsignal(n) for n in signals.TERMINATION_SIGNALS]
