"""What a person reads when a sweep has ended: the winner, and whether it was worth it.

In: the sweep and what came out. Out: text by rich, and the plots.
"""

import math

from rich.box import SIMPLE_HEAD
from rich.table import Table

from yuzogpt.console import terminal
from yuzogpt.console.terminal import say
from yuzogpt.tuning.plots import draw
from yuzogpt.tuning.sweep import BEST, FIRST, OUTCOME, Outcome, Sweep
from yuzogpt.tuning.table import format_value, format_values


def show(sweep: Sweep, found: Outcome) -> None:
    """Print the winner, the comparison, and where everything is."""
    name = sweep.settings.run.out_dir
    drawn = draw(found, sweep.space, sweep.directory)
    if failed := sum(one["state"] == "failed" for one in found["trials"]):
        say(f"{failed} of {len(found['trials'])} trials failed; {name}/{OUTCOME} says why")
    best = next((one for one in found["trials"] if one["name"] == found["best"]), None)
    if best is None:
        say(f"no trial has a loss; see {name}/{OUTCOME}")
        return
    loss, step = format_value(best["best_val_loss_estimate"]), best["best_step"]
    say(f"winner: trial {best['name']}, val loss estimate {loss} at step {step}")
    say(f"  {format_values(best['values'])}")
    if best["name"] == FIRST:
        say("the settings' own values won: there is nothing to compare")
    elif found["comparison"]:
        terminal.console().print(comparison_table(found))
        say(margin(found))
    say(f"train with it: yuzogpt train {name}/{BEST}")
    say(f"all of it: {', '.join(f'{name}/{file}' for file in (OUTCOME, *drawn))}")


def comparison_table(found: Outcome) -> Table:
    """Return default against tuned, by fresh seeds, on what the search never saw."""
    title = "the second half of the val split, which the search never saw"
    table = Table(box=SIMPLE_HEAD, show_edge=False, title=title, title_justify="left")
    for column in ("", "val loss", "spread", "seeds"):
        table.add_column(column, justify="right" if column else "left")
    for side, figures in found["comparison"].items():
        mean, spread = f"{figures['mean']:.4f}", f"{figures['spread']:.4f}"
        table.add_row(side, mean, spread, str(figures["seeds"]))
    return table


def margin(found: Outcome) -> str:
    """Say by how much tuned is better, against how much seeds alone make of a difference."""
    sides = found["comparison"]
    if len(sides) < 2:
        return "the comparison is not complete"
    default, tuned = sides["default"], sides["tuned"]
    lost = [f"{side['without']:.0f} with {name}" for name, side in sides.items() if side["without"]]
    if lost:
        return f"seeds have no score: {', '.join(lost)}; the means say little"
    if min(default["seeds"], tuned["seeds"]) < 2:
        return "one seed tells nothing of what seeds make of a difference"
    gain = default["mean"] - tuned["mean"]
    spread = math.hypot(default["spread"], tuned["spread"])
    how = "lower" if gain > 0 else "higher"
    worth = "more" if abs(gain) > 2 * spread else "not more"
    return (
        f"tuned is {abs(gain):.4f} {how}, {worth} than twice what seeds make of a difference "
        f"({spread:.4f})"
    )
