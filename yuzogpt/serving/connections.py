"""Connections: how many, how large a head may be, and how long each may be waited for.

In: an ASGI app. Out: a uvicorn server for it, in `yuzogpt serve` and in Ray Serve's proxies
(orchestration/proxy.py). By itself uvicorn waits for heads without end, and accepts connections
until the process has no file descriptor left.

A connection waits while no request of it is being answered, or while its client takes nothing of
an answer. Those that wait too long are closed. If there are too many connections, the one that has
waited longest makes room: silent ones cannot keep others out.
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
from yuzogpt.serving.sparing import sparing_logger

MOST_OF_A_HEAD = 2**16  # bytes
TAKEN_WITHIN = 60.0  # seconds: at least some of an answer that waits to be read
SPARE = 64  # file descriptors that connections leave to everything else
FEWEST = 16  # connections, however few descriptors there are
BACKLOG = 2048  # connections that the system holds until they are accepted
PAUSE = 0.5  # seconds, after the system could not give a connection

log = sparing_logger(__name__)


class Connections(ServerState):
    """The open connections of a server; `waiting`: until when, longest first."""

    def __init__(self, limits: LimitSettings) -> None:
        """`limits`: how many, and for how long."""
        super().__init__()
        self.head_timeout = limits.head_timeout
        self.most = min(limits.max_connections, max(FEWEST, free_descriptors() - SPARE))
        self.waiting: dict[Connection, float] = {}

    def make_room(self) -> None:
        """Drop the connection that has waited longest, if there are too many."""
        while len(self.connections) > self.most and self.waiting:
            log.warning(
                "%d connections, the most there may be: the one that has waited longest is closed "
                "for each new one",
                self.most,
            )
            next(iter(self.waiting)).drop()

    def drop_late(self) -> None:
        """Drop the connections that have waited too long."""
        now = asyncio.get_running_loop().time()
        for one in [one for one, until in self.waiting.items() if until < now]:
            one.drop()
        for connection in self.connections:
            if isinstance(connection, Connection) and connection.transport.is_closing():
                # What is left to send, before it is closed, may never be taken.
                self.waiting.setdefault(connection, now + TAKEN_WITHIN)


class Connection(H11Protocol):
    """One connection."""

    server_state: Connections

    @property
    def is_answering(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def wait(self, seconds: float) -> None:
        """Wait, from now on."""
        self.server_state.waiting.pop(self, None)
        self.server_state.waiting[self] = self.loop.time() + seconds

    def drop(self) -> None:
        """Close it at once, whatever is left to send."""
        self.server_state.waiting.pop(self, None)
        self.connections.discard(self)
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a head."""
        super().connection_made(transport)
        self.wait(self.server_state.head_timeout)
        self.server_state.make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing."""
        super().connection_lost(exc)
        self.server_state.waiting.pop(self, None)

    def handle_events(self) -> None:
        """Read; a head that is whole is not waited for any more."""
        super().handle_events()
        if self.is_answering and not self.flow.write_paused:
            self.server_state.waiting.pop(self, None)

    def on_response_complete(self) -> None:
        """Wait for the next head, and for what the client still sends of a body."""
        idle = 0 if self.conn.their_state is h11.SEND_BODY else self.timeout_keep_alive
        is_taken = not self.flow.write_paused
        self.wait(idle + self.server_state.head_timeout if is_taken else TAKEN_WITHIN)
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Wait for the client to take some of what is sent."""
        super().pause_writing()
        self.wait(TAKEN_WITHIN)

    def resume_writing(self) -> None:
        """Answer on."""
        super().resume_writing()
        if self.is_answering:
            self.server_state.waiting.pop(self, None)


class Listener:
    """Accepts connections one at a time; asyncio's own takes all there are before it looks."""

    def __init__(self, listening: socket.socket, make: Callable[[], Connection]) -> None:
        """`make`: the protocol of a connection."""
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
                # asyncio leaves it out; an answer's body would wait 40 ms for its head's receipt.
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await loop.connect_accepted_socket(self.make, accepted)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    log.warning("no new connections: %s", error.strerror)
                    await asyncio.sleep(PAUSE)

    def close(self) -> None:
        """Accept no more."""
        self.task.cancel()
        self.socket.close()

    async def wait_closed(self) -> None:
        """Return when it is closed."""
        await asyncio.wait({self.task})


class LimitedServer(uvicorn.Server):
    """uvicorn's server, with limits."""

    limits = LimitSettings()

    def __init__(self, config: uvicorn.Config) -> None:
        """Take a server's configuration, and change in it what decides over connections."""
        config.http = Connection
        config.ws = "none"  # it would take a connection out of our hands
        config.h11_max_incomplete_event_size = MOST_OF_A_HEAD
        super().__init__(config)
        sparing_logger("uvicorn.error")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        config = self.config
        self.server_state = state = Connections(self.limits)
        if config.is_ssl:  # a handshake takes its time: connections are accepted side by side
            await super().startup(sockets)
            return
        listening = sockets or listen(config.host, config.port)
        await super().startup([])

        def make() -> Connection:
            app_state = self.lifespan.state
            return Connection(config=config, server_state=state, app_state=app_state)

        self.servers = [Listener(one, make) for one in listening]  # type: ignore[misc]

    async def on_tick(self, counter: int) -> bool:
        """Close what is late, once a second."""
        if counter % 10 == 0 and isinstance(self.server_state, Connections):
            self.server_state.drop_late()
        return await super().on_tick(counter)


def listen(host: str, port: int) -> list[socket.socket]:
    """Return sockets for all addresses of a host that this machine has; OSError if none is free."""
    found: list[socket.socket] = []
    reason: OSError | None = None
    kinds = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, *_, address in dict.fromkeys(kinds):
        try:
            found.append(socket.create_server(address, family=family, backlog=BACKLOG))
        except OSError as error:
            reason = error
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # such as no IPv6
                break
    else:
        if found:
            return found
    for one in found:
        one.close()
    raise reason or OSError(errno.EADDRNOTAVAIL, f"{host}: no address")


def free_descriptors() -> int:
    """Return how many more files this process may open."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**20 if most == resource.RLIM_INFINITY else most - len([*Path("/dev/fd").iterdir()])
