"""`yuzogpt serve`: check the settings, then serve in this process. On Ray: orchestration/serve/."""

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

GRACEFUL_SHUTDOWN_S = 10  # for running requests, after Ctrl-C

Keys = Sequence[bytes]


def check(settings: ServeSettings) -> tuple[ServeSettings, Keys]:
    """Return the settings with absolute paths, and the keys' digests; UserError for a mistake."""
    host = settings.http.host.strip("[]")  # an IPv6 address has them only in a URL
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
            f"--host={settings.http.host}: anyone who can reach it could use it; give "
            "--api_keys_file=FILE, or leave --host out"
        )
    if not keys and "*" in settings.http.allowed_origins:
        raise UserError(
            "--allowed_origins=*: any page in your browser could use it; give "
            "--api_keys_file=FILE, or name the origins"
        )
    capacity = settings.replicas.max_batch + limits.max_waiting
    if limits.max_choices > capacity:
        raise UserError(
            f"--max_choices={limits.max_choices}: there is room for {capacity} requests "
            "(max_batch + max_waiting)"
        )
    return with_changes(located, {"http.host": host}), keys


def is_run(model: str) -> bool:
    """Return True if a model is a run: no published name, and no folder with weights in it."""
    if scheme_of(model):
        return True
    has_weights = any(Path(model, name).exists() for name in (MANIFEST, CONFIG))
    return model not in PUBLISHED and not has_weights


def with_free_port(settings: ServeSettings) -> ServeSettings:
    """Return the settings with a free port; UserError if the one they name is taken."""
    http = settings.http
    try:
        family = socket.getaddrinfo(http.host, http.port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((http.host, http.port))
            port = listener.getsockname()[1]
    except OSError as error:
        raise UserError(
            f"--host={http.host} --port={http.port}: cannot listen there "
            f"({error.strerror or error}); --port=0 takes any port that is free"
        ) from None
    return with_changes(settings, {"http.port": port})


def announce(settings: ServeSettings) -> None:
    """Print the address of the service."""
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

    def engine_failure() -> Exception | None:
        error: Exception | None = app.state.manager.current.engine_loop.failure
        return error

    class Server(LimitedServer):
        limits = settings.limits

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                announce(settings)

        async def on_tick(self, counter: int) -> bool:
            return await super().on_tick(counter) or engine_failure() is not None

    async def serve() -> None:
        # Load the model before the server starts: uvicorn would print a traceback for a UserError.
        async with app.router.lifespan_context(app):
            http = settings.http
            await Server(config).serve(sockets=listen(http.host, http.port))
            if error := engine_failure():
                raise RunFailed(f"the engine failed: {first_line(error)}")

    config = uvicorn.Config(
        app,
        host=settings.http.host,
        port=settings.http.port,
        log_level="warning",
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_S,
        server_header=False,
        lifespan="off",
    )
    with on_sigterm(stop):
        asyncio.run(serve())


def stop() -> None:
    """Stop on SIGTERM."""
    raise Stopped("stopped (SIGTERM)")
