"""The benchmarks: what each reads, what is scored, and what its figures are divided by.

In: a benchmark's file, and a protocol. Out: passages for the model, and, of their scores, figures
that carry what was counted. Two protocols, since published figures differ by up to ten points
between them:

    paper     the GPT-2 paper's: a text as people write it, in windows with context, and per token
              of the original; of LAMBADA the last word
    harness   lm-evaluation-harness's (0.4): documents apart, and each task as it is there
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

from yuzogpt.errors import UserError
from yuzogpt.evaluation.benchmarks import formats
from yuzogpt.evaluation.benchmarks.detokenizers import (
    ONE_BILLION,
    PTB,
    WIKITEXT,
    Detokenizer,
    Rules,
)
from yuzogpt.evaluation.passages import Passage, Score, continuation, windows
from yuzogpt.tokenization.tokenizer import Tokenizer, start_of

T = TypeVar("T")
Protocol = Literal["paper", "harness"]
UNKNOWN = "<unk>"  # what a word is in some editions of a text that is too rare in it


@dataclass(frozen=True)
class TaskOptions:
    """What a model reads with, and how a text is cut for it."""

    tokenizer: Tokenizer
    block_size: int
    stride: int  # of windows, in the paper's protocol
    stop_words: bool  # LAMBADA: a stop word is no answer
    limit: int = 0  # lines, passages or questions, if not all

    def some(self, items: Sequence[T]) -> Sequence[T]:
        """Return as many as the limit allows."""
        return items[: self.limit] if self.limit else items


@dataclass(frozen=True)
class Figure:
    """A number, what it is, and what was counted for it."""

    metric: str
    value: float
    counted: int
    unit: str  # of what was counted

    def to_dict(self) -> dict[str, float | int | str | None]:
        """Return it for results.json, which has no numbers that are not finite."""
        value = self.value if math.isfinite(self.value) else None
        return {"value": value, "counted": self.counted, "unit": self.unit}


def perplexity(nats: float) -> float:
    """Return e^nats; infinite where a model has diverged."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class PreparedTask:
    """A benchmark, ready for one model."""

    passages: list[Passage]
    judge: Callable[[Sequence[Score]], list[Figure]]
    notes: dict[str, str | int] = field(default_factory=dict)  # what else a reader must know
    size: int = 0  # bytes or questions in the file, whatever the limit is; 0: not counted


@dataclass(frozen=True)
class Task:
    """A benchmark: its file, and how it is read in each protocol that it has."""

    name: str
    file: str
    prepare: dict[Protocol, Callable[[Path, TaskOptions], PreparedTask]]
    paper: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # by metric, SIZES each
    about: str = ""  # the paper's figures: what it does not say

    def exam(self, protocol: Protocol, path: Path, reading: TaskOptions) -> PreparedTask:
        """Read it; UserError names the task if that fails, or if there is nothing to count."""
        try:
            exam = self.prepare[protocol](path, reading)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None
        if not exam.passages:
            raise UserError(f"{self.name}: nothing in {path} that it could be counted on")
        return exam


# --- a text, all of it


def exam_of_text(
    text: str, units: dict[str, int], reading: TaskOptions, **notes: str | int
) -> PreparedTask:
    """Read one long text in windows; `units`: what its log-likelihood is divided by, and named."""
    tokens = reading.tokenizer.encode(text).tolist()
    stride = min(reading.stride, reading.block_size)
    passages = list(windows(tokens, start_of(reading.tokenizer), reading.block_size, stride))
    notes = {"protocol": "paper", "window": reading.block_size, "stride": stride, **notes}

    def judge(scores: Sequence[Score]) -> list[Figure]:
        return figures_of_text(sum(score.logprob for score in scores), len(tokens), units)

    return PreparedTask(passages, judge, notes)


def figures_of_text(logprob: float, tokens: int, units: dict[str, int]) -> list[Figure]:
    """Return perplexities, or bits, for each way of counting."""
    found = []
    for unit, count in units.items():
        if unit in ("byte", "character"):
            found.append(
                Figure(f"bits_per_{unit}", -logprob / count / math.log(2), count, f"{unit}s")
            )
        else:
            name = "perplexity" if unit == "original token" else f"{unit}_perplexity"
            found.append(Figure(name, perplexity(-logprob / count), count, f"{unit}s"))
    return [
        *found,
        Figure("token_perplexity", perplexity(-logprob / tokens), tokens, "model's tokens"),
    ]


def tokenized(rules: Rules) -> Callable[[Path, TaskOptions], PreparedTask]:
    """Return how a tokenized text is read: as people write, per token of the original."""

    def prepare(path: Path, reading: TaskOptions) -> PreparedTask:
        lines = reading.some(formats.lines(path))
        detokenizer = Detokenizer.of(rules, lines)
        text = "".join(f"{joined}\n" for joined in join_lines(detokenizer, lines, path))
        # An end of line is a token, too, as language models before GPT-2 counted.
        original = sum(len(line.split()) + 1 for line in lines)
        units = {"original token": original, "byte": len(text.encode())}
        notes = {"lexicon": len(detokenizer.lexicon), "unknown_words": text.count(UNKNOWN)}
        return exam_of_text(text, units, reading, **notes)

    return prepare


