"""From a request to OpenAI's JSON, whole or as a stream of pieces.

In: a checked request, and the engine's events. Out: dicts as
https://platform.openai.com/docs/api-reference/completions describes them. Knows no HTTP.
"""

import codecs
import secrets
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from yuzogpt.config import LimitSettings
from yuzogpt.inference.requests import Event, Request
from yuzogpt.serving.errors import APIError
from yuzogpt.serving.protocol import CompletionRequest, default
from yuzogpt.tokenization.tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 16  # OpenAI's
FINISH = {"stop": "stop", "end_of_text": "stop", "length": "length", None: None}


def to_requests(
    wanted: CompletionRequest, tokenizer: Tokenizer, limits: LimitSettings, slide: bool
) -> list[Request]:
    """Return what the engine is asked for: n requests of each prompt, in this order.

    Refused for what is over a limit; UserError for text that the tokenizer has no ids for.
    """
    n = default(wanted.n, 1)
    max_tokens = default(wanted.max_tokens, DEFAULT_NEW_TOKENS)
    prompts = wanted.prompts()
    if len(prompts) * n > limits.max_choices:
        raise too_much("n", f"{len(prompts) * n} choices", limits.max_choices)
    if max_tokens > limits.max_new_tokens:
        raise too_much("max_tokens", str(max_tokens), limits.max_new_tokens)
    requests = []
    for prompt in prompts:
        ids = to_ids(prompt, tokenizer)
        if len(ids) > limits.max_prompt_tokens:
            raise too_much("prompt", f"{len(ids)} tokens", limits.max_prompt_tokens)
        for i in range(n):
            requests.append(
                Request(
                    ids,
                    max_tokens,
                    wanted.sampling(i),
                    wanted.stops(),
                    stop_at_end_of_text=not wanted.ignore_eos,
                    logprobs=wanted.logprobs,
                    echo=bool(wanted.echo),
                    slide=slide,
                )
            )
    return requests


def too_much(param: str, given: str, most: int) -> APIError:
    """Return the refusal of what is over a limit."""
    return APIError(400, f"{param}: {given}; at most {most} here", param=param)


def to_ids(prompt: str | list[int], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a prompt; an empty one is the beginning of a document."""
    ids: list[int] = tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else prompt
    if ids:
        return ids
    start = tokenizer.end_of_text
    return tokenizer.encode("\n").tolist() if start is None else [start]


@dataclass
class Logprobs:
    """The tokens of a choice, or of a piece of one, with their log-probabilities."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, event: Event, tokenizer: Tokenizer, offset: int) -> None:
        """Add a token. The one that was chosen is always among the likeliest here."""
        assert event.token is not None
        token = spelling(event.token, tokenizer)
        self.tokens.append(token)
        self.token_logprobs.append(event.logprob)
        self.text_offset.append(offset)
        if event.logprob is None:  # nothing foretells the first token
            self.top_logprobs.append(None)
            return
        top = {spelling(other, tokenizer): value for other, value in event.alternatives}
        self.top_logprobs.append({**top, token: event.logprob})

    def extend(self, other: "Logprobs") -> None:
        """Add the tokens of a piece."""
        for name, values in vars(self).items():
            values += getattr(other, name)


class TokenOffsets:
    """Where the tokens of a choice lie in its text, which they run ahead of.

    Text is held back while a stop string may have begun; its tokens are held back with it, and
    those that start where the text then ends are not part of it. The token that ends a text is: it
    stands at the text's end.
    """

    def __init__(self, tokenizer: Tokenizer, start: int) -> None:
        """`start`: of the text, in characters."""
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.next = start  # where the next token starts
        self.end = start  # of the text so far
        self.in_prompt = False
        self.ahead: deque[tuple[int, Event]] = deque()

    def add(self, event: Event) -> Logprobs:
        """Take a token; return those that begin in the text so far."""
        if self.in_prompt and not event.of_prompt:  # a character does not go on from there
            self.next += len(self.decoder.decode(b"", True))
        self.in_prompt = event.of_prompt
        self.end += len(event.text)
        ends = event.finish == "end_of_text"
        if ends and event.token is not None:
            self.ahead.append((self.end, event))
        elif event.token is not None:
            self.ahead.append((self.next, event))
            self.next += len(self.decoder.decode(self.tokenizer.token_bytes(event.token)))
        found = Logprobs()
        while self.ahead and (ends or self.ahead[0][0] < self.end):
            offset, one = self.ahead.popleft()
            found.add(one, self.tokenizer, offset)
        return found


def spelling(token: int, tokenizer: Tokenizer) -> str:
    """Return a token as text; a part of a character as its bytes, in OpenAI's way."""
    content = tokenizer.token_bytes(token)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class Completion:
    """One answer: what its choices have said so far."""

    def __init__(
        self,
        wanted: CompletionRequest,
        requests: Sequence[Request],
        tokenizer: Tokenizer,
        model: str,
        fingerprint: str,
    ) -> None:
        """`fingerprint`: which weights answer."""
        self.wanted = wanted
        self.requests = requests
        self.tokenizer = tokenizer
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self.texts = ["" for _ in requests]
        self.logprobs = [Logprobs() for _ in requests]
        self.finish: list[str | None] = [None for _ in requests]
        self.places: list[TokenOffsets] = []
        if wanted.logprobs is not None:
            for one in requests:
                start = 0 if wanted.echo else len(tokenizer.decode(one.prompt))
                self.places.append(TokenOffsets(tokenizer, start))
        options = wanted.stream_options
        self.tells_usage = bool(options and options.include_usage)
        self.new_tokens = 0

    def add(self, choice: int, event: Event) -> dict[str, Any] | None:
        """Take an event; return what a stream says of it, if anything."""
        self.new_tokens += event.token is not None and not event.of_prompt
        piece = None
        if self.places:
            piece = self.places[choice].add(event)
            self.logprobs[choice].extend(piece)
        self.texts[choice] += event.text
        self.finish[choice] = FINISH[event.finish]
        if not (event.text or event.finish):
            return None
        found = {**self.head, "choices": [self._choice(choice, event.text, piece)]}
        return {**found, "usage": None} if self.tells_usage else found

    def whole(self) -> dict[str, Any]:
        """Return the answer to a request that did not ask for a stream."""
        choices = [
            self._choice(i, text, None if self.wanted.logprobs is None else self.logprobs[i])
            for i, text in enumerate(self.texts)
        ]
        return {**self.head, "choices": choices, "usage": self.usage()}

    def last(self) -> dict[str, Any]:
        """Return the piece that ends a stream with what was used."""
        return {**self.head, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Count tokens; a prompt of n choices counts once."""
        n = default(self.wanted.n, 1)
        prompt = sum(len(request.prompt) for request in self.requests[::n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.new_tokens,
            "total_tokens": prompt + self.new_tokens,
        }

    def _choice(self, index: int, text: str, logprobs: Logprobs | None) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": None if logprobs is None else vars(logprobs),
            "finish_reason": self.finish[index],
        }
