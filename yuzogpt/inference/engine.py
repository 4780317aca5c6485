"""Continuous batching: requests join and leave the batch between tokens.

The engine is a plain object, driven by one caller: `submit`, then `step` while it is `busy`;
`cancel` at any time. Each running request has a slot of the KV cache. A step decodes one token of
each request that is past its prefill, and prefills at most `prefill_chunk` tokens of the other
prompts, so that a long prompt does not delay the other requests.

Sampling is batch-invariant: a request's logits are bit-identical whatever else is in the batch.
Every forward pass has one of a few shapes, padded where needed: prefill is one row of 2, 4, ...
`prefill_chunk` tokens, chosen from the prompt alone; decoding is 1, 2, 4, ... rows of one token.
At construction the engine finds the smallest batch size from which a row's logits depend neither
on the batch size nor on the row's index, with this model on this device. Smaller batches are
padded to that size. If there is none, `batch_invariant` is False. On a GPU there is one batch
size: all slots (cuda_graph.py).

Past block_size tokens the context window slides: the oldest tokens are dropped, a quarter of the
window at a time, and the rest is prefilled again, since a cached key depends on its token's
position. With `slide=False` the request finishes there instead.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from yuzogpt.errors import UserError
from yuzogpt.inference.cuda_graph import GraphedDecoder
from yuzogpt.inference.detokenize import TextStream
from yuzogpt.inference.kv_cache import CacheView, KVCache, Span
from yuzogpt.inference.packed_linear import activation_dtype, pack_weights
from yuzogpt.inference.requests import Event, Finish, Request, TopLogprobs
from yuzogpt.inference.sampler import sample_tokens, uniform
from yuzogpt.model.gpt import GPT
from yuzogpt.tokenization.tokenizer import Tokenizer


def window_start(num_tokens: int, block_size: int) -> int:
    """Return the index of the first token in the context window: 0, then multiples of a stride."""
    stride = max(1, block_size // 4)
    return -(-max(0, num_tokens - block_size) // stride) * stride


@dataclass
class RunningRequest:
    """A request that has a slot."""

    id: int
    request: Request
    slot: int
    tokens: list[int]
    text: TextStream
    start: int  # index of the context window's first token
    num_cached: int = 0  # tokens of the window whose keys and values are in the slot
    num_echoed: int = 0  # tokens of the prompt that have had their event
    echo: TextStream | None = None
    num_generated: int = 0

    @property
    def num_uncached(self) -> int:
        """Tokens of the window that are not in the cache yet."""
        return len(self.tokens) - self.start - self.num_cached


class Engine:
    """A model, its KV cache, and the requests that are running or waiting."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        slots: int = 8,
        prefill_chunk: int = 64,
        packed: bool = True,
        decode_all_slots: bool | None = None,
        compiled: bool = False,
    ) -> None:
        """Take the model over and pack its weights; `slots`: requests that run at a time.

        `packed=False` keeps float32 weights as they are, so that processes on a node can share
        them by memory map. `decode_all_slots`: every decode step computes all slots; None: on a
        GPU. `compiled`: such steps go through torch.compile, which compiles now.
        """
        assert slots > 0 and prefill_chunk > 0
        self.shape = model.settings
        self.tokenizer = tokenizer
        self.device = device
        self.dtype = dtype
        self.prefill_chunk = prefill_chunk
        # Apple's GPUs have no float64, in which the sampler adds probabilities up.
        self.sampling_device = torch.device("cpu") if device.type == "mps" else device
        self.model = pack_weights(model.eval(), dtype, device, packed)
        self.cache = KVCache(self.shape, slots, activation_dtype(dtype, device), device)
        self.slots = slots
        self.free_slots = list(range(slots))
        self.waiting: deque[tuple[int, Request]] = deque()
        self.running: dict[int, RunningRequest] = {}
        self.seen: Tensor | None = None  # (slots, V), once a request has a repetition penalty
        self.request_ids = count()
        if decode_all_slots is None:
            decode_all_slots = device.type == "cuda"
        self.decoder = (
            GraphedDecoder(self.model, self.cache, compiled) if decode_all_slots else None
        )
        self.batch_sizes, self.batch_invariant = self._find_batch_sizes()

    @property
    def busy(self) -> bool:
        """Return True if a step has anything to do."""
        return bool(self.waiting or self.running)

    def submit(self, request: Request) -> int:
        """Queue a request; return the id that its events carry. UserError if it is invalid."""
        self.check(request)
        request_id = next(self.request_ids)
        self.waiting.append((request_id, request))
        return request_id

    def cancel(self, request_id: int) -> bool:
        """Drop a request and free its slot; return False if it has already finished."""
        if running := self.running.get(request_id):
            self._release(running)
            return True
        num_waiting = len(self.waiting)
        self.waiting = deque(item for item in self.waiting if item[0] != request_id)
        return len(self.waiting) < num_waiting

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Do a bounded amount of work; return its events, in no order of requests."""
        events = self._admit()
        ready = [running for running in self.running.values() if running.num_uncached == 1]
        max_batch = self.batch_sizes[-1]
        for first in range(0, len(ready), max_batch):
            events += self._decode(ready[first : first + max_batch])
        return events + self._prefill()

    def check(self, request: Request) -> None:
        """Raise UserError if a request is invalid for this model."""
        request.sampling.check()
        length, block_size = len(request.prompt), self.shape.block_size
        vocab_size = self.shape.vocab_size
        if length == 0:
            raise UserError("the prompt is empty; give at least one token")
        if not all(0 <= token < vocab_size for token in request.prompt):
            raise UserError(f"the prompt has a token that is not in 0 to {vocab_size - 1}")
        if request.max_new_tokens < 0:
            raise UserError(f"max_new_tokens={request.max_new_tokens}: below 0")
        if request.logprobs is not None and not 0 <= request.logprobs <= vocab_size:
            raise UserError(f"logprobs={request.logprobs}: not in 0 to {vocab_size}")
        if length > block_size and (request.echo or not request.slide):
            reason = "echo" if request.echo else "a context that does not slide"
            raise UserError(f"the prompt has {length} tokens; with {reason}, at most {block_size}")

    def _admit(self) -> list[Event]:
        """Move waiting requests into free slots, first come, first served."""
        events = []
        while self.waiting and self.free_slots:
            request_id, request = self.waiting.popleft()
            if request.max_new_tokens == 0 and not request.echo:
                events.append(Event(request_id, None, finish="length"))
                continue
            tokens = [int(token) for token in request.prompt]
            text = TextStream(self.tokenizer, request.stop)
            start = window_start(len(tokens), self.shape.block_size)
            slot = self.free_slots.pop(0)
            running = RunningRequest(request_id, request, slot, tokens, text, start)
            running.echo = TextStream(self.tokenizer) if request.echo else None
            self.running[request_id] = running
            if self.seen is not None:
                self.seen[slot] = False
            self._mark_seen(running, tokens)
        return events

    def _prefill(self) -> list[Event]:
        """Compute up to `prefill_chunk` tokens of prompts (and of windows that have slid)."""
        events: list[Event] = []
        budget = self.prefill_chunk
        for running in list(self.running.values()):
            while budget > 0 and running.num_uncached > 1:
                T = min(self.prefill_chunk, next_power_of_two(running.num_uncached))
                if budget < T:  # left to the next step: the shape must not depend on the budget
                    return events
                budget -= T
                (span,), x = self._forward([running], 1, T)
                events += self._echo_prompt(running, x[0], span.count)
                if running.num_uncached == 0:
                    events += self._sample([running], self._logits(x[:, span.count - 1]))
                    break
        return events

    def _decode(self, batch: Sequence[RunningRequest]) -> list[Event]:
        """Compute the newest token of each request, and sample the next one."""
        if self.decoder is None:
            B = next(size for size in self.batch_sizes if size >= len(batch))
            x = self._forward(batch, B, 1)[1][:, 0]
            logits = self._logits(x)
        else:
            lengths = [0] * self.slots
            for running in self.running.values():
                lengths[running.slot] = running.num_cached
            spans = [self._next_span(running, 1) for running in batch]
            newest = [running.tokens[-1] for running in batch]
            x, logits = self.decoder.decode(spans, newest, lengths)
        events: list[Event] = []
        for row, running in enumerate(batch):
            events += self._echo_prompt(running, x[row : row + 1], 1)
        return events + self._sample(batch, logits)

    def _forward(
        self, batch: Sequence[RunningRequest], B: int, T: int
    ) -> tuple[list[Span], Tensor]:
        """Add up to T tokens of each request to the cache; return their spans and (B, T, C)."""
        spans, ids = [], torch.zeros(B, T, dtype=torch.long)
        for row, running in enumerate(batch):
            span = self._next_span(running, T)
            first = running.start + span.first
            ids[row, : span.count] = torch.tensor(running.tokens[first : first + span.count])
            spans.append(span)
        view = CacheView(self.cache, spans, B, T)
        return spans, self.model.hidden(ids.to(self.device), view.token_positions, cache=view)

    def _next_span(self, running: RunningRequest, max_tokens: int) -> Span:
        """Return where the next tokens of a request go in the cache, and count them as cached."""
        span = Span(running.slot, running.num_cached, min(max_tokens, running.num_uncached))
        running.num_cached = span.end
        return span

    def _logits(self, x: Tensor) -> Tensor:
        """(B, C) -> (B, V)."""
        return self.model.logits(x[:, None])[:, 0]

    def _sample(self, batch: Sequence[RunningRequest], logits: Tensor) -> list[Event]:
        """Draw the next token of each request from (B, V)."""
        logits = logits[: len(batch)].float().to(self.sampling_device)
        params = [running.request.sampling for running in batch]
        uniforms = [
            uniform(running.request.sampling.seed, running.num_generated) for running in batch
        ]
        seen = None
        if any(row.repetition_penalty != 1 for row in params):
            assert self.seen is not None
            seen = self.seen[[running.slot for running in batch]]
        tokens = sample_tokens(logits, params, uniforms, seen).tolist()
        return [
            self._append(running, token, logits[row])
            for row, (running, token) in enumerate(zip(batch, tokens, strict=True))
        ]

    def _append(self, running: RunningRequest, token: int, logits: Tensor) -> Event:
        """Append a new token; finish the request, or slide its window if it is full."""
        request = running.request
        if request.max_new_tokens == 0:  # only the prompt was asked for
            self._release(running)
            return Event(running.id, None, finish="length")
        logprob, top_logprobs = logprobs_of_token(logits, token, request.logprobs)
        running.tokens.append(token)
        running.num_generated += 1
        self._mark_seen(running, [token])
        finish: Finish | None = None
        if request.stop_at_end_of_text and token == self.tokenizer.end_of_text:
            text, finish = running.text.flush(), "end_of_text"
        else:
            text = running.text.push(token)
        fits = request.slide or len(running.tokens) <= self.shape.block_size
        if running.text.stopped:
            finish = "stop"
        elif finish is None and (running.num_generated == request.max_new_tokens or not fits):
            text, finish = text + running.text.flush(), "length"
        if finish is not None:
            self._release(running)
        elif len(running.tokens) - running.start > self.shape.block_size:
            running.start = window_start(len(running.tokens), self.shape.block_size)
            running.num_cached = 0
        return Event(running.id, token, text, logprob, top_logprobs, finish)

    def _echo_prompt(self, running: RunningRequest, x: Tensor, T: int) -> list[Event]:
        """Return the events of the prompt tokens that x (T, C) predicts, if echo is on."""
        prompt = running.request.prompt
        if running.echo is None or running.num_echoed == len(prompt):
            return []
        logits = self.model.logits(x[None])[0, :T].float()
        first = running.num_cached - T + 1  # the token that the first row predicts
        # Nothing predicts the first token of a prompt.
        scores: list[tuple[float | None, TopLogprobs]] = (
            [(None, ())] if running.num_echoed == 0 else []
        )
        for row, token in enumerate(prompt[first : first + T]):
            scores.append(logprobs_of_token(logits[row], int(token), running.request.logprobs))
        events = []
        for logprob, top_logprobs in scores:
            token = int(prompt[running.num_echoed])
            running.num_echoed += 1
            text = running.echo.push(token)
            if running.num_echoed == len(prompt):
                text += running.echo.flush()
            events.append(Event(running.id, token, text, logprob, top_logprobs, None, True))
        return events

    def _mark_seen(self, running: RunningRequest, tokens: Sequence[int]) -> None:
        """Note the tokens that a repetition penalty applies to."""
        if running.request.sampling.repetition_penalty == 1:
            return
        if self.seen is None:
            size = (self.slots, self.shape.vocab_size)
            self.seen = torch.zeros(size, dtype=torch.bool, device=self.sampling_device)
        self.seen[running.slot, tokens] = True

    def _release(self, running: RunningRequest) -> None:
        """Free the slot of a request."""
        del self.running[running.id]
        self.free_slots.append(running.slot)

    def _find_batch_sizes(self) -> tuple[list[int], bool]:
        """Return the decode batch sizes to use, and whether they are batch-invariant."""
        sizes = [1 << n for n in range(next_power_of_two(self.slots).bit_length())]
        if self.decoder is not None:
            sizes = [self.slots]
            self.cache.fill_with_same_values()
        logits = {size: self._probe_batch_size(size) for size in sizes}
        for index in range(len(sizes)):
            candidates = sizes[index:]
            first = logits[candidates[0]][0]
            if all(torch.equal(row, first) for size in candidates for row in logits[size]):
                return candidates, True
        return sizes[-1:], False

    @torch.inference_mode()
    def _probe_batch_size(self, size: int) -> list[Tensor]:
        """Return the logits of one token from every row of a batch, among copies and others."""
        token, other = 0, self.shape.vocab_size - 1
        mixed = torch.tensor([token, other] * size + [token] * size, device=self.device)
        spans = [Span(slot, 0, 1) for slot in range(min(size, self.slots))]
        rows = []
        for ids in (mixed[:size], mixed[1 : size + 1], mixed[-size:]):
            if self.decoder is None:
                view = CacheView(self.cache, spans, size, 1)
                x = self.model.hidden(ids[:, None], view.token_positions, cache=view)[:, 0]
                logits = self._logits(x)[: len(spans)]
            else:
                logits = self.decoder.probe(ids.tolist())
            rows += list(logits[ids[: len(spans)] == token])
        return rows


def next_power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below a number."""
    return 1 << (number - 1).bit_length()


def logprobs_of_token(
    logits: Tensor, token: int, top: int | None
) -> tuple[float | None, TopLogprobs]:
    """Return a token's log-probability, and the `top` highest ones, from (V,)."""
    if top is None:
        return None, ()
    logprobs = logits.log_softmax(dim=-1)
    best = logprobs.topk(top)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return logprobs[token].item(), tuple(pairs)
