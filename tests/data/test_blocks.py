"""The Arrow block format: what any Arrow reader sees, and what verification catches."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pytest

from tests.conftest import prepare_char_corpus
from yuzogpt.data import blocks, verified_blocks
from yuzogpt.data.block_files import map_documents
from yuzogpt.data.block_writer import list_array, write_block
from yuzogpt.errors import UserError


def test_a_block_is_arrow_ipc_with_one_batch_of_documents(tmp_path):
    documents = [np.array([1, 2, 3], np.uint16), np.array([], np.uint16), np.array([9], np.uint16)]
    entry = write_block(tmp_path / "train-00000.arrow", "train", list_array(documents, np.uint16))
    assert (entry.documents, entry.tokens) == (3, 4)
    reader = pa.ipc.open_file(str(tmp_path / "train-00000.arrow"))
    assert reader.num_record_batches == 1
    assert reader.schema.names == ["tokens"]
    assert reader.schema.field("tokens").type == pa.list_(pa.uint16())
    assert reader.get_batch(0).column(0).to_pylist() == [[1, 2, 3], [], [9]]


def test_mapping_copies_nothing(tmp_path):
    path = tmp_path / "train-00000.arrow"
    write_block(path, "train", list_array([np.arange(1_000_000, dtype=np.uint16)], np.uint16))
    before = pa.total_allocated_bytes()
    tokens = blocks.tokens_of(map_documents(path))
    assert pa.total_allocated_bytes() - before < 100_000
    assert not tokens.flags.owndata
    assert tokens[65_537] == 1


def test_large_vocabularies_take_uint32(tmp_path):
    path = tmp_path / "train-00000.arrow"
    write_block(path, "train", list_array([np.array([70_000], np.uint32)], np.uint32))
    assert blocks.tokens_of(map_documents(path)).tolist() == [70_000]


def test_the_same_source_gives_the_same_bytes(text_file, tmp_path):
    first = prepare_char_corpus(text_file, tmp_path / "a")
    second = prepare_char_corpus(text_file, tmp_path / "b")
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()
    assert blocks.open_corpus(first).fingerprint == blocks.open_corpus(second).fingerprint
    assert str(tmp_path) not in (first / "manifest.json").read_text()


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("file", ["train-00000.arrow", "val-00000.arrow", "tokenizer.json"])
@pytest.mark.parametrize("damage", [flip_a_byte, cut_short, lambda path: path.unlink()])
def test_damage_is_named(text_file, tmp_path, file, damage):
    directory = prepare_char_corpus(text_file, tmp_path / "corpus")
    blocks.open_corpus(directory).verify()  # from here on its hashes are remembered
    damage(directory / file)
    with pytest.raises(UserError, match=f"{file}: damaged"):
        blocks.open_corpus(directory).verify()


def test_hashes_are_remembered(text_file, tmp_path, monkeypatch):
    directory = prepare_char_corpus(text_file, tmp_path / "corpus")
    blocks.open_corpus(directory).verify()
    read = []

    def sha256(path):
        read.append(path.name)
        return hashlib.sha256().hexdigest()

    monkeypatch.setattr(blocks, "sha256", sha256)
    monkeypatch.setattr(verified_blocks, "sha256", sha256)
    with pytest.raises(UserError, match="tokenizer"):  # small, so it is read each time
        blocks.open_corpus(directory).verify()
    assert read == ["tokenizer.json"]


def test_missing_and_foreign_manifests(tmp_path):
    with pytest.raises(UserError, match="no prepared corpus here"):
        blocks.open_corpus(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not a manifest"):
        blocks.open_corpus(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 99; this version reads 1"):
        blocks.open_corpus(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", '{"a": 1}', "[" * 100_000])
def test_a_damaged_memory_of_hashes_is_an_empty_one(corpus_dir, tmp_path, monkeypatch, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "yuzogpt").mkdir()
    (tmp_path / "yuzogpt" / "verified-blocks.json").write_text(content)
    blocks.open_corpus(corpus_dir).verify()
    known = json.loads((tmp_path / "yuzogpt" / "verified-blocks.json").read_text())
    assert len(known) >= 2
