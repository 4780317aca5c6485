"""A table that becomes `key: value` lines where the console is too narrow for it."""

from collections.abc import Container, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

MIN_PROSE_WIDTH = 20  # columns of a cell that wraps
GAP = 3  # columns between two cells


class FittingTable(Table):
    """A table as wide as its cells, or a line for each cell."""

    def __init__(
        self,
        names: Sequence[str],
        rows: Sequence[Sequence[Text]],
        numeric: Container[str],
        prose: Container[str],
        title: str,
    ) -> None:
        heading = Text(title, style="bold") if title else None
        super().__init__(title=heading, title_justify="left", box=SIMPLE_HEAD, show_edge=False)
        self.names, self.cells = names, rows
        self.needed = GAP * len(names) - 1
        for index, name in enumerate(names):
            self.add_column(
                Text(name),
                justify="right" if name in numeric else "left",
                no_wrap=name not in prose,
                overflow="fold",
            )
            width = max(map(width_of, [Text(name), *(row[index] for row in rows)]))
            self.needed += min(width, MIN_PROSE_WIDTH) if name in prose else width
        for row in rows:
            self.add_row(*row)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table if it fits, and else a line for each cell that is not empty."""
        if self.needed <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        if self.title:
            yield self.title
        for row in self.cells:
            indent = 0
            for name, cell in zip(self.names, row, strict=True):
                if cell:
                    key = name.replace("\n", " ")
                    line = Text.assemble((f"{key}: " if key else "", "dim"), cell)
                    yield Padding(line, (0, 0, 0, indent), expand=False)
                    indent = 2


def width_of(text: Text) -> int:
    """Return the columns of the longest line."""
    return max((line.cell_len for line in text.split()), default=0)
