"""Draws the loss curves of a run as loss.png; `yuzogpt report` draws the same curves and more."""

from collections.abc import Sequence
from pathlib import Path

from yuzogpt.report.history import History
from yuzogpt.report.plots import draw_loss
from yuzogpt.runs.event_log import Record
from yuzogpt.storage.atomic_files import naming


def draw(records: Sequence[Record], path: Path) -> None:
    """Plot training loss, the estimate of the val loss, and the whole-split val loss by step."""
    from matplotlib.figure import Figure

    history = History.from_records(records)
    assert history is not None, "a run that ends has records"
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    draw_loss(axes, history)
    axes.set_title(path.parent.name)
    with naming(path):
        figure.savefig(path, dpi=120)
