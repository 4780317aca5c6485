"""The facts and tables that the terminal and the page both show.

They are plain text, which each of the two escapes in its own way.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from yuzogpt.report.history import MAX_STEP, Event, number, text
from yuzogpt.report.summary import START_UP, Attempt, Summary
from yuzogpt.runs.event_log import Record

MAX_BENCHMARKS = 50  # columns
MAX_TEXT_LENGTH = 300  # characters of a cause: an error may be a page long
NONE = "–"  # noqa: RUF001

PROSE = ("cause", "what happened")  # columns whose texts may be long

Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A title, and rows under columns; `numeric` columns are set flush right."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]]
    numeric: frozenset[str]


def facts(summary: Summary) -> Facts:
    """Return how well a run did, what it is, and how far it came."""
    data = section(summary, "data").get("dataset")
    max_iters = section(summary, "schedule").get("max_iters")
    of_all = f" of {max_iters:,}" if isinstance(max_iters, int) else ""
    facts = [
        ("val loss, whole split", final_loss(summary)),
        ("best checkpoint", best(summary)),
        ("state", plain(summary.state)),
        ("model", summary.model),
        ("corpus", data if isinstance(data, str) else ""),
        ("workers", workers(summary)),
        ("steps", f"{summary.step:,}{of_all}"),
        ("tokens seen", f"{summary.tokens:,}"),
        ("from, to (UTC)", f"{format_time(summary.begin)}, {format_time(summary.end)}"),
        ("wall time", duration(summary.wall)),
        ("effective training time", effective(summary)),
        ("throughput", f"{quantity(summary.tokens_per_second)} tokens/s (median)"),
        ("network", network(summary)),
        ("steps with clipped gradient", percent(summary.clip_rate)),
        ("skipped steps, spikes", f"{len(summary.skips):,}, {len(summary.spikes):,}"),
    ]
    return [(name, plain(value)) for name, value in facts if value not in ("", NONE)]


def tables(summary: Summary) -> list[Table]:
    """Return the tables that have rows."""
    all_tables = [
        lost_time(summary),
        restarts(summary),
        stalls(summary),
        incidents("Skipped steps", summary.skips),
        incidents("Spikes", summary.spikes),
    ]
    return [table for table in all_tables if table.rows]


def benchmarks(records: Sequence[Record]) -> list[Table]:
    """Return the figures of `--eval_tasks`: a row for each checkpoint, by its last record."""
    by_step = {
        int(number(record, "step")): {
            name: number(record, name)
            for name in record
            if name not in ("kind", "step", "time", "text")
        }
        for record in records
        if record.get("kind") == "tasks" and 0 <= number(record, "step") <= MAX_STEP
    }
    names = list(dict.fromkeys(name for figures in by_step.values() for name in figures))
    names = names[:MAX_BENCHMARKS]
    rows: list[Sequence[str]] = [
        (f"{step:,}", *(format_figure(figures.get(name, math.nan)) for name in names))
        for step, figures in sorted(by_step.items())
    ]
    columns = ("step", *(plain(name).replace(" ", "\n", 1) for name in names))
    return [Table("Benchmarks", columns, rows, frozenset(columns))] if rows else []


def format_figure(value: float) -> str:
    """Format a figure to four digits."""
    return NONE if math.isnan(value) else f"{value:.4g}"


def network(summary: Summary) -> str:
    """Describe the slowest hop between ranks: its median speed and its worst."""
    speeds = [(number(event.record, "slowest_mbit_per_second"), event) for event in summary.network]
    known = [(speed, event) for speed, event in speeds if not math.isnan(speed)]
    if not known:
        return NONE
    usual = statistics.median(speed for speed, _ in known)
    worst, event = min(known, key=lambda pair: pair[0])
    where = f"{text(event.record, 'slowest_hop')} at step {event.step:,}"
    return f"{quantity(usual)} Mbit/s on the slowest hop (median); worst {quantity(worst)}: {where}"


def lost_time(summary: Summary) -> Table:
    """Return where wall time went."""
    counts = {START_UP: 1}
    for attempt in summary.restarts:
        counts[attempt.cause] = counts.get(attempt.cause, 0) + 1
    rows: list[Sequence[str]] = [("productive", "", *share(summary.productive, summary.wall))]
    rows += [
        (plain(f"lost: {cause}"), f"{counts[cause]:,}", *share(seconds, summary.wall))
        for cause, seconds in summary.lost_by_cause.items()
    ]
    columns = ("wall time", "times", "time", "share")
    return Table("Where the time went", columns, rows, frozenset(columns[1:]))


def restarts(summary: Summary) -> Table:
    """Return one row for each restart."""
    columns = ("when (UTC)", "from\nstep", "cause", "steps\nredone", "tokens\nredone", "time lost")
    rows: list[Sequence[str]] = [
        (
            format_time(attempt.started),
            f"{attempt.step:,}",
            cause(attempt),
            NONE if attempt.redone_steps is None else f"{attempt.redone_steps:,}",
            NONE if attempt.redone_tokens is None else rounded(attempt.redone_tokens),
            duration(attempt.lost_seconds),
        )
        for attempt in summary.restarts
    ]
    return Table("Restarts", columns, rows, frozenset(columns) - {"when (UTC)", "cause"})


def stalls(summary: Summary) -> Table:
    """Return how long training waited for evaluations and checkpoints: productive time."""
    columns = ("while productive", "count", "in all", "median", "longest", "writing", "size")
    rows: list[Sequence[str]] = []
    if summary.evaluations:
        seconds = duration(summary.evaluation_seconds)
        rows.append(("evaluations", f"{summary.evaluations:,}", seconds, "", "", "", ""))
    checkpoints = summary.checkpoints
    if checkpoints:
        rows.append(
            (
                "checkpoints",
                f"{checkpoints.count:,}",
                duration(checkpoints.stalled),
                duration(checkpoints.median_stall),
                duration(checkpoints.longest_stall),
                duration(checkpoints.median_write),
                size(checkpoints.median_bytes),
            )
        )
    return Table("Stalls", columns, rows, frozenset(columns[1:]))


def incidents(title: str, events: Sequence[Event]) -> Table:
    """Return one row for each skipped step or spike."""
    rows: list[Sequence[str]] = [
        (format_time(event.time), f"{event.step:,}", event_text(event)) for event in events
    ]
    return Table(title, ("when (UTC)", "step", "what happened"), rows, frozenset({"step"}))


def workers(summary: Summary) -> str:
    """Return how many workers there were, and how they trained in parallel."""
    if summary.workers is None:
        return ""
    kind = "" if summary.parallel in ("", "none") else f", {summary.parallel}"
    return f"{summary.workers}{kind}"


def effective(summary: Summary) -> str:
    """Return the productive share of wall time, and the number of restarts."""
    if math.isnan(summary.effective):
        return ""
    restarted = len(summary.restarts)
    return f"{percent(summary.effective)}; {restarted:,} restart{'' if restarted == 1 else 's'}"


def final_loss(summary: Summary) -> str:
    """Return the loss over the whole val split, or the best estimate until there is one."""
    if summary.final:
        return f"{summary.final['val_loss']:.4f}"
    if summary.best_estimate is None:
        return ""
    step, loss = summary.best_estimate
    return f"not yet; best val_loss_estimate {loss:.4f} at step {step:,}"


def best(summary: Summary) -> str:
    """Return the step and loss of the best checkpoint."""
    if not summary.final or math.isnan(summary.final["best_step"]):
        return ""
    return f"step {summary.final['best_step']:,.0f}, val loss {summary.final['best_val_loss']:.4f}"


def cause(attempt: Attempt) -> str:
    """Return why there was another attempt, in the words of the records."""
    texts = dict.fromkeys(event_text(event).removeprefix("!!! ") for event in attempt.causes)
    return "; ".join(texts) or attempt.cause


def event_text(event: Event) -> str:
    """Return the text of an event, or else its reason."""
    return plain(text(event.record, "text") or text(event.record, "reason") or event.kind)


def section(summary: Summary, name: str) -> dict[str, object]:
    """Return one section of settings.yaml."""
    value = summary.settings.get(name)
    return value if isinstance(value, dict) else {}


def plain(text: str) -> str:
    """Return text on one line of limited length, without characters that would steer a terminal."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= MAX_TEXT_LENGTH else line[:MAX_TEXT_LENGTH] + " ..."


def duration(seconds: float) -> str:
    """Format seconds in their two largest units."""
    if math.isnan(seconds):
        return NONE
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02} s"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02} h"


def format_time(seconds: float) -> str:
    """Format a point in time, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def share(seconds: float, wall: float) -> tuple[str, str]:
    """Format a part of wall time, and its share of that."""
    return duration(seconds), percent(seconds / wall) if wall else NONE


def percent(value: float) -> str:
    """Format a share."""
    return NONE if math.isnan(value) else f"{100 * value:.1f}%"


def quantity(value: float) -> str:
    """Format a number to three digits or more."""
    return NONE if math.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def rounded(count: float, space: str = "") -> str:
    """Format a large number to three digits: 12.3M."""
    units = iter(("", "k", "M", "G"))
    unit = next(units)
    while count >= 999.5 and unit != "T":
        count, unit = count / 1000, next(units, "T")
    return f"{count:.3g}{space}{unit}"


def size(count: float) -> str:
    """Format a number of bytes."""
    return NONE if math.isnan(count) else f"{rounded(count, ' ')}B"
