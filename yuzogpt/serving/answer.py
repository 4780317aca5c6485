"""One request on its way: places, deadline, pieces, and a client that may go at any time.

In: a checked request. Out: an HTTP answer, whole or as server-sent events. The request's places are
free again as soon as it ends, in whichever way.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from yuzogpt.inference.requests import Event
from yuzogpt.serving.access import CLIENT_WENT, OUTCOME
from yuzogpt.serving.completions import Completion, to_requests
from yuzogpt.serving.errors import JSON, APIError, to_json
from yuzogpt.serving.metrics import Metrics
from yuzogpt.serving.model_slot import ModelManager
from yuzogpt.serving.protocol import CompletionRequest

LAST_WORDS = 5.0  # seconds to take what is said when nothing is computed any more


class Answer(Response):
    """The answer to a completion request."""

    def __init__(self, wanted: CompletionRequest, serving: ModelManager, metrics: Metrics) -> None:
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
        try:
            await asyncio.wait({answering, going}, return_when=asyncio.FIRST_COMPLETED)
            scope[OUTCOME].status = await answering if answering.done() else CLIENT_WENT
        finally:
            await cancelled(answering)
            await cancelled(going)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> int:
        """Compute and send; return how it ended, as a status."""
        settings = self.serving.settings
        slide = settings.served.context_overflow == "slide"
        with self.serving.now.in_use() as served:
            tokenizer = served.engine.tokenizer
            requests = await asyncio.to_thread(
                to_requests, self.wanted, tokenizer, settings.limits, slide
            )
            with served.driver.call(requests) as call:
                completion = Completion(
                    self.wanted, requests, tokenizer, self.serving.name, served.fingerprint
                )
                self.metrics.prompt_tokens.inc(completion.usage()["prompt_tokens"])
                pieces, refusal = self._pieces(served.driver.events(call), completion), None
                if self.wanted.stream:
                    refusal = await self._send_pieces(send, pieces)
                else:
                    async with self._in_time():
                        async for _ in pieces:
                            pass
        # Its places are free: who does not read takes nothing from others.
        try:
            async with asyncio.timeout(max(LAST_WORDS, self._time_left())):
                if self.wanted.stream:
                    await self._send_end(send, completion, refusal)
                    return refusal.status_code if refusal else 200
                await JSON(completion.whole())(scope, receive, send)
        except TimeoutError:
            return CLIENT_WENT
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

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Refuse what is not done by its deadline, be it a client that does not read."""
        try:
            async with asyncio.timeout(self._time_left()):
                yield
        except TimeoutError:
            deadline = self.serving.settings.limits.deadline
            raise APIError(504, f"not done within {deadline:g} s", code="timeout") from None

    def _time_left(self) -> float:
        return self.started + self.serving.settings.limits.deadline - time.monotonic()

    async def _send_pieces(
        self, send: Send, pieces: AsyncIterator[dict[str, Any]]
    ) -> APIError | None:
        """Send a stream's head and pieces; return why it ended early, if it did."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # nginx in front would hold the stream back
        ]
        try:
            async with self._in_time():
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                async for piece in pieces:
                    await send_event(send, piece)
        except APIError as refusal:  # too late for a status
            return refusal
        return None

    async def _send_end(self, send: Send, completion: Completion, refusal: APIError | None) -> None:
        options = self.wanted.stream_options
        if refusal:
            await send_event(send, refusal.body())
        elif options and options.include_usage:
            await send_event(send, completion.last())
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

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
    body = b"data: " + to_json(content) + b"\n\n"
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
