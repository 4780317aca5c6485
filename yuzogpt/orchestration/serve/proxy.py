"""Middleware of Serve's HTTP proxy: it refuses requests for which no replica has room.

A request that a replica refuses has passed through proxy, router and replica; at ten times the load
this costs more than the answers. Here it costs the parsing of a header. Serve's own plain-text
errors (a replica died) become OpenAI's JSON.

The proxy's server is replaced by ours, which limits connections, heads and bodies (serving/
connections.py). Serve has no setting for these; it makes a `uvicorn.Server` after it has called
`middlewares`. Bodies of all paths are limited, because the proxy reads them as fast as they come,
whatever the replica does.
"""

import os
import time

import uvicorn
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from yuzogpt.config import LimitSettings
from yuzogpt.orchestration.environment import PROXY_CALLBACK
from yuzogpt.serving.access import COMPLETIONS_PATH, body_too_large, check_content_length
from yuzogpt.serving.connections import LimitedServer
from yuzogpt.serving.errors import APIError
from yuzogpt.serving.latency import LatencyAverage

# Read by this module in a proxy; neither is needed.
MAX_REQUESTS = "YUZOGPT_MOST_REQUESTS"
LIMITS = "YUZOGPT_LIMITS"  # JSON: those of the settings that are not the defaults
MAX_REASON_BYTES = 300


def environment(max_requests: int, limits: LimitSettings) -> dict[str, str]:
    """Return the variables that make a proxy refuse more requests at a time."""
    changed = limits.model_dump_json(exclude_defaults=True, exclude={"api_keys_file"})
    return {
        PROXY_CALLBACK: f"{__name__}:middlewares",
        MAX_REQUESTS: str(max_requests),
        LIMITS: changed,
    }


def middlewares() -> list[Middleware]:
    """Return what Serve wraps its app in; its server is ours from here on."""
    limits = LimitSettings.model_validate_json(os.environ.get(LIMITS, "{}"))
    LimitedServer.limits = limits
    uvicorn.Server = LimitedServer  # type: ignore[misc]
    max_requests = int(os.environ.get(MAX_REQUESTS, 0)) or limits.max_connections
    return [Middleware(AdmissionMiddleware, max_requests=max_requests, limits=limits)]


class AdmissionMiddleware:
    """ASGI middleware: limits completions at a time, and answers errors in JSON."""

    def __init__(self, app: ASGIApp, max_requests: int, limits: LimitSettings) -> None:
        """`max_requests`: for which all replicas have places."""
        self.app = app
        self.max_requests = max_requests
        self.max_body_bytes = limits.max_body_bytes
        self.active = 0
        self.latency = LatencyAverage()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            check_content_length(Headers(scope=scope), self.max_body_bytes)
        except APIError as refusal:
            await refusal.response()(scope, receive, send)
            return
        is_counted = scope["path"] == COMPLETIONS_PATH and scope["method"] == "POST"
        answer = ErrorRewriter(send, in_json=is_counted)
        receive = self._limited(receive, answer)
        if not is_counted:
            await self.app(scope, receive, answer.send)
            return
        if self.active >= self.max_requests:
            message = f"overloaded: {self.active} requests are running or waiting; try again later"
            refused = APIError(
                503, message, code="overloaded", retry_after=self.latency.seconds / 2
            )
            await refused.response()(scope, receive, send)
            return
        self.active += 1
        since = time.monotonic()
        try:
            await self.app(scope, receive, answer.send)
        finally:
            self.active -= 1
            if answer.status == 200:
                self.latency.update(time.monotonic() - since)

    def _limited(self, receive: Receive, answer: "ErrorRewriter") -> Receive:
        """Return a `receive` that ends at the limit of a body, as if the client had left."""
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen <= self.max_body_bytes:
                return message
            await answer.refuse(body_too_large(self.max_body_bytes))
            return {"type": "http.disconnect"}

        return limited


class ErrorRewriter:
    """Passes on what Serve sends; its own plain-text errors become JSON."""

    def __init__(self, send: Send, in_json: bool) -> None:
        """`in_json`: whether Serve's own errors become JSON."""
        self.in_json = in_json
        self.status = 0
        self.is_refused = False
        self.forward = send
        self.reason: bytes | None = None  # of a failure, as far as it has arrived

    async def send(self, message: Message) -> None:
        """Send a message, or an error in JSON in its place."""
        if self.is_refused:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            kind = Headers(raw=list(message.get("headers", []))).get("content-type", "")
            if self.in_json and self.status >= 400 and kind.startswith("text/plain"):
                self.reason = b""
                return
        if self.reason is None:
            await self.forward(message)
            return
        self.reason += message.get("body", b"")
        if not message.get("more_body"):
            await self._send_error(self.reason[:MAX_REASON_BYTES].decode(errors="replace"))

    async def _send_error(self, reason: str) -> None:
        failed = APIError(max(500, self.status), f"the service failed: {reason}", retry_after=0)
        await self._send_whole(failed.response())

    async def refuse(self, refusal: APIError) -> None:
        """Refuse, unless an answer has begun; nothing else is sent from then on."""
        if not self.status:
            self.status, self.is_refused = refusal.status_code, True
            await self._send_whole(refusal.response())

    async def _send_whole(self, answer: Response) -> None:
        start = {"type": "http.response.start", "status": answer.status_code}
        await self.forward({**start, "headers": answer.raw_headers})
        await self.forward({"type": "http.response.body", "body": answer.body})
