"""Preparation: nanoGPT's split, one writer, done once, and never the wrong corpus."""

import hashlib

import pytest

from tests.conftest import make_text, yuzogpt
from tests.conftest import prepare_here as prepare
from yuzogpt.config import CorpusSettings
from yuzogpt.data.preparation import corpora
from yuzogpt.data.preparation.corpora import name_speakers, text_source
from yuzogpt.data.preparation.splits import split_tail
from yuzogpt.errors import UserError


def settings(**values: str) -> CorpusSettings:
    return CorpusSettings(**values)


def test_split_is_nanogpts(tmp_path):
    text = make_text(10_007)
    (tmp_path / "t.txt").write_text(text)
    chosen = settings(dataset="mine", source=str(tmp_path / "t.txt"), tokenizer="char")
    corpus, is_new = prepare(chosen, tmp_path / "d")
    assert is_new
    cut = int(len(text) * 0.9)  # as in nanoGPT's prepare.py
    decode = corpus.tokenizer.decode
    assert decode(corpus.stream("train").read(0, cut)) == text[:cut]
    val = corpus.stream("val")
    assert decode(val.read(0, len(val))) == text[cut:]
    assert corpus.tokenizer.characters == "".join(sorted(set(text)))


def test_split_cuts_in_the_middle_of_a_document():
    assert split_tail(["a" * 60, "b" * 60, "c" * 30]) == (
        ["a" * 60, "b" * 60, "c" * 15],
        ["c" * 15],
    )


def test_gpt2_corpus(tmp_path):
    (tmp_path / "t.txt").write_text(make_text(5_000))
    chosen = settings(dataset="mine", source=str(tmp_path / "t.txt"), tokenizer="gpt2")
    corpus, _ = prepare(chosen, tmp_path / "d")
    assert corpus.manifest.tokenizer["vocab_size"] == 50257
    tokens = corpus.stream("train").read(0, 100)
    assert make_text(5_000).startswith(corpus.tokenizer.decode(tokens.tolist()))


def test_done_once_and_never_swapped(tmp_path):
    one, other = tmp_path / "1.txt", tmp_path / "2.txt"
    one.write_text(make_text(5_000, seed=1))
    other.write_text(make_text(5_000, seed=2))
    chosen = settings(dataset="mine", source=str(one), tokenizer="char")
    corpus, _ = prepare(chosen, tmp_path / "d")
    assert prepare(chosen, tmp_path / "d")[1] is False
    swapped = chosen.model_copy(update={"source": str(other)})
    with pytest.raises(UserError, match="another source"):
        prepare(swapped, tmp_path / "d")
    with pytest.raises(UserError, match="another tokenizer"):
        prepare(chosen.model_copy(update={"tokenizer": "gpt2"}), tmp_path / "d")
    replaced, is_new = prepare(swapped.model_copy(update={"overwrite": True}), tmp_path / "d")
    assert is_new
    assert replaced.fingerprint != corpus.fingerprint


def test_what_is_prepared_needs_no_download(tmp_path, monkeypatch):
    source = tmp_path / "t.txt"
    source.write_text(make_text(5_000))
    prepare(settings(dataset="shakespeare_char", source=str(source)), tmp_path / "d")
    monkeypatch.setattr(corpora, "TINYSHAKESPEARE_URL", "http://127.0.0.1:9/none")
    assert prepare(settings(dataset="shakespeare_char"), tmp_path / "d")[1] is False


def test_a_file_is_known_by_its_bytes():
    assert text_source(b"abc", "x").identity == {
        "name": "text file",
        "sha256": hashlib.sha256(b"abc").hexdigest(),
        "bytes": 3,
    }
    with pytest.raises(UserError, match="byte 1 is not UTF-8"):
        text_source(b"a\xff", "x")
    with pytest.raises(UserError, match="empty"):
        text_source(b"", "x")


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="did you mean shakespeare_char"):
        prepare(settings(dataset="shakespear_char"), tmp_path / "d")
    with pytest.raises(UserError, match="needs --tokenizer"):
        prepare(settings(dataset="mine", source="x"), tmp_path / "d")
    with pytest.raises(UserError, match="no such file"):
        prepare(settings(dataset="shakespeare", source="/nowhere.txt"), tmp_path / "d")
    with pytest.raises(UserError, match="is a char corpus"):
        prepare(settings(dataset="shakespeare_char", tokenizer="gpt2"), tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_without_web_one_line_says_what_would_work(tmp_path):
    # A proxy that refuses connections stands for a network without web.
    result = yuzogpt(
        "prepare", "shakespeare_char", cwd=tmp_path, https_proxy="http://127.0.0.1:9", no_proxy=""
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert "--source=FILE" in result.stderr
    assert "shakespeare_plays_char" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_download_with_other_bytes_is_refused():
    with pytest.raises(UserError, match="expected 86c4e6aa"):
        corpora.check_download(b"other", corpora.TINYSHAKESPEARE_SHA256, "here")


def test_speakers_of_the_plays_are_named_as_in_tinyshakespeare():
    page = "## ACT I\n\n_Enter FRANCISCO._\n\n**BERNARDO**  \nWho's there?  \nNay.\n"
    assert name_speakers(page) == (
        "## ACT I\n\n_Enter FRANCISCO._\n\nBERNARDO:\nWho's there?\nNay.\n"
    )
