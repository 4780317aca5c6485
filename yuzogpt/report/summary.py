"""Summarizes a run's history: its state, its restarts, and its productive time.

Next on the line: tables.py and plots.py.

Wall time is from the command of the first `start`, Ray's start included, to the last record. A
restart loses the time from the last train or evaluation record before it that was kept to the first
train record after it, less what those steps usually take: the failure, the wait, the start, and the
steps that were done again. The start-up before the first step is lost, too. All other time is
productive, evaluations and checkpoints included.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from yuzogpt.report.history import Column, Event, History, number, text
from yuzogpt.runs.directory import SETTINGS
from yuzogpt.runs.event_log import Record
from yuzogpt.storage.untrusted import DamagedFile, read_file

MAX_SETTINGS_BYTES = 2**20
START_UP = "start-up"
MAX_START_UP_S = 86400.0  # more is no wait for workers, but another machine's clock
RESUMING = "resuming at step "  # the notice of versions without `start` records
DEAD_WORKER = "!!! worker"  # the notice of versions without `failure` records


@dataclass(frozen=True)
class Attempt:
    """One start of the training loop, and the time that it cost."""

    started: float  # time
    trains: int  # train records before it
    step: int  # at which it resumed
    causes: list[Event]  # failures and stops since the attempt before
    redone_steps: int | None  # None: an older version did not say
    redone_tokens: int | None
    lost_from: float
    lost_seconds: float

    @property
    def cause(self) -> str:
        """Why there was another attempt, in the few words by which time is added up."""
        causes = dict.fromkeys(
            text(event.record, "reason") or ("stopped" if event.kind == "stop" else "worker failed")
            for event in self.causes
        )
        return " + ".join(causes) or "started again"


@dataclass(frozen=True)
class Checkpoints:
    """The time and bytes of checkpoints."""

    count: int
    median_stall: float  # seconds that training stood still
    longest_stall: float
    stalled: float  # seconds in all
    median_write: float
    median_bytes: float


@dataclass(frozen=True)
class Summary:
    """The facts and figures of a run."""

    name: str
    settings: dict[str, Any]  # as in settings.yaml; empty if there is none
    model: str
    parallel: str
    workers: int | None
    state: str
    step: int
    tokens: int
    begin: float
    end: float
    attempts: list[Attempt]  # the first is the start-up
    tokens_per_second: float  # median
    clip_rate: float  # share of all steps
    final: dict[str, float]  # val_loss, best_step, best_val_loss; empty before the end
    best_estimate: tuple[int, float] | None  # step, val_loss_estimate
    evaluations: int
    evaluation_seconds: float
    checkpoints: Checkpoints | None
    skips: list[Event]
    spikes: list[Event]
    network: list[Event]  # measurements between the ranks

    @property
    def restarts(self) -> list[Attempt]:
        """All attempts but the first."""
        return self.attempts[1:]

    @property
    def wall(self) -> float:
        """Seconds from the first command to the last record."""
        return max(0.0, self.end - self.begin)

    @property
    def lost_by_cause(self) -> dict[str, float]:
        """Seconds that were not productive, start-up first."""
        lost = {START_UP: self.attempts[0].lost_seconds}
        for attempt in self.restarts:
            lost[attempt.cause] = lost.get(attempt.cause, 0.0) + attempt.lost_seconds
        return lost

    @property
    def productive(self) -> float:
        """Seconds of wall time that were not lost."""
        return max(0.0, self.wall - sum(self.lost_by_cause.values()))

    @property
    def effective(self) -> float:
        """Effective training time: the productive share of wall time; NaN of no time at all."""
        return self.productive / self.wall if self.wall else math.nan


def summarize(run: Path, history: History) -> Summary:
    """Summarize a run's history."""
    train, starts = history.train, find_starts(history)
    real_starts = history.of_kind("start")
    last_start = real_starts[-1].record if real_starts else {}
    pace = seconds_per_step(history, starts)
    steps_of_each = np.diff(train["step"], prepend=0.0)
    finals = history.of_kind("final")
    losses = ("val_loss", "best_step", "best_val_loss")
    last_steps = [*train["step"][-1:].tolist(), *(event.step for event in finals[-1:])]
    return Summary(
        name=run.name,
        settings=read_settings(run / SETTINGS),
        model=last_notice(history, "model: "),
        parallel=text(last_start, "parallel"),
        workers=count(last_start, "workers"),
        state=final_state(history),
        step=int(max([0, *last_steps])),
        tokens=int(np.nansum(steps_of_each * train["tokens_per_step"])),
        begin=begun_at(starts[0]),
        end=history.end,
        attempts=find_attempts(history, starts, pace),
        tokens_per_second=median(train["tokens_per_second"]),
        clip_rate=weighted_mean(train["clip_rate"], steps_of_each),
        final={name: number(finals[-1].record, name) for name in losses} if finals else {},
        best_estimate=best_estimate(history),
        evaluations=len(history.evaluation["step"]),
        evaluation_seconds=evaluation_seconds(history, pace),
        checkpoints=summarize_checkpoints(history.of_kind("checkpoint")),
        skips=history.of_kind("skip"),
        spikes=history.of_kind("spike"),
        network=history.of_kind("network"),
    )


