"""The plots of a sweep, as PNGs beside sweep.json.

They show each trial's losses, losses against values, and the importance of each setting.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yuzogpt.tuning.space import Space
from yuzogpt.tuning.sweep import BASELINE, PLOTS, Outcome

if TYPE_CHECKING:
    import optuna
    from matplotlib.figure import Figure

LOSS = "val loss (estimate)"
MIN_TRIALS_FOR_IMPORTANCE = 4  # fewer give importances by chance


def draw(outcome: Outcome, space: Space, directory: Path) -> list[str]:
    """Draw the plots that there are enough trials for; return the names of the files."""
    import matplotlib as mpl

    mpl.use("agg")  # Optuna draws with pyplot
    drawers: list[Callable[[], Figure | None]] = [
        lambda: losses(outcome),
        lambda: parameters(build_study(outcome, space)),
        lambda: importance(build_study(outcome, space)),
    ]
    drawn = []
    for name, drawer in zip(PLOTS, drawers, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna calls its plots experimental
            figure = drawer()
        if figure:
            figure.savefig(directory / name, dpi=120, bbox_inches="tight")
            drawn.append(name)
    return drawn


def losses(outcome: Outcome) -> "Figure":
    """Draw the loss of each trial by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for trial in outcome["trials"]:
        points = [(step, loss) for step, loss in trial["evaluations"] if loss is not None]
        is_best, is_default = trial["name"] == outcome["best"], trial["name"] == BASELINE
        label = "the winner" if is_best else "the settings' own values" if is_default else None
        colour = "#30a46c" if is_best else "#e08133" if is_default else "#4385d6"
        axes.plot(
            *(zip(*points, strict=True) if points else ([], [])),
            color=colour,
            linewidth=2 if label else 1,
            alpha=1 if label else 0.5,
            marker="." if len(points) < 20 else "",
            label=f"{trial['name']}, {label}" if label else None,
            zorder=3 if label else 2,
        )
    axes.set(xlabel="step", ylabel=LOSS)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def build_study(outcome: Outcome, space: Space) -> "optuna.Study":
    """Return a study of the trials that have a loss, for Optuna's plots."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize")
    for trial in outcome["trials"]:
        loss = trial["best_val_loss_estimate"]
        if loss is not None and trial["state"] != "failed":
            values = {p.leaf: trial["values"][p.key] for p in space.parameters}
            distributions = {p.leaf: p.distribution(values[p.leaf]) for p in space.parameters}
            study.add_trial(
                optuna.trial.create_trial(params=values, distributions=distributions, value=loss)
            )
    return study


def parameters(study: "optuna.Study") -> "Figure | None":
    """Draw each trial as a line through its values, to its loss."""
    from optuna.visualization.matplotlib import plot_parallel_coordinate

    if len(study.trials) < 2:
        return None
    return parent_figure(plot_parallel_coordinate(study, target_name=LOSS))


def importance(study: "optuna.Study") -> "Figure | None":
    """Draw how much of the loss's variance each parameter explains (PED-ANOVA, Watanabe, 2023)."""
    from optuna.importance import PedAnovaImportanceEvaluator
    from optuna.visualization.matplotlib import plot_param_importances

    varied = (
        [key for key in study.trials[0].params if is_varied(study, key)] if study.trials else []
    )
    if len(study.trials) < MIN_TRIALS_FOR_IMPORTANCE or not varied:
        return None
    evaluator = PedAnovaImportanceEvaluator()
    return parent_figure(
        plot_param_importances(study, evaluator=evaluator, params=varied, target_name=LOSS)
    )


def is_varied(study: "optuna.Study", key: str) -> bool:
    """Return True if trials differ in a parameter."""
    return len({trial.params[key] for trial in study.trials}) > 1


def parent_figure(axes: Any) -> "Figure":
    """Return the figure that axes are part of."""
    figure: Figure = axes.figure
    return figure
