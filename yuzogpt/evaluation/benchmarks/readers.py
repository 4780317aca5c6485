"""Readers of benchmarks: which passages of a file the model scores, and which metrics follow.

In: a file and TaskOptions. Out: a PreparedTask. There are two
protocols, because published figures differ by up to ten points between them:

    paper     the GPT-2 paper's: detokenized text in sliding windows, counted per token of the
              original; for LAMBADA the last word
    harness   lm-evaluation-harness's (0.4): each document alone, and each task as defined there
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

from yuzogpt.errors import UserError
from yuzogpt.evaluation.benchmarks import formats
from yuzogpt.evaluation.benchmarks.detokenizers import (
    ONE_BILLION,
    Detokenizer,
    Rules,
)
from yuzogpt.evaluation.passages import Passage, Score, continuation, windows
from yuzogpt.tokenization.tokenizer import Tokenizer, start_of

T = TypeVar("T")
Protocol = Literal["paper", "harness"]
Prepare = Callable[[Path, "TaskOptions"], "PreparedTask"]
UNKNOWN = "<unk>"  # stands for rare words in some editions of a text


@dataclass(frozen=True)
class TaskOptions:
    """The model's tokenizer and context, and how a text is cut for it."""

    tokenizer: Tokenizer
    block_size: int
    stride: int  # of the windows, in the paper's protocol
    stop_words: bool  # LAMBADA: a stop word cannot be the answer
    limit: int = 0  # lines, passages or questions; 0: all

    def truncate(self, items: Sequence[T]) -> Sequence[T]:
        """Return as many items as the limit allows."""
        return items[: self.limit] if self.limit else items


@dataclass(frozen=True)
class Metric:
    """A value, and how many of which units it was computed from."""

    name: str
    value: float
    counted: int
    unit: str  # of `counted`

    def to_dict(self) -> dict[str, float | int | str | None]:
        """Return its entry for results.json, where a value that is not finite is null."""
        value = self.value if math.isfinite(self.value) else None
        return {"value": value, "counted": self.counted, "unit": self.unit}


def perplexity(nats: float) -> float:
    """Return e^nats, or infinity if that overflows, as after a divergence."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class PreparedTask:
    """A benchmark, cut into passages for one model."""

    passages: list[Passage]
    compute_metrics: Callable[[Sequence[Score]], list[Metric]]
    notes: dict[str, str | int] = field(default_factory=dict)  # written beside the metrics
    size: int = 0  # bytes or questions in the whole file, whatever the limit; 0: not counted


# --- whole texts


def prepare_text(
    text: str, units: dict[str, int], options: TaskOptions, **notes: str | int
) -> PreparedTask:
    """Cut one long text into windows; `units`: by name, the counts that metrics are taken per."""
    tokens = options.tokenizer.encode(text).tolist()
    stride = min(options.stride, options.block_size)
    passages = list(windows(tokens, start_of(options.tokenizer), options.block_size, stride))
    notes = {"protocol": "paper", "window": options.block_size, "stride": stride, **notes}

    def compute_metrics(scores: Sequence[Score]) -> list[Metric]:
        return text_metrics(sum(score.logprob for score in scores), len(tokens), units)

    return PreparedTask(passages, compute_metrics, notes)


def text_metrics(logprob: float, tokens: int, units: dict[str, int]) -> list[Metric]:
    """Return the perplexity, or the bits, per each unit, and the perplexity per model's token."""
    metrics = []
    for unit, count in units.items():
        if unit in ("byte", "character"):
            name, value = f"bits_per_{unit}", -logprob / count / math.log(2)
        else:
            name = "perplexity" if unit == "original token" else f"{unit}_perplexity"
            value = perplexity(-logprob / count)
        metrics.append(Metric(name, value, count, f"{unit}s"))
    value = perplexity(-logprob / tokens)
    return [*metrics, Metric("token_perplexity", value, tokens, "model's tokens")]


