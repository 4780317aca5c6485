"""The history of a run: metrics.jsonl as columns of numbers, and the events among them.

In: records. Out: `History`. Numbers are in arrays from the first pass on, so that a run of 600,000
steps is read in seconds and a few hundred megabytes. Next on the line: summary.py.
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

# The numbers that are kept of each kind of record; null, and what an older version did not write,
# is NaN. `trains` counts the train records before it. All other kinds are events.
NUMBERS = {
    "train": (
        "step", "time", "loss", "lr", "grad_norm", "clip_rate", "tokens_per_second",
        "tokens_per_step",
    ),
    "evaluation": ("step", "time", "val_loss_estimate"),
}  # fmt: skip
BESIDE = ("notice", "undone", "eval_only")  # kinds that do not show that a run trains
SKEW = 60.0  # seconds by which clocks of a cluster may differ
LAYER_NUMBERS = ("grad_norm", "update_to_weight")
# The file may be somebody else's. What is beyond these bounds is left out.
LARGEST = 3.5e38  # of numbers: what float32 holds
LAST_STEP = 2**53  # a float holds each integer up to here
LAST_TIME = 253_402_300_799.0  # the end of the year 9999
MOST_LAYERS = 1000


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
    """Everything that a run wrote down."""

    train: Columns
    evaluation: Columns
    health: Health
    events: list[Event]  # in the order of the file
    begin: float  # time of the first record
    end: float  # time of the last record that shows that it trained

    @classmethod
    def read(cls, path: Path) -> "History | None":
        """Read metrics.jsonl; None if it is not there, or without a whole record."""
        return cls.of(record for _, record in read_lines(path)) if path.exists() else None

    @classmethod
    def of(cls, records: Iterable[Record]) -> "History | None":
        """Sort records by kind."""
        columns = {
            kind: {name: array("d") for name in (*NUMBERS[kind], "trains")} for kind in NUMBERS
        }
        health, events, trains = list[Record](), list[Event](), 0
        begin = end = math.nan
        finished = False
        for record in timed(records):
            kind, time = record["kind"], record["time"]
            begin = time if math.isnan(begin) else begin
            # What is said after the end is no part of the run's time, nor what is said of a run
            # that does not train at the time: before a start, or by an evaluation.
            finished = (finished or kind == "final") and kind not in ("start", "train")
            if (not finished or kind == "final") and kind not in BESIDE:
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
        return cls(train, evaluation, health_of(health), events, begin, end)

    def of_kind(self, *kinds: str) -> list[Event]:
        """Return the events of these kinds."""
        return [event for event in self.events if event.kind in kinds]


def timed(records: Iterable[Record]) -> Iterator[Record]:
    """Yield the records that have a kind, a step and a time; times never go back.

    If a clock was set back, time continues from the last record. If the clocks of several machines
    differ a little, the later one counts.
    """
    latest = set_back = 0.0
    for record in records:
        kind, step, time = record.get("kind"), number(record, "step"), number(record, "time")
        # NaN is in no range.
        if isinstance(kind, str) and 0 <= step <= LAST_STEP and 0 < time <= LAST_TIME:
            time += set_back
            if time < latest - SKEW:
                set_back += latest - time
            latest = min(max(latest, time), LAST_TIME)
            yield {**record, "step": int(step), "time": latest}


def number(record: Record, name: str) -> float:
    """Return a number of a record; NaN if there is none, or not one within bounds."""
    value = record.get(name)
    is_number = isinstance(value, float | int) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= LARGEST else math.nan  # type: ignore[arg-type]


def words(record: Record, name: str) -> str:
    """Return a text of a record; an empty one if there is none."""
    value = record.get(name)
    return value if isinstance(value, str) else ""


def health_of(records: list[Record]) -> Health:
    """Put what health records say of each layer side by side, layers in the model's order."""
    by_step = [
        (record["step"], record["layers"])
        for record in records
        if isinstance(record.get("layers"), dict)
    ]
    layers = list(dict.fromkeys(name for _, found in by_step for name in found))[:MOST_LAYERS]
    numbers = {
        name: np.array(
            [[number_of_layer(found, layer, name) for _, found in by_step] for layer in layers]
        ).reshape(len(layers), len(by_step))
        for name in LAYER_NUMBERS
    }
    return Health(layers, np.array([float(step) for step, _ in by_step]), numbers)


def number_of_layer(found: Record, layer: str, name: str) -> float:
    """Return a number that a health record has of a layer; NaN if there is none."""
    numbers = found.get(layer)
    return number(numbers, name) if isinstance(numbers, dict) else math.nan
