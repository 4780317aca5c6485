"""metrics.jsonl: the event log of a run, one JSON record a line, written by rank 0.

Plots, displays, reports and W&B read it, wherever they run. Every record has kind, step and time
(Unix seconds); a record with a text is shown to the user. Kinds:

    start        the loop started or resumed: workers; begun: when its command began (Unix seconds);
                 redone_steps, redone_tokens: what was done before, and lost; weights: the model
                 whose weights it started from
    undone       a resumed run lost this many steps and rows; their records are deleted
    first_step   the first step since the start is made
    train        a step: loss, lr, grad_norm; since the last train record: the share of steps whose
                 gradient was clipped (clip_rate), and the number of skipped steps
    health       of each layer: norms of gradient and weights; norm of the update / of the weights
    network      how fast the ranks reach each other: an all-reduce, and the slowest hop of a ring
    evaluation   the estimate of the validation loss
    checkpoint   one was written: how long the loop waited, how long the write took, bytes
    skip, spike  a step whose numbers were not finite, or whose loss was far too high
    failure      a worker died or hangs; with a reason: the run gave up (from outside the loop: at
                 step 0)
    stop         the run was asked to stop, and did; kept: the step of its newest checkpoint
    final        the validation loss over the whole split, of the last and the best checkpoint
    eval_only    the validation loss over the whole split, of a run that was only evaluated
    tasks        benchmark metrics (in evaluations.jsonl, by another process)
    notice       anything else that the user should read
"""

import contextlib
import functools
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Required

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

from yuzogpt.console.terminal import complain
from yuzogpt.storage.atomic_files import write_durably
from yuzogpt.storage.background_uploader import BackgroundUploader, pause_after
from yuzogpt.storage.run_storage import RunStorage
from yuzogpt.storage.untrusted import open_regular

Record = dict[str, Any]
Line = tuple[str, Record]  # a line of the file, and its record
Listener = Callable[[Record], None]

MAX_LINE_BYTES = 2**24  # a longer line is none of ours
TAIL_BYTES = 2**16  # of the file's end, for its last records
Whole = Annotated[int, Field(ge=0, le=2**53)]
Number = float | None  # None: it was not finite


@with_config(ConfigDict(strict=True, extra="allow"))
class StoredRecord(TypedDict, total=False):
    """A record in the file, which somebody else may have written; more fields are allowed."""

    kind: Required[Annotated[str, Field(max_length=40)]]
    step: Required[Whole]
    time: Annotated[float, Field(ge=0, le=2.0**36)]  # Unix seconds
    text: str
    reason: str
    workers: Whole
    rows_seen: Whole
    rows: Whole
    steps: Whole
    kept: Whole | None
    redone_steps: Whole
    redone_tokens: Whole
    tokens_per_step: Whole
    tokens_per_second: Annotated[float, Field(gt=0)]
    skipped: Whole
    bytes: Whole
    best_step: Whole | None
    loss: Number
    lr: Number
    grad_norm: Number
    clip_rate: Number
    val_loss: Number
    val_loss_estimate: Number
    best_val_loss: Number
    stall_seconds: Number
    waited_seconds: Number
    write_seconds: Number


# Kinds of records that stay when the steps of a run are undone.
HISTORY = ("start", "undone", "failure", "stop")


