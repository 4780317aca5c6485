"""Connections that send or read nothing: the service still answers, and does not grow."""

import asyncio
import contextlib
import socket
import sys
import threading
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import uvicorn

from tests.serving.services import Service, service, write_checkpoint
from yuzogpt.serving.connections import LimitedServer, listen

DESCRIPTORS = 256
# As under `ulimit -n 256`.
WITH_FEW_DESCRIPTORS = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({DESCRIPTORS}, {DESCRIPTORS}))
from yuzogpt.cli import run
run()
"""
MB = 2**20


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("connections") / "run"
    write_checkpoint(directory, 20, 2.0)
    return directory


def connect(served: Service) -> socket.socket:
    """Return a connection to a service."""
    address = urlsplit(served.url)
    return socket.create_connection((address.hostname, address.port), timeout=30)


def is_open(connection: socket.socket) -> bool:
    """Return whether the other side has closed a connection on which it had nothing to say."""
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


def pour(connection: socket.socket, size: int) -> None:
    """Send a head of many small lines, until it is refused."""
    with contextlib.suppress(OSError):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        for _ in range(size // 2**16):
            connection.sendall(b"a: b\r\n" * (2**16 // 6))


def proxy_of(served: Service) -> int:
    """Return the process of Serve's proxy."""
    for child in psutil.Process(served.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ProxyActor" in " ".join(child.cmdline()):
                return child.pid
    raise AssertionError("no proxy")


def connections_of(process: int) -> int:
    """Return how many connections a process has accepted that are open."""
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(process).net_connections("tcp")
        ports = {each.laddr.port for each in found if each.status == "LISTEN"}
        return sum(each.laddr.port in ports and each.status != "LISTEN" for each in found)
    return 0


def flood(served: Service, process: int) -> None:
    """Open silent connections and endless heads, and check that other clients are answered."""
    before = psutil.Process(process).memory_info().rss
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(served)) for _ in range(400)]
        half = [stack.enter_context(connect(served)) for _ in range(400)]
        for one in half:
            with contextlib.suppress(OSError):  # it may have made room already
                one.sendall(b"GET / HTTP/1.1\r\nHost: loc")
        endless = [stack.enter_context(connect(served)) for _ in range(40)]
        pouring = [threading.Thread(target=pour, args=(one, 4 * MB)) for one in endless]
        for thread in pouring:
            thread.start()
        for _ in range(20):
            assert served.post(max_tokens=2).status_code == 200
        for thread in pouring:
            thread.join(60)
        assert httpx.get(served.url).status_code == 200
        assert psutil.Process(process).memory_info().rss - before < 50 * MB
        assert psutil.Process(process).num_fds() < DESCRIPTORS
        assert not all(map(is_open, silent))
    assert served.post(max_tokens=2).status_code == 200


@pytest.mark.slow
def test_silent_connections_and_endless_heads_keep_no_client_out(run):
    command = [sys.executable, "-c", WITH_FEW_DESCRIPTORS]
    with service(run, "--num_replicas=0", "--threads=1", command=command) as served:
        assert served.post(max_tokens=2).status_code == 200
        flood(served, served.process.pid)
    assert len(served.printed) < 100, served.printed[:100]
    assert not any("Traceback" in line for line in served.printed)


@pytest.mark.slow
def test_nor_at_serves_proxy(run):
    flags = ("--num_replicas=1", "--threads=1", "--max_connections=100", "--max_body_bytes=100000")
    with service(run, *flags) as served:
        assert served.post(max_tokens=2).status_code == 200
        proxy = proxy_of(served)
        flood(served, proxy)
        with connect(served) as endless:  # a body that is not wanted
            endless.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 200000\r\n\r\n")
            assert endless.recv(100).startswith(b"HTTP/1.1 413")
        served.wait_until(lambda: connections_of(proxy) < 10)
    assert len(served.printed) < 100, served.printed[:100]
    assert not any("Traceback" in line for line in served.printed)


@pytest.mark.slow
def test_who_brings_no_head_or_takes_no_answer_is_left(run):
    patch = "import yuzogpt.serving.connections as c; c.WRITE_TIMEOUT_S = 0.5"
    command = [sys.executable, "-c", f"{patch}\nfrom yuzogpt.cli import run\nrun()"]
    flags = ("--num_replicas=0", "--threads=1", "--head_timeout=0.5")
    with service(run, *flags, command=command) as served, contextlib.ExitStack() as stack:
        silent, half, deaf, slow = (stack.enter_context(connect(served)) for _ in range(4))
        half.sendall(b"GET / HTTP/1.1\r\nHost: loc")
        with contextlib.suppress(BlockingIOError):
            deaf.setblocking(False)
            while True:  # until neither side can take more
                deaf.sendall(b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
        # A body that is not wanted, and comes byte by byte.
        slow.sendall(b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
        assert slow.recv(1000).startswith(b"HTTP/1.1 404")

        def all_are_closed() -> bool:
            with contextlib.suppress(OSError):
                slow.send(b"a")
            return connections_of(served.process.pid) == 0

        served.wait_until(all_are_closed)
        assert not any(map(is_open, (silent, half)))
        assert served.post(max_tokens=2).status_code == 200
    assert len(served.printed) == 2, served.printed  # where it serves, and that it was stopped


def test_an_answer_does_not_wait_for_the_receipt_of_its_head():
    """Head and body are two packets; without TCP_NODELAY a kept connection loses 40 ms there."""

    async def app(scope, receive, send) -> None:
        (connection,) = server.server_state.connections
        found = connection.transport.get_extra_info("socket")
        seen.append(found.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def serve() -> None:
        (listening,) = listen("127.0.0.1", 0)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        async with httpx.AsyncClient() as client:
            assert (await client.get(url)).status_code == 204
        server.should_exit = True
        await serving

    seen: list[int] = []
    server = LimitedServer(uvicorn.Config(app, lifespan="off", log_level="warning"))
    asyncio.run(serve())
    assert seen == [1]