def find_starts(history: History) -> list[Event]:
    """Return the event that began each attempt; without one, the first begins with the run.

    A notice of resuming counts if no `start` record stands beside it and steps follow.
    """
    recorded = {event.trains for event in history.of_kind("start")}
    starts = [
        event
        for event in history.events
        if event.kind == "start"
        or (
            notice_text(event).startswith(RESUMING)
            and event.trains not in recorded
            and event.trains < len(history.train["step"])
        )
    ]
    if not starts or starts[0].trains:
        starts.insert(0, Event("start", 0, history.begin, {}, 0))
    return starts


def begun_at(start: Event) -> float:
    """Return when the command of a start began; of versions that did not record it, the start."""
    begun = number(start.record, "begun")
    return begun if 0 < start.time - begun < MAX_START_UP_S else start.time


def seconds_per_step(history: History, starts: list[Event]) -> float:
    """Return what a step usually takes: the median between train records of one attempt."""
    train = history.train
    within = np.ones(max(0, len(train["step"]) - 1), dtype=bool)
    for start in starts:
        if 0 < start.trains <= len(within):
            within[start.trains - 1] = False
    steps = np.diff(train["step"])
    paces = np.diff(train["time"])[within & (steps > 0)] / steps[within & (steps > 0)]
    if not len(paces):  # too few records: take the throughput
        with np.errstate(divide="ignore", invalid="ignore"):
            paces = train["tokens_per_step"] / train["tokens_per_second"]
    pace = median(paces)
    return 0.0 if math.isnan(pace) else pace


def find_attempts(history: History, starts: list[Event], pace: float) -> list[Attempt]:
    """Return what each attempt cost until its first train record, or its end if it has none."""
    train = history.train
    causes = [[], *(find_causes(history, before, start) for before, start in pairwise(starts))]
    # Where each attempt's lost time begins: at the last record that the one before kept.
    begins = [(begun_at(starts[0]), starts[0].step)]
    for (before, start), failures in zip(pairwise(starts), causes[1:], strict=True):
        last = start.trains - 1
        if start.trains > before.trains:
            times = history.evaluation["time"][history.evaluation["trains"] == start.trains]
            # Evaluations after that step were productive.
            kept = [time for time in times if time < start.time]
            begins.append((float(max([train["time"][last], *kept])), int(train["step"][last])))
        else:  # the attempt before made no step
            begins.append((failures[0].time if failures else start.time, start.step))
    ends = [*(begin for begin, _ in begins[1:]), history.end]
    counts = [*(start.trains for start in starts[1:]), len(train["step"])]
    attempts = []
    for start, failures, (begin, step), end, records in zip(
        starts, causes, begins, ends, counts, strict=True
    ):
        lost = end - begin
        if start.trains < records:
            first = start.trains
            lost = train["time"][first] - begin - (train["step"][first] - step) * pace
        attempts.append(
            Attempt(
                started=start.time,
                trains=start.trains,
                step=start.step,
                causes=failures,
                redone_steps=count(start.record, "redone_steps"),
                redone_tokens=redone_tokens(start.record),
                lost_from=begin,
                lost_seconds=max(0.0, float(lost)),
            )
        )
    return attempts