class MetricsLog:
    """Appends records to the file and calls a listener in this process, if there is one.

    Threads may write at the same time. A full disk stops no run: what could not be written is
    written with a later record. If the run is in a store, the file is uploaded every few seconds.
    """

    def __init__(
        self,
        file: RunStorage,
        step: int | None,
        listener: Listener | None,
        rows_seen: int = 0,
        *,
        is_evaluated: bool = True,
    ) -> None:
        """Open the file for a run that resumes at `step`: later records are undone.

        `step` is -1 for a new run: all records but HISTORY are undone. It is None for a run that
        is only evaluated: none are. `is_evaluated`: whether the checkpoint of `step` has its
        losses; if not, that step is evaluated again, and its evaluation record is undone, too.
        """
        path = file.local
        path.parent.mkdir(parents=True, exist_ok=True)
        self.undone_steps = self.undone_rows = 0  # since the loop last started
        self.begun: float | None = None  # when the command began
        if path.exists():
            lines = list(read_lines(path))
            kept = lines if step is None else undo(lines, step, rows_seen, is_evaluated)
            for _, record in kept:
                if record["kind"] == "start":
                    self.undone_steps = self.undone_rows = 0
                elif record["kind"] == "undone":
                    self.undone_steps += record.get("steps", 0)
                    self.undone_rows += record.get("rows", 0)
            write_durably(path, "".join(f"{line}\n" for line, _ in kept).encode())
        self.file = path.open("ab", buffering=0)
        self.listener = listener
        self.unwritten = b""
        self.lock = threading.Lock()
        self.uploader = BackgroundUploader(file)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one record."""
        record = record_of(kind, step, **values)
        with self.lock:
            self.unwritten += (json.dumps(record) + "\n").encode()
            with contextlib.suppress(OSError):
                self._flush()
            if self.listener:
                self.listener(record)
        if kind in HISTORY:
            self.uploader.upload_soon()

    def upload(self) -> None:
        """Upload everything now, if the run is in a store; OSError if that fails."""
        self.uploader.upload()

    def _flush(self) -> None:
        while self.unwritten:
            # Ctrl-C may come after the write: to lose a line is better than to have it twice.
            line, self.unwritten = self.unwritten, b""
            try:
                written = self.file.write(line)
            except OSError:
                self.unwritten = line
                raise
            self.unwritten = line[written:]

    def close(self) -> None:
        """Close the file; complain if records could not be written or uploaded."""
        for end in (self._flush, self.file.close, self.uploader.close):
            try:
                with self.lock:
                    end()
            except OSError as error:  # no reason to fail: the checkpoints are written
                complain(f"!!! {error.filename or 'metrics'}: {error.strerror}")


def record_of(kind: str, step: int, **values: Any) -> Record:
    """Return a record with the present time."""
    return {"kind": kind, "step": step, **values, "time": round(time.time(), 3)}


def undo(lines: list[Line], step: int, rows_seen: int, is_evaluated: bool) -> list[Line]:
    """Remove the records after `step`, but for HISTORY; add a record that counts the lost steps.

    So the count is kept even if this start is killed, too. `rows_seen`: until `step`.
    """
    kept = [(line, r) for line, r in lines if r["step"] <= step or r["kind"] in HISTORY]
    if not is_evaluated:
        kept = [(line, r) for line, r in kept if (r["kind"], r["step"]) != ("evaluation", step)]
    trained = [r for _, r in lines if r["kind"] == "train" and r["step"] > max(step, 0)]
    if trained:
        last = max(trained, key=lambda record: record["step"])
        steps, rows = last["step"] - max(step, 0), last.get("rows_seen", rows_seen) - rows_seen
        record = record_of("undone", max(step, 0), steps=steps, rows=rows)
        kept.append((json.dumps(record), record))
    return kept


def append_record(file: RunStorage, kind: str, text: str, *, step: int = 0, **values: Any) -> None:
    """Append a record from outside the loop: when its workers are gone, or about to go."""
    record = record_of(kind, step, text=text, **values)
    # On a line of its own, even if the writer died in the middle of one.
    file.append(f"\n{json.dumps(record)}\n".encode())


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the records of the file with their lines; a line that a crash cut short is skipped."""
    with open_regular(path) as file:
        for content in iter(lambda: file.readline(MAX_LINE_BYTES), b""):
            line = content.decode("utf-8", errors="replace")
            record = parse(line)
            if record:
                yield line.rstrip("\n"), record


def parse(line: str) -> Record | None:
    """Return the record of a line; None if it is incomplete, or a value has another type."""
    try:
        return dict(schema().validate_json(line))
    except ValidationError:
        return None


