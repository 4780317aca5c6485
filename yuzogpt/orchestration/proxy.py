"""What Serve's proxy does for the service: it refuses at its door what no replica could take.

In: an ASGI app, Serve's. Out: the same behind a counter. A request that a replica refuses has gone
through proxy, router and replica, which under ten times the load costs more than the answers; here
it costs a header's parsing. And what Serve itself says in plain text (a replica died) is said in
OpenAI's JSON.
"""

import os
import time

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from yuzogpt.serving.access import COUNTED
from yuzogpt.serving.pace import Pace
from yuzogpt.serving.refusals import Refused

# Read by Serve when a proxy starts, and by this module there.
CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
MOST = "YUZOGPT_MOST_REQUESTS"
MOST_OF_A_REASON = 300  # bytes


def environment(most: int) -> dict[str, str]:
    """Return what makes a proxy refuse what is more than so many requests at a time."""
    return {CALLBACK: f"{__name__}:middlewares", MOST: str(most)}


def middlewares() -> list[Middleware]:
    """Return what Serve wraps its app in."""
    return [Middleware(Door, most=int(os.environ[MOST]))]


class Door:
    """ASGI middleware: so many completions at a time, and JSON whatever happens."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        """`most`: what all replicas have places for."""
        self.app = app
        self.most = most
        self.inside = 0
        self.pace = Pace()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on."""
        if scope["type"] != "http" or scope["path"] != COUNTED:
            await self.app(scope, receive, send)
            return
        if self.inside >= self.most:
            message = f"overloaded: {self.inside} requests are running or waiting; try again later"
            refused = Refused(503, message, code="overloaded", retry_after=self.pace.seconds / 2)
            await refused.response()(scope, receive, send)
            return
        self.inside += 1
        answer, since = Answer(send), time.monotonic()
        try:
            await self.app(scope, receive, answer.send)
        finally:
            self.inside -= 1
            if answer.status == 200:
                self.pace.note(time.monotonic() - since)


class Answer:
    """What Serve sends: its own plain text is put into JSON."""

    def __init__(self, send: Send) -> None:
        """Nothing is sent yet."""
        self.status = 0
        self.forward = send
        self.reason: bytes | None = None  # of a failure, as far as it has come

    async def send(self, message: Message) -> None:
        """Send a message on, or in its place one that clients can read."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            kind = Headers(raw=list(message.get("headers", []))).get("content-type", "")
            if self.status >= 400 and kind.startswith("text/plain"):
                self.reason = b""
                return
        if self.reason is None:
            await self.forward(message)
            return
        self.reason += message.get("body", b"")
        if not message.get("more_body"):
            await self._tell(self.reason[:MOST_OF_A_REASON].decode(errors="replace"))

    async def _tell(self, reason: str) -> None:
        failed = Refused(max(500, self.status), f"the service failed: {reason}", retry_after=0)
        answer = failed.response()
        start = {"type": "http.response.start", "status": answer.status_code}
        await self.forward({**start, "headers": answer.raw_headers})
        await self.forward({"type": "http.response.body", "body": answer.body})
