"""Lossless detokenizers: turn a benchmark's tokens into ordinary text.

In: a line that was tokenized for other models (`he said , " I do n't "`). Out: the text that GPT-2
expects (`he said, "I don't"`). Perplexity per original token means something only if the tokens
can be restored, so every line is checked at once. (The GPT-2 paper, "Language Models are
Unsupervised Multitask Learners", section 3.1, says that such detokenizers gain 2.5 to 5 points;
its own were not published.)

Tokens are joined into chunks, and the same rules split a chunk again: marks in front, marks and
clitics at the end, separators inside. Tokens that the rules would split (`U.S.` is one token) are
in a lexicon that is built from the text itself. Tokens stay apart if their chunk would not split
into the same tokens again.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from yuzogpt.errors import UserError

QUOTE = '"'


@dataclass(frozen=True)
class Rules:
    """Which tokens are written without a space before or after."""

    opening: frozenset[str]  # no space after
    closing: frozenset[str]  # no space before
    inside: dict[str, str]  # by token, the mark that it stands for, with no space on either side
    quotes: bool  # straight double quotes open and close in turn

    @cached_property
    def prefixes(self) -> frozenset[str]:
        """Tokens that a chunk may begin with."""
        return self.opening | ({QUOTE} if self.quotes else set())

    @cached_property
    def suffixes(self) -> frozenset[str]:
        """Tokens that a chunk may end with."""
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
    """Rules, and the exceptions to them."""

    rules: Rules
    lexicon: set[str] = field(default_factory=set)  # tokens that the rules would split

    @classmethod
    def for_lines(cls, rules: Rules, lines: Iterable[str]) -> "Detokenizer":
        """Return a detokenizer for a text, with the lexicon of that text."""
        detokenizer = cls(rules)
        tokens = {token for line in lines for token in line.split(" ") if token}
        detokenizer.lexicon = {token for token in tokens if detokenizer.split(token) != [token]}
        return detokenizer

    def join(self, line: str) -> str:
        """Return a line as ordinary text; UserError if it is not tokenized as expected.

        `restore` returns the same line, to the last space.
        """
        tokens = line.split()
        joined = " ".join(self._chunks(tokens))
        if self.restore(joined) != line:
            raise UserError(f"not a line of tokens with a space around each: {line[:60]!r}")
        return joined

    def restore(self, joined: str) -> str:
        """Return the line that `join` was called with."""
        tokens = [token for chunk in joined.split(" ") if chunk for token in self.split(chunk)]
        return " " + "".join(f"{token} " for token in tokens)

    def _chunks(self, tokens: Sequence[str]) -> Iterable[str]:
        """Yield tokens, joined where that can be undone."""
        run: list[str] = []  # tokens without spaces between them
        closes = False  # whether the next quote closes
        glued = True  # whether the next token joins the run, whatever it is
        for token in tokens:
            is_quote = self.rules.quotes and token == QUOTE
            close = glued or token in self.rules.closing or (is_quote and closes)
            if run and not (close or token in self.rules.inside):
                yield from self._restorable(run)
                run = []
            run.append(token)
            glued = token in self.rules.opening or token in self.rules.inside
            if is_quote:
                glued, closes = not closes, not closes
        yield from self._restorable(run)

    def _restorable(self, run: list[str]) -> Iterable[str]:
        """Yield a run in as few chunks as split into the same tokens again."""
        while run:
            size = next(
                (n for n in range(len(run), 1, -1) if self.split(self._spell(run[:n])) == run[:n]),
                1,
            )
            yield self._spell(run[:size]) if size > 1 else run[0]
            run = run[size:]

    def _spell(self, run: Sequence[str]) -> str:
        return "".join(self.rules.inside.get(token, token) for token in run)

    def split(self, chunk: str) -> list[str]:
        """Return the tokens of a chunk: split by the rules, but for tokens of the lexicon."""
        before: list[str] = []
        after: list[str] = []
        while chunk and chunk not in self.lexicon:
            if len(chunk) > 1 and chunk[0] in self.rules.prefixes:
                before.append(chunk[0])
                chunk = chunk[1:]
                continue
            ends = (e for e in self.rules.suffixes if len(e) < len(chunk) and chunk.endswith(e))
            end = max(ends, key=len, default="")
            if not end:
                break
            after.append(end)
            chunk = chunk[: -len(end)]
        middle = [chunk] if chunk in self.lexicon else self._split_inside(chunk)
        return before + middle + after[::-1]

    def _split_inside(self, chunk: str) -> list[str]:
        """Split a chunk at the marks that stand for a token between two others."""
        if not self.rules.inside or chunk in self.rules.inside:
            return [chunk]
        tokens = {mark: token for token, mark in self.rules.inside.items()}
        pattern = f"(?<=\\w)([{re.escape(''.join(tokens))}])(?=\\w)"
        parts = re.split(pattern, chunk)
        return [tokens[part] if n % 2 else part for n, part in enumerate(parts)]
