"""The service: OpenAI's completions, what it serves, how it is, and a page to try it on.

In: settings. Out: an ASGI app, which uvicorn runs in one process and Ray Serve on many.

    POST /v1/completions     protocol.py: what may be asked; completions.py: what is answered
    GET  /v1/models          what is served: its step, its arithmetic, its limits
    GET  /healthz            200 while the engine works
    GET  /metrics            Prometheus
    GET  /v1/run             the loss curve of the run that is served
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
from yuzogpt.serving import metrics
from yuzogpt.serving.access import CLIENT_WENT, AuthMiddleware
from yuzogpt.serving.answer import Answer
from yuzogpt.serving.errors import JSON, APIError, error_body
from yuzogpt.serving.loss_curve import LossCurve
from yuzogpt.serving.metrics import Metrics
from yuzogpt.serving.model_slot import LoadedModel, ModelManager
from yuzogpt.serving.protocol import read_request

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
READ = ["GET", "HEAD"]
# The page asks nobody but this server for anything.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

Texts = Callable[[str], Awaitable[Mapping[str, str]]]


def build(
    settings: ServeSettings,
    keys: Sequence[bytes] = (),
    of_all_replicas: Texts | None = None,
) -> FastAPI:
    """Return the app; its model is loaded when it starts.

    `keys`: SHA-256 of those who may ask; `of_all_replicas`: from this one's metrics to those of
    each.
    """
    serving, numbers = ModelManager(settings), Metrics()
    curve = LossCurve(settings.served.model)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with serving.at_work():
            app.state.serving = serving
            yield

    # No /docs: FastAPI's would load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    most = settings.replicas.span()[1]
    app.add_middleware(
        AuthMiddleware, keys=keys, limits=settings.limits, replicas=most, requests=numbers.requests
    )
    if settings.http.allowed_origins:  # outermost: a browser asks before it sends a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.http.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    answer_mistakes(app)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        wanted = read_request(await request.body(), request.headers.get("content-type", ""))
        if wanted.model != serving.name:
            raise APIError(
                404,
                f"model {wanted.model!r} is not served here; {serving.name!r} is",
                param="model",
                code="model_not_found",
            )
        return Answer(wanted, serving, numbers)

    @app.post("/v1/chat/completions")
    async def chat() -> Response:
        raise APIError(
            404,
            "chat completions are not served yet; send the text to go on with, as `prompt`, to "
            "/v1/completions",
        )

    @app.api_route("/v1/models", methods=READ)
    async def models() -> Response:
        return JSON({"object": "list", "data": [describe(serving, serving.now)]})

    @app.api_route("/v1/models/{name:path}", methods=READ)
    async def model(name: str) -> Response:
        if name != serving.name:
            raise APIError(404, f"model {name!r} is not served here", code="model_not_found")
        return JSON(describe(serving, serving.now))

    @app.api_route("/healthz", methods=READ)
    async def healthz() -> Response:
        if serving.now.driver.failure:
            raise APIError(503, "the engine has failed")
        return JSON({"status": "ok"})

    @app.api_route("/metrics", methods=READ)
    async def prometheus() -> Response:
        text = text_of(numbers, serving)
        if of_all_replicas:
            text = metrics.merge(await of_all_replicas(text))
        return PlainTextResponse(text, media_type=metrics.CONTENT_TYPE)

    @app.api_route("/v1/run", methods=READ)
    async def run() -> Response:
        return JSON({**await asyncio.to_thread(curve.read), "step": serving.now.step})

    for path, name in PAGE_FILES.items():
        app.add_api_route(path, page_file(PAGE / name), methods=READ)
    app.state.metrics_text = lambda: text_of(numbers, serving)
    return app


def page_file(path: Path) -> Callable[[], Awaitable[Response]]:
    """Return the handler that sends a file of the page: from memory, as anybody may ask for it."""
    content, kind = path.read_bytes(), guess_type(path.name)[0]

    async def send() -> Response:
        return Response(content, headers=PAGE_HEADERS, media_type=kind)

    return send


def describe(serving: ModelManager, served: LoadedModel) -> dict[str, Any]:
    """Return what a client may want to know of the model."""
    settings, engine = serving.settings, served.engine
    return {
        "id": serving.name,
        "object": "model",
        "created": served.created,
        "owned_by": "yuzogpt",
        "step": served.step,
        "val_loss_estimate": served.val_loss,
        "fingerprint": served.fingerprint,
        "follows_its_run": settings.served.follow,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "device": engine.device.type,
        # The same request gives the same text whatever else runs, to the last bit.
        "batch_invariant": engine.batch_invariant,
        "context_length": engine.shape.block_size,
        "context_overflow": settings.served.context_overflow,
        "vocabulary": engine.shape.vocab_size,
        "max_batch": engine.slots,
        "max_prompt_tokens": settings.limits.max_prompt_tokens,
        "max_new_tokens": settings.limits.max_new_tokens,
        "max_choices": settings.limits.max_choices,
    }


def text_of(numbers: Metrics, serving: ModelManager) -> str:
    """Return the metrics, with those that are looked at now."""
    served, drivers = serving.now, [one.driver for one in serving.working]
    numbers.running.set(sum(driver.running for driver in drivers))
    numbers.waiting.set(sum(driver.waiting for driver in drivers))
    numbers.slots.set(served.engine.slots)
    numbers.step.set(served.step or 0)
    numbers.val_loss.set(float("nan") if served.val_loss is None else served.val_loss)
    return numbers.text()


def answer_mistakes(app: FastAPI) -> None:
    """Give every error OpenAI's form."""

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if isinstance(error, APIError):
            return error.response()
        detail = str(error.detail)
        if error.status_code in (404, 405):
            asked = f"{request.method} {request.url.path}"
            detail = f"{asked} is not served here; POST /v1/completions and GET /v1/models are"
        return JSON(error_body(error.status_code, detail), error.status_code, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_WENT)

    @app.exception_handler(UserError)
    async def user_error(_: Request, error: UserError) -> Response:
        return APIError(400, str(error)).response()

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return APIError(500, f"unexpected: {type(error).__name__}; see the log").response()
