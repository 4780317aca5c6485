"""Prints a report on the terminal."""

from collections.abc import Sequence

from rich.table import Table as RichTable
from rich.text import Text

from yuzogpt.console import terminal
from yuzogpt.report.tables import PROSE, Facts, Table

FACTS_WIDTH = 60  # columns; on a narrower terminal, facts are `key: value` lines
MAX_ROWS = 10  # of a table; the page has more


def show(name: str, facts: Facts, tables: Sequence[Table], max_rows: int = MAX_ROWS) -> None:
    """Print a report."""
    console = terminal.console()
    console.print(Text(name, style="bold"))
    lines = [(Text(key, style="dim"), Text(value)) for key, value in facts]
    grid = RichTable.grid(padding=(0, 2))
    for line in lines:
        grid.add_row(*line)
    is_narrow = console.width < FACTS_WIDTH
    console.print(Text("\n").join(map(Text(": ").join, lines)) if is_narrow else grid)
    for table in tables:
        console.print()
        console.print(as_rich(table, max_rows))
        hidden = len(table.rows) - max_rows
        if hidden > 0:
            console.print(Text(f"... and {hidden:,} before these, in the page", style="dim"))


def as_rich(table: Table, max_rows: int = MAX_ROWS) -> RichTable:
    """Return a table with its newest rows."""
    rows = table.rows[-max_rows:]
    return terminal.table(
        table.columns, rows, numeric=table.numeric, prose=PROSE, title=table.title
    )
