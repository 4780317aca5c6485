"""The HTTP response to a completion request, whole or as server-sent events.

The request takes up capacity of the engine until it finishes, its deadline passes or its client
disconnects.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from yuzogpt.inference.requests import Event
from yuzogpt.serving.access import CLIENT_CLOSED_REQUEST, OUTCOME_KEY
from yuzogpt.serving.completions import Completion, to_requests
from yuzogpt.serving.errors import APIError, SafeJSONResponse, to_json
from yuzogpt.serving.metrics import Metrics
from yuzogpt.serving.model_slot import ModelManager
from yuzogpt.serving.protocol import CompletionRequest

FINAL_SEND_TIMEOUT_S = 5.0  # for a client to read the rest after all tokens are computed


class CompletionResponse(Response):
    """Runs a completion request and sends its tokens."""

    def __init__(self, request: CompletionRequest, manager: ModelManager, metrics: Metrics) -> None:
        self.request = request
        self.manager = manager
        self.metrics = metrics
        self.background = None
        self.status_code = 200
        self.started = time.monotonic()
        self.last_token: dict[int, float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond, until the client disconnects."""
        response = asyncio.create_task(self._respond(scope, receive, send))
        disconnect = asyncio.create_task(wait_for_disconnect(receive))
        try:
            await asyncio.wait({response, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            status = await response if response.done() else CLIENT_CLOSED_REQUEST
            scope[OUTCOME_KEY].status = status
        finally:
            await cancel(response)
            await cancel(disconnect)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> int:
        """Compute and send; return the outcome as a status."""
        settings = self.manager.settings
        slide = settings.served.context_overflow == "slide"
        with self.manager.current.in_use() as model:
            tokenizer = model.engine.tokenizer
            requests = await asyncio.to_thread(
                to_requests, self.request, tokenizer, settings.limits, slide
            )
            with model.engine_loop.call(requests) as call:
                completion = Completion(
                    self.request, requests, tokenizer, self.manager.name, model.fingerprint
                )
                self.metrics.prompt_tokens.inc(completion.usage()["prompt_tokens"])
                events = model.engine_loop.events(call)
                chunks, error = self._chunks(events, completion), None
                if self.request.stream:
                    error = await self._send_stream(send, chunks)
                else:
                    async with self._within_deadline():
                        async for _ in chunks:
                            pass
        # From here on the request takes up no capacity: a slow reader does not delay others.
        try:
            async with asyncio.timeout(max(FINAL_SEND_TIMEOUT_S, self._time_left())):
                if self.request.stream:
                    await self._end_stream(send, completion, error)
                    return error.status_code if error else 200
                await SafeJSONResponse(completion.whole())(scope, receive, send)
        except TimeoutError:
            return CLIENT_CLOSED_REQUEST
        return 200

    async def _chunks(
        self, events: AsyncIterator[tuple[int, Event]], completion: Completion
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of a stream; complete the response on the way."""
        async for choice, event in events:
            self._measure(choice, event)
            if chunk := completion.add(choice, event):
                yield chunk
        self.metrics.request.observe(time.monotonic() - self.started)

    @contextlib.asynccontextmanager
    async def _within_deadline(self) -> AsyncIterator[None]:
        """Raise APIError at the deadline, also if it is the client that is slow to read."""
        try:
            async with asyncio.timeout(self._time_left()):
                yield
        except TimeoutError:
            deadline = self.manager.settings.limits.deadline
            raise APIError(504, f"not done within {deadline:g} s", code="timeout") from None

    def _time_left(self) -> float:
        return self.started + self.manager.settings.limits.deadline - time.monotonic()

    async def _send_stream(
        self, send: Send, chunks: AsyncIterator[dict[str, Any]]
    ) -> APIError | None:
        """Send a stream's head and chunks; return the error that ended it early, if any."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # otherwise nginx buffers the stream
        ]
        try:
            async with self._within_deadline():
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                async for chunk in chunks:
                    await send_event(send, chunk)
        except APIError as error:  # too late for a status
            return error
        return None

    async def _end_stream(self, send: Send, completion: Completion, error: APIError | None) -> None:
        options = self.request.stream_options
        if error:
            await send_event(send, error.body())
        elif options and options.include_usage:
            await send_event(send, completion.usage_chunk())
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    def _measure(self, choice: int, event: Event) -> None:
        if event.token is None or event.is_prompt:
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


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel(task: "asyncio.Task[Any]") -> None:
    """Cancel a task, and wait until it has cleaned up."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task
