"""The loss curves of a run, as a PNG.

In: records of metrics.jsonl. Out: loss.png in out_dir.
"""

from collections.abc import Sequence
from pathlib import Path

from yuzogpt.metrics import Record


def draw(records: Sequence[Record], path: Path) -> None:
    """Plot training loss, the estimate of the val loss, and the whole-split val loss by step."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    train = [record for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    final = [record for record in records if record["kind"] == "final"]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(
        [record["step"] for record in train],
        [record["loss"] for record in train],
        linewidth=0.6,
        alpha=0.6,
        label="train loss (one batch)",
    )
    axes.plot(
        [record["step"] for record in evaluations],
        [record["val_loss_estimate"] for record in evaluations],
        marker="o",
        markersize=3,
        label="val_loss_estimate",
    )
    for record in final[-1:]:
        axes.plot(
            record["step"],
            record["val_loss"],
            marker="*",
            markersize=11,
            linestyle="none",
            label=f"val loss, whole split: {record['val_loss']:.4f}",
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=path.parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
