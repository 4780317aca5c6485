"""The benchmarks' files, as their makers published them.

In: a path. Out: lines, texts, questions. UserError names the line that is not as it should be.
"""

import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yuzogpt.errors import UserError


@dataclass(frozen=True)
class Question:
    """A text and its possible continuations, one of which is right."""

    context: str
    choices: Sequence[str]
    answer: int


def content(path: Path) -> bytes:
    """Return the bytes of a file, or of the one file in a zip."""
    if path.suffix != ".zip":
        return path.read_bytes()
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(archive.namelist()[0])
    except (zipfile.BadZipFile, zlib.error, EOFError, IndexError) as error:
        raise UserError(f"{path}: not a whole zip of one file: {error}") from None


def lines(path: Path) -> list[str]:
    """Return the lines of a text, without their ends."""
    try:
        return content(path).decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error}") from None


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each object is, and the object."""
    for number, line in enumerate(lines(path), 1):
        place = f"{path}:{number}"
        try:
            found = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place}: not JSON: {error}") from None
        if not isinstance(found, dict):
            raise UserError(f"{place}: not an object")
        yield place, found


def lambada(path: Path) -> list[tuple[str, str]]:
    """Return passages without their last word, and that word with the space before it."""
    found = []
    for place, passage in json_lines(path):
        context, space, word = str(passage.get("text", "")).rpartition(" ")
        if not (space and word):
            raise UserError(f"{place}: expected a passage of several words as `text`")
        found.append((context, f" {word}"))
    return found


def hellaswag(path: Path) -> list[Question]:
    """Return scenes, each with four ends."""
    found = []
    for place, scene in json_lines(path):
        try:
            text = f"{scene['activity_label']}: {scene['ctx_a']} {scene['ctx_b'].capitalize()}"
            ends = [f" {without_marks(end)}" for end in scene["endings"]]
            found.append(Question(without_marks(text), ends, int(scene["label"])))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{place}: not a line of HellaSwag") from None
    return found


def without_marks(text: str) -> str:
    """Remove what WikiHow's articles were marked up with."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def childrens_books(path: Path) -> list[Question]:
    """Return CBT's questions: twenty sentences, and one with a gap, for which there are ten words.

    The continuation is that sentence from the gap on: the rest tells of the word, too.
    """
    found, story = [], list[str]()
    for number, line in enumerate(lines(path), 1):
        place, _, text = line.partition(" ")
        if place != "21":
            story = [text] if place == "1" else [*story, text] if text else []
            continue
        try:
            query, answer, _, words = text.split("\t")
        except ValueError:
            raise UserError(f"{path}:{number}: not a question of CBT") from None
        before, gap, after = query.partition("XXXXX")
        choices = words.split("|")
        if not gap or answer not in choices:
            raise UserError(f"{path}:{number}: no gap, or no answer among the words")
        context = " ".join([*story, before]).rstrip()
        ends = [f" {word}{after}" for word in choices]
        found.append(Question(context, ends, choices.index(answer)))
    return found


def wikitext_pages(path: Path) -> list[str]:
    """Return the articles, each from its title on."""
    pages = list[str]()
    for line in lines(path):
        is_title = re.fullmatch(r" = [^=].*[^=] = ", line) or re.fullmatch(r" = [^=] = ", line)
        if is_title or not pages:
            pages.append("")
        pages[-1] += f"{line}\n"
    return [page for page in pages if page.strip()]


# lm-evaluation-harness's way from WikiText's tokens to text: what is replaced, in this order. It
# cannot be turned back, which detokenizers.py can; it is here to give the harness's figures.
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
