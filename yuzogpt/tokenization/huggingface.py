"""A tokenizer as the files of a Hugging Face folder: `AutoTokenizer` gives the same ids and text.

In: one of our tokenizers. Out: the content of tokenizer.json (for the `tokenizers` library: what
happens to a text, step by step), tokenizer_config.json, and for GPT-2's vocab.json and merges.txt.
And back, where a folder's tokenizer is of one of these two kinds.

One thing differs by that library's custom: a literal <|endoftext|> in a text becomes the token,
unless one asks for `split_special_tokens=True`.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yuzogpt.errors import UserError
from yuzogpt.storage.atomic_files import to_json
from yuzogpt.storage.untrusted import DamagedFile, Untrusted, read_file, read_json
from yuzogpt.tokenization.tokenizer import (
    END_OF_TEXT,
    BytePairTokenizer,
    CharTokenizer,
    Tokenizer,
    byte_pair_tokenizer,
)

TOKENIZER, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
# Of other kinds of tokenizers.
UNREADABLE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")


def files_of(tokenizer: Tokenizer, block_size: int) -> dict[str, bytes]:
    """Return the content of each file; `block_size`: the longest text, in tokens."""
    # Without the second one, decoding would take spaces away before commas and full stops.
    config: dict[str, Any] = {
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(tokenizer, BytePairTokenizer):
        return byte_pair_files(tokenizer, config)
    if isinstance(tokenizer, CharTokenizer):
        return char_files(tokenizer, config)
    raise UserError(f"a tokenizer of kind {tokenizer.kind!r} has no files in Hugging Face's format")


def byte_pair_files(tokenizer: BytePairTokenizer, config: dict[str, Any]) -> dict[str, bytes]:
    """Return the files of GPT-2's tokenizer: to characters that stand for bytes, then merges."""
    merges = merges_of(tokenizer)
    vocabulary = {shown_as(token): rank for token, rank in by_rank(tokenizer)}
    vocabulary[END_OF_TEXT] = tokenizer.end_of_text
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = {
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
        "decoder": byte_level,
        "added_tokens": [special(END_OF_TEXT, tokenizer.end_of_text)],
    }
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT)
    # A model goes on at the right end of each text, so shorter ones are filled up on the left.
    own = {"padding_side": "left", "add_prefix_space": False, **names}
    own["tokenizer_class"] = "GPT2Tokenizer"
    return {
        "vocab.json": to_json(vocabulary),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        "tokenizer.json": to_json({"version": "1.0", **steps}),
        "tokenizer_config.json": to_json({**config, **own}),
    }


def merges_of(tokenizer: BytePairTokenizer) -> list[str]:
    """Return the lines of merges.txt: the two tokens that each longer one is merged from."""
    return [
        " ".join(shown_as(part) for part in merged_from(token, tokenizer.ranks))
        for token, _ in by_rank(tokenizer)
        if len(token) > 1
    ]


def by_rank(tokenizer: BytePairTokenizer) -> list[tuple[bytes, int]]:
    """Return the tokens with their ids, in the order of these."""
    return sorted(tokenizer.ranks.items(), key=lambda item: item[1])


def shown_as(token: bytes) -> str:
    """Return the characters that stand for the bytes of a token."""
    shown = characters_of_bytes()
    return "".join(shown[byte] for byte in token)


def char_files(tokenizer: CharTokenizer, config: dict[str, Any]) -> dict[str, bytes]:
    """Return the files of a character tokenizer: each character is a word of its own.

    What is not in the alphabet is an error there, too: the vocabulary has no word for it.
    """
    each = {"Regex": r"[\s\S]"}
    steps = {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": each,
            "behavior": "Isolated",
            "invert": False,
        },
        "model": {"type": "WordLevel", "vocab": tokenizer.id_of, "unk_token": "no such character"},
        "decoder": {"type": "Fuse"},
        "added_tokens": [],
    }
    return {
        "tokenizer.json": to_json({"version": "1.0", **steps}),
        "tokenizer_config.json": to_json({**config, "tokenizer_class": "PreTrainedTokenizerFast"}),
    }


def special(content: str, index: int) -> dict[str, Any]:
    """Return what tokenizer.json says of a token that is no text."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, "special": True, **plain}


@functools.cache
def characters_of_bytes() -> dict[int, str]:
    """Return the character that stands for each byte in GPT-2's files (GPT-2's encoder.py).

    Itself, where it can be seen; the others get the characters from U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(256 + place) for place, byte in enumerate(hidden)
    }


