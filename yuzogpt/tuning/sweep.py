"""A sweep is one directory, and the same command resumes it.

It holds:

    settings.yaml    what all trials have in common, and the search space
    trials/0000/     a run for each trial (trials.py); 0000 has the settings' own values
    final/           default and winner, with fresh seeds, scored on what the search never saw
    sweep.json       the outcome
    best.yaml        the winner: `yuzogpt train best.yaml`
    *.png            plots.py
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
from yuzogpt.config import TrainSettings, TuneSettings, WorkerSettings, with_changes
from yuzogpt.config.renamed import with_current_names
from yuzogpt.config.resolve import changed_frozen, load_yaml, to_yaml
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
RAY_DIR_PREFIX = ".tune-"  # of Ray Tune's own directory, which is deleted when the command ends
# Of names that a sweep may leave without settings.yaml if it is cut off.
LEFTOVER_PREFIXES = (LEASE, RAY_DIR_PREFIX)
# Settings that a resumed run may change, but without which losses are not comparable.
COMPARABLE = (
    ("schedule", "max_iters"),
    ("batch", "batch_size"),
    ("batch", "gradient_accumulation_steps"),
    ("evaluation", "eval_iters"),
    ("evaluation", "eval_interval"),
    ("device", "dtype"),
)
BASELINE = "0000"  # the name of the trial with the settings' own values


@dataclass(frozen=True)
class Sweep:
    """A search space around settings, and the directory of its trials."""

    settings: TuneSettings
    space: Space
    corpus: str = ""  # its fingerprint

    @property
    def directory(self) -> Path:
        """The sweep's out_dir."""
        return Path(self.settings.run.out_dir)

    @property
    def base(self) -> TrainSettings:
        """The settings that all trials have in common."""
        # Unset fields stay unset: a pretrained model brings its own shape.
        nested = self.settings.model_dump(exclude_unset=True, exclude={"sweep"})
        return TrainSettings.model_validate(nested)

    def trial_settings(self, trial: Trial) -> TrainSettings:
        """Return the settings of a trial, which evaluates on the first half of the val split only.

        UserError if training does not accept its values in this combination.
        """
        try:
            chosen = with_values(self.base, trial.values)
        except UserError as error:
            raise UserError(f"{format_values(trial.values)}: {error}") from None
        changes = {
            "run.out_dir": str(trial.directory),
            "run.overwrite": False,
            "run.storage": "",
            "evaluation.val_part": "first",
            "checkpoint.keep_last": 1,
            "checkpoint.keep_best": 1,
            "workers.warm_spare_workers": False,
        }
        return with_changes(chosen, changes)

    def checked(self) -> "Sweep":
        """Raise UserError for every mistake that can be found before Ray starts.

        Return the sweep with the corpus's vocabulary and fingerprint.
        """
        workers_of(self.settings.workers)
        for is_set, message in (
            (
                self.settings.run.init_from == "resume",
                "--init_from=resume: every trial starts at step 0; leave it out",
            ),
            (self.settings.evaluation.eval_only, "--eval_only: a sweep trains; leave it out"),
            (
                self.settings.evaluation.eval_tasks,
                "--eval_tasks: trials are not evaluated on benchmarks; train best.yaml with it",
            ),
            (
                self.settings.log.all_loggers,
                f"--loggers, --wandb_log: a sweep's trials are not sent; {OUTCOME} has them all",
            ),
        ):
            if is_set:
                raise UserError(message)
        if self.settings.sweep.search_algorithm == "grid":
            self.space.grid()
        requirements.check_start_is_kept(self.settings.run)
        example = self._check({})
        for parameter in self.space.parameters:
            for value in parameter.values:
                self._check(self.space.fitting(self.base, parameter.key, value))
        sweep = replace(
            self,
            settings=self.settings.model_copy(update={"model": example.settings.model}),
            corpus=example.corpus.fingerprint,
        )
        sweep.check_is_ours()
        return sweep

    def _check(self, values: Values) -> runs.ResolvedRun:
        """Return the run of a trial with these values; UserError if it cannot start."""
        example = Trial(self.directory / TRIALS / "example", "example", values)
        return runs.check(self.trial_settings(example))

    def check_is_ours(self) -> None:
        """Raise UserError if the directory is another sweep's, or a run's."""
        name, path = self.settings.run.out_dir, self.directory / runs.SETTINGS
        if scheme_of(name):
            raise UserError(f"--out_dir={name}: a sweep needs a directory that all nodes share")
        if not path.exists():
            entries = self.directory.iterdir() if self.directory.exists() else ()
            foreign = next((entry.name for entry in entries if not is_leftover(entry)), None)
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
                "--overwrite to start over"
            )

    def differences(self, written: bytes, origin: str) -> list[str]:
        """Return how this sweep differs from the one that wrote a settings.yaml."""
        now = self.settings.model_dump()
        content = load_yaml(written, origin, yaml.SafeLoader)
        before = with_current_names(checked(content, dict[str, dict[str, Any]], origin))
        changes = changed_frozen(before, self.settings)
        for section, leaf in COMPARABLE:
            then = before.get(section, {}).get(leaf, now[section][leaf])
            if then != now[section][leaf]:
                changes.append(f"{leaf}: {then} -> {now[section][leaf]}")
        if before.get("search") != self.space.describe():
            changes.append(f"search: {before.get('search')} -> {self.space.describe()}")
        if self._corpus_line().encode() not in written:
            changes.append("the corpus is another one")
        return changes

    def _corpus_line(self) -> str:
        return f"# Of the corpus {self.corpus}.\n"

    @contextlib.contextmanager
    def hold_directory(self) -> Iterator[None]:
        """Hold the directory for this command; do not delete yet the sweep that it replaces."""
        with Lease(LocalStorage(self.directory)):
            for leftover in self.directory.glob(f"{RAY_DIR_PREFIX}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            if not self.replaces_another:
                self.begin()
            yield

    @property
    def replaces_another(self) -> bool:
        """Whether `begin` deletes a sweep: on --overwrite, or if a killed command began to."""
        head = runs.header(LocalStorage(self.directory))
        return self.settings.run.overwrite or runs.DELETING in head

    def begin(self) -> None:
        """Write settings.yaml, and delete a replaced sweep first: call it when trials can start."""
        if self.replaces_another:
            self._write_settings(runs.DELETING)
            self.clear()
        self._write_settings()

    def _write_settings(self, state: str = "") -> None:
        settings = to_yaml(with_changes(self.settings, {"run.overwrite": False}))
        content = SIGNATURE + state + self._corpus_line() + settings + self.space.to_yaml()
        write_durably(self.directory / runs.SETTINGS, content.encode())

    def clear(self) -> None:
        """Delete only what earlier sweeps wrote here; settings.yaml stays."""
        for folder in (TRIALS, FINAL):
            for trial in (self.directory / folder).glob(f"*/{TRIAL}"):
                shutil.rmtree(trial.parent)
        for name in (OUTCOME, BEST, *PLOTS):
            (self.directory / name).unlink(missing_ok=True)

    def trials(self, folder: str = TRIALS) -> list[Trial]:
        """Return all trials that were started, by name."""
        trials = (Trial.read(path.parent) for path in (self.directory / folder).glob(f"*/{TRIAL}"))
        return sorted((trial for trial in trials if trial), key=lambda trial: trial.name)


def is_leftover(path: Path) -> bool:
    """Return True if a sweep that was cut off may have left this, so that it is not the user's."""
    if path.name in (TRIALS, FINAL) and path.is_dir():
        return all((trial / TRIAL).is_file() for trial in path.iterdir())
    return path.name.startswith(LEFTOVER_PREFIXES)


def workers_of(workers: WorkerSettings) -> int:
    """Return the number of workers of each trial; UserError if it is a range or 0."""
    least, most = workers.span(auto=1)
    if least != most:
        raise UserError(f"--num_workers={workers.num_workers}: a sweep needs one number")
    if not least:
        raise UserError("--num_workers=0: a sweep needs Ray; leave it out")
    return least


@dataclass(frozen=True)
class Result:
    """A trial and its losses."""

    trial: Trial
    evaluations: list[tuple[int, float]]

    @classmethod
    def of(cls, trial: Trial) -> "Result":
        """Read the losses of a trial's run, but for that at step 0."""
        return cls(trial, [(step, loss) for step, loss in trial.evaluations() if step > 0])

    @property
    def best(self) -> tuple[float, int]:
        """The lowest loss and its step."""
        return min(((loss, step) for step, loss in self.evaluations), default=(math.inf, 0))


def winner(results: list[Result]) -> Result | None:
    """Return the trial with the lowest loss among those that did not fail; of equals the first."""
    valid = [
        result
        for result in results
        if result.trial.state in ("finished", "stopped") and math.isfinite(result.best[0])
    ]
    return min(valid, key=lambda result: result.best[0], default=None)


def best_yaml(sweep: Sweep, values: Values) -> str:
    """Return the winner as a preset."""
    chosen = with_values(sweep.base, values)
    out_dir = f"{sweep.directory.name}-best"
    changes = {"run.out_dir": out_dir, "run.overwrite": False, "run.storage": ""}
    head = "# The winner of a sweep: `yuzogpt train best.yaml`.\n"
    return head + to_yaml(with_changes(chosen, changes))


def comparison(finals: list[Trial], best: str) -> dict[str, dict[str, float]]:
    """Return for default and tuned: mean and spread (standard deviation) of their scores."""
    compared = {}
    for side, name in (("default", BASELINE), ("tuned", best)):
        all_scores = [trial.score for trial in finals if trial.name.partition("-")[0] == name]
        scores = [score for score in all_scores if score is not None]
        if scores:
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            mean = statistics.fmean(scores)
            compared[side] = {"mean": mean, "spread": spread, "seeds": len(scores)}
            compared[side]["without"] = len(all_scores) - len(scores)  # seeds that failed
    return compared


def collect_outcome(sweep: Sweep) -> Outcome:
    """Return the results so far, as in sweep.json."""
    results = [Result.of(trial) for trial in sweep.trials()]
    best, finals = winner(results), sweep.trials(FINAL)
    return {
        "search": sweep.space.describe(),
        "best": best.trial.name if best else None,
        "trials": [
            {
                "name": result.trial.name,
                "values": result.trial.values,
                "state": result.trial.state,
                "error": result.trial.error,
                "best_val_loss_estimate": finite(result.best[0]),
                "best_step": result.best[1],
                "evaluations": [[step, finite(loss)] for step, loss in result.evaluations],
            }
            for result in results
        ],
        "final": [{"name": t.name, "state": t.state, "score": t.score} for t in finals],
        "comparison": comparison(finals, best.trial.name) if best else {},
    }


def finite(loss: float) -> float | None:
    """Return the loss; None if it is not finite, for JSON."""
    return loss if math.isfinite(loss) else None


def write_outcome(sweep: Sweep) -> Outcome:
    """Write sweep.json, and best.yaml once there is a best trial."""
    outcome = collect_outcome(sweep)
    write_durably(sweep.directory / OUTCOME, to_json(outcome))
    for trial in outcome["trials"]:
        if trial["name"] == outcome["best"]:
            content = best_yaml(sweep, trial["values"])
            write_durably(sweep.directory / BEST, content.encode())
    return outcome
