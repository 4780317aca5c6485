"""Text for a terminal: what other people wrote cannot steer it.

In: text that may come from a file, a corpus, a model or another machine. Out: the same text with
its control characters made visible. Everything that the package prints goes through here.
"""

import re
import sys
from collections.abc import Container, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:  # takes a tenth of a second to import
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

# C0, DEL and C1, without newline and tab. C1 has CSI and OSC, too, as one character each.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    r"""Return text whose control characters, but for newline and tab, are written as `\x1b`."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def in_one_line(text: str) -> str:
    r"""Return visible text without line breaks: these are written as `\n`."""
    return visible(text.strip("\n").replace("\n", "\\n"))


def shown_on(stream: TextIO | None, text: str) -> str:
    """Return visible text if the stream is a terminal; the text as it is for a file or a pipe."""
    return visible(text) if stream is not None and stream.isatty() else text


def say(text: str = "", end: str = "\n") -> None:
    """Print to stdout at once, visibly if that is a terminal."""
    print(shown_on(sys.stdout, text), end=end, flush=True)


def complain(text: str) -> None:
    """Print one line to stderr at once."""
    print(in_one_line(text), file=sys.stderr, flush=True)


def console(width: int | None = None) -> "Console":
    """Return rich's console on stdout; on a terminal it prints visible text only.

    `width`: columns if stdout is no terminal; there the text is not folded.
    """
    from rich.console import Console

    class VisibleConsole(Console):
        """Cleans what is rendered: rich's own escapes are added after that."""

        def render(self, *arguments: Any, **options: Any) -> Any:
            for segment in super().render(*arguments, **options):
                is_text = self.is_terminal and not segment.control
                yield segment._replace(text=visible(segment.text)) if is_text else segment

    found = VisibleConsole(highlight=False)
    if width is None or found.is_terminal:
        return found
    return VisibleConsole(highlight=False, width=width)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence["str | Text"]],
    *,
    numeric: Container[str] = (),
    no_wrap: Container[str] = (),
    title: str = "",
) -> "Table":
    """Return a table for a console. Texts are printed as they are: brackets in them are no markup.

    `numeric`: columns that are set flush right; `no_wrap`: columns whose cells stay on one line.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    heading = Text(title, style="bold") if title else None
    drawn = Table(title=heading, title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    for name in columns:
        drawn.add_column(
            Text(name),
            justify="right" if name in numeric else "left",
            no_wrap=name in no_wrap,
            overflow="fold",
        )
    for row in rows:
        drawn.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return drawn
