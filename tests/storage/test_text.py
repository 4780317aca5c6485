"""Text files: one reading for corpora and prompts, whatever their line ends and byte order mark."""

import codecs
import json
import os
import threading

import pytest

from yuzogpt.config import CorpusSettings, SamplingSettings
from yuzogpt.data.inspect import documents
from yuzogpt.errors import UserError
from yuzogpt.inference.sample import read_prompts
from yuzogpt.storage.text import decode_pieces, decode_text, plain, read_text

TEXT = "one\ntwo\n\nthree ü\n"
FORMS = [
    TEXT.encode(),
    codecs.BOM_UTF8 + TEXT.encode(),
    TEXT.replace("\n", "\r\n").encode(),
    TEXT.replace("\n", "\r").encode(),
    codecs.BOM_UTF8 + TEXT.replace("\n", "\r\n").encode(),
]


@pytest.mark.parametrize("content", FORMS)
def test_all_forms_are_one_text(content, tmp_path):
    assert decode_text(content, "a.txt") == TEXT
    assert plain(content).decode() == TEXT
    for size in (1, 2, 3, 100):
        pieces = [content[start : start + size] for start in range(0, len(content), size)]
        assert "".join(decode_pieces(pieces)) == TEXT
    (tmp_path / "a.txt").write_bytes(content)
    assert read_text(tmp_path / "a.txt", "a.txt") == TEXT


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
@pytest.mark.parametrize("content", FORMS)
def test_a_corpus_and_a_prompt_of_the_same_file_have_the_same_text(tmp_path, content, tokenizer):
    from tests.conftest import prepare_here

    path = tmp_path / "a.txt"
    path.write_bytes(content)
    settings = CorpusSettings(dataset="mine", source=str(path), tokenizer=tokenizer)
    corpus, _ = prepare_here(settings, tmp_path / "corpus")
    found = "".join(
        corpus.tokenizer.decode(column.values.to_pylist())
        for split in ("train", "val")
        for column in documents(corpus, split)
    )
    assert found == TEXT
    assert read_prompts(SamplingSettings(start=f"FILE:{path}")) == [TEXT]


def test_prompts_with_a_mark(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = "".join(json.dumps({"prompt": text}) + "\r\n" for text in ("a", "b"))
    path.write_bytes(codecs.BOM_UTF8 + lines.encode())
    assert read_prompts(SamplingSettings(prompts=str(path))) == ["a", "b"]


def test_prompts_from_a_pipe(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=("a prompt",))
    writer.start()
    assert read_prompts(SamplingSettings(start=f"FILE:{path}")) == ["a prompt"]
    writer.join()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEXT.encode("utf-16"), "UTF-16, not UTF-8; convert it first: iconv -f UTF-16 -t UTF-8"),
        (TEXT.encode("utf-32"), "UTF-32, not UTF-8"),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), "UTF-16, not UTF-8"),
        (b"one\r\n\xff", "byte 5 is not UTF-8"),
    ],
)
def test_other_encodings_are_named(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    for wanted in ({"start": f"FILE:{path}"}, {"prompts": str(path)}):
        with pytest.raises(UserError, match=f"{path}: {message}"):
            read_prompts(SamplingSettings(**wanted))
