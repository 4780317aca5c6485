"""How likely a text is: what every benchmark asks of a model.

In: passages. Out: for each the log-likelihood of its last tokens, and whether a greedy reader would
have said them. Passages of a batch are padded on the right, where a causal model does not look, and
only what is scored is projected to the vocabulary.
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
    """Score passages, in their order; long ones are computed first, so that memory fails at once.

    A score does not depend on the batch but in its last bits; sums are in float64.
    """
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 is to mean the same on every machine
    order = sorted(range(len(passages)), key=lambda i: -len(passages[i].tokens))
    found: dict[int, Score] = {}
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        scores = score_batch(model, [passages[i] for i in batch], hardware)
        found.update(zip(batch, scores, strict=True))
    return [found[i] for i in range(len(passages))]


def score_batch(model: GPT, passages: Sequence[Passage], hardware: Hardware) -> list[Score]:
    """Score passages in one forward pass."""
    T = max(len(passage.tokens) for passage in passages) - 1
    ids = torch.zeros(len(passages), T, dtype=torch.long)
    rows, places, targets = list[int](), list[int](), list[int]()
    never: dict[int, tuple[int, ...]] = {}  # by the row of logits
    for row, passage in enumerate(passages):
        read = len(passage.tokens) - 1
        ids[row, :read] = torch.tensor(passage.tokens[:-1])
        if passage.never:
            never[len(rows)] = passage.never
        rows += [row] * passage.scored
        places += range(read - passage.scored, read)
        targets += passage.tokens[read + 1 - passage.scored :]
    device = hardware.device
    with hardware.autocast():
        x = model.hidden(ids.to(device), torch.arange(T, device=device))  # (B, T, C)
        x = x[torch.tensor(rows, device=device), torch.tensor(places, device=device)]  # (N, C)
        logprobs, greedy = score_targets(model, x, torch.tensor(targets, device=device), never)
    counts = [passage.scored for passage in passages]
    each = zip(torch.split(logprobs, counts), torch.split(greedy, counts), strict=True)
    return [
        Score(values.double().sum().item(), bool(hits.all()), bool(hits[-1]))
        for values, hits in each
    ]


def score_targets(
    model: GPT, x: Tensor, targets: Tensor, never: dict[int, tuple[int, ...]]
) -> tuple[Tensor, Tensor]:
    """Return of (N, C) the targets' log-probabilities, and which were the likeliest; on the CPU."""
    logprobs, greedy, count = [], [], model.tokens_at_once(x)
    for first in range(0, len(x), count):
        wanted = targets[first : first + count]
        logits = model.logits(x[None, first : first + count])[0].float()  # (count, V)
        logprobs.append(-F.cross_entropy(logits, wanted, reduction="none"))
        for row, tokens in never.items():
            if first <= row < first + count:
                logits[row - first, list(tokens)] = -torch.inf
        greedy.append(are_likeliest(logits, wanted))
    return torch.cat(logprobs).cpu(), torch.cat(greedy).cpu()


def are_likeliest(logits: Tensor, targets: Tensor) -> Tensor:
    """Tell of (N, V) and (N,) which targets `argmax` finds; it looks only where one is a maximum.

    `amax` is ten times as fast, but does not tell which of several equal ones comes first.
    """
    found = logits.gather(1, targets[:, None])[:, 0] == logits.amax(dim=-1)
    rows = found.nonzero()[:, 0]
    found[rows] = logits[rows].argmax(dim=-1) == targets[rows]
    return found
