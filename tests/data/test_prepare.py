"""Large corpora, in this process: exact, counted, resumable, and nanoGPT's to the byte."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from tests.conftest import REPOSITORY, TINY, make_text, yuzogpt
from tests.data.text_sources import make_documents, write_jsonl, write_parquet
from yuzogpt.config import PrepareSettings
from yuzogpt.config.resolve import resolve
from yuzogpt.data.blocks import MANIFEST, STAGING, open_corpus
from yuzogpt.data.inspect import documents, export_bin
from yuzogpt.data.preparation import readers, sources
from yuzogpt.data.preparation.prepare import LocalWorkers, prepare
from yuzogpt.errors import UserError
from yuzogpt.storage.lease import Lease
from yuzogpt.storage.run_storage import LocalStorage
from yuzogpt.tokenization.tokenizer import gpt2_tokenizer

TEXTS = make_documents(300)


def run(source: Path | str, directory: Path, *flags: str):
    """Prepare `source` as a corpus of one's own, in this process."""
    flags = (f"--source={source}", "--dataset=mine", "--tokenizer=gpt2", *flags)
    return prepare(resolve(PrepareSettings, [], flags), directory, LocalWorkers())


def texts_of(corpus, split):
    """Return the documents of a split as text, without their end."""
    decode, end = corpus.tokenizer.decode, corpus.tokenizer.end_of_text
    found = [row.values.to_numpy() for column in documents(corpus, split) for row in column]
    assert all(ids[-1] == end for ids in found)
    return [decode(ids[:-1].tolist()) for ids in found]


def all_texts(corpus):
    """Return the documents of both splits, sorted."""
    return sorted(texts_of(corpus, "train") + texts_of(corpus, "val"))


@pytest.fixture
def small_units(monkeypatch):
    """Cut sources into many units."""
    monkeypatch.setattr(sources, "UNIT_BYTES", 20_000)
    monkeypatch.setattr(readers, "BATCH_BYTES", 5_000)


def test_nanogpts_files_to_the_byte(tmp_path, small_units):
    source = write_parquet(tmp_path / "web", TEXTS)
    flags = ("--split_rule=nanogpt", "--val_fraction=0.05")
    corpus, is_new = run(source, tmp_path / "corpus", *flags)
    assert is_new
    assert len([b for b in corpus.manifest.blocks if b.split == "train"]) > 4  # several units
    encode = gpt2_tokenizer().encoding.encode_ordinary
    rows = Dataset.from_dict({"text": TEXTS})
    held_out = rows.train_test_split(test_size=0.05, seed=2357, shuffle=True)["test"]["text"]
    train = [text for text in TEXTS if text not in set(held_out)]
    train_bin, val_bin = export_bin(corpus)
    for path, expected in ((val_bin, held_out), (train_bin, train)):
        ids = [token for text in expected for token in [*encode(text), 50256]]
        assert path.read_bytes() == np.array(ids, np.uint16).tobytes()
    assert run(source, tmp_path / "corpus", *flags)[1] is False  # done once


@pytest.mark.slow
def test_formats_give_the_same_documents(tmp_path, small_units):
    (tmp_path / "lines").mkdir()
    texts = [text.replace("\n", " ").strip() or "x" for text in TEXTS]
    (tmp_path / "lines" / "a.txt").write_bytes("\r\n".join(texts).encode())
    found = {
        "parquet": run(write_parquet(tmp_path / "web", texts), tmp_path / "1")[0],
        "jsonl": run(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "2")[0],
        "gz": run(write_jsonl(tmp_path / "gz" / "a.jsonl.gz", texts), tmp_path / "3")[0],
        "zst": run(f"{write_jsonl(tmp_path / 'b.jsonl.zst', texts).parent}/b*", tmp_path / "4")[0],
        "lines": run(tmp_path / "lines", tmp_path / "5", "--by_line=true")[0],
    }
    for corpus in found.values():
        assert corpus.manifest.source["documents"] == 300
        assert texts_of(corpus, "train") + texts_of(corpus, "val") == texts_of(
            found["parquet"], "train"
        ) + texts_of(found["parquet"], "val")
    kinds = [corpus.manifest.source["name"].split()[1] for corpus in found.values()]
    assert kinds == ["parquet", "jsonl", "jsonl", "jsonl", "lines"]


