"""Runs in an object store, against a real S3 server: what they leave, lose and refuse."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.conftest import REPOSITORY, TINY, names, tiny_settings, yuzogpt
from tests.training.worlds import exit_codes, losses, records, run_world, start_world, weights
from tests.waiting import wait_until
from yuzogpt import checkpoints, cli, runs
from yuzogpt.checkpoints import remote
from yuzogpt.errors import RunFailed, Stopped, UserError
from yuzogpt.runs.event_log import Follower, MetricsLog, append_record
from yuzogpt.storage import background_uploader, lease, run_storage
from yuzogpt.storage.atomic_files import to_json
from yuzogpt.storage.lease import LEASE, Lease
from yuzogpt.storage.run_storage import (
    DRIVER,
    READER,
    WORKER,
    LocalStorage,
    ObjectStorage,
    open_storage,
)
from yuzogpt.training import launch

URI = "s3://runs/team/run"
OF_AWS = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")


class Environment:
    """Gives each rank a cache of its own, as on separate nodes, and the address of the store."""

    def __init__(self, caches):
        self.caches = caches
        self.values = {name: os.environ[name] for name in OF_AWS}

    def __call__(self, rank):
        os.environ.update(self.values, LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ["XDG_CACHE_HOME"] = str(self.caches / str(rank))


class KillAt(Environment):
    """Kills a rank when it is about to upload a file of a checkpoint."""

    def __init__(self, caches, file):
        super().__init__(caches)
        self.file = file

    def __call__(self, rank):
        super().__call__(rank)
        real = ObjectStorage.upload

        def upload(storage, source=None):
            if storage.uri.endswith(self.file):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(storage, source)

        ObjectStorage.upload = upload


@pytest.fixture
def store(s3, tmp_path, monkeypatch):
    """A bucket named `runs`, and an empty cache."""
    s3.create_bucket(Bucket="runs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(run_storage, "STORE_SETTLE_S", 0.05)
    monkeypatch.setattr(background_uploader, "SYNC_INTERVAL_S", 0.2)
    return s3


def download(s3, directory):
    """Copy the run to a directory, past the code that is tested."""
    for name in names(s3):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        s3.download_file("runs", f"team/run/{name}", str(directory / name))
    return directory


def put(s3, name, content):
    s3.put_object(Bucket="runs", Key=f"team/run/{name}", Body=content)


def get(s3, name):
    return s3.get_object(Bucket="runs", Key=f"team/run/{name}")["Body"].read()


def train(corpus_dir, out_dir, *flags):
    """Train in this process, as the command does."""
    launch.run_here(runs.check(tiny_settings(corpus_dir, out_dir, "--dropout=0.1", *flags)))


def files_below(directory):
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")} - {
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_dir()
    }


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
    assert f"sample from it: yuzogpt sample --out_dir={URI}" in again.stdout
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


# --- who may write


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_one_line_before_ray_starts(store, corpus_dir, tmp_path):
    flags = [*TINY, f"--data_dir={corpus_dir}"]
    missing = yuzogpt("train", *flags, "--out_dir=s3://nobucket/run")
    nobody = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    silent = yuzogpt("train", *flags, f"--out_dir={URI}", **nobody)
    for result in (missing, silent):
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1, result.stderr
        assert "s3://" in result.stderr
        assert "Ray" not in result.stdout


@pytest.mark.slow
def test_a_second_command_is_refused(store, corpus_dir):
    with Lease(open_storage(URI, DRIVER)):
        result = yuzogpt(
            "train", *TINY, f"--data_dir={corpus_dir}", f"--out_dir={URI}", "--num_workers=0"
        )
        assert result.returncode == 2
        assert f"{URI}: in use by process {os.getpid()}" in result.stderr
    assert LEASE not in names(store)


@pytest.mark.slow
def test_of_two_that_come_at_once_one_holds_the_lease(store, monkeypatch):
    monkeypatch.setattr(run_storage, "STORE_SETTLE_S", 0.5)
    held, refused, done = [], [], threading.Event()

    def take(number):
        try:
            with Lease(open_storage(URI, DRIVER)) as mine:
                held.append(mine.holder["id"])
                done.wait(20)
        except UserError:
            refused.append(number)
            done.set()

    threads = [threading.Thread(target=take, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(held), len(refused)) == (1, 1)


@pytest.mark.slow
def test_a_lease_of_another_machine_expires(store, monkeypatch):
    monkeypatch.setattr(lease, "EXPIRES_AFTER", 0.5)
    monkeypatch.setattr(lease, "HEARTBEAT", 0.2)
    stale = {"id": "x", "process": 1, "host": "gone", "boot": "", "namespace": "", "beat": 3}
    for left in (json.dumps(stale).encode(), b'{"id": '):
        put(store, LEASE, left)
        with Lease(open_storage(URI, DRIVER)) as mine:
            assert json.loads(get(store, LEASE))["id"] == mine.holder["id"]
        assert LEASE not in names(store)


def test_a_holder_that_lost_its_lease_ends(store, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT", 0.05)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    directory = open_storage(URI, DRIVER)
    with (
        pytest.raises(RunFailed, match=f"{URI}: another command took over"),
        Lease(directory) as mine,
    ):
        put(store, LEASE, json.dumps({**mine.holder, "id": "another"}).encode())
        threading.Event().wait(60)  # its work, which is interrupted


# --- what a run says, from one process to another


@pytest.mark.slow
def test_records_are_followed_through_the_store(store):
    seen = []
    log = MetricsLog(open_storage(URI, WORKER) / runs.METRICS, -1, None)
    followed = open_storage(URI, DRIVER) / runs.METRICS
    with Follower(followed, seen.append):
        log.write("train", 1, loss=2.0)
        log.write("start", 1)
        wait_until(lambda: len(seen) == 2)
        assert [record["kind"] for record in seen] == ["train", "start"]
        log.write("train", 2, loss=1.0)
        log.close()
        append_record(followed, "failure", "worker 0 failed")
    assert [record["kind"] for record in seen] == ["train", "start", "train", "failure"]


def test_a_store_is_a_type(store, tmp_path):
    checkpoint = open_storage(URI, WORKER) / "checkpoints" / "step-1"
    assert checkpoint.display_name == f"{URI}/checkpoints/step-1"
    assert checkpoint.parent.parent == open_storage(URI, WORKER)
    assert checkpoint.local != (open_storage(URI, DRIVER) / "checkpoints" / "step-1").local
    assert open_storage(str(tmp_path), WORKER) == LocalStorage(tmp_path)
    assert not (LocalStorage(tmp_path) / "s3:" / "run").is_remote
    with pytest.raises(UserError, match="too long"):
        open_storage(f"s3://runs/{'x' * 300}/run", WORKER)
    with pytest.raises(UserError, match="has no folder"):
        open_storage("s3://runs/..", READER)
    with pytest.raises(UserError, match="leads out of its folder"):
        checkpoint / "../../../../victim"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["directory", "store"])
def test_both_kinds_of_storage_do_the_same(store, tmp_path, where):
    folder = LocalStorage(tmp_path) if where == "directory" else open_storage(URI, WORKER)
    file = folder / "file"
    assert not file.exists()
    with pytest.raises(FileNotFoundError):
        file.read()
    file.delete()
    assert file.create(b"1")
    assert not file.create(b"2")
    file.append(b"3")
    assert file.read() == b"13"
    file.delete_if(b"1")
    assert file.read() == b"13"
    file.delete_if(b"13")
    assert not file.exists()
    file.write(b"4")
    file.write(b"5")
    assert (folder / "file").read() == b"5"
    file.delete()
    assert not file.exists()
    if where == "directory":
        assert list(tmp_path.glob(".*")) == []
        assert file.upload() is None
        assert not file.download()
        assert folder.list_remote() == {}


HOSTILE = [
    "../../../victim.txt",
    "{victim}",
    "s3%3A%2F%2Fattack/reader/victim.txt",
    "linked/victim.txt",
    "model.safetensors/../../victim.txt",
    "model.safetensors\n",
    "state.json\0",
    ".bashrc",
]


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["sample", "serve", "export", "evaluate", "train", "report"])
@pytest.mark.parametrize("is_local", [True, False], ids=["folder", "store"])
def test_a_checkpoint_of_others_names_no_file_of_mine(
    store, corpus_dir, tmp_path, verb, is_local, monkeypatch, capfd
):
    """Its manifest names a file that lies elsewhere, with the hash of what a store has there."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    victim = home / "victim.txt"
    victim.write_text("mine")
    evil = b"evil"
    store.create_bucket(Bucket="attack")
    store.put_object(Bucket="attack", Key="victim.txt", Body=evil)
    state = to_json({
        "step": 5, "rows_seen": 60, "settings": {}, "dataset": "", "tokenizer": "", "metrics": {},
    })  # fmt: skip
    folder = home / "theirs" / "checkpoints" / "step-5"
    folder.mkdir(parents=True)
    (folder / "linked").symlink_to(home)
    reference = str(home / "theirs") if is_local else URI
    flags = {
        "sample": [f"--out_dir={reference}"],
        "serve": [reference, "--num_replicas=0", "--port=0"],
        "export": [reference, "--to=huggingface", str(home / "exported")],
        "evaluate": [reference, "--tasks=wikitext2", "--num_workers=0"],
        "train": [*TINY, f"--data_dir={corpus_dir}", f"--init_from={reference}",
                  f"--out_dir={home / 'mine'}", "--num_workers=0"],
        "report": [reference],
    }  # fmt: skip
    for name in HOSTILE:
        files = {name.format(victim=victim): hashlib.sha256(evil).hexdigest()}
        files["state.json"] = hashlib.sha256(state).hexdigest()
        heads = {"state.json": state, "manifest.json": to_json({"format": 2, "files": files})}
        for head, content in heads.items():
            if is_local:
                (folder / head).write_bytes(content)
            else:
                put(store, f"checkpoints/step-5/{head}", content)
        before = {path for path in home.rglob("*") if path.is_file()}
        assert cli.exit_status([verb, *flags[verb]]) == 2
        assert victim.read_text() == "mine"
        assert {path for path in home.rglob("*") if path.is_file()} == before
        printed = capfd.readouterr().err.splitlines()
        errors = [line for line in printed if "!!! checkpoint" not in line]
        assert len(errors) == 1, errors


def test_a_folder_named_as_a_copy_in_the_cache_is_a_folder(store, tmp_path):
    """No path means a store, whatever its name, in the cache or not."""
    store.create_bucket(Bucket="attack")
    store.put_object(Bucket="attack", Key="run/model.safetensors", Body=b"evil")
    for base in (tmp_path, tmp_path / "cache" / "yuzogpt" / "runs"):
        folder = base / "s3%3A%2F%2Fattack" / READER / "run"
        folder.mkdir(parents=True)
        storage = open_storage(str(folder), READER)
        assert storage == LocalStorage(folder)
        assert not (storage / "model.safetensors").download()
        assert not (storage / "model.safetensors").exists()


def test_a_head_that_would_fill_the_disk_is_not_fetched(store, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "MAX_JSON_BYTES", 1000)
    put(store, "checkpoints/step-5/state.json", b" " * 1001)
    put(store, "checkpoints/step-5/manifest.json", b"{}")
    with pytest.raises(UserError, match="1,001 bytes, at most 1,000"):
        remote.open_reference(URI)
    assert not list((tmp_path / "cache").rglob("state.json"))
