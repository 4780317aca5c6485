"""A tokenizer as the files of a Hugging Face folder: `AutoTokenizer` gives the same ids and text.

In: one of our tokenizers. Out: the content of tokenizer.json (for the `tokenizers` library: what
happens to a text, step by step), tokenizer_config.json, and for GPT-2's vocab.json and merges.txt.

One thing differs by that library's custom: a literal <|endoftext|> in a text becomes the token,
unless one asks for `split_special_tokens=True`.
"""

from collections.abc import Mapping
from typing import Any

from yuzogpt.errors import UserError
from yuzogpt.files import to_json
from yuzogpt.tokenizers import END_OF_TEXT, BytePairTokenizer, CharTokenizer, Tokenizer


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
    shown = characters_of_bytes()

    def show(token: bytes) -> str:
        return "".join(shown[byte] for byte in token)

    ordered = sorted(tokenizer.ranks.items(), key=lambda item: item[1])
    merges = [
        " ".join(show(part) for part in merged_from(token, tokenizer.ranks))
        for token, _ in ordered
        if len(token) > 1
    ]
    vocabulary = {show(token): rank for token, rank in ordered}
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
