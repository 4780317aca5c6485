"""Which values are tried next: Optuna's samplers, asked for one trial after the other.

The first trial has the settings' own values. A trial's values depend on the seed, on its number and
on the losses that are known when it is asked for. So a sweep that was cut off resumes with the
trials that it would have tried; those that it already has keep their values.
"""

import optuna

from yuzogpt.storage.untrusted import DamagedFile
from yuzogpt.tuning.space import Values
from yuzogpt.tuning.sweep import BASELINE, FINAL, TRIALS, Outcome, Sweep, collect_outcome
from yuzogpt.tuning.trials import SEED, TRIAL, Trial

STARTUP_TRIALS = 5  # drawn at random before TPE uses their losses


class Search:
    """Hands out trials with `ask`, and is told their losses with `tell`."""

    def __init__(self, sweep: Sweep) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.sweep, self.directory = sweep.settings.sweep, sweep.directory / TRIALS
        self.space = sweep.space
        self.study = optuna.create_study(direction="minimize")
        self.asked = 0  # how many trials were handed out
        self.optuna_trials: dict[str, optuna.Trial] = {}  # by the name of ours
        own = self.space.defaults(sweep.base)
        self.fixed = [own]  # values that no sampler draws
        if self.sweep.search_algorithm == "grid":
            self.fixed += [values for values in self.space.grid() if values != own]

    @property
    def count(self) -> int:
        """How many trials there will be."""
        return len(self.fixed) if self.sweep.search_algorithm == "grid" else self.sweep.num_samples

    def ask(self) -> Trial | None:
        """Return the next trial; None when all were handed out."""
        if self.asked >= self.count:
            return None
        name = f"{self.asked:04}"
        trial = Trial.read(self.directory / name)
        if trial:
            if trial.values.keys() != self.fixed[0].keys():
                path = trial.directory / TRIAL
                raise DamagedFile(f"{path}: values: not those of this search; delete it")
            self._draw(name, trial.values)
        else:
            fixed = self.fixed[self.asked] if self.asked < len(self.fixed) else None
            trial = Trial(self.directory / name, name, self._draw(name, fixed))
            trial.write()
        self.asked += 1
        return trial

    def _draw(self, name: str, fixed: Values | None) -> Values:
        """Return a trial's values: the fixed ones, or what the sampler draws."""
        if fixed and not self.space.has(fixed):
            return fixed  # the settings' own, which the sampler could not have drawn
        seed = (self.sweep.search_seed + self.asked) % 2**32
        if self.sweep.search_algorithm == "tpe":
            self.study.sampler = optuna.samplers.TPESampler(
                n_startup_trials=STARTUP_TRIALS, constant_liar=True, seed=seed
            )
        else:
            self.study.sampler = optuna.samplers.RandomSampler(seed)
        if fixed:
            self.study.enqueue_trial(fixed)
        trial = self.study.ask(self.space.distributions())
        self.optuna_trials[name] = trial
        return trial.params

    def tell(self, name: str, loss: float | None) -> None:
        """Record how a trial ended: its best loss, None if it failed."""
        trial = self.optuna_trials.get(name)
        if trial and loss is None:
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        elif trial:
            self.study.tell(trial, loss)


def is_done(sweep: Sweep) -> bool:
    """Return True if nothing of a sweep is left to do."""
    count = Search(sweep).count
    trials = sweep.trials()[:count]
    if len(trials) < count or not all(trial.is_done for trial in trials):
        return False
    finals = Finals.of(sweep, collect_outcome(sweep))
    return not finals or all(
        trial.is_done and (trial.state != "finished" or trial.score is not None)
        for trial in finals.trials
    )


class Finals:
    """The settings' own values and the winner's, each with seeds that no trial had."""

    def __init__(self, trials: list[Trial]) -> None:
        self.trials, self.count = trials, len(trials)  # in the order in which they run
        self.left = iter(trials)

    @classmethod
    def of(cls, sweep: Sweep, outcome: Outcome) -> "Finals | None":
        """Return the runs to compare; None if the settings' own values won, or no trial did."""
        by_name = {trial["name"]: trial["values"] for trial in outcome["trials"]}
        best, offsets = outcome["best"], range(1, sweep.settings.sweep.final_seeds + 1)
        if not offsets or best in (None, BASELINE):
            return None
        trials = []
        for offset in offsets:
            seed = sweep.base.run.seed + offset
            for side in (BASELINE, best):
                name = f"{side}-{seed}"
                directory = sweep.directory / FINAL / name
                values = {**by_name[side], SEED: seed}
                trials.append(Trial.read(directory) or Trial(directory, name, values))
        return cls(trials)

    def ask(self) -> Trial | None:
        """Return the next trial; None when all were handed out."""
        trial = next(self.left, None)
        if trial:
            trial.write()
        return trial

    def tell(self, name: str, loss: float | None) -> None:
        """Do nothing: no later trial depends on it."""
