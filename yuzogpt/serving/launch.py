"""`yuzogpt serve`: what is known to be right before anything starts, and one process without Ray.

In: settings. Out: settings whose paths are absolute, the digests of the keys, and a server that
ends with Ctrl-C. On Ray: orchestration/serve.py.
"""

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path

from yuzogpt.checkpoints.format import MANIFEST
from yuzogpt.checkpoints.locations import with_absolute_paths
from yuzogpt.checkpoints.pretrained import CONFIG, PUBLISHED
from yuzogpt.checkpoints.resolve import resolve_model
from yuzogpt.config import ServeSettings, with_changes
from yuzogpt.console.terminal import say
from yuzogpt.errors import RunFailed, Stopped, UserError, first_line
from yuzogpt.runtime.signals import on_sigterm
from yuzogpt.serving.access import is_loopback, read_keys
from yuzogpt.storage.filesystems import scheme_of

LAST_REQUESTS = 10  # seconds to end what runs, after Ctrl-C

Keys = Sequence[bytes]


def check(settings: ServeSettings) -> tuple[ServeSettings, Keys]:
    """Return the settings made absolute, and the keys; UserError for what could not be served."""
    host = settings.http.host.strip("[]")  # which an IPv6 address has in a URL alone
    located = with_absolute_paths(settings)
    served, limits = located.served, located.limits
    if served.follow and not is_run(served.model):
        raise UserError(
            f"--follow {settings.served.model}: not a run; only runs get better checkpoints"
        )
    resolve_model(served.model, served.context).tokenizer()
    keys = read_keys(limits.api_keys_file)
    if not keys and not is_loopback(host):
        raise UserError(
            f"--host={settings.http.host}: everybody who reaches it could use it; give "
            "--api_keys_file=FILE, or leave --host out"
        )
    if not keys and "*" in settings.http.allowed_origins:
        raise UserError(
            "--allowed_origins=*: any page that you look at could use it; give "
            "--api_keys_file=FILE, or name the origins"
        )
    places = settings.replicas.max_batch + limits.max_waiting
    if limits.max_choices > places:
        raise UserError(
            f"--max_choices={limits.max_choices}: there is room for {places} requests "
            "(max_batch + max_waiting)"
        )
    return with_changes(located, {"http.host": host}), keys


def is_run(model: str) -> bool:
    """Tell whether a model is a run: not a published name, nor a folder with weights itself."""
    inside = model not in PUBLISHED and not scheme_of(model)
    return bool(scheme_of(model)) or (
        inside and not any(Path(model, name).exists() for name in (MANIFEST, CONFIG))
    )


def with_free_port(settings: ServeSettings) -> ServeSettings:
    """Return the settings with a port that can be had; UserError if theirs cannot."""
    http = settings.http
    try:
        family = socket.getaddrinfo(http.host, http.port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((http.host, http.port))
            port = probe.getsockname()[1]
    except OSError as error:
        raise UserError(
            f"--host={http.host} --port={http.port}: cannot listen there "
            f"({error.strerror or error}); --port=0 takes any port that is free"
        ) from None
    return with_changes(settings, {"http.port": port})


def announce(settings: ServeSettings) -> None:
    """Say where the service is."""
    http = settings.http
    host = f"[{http.host}]" if ":" in http.host else http.host
    say(f"serving {settings.served.model} at http://{host}:{http.port}/")


def serve_here(settings: ServeSettings, keys: Keys) -> None:
    """Serve in this process until it is interrupted; RunFailed if the engine fails."""
    import uvicorn

    from yuzogpt.serving.app import build
    from yuzogpt.serving.connections import LimitedServer, listen

    settings = with_free_port(settings)
    app = build(settings, keys)

    def failure() -> Exception | None:
        error: Exception | None = app.state.serving.now.driver.failure
        return error

    class Server(LimitedServer):
        limits = settings.limits

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                announce(settings)

        async def on_tick(self, counter: int) -> bool:
            return await super().on_tick(counter) or failure() is not None

    async def serve() -> None:
        # Loaded before the server starts, which would show a traceback of what a user got wrong.
        async with app.router.lifespan_context(app):
            http = settings.http
            await Server(config).serve(sockets=listen(http.host, http.port))
            if error := failure():
                raise RunFailed(f"the engine failed: {first_line(error)}")

    config = uvicorn.Config(
        app,
        host=settings.http.host,
        port=settings.http.port,
        log_level="warning",
        timeout_graceful_shutdown=LAST_REQUESTS,
        server_header=False,
        lifespan="off",
    )
    with on_sigterm(leave):
        asyncio.run(serve())


def leave() -> None:
    """End on SIGTERM."""
    raise Stopped("stopped (SIGTERM)")
