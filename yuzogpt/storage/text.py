"""Reads text files: UTF-8, with or without a byte order mark, any line ends.

The text that is returned has "\\n" as line ends, as Python's `open` and so nanoGPT read it, and no
mark. Corpora and prompts are read here, so that both have the same tokens.
"""

import codecs
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from yuzogpt.errors import UserError, reason_of
from yuzogpt.storage.untrusted import DamagedFile

MAX_TEXT_BYTES = 2**28  # of a prompt, or of a file of prompts
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: Path, origin: str) -> str:
    """Return the text of a file, or a pipe, that the user named.

    UserError, which begins with `origin`, if there is none.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise UserError(f"{origin}: not readable: {reason_of(error)}") from None
    if len(content) > MAX_TEXT_BYTES:
        raise UserError(f"{origin}: more than {MAX_TEXT_BYTES:,} bytes")
    return decode_text(content, origin)


def decode_text(content: bytes, origin: str) -> str:
    """Return the text of a file's bytes; DamagedFile, which begins with `origin`, if not UTF-8."""
    text = decode_utf8(content, origin)
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def decode_utf8(content: bytes, origin: str) -> str:
    """Return bytes as text, line ends as they are; DamagedFile if they are not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DamagedFile(f"{origin}: {why_not_utf8(content)}") from None


def plain(content: bytes) -> bytes:
    """Return the bytes of a text file with "\\n" as its line ends, and no byte order mark."""
    content = content.removeprefix(codecs.BOM_UTF8)
    return content.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in content else content


def decode_pieces(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield the text of a file that comes in pieces, with the line ends of `plain`.

    UnicodeDecodeError if it is not UTF-8.
    """
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    for piece in pieces:
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)


def other_encoding(content: bytes) -> str | None:
    """Return the encoding, other than UTF-8, whose byte order mark begins a file."""
    return next((name for mark, name in MARKS.items() if content.startswith(mark)), None)


def why_not_utf8(content: bytes) -> str:
    """Return why bytes are not UTF-8, and what would help."""
    if name := other_encoding(content):
        return f"{name}, not UTF-8; convert it first: iconv -f {name} -t UTF-8"
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f"byte {error.start} is not UTF-8; convert it first"
    return "not UTF-8; convert it first"
