"""Requests of one engine, each read as a stream of text: in any order, from any thread."""

import threading
from collections import deque
from collections.abc import Iterator, Sequence

from yuzogpt.inference.engine import Engine
from yuzogpt.inference.requests import Event, Request


class Completions:
    """Drives an engine for several readers: the one that waits for a token makes the next step."""

    def __init__(self, engine: Engine) -> None:
        """Take the engine over."""
        self.engine = engine
        self.lock = threading.Lock()
        self.unread: dict[int, deque[Event]] = {}  # of the requests that have a reader

    def stream(self, request: Request) -> Iterator[str]:
        """Yield the text of a request as it comes; cancel it if the reader stops before its end."""
        request_id = self._submit(request)
        try:
            yield from self._read(request_id)
        finally:
            self._drop(request_id)

    def complete(self, requests: Sequence[Request]) -> Iterator[str]:
        """Yield the whole text of each request, in their order; they are decoded together."""
        ids = [self._submit(request) for request in requests]
        try:
            for request_id in ids:
                yield "".join(self._read(request_id))
        finally:
            for request_id in ids:
                self._drop(request_id)

    def _submit(self, request: Request) -> int:
        with self.lock:
            request_id = self.engine.submit(request)
            self.unread[request_id] = deque()
        return request_id

    def _read(self, request_id: int) -> Iterator[str]:
        unread, finish = self.unread[request_id], None
        while finish is None:
            with self.lock:
                while not unread:
                    for event in self.engine.step():
                        if event.request_id in self.unread:
                            self.unread[event.request_id].append(event)
            event = unread.popleft()
            finish = event.finish
            if event.text:
                yield event.text

    def _drop(self, request_id: int) -> None:
        with self.lock:
            self.engine.cancel(request_id)
            del self.unread[request_id]
