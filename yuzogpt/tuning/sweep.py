"""A sweep is one directory: the same command goes on with it.

    settings.yaml    what all trials have in common, and the search space
    trials/0000/     a run for each trial (trials.py); 0000 has the settings' own values
    final/           default and winner, with fresh seeds, scored on what the search never saw
    sweep.json       all that came out
    best.yaml        the winner: `yuzogpt train best.yaml`
    *.png            plots.py

In: settings, space and directory. Out: the sweep's place on disk, and its outcome.
"""

import contextlib
import math
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from yuzogpt import runs
from yuzogpt.config import TrainSettings, TuneSettings
from yuzogpt.config.resolve import changed_frozen, load_yaml, to_yaml
from yuzogpt.data.remote import open_anywhere
from yuzogpt.errors import UserError
from yuzogpt.runs import requirements
from yuzogpt.storage.atomic_files import to_json, write_durably
from yuzogpt.storage.filesystems import scheme_of
from yuzogpt.storage.lease import LEASE, Lease
from yuzogpt.storage.run_storage import LocalStorage
from yuzogpt.storage.untrusted import checked, read_file
from yuzogpt.tuning.space import Space, Values, with_values
from yuzogpt.tuning.table import format_values
from yuzogpt.tuning.trials import TRIAL, Trial

SIGNATURE = "# Written by `yuzogpt tune`: what all trials have in common, and the search space.\n"
TRIALS, FINAL, OUTCOME, BEST = "trials", "final", "sweep.json", "best.yaml"
Outcome = dict[str, Any]  # what sweep.json holds
PLOTS = ("losses.png", "parameters.png", "importance.png")
PRIVATE = ".tune-"  # begins the name of Ray Tune's own directory, which ends with the command
# Beginnings of names that a sweep which was cut off may have left without settings.yaml.
OWN = (LEASE, PRIVATE)
# Settings that a run may change when it goes on, but without which losses do not compare.
COMPARED = (
    ("schedule", "max_iters"),
    ("batch", "batch_size"),
    ("batch", "gradient_accumulation_steps"),
    ("evaluation", "eval_iters"),
    ("evaluation", "eval_interval"),
    ("device", "dtype"),
)
FIRST = "0000"  # the trial with the settings' own values


