"""Files that are complete or absent: synced to disk under another name, then renamed.

A crash at any moment leaves the old file, the new one, or none.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from yuzogpt.errors import UserError, reason_of
from yuzogpt.storage.untrusted import open_regular

NO_HOME = "/nonexistent"  # as Debian has it for the user nobody
ADVICE_ON_CACHES = "XDG_CACHE_HOME=DIR names a directory that can be written"


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name of the file to an OSError that has none, as on a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno or errno.EIO, reason_of(error), str(path)) from error
        raise


def write_durably(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Replace the content of a file, so that a reader sees the old content or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)


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
    """Return the SHA-256 of a regular file, as hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: Any) -> bytes:
    """Return readable JSON whose bytes depend only on `value`, so that it can be hashed."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def may(path: Path, mode: int) -> bool:
    """Return whether this process, by its effective user, may use a path (os.R_OK, ...)."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def cache_path() -> Path:
    """Return the path of this user's cache on this node; UserError without a home."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "yuzogpt"
    try:
        return Path.home() / ".cache" / "yuzogpt"
    except RuntimeError:
        raise UserError(f"no cache: HOME is not set; {ADVICE_ON_CACHES}") from None


def cache_directory() -> Path:
    """Return the cache (downloads, copies of stored runs, verified hashes); create it if missing.

    UserError if it cannot be written; callers that only save time with it then do without.
    """
    directory = cache_path()
    try:
        if not os.environ.get("XDG_CACHE_HOME"):
            Path.home().stat()  # a missing home is not created
        directory.mkdir(parents=True, exist_ok=True)
        if not may(directory, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        reason = f"{directory} cannot be written ({reason_of(error)})"
        raise UserError(f"no cache: {reason}; {ADVICE_ON_CACHES}") from None
    return directory


def expect_no_home() -> None:
    """Let libraries be imported and used without a home that this user can write to.

    Some raise at import without a home: a uid that no passwd file names, and no HOME.
    """
    try:
        home = Path.home()
    except RuntimeError:
        home = Path(NO_HOME)
        os.environ["HOME"] = NO_HOME
    if not may(home, os.W_OK):  # it would log a paragraph about its temporary directory
        logging.getLogger("matplotlib").setLevel(logging.ERROR)


def check_not_public(path: Path, flag: str) -> None:
    """Raise UserError if a file with a secret cannot be read, or others can read it.

    A file that belongs to another user (a mounted secret belongs to root) may be readable by our
    group: that is how we can read it.
    """
    if not path.is_file() or not may(path, os.R_OK):
        raise UserError(f"--{flag}={path}: not readable")
    stat = path.stat()
    if stat.st_mode & (0o077 if stat.st_uid == os.getuid() else 0o007):
        raise UserError(f"--{flag}={path}: others may read it; chmod 600 {path}")
