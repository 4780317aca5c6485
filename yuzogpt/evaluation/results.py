"""The results of an evaluation: results.json, and a table beside published figures of GPT-2.

The file has the results of one model; metrics of the same weights from earlier commands stay in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from yuzogpt.console import terminal
from yuzogpt.console.terminal import note
from yuzogpt.errors import UserError
from yuzogpt.evaluation.benchmarks.corpus_loss import LOSS, NANOGPT
from yuzogpt.evaluation.benchmarks.readers import Metric
from yuzogpt.evaluation.benchmarks.tasks import TASKS
from yuzogpt.storage.atomic_files import to_json, write_durably
from yuzogpt.storage.untrusted import DamagedFile, Untrusted, read_json

RESULTS = "results.json"
SIZES = ("117M", "345M", "762M", "1542M")  # the paper's names; today's are 124M, 355M, 774M, 1558M
TABLE_WIDTH = 140  # columns, if stdout is no terminal


@dataclass(frozen=True)
class Result:
    """The metrics of one task."""

    task: str
    metrics: Sequence[Metric]
    notes: Mapping[str, str | int]

    @property
    def key(self) -> str:
        """Its key in results.json: the task's name, with the protocol if that is not the first."""
        protocol = self.notes.get("protocol")
        is_first = self.task not in TASKS or protocol == next(iter(TASKS[self.task].protocols))
        return self.task if is_first else f"{self.task}-{protocol}"

    def to_dict(self) -> dict[str, Any]:
        """Return its entry for results.json."""
        return {"figures": {metric.name: metric.to_dict() for metric in self.metrics}, **self.notes}


class MetricEntry(Untrusted):
    """A metric in results.json."""

    value: float | None
    counted: int
    unit: str


class TaskEntry(Untrusted):
    """A task in results.json: its metrics and notes, of which these are read."""

    model_config = ConfigDict(extra="allow")

    figures: dict[str, MetricEntry]
    limit: int = 0
    loss_windows: int = 0
    file_sha256: str = ""


class Results(Untrusted):
    """The content of results.json."""

    model: dict[str, str]
    tasks: dict[str, TaskEntry]


def write(directory: Path, model: Mapping[str, Any], results: Sequence[Result]) -> Path:
    """Write results.json; it keeps the metrics that the same weights have for other tasks.

    A task's metrics over the whole text also stay if the new ones are over a part of it.
    """
    path = directory / RESULTS
    try:
        stored = read(directory)
    except DamagedFile:  # it was refused, unless --overwrite was given
        stored = None
    kept = dict(stored.tasks) if stored and stored.model == model else {}
    tasks = {key: entry.model_dump(exclude_unset=True) for key, entry in kept.items()}
    for result in results:
        flag = partial_flag(result, kept.get(result.key))
        if flag:
            note(f"{result.key}: {path} keeps the metrics computed without {flag}")
        else:
            tasks[result.key] = result.to_dict()
    write_durably(path, to_json({"model": dict(model), "tasks": tasks}))
    return path


def partial_flag(result: Result, entry: TaskEntry | None) -> str:
    """Return the flag because of which a result covers only a part of a stored one; or ""."""
    if entry is None or entry.limit:
        return ""
    if result.notes.get("limit"):
        return "--limit"
    is_same = result.notes.get("file_sha256") == entry.file_sha256
    windows = result.notes.get("loss_windows")
    return f"--loss_windows={windows}" if windows and not entry.loss_windows and is_same else ""


def read(directory: Path) -> Results | None:
    """Return results.json; None if there is none; DamagedFile if it is something else."""
    try:
        return read_json(directory / RESULTS, Results)
    except FileNotFoundError:
        return None


def check_is_ours(directory: Path) -> None:
    """Raise UserError if results.json is not an evaluation's: it would be overwritten."""
    try:
        read(directory)
    except DamagedFile as error:
        raise UserError(
            f"{error}: not the results of an evaluation; choose another --out_dir"
        ) from None


def check_same_model(directory: Path, name: str) -> None:
    """Raise UserError if results.json is of a model of another name."""
    stored = read(directory)
    if stored and stored.model.get("name") != name:
        raise UserError(
            f"{directory / RESULTS}: has the results of {stored.model.get('name')}; choose another "
            "--out_dir, or give --overwrite"
        )


def show(results: Sequence[Result]) -> None:
    """Print a row for each metric, with the published figures if there are any."""
    console = terminal.console(TABLE_WIDTH)
    numeric = ("this model", "counted", *SIZES)
    columns = ("task", "protocol", "metric", *numeric)
    rows = [table_row(result, metric) for result in results for metric in result.metrics]
    console.print(terminal.table(columns, rows, numeric=numeric))
    for result in results:
        if result.notes.get("protocol") == "paper" and not result.notes.get("published", True):
            console.print(
                f"{result.task}: not the published file, so no published figures are shown"
            )
    compared = [r for r in results if any(published_figures(r, metric) for metric in r.metrics)]
    if compared:
        console.print(f"{', '.join(SIZES)}: {', '.join(dict.fromkeys(map(source, compared)))}")
    for task in (result.task for result in compared if result.task in TASKS):
        if TASKS[task].about:
            console.print(f"{task}, of the paper's figures: {TASKS[task].about}")


def table_row(result: Result, metric: Metric) -> list[str]:
    """Return the cells of a metric."""
    counted = f"{metric.counted:,} {metric.unit}"
    published = [f"{value:g}" for value in published_figures(result, metric)] or [""] * len(SIZES)
    protocol = str(result.notes.get("protocol", ""))
    return [result.task, protocol, metric.name, f"{metric.value:.4f}", counted, *published]


def published_figures(result: Result, metric: Metric) -> tuple[float, ...]:
    """Return the published figures of the four sizes of GPT-2 on the same text, or ()."""
    notes = result.notes
    if notes.get("limit") or not notes.get("published", True):
        return ()
    if result.task == LOSS:
        return NANOGPT.get(metric.name, ()) if notes.get("corpus") == "openwebtext" else ()
    return TASKS[result.task].paper.get(metric.name, ()) if notes["protocol"] == "paper" else ()


def source(result: Result) -> str:
    """Return the source of the published figures."""
    return "nanoGPT's losses" if result.task == LOSS else "the GPT-2 paper's figures, table 3"
