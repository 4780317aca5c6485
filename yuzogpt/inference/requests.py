"""What the engine is asked for, and what it returns: one event per token. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from yuzogpt.errors import UserError

Finish = Literal["stop", "end_of_text", "length"]
TopLogprobs = tuple[tuple[int, float], ...]  # (token, log-probability), most probable first


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. Filters apply in the order of these fields."""

    repetition_penalty: float = 1.0  # above 1: tokens of the prompt and the text get less probable
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # keep the k most probable tokens; 0: all
    top_p: float = 1.0  # keep the most probable tokens that hold this share of what top_k left
    min_p: float = 0.0  # keep tokens at least this share as probable as the most probable one
    seed: int = 0

    def check(self) -> None:
        """Raise UserError if a value is out of range (NaN is in no range)."""
        ranges = {
            "repetition_penalty": 0 < self.repetition_penalty <= 100,
            "temperature": 0 <= self.temperature <= 100,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "seed": 0 <= self.seed < 2**63,
        }
        for name, is_in_range in ranges.items():
            if not is_in_range:
                raise UserError(f"{name}={getattr(self, name)}: out of range")


@dataclass(frozen=True)
class Request:
    """One prompt to continue."""

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()  # the text ends before any of these strings
    stop_at_end_of_text: bool = True
    logprobs: int | None = None  # how many top tokens; 0: the chosen token only; None: none
    echo: bool = False  # emit the prompt's tokens first, with their log-probabilities
    slide: bool = True  # past block_size: slide the context window; False: finish there


@dataclass(frozen=True)
class Event:
    """One token of a request, and the text that it adds.

    `text` may be empty, or include text of earlier tokens: text is held back while it may be the
    start of a stop string or part of a character. Log-probabilities are the model's own, before
    temperature and filters. Only the last event of a request has `finish`.
    """

    request_id: int
    token: int | None  # None: max_new_tokens was 0
    text: str = ""
    logprob: float | None = None
    top_logprobs: TopLogprobs = ()
    finish: Finish | None = None
    is_prompt: bool = False
