"""`yuzogpt tune`: a training run's settings, and the search."""

from typing import Annotated, Literal

from pydantic import Field

from yuzogpt.config.section import Count, Positive, Section, Seed, setting
from yuzogpt.config.train import TrainSettings


class SweepSettings(Section):
    """How settings are searched for."""

    num_samples: Positive = setting(
        16, "trials in all; the first has the settings' own values; grid: all there are", "trials"
    )
    max_concurrent_trials: Count = setting(
        0, "trials at a time; 0: as many as there is room for", "trials"
    )
    search_algorithm: Literal["tpe", "random", "grid"] = setting(
        "tpe", "how values are chosen: Optuna's TPE, at random, or every combination", frozen=True
    )
    search_seed: Seed = setting(1337, "of the values that are chosen", frozen=True)
    scheduler: Literal["asha", "none"] = setting(
        "asha", "asha: trials that fall behind are stopped; none: each goes to its end", frozen=True
    )
    grace_steps: Count = setting(
        0, "asha stops no trial before; 0: two evaluations", "steps", frozen=True
    )
    reduction_factor: Annotated[int, Field(ge=2)] = setting(
        3,
        "of the trials that reach a rung, asha lets one in so many go on to the next",
        frozen=True,
    )
    final_seeds: Count = setting(
        3, "fresh seeds, with each of which default and winner are trained and compared; 0: none"
    )


class TuneSettings(TrainSettings):
    """`yuzogpt tune`: what all trials have in common, and the search."""

    sweep: SweepSettings = SweepSettings()
