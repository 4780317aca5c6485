"""What a model is asked to score: tokens in a row, of which the last few count.

Texts are cut into passages that fit into the model's context. Needs no torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from yuzogpt.tokenization.tokenizer import Tokenizer, start_of


@dataclass(frozen=True)
class Passage:
    """Tokens: all but the last are the model's input, and the last `scored` are its targets."""

    tokens: tuple[int, ...]
    scored: int
    banned_tokens: tuple[int, ...] = ()  # left out of the greedy prediction


@dataclass(frozen=True)
class Score:
    """How probable the scored tokens of a passage are, together."""

    logprob: float  # in nats
    is_greedy: bool  # each scored token was the most probable one
    ends_greedy: bool  # the last one was, given the others


def windows(
    tokens: Sequence[int], start_token: int, block_size: int, stride: int
) -> Iterator[Passage]:
    """Cut a long text into passages that score each token once, with as much context as fits.

    `start_token` stands for the beginning of the text. The first window scores block_size tokens,
    each later one `stride` tokens with at least block_size - stride tokens before each. With
    stride = block_size no two windows overlap, but for the last, which takes all context that fits.
    """
    assert 0 < stride <= block_size
    whole = (start_token, *tokens)
    end = 1  # the first token that is not scored yet
    while end < len(whole):
        count = min(block_size if end == 1 else stride, len(whole) - end)
        end += count
        yield Passage(tuple(whole[max(0, end - block_size - 1) : end]), count)


def continuation(context: str, text: str, tokenizer: Tokenizer, block_size: int) -> Passage:
    """Score a text after a context, whose beginning is dropped if both do not fit.

    As in lm-evaluation-harness, spaces at the end of the context belong to the text, and both are
    encoded together: a token that is part of both belongs to the text.
    """
    stripped = context.rstrip()
    text, context = context[len(stripped) :] + text, stripped
    if not context:
        ids = tokenizer.encode(text).tolist()
        start = start_of(tokenizer)
        # A text that begins with the start token needs no other.
        read, scored = (ids[:1], ids[1:]) if ids[:1] == [start] else ([start], ids)
    else:
        ids = tokenizer.encode(context + text).tolist()
        count = len(tokenizer.encode(context))
        read, scored = ids[:count], ids[count:]
    tokens = [*read, *scored][-(block_size + 1) :]
    return Passage(tuple(tokens), min(len(scored), block_size, len(tokens) - 1))
