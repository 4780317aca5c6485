"""Checkpoints: one directory each, whole and verified, or not there. Knows no loop and no ranks.

In: tensors and the state of a run. Out: `out_dir/checkpoints/step-N/` with

    model.safetensors        the weights; written by several ranks: model-0000k-of-0000n.safetensors
                             and model.safetensors.index.json, as Hugging Face names them
    optimizer.safetensors    likewise; apart, so that a reader of weights never touches it, and gone
                             where resuming does not need it
    tokenizer.json           so that sampling needs nothing else
    state.json               rows_seen, step, settings, dataset fingerprint, metrics
    manifest.json            the SHA-256 of each; written last. And what was found out later: the
                             validation loss

Tensors are whole in every file, so a checkpoint does not depend on how many ranks wrote it. It is
written under another name, synced, verified, then renamed. The directory is the only truth: which
checkpoint is newest or best is read off what is there. remote.py: the same in an object
store.
"""

import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, Field

from yuzogpt.checkpoints.safetensors_file import read_tensors, write_tensors
from yuzogpt.config.renamed import with_current_names
from yuzogpt.errors import UserError
from yuzogpt.storage import mirrors
from yuzogpt.storage.atomic_files import sha256, sync_directory, sync_file, to_json, write_durably
from yuzogpt.storage.untrusted import DamagedFile, Sha256, Untrusted, read_json

if TYPE_CHECKING:  # torch takes seconds to import; errors of the user's are found before that
    from torch import Tensor

MODEL, OPTIMIZER = "model", "optimizer"  # the two kinds of tensor files
TOKENIZER = "tokenizer.json"
STATE = "state.json"
MANIFEST = "manifest.json"
METRICS = "metrics"  # in the manifest: what was found out after the checkpoint was written
FORMAT_VERSION = 2
READABLE = (1, 2)  # 1 had no files of several ranks


Setting = TypeVar("Setting", str, int)

# The names that we write. A manifest of somebody else's may hold any; others are not opened.
FileName = Annotated[
    str,
    Field(
        pattern=r"^((model|optimizer)(-\d{5,}-of-\d{5,})?\.safetensors(\.index\.json)?"
        r"|tokenizer\.json|state\.json)$"
    ),
]
Whole = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[int, Field(gt=-(2**63), lt=2**63)] | float


class CorruptCheckpoint(Exception):
    """A directory that looks like a checkpoint and is not a whole one."""


class Manifest(Untrusted):
    """What manifest.json says."""

    format: int
    files: dict[FileName, Sha256]
    metrics: dict[str, Number] = Field(default_factory=dict)  # found out later


