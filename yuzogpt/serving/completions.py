"""A completion request -> engine requests; their events -> OpenAI's JSON, whole or in chunks.

https://platform.openai.com/docs/api-reference/completions
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
from yuzogpt.serving.protocol import CompletionRequest
from yuzogpt.tokenization.tokenizer import Tokenizer, start_of

FINISH_REASONS = {"stop": "stop", "end_of_text": "stop", "length": "length", None: None}


def to_requests(
    body: CompletionRequest, tokenizer: Tokenizer, limits: LimitSettings, slide: bool
) -> list[Request]:
    """Return the engine's requests: n for each prompt, in this order.

    Raise APIError for what is above a limit, UserError for text that the tokenizer cannot encode.
    """
    prompts = body.prompts()
    choices = len(prompts) * body.n
    if choices > limits.max_choices:
        raise over_limit("n", f"{choices} choices", limits.max_choices)
    if body.max_tokens > limits.max_new_tokens:
        raise over_limit("max_tokens", str(body.max_tokens), limits.max_new_tokens)
    requests = []
    for prompt in prompts:
        ids = prompt_ids(prompt, tokenizer)
        if len(ids) > limits.max_prompt_tokens:
            raise over_limit("prompt", f"{len(ids)} tokens", limits.max_prompt_tokens)
        for i in range(body.n):
            requests.append(
                Request(
                    ids,
                    body.max_tokens,
                    body.sampling(i),
                    tuple(body.stop or ()),
                    stop_at_end_of_text=not body.ignore_eos,
                    logprobs=body.logprobs,
                    echo=body.echo,
                    slide=slide,
                )
            )
    return requests


def over_limit(param: str, given: str, limit: int) -> APIError:
    """Return the error for a value above its limit."""
    return APIError(400, f"{param}: {given}; at most {limit} here", param=param)


def prompt_ids(prompt: str | list[int], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a prompt; an empty one starts a document."""
    ids: list[int] = tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else prompt
    return ids or [start_of(tokenizer)]


@dataclass
class Logprobs:
    """The tokens of a choice, or of a chunk of one, with their log-probabilities."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, event: Event, tokenizer: Tokenizer, offset: int) -> None:
        """Add a token. As in OpenAI's API, top_logprobs always include the chosen token."""
        assert event.token is not None
        token = token_text(event.token, tokenizer)
        self.tokens.append(token)
        self.token_logprobs.append(event.logprob)
        self.text_offset.append(offset)
        if event.logprob is None:  # nothing predicts the first token
            self.top_logprobs.append(None)
            return
        top = {token_text(other, tokenizer): value for other, value in event.top_logprobs}
        self.top_logprobs.append({**top, token: event.logprob})

    def extend(self, other: "Logprobs") -> None:
        """Add the tokens of a chunk."""
        for name, values in vars(self).items():
            values += getattr(other, name)


class TokenOffsets:
    """The offsets of a choice's tokens in its text.

    Text is held back while it may be the start of a stop string, and its tokens with it. If the
    text then ends before them, they are dropped. The end-of-text token is kept, at the text's end.
    """

    def __init__(self, tokenizer: Tokenizer, start: int) -> None:
        """`start`: where the text starts, in characters."""
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.next_offset = start  # of the next token
        self.end = start  # of the text so far
        self.in_prompt = False
        self.pending: deque[tuple[int, Event]] = deque()

    def add(self, event: Event) -> Logprobs:
        """Add a token; return those that start in the text so far."""
        if self.in_prompt and not event.is_prompt:  # cut off a partial character of the prompt
            self.next_offset += len(self.decoder.decode(b"", True))
        self.in_prompt = event.is_prompt
        self.end += len(event.text)
        ends = event.finish == "end_of_text"
        if ends and event.token is not None:
            self.pending.append((self.end, event))
        elif event.token is not None:
            self.pending.append((self.next_offset, event))
            self.next_offset += len(self.decoder.decode(self.tokenizer.token_bytes(event.token)))
        logprobs = Logprobs()
        while self.pending and (ends or self.pending[0][0] < self.end):
            offset, listed = self.pending.popleft()
            logprobs.add(listed, self.tokenizer, offset)
        return logprobs


def token_text(token: int, tokenizer: Tokenizer) -> str:
    """Return a token as text; part of a character as its bytes, in OpenAI's notation."""
    content = tokenizer.token_bytes(token)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class Completion:
    """The response to one request: its choices so far."""

    def __init__(
        self,
        body: CompletionRequest,
        requests: Sequence[Request],
        tokenizer: Tokenizer,
        model: str,
        fingerprint: str,
    ) -> None:
        """`fingerprint`: of the weights."""
        self.body = body
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
        self.offsets: list[TokenOffsets] = []
        if body.logprobs is not None:
            for request in requests:
                start = 0 if body.echo else len(tokenizer.decode(request.prompt))
                self.offsets.append(TokenOffsets(tokenizer, start))
        options = body.stream_options
        self.include_usage = bool(options and options.include_usage)
        self.new_tokens = 0

    def add(self, choice: int, event: Event) -> dict[str, Any] | None:
        """Add an event; return its chunk of a stream, if it has one."""
        self.new_tokens += event.token is not None and not event.is_prompt
        logprobs = None
        if self.offsets:
            logprobs = self.offsets[choice].add(event)
            self.logprobs[choice].extend(logprobs)
        self.texts[choice] += event.text
        self.finish[choice] = FINISH_REASONS[event.finish]
        if not (event.text or event.finish):
            return None
        chunk = {**self.head, "choices": [self._choice(choice, event.text, logprobs)]}
        return {**chunk, "usage": None} if self.include_usage else chunk

    def whole(self) -> dict[str, Any]:
        """Return the whole response, for a request without a stream."""
        choices = [
            self._choice(i, text, None if self.body.logprobs is None else self.logprobs[i])
            for i, text in enumerate(self.texts)
        ]
        return {**self.head, "choices": choices, "usage": self.usage()}

    def usage_chunk(self) -> dict[str, Any]:
        """Return the chunk that ends a stream with its usage."""
        return {**self.head, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Count tokens; a prompt of n choices counts once."""
        prompt = sum(len(request.prompt) for request in self.requests[:: self.body.n])
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
