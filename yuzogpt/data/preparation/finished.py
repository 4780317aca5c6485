"""Is a corpus that lies in the directory already the one that is asked for?

All checks compare what its manifest records with the command; each names the first difference.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from yuzogpt.data import blocks
from yuzogpt.data.blocks import PreparedCorpus
from yuzogpt.data.preparation.corpora import Corpus, Source
from yuzogpt.data.preparation.records import read_times, real_path, recorded_source
from yuzogpt.data.preparation.sources import Listing
from yuzogpt.errors import UserError
from yuzogpt.storage.lease import Lease
from yuzogpt.storage.run_storage import LocalStorage

SHOWN_DIGITS = 12  # of a hash, in messages


def open_finished(corpus: Corpus, directory: Path, *, overwrite: bool) -> PreparedCorpus | None:
    """Open a finished corpus that is to be kept, if there is one; UserError for another corpus."""
    if overwrite or not (directory / blocks.MANIFEST).exists():
        return None
    finished = blocks.open_corpus(directory)
    check_same(finished, "corpus", finished.manifest.corpus, corpus.name)
    return finished


@contextlib.contextmanager
def write_lease(directory: Path, *, overwrite: bool) -> Iterator[None]:
    """Hold the lease of a directory; UserError if a corpus was finished there in the meantime."""
    with Lease(LocalStorage(directory)):
        if (directory / blocks.MANIFEST).exists() and not overwrite:
            raise UserError(f"{directory}: another command prepared it just now; run this again")
        yield


def check_same(finished: PreparedCorpus, what: str, old: str, new: str) -> None:
    """Raise UserError if a finished corpus was prepared from something else."""
    if old != new:
        raise UserError(
            f"{finished.directory}: holds a corpus with another {what}: {old}, not {new}; "
            "--overwrite replaces it, --data_dir=DIR keeps both"
        )


def check_same_text(finished: PreparedCorpus, source: Source) -> None:
    """Raise UserError if a finished corpus was made from another text."""
    recorded = recorded_source(finished)
    if recorded.files is not None:
        check_same(finished, "source", recorded.name, "one text file")
    old, new = recorded.sha256, source.identity["sha256"]
    if old != new:
        check_same(finished, "source", f"SHA-256 {old[:SHOWN_DIGITS]}", new[:SHOWN_DIGITS])


def check_same_files(finished: PreparedCorpus, listing: Listing) -> None:
    """Raise UserError if a finished corpus was made from other files, or they changed since."""
    recorded, name = recorded_source(finished), listing.name
    if recorded.files is None:
        check_same(finished, "source", "one text file", name)
    sizes = {file.name: file.bytes for file in recorded.files or []}
    times = read_times(finished.directory)
    for file in listing.files:
        if sizes.pop(file.name, None) != file.bytes:
            check_same(finished, "source", recorded.name, f"{name} with this {file.name}")
        if times.get(real_path(file), file.modified) != file.modified:
            raise UserError(
                f"{file.path}: changed since {finished.directory} was prepared from it; "
                "--overwrite prepares it again, --data_dir=DIR keeps both"
            )
    if sizes:
        check_same(finished, "source", recorded.name, f"{name} without {min(sizes)}")


def check_same_settings(finished: PreparedCorpus, settings: dict[str, Any]) -> None:
    """Raise UserError if a finished corpus was made with other settings that decide its bytes."""
    recorded = recorded_source(finished).settings
    if recorded is None:
        return  # it was one text, which check_same_files refuses
    for key, value in settings.items():
        check_same(finished, key, str(recorded.get(key)), str(value))
