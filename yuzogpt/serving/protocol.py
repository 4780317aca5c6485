"""POST /v1/completions, as OpenAI defined it: what a request may say.

In: JSON. Out: a checked request. Numbers are numbers and nothing is silently ignored: an unknown
field, or a known one that is not done here, is refused by its name. Only null is: a client that
sends it wants nothing of the field. Fields beyond OpenAI's have the names that vLLM gave them. https://platform.openai.com/docs/api-reference/completions
"""

import re
import secrets
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from yuzogpt.inference.requests import Sampling
from yuzogpt.serving.errors import APIError
from yuzogpt.storage.untrusted import load_json

T = TypeVar("T")
MOST_INT = 2**31 - 1
Token = Annotated[int, Field(ge=0, le=MOST_INT)]
StopString = Annotated[str, Field(max_length=256)]
MOST_STOPS = 16
MOST_FIELDS = 64
# Of many mistakes the first is told; an error for each of a million would hold up everybody.
FIRST = Field(fail_fast=True)
Texts = Annotated[list[str], FIRST]
Tokens = Annotated[list[Token], FIRST]
Stops = Annotated[
    list[StopString],
    Field(max_length=MOST_STOPS, fail_fast=True),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]


class Fields(BaseModel):
    """JSON without surprises."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def null_is_absent(cls, content: Any) -> Any:
        """Leave out fields that are null; refuse thousands of them, each an error if unknown."""
        if not isinstance(content, dict):
            return content
        if len(content) > MOST_FIELDS:
            raise ValueError(f"{len(content)} fields; there are not so many")
        return {name: value for name, value in content.items() if value is not None}


class StreamOptions(Fields):
    """What a stream tells besides tokens."""

    include_usage: bool = False
    include_obfuscation: bool = False  # OpenAI's clients may send it; nothing is obfuscated


class CompletionRequest(Fields):
    """What a client asks for."""

    model: str
    prompt: str | Texts | Tokens | Annotated[list[Tokens], FIRST] = ""
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    n: Annotated[int, Field(ge=1)] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stop: Stops | None = None
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    user: str | None = None  # who asks, for the client's own books

    top_k: Annotated[int, Field(ge=-1, le=MOST_INT)] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = 1.0
    ignore_eos: bool | None = False

    best_of: int | None = None
    suffix: str | None = None
    frequency_penalty: float | None = 0.0
    presence_penalty: float | None = 0.0
    logit_bias: dict[str, Any] | None = None

    @field_validator("stop")
    @classmethod
    def stops_are_not_empty(cls, stops: list[str] | None) -> list[str] | None:
        """Refuse what every text begins with."""
        if stops and "" in stops:
            raise ValueError("an empty string would end every text at once; leave it out")
        return stops

    @model_validator(mode="after")
    def only_what_is_done(self) -> Self:
        """Refuse OpenAI's fields that are not done here, where they would change the answer."""
        not_done = {
            "best_of": self.best_of not in (None, self.n or 1),
            "suffix": bool(self.suffix),
            "frequency_penalty": bool(self.frequency_penalty),
            "presence_penalty": bool(self.presence_penalty),
            "logit_bias": bool(self.logit_bias),
        }
        for name, wanted in not_done.items():
            if wanted:
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

    def stops(self) -> tuple[str, ...]:
        """Return the strings that end a choice."""
        return tuple(self.stop or ())

    def sampling(self, i: int) -> Sampling:
        """Return how choice i of a prompt is drawn; without a seed, by one that nobody knows."""
        seed = secrets.randbits(62) if self.seed is None else (self.seed + i) % 2**62
        return Sampling(
            repetition_penalty=default(self.repetition_penalty, 1.0),
            temperature=default(self.temperature, 1.0),
            top_k=max(0, default(self.top_k, 0)),  # -1 is vLLM's word for all
            top_p=default(self.top_p, 1.0),
            min_p=default(self.min_p, 0.0),
            seed=seed,
        )


def default(value: T | None, otherwise: T) -> T:
    """Return a value, or what null means."""
    return otherwise if value is None else value


def read_request(content: bytes, media_type: str) -> CompletionRequest:
    """Return what a body asks for; Refused or UserError, in one line, if it is not JSON or not so.

    A page from elsewhere can send other types without asking the browser for leave: they are
    refused, whatever they hold.
    """
    if not is_json(media_type):
        raise APIError(400, "send the header Content-Type: application/json (curl: -H, or --json)")
    content_of_body = load_json(content, "the body")
    try:
        return CompletionRequest.model_validate(content_of_body)
    except ValidationError as error:
        raise refusal_of(error) from None


def is_json(media_type: str) -> bool:
    """Return whether a media type is JSON's, or of a kind of JSON."""
    kind = media_type.partition(";")[0].strip().lower()
    return re.fullmatch(r"application/([^/]+\+)?json", kind) is not None


def refusal_of(error: ValidationError) -> APIError:
    """Return the refusal that names the first mistake of a request."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = [str(part) for part in first["loc"]]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown field"
    elif place[:1] == ["prompt"]:  # of many types that it may have, none fits
        place, message = place[:1], "give a text, a list of texts, or lists of token ids, from 0 on"
    elif not place and first["type"] == "model_type":
        message = 'the body: give an object, such as {"model": ..., "prompt": ...}'
    text = f"{'.'.join(place)}: {message}" if place else message
    return APIError(400, text, param=place[0] if place else None)
