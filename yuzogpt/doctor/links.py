"""How fast a node reaches another: plain TCP, so that a closed port holds up nothing else.

In: an address and a port on which another node listens. Out: seconds there and back, and bits a
second. Each measurement begins with a secret, so that a stranger's connection is closed at once.
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

SECRET = 16  # bytes
ROUND_TRIPS = 20
WARM_UP = 0.1  # seconds, in which TCP learns how much the link takes
COUNTED = 0.4  # seconds after these: less, and a busy core looks like a slow link
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

        class Server(socketserver.ThreadingTCPServer):
            address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
            daemon_threads = True

        class Answer(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    self.request.settimeout(PATIENCE)
                    answer(self.request, secret)

        self.server = Server((address, 0), Answer)
        self.port = int(self.server.server_address[1])
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        self.server.shutdown()
        self.server.server_close()


def answer(connection: socket.socket, secret: bytes) -> None:
    """Send back single bytes, then take in what comes, and say how fast it came."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if not secrets.compare_digest(receive(connection, SECRET), secret):
        return
    for _ in range(ROUND_TRIPS):
        connection.sendall(receive(connection, 1))
    receive(connection, 1)
    first = time.perf_counter()
    since, now, count = first, first, 0
    while now < first + WARM_UP + COUNTED and (piece := connection.recv(2**18)):
        now = time.perf_counter()
        if now < first + WARM_UP:
            since = now
        else:
            count += len(piece)
    connection.sendall(f"{8 * count / max(now - since, 1e-6):.0f}\n".encode())
    while connection.recv(2**18):  # until the other side has read that
        pass


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
            connection.sendall(secret)
            trips = []
            for _ in range(ROUND_TRIPS):
                began = time.perf_counter()
                connection.sendall(b"?")
                receive(connection, 1)
                trips.append(time.perf_counter() - began)
            while not select.select([connection], [], [], 0)[0]:
                connection.sendall(PIECE)
            # What is on the way is thrown away: a slow link would need seconds for it.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
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
