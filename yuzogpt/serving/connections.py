"""A uvicorn server with limits on connections, heads and waiting times.

Used by `yuzogpt serve` and in Ray Serve's proxies (orchestration/serve/proxy.py). uvicorn itself
waits for heads without a limit, and accepts connections until the process is out of file
descriptors.

A connection is waiting while none of its requests is being answered, or while its client reads
nothing of a response. If it waits too long, it is closed. If there are too many connections, the
one that has waited longest is closed: silent connections cannot keep others out.
"""

import asyncio
import errno
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from yuzogpt.config import LimitSettings
from yuzogpt.serving.rate_limited_log import rate_limited_logger

MAX_HEAD_BYTES = 2**16
WRITE_TIMEOUT_S = 60.0  # for a client to read some of a response
RESERVED_DESCRIPTORS = 64  # for everything but connections
MIN_CONNECTIONS = 16  # even with fewer descriptors
BACKLOG = 2048  # connections that the system holds until they are accepted
ACCEPT_RETRY_S = 0.5  # after the system ran out of descriptors or memory

log = rate_limited_logger(__name__)


class Connections(ServerState):
    """The open connections of a server; `waiting`: their deadlines, longest waiting first."""

    def __init__(self, limits: LimitSettings) -> None:
        super().__init__()
        self.head_timeout = limits.head_timeout
        room = max(MIN_CONNECTIONS, free_descriptors() - RESERVED_DESCRIPTORS)
        self.max_connections = min(limits.max_connections, room)
        self.waiting: dict[Connection, float] = {}

    def make_room(self) -> None:
        """If there are too many connections, drop the one that has waited longest."""
        while len(self.connections) > self.max_connections and self.waiting:
            log.warning(
                "%d connections, which is the limit: for each new one, the one that has waited "
                "longest is closed",
                self.max_connections,
            )
            next(iter(self.waiting)).drop()

    def drop_expired(self) -> None:
        """Drop the connections whose deadline has passed."""
        now = asyncio.get_running_loop().time()
        for expired in [each for each, deadline in self.waiting.items() if deadline < now]:
            expired.drop()
        for connection in self.connections:
            if isinstance(connection, Connection) and connection.transport.is_closing():
                # It closes when its client has read the rest, which may be never.
                self.waiting.setdefault(connection, now + WRITE_TIMEOUT_S)


class Connection(H11Protocol):
    """One connection."""

    server_state: Connections

    @property
    def is_answering(self) -> bool:
        """Return True while a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def wait(self, seconds: float) -> None:
        """Start waiting, for at most so many seconds."""
        self.server_state.waiting.pop(self, None)
        self.server_state.waiting[self] = self.loop.time() + seconds

    def drop(self) -> None:
        """Close at once, even with data left to send."""
        self.server_state.waiting.pop(self, None)
        self.connections.discard(self)
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start waiting for a head."""
        super().connection_made(transport)
        self.wait(self.server_state.head_timeout)
        self.server_state.make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        self.server_state.waiting.pop(self, None)

    def handle_events(self) -> None:
        """Parse; stop waiting once a head is complete."""
        super().handle_events()
        if self.is_answering and not self.flow.write_paused:
            self.server_state.waiting.pop(self, None)

    def on_response_complete(self) -> None:
        """Wait for the next head, and for the rest of a body that the client still sends."""
        idle = 0 if self.conn.their_state is h11.SEND_BODY else self.timeout_keep_alive
        if self.flow.write_paused:
            self.wait(WRITE_TIMEOUT_S)
        else:
            self.wait(idle + self.server_state.head_timeout)
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self.wait(WRITE_TIMEOUT_S)

    def resume_writing(self) -> None:
        """Stop waiting for the client to read."""
        super().resume_writing()
        if self.is_answering:
            self.server_state.waiting.pop(self, None)


class Listener:
    """Accepts connections one at a time; asyncio's server accepts all before it handles one."""

    def __init__(self, listening: socket.socket, make: Callable[[], Connection]) -> None:
        """`make` creates the protocol of a connection."""
        listening.setblocking(False)
        listening.listen(BACKLOG)
        self.socket = listening
        self.make = make
        self.task = asyncio.get_running_loop().create_task(self._accept())

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(self.socket)
                # asyncio does not set it here; a body would wait 40 ms for the ACK of its head.
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await loop.connect_accepted_socket(self.make, accepted)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    log.warning("no new connections: %s", error.strerror)
                    await asyncio.sleep(ACCEPT_RETRY_S)

    def close(self) -> None:
        """Stop accepting."""
        self.task.cancel()
        self.socket.close()

    async def wait_closed(self) -> None:
        """Return when accepting has stopped."""
        await asyncio.wait({self.task})


class LimitedServer(uvicorn.Server):
    """uvicorn's server with limits."""

    limits = LimitSettings()

    def __init__(self, config: uvicorn.Config) -> None:
        """Replace what a configuration says about protocols and heads."""
        config.http = Connection
        config.ws = "none"  # a websocket would leave the limits
        config.h11_max_incomplete_event_size = MAX_HEAD_BYTES
        super().__init__(config)
        rate_limited_logger("uvicorn.error")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening."""
        config = self.config
        self.server_state = state = Connections(self.limits)
        if config.is_ssl:  # handshakes are slow, so connections must be accepted concurrently
            await super().startup(sockets)
            return
        listening = sockets or listen(config.host, config.port)
        await super().startup([])

        def make() -> Connection:
            app_state = self.lifespan.state
            return Connection(config=config, server_state=state, app_state=app_state)

        self.servers = [Listener(each, make) for each in listening]  # type: ignore[misc]

    async def on_tick(self, counter: int) -> bool:
        """Drop expired connections, once a second."""
        if counter % 10 == 0 and isinstance(self.server_state, Connections):
            self.server_state.drop_expired()
        return await super().on_tick(counter)


def listen(host: str, port: int) -> list[socket.socket]:
    """Return a socket for each address of a host; OSError if one is taken or there are none."""
    sockets: list[socket.socket] = []
    reason: OSError | None = None
    kinds = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, *_, address in dict.fromkeys(kinds):
        try:
            sockets.append(socket.create_server(address, family=family, backlog=BACKLOG))
        except OSError as error:
            reason = error
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # for example, no IPv6
                break
    else:
        if sockets:
            return sockets
    for each in sockets:
        each.close()
    raise reason or OSError(errno.EADDRNOTAVAIL, f"{host}: no address")


def free_descriptors() -> int:
    """Return the number of files that this process may still open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**20 if limit == resource.RLIM_INFINITY else limit - len([*Path("/dev/fd").iterdir()])
