"""From logits to the next token, for many requests at once, each with settings of its own.

In: logits (R, V), and of each row its settings and a number from 0 to 1. Out: token ids (R,). A
row's token depends on that row alone. Nothing is sorted in full where it can be helped: a filter is
a threshold that logits must reach, so of equal logits all pass or none.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from yuzogpt.inference.requests import Sampling
from yuzogpt.rng import scramble

GREEDY = 1e-5  # a temperature below is 0
LIKELY = 1024  # so many tokens mostly hold top_p's share


def uniform(seed: int, index: int) -> float:
    """Return the number, 0 to 1, that draws new token `index`: a pure function, no random state.

    So a request gets the same text after whatever else was drawn, and on another machine.
    """
    key = scramble(np.array([seed], np.uint64))
    bits = int(scramble(key ^ np.uint64(index))[0]) >> 16
    return (bits + 0.5) / 2**48


def next_tokens(
    logits: Tensor, rows: Sequence[Sampling], uniforms: Sequence[float], seen: Tensor | None
) -> Tensor:
    """Return a token for each row; `seen`, (R, V): tokens that repetition_penalty applies to."""
    logits = logits.float()
    if seen is not None:
        logits = penalized(logits, column(logits, [row.repetition_penalty for row in rows]), seen)
    drawn = [i for i, row in enumerate(rows) if row.temperature >= GREEDY]
    if not drawn:
        return logits.argmax(dim=-1)
    filtered = keep_likely(pick(logits, drawn), [rows[i] for i in drawn])
    numbers = column(filtered, [uniforms[i] for i in drawn], torch.float64)
    if len(drawn) == len(rows):
        return draw(filtered, numbers)
    tokens = logits.argmax(dim=-1)
    tokens[drawn] = draw(filtered, numbers)
    return tokens


def pick(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """Return some rows; all of them without a copy."""
    return logits if len(rows) == len(logits) else logits[rows]


def column(like: Tensor, values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return one value a row, (R, 1)."""
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]


def penalized(logits: Tensor, penalty: Tensor, seen: Tensor) -> Tensor:
    """Make tokens that were there less likely (CTRL; Keskar et al., 2019)."""
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lowered, logits)


def keep_likely(logits: Tensor, rows: Sequence[Sampling]) -> Tensor:
    """Apply temperature, top_k, top_p and min_p, in this order; what is left out becomes -inf."""
    V = logits.shape[-1]
    logits = logits / column(logits, [row.temperature for row in rows])
    lowest = torch.full_like(logits[:, :1], -torch.inf)  # what a logit must reach
    limited = [i for i, row in enumerate(rows) if 0 < row.top_k < V]
    if limited:
        counts = torch.tensor([rows[i].top_k for i in limited], device=logits.device)
        best = pick(logits, limited).topk(int(counts.max()), dim=-1).values
        lowest[limited] = best.gather(1, counts[:, None] - 1)
        logits = at_least(logits, lowest)
    nucleus = [i for i, row in enumerate(rows) if row.top_p < 1]
    if nucleus:
        share = column(logits, [rows[i].top_p for i in nucleus], torch.float64)
        lowest[nucleus] = nucleus_threshold(pick(logits, nucleus), share)
        logits = at_least(logits, lowest)
    if any(row.min_p > 0 for row in rows):
        share = column(logits, [row.min_p for row in rows])
        logits = at_least(logits, logits.amax(dim=-1, keepdim=True) + share.log())
    return logits


def at_least(logits: Tensor, threshold: Tensor) -> Tensor:
    """Leave out what does not reach the threshold of its row, (R, 1)."""
    return logits.masked_fill(logits < threshold, -torch.inf)


def nucleus_threshold(logits: Tensor, share: Tensor) -> Tensor:
    """Return the logit of the last token that top_p keeps (Holtzman et al., 2020), (R, 1)."""
    most = logits.amax(dim=-1, keepdim=True)
    wanted = share * (logits - most).double().exp().sum(dim=-1, keepdim=True)
    best = logits.topk(min(LIKELY, logits.shape[-1]), dim=-1).values
    reached = (best - most).double().exp().cumsum(dim=-1)
    missing = (reached[:, -1:] < wanted).flatten()
    threshold = best.gather(1, last_needed(reached, wanted))
    if missing.any():  # a flat row: all of it must be sorted
        best = logits[missing].sort(dim=-1, descending=True).values
        reached = (best - most[missing]).double().exp().cumsum(dim=-1)
        threshold[missing] = best.gather(1, last_needed(reached, wanted[missing]))
    return threshold


def last_needed(reached: Tensor, wanted: Tensor) -> Tensor:
    """Return the first place at which the sum so far is enough, (R, 1)."""
    return torch.searchsorted(reached, wanted).clamp(max=reached.shape[-1] - 1)


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """Draw from the softmax: the token in whose share of the line from 0 to 1 the number falls."""
    line = logits.softmax(dim=-1).double().cumsum(dim=-1)
    place = torch.searchsorted(line, numbers * line[:, -1:], right=True)
    return place.squeeze(1).clamp(max=logits.shape[-1] - 1)
