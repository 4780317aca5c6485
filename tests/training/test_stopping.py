"""Ctrl-C waits for the loop's next look, and for nothing else."""

import os
import signal

import pytest

from yuzogpt.training import stopping
from yuzogpt.training.stopping import Interruption, StopRequest


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)
    signal.sigtimedwait([], 0)  # Python's handler has run when this returns


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(stopping, "LOOK_EVERY", 0)


def test_it_is_raised_by_the_next_look(no_pause):
    before = signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        stop = StopRequest(interruption)
        assert stop.look() is None
        ctrl_c()  # in the middle of a step nothing is raised: C code could drop it
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                stop.look()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_one_is_raised_at_once(no_pause):
    with Interruption() as interruption:
        StopRequest(interruption).look()
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()


def test_where_nobody_looks_it_is_raised_at_once(no_pause, monkeypatch):
    with Interruption() as interruption, pytest.raises(KeyboardInterrupt):
        ctrl_c()
    with Interruption() as interruption:
        StopRequest(interruption).look()
        monkeypatch.setattr(stopping, "LOOKED_WITHIN", 0)
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()
