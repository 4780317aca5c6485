"""The table of a sweep's trials: live on a terminal, elsewhere one line per change."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from yuzogpt.console import terminal
from yuzogpt.console.terminal import note

OTHERS_WIDTH, MIN_VALUE_WIDTH = 44, 9  # columns of text: of all but the values, of each value
STYLES = {"running": "bold", "failed": "red", "stopped": "dim", "finished": "green"}


@dataclass
class Row:
    """What is known of one trial."""

    values: Mapping[str, Any]
    state: str = "waiting"
    step: int = 0
    loss: float = math.inf  # the best so far
    error: str = ""

    def describe_end(self) -> str:
        """Return one line about how the trial ended."""
        reason = f" ({self.error})" if self.error else ""
        return (
            f"{self.state} at step {self.step}: val_loss_estimate {format_value(self.loss)}{reason}"
        )


class TrialTable:
    """A context manager that shows trials."""

    def __init__(self, title: str, max_iters: int) -> None:
        self.title, self.max_iters = title, max_iters
        self.rows: dict[str, Row] = {}
        self.console = terminal.console()
        self.live = Live(console=self.console, get_renderable=self.table, refresh_per_second=2)

    def __enter__(self) -> "TrialTable":
        """Show the table if stdout is a terminal."""
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Print the last state; trials that still run are cut off."""
        for row in self.rows.values():
            row.state = "cut off" if row.state == "running" else row.state
        if self.console.is_terminal:
            self.live.stop()
        elif self.rows:
            self.console.print(self.table())
        for name, row in sorted(self.rows.items()):
            if row.error:
                self.console.print(Text(f"!!! {name} failed: {row.error}"), soft_wrap=True)

    def mark_started(self, name: str, values: Mapping[str, Any]) -> None:
        """A trial starts or resumes training."""
        row = self.rows.setdefault(name, Row(values))
        row.state = "running"
        self._line(f"{name} starts: {format_values(values)}")

    def mark_kept(self, name: str, row: Row) -> None:
        """A trial ended before this command."""
        self.rows[name] = row
        self._line(f"{name} kept: {row.describe_end()}")

    def update(self, name: str, step: int, loss: float) -> None:
        """A trial was evaluated; `loss`: its best so far."""
        row = self.rows.setdefault(name, Row({}))
        row.step, row.loss = max(row.step, step), min(row.loss, loss)

    def mark_ended(self, name: str, state: str, error: str = "") -> None:
        row = self.rows.setdefault(name, Row({}))
        row.state, row.error = state, error
        self._line(f"{name} {row.describe_end()}")

    def _line(self, text: str) -> None:
        if not self.console.is_terminal:
            note(text)

    def table(self) -> Table:
        """Return one row per trial, the best one marked."""
        keys = list(dict.fromkeys(key for row in self.rows.values() for key in row.values))
        title = self.title
        if self.console.width < OTHERS_WIDTH + MIN_VALUE_WIDTH * len(keys):
            keys, title = [], f"{title} (values left out: they need a wider terminal)"
        rows: list[list[str | Text]] = []
        sound = [row.loss for row in self.rows.values() if row.state != "failed"]
        best = min(sound, default=math.inf)
        for name, row in sorted(self.rows.items()):
            is_best = row.state != "failed" and row.loss == best < math.inf
            mark = " *" if is_best else "  "
            values = [format_value(row.values.get(key)) for key in keys]
            progress = [f"{row.step}/{self.max_iters}", format_value(row.loss) + mark]
            rows.append([name, *values, *progress, Text(row.state, STYLES.get(row.state, ""))])
        names = [key.partition(".")[2] or key for key in keys]
        return terminal.table(
            ["trial", *names, "step", "val_loss_estimate", "state"],
            rows,
            numeric=(*names, "step", "val_loss_estimate"),
            title=title,
        )


def format_value(value: Any) -> str:
    """Return a value as short text."""
    if isinstance(value, float):
        return "-" if math.isinf(value) else f"{value:.3g}" if value < 1e-2 else f"{value:.4f}"
    return "-" if value is None else str(value)


def format_values(values: Mapping[str, Any]) -> str:
    """Return a trial's values as one line."""
    return ", ".join(
        f"{key.partition('.')[2]} {format_value(value)}" for key, value in values.items()
    )
