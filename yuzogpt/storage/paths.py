"""Makes paths absolute before Ray starts: workers and jobs do not run in the user's directory."""

import os
import posixpath
import shlex
from pathlib import Path

from yuzogpt.errors import UserError
from yuzogpt.storage.filesystems import scheme_of
from yuzogpt.storage.run_storage import SCHEMES

# Set by Ray for the entrypoint of `ray job submit`.
SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def absolute(path: str, storage: str, key: str) -> Path:
    """Return `path` as an absolute local path; relative ones start at `storage`, if set.

    UserError in a submitted job without `storage`: its working directory is a copy that is deleted
    with the job. `key`: the setting's name, for the message.
    """
    if not path:
        raise UserError(f"--{key}=: empty; give a path")
    plain = expanded(local_path(path, key), key)
    if plain.is_absolute():
        return written_as_text(plain, key)
    base = expanded(local_path(storage, "storage"), "storage") if storage else Path.cwd()
    if not base.is_absolute():
        raise UserError(f"--storage={storage}: not absolute; give a directory that all nodes share")
    if SUBMITTED_JOB in os.environ and not storage:
        raise UserError(
            f"--{key}={path}: relative, and a submitted job's directory vanishes with it; "
            "give an absolute path, or --storage=/a/directory/that/all/nodes/share (or s3://bucket)"
        )
    return written_as_text(base / plain, key)


def expanded(path: str, key: str) -> Path:
    """Return a path with ~ or ~user replaced by that user's home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"--{key}={path}: there is no such user; give a path") from None


def written_as_text(path: Path, key: str) -> Path:
    """Return a path unless our files, which are UTF-8, cannot name it (UserError)."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise UserError(f"--{key}={shown}: not UTF-8; give another name") from None
    if "\0" in str(path):
        raise UserError(f"--{key}={str(path)!r}: has a character that no path can have")
    return path


def absolute_or_remote(path: str, storage: str, key: str) -> str:
    """Return `path` as an absolute local path, or as a URI if it, or its base, is one."""
    if scheme_of(path):
        return path
    if scheme_of(storage) and path and not Path(path).is_absolute():
        return f"{storage.rstrip('/')}/{path}"
    return str(absolute(path, storage, key))


def directory_or_store(path: str, storage: str, key: str) -> str:
    """Return where a run is: an absolute local path, or the URI of a folder in a store."""
    location = absolute_or_remote(path, storage, key).rstrip("/") or "/"
    scheme = scheme_of(location)
    if scheme and scheme not in SCHEMES:
        raise UserError(
            f"--{key}={path}: {scheme}:// is not supported here; give a directory, "
            f"{' or '.join(f'{known}://bucket/folder' for known in SCHEMES)}"
        )
    if scheme and "/" not in location.removeprefix(f"{scheme}://"):
        raise UserError(f"--{key}={path}: a whole bucket; give a folder in it: {location}/run")
    return location


def local_path(path: str, key: str) -> str:
    """Strip file://, and refuse object stores."""
    scheme = scheme_of(path)
    if scheme:
        raise UserError(
            f"--{key}={path}: {scheme}:// is not supported here; give a directory that all nodes "
            "share"
        )
    return path.removeprefix("file://")


def as_typed(path: str) -> str:
    """Return a path as one would type it here: relative if it is in this directory, and quoted."""
    if not scheme_of(path) and Path(path).is_relative_to(Path.cwd()):
        path = str(Path(path).relative_to(Path.cwd()))
    return shlex.quote(path)


def is_within(path: Path, folder: Path) -> bool:
    """Return whether a path is a folder or lies in it, symlinks followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def is_within_store(uri: str, folder: str) -> bool:
    """Return whether a URI names a folder of an object store or lies in it."""
    if not scheme_of(uri) or scheme_of(uri) != scheme_of(folder):
        return False
    inside, of = (posixpath.normpath(f"/{name.partition('://')[2]}") for name in (uri, folder))
    return f"{inside}/".startswith(f"{of}/")
