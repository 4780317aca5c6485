"""Which values are tried next: Optuna's samplers, asked for one trial after the other.

In: a space, and the losses of the trials so far. Out: trials, each with its directory. The first
has the settings' own values. What a trial gets depends on the seed, on its number and on the losses
that are known by then, so that a sweep goes on, after whatever happened, with what it would have
tried; the trials that it has already come first, each with the values that it had.
"""

import optuna

from yuzogpt.storage.untrusted import DamagedFile
from yuzogpt.tuning.space import Values
from yuzogpt.tuning.sweep import FINAL, FIRST, TRIALS, Outcome, Sweep, outcome
from yuzogpt.tuning.trials import SEED, TRIAL, Trial

RANDOM_FIRST = 5  # trials, before TPE has something to learn from


class Search:
    """Gives out trials; learns from their losses."""

    def __init__(self, sweep: Sweep) -> None:
        """Trials that the sweep has already have their values."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.sweep, self.directory = sweep.settings.sweep, sweep.directory / TRIALS
        self.space = sweep.space
        self.study = optuna.create_study(direction="minimize")
        self.given: list[Trial] = []
        self.asked: dict[str, optuna.Trial] = {}
        own = self.space.defaults(sweep.base)
        self.fixed = [own]
        if self.sweep.search_algorithm == "grid":
            self.fixed += [values for values in self.space.grid() if values != own]

    @property
    def count(self) -> int:
        """How many trials there will be."""
        return len(self.fixed) if self.sweep.search_algorithm == "grid" else self.sweep.num_samples

    def next(self) -> Trial | None:
        """Return the next trial; None when all were given out."""
        number = len(self.given)
        if number >= self.count:
            return None
        name = f"{number:04}"
        trial = Trial.read(self.directory / name)
        if trial:
            if trial.values.keys() != self.fixed[0].keys():
                path = trial.directory / TRIAL
                raise DamagedFile(f"{path}: values: not those of this search; delete it")
            self._ask(number, trial.values)
        else:
            fixed = self.fixed[number] if number < len(self.fixed) else None
            trial = Trial(self.directory / name, name, self._ask(number, fixed))
            trial.write()
        self.given.append(trial)
        return trial

    def _ask(self, number: int, fixed: Values | None) -> Values:
        """Return a trial's values: the fixed ones, or what the sampler draws."""
        if fixed and not self.space.has(fixed):
            return fixed  # the settings' own, which the sampler could not have drawn
        seed = (self.sweep.search_seed + number) % 2**32
        if self.sweep.search_algorithm == "tpe":
            self.study.sampler = optuna.samplers.TPESampler(
                n_startup_trials=RANDOM_FIRST, constant_liar=True, seed=seed
            )
        else:
            self.study.sampler = optuna.samplers.RandomSampler(seed)
        if fixed:
            self.study.enqueue_trial(fixed)
        asked = self.study.ask(self.space.distributions())
        self.asked[f"{number:04}"] = asked
        return asked.params

    def learn(self, name: str, loss: float | None) -> None:
        """Take in how a trial ended: its best loss; None if it failed."""
        asked = self.asked.get(name)
        if asked and loss is None:
            self.study.tell(asked, state=optuna.trial.TrialState.FAIL)
        elif asked:
            self.study.tell(asked, loss)


def is_over(sweep: Sweep) -> bool:
    """Tell whether nothing of a sweep is left to do."""
    count = Search(sweep).count
    trials = sweep.trials()[:count]
    if len(trials) < count or not all(trial.is_over for trial in trials):
        return False
    finals = Finals.of(sweep, outcome(sweep))
    return not finals or all(
        trial.is_over and (trial.state != "finished" or trial.score is not None)
        for trial in finals.trials
    )


class Finals:
    """The settings' own values and the winner's, each with seeds that no trial had."""

    def __init__(self, trials: list[Trial]) -> None:
        """`trials`: in which order they are run."""
        self.trials, self.count = trials, len(trials)
        self.left = iter(trials)

    @classmethod
    def of(cls, sweep: Sweep, found: Outcome) -> "Finals | None":
        """Return what there is to compare; None if the settings' own values won, or nothing did."""
        by_name = {one["name"]: one["values"] for one in found["trials"]}
        best, seeds = found["best"], range(1, sweep.settings.sweep.final_seeds + 1)
        if not seeds or best in (None, FIRST):
            return None
        trials = []
        for more in seeds:
            seed = sweep.base.run.seed + more
            for side in (FIRST, best):
                name = f"{side}-{seed}"
                directory = sweep.directory / FINAL / name
                known = Trial.read(directory)
                values = {**by_name[side], SEED: seed}
                trials.append(known or Trial(directory, name, values))
        return cls(trials)

    def next(self) -> Trial | None:
        """Return the next one."""
        trial = next(self.left, None)
        if trial:
            trial.write()
        return trial

    def learn(self, name: str, loss: float | None) -> None:
        """There is nothing to learn."""