def tokenized(rules: Rules) -> Prepare:
    """Return the reader of a tokenized text: detokenized, and counted per original token."""

    def prepare(path: Path, options: TaskOptions) -> PreparedTask:
        lines = options.truncate(formats.lines(path))
        detokenizer = Detokenizer.for_lines(rules, lines)
        text = "".join(f"{joined}\n" for joined in join_lines(detokenizer, lines, path))
        # Language models before GPT-2 counted the end of a line as a token.
        original = sum(len(line.split()) + 1 for line in lines)
        units = {"original token": original, "byte": len(text.encode())}
        notes = {"lexicon": len(detokenizer.lexicon), "unknown_words": text.count(UNKNOWN)}
        return prepare_text(text, units, options, **notes)

    return prepare


def join_lines(detokenizer: Detokenizer, lines: Sequence[str], path: Path) -> Iterator[str]:
    """Yield detokenized lines; UserError names the line that is not tokenized."""
    for number, line in enumerate(lines, 1):
        try:
            yield detokenizer.join(line)
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None


def sentences(path: Path, options: TaskOptions) -> PreparedTask:
    """Read One Billion Words: each sentence is scored alone, because their order is shuffled."""
    lines = options.truncate([line for line in formats.lines(path) if line.strip()])
    spaced = [f" {' '.join(line.split())} " for line in lines]
    detokenizer = Detokenizer.for_lines(ONE_BILLION, spaced)
    start, passages, tokens = start_of(options.tokenizer), list[Passage](), 0
    for joined in map(detokenizer.join, spaced):
        ids = options.tokenizer.encode(f"{joined}\n").tolist()  # the end counts as a token
        tokens += len(ids)
        passages += windows(ids, start, options.block_size, options.block_size)
    original = sum(len(line.split()) + 1 for line in lines)

    def compute_metrics(scores: Sequence[Score]) -> list[Metric]:
        logprob = sum(score.logprob for score in scores)
        return text_metrics(logprob, tokens, {"original token": original})

    return PreparedTask(passages, compute_metrics, {"protocol": "paper", "sentences": len(lines)})


def last_bytes(unit: str) -> Prepare:
    """Return the reader of enwik8 and text8: the last 5 million of their 100 million bytes."""

    def prepare(path: Path, options: TaskOptions) -> PreparedTask:
        whole = formats.content(path)
        content = bytes(options.truncate(whole[-5_000_000:]))
        text = content.decode("utf-8", errors="replace")
        count = len(content) if unit == "byte" else len(text)
        return replace(prepare_text(text, {unit: count}, options), size=len(whole))

    return prepare


def documents(path: Path, options: TaskOptions) -> PreparedTask:
    """Read WikiText as the harness does: article by article, with its detokenizer's rules."""
    pages = options.truncate(formats.wikitext_pages(path))
    start, passages = start_of(options.tokenizer), list[Passage]()
    for page in pages:
        ids = options.tokenizer.encode(formats.harness_wikitext(page)).tolist()
        passages += windows(ids, start, options.block_size, options.block_size)
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    size = sum(len(page.encode()) for page in pages)

    def compute_metrics(scores: Sequence[Score]) -> list[Metric]:
        logprob = sum(score.logprob for score in scores)
        return [
            Metric("word_perplexity", perplexity(-logprob / words), words, "words"),
            Metric("byte_perplexity", perplexity(-logprob / size), size, "bytes"),
            Metric("bits_per_byte", -logprob / size / math.log(2), size, "bytes"),
        ]

    # The harness's own text, the "raw" edition, has none.
    unknown = sum(page.count(UNKNOWN) for page in pages)
    notes: dict[str, str | int] = {"protocol": "harness", "documents": len(pages)}
    return PreparedTask(passages, compute_metrics, {**notes, "unknown_words": unknown})


# --- last words


