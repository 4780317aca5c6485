"""Prints a report on the terminal."""

from collections.abc import Sequence

from rich.table import Table as RichTable
from rich.text import Text

from yuzogpt.console import terminal
from yuzogpt.report.tables import PROSE, Facts, Table

MAX_ROWS = 10  # of a table; the page has more


def show(name: str, facts: Facts, tables: Sequence[Table]) -> None:
    """Print a report."""
    console = terminal.console()
    console.print(Text(name, style="bold"))
    grid = RichTable.grid(padding=(0, 2))
    for key, value in facts:
        grid.add_row(Text(key, style="dim"), Text(value))
    console.print(grid)
    for table in tables:
        console.print()
        console.print(as_rich(table))
        hidden = len(table.rows) - MAX_ROWS
        if hidden > 0:
            console.print(Text(f"... and {hidden:,} before these, in the page", style="dim"))


def as_rich(table: Table) -> RichTable:
    """Return a table with its newest rows."""
    no_wrap = set(table.columns) - set(PROSE)
    rows = table.rows[-MAX_ROWS:]
    return terminal.table(
        table.columns, rows, numeric=table.numeric, no_wrap=no_wrap, title=table.title
    )
