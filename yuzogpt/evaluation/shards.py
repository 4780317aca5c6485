"""Shards of a benchmark: pieces that any process can score, each once, and whose scores are kept.

A shard carries its passages, so a worker needs nothing but the model. Its file's name depends on
what the scores derive from: the weights, the passages and this version of YuzoGPT. So a killed
command resumes, a command that asks for something else computes that, and older scores stay.
"""

import hashlib
import json
import math
from collections.abc import Sequence
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
from yuzogpt.evaluation.benchmarks.readers import Protocol
from yuzogpt.evaluation.passages import Passage, Score
from yuzogpt.storage.atomic_files import sha256, write_durably
from yuzogpt.storage.untrusted import DamagedFile, Untrusted, read_json

if TYPE_CHECKING:
    from yuzogpt.model.gpt import GPT
    from yuzogpt.runtime.device import Hardware

SHARDS = "shards"


@dataclass(frozen=True)
class ScoringJob:
    """One model on one task: what its scores derive from, and how they are computed."""

    model: str
    weights: str  # their SHA-256
    task: str
    protocol: Protocol
    shard_size: int  # passages
    batch_size: int
    device: DeviceSettings


class Scores(Untrusted):
    """The content of a shard's file."""

    fingerprint: str
    scores: list[Annotated[tuple[FiniteFloat, bool, bool], Field(strict=False)]]  # lists, in JSON


@dataclass(frozen=True)
class Shard:
    """Some of a job's passages."""

    job: ScoringJob
    number: int
    passages: Sequence[Passage]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what the scores derive from, which leaves out the machine and the batch size."""
        passages = [astuple(passage) for passage in self.passages]
        content = [__version__, self.job.weights, self.job.device.dtype, passages]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def path(self, directory: Path) -> Path:
        """Return the file of its scores."""
        folder = f"{self.job.task}-{self.job.protocol}"
        return directory / SHARDS / folder / f"{self.number:05}-{self.fingerprint[:16]}.json"

    def read(self, directory: Path) -> list[Score] | None:
        """Return its scores; None if the file is missing, damaged, or not of this shard."""
        try:
            stored = read_json(self.path(directory), Scores)
        except (FileNotFoundError, DamagedFile):  # it is computed again
            return None
        is_whole = len(stored.scores) == len(self.passages)
        if stored.fingerprint != self.fingerprint or not is_whole:
            return None
        return [Score(*values) for values in stored.scores]

    def write(self, directory: Path, scores: Sequence[Score]) -> None:
        path = self.path(directory)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [list(astuple(score)) for score in scores]
        content = {"fingerprint": self.fingerprint, "scores": rows}
        write_durably(path, (json.dumps(content) + "\n").encode())


def split_into_shards(job: ScoringJob, passages: Sequence[Passage]) -> list[Shard]:
    starts = range(0, len(passages), job.shard_size)
    return [
        Shard(job, number, passages[first : first + job.shard_size])
        for number, first in enumerate(starts)
    ]


def score_shard(shard: Shard) -> list[Score]:
    """Score a shard; this process keeps the model for the next one."""
    import torch

    from yuzogpt.evaluation.scoring import score

    job = shard.job
    model, hardware = load_scored_model(job.model, job.weights, job.device)
    try:
        scores = score(model, shard.passages, job.batch_size, hardware)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--batch_size={job.batch_size}: too much for {hardware.device} "
            f"({first_line(error)}); give a smaller one"
        ) from None
    if not all(math.isfinite(one.logprob) for one in scores):
        raise UserError(
            f"{job.model}: its log probabilities are not finite ({job.task}): the weights are "
            "damaged, or the training diverged"
        )
    return scores


@lru_cache(maxsize=1)
def load_scored_model(name: str, weights: str, device: DeviceSettings) -> "tuple[GPT, Hardware]":
    """Load a model; UserError if this machine has other weights under that name."""
    from yuzogpt.checkpoints.load import load_model
    from yuzogpt.runtime.device import choose_hardware
    from yuzogpt.runtime.world import World

    reference = resolve_model(name)
    if weights_hash(reference) != weights:
        raise UserError(f"{name}: not the same weights on every machine")
    hardware = choose_hardware(device, World())
    return load_model(reference).to(hardware.device), hardware


def weights_hash(reference: ModelReference) -> str:
    """Return the SHA-256 over all files that a model's weights are read from.

    For a checkpoint its manifest is enough: that has the hashes of the tensors.
    """
    if reference.checkpoint:
        return sha256(reference.checkpoint.directory / MANIFEST)
    folder = download(reference.name) if reference.name in PUBLISHED else Path(reference.name)
    files = [folder / CONFIG, *weight_files(folder)]
    return hashlib.sha256("".join(sha256(path) for path in files).encode()).hexdigest()


def missing_shards(directory: Path, shards: Sequence[Shard]) -> list[Shard]:
    return [shard for shard in shards if shard.read(directory) is None]
