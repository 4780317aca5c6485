"""A sweep's directory: whose it is, what may resume in it, and its outcome."""

import json
import shutil

import pytest

from tests.conftest import TINY
from yuzogpt import runs
from yuzogpt.config import TuneSettings
from yuzogpt.config.resolve import resolve
from yuzogpt.errors import UserError
from yuzogpt.tuning.search import Search, is_done
from yuzogpt.tuning.space import read_space
from yuzogpt.tuning.summary import margin
from yuzogpt.tuning.sweep import Sweep, collect_outcome
from yuzogpt.tuning.table import Row, TrialTable
from yuzogpt.tuning.trials import Trial

SPACE = ["--search.dropout={grid: [0.0, 0.1]}"]


@pytest.fixture
def sweep(corpus_dir, tmp_path):
    """Return how a sweep is described, and checked."""

    def describe(*flags):
        places = [f"--data_dir={corpus_dir}", f"--out_dir={tmp_path / 'sweep'}"]
        said = [*TINY, *places, "--search_algorithm=grid", "--final_seeds=2", *flags]
        settings = resolve(TuneSettings, [], said)
        return Sweep(settings, read_space(settings, [], SPACE)).checked()

    return describe


def write(directory, state="finished", losses=(2.0,), **more):
    """Leave a trial as it would be left."""
    values = {"model.dropout": 0.1 if "0001" in directory.name else 0.0}
    Trial(directory, directory.name, values, state=state, **more).write()
    evaluations = [
        {"kind": "evaluation", "step": step, "val_loss_estimate": loss}
        for step, loss in enumerate(losses, start=1)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in evaluations))


@pytest.mark.parametrize(
    "flag",
    ["--batch_size=8", "--eval_iters=1", "--eval_interval=7", "--max_iters=3", "--seed=1"],
)
def test_another_sweep_is_refused_in_its_directory(sweep, flag):
    with sweep().hold_directory():
        pass
    sweep("--num_samples=99")  # the same, longer
    with pytest.raises(UserError, match="another sweep: "):
        sweep(flag)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("model: [1]", "model: "),
        ("a: [", "not readable as YAML"),
        ("- 1", "valid dictionary"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_damaged_settings_of_a_sweep_are_one_line(sweep, tmp_path, damage, says):
    with sweep().hold_directory():
        pass
    path = tmp_path / "sweep" / "settings.yaml"
    path.write_text(path.read_text().splitlines()[0] + "\n" + damage + "\n")
    with pytest.raises(UserError) as caught:
        sweep()
    assert str(path) in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_trial_of_another_search_is_refused(sweep):
    described = sweep()
    directory = described.directory / "trials" / "0000"
    Trial(directory, "0000", {"optimizer.beta2": 0.9}).write()
    with pytest.raises(UserError, match=r"trial.json: values: not those of this search"):
        Search(described).ask()


def test_a_directory_of_others_is_refused_and_one_that_was_cut_off_is_not(sweep, tmp_path):
    directory = tmp_path / "sweep"
    directory.mkdir()
    (directory / ".lease.json").write_text("{}")
    (directory / "trials").mkdir()
    sweep()
    (directory / "thesis.txt").touch()
    with pytest.raises(UserError, match=r"holds something else, thesis\.txt"):
        sweep()


@pytest.mark.parametrize("name", ["losses.png", "best.yaml", "trials/0000/notes", "final.docx"])
@pytest.mark.parametrize("flag", ["--overwrite", "--overwrite=False"])
def test_a_file_of_the_users_under_a_name_of_ours_is_refused(sweep, tmp_path, name, flag):
    (tmp_path / "sweep" / name).parent.mkdir(parents=True)
    (tmp_path / "sweep" / name).touch()
    with pytest.raises(UserError, match="holds something else"):
        sweep(flag)


def test_overwrite_deletes_no_model_that_it_starts_from(sweep, tmp_path):
    with pytest.raises(UserError, match="--overwrite would delete what --init_from="):
        sweep("--overwrite", f"--init_from={tmp_path / 'sweep' / 'trials' / '0001'}")


def test_a_sweep_is_whole_until_the_one_that_replaces_it_begins(sweep):
    old = sweep()
    with old.hold_directory():
        write(old.directory / "trials" / "0000")
    new = sweep("--overwrite", "--seed=9")
    with new.hold_directory():
        assert [trial.name for trial in old.trials()] == ["0000"]
        sweep()  # nor has the old one's settings.yaml changed
        new.begin()
        assert old.trials() == []
    assert not sweep("--seed=9").replaces_another


def test_a_sweep_that_was_being_deleted_is_none(sweep):
    old = sweep()
    with old.hold_directory():
        write(old.directory / "trials" / "0001")
    path = old.directory / "settings.yaml"
    path.write_text(path.read_text().replace("\n", f"\n{runs.DELETING}", 1))
    with sweep("--seed=9").hold_directory():
        sweep("--seed=9").begin()
    assert old.trials() == []


def test_a_final_run_without_its_score_is_left_to_do(sweep):
    described = sweep()
    for name, losses in (("0000", [2.0]), ("0001", [1.0])):
        write(described.directory / "trials" / name, losses=losses)
    assert not is_done(described)
    finals = [f"{name}-{seed}" for seed in (1338, 1339) for name in ("0000", "0001")]
    for name in finals:
        write(described.directory / "final" / name, score=1.5)
    assert is_done(described)
    write(described.directory / "final" / finals[0])
    assert not is_done(described)


def test_a_trial_whose_folder_was_deleted_is_left_to_do(sweep):
    """Also the first, with the settings' own values, which the finals are compared with."""
    described = sweep()
    for name, losses in (("0000", [2.0]), ("0001", [1.0])):
        write(described.directory / "trials" / name, losses=losses)
    shutil.rmtree(described.directory / "trials" / "0000")
    assert not is_done(described)


def test_seeds_that_diverge_are_not_left_out_in_silence(sweep):
    described = sweep()
    for name, losses in (("0000", [2.0]), ("0001", [1.0])):
        write(described.directory / "trials" / name, losses=losses)
        write(described.directory / "final" / f"{name}-1338", score=losses[0])
        write(described.directory / "final" / f"{name}-1339", score=losses[0] + 0.1)
    assert "more than twice the spread between seeds" in margin(collect_outcome(described))
    write(described.directory / "final" / "0001-1340", state="failed")
    assert margin(collect_outcome(described)).startswith("seeds have no score: 1 with tuned")


def test_a_trial_that_was_over_before_is_said_to_be_kept(capsys):
    table = TrialTable("trials", 10)
    table.mark_kept("0000", Row({"model.dropout": 0.1}, "finished", 10, 2.0))
    table.mark_kept("0001", Row({"model.dropout": 0.2}, "failed", error="out of memory"))
    assert capsys.readouterr().out.splitlines() == [
        "0000 kept: finished at step 10: val_loss_estimate 2.0000",
        "0001 kept: failed at step 0: val_loss_estimate - (out of memory)",
    ]


def test_a_failed_trial_is_not_marked_as_the_best():
    table = TrialTable("trials", 10)
    for name, loss in (("0000", 2.0), ("0001", 1.0)):
        table.mark_started(name, {"model.dropout": 0.1})
        table.update(name, 5, loss)
    table.mark_ended("0001", "failed", "out of memory")
    table.mark_ended("0002", "failed", "its process died")  # one that never came to start
    with table.console.capture() as shown:
        table.console.print(table.table())
    (marked,) = (line for line in shown.get().splitlines() if " * " in line)
    assert marked.split()[0] == "0000"
