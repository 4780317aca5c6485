"""The plots of a sweep: ticks that can be read, and importances that say what they rest on."""

import itertools

import pytest

from yuzogpt.tuning.plots import importance, parameters
from yuzogpt.tuning.space import Parameter, Space

SPACE = Space(
    (
        Parameter("optimizer.learning_rate", "loguniform", (1e-5, 1e-2)),
        Parameter("optimizer.weight_decay", "loguniform", (0.01, 0.1)),
        Parameter("optimizer.beta2", "uniform", (0.9, 0.999)),
        Parameter("schedule.warmup_iters", "uniform", (0, 20_000), is_integer=True),
        Parameter("model.dropout", "choice", (0.0, 0.1, 0.2)),
        Parameter("schedule.lr_schedule", "grid", ("cosine", "linear", "constant", "invsqrt")),
    )
)


def outcome(count):
    """Return what sweep.json holds of so many trials, spread over each range."""

    def value(parameter, i):
        if len(parameter.values) > 2:
            return parameter.values[i % len(parameter.values)]
        low, high = parameter.values
        found = low + (high - low) * (i * 7 % count) / (count - 1)
        if parameter.kind == "loguniform":
            found = low * (high / low) ** (i * 3 % count / (count - 1))
        return round(found) if parameter.is_integer else found

    trials = [
        {
            "name": f"{i:04}", "state": "finished", "evaluations": [(10, 2 + i % 5 / 10)],
            "best_val_loss_estimate": 2 + i % 5 / 10,
            "values": {p.key: value(p, i) for p in SPACE.parameters},
        }
        for i in range(count)
    ]  # fmt: skip
    return {"trials": trials, "best": "0005", "comparison": {}}


@pytest.mark.slow
def test_ticks_do_not_touch():
    figure = parameters(outcome(12), SPACE)
    figure.draw_without_rendering()
    for axes, parameter in zip(figure.axes, SPACE.parameters, strict=True):
        low, high = axes.get_xlim()
        labels = [
            label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high
        ]
        assert len([label for label in labels if label.get_text()]) >= 2, parameter
        if any(label.get_rotation() for label in labels):
            assert parameter.leaf == "lr_schedule"
            continue
        boxes = [label.get_window_extent() for label in labels]
        assert not any(a.x1 + 2 > b.x0 for a, b in itertools.pairwise(boxes)), parameter


@pytest.mark.slow
@pytest.mark.parametrize(("count", "is_few"), [(12, True), (60, False)])
def test_importances_of_few_trials_come_with_a_caveat(count, is_few):
    (axes,) = importance(outcome(count), SPACE).axes
    title = axes.get_title(loc="left")
    assert title.startswith(f"from {count} trials of 6 settings")
    assert title.endswith("too few to tell importance from chance") == is_few
