"""Decode steps of one fixed shape, recorded as a CUDA graph.

On a GPU the hundreds of kernels of a decode step finish sooner than Python can launch them. A CUDA
graph launches them together, but needs fixed shapes. So every step computes all slots, running or
free, and each attends to its slot's full length under a mask. With torch.compile there are fewer
kernels, too.
"""

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from yuzogpt.errors import first_line
from yuzogpt.inference.kv_cache import KVCache, Span
from yuzogpt.model.gpt import GPT
from yuzogpt.model.positions import Positions, causal_mask
from yuzogpt.runtime.device import keep_compiled_code_private

WARMUP_STEPS = 3  # before recording: libraries allocate their memory and choose their kernels


class GraphedDecoder:
    """Decodes one token of every slot at a time."""

    @torch.inference_mode()
    def __init__(self, model: GPT, cache: KVCache, compiled: bool = False) -> None:
        """Compile the step if `compiled`; on a GPU, record it."""
        self.model = model
        self.cache = cache
        slots, device = cache.keys.shape[1], cache.keys.device
        cache.clear()  # masked keys and values must be finite, too
        self.ids = torch.zeros(slots, 1, dtype=torch.long, device=device)
        self.token_positions = torch.zeros(slots, 1, dtype=torch.long, device=device)
        self.step: Callable[[], tuple[Tensor, Tensor]] = self._compute
        self.is_compiled = False
        if compiled:
            keep_compiled_code_private()
            step = torch.compile(self._compute, dynamic=False)
            if try_feature("torch.compile", step):  # it fails without a compiler, for example
                self.step, self.is_compiled = step, True
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            try_feature("a CUDA graph, slowly", lambda: self._record(recording_stream(device)))

    def _record(self, stream: torch.cuda.Stream) -> None:
        """Record the step; another engine may compute at the same time, in another thread."""
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_STEPS):
                self.step()
        torch.cuda.current_stream(stream.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.outputs = self.step()
        self.graph = graph

    def decode(
        self, spans: Sequence[Span], tokens: Sequence[int], lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Add a token to each of n slots; return their (n, C) and (n, V).

        `lengths`: the cached tokens of every slot. A slot without a span computes a dummy token,
        whose keys and values go behind its cached ones and are overwritten by its next token.
        """
        ids, positions = [0] * len(lengths), list(lengths)
        for span, token in zip(spans, tokens, strict=True):
            ids[span.slot], positions[span.slot] = token, span.first
        self.ids.copy_(torch.tensor(ids)[:, None])
        self.token_positions.copy_(torch.tensor(positions)[:, None])
        if self.graph is None:
            x, logits = self.step()
        else:
            self.graph.replay()
            x, logits = self.outputs
        slots = torch.tensor([span.slot for span in spans], device=x.device)
        return x[slots], logits[slots]

    def probe(self, tokens: Sequence[int]) -> Tensor:
        """Return (slots, V) of one token per slot, in the middle of its context."""
        middle = self.cache.keys.shape[3] // 2
        spans = [Span(slot, middle, 1) for slot in range(len(tokens))]
        return self.decode(spans, tokens, [middle] * len(tokens))[1]

    def _compute(self) -> tuple[Tensor, Tensor]:
        """Return (slots, C) and (slots, V)."""
        view = AllSlotsView(self.cache, self.token_positions[:, 0])
        x = self.model.hidden(self.ids, self.token_positions, cache=view)
        return x[:, 0], self.model.logits(x)[:, 0]


class AllSlotsView:
    """The cache in a step of all slots: row i of the batch is slot i, with one token."""

    def __init__(self, cache: KVCache, token_positions: Tensor) -> None:
        """`token_positions`: of each slot's token, (slots,)."""
        self.cache = cache
        self.token_positions = token_positions
        self.slots = torch.arange(len(token_positions), device=token_positions.device)
        self.key_positions = torch.arange(cache.keys.shape[3], device=token_positions.device)
        self.mask: Tensor | None = None  # the same in all layers

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
        """Write k and v into the cache; return the attention output, (slots, H, 1, D)."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]  # (slots, H, block_size, D)
        keys[self.slots, :, self.token_positions] = k[:, :, 0]
        values[self.slots, :, self.token_positions] = v[:, :, 0]
        if self.mask is None:
            bias = positions.bias(self.token_positions, self.key_positions)
            mask = causal_mask(self.token_positions, self.key_positions, bias)
            # (slots, block_size), or (1, H, slots, block_size) with a bias
            mask = mask[:, None, None] if mask.dim() == 2 else mask.permute(2, 1, 0, 3)
            self.mask = mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, keys, values, self.mask)


def try_feature(feature: str, run: Callable[[], object]) -> bool:
    """Run something that decoding can do without; if it fails, warn and return False."""
    try:
        run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        warnings.warn(f"decoding without {feature}: {first_line(error)}", stacklevel=3)
        return False
    return True


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of a device for recordings: libraries keep memory for each stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
