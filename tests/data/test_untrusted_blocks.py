"""Blocks whose hash is the manifest's and whose content is not what Arrow can trust: one line."""

import hashlib
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pytest

from tests.conftest import TINY, yuzogpt
from yuzogpt.data.blocks import MANIFEST, open_corpus
from yuzogpt.data.inspect import export_bin, show
from yuzogpt.errors import UserError

FILE = "train-00000.arrow"


SCHEMA = pa.schema([("tokens", pa.list_(pa.uint16()))])


def write(path, batches, options=None):
    """Write record batches as an Arrow file."""
    schema = batches[0].schema if batches else SCHEMA
    with pa.ipc.new_file(str(path), schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)


def batch_of(column, name="tokens"):
    """Return a record batch of one column."""
    return pa.record_batch([column], names=[name])


def list_of(offsets, values, offsets_dtype=np.int32):
    """Return a list array that nobody validates."""
    buffers = [None, pa.py_buffer(np.array(offsets, offsets_dtype))]
    return pa.Array.from_buffers(
        pa.list_(values.type), len(offsets) - 1, buffers, children=[values]
    )


def with_offset(path, index, value):
    """Change an offset in a block's file; a negative index counts from the last."""
    content = path.read_bytes()
    column = pa.ipc.open_file(path).get_batch(0).column(0)
    offsets = column.offsets.to_numpy()
    changed = offsets.copy()
    changed[index] = value
    assert content.count(offsets.tobytes()) == 1
    path.write_bytes(content.replace(offsets.tobytes(), changed.tobytes()))


def with_length(path, old, new):
    """Change each 64-bit number of a block's record batch that is `old`."""
    content = path.read_bytes()
    old, new = (int(number).to_bytes(8, "little") for number in (old, new))
    assert old in content
    path.write_bytes(content.replace(old, new))


COUNT = 500  # documents
LENGTH = 37  # tokens of each
OFFSETS = np.arange(COUNT + 1) * LENGTH


def values(dtype=np.uint16):
    """Return the tokens of a block."""
    return pa.array(np.arange(COUNT * LENGTH) % 5, pa.from_numpy_dtype(dtype))


def compressed(codec):
    """Return a way to write a block whose buffers are compressed."""
    options = pa.ipc.IpcWriteOptions(compression=codec)
    return lambda path: write(path, [batch_of(list_of(OFFSETS, values()))], options)


def nulls():
    """Return tokens, some of which are null."""
    return pa.array([None, *values().to_pylist()[1:]], pa.uint16())


def null_documents():
    """Return documents, one of which is null."""
    rows = list_of(OFFSETS, values()).to_pylist()
    return pa.array([None, *rows[1:]], pa.list_(pa.uint16()))


DAMAGES = {
    "last offset beyond the values": lambda path: with_offset(path, -1, COUNT * LENGTH + 10**9),
    "last offset before their end": lambda path: with_offset(path, -1, COUNT * LENGTH - 1),
    "negative offset": lambda path: with_offset(path, 7, -1),
    "first offset": lambda path: with_offset(path, 0, 1),
    "descending offsets": lambda path: with_offset(path, 7, 10),
    "one offset beyond the values": lambda path: with_offset(path, 7, 2**30),
    "more documents than offsets": lambda path: with_length(path, COUNT, COUNT * 1000),
    "more tokens than bytes": lambda path: with_length(path, COUNT * LENGTH, 10**9),
    "a buffer beyond the file": lambda path: with_length(path, COUNT * LENGTH * 2, 10**12),
    "null tokens": lambda path: write(path, [batch_of(list_of(OFFSETS, nulls()))]),
    "a null document": lambda path: write(path, [batch_of(null_documents())]),
    "a foreign id": lambda path: write(
        path, [batch_of(list_of(OFFSETS, pa.array([60_000] * COUNT * LENGTH, pa.uint16())))]
    ),
    "compressed": compressed("zstd"),
    "compressed otherwise": compressed("lz4"),
    "two batches": lambda path: write(
        path, [batch_of(list_of(OFFSETS[:251], values()[: 250 * LENGTH]))] * 2
    ),
    "no batch": lambda path: write(path, []),
    "signed": lambda path: write(path, [batch_of(list_of(OFFSETS, values(np.int16)))]),
    "64 bits": lambda path: write(path, [batch_of(list_of(OFFSETS, values(np.uint64)))]),
    "large lists": lambda path: write(
        path, [batch_of(list_of(OFFSETS, values()).cast(pa.large_list(pa.uint16())))]
    ),
    "no lists": lambda path: write(path, [batch_of(values())]),
    "strings": lambda path: write(path, [batch_of(pa.array(["a"] * COUNT))]),
    "another name": lambda path: write(path, [batch_of(list_of(OFFSETS, values()), "ids")]),
    "two columns": lambda path: write(
        path, [pa.record_batch([list_of(OFFSETS, values())] * 2, names=["tokens", "more"])]
    ),
    "fewer documents": lambda path: write(path, [batch_of(list_of(OFFSETS[:-1], values()[:-37]))]),
    "no Arrow": lambda path: path.write_bytes(b"x" * 5_000),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.fixture
def corpus(corpus_dir, tmp_path):
    """A corpus whose train block can be replaced."""
    directory = tmp_path / "corpus"
    shutil.copytree(corpus_dir, directory)
    write(directory / FILE, [batch_of(list_of(OFFSETS, values()))])
    record(directory, documents=COUNT, tokens=COUNT * LENGTH)
    return directory


def record(directory, **counts):
    """Have the manifest say of the train block what is true of its bytes."""
    manifest = json.loads((directory / MANIFEST).read_bytes())
    (entry,) = [block for block in manifest["blocks"] if block["file"] == FILE]
    content = (directory / FILE).read_bytes()
    entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), **counts}
    (directory / MANIFEST).write_text(json.dumps(manifest))


