"""Loggers: where a run's records go besides metrics.jsonl and the terminal.

They run in the process of the command, so that a W&B key never leaves it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

from yuzogpt import runs
from yuzogpt.config import TrainSettings
from yuzogpt.config.registry import Registry
from yuzogpt.errors import UserError, first_line
from yuzogpt.runs.event_log import Record
from yuzogpt.runs.requirements import OFFLINE

FIGURES = ("train", "evaluation", "health", "tasks", "final")  # the kinds of records to plot
WANDB_INIT_TIMEOUT_S = 30.0


class Logger(ABC):
    """Takes the records of one run, as they are written."""

    @abstractmethod
    def __call__(self, record: Record) -> None:
        """Take one record, of any kind."""

    @abstractmethod
    def close(self) -> None:
        """End, with the command."""


# From the run's settings, the key of W&B, and whether an earlier run of its out_dir gave way.
LOGGERS = Registry[Callable[[TrainSettings, str | None, bool], Logger]]("logger")


@LOGGERS.register("wandb", help="Weights & Biases; the same as --wandb_log")
class Wandb(Logger):
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

    def __call__(self, record: Record) -> None:
        """Log one record at its step; W&B takes no step before the last one."""
        if not self.is_id_saved:  # now that the run has begun
            self.is_id_saved = True
            self.id_file.local.write_text(self.run.id)
            self.id_file.upload()
        if record["kind"] not in FIGURES:
            return
        omitted = ("kind", "time", "text")
        values = {key: value for key, value in record.items() if key not in omitted}
        if record["kind"] == "tasks":
            values["evaluated_step"] = values.pop("step")
        self.step = max(self.step, record["step"])
        self.run.log(values, step=self.step)

    def close(self) -> None:
        """Finish the W&B run."""
        self.run.finish()
