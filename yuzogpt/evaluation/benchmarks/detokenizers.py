"""Tokenized text back to how people write, without losing a bit of it.

In: a line of a benchmark that was tokenized for other models (`he said , " I do n't "`). Out: the
line as GPT-2 knows text (`he said, "I don't"`), and back. Perplexity per original token means
something only if the tokens can be had back, so every line is turned back at once. (The GPT-2
paper, "Language Models are Unsupervised Multitask Learners", section 3.1, has such de-tokenizers
gain 2.5 to 5 points; they were not published.)

Tokens are joined into chunks, and a chunk is cut again by the same rules: marks in front, marks and
clitics behind, separators inside. What the rules would cut wrongly (`U.S.`, which is one token) is
in a lexicon that is made from the text itself; where joined tokens would come apart otherwise than
they were, they stay apart.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from yuzogpt.errors import UserError

QUOTE = '"'


@dataclass(frozen=True)
class Rules:
    """What stands close to what."""

    opening: frozenset[str]  # close to what follows
    closing: frozenset[str]  # close to what comes before
    inside: dict[str, str]  # a token that stands for a mark without spaces, between two others
    quotes: bool  # straight double quotes open and close in turn

    @cached_property
    def in_front(self) -> frozenset[str]:
        """What a chunk may begin with that is a token of its own."""
        return self.opening | ({QUOTE} if self.quotes else set())

    @cached_property
    def behind(self) -> frozenset[str]:
        """What it may end with."""
        return self.closing | ({QUOTE} if self.quotes else set())


CLITICS = frozenset(["'s", "'m", "'d", "'re", "'ve", "'ll", "n't", "'"])
WIKITEXT = Rules(
    opening=frozenset("([{£$€"),
    closing=frozenset([",", ".", ";", ":", "!", "?", ")", "]", "}", "%", *CLITICS]),
    inside={"@-@": "-", "@,@": ",", "@.@": "."},
    quotes=True,
)
PTB = Rules(frozenset("$#"), frozenset(["%", *CLITICS]), {}, quotes=False)
ONE_BILLION = Rules(frozenset("([$£"), WIKITEXT.closing, {}, quotes=True)
CBT = Rules(frozenset("([$£`"), WIKITEXT.closing, {}, quotes=True)


@dataclass
class Detokenizer:
    """Rules, and the tokens that they do not hold for."""

    rules: Rules
    lexicon: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, rules: Rules, lines: Iterable[str]) -> "Detokenizer":
        """Return a detokenizer for a text: its lexicon has what the rules would take apart."""
        made = cls(rules)
        tokens = {token for line in lines for token in line.split(" ") if token}
        made.lexicon = {token for token in tokens if made.cut(token) != [token]}
        return made

    def join(self, line: str) -> str:
        """Return a line as people write; UserError if it is not tokenized as this text should be.

        `back` gives the line again, to the last space.
        """
        tokens = line.split()
        joined = " ".join(self._chunks(tokens))
        if self.back(joined) != line:
            raise UserError(f"not a line of tokens with a space around each: {line[:60]!r}")
        return joined

    def back(self, joined: str) -> str:
        """Return the line that `join` made this of."""
        tokens = [token for chunk in joined.split(" ") if chunk for token in self.cut(chunk)]
        return " " + "".join(f"{token} " for token in tokens)

    def _chunks(self, tokens: Sequence[str]) -> Iterable[str]:
        """Yield tokens, joined where they can be had back."""
        run: list[str] = []  # tokens without spaces between
        closes = False  # does the next quote close?
        glued = True  # is the next token close to the run, whatever it is?
        for token in tokens:
            is_quote = self.rules.quotes and token == QUOTE
            close = glued or token in self.rules.closing or (is_quote and closes)
            if run and not (close or token in self.rules.inside):
                yield from self._written(run)
                run = []
            run.append(token)
            glued = token in self.rules.opening or token in self.rules.inside
            if is_quote:
                glued, closes = not closes, not closes
        yield from self._written(run)

    def _written(self, run: list[str]) -> Iterable[str]:
        """Yield a run as one chunk, or, where that would come apart otherwise, in the fewest."""
        while run:
            size = next(
                (n for n in range(len(run), 1, -1) if self.cut(self._spell(run[:n])) == run[:n]), 1
            )
            yield self._spell(run[:size]) if size > 1 else run[0]
            run = run[size:]

    def _spell(self, run: Sequence[str]) -> str:
        return "".join(self.rules.inside.get(token, token) for token in run)

    def cut(self, chunk: str) -> list[str]:
        """Return the tokens of a chunk: of what is not in the lexicon, by the rules."""
        before: list[str] = []
        after: list[str] = []
        while chunk and chunk not in self.lexicon:
            if len(chunk) > 1 and chunk[0] in self.rules.in_front:
                before.append(chunk[0])
                chunk = chunk[1:]
                continue
            ends = (e for e in self.rules.behind if len(e) < len(chunk) and chunk.endswith(e))
            end = max(ends, key=len, default="")
            if not end:
                break
            after.append(end)
            chunk = chunk[: -len(end)]
        middle = [chunk] if chunk in self.lexicon else self._cut_inside(chunk)
        return before + middle + after[::-1]

    def _cut_inside(self, chunk: str) -> list[str]:
        """Cut a chunk at the marks that stand for a token between two others."""
        if not self.rules.inside or chunk in self.rules.inside:
            return [chunk]
        token_of = {mark: token for token, mark in self.rules.inside.items()}
        pattern = f"(?<=\\w)([{re.escape(''.join(token_of))}])(?=\\w)"
        parts = re.split(pattern, chunk)
        return [token_of[part] if n % 2 else part for n, part in enumerate(parts)]
