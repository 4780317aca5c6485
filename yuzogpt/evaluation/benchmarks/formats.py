"""Parse the benchmarks' files as published: lines, passages, questions.

UserError names the file and the line that is not as expected.
"""

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yuzogpt.errors import UserError, reason_of
from yuzogpt.evaluation.benchmarks.detokenizers import CBT, Detokenizer
from yuzogpt.storage.text import decode_utf8
from yuzogpt.storage.untrusted import load_json, read_file

MAX_BYTES = 2**28  # of a file, unpacked; enwik8 has 10^8
# What zipfile raises for a damaged file; RuntimeError: for one with a password.
NOT_A_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Question:
    """A context and its possible continuations, one of which is right.

    A space between them belongs to the context.
    """

    context: str
    choices: Sequence[str]
    answer: int


def content(path: Path) -> bytes:
    """Return the bytes of a file, or of the one file in a zip; at most MAX_BYTES."""
    try:
        data = read_file(path, MAX_BYTES)
    except OSError as error:
        raise UserError(f"{path}: not readable: {reason_of(error)}") from None
    if path.suffix != ".zip":
        return data
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            if len(names) != 1:
                raise zipfile.BadZipFile(f"it has {len(names)}")
            with archive.open(names[0]) as member:
                data = member.read(MAX_BYTES + 1)
    except NOT_A_ZIP as error:
        raise UserError(f"{path}: not a whole zip of one file: {error}") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: more than {MAX_BYTES:,} bytes")
    return data


def lines(path: Path) -> list[str]:
    """Return the lines of a text file, without line ends."""
    text = decode_utf8(content(path), str(path))
    return text.removesuffix("\n").split("\n") if text else []


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the location, FILE:LINE, of each object, and the object."""
    for number, line in enumerate(lines(path), 1):
        location = f"{path}:{number}"
        row = load_json(line, location)
        if not isinstance(row, dict):
            raise UserError(f"{location}: not an object")
        yield location, row


def lambada(path: Path) -> list[tuple[str, str]]:
    """Return passages without their last word, and that word with the space before it."""
    passages = []
    for location, row in json_lines(path):
        context, space, word = str(row.get("text", "")).rpartition(" ")
        if not (space and word):
            raise UserError(f"{location}: expected a passage of several words as `text`")
        passages.append((context, f" {word}"))
    return passages


def hellaswag(path: Path) -> list[Question]:
    """Return scenes, each with four endings."""
    questions = []
    for location, scene in json_lines(path):
        try:
            text = f"{scene['activity_label']}: {scene['ctx_a']} {scene['ctx_b'].capitalize()}"
            ends = [remove_markup(end) for end in scene["endings"]]
            right = int(scene["label"])
            if not all(ends) or right not in range(len(ends)):
                raise ValueError("an empty ending, or none that is right")
            questions.append(Question(f"{remove_markup(text)} ", ends, right))
        except (LookupError, TypeError, ValueError, AttributeError):
            raise UserError(f"{location}: not a line of HellaSwag") from None
    return questions


def remove_markup(text: str) -> str:
    """Remove WikiHow's markup, such as `[header]`, from a text."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def childrens_books(path: Path) -> list[Question]:
    """Return CBT's questions: twenty sentences, then one with a gap and ten words for it.

    A continuation is a word and the rest of the sentence, which depends on the word, too. Texts
    are detokenized: the file has the tokens of the Penn Treebank.
    """
    rows = list(read_gap_questions(path))
    lines = (line for story, query, _, _ in rows for line in (*story, query))
    detokenizer = Detokenizer.for_lines(CBT, lines)
    questions = []
    for story, query, words, answer in rows:
        before, _, after = detokenizer.join(query).partition(GAP)
        context = " ".join([*map(detokenizer.join, story), before]).replace("`", "'")
        ends = [f"{word}{after}".replace("`", "'") for word in words]
        questions.append(Question(context, ends, words.index(answer)))
    return questions


def read_gap_questions(path: Path) -> Iterator[tuple[list[str], str, list[str], str]]:
    """Yield each question's story, its sentence with the gap, its words, and the answer."""
    story = list[str]()
    for number, line in enumerate(lines(path), 1):
        index, _, text = line.partition(" ")
        if index != "21":
            story = [treebank(text)] if index == "1" else [*story, treebank(text)] if text else []
            continue
        try:
            query, answer, _, choices = text.split("\t")
        except ValueError:
            raise UserError(f"{path}:{number}: not a question of CBT") from None
        words = choices.split("|")
        if GAP not in query or answer not in words or not all(words):
            raise UserError(f"{path}:{number}: no gap, or no answer among the words")
        yield story, treebank(query), words, answer


def treebank(text: str) -> str:
    """Return a sentence's tokens with a space around each, and its brackets and quotes as typed."""
    return f" {' '.join(TREEBANK.get(token, token) for token in text.split())} "


GAP = "XXXXX"
TREEBANK = {
    "``": '"', "''": '"', "-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{",
    "-RCB-": "}",
}  # fmt: skip


def wikitext_pages(path: Path) -> list[str]:
    """Return the articles, each beginning with its title, as the harness cuts them."""
    pages = [list[str]()]
    for line in [*lines(path), ""]:  # the last line has an end, too
        text = line.replace("= = =", "===").replace("= =", "==").strip()
        if text.startswith("= ") and text.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    joined = ("\n".join(page) for page in pages)
    return [page for page in joined if page.strip()]


# lm-evaluation-harness's detokenizer for WikiText: what is replaced, in this order. Unlike those in
# detokenizers.py it loses information; it is here to reproduce the harness's figures.
HARNESS_WIKITEXT = (
    *((re.escape(a), b) for a, b in (("s '", "s'"),)),
    (r"/' [0-9]/", r"/'[0-9]/"),
    *((re.escape(f" @{mark}@ "), mark) for mark in "-,."),
    *((re.escape(f" {mark} "), f"{mark} ") for mark in ":;.!?,"),
    *(
        (rf"{left}\s*([^{right}]*?)\s*{right}", rf"{plain}\1{end}")
        for left, right, plain, end in (
            (r"\(", r"\)", "(", ")"), (r"\[", r"\]", "[", "]"), ("{", "}", "{", "}"),
            ('"', '"', '"', '"'), ("'", "'", "'", "'"),
        )
    ),
    *((" ".join("=" * n), "=" * n) for n in (4, 3, 2)),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)  # fmt: skip


def harness_wikitext(page: str) -> str:
    """Return an article as lm-evaluation-harness reads it."""
    for pattern, replacement in HARNESS_WIKITEXT:
        page = re.sub(pattern, replacement, page)
    return page
