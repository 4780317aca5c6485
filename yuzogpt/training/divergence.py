"""What a run that diverged tells the user: where it happened, and what would help."""

from yuzogpt.training.guards import Guard, StepStats
from yuzogpt.training.layer_stats import non_finite_layers
from yuzogpt.training.parallel import ParallelModel

ADVICE = (
    "Try a lower --learning_rate, more --warmup_iters, or --dtype=float32, in another --out_dir"
)
MAX_LAYERS_SHOWN = 3


def divergence_message(
    out_dir: str, model: ParallelModel, stats: StepStats, guard: Guard, step: int
) -> str:
    """Return the error for a run whose last steps were all skipped: one line."""
    layers = non_finite_layers(model, stats)
    where = f", not finite in {', '.join(layers[:MAX_LAYERS_SHOWN])}" if layers else ""
    others = len(layers) - MAX_LAYERS_SHOWN
    more = f" and {others} more" if others > 0 else ""
    return (
        f"{out_dir}: step {step} is number {guard.not_finite_in_a_row} in a row to be "
        f"skipped: loss {stats.loss}, gradient norm {stats.grad_norm}{where}{more}; weights "
        f"are those of step {step - guard.not_finite_in_a_row}. {ADVICE}"
    )
