"""One token for every slot at once, always in the same shape: how a GPU decodes.

In: the newest token of some slots, and where it stands. Out: hidden vectors and logits of theirs.
On a GPU the hundreds of kernels of a step are done sooner than Python has launched them. So they
are recorded once, as a CUDA graph, and then launched together. For that all shapes stay the same:
every slot is computed, and sees the whole of its room in the cache under a mask, whoever has it.
Compiled before, the kernels are fewer, too.
"""

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from yuzogpt.inference.kv_cache import KVCache, Span
from yuzogpt.model.gpt import GPT
from yuzogpt.model.positions import Positions, causal_mask
from yuzogpt.runtime.device import keep_compiled_code_private

TRIALS = 3  # before the recording: libraries allocate what they need, and choose their kernels


class GraphedDecoder:
    """A model, and the step of all its slots."""

    @torch.inference_mode()
    def __init__(self, model: GPT, cache: KVCache, compiled: bool = False) -> None:
        """Compile the step, if so wanted; on a GPU, record it."""
        self.model = model
        self.cache = cache
        slots, device = cache.keys.shape[1], cache.keys.device
        cache.clear()  # what a mask hides must be a number
        self.ids = torch.zeros(slots, 1, dtype=torch.long, device=device)
        self.at = torch.zeros(slots, 1, dtype=torch.long, device=device)
        self.step: Callable[[], tuple[Tensor, Tensor]] = self._compute
        if compiled:
            self._compile()
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            try:
                self._record(recording_stream(device))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                warnings.warn(without("a CUDA graph, slowly", error), stacklevel=2)

    def _compile(self) -> None:
        """Compile the step, and see whether it can be computed so."""
        keep_compiled_code_private()
        self.step = torch.compile(self._compute, dynamic=False)
        try:
            self.step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # no compiler, say
            self.step = self._compute
            warnings.warn(without("torch.compile", error), stacklevel=3)

    def _record(self, stream: torch.cuda.Stream) -> None:
        """Record the step; another engine may compute meanwhile, in another thread."""
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for _ in range(TRIALS):
                self.step()
        torch.cuda.current_stream(stream.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.recorded = self.step()
        self.graph = graph

    def decode(
        self, spans: Sequence[Span], tokens: Sequence[int], cached: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return (n, C) and (n, V) of the tokens of n slots, which enter the cache.

        `cached`: how many tokens of each slot are in the cache; whatever a slot that is not among
        the spans writes, it writes behind them, where its next token comes.
        """
        ids, at = [0] * len(cached), list(cached)
        for span, token in zip(spans, tokens, strict=True):
            ids[span.slot], at[span.slot] = token, span.first
        self.ids.copy_(torch.tensor(ids)[:, None])
        self.at.copy_(torch.tensor(at)[:, None])
        if self.graph is None:
            x, logits = self.step()
        else:
            self.graph.replay()
            x, logits = self.recorded
        slots = torch.tensor([span.slot for span in spans], device=x.device)
        return x[slots], logits[slots]

    def try_out(self, tokens: Sequence[int]) -> Tensor:
        """Return (slots, V) of a token for each slot, in the middle of its context."""
        middle = self.cache.keys.shape[3] // 2
        spans = [Span(slot, middle, 1) for slot in range(len(tokens))]
        return self.decode(spans, tokens, [middle] * len(tokens))[1]

    def _compute(self) -> tuple[Tensor, Tensor]:
        """Return (slots, C) and (slots, V)."""
        view = AllSlotsView(self.cache, self.at[:, 0])
        x = self.model.hidden(self.ids, self.at, cache=view)
        return x[:, 0], self.model.logits(x)[:, 0]


class AllSlotsView:
    """The cache in a step of all slots: row i of the batch is slot i, with one token."""

    def __init__(self, cache: KVCache, at: Tensor) -> None:
        """`at`: where each slot's token stands, (slots,)."""
        self.cache = cache
        self.at = at
        self.slots = torch.arange(len(at), device=at.device)
        self.keys_at = torch.arange(cache.keys.shape[3], device=at.device)
        self.mask: Tensor | None = None  # the same in all layers

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
        """Write k and v; return what q sees, (slots, H, 1, D)."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]  # (slots, H, length, D)
        keys[self.slots, :, self.at] = k[:, :, 0]
        values[self.slots, :, self.at] = v[:, :, 0]
        if self.mask is None:
            seen = causal_mask(self.at, self.keys_at, positions.bias(self.at, self.keys_at))
            # (slots, length), or (1, H, slots, length) with a bias
            seen = seen[:, None, None] if seen.dim() == 2 else seen.permute(2, 1, 0, 3)
            self.mask = seen.to(q.dtype)
        return F.scaled_dot_product_attention(q, keys, values, self.mask)


def without(what: str, error: RuntimeError) -> str:
    """Return a line about what could not be had."""
    return f"decoding without {what}: {str(error).partition(chr(10))[0]}"


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of a device for recordings: libraries keep memory for each stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