def merged_from(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens that a token is merged from: the last step of encoding its bytes."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [parts[place] + parts[place + 1] for place in range(len(parts) - 1)]
        first = min(range(len(pairs)), key=lambda place: ranks.get(pairs[place], len(ranks)))
        parts[first : first + 2] = [pairs[first]]
    return parts[0], parts[1]


class TokenizerFile(Untrusted):
    """What tokenizer.json says, as far as it decides the ids of a text."""

    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    model: dict[str, Any]


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer that a Hugging Face folder brings; None if it brings none.

    UserError for one that is neither a byte-level BPE as GPT-2's nor one of our characters.
    """
    path = folder / TOKENIZER
    if path.exists():
        return from_tokenizer_json(path)
    path = folder / VOCABULARY
    if path.exists():
        vocabulary = read_json(path, dict[str, int])
        try:
            lines = read_file(folder / MERGES).decode("utf-8").split("\n")
        except (OSError, ValueError):
            raise DamagedFile(f"{folder / MERGES}: not readable; {VOCABULARY} needs it") from None
        first = 1 if lines[0].startswith("#version") else 0
        return from_merges(vocabulary, [line for line in lines[first:] if line], path)
    others = [name for name in UNREADABLE if (folder / name).exists()]
    if others:
        raise not_readable(folder / others[0], "of a kind that is not read here")
    return None


def has_tokenizer(folder: Path) -> bool:
    """Return whether a Hugging Face folder brings a tokenizer of any kind."""
    return any((folder / name).exists() for name in (TOKENIZER, VOCABULARY, *UNREADABLE))


def from_tokenizer_json(path: Path) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json, if its steps are those of one of ours."""
    content = read_json(path, TokenizerFile)
    model, steps = content.model, content.pre_tokenizer or {}
    vocabulary, kind = model.get("vocab"), model.get("type", "BPE")  # older files leave it out
    if content.normalizer is not None:
        raise not_readable(path, "it changes the text first (normalizer)")
    if not isinstance(vocabulary, dict) or not all(
        isinstance(index, int) and not isinstance(index, bool) for index in vocabulary.values()
    ):
        raise not_readable(path, f"its model is {kind!r:.40}, without a vocabulary of ids")
    if kind == "WordLevel" and steps.get("type") == "Split":
        return from_characters(vocabulary, steps, path)
    # `use_regex`: GPT-2's rule for cutting text into pieces; it is on where it is left out.
    is_byte_level = steps.get("type") == "ByteLevel" and steps.get("use_regex", True) is True
    merges = model.get("merges")
    if kind != "BPE" or not is_byte_level or not isinstance(merges, list):
        raise not_readable(path, f"{kind!r:.40} after {steps.get('type')!r:.40}")
    if steps.get("add_prefix_space") is not False:
        raise not_readable(path, "it puts a space before each text (add_prefix_space)")
    joined = [one if isinstance(one, str) else " ".join(map(str, one)) for one in merges]
    return from_merges(vocabulary, joined, path)


def from_characters(
    vocabulary: Mapping[str, int], steps: Mapping[str, Any], path: Path
) -> Tokenizer:
    """Return our tokenizer of characters, from the file that `char_files` makes."""
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    is_split = steps.get("pattern") == {"Regex": r"[\s\S]"} and steps.get("behavior") == "Isolated"
    is_counted = sorted(vocabulary.values()) == list(range(len(ordered)))
    if not is_split or not is_counted or any(len(one) != 1 for one in ordered):
        raise not_readable(path, "its words are no characters")
    return CharTokenizer("".join(ordered))


def from_merges(vocabulary: Mapping[str, int], merges: list[str], path: Path) -> Tokenizer:
    """Return a byte-level BPE, if ids follow merges as in GPT-2, with the end of text last."""
    bytes_of = {shown: byte for byte, shown in characters_of_bytes().items()}
    try:
        ranks = {
            bytes(bytes_of[one] for one in token): index
            for token, index in vocabulary.items()
            if token != END_OF_TEXT
        }
    except KeyError as error:
        raise not_readable(path, f"a token has the character {error.args[0]!r:.20}") from None
    if vocabulary.get(END_OF_TEXT) != len(vocabulary) - 1:
        raise not_readable(path, f"its last token is not {END_OF_TEXT}")
    tokenizer = byte_pair_tokenizer(ranks, str(path))
    # What tiktoken merges follows from the ids alone; the file must say the same.
    if merges_of(tokenizer) != merges:
        raise not_readable(path, "its merges are not in the order of its ids")
    return tokenizer


def not_readable(path: Path, reason: str) -> UserError:
    """Say that a folder brings a tokenizer that is not read here."""
    return UserError(
        f"{path}: this tokenizer is not read here: {reason}; only GPT-2's kind is (byte-level BPE "
        "with <|endoftext|> as its last token)"
    )
