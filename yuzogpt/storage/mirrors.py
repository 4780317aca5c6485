"""A run in an object store: each process works in a mirror of it, a directory of its machine.

In: `--out_dir`, a directory or the URI of a folder (s3://, gs://). Out: a directory, and the copies
between it and the store, which has neither rename nor append. Two kinds of files:

    push, pull                     what is made here and copied: tensors, metrics.jsonl, curves
    read, write, append, delete    small files that processes share: in a mirror, the store's own

Where a path is in no mirror, the first kind do nothing, and the second do it to the file. So the
rest of the program names files of a run by their paths, wherever the run is. A mirror lies in the
cache's folder `runs` and nowhere else: no name in a run or corpus of somebody else makes one.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

from pyarrow import fs

from yuzogpt.errors import UserError, first_line
from yuzogpt.storage.atomic_files import cache_directory, cache_path, write_durably
from yuzogpt.storage.filesystems import is_store_error, open_filesystem, scheme_of
from yuzogpt.storage.untrusted import DamagedFile, open_regular

# Processes of one machine that must not write each other's copies.
ROLES = DRIVER, WORKER, READER = "driver", "worker", "reader"
MIRRORS = "runs"  # in the cache
SCHEMES = ("s3", "gs")
MARKS = tuple(quote(f"{scheme}://", safe="") for scheme in SCHEMES)
LONGEST = 255  # of a name in a directory
PIECE = 2**24  # bytes, sent or asked for at a time
WAIT_AFTER = 2**26  # bytes; what is read faster than it is sent would fill the memory
EVERY = 2.0  # seconds between copies of a file that grows, and between looks at the store
SHARE = 0.05  # of the time, at most, that goes into such copies


def directory_of(out_dir: str, role: str) -> Path:
    """Return where a process finds out_dir: itself, or its mirror, made if missing.

    `role`: DRIVER for what the user started, WORKER for training processes, READER for others.
    """
    if not scheme_of(out_dir):
        return Path(out_dir)
    parent, _, name = out_dir.rpartition("/")
    if ".." in out_dir.split("/"):
        raise UserError(f"{out_dir}: a store has no folder `..`; write the folder's own name")
    quoted = quote(parent, safe="")
    if len(quoted) > LONGEST:
        raise UserError(f"{out_dir}: too long; choose a shorter name")
    directory = cache_directory() / MIRRORS / quoted / role / name
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def uri_of(path: Path) -> str | None:
    """Return what a path in a mirror is a copy of; None for any other path."""
    try:
        folder = (cache_path() / MIRRORS).parts
    except UserError:  # this user has no home, hence no mirror
        return None
    if path.parts[: len(folder)] != folder or ".." in path.parts:
        return None
    quoted, role, *below = (*path.parts[len(folder) :], "", "")
    if not quoted.startswith(MARKS) or role not in ROLES:
        return None
    return "/".join([unquote(quoted), *filter(None, below)])


def name_of(path: Path) -> str:
    """Return the name of a path for people: where it is kept."""
    return uri_of(path) or str(path)


# --- copies


def push(path: Path, to: Path | None = None) -> str | None:
    """Copy a file to its store, or to where `to` is a copy of; return the SHA-256 of what was sent.

    OSError if it is not whole there.
    """
    uri = uri_of(to or path)
    if uri is None:
        return None
    filesystem, inside = opened(uri)
    digest, sent = hashlib.sha256(), 0
    with as_os_error(uri):
        with path.open("rb") as file, filesystem.open_output_stream(inside) as stream:
            while piece := file.read(PIECE):
                stream.write(piece)
                digest.update(piece)
                sent += len(piece)
                if sent % WAIT_AFTER == 0:
                    stream.flush()
        stored = filesystem.get_file_info(inside).size
    if stored != sent:
        raise OSError(errno.EIO, f"{stored} of {sent} bytes arrived", uri)
    return digest.hexdigest()


def pull(path: Path, *, if_changed: bool = False, max_bytes: int | None = None) -> bool:
    """Copy a file from its store, if it is there; return whether it is.

    `if_changed`: leave a copy of the same time and size. One that is gone in the store goes here.
    OSError if it has more than `max_bytes`.
    """
    uri = uri_of(path)
    if uri is None:
        return False
    filesystem, inside = opened(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with as_os_error(uri):
            info = filesystem.get_file_info(inside)
            if not info.is_file:
                raise FileNotFoundError(errno.ENOENT, "not there", uri)
            if max_bytes is not None and info.size > max_bytes:
                raise OSError(errno.EFBIG, f"{info.size:,} bytes, at most {max_bytes:,}", uri)
            if if_changed and path.exists() and version_of(path) == (info.size, info.mtime_ns):
                return True
            with filesystem.open_input_stream(inside) as stream, temporary.open("wb") as file:
                shutil.copyfileobj(stream, file, PIECE)
        os.utime(temporary, ns=(info.mtime_ns, info.mtime_ns))
        temporary.replace(path)
    except FileNotFoundError:
        path.unlink(missing_ok=True)
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def version_of(path: Path) -> tuple[int, int]:
    """Return the size and the time of a copy."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