def test_the_nanogpt_rule_counts_lines_first(tmp_path, small_units):
    flags = ("--split_rule=nanogpt", "--val_fraction=0.05")
    parquet, _ = run(write_parquet(tmp_path / "web", TEXTS), tmp_path / "1", *flags)
    lines, _ = run(write_jsonl(tmp_path / "a.jsonl.gz", TEXTS), tmp_path / "2", *flags)
    assert texts_of(lines, "val") == texts_of(parquet, "val")
    assert texts_of(lines, "train") == texts_of(parquet, "train")


def test_every_document_is_counted(tmp_path, capsys):
    (tmp_path / "web").mkdir()
    rows = [b"good", b"", None, b"\xff\xfe", b"x" * 101, "ü<|endoftext|>".encode()]
    table = pa.table({"body": pa.array(rows, pa.binary())})
    pq.write_table(table, tmp_path / "web" / "a.parquet")
    flags = ("--text_column=body", "--max_document_bytes=100")
    corpus, _ = run(tmp_path / "web", tmp_path / "1", *flags)
    expected = {"empty": 1, "invalid UTF-8": 1, "too long": 1, "without text": 1}
    assert corpus.manifest.rejected == expected
    assert all_texts(corpus) == ["good", "ü<|endoftext|>"]
    assert "6 documents in = 2 written + 4 rejected" in capsys.readouterr().out

    bad = [
        '{"text": "a"}',
        "",
        "nonsense",
        "[" * 200_000,
        "[]",
        '{"text": 3}',
        '{"text": "\\ud800"}',
        '{"x": 1}',
    ]
    (tmp_path / "bad.jsonl").write_text("\n".join(bad))
    corpus, _ = run(tmp_path / "bad.jsonl", tmp_path / "2")
    assert corpus.manifest.rejected == {"invalid JSON": 2, "invalid UTF-8": 1, "without text": 3}
    assert texts_of(corpus, "train") == ["a"]


def test_blocks_are_cut_within_a_unit_and_documents_are_not(tmp_path):
    source = write_parquet(tmp_path / "web", TEXTS, files=1)
    whole, _ = run(source, tmp_path / "1")
    cut, _ = run(source, tmp_path / "2", "--block_tokens=500")
    blocks = [block for block in cut.manifest.blocks if block.split == "train"]
    assert [block.file for block in blocks[:2]] == ["train-00000.arrow", "train-00001.arrow"]
    assert len(blocks) > 10
    assert all(block.tokens <= 500 or block.documents == 1 for block in blocks)
    assert texts_of(cut, "train") == texts_of(whole, "train")


def test_one_document_and_an_empty_val_split(tmp_path, capsys):
    source = write_parquet(tmp_path / "web", ["only one"], files=1)
    corpus, _ = run(source, tmp_path / "1", "--split_rule=nanogpt")
    assert texts_of(corpus, "train") == ["only one"]
    assert corpus.manifest.tokens("val") == 0
    assert len(corpus.stream("val")) == 0
    assert "the val split is empty" in capsys.readouterr().out


@pytest.mark.slow
def test_files_that_are_documents(tmp_path, small_units):
    for index, text in enumerate(TEXTS):
        path = tmp_path / "books" / str(index % 3) / f"{index:04d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    corpus, _ = run(tmp_path / "books", tmp_path / "1", "--val_fraction=0.001")
    in_order = [TEXTS[index] for shelf in range(3) for index in range(shelf, 300, 3)]
    found = texts_of(corpus, "train") + texts_of(corpus, "val")
    assert sorted(found) == sorted(in_order)
    assert [text for text in in_order if text in set(texts_of(corpus, "train"))] == texts_of(
        corpus, "train"
    )
    assert len(list((tmp_path / "1").glob("train-*.arrow"))) < 20  # many files in a unit


