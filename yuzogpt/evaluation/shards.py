"""A benchmark in pieces, each of which is computed once, by any process, and kept.

In: an exam, and the model that sits it. Out: scores, in order. A shard brings its passages along:
a worker needs nothing but the model. Its file is named after what it derives from, the weights, the
passages themselves and this version of YuzoGPT: a command that was killed goes on, one that asks
something else computes anew, and what was computed before stays.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, FiniteFloat

from yuzogpt import __version__
from yuzogpt.checkpoints.format import MANIFEST
from yuzogpt.checkpoints.pretrained import CONFIG, PUBLISHED, download, weight_files
from yuzogpt.checkpoints.resolve import ModelReference, resolve_model
from yuzogpt.config import DeviceSettings
from yuzogpt.errors import UserError, first_line
from yuzogpt.evaluation.benchmarks.tasks import Protocol
from yuzogpt.evaluation.passages import Passage, Score
from yuzogpt.storage.atomic_files import sha256, write_durably
from yuzogpt.storage.untrusted import DamagedFile, Untrusted, read_json

if TYPE_CHECKING:
    from yuzogpt.model.gpt import GPT
    from yuzogpt.runtime.device import Hardware

SHARDS = "shards"


@dataclass(frozen=True)
class ScoringJob:
    """A model that sits an exam: what its scores derive from, and how they are computed."""

    model: str
    weights: str  # the SHA-256 of
    task: str
    protocol: Protocol
    size: int  # of a shard
    batch_size: int
    device: DeviceSettings


class Scores(Untrusted):
    """What is in a shard's file."""

    fingerprint: str
    scores: list[Annotated[tuple[FiniteFloat, bool, bool], Field(strict=False)]]  # lists, in JSON


@dataclass(frozen=True)
class Shard:
    """Some of the passages of an exam."""

    sitting: ScoringJob
    number: int
    passages: Sequence[Passage]

    @cached_property
    def fingerprint(self) -> str:
        """What its scores derive from; not where they are computed, or in which batches."""
        asked = [astuple(passage) for passage in self.passages]
        known = [__version__, self.sitting.weights, self.sitting.device.dtype, asked]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def path(self, directory: Path) -> Path:
        """Return where its scores are kept."""
        folder = f"{self.sitting.task}-{self.sitting.protocol}"
        return directory / SHARDS / folder / f"{self.number:05}-{self.fingerprint[:16]}.json"

    def read(self, directory: Path) -> list[Score] | None:
        """Return its scores, if they are there, whole, and of this sitting."""
        try:
            found = read_json(self.path(directory), Scores)
        except (FileNotFoundError, DamagedFile):  # it is computed again
            return None
        is_whole = len(found.scores) == len(self.passages)
        if found.fingerprint != self.fingerprint or not is_whole:
            return None
        return [Score(*values) for values in found.scores]

    def write(self, directory: Path, scores: Sequence[Score]) -> None:
        """Keep its scores."""
        path = self.path(directory)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [list(astuple(score)) for score in scores]
        content = {"fingerprint": self.fingerprint, "scores": rows}
        write_durably(path, (json.dumps(content) + "\n").encode())


def shards_of(sitting: ScoringJob, passages: Sequence[Passage]) -> list[Shard]:
    """Cut the passages of an exam into shards."""
    starts = range(0, len(passages), sitting.size)
    return [
        Shard(sitting, number, passages[first : first + sitting.size])
        for number, first in enumerate(starts)
    ]


def compute(shard: Shard) -> list[Score]:
    """Score a shard; the model is kept for the next one in this process."""
    import torch

    from yuzogpt.evaluation.scoring import score

    sitting = shard.sitting
    model, hardware = loaded(sitting.model, sitting.weights, sitting.device)
    try:
        return score(model, shard.passages, sitting.batch_size, hardware)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--batch_size={sitting.batch_size}: too much for {hardware.device} "
            f"({first_line(error)}); give a smaller one"
        ) from None


@lru_cache(maxsize=1)
def loaded(name: str, weights: str, device: DeviceSettings) -> "tuple[GPT, Hardware]":
    """Load a model; UserError if this machine has another one of that name."""
    from yuzogpt.checkpoints.load import load_model
    from yuzogpt.runtime.device import choose_hardware
    from yuzogpt.runtime.world import World

    reference = resolve_model(name)
    if weights_hash(reference) != weights:
        raise UserError(f"{name}: not the same weights on every machine")
    hardware = choose_hardware(device, World())
    return load_model(reference).to(hardware.device), hardware


def weights_hash(reference: ModelReference) -> str:
    """Return what tells a model's weights from others: the SHA-256 of all that they are read from.

    A checkpoint's manifest has those of its tensors.
    """
    if reference.checkpoint:
        return sha256(reference.checkpoint.directory / MANIFEST)
    folder = download(reference.name) if reference.name in PUBLISHED else Path(reference.name)
    files = [folder / CONFIG, *weight_files(folder)]
    return hashlib.sha256("".join(sha256(path) for path in files).encode()).hexdigest()


def undone(directory: Path, shards: Sequence[Shard]) -> Iterator[Shard]:
    """Yield the shards that have no scores yet."""
    return (shard for shard in shards if shard.read(directory) is None)
