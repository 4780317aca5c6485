"""Files that are whole or absent: synced to disk under another name, then renamed.

In: bytes. Out: a file that survives a crash at any moment, or none.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from yuzogpt.errors import UserError


def write_durably(path: Path, content: bytes) -> None:
    """Replace `path` by `content` so that a reader sees the old file or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path), temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a file in an OSError that names none, as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` survive a power loss."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make the bytes of `path` survive a power loss."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: Any) -> bytes:
    """Return readable JSON whose bytes depend on `value` alone, so that it can be hashed."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def cache_directory() -> Path:
    """Return this user's cache on this node (downloads, verified hashes), made if missing."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    directory = Path(base) / "yuzogpt"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def refuse_public(path: Path, flag: str) -> None:
    """Raise UserError if a file with a secret cannot be read, or can be by others.

    One that another user gave us (a mounted secret belongs to root) may be our group's, too: that
    is how it came to us.
    """
    if not path.is_file() or not os.access(path, os.R_OK):
        raise UserError(f"--{flag}={path}: not readable")
    found = path.stat()
    if found.st_mode & (0o077 if found.st_uid == os.getuid() else 0o007):
        raise UserError(f"--{flag}={path}: others may read it; chmod 600 {path}")