@pytest.mark.slow
def test_a_line_of_ten_megabytes(tmp_path):
    long = make_text(100_000) * 100
    corpus, _ = run(write_jsonl(tmp_path / "a.jsonl", ["first", long, "last"]), tmp_path / "1")
    assert all_texts(corpus) == sorted(["first", long, "last"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source={tmp}/none"], "no such file"),
        (["--source={tmp}/empty"], "no file there"),
        (["--source={tmp}/mixed"], "several formats (jsonl, text)"),
        (["--source={tmp}/web", "--text_column=body"], "which has text"),
        (["--source={tmp}/cut"], "part-001.parquet: damaged or not readable"),
        (["--source={tmp}/a.jsonl", "--text_column=body"], "whose first line has text"),
        (["--source={tmp}/web", "--split_rule=tail"], "only for one text file"),
        (["--source=ftp://x/y"], "ftp://: not known"),
        (["--source={tmp}/blank"], "no document there"),
        (["--source={tmp}/none.parquet"], "no document there"),
        (["--source={tmp}/twice.parquet"], "several of that name"),
        (["--source={tmp}/bad.jsonl.gz"], "bad.jsonl.gz: damaged or not readable"),
        (["--source={tmp}/short.jsonl.gz"], "short.jsonl.gz: damaged or not readable"),
    ],
)
def test_mistakes(tmp_path, flags, message):
    write_parquet(tmp_path / "web", TEXTS)
    write_jsonl(tmp_path / "mixed" / "a.jsonl", TEXTS[:3])
    (tmp_path / "mixed" / "b.txt").write_text("b")
    (tmp_path / "empty").mkdir()
    write_jsonl(tmp_path / "blank" / "a.jsonl", [])
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    (tmp_path / "bad.jsonl.gz").write_bytes(b"no gzip")
    short = write_jsonl(tmp_path / "short.jsonl.gz", TEXTS)
    short.write_bytes(short.read_bytes()[:-20])
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:3])
    cut = write_parquet(tmp_path / "cut", TEXTS) / "part-001.parquet"
    cut.write_bytes(cut.read_bytes()[:-100])
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    result = yuzogpt("prepare", "mine", "--tokenizer=gpt2", f"--data_dir={tmp_path}/d", *flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "d").exists()


def test_too_little_disk(tmp_path, monkeypatch):
    source = write_parquet(tmp_path / "web", TEXTS)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(UserError, match=r"needs about .* more, 10.0 kB are free"):
        run(source, tmp_path / "1")
    assert not (tmp_path / "1").exists()


def test_another_source_or_rule_is_refused(tmp_path):
    run(write_parquet(tmp_path / "web", TEXTS), tmp_path / "1")
    other = write_parquet(tmp_path / "other", TEXTS[:-1])
    with pytest.raises(UserError, match="another source"):
        run(other, tmp_path / "1")
    with pytest.raises(UserError, match="another split_rule: hash, not nanogpt"):
        run(tmp_path / "web", tmp_path / "1", "--split_rule=nanogpt")
    corpus, _ = run(other, tmp_path / "1", "--overwrite")
    assert corpus.manifest.source["documents"] == 299


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag", ["--text_column=other", "--max_document_bytes=9", "--block_tokens=9", "--by_line=true"]
)
def test_other_settings_of_a_finished_corpus_are_refused(tmp_path, flag):
    (tmp_path / "web").mkdir()
    table = pa.table({"text": ["one"] * 9, "other": ["two"] * 9})
    pq.write_table(table, tmp_path / "web" / "a.parquet")
    run(tmp_path / "web", tmp_path / "1")
    with pytest.raises(UserError, match=f"another {flag[2:].partition('=')[0]}: "):
        run(tmp_path / "web", tmp_path / "1", flag)


