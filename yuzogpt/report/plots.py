"""The plots of a report, and loss.png.

The SVGs take their text colour from the page around them. A long run is drawn in bins: the mean of
each as a line, and behind it a band from its lowest to its highest value. The band is never thinner
than a line, so a spike of a single step shows.
"""

import io
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from yuzogpt.report.history import Column, Health, History, number
from yuzogpt.report.summary import Summary

if TYPE_CHECKING:  # imported late: a training worker draws only at the end
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

BINS = 1000  # points of a line
LAYER_BINS = 240  # points of each layer's line
BLUE, ORANGE, GREEN, RED = "#4385d6", "#cf6d1c", "#2b9462", "#e5484d"  # 3:1 on white and on black
FEW = 20  # points: with fewer, a part of a curve shows nothing that the whole does not
TEXT = "#010203"  # stands for the page's text colour
SMALL = 9  # points: of legends
SIZE = (5.4, 3.1)  # inches; a phone shows it at about this size
TIME_UNITS = {"days": 86400.0, "hours": 3600.0, "minutes": 60.0, "seconds": 1.0}

# Without these, matplotlib says when and with what the SVG was made, with addresses.
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Plot:
    """A drawing with a title and a caption, and what it shows in words."""

    title: str
    caption: str
    svg: str
    description: str


def plots(history: History, summary: Summary) -> Iterator[Plot]:
    """Draw every plot that has numbers."""
    train, health = history.train, history.health
    if np.isfinite(train["loss"]).any() or len(history.evaluation["step"]):
        caption = "of each batch, of the val split's sample, and of the whole val split at the end"
        yield plot("Loss", caption, lambda axes: draw_loss(axes, history))
    half = np.max(train["step"], initial=0) / 2
    if np.isfinite(train["loss"][train["step"] >= half]).sum() > FEW:
        title = "Loss, second half of the steps"
        yield plot(title, "", lambda axes: draw_loss(axes, history, half))
    if np.isfinite(train["grad_norm"]).any():
        caption = "before clipping, with skipped steps and spikes marked along the top"
        yield plot("Gradient norm", caption, lambda axes: draw_gradient(axes, history))
    if np.isfinite(train["lr"]).any():
        yield plot("Learning rate", "", lambda axes: draw_learning_rate(axes, history))
    if np.isfinite(train["tokens_per_second"]).any():
        caption = "over wall time; lost time is shaded"
        yield plot("Throughput", caption, lambda axes: draw_throughput(axes, history, summary))
    if np.isfinite(health.numbers["update_to_weight"]).any():
        caption = "of each layer: norm of a step's update over norm of the weights"
        yield plot("Update-to-weight ratio", caption, lambda axes: draw_updates(axes, health))
    if np.nanmax(health.numbers["grad_norm"], initial=0.0) > 0:
        caption = "of each layer; the highest of each bin of steps"
        yield plot("Gradient norm by layer", caption, lambda axes: draw_layers(axes, health))


Draw = Callable[["Axes"], None]


def plot(title: str, caption: str, draw: Draw) -> Plot:
    """Return a drawing as an SVG element to stand in a page, and its lines in words."""
    import matplotlib
    from matplotlib.figure import Figure

    colours = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT
    )
    style: Any = {
        **colours,
        "grid.color": TEXT,
        "svg.fonttype": "none",  # text stays text: the page's font, and to be searched
        "text.parse_math": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, dpi=150, metadata=NO_METADATA)
    content = drawn.getvalue()
    content = content[content.index("<svg") :].replace(TEXT, "currentColor")
    content = re.sub(r'<g id="[^"]*">', "<g>", content)  # ids repeat: all plots have the same
    content = re.sub(r'width="[\d.]+pt" height="[\d.]+pt" ', "", content, count=1)
    return Plot(title, caption, content, "; ".join(describe_lines(axes)))


def describe_lines(axes: "Axes") -> Iterator[str]:
    """Yield the legend's text of each line, and where the line begins, ends and is lowest."""
    for line in axes.get_lines():
        label, values = str(line.get_label()), np.asarray(line.get_ydata(), dtype=float)
        values = values[np.isfinite(values)]
        if not label.startswith("_") and len(values):
            first, last, lowest = values[0], values[-1], values.min()
            numbers = f": from {first:.4g} to {last:.4g}, lowest {lowest:.4g}"
            yield label + (numbers if lowest < values.max() else "")


