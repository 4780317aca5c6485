"""One writer for one directory: a lease with a heartbeat, so that power loss leaves no stale lock.

In: a directory. Out: the right to write in it, or a UserError that names its holder. If the holder
of a lease runs on this machine, a process that wants the lease asks the system whether the holder
is alive. A lease of another machine is watched: its holder rewrites it every few seconds, and if it
does not change for EXPIRES_AFTER seconds of the watcher's own clock, its holder is dead. No clocks
are compared between machines.

An object store has no hard links, so the last writer wins there: a process that wrote a lease waits
a moment, and holds it if its own lease is still there (ObjectStorage.create).
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
from yuzogpt.storage.run_storage import RunStorage
from yuzogpt.storage.untrusted import DamagedFile, Untrusted, parse_json

LEASE = ".lease.json"
HEARTBEAT = 2.0  # seconds
EXPIRES_AFTER = 10.0  # seconds without a heartbeat

LOST = threading.Event()  # a lease of this process was lost: it must write nowhere any more

Holder = dict[str, Any]


class StoredHolder(Untrusted):
    """A process in a file, as `describe_process` describes it."""

    host: str
    process: Annotated[int, Field(gt=0, lt=2**31)]
    boot: str = ""
    namespace: str = ""
    started: str = ""
    taken: Annotated[float, Field(ge=0, le=2.0**36)] = 0.0  # Unix seconds; 0: not known


class StoredLease(StoredHolder):
    """The content of a lease file, ours or another process's."""

    id: str


class Lease:
    """Held from `with Lease(directory):` to the end of the block."""

    def __init__(self, directory: RunStorage) -> None:
        """`directory` is made if missing."""
        self.file, self.name = directory / LEASE, directory.display_name
        self.holder: Holder = {
            "id": uuid.uuid4().hex,
            "taken": round(time.time(), 3),
            **describe_process(os.getpid()),
        }
        self.beat, self.last_beat = 0, 0.0  # a count; seconds of this process's clock
        self.lost = threading.Event()
        self.released = threading.Event()
        self.heart = threading.Thread(target=self._keep_beating, name="lease", daemon=True)

    def __enter__(self) -> Self:
        """Take the lease; UserError if another living process holds it."""
        try:
            self.file.local.parent.mkdir(parents=True, exist_ok=True)
            while not self.file.create(self._content()):
                self._remove_if_stale()
        except OSError as error:
            raise UserError(f"{self.name}: not writable: {error.strerror}") from None
        self.last_beat = time.monotonic()
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
            LOST.clear()
            raise RunFailed(
                f"{self.name}: another command took over, because this process stood still "
                f"for more than {EXPIRES_AFTER:.0f} s; it ends here"
            ) from None
        with contextlib.suppress(OSError):  # it will be found stale
            self.file.delete()

    def _content(self) -> bytes:
        return json.dumps({**self.holder, "beat": self.beat}).encode()

    def _remove_if_stale(self) -> None:
        """Remove the lease that is there if its holder is dead; UserError if the holder lives."""
        try:
            content = self.file.read()
        except FileNotFoundError:
            return  # given back just now
        holder = parse(content)
        is_alive = is_holder_alive(holder) if holder else None
        if is_alive is None:
            is_alive = self._changes(content)
        if not is_alive:
            self.file.delete_if(content)
        elif holder and self.file.exists():
            raise InUse(
                f"{self.name}: in use by process {holder['process']} on {holder['host']}; "
                "wait for it to end, or use another directory"
            )

    def _changes(self, content: bytes) -> bool:
        """Watch a lease until it changes (True) or has not changed for too long (False)."""
        deadline = time.monotonic() + EXPIRES_AFTER
        while time.monotonic() < deadline:
            try:
                if self.file.read() != content:
                    return True
            except FileNotFoundError:
                return True
            time.sleep(HEARTBEAT / 4)
        return False

    def _keep_beating(self) -> None:
        while not self.released.wait(HEARTBEAT):
            with contextlib.suppress(OSError):  # a full disk must not end the run here
                if self._was_taken_over():
                    self.lost.set()
                    LOST.set()
                    # As Ctrl-C would: two writers would be worse than none.
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return
                self.last_beat = time.monotonic()

    def _was_taken_over(self) -> bool:
        """Return True if another process took the lease over; otherwise rewrite the lease.

        A lease that was removed is created again. But if it is gone after this process stood still,
        another process may have held it, and ended.
        """
        self.beat += 1
        try:
            holder = parse(self.file.read())
        except FileNotFoundError:
            if time.monotonic() - self.last_beat > EXPIRES_AFTER:
                return True
            self.file.create(self._content())
            return False
        if holder is not None and holder["id"] != self.holder["id"]:
            return True
        self.file.write(self._content())
        return False


def parse(content: bytes) -> Holder | None:
    """Return the holder that a lease names; None for a lease that a power loss damaged."""
    try:
        return parse_json(content, StoredLease, LEASE).model_dump()
    except DamagedFile:
        return None


def holder_of(directory: RunStorage) -> str | None:
    """Return the id of the process that holds a directory; None if none does.

    OSError if the lease cannot be read.
    """
    try:
        holder = parse((directory / LEASE).read())
    except FileNotFoundError:
        return None
    return str(holder["id"]) if holder else None


def held_since(directory: RunStorage) -> float | None:
    """Return when the lease of a directory was taken, in Unix seconds; None if not known."""
    with contextlib.suppress(OSError):
        holder = parse((directory / LEASE).read())
        return holder["taken"] or None if holder else None
    return None


def describe_process(process: int) -> Holder:
    """Describe a process so that no other is mistaken for it: where its number is valid (host,
    boot, process namespace), and when it started.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "namespace": str(namespace.readlink()) if namespace.exists() else "",
        "process": process,
        "started": start_time(process),
    }


def start_time(process: int) -> str:
    """Return when a process started, in clock ticks since boot; empty if gone or not known."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()  # from field 3 on; the name in field 2 may hold spaces
    return "" if fields[0] == "Z" else fields[19]  # a zombie does nothing any more


def is_holder_alive(holder: Holder) -> bool | None:
    """Return whether the holder is a living process; None if it is one of another machine."""
    own = describe_process(os.getpid())
    if any(holder.get(key) != own[key] for key in ("host", "boot", "namespace")):
        return None
    try:
        os.kill(holder["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return bool(holder.get("started") == start_time(holder["process"]))
