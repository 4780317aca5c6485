"""The search space: what can be written, and what is refused before anything starts."""

import pytest

from yuzogpt.config import TrainSettings
from yuzogpt.config.resolve import resolve
from yuzogpt.errors import UserError
from yuzogpt.tuning.space import read_space, with_values

SETTINGS = resolve(TrainSettings, [], ["--n_layer=3"])


def space_of(*flags, files=()):
    return read_space(SETTINGS, files, [f"--search.{flag}" for flag in flags])


def test_yaml_and_flags_add_up(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "search:\n  learning_rate: {loguniform: [1e-5, 1e-3]}\n  dropout: {uniform: [0, 0.3]}\n"
        "  model.n_layer: {choice: [2, 4]}\n"
    )
    space = space_of("dropout=", "weight_decay={grid: [0.0, 0.1]}", files=[str(file)])
    assert space.describe() == {
        "optimizer.learning_rate": {"loguniform": [1e-5, 1e-3]},
        "model.n_layer": {"choice": [2, 4]},
        "optimizer.weight_decay": {"grid": [0.0, 0.1]},
    }
    # To train from the same file, or to read it for another verb, ignores the section.
    assert resolve(TrainSettings, [str(file)], []) == TrainSettings()


def test_a_grid_is_every_combination():
    space = space_of("n_layer={choice: [2, 4]}", "dropout={grid: [0.0, 0.1, 0.2]}")
    combinations = space.grid()
    assert len(combinations) == 6
    assert combinations[0] == {"model.n_layer": 2, "model.dropout": 0.0}


def test_whole_numbers_stay_whole():
    distribution = space_of("warmup_iters={uniform: [0, 10]}").distributions()
    assert type(distribution["schedule.warmup_iters"]).__name__ == "IntDistribution"


def test_how_weights_start_can_be_searched():
    assert len(space_of("residual_init={choice: [scaled, zero]}").grid()) == 2


def test_a_trials_values_leave_unset_what_the_user_left_out():
    """A pretrained model's shape is its own where the user said nothing."""
    changed = with_values(SETTINGS, {"optimizer.learning_rate": 0.1})
    assert changed.optimizer.learning_rate == 0.1
    assert changed.model.model_fields_set == {"n_layer"}


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("learning_rat={uniform: [0, 1]}", "did you mean learning_rate?"),
        ("learning_rate=0.1", "write {KIND: [...]}; kinds: uniform"),
        ("learning_rate={normal: [0, 1]}", "write {KIND: [...]}; kinds: uniform"),
        ("learning_rate={uniform: 0.1}", "uniform needs a list"),
        ("learning_rate={uniform: [1, 0]}", "uniform needs lowest < highest"),
        ("learning_rate={uniform: [0, 1, 2]}", "uniform needs [lowest, highest]"),
        ("learning_rate={loguniform: [0, 1]}", "lowest < highest, above 0"),
        ("learning_rate={uniform: [-1, 1]}", "-1: Input should be greater than or equal to 0"),
        ("dropout={choice: [0.1, lots]}", "lots: Input should be a valid number"),
        ("n_head={choice: [5]}", "n_embd=768 is not a multiple of n_head=5"),
        ("lr_schedule={choice: [cosine, wsd]}", "wsd: lr_schedule=wsd: set cooldown_iters"),
        ("max_iters={choice: [1, 2]}", "cannot be searched"),
        ("out_dir={choice: [a, b]}", "cannot be searched"),
        ("dropout={uniform: [0", "write --search.dropout='{uniform: [0, 1]}'"),
    ],
)
def test_mistakes_are_one_line(flag, says):
    with pytest.raises(UserError) as caught:
        space_of(flag)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


WSD = "lr_schedule={choice: [cosine, wsd]}"


def test_a_value_that_fits_only_beside_another_is_taken():
    space = space_of(WSD, "cooldown_iters={choice: [0, 20]}")
    assert len(space.grid()) == 4
    assert space.fitting(SETTINGS, "schedule.lr_schedule", "wsd") == {
        "schedule.lr_schedule": "wsd",
        "schedule.cooldown_iters": 20,
    }
    space_of(WSD, "cooldown_iters={uniform: [0, 20]}")


def test_a_value_that_no_combination_takes_is_refused():
    fits_alone = resolve(TrainSettings, [], ["--cooldown_iters=20"])
    read_space(fits_alone, [], [f"--search.{WSD}"])
    with pytest.raises(UserError, match="wsd: lr_schedule=wsd: set cooldown_iters"):
        read_space(fits_alone, [], [f"--search.{WSD}", "--search.cooldown_iters={choice: [0]}"])


def test_of_very_many_combinations_some_are_tried():
    many = [f"{key}={{choice: {[n / 100 for n in range(50)]}}}" for key in ("dropout", "min_lr")]
    space = space_of(*many, WSD, "cooldown_iters={choice: [0, 5, 10]}")
    assert len(space.parameters) == 4


def test_a_range_has_no_grid():
    with pytest.raises(UserError, match="uniform is a range"):
        space_of("dropout={uniform: [0, 0.3]}").grid()


def test_nothing_to_search_is_said():
    with pytest.raises(UserError, match="nothing to search"):
        space_of()
