"""Incremental detokenization: tokens, one by one -> pieces of text, up to the first stop string.

Two things are held back: bytes that are not a whole character yet, and text that may be the start
of a stop string.
"""

import codecs
from collections.abc import Sequence

from yuzogpt.tokenization.tokenizer import Tokenizer


class TextStream:
    """The text of one request."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        """`stops`: the text ends before the stop string that is complete first."""
        self.tokenizer = tokenizer
        self.stops = [stop for stop in stops if stop]
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held_back = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; return the text that is final now. Sets `stopped` at a stop string."""
        return self._emit(self.tokenizer.token_bytes(token), final=False)

    def flush(self) -> str:
        """Return the text that was held back: no token follows."""
        return self._emit(b"", final=True)

    def _emit(self, content: bytes, final: bool) -> str:
        if self.stopped:
            return ""
        text = self.held_back + self.decoder.decode(content, final)
        # The stop string that is complete first, so that token boundaries do not matter; of two
        # that are complete at once, the longer.
        matches = [(text.find(stop) + len(stop), -len(stop)) for stop in self.stops if stop in text]
        if matches:
            end, minus_length = min(matches)
            self.stopped, self.held_back = True, ""
            return text[: end + minus_length]
        count = 0 if final else max((overlap(text, stop) for stop in self.stops), default=0)
        self.held_back = text[len(text) - count :]
        return text[: len(text) - count]


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
