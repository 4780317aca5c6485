"""Where a run is kept: in a directory of this machine, or in a folder of an object store.

`open_storage(out_dir, role)` returns a LocalStorage or an ObjectStorage. Both stand for a folder,
and `storage / name` for a file or folder in it. `storage.local` is the path at which this process
finds it: the directory itself, or a copy in the cache. A store has neither rename nor append, so
there are two groups of methods:

    upload, download, ...          copies of files that are made here: tensors, metrics.jsonl.
                                   With LocalStorage they do nothing
    read, write, append, ...       small files that processes share. With ObjectStorage each call
                                   goes to the store

A function that takes a RunStorage may use the network; one that takes a Path does not.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self
from urllib.parse import quote

from pyarrow import fs

from yuzogpt.errors import UserError, first_line
from yuzogpt.storage.atomic_files import cache_directory, write_durably
from yuzogpt.storage.filesystems import is_store_error, open_filesystem, scheme_of
from yuzogpt.storage.untrusted import DamagedFile, open_regular

# Processes of one machine that must not overwrite each other's copies: what the user started, the
# training processes, and all others.
ROLES = DRIVER, WORKER, READER = "driver", "worker", "reader"
COPIES = "runs"  # the folder of the cache
SCHEMES = ("s3", "gs")
MAX_NAME_LENGTH = 255  # characters, of a name in a directory
CHUNK_BYTES = 2**24  # uploaded or downloaded at a time
FLUSH_BYTES = 2**26  # a file that is read faster than it is uploaded would fill the memory
STORE_SETTLE_S = 1.0  # more than another process needs between its look and its write


class RunStorage(ABC):
    """A folder of a run, or a file in it."""

    local: Path  # where this process finds it
    is_remote: ClassVar[bool]

    @property
    @abstractmethod
    def display_name(self) -> str:
        """Its name for people: where it is kept."""

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.local.name

    @property
    @abstractmethod
    def parent(self) -> Self:
        """The folder it is in."""

    @abstractmethod
    def __truediv__(self, name: str) -> Self:
        """Return a file or folder in this folder."""

    # --- copies; without a store there is nothing to copy

    def upload(self, source: Path | None = None) -> str | None:
        """Copy `source` (default: the local copy) to the store; return the SHA-256 of its bytes.

        OSError if not all of them arrive. None without a store.
        """
        return None

    def download(self, *, if_changed: bool = False, max_bytes: int | None = None) -> bool:
        """Copy a file from the store, if it is there; return whether it is.

        `if_changed`: keep a copy that has the same time and size. A file that is gone from the
        store is deleted here. OSError if it is larger than `max_bytes`. False without a store.
        """
        return False

    def list_remote(self) -> dict[str, int]:
        """Return the names and sizes of all files below this folder in the store."""
        return {}

    @abstractmethod
    def delete_remote(self, first: str) -> None:
        """Delete this folder in the store, beginning with the file `first`; copies here stay."""

    # --- small files that processes share

    @abstractmethod
    def read(self) -> bytes:
        """Return the content; FileNotFoundError if there is no such file, OSError if unreadable."""

    @abstractmethod
    def write(self, content: bytes) -> None:
        """Replace the content, so that a reader sees the old one or the new one."""

    @abstractmethod
    def append(self, content: bytes) -> None:
        """Add to the content. In a store this reads and writes: another write may be lost."""

    @abstractmethod
    def create(self, content: bytes) -> bool:
        """Write the file if there is none; return whether this process wrote it.

        In a store the last writer wins: so wait after writing, and look whose content is there.
        """

    @abstractmethod
    def exists(self) -> bool:
        """Return whether there is such a file."""

    @abstractmethod
    def delete(self) -> None:
        """Delete the file, and its local copy, if they exist."""

    @abstractmethod
    def delete_if(self, content: bytes) -> None:
        """Delete the file if it has this content, and leave a newer one that took its place.

        In a store the newer file may be deleted, too; its creator notices that.
        """


@dataclass(frozen=True)
class LocalStorage(RunStorage):
    """A directory, or a file in it."""

    local: Path
    is_remote: ClassVar[bool] = False

    @property
    def display_name(self) -> str:
        return str(self.local)

    @property
    def parent(self) -> Self:
        return type(self)(self.local.parent)

    def __truediv__(self, name: str) -> Self:
        return type(self)(self.local / name)

    def delete_remote(self, first: str) -> None:
        pass

    def read(self) -> bytes:
        try:
            with open_regular(self.local) as file:
                return file.read()
        except DamagedFile:
            raise OSError(errno.EINVAL, "not a regular file", str(self.local)) from None

    def write(self, content: bytes) -> None:
        write_durably(self.local, content)

    def append(self, content: bytes) -> None:
        with self.local.open("ab") as file:
            file.write(content)

    def create(self, content: bytes) -> bool:
        mine = self.local.with_name(f"{self.name}.{uuid.uuid4().hex}")
        mine.write_bytes(content)
        try:
            os.link(mine, self.local)  # atomic on network file systems too
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            return self._create_exclusively(content)
        finally:
            mine.unlink()
        return True

    def _create_exclusively(self, content: bytes) -> bool:
        try:
            with self.local.open("xb") as file:
                file.write(content)
        except FileExistsError:
            return False
        return True

    def exists(self) -> bool:
        return self.local.exists()

    def delete(self) -> None:
        self.local.unlink(missing_ok=True)

    def delete_if(self, content: bytes) -> None:
        aside = self.local.with_name(f"{self.name}.stale.{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            self.local.rename(aside)
            if aside.read_bytes() != content:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.local)
            aside.unlink()


@dataclass(frozen=True)
class ObjectStorage(RunStorage):
    """A folder of an object store, or a file in it, and its copy in the cache."""

    uri: str
    local: Path
    is_remote: ClassVar[bool] = True

    @property
    def display_name(self) -> str:
        return self.uri

    @property
    def parent(self) -> Self:
        return type(self)(self.uri.rpartition("/")[0], self.local.parent)

    def __truediv__(self, name: str) -> Self:
        if ".." in name.split("/"):
            raise UserError(f"{self.uri}/{name}: leads out of its folder")
        return type(self)(f"{self.uri}/{name}", self.local / name)

    def upload(self, source: Path | None = None) -> str:
        digest, sent = hashlib.sha256(), 0
        with self._in_store() as (filesystem, inside):
            with (
                (source or self.local).open("rb") as file,
                filesystem.open_output_stream(inside) as stream,
            ):
                while chunk := file.read(CHUNK_BYTES):
                    stream.write(chunk)
                    digest.update(chunk)
                    sent += len(chunk)
                    if sent % FLUSH_BYTES == 0:
                        stream.flush()
            stored = filesystem.get_file_info(inside).size
        if stored != sent:
            raise OSError(errno.EIO, f"{stored} of {sent} bytes arrived", self.uri)
        return digest.hexdigest()

    def download(self, *, if_changed: bool = False, max_bytes: int | None = None) -> bool:
        path = self.local
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            with self._in_store() as (filesystem, inside):
                info = filesystem.get_file_info(inside)
                if not info.is_file:
                    raise FileNotFoundError(errno.ENOENT, "not there", self.uri)
                if max_bytes is not None and info.size > max_bytes:
                    reason = f"{info.size:,} bytes, at most {max_bytes:,}"
                    raise OSError(errno.EFBIG, reason, self.uri)
                version = (info.size, info.mtime_ns)
                if if_changed and path.exists() and version_of(path) == version:
                    return True
                with filesystem.open_input_stream(inside) as stream, temporary.open("wb") as file:
                    shutil.copyfileobj(stream, file, CHUNK_BYTES)
            os.utime(temporary, ns=(info.mtime_ns, info.mtime_ns))
            temporary.replace(path)
        except FileNotFoundError:
            path.unlink(missing_ok=True)
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def list_remote(self) -> dict[str, int]:
        with self._in_store() as (filesystem, inside):
            selector = fs.FileSelector(inside, recursive=True, allow_not_found=True)
            files = [info for info in filesystem.get_file_info(selector) if info.is_file]
        return {info.path.removeprefix(f"{inside}/"): info.size for info in files}

    def delete_remote(self, first: str) -> None:
        if not self.list_remote():
            return
        (self / first)._delete_object()
        with self._in_store() as (filesystem, inside), contextlib.suppress(FileNotFoundError):
            filesystem.delete_dir(inside)

    def read(self) -> bytes:
        # Not an input stream, which asks for 16 kB at a time.
        with self._in_store() as (filesystem, inside), filesystem.open_input_file(inside) as file:
            return bytes(file.read())

    def write(self, content: bytes) -> None:
        with (
            self._in_store() as (filesystem, inside),
            filesystem.open_output_stream(inside) as stream,
        ):
            stream.write(content)

    def append(self, content: bytes) -> None:
        before = b""
        with contextlib.suppress(FileNotFoundError):
            before = self.read()
        self.write(before + content)

    def create(self, content: bytes) -> bool:
        if self.exists():
            return False
        self.write(content)
        time.sleep(STORE_SETTLE_S)
        try:
            return self.read() == content
        except FileNotFoundError:
            return False

    def exists(self) -> bool:
        with self._in_store() as (filesystem, inside):
            return bool(filesystem.get_file_info(inside).is_file)

    def delete(self) -> None:
        with contextlib.suppress(OSError):
            self.local.unlink(missing_ok=True)
        self._delete_object()

    def delete_if(self, content: bytes) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self.read() == content:
                self.delete()

    @contextlib.contextmanager
    def _in_store(self) -> Iterator[tuple[fs.FileSystem, str]]:
        """Yield the store's filesystem, and the path in it.

        What the store's library raises becomes an OSError of one line that names the URI.
        """
        try:
            yield open_filesystem(self.uri)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "not there", self.uri) from None
        except Exception as error:
            is_of_store = isinstance(error, UserError) or is_store_error(error)
            if not is_of_store or (isinstance(error, OSError) and error.filename):
                raise
            raise OSError(errno.EIO, first_line(error), self.uri) from None

    def _delete_object(self) -> None:
        with self._in_store() as (filesystem, inside), contextlib.suppress(FileNotFoundError):
            if filesystem.get_file_info(inside).is_file:
                filesystem.delete_file(inside)


def open_storage(out_dir: str, role: str) -> RunStorage:
    """Return the storage of a run, or of a folder of one: of a path or a URI.

    `role`: DRIVER, WORKER or READER. The directory for copies is made if it is missing.
    """
    if not scheme_of(out_dir):
        return LocalStorage(Path(out_dir))
    parent, _, name = out_dir.rpartition("/")
    if ".." in out_dir.split("/"):
        raise UserError(f"{out_dir}: a store has no folder `..`; write the folder's own name")
    quoted = quote(parent, safe="")
    if len(quoted) > MAX_NAME_LENGTH:
        raise UserError(f"{out_dir}: too long; choose a shorter name")
    local = cache_directory() / COPIES / quoted / role / name
    local.mkdir(parents=True, exist_ok=True)
    return ObjectStorage(out_dir, local)


def version_of(path: Path) -> tuple[int, int]:
    """Return the size of a file in bytes, and the time of its last change in nanoseconds."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