class BackgroundUploader:
    """Copies a file that grows to its store, every few seconds; nothing, if it is in no mirror."""

    def __init__(self, path: Path) -> None:
        """Begin at once."""
        self.path, self.pushed = path, (-1, -1)
        self.turn = threading.Lock()  # an older copy must not come after a newer one
        self.wake, self.done = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._go_on, name="mirror", daemon=True)
        if uri_of(path):
            self.wake.set()
            self.thread.start()

    def push(self) -> None:
        """Copy what is there now, if that is new; OSError if it cannot be."""
        if not uri_of(self.path):
            return
        with self.turn:
            stamp = version_of(self.path)
            if stamp != self.pushed:
                push(self.path)
                self.pushed = stamp

    def soon(self) -> None:
        """Copy without waiting for the time to come."""
        self.wake.set()

    def close(self) -> None:
        """Copy what is left; OSError if it cannot be."""
        self.done.set()
        self.wake.set()
        if self.thread.is_alive():
            self.thread.join()
        self.push()

    def _go_on(self) -> None:
        pause = 0.0
        while not self.done.is_set():
            self.wake.wait(pause)
            self.wake.clear()
            started = time.monotonic()
            with contextlib.suppress(OSError):  # tried again
                self.push()
            pause = pause_after(time.monotonic() - started)


def pause_after(took: float) -> float:
    """Return how long to wait until a file that grows is copied again."""
    return max(EVERY, took / SHARE)


# --- small files that processes share


def read(path: Path) -> bytes:
    """Return the content of a file; FileNotFoundError if there is none, OSError if unreadable."""
    uri = uri_of(path)
    if uri is None:
        try:
            with open_regular(path) as regular:
                return regular.read()
        except DamagedFile:
            raise OSError(errno.EINVAL, "not a regular file", str(path)) from None
    filesystem, inside = opened(uri)
    with (
        as_os_error(uri),
        filesystem.open_input_file(inside) as file,
    ):  # a stream asks 16 kB at a time
        return bytes(file.read())


def write(path: Path, content: bytes) -> None:
    """Replace the content of a file, so that a reader sees the old one or the new one."""
    uri = uri_of(path)
    if uri is None:
        write_durably(path, content)
        return
    filesystem, inside = opened(uri)
    with as_os_error(uri), filesystem.open_output_stream(inside) as stream:
        stream.write(content)


def append(path: Path, content: bytes) -> None:
    """Add to a file. In a store that is reading and writing: another may come in between."""
    if uri_of(path) is None:
        with path.open("ab") as file:
            file.write(content)
        return
    before = b""
    with contextlib.suppress(FileNotFoundError):
        before = read(path)
    write(path, before + content)


def exists(path: Path) -> bool:
    """Tell whether there is such a file."""
    uri = uri_of(path)
    if uri is None:
        return path.exists()
    filesystem, inside = opened(uri)
    with as_os_error(uri):
        return bool(filesystem.get_file_info(inside).is_file)


def delete(path: Path) -> None:
    """Delete a file, if it is there; in a mirror, in the store and here."""
    if uri_of(path) is None:
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    delete_stored(path)


# --- folders of the store


def listing(directory: Path) -> dict[str, int]:
    """Return the files that the store has below a directory of a mirror, with their sizes."""
    uri = uri_of(directory)
    if uri is None:
        return {}
    filesystem, inside = opened(uri)
    selector = fs.FileSelector(inside, recursive=True, allow_not_found=True)
    with as_os_error(uri):
        found = [info for info in filesystem.get_file_info(selector) if info.is_file]
    return {info.path.removeprefix(f"{inside}/"): info.size for info in found}


def delete_folder(directory: Path, first: str) -> None:
    """Delete in the store what is below a directory of a mirror: the file `first` first."""
    uri = uri_of(directory)
    if uri is None or not listing(directory):
        return
    delete_stored(directory / first)
    filesystem, inside = opened(uri)
    with as_os_error(uri), contextlib.suppress(FileNotFoundError):
        filesystem.delete_dir(inside)


def delete_stored(path: Path) -> None:
    """Delete in the store what a path of a mirror is a copy of, if it is there."""
    uri = uri_of(path)
    if uri is None:
        return
    filesystem, inside = opened(uri)
    with as_os_error(uri), contextlib.suppress(FileNotFoundError):
        if filesystem.get_file_info(inside).is_file:
            filesystem.delete_file(inside)


def opened(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem that holds a URI, and the path in it; OSError if out of reach."""
    try:
        return open_filesystem(uri)
    except UserError as error:
        raise OSError(errno.EIO, str(error), uri) from None


@contextlib.contextmanager
def as_os_error(uri: str) -> Iterator[None]:
    """Turn what a store's library raises into an OSError of one line that names the URI."""
    try:
        yield
    except Exception as error:
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, "not there", uri) from None
        if not is_store_error(error) or (isinstance(error, OSError) and error.filename):
            raise
        raise OSError(errno.EIO, first_line(error), uri) from None
