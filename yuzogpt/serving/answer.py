"""One request on its way: places, deadline, pieces, and a client that may go at any time.

In: a checked request. Out: an HTTP answer, whole or as server-sent events. The request's places are
free again as soon as it ends, in whichever way.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from yuzogpt.errors import UserError
from yuzogpt.sampling.requests import Event
from yuzogpt.serving.completions import Completion, to_requests
from yuzogpt.serving.metrics import Metrics
from yuzogpt.serving.protocol import CompletionRequest
from yuzogpt.serving.refusals import Refused
from yuzogpt.serving.served import Serving

CLIENT_WENT = 499  # nginx's status for it, in metrics only


class Answer(Response):
    """The answer to a completion request."""

    def __init__(self, wanted: CompletionRequest, serving: Serving, metrics: Metrics) -> None:
        """Nothing is done before it is sent."""
        self.wanted = wanted
        self.serving = serving
        self.metrics = metrics
        self.background = None
        self.status_code = 200
        self.started = time.monotonic()
        self.last_token: dict[int, float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client goes before the end."""
        answering = asyncio.create_task(self._answer(scope, receive, send))
        going = asyncio.create_task(gone(receive))
        status = CLIENT_WENT
        try:
            await asyncio.wait({answering, going}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                status = await answering
        except Refused as refusal:
            status = refusal.status_code
            raise
        except UserError:
            status = 400
            raise
        finally:
            self.metrics.requests.labels(str(status)).inc()
            await cancelled(answering)
            await cancelled(going)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> int:
        """Compute and send; return the status."""
        settings = self.serving.settings
        slide = settings.served.context_overflow == "slide"
        with self.serving.now.in_use() as served:
            tokenizer = served.engine.tokenizer
            requests = await asyncio.to_thread(
                to_requests, self.wanted, tokenizer, settings.limits, slide
            )
            completion = Completion(
                self.wanted, requests, tokenizer, self.serving.name, served.fingerprint
            )
            with served.driver.call(requests) as call:
                pieces = self._pieces(served.driver.events(call), completion)
                if self.wanted.stream:
                    return await self._send_stream(send, pieces, completion)
                async with self._in_time():
                    async for _ in pieces:
                        pass
            await JSONResponse(completion.whole())(scope, receive, send)
        return 200

    async def _pieces(
        self, events: AsyncIterator[tuple[int, Event]], completion: Completion
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield what a stream says."""
        async for choice, event in events:
            self._measure(choice, event)
            if piece := completion.add(choice, event):
                yield piece
        self.metrics.request.observe(time.monotonic() - self.started)
        self.metrics.prompt_tokens.inc(completion.usage()["prompt_tokens"])

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Refuse what is not done by its deadline, be it a client that does not read."""
        deadline = self.serving.settings.limits.deadline
        try:
            async with asyncio.timeout(deadline - (time.monotonic() - self.started)):
                yield
        except TimeoutError:
            raise Refused(504, f"not done within {deadline:g} s", code="timeout") from None

    async def _send_stream(
        self, send: Send, pieces: AsyncIterator[dict[str, Any]], completion: Completion
    ) -> int:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # nginx in front would hold the stream back
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        status = 200
        try:
            async with self._in_time():
                async for piece in pieces:
                    await send_event(send, piece)
            options = self.wanted.stream_options
            if options and options.include_usage:
                await send_event(send, completion.last())
        except Refused as refusal:  # too late for a status
            status = refusal.status_code
            await send_event(send, refusal.body())
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        return status

    def _measure(self, choice: int, event: Event) -> None:
        if event.token is None or event.of_prompt:
            return
        now = time.monotonic()
        self.metrics.new_tokens.inc()
        if choice in self.last_token:
            self.metrics.token.observe(now - self.last_token[choice])
        elif not self.last_token:
            self.metrics.first_token.observe(now - self.started)
        self.last_token[choice] = now


async def send_event(send: Send, content: dict[str, Any]) -> None:
    """Send one server-sent event."""
    body = f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def gone(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancelled(task: "asyncio.Task[Any]") -> None:
    """Cancel a task, and wait until it has cleaned up."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task