def last_word(protocol: Protocol) -> Prepare:
    """Return the reader of LAMBADA, OpenAI's detokenized variant: predict the last word."""

    def prepare(path: Path, options: TaskOptions) -> PreparedTask:
        filtered = protocol == "paper" and options.stop_words
        passages = [
            continuation(context, word, options.tokenizer, options.block_size)
            for context, word in options.truncate(formats.lambada(path))
        ]
        banned = stop_tokens(options.tokenizer) if filtered else frozenset[int]()
        answers = [answer_tokens(passage) for passage in passages]
        missed = sum(tokens[0] in banned for tokens in answers if len(tokens) == 1)
        passages = [ban_stop_words(passage, banned) for passage in passages]

        def compute_metrics(scores: Sequence[Score]) -> list[Metric]:
            n = len(scores)
            logprob = sum(score.logprob for score in scores)
            metrics = [
                Metric("perplexity", perplexity(-logprob / n), n, "last words"),
                Metric("accuracy", sum(score.is_greedy for score in scores) / n, n, "last words"),
            ]
            if protocol == "paper":  # some papers report this one; it is 14 points higher
                hits = sum(score.ends_greedy for score in scores)
                metrics.append(Metric("last_token_accuracy", hits / n, n, "last tokens"))
            return metrics

        notes: dict[str, str | int] = {"protocol": protocol, "variant": "OpenAI's, de-tokenized"}
        if protocol == "paper":
            notes["stop_word_filter"] = "on" if filtered else "off"
            notes["answers_that_are_stop_words"] = missed
        return PreparedTask(passages, compute_metrics, notes)

    return prepare


def answer_tokens(passage: Passage) -> tuple[int, ...]:
    """Return the tokens that are scored."""
    return passage.tokens[-passage.scored :]


def ban_stop_words(passage: Passage, banned: frozenset[int]) -> Passage:
    """Return the passage with stop words banned as greedy answers.

    An answer of several tokens may begin with a stop word's token (` in`, `side`), so that token
    stays allowed.
    """
    first, *rest = answer_tokens(passage)
    return replace(passage, banned_tokens=tuple(sorted(banned - {first} if rest else banned)))


# Words that a weak model predicts everywhere. The paper does not give its list. As with any such
# filter, a few passages do end with one of these words, and no model gets those right.
STOP_WORDS = (
    "a an the this that these those and or but nor so yet if then than because while as until "
    "of at by for with about against between into through during before after above below to "
    "from up down in out on off over under again further once here there when where why how all "
    "any both each few more most other some such no not only own same too very i me my we our "
    "ours you your yours he him his she her hers it its they them their theirs what which who "
    "whom is am are was were be been being have has had having do does did doing will would "
    "shall should can could may might must just now"
).split()


def stop_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that are a whole stop word, or punctuation."""
    spelled = (f" {form}" for word in STOP_WORDS for form in (word, word.capitalize()))
    tokens = set[int]()
    for text in (*spelled, ",", ".", "\n", '"', " -"):
        with contextlib.suppress(UserError):  # a letter that the vocabulary lacks
            ids = tokenizer.encode(text).tolist()
            tokens |= set(ids) if len(ids) == 1 else set()
    return frozenset(tokens)


# --- multiple choice


def choices(protocol: Protocol, read: Callable[[Path], list[formats.Question]]) -> Prepare:
    """Return the reader of questions: the most probable continuation is the model's answer."""

    def prepare(path: Path, options: TaskOptions) -> PreparedTask:
        whole = read(path)
        questions = options.truncate(whole)
        passages = [
            continuation(question.context, choice, options.tokenizer, options.block_size)
            for question in questions
            for choice in question.choices
        ]

        def compute_metrics(scores: Sequence[Score]) -> list[Metric]:
            right = right_by_length = first = 0
            for question in questions:
                end = first + len(question.choices)
                logprobs = [score.logprob for score in scores[first:end]]
                first = end
                lengths = [len(choice) for choice in question.choices]  # in characters
                by_length = [a / b for a, b in zip(logprobs, lengths, strict=True)]
                right += argmax(logprobs) == question.answer
                right_by_length += argmax(by_length) == question.answer
            n = len(questions)
            return [
                Metric("accuracy", right / n, n, "questions"),
                Metric("accuracy_by_length", right_by_length / n, n, "questions"),
            ]

        return PreparedTask(passages, compute_metrics, {"protocol": protocol}, len(whole))

    return prepare


def argmax(values: Sequence[float]) -> int:
    """Return the index of the highest value, the first of equal ones."""
    return max(range(len(values)), key=values.__getitem__)
