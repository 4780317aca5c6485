"""Where a path leads: this machine's files, or an object store (s3://, gs://, hf://).

In: a path or URI as the user wrote it. Out: a pyarrow filesystem and the path within it. Nothing
is contacted before the user names a URI; credentials come from where the stores' own tools look.
"""

import fnmatch
import functools
from collections.abc import Iterator

import pyarrow as pa
from pyarrow import fs

from yuzogpt.errors import UserError, first_line

OBJECT_STORES = ("s3", "gs", "hf")


def scheme_of(path: str) -> str:
    """Return the scheme of a URI; empty for a path of this machine, file:// included."""
    scheme, separator, _ = path.partition("://")
    return scheme if separator and scheme != "file" else ""


def open_filesystem(path: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem that holds `path`, and the path within it.

    Raises UserError for a scheme that is not known, or a store that its settings do not reach.
    """
    scheme = scheme_of(path)
    if not scheme:
        return fs.LocalFileSystem(), path.removeprefix("file://")
    inside = path.removeprefix(f"{scheme}://")
    return store(scheme, inside.partition("/")[0]), inside


@functools.cache
def store(scheme: str, bucket: str) -> fs.FileSystem:
    """Connect to an object store; once a process for each bucket, whose region it may depend on."""
    try:
        if scheme == "hf":
            from huggingface_hub import HfFileSystem

            return fs.PyFileSystem(fs.FSSpecHandler(HfFileSystem()))
        if scheme in ("s3", "gs"):
            return fs.FileSystem.from_uri(f"{scheme}://{bucket}")[0]
    except (OSError, ValueError) as error:
        raise UserError(f"{scheme}://{bucket}: not reachable: {first_line(error)}") from None
    raise UserError(
        f"{scheme}://: not known; use a path, file://, or {', '.join(OBJECT_STORES)}://"
    )


def is_store_error(error: BaseException) -> bool:
    """Tell whether an error is of a file or store, not of this program."""
    package = type(error).__module__.partition(".")[0]
    is_of_hub = package.startswith(("httpx", "httpcore", "huggingface_hub"))
    return is_of_hub or isinstance(error, OSError | pa.ArrowInvalid)


def is_pattern(path: str) -> bool:
    """Tell whether a path is a glob."""
    return any(character in path for character in "*?[")


def list_files(path: str) -> tuple[str, list[fs.FileInfo]]:
    """Return the folder and, sorted by path, the files that a file, a folder or a glob means.

    The paths in the answer are within the filesystem. UserError if there is none.
    """
    filesystem, inside = open_filesystem(path)
    try:
        folder = inside.rstrip("/")
        (info,) = filesystem.get_file_info([folder])
        if is_pattern(inside) and info.type == fs.FileType.NotFound:
            folder = inside[: min(inside.find(c) for c in "*?[" if c in inside)].rpartition("/")[0]
            pattern = inside.removeprefix(folder).lstrip("/").split("/")
            files = list(expand(filesystem, folder, pattern))
        else:
            if info.type == fs.FileType.Directory:
                found = filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
                files = [info for info in found if info.is_file]
            else:
                files = [info] if info.is_file else []
                folder = folder.rpartition("/")[0]
    except FileNotFoundError:
        files = []
    except Exception as error:
        if not is_store_error(error):
            raise
        raise UserError(f"{path}: not within reach: {first_line(error)}") from None
    if not files:
        raise UserError(f"{path}: no file there")
    return folder, sorted(files, key=lambda info: str(info.path))


def expand(filesystem: fs.FileSystem, folder: str, pattern: list[str]) -> Iterator[fs.FileInfo]:
    """Yield the files below `folder` that match, folder by folder: `*` stays within one, `**` not.

    Folders that cannot match are not looked into.
    """
    spans = pattern[0] == "**"
    for info in filesystem.get_file_info(fs.FileSelector(folder or "/", recursive=spans)):
        if spans:
            below = info.path.removeprefix(folder).lstrip("/").split("/")
            if info.is_file and match_folders(below, pattern):
                yield info
        elif fnmatch.fnmatchcase(info.base_name, pattern[0]):
            if len(pattern) > 1 and not info.is_file:
                yield from expand(filesystem, info.path, pattern[1:])
            elif len(pattern) == 1 and info.is_file:
                yield info


def match_folders(path: list[str], pattern: list[str]) -> bool:
    """Match folder by folder."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(match_folders(path[cut:], pattern[1:]) for cut in range(len(path) + 1))
    here = bool(path) and fnmatch.fnmatchcase(path[0], pattern[0])
    return here and match_folders(path[1:], pattern[1:])
