"""The hash rule holds out at least one of two documents, whichever worker did which unit."""

import hashlib
import shutil

import pytest

from tests.data.test_prepare import interrupt, run, texts_of
from tests.data.text_sources import make_documents, write_jsonl, write_parquet
from yuzogpt.data.blocks import STAGING
from yuzogpt.data.preparation import commit, sources


def least(texts):
    return min(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 200])
def test_the_smallest_hash_is_held_out_if_no_other_is(tmp_path, monkeypatch, count):
    texts = [f"no. {index}: {text}" for index, text in enumerate(make_documents(count))]
    corpus, _ = run(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "1")
    assert texts_of(corpus, "val") == [least(texts)]
    assert texts_of(corpus, "train") == [text for text in texts if text != least(texts)]
    corpus.verify(reread=True)
    assert sum(block.documents for block in corpus.manifest.blocks) == count

    monkeypatch.setattr(sources, "UNIT_BYTES", 10_000)  # another cut, the same split
    shuffled = write_jsonl(tmp_path / "b.jsonl", texts[::-1])
    cut, _ = run(shuffled, tmp_path / "2", "--block_tokens=200")
    assert texts_of(cut, "val") == [least(texts)]
    assert texts_of(cut, "train")[::-1] == texts_of(corpus, "train")
    names = [block.file for block in cut.manifest.blocks if block.split == "train"]
    assert names == [f"train-{index:05d}.arrow" for index in range(len(names))]


def test_copies_are_held_out_together_and_never_all(tmp_path):
    texts = ["one", "two"] * 3
    corpus, _ = run(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "1")
    assert texts_of(corpus, "val") == [least(texts)] * 3
    alike, _ = run(write_jsonl(tmp_path / "b.jsonl", ["one"] * 3), tmp_path / "2")
    assert texts_of(alike, "train") == ["one"] * 3
    assert texts_of(alike, "val") == []


def test_rejected_documents_are_not_held_out(tmp_path):
    texts = ["", "one", "two", "too long for it"]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    corpus, _ = run(source, tmp_path / "1", "--max_document_bytes=9")
    assert texts_of(corpus, "val") == [least(texts[1:3])]


@pytest.mark.slow
def test_a_commit_that_was_killed_comes_to_the_same_bytes(tmp_path, monkeypatch):
    source = write_parquet(tmp_path / "web", make_documents(100))
    whole, _ = run(source, tmp_path / "whole")
    assert whole.manifest.tokens("val")

    def killed(*_):
        raise KeyboardInterrupt

    for place in ("write_val", "make_manifest"):
        with monkeypatch.context() as patch:
            patch.setattr(commit, place, killed)
            with pytest.raises(KeyboardInterrupt):
                run(source, tmp_path / place)
        assert (tmp_path / place / STAGING).is_dir()
        assert run(source, tmp_path / place)[0].fingerprint == whole.fingerprint
    interrupt(source, tmp_path / "half")
    assert run(source, tmp_path / "half")[0].fingerprint == whole.fingerprint
    shutil.rmtree(tmp_path / "half")