@dataclass(frozen=True)
class Binned:
    """Values by step, in bins of about equally many."""

    step: Column
    low: Column
    mean: Column
    high: Column
    in_bin: int  # largest number of values in a bin


def binned(step: Column, values: Column, bins: int = BINS) -> Binned:
    """Sort finite values into at most `bins` bins; few values have a bin each."""
    finite = np.isfinite(step) & np.isfinite(values)
    step, values = step[finite], values[finite]
    if len(values) <= bins:
        return Binned(step, values, values, values, 1)
    edges = np.linspace(0, len(values), bins + 1).astype(int)
    first, counts = edges[:-1], np.diff(edges)
    return Binned(
        step=np.add.reduceat(step, first) / counts,
        low=np.minimum.reduceat(values, first),
        mean=np.add.reduceat(values, first) / counts,
        high=np.maximum.reduceat(values, first),
        in_bin=int(counts.max()),
    )


def draw_bins(
    axes: "Axes", step: Column, values: Column, label: str, *, bins: int = BINS
) -> Binned:
    """Draw one number over the steps."""
    curve = binned(step, values, bins)
    if curve.in_bin > 1:
        axes.plot(*zigzag(curve), color=BLUE, alpha=0.45, linewidth=0.8)
        axes.set_xlabel(f"step (mean and range of {curve.in_bin:,} each)")
    width = 0.8 if curve.in_bin == 1 else 1.2
    axes.plot(curve.step, curve.mean, color=BLUE, linewidth=width, label=label)
    return curve


def zigzag(curve: Binned) -> tuple[Column, Column]:
    """Return a line from low to high in each bin: unlike a filled band, strokes have a width."""
    return np.repeat(curve.step, 2), np.stack([curve.low, curve.high], axis=1).ravel()


def draw_loss(axes: "Axes", history: History, first_step: float = 0) -> None:
    """Draw training loss, the estimate of the val loss, and the whole-split val loss by step."""
    train, evaluation = (
        {name: column[columns["step"] >= first_step] for name, column in columns.items()}
        for columns in (history.train, history.evaluation)
    )
    curve = draw_bins(axes, train["step"], train["loss"], "train loss (one batch)")
    few = len(evaluation["step"]) <= BINS // 10
    axes.plot(
        evaluation["step"],
        evaluation["val_loss_estimate"],
        color=ORANGE,
        marker="o" if few else None,
        markersize=3,
        label="val_loss_estimate",
    )
    for event in history.of_kind("final")[-1:]:
        loss = number(event.record, "val_loss")
        label = f"val loss, whole split: {loss:.4f}"
        axes.plot(event.step, loss, "*", color=GREEN, markersize=11, label=label)
    # A single high spike would flatten the curve.
    if len(curve.mean) and curve.low.min() > 0 and curve.high.max() > 10 * np.median(curve.mean):
        axes.set_yscale("log")
    finish(axes, "loss (nats per token)")


def draw_gradient(axes: "Axes", history: History) -> None:
    """Draw the gradient norm, and mark skipped steps and spikes."""
    train = history.train
    draw_bins(axes, train["step"], train["grad_norm"], "gradient norm")
    for kind, colour, label in (("skip", RED, "skipped"), ("spike", ORANGE, "spike")):
        marked = sorted({event.step for event in history.of_kind(kind)})
        if marked:
            along_the_top = axes.get_xaxis_transform()
            axes.plot(
                marked,
                np.full(len(marked), 0.97),
                "v",
                color=colour,
                markersize=5,
                transform=along_the_top,
                label=f"{label}: {len(marked):,}",
            )
    axes.set_yscale("log")
    finish(axes, "gradient norm")


def draw_learning_rate(axes: "Axes", history: History) -> None:
    """Draw the learning rate."""
    draw_bins(axes, history.train["step"], history.train["lr"], "learning rate")
    axes.set_ylim(bottom=0)
    finish(axes, "learning rate")