def join_lines(detokenizer: Detokenizer, lines: Sequence[str], path: Path) -> Iterator[str]:
    """Yield the lines of a file as people write; UserError names the one that is not tokenized."""
    for number, line in enumerate(lines, 1):
        try:
            yield detokenizer.join(line)
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None


def sentences(path: Path, reading: TaskOptions) -> PreparedTask:
    """One billion words: sentences that have nothing to do with each other."""
    lines = reading.some([line for line in formats.lines(path) if line.strip()])
    spaced = [f" {' '.join(line.split())} " for line in lines]
    detokenizer = Detokenizer.of(ONE_BILLION, spaced)
    start, passages, tokens = start_of(reading.tokenizer), list[Passage](), 0
    for joined in map(detokenizer.join, spaced):
        ids = reading.tokenizer.encode(f"{joined}\n").tolist()  # its end is counted: as a token
        tokens += len(ids)
        passages += windows(ids, start, reading.block_size, reading.block_size)
    original = sum(len(line.split()) + 1 for line in lines)

    def judge(scores: Sequence[Score]) -> list[Figure]:
        logprob = sum(score.logprob for score in scores)
        return figures_of_text(logprob, tokens, {"original token": original})

    return PreparedTask(passages, judge, {"protocol": "paper", "sentences": len(lines)})


def last_bytes(unit: str) -> Callable[[Path, TaskOptions], PreparedTask]:
    """Return how enwik8 and text8 are read: the last five of a hundred million bytes."""

    def prepare(path: Path, reading: TaskOptions) -> PreparedTask:
        whole = formats.content(path)
        content = bytes(reading.some(whole[-5_000_000:]))
        text = content.decode("utf-8", errors="replace")
        count = len(content) if unit == "byte" else len(text)
        return replace(exam_of_text(text, {unit: count}, reading), size=len(whole))

    return prepare


def documents(path: Path, reading: TaskOptions) -> PreparedTask:
    """WikiText as the harness reads it: article by article, with its de-tokenizer's rules."""
    pages = reading.some(formats.wikitext_pages(path))
    start, passages = start_of(reading.tokenizer), list[Passage]()
    for page in pages:
        ids = reading.tokenizer.encode(formats.harness_wikitext(page)).tolist()
        passages += windows(ids, start, reading.block_size, reading.block_size)
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    size = sum(len(page.encode()) for page in pages)

    def judge(scores: Sequence[Score]) -> list[Figure]:
        logprob = sum(score.logprob for score in scores)
        return [
            Figure("word_perplexity", perplexity(-logprob / words), words, "words"),
            Figure("byte_perplexity", perplexity(-logprob / size), size, "bytes"),
            Figure("bits_per_byte", -logprob / size / math.log(2), size, "bytes"),
        ]

    unknown = sum(page.count(UNKNOWN) for page in pages)  # the harness's own text has none: "raw"
    notes: dict[str, str | int] = {"protocol": "harness", "documents": len(pages)}
    return PreparedTask(passages, judge, {**notes, "unknown_words": unknown})


# --- the last word of a passage


def last_word(protocol: Protocol) -> Callable[[Path, TaskOptions], PreparedTask]:
    """Return how LAMBADA is read, in OpenAI's de-tokenized variant: is the last word foreseen?"""

    def prepare(path: Path, reading: TaskOptions) -> PreparedTask:
        filtered = protocol == "paper" and reading.stop_words
        passages = [
            continuation(context, word, reading.tokenizer, reading.block_size)
            for context, word in reading.some(formats.lambada(path))
        ]
        never = stop_tokens(reading.tokenizer) if filtered else frozenset[int]()
        banned = sum(answer(one)[0] in never for one in passages if len(answer(one)) == 1)
        passages = [without_stop_words(one, never) for one in passages]

        def judge(scores: Sequence[Score]) -> list[Figure]:
            n = len(scores)
            logprob = sum(score.logprob for score in scores)
            found = [
                Figure("perplexity", perplexity(-logprob / n), n, "last words"),
                Figure("accuracy", sum(score.is_greedy for score in scores) / n, n, "last words"),
            ]
            if protocol == "paper":  # some count this, and get 14 points more
                hits = sum(score.ends_greedy for score in scores)
                found.append(Figure("last_token_accuracy", hits / n, n, "last tokens"))
            return found

        notes: dict[str, str | int] = {"protocol": protocol, "variant": "OpenAI's, de-tokenized"}
        if protocol == "paper":
            notes["stop_word_filter"] = "on" if filtered else "off"
            notes["answers_that_are_stop_words"] = banned  # and so count as missed
        return PreparedTask(passages, judge, notes)

    return prepare


