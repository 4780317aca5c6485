"""Which filesystem a path or URI means: this machine's, or an object store (s3://, gs://, hf://).

In: a path or URI as the user wrote it. Out: a pyarrow filesystem and the path within it. Nothing is
contacted unless the user names a URI; credentials come from where the stores' own tools look.
"""

import fnmatch
import functools
import heapq
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

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

    UserError if the scheme is not known, or the store cannot be reached.
    """
    scheme = scheme_of(path)
    if not scheme:
        return fs.LocalFileSystem(), path.removeprefix("file://")
    inside = path.removeprefix(f"{scheme}://")
    return store(scheme, inside.partition("/")[0]), inside


@functools.cache
def store(scheme: str, bucket: str) -> fs.FileSystem:
    """Connect to an object store: once per process and bucket, which may decide the region."""
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
    """Return whether an error comes from a file or a store, not from this program."""
    package = type(error).__module__.partition(".")[0]
    is_of_hub = package.startswith(("httpx", "httpcore", "huggingface_hub"))
    return is_of_hub or isinstance(error, OSError | pa.ArrowInvalid)


def is_pattern(path: str) -> bool:
    return any(character in path for character in "*?[")


def list_files(path: str) -> tuple[str, list[fs.FileInfo]]:
    """Return the folder and, sorted by path, the files that a file, a folder or a glob names.

    A folder's hidden files are left out, unless the user or a glob names them. On this machine each
    real path comes once. The paths in the answer are within the filesystem. UserError if there is
    no file.
    """
    filesystem, inside = open_filesystem(path)
    try:
        folder = inside.rstrip("/")
        (info,) = filesystem.get_file_info([folder])
        if is_pattern(inside) and info.type == fs.FileType.NotFound:
            folder = inside[: min(inside.find(c) for c in "*?[" if c in inside)].rpartition("/")[0]
            pattern = inside.removeprefix(folder).lstrip("/").split("/")
            files = list(expand(filesystem, folder, pattern))
            if isinstance(filesystem, fs.LocalFileSystem):
                files = each_once(files, folder)
        else:
            if info.type == fs.FileType.Directory:
                below = files_below(filesystem, folder)
                files = [info for info in below if not is_hidden(path_below(info, folder))]
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
    """Yield the files below `folder` that match a pattern, in which only `**` spans folders.

    Folders that cannot match are not listed.
    """
    if pattern[0] == "**":
        for info in files_below(filesystem, folder):
            if match_folders(path_below(info, folder), pattern):
                yield info
        return
    for info in filesystem.get_file_info(fs.FileSelector(folder or "/")):
        if fnmatch.fnmatchcase(info.base_name, pattern[0]):
            if len(pattern) > 1 and not info.is_file:
                yield from expand(filesystem, info.path, pattern[1:])
            elif len(pattern) == 1 and info.is_file:
                yield info


def match_folders(path: list[str], pattern: list[str]) -> bool:
    """Match a path folder by folder; `**` does not match hidden ones."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(
            match_folders(path[cut:], pattern[1:])
            for cut in range(len(path) + 1)
            if not is_hidden(path[:cut])
        )
    matches = bool(path) and fnmatch.fnmatchcase(path[0], pattern[0])
    return matches and match_folders(path[1:], pattern[1:])


def path_below(info: fs.FileInfo, folder: str) -> list[str]:
    """Return the folders, and the name, that lead from `folder` to a file."""
    below: str = info.path.removeprefix(folder).lstrip("/")
    return below.split("/")


def is_hidden(names: Iterable[str]) -> bool:
    """Return whether a name in a path begins with a dot or an underscore."""
    return any(name.startswith((".", "_")) for name in names)


def files_below(filesystem: fs.FileSystem, folder: str) -> list[fs.FileInfo]:
    if isinstance(filesystem, fs.LocalFileSystem):
        infos = filesystem.get_file_info(list(walk(folder or "/")))
    else:
        infos = filesystem.get_file_info(fs.FileSelector(folder or "/", recursive=True))
    return [info for info in infos if info.is_file]


def walk(folder: str) -> Iterator[str]:
    """Yield the files below a folder of this machine; links are followed, each real path once.

    Targets of links come last, so that a file keeps the name that it has without them.
    """
    folders = [(folder, os.path.realpath(folder).rstrip("/"))]
    seen = {real for _, real in folders}
    links: list[str] = []
    while folders or links:
        if folders:
            current, real_folder = folders.pop()
            for entry in os.scandir(current):
                real = f"{real_folder}/{entry.name}"
                if entry.is_symlink():
                    heapq.heappush(links, entry.path)
                elif real not in seen:
                    seen.add(real)
                    if entry.is_dir():
                        folders.append((entry.path, real))
                    else:
                        yield entry.path
            continue
        link = heapq.heappop(links)
        real = os.path.realpath(link).rstrip("/")
        if real not in seen:
            seen.add(real)
            if Path(real).is_dir():
                folders.append((link, real))
            else:
                yield link


def each_once(files: Iterable[fs.FileInfo], folder: str) -> list[fs.FileInfo]:
    """Leave out files of this machine that are links to others of them."""
    base = os.path.realpath(folder or "/").rstrip("/")

    def is_link(info: fs.FileInfo) -> bool:
        real = "/".join([base, *path_below(info, folder)])
        return real != os.path.realpath(str(info.path))

    by_real_path: dict[str, fs.FileInfo] = {}
    for info in sorted(files, key=lambda info: (is_link(info), info.path)):
        by_real_path.setdefault(os.path.realpath(info.path), info)
    return list(by_real_path.values())
