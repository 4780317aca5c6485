"""How fast a node reaches another: plain TCP, so that a closed port holds up nothing else.

In: an address and a port on which another node listens. Out: seconds there and back, and bits a
second. Each measurement begins with a secret, so that a stranger's connection is closed at once.
"""

import contextlib
import secrets
import socket
import socketserver
import statistics
import threading
import time
from dataclasses import dataclass

SECRET = 16  # bytes
ROUND_TRIPS = 20
SENDING = 0.25  # seconds
BUFFER = 2**20  # bytes on the way: what a slow link still has to swallow after SENDING
PIECE = bytes(2**16)
PATIENCE = 5.0  # seconds


@dataclass(frozen=True)
class Link:
    """What was measured from one node to another."""

    source: str
    target: str
    latency: float = 0.0  # seconds, there and back, the median
    bandwidth: float = 0.0  # bits a second
    problem: str = ""


class Listener:
    """Waits on a node for the measurements of the others."""

    def __init__(self, address: str, secret: bytes) -> None:
        """Listen at `address`, on a port that the system chooses."""

        class Answer(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    self.request.settimeout(PATIENCE)
                    answer(self.request, secret)

        self.server = socketserver.ThreadingTCPServer((address, 0), Answer)
        self.server.daemon_threads = True
        self.port = int(self.server.server_address[1])
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        self.server.shutdown()
        self.server.server_close()


def answer(connection: socket.socket, secret: bytes) -> None:
    """Send back single bytes, then take in all that comes, and say how fast it came."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if not secrets.compare_digest(receive(connection, SECRET), secret):
        return
    for _ in range(ROUND_TRIPS):
        connection.sendall(receive(connection, 1))
    count, began = 0, time.perf_counter()
    while piece := connection.recv(2**18):
        if count == 0:
            began = time.perf_counter()
        count += len(piece)
    seconds = max(time.perf_counter() - began, 1e-6)
    connection.sendall(f"{8 * count / seconds:.0f}\n".encode())


def receive(connection: socket.socket, count: int) -> bytes:
    """Return exactly so many bytes; OSError if they do not come."""
    found = b""
    while len(found) < count:
        piece = connection.recv(count - len(found))
        if not piece:
            raise ConnectionError("closed by the other side")
        found += piece
    return found


def measure(source: str, target: str, address: str, port: int, secret: bytes) -> Link:
    """Measure the link from this node to the one that listens there."""
    try:
        with socket.create_connection((address, port), timeout=PATIENCE) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            connection.sendall(secret)
            trips = []
            for _ in range(ROUND_TRIPS):
                began = time.perf_counter()
                connection.sendall(b"?")
                receive(connection, 1)
                trips.append(time.perf_counter() - began)
            deadline = time.perf_counter() + SENDING
            while time.perf_counter() < deadline:
                connection.sendall(PIECE)
            connection.shutdown(socket.SHUT_WR)
            with connection.makefile() as lines:
                return Link(source, target, statistics.median(trips), float(lines.readline()))
    except (OSError, ValueError) as error:
        reason = "no answer" if isinstance(error, TimeoutError) else str(error)
        return Link(source, target, problem=f"port {port}: {reason}")


def is_open(address: str, port: int) -> bool:
    """Tell whether somebody listens there."""
    try:
        socket.create_connection((address, port), timeout=PATIENCE).close()
    except OSError:
        return False
    return True
