"""The progress display of a run, from records of metrics.jsonl, which its loggers get, too.

A progress bar on a terminal, plain lines elsewhere. This runs in the process of the command, so
that workers print nothing, and a W&B key never leaves this process.
"""

import errno
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from yuzogpt.config import LogSettings, TrainSettings
from yuzogpt.console.quantities import time_left
from yuzogpt.console.terminal import complain, note, visible
from yuzogpt.errors import reason_of
from yuzogpt.runs.event_log import Record, seconds_of_step
from yuzogpt.training.loggers import LOGGERS

PLAIN_LINE_INTERVAL_S = 5.0  # where there is no terminal
TAKEN_KEYS: list[str] = []  # of W&B, from the environment of this process; the last one counts
BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Display:
    """A listener for records; as a context manager, it closes the bar and the loggers."""

    def __init__(
        self, settings: TrainSettings, wandb_key: str | None = None, *, is_new: bool | None = None
    ) -> None:
        """`is_new`: loggers must not resume an earlier run of out_dir; None: if --overwrite."""
        is_new = settings.run.overwrite if is_new is None else is_new
        self.max_iters = settings.schedule.max_iters
        self.bar: tqdm[Any] | None = None
        self.on_terminal = sys.stderr.isatty()
        self.val_loss: float | None = None
        self.last_plain = 0.0
        names = settings.log.all_loggers
        self.loggers = [LOGGERS[name](settings, wandb_key, is_new) for name in names]

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        for logger in self.loggers:
            logger.close()

    def __call__(self, record: Record) -> None:
        """Show one record, and send it to the loggers."""
        try:
            self._show(record)
        except OSError as error:
            if error.errno != errno.EIO:  # the terminal was closed: SIGHUP ends the run
                raise
        for logger in list(self.loggers):
            try:
                logger(record)
            except Exception as error:  # of a service, or of somebody's own logger
                complain(f"!!! logger {type(logger).__name__} is left out: {reason_of(error)}")
                self.loggers.remove(logger)

    def _show(self, record: Record) -> None:
        kind = record["kind"]
        if "text" in record:
            self._line(record["text"])
        elif kind == "train":
            self._progress(record)
        elif kind == "start" and self.on_terminal and self.bar is None:
            self._begin_bar(record["step"]).set_postfix_str("the first step ...")
        elif kind == "evaluation":
            self.val_loss = record["val_loss_estimate"]
            self._line(f"step {record['step']}: val_loss_estimate {format_loss(self.val_loss)}")

    def _line(self, text: str) -> None:
        if self.on_terminal:
            tqdm.write(visible(text))
        else:
            note(text)

    def _begin_bar(self, step: int) -> "tqdm[Any]":
        self.bar = tqdm(total=self.max_iters, initial=step, unit="step", bar_format=BAR_FORMAT)
        return self.bar

    def _progress(self, record: Record) -> None:
        speed = f"{record['tokens_per_second']:,.0f} tokens/s"
        losses = f"loss {format_loss(record['loss'])}"
        step = record["step"]
        if self.on_terminal:
            bar = self.bar or self._begin_bar(step - 1)
            bar.set_postfix_str(f"{losses}, {speed}", refresh=False)
            bar.update(step - bar.n)
        elif time.monotonic() - self.last_plain >= PLAIN_LINE_INTERVAL_S or step == self.max_iters:
            self.last_plain = time.monotonic()
            if self.val_loss is not None:  # none yet after a resume
                losses += f", val_loss_estimate {self.val_loss:.4f}"
            seconds = (self.max_iters - step) * seconds_of_step(record)
            eta = time_left(seconds)
            self._line(f"step {step}/{self.max_iters}: {losses}, {speed}, ETA {eta}")


def format_loss(value: float | None) -> str:
    """Return a loss as text."""
    return "not finite" if value is None else f"{value:.4f}"


def take_wandb_key(log: LogSettings) -> str | None:
    """Read the key from its file, or remove it from the environment that workers inherit.

    Call it before any worker is started. Later runs of this process get the same key.
    """
    if key := os.environ.pop("WANDB_API_KEY", None):
        TAKEN_KEYS.append(key)
    if "wandb" in log.all_loggers and log.wandb_key_file:
        return Path(log.wandb_key_file).read_text().strip()
    return TAKEN_KEYS[-1] if TAKEN_KEYS else None
