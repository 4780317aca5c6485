"""What the engine is asked for, and what it answers. Needs no torch.

In: a prompt's ids and settings. Out: events, one a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from yuzogpt.errors import UserError

Finish = Literal["stop", "end_of_text", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Filters apply in the order in which they stand here."""

    repetition_penalty: float = 1.0  # above 1: what was there already is less likely
    temperature: float = 1.0  # 0: always the likeliest
    top_k: int = 0  # only the k likeliest; 0: all
    top_p: float = 1.0  # only the likeliest that have this share of what top_k left
    min_p: float = 0.0  # only those at least so likely as this share of the likeliest
    seed: int = 0

    def check(self) -> None:
        """Raise UserError for what makes no sense (a NaN is in no range)."""
        ranges = {
            "repetition_penalty": 0 < self.repetition_penalty <= 100,
            "temperature": 0 <= self.temperature <= 100,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "seed": 0 <= self.seed < 2**63,
        }
        for name, fits in ranges.items():
            if not fits:
                raise UserError(f"{name}={getattr(self, name)}: out of range")


@dataclass(frozen=True)
class Request:
    """One prompt to go on with."""

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()  # ends before any of these strings; nothing of it is emitted
    stop_at_end_of_text: bool = True
    logprobs: int | None = None  # so many alternatives; 0: the chosen token's alone; None: none
    echo: bool = False  # the prompt's tokens come first, with their log-probabilities
    slide: bool = True  # past the context's end: go on with a later window; False: end there


@dataclass(frozen=True)
class Event:
    """One token of a request, and what it adds to the text.

    `text` may be empty, or belong to earlier tokens, too: a piece is held back while it may be the
    beginning of a stop string or a part of a character. Log-probabilities are the model's own,
    before temperature and filters. The last event of a request, and no other, has `finish`.
    """

    request: int
    token: int | None  # None: max_new_tokens was 0
    text: str = ""
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    finish: Finish | None = None
    of_prompt: bool = False
