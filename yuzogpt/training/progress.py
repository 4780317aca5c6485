"""What a person sees while a run trains, and what W&B is sent: both fed from the run's records.

In: records of metrics.jsonl. Out: one progress bar on a terminal, plain lines elsewhere. Runs where
the command was typed, so that workers print nothing, and a W&B key never leaves this process.
"""

import errno
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from yuzogpt import runs
from yuzogpt.config import LogSettings, TrainSettings
from yuzogpt.console.quantities import time_left
from yuzogpt.console.terminal import say, visible
from yuzogpt.errors import UserError, first_line
from yuzogpt.runs.event_log import Record, seconds_of_step
from yuzogpt.runs.requirements import OFFLINE

PLAIN_EVERY = 5.0  # seconds between plain lines, where there is no terminal
INIT_WITHIN = 30.0  # seconds
SENT = ("train", "evaluation", "health", "tasks", "final")  # to W&B
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Display:
    """A listener for records; a context manager that leaves the terminal in order."""

    def __init__(
        self, settings: TrainSettings, wandb_key: str | None = None, *, is_new: bool | None = None
    ) -> None:
        """Nothing is shown before the first record.

        `is_new`: whether the run is none that W&B may know; None: if it is to overwrite another.
        """
        is_new = settings.run.overwrite if is_new is None else is_new
        self.max_iters = settings.schedule.max_iters
        self.bar: tqdm[Any] | None = None
        self.on_terminal = sys.stderr.isatty()
        self.val_loss: float | None = None
        self.last_plain = 0.0
        self.wandb = WandbSink(settings, wandb_key, is_new) if settings.log.wandb_log else None

    def __enter__(self) -> "Display":
        """Return the listener."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the bar, wherever it stands."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.wandb:
            self.wandb.close()

    def __call__(self, record: Record) -> None:
        """Show one record, and send it."""
        try:
            self._show(record)
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal that was closed: SIGHUP says what follows
                raise
        if self.wandb:
            self.wandb.remember()
            if record["kind"] in SENT:
                self.wandb.send(record)

    def _show(self, record: Record) -> None:
        kind = record["kind"]
        if "text" in record:
            self._line(record["text"])
        elif kind == "train":
            self._progress(record)
        elif kind == "evaluation":
            self.val_loss = record["val_loss_estimate"]
            self._line(f"step {record['step']}: val_loss_estimate {number(self.val_loss)}")

    def _line(self, text: str) -> None:
        if self.on_terminal:
            tqdm.write(visible(text))
        else:
            say(text)

    def _progress(self, record: Record) -> None:
        speed = f"{record['tokens_per_second']:,.0f} tokens/s"
        losses = f"loss {number(record['loss'])}"
        if self.val_loss is not None:  # a resumed run has not looked yet
            losses += f", val {self.val_loss:.4f}"
        step = record["step"]
        if self.on_terminal:
            if self.bar is None:
                self.bar = tqdm(total=self.max_iters, initial=step - 1, unit="step", bar_format=BAR)
            self.bar.set_postfix_str(f"{losses}, {speed}", refresh=False)
            self.bar.update(step - self.bar.n)
        elif time.monotonic() - self.last_plain >= PLAIN_EVERY or step == self.max_iters:
            self.last_plain = time.monotonic()
            seconds = (self.max_iters - step) * seconds_of_step(record)
            eta = time_left(seconds)
            self._line(f"step {step}/{self.max_iters}: {losses}, {speed}, ETA {eta}")


def number(value: float | None) -> str:
    """Return a loss for people."""
    return "not finite" if value is None else f"{value:.4f}"


class WandbSink:
    """Weights & Biases, offline or not."""

    def __init__(self, settings: TrainSettings, key: str | None, is_new: bool) -> None:
        """Start a W&B run; go on with that of this out_dir, unless the run there `is_new`."""
        import wandb

        run = runs.open_run(settings)
        self.memory, self.is_remembered = run / runs.WANDB_ID, False
        is_known = self.memory.local.exists() and not is_new
        known = self.memory.local.read_text().strip() if is_known else None
        try:
            self.run = wandb.init(
                project=settings.log.wandb_project,
                name=settings.log.wandb_run_name or run.name,
                id=known,
                resume="allow",
                dir=str(run.local),
                config=settings.model_dump(),
                settings=wandb.Settings(silent=True, api_key=key, init_timeout=INIT_WITHIN),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"--wandb_log: W&B did not begin a run ({first_line(error)}); {OFFLINE}"
            ) from None
        self.step = 0

    def remember(self) -> None:
        """Keep the id in out_dir, now that the run there has begun."""
        if not self.is_remembered:
            self.is_remembered = True
            self.memory.local.write_text(self.run.id)
            self.memory.upload()

    def send(self, record: Record) -> None:
        """Log one record at its step; W&B takes none of an earlier step than the last one."""
        left_out = ("kind", "time", "text")
        values = {key: value for key, value in record.items() if key not in left_out}
        if record["kind"] == "tasks":
            values["evaluated_step"] = values.pop("step")
        self.step = max(self.step, record["step"])
        self.run.log(values, step=self.step)

    def close(self) -> None:
        """Send what is left."""
        self.run.finish()


def take_wandb_key(log: LogSettings) -> str | None:
    """Read the key from its file, or take it out of the environment that workers would inherit.

    So call it before any worker is started.
    """
    from_environment = os.environ.pop("WANDB_API_KEY", None)
    if log.wandb_log and log.wandb_key_file:
        return Path(log.wandb_key_file).read_text().strip()
    return from_environment
