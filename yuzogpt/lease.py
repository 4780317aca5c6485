"""One writer for one directory: a lease with a heartbeat, so that power loss leaves no stale lock.

In: a directory. Out: the right to write in it, or a UserError that names who holds it. The holder
rewrites `.lease.json` every few seconds. Whoever finds a lease takes it over at once if its
process on this machine is dead, and otherwise watches it: one that does not change for
EXPIRES_AFTER seconds of the watcher's own clock has no living holder. No clocks are compared
between machines.
"""

import _thread
import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from yuzogpt.errors import RunFailed, UserError
from yuzogpt.files import write_durably

LEASE = ".lease.json"
HEARTBEAT = 2.0  # seconds
EXPIRES_AFTER = 10.0  # seconds without a heartbeat


class Lease:
    """Held from `with Lease(directory):` to the end of the block."""

    def __init__(self, directory: Path) -> None:
        """`directory` is made if missing."""
        self.path = directory / LEASE
        self.holder = {"id": uuid.uuid4().hex, "process": os.getpid(), **this_machine()}
        self.beat = 0
        self.lost = threading.Event()
        self.released = threading.Event()
        self.heart = threading.Thread(target=self._keep_beating, name="lease", daemon=True)

    def __enter__(self) -> Self:
        """Take the lease; UserError if another living process holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            found = self._read()
            if found and not died_here(found) and self._is_beating(found):
                raise UserError(
                    f"{self.path.parent}: in use by process {found['process']} on "
                    f"{found['host']}; wait for it to end, or use another directory"
                )
            self._remove(found)
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
                f"{self.path.parent}: another command took over, because this process stood still "
                f"for more than {EXPIRES_AFTER:.0f} s; it ends here"
            ) from None
        self.path.unlink(missing_ok=True)

    def _content(self) -> bytes:
        return json.dumps({**self.holder, "beat": self.beat}).encode()

    def _create(self) -> bool:
        """Write the lease if there is none: a hard link, atomic on network file systems too."""
        mine = self.path.with_name(f"{LEASE}.{self.holder['id']}")
        mine.write_bytes(self._content())
        try:
            os.link(mine, self.path)
        except FileExistsError:
            return False
        finally:
            mine.unlink()
        return True

    def _read(self) -> dict[str, Any] | None:
        try:
            content: dict[str, Any] = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return None
        return content

    def _is_beating(self, found: dict[str, Any]) -> bool:
        """Watch a lease until it changes (True) or has been still for too long (False)."""
        deadline = time.monotonic() + EXPIRES_AFTER
        while time.monotonic() < deadline:
            if self._read() != found:
                return True
            time.sleep(HEARTBEAT / 4)
        return False

    def _remove(self, stale: dict[str, Any] | None) -> None:
        """Remove the lease that was found stale, and no newer one that took its place."""
        aside = self.path.with_name(f"{LEASE}.stale.{self.holder['id']}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
            moved = json.loads(aside.read_text() or "null")
            if moved is not None and stale is not None and moved["id"] != stale["id"]:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()

    def _keep_beating(self) -> None:
        while not self.released.wait(HEARTBEAT):
            found = self._read()
            if found is not None and found["id"] != self.holder["id"]:
                self.lost.set()
                _thread.interrupt_main()  # two writers would be worse than none
                return
            self.beat += 1
            with contextlib.suppress(OSError):  # a full disk must not end the run here
                write_durably(self.path, self._content())


def this_machine() -> dict[str, str]:
    """Name the place where a process number means something: host, boot, process namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "namespace": str(namespace.readlink()) if namespace.exists() else "",
    }


def died_here(found: dict[str, Any]) -> bool:
    """Tell whether the holder was a process of this machine that is gone."""
    here = this_machine()
    if any(found[key] != value for key, value in here.items()):
        return False
    try:
        os.kill(found["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
