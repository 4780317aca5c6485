"""metrics.jsonl: everything that a run says, one JSON record a line, written by rank 0.

In: records. Out: a file that plots, displays, reports and W&B are fed from, wherever they run.
Every record has kind, step and time (Unix seconds); one with a text is shown to the user. Kinds:

    start        the loop began or went on, with so many workers; redone_steps, redone_tokens: what
                 was done once already, and lost; weights: the model whose weights it began with
    undone       so many steps and rows were lost: later records are not there any more
    train        a step: loss, lr, grad_norm; since the train record before: the share of steps
                 whose gradient was clipped (clip_rate), and how many were skipped
    health       of each layer: norm of gradient and weights, and of the update over the weights
    network      how fast the ranks reach each other: an all-reduce, and the slowest hop of a ring
    evaluation   the estimate of the validation loss
    checkpoint   one was written: how long the loop waited, how long it took, bytes
    skip, spike  a step whose numbers were not finite, or whose loss was far too high
    failure      a worker died or stood still, or, with that for a reason, the run gave up (from
                 outside the loop: at step 0)
    stop         the run was asked to stop, and did, with a checkpoint
    final        the validation loss over the whole split, of the last and the best checkpoint
    tasks        figures of benchmarks (in evaluations.jsonl, by another process)
    eval_only    the same, of a run that was only to be evaluated
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
from yuzogpt.storage import mirrors
from yuzogpt.storage.atomic_files import write_durably
from yuzogpt.storage.untrusted import open_regular

Record = dict[str, Any]
Line = tuple[str, Record]  # of the file, and what it says
Listener = Callable[[Record], None]

MAX_LINE_BYTES = 2**24  # a longer line is none of ours
Whole = Annotated[int, Field(ge=0, le=2**53)]
Number = float | None  # None: it was not finite


@with_config(ConfigDict(strict=True, extra="allow"))
class StoredRecord(TypedDict, total=False):
    """A record as it lies in the file, which may be somebody else's; more fields may be there."""

    kind: Required[Annotated[str, Field(max_length=40)]]
    step: Required[Whole]
    time: Annotated[float, Field(ge=0, le=2.0**36)]  # Unix seconds
    text: str
    reason: str
    workers: Whole
    rows_seen: Whole
    rows: Whole
    steps: Whole
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


# What happened to a run is not undone with its steps.
HISTORY = ("start", "undone", "failure", "stop")


class MetricsLog:
    """Appends records to the file and hands them to a listener in this process, if there is one.

    Threads may write at the same time. A full disk stops no run: what could not be written is
    written with a later record. In a mirror the file is copied to its store every few seconds.
    """

    def __init__(
        self,
        path: Path,
        step: int | None,
        listener: Listener | None,
        rows_seen: int = 0,
        *,
        is_evaluated: bool = True,
    ) -> None:
        """Open the file for a run that resumes at `step`: later records are undone.

        `step` is -1 for a new run: all of them are, but for HISTORY. It is None for a run that is
        only looked at: none are. `is_evaluated`: whether the checkpoint of `step` has its losses;
        if not, that step is evaluated once more, and its record is undone, too.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.undone_steps = self.undone_rows = 0  # since the loop began last
        if path.exists():
            found = list(read_lines(path))
            kept = found if step is None else undo(found, step, rows_seen, is_evaluated)
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
        self.copy = mirrors.BackgroundUploader(path)

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
            self.copy.soon()

    def push(self) -> None:
        """Have everything in the store, if the file is in a mirror; OSError if it cannot be."""
        self.copy.push()

    def _flush(self) -> None:
        while self.unwritten:
            # Ctrl-C may come after the write: rather lose a line then than have it twice.
            line, self.unwritten = self.unwritten, b""
            try:
                written = self.file.write(line)
            except OSError:
                self.unwritten = line
                raise
            self.unwritten = line[written:]

    def close(self) -> None:
        """Close the file; what could not be written is said."""
        for end in (self._flush, self.file.close, self.copy.close):
            try:
                with self.lock:
                    end()
            except OSError as error:  # what the run is about is in its checkpoints
                complain(f"!!! {error.filename or 'metrics'}: {error.strerror}")


def record_of(kind: str, step: int, **values: Any) -> Record:
    """Return a record of what happens now."""
    return {"kind": kind, "step": step, **values, "time": round(time.time(), 3)}


def undo(found: list[Line], step: int, rows_seen: int, is_evaluated: bool) -> list[Line]:
    """Leave out the records after `step`, but for HISTORY; a new one counts what they told of.

    So the count is not forgotten if this start is killed, too. `rows_seen`: until `step`.
    """
    kept = [(line, r) for line, r in found if r["step"] <= step or r["kind"] in HISTORY]
    if not is_evaluated:
        kept = [(line, r) for line, r in kept if (r["kind"], r["step"]) != ("evaluation", step)]
    trained = [r for _, r in found if r["kind"] == "train" and r["step"] > max(step, 0)]
    if trained:
        last = max(trained, key=lambda record: record["step"])
        steps, rows = last["step"] - max(step, 0), last.get("rows_seen", rows_seen) - rows_seen
        record = record_of("undone", max(step, 0), steps=steps, rows=rows)
        kept.append((json.dumps(record), record))
    return kept


def append_record(path: Path, kind: str, text: str, *, step: int = 0, **values: Any) -> None:
    """Append a record from outside the loop: when its workers are gone, or about to go."""
    record = record_of(kind, step, text=text, **values)
    # On a line of its own, even if the writer died in the middle of one.
    mirrors.append(path, f"\n{json.dumps(record)}\n".encode())


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the records of the file with their lines; what a crash left of a line is skipped."""
    with open_regular(path) as file:
        for content in iter(lambda: file.readline(MAX_LINE_BYTES), b""):
            line = content.decode("utf-8", errors="replace")
            record = parse(line)
            if record:
                yield line.rstrip("\n"), record


