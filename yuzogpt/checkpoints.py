"""Checkpoints: one directory each, whole and verified, or not there. Knows no loop and no ranks.

In: tensors and the state of a run. Out: `out_dir/checkpoints/step-N/` with

    model.safetensors        the weights
    optimizer.safetensors    apart, so that a reader of weights never touches it
    tokenizer.json           so that sampling needs nothing else
    state.json               rows_seen, step, settings, dataset fingerprint, metrics
    manifest.json            the SHA-256 of each; written last

It is written under another name, synced, then renamed. The directory is the only truth: which
checkpoint is newest or best is read off what is there.
"""

import contextlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yuzogpt.errors import UserError
from yuzogpt.files import sha256, sync_directory, sync_file, to_json

if TYPE_CHECKING:  # torch takes seconds to import; errors of the user's are found before that
    from torch import Tensor

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
TOKENIZER = "tokenizer.json"
STATE = "state.json"
MANIFEST = "manifest.json"
FILES = (MODEL, OPTIMIZER, TOKENIZER, STATE)
WITHOUT_OPTIMIZER = (MODEL, TOKENIZER, STATE)  # all that a reader of weights needs
FORMAT_VERSION = 1


class CorruptCheckpoint(Exception):
    """A directory that looks like a checkpoint and is not a whole one."""


