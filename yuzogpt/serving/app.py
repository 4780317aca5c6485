"""The HTTP service as an ASGI app. uvicorn runs it in one process, Ray Serve on many.

POST /v1/completions     OpenAI's completions: protocol.py, completions.py
GET  /v1/models          the served model: its step, dtype and limits
GET  /healthz            200 while the engine works
GET  /metrics            Prometheus
GET  /v1/run             the loss curve of the served run
GET  /                   the page
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from mimetypes import guess_type
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response

from yuzogpt.config import ServeSettings
from yuzogpt.errors import UserError
from yuzogpt.serving.access import CLIENT_CLOSED_REQUEST, AuthMiddleware
from yuzogpt.serving.answer import CompletionResponse
from yuzogpt.serving.errors import APIError, SafeJSONResponse, error_body
from yuzogpt.serving.loss_curve import LossCurve
from yuzogpt.serving.metrics import CONTENT_TYPE, Metrics, merge
from yuzogpt.serving.model_slot import ModelManager
from yuzogpt.serving.protocol import parse_request

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
READ_METHODS = ["GET", "HEAD"]
# The page may load and send data only from and to this server.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

# From this replica's metrics to those of every replica, by name.
GatherMetrics = Callable[[str], Awaitable[Mapping[str, str]]]


def build(
    settings: ServeSettings,
    keys: Sequence[bytes] = (),
    gather_metrics: GatherMetrics | None = None,
) -> FastAPI:
    """Return the app; its model is loaded when it starts. `keys`: SHA-256 of the API keys."""
    manager, metrics = ModelManager(settings), Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with manager.running():
            app.state.manager = manager
            yield

    # No /docs: FastAPI's page would load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(
        AuthMiddleware,
        keys=keys,
        limits=settings.limits,
        replicas=settings.replicas.span()[1],
        request_counter=metrics.requests,
    )
    if settings.http.allowed_origins:  # outermost: a browser's preflight request has no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.http.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    add_error_handlers(app)
    add_openai_routes(app, manager, metrics)
    add_status_routes(app, manager, metrics, gather_metrics)
    for path, name in PAGE_FILES.items():
        app.add_api_route(path, page_file(PAGE / name), methods=READ_METHODS)
    app.state.metrics_text = lambda: metrics_text(metrics, manager)
    return app


def add_openai_routes(app: FastAPI, manager: ModelManager, metrics: Metrics) -> None:
    """Add OpenAI's API: completions and models."""

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = parse_request(await request.body(), request.headers.get("content-type", ""))
        if body.model != manager.name:
            raise APIError(
                404,
                f"model {body.model!r} is not served here; {manager.name!r} is",
                param="model",
                code="model_not_found",
            )
        return CompletionResponse(body, manager, metrics)

    @app.post("/v1/chat/completions")
    async def chat() -> Response:
        raise APIError(
            404,
            "chat completions are not supported; send the text to continue, as `prompt`, to "
            "/v1/completions",
        )

    @app.api_route("/v1/models", methods=READ_METHODS)
    async def models() -> Response:
        return SafeJSONResponse({"object": "list", "data": [describe(manager)]})

    @app.api_route("/v1/models/{name:path}", methods=READ_METHODS)
    async def model(name: str) -> Response:
        if name != manager.name:
            raise APIError(404, f"model {name!r} is not served here", code="model_not_found")
        return SafeJSONResponse(describe(manager))


def add_status_routes(
    app: FastAPI, manager: ModelManager, metrics: Metrics, gather_metrics: GatherMetrics | None
) -> None:
    """Add what watches the service: health, metrics, the loss curve."""
    curve = LossCurve(manager.settings.served.model)

    @app.api_route("/healthz", methods=READ_METHODS)
    async def healthz() -> Response:
        if manager.current.engine_loop.failure:
            raise APIError(503, "the engine has failed")
        return SafeJSONResponse({"status": "ok"})

    @app.api_route("/metrics", methods=READ_METHODS)
    async def prometheus() -> Response:
        text = metrics_text(metrics, manager)
        if gather_metrics:
            text = merge(await gather_metrics(text))
        return PlainTextResponse(text, media_type=CONTENT_TYPE)

    @app.api_route("/v1/run", methods=READ_METHODS)
    async def run() -> Response:
        points = await asyncio.to_thread(curve.read)
        return SafeJSONResponse({**points, "step": manager.current.step})


def page_file(path: Path) -> Callable[[], Awaitable[Response]]:
    """Return the handler that sends a file of the page, from memory: the path needs no key."""
    content, kind = path.read_bytes(), guess_type(path.name)[0]

    async def send() -> Response:
        return Response(content, headers=PAGE_HEADERS, media_type=kind)

    return send


def describe(manager: ModelManager) -> dict[str, Any]:
    """Return the entry of the served model in /v1/models."""
    settings, model = manager.settings, manager.current
    engine = model.engine
    return {
        "id": manager.name,
        "object": "model",
        "created": model.created,
        "owned_by": "yuzogpt",
        "step": model.step,
        "val_loss_estimate": model.val_loss,
        "fingerprint": model.fingerprint,
        "follows_its_run": settings.served.follow,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "device": engine.device.type,
        # True: a request gives the same bits whatever else is in the batch.
        "batch_invariant": engine.batch_invariant,
        "context_length": engine.shape.block_size,
        "context_overflow": settings.served.context_overflow,
        "vocabulary": engine.shape.vocab_size,
        "max_batch": engine.slots,
        "max_prompt_tokens": settings.limits.max_prompt_tokens,
        "max_new_tokens": settings.limits.max_new_tokens,
        "max_choices": settings.limits.max_choices,
    }


def metrics_text(metrics: Metrics, manager: ModelManager) -> str:
    """Return the metrics as text, with the gauges set to their present values."""
    model, loops = manager.current, [loaded.engine_loop for loaded in manager.loaded]
    metrics.running.set(sum(loop.running for loop in loops))
    metrics.waiting.set(sum(loop.waiting for loop in loops))
    metrics.slots.set(model.engine.slots)
    metrics.step.set(model.step or 0)
    metrics.val_loss.set(float("nan") if model.val_loss is None else model.val_loss)
    return metrics.text()


def add_error_handlers(app: FastAPI) -> None:
    """Return every error in OpenAI's JSON."""

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if isinstance(error, APIError):
            return error.response()
        detail = str(error.detail)
        if error.status_code in (404, 405):
            line = f"{request.method} {request.url.path}"
            detail = f"{line} is not served here; POST /v1/completions and GET /v1/models are"
        return SafeJSONResponse(
            error_body(error.status_code, detail), error.status_code, error.headers
        )

    @app.exception_handler(ClientDisconnect)
    async def disconnected(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(UserError)
    async def user_error(_: Request, error: UserError) -> Response:
        return APIError(400, str(error)).response()

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return APIError(500, f"unexpected: {type(error).__name__}; see the log").response()