class Interrupted(LocalWorkers):
    """Stops in the middle, as Ctrl-C does."""

    def run(self, plan, units):
        super().run(plan, units[: len(units) // 2])
        raise KeyboardInterrupt


def interrupt(source, directory, *flags):
    flags = (f"--source={source}", "--dataset=mine", "--tokenizer=gpt2", *flags)
    with pytest.raises(KeyboardInterrupt):
        prepare(resolve(PrepareSettings, [], flags), directory, Interrupted())


def test_units_without_their_plan_are_not_taken_over(tmp_path):
    first = write_parquet(tmp_path / "a", ["AAAA"] * 40)
    second = write_parquet(tmp_path / "b", ["BBBB"] * 40)
    interrupt(first, tmp_path / "1")
    (tmp_path / "1" / STAGING / "plan.json").unlink()  # killed while it was deleted
    corpus, _ = run(second, tmp_path / "1")
    assert set(texts_of(corpus, "train")) == {"BBBB"}


@pytest.mark.slow
def test_an_interrupted_overwrite_goes_on(tmp_path, capsys):
    run(write_parquet(tmp_path / "old", TEXTS[:9], files=1), tmp_path / "1")
    source = write_parquet(tmp_path / "web", TEXTS)
    export_bin(open_corpus(tmp_path / "1"))
    interrupt(source, tmp_path / "1", "--overwrite")
    corpus, _ = run(source, tmp_path / "1", "--overwrite")
    assert "resuming: 2 of 4 units are done" in capsys.readouterr().out
    assert corpus.fingerprint == run(source, tmp_path / "2")[0].fingerprint
    assert not (tmp_path / "1" / "train.bin").exists()  # it was of the old corpus


def test_a_text_file_does_not_replace_an_interrupted_preparation(tmp_path):
    interrupt(write_parquet(tmp_path / "web", TEXTS), tmp_path / "1")
    (tmp_path / "t.txt").write_text(make_text(5_000))
    with pytest.raises(UserError, match="interrupted preparation of another source"):
        run(tmp_path / "t.txt", tmp_path / "1")
    assert (tmp_path / "1" / STAGING / "plan.json").exists()


@pytest.mark.slow
def test_which_files_are_of_a_source(tmp_path, capsys):
    names = ["a.TXT", "b.txt", ".hidden/c.txt", "_tmp/d.txt", "sub [1]/e.txt", "f.pdf", "sub [1]/g"]
    for name in names:
        (tmp_path / "web" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "web" / name).write_text(name)
    corpus, _ = run(tmp_path / "web", tmp_path / "web" / "corpus")
    assert all_texts(corpus) == ["a.TXT", "b.txt", "sub [1]/e.txt"]
    assert "2 other files are skipped (f.pdf, g)" in capsys.readouterr().out
    assert run(tmp_path / "web", tmp_path / "web" / "corpus")[1] is False  # not its own source
    for place, expected in (("web/sub [1]", 1), ("web/*.txt", 1), ("web/**/*.txt", 2)):
        corpus, _ = run(tmp_path / place, tmp_path / place.replace("/", "-").replace("*", "x"))
        assert corpus.manifest.source["documents"] == expected
    with pytest.raises(UserError, match="is the source's folder"):
        run(tmp_path / "web", tmp_path / "web")


def test_dictionary_encoded_text(tmp_path):
    (tmp_path / "web").mkdir()
    column = pa.array(["one", "two", "one"]).dictionary_encode()
    pq.write_table(pa.table({"text": column}), tmp_path / "web" / "a.parquet")
    assert all_texts(run(tmp_path / "web", tmp_path / "1")[0]) == ["one", "one", "two"]


@pytest.mark.slow
@pytest.mark.parametrize("command", [["prepare", "mine", "--tokenizer=gpt2"], ["train"]])
def test_a_cluster_that_does_not_answer(tmp_path, corpus_dir, command):
    source = write_parquet(tmp_path / "web", TEXTS[:9], files=1)
    places = [f"--data_dir={tmp_path}/d", f"--source={source}"]
    if command == ["train"]:
        places = [*TINY, f"--data_dir={corpus_dir}", f"--out_dir={tmp_path}/d"]
    result = yuzogpt(*command, *places, "--ray_address=127.0.0.1:9")
    assert result.returncode == 2
    assert "no Ray cluster could be joined there" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "d").exists()


def test_a_text_file_needs_no_cluster(tmp_path):
    (tmp_path / "t.txt").write_text(make_text(5_000))
    places = [f"--source={tmp_path}/t.txt", f"--data_dir={tmp_path}/d"]
    result = yuzogpt("prepare", "mine", "--tokenizer=char", *places, RAY_ADDRESS="127.0.0.1:9")
    assert result.returncode == 0, result.stderr


def test_a_second_writer_is_refused(tmp_path):
    source = write_parquet(tmp_path / "web", TEXTS)
    with Lease(LocalStorage(tmp_path / "1")), pytest.raises(UserError, match="in use by process"):
        run(source, tmp_path / "1")


@pytest.mark.slow
def test_a_killed_command_goes_on(tmp_path):
    source = write_parquet(tmp_path / "web", make_documents(4_000), files=100)
    arguments = ["prepare", "mine", "--tokenizer=gpt2", f"--source={source}", "--num_workers=0"]
    whole = yuzogpt(*arguments, f"--data_dir={tmp_path}/whole")
    assert whole.returncode == 0, whole.stderr
    staging = tmp_path / "killed" / STAGING
    process = subprocess.Popen(
        [sys.executable, "-m", "yuzogpt", *arguments, f"--data_dir={tmp_path}/killed"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
    )
    wait = threading.Event()
    while len(list(staging.glob("unit-*.json"))) < 20:
        assert process.poll() is None
        wait.wait(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list(staging.glob("unit-*.json")))
    assert 20 <= done < 100
    with pytest.raises(UserError, match="its preparation was interrupted"):
        open_corpus(tmp_path / "killed")
    # What a power loss may leave: a record without its block, and half a block.
    block = next(staging.glob("unit-000003-train-*.arrow"))
    block.write_bytes(block.read_bytes()[:-1])
    (staging / ".unit-000099-train-000.arrow.0.tmp").write_bytes(b"half")
    changed = yuzogpt(*arguments, f"--data_dir={tmp_path}/killed", "--val_fraction=0.1")
    assert changed.returncode == 2
    assert "an interrupted preparation with another val_fraction" in changed.stderr
    again = yuzogpt(*arguments, f"--data_dir={tmp_path}/killed")
    assert again.returncode == 0, again.stderr
    assert f"resuming: {done - 1} of 100 units are done" in again.stdout
    whole_manifest = (tmp_path / "whole" / MANIFEST).read_bytes()
    assert (tmp_path / "killed" / MANIFEST).read_bytes() == whole_manifest
    for block in json.loads(whole_manifest)["blocks"]:
        content = (tmp_path / "killed" / block["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == block["sha256"]
    assert not staging.exists()


@pytest.mark.slow
def test_a_corpus_in_an_object_store_is_copied_once(s3, tmp_path):
    local, _ = run(write_parquet(tmp_path / "web", TEXTS), tmp_path / "1", "--val_fraction=0.2")
    s3.create_bucket(Bucket="base")
    for path in (tmp_path / "1").iterdir():
        s3.upload_file(str(path), "base", f"data/mine/{path.name}")
    flags = [*TINY, "--dataset=mine", f"--out_dir={tmp_path}/run", "--num_workers=0"]
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    train = ["train", *flags, "--data_dir=s3://base/data/mine"]
    first = yuzogpt(*train, "--max_iters=2", **cache)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("copying s3://base/data/mine/train-00000.arrow") == 1
    again = yuzogpt(*train, "--max_iters=3", **cache)  # the same run, by its fingerprint
    assert again.returncode == 0, again.stderr
    assert "copying" not in again.stdout
    inspected = yuzogpt("inspect", "data/mine", "--storage=s3://base", **cache)
    assert f"fingerprint {local.fingerprint[:12]}" in inspected.stdout
    s3.delete_object(Bucket="base", Key="data/mine/manifest.json")
    missing = yuzogpt(*train, "--max_iters=4", **cache)
    assert missing.returncode == 2
    assert "no prepared corpus there" in missing.stderr
    assert len(missing.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_source_in_an_object_store(s3, tmp_path):
    source = write_parquet(tmp_path / "web", TEXTS)
    s3.create_bucket(Bucket="web")
    for path in source.iterdir():
        s3.upload_file(str(path), "web", f"text/{path.name}")
    local, _ = run(source, tmp_path / "1")
    for place in ("s3://web/text", "s3://web/text/*.parquet"):
        remote, _ = run(place, tmp_path / place.rpartition("/")[2])
        assert remote.fingerprint == local.fingerprint
    for place in ("s3://web/none/*.parquet", "s3://web/none", "s3://other/text"):
        with pytest.raises(UserError, match="no file there"):
            run(place, tmp_path / "3")