def answer(passage: Passage) -> tuple[int, ...]:
    """Return the tokens that are scored."""
    return passage.tokens[-passage.scored :]


def without_stop_words(passage: Passage, never: frozenset[int]) -> Passage:
    """Forbid a greedy reader to answer with a stop word.

    An answer may begin with the letters of one (` in`, `side`): then that token is none.
    """
    first, *rest = answer(passage)
    return replace(passage, never=tuple(sorted(never - {first} if rest else never)))


# What a model that knows little likes to say. The paper does not give its list; a few passages do
# end with one of these, and no model gets those right, as with any such filter.
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
    """Return the tokens that are a whole stop word, or no word at all."""
    spelled = (f" {form}" for word in STOP_WORDS for form in (word, word.capitalize()))
    found = set[int]()
    for text in (*spelled, ",", ".", "\n", '"', " -"):
        with contextlib.suppress(UserError):  # a letter that a model's vocabulary has not
            ids = tokenizer.encode(text).tolist()
            found |= set(ids) if len(ids) == 1 else set()
    return frozenset(found)


# --- choices


def choices(
    protocol: Protocol, read: Callable[[Path], list[formats.Question]]
) -> Callable[[Path, TaskOptions], PreparedTask]:
    """Return how questions are read: the likeliest continuation is the answer."""

    def prepare(path: Path, reading: TaskOptions) -> PreparedTask:
        whole = read(path)
        questions = reading.some(whole)
        passages = [
            continuation(question.context, choice, reading.tokenizer, reading.block_size)
            for question in questions
            for choice in question.choices
        ]

        def judge(scores: Sequence[Score]) -> list[Figure]:
            right = right_by_length = first = 0
            for question in questions:
                mine = scores[first : first + len(question.choices)]
                first += len(mine)
                logprobs = [score.logprob for score in mine]
                lengths = [len(choice) for choice in question.choices]  # in characters
                by_length = [a / b for a, b in zip(logprobs, lengths, strict=True)]
                right += best(logprobs) == question.answer
                right_by_length += best(by_length) == question.answer
            n = len(questions)
            return [
                Figure("accuracy", right / n, n, "questions"),
                Figure("accuracy_by_length", right_by_length / n, n, "questions"),
            ]

        return PreparedTask(passages, judge, {"protocol": protocol}, len(whole))

    return prepare


def best(values: Sequence[float]) -> int:
    """Return the place of the highest."""
    return max(range(len(values)), key=values.__getitem__)


# The paper's table 3, for the four sizes.
TASKS = {
    task.name: task
    for task in (
        Task(
            "lambada", "lambada_test.jsonl",
            {"paper": last_word("paper"), "harness": last_word("harness")},
            {
                "perplexity": (35.13, 15.60, 10.87, 8.63),
                "accuracy": (0.4599, 0.5548, 0.6012, 0.6324),
            },
            "the accuracy is with a filter of stop words, whose list is not published",
        ),
        Task(
            "wikitext2", "wikitext2_test.txt",
            {"paper": tokenized(WIKITEXT), "harness": documents},
            {"token_perplexity": (29.41, 22.76, 19.93, 18.34)},
            "taken for per token of the model: of the same text, wikitext103, it has others",
        ),
        Task(
            "ptb", "ptb.test.txt", {"paper": tokenized(PTB)},
            {"perplexity": (65.85, 47.33, 40.31, 35.76)},
        ),
        Task(
            "wikitext103", "wikitext103_test.txt",
            {"paper": tokenized(WIKITEXT), "harness": documents},
            {"perplexity": (37.50, 26.37, 22.05, 17.48)},
        ),
        Task(
            "enwik8", "enwik8.zip", {"paper": last_bytes("byte")},
            {"bits_per_byte": (1.16, 1.01, 0.97, 0.93)},
        ),
        Task(
            "text8", "text8.zip", {"paper": last_bytes("character")},
            {"bits_per_character": (1.17, 1.06, 1.02, 0.98)},
        ),
        Task(
            "1bw", "1bw_test.txt", {"paper": sentences},
            {"perplexity": (75.20, 55.72, 44.575, 42.16)},
        ),
        Task(
            "cbt_cn", "cbtest_CN_valid_2000ex.txt",  # a book of the test set is in WebText
            {"paper": choices("paper", formats.childrens_books)},
            {"accuracy": (0.8765, 0.9235, 0.9345, 0.9330)},
        ),
        Task(
            "cbt_ne", "cbtest_NE_valid_2000ex.txt",
            {"paper": choices("paper", formats.childrens_books)},
            {"accuracy": (0.834, 0.871, 0.880, 0.8905)},
        ),
        Task(
            "hellaswag", "hellaswag_val.jsonl",
            {"harness": choices("harness", formats.hellaswag)},
        ),
    )
}  # fmt: skip
