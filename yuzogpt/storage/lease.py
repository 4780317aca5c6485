"""One writer for one directory: a lease with a heartbeat, so that power loss leaves no stale lock.

In: a directory. Out: the right to write in it, or a UserError that names who holds it. Whoever
finds a lease asks, if its holder runs on this machine, whether that process lives. The lease of
another machine is watched: its holder rewrites it every few seconds, and one that does not change
for EXPIRES_AFTER seconds of the watcher's own clock has no living holder. No clocks are compared
between machines.

In an object store, which has no hard links, the last writer wins: whoever wrote a lease waits, and
holds it if it is still there.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

from pydantic import Field

from yuzogpt.errors import InUse, RunFailed, UserError
from yuzogpt.storage import mirrors
from yuzogpt.storage.untrusted import DamagedFile, Untrusted, parse_json

LEASE = ".lease.json"
HEARTBEAT = 2.0  # seconds
EXPIRES_AFTER = 10.0  # seconds without a heartbeat
STORE_SETTLE_S = 1.0  # seconds, in a store: more than another needs from its look to its writing

Holder = dict[str, Any]


class StoredLease(Untrusted):
    """What a lease says that somebody holds; ours, or another's."""

    id: str
    host: str
    process: Annotated[int, Field(gt=0, lt=2**31)]
    boot: str = ""
    namespace: str = ""
    started: str = ""


class Lease:
    """Held from `with Lease(directory):` to the end of the block."""

    def __init__(self, directory: Path) -> None:
        """`directory` is made if missing; that of a mirror stands for its folder in the store."""
        self.path, self.name = directory / LEASE, mirrors.name_of(directory)
        self.holder: Holder = {"id": uuid.uuid4().hex, **this_process(os.getpid())}
        self.beat, self.beaten = 0, 0.0  # when, by this process's clock
        self.lost = threading.Event()
        self.released = threading.Event()
        self.heart = threading.Thread(target=self._keep_beating, name="lease", daemon=True)

    def __enter__(self) -> Self:
        """Take the lease; UserError if another living process holds it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._remove_or_refuse()
        except OSError as error:
            raise UserError(f"{self.name}: not writable: {error.strerror}") from None
        self.beaten = time.monotonic()
        self.heart.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the lease back; RunFailed if it was lost meanwhile."""
        self.released.set()
        self.heart.join()
        if self.lost.is_set():
            raise RunFailed(
                f"{self.name}: another command took over, because this process stood still "
                f"for more than {EXPIRES_AFTER:.0f} s; it ends here"
            ) from None
        with contextlib.suppress(OSError):  # it will be found stale
            mirrors.delete(self.path)

    def _content(self) -> bytes:
        return json.dumps({**self.holder, "beat": self.beat}).encode()

    def _create(self) -> bool:
        """Write the lease if there is none: a hard link, atomic on network file systems too."""
        if mirrors.uri_of(self.path):
            return self._create_stored()
        mine = self.path.with_name(f"{LEASE}.{self.holder['id']}")
        mine.write_bytes(self._content())
        try:
            os.link(mine, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            return self._create_exclusively()
        finally:
            mine.unlink()
        return True

    def _create_exclusively(self) -> bool:
        try:
            with self.path.open("xb") as file:
                file.write(self._content())
        except FileExistsError:
            return False
        return True

    def _create_stored(self) -> bool:
        if mirrors.exists(self.path):
            return False
        mirrors.write(self.path, self._content())
        time.sleep(STORE_SETTLE_S)
        try:
            return mirrors.read(self.path) == self._content()
        except FileNotFoundError:
            return False

    def _remove_or_refuse(self) -> None:
        """Deal with the lease that is there: remove it if its holder is gone, else UserError."""
        try:
            content = mirrors.read(self.path)
        except FileNotFoundError:
            return  # given back just now
        found = parse(content)
        lives = is_holder_alive(found) if found else None
        if lives is None:
            lives = self._changes(content)
        if not lives:
            self._remove(content)
        elif found and mirrors.exists(self.path):
            raise InUse(
                f"{self.name}: in use by process {found['process']} on {found['host']}; "
                "wait for it to end, or use another directory"
            )

    def _changes(self, content: bytes) -> bool:
        """Watch a lease until it changes (True) or has been still for too long (False)."""
        deadline = time.monotonic() + EXPIRES_AFTER
        while time.monotonic() < deadline:
            try:
                if mirrors.read(self.path) != content:
                    return True
            except FileNotFoundError:
                return True
            time.sleep(HEARTBEAT / 4)
        return False

    def _remove(self, stale: bytes) -> None:
        """Remove the lease that was found stale, and no newer one that took its place.

        A newer one in a store may be removed: its writer reads back, and tries again.
        """
        if mirrors.uri_of(self.path):
            with contextlib.suppress(FileNotFoundError):
                if mirrors.read(self.path) == stale:
                    mirrors.delete(self.path)
            return
        aside = self.path.with_name(f"{LEASE}.stale.{self.holder['id']}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
            if aside.read_bytes() != stale:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()

    def _keep_beating(self) -> None:
        while not self.released.wait(HEARTBEAT):
            with contextlib.suppress(OSError):  # a full disk must not end the run here
                if self._was_taken_over():
                    self.lost.set()
                    # As Ctrl-C would: two writers would be worse than none.
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return
                self.beaten = time.monotonic()

    def _was_taken_over(self) -> bool:
        """Tell whether another took the lease over; rewrite it otherwise, also if it was removed.

        One that is gone after this process stood still may have been another's, which is done.
        """
        self.beat += 1
        try:
            found = parse(mirrors.read(self.path))
        except FileNotFoundError:
            if time.monotonic() - self.beaten > EXPIRES_AFTER:
                return True
            self._create()
            return False
        if found is not None and found["id"] != self.holder["id"]:
            return True
        mirrors.write(self.path, self._content())
        return False


def parse(content: bytes) -> Holder | None:
    """Return who holds a lease; None for what a power loss left of one."""
    try:
        return parse_json(content, StoredLease, LEASE).model_dump()
    except DamagedFile:
        return None


def holder_of(directory: Path) -> str | None:
    """Return the id of whoever holds a directory; None if nobody does.

    OSError if that cannot be told.
    """
    try:
        found = parse(mirrors.read(directory / LEASE))
    except FileNotFoundError:
        return None
    return str(found["id"]) if found else None


def this_process(process: int) -> Holder:
    """Describe a process so that it is not taken for another: where its number means something
    (host, boot, process namespace), and when it started.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "namespace": str(namespace.readlink()) if namespace.exists() else "",
        "process": process,
        "started": start_of(process),
    }


def start_of(process: int) -> str:
    """Return when a process started, in clock ticks since boot; empty if it is gone or not told."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()  # from field 3 on; the name in field 2 may hold spaces
    return "" if fields[0] == "Z" else fields[19]  # a zombie does nothing any more


def is_holder_alive(found: Holder) -> bool | None:
    """Tell whether the holder is a living process of this machine; None if it is of another."""
    here = this_process(os.getpid())
    if any(found.get(key) != here[key] for key in ("host", "boot", "namespace")):
        return None
    try:
        os.kill(found["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return bool(found.get("started") == start_of(found["process"]))
