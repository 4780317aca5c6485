"""What an evaluation found: results.json, and a table beside published figures of the four GPT-2s.

In: the figures of each task. Out: a file that has everything that was counted, and a table. The
file is of one model: what another command found of the same weights stays in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from rich.box import SIMPLE_HEAD
from rich.table import Table

from yuzogpt.console import terminal
from yuzogpt.console.terminal import say
from yuzogpt.errors import UserError
from yuzogpt.evaluation.benchmarks.corpus_loss import LOSS, NANOGPT
from yuzogpt.evaluation.benchmarks.tasks import TASKS, Figure
from yuzogpt.storage.atomic_files import to_json, write_durably
from yuzogpt.storage.untrusted import DamagedFile, Untrusted, read_json

RESULTS = "results.json"
SIZES = ("117M", "345M", "762M", "1542M")  # the paper's names; today's are 124M, 355M, 774M, 1558M
WIDE = 140  # columns, where there is no terminal


@dataclass(frozen=True)
class Result:
    """The figures of one task."""

    task: str
    figures: Sequence[Figure]
    notes: Mapping[str, str | int]

    @property
    def key(self) -> str:
        """What it is called in results.json: as the task, if in the first of its protocols."""
        protocol = self.notes.get("protocol")
        is_first = self.task not in TASKS or protocol == next(iter(TASKS[self.task].prepare))
        return self.task if is_first else f"{self.task}-{protocol}"

    def to_dict(self) -> dict[str, Any]:
        """Return it for results.json."""
        return {
            "figures": {figure.metric: figure.to_dict() for figure in self.figures},
            **self.notes,
        }


class FigureEntry(Untrusted):
    """A figure in results.json."""

    value: float | None
    counted: int
    unit: str


class TaskEntry(Untrusted):
    """A task in results.json: its figures, and what else a reader must know."""

    model_config = ConfigDict(extra="allow")

    figures: dict[str, FigureEntry]
    limit: int = 0
    loss_windows: int = 0
    file_sha256: str = ""


class Results(Untrusted):
    """What is in results.json."""

    model: dict[str, str]
    tasks: dict[str, TaskEntry]


def write(directory: Path, model: Mapping[str, Any], results: Sequence[Result]) -> Path:
    """Write results.json; figures of the same weights that are not among these stay.

    So do those of a whole task, where these are of a part.
    """
    path = directory / RESULTS
    try:
        found = read(directory)
    except DamagedFile:  # it was refused, unless it was to be overwritten
        found = None
    kept = dict(found.tasks) if found and found.model == model else {}
    tasks = {key: entry.model_dump(exclude_unset=True) for key, entry in kept.items()}
    for result in results:
        flag = part_of(result, kept.get(result.key))
        if flag:
            say(f"{result.key}: without {flag} before; {path} keeps those figures")
        else:
            tasks[result.key] = result.to_dict()
    write_durably(path, to_json({"model": dict(model), "tasks": tasks}))
    return path


def part_of(result: Result, entry: TaskEntry | None) -> str:
    """Return the flag by which a result is of a part of what is there; empty if it is not."""
    if entry is None or entry.limit:
        return ""
    if result.notes.get("limit"):
        return "--limit"
    is_same = result.notes.get("file_sha256") == entry.file_sha256
    windows = result.notes.get("loss_windows")
    return f"--loss_windows={windows}" if windows and not entry.loss_windows and is_same else ""


def read(directory: Path) -> Results | None:
    """Return results.json, if it is there; DamagedFile if it is something else."""
    try:
        return read_json(directory / RESULTS, Results)
    except FileNotFoundError:
        return None


def refuse_foreign(directory: Path) -> None:
    """Raise UserError if there is a results.json that is none of ours: it would be replaced."""
    try:
        read(directory)
    except DamagedFile as error:
        raise UserError(
            f"{error}: not the results of an evaluation; choose another --out_dir"
        ) from None


def check_same_model(directory: Path, name: str) -> None:
    """Raise UserError if the results there are of a model of another name."""
    found = read(directory)
    if found and found.model.get("name") != name:
        raise UserError(
            f"{directory / RESULTS}: has the figures of {found.model.get('name')}; choose another "
            "--out_dir, or give --overwrite"
        )


def show(results: Sequence[Result]) -> None:
    """Print a table: a row for each figure, published ones beside it where there are any."""
    console = terminal.console(WIDE)
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for name in ("task", "protocol", "figure", "here", "counted", *SIZES):
        is_number = name in ("here", "counted", *SIZES)
        table.add_column(name, justify="right" if is_number else "left", no_wrap=True)
    for result in results:
        for figure in result.figures:
            table.add_row(*row(result, figure))
    console.print(table)
    for result in results:
        if result.notes.get("protocol") == "paper" and not result.notes.get("published", True):
            console.print(f"{result.task}: not the published file, so nothing is beside it")
    compared = [one for one in results if any(beside(one, figure) for figure in one.figures)]
    if compared:
        console.print(f"{', '.join(SIZES)}: {', '.join(dict.fromkeys(map(source, compared)))}")
    for task in (TASKS[one.task] for one in compared if one.task in TASKS):
        if task.about:
            console.print(f"{task.name}, of the paper's figures: {task.about}")


def row(result: Result, figure: Figure) -> list[str]:
    """Return the cells of a figure."""
    counted = f"{figure.counted:,} {figure.unit}"
    published = [f"{value:g}" for value in beside(result, figure)] or [""] * len(SIZES)
    protocol = str(result.notes.get("protocol", ""))
    return [result.task, protocol, figure.metric, f"{figure.value:.4f}", counted, *published]


def beside(result: Result, figure: Figure) -> tuple[float, ...]:
    """Return the published figures of the four sizes, where there are any of the same text."""
    notes = result.notes
    if notes.get("limit") or not notes.get("published", True):
        return ()
    if result.task == LOSS:
        return NANOGPT.get(figure.metric, ()) if notes.get("corpus") == "openwebtext" else ()
    return TASKS[result.task].paper.get(figure.metric, ()) if notes["protocol"] == "paper" else ()


def source(result: Result) -> str:
    """Return whose the published figures are."""
    return "nanoGPT's losses" if result.task == LOSS else "the GPT-2 paper's figures, table 3"
