"""What the package prints, and its log. Text that other people wrote cannot steer a terminal.

Everything that is printed goes through here: an answer of a command by `say`, what a command is
doing by `note`, a warning by `complain`. The last two are records of the logger `yuzogpt`, which
prints notes to stdout and the rest to stderr, without a prefix. A program that uses the package
silences it by `logging.getLogger("yuzogpt").setLevel("ERROR")`, a command by `--log_level=error`.
"""

import logging
import os
import re
import sys
from collections.abc import Container, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:  # takes a tenth of a second to import
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

LEVELS = ("debug", "info", "warning", "error")
LEVEL_VARIABLE = "YUZOGPT_LOG_LEVEL"  # so that processes that a command starts have its level
LOGGER = logging.getLogger("yuzogpt")

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
    """Print an answer to stdout at once, visibly if that is a terminal."""
    print(shown_on(sys.stdout, text), end=end, flush=True)


def note(text: str) -> None:
    """Log what a command is doing: a line on stdout."""
    LOGGER.info("%s", text)


def say_while_waiting(text: str) -> None:
    """Print on a terminal's stderr what takes a moment; nothing into a file or a pipe."""
    if sys.stderr is not None and sys.stderr.isatty() and LOGGER.isEnabledFor(logging.INFO):
        print(visible(text), file=sys.stderr, flush=True)


def complain(text: str) -> None:
    """Log a warning: one line on stderr."""
    LOGGER.warning("%s", in_one_line(text))


def report_error(text: str) -> None:
    """Log why a command ends with an error: one line on stderr, at every level."""
    LOGGER.error("%s", in_one_line(text))


class TerminalHandler(logging.Handler):
    """Prints records to the stdout and stderr that there are at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record at once, with its traceback if it has one."""
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        print(shown_on(stream, self.format(record)), file=stream, flush=True)


def set_log_level(level: str) -> None:
    """Set the level of this process and of those that it starts: one of LEVELS."""
    os.environ[LEVEL_VARIABLE] = level
    LOGGER.setLevel(level.upper())


if not LOGGER.handlers:
    LOGGER.addHandler(TerminalHandler())
    LOGGER.propagate = False  # a root logger's handlers would print each line again
    if LOGGER.level == logging.NOTSET:  # a program may have set it before it called us
        given = os.environ.get(LEVEL_VARIABLE, "info").lower()
        LOGGER.setLevel(given.upper() if given in LEVELS else "INFO")


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
    prose: Container[str] = (),
    title: str = "",
) -> "Table":
    """Return a table for a console; on a narrow one it prints `key: value` lines.

    Texts are printed as they are: brackets in them are no markup. `numeric`: columns that are set
    flush right; `prose`: columns whose cells wrap. All other cells stay on one line.
    """
    from rich.text import Text

    from yuzogpt.console.fitting_table import FittingTable

    cells = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    return FittingTable(columns, cells, numeric, prose, title)
