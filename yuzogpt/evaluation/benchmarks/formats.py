"""The benchmarks' files, as their makers published them.

In: a path. Out: lines, texts, questions. UserError names the line that is not as it should be.
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
# What zipfile raises for a file that is none; RuntimeError: for one with a password.
NOT_A_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Question:
    """A text and its possible continuations, one of which is right.

    A space between them is the text's.
    """

    context: str
    choices: Sequence[str]
    answer: int


def content(path: Path) -> bytes:
    """Return the bytes of a file, or of the one file in a zip; at most MAX_BYTES."""
    try:
        found = read_file(path, MAX_BYTES)
    except OSError as error:
        raise UserError(f"{path}: not readable: {reason_of(error)}") from None
    if path.suffix != ".zip":
        return found
    try:
        with zipfile.ZipFile(io.BytesIO(found)) as archive:
            names = archive.namelist()
            if len(names) != 1:
                raise zipfile.BadZipFile(f"it has {len(names)}")
            with archive.open(names[0]) as member:
                found = member.read(MAX_BYTES + 1)
    except NOT_A_ZIP as error:
        raise UserError(f"{path}: not a whole zip of one file: {error}") from None
    if len(found) > MAX_BYTES:
        raise UserError(f"{path}: more than {MAX_BYTES:,} bytes")
    return found


def lines(path: Path) -> list[str]:
    """Return the lines of a text, without their ends."""
    text = decode_utf8(content(path), str(path))
    return text.removesuffix("\n").split("\n") if text else []


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each object is, and the object."""
    for number, line in enumerate(lines(path), 1):
        place = f"{path}:{number}"
        found = load_json(line, place)
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
            ends = [without_marks(end) for end in scene["endings"]]
            right = int(scene["label"])
            if not all(ends) or right not in range(len(ends)):
                raise ValueError("an end without a word, or none that is right")
            found.append(Question(f"{without_marks(text)} ", ends, right))
        except (LookupError, TypeError, ValueError, AttributeError):
            raise UserError(f"{place}: not a line of HellaSwag") from None
    return found


def without_marks(text: str) -> str:
    """Remove what WikiHow's articles were marked up with."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def childrens_books(path: Path) -> list[Question]:
    """Return CBT's questions: twenty sentences, and one with a gap, for which there are ten words.

    The continuation is that sentence from the gap on: the rest tells of the word, too. All of it
    as people write: the file has the tokens of the Penn Treebank.
    """
    asked = list(gapped(path))
    lines = (line for story, query, _, _ in asked for line in (*story, query))
    detokenizer = Detokenizer.of(CBT, lines)
    found = []
    for story, query, words, answer in asked:
        before, _, after = detokenizer.join(query).partition(GAP)
        context = " ".join([*map(detokenizer.join, story), before]).replace("`", "'")
        ends = [f"{word}{after}".replace("`", "'") for word in words]
        found.append(Question(context, ends, words.index(answer)))
    return found


def gapped(path: Path) -> Iterator[tuple[list[str], str, list[str], str]]:
    """Yield of CBT's questions the story, the sentence with the gap, the words, and the answer."""
    story = list[str]()
    for number, line in enumerate(lines(path), 1):
        place, _, text = line.partition(" ")
        if place != "21":
            story = [treebank(text)] if place == "1" else [*story, treebank(text)] if text else []
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
    """Return a sentence's tokens with a space around each, and marks as they are typed."""
    return f" {' '.join(TREEBANK.get(token, token) for token in text.split())} "


GAP = "XXXXX"
TREEBANK = {
    "``": '"', "''": '"', "-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{",
    "-RCB-": "}",
}  # fmt: skip


def wikitext_pages(path: Path) -> list[str]:
    """Return the articles, each from its title on, as the harness cuts them."""
    pages = [list[str]()]
    for line in [*lines(path), ""]:  # its last line has an end, too
        text = line.replace("= = =", "===").replace("= =", "==").strip()
        if text.startswith("= ") and text.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    joined = ("\n".join(page) for page in pages)
    return [page for page in joined if page.strip()]


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
