"""Reading documents: over-long ones are passed over, encodings and line ends are what they are."""

import codecs
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import yuzogpt
from tests.data.test_prepare import run, texts_of
from tests.data.text_sources import make_documents, write_jsonl
from yuzogpt.data.preparation import readers, sources
from yuzogpt.errors import UserError


def everything(corpus):
    """Return all documents of a corpus of few, sorted: any of them may be held out."""
    return sorted(texts_of(corpus, "train") + texts_of(corpus, "val"))


@pytest.fixture
def small_limits(monkeypatch):
    """Have documents of more than a kilobyte be large ones, and units be small."""
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 1_000)
    monkeypatch.setattr(readers, "MAX_WHOLE_BYTES", 1_000)
    monkeypatch.setattr(readers, "BATCH_BYTES", 700)
    monkeypatch.setattr(sources, "UNIT_BYTES", 3_000)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt"])
def test_over_long_documents_are_counted_and_the_rest_is_read(tmp_path, small_limits, suffix):
    texts = ["first", "x" * 10_000, "second", "y" * 2_000, "z" * 980, "", "last"]
    path = tmp_path / "web" / f"a.{suffix}"
    path.parent.mkdir()
    flags = ["--max_document_bytes=990"]
    if suffix == "parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=3)
    elif suffix == "txt":
        path.write_text("\n".join(texts))
        flags.append("--by_line=true")
    else:
        write_jsonl(path, texts)
    for too_long, more in ((2, ()), (1, ("--max_document_bytes=5000",))):
        corpus, _ = run(path.parent, tmp_path / str(too_long), *flags, *more)
        assert corpus.manifest.rejected == {"empty": 1, "too long": too_long}
        assert corpus.manifest.source["documents"] == 7
        kept = [text for text in texts if text and len(text) < (990 if too_long == 2 else 5000)]
        assert everything(corpus) == sorted(kept)


def test_the_nanogpt_rule_counts_over_long_lines(tmp_path, small_limits):
    texts = ["a b", "x" * 10_000, *make_documents(40, characters=100)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    corpus, _ = run(path, tmp_path / "1", "--split_rule=nanogpt", "--val_fraction=0.1")
    assert corpus.manifest.source["documents"] == 42
    assert corpus.manifest.rejected == {"too long": 1}


def test_a_large_file_by_pieces_is_the_document_that_it_is_whole(tmp_path, monkeypatch):
    (tmp_path / "books").mkdir()
    text = "".join(make_documents(100)) + "naïve 日本語\r\n" * 300 + "  \n" * 999 + "end"
    (tmp_path / "books" / "a.txt").write_bytes(codecs.BOM_UTF8 + text.encode())
    (tmp_path / "books" / "b.txt").write_bytes(text.encode() + b"\xff")
    (tmp_path / "books" / "c.txt").write_text("short")
    whole, _ = run(tmp_path / "books", tmp_path / "1")
    monkeypatch.setattr(readers, "MAX_WHOLE_BYTES", 1_000)
    monkeypatch.setattr(readers, "BATCH_BYTES", 777)
    monkeypatch.setattr("yuzogpt.tokenization.tokenizer.MAX_PIECE_LENGTH", 100)
    pieces, _ = run(tmp_path / "books", tmp_path / "2")
    assert everything(pieces) == sorted([text.replace("\r\n", "\n"), "short"])
    assert pieces.manifest.blocks == whole.manifest.blocks
    assert pieces.manifest.rejected == whole.manifest.rejected == {"invalid UTF-8": 1}
    limited, _ = run(tmp_path / "books", tmp_path / "3", "--max_document_bytes=5000")
    assert limited.manifest.rejected == {"too long": 2}


def test_line_ends_and_marks_of_text_files(tmp_path):
    lines = codecs.BOM_UTF8 + b"one\r\ntwo\rthree\n"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_bytes(lines)
    assert everything(run(tmp_path / "a", tmp_path / "1")[0]) == ["one\ntwo\nthree\n"]
    assert everything(run(tmp_path / "b", tmp_path / "2", "--by_line=true")[0]) == [
        "one", "three", "two",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_json_lines_in_other_encodings_are_no_documents(tmp_path, encoding):
    content = "".join(json.dumps({"text": f"line {n}"}) + "\r\n" for n in range(20))
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "b.jsonl").write_bytes(content.encode(encoding))
    with pytest.raises(UserError, match=r"UTF-(16|32), not UTF-8; convert it|not JSON"):
        run(tmp_path / "web", tmp_path / "1")
    (tmp_path / "web" / "a.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"text": "one"}\n')
    corpus, _ = run(tmp_path / "web", tmp_path / "2")
    assert everything(corpus) == ["one"]
    assert sum(corpus.manifest.rejected.values()) >= 20


def test_powershell_as_a_command(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "one"}\r\n'.encode("utf-16"))
    places = [f"--source={path}", f"--data_dir={tmp_path}/corpus", "--num_workers=0"]
    result = yuzogpt("prepare", "mine", "--tokenizer=gpt2", *places)
    assert result.returncode == 2
    assert f"{path}: UTF-16, not UTF-8; convert it first" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_text_that_no_tokenizer_takes_is_counted(tmp_path):
    blanks = " " * 1_000_000 + "a"
    texts = ["first", blanks, "b" * 3_000_000, "last"]
    corpus, _ = run(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "1")
    assert corpus.manifest.rejected == {"not tokenizable": 1}
    assert everything(corpus) == sorted(["first", blanks, "last"])
    corpus, _ = run(write_jsonl(tmp_path / "b.jsonl", texts[2:]), tmp_path / "2")  # the first one
    assert everything(corpus) == ["last"]


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    (tmp_path / "web").mkdir()
    path = tmp_path / "web" / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n'))

    def refused(path: str):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(readers, "open_stream", refused)
    with pytest.raises(UserError, match="not readable: Permission denied") as caught:
        run(tmp_path / "web", Path(tmp_path / "1"))
    assert "damaged" not in str(caught.value)
