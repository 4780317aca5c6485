"""The engine at work: a task of the event loop drives it, one step at a time, in another thread.

In: requests. Out: their events, as they come. While a step computes, the event loop is free: it
takes new requests, refuses those that are too many, and notices clients that go. What it noted
reaches the engine between two steps, so nothing is locked.
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
    """The requests of one client's call: its choices, which start and end each on its own."""

    requests: Sequence[Request]
    unfinished: int
    events: asyncio.Queue[tuple[int, Event] | APIError] = field(default_factory=asyncio.Queue)
    choices: dict[int, int] = field(default_factory=dict)  # by the engine's number


class EngineLoop:
    """An engine, and those who wait for it. Made and used on one event loop."""

    @classmethod
    async def start(cls, load: Callable[[], Engine], max_waiting: int) -> "EngineLoop":
        """Load an engine and put it to work; `max_waiting`: requests that may wait for a slot.

        It is loaded by the thread that will drive it. OpenMP gives each thread that has ever
        computed a team of its own; with more of them than cores, all of them sleep where they would
        spin, and a step takes 1.4 times as long (GNU's libgomp, 2 cores).
        """
        thread = ThreadPoolExecutor(1, "engine")
        try:
            engine = await asyncio.get_running_loop().run_in_executor(thread, load)
        except BaseException:
            thread.shutdown(wait=False)
            raise
        return cls(engine, thread, max_waiting)

    def __init__(self, engine: Engine, thread: ThreadPoolExecutor, max_waiting: int) -> None:
        """Use `start`."""
        self.engine = engine
        self.thread = thread
        self.places = engine.slots + max_waiting
        self.taken = 0
        self.pace = LatencyAverage()
        self.failure: Exception | None = None
        self.calls: dict[int, Call] = {}  # by the engine's number
        self.arrived: list[Call] = []
        self.gone: list[Call] = []
        self.wanted = asyncio.Event()
        self.task = asyncio.create_task(self._drive())

    @property
    def running(self) -> int:
        """Count the requests that have a slot."""
        return len(self.engine.running)

    @property
    def waiting(self) -> int:
        """Count the requests that wait for one."""
        arrived = sum(len(call.requests) for call in self.arrived if call not in self.gone)
        return len(self.engine.waiting) + arrived

    @contextlib.contextmanager
    def call(self, requests: Sequence[Request]) -> Iterator[Call]:
        """Take places for requests, until the end or for as long as somebody listens.

        UserError for what the engine cannot do, Refused if there is no room for all of them: both
        before anything is computed.
        """
        call, since = self._admit(requests), time.monotonic()
        try:
            yield call
        finally:
            if call.unfinished:
                self.taken -= call.unfinished
                self.gone.append(call)
                self.wanted.set()
            else:
                self.pace.note(time.monotonic() - since)

    async def events(self, call: Call) -> AsyncIterator[tuple[int, Event]]:
        """Yield (choice, event) until all choices of a call have ended."""
        while call.unfinished:
            found = await call.events.get()
            if isinstance(found, APIError):
                raise found
            if found[1].finish:
                call.unfinished -= 1
                self.taken -= 1
            yield found

    def _admit(self, requests: Sequence[Request]) -> Call:
        for request in requests:
            self.engine.check(request)
        if self.failure:
            raise self._failed()
        if len(requests) > self.places:
            raise APIError(
                400,
                f"n: {len(requests)} choices; this replica has room for {self.places} at a time",
                param="n",
            )
        if self.taken + len(requests) > self.places:
            turns = max(0, self.taken - self.engine.slots) / self.engine.slots + 0.5
            raise APIError(
                503,
                f"overloaded: {self.taken} of {self.places} places are taken, this request needs "
                f"{len(requests)}; try again later",
                code="overloaded",
                retry_after=turns * self.pace.seconds,
            )
        call = Call(requests, len(requests))
        self.taken += len(requests)
        self.arrived.append(call)
        self.wanted.set()
        return call

    async def _drive(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                self._tell_engine()
                if self.engine.busy:
                    self._hand_out(await loop.run_in_executor(self.thread, self.engine.step))
                else:
                    self.wanted.clear()
                    await self.wanted.wait()
        except Exception as error:  # the replica is replaced: see `failure`
            logging.getLogger(__name__).exception("the engine failed")
            self.failure = error
            for call in {*self.calls.values(), *self.arrived}:
                call.events.put_nowait(self._failed())

    def _tell_engine(self) -> None:
        """Submit what arrived and cancel what went; no step is running."""
        for call in self.arrived:
            if call not in self.gone:
                for choice, request in enumerate(call.requests):
                    number = self.engine.submit(request)
                    call.choices[number] = choice
                    self.calls[number] = call
        for call in self.gone:
            for number in call.choices:
                self.engine.cancel(number)
                self.calls.pop(number, None)
        self.arrived, self.gone = [], []

    def _hand_out(self, events: Sequence[Event]) -> None:
        for event in events:
            call = self.calls[event.request]
            call.events.put_nowait((call.choices[event.request], event))
            if event.finish:
                del self.calls[event.request]

    def _failed(self) -> APIError:
        return APIError(500, f"the engine failed ({type(self.failure).__name__}): see the log")

    def close(self) -> None:
        """Stop; nobody waits any more."""
        self.task.cancel()
        self.thread.shutdown(wait=False)