@functools.cache
def schema() -> TypeAdapter[StoredRecord]:
    """Return the schema of records, compiled once."""
    return TypeAdapter(StoredRecord)


def read_records(path: Path) -> list[Record]:
    """Return all records of a file; none if there is no file."""
    return [record for _, record in read_lines(path)] if path.exists() else []


def last_record(file: RunStorage, kind: str) -> Record | None:
    """Return the last record of a kind, if it is among the file's last ones."""
    with contextlib.suppress(OSError), open_regular(file.local) as content:
        content.seek(max(0, content.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = content.read().decode("utf-8", errors="replace").splitlines()
        found = (record for line in reversed(lines) if (record := parse(line)))
        return next((record for record in found if record["kind"] == kind), None)
    return None


def seconds_of_step(train: Record) -> float:
    """Return the seconds per step, averaged over the steps of a train record."""
    seconds: float = train["tokens_per_step"] / train["tokens_per_second"]
    return seconds


class Follower:
    """Calls a listener with a run's new records, in another process than the one that writes.

    If the run is in a store, the file is downloaded every few seconds.
    """

    POLL_INTERVAL_S = 0.25

    def __init__(self, storage: RunStorage, listener: Listener) -> None:
        """Records that are there already are skipped."""
        self.storage = storage
        self.listener = listener
        self.file: BinaryIO | None = None  # open, and read as far as the listener knows
        with contextlib.suppress(FileNotFoundError):
            self.file = open_regular(storage.local)
            for _ in whole_lines(self.file):
                pass
        self.done, self.poll_now = threading.Event(), threading.Event()
        self.waiting: list[threading.Event] = []
        self.thread = threading.Thread(target=self._follow, name="metrics", daemon=True)

    def __enter__(self) -> "Follower":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Read what is left, and stop."""
        self.done.set()
        self.poll_now.set()
        self.thread.join()
        if self.file:
            self.file.close()

    def catch_up(self, timeout: float = 1.0) -> None:
        """Return when the listener knows all records written by now, or after `timeout` seconds."""
        caught_up = threading.Event()
        self.waiting.append(caught_up)
        self.poll_now.set()
        caught_up.wait(timeout)

    def _follow(self) -> None:
        pause = self.POLL_INTERVAL_S
        while not self.done.is_set():
            self.poll_now.wait(pause)
            self.poll_now.clear()
            waiting, self.waiting = self.waiting, []
            started = time.monotonic()
            self._poll()
            for caught_up in waiting:
                caught_up.set()
            if self.storage.is_remote:
                pause = pause_after(time.monotonic() - started)
        self._poll()

    def _poll(self) -> None:
        with contextlib.suppress(OSError):  # tried again
            self.storage.download(if_changed=True)
        with contextlib.suppress(FileNotFoundError):
            self._switch_to(open_regular(self.storage.local))
        for line in whole_lines(self.file) if self.file else ():
            record = parse(line.decode("utf-8", errors="replace"))
            if record:
                self.listener(record)

    def _switch_to(self, file: BinaryIO) -> None:
        """Continue in a newly opened file, at the first line that the listener does not know.

        A resumed run rewrites the file. The new file begins with the lines that it kept of the old
        one, which is still open.
        """
        old, self.file = self.file, file
        if old is None:
            return
        begin = end = old.tell()
        if not os.path.samestat(os.fstat(old.fileno()), os.fstat(file.fileno())):
            old.seek(0)
            known = itertools.takewhile(lambda _: old.tell() <= end, whole_lines(old))
            begin = 0
            for line in whole_lines(file):
                if line not in known:  # this reads `known` up to that line, or to its end
                    break
                begin = file.tell()
        file.seek(begin)
        old.close()


def whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the remaining complete lines; an incomplete one is left to be read again."""
    while (line := file.readline(MAX_LINE_BYTES)).endswith(b"\n") or len(line) == MAX_LINE_BYTES:
        yield line
    file.seek(-len(line), os.SEEK_CUR)
