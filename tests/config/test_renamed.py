"""Settings that were renamed: their old names work wherever earlier versions wrote them."""

import hashlib
import json

import pytest

from tests.conftest import TINY, tiny_settings
from tests.training.worlds import losses, train_here
from yuzogpt import runs
from yuzogpt.cli import VERBS, exit_status, main
from yuzogpt.cli.entry_point import read_arguments
from yuzogpt.config import DoctorSettings, EvaluateSettings, TrainSettings, TuneSettings
from yuzogpt.config.renamed import RENAMED_SECTIONS, RENAMED_SETTINGS, current_name
from yuzogpt.config.resolve import leaves, resolve
from yuzogpt.errors import UserError
from yuzogpt.tuning.space import read_space
from yuzogpt.tuning.sweep import Sweep
from yuzogpt.tuning.trials import Trial

OLD = ("optimizer.matrix_rate", "batch.start_rows", "workers.hang_timeout")


def old_name(dotted):
    """Return the name that a setting had, if it had one."""
    section, leaf = dotted.split(".")
    former = {new: old for old, new in (RENAMED_SETTINGS | RENAMED_SECTIONS).items()}
    return f"{former.get(section, section)}.{former.get(leaf, leaf)}"


def test_every_old_name_means_a_setting_and_none_is_one():
    known = {dotted for verb in VERBS.values() for dotted, _ in leaves(verb.schema)}
    names = {dotted.split(".")[1] for dotted in known}
    assert RENAMED_SETTINGS.keys().isdisjoint(names)
    assert set(RENAMED_SETTINGS.values()) <= names
    assert set(RENAMED_SECTIONS.values()) <= {dotted.split(".")[0] for dotted in known}
    assert all(current_name(old_name(dotted)) == dotted for dotted in known)


@pytest.mark.parametrize("old", RENAMED_SETTINGS)
def test_an_old_flag_sets_the_setting_and_says_its_new_name(old, capsys):
    new = RENAMED_SETTINGS[old]
    schema = DoctorSettings if new.startswith(("min_", "max_l", "max_c")) else TrainSettings
    value = "False" if old == "spare_workers" else "7"
    assert resolve(schema, [], [f"--{old}={value}"]) == resolve(schema, [], [f"--{new}={value}"])
    assert capsys.readouterr().err == f"yuzogpt: --{old} is now --{new}\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("matrix_rate: 3", "matrix_rate is now matrix_lr_mult"),
        ("optimizer.matrix_rate: 3", "optimizer.matrix_rate is now optimizer.matrix_lr_mult"),
        ("optimizer: {matrix_rate: 3}", "optimizer.matrix_rate is now optimizer.matrix_lr_mult"),
    ],
)
def test_an_old_name_in_yaml(content, said, tmp_path, capsys):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    assert resolve(TrainSettings, [str(path)], []).optimizer.matrix_lr_mult == 3
    assert capsys.readouterr().err == f"yuzogpt: {path}: {said}\n"


def test_an_old_section(tmp_path, capsys):
    path = tmp_path / "x.yaml"
    path.write_text("work: {num_workers: 0, batch_size: 4}\n")
    settings = resolve(EvaluateSettings, [str(path)], ["--work.shard_size=64"])
    assert settings.workers.model_dump(exclude_unset=True) == {
        "num_workers": 0, "batch_size": 4, "shard_size": 64,
    }  # fmt: skip
    assert "yuzogpt: --work.shard_size is now --workers.shard_size\n" in capsys.readouterr().err
    path.write_text("work:\n")
    assert resolve(EvaluateSettings, [str(path)], []) == EvaluateSettings()


def test_old_and_new_name_in_one_place_are_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("optimizer: {matrix_rate: 3, matrix_lr_mult: 4}\n")
    both = "matrix_rate is now .*matrix_lr_mult, which is given, too"
    with pytest.raises(UserError, match=both):
        resolve(TrainSettings, [str(path)], [])
    with pytest.raises(UserError, match=both):
        resolve(TrainSettings, [], ["--matrix_lr_mult=4", "--matrix_rate=4"])
    with pytest.raises(UserError, match=r"work.num_workers is now workers.num_workers, which is"):
        resolve(EvaluateSettings, [], ["--work.num_workers=0", "--num_workers=1"])
    # A flag is meant to change what a file says.
    path.write_text("matrix_rate: 3\n")
    settings = resolve(TrainSettings, [str(path)], ["--matrix_lr_mult=4"])
    assert settings.optimizer.matrix_lr_mult == 4


