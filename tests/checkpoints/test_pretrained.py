"""Published checkpoints as Hugging Face's cache keeps them, read by its own library."""

import hashlib
import re
from pathlib import Path

import pytest

from yuzogpt.checkpoints.pretrained import CONFIG, PUBLISHED, WEIGHTS, download
from yuzogpt.errors import UserError

NAME = "gpt2-medium"  # what the hub says is its SHA-256, is
CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def snapshot(tmp_path, monkeypatch) -> Path:
    """The folder of the revision in a cache that has its config only."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / f"models--openai-community--{NAME}"
    snapshot = folder / "snapshots" / PUBLISHED[NAME].revision
    (folder / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (snapshot / CONFIG).write_text("{}")
    return snapshot


def link_to_blob(snapshot: Path, sha256: str) -> Path:
    """Have the weights be a link into the blobs; return where that is."""
    (snapshot / WEIGHTS).symlink_to(Path("..", "..", "blobs", sha256))
    return snapshot.parents[1] / "blobs" / sha256


def test_weights_are_held_against_the_name_of_their_blob(snapshot):
    blob = link_to_blob(snapshot, SHA256)
    blob.write_bytes(CONTENT)
    assert download(NAME) == snapshot
    blob.write_bytes(b"others")
    expected = f"^{blob}: SHA-256 is .*, expected {SHA256[:12]}; delete it"
    with pytest.raises(UserError, match=expected):
        download(NAME)


def test_a_blob_that_repositories_share_has_another_name_of_its_own(snapshot, tmp_path):
    """As what Xet brings, which is known by Xet's hash there (huggingface_hub from 2.4 on)."""
    shared = tmp_path / "blobs" / "ab" / "ab12"
    shared.parent.mkdir(parents=True)
    shared.write_bytes(CONTENT)
    link_to_blob(snapshot, SHA256).symlink_to(shared)
    assert download(NAME) == snapshot


def test_a_cache_without_links_says_what_would_work(snapshot):
    (snapshot / WEIGHTS).write_bytes(CONTENT)
    with pytest.raises(UserError, match=re.escape(f"give {snapshot} instead of {NAME}")) as raised:
        download(NAME)
    assert "\n" not in str(raised.value)