@dataclass(frozen=True)
class Sweep:
    """What is searched, and where it is written."""

    settings: TuneSettings
    space: Space
    corpus: str = ""  # the fingerprint of the corpus that trials learn from

    @property
    def directory(self) -> Path:
        """The sweep's out_dir."""
        return Path(self.settings.run.out_dir)

    @property
    def base(self) -> TrainSettings:
        """What all trials have in common."""
        # What the user did not set is not set: a pretrained model's shape is its own.
        nested = self.settings.model_dump(exclude_unset=True, exclude={"sweep"})
        return TrainSettings.model_validate(nested)

    def settings_of(self, trial: Trial) -> TrainSettings:
        """Return what a trial trains with; it sees the first half of the val split alone.

        UserError if training does not take its values in this combination.
        """
        try:
            chosen = with_values(self.base, trial.values)
        except UserError as error:
            raise UserError(f"{format_values(trial.values)}: {error}") from None
        run = chosen.run.model_copy(
            update={"out_dir": str(trial.directory), "overwrite": False, "storage": ""}
        )
        look = chosen.evaluation.model_copy(update={"val_part": "first"})
        kept = chosen.checkpoint.model_copy(update={"keep_last": 1, "keep_best": 1})
        workers = chosen.workers.model_copy(update={"spare_workers": False})
        return chosen.model_copy(
            update={"run": run, "evaluation": look, "checkpoint": kept, "workers": workers}
        )

    def checked(self) -> "Sweep":
        """Find every mistake that can be found before Ray starts.

        Returns the sweep with the corpus's vocabulary.
        """
        workers_of(self.settings)
        for refused, why in (
            (self.settings.run.init_from == "resume", "--init_from=resume: trials begin anew"),
            (self.settings.evaluation.eval_only, "--eval_only: a sweep trains"),
            (
                self.settings.evaluation.eval_tasks,
                "--eval_tasks: trials are not evaluated on benchmarks; train best.yaml with it",
            ),
        ):
            if refused:
                raise UserError(why)
        if self.settings.log.wandb_log:
            raise UserError(f"--wandb_log: a sweep's trials are not sent; {OUTCOME} has them all")
        if self.settings.sweep.search_algorithm == "grid":
            self.space.grid()
        requirements.check_start_is_kept(self.settings)
        model = self._check({}).model
        for parameter in self.space.parameters:
            for value in parameter.values:
                self._check(self.space.fitting(self.base, parameter.key, value))
        sweep = replace(
            self,
            settings=self.settings.model_copy(update={"model": model}),
            corpus=open_anywhere(self.settings.data.data_dir).fingerprint,
        )
        sweep.refuse_other()
        return sweep

    def _check(self, values: Values) -> TrainSettings:
        """Raise UserError if no trial could train with these values."""
        example = Trial(self.directory / TRIALS / "example", "example", values)
        return runs.check(self.settings_of(example))[0]

    def refuse_other(self) -> None:
        """Raise UserError if the directory is another sweep's, or a run's."""
        name, path = self.settings.run.out_dir, self.directory / runs.SETTINGS
        if scheme_of(name):
            raise UserError(f"--out_dir={name}: a sweep wants a directory that all nodes share")
        if not path.exists():
            found = self.directory.iterdir() if self.directory.exists() else ()
            foreign = next((one.name for one in found if not is_leftover(one)), None)
            if foreign:
                raise UserError(
                    f"--out_dir={name}: holds something else, {foreign}; choose another"
                )
            return
        written = read_file(path)
        if runs.header(LocalStorage(self.directory))[:1] != [SIGNATURE]:
            raise UserError(f"--out_dir={name}: its {runs.SETTINGS} is not of a sweep")
        if self.replaces_another:
            return
        differences = self.differences(written, str(path))
        if differences:
            raise UserError(
                f"{name}: another sweep: {'; '.join(differences)}; choose another --out_dir, or "
                "--overwrite to start anew"
            )

    def differences(self, written: bytes, origin: str) -> list[str]:
        """Return what makes this another sweep than the one of a settings.yaml."""
        now = self.settings.model_dump()
        before = checked(
            load_yaml(written, origin, yaml.SafeLoader), dict[str, dict[str, Any]], origin
        )
        found = changed_frozen(before, self.settings)
        for section, leaf in COMPARED:
            then = before.get(section, {}).get(leaf, now[section][leaf])
            if then != now[section][leaf]:
                found.append(f"{leaf}: {then} -> {now[section][leaf]}")
        if before.get("search") != self.space.describe():
            found.append(f"search: {before.get('search')} -> {self.space.describe()}")
        if self._of_corpus().encode() not in written:
            found.append("the corpus is another one")
        return found

    def _of_corpus(self) -> str:
        return f"# Of the corpus {self.corpus}.\n"

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the directory for this command alone; a sweep that it replaces is still whole."""
        with Lease(LocalStorage(self.directory)):
            for leftover in self.directory.glob(f"{PRIVATE}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            if not self.replaces_another:
                self.begin()
            yield

    @property
    def replaces_another(self) -> bool:
        """Whether `begin` is to delete what is here: as asked, or as a killed command began to."""
        head = runs.header(LocalStorage(self.directory))
        return self.settings.run.overwrite or runs.DELETING in head

    def begin(self) -> None:
        """Make the directory this sweep's; once trials can start, if that deletes another's."""
        if self.replaces_another:
            self._write_settings(runs.DELETING)
            self.clear()
        self._write_settings()

    def _write_settings(self, state: str = "") -> None:
        kept = self.settings.run.model_copy(update={"overwrite": False})
        settings = to_yaml(self.settings.model_copy(update={"run": kept}))
        content = SIGNATURE + state + self._of_corpus() + settings + self.space.to_yaml()
        write_durably(self.directory / runs.SETTINGS, content.encode())

    def clear(self) -> None:
        """Delete what earlier sweeps wrote here, and nothing else; settings.yaml stays."""
        for folder in (TRIALS, FINAL):
            for trial in (self.directory / folder).glob(f"*/{TRIAL}"):
                shutil.rmtree(trial.parent)
        for name in (OUTCOME, BEST, *PLOTS):
            (self.directory / name).unlink(missing_ok=True)

    def trials(self, folder: str = TRIALS) -> list[Trial]:
        """Return all trials that were begun, in their order."""
        found = (Trial.read(path.parent) for path in (self.directory / folder).glob(f"*/{TRIAL}"))
        return sorted((trial for trial in found if trial), key=lambda trial: trial.name)


def is_leftover(path: Path) -> bool:
    """Return whether a sweep that was cut off may have left this: no file of the user's."""
    if path.name in (TRIALS, FINAL) and path.is_dir():
        return all((trial / TRIAL).is_file() for trial in path.iterdir())
    return path.name.startswith(OWN)