def test_a_block_as_it_should_be(corpus):
    open_corpus(corpus).verify()
    assert len(open_corpus(corpus).stream("train")) == COUNT * LENGTH
    show(open_corpus(corpus), 3)


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_way_to_a_block_refuses_it(corpus, damage):
    DAMAGES[damage](corpus / FILE)
    record(corpus)
    ways = [lambda c: c.verify(), lambda c: c.verify(), lambda c: show(c, 3), export_bin]
    if damage != "a foreign id":  # which a scan of the tokens finds, once a node
        ways.append(lambda c: c.stream("train"))
    for way in ways:
        with pytest.raises(UserError, match=rf"{FILE}: damaged: .*prepare the corpus") as caught:
            way(open_corpus(corpus))
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["last offset beyond the values", "a foreign id"])
@pytest.mark.parametrize("command", ["train", "inspect"])
def test_the_commands_end_in_one_line(corpus, tmp_path, damage, command):
    DAMAGES[damage](corpus / FILE)
    record(corpus)
    flags = [f"--data_dir={corpus}"]
    if command == "train":
        flags += [*TINY, f"--out_dir={tmp_path}/run", "--num_workers=0", "--max_iters=2"]
    result = yuzogpt(command, *flags)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert f"{FILE}: damaged: " in line
    assert not (tmp_path / "run").exists()


def test_what_is_no_regular_file_is_not_waited_for(corpus):
    (corpus / FILE).unlink()
    os.mkfifo(corpus / FILE)
    for way in (lambda c: c.verify(), lambda c: c.stream("train"), lambda c: show(c, 3)):
        with pytest.raises(UserError, match=FILE):
            way(open_corpus(corpus))
    (corpus / MANIFEST).unlink()
    os.mkfifo(corpus / MANIFEST)
    with pytest.raises(UserError):
        open_corpus(corpus)


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../train-00000.arrow"},
        {"file": "/etc/passwd"},
        {"file": "val-00000.arrow"},
        {"split": "test"},
        {"tokens": "many"},
        {"tokens": -1},
        {"documents": 10**400},
        {"bytes": 1.5},
        {"sha256": None},
    ],
)
def test_a_manifest_is_checked(corpus, change):
    manifest = json.loads((corpus / MANIFEST).read_bytes())
    manifest["blocks"][0] |= change
    (corpus / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest.json: damaged: ") as caught:
        open_corpus(corpus)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("vocab_size", ["many", -1, None, 10**40])
def test_a_manifests_tokenizer_is_checked(corpus, vocab_size):
    manifest = json.loads((corpus / MANIFEST).read_bytes())
    manifest["tokenizer"]["vocab_size"] = vocab_size
    (corpus / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="vocab_size"):
        open_corpus(corpus)


def test_a_block_that_may_not_be_read_is_not_called_damaged(corpus, monkeypatch):
    opened = open_corpus(corpus)

    def refused(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("yuzogpt.data.block_files.open_regular", refused)
    with pytest.raises(UserError, match="not readable: Permission denied") as caught:
        opened.stream("train")
    assert "damaged" not in str(caught.value)