def test_an_old_flag_in_two_words(capsys):
    words = ["--spare_workers", "False", "--hang_timeout", "7", "shakespeare_char"]
    flags = ["--spare_workers=False", "--hang_timeout=7"]
    assert read_arguments("train", VERBS["train"], words) == (["shakespeare_char"], flags)
    main(["train", *words, "--dry_run"])
    printed = capsys.readouterr()
    assert "hang_timeout_s: 7.0\n" in printed.out
    assert printed.err.count(" is now --") == 2


def test_an_old_name_of_another_verb_is_unknown(capsys):
    assert exit_status(["sample", "--matrix_rate=1"]) == 2
    assert "--matrix_rate=1: unknown setting" in capsys.readouterr().err


def test_what_is_searched_by_an_old_name(tmp_path, capsys):
    path = tmp_path / "x.yaml"
    path.write_text("search: {matrix_rate: {grid: [1, 2]}}\n")
    flag = "--search.optimizer.head_rate={uniform: [1, 2]}"
    space = read_space(TuneSettings(), [str(path)], [flag])
    assert space.describe() == {
        "optimizer.matrix_lr_mult": {"grid": [1.0, 2.0]},
        "optimizer.head_lr_mult": {"uniform": [1.0, 2.0]},
    }
    assert "optimizer.head_rate is now --optimizer.head_lr_mult" in capsys.readouterr().err
    with pytest.raises(UserError, match="which is given, too"):
        read_space(TuneSettings(), [], [flag, "--search.head_lr_mult={grid: [1]}"])


def as_older_versions_wrote(checkpoint):
    """Give the settings in a checkpoint's state.json their old names."""
    path, manifest_path = checkpoint / "state.json", checkpoint / "manifest.json"
    state, manifest = json.loads(path.read_text()), json.loads(manifest_path.read_text())
    state["settings"] = {
        section: {old_name(f"{section}.{leaf}").split(".")[1]: value for leaf, value in of.items()}
        for section, of in state["settings"].items()
    }
    path.write_text(json.dumps(state))
    manifest["files"]["state.json"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest_path.write_text(json.dumps(manifest))
    return state["settings"]


def test_a_run_of_an_older_version_is_resumed(corpus_dir, tmp_path):
    def settings(*flags):
        muon = ("--optimizer=muon", "--learning_rate=5e-3", "--matrix_lr_mult=4")
        return tiny_settings(corpus_dir, tmp_path / "run", *muon, *flags)

    train_here(settings("--max_iters=10", "--eval_interval=10"))
    written = as_older_versions_wrote(tmp_path / "run" / "checkpoints" / "step-10")
    assert all(name.split(".")[1] in written[name.split(".")[0]] for name in OLD)
    longer = ("--max_iters=12", "--eval_interval=10")
    with pytest.raises(UserError, match=r"optimizer.matrix_lr_mult: 4.0 -> 5.0"):
        runs.check(settings(*longer, "--matrix_lr_mult=5"))
    train_here(settings(*longer))
    assert max(losses(tmp_path / "run")) == 12


def test_a_sweep_of_an_older_version_is_continued(corpus_dir, tmp_path):
    def sweep(*flags):
        places = [f"--data_dir={corpus_dir}", f"--out_dir={tmp_path / 'sweep'}"]
        settings = resolve(TuneSettings, [], [*TINY, *places, "--matrix_lr_mult=2", *flags])
        return Sweep(settings, read_space(settings, [], ["--search.head_lr_mult={grid: [1, 2]}"]))

    with sweep().checked().hold_directory():
        pass
    path = tmp_path / "sweep" / runs.SETTINGS
    content = path.read_text()
    for old, new in RENAMED_SETTINGS.items():
        content = content.replace(f"{new}:", f"{old}:")
    assert "optimizer.head_rate:" in content
    path.write_text(content)
    sweep().checked()
    with pytest.raises(UserError, match=r"optimizer.matrix_lr_mult: 2.0 -> 3.0"):
        sweep("--matrix_lr_mult=3").checked()
    trial = tmp_path / "sweep" / "trials" / "0000"
    Trial(trial, "0000", {"optimizer.head_rate": 1.0}).write()
    assert Trial.read(trial).values == {"optimizer.head_lr_mult": 1.0}
