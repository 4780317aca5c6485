"""What a model is asked: tokens that follow each other, of which the last few are scored.

In: the ids of texts. Out: passages that fit into a model's context. Needs no torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from yuzogpt.tokenization.tokenizer import Tokenizer, start_of


@dataclass(frozen=True)
class Passage:
    """Tokens; all but the last are read, and the last `scored` foretold."""

    tokens: tuple[int, ...]
    scored: int
    never: tuple[int, ...] = ()  # what a greedy reader does not say first


@dataclass(frozen=True)
class Score:
    """How likely the scored tokens of a passage are, together."""

    logprob: float  # in nats
    is_greedy: bool  # each was the likeliest
    ends_greedy: bool  # the last one was, after the others


def windows(tokens: Sequence[int], before: int, block_size: int, stride: int) -> Iterator[Passage]:
    """Cut a long text into passages that score each token once, with as much context as fits.

    `before`: the token that stands for the beginning. The first window foretells block_size tokens,
    each later one `stride`, of which none sees less than block_size - stride tokens. With a stride
    of block_size they have nothing in common, but for the last, which sees all that it can.
    """
    assert 0 < stride <= block_size
    whole = (before, *tokens)
    end = 1  # the first token that is not scored yet
    while end < len(whole):
        count = min(block_size if end == 1 else stride, len(whole) - end)
        end += count
        yield Passage(tuple(whole[max(0, end - block_size - 1) : end]), count)


def continuation(
    context: str, text: str, tokenizer: Tokenizer, block_size: int, never: tuple[int, ...] = ()
) -> Passage:
    """Score a text after a context, which is shortened in front where both do not fit.

    As in lm-evaluation-harness, spaces at the end of the context count as the text's, and both are
    encoded together: ids that straddle the two belong to the text.
    """
    stripped = context.rstrip()
    text, context = context[len(stripped) :] + text, stripped
    if not context:
        ids = tokenizer.encode(text).tolist()
        start = start_of(tokenizer)
        # A text that begins with that token needs no other.
        read, scored = (ids[:1], ids[1:]) if ids[:1] == [start] else ([start], ids)
    else:
        ids = tokenizer.encode(context + text).tolist()
        known = len(tokenizer.encode(context))
        read, scored = ids[:known], ids[known:]
    tokens = [*read, *scored][-(block_size + 1) :]
    return Passage(tuple(tokens), min(len(scored), block_size, len(tokens) - 1), never)
