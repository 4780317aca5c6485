"""`yuzogpt report A B`: curves of runs overlaid, their figures, and the settings that differ.

In: runs. Out: tables in the terminal, and one HTML file as of a single run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from yuzogpt.config import TrainSettings
from yuzogpt.config.resolve import leaves
from yuzogpt.errors import UserError
from yuzogpt.report import tables, terminal
from yuzogpt.report.history import History, number
from yuzogpt.report.page import MAX_ROWS, page
from yuzogpt.report.plots import BLUE, GREEN, ORANGE, RED, TIME_UNITS, binned, finish, plot
from yuzogpt.report.report import check_page, read
from yuzogpt.report.summary import Summary
from yuzogpt.report.tables import NONE, Table, plain
from yuzogpt.storage.atomic_files import write_durably
from yuzogpt.storage.paths import as_typed
from yuzogpt.storage.run_storage import LocalStorage, RunStorage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLACES = ("run.out_dir", "run.storage", "run.overwrite")  # which differ, and decide nothing
COLOURS = (BLUE, ORANGE, GREEN, RED)


def write(runs: Sequence[RunStorage], html: Path) -> str:
    """Compare runs; return where the page is. UserError if one is not a run."""
    if len({run.display_name for run in runs}) < len(runs):
        raise UserError(f"{runs[0].display_name}: the same run twice; give two runs")
    check_page(LocalStorage(html), html)
    found = [read(run) for run in runs]
    summaries = [summary for _, summary in found]
    names = [plain(as_typed(run.display_name)) for run in runs]
    shown = [*figures(names, summaries), *differences(names, [s.settings for s in summaries])]
    title = " and ".join(plain(summary.name) for summary in summaries)
    terminal.show(title, [], shown, max_rows=MAX_ROWS)
    histories = dict(zip(names, (history for history, _ in found), strict=True))
    drawn = [
        plot(
            "Loss",
            "of each batch, pale, and val_loss_estimate with dots; * is val loss, whole split",
            lambda axes: draw_losses(axes, histories, by_time=False),
        ),
        plot(
            "Loss by time",
            "since the first start, lost time included",
            lambda axes: draw_losses(axes, histories, by_time=True),
        ),
    ]
    # As the page of one run, but without the time that this one lost.
    of_all = replace(summaries[0], name=title, begin=0.0, end=0.0)
    facts = [
        (f"{name}: val loss", tables.final_loss(summary))
        for name, summary in zip(names, summaries, strict=True)
    ]
    write_durably(html, page(of_all, facts, shown, drawn).encode())
    return str(html)


def figures(names: Sequence[str], summaries: Sequence[Summary]) -> list[Table]:
    """Return a table of what is known of the runs, val loss first."""
    facts = [dict(tables.facts(summary)) for summary in summaries]
    keys = dict.fromkeys(key for known in facts for key in known)
    rows: list[Sequence[str]] = [(key, *(known.get(key, NONE) for known in facts)) for key in keys]
    return [Table("Runs", ("", *names), rows, frozenset())]


def differences(names: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return a table of the settings that differ; what a settings.yaml lacks has its default."""
    rows: list[Sequence[str]] = []
    for dotted, field in leaves(TrainSettings):
        section, leaf = dotted.split(".")
        sections = [given.get(section) for given in settings]
        known = [part if isinstance(part, dict) else {} for part in sections]
        values = [plain(str(part.get(leaf, field.default))) for part in known]
        if len(set(values)) > 1 and dotted not in PLACES:
            rows.append((leaf, *values))
    return [Table("Settings that differ", ("setting", *names), rows, frozenset())] if rows else []


def draw_losses(axes: "Axes", histories: Mapping[str, History], *, by_time: bool) -> None:
    """Draw the losses of each run in a colour of its own."""
    from matplotlib.ticker import ScalarFormatter

    longest = max(history.end - history.begin for history in histories.values())
    fitting = (item for item in TIME_UNITS.items() if longest >= 3 * item[1])
    name_of_unit, unit = next(fitting, ("seconds", 1.0))
    for (name, history), colour in zip(histories.items(), COLOURS, strict=False):
        train, evaluation = history.train, history.evaluation
        finals = history.of_kind("final")[-1:]
        losses = [number(event.record, "val_loss") for event in finals]
        places = [train["step"], evaluation["step"], np.array([e.step for e in finals])]
        if by_time:
            times = (train["time"], evaluation["time"], np.array([e.time for e in finals]))
            places = [(time - history.begin) / unit for time in times]
        batches = binned(places[0], train["loss"])
        axes.plot(batches.step, batches.mean, color=colour, alpha=0.4, linewidth=0.8)
        estimates = evaluation["val_loss_estimate"]
        # matplotlib leaves a label out that begins with an underscore: a space of no width.
        label = f"\u200b{name}" if name.startswith("_") else name
        axes.plot(places[1], estimates, "o-", color=colour, markersize=3, label=label)
        axes.plot(places[2], losses, "*", color=colour, markersize=11)
    finish(axes, "loss (nats per token)")
    if by_time:
        axes.set_xlabel(name_of_unit)
        axes.xaxis.set_major_formatter(ScalarFormatter())
