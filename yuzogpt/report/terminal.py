"""A report on the terminal.

In: facts and tables. Out: text, by rich.
"""

from collections.abc import Sequence
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from rich.text import Text

from yuzogpt.console import terminal
from yuzogpt.report.tables import PROSE, Facts, Table

MOST_ROWS = 10  # of a table; the page has more


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
        hidden = len(table.rows) - MOST_ROWS
        if hidden > 0:
            console.print(Text(f"... and {hidden:,} before these, in the page", style="dim"))


def as_rich(table: Table) -> RichTable:
    """Return a table with its newest rows. Cells are texts, so brackets in them are no markup."""
    title = Text(table.title, style="bold")
    found = RichTable(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    for name in table.columns:
        is_prose = name in PROSE
        justify: Literal["left", "right"] = "right" if name in table.numeric else "left"
        found.add_column(name, justify=justify, no_wrap=not is_prose, overflow="fold")
    for row in table.rows[-MOST_ROWS:]:
        found.add_row(*(Text(cell) for cell in row))
    return found