@dataclass(frozen=True)
class State:
    """What a run is, apart from its tensors."""

    __pydantic_config__ = ConfigDict(strict=True, extra="ignore")

    step: Whole
    rows_seen: Whole
    settings: Annotated[dict[str, dict[str, Any]], AfterValidator(with_current_names)]
    dataset: str
    tokenizer: str
    metrics: dict[str, Number]
    guard: dict[str, Number] = field(default_factory=dict)  # what the guards remember of the losses
    batch: dict[str, Number] = field(default_factory=dict)  # what its schedule has measured


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was verified."""

    directory: Path
    state: State

    def tensors(self, kind: str) -> "Iterator[tuple[str, Tensor]]":
        """Yield the tensors of MODEL or OPTIMIZER with their names, whole, memory-mapped."""
        for name in sorted(read_manifest(self.directory).files):
            if name.startswith(kind) and name.endswith(".safetensors"):
                yield from read_tensors(self.directory / name)

    def setting(self, section: str, leaf: str, kind: type[Setting]) -> Setting:
        """Return one of the settings that the run had; UserError if its state has none such."""
        value = self.state.settings.get(section, {}).get(leaf)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(
                f"{self.directory / STATE}: settings.{section}.{leaf}: not a {kind.__name__}"
            )
        return value


def tensor_file(kind: str, part: int, parts: int) -> str:
    """Return the name of the file that holds part `part` (from 0) of the tensors of a kind."""
    number = "" if parts == 1 else f"-{part + 1:05}-of-{parts:05}"
    return f"{kind}{number}.safetensors"


def write(
    run: Path,
    state: State,
    model: "Mapping[str, Tensor]",
    optimizer: "Mapping[str, Tensor]",
    tokenizer: bytes,
) -> Checkpoint:
    """Write a checkpoint, all of it in this process, and read it back to verify it."""
    temporary = begin(run, state.step)
    hashes, places = {}, {}
    for kind, tensors in ((MODEL, model), (OPTIMIZER, optimizer)):
        name = tensor_file(kind, 0, 1)
        hashes[name] = write_tensors(temporary / name, tensors, tensors.values())
        places[name] = list(tensors)
    return commit(temporary, state, tokenizer, hashes, places)


def begin(run: Path, step: int) -> Path:
    """Return a new directory for the tensor files of a checkpoint; `commit` gives it its name."""
    temporary = run / "checkpoints" / f".step-{step}.{uuid.uuid4().hex}.tmp"
    temporary.mkdir(parents=True)
    return temporary


def commit(
    temporary: Path,
    state: State,
    tokenizer: bytes,
    hashes: Mapping[str, str],
    places: Mapping[str, list[str]],
) -> Checkpoint:
    """Make a checkpoint of the tensor files in `temporary`: add the rest, verify, rename.

    The files are synced. `hashes`: their SHA-256; `places`: the tensors in each. CorruptCheckpoint
    if the disk gives other bytes back: nothing has the checkpoint's name then.
    """
    small = {TOKENIZER: tokenizer, STATE: to_json(asdict(state)), **indices(places)}
    for name, content in small.items():
        (temporary / name).write_bytes(content)
        sync_file(temporary / name)
    hashes = {**hashes, **{name: sha256(temporary / name) for name in small}}
    manifest = {"format": FORMAT_VERSION, "files": hashes}
    (temporary / MANIFEST).write_bytes(to_json(manifest))
    sync_file(temporary / MANIFEST)
    sync_directory(temporary)
    written = verify(temporary, head_only=mirrors.uri_of(temporary) is not None)
    final = temporary.with_name(f"step-{state.step}")
    remove(final)
    temporary.rename(final)
    sync_directory(final.parent)
    return replace(written, directory=final)


def indices(places: Mapping[str, list[str]]) -> dict[str, bytes]:
    """Return the index files: for each kind in several files, which tensor is in which."""
    found = {}
    for kind in (MODEL, OPTIMIZER):
        files = [name for name in places if name.startswith(f"{kind}-")]
        if files:
            weight_map = {tensor: name for name in files for tensor in places[name]}
            content = {"metadata": {}, "weight_map": weight_map}
            found[f"{kind}.safetensors.index.json"] = to_json(content)
    return found


def verify(directory: Path, *, optimizer: bool = True, head_only: bool = False) -> Checkpoint:
    """Compare files with the manifest; CorruptCheckpoint says what is wrong.

    `optimizer`: whether the reader needs its tensors; `head_only`: the state alone. A mirror gets
    from its store what it lacks. UserError for what another version wrote, or what may not be read:
    such a checkpoint is not corrupt.
    """
    try:
        manifest = read_manifest(directory)
        if manifest.format not in READABLE:
            raise UserError(
                f"{directory}: format {manifest.format}, written by another version of "
                f"YuzoGPT; this one reads {', '.join(map(str, READABLE))}"
            )
        if STATE not in manifest.files:
            raise CorruptCheckpoint(f"{MANIFEST} does not name {STATE}")
        for name, expected in manifest.files.items():
            if (name.startswith(OPTIMIZER) and not optimizer) or (head_only and name != STATE):
                continue
            if not is_whole(directory / name, expected):
                raise CorruptCheckpoint(f"{name} does not have the SHA-256 of the manifest")
        return read(directory)
    except FileNotFoundError as error:
        raise CorruptCheckpoint(f"{Path(error.filename).name} is missing") from None
    except DamagedFile as error:
        raise CorruptCheckpoint(str(error).removeprefix(f"{directory}/")) from None
    except OSError as error:
        if mirrors.uri_of(directory):  # it may be within reach again soon
            raise
        raise UserError(f"{directory}: not readable: {error.strerror}") from None


def is_whole(path: Path, expected: str) -> bool:
    """Compare a file with its SHA-256; a copy that is missing, or another, is fetched anew."""
    if not path.exists():
        mirrors.pull(path)
    return sha256(path) == expected or (mirrors.pull(path) and sha256(path) == expected)


def read(directory: Path) -> Checkpoint:
    """Read the state of a checkpoint that was verified already, by this process or another."""
    state = read_json(directory / STATE, State)
    metrics = {**state.metrics, **read_manifest(directory).metrics}
    return Checkpoint(directory, replace(state, metrics=metrics))


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of a checkpoint; DamagedFile if it is none of ours."""
    return read_json(directory / MANIFEST, Manifest)


def add_metrics(directory: Path, metrics: Mapping[str, float]) -> None:
    """Keep with a checkpoint what was found out later: in its manifest, which is one file."""
    manifest = read_manifest(directory)
    rewrite_manifest(directory, manifest.model_copy(update={METRICS: dict(metrics)}))


def rewrite_manifest(directory: Path, manifest: Manifest) -> None:
    """Replace the manifest of a checkpoint, here and in its store."""
    write_durably(directory / MANIFEST, to_json(manifest.model_dump(exclude_unset=True)))
    mirrors.push(directory / MANIFEST)


def remove(directory: Path) -> None:
    """Delete a directory so that half of it is never taken for a checkpoint."""
    if directory.exists():
        doomed = directory.with_name(f".{directory.name}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        directory.rename(doomed)
        shutil.rmtree(doomed)
