"""The plots of a sweep, as PNGs beside sweep.json.

They show each trial's losses, losses against values, and the importance of each setting.
"""

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yuzogpt.tuning.space import LISTS, Parameter, Space
from yuzogpt.tuning.sweep import BASELINE, PLOTS, Outcome

if TYPE_CHECKING:
    import optuna
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS = "val_loss_estimate"
BLUE, ORANGE, GREEN = "#4385d6", "#cf6d1c", "#2b9462"
MIN_TRIALS_FOR_IMPORTANCE = 4  # fewer give importances by chance
FEW_TRIALS = 10  # for each setting that varies; fewer give importances with a caveat
COLUMNS = 3  # plots of settings side by side
MAX_TICK_LENGTH = 20  # characters that stand side by side below such a plot


def draw(outcome: Outcome, space: Space, directory: Path) -> list[str]:
    """Draw the plots that there are enough trials for; return the names of the files."""
    figures = (losses(outcome), parameters(outcome, space), importance(outcome, space))
    drawn = [(name, figure) for name, figure in zip(PLOTS, figures, strict=True) if figure]
    for name, figure in drawn:
        figure.savefig(directory / name, dpi=120)
    return [name for name, _ in drawn]


def style_of(trial: dict[str, Any], outcome: Outcome) -> dict[str, Any]:
    """Return how a trial is drawn: the winner and the settings' own values stand out."""
    name = trial["name"]
    if name == outcome["best"]:
        return {"color": GREEN, "zorder": 4, "label": f"{name}, the winner"}
    if name == BASELINE:
        return {"color": ORANGE, "zorder": 3, "label": f"{name}, the settings' own values"}
    return {"color": BLUE, "zorder": 2, "label": None}


def losses(outcome: Outcome) -> "Figure":
    """Draw the loss of each trial by step."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for trial in outcome["trials"]:
        points = [(step, loss) for step, loss in trial["evaluations"] if loss is not None]
        style = style_of(trial, outcome)
        axes.plot(
            *(zip(*points, strict=True) if points else ([], [])),
            linewidth=2 if style["label"] else 1,
            marker="." if len(points) < 20 else "",
            **style,
        )
    axes.set(xlabel="step", ylabel=LOSS)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def scored(outcome: Outcome) -> list[dict[str, Any]]:
    """Return the trials that have a loss and have not failed."""
    return [
        trial
        for trial in outcome["trials"]
        if trial["best_val_loss_estimate"] is not None and trial["state"] != "failed"
    ]


def parameters(outcome: Outcome, space: Space) -> "Figure | None":
    """Draw the lowest loss of each trial against each of its values, a plot for each setting."""
    from matplotlib.figure import Figure

    trials, count = scored(outcome), len(space.parameters)
    if len(trials) < 2:
        return None
    rows = math.ceil(count / COLUMNS)
    figure = Figure(figsize=(8, 0.6 + 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, min(count, COLUMNS), sharey=True, squeeze=False)
    for axes, parameter in zip(grid.flat, space.parameters, strict=False):
        draw_parameter(axes, parameter, trials, outcome)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel(LOSS)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False)
    return figure


def draw_parameter(
    axes: "Axes", parameter: Parameter, trials: list[dict[str, Any]], outcome: Outcome
) -> None:
    """Draw a point for each trial, and ticks that do not touch."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    values = [trial["values"][parameter.key] for trial in trials]
    if parameter.kind in LISTS:
        known = list(dict.fromkeys((*parameter.values, *values)))
        names = [str(value) for value in known]
        slanted: Any = (
            {"rotation": 30, "ha": "right"} if len("".join(names)) > MAX_TICK_LENGTH else {}
        )
        axes.set_xticks(range(len(known)), names, **slanted)
        axes.margins(x=0.2)
        values = [known.index(value) for value in values]
    elif parameter.kind == "loguniform" and min(values) > 0:
        ratio = max(values) / min(values)
        axes.set_xscale("log")
        subs = (1,) if ratio > 200 else (1, 3) if ratio > 20 else (1, 2, 5)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=parameter.is_integer))
    if parameter.kind not in LISTS:
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    for trial, value in zip(trials, values, strict=True):
        axes.plot(value, trial["best_val_loss_estimate"], "o", **style_of(trial, outcome))
    axes.set_xlabel(parameter.leaf)
    axes.grid(alpha=0.3)


def build_study(outcome: Outcome, space: Space) -> "optuna.Study":
    """Return a study of the trials that have a loss."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize")
    for trial in scored(outcome):
        values = {p.leaf: trial["values"][p.key] for p in space.parameters}
        distributions = {p.leaf: p.distribution(values[p.leaf]) for p in space.parameters}
        study.add_trial(
            optuna.trial.create_trial(
                params=values, distributions=distributions, value=trial["best_val_loss_estimate"]
            )
        )
    return study


def importance(outcome: Outcome, space: Space) -> "Figure | None":
    """Draw how much of the loss's variance each parameter explains (PED-ANOVA, Watanabe, 2023)."""
    from matplotlib.figure import Figure
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    trials = scored(outcome)
    varied = [
        p.leaf for p in space.parameters if len({trial["values"][p.key] for trial in trials}) > 1
    ]
    if len(trials) < MIN_TRIALS_FOR_IMPORTANCE or not varied:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls it experimental
        evaluator = PedAnovaImportanceEvaluator()
    shares = get_param_importances(build_study(outcome, space), evaluator=evaluator, params=varied)
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(shares)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(shares), list(shares.values()), color=BLUE)
    axes.bar_label(bars, fmt="{:.0%}", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel("share of the variance of val_loss_estimate (PED-ANOVA)")
    axes.set_title(caveat(len(trials), len(varied)), loc="left", fontsize="medium")
    return figure


def caveat(trials: int, varied: int) -> str:
    """Return what importances rest on, and whether that is little."""
    text = f"from {trials} trials of {varied} setting{'' if varied == 1 else 's'}"
    few = trials < FEW_TRIALS * varied
    return f"{text}: too few to tell importance from chance" if few else text
