"""Pieces of text: together the whole text, whole characters only, nothing of a stop string."""

import random

import pytest

from yuzogpt.inference.detokenize import TextStream
from yuzogpt.tokenization.tokenizer import CharTokenizer, gpt2_tokenizer

TEXT = "naïve 日本語 🍋‍🟩 family 👨‍👩‍👧 Ünï — done"


@pytest.fixture(scope="module")
def gpt2():
    return gpt2_tokenizer()


def pieces(tokenizer, ids, stops=()):
    stream = TextStream(tokenizer, stops)
    texts = []
    for token in ids:
        texts.append(stream.push(int(token)))
        if stream.stopped:
            return texts
    return [*texts, stream.flush()]


def test_pieces_are_the_whole_text(gpt2):
    ids = gpt2.encode(TEXT)
    assert any("\ufffd" in gpt2.decode([token]) for token in ids)  # characters are cut
    texts = pieces(gpt2, ids)
    assert "".join(texts) == TEXT
    assert not any("\ufffd" in piece for piece in texts)


def test_bytes_that_are_no_text_are_shown_as_such(gpt2):
    chance = random.Random(1)
    for _ in range(200):
        ids = [chance.randrange(gpt2.vocab_size) for _ in range(chance.randint(1, 12))]
        assert "".join(pieces(gpt2, ids)) == gpt2.decode(ids)


@pytest.mark.parametrize("stop", ["語", "日本", " family", "ly 👨", "e 日本語 🍋", "done", "n"])
def test_a_stop_string_across_tokens_is_never_seen(gpt2, stop):
    texts = pieces(gpt2, gpt2.encode(TEXT), ["never there", stop])
    assert "".join(texts) == TEXT[: TEXT.index(stop)]


def test_what_began_like_a_stop_string_comes_later():
    tokenizer = CharTokenizer("abcx")
    stream = TextStream(tokenizer, ["abab", "xx"])
    assert [stream.push(token) for token in tokenizer.encode("abacabx")] == [
        "", "", "", "abac", "", "", "ab",
    ]  # fmt: skip
    assert stream.flush() == "x"
    assert not stream.stopped


def test_where_tokens_end_does_not_matter():
    chance = random.Random(2)
    tokenizer = CharTokenizer("ab")

    class Words(CharTokenizer):  # the same text in longer tokens
        def token_bytes(self, token):
            return ["a", "b", "ab", "bb", "abab", "baa"][token].encode()

    words = Words("ab")
    for _ in range(500):
        ids = [chance.randrange(6) for _ in range(8)]
        text = "".join(words.token_bytes(token).decode() for token in ids)
        stops = ["".join(chance.choices("ab", k=chance.randint(1, 5))) for _ in range(2)]
        whole = "".join(pieces(words, ids, stops))
        assert whole == "".join(pieces(tokenizer, tokenizer.encode(text), stops))
        assert not any(stop in whole for stop in stops)
        assert text.startswith(whole)
