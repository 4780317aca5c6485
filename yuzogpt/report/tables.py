"""A summary in words: the facts and tables that the terminal and the page both show.

In: a Summary. Out: `Facts` and `Table`s, of plain text that either escapes in its own way.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from yuzogpt.report.history import LAST_STEP, Event, number, words
from yuzogpt.report.summary import START_UP, Attempt, Summary
from yuzogpt.runs.event_log import Record

MOST_BENCHMARKS = 50  # columns
LONGEST_TEXT = 300  # characters of a cause: an error may be a page long
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
    """Say what the run is, how far it came, and how well it did."""
    data = section(summary, "data").get("dataset")
    max_iters = section(summary, "schedule").get("max_iters")
    of_all = f" of {max_iters:,}" if isinstance(max_iters, int) else ""
    found = [
        ("state", plain(summary.state)),
        ("model", summary.model),
        ("corpus", data if isinstance(data, str) else ""),
        ("workers", workers(summary)),
        ("steps", f"{summary.step:,}{of_all}"),
        ("tokens seen", f"{summary.tokens:,}"),
        ("from, to (UTC)", f"{moment(summary.begin)}, {moment(summary.end)}"),
        ("wall time", duration(summary.wall)),
        ("effective training time", effective(summary)),
        ("throughput", f"{quantity(summary.tokens_per_second)} tokens/s (median)"),
        ("network", network(summary)),
        ("val loss, whole split", final_loss(summary)),
        ("best checkpoint", best(summary)),
        ("steps with clipped gradient", percent(summary.clip_rate)),
        (
            "skipped steps, spikes",
            f"{len(summary.skips):,}, {len(summary.spikes):,}",
        ),
    ]
    return [(name, plain(text)) for name, text in found if text not in ("", NONE)]


def tables(summary: Summary) -> list[Table]:
    """Return the tables that have something to show."""
    found = [
        lost_time(summary),
        restarts(summary),
        stalls(summary),
        incidents("Skipped steps", summary.skips),
        incidents("Spikes", summary.spikes),
    ]
    return [table for table in found if table.rows]


def benchmarks(records: Sequence[Record]) -> list[Table]:
    """Return the figures of `--eval_tasks`: a row for each checkpoint; the last of one counts."""
    found = {
        int(number(record, "step")): {
            name: number(record, name)
            for name in record
            if name not in ("kind", "step", "time", "text")
        }
        for record in records
        if record.get("kind") == "tasks" and 0 <= number(record, "step") <= LAST_STEP
    }
    names = list(dict.fromkeys(name for figures in found.values() for name in figures))
    names = names[:MOST_BENCHMARKS]
    rows: list[Sequence[str]] = [
        (f"{step:,}", *(short(figures.get(name, math.nan)) for name in names))
        for step, figures in sorted(found.items())
    ]
    columns = ("step", *(plain(name).replace(" ", "\n", 1) for name in names))
    return [Table("Benchmarks", columns, rows, frozenset(columns))] if rows else []


def short(value: float) -> str:
    """Say a figure to four digits."""
    return NONE if math.isnan(value) else f"{value:.4g}"


def network(summary: Summary) -> str:
    """Say how fast the slowest hop between ranks was, usually and at worst."""
    found = [(number(event.record, "slowest_mbit_per_second"), event) for event in summary.network]
    known = [(speed, event) for speed, event in found if not math.isnan(speed)]
    if not known:
        return NONE
    usual = statistics.median(speed for speed, _ in known)
    worst, event = min(known, key=lambda pair: pair[0])
    where = f"{words(event.record, 'slowest_hop')} at step {event.step:,}"
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
    """Return one row for each time that the run was started again."""
    columns = ("when (UTC)", "from\nstep", "cause", "steps\nredone", "tokens\nredone", "time lost")
    rows: list[Sequence[str]] = [
        (
            moment(attempt.started),
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
    """Return how long training stood still for evaluations and checkpoints: time well spent."""
    columns = ("while productive", "count", "in all", "median", "longest", "writing", "size")
    rows: list[Sequence[str]] = []
    if summary.evaluations:
        seconds = duration(summary.evaluation_seconds)
        rows.append(("evaluations", f"{summary.evaluations:,}", seconds, "", "", "", ""))
    found = summary.checkpoints
    if found:
        rows.append(
            (
                "checkpoints",
                f"{found.count:,}",
                duration(found.stalled),
                duration(found.median_stall),
                duration(found.longest_stall),
                duration(found.median_write),
                size(found.median_bytes),
            )
        )
    return Table("Stalls", columns, rows, frozenset(columns[1:]))


def incidents(title: str, events: Sequence[Event]) -> Table:
    """Return one row for each skipped step or spike."""
    rows: list[Sequence[str]] = [
        (moment(event.time), f"{event.step:,}", said(event)) for event in events
    ]
    return Table(title, ("when (UTC)", "step", "what happened"), rows, frozenset({"step"}))


def workers(summary: Summary) -> str:
    """Say how the work was shared."""
    if summary.workers is None:
        return ""
    kind = "" if summary.parallel in ("", "none") else f", {summary.parallel}"
    return f"{summary.workers}{kind}"


def effective(summary: Summary) -> str:
    """Say how much of wall time was productive."""
    if math.isnan(summary.effective):
        return ""
    restarted = len(summary.restarts)
    return f"{percent(summary.effective)}; {restarted:,} restart{'' if restarted == 1 else 's'}"


def final_loss(summary: Summary) -> str:
    """Say the loss over the whole val split, or the best estimate until there is one."""
    if summary.final:
        return f"{summary.final['val_loss']:.4f}"
    if summary.best_estimate is None:
        return ""
    step, loss = summary.best_estimate
    return f"not yet; best val_loss_estimate {loss:.4f} at step {step:,}"


def best(summary: Summary) -> str:
    """Say which checkpoint is best."""
    if not summary.final or math.isnan(summary.final["best_step"]):
        return ""
    return f"step {summary.final['best_step']:,.0f}, val loss {summary.final['best_val_loss']:.4f}"


def cause(attempt: Attempt) -> str:
    """Say why there was another attempt, as the records said it."""
    said_of_each = dict.fromkeys(said(event).removeprefix("!!! ") for event in attempt.causes)
    return "; ".join(said_of_each) or attempt.cause


def said(event: Event) -> str:
    """Return the text of an event, or else its reason."""
    return plain(words(event.record, "text") or words(event.record, "reason") or event.kind)


def section(summary: Summary, name: str) -> dict[str, object]:
    """Return one section of settings.yaml."""
    found = summary.settings.get(name)
    return found if isinstance(found, dict) else {}


def plain(text: str) -> str:
    """Put text on one line, not too long a one, without what would steer a terminal."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= LONGEST_TEXT else line[:LONGEST_TEXT] + " ..."


def duration(seconds: float) -> str:
    """Say a time span in its two largest units."""
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


def moment(seconds: float) -> str:
    """Say a point in time, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def share(seconds: float, wall: float) -> tuple[str, str]:
    """Say a part of wall time, and which part."""
    return duration(seconds), percent(seconds / wall) if wall else NONE


def percent(value: float) -> str:
    """Say a share."""
    return NONE if math.isnan(value) else f"{100 * value:.1f}%"


def quantity(value: float) -> str:
    """Say a number to three digits or more."""
    return NONE if math.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def rounded(count: float, space: str = "") -> str:
    """Say a large number to three digits: 12.3M."""
    units = iter(("", "k", "M", "G"))
    unit = next(units)
    while count >= 999.5 and unit != "T":
        count, unit = count / 1000, next(units, "T")
    return f"{count:.3g}{space}{unit}"


def size(count: float) -> str:
    """Say a number of bytes."""
    return NONE if math.isnan(count) else f"{rounded(count, ' ')}B"
