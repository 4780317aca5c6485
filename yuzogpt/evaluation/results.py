"""What an evaluation found: results.json, and a table beside published figures of the four GPT-2s.

In: the figures of each task. Out: a file that has everything that was counted, and a table. The
file is of one model: what another command found of the same weights stays in it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from yuzogpt.errors import UserError
from yuzogpt.evaluation.corpus_loss import LOSS, NANOGPT
from yuzogpt.evaluation.tasks import TASKS, Figure
from yuzogpt.files import to_json, write_durably

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


def write(directory: Path, model: Mapping[str, Any], results: Sequence[Result]) -> Path:
    """Write results.json; figures of the same weights that are not among these stay.

    So do those of a whole task, where these are of a part.
    """
    found, path = read(directory), directory / RESULTS
    tasks = dict(found["tasks"]) if found and found["model"] == model else {}
    for result in results:
        if result.notes.get("limit") and tasks.get(result.key, {}).get("limit") == 0:
            print(f"{result.key}: without --limit before; {path} keeps those figures")
        else:
            tasks[result.key] = result.to_dict()
    write_durably(path, to_json({"model": dict(model), "tasks": tasks}))
    return path


def read(directory: Path) -> dict[str, Any] | None:
    """Return results.json, if it is there and whole."""
    try:
        found: dict[str, Any] = json.loads((directory / RESULTS).read_bytes())
        return found if {"model", "tasks"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def refuse_foreign(directory: Path) -> None:
    """Raise UserError if there is a results.json that is none of ours: it would be replaced."""
    if (directory / RESULTS).exists() and read(directory) is None:
        raise UserError(
            f"{directory / RESULTS}: not the results of an evaluation; choose another --out_dir"
        )


def refuse_other_model(directory: Path, name: str) -> None:
    """Raise UserError if the results there are of a model of another name."""
    found = read(directory)
    if found and found["model"].get("name") != name:
        raise UserError(
            f"{directory / RESULTS}: has the figures of {found['model'].get('name')}; "
            "choose another --out_dir, or give --overwrite"
        )


def show(results: Sequence[Result]) -> None:
    """Print a table: a row for each figure, published ones beside it where there are any."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDE)
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
