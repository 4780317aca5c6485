"""Printing to a terminal, safely: text from others cannot control it.

Text may come from a file, a corpus, a model or another machine; its control characters are printed
in visible form. Everything that the package prints goes through here.
"""

import re
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:  # importing it takes 0.1 s
    from rich.console import Console

# C0, DEL and C1, except newline and tab. C1 also has CSI and OSC, as one character each.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    r"""Return text with control characters, except newline and tab, written as `\x1b`."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def in_one_line(text: str) -> str:
    r"""Return visible text with line breaks written as `\n`."""
    return visible(text.strip("\n").replace("\n", "\\n"))


def shown_on(stream: TextIO | None, text: str) -> str:
    """Return visible text if the stream is a terminal; for a file or pipe, the text unchanged."""
    return visible(text) if stream is not None and stream.isatty() else text


def say(text: str = "", end: str = "\n") -> None:
    """Print to stdout and flush; on a terminal, visible text only."""
    print(shown_on(sys.stdout, text), end=end, flush=True)


def complain(text: str) -> None:
    """Print one line to stderr and flush."""
    print(in_one_line(text), file=sys.stderr, flush=True)


def console(width: int | None = None) -> "Console":
    """Return a rich console on stdout; on a terminal it prints visible text only.

    `width`: columns if stdout is not a terminal.
    """
    from rich.console import Console

    class VisibleConsole(Console):
        """Cleans rendered text; rich adds its own escapes afterwards."""

        def render(self, *arguments: Any, **options: Any) -> Any:
            for segment in super().render(*arguments, **options):
                is_text = self.is_terminal and not segment.control
                yield segment._replace(text=visible(segment.text)) if is_text else segment

    on_stdout = VisibleConsole(highlight=False)
    if width is None or on_stdout.is_terminal:
        return on_stdout
    return VisibleConsole(highlight=False, width=width)
