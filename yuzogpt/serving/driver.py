"""The loop that runs the engine: one step at a time, in a thread of its own.

While a step computes, the event loop is free: it admits or refuses requests, and notices clients
that disconnect. New and cancelled requests reach the engine between two steps, so there are no
locks.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from yuzogpt.inference.engine import Engine
from yuzogpt.inference.requests import Event, Request
from yuzogpt.serving.errors import APIError
from yuzogpt.serving.latency import LatencyAverage


@dataclass(eq=False)
class Call:
    """The choices of one completion request: each is a request to the engine."""

    requests: Sequence[Request]
    unfinished: int
    events: asyncio.Queue[tuple[int, Event] | APIError] = field(default_factory=asyncio.Queue)
    choices: dict[int, int] = field(default_factory=dict)  # by the engine's request id


class EngineLoop:
    """An engine and the calls that wait for it. Created and used on one event loop."""

    @classmethod
    async def start(cls, load: Callable[[], Engine], max_waiting: int) -> "EngineLoop":
        """Load an engine and start its loop; `max_waiting`: requests that may wait for a slot.

        The thread that runs the engine also loads it. OpenMP gives every thread that has ever
        computed its own team; if all teams have more threads than there are cores, they sleep
        instead of spinning, and a step takes 1.4 times as long (GNU's libgomp, 2 cores).
        """
        thread = ThreadPoolExecutor(1, "engine")
        try:
            engine = await asyncio.get_running_loop().run_in_executor(thread, load)
        except BaseException:
            thread.shutdown(wait=False)
            raise
        return cls(engine, thread, max_waiting)

    def __init__(self, engine: Engine, thread: ThreadPoolExecutor, max_waiting: int) -> None:
        """Use `start` instead."""
        self.engine = engine
        self.thread = thread
        self.capacity = engine.slots + max_waiting
        self.admitted = 0
        self.latency = LatencyAverage()
        self.failure: Exception | None = None
        self.calls: dict[int, Call] = {}  # by the engine's request id
        self.submitted: list[Call] = []
        self.cancelled: list[Call] = []
        self.wake_up = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    @property
    def running(self) -> int:
        """Number of requests that have a slot."""
        return len(self.engine.running)

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a slot."""
        submitted = sum(len(call.requests) for call in self.submitted if call not in self.cancelled)
        return len(self.engine.waiting) + submitted

    @contextlib.contextmanager
    def call(self, requests: Sequence[Request]) -> Iterator[Call]:
        """Hold capacity for requests until they finish or the block ends, which cancels them.

        Before anything is computed, raise UserError for an invalid request, and APIError if there
        is no capacity for all of them.
        """
        call, since = self._admit(requests), time.monotonic()
        try:
            yield call
        finally:
            if call.unfinished:
                self.admitted -= call.unfinished
                self.cancelled.append(call)
                self.wake_up.set()
            else:
                self.latency.update(time.monotonic() - since)

    async def events(self, call: Call) -> AsyncIterator[tuple[int, Event]]:
        """Yield (choice, event) until all choices of a call have ended."""
        while call.unfinished:
            item = await call.events.get()
            if isinstance(item, APIError):
                raise item
            if item[1].finish:
                call.unfinished -= 1
                self.admitted -= 1
            yield item

    def _admit(self, requests: Sequence[Request]) -> Call:
        for request in requests:
            self.engine.check(request)
        if self.failure:
            raise self._failed()
        if len(requests) > self.capacity:
            raise APIError(
                400,
                f"n: {len(requests)} choices; this replica has room for {self.capacity} at a time",
                param="n",
            )
        if self.admitted + len(requests) > self.capacity:
            turns = max(0, self.admitted - self.engine.slots) / self.engine.slots + 0.5
            raise APIError(
                503,
                f"overloaded: {self.admitted} of {self.capacity} places are taken, this request "
                f"needs {len(requests)}; try again later",
                code="overloaded",
                retry_after=turns * self.latency.seconds,
            )
        call = Call(requests, len(requests))
        self.admitted += len(requests)
        self.submitted.append(call)
        self.wake_up.set()
        return call

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                self._update_engine()
                if self.engine.busy:
                    self._dispatch(await loop.run_in_executor(self.thread, self.engine.step))
                else:
                    self.wake_up.clear()
                    await self.wake_up.wait()
        except Exception as error:  # Serve replaces the replica: see `failure`
            logging.getLogger(__name__).exception("the engine failed")
            self.failure = error
            for call in {*self.calls.values(), *self.submitted}:
                call.events.put_nowait(self._failed())

    def _update_engine(self) -> None:
        """Submit new requests and cancel dropped ones; no step is running."""
        for call in self.submitted:
            if call not in self.cancelled:
                for choice, request in enumerate(call.requests):
                    request_id = self.engine.submit(request)
                    call.choices[request_id] = choice
                    self.calls[request_id] = call
        for call in self.cancelled:
            for request_id in call.choices:
                self.engine.cancel(request_id)
                self.calls.pop(request_id, None)
        self.submitted, self.cancelled = [], []

    def _dispatch(self, events: Sequence[Event]) -> None:
        for event in events:
            call = self.calls[event.request_id]
            call.events.put_nowait((call.choices[event.request_id], event))
            if event.finish:
                del self.calls[event.request_id]

    def _failed(self) -> APIError:
        return APIError(500, f"the engine failed ({type(self.failure).__name__}): see the log")

    def close(self) -> None:
        """Stop the loop; no call is open any more."""
        self.task.cancel()
        self.thread.shutdown(wait=False)
