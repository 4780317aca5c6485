"""One trial: a run in `DIR/trials/0007/`, its values, and how it ended.

Beside the run's files is all that a sweep resumes from:

    trial.json    name, values, state: waiting, finished, stopped (by the scheduler) or failed

This runs in the trial's process. Ray is behind the callables `report` and `train` only.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from yuzogpt import checkpoints, runs
from yuzogpt.config import TrainSettings, with_changes
from yuzogpt.config.renamed import current_name
from yuzogpt.errors import InUse, RunFailed, UserError, is_out_of_memory
from yuzogpt.runs.event_log import Listener, Record, read_records
from yuzogpt.runs.stop_request import ask_to_stop
from yuzogpt.storage.atomic_files import to_json, write_durably
from yuzogpt.storage.run_storage import LocalStorage
from yuzogpt.storage.untrusted import DamagedFile, Untrusted, checked, read_json
from yuzogpt.tuning.space import SEARCHABLE

TRIAL = "trial.json"
SEED = "run.seed"  # which finals set
SCHEDULER = "the sweep's scheduler"  # the reason given to a run that falls behind others

State = Literal["waiting", "finished", "stopped", "failed"]
# Takes the step and the best loss so far; returns whether the trial is to continue.
Report = Callable[[int, float], bool]
# Trains; returns the reason why the run stopped early, if it did.
Train = Callable[[TrainSettings, Listener], str | None]


class TrialFile(Untrusted):
    """The content of trial.json."""

    name: str
    values: dict[str, bool | int | float | str | None]
    state: State
    error: str = ""
    score: float | None = None


class Evaluation(Untrusted):
    """The fields of an evaluation's record that are read."""

    step: int
    val_loss_estimate: float | None

    @property
    def loss(self) -> float:
        """The loss; infinity if it is not finite."""
        loss = self.val_loss_estimate
        return math.inf if loss is None or not math.isfinite(loss) else loss


@dataclass(frozen=True)
class Trial:
    """A trial, as in trial.json."""

    directory: Path
    name: str
    values: dict[str, Any] = field(default_factory=dict)  # by section.leaf
    state: State = "waiting"
    error: str = ""
    score: float | None = None  # loss on the half of the val split that the search never saw

    @property
    def is_done(self) -> bool:
        return self.state != "waiting"

    def write(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        content = {key: value for key, value in asdict(self).items() if key != "directory"}
        write_durably(self.directory / TRIAL, to_json(content))

    @classmethod
    def read(cls, directory: Path) -> "Trial | None":
        """Read trial.json; None if there is none."""
        path = directory / TRIAL
        try:
            content = read_json(path, TrialFile)
            if content.name != directory.name:  # names become paths
                raise DamagedFile(f"{path}: name: {content.name!r}, in {directory.name}")
            for key in content.values:
                if key.partition(".")[0] not in SEARCHABLE and key != SEED:
                    raise DamagedFile(f"{path}: values: {key!r} is not searched")
        except FileNotFoundError:
            return None
        except DamagedFile as error:
            raise DamagedFile(f"{error}; delete it, and the trial runs again") from None
        values = {current_name(key): value for key, value in content.values.items()}
        return cls(directory, **{**dict(content), "values": values})

    def evaluations(self) -> list[tuple[int, float]]:
        """Return the steps and losses of its evaluations."""
        path = self.directory / runs.METRICS
        records = (r for r in read_records(path) if r.get("kind") == "evaluation")
        evaluations = (checked(record, Evaluation, str(path)) for record in records)
        return [(evaluation.step, evaluation.loss) for evaluation in evaluations]


class Progress:
    """A listener for a run's records that reports each evaluation.

    If a report returns False, the trial is no longer wanted, and the run is asked to stop. After
    its last step only the end is left of it, which it may reach.
    """

    def __init__(self, run: Path, report: Report, max_iters: int) -> None:
        self.run, self.report, self.max_iters = run, report, max_iters
        self.best, self.is_wanted, self.made_all_steps = math.inf, True, False

    def __call__(self, record: Record) -> None:
        """Report a record's loss, if it is of an evaluation."""
        # At step 0 nothing is tuned yet, and there is no checkpoint.
        if record["kind"] == "evaluation" and record["step"] > 0 and self.is_wanted:
            evaluation = checked(record, Evaluation, str(self.run / runs.METRICS))
            self.best = min(self.best, evaluation.loss)
            self.is_wanted = self.report(record["step"], self.best)
            self.made_all_steps = record["step"] >= self.max_iters
            if not (self.is_wanted or self.made_all_steps):
                ask_to_stop(LocalStorage(self.run), SCHEDULER)


def run_trial(settings: TrainSettings, trial: Trial, report: Report, train: Train) -> bool:
    """Run a trial, or what is left of it; return False if the scheduler stopped it.

    A trial that has ended is only reported.
    """
    progress = Progress(trial.directory, report, settings.schedule.max_iters)
    progress.is_wanted = report(0, math.inf)  # Tune needs a report even of one that fails at once
    # An earlier attempt's losses are reported again: the scheduler compares them.
    for record in read_records(trial.directory / runs.METRICS):
        if progress.is_wanted:
            progress(record)
    if trial.is_done:
        return progress.is_wanted
    state: State = "stopped"
    error = ""
    if progress.is_wanted or progress.made_all_steps:
        try:
            reason = train(settings, progress)
        except InUse:
            raise  # Tune tries again
        except (RunFailed, UserError) as problem:  # another attempt would fail in the same way
            state, error = "failed", str(problem)
        except Exception as problem:
            if not is_out_of_memory(problem):
                raise
            state, error = "failed", "out of memory"
        else:
            if reason not in (None, SCHEDULER):
                return True  # the user stopped the run; the same command resumes it
            state = "stopped" if reason else "finished"
    conclude(trial, state, error)
    return progress.is_wanted


def conclude(trial: Trial, state: State, error: str = "") -> None:
    """Write how a trial ended, and delete what readers of its run do not need."""
    replace(trial, state=state, error=error).write()
    keep_weights_only(trial.directory)


def fail_before_start(trial: Trial, why: str, report: Report) -> None:
    """Write that a trial cannot start, unless it has ended; Tune needs a report of each."""
    report(0, math.inf)
    if not trial.is_done:
        conclude(trial, "failed", why)


def score_trial(settings: TrainSettings, directory: Path, train: Train) -> None:
    """Write the loss of a finished trial's best weights on the second half of the val split.

    The evaluation is a run of its own, on as many workers.
    """
    trial = Trial.read(directory)
    if not trial or trial.state != "finished" or trial.score is not None:
        return
    out_dir = directory / "score"
    changes = {
        "run.init_from": str(directory),
        "run.out_dir": str(out_dir),
        "run.overwrite": True,
        "evaluation.val_part": "second",
        "evaluation.eval_only": True,
    }
    train(with_changes(settings, changes), lambda _: None)
    records = read_records(out_dir / runs.METRICS)
    losses = [record["val_loss"] for record in records if record["kind"] == "eval_only"]
    replace(trial, score=losses[-1]).write()


def keep_weights_only(run: Path) -> None:
    """Delete all but the weights of the best checkpoint: no reader of a trial needs the rest."""
    checkpoints.sweep(LocalStorage(run))
    (run / runs.STOP).unlink(missing_ok=True)
    best = checkpoints.best(LocalStorage(run), lambda *_: None)
    for directory in checkpoints.candidates(run):
        with contextlib.suppress(OSError):
            if best and directory == best.directory:
                checkpoints.drop_optimizer(LocalStorage(directory))
            else:
                checkpoints.remove(directory)
