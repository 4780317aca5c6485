"""The summary that ends a sweep: the winner, and whether it is better than chance."""

import math

from rich.table import Table

from yuzogpt.console import terminal
from yuzogpt.console.terminal import say
from yuzogpt.tuning.plots import draw
from yuzogpt.tuning.sweep import BASELINE, BEST, OUTCOME, Outcome, Sweep
from yuzogpt.tuning.table import format_value, format_values


def show(sweep: Sweep, outcome: Outcome) -> None:
    """Draw the plots; print the winner, the comparison, and where the files are."""
    name = sweep.settings.run.out_dir
    drawn = draw(outcome, sweep.space, sweep.directory)
    if failed := sum(trial["state"] == "failed" for trial in outcome["trials"]):
        say(f"{failed} of {len(outcome['trials'])} trials failed; {name}/{OUTCOME} says why")
    best = next((trial for trial in outcome["trials"] if trial["name"] == outcome["best"]), None)
    if best is None:
        say(f"no trial has a loss; see {name}/{OUTCOME}")
        return
    loss, step = format_value(best["best_val_loss_estimate"]), best["best_step"]
    say(f"winner: trial {best['name']}, val_loss_estimate {loss} at step {step}")
    say(f"  {format_values(best['values'])}")
    if best["name"] == BASELINE:
        say("the settings' own values won: there is nothing to compare")
    elif outcome["comparison"]:
        terminal.console().print(comparison_table(outcome))
        say(margin(outcome))
    say(f"train with it: yuzogpt train {name}/{BEST}")
    say(f"results: {', '.join(f'{name}/{file}' for file in (OUTCOME, *drawn))}")


def comparison_table(outcome: Outcome) -> Table:
    """Return the table of default against tuned, with fresh seeds."""
    title = "the second half of the val split, which the search never saw"
    numeric = ("val loss", "spread", "seeds")
    rows = [
        [side, f"{figures['mean']:.4f}", f"{figures['spread']:.4f}", str(figures["seeds"])]
        for side, figures in outcome["comparison"].items()
    ]
    return terminal.table(["", *numeric], rows, numeric=numeric, title=title)


def margin(outcome: Outcome) -> str:
    """Return one line: the gain of tuned over default, against the spread between seeds."""
    sides = outcome["comparison"]
    if len(sides) < 2:
        return "the comparison is not complete"
    default, tuned = sides["default"], sides["tuned"]
    lost = [f"{side['without']:.0f} with {name}" for name, side in sides.items() if side["without"]]
    if lost:
        return f"seeds have no score: {', '.join(lost)}; the means say little"
    if min(default["seeds"], tuned["seeds"]) < 2:
        return "one seed does not show how much losses differ between seeds; give --final_seeds=2"
    gain = default["mean"] - tuned["mean"]
    spread = math.hypot(default["spread"], tuned["spread"])
    how = "lower" if gain > 0 else "higher"
    worth = "more" if abs(gain) > 2 * spread else "not more"
    return (
        f"tuned is {abs(gain):.4f} {how}, {worth} than twice the spread between seeds "
        f"({spread:.4f})"
    )
