"""Checkpoints: whole or not there, never half; newest and best are read off the directory."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.checkpoints.files import write_checkpoint
from tests.conftest import REPOSITORY
from yuzogpt import checkpoints
from yuzogpt.checkpoints.format import CorruptCheckpoint, State
from yuzogpt.checkpoints.safetensors_file import write_tensors
from yuzogpt.errors import UserError
from yuzogpt.storage.run_storage import LocalStorage

TENSORS = {"w": torch.arange(1000.0)}


def write(run, step, loss=1.0, windows=24):
    metrics = {"val_loss_estimate": loss, "val_windows": windows}
    state = State(step, step * 12, {}, "data", "tokenizer", metrics)
    return write_checkpoint(run, state, TENSORS, {"exp_avg/w": TENSORS["w"]}, b"{}")


def test_round_trip(tmp_path):
    written = write(tmp_path, 5)
    found = checkpoints.newest(LocalStorage(tmp_path), pytest.fail)
    assert found == written
    assert found.state.rows_seen == 60
    assert torch.equal(dict(found.tensors("model"))["w"], TENSORS["w"])
    assert torch.equal(dict(found.tensors("optimizer"))["exp_avg/w"], TENSORS["w"])
    files = {path.name for path in found.directory.iterdir()}
    assert files == {
        "model.safetensors", "optimizer.safetensors", "tokenizer.json", "state.json",
        "manifest.json",
    }  # fmt: skip


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def empty(path):
    for file in path.parent.iterdir():
        file.unlink()


@pytest.mark.parametrize("damage", [flip, lambda path: path.unlink(), empty])
@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
def test_damage_falls_back_to_the_one_before(tmp_path, damage, file):
    older, newer = write(tmp_path, 5), write(tmp_path, 10)
    damage(newer.directory / file)
    corrupt = []
    run = LocalStorage(tmp_path)
    assert checkpoints.newest(run, lambda *arguments: corrupt.append(arguments)) == older
    assert corrupt[0][0] == newer.storage
    assert checkpoints.quarantine(newer.storage) == "broken-step-10-0"
    assert (tmp_path / "checkpoints" / "broken-step-10-0").is_dir()
    assert checkpoints.candidates(tmp_path) == [older.directory]


def test_what_the_disk_gives_back_otherwise_gets_no_name(tmp_path):
    older = write(tmp_path, 5)
    temporary = checkpoints.begin(LocalStorage(tmp_path), 10)
    digest = write_tensors(temporary.local / "model.safetensors", TENSORS, TENSORS.values())
    flip(temporary.local / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors does not have"):
        checkpoints.commit(
            temporary, replace(older.state, step=10), b"{}",
            {"model.safetensors": digest}, {"model.safetensors": ["w"]},
        )  # fmt: skip
    assert checkpoints.candidates(tmp_path) == [older.directory]
    assert checkpoints.newest(LocalStorage(tmp_path), pytest.fail) == older


def test_prune_keeps_the_best_and_the_successor(tmp_path):
    for step, loss in ((5, 2.0), (10, 1.0), (15, 3.0)):
        write(tmp_path, step, loss)
    checkpoints.prune(LocalStorage(tmp_path), write(tmp_path, 20, 2.5), keep_last=1, keep_best=1)
    assert [checkpoints.step_of(path) for path in checkpoints.candidates(tmp_path)] == [10, 20]
    assert checkpoints.best(LocalStorage(tmp_path), pytest.fail).state.step == 10
    assert checkpoints.newest(LocalStorage(tmp_path), pytest.fail).state.step == 20


def test_prune_keeps_a_best_that_the_newest_does_not_compare_with(tmp_path):
    """Over other windows, as after a resume with another batch_size."""
    for step, loss in ((5, 2.0), (10, 1.0), (15, 3.0)):
        write(tmp_path, step, loss)
    write(tmp_path, 20, 1.5, windows=12)
    checkpoints.prune(
        LocalStorage(tmp_path), write(tmp_path, 25, 4.0, windows=12), keep_last=1, keep_best=1
    )
    assert [checkpoints.step_of(path) for path in checkpoints.candidates(tmp_path)] == [10, 20, 25]
    assert checkpoints.best(LocalStorage(tmp_path), pytest.fail).state.step == 20


def test_a_corrupt_best_is_not_loaded(tmp_path):
    write(tmp_path, 5, 1.0)
    write(tmp_path, 10, 2.0)
    flip(tmp_path / "checkpoints" / "step-5" / "model.safetensors")
    found = checkpoints.find(LocalStorage(tmp_path))
    assert found.state.step == 10
    flip(tmp_path / "checkpoints" / "step-10" / "model.safetensors")
    with pytest.raises(UserError, match="no checkpoint is whole"):
        checkpoints.find(LocalStorage(tmp_path))
    with pytest.raises(UserError, match="corrupt checkpoint"):
        checkpoints.find(LocalStorage(tmp_path / "checkpoints" / "step-10"))


def test_one_that_its_run_deletes_while_it_is_read_is_not_corrupt(tmp_path, monkeypatch, capfd):
    best = write(tmp_path, 5, 1.0).directory
    real = checkpoints.format.sha256

    def prune(path):
        monkeypatch.setattr(checkpoints.format, "sha256", real)
        write(tmp_path, 10, 0.5)
        checkpoints.remove(best)
        return real(path)

    monkeypatch.setattr(checkpoints.format, "sha256", prune)
    assert checkpoints.find(LocalStorage(tmp_path)).state.step == 10
    assert "corrupt" not in capfd.readouterr().err


def test_another_format_is_refused(tmp_path):
    directory = write(tmp_path, 5).directory
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps({**manifest, "format": 3}))
    with pytest.raises(UserError, match="format 3, written by another version"):
        # It is not corrupt, and not quarantined.
        checkpoints.newest(LocalStorage(tmp_path), pytest.fail)


def test_a_state_with_more_in_it_is_read(tmp_path):
    written = write(tmp_path, 5)
    path = written.directory / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_a_later_version": 1}))
    assert checkpoints.read(written.storage).state.step == 5


def test_readers_of_weights_need_no_optimizer(tmp_path):
    written = write(tmp_path, 5)
    (written.directory / "optimizer.safetensors").unlink()
    assert checkpoints.find(LocalStorage(tmp_path)).state.step == 5
    with pytest.raises(CorruptCheckpoint, match=r"optimizer.safetensors is missing"):
        checkpoints.verify(written.storage)


def test_best_compares_what_compares(tmp_path):
    write(tmp_path, 5, 0.5, windows=10)  # over other windows than the rest
    write(tmp_path, 10, float("nan"))
    write(tmp_path, 15, 2.0)
    write(tmp_path, 20, 3.0)
    assert checkpoints.best(LocalStorage(tmp_path), pytest.fail).state.step == 15


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from yuzogpt import checkpoints
from tests.checkpoints.test_checkpoints import write
from yuzogpt.storage.run_storage import LocalStorage
run, victim = Path(sys.argv[1]), int(sys.argv[2])
write(run, 5)
calls, real = 0, os.fsync
def fsync(file):
    global calls
    real(file)
    calls += 1
    if calls == victim:
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
checkpoints.prune(LocalStorage(run), write(run, 10), keep_last=1, keep_best=1)
print("survived")
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_a_whole_checkpoint(tmp_path):
    # Five files and two directories are synced: the writer is killed after each, and not at all.
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED_WRITER, str(tmp_path / str(victim)), str(victim)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
        )
        for victim in (1, 3, 5, 6, 7, 99)
    ]
    for victim, process in zip((1, 3, 5, 6, 7, 99), processes, strict=True):
        survived = b"survived" in process.communicate()[0]
        assert survived == (victim == 99)
        found = checkpoints.newest(LocalStorage(tmp_path / str(victim)), pytest.fail)
        assert found.state.step == (10 if victim >= 7 else 5)
        assert torch.equal(dict(found.tensors("model"))["w"], TENSORS["w"])


def test_a_corpus_is_not_taken_for_a_corrupt_checkpoint(corpus_dir):
    with pytest.raises(UserError, match=r"a prepared corpus, not a run; give the out_dir"):
        checkpoints.find(LocalStorage(corpus_dir))
