"""One trial: a run of its own, its values, and how it ended.

In: settings with the trial's values. Out: a run in `DIR/trials/0007/`, and beside its files

    trial.json    number, values, state: waiting, finished, stopped (by the scheduler) or failed

which is all that a sweep goes on from. Runs where the trial runs; Ray shows only in `report` and in
`train`.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from yuzogpt import checkpoints, runs
from yuzogpt.config import TrainSettings
from yuzogpt.errors import InUse, RunFailed, UserError, is_out_of_memory
from yuzogpt.runs.event_log import Listener, Record, read_records
from yuzogpt.runs.stop_request import ask_to_stop
from yuzogpt.storage.atomic_files import to_json, write_durably
from yuzogpt.storage.run_storage import LocalStorage
from yuzogpt.storage.untrusted import DamagedFile, Untrusted, checked, read_json
from yuzogpt.tuning.space import SEARCHABLE

TRIAL = "trial.json"
SEED = "run.seed"  # of the finals
STOPPED = "the sweep's scheduler"  # why a run stops that others left behind

State = Literal["waiting", "finished", "stopped", "failed"]
# Hands on the step and the best loss so far; tells whether the trial is to go on.
Report = Callable[[int, float], bool]
# Trains, and returns why the run stopped before its end, if it did.
Train = Callable[[TrainSettings, Listener], str | None]


class TrialFile(Untrusted):
    """What trial.json may say."""

    name: str
    values: dict[str, bool | int | float | str | None]
    state: State
    error: str = ""
    score: float | None = None


class Evaluation(Untrusted):
    """What a record of an evaluation must say."""

    step: int
    val_loss_estimate: float | None

    @property
    def loss(self) -> float:
        """Infinity, if it was not finite."""
        loss = self.val_loss_estimate
        return math.inf if loss is None or not math.isfinite(loss) else loss


@dataclass(frozen=True)
class Trial:
    """What trial.json says."""

    directory: Path
    name: str
    values: dict[str, Any] = field(default_factory=dict)  # by section.leaf
    state: State = "waiting"
    error: str = ""
    score: float | None = None  # loss on what the search never saw

    @property
    def is_over(self) -> bool:
        """Tell whether nothing is left to do."""
        return self.state != "waiting"

    def write(self) -> None:
        """Write trial.json."""
        self.directory.mkdir(parents=True, exist_ok=True)
        content = {key: value for key, value in asdict(self).items() if key != "directory"}
        write_durably(self.directory / TRIAL, to_json(content))

    @classmethod
    def read(cls, directory: Path) -> "Trial | None":
        """Read trial.json; None if there is none."""
        path = directory / TRIAL
        try:
            found = read_json(path, TrialFile)
            if found.name != directory.name:  # names become paths
                raise DamagedFile(f"{path}: name: {found.name!r}, in {directory.name}")
            for key in found.values:
                if key.partition(".")[0] not in SEARCHABLE and key != SEED:
                    raise DamagedFile(f"{path}: values: {key!r} is not searched")
        except FileNotFoundError:
            return None
        except DamagedFile as error:
            raise DamagedFile(f"{error}; delete it, and the trial is done again") from None
        return cls(directory, **dict(found))

    def evaluations(self) -> list[tuple[int, float]]:
        """Return the steps and losses of its evaluations."""
        path = self.directory / runs.METRICS
        evaluations = (r for r in read_records(path) if r.get("kind") == "evaluation")
        found = (checked(record, Evaluation, str(path)) for record in evaluations)
        return [(one.step, one.loss) for one in found]


def loss_of(record: Record) -> float:
    """Return an evaluation's loss; infinity if it was not finite."""
    loss = record["val_loss_estimate"]
    return math.inf if loss is None else float(loss)


class Progress:
    """A listener for a run's records: reports each evaluation, and stops the run if told to."""

    def __init__(self, run: Path, report: Report) -> None:
        """What an earlier attempt found is reported again: a scheduler compares it."""
        self.run, self.report = run, report
        self.best, self.goes_on = math.inf, True

    def __call__(self, record: Record) -> None:
        """Hear of one record."""
        # At step 0 nothing is tuned yet, and there is no checkpoint.
        if record["kind"] == "evaluation" and record["step"] > 0 and self.goes_on:
            self.best = min(self.best, loss_of(record))
            self.goes_on = self.report(record["step"], self.best)
            if not self.goes_on:
                ask_to_stop(LocalStorage(self.run), STOPPED)


def run_trial(settings: TrainSettings, trial: Trial, report: Report, train: Train) -> bool:
    """Do a trial, or what is left of it; tell whether it was not stopped.

    One that is over is only reported.
    """
    progress = Progress(trial.directory, report)
    progress.goes_on = report(0, math.inf)  # even a trial that fails at once has said something
    for record in read_records(trial.directory / runs.METRICS):
        if progress.goes_on:
            progress(record)
    if trial.is_over:
        return progress.goes_on
    state: State = "stopped"
    error = ""
    if progress.goes_on:
        try:
            reason = train(settings, progress)
        except InUse:
            raise  # it is tried again
        except (RunFailed, UserError) as problem:  # it would only come again
            state, error = "failed", str(problem)
        except Exception as problem:
            if not is_out_of_memory(problem):
                raise
            state, error = "failed", "out of memory"
        else:
            if reason not in (None, STOPPED):
                return True  # somebody else's wish: the same command goes on
            state = "stopped" if reason else "finished"
    conclude(trial, state, error)
    return progress.goes_on


def conclude(trial: Trial, state: State, error: str = "") -> None:
    """Write down how a trial ended, and keep of its run what readers need."""
    replace(trial, state=state, error=error).write()
    keep_weights_only(trial.directory)


def refuse(trial: Trial, why: str, report: Report) -> None:
    """Write down that a trial cannot begin, unless it is over; Tune wants a report of each."""
    report(0, math.inf)
    if not trial.is_over:
        conclude(trial, "failed", why)


def score(settings: TrainSettings, directory: Path, train: Train) -> None:
    """Write down a finished trial's loss on the other half of the val split, by its best weights.

    An evaluation is a run like any other, on as many workers.
    """
    trial = Trial.read(directory)
    if not trial or trial.state != "finished" or trial.score is not None:
        return
    place = directory / "score"
    run = settings.run.model_copy(
        update={"init_from": str(directory), "out_dir": str(place), "overwrite": True}
    )
    look = settings.evaluation.model_copy(update={"val_part": "second", "eval_only": True})
    train(settings.model_copy(update={"run": run, "evaluation": look}), lambda _: None)
    found = [r["val_loss"] for r in read_records(place / runs.METRICS) if r["kind"] == "eval_only"]
    replace(trial, score=found[-1]).write()


def keep_weights_only(run: Path) -> None:
    """Delete what no reader of a trial needs: all but the weights of its best checkpoint."""
    checkpoints.sweep(LocalStorage(run))
    (run / runs.STOP).unlink(missing_ok=True)
    best = checkpoints.best(LocalStorage(run), lambda *_: None)
    for directory in checkpoints.candidates(run):
        with contextlib.suppress(OSError):
            if best and directory == best.directory:
                checkpoints.drop_optimizer(LocalStorage(directory))
            else:
                checkpoints.remove(directory)
