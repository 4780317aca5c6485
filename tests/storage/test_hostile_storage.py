"""Checkpoints and folders of others: they name no file of mine, and fill no disk."""

import hashlib

import pytest

from tests.conftest import TINY
from tests.storage.stores import URI, put
from yuzogpt import cli
from yuzogpt.checkpoints import remote
from yuzogpt.errors import UserError
from yuzogpt.storage.atomic_files import to_json
from yuzogpt.storage.run_storage import READER, LocalStorage, open_storage

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
