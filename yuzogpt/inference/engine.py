"""Decoding for many requests at once: they join and leave between tokens.

In: a model, and requests. Out: events, one a token. The engine is a plain object that is driven
step by step, by one caller: `submit`, then `step` as long as it is `busy`; `cancel` at any time.
A step computes at most `chunk` tokens of new prompts, so that a long one does not hold up the
others, and one token of each request whose prompt was done before.

A request's tokens do not depend on what else runs, to the last bit. Every forward pass has one of
few shapes: one row of 2, 4, ... `chunk` tokens of a prompt, which depends on the prompt alone, or
1, 2, 4, ... rows of one token; what is left over is padding. From how many rows on a row's bits do
not depend on how many there are, and in which of them it is, is tried with this model on this
device when the engine is made; fewer rows are then never computed. Where no number keeps rows
apart, `batch_invariant` says so. On a GPU there is one number, that of all slots (slots.py).

Past the context's end (block_size) a request goes on with a later window: the oldest tokens are
left out, a quarter of the context at a time, and the rest is computed anew, since every cached key
knows its token's position. Or it ends there (`slide=False`).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from yuzogpt.errors import UserError
from yuzogpt.inference.cuda_graph import GraphedDecoder
from yuzogpt.inference.detokenize import TextStream
from yuzogpt.inference.kv_cache import KVCache, Span
from yuzogpt.inference.packed_linear import activations, pack_weights
from yuzogpt.inference.requests import Event, Finish, Request
from yuzogpt.inference.sampler import next_tokens, uniform
from yuzogpt.model.gpt import GPT
from yuzogpt.tokenization.tokenizer import Tokenizer


def window_start(tokens: int, block_size: int) -> int:
    """Return the first token that a model sees of so many: 0 while they fit, then in strides."""
    stride = max(1, block_size // 4)
    return -(-max(0, tokens - block_size) // stride) * stride


@dataclass
class Running:
    """A request that has a slot."""

    id: int
    request: Request
    slot: int
    tokens: list[int]
    text: TextStream
    start: int  # of the window: the first token that the model sees
    cached: int = 0  # tokens of the window whose keys and values are in the slot
    echoed: int = 0  # tokens of the prompt that have had their event
    echo: TextStream | None = None
    new: int = field(init=False, default=0)

    def missing(self) -> int:
        """Count the tokens of the window that are not in the cache."""
        return len(self.tokens) - self.start - self.cached


class Engine:
    """A model, the caches of its slots, and the requests that have them."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        slots: int = 8,
        chunk: int = 64,
        packed: bool = True,
        in_all_slots: bool | None = None,
        compiled: bool = False,
    ) -> None:
        """Take the model over (its weights are laid out anew); `slots`: requests at a time.

        `packed=False` keeps float32 weights as they are, so that processes on a node can share
        them by memory map. `in_all_slots`: each step computes all slots; None: on a GPU.
        `compiled`: such steps go through torch.compile, which takes its time now.
        """
        assert slots > 0 and chunk > 0
        self.shape = model.settings
        self.tokenizer = tokenizer
        self.device = device
        self.dtype = dtype
        self.chunk = chunk
        # Apple's GPUs have no float64, which the samplers add probabilities up in.
        self.sampled_on = torch.device("cpu") if device.type == "mps" else device
        self.model = pack_weights(model.eval(), dtype, device, packed)
        self.cache = KVCache(self.shape, slots, activations(dtype, device), device)
        self.slots = slots
        self.free = list(range(slots))
        self.waiting: deque[tuple[int, Request]] = deque()
        self.running: dict[int, Running] = {}
        self.seen: Tensor | None = None  # (slots, V), once a request has a repetition penalty
        self.ids = count()
        in_all_slots = device.type == "cuda" if in_all_slots is None else in_all_slots
        self.all_slots = GraphedDecoder(self.model, self.cache, compiled) if in_all_slots else None
        self.group_sizes, self.batch_invariant = self._find_group_sizes()

    @property
    def busy(self) -> bool:
        """Tell whether a step has anything to do."""
        return bool(self.waiting or self.running)

    def submit(self, request: Request) -> int:
        """Queue a request; return the id that its events carry. UserError if it cannot be met."""
        self.check(request)
        number = next(self.ids)
        self.waiting.append((number, request))
        return number

    def cancel(self, number: int) -> bool:
        """Forget a request, and free its slot at once; False if it has ended already."""
        running = self.running.get(number)
        if running is not None:
            self._release(running)
            return True
        kept = [item for item in self.waiting if item[0] != number]
        found = len(kept) < len(self.waiting)
        self.waiting = deque(kept)
        return found

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Do a bounded amount of work; return what came of it, in no order of requests."""
        events = self._admit()
        ready = [one for one in self.running.values() if one.missing() == 1]
        for first in range(0, len(ready), self.group_sizes[-1]):
            events += self._decode(ready[first : first + self.group_sizes[-1]])
        return events + self._step_prompts()

    def check(self, request: Request) -> None:
        request.sampling.check()
        length, most = len(request.prompt), self.shape.block_size
        if length == 0:
            raise UserError("the prompt is empty; give at least one token")
        if not all(0 <= token < self.shape.vocab_size for token in request.prompt):
            last = self.shape.vocab_size - 1
            raise UserError(f"the prompt has a token that is not in 0 to {last}")
        if request.max_new_tokens < 0:
            raise UserError(f"max_new_tokens={request.max_new_tokens}: below 0")
        if request.logprobs is not None and not 0 <= request.logprobs <= self.shape.vocab_size:
            raise UserError(f"logprobs={request.logprobs}: not in 0 to {self.shape.vocab_size}")
        if length > most and (request.echo or not request.slide):
            why = "echo" if request.echo else "a context that does not slide"
            raise UserError(f"the prompt has {length} tokens; with {why}, at most {most}")

    def _admit(self) -> list[Event]:
        """Give free slots to those who wait, first come, first served."""
        events = []
        while self.waiting and self.free:
            number, request = self.waiting.popleft()
            if request.max_new_tokens == 0 and not request.echo:
                events.append(Event(number, None, finish="length"))
                continue
            tokens = [int(token) for token in request.prompt]
            text = TextStream(self.tokenizer, request.stop)
            start = window_start(len(tokens), self.shape.block_size)
            running = Running(number, request, self.free.pop(0), tokens, text, start)
            running.echo = TextStream(self.tokenizer) if request.echo else None
            self.running[number] = running
            self._remember(running, tokens, anew=True)
        return events

    def _step_prompts(self) -> list[Event]:
        """Compute up to `chunk` tokens of prompts (and of windows that have slid)."""
        events: list[Event] = []
        left = self.chunk
        for running in list(self.running.values()):
            while left > 0 and running.missing() > 1:
                T = min(self.chunk, round_up(running.missing()))
                if left < T:  # the next step's: its shape must not depend on what is left
                    return events
                left -= T
                (span,), x = self._forward([running], 1, T)
                events += self._score_prompt(running, x[0], span.count)
                if running.missing() == 0:
                    events += self._choose([running], self._logits(x[:, span.count - 1]))
                    break
        return events

    def _decode(self, group: Sequence[Running]) -> list[Event]:
        """Compute the newest token of each request, and choose the next."""
        if self.all_slots is None:
            size = next(size for size in self.group_sizes if size >= len(group))
            x = self._forward(group, size, 1)[1][:, 0]
            logits = self._logits(x)
        else:
            cached = [0] * self.slots
            for running in self.running.values():
                cached[running.slot] = running.cached
            spans = [self._take(running, 1) for running in group]
            x, logits = self.all_slots.decode(spans, [one.tokens[-1] for one in group], cached)
        events: list[Event] = []
        for row, running in enumerate(group):
            events += self._score_prompt(running, x[row : row + 1], 1)
        return events + self._choose(group, logits)

    def _forward(self, rows: Sequence[Running], B: int, T: int) -> tuple[list[Span], Tensor]:
        """Put up to T tokens of each row into its cache; return which, and (B, T, C)."""
        spans, ids = [], torch.zeros(B, T, dtype=torch.long)
        for row, running in enumerate(rows):
            span = self._take(running, T)
            first = running.start + span.first
            ids[row, : span.count] = torch.tensor(running.tokens[first : first + span.count])
            spans.append(span)
        view = self.cache.view(spans, B, T)
        return spans, self.model.hidden(ids.to(self.device), view.at, cache=view)

    def _take(self, running: Running, most: int) -> Span:
        """Return the next tokens of a request to be put into the cache."""
        span = Span(running.slot, running.cached, min(most, running.missing()))
        running.cached = span.end
        return span

    def _logits(self, x: Tensor) -> Tensor:
        """(B, C) -> (B, V)."""
        return self.model.logits(x[:, None])[:, 0]

    def _choose(self, rows: Sequence[Running], logits: Tensor) -> list[Event]:
        """Draw the next token of each row from (B, V)."""
        logits = logits[: len(rows)].float().to(self.sampled_on)
        wanted = [running.request.sampling for running in rows]
        numbers = [uniform(running.request.sampling.seed, running.new) for running in rows]
        seen = None
        if any(sampling.repetition_penalty != 1 for sampling in wanted):
            assert self.seen is not None
            seen = self.seen[[running.slot for running in rows]]
        tokens = next_tokens(logits, wanted, numbers, seen).tolist()
        return [
            self._add(running, token, logits[row])
            for row, (running, token) in enumerate(zip(rows, tokens, strict=True))
        ]

    def _add(self, running: Running, token: int, logits: Tensor) -> Event:
        """Append a new token; end the request, or prepare its next token."""
        request = running.request
        if request.max_new_tokens == 0:  # only its prompt was asked for
            self._release(running)
            return Event(running.id, None, finish="length")
        logprob, alternatives = score(logits, token, request.logprobs)
        running.tokens.append(token)
        running.new += 1
        self._remember(running, [token])
        finish: Finish | None = None
        if request.stop_at_end_of_text and token == self.tokenizer.end_of_text:
            text, finish = running.text.flush(), "end_of_text"
        else:
            text = running.text.push(token)
        fits = request.slide or len(running.tokens) <= self.shape.block_size
        if running.text.stopped:
            finish = "stop"
        elif finish is None and (running.new == request.max_new_tokens or not fits):
            text, finish = text + running.text.flush(), "length"
        if finish is not None:
            self._release(running)
        elif len(running.tokens) - running.start > self.shape.block_size:
            running.start = window_start(len(running.tokens), self.shape.block_size)
            running.cached = 0
        return Event(running.id, token, text, logprob, alternatives, finish)

    def _score_prompt(self, running: Running, x: Tensor, done: int) -> list[Event]:
        """Return the events of the prompt's tokens that (done, C) tells of, if they are wanted."""
        if running.echo is None or running.echoed == len(running.request.prompt):
            return []
        prompt, wanted = running.request.prompt, running.request.logprobs
        logits = self.model.logits(x[None])[0, :done].float()
        known = running.cached - done + 1  # the token that the first row foretells
        told: list[tuple[float | None, tuple[tuple[int, float], ...]]]
        told = [(None, ())] if running.echoed == 0 else []  # nothing foretells the first
        for row, token in enumerate(prompt[known : known + done]):
            told.append(score(logits[row], int(token), wanted))
        events = []
        for logprob, alternatives in told:
            token = int(prompt[running.echoed])
            running.echoed += 1
            text = running.echo.push(token)
            if running.echoed == len(prompt):
                text += running.echo.flush()
            events.append(Event(running.id, token, text, logprob, alternatives, None, True))
        return events

    def _remember(self, running: Running, tokens: Sequence[int], anew: bool = False) -> None:
        """Note the tokens that a repetition penalty applies to."""
        if running.request.sampling.repetition_penalty == 1:
            return
        if self.seen is None:
            size = (self.slots, self.shape.vocab_size)
            self.seen = torch.zeros(size, dtype=torch.bool, device=self.sampled_on)
        if anew:
            self.seen[running.slot] = False
        self.seen[running.slot, tokens] = True

    def _release(self, running: Running) -> None:
        """Free the slot of a request."""
        del self.running[running.id]
        self.free.append(running.slot)

    def _find_group_sizes(self) -> tuple[list[int], bool]:
        """Return numbers of rows that give a row the same bits, and whether there are such."""
        sizes = [1 << n for n in range(round_up(self.slots).bit_length())]
        if self.all_slots is not None:
            sizes = [self.slots]
            self.cache.fill_with_same_values()
        logits = {size: self._try_rows(size) for size in sizes}
        for place in range(len(sizes)):
            kept = sizes[place:]
            first = logits[kept[0]][0]
            if all(torch.equal(row, first) for size in kept for row in logits[size]):
                return kept, True
        return sizes[-1:], False

    @torch.inference_mode()
    def _try_rows(self, size: int) -> list[Tensor]:
        """Return the logits of one token, from each of `size` rows, among others of another."""
        one, other = 0, self.shape.vocab_size - 1
        mixed = torch.tensor([one, other] * size + [one] * size, device=self.device)
        spans = [Span(slot, 0, 1) for slot in range(min(size, self.slots))]
        found = []
        for ids in (mixed[:size], mixed[1 : size + 1], mixed[-size:]):
            if self.all_slots is None:
                view = self.cache.view(spans, size, 1)
                x = self.model.hidden(ids[:, None], view.at, cache=view)[:, 0]
                logits = self._logits(x)[: len(spans)]
            else:
                logits = self.all_slots.try_out(ids.tolist())
            found += list(logits[ids[: len(spans)] == one])
        return found


def round_up(tokens: int) -> int:
    """Return the next power of two."""
    return 1 << (tokens - 1).bit_length()


def score(
    logits: Tensor, token: int, wanted: int | None
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """Return a token's log-probability, and those of the likeliest (V,)."""
    if wanted is None:
        return None, ()
    logprobs = logits.log_softmax(dim=-1)
    best = logprobs.topk(wanted)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return logprobs[token].item(), tuple(pairs)
