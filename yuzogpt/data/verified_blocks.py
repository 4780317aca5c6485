"""Hashes of blocks that this node has checked, so that a restart does not read 18 GB again."""

import contextlib
from pathlib import Path

from yuzogpt.errors import UserError
from yuzogpt.storage.atomic_files import (
    cache_directory,
    cache_path,
    sha256,
    to_json,
    write_durably,
)
from yuzogpt.storage.untrusted import read_json

VERIFIED = "verified-blocks.json"  # in the cache directory


class VerifiedBlocks:
    """The node's cache of hashes, keyed by path, size, modification time and inode."""

    def __init__(self, *, reread: bool) -> None:
        """Load the cache; an unreadable one counts as empty. `reread`: ignore what is cached."""
        self.known: dict[str, str] = {}
        with contextlib.suppress(OSError, UserError):
            self.known = {} if reread else read_json(cache_path() / VERIFIED, dict[str, str])
        self.used: dict[str, str] = {}

    def sha256(self, path: Path) -> str:
        """Return the file's SHA-256; the file is read only if it is new or has changed."""
        key = self._key(path)
        self.used[key] = self.known.get(key) or sha256(path)
        return self.used[key]

    def has_ids_below(self, path: Path, vocab_size: int) -> bool:
        """Return whether all ids of a file are known to be below `vocab_size`."""
        return f"{self._key(path)}:{vocab_size}" in self.known

    def note_ids_below(self, path: Path, vocab_size: int) -> None:
        """Record that all ids of a file are below `vocab_size`."""
        self.used[f"{self._key(path)}:{vocab_size}"] = "ids"

    def _key(self, path: Path) -> str:
        stat = path.stat()
        return f"{path}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"

    def save(self) -> None:
        """Write the cache for later runs. Failure is harmless: files are then read again."""
        if not self.used.items() <= self.known.items():
            with contextlib.suppress(OSError, UserError):
                write_durably(cache_directory() / VERIFIED, to_json(self.known | self.used))
