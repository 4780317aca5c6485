"""The JSON of POST /v1/completions: OpenAI's fields, and vLLM's names for those beyond.

Types are strict and nothing is silently ignored: unknown and unsupported fields are refused by
name. Only null counts as absent. https://platform.openai.com/docs/api-reference/completions
"""

import re
import secrets
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from yuzogpt.inference.requests import SamplingParams
from yuzogpt.serving.errors import APIError
from yuzogpt.storage.untrusted import load_json

MAX_INT32 = 2**31 - 1
Token = Annotated[int, Field(ge=0, le=MAX_INT32)]
StopString = Annotated[str, Field(max_length=256)]
MAX_STOPS = 16
MAX_FIELDS = 64
# Report the first mistake only: listing a million would block the event loop.
FIRST_ERROR_ONLY = Field(fail_fast=True)
Texts = Annotated[list[str], FIRST_ERROR_ONLY]
Tokens = Annotated[list[Token], FIRST_ERROR_ONLY]
Stops = Annotated[
    list[StopString],
    Field(max_length=MAX_STOPS, fail_fast=True),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]


class StrictModel(BaseModel):
    """A JSON object with strict types and no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, content: Any) -> Any:
        """Drop fields that are null; refuse objects with thousands of fields."""
        if not isinstance(content, dict):
            return content
        if len(content) > MAX_FIELDS:
            raise ValueError(f"{len(content)} fields; there are not so many")
        return {name: value for name, value in content.items() if value is not None}


class StreamOptions(StrictModel):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False  # OpenAI's clients may send it; nothing is obfuscated


class CompletionRequest(StrictModel):
    """A completion request."""

    model: str
    prompt: str | Texts | Tokens | Annotated[list[Tokens], FIRST_ERROR_ONLY] = ""
    max_tokens: Annotated[int, Field(ge=0)] = 16
    n: Annotated[int, Field(ge=1)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stop: Stops | None = None
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    user: str | None = None  # accepted and not used

    top_k: Annotated[int, Field(ge=-1, le=MAX_INT32)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    ignore_eos: bool = False

    best_of: int | None = None
    suffix: str | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[str, Any] | None = None

    @field_validator("stop")
    @classmethod
    def reject_empty_stops(cls, stops: list[str] | None) -> list[str] | None:
        """Refuse empty stop strings: they would end every text at once."""
        if stops and "" in stops:
            raise ValueError("an empty string would end every text at once; leave it out")
        return stops

    @model_validator(mode="after")
    def reject_unsupported(self) -> Self:
        """Refuse OpenAI's fields that are not supported, if they would change the response."""
        unsupported = {
            "best_of": self.best_of not in (None, self.n),
            "suffix": bool(self.suffix),
            "frequency_penalty": bool(self.frequency_penalty),
            "presence_penalty": bool(self.presence_penalty),
            "logit_bias": bool(self.logit_bias),
        }
        for name, is_used in unsupported.items():
            if is_used:
                raise ValueError(f"{name} is not supported; leave it out")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is for stream: true only")
        return self

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, each as text or as tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt) or [""]  # type: ignore[arg-type]

    def sampling(self, i: int) -> SamplingParams:
        """Return the parameters of choice i of a prompt; without a seed, with a random one."""
        seed = secrets.randbits(62) if self.seed is None else (self.seed + i) % 2**62
        return SamplingParams(
            repetition_penalty=self.repetition_penalty,
            temperature=self.temperature,
            top_k=max(0, self.top_k),  # in vLLM -1 means all
            top_p=self.top_p,
            min_p=self.min_p,
            seed=seed,
        )


def parse_request(content: bytes, media_type: str) -> CompletionRequest:
    """Parse a body; raise APIError or UserError, in one line, if it is no valid request.

    Other media types than JSON are refused: with them a foreign page could send requests without
    the browser's CORS check.
    """
    if not is_json(media_type):
        raise APIError(400, "send the header Content-Type: application/json (curl: -H, or --json)")
    fields = load_json(content, "the body")
    try:
        return CompletionRequest.model_validate(fields)
    except ValidationError as error:
        raise to_api_error(error) from None


def is_json(media_type: str) -> bool:
    """Return True if a media type is application/json or application/*+json."""
    kind = media_type.partition(";")[0].strip().lower()
    return re.fullmatch(r"application/([^/]+\+)?json", kind) is not None


def to_api_error(error: ValidationError) -> APIError:
    """Return the error that names the first mistake of a request."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [str(part) for part in first["loc"]]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown field"
    elif path[:1] == ["prompt"]:  # it fits none of its types
        path, message = path[:1], "give a text, a list of texts, or lists of token ids, from 0 on"
    elif not path and first["type"] == "model_type":
        message = 'the body: give an object, such as {"model": ..., "prompt": ...}'
    text = f"{'.'.join(path)}: {message}" if path else message
    return APIError(400, text, param=path[0] if path else None)
