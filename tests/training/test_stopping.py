"""Ctrl-C that a library drops is raised again by the next look."""

import os
import signal

import pytest

from yuzogpt.training.stopping import StopRequest, keep_interruption


def test_an_interruption_that_was_dropped_comes_again():
    before = signal.getsignal(signal.SIGINT)
    with keep_interruption() as interruption:
        assert StopRequest(interruption).look() is None
        with pytest.raises(KeyboardInterrupt):  # as a library would, which says nothing
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)
        with pytest.raises(KeyboardInterrupt):
            StopRequest(interruption).look()
    assert signal.getsignal(signal.SIGINT) is before
