"""A model that `yuzogpt.load` found: text in, text or numbers out.

The weights are read when they are first used. Next: inference/completions.py.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, overload

import torch
from torch import Tensor

from yuzogpt.api.keywords import read_settings, takes_settings
from yuzogpt.checkpoints.load import load_model
from yuzogpt.checkpoints.resolve import ModelReference
from yuzogpt.config import GenerateSettings, GenerationSettings, SamplingDeviceSettings
from yuzogpt.errors import UserError
from yuzogpt.evaluation.passages import windows
from yuzogpt.evaluation.scoring import score
from yuzogpt.inference.completions import Completions
from yuzogpt.inference.load import load_engine
from yuzogpt.inference.requests import Request
from yuzogpt.inference.sample import MAX_SLOTS, encode_start, to_request
from yuzogpt.model.gpt import GPT
from yuzogpt.runtime.device import Hardware
from yuzogpt.tokenization.tokenizer import Tokenizer, encode_prompt, start_of


class LanguageModel:
    """A model and its tokenizer."""

    def __init__(self, reference: ModelReference, device: SamplingDeviceSettings) -> None:
        """`device`: what `generate` and `stream` run on."""
        self.reference, self.device = reference, device
        with checkpoint_kept(reference):
            self.tokenizer: Tokenizer = reference.tokenizer()
        self._slots = 0
        self._completions: Completions | None = None

    def __repr__(self) -> str:
        return f"<LanguageModel {self.reference.name}>"

    @functools.cached_property
    def model(self) -> GPT:
        """The plain nn.Module, in float32, on the CPU, in eval mode; `generate` has a copy."""
        with checkpoint_kept(self.reference):
            return load_model(self.reference, exact=True)

    @overload
    def generate(self, text: str = ..., *, num_samples: None = ..., **settings: Any) -> str: ...

    @overload
    def generate(self, text: str = ..., *, num_samples: int, **settings: Any) -> list[str]: ...

    @takes_settings(GenerateSettings)
    def generate(
        self, text: str = "\n", *, num_samples: int | None = None, **settings: Any
    ) -> str | list[str]:
        """Return what follows `text`, or a list of `num_samples` continuations.

        They are those of `yuzogpt sample`, for the same settings and seed.
        """
        options = read_settings(GenerateSettings, [], settings).generation
        count = 1 if num_samples is None else num_samples
        if count < 1:
            raise UserError(f"{num_samples=}: give 1 or more")
        requests = [self._request(text, options, options.seed + i) for i in range(count)]
        texts = list(self._engine(count).complete(requests))
        return texts[0] if num_samples is None else texts

    @takes_settings(GenerateSettings)
    def stream(self, text: str = "\n", **settings: Any) -> Iterator[str]:
        """Yield the text of `generate` in pieces, as it is written."""
        options = read_settings(GenerateSettings, [], settings).generation
        return self._engine(1).stream(self._request(text, options, options.seed))

    def logits(self, text: str) -> Tensor:
        """Return the logits after each token of a text, (T, V), of at most block_size tokens."""
        ids, block_size = encode_start(text, self.tokenizer), self.reference.shape.block_size
        if len(ids) > block_size:
            raise UserError(f"the text has {len(ids)} tokens; the model's context {block_size}")
        with torch.no_grad():
            logits: Tensor = self.model(torch.tensor([ids], device=self._device()))[0]
        return logits

    def loss(self, text: str) -> float:
        """Return the mean loss per token of a text that starts a document, in nats.

        A longer text than block_size is read in windows; each token is scored once, after at least
        half of block_size tokens.
        """
        block_size = self.reference.shape.block_size
        if not (ids := encode_prompt(self.tokenizer, text)):
            raise UserError("the text is empty; a loss needs at least one token")
        start, stride = start_of(self.tokenizer), max(1, block_size // 2)
        hardware = Hardware(self._device(), None, compile=False, threads=0, reasons=())
        scores = score(self.model, [*windows(ids, start, block_size, stride)], 8, hardware)
        return -sum(each.logprob for each in scores) / len(ids)

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _request(self, text: str, options: GenerationSettings, seed: int) -> Request:
        return to_request(options, encode_start(text, self.tokenizer), seed)

    def _engine(self, num_requests: int) -> Completions:
        """Return the engine; a new one if it has too few slots."""
        slots = min(num_requests, MAX_SLOTS)
        if self._completions is None or slots > self._slots:
            with checkpoint_kept(self.reference):
                engine = load_engine(
                    self.reference, self.tokenizer, self.device, slots,
                    exact=True, compiled=self.device.compile,
                )  # fmt: skip
            self._slots, self._completions = slots, Completions(engine)
        return self._completions


@contextlib.contextmanager
def checkpoint_kept(reference: ModelReference) -> Iterator[None]:
    """Raise UserError if a run has deleted the checkpoint: its successor is another model."""
    try:
        yield
    except FileNotFoundError:
        name = reference.name
        raise UserError(f"{name}: its run has replaced this checkpoint; load it again") from None
