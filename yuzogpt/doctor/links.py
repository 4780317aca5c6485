"""Measures latency and bandwidth between two nodes.

Plain TCP, not a collective, so that a closed port delays nothing else.
Each measurement begins with a secret, so that a stranger's connection is closed at once.
"""

import contextlib
import secrets
import select
import socket
import socketserver
import statistics
import struct
import threading
import time
from dataclasses import dataclass

SECRET_BYTES = 16
ROUND_TRIPS = 20
WARM_UP_S = 0.1  # in which TCP adapts to the link
MEASURED_S = 0.4  # after the warm-up: with less, a busy core looks like a slow link
CHUNK = bytes(2**16)
TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Link:
    """What was measured from one node to another."""

    source: str
    target: str
    latency: float = 0.0  # seconds, there and back, the median
    bandwidth: float = 0.0  # bits a second
    problem: str = ""


class Listener:
    """Answers the measurements of other nodes."""

    def __init__(self, address: str, secret: bytes) -> None:
        """Listen at `address`, on a port that the system chooses."""

        class Server(socketserver.ThreadingTCPServer):
            address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
            daemon_threads = True

        class Answer(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    self.request.settimeout(TIMEOUT_S)
                    answer(self.request, secret)

        self.server = Server((address, 0), Answer)
        self.port = int(self.server.server_address[1])
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self.server.shutdown()
        self.server.server_close()


def answer(connection: socket.socket, secret: bytes) -> None:
    """Return single bytes, then receive as much as comes, and report its speed."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if not secrets.compare_digest(receive(connection, SECRET_BYTES), secret):
        return
    for _ in range(ROUND_TRIPS):
        connection.sendall(receive(connection, 1))
    receive(connection, 1)
    first = time.perf_counter()
    since, now, count = first, first, 0
    while now < first + WARM_UP_S + MEASURED_S and (piece := connection.recv(2**18)):
        now = time.perf_counter()
        if now < first + WARM_UP_S:
            since = now
        else:
            count += len(piece)
    connection.sendall(f"{8 * count / max(now - since, 1e-6):.0f}\n".encode())
    while connection.recv(2**18):  # until the other side has read that
        pass


def receive(connection: socket.socket, count: int) -> bytes:
    """Return exactly `count` bytes; OSError if they do not come."""
    received = b""
    while len(received) < count:
        piece = connection.recv(count - len(received))
        if not piece:
            raise ConnectionError("closed by the other side")
        received += piece
    return received


def measure(source: str, target: str, address: str, port: int, secret: bytes) -> Link:
    """Measure the link from this node to the one that listens at `address`."""
    try:
        with socket.create_connection((address, port), timeout=TIMEOUT_S) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(secret)
            trips = []
            for _ in range(ROUND_TRIPS):
                began = time.perf_counter()
                connection.sendall(b"?")
                receive(connection, 1)
                trips.append(time.perf_counter() - began)
            while not select.select([connection], [], [], 0)[0]:
                connection.sendall(CHUNK)
            # Data in flight is dropped: a slow link would need seconds for it.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with connection.makefile() as lines:
                return Link(source, target, statistics.median(trips), float(lines.readline()))
    except (OSError, ValueError) as error:
        reason = "no answer" if isinstance(error, TimeoutError) else str(error)
        return Link(source, target, problem=f"port {port}: {reason}")


def is_open(address: str, port: int) -> bool:
    """Return whether a process listens at an address and port."""
    try:
        socket.create_connection((address, port), timeout=TIMEOUT_S).close()
    except OSError:
        return False
    return True
