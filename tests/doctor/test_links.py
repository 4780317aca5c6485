"""Links, measured over real sockets."""

import secrets
import socket

import pytest

from yuzogpt.doctor.links import SECRET_BYTES, Listener, measure


@pytest.fixture
def listener():
    secret = secrets.token_bytes(SECRET_BYTES)
    listener = Listener("127.0.0.1", secret)
    yield listener, secret
    listener.close()


def test_a_link_is_measured(listener):
    answering, secret = listener
    link = measure("a", "b", "127.0.0.1", answering.port, secret)
    assert link.problem == ""
    assert 0 < link.latency < 0.1
    assert link.bandwidth > 1e8  # the loopback


def test_a_stranger_is_turned_away(listener):
    answering, _ = listener
    link = measure("a", "b", "127.0.0.1", answering.port, bytes(SECRET_BYTES))
    assert "closed by the other side" in link.problem or "reset" in link.problem


def test_a_port_where_nobody_listens_is_a_problem():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        link = measure("a", "b", "127.0.0.1", port, bytes(SECRET_BYTES))
    assert f"port {port}: " in link.problem
    assert "refused" in link.problem
