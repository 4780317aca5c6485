"""Benchmark files are read with limits and as UTF-8; mistakes are one line."""

import codecs
import io
import json
import os
import zipfile

import pytest

from yuzogpt.errors import UserError
from yuzogpt.evaluation.benchmarks import formats

PASSAGE = json.dumps({"text": "one two three"}) + "\n"


def zipped(content, **options):
    """Return a zip of one file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", content)
    return file.getvalue()


@pytest.mark.parametrize("content", [PASSAGE.encode(), codecs.BOM_UTF8 + PASSAGE.encode()])
def test_passages(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert formats.lambada(tmp_path / "a.jsonl") == [("one two", " three")]
    (tmp_path / "a.zip").write_bytes(zipped(content))
    assert formats.content(tmp_path / "a.zip") == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PASSAGE.encode("utf-16"), "UTF-16, not UTF-8; convert it first"),
        (PASSAGE.encode("utf-16-le"), "not JSON"),
        (b"\xff", "byte 0 is not UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"text": 1' + b"0" * 10_000 + b"}", "not JSON"),
        (b"[]", "not an object"),
    ],
)
def test_what_is_no_passage_is_one_line(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        formats.lambada(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1


def test_files_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_BYTES", 1_000)
    (tmp_path / "a.txt").write_bytes(b"a" * 1_001)
    (tmp_path / "a.zip").write_bytes(zipped(b"a" * 10**7))
    for name in ("a.txt", "a.zip"):
        with pytest.raises(UserError, match="1,000"):
            formats.content(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.zip"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="not a regular file"):
        formats.content(tmp_path / name)


@pytest.mark.parametrize("cut", [slice(0, 50), slice(0, -1), slice(40, None)])
def test_a_damaged_zip_is_one_line(tmp_path, cut):
    path = tmp_path / "a.zip"
    path.write_bytes(zipped(os.urandom(1_000))[cut])
    with pytest.raises(UserError, match="not a whole zip of one file") as caught:
        formats.content(path)
    assert len(str(caught.value).splitlines()) == 1
