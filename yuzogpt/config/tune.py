"""`yuzogpt tune`: the settings of a training run, and of the search."""

from typing import Annotated, Literal

from pydantic import Field

from yuzogpt.config.section import Count, Positive, Section, Seed, setting
from yuzogpt.config.train import TrainSettings


class SweepSettings(Section):
    """How the settings are searched."""

    num_samples: Positive = setting(
        16,
        "number of trials; the first uses the settings' own values; grid: every combination",
        "trials",
    )
    max_concurrent_trials: Count = setting(0, "trials at a time; 0: as many as fit", "trials")
    search_algorithm: Literal["tpe", "random", "grid"] = setting(
        "tpe", "tpe: Optuna's TPE sampler; random; grid: every combination", frozen=True
    )
    search_seed: Seed = setting(1337, "seed of the search", frozen=True)
    scheduler: Literal["asha", "none"] = setting(
        "asha", "asha: stop trials that fall behind; none: run every trial to its end", frozen=True
    )
    grace_steps: Count = setting(
        0, "asha stops no trial before this step; 0: two evaluations", "steps", frozen=True
    )
    reduction_factor: Annotated[int, Field(ge=2)] = setting(
        3, "asha: one in this many trials continues past each rung", frozen=True
    )
    final_seeds: Count = setting(
        3, "new seeds on which the defaults and the winner are trained and compared; 0: none"
    )


class TuneSettings(TrainSettings):
    """`yuzogpt tune`: the settings that all trials share, and the search."""

    sweep: SweepSettings = SweepSettings()
