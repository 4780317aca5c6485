"""Ctrl-C waits for the loop's next look; a request to stop is heard on a full disk, too."""

import os
import resource
import signal
import threading

import pytest

from yuzogpt.runs import stop_request
from yuzogpt.runs.stop_request import StopRequest, ask_to_stop, keep_asking, read_request
from yuzogpt.runtime import signals
from yuzogpt.runtime.signals import DeferredKeyboardInterrupt, on_sigterm
from yuzogpt.storage.run_storage import LocalStorage


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)
    signal.sigtimedwait([], 0)  # Python's handler has run when this returns


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(stop_request, "POLL_INTERVAL_S", 0)


def test_it_is_raised_by_the_next_look(no_pause):
    before = signal.getsignal(signal.SIGINT)
    with DeferredKeyboardInterrupt() as interruption:
        stop = StopRequest(interruption)
        assert stop.look() is None
        ctrl_c()  # in the middle of a step nothing is raised: C code could drop it
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                stop.look()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_one_is_raised_at_once(no_pause):
    with DeferredKeyboardInterrupt() as interruption:
        StopRequest(interruption).look()
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()


def test_where_nobody_looks_it_is_raised_at_once(no_pause, monkeypatch):
    with DeferredKeyboardInterrupt() as interruption, pytest.raises(KeyboardInterrupt):
        ctrl_c()
    with DeferredKeyboardInterrupt() as interruption:
        StopRequest(interruption).look()
        monkeypatch.setattr(signals, "POLLED_WITHIN_S", 0)
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()


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