def redone_tokens(start: Record) -> int | None:
    """Return the tokens of the steps done again, estimated by the last batch if not recorded."""
    counted = count(start, "redone_tokens")
    steps, tokens = count(start, "redone_steps"), count(start, "tokens_per_step")
    return steps * tokens if counted is None and steps is not None and tokens else counted


def count(record: Record, name: str) -> int | None:
    """Return a count of a record; None if it is missing."""
    value = number(record, name)
    return int(value) if value >= 0 else None


def find_causes(history: History, before: Event, start: Event) -> list[Event]:
    """Return the failures and stops since the attempt before, and since its last train record."""
    causes: list[Event] = []
    for event in history.events:
        if event is start:
            break
        if event is before:
            causes = []
        is_failure = event.kind == "failure" or notice_text(event).startswith(DEAD_WORKER)
        if event.trains == start.trains and (is_failure or event.kind == "stop"):
            causes.append(event)
    return causes


def final_state(history: History) -> str:
    """Return how a run ended, by the records after its last step and start."""
    for event in reversed(history.events):
        if event.trains < len(history.train["step"]) or event.kind == "start":
            break
        if event.kind == "final":
            return "finished"
        if event.kind == "failure" and "reason" in event.record:  # not a worker's
            return f"{text(event.record, 'reason')}: {text(event.record, 'text')}"
        if event.kind == "stop":
            return f"stopped ({text(event.record, 'reason') or 'no reason given'})"
    return "not finished"


def evaluation_seconds(history: History, pace: float) -> float:
    """Estimate how long evaluations took: from the train record before to their own."""
    train, evaluation = history.train, history.evaluation
    seconds = 0.0
    for step, time, trains in zip(
        evaluation["step"], evaluation["time"], evaluation["trains"].astype(int), strict=True
    ):
        if trains > 0:
            steps = step - train["step"][trains - 1]
            seconds += max(0.0, time - train["time"][trains - 1] - steps * pace)
    return float(seconds)


def summarize_checkpoints(events: list[Event]) -> Checkpoints | None:
    """Summarize the records of checkpoints; None if there are none."""
    if not events:
        return None
    stall, write, size = (
        np.array([number(event.record, name) for event in events])
        for name in ("stall_seconds", "write_seconds", "bytes")
    )
    return Checkpoints(
        count=len(events),
        median_stall=median(stall),
        longest_stall=float(np.nanmax(stall)) if np.isfinite(stall).any() else math.nan,
        stalled=float(np.nansum(stall)),
        median_write=median(write),
        median_bytes=median(size),
    )


def best_estimate(history: History) -> tuple[int, float] | None:
    """Return the step and value of the lowest val_loss_estimate."""
    losses = history.evaluation["val_loss_estimate"]
    if not np.isfinite(losses).any():
        return None
    best = int(np.nanargmin(losses))
    return int(history.evaluation["step"][best]), float(losses[best])


def notice_text(event: Event) -> str:
    """Return the text of a notice; empty for other events."""
    return text(event.record, "text") if event.kind == "notice" else ""


def last_notice(history: History, beginning: str) -> str:
    """Return the rest of the last notice with this beginning; empty if there is none."""
    texts = [notice_text(event) for event in history.events]
    rests = [text.removeprefix(beginning) for text in texts if text.startswith(beginning)]
    return rests[-1] if rests else ""


def read_settings(path: Path) -> dict[str, Any]:
    """Read settings.yaml; empty if it is missing or damaged."""
    try:
        content = yaml.safe_load(read_file(path, MAX_SETTINGS_BYTES).decode(errors="replace"))
    except (OSError, DamagedFile, yaml.YAMLError, ValueError, OverflowError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def median(values: Column) -> float:
    """Return the median of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def weighted_mean(values: Column, weights: Column) -> float:
    """Return the mean of the finite values; NaN if there are none."""
    known = np.isfinite(values) & (weights > 0)
    return float(np.average(values[known], weights=weights[known])) if known.any() else math.nan
