"""Which trial is next: the same after any interruption, given the same known losses."""

import pytest

from yuzogpt.config import TuneSettings
from yuzogpt.config.resolve import resolve
from yuzogpt.tuning.search import Finals, Search
from yuzogpt.tuning.space import read_space
from yuzogpt.tuning.sweep import Sweep, collect_outcome
from yuzogpt.tuning.trials import Trial, conclude

SPACE = ("dropout={uniform: [0, 0.3]}", "learning_rate={loguniform: [1e-5, 1e-2]}")


def sweep_in(directory, *flags, space=SPACE):
    settings = resolve(TuneSettings, [], [f"--out_dir={directory}", "--num_samples=8", *flags])
    return Sweep(settings, read_space(settings, [], [f"--search.{flag}" for flag in space]))


def loss_of(values):
    return values["model.dropout"] + values["optimizer.learning_rate"]


def search_through(search, most=100):
    """Do trials one after the other; return the values of each."""
    found = []
    while len(found) < most and (trial := search.ask()):
        found.append(trial.values)
        search.tell(trial.name, loss_of(trial.values))
    return found


@pytest.mark.parametrize("algorithm", ["random", "tpe"])
def test_a_search_that_was_cut_off_resumes_with_what_it_would_have_tried(tmp_path, algorithm):
    flag = f"--search_algorithm={algorithm}"
    whole = search_through(Search(sweep_in(tmp_path / "whole", flag)))
    assert len(whole) == 8
    assert whole[0] == {"model.dropout": 0.0, "optimizer.learning_rate": 6e-4}  # the settings' own
    assert len({str(values) for values in whole}) == 8
    search_through(Search(sweep_in(tmp_path / "cut", flag)), most=5)
    assert search_through(Search(sweep_in(tmp_path / "cut", flag))) == whole


def test_tpe_uses_the_losses(tmp_path):
    found = search_through(Search(sweep_in(tmp_path, "--num_samples=40")))
    first, last = found[1:11], found[-10:]
    assert sum(map(loss_of, last)) < sum(map(loss_of, first)) / 2


def test_a_grid_has_the_settings_own_values_first(tmp_path):
    space = ("dropout={grid: [0.1, 0.2]}", "learning_rate={choice: [1e-3, 1e-2]}")
    found = search_through(Search(sweep_in(tmp_path, "--search_algorithm=grid", space=space)))
    assert [loss_of(values) for values in found] == pytest.approx(
        [0.0006, 0.101, 0.11, 0.201, 0.21]
    )


def test_failed_trials_and_values_outside_of_the_space_are_no_trouble(tmp_path):
    sweep = sweep_in(tmp_path, "--dropout=0.9")
    search = Search(sweep)
    for number in range(8):
        trial = search.ask()
        assert (trial.values["model.dropout"] == 0.9) == (number == 0)
        search.tell(trial.name, None if number % 2 else 1.0)
    assert search.ask() is None


def test_the_winner_is_compared_on_seeds_that_no_trial_had(tmp_path):
    sweep = sweep_in(tmp_path, "--final_seeds=2")
    for name, losses in (("0000", "2.0, 1.5"), ("0001", "2.0, 1.0"), ("0002", "NaN, null")):
        directory = sweep.directory / "trials" / name
        Trial(directory, name, {"model.dropout": 0.1 * int(name)}).write()
        (directory / "metrics.jsonl").write_text(
            "".join(
                f'{{"kind": "evaluation", "step": {step}, "val_loss_estimate": {loss}}}\n'
                for step, loss in enumerate(losses.split(", "), start=1)
            )
        )
        conclude(Trial.read(directory), "failed" if name == "0002" else "finished")
    found = collect_outcome(sweep)
    assert found["best"] == "0001"
    finals = Finals.of(sweep, found)
    assert [trial.name for trial in finals.trials] == [
        "0000-1338", "0001-1338", "0000-1339", "0001-1339"
    ]  # fmt: skip
    assert [trial.values["run.seed"] for trial in finals.trials] == [1338, 1338, 1339, 1339]
    assert Finals.of(sweep, {**found, "best": "0000"}) is None
    assert Finals.of(sweep, {**found, "best": None}) is None