def workers_of(settings: TrainSettings) -> int:
    """Return how many workers a trial has; UserError unless that is one number."""
    least, most = settings.workers.span(auto=1)
    if least != most:
        raise UserError(f"--num_workers={settings.workers.num_workers}: a trial wants one number")
    if not least:
        raise UserError("--num_workers=0: a sweep needs Ray; leave it out")
    return least


@dataclass(frozen=True)
class Result:
    """What came out of a trial."""

    trial: Trial
    evaluations: list[tuple[int, float]]

    @classmethod
    def of(cls, trial: Trial) -> "Result":
        """Read it off the trial's run."""
        return cls(trial, [(step, loss) for step, loss in trial.evaluations() if step > 0])

    @property
    def best(self) -> tuple[float, int]:
        """The lowest loss, and at which step."""
        return min(((loss, step) for step, loss in self.evaluations), default=(math.inf, 0))


def winner(results: list[Result]) -> Result | None:
    """Return the best of those that did not fail; the first of equals."""
    sound = [
        one
        for one in results
        if one.trial.state in ("finished", "stopped") and math.isfinite(one.best[0])
    ]
    return min(sound, key=lambda one: one.best[0], default=None)


def best_yaml(sweep: Sweep, values: Values) -> str:
    """Return the winner as a preset."""
    chosen = with_values(sweep.base, values)
    run = chosen.run.model_copy(
        update={"out_dir": f"{sweep.directory.name}-best", "overwrite": False, "storage": ""}
    )
    return "# The winner of a sweep: `yuzogpt train best.yaml`.\n" + to_yaml(
        chosen.model_copy(update={"run": run})
    )


def comparison(finals: list[Trial], best: str) -> dict[str, dict[str, float]]:
    """Return for default and tuned: mean and spread (standard deviation) of their scores."""
    compared = {}
    for side, name in (("default", FIRST), ("tuned", best)):
        mine = [trial.score for trial in finals if trial.name.partition("-")[0] == name]
        scores = [score for score in mine if score is not None]
        if scores:
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            mean = statistics.fmean(scores)
            compared[side] = {"mean": mean, "spread": spread, "seeds": len(scores)}
            compared[side]["without"] = len(mine) - len(scores)  # seeds that failed
    return compared


def outcome(sweep: Sweep) -> Outcome:
    """Return all that came out so far, as sweep.json holds it."""
    results = [Result.of(trial) for trial in sweep.trials()]
    best, finals = winner(results), sweep.trials(FINAL)
    return {
        "search": sweep.space.describe(),
        "best": best.trial.name if best else None,
        "trials": [
            {
                "name": one.trial.name,
                "values": one.trial.values,
                "state": one.trial.state,
                "error": one.trial.error,
                "best_val_loss_estimate": finite(one.best[0]),
                "best_step": one.best[1],
                "evaluations": [[step, finite(loss)] for step, loss in one.evaluations],
            }
            for one in results
        ],
        "final": [{"name": one.name, "state": one.state, "score": one.score} for one in finals],
        "comparison": comparison(finals, best.trial.name) if best else {},
    }


def finite(loss: float) -> float | None:
    """Return a loss as JSON has it."""
    return loss if math.isfinite(loss) else None


def write_outcome(sweep: Sweep) -> Outcome:
    """Write sweep.json, and best.yaml once there is a best trial."""
    found = outcome(sweep)
    write_durably(sweep.directory / OUTCOME, to_json(found))
    for one in found["trials"]:
        if one["name"] == found["best"]:
            content = best_yaml(sweep, one["values"])
            write_durably(sweep.directory / BEST, content.encode())
    return found