def parse(line: str) -> Record | None:
    """Return the record of a line; None if it is not a whole one, or a value is of no such type."""
    try:
        return dict(schema().validate_json(line))
    except ValidationError:
        return None


@functools.cache
def schema() -> TypeAdapter[StoredRecord]:
    """Return what records are held against."""
    return TypeAdapter(StoredRecord)


def read_records(path: Path) -> list[Record]:
    """Return all records of a run; none, if it wrote none."""
    return [record for _, record in read_lines(path)] if path.exists() else []


def seconds_of_step(train: Record) -> float:
    """Return what a step took, in the mean over those that a train record tells of."""
    seconds: float = train["tokens_per_step"] / train["tokens_per_second"]
    return seconds


class Follower:
    """Hands a run's new records to a listener, from another process than the one that writes.

    In a mirror the file is copied from its store now and then.
    """

    POLL = 0.25  # seconds

    def __init__(self, path: Path, listener: Listener) -> None:
        """Records that are there already are not handed on."""
        self.path = path
        self.listener = listener
        self.file: BinaryIO | None = None  # open, and read as far as its records were handed on
        with contextlib.suppress(FileNotFoundError):
            self.file = open_regular(path)
            for _ in whole_lines(self.file):
                pass
        self.done, self.is_wanted = threading.Event(), threading.Event()
        self.waiting: list[threading.Event] = []
        self.is_copied = mirrors.uri_of(path) is not None
        self.thread = threading.Thread(target=self._follow, name="metrics", daemon=True)

    def __enter__(self) -> "Follower":
        """Start following."""
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Hand on what is left, and stop."""
        self.done.set()
        self.is_wanted.set()
        self.thread.join()
        if self.file:
            self.file.close()

    def catch_up(self, timeout: float = 5.0) -> None:
        """Return when every record that is written by now was handed on, or after `timeout` s."""
        caught_up = threading.Event()
        self.waiting.append(caught_up)
        self.is_wanted.set()
        caught_up.wait(timeout)

    def _follow(self) -> None:
        pause = self.POLL
        while not self.done.is_set():
            self.is_wanted.wait(pause)
            self.is_wanted.clear()
            waiting, self.waiting = self.waiting, []
            started = time.monotonic()
            self._read_on()
            for caught_up in waiting:
                caught_up.set()
            if self.is_copied:
                pause = mirrors.pause_after(time.monotonic() - started)
        self._read_on()

    def _read_on(self) -> None:
        if self.is_copied:
            with contextlib.suppress(OSError):  # tried again
                mirrors.pull(self.path, if_changed=True)
        with contextlib.suppress(FileNotFoundError):
            self._take_over(open_regular(self.path))
        for line in whole_lines(self.file) if self.file else ():
            record = parse(line.decode("utf-8", errors="replace"))
            if record:
                self.listener(record)

    def _take_over(self, file: BinaryIO) -> None:
        """Read on in the file of that name, if it is another one: a resumed run rewrote it.

        It begins with what was kept of the old one, which is open still and tells what is known.
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
                if line not in known:  # which is read on to that line, or to its end
                    break
                begin = file.tell()
        file.seek(begin)
        old.close()


def whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines from here on; what is not a whole one yet is left to be read again."""
    while (line := file.readline(MAX_LINE_BYTES)).endswith(b"\n") or len(line) == MAX_LINE_BYTES:
        yield line
    file.seek(-len(line), os.SEEK_CUR)
