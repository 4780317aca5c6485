"""From tokens to pieces of text, as they come.

In: tokens, one by one. Out: pieces that together are the whole text, up to the first stop string.
Held back is what may still change: bytes that are no whole character yet, and an end of the text
that a stop string may begin with.
"""

import codecs
from collections.abc import Sequence

from yuzogpt.tokenization.tokenizer import Tokenizer


class TextStream:
    """The text of one request."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        """`stops`: the text ends before the one that is complete first."""
        self.tokenizer = tokenizer
        self.stops = [stop for stop in stops if stop]
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Return what is sure by now; sets `stopped` when a stop string is complete."""
        return self._emit(self.tokenizer.token_bytes(token), final=False)

    def flush(self) -> str:
        """Return what was held back: no token follows."""
        return self._emit(b"", final=True)

    def _emit(self, content: bytes, final: bool) -> str:
        if self.stopped:
            return ""
        text = self.held + self.decoder.decode(content, final)
        # The first that is complete, so that it does not matter where tokens end; of two that are
        # complete at once, the longer.
        found = [(text.find(stop) + len(stop), -len(stop)) for stop in self.stops if stop in text]
        if found:
            end, minus_length = min(found)
            self.stopped, self.held = True, ""
            return text[: end + minus_length]
        kept = 0 if final else max((overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - kept :]
        return text[: len(text) - kept]


def overlap(text: str, stop: str) -> int:
    """Return how much of the end of `text` is a beginning of `stop`, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
