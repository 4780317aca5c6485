"""manifest.json: the description of a prepared corpus, checked when it is read."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from yuzogpt.data.block_files import damaged
from yuzogpt.errors import UserError
from yuzogpt.storage.atomic_files import to_json
from yuzogpt.storage.untrusted import DamagedFile, Sha256, Untrusted, parse_json
from yuzogpt.tokenization.tokenizer import TokenizerFacts

FORMAT_VERSION = 1

# A manifest may be hostile: types are strict, and only file names that we write are accepted.
EXACTLY = ConfigDict(strict=True, extra="ignore")
Whole = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class Block:
    """A block file's entry in the manifest."""

    __pydantic_config__ = EXACTLY

    file: Annotated[str, Field(pattern=r"^(unit-\d{6,}-)?(train|val)-\d{3,}\.arrow$")]
    split: Annotated[str, Field(pattern=r"^(train|val)$")]
    documents: Whole
    tokens: Annotated[int, Field(ge=0, lt=2**31)]  # int32 offsets
    bytes: Whole
    sha256: Sha256


@dataclass(frozen=True)
class Manifest:
    """The description of a prepared corpus: everything but the tokens."""

    __pydantic_config__ = EXACTLY

    corpus: str
    tokenizer: TokenizerFacts
    source: dict[str, Any]
    split_rule: str
    append_end_of_text: bool
    blocks: list[Block]
    rejected: dict[str, Whole]
    format: int = FORMAT_VERSION

    def to_bytes(self) -> bytes:
        """Return the content of manifest.json."""
        return to_json(asdict(self))

    def tokens(self, split: str) -> int:
        return sum(block.tokens for block in self.blocks if block.split == split)


class Version(Untrusted):
    """The part that the manifests of all format versions share."""

    format: int


def parse_manifest(content: bytes, origin: str) -> Manifest:
    """Parse a manifest; UserError if it is of another version, or not a manifest."""
    try:
        version = parse_json(content, Version, origin).format
        if version != FORMAT_VERSION:
            raise UserError(f"{origin}: format {version}; this version reads {FORMAT_VERSION}")
        manifest = parse_json(content, Manifest, origin)
        for block in manifest.blocks:
            if not block.file.startswith(f"{block.split}-"):  # staged, or another split's
                raise DamagedFile(f"it has a block {block.file} of {block.split}")
        return manifest
    except DamagedFile as error:
        reason = str(error).removeprefix(f"{origin}: ")
        raise damaged(origin, f"not a manifest ({reason})") from None
