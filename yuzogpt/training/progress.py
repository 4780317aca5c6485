"""The progress display of a run, and its upload to W&B, both from records of metrics.jsonl.

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

from yuzogpt import runs
from yuzogpt.config import LogSettings, TrainSettings
from yuzogpt.console.quantities import time_left
from yuzogpt.console.terminal import note, visible
from yuzogpt.errors import UserError, first_line
from yuzogpt.runs.event_log import Record, seconds_of_step
from yuzogpt.runs.requirements import OFFLINE

PLAIN_LINE_INTERVAL_S = 5.0  # where there is no terminal
WANDB_INIT_TIMEOUT_S = 30.0
WANDB_KINDS = ("train", "evaluation", "health", "tasks", "final")  # of records
TAKEN_KEYS: list[str] = []  # of W&B, from the environment of this process; the last one counts
BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Display:
    """A listener for records; as a context manager, it closes the bar and W&B at the end."""

    def __init__(
        self, settings: TrainSettings, wandb_key: str | None = None, *, is_new: bool | None = None
    ) -> None:
        """`is_new`: W&B must not resume an earlier run of this out_dir; None: if --overwrite."""
        is_new = settings.run.overwrite if is_new is None else is_new
        self.max_iters = settings.schedule.max_iters
        self.bar: tqdm[Any] | None = None
        self.on_terminal = sys.stderr.isatty()
        self.val_loss: float | None = None
        self.last_plain = 0.0
        self.wandb = WandbSink(settings, wandb_key, is_new) if settings.log.wandb_log else None

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.wandb:
            self.wandb.close()

    def __call__(self, record: Record) -> None:
        """Show one record, and send it to W&B."""
        try:
            self._show(record)
        except OSError as error:
            if error.errno != errno.EIO:  # the terminal was closed: SIGHUP ends the run
                raise
        if self.wandb:
            self.wandb.save_id()
            if record["kind"] in WANDB_KINDS:
                self.wandb.send(record)

    def _show(self, record: Record) -> None:
        kind = record["kind"]
        if "text" in record:
            self._line(record["text"])
        elif kind == "train":
            self._progress(record)
        elif kind == "evaluation":
            self.val_loss = record["val_loss_estimate"]
            self._line(f"step {record['step']}: val_loss_estimate {format_loss(self.val_loss)}")

    def _line(self, text: str) -> None:
        if self.on_terminal:
            tqdm.write(visible(text))
        else:
            note(text)

    def _progress(self, record: Record) -> None:
        speed = f"{record['tokens_per_second']:,.0f} tokens/s"
        losses = f"loss {format_loss(record['loss'])}"
        if self.val_loss is not None:  # none yet after a resume
            losses += f", val {self.val_loss:.4f}"
        step = record["step"]
        if self.on_terminal:
            if self.bar is None:
                self.bar = tqdm(
                    total=self.max_iters, initial=step - 1, unit="step", bar_format=BAR_FORMAT
                )
            self.bar.set_postfix_str(f"{losses}, {speed}", refresh=False)
            self.bar.update(step - self.bar.n)
        elif time.monotonic() - self.last_plain >= PLAIN_LINE_INTERVAL_S or step == self.max_iters:
            self.last_plain = time.monotonic()
            seconds = (self.max_iters - step) * seconds_of_step(record)
            eta = time_left(seconds)
            self._line(f"step {step}/{self.max_iters}: {losses}, {speed}, ETA {eta}")


def format_loss(value: float | None) -> str:
    """Return a loss as text."""
    return "not finite" if value is None else f"{value:.4f}"


class WandbSink:
    """Weights & Biases, offline or not."""

    def __init__(self, settings: TrainSettings, key: str | None, is_new: bool) -> None:
        """Start a W&B run, or resume the one of this out_dir unless `is_new`."""
        import wandb

        run = runs.open_run(settings.run)
        self.id_file, self.is_id_saved = run / runs.WANDB_ID, False
        is_known = self.id_file.local.exists() and not is_new
        run_id = self.id_file.local.read_text().strip() if is_known else None
        try:
            self.run = wandb.init(
                project=settings.log.wandb_project,
                name=settings.log.wandb_run_name or run.name,
                id=run_id,
                resume="allow",
                dir=str(run.local),
                config=settings.model_dump(),
                settings=wandb.Settings(
                    silent=True, api_key=key, init_timeout=WANDB_INIT_TIMEOUT_S
                ),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"--wandb_log: W&B did not begin a run ({first_line(error)}); {OFFLINE}"
            ) from None
        self.step = 0

    def save_id(self) -> None:
        """Save the id of the W&B run in out_dir; call it once the run there has begun."""
        if not self.is_id_saved:
            self.is_id_saved = True
            self.id_file.local.write_text(self.run.id)
            self.id_file.upload()

    def send(self, record: Record) -> None:
        """Log one record at its step; W&B takes no step before the last one."""
        omitted = ("kind", "time", "text")
        values = {key: value for key, value in record.items() if key not in omitted}
        if record["kind"] == "tasks":
            values["evaluated_step"] = values.pop("step")
        self.step = max(self.step, record["step"])
        self.run.log(values, step=self.step)

    def close(self) -> None:
        """Finish the W&B run."""
        self.run.finish()


def take_wandb_key(log: LogSettings) -> str | None:
    """Read the key from its file, or remove it from the environment that workers inherit.

    Call it before any worker is started. Later runs of this process get the same key.
    """
    if key := os.environ.pop("WANDB_API_KEY", None):
        TAKEN_KEYS.append(key)
    if log.wandb_log and log.wandb_key_file:
        return Path(log.wandb_key_file).read_text().strip()
    return TAKEN_KEYS[-1] if TAKEN_KEYS else None