def draw_throughput(axes: "Axes", history: History, summary: Summary) -> None:
    """Draw tokens per second over wall time, with lost time shaded."""
    from matplotlib.ticker import EngFormatter, ScalarFormatter

    large = (item for item in TIME_UNITS.items() if summary.wall >= 3 * item[1])
    name, unit = next(large, ("seconds", 1.0))
    elapsed = (history.train["time"] - summary.begin) / unit
    # One line per attempt: none across the time between them.
    starts = [attempt.trains for attempt in summary.restarts]
    bins = max(1, BINS // len(summary.attempts))
    label = "tokens/s"
    for times, speeds in zip(
        np.split(elapsed, starts),
        np.split(history.train["tokens_per_second"], starts),
        strict=True,
    ):
        draw_bins(axes, times, speeds, label, bins=bins)
        label = "_"  # matplotlib leaves it out of the legend
    label = "lost time"
    for attempt in summary.attempts:
        begin = (attempt.lost_from - summary.begin) / unit
        end = begin + attempt.lost_seconds / unit
        axes.axvspan(begin, end, color=RED, alpha=0.3, linewidth=0.5, label=label)
        label = "_"
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    finish(axes, "tokens/s")
    axes.set_xlabel(f"{name} since the start")
    axes.xaxis.set_major_formatter(ScalarFormatter())


def draw_updates(axes: "Axes", health: Health) -> None:
    """Draw a line for each layer: blocks in colours by depth, the rest dashed."""
    import matplotlib

    blocks = [name for name in health.layers if name.startswith("h.")]
    named = {blocks[i] for i in (0, len(blocks) // 2, -1)} if len(blocks) > 4 else set(blocks)
    depths = matplotlib.colormaps["viridis"](np.linspace(0.15, 0.9, max(1, len(blocks))))
    others = iter(range(len(health.layers)))
    for layer, values in zip(health.layers, health.numbers["update_to_weight"], strict=True):
        is_block = layer in blocks
        curve = binned(health.step, values, LAYER_BINS)
        colour = depths[blocks.index(layer)] if is_block else (RED, ORANGE, BLUE)[next(others) % 3]
        axes.plot(
            *(zigzag(curve) if curve.in_bin > 1 else (curve.step, curve.mean)),
            color=colour,
            linewidth=0.9,
            linestyle="-" if is_block else "--",
            label=layer if layer in named or not is_block else "_",
        )
    axes.set_yscale("log")
    finish(axes, "update / weight", columns=5)


def draw_layers(axes: "Axes", health: Health) -> None:
    """Draw a map: a row for each layer, brighter where its gradient norm is larger."""
    from matplotlib.colors import LogNorm

    values = health.numbers["grad_norm"]
    count = min(LAYER_BINS, len(health.step))
    first = np.linspace(0, len(health.step), count + 1).astype(int)[:-1]
    highest = np.fmax.reduceat(values, first, axis=1)  # fmax: NaN only if all are
    last = 2 * health.step[-1] - health.step[-2] if len(health.step) > 1 else health.step[-1] + 1
    edges = np.append(health.step[first], last)
    shown = np.ma.masked_invalid(np.where(highest > 0, highest, math.nan))
    rows = np.arange(len(health.layers) + 1)
    mesh = axes.pcolormesh(edges, rows, shown, norm=LogNorm(), cmap="viridis", rasterized=True)
    label_powers(axes.figure.colorbar(mesh, ax=axes, pad=0.02).ax.yaxis)
    every = max(1, len(health.layers) // 10)
    axes.set_yticks(rows[:-1][::every] + 0.5, health.layers[::every])
    axes.invert_yaxis()
    finish(axes, "", grid=False)


def finish(axes: "Axes", unit: str, *, columns: int = 2, grid: bool = True) -> None:
    """Label the axes, and put the legend above, where it hides nothing."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set(xlabel=axes.get_xlabel() or "step", ylabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if axes.get_yscale() == "log":
        label_powers(axes.yaxis)
    axes.margins(x=0.02)
    if grid:
        axes.grid(alpha=0.2)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.figure.legend(
            *axes.get_legend_handles_labels(),
            loc="outside upper left",
            ncols=columns,
            frameon=False,
            fontsize=SMALL,
            handlelength=1.4,
        )


def label_powers(axis: "Axis") -> None:
    """Label a logarithmic axis in plain text: matplotlib's own labels are formulas."""
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
