"""Tokenizers as files of a Hugging Face folder, in and out: `AutoTokenizer` gives the same ids.

Written are tokenizer.json (the steps of the `tokenizers` library), tokenizer_config.json, and for
GPT-2's kind vocab.json and merges.txt. Read are folders whose tokenizer is of one of our two kinds.

One thing differs, as is usual with that library: a literal <|endoftext|> in a text becomes the
token, unless `split_special_tokens=True` is given.
"""

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
    byte_characters,
    byte_pair_tokenizer,
)

TOKENIZER, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
# Files of other kinds of tokenizers, which are not read here.
OTHER_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")


def to_files(tokenizer: Tokenizer, block_size: int) -> dict[str, bytes]:
    """Return the content of each file; `block_size`: the longest text, in tokens."""
    # Without the second one, decoding would remove spaces before commas and full stops.
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
    """Return the files of GPT-2's tokenizer: bytes as printable characters, then merges."""
    merges = to_merges(tokenizer)
    vocabulary = {to_printable(token): rank for token, rank in by_rank(tokenizer)}
    vocabulary[END_OF_TEXT] = tokenizer.end_of_text
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = {
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
        "decoder": byte_level,
        "added_tokens": [special(END_OF_TEXT, tokenizer.end_of_text)],
    }
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT)
    # A model continues each text at its right end, so shorter texts are padded on the left.
    options = {"padding_side": "left", "add_prefix_space": False, **names}
    options["tokenizer_class"] = "GPT2Tokenizer"
    return {
        "vocab.json": to_json(vocabulary),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        "tokenizer.json": to_json({"version": "1.0", **steps}),
        "tokenizer_config.json": to_json({**config, **options}),
    }


def to_merges(tokenizer: BytePairTokenizer) -> list[str]:
    """Return the lines of merges.txt: the two tokens from which each longer one is merged."""
    return [
        " ".join(to_printable(part) for part in merged_from(token, tokenizer.ranks))
        for token, _ in by_rank(tokenizer)
        if len(token) > 1
    ]


def by_rank(tokenizer: BytePairTokenizer) -> list[tuple[bytes, int]]:
    """Return the tokens and their ids, ordered by id."""
    return sorted(tokenizer.ranks.items(), key=lambda item: item[1])


def to_printable(token: bytes) -> str:
    """Return a token with a printable character for each byte."""
    characters = byte_characters()
    return "".join(characters[byte] for byte in token)


def char_files(tokenizer: CharTokenizer, config: dict[str, Any]) -> dict[str, bytes]:
    """Return the files of a character tokenizer: each character is a word.

    A character that is not in the alphabet is an error there, too: the vocabulary has no such word.
    """
    any_character = {"Regex": r"[\s\S]"}
    steps = {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": any_character,
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
    """Return the entry of tokenizer.json for a special token."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, "special": True, **plain}


def merged_from(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens that merge into a token in the last step of encoding its bytes."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [parts[index] + parts[index + 1] for index in range(len(parts) - 1)]
        first = min(range(len(pairs)), key=lambda index: ranks.get(pairs[index], len(ranks)))
        parts[first : first + 2] = [pairs[first]]
    return parts[0], parts[1]


class TokenizerFile(Untrusted):
    """The parts of tokenizer.json that decide the ids of a text."""

    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    model: dict[str, Any]


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer of a Hugging Face folder; None if it has none.

    UserError for one that is neither a byte-level BPE like GPT-2's nor one of our char tokenizers.
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
    others = [name for name in OTHER_FILES if (folder / name).exists()]
    if others:
        raise not_readable(folder / others[0], "of a kind that is not read here")
    return None


def has_tokenizer(folder: Path) -> bool:
    """Return whether a Hugging Face folder has a tokenizer of any kind."""
    return any((folder / name).exists() for name in (TOKENIZER, VOCABULARY, *OTHER_FILES))


def from_tokenizer_json(path: Path) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json; UserError if its steps are not those of ours."""
    content = read_json(path, TokenizerFile)
    model, steps = content.model, content.pre_tokenizer or {}
    vocabulary, kind = model.get("vocab"), model.get("type", "BPE")  # older files omit it
    if content.normalizer is not None:
        raise not_readable(path, "it changes the text first (normalizer)")
    if not isinstance(vocabulary, dict) or not all(
        isinstance(index, int) and not isinstance(index, bool) for index in vocabulary.values()
    ):
        raise not_readable(path, f"its model is {kind!r:.40}, without a vocabulary of ids")
    if kind == "WordLevel" and steps.get("type") == "Split":
        return from_characters(vocabulary, steps, path)
    # `use_regex`: GPT-2's rule for cutting text into pieces; on by default.
    is_byte_level = steps.get("type") == "ByteLevel" and steps.get("use_regex", True) is True
    merges = model.get("merges")
    if kind != "BPE" or not is_byte_level or not isinstance(merges, list):
        raise not_readable(path, f"{kind!r:.40} after {steps.get('type')!r:.40}")
    if steps.get("add_prefix_space") is not False:
        raise not_readable(path, "it puts a space before each text (add_prefix_space)")
    lines = [pair if isinstance(pair, str) else " ".join(map(str, pair)) for pair in merges]
    return from_merges(vocabulary, lines, path)


def from_characters(
    vocabulary: Mapping[str, int], steps: Mapping[str, Any], path: Path
) -> Tokenizer:
    """Return our char tokenizer, from a file as `char_files` makes it."""
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    is_split = steps.get("pattern") == {"Regex": r"[\s\S]"} and steps.get("behavior") == "Isolated"
    are_ids_complete = sorted(vocabulary.values()) == list(range(len(ordered)))
    if not is_split or not are_ids_complete or any(len(word) != 1 for word in ordered):
        raise not_readable(path, "its words are not single characters")
    return CharTokenizer("".join(ordered))


def from_merges(vocabulary: Mapping[str, int], merges: list[str], path: Path) -> Tokenizer:
    """Return a byte-level BPE; UserError unless ids follow merges and the end of text is last."""
    bytes_by_character = {character: byte for byte, character in byte_characters().items()}
    try:
        ranks = {
            bytes(bytes_by_character[character] for character in token): index
            for token, index in vocabulary.items()
            if token != END_OF_TEXT
        }
    except KeyError as error:
        raise not_readable(path, f"a token has the character {error.args[0]!r:.20}") from None
    if vocabulary.get(END_OF_TEXT) != len(vocabulary) - 1:
        raise not_readable(path, f"its last token is not {END_OF_TEXT}")
    tokenizer = byte_pair_tokenizer(ranks, str(path))
    # tiktoken derives merges from the ids alone; those of the file must be the same.
    if to_merges(tokenizer) != merges:
        raise not_readable(path, "its merges are not in the order of its ids")
    return tokenizer


def not_readable(path: Path, reason: str) -> UserError:
    """Return the error for a tokenizer that is not read here."""
    return UserError(
        f"{path}: this tokenizer is not read here: {reason}; only GPT-2's kind is (byte-level BPE "
        "with <|endoftext|> as its last token)"
    )