@dataclass(frozen=True)
class State:
    """What a run is, apart from its tensors."""

    step: int
    rows_seen: int
    settings: dict[str, Any]
    dataset: str
    tokenizer: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was verified."""

    directory: Path
    state: State

    def model(self) -> "dict[str, Tensor]":
        """Read the weights, on the CPU."""
        return read_tensors(self.directory / MODEL)

    def optimizer(self) -> "dict[str, Tensor]":
        """Read the optimizer's tensors, on the CPU, as `write` was given them."""
        return read_tensors(self.directory / OPTIMIZER)


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """Read a safetensors file."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def write(
    run: Path,
    state: State,
    model: "Mapping[str, Tensor]",
    optimizer: "Mapping[str, Tensor]",
    tokenizer: bytes,
) -> Checkpoint:
    """Write a checkpoint and read it back to verify it."""
    from safetensors.torch import save_file

    final = run / "checkpoints" / f"step-{state.step}"
    temporary = final.with_name(f".{final.name}.tmp")
    remove(temporary)
    temporary.mkdir(parents=True)
    save_file(dict(model), temporary / MODEL)
    save_file(dict(optimizer), temporary / OPTIMIZER)
    (temporary / TOKENIZER).write_bytes(tokenizer)
    (temporary / STATE).write_bytes(to_json(asdict(state)))
    for name in FILES:
        sync_file(temporary / name)
    hashes = {name: sha256(temporary / name) for name in FILES}
    manifest = {"format": FORMAT_VERSION, "files": hashes}
    (temporary / MANIFEST).write_bytes(to_json(manifest))
    sync_file(temporary / MANIFEST)
    sync_directory(temporary)
    remove(final)
    temporary.rename(final)
    sync_directory(final.parent)
    return verify(final)


def verify(directory: Path, names: tuple[str, ...] = FILES) -> Checkpoint:
    """Compare files with the manifest; CorruptCheckpoint says what is wrong.

    `names`: those that the reader needs. UserError for what another version wrote, or what may
    not be read: such a checkpoint is not corrupt.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT_VERSION:
            raise UserError(
                f"{directory}: format {manifest['format']}, written by another version of "
                f"YuzoGPT; this one reads {FORMAT_VERSION}"
            )
        for name in names:
            if sha256(directory / name) != manifest["files"][name]:
                raise CorruptCheckpoint(f"{name} does not have the SHA-256 of the manifest")
        return read(directory)
    except FileNotFoundError as error:
        raise CorruptCheckpoint(f"{Path(error.filename).name} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(f"unreadable: {error!r}") from None
    except OSError as error:
        raise UserError(f"{directory}: not readable: {error.strerror}") from None


def read(directory: Path) -> Checkpoint:
    """Read the state of a checkpoint that was verified already, by this process or another."""
    content = json.loads((directory / STATE).read_bytes())
    return Checkpoint(directory, State(**{name: content[name] for name in State.__annotations__}))


def newest(run: Path, on_corrupt: Callable[[Path, str], None]) -> Checkpoint | None:
    """Return the newest checkpoint that is whole; `on_corrupt` is told of each that is not."""
    for directory in reversed(candidates(run)):
        try:
            return verify(directory)
        except CorruptCheckpoint as error:
            on_corrupt(directory, str(error))
    return None


def best(run: Path, on_corrupt: Callable[[Path, str], None]) -> Checkpoint | None:
    """Return the checkpoint with the lowest validation loss whose weights are whole."""
    for directory in by_validation_loss(run):
        try:
            return verify(directory, WITHOUT_OPTIMIZER)
        except CorruptCheckpoint as error:
            on_corrupt(directory, str(error))
    return None


def find(reference: str) -> Checkpoint | None:
    """Return the checkpoint that a run directory (its best) or checkpoint directory means.

    None if it is neither; UserError if it holds checkpoints and none is whole.
    """
    directory = Path(reference)
    try:
        if (directory / STATE).exists() or (directory / MANIFEST).exists():
            return verify(directory, WITHOUT_OPTIMIZER)
    except CorruptCheckpoint as error:
        raise UserError(f"{directory}: corrupt checkpoint: {error}") from None
    broken: list[str] = []

    def tell(path: Path, reason: str) -> None:
        broken.append(f"{path.name}: {reason}")
        print(f"!!! checkpoint {path} is corrupt ({reason})", file=sys.stderr)

    found = best(directory, tell)
    if found is None and broken:
        raise UserError(f"{directory}: no checkpoint is whole: {'; '.join(broken)}")
    if found is None and (directory / "metrics.jsonl").exists():
        raise UserError(f"{directory}: this run has no checkpoint yet")
    return found


def candidates(run: Path) -> list[Path]:
    """Return the checkpoint directories of a run, oldest first, not yet verified."""
    found = (run / "checkpoints").glob("step-*")
    return sorted((path for path in found if step_of(path) >= 0), key=step_of)


def step_of(directory: Path) -> int:
    """Return the step of a checkpoint directory by its name, -1 if it has none."""
    with contextlib.suppress(ValueError):
        return int(directory.name.removeprefix("step-"))
    return -1


def by_validation_loss(run: Path) -> list[Path]:
    """Return the checkpoint directories of a run, the best first.

    Only estimates over as many windows as the newest one's compare; others come last, as do NaN
    and none at all. Among equals the newest is first.
    """
    newest_first = candidates(run)[::-1]
    metrics = [read_metrics(directory) for directory in newest_first]
    comparable = metrics[0].get("val_windows") if metrics else None

    def loss(index: int) -> float:
        found = metrics[index].get("val_loss_estimate", math.nan)
        same = metrics[index].get("val_windows") == comparable
        return found if same and not math.isnan(found) else math.inf

    return [newest_first[index] for index in sorted(range(len(metrics)), key=loss)]


def read_metrics(directory: Path) -> dict[str, float]:
    """Return the metrics of a checkpoint that may be broken: none, then."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((directory / STATE).read_bytes())["metrics"]
        return {str(name): float(value) for name, value in found.items()}
    return {}


def quarantine(directory: Path) -> Path:
    """Move a broken checkpoint aside, where nothing looks for checkpoints; nothing is deleted."""
    for attempt in range(1000):
        aside = directory.with_name(f"broken-{directory.name}-{attempt}")
        if not aside.exists():
            return directory.rename(aside)
    raise OSError(f"{directory}: too many broken checkpoints beside it")


def prune(run: Path, successor: Checkpoint) -> None:
    """Delete all checkpoints but `successor`, which was just verified, and the best one."""
    keep = {successor.directory, by_validation_loss(run)[0]}
    for directory in candidates(run):
        if directory not in keep:
            remove(directory)


def sweep(run: Path) -> None:
    """Delete what a killed writer left half done; only the holder of the run's lease may."""
    for leftover in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove(directory: Path) -> None:
    """Delete a directory so that half of it is never taken for a checkpoint."""
    if directory.exists():
        doomed = directory.with_name(f".{directory.name}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        directory.rename(doomed)
        shutil.rmtree(doomed)
