"""What an evaluation found: results.json, and a table beside the GPT-2 paper's figures.

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
    """Write results.json; figures of the same weights that are not among these stay."""
    found = read(directory)
    earlier = found["tasks"] if found and found["model"] == model else {}
    tasks = earlier | {result.key: result.to_dict() for result in results}
    path = directory / RESULTS
    write_durably(path, to_json({"model": dict(model), "tasks": tasks}))
    return path


def read(directory: Path) -> dict[str, Any] | None:
    """Return results.json, if it is there and whole."""
    try:
        found: dict[str, Any] = json.loads((directory / RESULTS).read_bytes())
        return found if {"model", "tasks"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def refuse_other_model(directory: Path, name: str) -> None:
    """Raise UserError if the results there are of a model of another name."""
    found = read(directory)
    if found and found["model"].get("name") != name:
        raise UserError(
            f"{directory / RESULTS}: has the figures of {found['model'].get('name')}; "
            "choose another --out_dir, or give --overwrite"
        )


def show(results: Sequence[Result]) -> None:
    """Print a table: a row for each figure, the paper's beside those that it has."""
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
    if any(paper(result, figure) for result in results for figure in result.figures):
        console.print(f"{', '.join(SIZES)}: the GPT-2 paper's figures, table 3")


def row(result: Result, figure: Figure) -> list[str]:
    """Return the cells of a figure."""
    counted = f"{figure.counted:,} {figure.unit}"
    beside = paper(result, figure) or ("",) * len(SIZES)
    protocol = str(result.notes.get("protocol", ""))
    return [result.task, protocol, figure.metric, f"{figure.value:.4f}", counted, *beside]


def paper(result: Result, figure: Figure) -> tuple[str, ...]:
    """Return the paper's figures for the four sizes, where it has this one."""
    task = TASKS.get(result.task)
    is_papers = result.notes.get("protocol") == "paper" and not result.notes.get("limit")
    if task is None or not is_papers:
        return ()
    if result.task == "lambada" and figure.metric == "accuracy":
        return LAMBADA_ACCURACY
    if figure.metric != task.metric:
        return ()
    return tuple(f"{value:g}" for value in task.paper)


LAMBADA_ACCURACY = ("0.4599", "0.5548", "0.6012", "0.6324")  # with its filter of stop words
