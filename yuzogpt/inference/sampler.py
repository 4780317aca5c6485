"""Sampling: logits -> next tokens, for many requests at once, each with its own settings.

A row's token depends on that row only. Full sorts are avoided: each filter is a threshold that
logits must reach, so of equal logits either all pass or none.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from yuzogpt.inference.requests import SamplingParams
from yuzogpt.rng import scramble

MIN_TEMPERATURE = 1e-5  # below: greedy
TOP_P_CANDIDATES = 1024  # tokens that are sorted first for top_p; they are nearly always enough


def uniform(seed: int, index: int) -> float:
    """Return the number in (0, 1) that draws new token `index`: a pure function, no random state.

    So a request gets the same text whatever was drawn before, and on any machine.
    """
    key = scramble(np.array([seed], np.uint64))
    bits = int(scramble(key ^ np.uint64(index))[0]) >> 16
    return (bits + 0.5) / 2**48


def sample_tokens(
    logits: Tensor,
    params: Sequence[SamplingParams],
    uniforms: Sequence[float],
    seen: Tensor | None,
) -> Tensor:
    """Return a token (R,) for each row of logits (R, V), drawn by a number in (0, 1) per row.

    `seen` (R, V): the tokens that repetition_penalty applies to.
    """
    logits = logits.float()
    if seen is not None:
        penalty = per_row(logits, [row.repetition_penalty for row in params])
        logits = apply_repetition_penalty(logits, penalty, seen)
    drawn = [i for i, row in enumerate(params) if row.temperature >= MIN_TEMPERATURE]
    if not drawn:
        return logits.argmax(dim=-1)
    filtered = filter_logits(select_rows(logits, drawn), [params[i] for i in drawn])
    numbers = per_row(filtered, [uniforms[i] for i in drawn], torch.float64)
    if len(drawn) == len(params):
        return draw(filtered, numbers)
    tokens = logits.argmax(dim=-1)
    tokens[drawn] = draw(filtered, numbers)
    return tokens


def select_rows(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """Return some rows, without a copy if they are all."""
    return logits if len(rows) == len(logits) else logits[rows]


def per_row(like: Tensor, values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return one value per row, (R, 1), on the device of `like`."""
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]


def apply_repetition_penalty(logits: Tensor, penalty: Tensor, seen: Tensor) -> Tensor:
    """Make seen tokens less probable (CTRL; Keskar et al., 2019)."""
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lowered, logits)


def filter_logits(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Apply temperature, top_k, top_p and min_p, in this order; removed tokens become -inf."""
    V = logits.shape[-1]
    logits = logits / per_row(logits, [row.temperature for row in params])
    threshold = torch.full_like(logits[:, :1], -torch.inf)
    limited = [i for i, row in enumerate(params) if 0 < row.top_k < V]
    if limited:
        counts = torch.tensor([params[i].top_k for i in limited], device=logits.device)
        best = select_rows(logits, limited).topk(int(counts.max()), dim=-1).values
        threshold[limited] = best.gather(1, counts[:, None] - 1)
        logits = mask_below(logits, threshold)
    nucleus = [i for i, row in enumerate(params) if row.top_p < 1]
    if nucleus:
        top_p = per_row(logits, [params[i].top_p for i in nucleus], torch.float64)
        threshold[nucleus] = nucleus_threshold(select_rows(logits, nucleus), top_p)
        logits = mask_below(logits, threshold)
    if any(row.min_p > 0 for row in params):
        min_p = per_row(logits, [row.min_p for row in params])
        logits = mask_below(logits, logits.amax(dim=-1, keepdim=True) + min_p.log())
    return logits


def mask_below(logits: Tensor, threshold: Tensor) -> Tensor:
    """Set logits below the threshold of their row, (R, 1), to -inf."""
    return logits.masked_fill(logits < threshold, -torch.inf)


def nucleus_threshold(logits: Tensor, top_p: Tensor) -> Tensor:
    """Return the logit of the last token that top_p keeps (Holtzman et al., 2020), (R, 1)."""
    peak = logits.amax(dim=-1, keepdim=True)
    target = top_p * (logits - peak).double().exp().sum(dim=-1, keepdim=True)
    best = logits.topk(min(TOP_P_CANDIDATES, logits.shape[-1]), dim=-1).values
    mass = (best - peak).double().exp().cumsum(dim=-1)
    too_few = (mass[:, -1:] < target).flatten()
    threshold = best.gather(1, last_kept(mass, target))
    if too_few.any():  # a flat distribution: sort the whole row
        best = logits[too_few].sort(dim=-1, descending=True).values
        mass = (best - peak[too_few]).double().exp().cumsum(dim=-1)
        threshold[too_few] = best.gather(1, last_kept(mass, target[too_few]))
    return threshold


def last_kept(mass: Tensor, target: Tensor) -> Tensor:
    """Return the first index at which the cumulative mass reaches the target, (R, 1)."""
    return torch.searchsorted(mass, target).clamp(max=mass.shape[-1] - 1)


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """Draw from the softmax by inverting its cumulative distribution at the numbers, (R, 1)."""
    cdf = logits.softmax(dim=-1).double().cumsum(dim=-1)
    index = torch.searchsorted(cdf, numbers * cdf[:, -1:], right=True)
    return index.squeeze(1).clamp(max=logits.shape[-1] - 1)
