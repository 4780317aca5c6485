"""Find the benchmarks' files: in the user's folder, or in the cache, downloaded once.

A downloaded file has a fixed revision and a known SHA-256. A file in the user's folder may be
another edition; results.json then says so.
"""

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from yuzogpt.errors import UserError, reason_of
from yuzogpt.evaluation.benchmarks.formats import MAX_BYTES
from yuzogpt.evaluation.benchmarks.tasks import TASKS, Published
from yuzogpt.storage.atomic_files import cache_directory, cache_path, sha256, write_durably

TIMEOUT_S = 20  # without an answer


def find(name: str, folder: str) -> tuple[Path, str]:
    """Return a benchmark's file and its SHA-256; UserError says which file to put where."""
    task, published = TASKS[name], TASKS[name].published
    path = Path(folder, task.file) if folder else cache_path() / "benchmarks" / task.file
    if not path.is_file():
        if folder or published.how or not published.sha256:
            what = published.how or "this file"
            raise UserError(f"{name}: {path} is missing; put {what} there: {published.url}")
        fetch(name, published, path)
    digest = sha256(path)
    if not folder:
        check_published(f"{path}", digest, published)
    return path, digest


def is_published(task: str, digest: str, size: int) -> bool | None:
    """Return whether a file is the published one, by its SHA-256, or by its bytes or questions.

    None: neither is known.
    """
    published = TASKS[task].published
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
