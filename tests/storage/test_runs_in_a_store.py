"""Runs in an object store, against a real S3 server: what they leave, lose and refuse."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, TINY, names, tiny_settings, yuzogpt
from tests.storage.stores import URI, Environment, KillAt, download, files_below, get, put, train
from tests.training.worlds import exit_codes, losses, records, run_world, start_world, weights
from tests.waiting import wait_until
from yuzogpt import checkpoints, cli, runs
from yuzogpt.checkpoints import remote
from yuzogpt.errors import RunFailed, Stopped, UserError
from yuzogpt.runs.event_log import MetricsLog
from yuzogpt.storage.run_storage import WORKER, LocalStorage, ObjectStorage, open_storage
from yuzogpt.training import launch


@pytest.mark.slow
def test_a_run_in_a_store_leaves_what_a_local_one_leaves(store, corpus_dir, tmp_path):
    flags = ("--max_iters=30", "--eval_interval=5", "--keep_last=1")
    train(corpus_dir, URI, *flags)
    train(corpus_dir, tmp_path / "local", *flags)
    copy = download(store, tmp_path / "copy")
    assert files_below(copy) == files_below(tmp_path / "local")
    assert losses(copy) == losses(tmp_path / "local")
    assert (
        records(copy, "final")[0]["val_loss"] == records(tmp_path / "local", "final")[0]["val_loss"]
    )
    for directory in checkpoints.candidates(tmp_path / "local"):
        assert weights(copy, checkpoints.step_of(directory)) == weights(
            tmp_path / "local", checkpoints.step_of(directory)
        )
        checkpoints.verify(LocalStorage(copy / "checkpoints" / directory.name))
    here = {path.name for path in (tmp_path / "cache" / "yuzogpt" / "runs").rglob("*.safetensors")}
    assert not here  # a copy in the cache keeps metadata alone


@pytest.mark.slow
def test_killed_and_run_again_on_another_machine_gives_the_same_bits(store, corpus_dir, tmp_path):
    flags = [*TINY, "--dropout=0.1", f"--data_dir={corpus_dir}", "--num_workers=0"]
    flags += ["--max_iters=200"]
    command = [sys.executable, "-m", "yuzogpt", "train", *flags]
    process = subprocess.Popen(
        [*command, "--out_dir=team/run", "--storage=s3://runs"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
    )
    wait_until(lambda: "checkpoints/step-50/manifest.json" in names(store), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert records(download(store, tmp_path / "killed"), "final") == []
    settings = tmp_path / "killed" / runs.SETTINGS
    again = yuzogpt("train", str(settings), XDG_CACHE_HOME=str(tmp_path / "another"))
    assert again.returncode == 0, again.stderr
    assert f"sample from it: yuzogpt sample {URI}" in again.stdout
    whole = yuzogpt("train", *flags, f"--out_dir={tmp_path / 'local'}")
    assert whole.returncode == 0, whole.stderr
    copy = download(store, tmp_path / "copy")
    assert len(records(copy, "start")) == 2
    assert losses(copy) == losses(tmp_path / "local")
    assert weights(copy, 200) == weights(tmp_path / "local", 200)
    finished = yuzogpt("train", str(settings))
    assert f"{URI}: finished" in finished.stdout


@pytest.mark.slow
def test_each_rank_sends_its_part_and_fetches_the_whole(store, corpus_dir, tmp_path):
    flags = ("--dropout=0.1", "--parallel=fsdp", "--eval_interval=5")
    for max_iters in (5, 10):
        settings = tiny_settings(corpus_dir, URI, *flags, f"--max_iters={max_iters}")
        ranks = start_world(2, settings, Environment(tmp_path / f"caches-{max_iters}"))
        assert exit_codes(ranks) == [0, 0]
    run_world(2, tiny_settings(corpus_dir, tmp_path / "local", *flags, "--max_iters=10"))
    copy = download(store, tmp_path / "copy")
    assert losses(copy) == losses(tmp_path / "local")
    assert len(weights(copy, 10)) == 4
    assert weights(copy, 10) == weights(tmp_path / "local", 10)
    for rank in (0, 1):
        assert not list((tmp_path / "caches-10" / str(rank)).rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_killed_while_it_sends_a_checkpoint(store, corpus_dir, tmp_path, name):
    flags = ("--dropout=0.1", "--eval_interval=5", "--max_iters=10")
    settings = tiny_settings(corpus_dir, URI, *flags)
    killed = start_world(1, settings, KillAt(tmp_path / "caches", f"step-10/{name}"))
    assert exit_codes(killed) == [-signal.SIGKILL]
    left = download(store, tmp_path / "left")
    assert (left / "checkpoints" / "step-10" / "state.json").exists() == (name == "manifest.json")
    assert not (left / "checkpoints" / "step-10" / "manifest.json").exists()
    assert checkpoints.newest(LocalStorage(left), lambda *_: None).state.step == 5
    assert exit_codes(start_world(1, settings, Environment(tmp_path / "others"))) == [0]
    run_world(1, tiny_settings(corpus_dir, tmp_path / "local", *flags))
    copy = download(store, tmp_path / "copy")
    assert losses(copy) == losses(tmp_path / "local")
    assert weights(copy, 10) == weights(tmp_path / "local", 10)


@pytest.mark.slow
def test_what_was_not_committed_is_not_there(store, corpus_dir):
    train(corpus_dir, URI, "--max_iters=10", "--eval_interval=5")
    store.delete_object(Bucket="runs", Key="team/run/checkpoints/step-10/manifest.json")
    put(store, "checkpoints/step-7/model.safetensors", b"of a killed writer")
    train(corpus_dir, URI, "--max_iters=15", "--eval_interval=5")
    run = open_storage(URI, WORKER).local
    assert [start["step"] for start in records(run, "start")] == [0, 5]
    folders = {name.split("/")[1] for name in names(store) if name.startswith("checkpoints/")}
    assert "step-7" not in folders


@pytest.mark.slow
def test_a_corrupt_checkpoint_is_quarantined_and_the_one_before_used(store, corpus_dir, capfd):
    train(corpus_dir, URI, "--max_iters=10", "--eval_interval=5")
    name = "checkpoints/step-10/model.safetensors"
    content = get(store, name)
    put(store, name, content[:-1] + bytes([content[-1] ^ 1]))
    train(corpus_dir, URI, "--max_iters=12", "--eval_interval=6")
    assert "!!! checkpoint step-10 is corrupt (model.safetensors does not" in capfd.readouterr().out
    run = open_storage(URI, WORKER).local
    assert [start["step"] for start in records(run, "start")] == [0, 5]
    left = names(store, "team/run/checkpoints/step-10/")
    assert {"manifest.broken.json", "model.safetensors", "optimizer.safetensors"} <= left
    assert "manifest.json" not in left


@pytest.mark.slow
def test_a_damaged_copy_is_downloaded_again(store, corpus_dir):
    train(corpus_dir, URI, "--max_iters=5", "--eval_interval=5")
    for name in ("model.safetensors", "state.json"):
        copy = open_storage(URI, WORKER).local / "checkpoints" / "step-5" / name
        copy.write_bytes(b"not what was stored")
    train(corpus_dir, URI, "--max_iters=6", "--eval_interval=6")
    run = open_storage(URI, WORKER).local
    assert [start["step"] for start in records(run, "start")] == [0, 5]


@pytest.mark.slow
def test_uploads_that_fail_end_the_run_after_three(store, corpus_dir, monkeypatch):
    real, failing = ObjectStorage.upload, set()

    def upload(file, source=None):
        if file.name == "optimizer.safetensors" and file.parent.name in failing:
            raise OSError(5, "no route to the store", file.uri)
        return real(file, source)

    monkeypatch.setattr(ObjectStorage, "upload", upload)
    failing |= {"step-10"}
    train(corpus_dir, URI, "--max_iters=15", "--eval_interval=5")
    run = open_storage(URI, WORKER).local
    notices = [record["text"] for record in records(run, "notice")]
    assert any("step-10 could not be written (no route to the store)" in text for text in notices)
    failing |= {"step-20", "step-25", "step-30"}
    with pytest.raises(RunFailed, match=f"{URI}: 3 checkpoints in a row"):
        train(corpus_dir, URI, "--max_iters=40", "--eval_interval=5")
    assert checkpoints.step_of(checkpoints.resumable(run)[-1]) == 15


@pytest.mark.slow
def test_a_checkpoint_whose_records_are_not_in_the_store_replaces_none(
    store, corpus_dir, monkeypatch
):
    real, calls = MetricsLog.upload, []

    def upload(log):
        calls.append(None)
        if len(calls) == 2:
            raise OSError(5, "no route to the store")
        real(log)

    monkeypatch.setattr(MetricsLog, "upload", upload)
    train(corpus_dir, URI, "--max_iters=15", "--eval_interval=5", "--keep_last=2")
    left = names(store)
    committed = {name.split("/")[1] for name in left if name.endswith("/manifest.json")}
    assert committed == {"step-5", "step-15"}
    assert "checkpoints/step-5/optimizer.safetensors" in left  # a run could resume from it
    kept = checkpoints.candidates(open_storage(URI, WORKER).local)
    assert [checkpoints.step_of(directory) for directory in kept] == [5, 15]


@pytest.mark.slow
def test_a_file_named_stop_in_the_store_is_enough(store, corpus_dir, monkeypatch):
    made = []

    class Watching(launch.Display):
        def __call__(self, record):
            made.append(record["step"])
            if record["kind"] == "train" and record["step"] == 20:
                put(store, runs.STOP, b"enough for today")

    monkeypatch.setattr(launch, "Display", Watching)
    with pytest.raises(Stopped, match="enough for today"):
        train(corpus_dir, URI, "--max_iters=100000", "--eval_interval=100000")
    stopped = made[-1]
    manifest = f"checkpoints/step-{stopped}/manifest.json"
    assert manifest in names(store)
    assert runs.STOP not in names(store)
    assert "metrics" not in json.loads(get(store, manifest))
    train(corpus_dir, URI, f"--max_iters={stopped + 1}", f"--eval_interval={stopped}")
    run = open_storage(URI, WORKER).local
    (looked, _) = records(run, "evaluation")[1:]
    assert looked["step"] == stopped
    found = json.loads(get(store, manifest))["metrics"]
    assert found["val_loss_estimate"] == looked["val_loss_estimate"]


@pytest.mark.slow
def test_overwrite_deletes_the_runs_own_files_only(store, corpus_dir):
    train(corpus_dir, URI, "--max_iters=10", "--eval_interval=5")
    put(store, "notes.txt", b"mine")
    put(store, "checkpoints/step-3/manifest.broken.json", b"{}")
    train(corpus_dir, URI, "--max_iters=3", "--eval_interval=3", "--overwrite", "--seed=2")
    left = names(store)
    assert get(store, "notes.txt") == b"mine"
    folders = {name.split("/")[1] for name in left if name.startswith("checkpoints/")}
    assert folders == {"step-3"}
    assert "checkpoints/step-3/manifest.broken.json" not in left
    changed = b"overwrite: true" in get(store, runs.SETTINGS)
    assert not changed  # to train from this file again must not delete the run


@pytest.mark.slow
def test_changed_settings_are_refused_without_a_download(store, corpus_dir, monkeypatch):
    train(corpus_dir, URI, "--max_iters=5", "--eval_interval=5")
    fetched, real = [], ObjectStorage.download

    def fetch(file, **options):
        fetched.append(file.name)
        return real(file, **options)

    monkeypatch.setattr(ObjectStorage, "download", fetch)
    with pytest.raises(UserError, match=f"{URI}: holds a run with other settings"):
        train(corpus_dir, URI, "--max_iters=9", "--learning_rate=1")
    assert not [name for name in fetched if name.endswith(".safetensors")]


# --- readers


@pytest.mark.slow
def test_report_sample_export_and_finetuning_read_the_store(store, corpus_dir, tmp_path, capsys):
    train(corpus_dir, URI, "--max_iters=10", "--eval_interval=5")
    cli.main(["report", URI])
    assert f"page: {URI}/report.html" in capsys.readouterr().out
    assert b"<html" in get(store, "report.html")
    flags = ["--num_samples=1", "--max_new_tokens=5", "--device=cpu"]
    for where in (
        ["--out_dir=team/run", "--storage=s3://runs"],
        [f"--out_dir={URI}/checkpoints/step-10"],
    ):
        cli.main(["sample", *where, *flags])
        assert capsys.readouterr().out.strip()
    reader = tmp_path / "cache" / "yuzogpt" / "runs" / "s3%3A%2F%2Fruns%2Fteam" / "reader" / "run"
    assert {path.name for path in reader.rglob("*.safetensors")} == {"model.safetensors"}
    cli.main(["export", f"--out_dir={URI}", f"--hf_dir={tmp_path / 'hf'}"])
    assert (tmp_path / "hf" / "config.json").is_file()
    train(corpus_dir, tmp_path / "tuned", f"--init_from={URI}", "--max_iters=2")
    assert sorted(losses(tmp_path / "tuned")) == [1, 2]


@pytest.mark.slow
def test_a_checkpoint_deleted_since_a_reader_listed_it_is_not_corrupt(store, corpus_dir, capfd):
    train(corpus_dir, URI, "--max_iters=10", "--eval_interval=5")
    reader = remote.open_reference(URI)
    best, other = checkpoints.by_validation_loss(reader.local)
    for name in names(store, f"team/run/checkpoints/{best.name}/"):
        store.delete_object(Bucket="runs", Key=f"team/run/checkpoints/{best.name}/{name}")
    assert checkpoints.find(reader).directory == other
    assert "corrupt" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("uri", ["s3://nobucket/run", "s3://runs/no/run"])
def test_nothing_to_read_is_one_line(store, uri):
    for verb, why in (("report", "no run here"), ("sample", "no model here")):
        with pytest.raises(UserError, match=f"{uri}: {why}"):
            cli.main([verb, f"--out_dir={uri}"])
