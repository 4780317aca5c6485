"""The history of a run: metrics.jsonl as columns of numbers, and the events among them.

Numbers go into arrays as they are read: a run of 600,000 steps takes seconds and some hundred MB.
Next on the line: summary.py.
"""

import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from yuzogpt.runs.event_log import Record, read_lines

Column = npt.NDArray[np.float64]
Columns = dict[str, Column]

# The numbers that are kept of each kind of record. Null is NaN, and so is what older versions lack.
# `trains` counts the train records before it. All other kinds are events.
NUMBERS = {
    "train": (
        "step", "time", "loss", "lr", "grad_norm", "clip_rate", "tokens_per_second",
        "tokens_per_step",
    ),
    "evaluation": ("step", "time", "val_loss_estimate"),
}  # fmt: skip
NOT_TRAINING = ("notice", "undone", "eval_only")  # kinds that do not show that a run trains
MAX_CLOCK_SKEW_S = 60.0  # between machines of a cluster
LAYER_NUMBERS = ("grad_norm", "update_to_weight")
# The file may be somebody else's: records beyond these bounds are left out.
MAX_NUMBER = 3.5e38  # the largest of float32
MAX_STEP = 2**53  # a float holds each integer up to here
MAX_TIME = 253_402_300_799.0  # the end of the year 9999
MAX_LAYERS = 1000


@dataclass(frozen=True)
class Event:
    """A record that stands between train records."""

    kind: str
    step: int
    time: float
    record: Record
    trains: int  # train records before it


@dataclass(frozen=True)
class Health:
    """The numbers of each layer: rows are layers, columns are health records."""

    layers: list[str]
    step: Column
    numbers: dict[str, Column]  # by name: (layers, records)


@dataclass(frozen=True)
class History:
    """Everything that a run recorded."""

    train: Columns
    evaluation: Columns
    health: Health
    events: list[Event]  # in the order of the file
    begin: float  # time of the first record
    end: float  # time of the last record that shows that the run trained

    @classmethod
    def read(cls, path: Path) -> "History | None":
        """Read metrics.jsonl; None if it is missing or has no whole record."""
        return cls.from_records(record for _, record in read_lines(path)) if path.exists() else None

    @classmethod
    def from_records(cls, records: Iterable[Record]) -> "History | None":
        """Sort records by kind."""
        columns = {
            kind: {name: array("d") for name in (*NUMBERS[kind], "trains")} for kind in NUMBERS
        }
        health, events, trains = list[Record](), list[Event](), 0
        begin = end = math.nan
        finished = False
        for record in with_times(records):
            kind, time = record["kind"], record["time"]
            begin = time if math.isnan(begin) else begin
            # Records after the end, before a start or of an evaluation do not extend the run.
            finished = (finished or kind == "final") and kind not in ("start", "train")
            if (not finished or kind == "final") and kind not in NOT_TRAINING:
                end = time
            if kind in columns:
                for name in NUMBERS[kind]:
                    columns[kind][name].append(number(record, name))
                columns[kind]["trains"].append(trains)
                trains += kind == "train"
            elif kind == "health":
                health.append(record)
            else:
                events.append(Event(kind, record["step"], time, record, trains))
        if math.isnan(begin):
            return None
        train, evaluation = (
            {name: np.array(column) for name, column in columns[kind].items()} for kind in NUMBERS
        )
        end = begin if math.isnan(end) else end
        return cls(train, evaluation, collect_health(health), events, begin, end)

    def of_kind(self, *kinds: str) -> list[Event]:
        """Return the events of these kinds."""
        return [event for event in self.events if event.kind in kinds]


def with_times(records: Iterable[Record]) -> Iterator[Record]:
    """Yield the records that have a kind, a step and a time, with times that never decrease.

    If a clock was set back, time continues from the last record. If the clocks of several machines
    differ a little, the latest time counts.
    """
    latest = set_back = 0.0
    for record in records:
        kind, step, time = record.get("kind"), number(record, "step"), number(record, "time")
        # NaN is in no range.
        if isinstance(kind, str) and 0 <= step <= MAX_STEP and 0 < time <= MAX_TIME:
            time += set_back
            if time < latest - MAX_CLOCK_SKEW_S:
                set_back += latest - time
            latest = min(max(latest, time), MAX_TIME)
            yield {**record, "step": int(step), "time": latest}


def number(record: Record, name: str) -> float:
    """Return a number of a record; NaN if it is missing or out of bounds."""
    value = record.get(name)
    is_number = isinstance(value, float | int) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= MAX_NUMBER else math.nan  # type: ignore[arg-type]


def text(record: Record, name: str) -> str:
    """Return a text of a record; empty if it is missing."""
    value = record.get(name)
    return value if isinstance(value, str) else ""


def collect_health(records: list[Record]) -> Health:
    """Return the numbers of health records by layer, layers in the model's order."""
    by_step = [
        (record["step"], record["layers"])
        for record in records
        if isinstance(record.get("layers"), dict)
    ]
    layers = list(dict.fromkeys(name for _, numbers in by_step for name in numbers))[:MAX_LAYERS]
    numbers = {
        name: np.array(
            [[layer_number(record, layer, name) for _, record in by_step] for layer in layers]
        ).reshape(len(layers), len(by_step))
        for name in LAYER_NUMBERS
    }
    return Health(layers, np.array([float(step) for step, _ in by_step]), numbers)


def layer_number(layers: Record, layer: str, name: str) -> float:
    """Return a layer's number in a health record; NaN if it is missing."""
    numbers = layers.get(layer)
    return number(numbers, name) if isinstance(numbers, dict) else math.nan
