"""A report as one HTML file that needs nothing else: no script, no font, no other host.

page.html is the template. It escapes every text but the SVGs of plots.py.
"""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from yuzogpt.console.terminal import visible
from yuzogpt.report.plots import Plot
from yuzogpt.report.summary import Summary
from yuzogpt.report.tables import PROSE, Facts, Table, percent, plain

if TYPE_CHECKING:  # imported late: a training worker draws only loss.png
    from jinja2 import Template

TEMPLATE = Path(__file__).with_name("page.html")
MAX_ROWS = 500  # of a table: the newest
# Whatever a record may hold, a browser fetches nothing and runs nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(
    summary: Summary,
    facts: Facts,
    tables: Sequence[Table],
    plots: Iterable[Plot],
    samples: Sequence[str] = (),
) -> str:
    """Return the whole page."""
    return template().render(
        policy=POLICY,
        name=plain(summary.name),
        facts=facts,
        productive=percent(summary.effective) if summary.wall else "",
        plots=plots,
        samples=[visible(sample) for sample in samples],
        tables=tables,
        max_rows=MAX_ROWS,
        kind=kind,
    )


@functools.cache
def template() -> "Template":
    """Return the template, compiled once."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text())


def is_page(head: bytes) -> bool:
    """Return whether the first bytes of a file are those of such a page."""
    return head.startswith(b"<!DOCTYPE html>") and b": report</title>\n<style>" in head


def kind(table: Table, column: str) -> str:
    """Return the class of a column's cells."""
    return "number" if column in table.numeric else "prose" if column in PROSE else ""
