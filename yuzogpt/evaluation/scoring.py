"""Score passages: the log-likelihood of their last tokens, and whether they are the greedy choice.

Passages of a batch are padded on the right, where a causal model does not look, and only scored
positions are projected to the vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from yuzogpt.evaluation.passages import Passage, Score
from yuzogpt.model.gpt import GPT
from yuzogpt.runtime.device import Hardware


@torch.inference_mode()
def score(
    model: GPT, passages: Sequence[Passage], batch_size: int, hardware: Hardware
) -> list[Score]:
    """Score passages, in their order; long ones run first, so that a lack of memory shows at once.

    A score depends on the batch in its last bits only; sums are in float64.
    """
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 must mean the same on every machine
    order = sorted(range(len(passages)), key=lambda i: -len(passages[i].tokens))
    scores: dict[int, Score] = {}
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        batch_scores = score_batch(model, [passages[i] for i in batch], hardware)
        scores.update(zip(batch, batch_scores, strict=True))
    return [scores[i] for i in range(len(passages))]


def score_batch(model: GPT, passages: Sequence[Passage], hardware: Hardware) -> list[Score]:
    """Score passages in one forward pass."""
    T = max(len(passage.tokens) for passage in passages) - 1
    ids = torch.zeros(len(passages), T, dtype=torch.long)
    rows, positions, targets = list[int](), list[int](), list[int]()
    banned: dict[int, tuple[int, ...]] = {}  # by the row of logits
    for row, passage in enumerate(passages):
        length = len(passage.tokens) - 1
        ids[row, :length] = torch.tensor(passage.tokens[:-1])
        if passage.banned_tokens:
            banned[len(rows)] = passage.banned_tokens
        rows += [row] * passage.scored
        positions += range(length - passage.scored, length)
        targets += passage.tokens[length + 1 - passage.scored :]
    device = hardware.device
    with hardware.autocast():
        x = model.hidden(ids.to(device), torch.arange(T, device=device))  # (B, T, C)
        x = x[torch.tensor(rows, device=device), torch.tensor(positions, device=device)]  # (N, C)
        logprobs, greedy = score_targets(model, x, torch.tensor(targets, device=device), banned)
    counts = [passage.scored for passage in passages]
    by_passage = zip(torch.split(logprobs, counts), torch.split(greedy, counts), strict=True)
    return [
        Score(values.double().sum().item(), bool(hits.all()), bool(hits[-1]))
        for values, hits in by_passage
    ]


def score_targets(
    model: GPT, x: Tensor, targets: Tensor, banned: dict[int, tuple[int, ...]]
) -> tuple[Tensor, Tensor]:
    """Return for (N, C) the targets' log-probabilities and whether each is the argmax; on the CPU.

    `banned`: by row, tokens that are left out of the argmax.
    """
    logprobs, greedy, count = [], [], model.tokens_at_once(x)
    for first in range(0, len(x), count):
        part = targets[first : first + count]
        logits = model.logits(x[None, first : first + count])[0].float()  # (count, V)
        logprobs.append(-F.cross_entropy(logits, part, reduction="none"))
        for row, tokens in banned.items():
            if first <= row < first + count:
                logits[row - first, list(tokens)] = -torch.inf
        greedy.append(are_argmax(logits, part))
    return torch.cat(logprobs).cpu(), torch.cat(greedy).cpu()


def are_argmax(logits: Tensor, targets: Tensor) -> Tensor:
    """Return for (N, V) and (N,) which targets are the argmax of their row.

    `amax` is ten times as fast as `argmax`, but does not say which of several equal logits comes
    first, so `argmax` runs only on rows whose target is a maximum.
    """
    is_max = logits.gather(1, targets[:, None])[:, 0] == logits.amax(dim=-1)
    rows = is_max.nonzero()[:, 0]
    is_max[rows] = logits[rows].argmax(dim=-1) == targets[rows]
    return is_max
