"""What Serve's proxy does for the service: it refuses at its door what no replica could take.

In: an ASGI app, Serve's. Out: the same behind a counter. A request that a replica refuses has gone
through proxy, router and replica, which under ten times the load costs more than the answers; here
it costs a header's parsing. And what Serve itself says in plain text (a replica died) is said in
OpenAI's JSON.

The proxy's server becomes ours, with limits on connections, heads and bodies (serving/
connections.py). Serve has no setting for these, but makes a `uvicorn.Server` after it has called
the hook below, which puts ours in its place. Bodies of all paths are limited: the proxy reads them
as fast as they come, whatever the replica does.
"""

import os
import time

import uvicorn
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from yuzogpt.config import LimitSettings
from yuzogpt.serving.access import COMPLETIONS_PATH, body_too_large, check_content_length
from yuzogpt.serving.connections import LimitedServer
from yuzogpt.serving.errors import APIError
from yuzogpt.serving.latency import LatencyAverage

# Read by Serve when a proxy starts, and by this module there. Only the first is needed.
CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
MOST = "YUZOGPT_MOST_REQUESTS"
LIMITS = "YUZOGPT_LIMITS"  # JSON: those of the settings that are not the defaults
MOST_OF_A_REASON = 300  # bytes


def environment(most: int, limits: LimitSettings) -> dict[str, str]:
    """Return what makes a proxy refuse what is more than so many requests at a time."""
    changed = limits.model_dump_json(exclude_defaults=True, exclude={"api_keys_file"})
    return {CALLBACK: f"{__name__}:middlewares", MOST: str(most), LIMITS: changed}


def middlewares() -> list[Middleware]:
    """Return what Serve wraps its app in; its server is ours from now on."""
    limits = LimitSettings.model_validate_json(os.environ.get(LIMITS, "{}"))
    LimitedServer.limits = limits
    uvicorn.Server = LimitedServer  # type: ignore[misc]
    most = int(os.environ.get(MOST, 0)) or limits.max_connections
    return [Middleware(AdmissionMiddleware, most=most, limits=limits)]


class AdmissionMiddleware:
    """ASGI middleware: so many completions at a time, and JSON whatever happens."""

    def __init__(self, app: ASGIApp, most: int, limits: LimitSettings) -> None:
        """`most`: what all replicas have places for."""
        self.app = app
        self.most = most
        self.most_of_a_body = limits.max_body_bytes
        self.inside = 0
        self.pace = LatencyAverage()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            check_content_length(Headers(scope=scope), self.most_of_a_body)
        except APIError as refusal:
            await refusal.response()(scope, receive, send)
            return
        is_counted = scope["path"] == COMPLETIONS_PATH and scope["method"] == "POST"
        answer = Answer(send, in_json=is_counted)
        receive = self._limited(receive, answer)
        if not is_counted:
            await self.app(scope, receive, answer.send)
            return
        if self.inside >= self.most:
            message = f"overloaded: {self.inside} requests are running or waiting; try again later"
            refused = APIError(503, message, code="overloaded", retry_after=self.pace.seconds / 2)
            await refused.response()(scope, receive, send)
            return
        self.inside += 1
        since = time.monotonic()
        try:
            await self.app(scope, receive, answer.send)
        finally:
            self.inside -= 1
            if answer.status == 200:
                self.pace.update(time.monotonic() - since)

    def _limited(self, receive: Receive, answer: "Answer") -> Receive:
        """Return `receive` that ends at the limit of a body, as if the client went there."""
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen <= self.most_of_a_body:
                return message
            await answer.refuse(body_too_large(self.most_of_a_body))
            return {"type": "http.disconnect"}

        return limited


class Answer:
    """What Serve sends: its own plain text is put into JSON."""

    def __init__(self, send: Send, in_json: bool) -> None:
        """`in_json`: whether Serve's own words are put into JSON."""
        self.in_json = in_json
        self.status = 0
        self.is_refused = False
        self.forward = send
        self.reason: bytes | None = None  # of a failure, as far as it has come

    async def send(self, message: Message) -> None:
        """Send a message on, or in its place one that clients can read."""
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
            await self._tell(self.reason[:MOST_OF_A_REASON].decode(errors="replace"))

    async def _tell(self, reason: str) -> None:
        failed = APIError(max(500, self.status), f"the service failed: {reason}", retry_after=0)
        await self._send_whole(failed.response())

    async def refuse(self, refused: APIError) -> None:
        """Refuse, unless an answer has begun; nothing else is sent from now on."""
        if not self.status:
            self.status, self.is_refused = refused.status_code, True
            await self._send_whole(refused.response())

    async def _send_whole(self, answer: Response) -> None:
        start = {"type": "http.response.start", "status": answer.status_code}
        await self.forward({**start, "headers": answer.raw_headers})
        await self.forward({"type": "http.response.body", "body": answer.body})
