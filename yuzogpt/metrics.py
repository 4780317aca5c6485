"""metrics.jsonl: everything that a run says, one JSON record a line, written by rank 0.

In: records. Out: a file that plots, displays and W&B are fed from, wherever they run. Kinds of
record: notice (a line for the user), train, evaluation, final.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from yuzogpt.files import write_durably

Record = dict[str, Any]
Listener = Callable[[Record], None]


class MetricsLog:
    """Appends records to the file and hands them to a listener in this process, if there is one."""

    def __init__(self, path: Path, step: int, listener: Listener | None) -> None:
        """Open the file for a run that goes on from `step`: later records are undone.

        `step` is -1 for a run that starts anew: all of them are.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [line for line, record in read_lines(path) if record["step"] <= step]
            write_durably(path, "".join(f"{line}\n" for line in kept).encode())
        self.file = path.open("a", encoding="utf-8")
        self.listener = listener

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one record."""
        record = {"kind": kind, "step": step, **values, "time": round(time.time(), 3)}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.listener:
            self.listener(record)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def append_notice(path: Path, text: str) -> None:
    """Append a line for the user from outside the run: when its workers are gone."""
    record = {"kind": "notice", "step": 0, "text": text, "time": round(time.time(), 3)}
    with path.open("a", encoding="utf-8") as file:
        # On a line of its own, even if the writer died in the middle of one.
        file.write("\n" + json.dumps(record) + "\n")


def read_lines(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield the records of the file with their lines; what a crash left of a line is skipped."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            record = parse(line)
            if record:
                yield line.rstrip("\n"), record


def parse(line: str) -> Record | None:
    """Return the record of a line; None if it is not a whole one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"kind", "step"} <= record.keys() else None


def read_records(path: Path) -> list[Record]:
    """Return all records of a run; none, if it wrote none."""
    return [record for _, record in read_lines(path)] if path.exists() else []


class Follower:
    """Hands a run's new records to a listener, from another process than the one that writes."""

    POLL = 0.1  # seconds

    def __init__(self, path: Path, listener: Listener) -> None:
        """Records that are there already are not handed on."""
        self.path = path
        self.listener = listener
        self.seen = {line for line, _ in read_lines(path)} if path.exists() else set()
        self.offset = 0
        self.inode = 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="metrics", daemon=True)

    def __enter__(self) -> "Follower":
        """Start following."""
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Hand on what is left, and stop."""
        self.done.set()
        self.thread.join()

    def _follow(self) -> None:
        while not self.done.wait(self.POLL):
            self._read_on()
        self._read_on()

    def _read_on(self) -> None:
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self.inode:  # a resumed run rewrote the file: start over, skip the known
                self.inode, self.offset = inode, 0
            file.seek(self.offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self.offset += len(whole)
        for line in whole.decode("utf-8", errors="replace").splitlines():
            record = None if line in self.seen else parse(line)
            if record:
                self.seen.add(line)
                self.listener(record)
